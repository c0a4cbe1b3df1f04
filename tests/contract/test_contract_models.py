"""The contract of every model, bundled or stored: verbs run and change nothing, saved is loaded, dtype and device are
kept, files and model hold the same numbers. A new family is taken up from the registry."""

from collections.abc import Iterator
from types import GeneratorType

import pytest
import torch
from helpers.toys import picture
from PIL import Image
from safetensors.torch import load_file, save_file
from walk import GOLDENS, MODELS, loaded, numbers, source, stored_keys, verbs

import unimm
from unimm import Generation, TextSampling
from unimm.checkpoint.load import CheckpointError

SHORT = TextSampling(max_tokens=2)
CONVERSATION = [
    {"role": "user", "content": "what is it", "images": [picture()]},
    {"role": "assistant", "content": "a picture"},
    {"role": "user", "content": "which"},
]


def draws(model, prompt, **options) -> Generation:
    """Generated in one step, where a model has steps."""
    return model.generate(prompt, **options, **model.supported_options(steps=1 if model.supports_steps else None))


# a call of each verb, and what it returns
VERBS = {
    "generate": (lambda model: draws(model, "a red circle", seed=1), Generation),
    "understand": (lambda model: model.understand(picture(), "what is it", text_sampling=SHORT), str),
    "chat": (lambda model: model.chat(CONVERSATION, text_sampling=SHORT), str),
    "interleave": (
        lambda model: model.interleave(["a", picture()], outputs=("text", "image"), steps=1, text_sampling=SHORT),
        GeneratorType,
    ),
    "extend": (
        lambda model: model.extend("a red circle", images=picture(), directions="right", seed=1, steps=1),
        Generation,
    ),
    "respond": (lambda model: model.respond("draw a red circle", steps=1, text_sampling=SHORT), (str, Generation)),
}
MORE = {
    "generate": lambda model: draws(model, ["a", "b c"], images=[picture(), None], seed=[1, 2]),
    "understand": lambda model: model.understand(
        [[picture(), picture(20, 44, 1)], None], ["what differs", "who"], text_sampling=SHORT
    ),
    "chat": lambda model: model.chat([CONVERSATION, CONVERSATION[:1]], text_sampling=SHORT),
}
# what stored cases cannot do, for want of a part that they were made without; the error says which
NO_TOKENIZER = "no tokenizer"
LACKS = {
    "bagel/dev": dict.fromkeys(("generate", "understand", "interleave"), NO_TOKENIZER),
    "janus/dev": dict.fromkeys(("generate", "understand", "chat"), NO_TOKENIZER),
    "janus/flow_dev": dict.fromkeys(("generate", "understand", "chat"), NO_TOKENIZER),
    "metaquery/dev": dict.fromkeys(("understand", "chat"), "no language head"),
    "uniworld/dev": dict.fromkeys(("generate", "respond"), "without its VAE"),
}

# families that inherit FLOAT32 and have nothing of it, and why
ALL_CAST = {"MetaQuery": "its autoencoder is no KL autoencoder, and lies in the one file with all the rest"}

each_model = pytest.mark.parametrize("name", MODELS)


def state_of(model) -> dict[str, torch.Tensor]:
    """A copy of what a verb must not change: every parameter and buffer."""
    return {name: x.clone() for name, x in (*model.named_parameters(), *model.named_buffers())}


def changed(model, before: dict[str, torch.Tensor]) -> list[str]:
    """What is not as it was: its numbers, its dtype, its device; the mode."""
    now = dict((*model.named_parameters(), *model.named_buffers()))
    assert now.keys() == before.keys()
    kept = {name for name, x in now.items() if (x.dtype, x.device) == (before[name].dtype, before[name].device)}
    odd = [name for name, x in now.items() if name not in kept or not torch.equal(x, before[name])]
    modes = {"training": model.training, "gradients": any(p.grad is not None for p in model.parameters())}
    return [*odd, *(name for name, is_so in modes.items() if is_so)]


def listed(result):
    """A result with its pieces, where they come one by one."""
    return list(result) if isinstance(result, Iterator) else result


@each_model
def test_every_verb_runs_and_changes_nothing(name):
    model = loaded(name)
    before = state_of(model)
    for verb in verbs(name):
        call, kind = VERBS[verb]
        if (lack := LACKS.get(name, {}).get(verb)) is not None:
            with pytest.raises(ValueError, match=lack):
                listed(call(model))
            continue
        result = call(model)
        assert isinstance(result, kind), verb
        pieces = listed(result)
        images = (
            pieces.images if isinstance(pieces, Generation) else [one for one in pieces if isinstance(one, Image.Image)]
        )
        assert all(image.mode == "RGB" for image in images) and (images or isinstance(pieces, str))
        if verb in MORE:
            several = MORE[verb](model)
            assert len(several.images if isinstance(several, Generation) else several) == 2
    assert not changed(model, before)
    assert not [verb for verb in set(VERBS) - set(verbs(name)) if hasattr(model, verb)]


def test_what_is_lacking_is_of_stored_cases():
    assert set(LACKS) <= set(GOLDENS), "a bundled model has all of its parts"


@each_model
def test_saved_is_loaded(name, tmp_path):
    model = loaded(name)
    model.save_pretrained(tmp_path / "first")
    again = type(model).from_pretrained(tmp_path / "first")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and again.config == model.config and not again.training
    assert all(torch.equal(x, theirs[key]) and x.dtype == theirs[key].dtype for key, x in ours.items())
    again.save_pretrained(tmp_path / "second")
    files = {path.relative_to(tmp_path / "first"): path for path in (tmp_path / "first").rglob("*") if path.is_file()}
    assert files.keys() == {p.relative_to(tmp_path / "second") for p in (tmp_path / "second").rglob("*") if p.is_file()}
    assert all(path.read_bytes() == (tmp_path / "second" / at).read_bytes() for at, path in files.items())
    # what is saved is the model, number by number: nothing is left out, nothing added, nothing twice
    saved = {
        f"{at}:{key}": x
        for at, path in files.items()
        if path.suffix == ".safetensors"
        for key, x in load_file(path).items()
    }
    assert torch.equal(numbers(saved), numbers(ours))


@each_model
def test_key_tables_are_used_up(name, tmp_path):
    """Strictly: a key too many and a key too few are refused in every file, and every parameter comes from one."""
    model = loaded(name)
    model.save_pretrained(tmp_path / "model")
    for path in sorted((tmp_path / "model").rglob("*.safetensors")):
        whole = load_file(path)
        last = max(whole, key=len)
        for broken in (whole | {"no.such.key": torch.zeros(1)}, {key: x for key, x in whole.items() if key != last}):
            save_file(broken, path)
            with pytest.raises(CheckpointError, match=r"no.such.key|missing keys|entries of the key map"):
                type(model).from_pretrained(tmp_path / "model")
        save_file(whole, path)
    type(model).from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", GOLDENS)
def test_a_released_layout_is_written_as_it_was_read(name, tmp_path):
    """The same keys, shapes and numbers as in the stored files; a file may hold keys that nothing reads."""
    model = loaded(name)
    model.save_pretrained(tmp_path / "model")
    released = {path.name: path for path in source(name).glob("*.safetensors") if path.name != "io.safetensors"}
    assert released
    for file, path in released.items():
        before, after = load_file(path), load_file(tmp_path / "model" / file)
        assert stored_keys(tmp_path / "model" / file) and after.keys() <= before.keys(), file
        assert all(torch.equal(x, before[key].to(x.dtype)) for key, x in after.items())


def kinds(model) -> dict[str, torch.dtype]:
    """The dtype of every tensor with a fraction."""
    return {name: x.dtype for name, x in model.state_dict().items() if x.is_floating_point()}


@each_model
def test_dtypes_are_kept(name, tmp_path):
    """bfloat16 is bfloat16, but for what says that it stays in float32, through every verb and in the files."""
    assert set(kinds(loaded(name)).values()) == {torch.float32}
    half = unimm.load(source(name), dtype="bfloat16")
    wide = {key for key in kinds(half) if key.startswith(half.KEEP_FLOAT32) and type(half).__name__ not in ALL_CAST}
    assert {key: dtype for key, dtype in kinds(half).items() if dtype != torch.bfloat16} == dict.fromkeys(
        wide, torch.float32
    )
    before = state_of(half)
    for verb in verbs(name):
        if verb not in LACKS.get(name, {}):
            listed(VERBS[verb][0](half))
    assert not changed(half, before)
    half.save_pretrained(tmp_path / "half")
    files = [load_file(path) for path in (tmp_path / "half").rglob("*.safetensors")]
    written = sum(x.numel() for file in files for x in file.values() if x.dtype == torch.float32)
    assert written == sum(half.state_dict()[key].numel() for key in wide)
    again = unimm.load(tmp_path / "half", dtype="bfloat16").state_dict()
    assert all(torch.equal(x, again[key]) for key, x in half.state_dict().items())


@each_model
def test_the_device_is_the_one_that_was_asked_for(name):
    """Not torch's default, which another library may have set."""
    with torch.device("meta"):
        model = unimm.load(source(name), device="cpu")
    assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"cpu"} == {model.device.type}
    ours = model.state_dict()
    assert all(torch.equal(x, ours[key]) for key, x in loaded(name).state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_model
def test_every_verb_runs_where_the_model_is(name):
    model = unimm.load(source(name), device="cuda")
    before = state_of(model)
    for verb in verbs(name):
        if verb not in LACKS.get(name, {}):
            listed(VERBS[verb][0](model))
    assert not changed(model, before) and {x.device.type for x in model.state_dict().values()} == {"cuda"}
