"""Calls that nobody planned and somebody makes: copies, odd types, other defaults of torch, folders that were used
before."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cases import GOLDEN
from helpers.toys import picture, toy
from helpers.uniworld_toys import uniworld
from PIL import Image

import unimm
from unimm import Guidance, Janus, MetaQuery, TextSampling
from unimm.models.uniworld.model import UniWorld
from unimm.processing.images.io import load_image
from unimm.sequence.packing import pack_sequences

TYPED = "say <|im_end|> please"


@pytest.fixture(scope="module")
def bagel():
    return toy(0)


@pytest.fixture(scope="module")
def janus():
    return unimm.load("janus-nano")


def pixels(generation) -> np.ndarray:
    return np.stack([np.asarray(image) for image in generation.images]).astype(int)


# ---- copies


def pickled(x):
    return pickle.loads(pickle.dumps(x))  # noqa: S301 - our own bytes


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copied_tokenizer_still_takes_typed_special_tokens_for_text(copied):
    model = UniWorld.from_pretrained(GOLDEN / "uniworld" / "dev")
    tokenizer, token_id = model.mllm.tokenizer, model.mllm.tokenizer.token_id("<|im_end|>")
    assert token_id is not None and token_id not in tokenizer.encode(TYPED)
    assert copied(tokenizer).encode(TYPED) == tokenizer.encode(TYPED)
    clip = uniworld().auxiliary.clip_tokenizer
    assert copied(clip)(["a <|endoftext|> bird"]).tolist() == clip(["a <|endoftext|> bird"]).tolist()


def test_a_prepared_model_reads_the_same_prompt():
    model = UniWorld.from_pretrained(GOLDEN / "uniworld" / "dev")
    reader, ready = model.mllm, model.mllm.optimize_for_cpu()
    asked = [{"role": "user", "content": TYPED}]
    assert torch.equal(*(one.processor.conversation_parts(asked)[-1].ids for one in (reader, ready)))


@pytest.mark.parametrize("name", ["bagel-nano", "janus-nano", "janusflow-nano", "metaquery-nano", "uniworld-nano"])
def test_models_are_pickled(name):
    model = unimm.load(name)
    again = pickled(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_model_is_saved_when_its_folder_is_gone(tmp_path, monkeypatch):
    source = tmp_path / "source"
    UniWorld.from_pretrained(GOLDEN / "uniworld" / "dev").save_pretrained(source)
    monkeypatch.chdir(tmp_path)
    model = UniWorld.from_pretrained("./source")
    source.rename(tmp_path / "elsewhere")
    model.save_pretrained(tmp_path / "again")
    assert UniWorld.from_pretrained(tmp_path / "again").mllm.tokenizer.encode(TYPED) == model.mllm.tokenizer.encode(
        TYPED
    )


# ---- folders


def test_a_folder_with_the_name_of_a_bundled_model(tmp_path, monkeypatch, janus, caplog):
    changed = copy.deepcopy(janus)
    torch.nn.init.zeros_(changed.decoder.embed.weight)
    changed.save_pretrained(tmp_path / "janus-nano")
    monkeypatch.chdir(tmp_path)
    for name in ("./janus-nano", Path("janus-nano"), tmp_path / "janus-nano"):
        assert not unimm.load(name).decoder.embed.weight.any(), name
        assert not Janus.from_pretrained(name).decoder.embed.weight.any(), name
    unimm.checkpoint.hub.warn_shadowed_folder.cache_clear()
    assert unimm.load("janus-nano").decoder.embed.weight.any()
    assert caplog.messages == ["janus-nano is the bundled model: for the folder of that name write ./janus-nano"]


def test_a_family_is_loaded_by_its_name(monkeypatch):
    asked = []
    folder = unimm.checkpoint.hub.resolve("uniworld-nano")
    monkeypatch.setattr(unimm.checkpoint.hub, "resolve", lambda name, **options: asked.append(name) or folder)
    monkeypatch.setattr(UniWorld, "from_pretrained", lambda name, **options: (name, options["revision"]))
    assert unimm.load("somebody/UniWorld", revision="v2") == ("somebody/UniWorld", "v2")
    assert asked == ["somebody/UniWorld"]


def test_saving_over_another_model(tmp_path, janus):
    (tmp_path / "README.md").write_text("mine")
    janus.save_pretrained(tmp_path)
    janus.save_pretrained(tmp_path / "step 100")
    (tmp_path / "step 100" / "tokenizer.json").write_text("{}")  # nobody's business
    janus.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    before = (tmp_path / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"holds tokenizer.json of another model.*save into another folder"):
        janus.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").stat().st_mtime_ns == before
    assert not [path for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}-")]


def test_a_home_folder(tmp_path, monkeypatch, janus):
    monkeypatch.setenv("HOME", str(tmp_path))
    janus.save_pretrained("~/kept")
    assert (tmp_path / "kept" / "config.json").exists() and unimm.load("~/kept").config == janus.config


def test_another_family_is_named():
    for family, name in ((unimm.Bagel, "janus-nano"), (Janus, "uniworld-nano"), (MetaQuery, "bagel-nano")):
        other = type(unimm.load(name)).__name__
        with pytest.raises(ValueError, match=rf"holds a {other}: load it with unimm\.{other}"):
            family.from_pretrained(name)


# ---- numbers and sequences of other kinds


THREE = [np.int64(3), torch.tensor(3), [3], np.array([3]), torch.tensor([3]), (np.int64(3),)]


@pytest.mark.parametrize("seed", THREE, ids=repr)
def test_whole_numbers_are_seeds(janus, seed):
    assert (pixels(janus.generate(["a red circle"], seed=seed)) == pixels(janus.generate("a red circle", seed=3))).all()


@pytest.mark.parametrize("seed", [None, 1.5, "a", [None], 2**64, -1, [2**63]], ids=repr)
def test_others_are_none(janus, seed):
    with pytest.raises(ValueError, match="got seed"):
        janus.generate(["a red circle"], seed=seed)


def test_arrays_of_guidance_and_size(bagel, janus):
    both = janus.generate(["a red circle", "a blue square"], guidance=np.array([1.0, 4.0]), size=np.array([64, 64]))
    assert (pixels(both) == pixels(janus.generate(["a red circle", "a blue square"], guidance=[1.0, 4.0]))).all()
    assert bagel.generate("a b", size=torch.tensor([16, 24])).image.size == (24, 16)


@pytest.mark.parametrize("size", [64, (64,), (64, 64, 3), [(64, 64)], (64.5, 64), "64"], ids=repr)
def test_sizes_that_are_none(bagel, janus, size):
    for model in (bagel, janus, unimm.load("metaquery-nano"), unimm.load("uniworld-nano")):
        with pytest.raises(ValueError, match="got size"):
            model.generate("a b", size=size)


@pytest.mark.parametrize("prompt", [None, b"a", {"a": 1}, 3, ["a", None], (text for text in "ab"), "a \ud800"])
def test_prompts_that_are_none(bagel, janus, prompt):
    for model in (bagel, janus):
        with pytest.raises(ValueError, match="for a prompt|no text"):
            model.generate(prompt)
        with pytest.raises(ValueError, match="for a prompt|no text"):
            model.understand(None, prompt)


@pytest.mark.parametrize("call", [
    lambda: TextSampling(temperature=float("nan")),
    lambda: TextSampling(stop=("",)),
    lambda: TextSampling(stop=None),
    lambda: unimm.ImageTokenSampling(temperature=float("nan")),
    lambda: Guidance(text_scale=float("nan")),
    lambda: Guidance(image_scale=-1.0),
    lambda: Guidance(interval=(1.0, 0.0)),
    lambda: unimm.load("janus-nano").generate("a", guidance=float("nan")),
    lambda: unimm.load("metaquery-nano").generate("a", image_guidance=float("nan")),
    lambda: unimm.load("uniworld-nano").generate("a", guidance=float("nan")),
    lambda: unimm.load("janus-nano", dtype="float8_e4m3fn"),
    lambda: toy(0).generate("a", timestep_shift=float("nan")),
    lambda: toy(0).generate("a", guidance={"text": 3}),
])  # fmt: skip
def test_what_is_no_number(call):
    with pytest.raises(ValueError, match="got|expected"):
        call()


def test_a_number_is_the_texts_scale(bagel):
    ours, default = bagel.generate("a b", guidance=3.0), bagel.config.defaults.generate_guidance
    assert (pixels(ours) == pixels(bagel.generate("a b", guidance=replace(default, text_scale=3.0)))).all()


def test_a_stop_string_is_one(janus):
    image = picture(64, 64)
    whole = janus.understand(image, "describe the picture")
    stop = whole[len(whole) // 2 :]
    for given in (stop, (stop,), [stop]):
        # however many tokens the model's config allows: a sampling that names no number keeps to that
        assert (
            janus.understand(image, "describe the picture", text_sampling=TextSampling(stop=given))
            == whole[: whole.index(stop)]
        )


def test_one_question_in_a_list_streams(bagel, janus):
    for model in (bagel, janus):
        text = TextSampling(max_tokens=6)
        assert "".join(model.understand(None, ["a b"], stream=True, text_sampling=text)) == model.understand(
            None, "a b", text_sampling=text
        )


def test_one_thing_to_go_on_from(bagel):
    short = dict(outputs=("text",), text_sampling=TextSampling(max_tokens=4))
    assert list(bagel.interleave("a b", **short)) == list(bagel.interleave(["a b"], **short))
    assert list(bagel.interleave(picture(), **short)) == list(bagel.interleave([picture()], **short))
    with pytest.raises(ValueError, match="got outputs"):
        bagel.interleave(["a"], outputs=("video",))  # before the first piece is asked for


# ---- images


def test_images_of_whole_numbers():
    plain = picture(9, 7)
    grey = plain.convert("L")
    expected = np.asarray(grey.convert("RGB"))
    for other in (grey.convert("I"), Image.fromarray(np.asarray(grey).astype(np.int32))):
        assert (np.asarray(load_image(other)) == expected).all()
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert (np.asarray(load_image(wide)) == expected).all()
    with pytest.raises(ValueError, match="floats"):
        load_image(Image.fromarray(np.asarray(grey).astype(np.float32) / 255))
    with pytest.raises(ValueError, match="0x0|expected a pixel"):
        load_image(Image.new("RGB", (0, 0)))


def test_images_stand_upright(tmp_path):
    plain, exif = picture(24, 16), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    plain.save(tmp_path / "a.png", exif=exif)
    assert (np.asarray(load_image(tmp_path / "a.png")) == np.asarray(plain.transpose(Image.Transpose.ROTATE_270))).all()


# ---- torch's own switches


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["bagel-nano", "janus-nano", "janusflow-nano", "metaquery-nano", "uniworld-nano"])
def test_other_default_dtypes(name, dtype):
    model = unimm.load(name)
    expected = pixels(model.generate("a red circle"))
    torch.set_default_dtype(dtype)
    try:
        found = pixels(model.generate("a red circle"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("name", ["bagel-nano", "janus-nano", "janusflow-nano", "metaquery-nano", "uniworld-nano"])
def test_a_model_that_is_cast(name):
    model = unimm.load(name).to(torch.bfloat16)
    assert model.generate("make it red", images=picture(64, 64)).image.size == (64, 64)
    assert isinstance(model.understand(picture(64, 64), "what is it?", text_sampling=TextSampling(max_tokens=3)), str)
    if name == "uniworld-nano":
        assert model.respond("draw a red circle") is not None


def test_a_pack_that_was_looked_at_serves_training(bagel):
    latents = bagel.processor.latent_part(torch.randn(3, 4, 6), timestep=0.4, noised=True)
    batch = pack_sequences([[bagel.processor.answer_part([1, 2, 3]), latents]])
    noise = torch.randn(6, bagel.config.latent_dim)
    model = copy.deepcopy(bagel)
    with torch.inference_mode():
        model(batch, noise)
    losses = model(batch, noise)
    (losses.ce.sum() + losses.mse.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


def test_saving_a_uniworld_without_what_was_there_before(tmp_path):
    uniworld().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds text_encoder/config.json, .*tokenizer_2.* of another model"):
        uniworld(clip=False, t5=False).save_pretrained(tmp_path)


# ---- what is no text, no image, no number


NAMES = ["bagel-nano", "janus-nano", "janusflow-nano", "metaquery-nano", "uniworld-nano"]
USER = {"role": "user", "content": "what is it?"}


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_other_types(name):
    model = unimm.load(name)
    for n in (1.5, "2", None):
        with pytest.raises(ValueError, match="got n .*a whole number"):
            model.generate("a red circle", n=n)
    assert len(model.generate("a red circle", n=np.int64(2)).images) == 2
    for guidance in ("x", [[1.0]]):
        with pytest.raises(ValueError, match="got guidance"):
            model.generate("a red circle", guidance=guidance)
    for call in (model.generate, lambda text, images: model.understand(images, text)):
        with pytest.raises(ValueError, match="got an image of type NoneType"):
            call("make it red", images=[None])
    for steps in (1.5, "2", [2]) if model.supports_steps else ():
        with pytest.raises(ValueError, match="got steps .*a whole number"):
            model.generate("a red circle", steps=steps)


@pytest.mark.parametrize("messages", [5, "hi", iter([USER]), [5], [None], [[USER], None]], ids=range(6))
def test_conversations_of_other_types(janus, messages):
    with pytest.raises(ValueError, match=r"for a conversation: expected a list of messages"):
        janus.chat(messages)


def test_chat_of_what_is_no_text(janus):
    with pytest.raises(ValueError, match="got a message of the user that is no text"):
        janus.chat([{**USER, "content": "half \ud800"}])
    for system in (5, b"x", ["be brief"]):
        with pytest.raises(ValueError, match="got system"):
            janus.chat([USER], system=system)


@pytest.mark.parametrize("folder", [".", "", "../there"])
def test_saving_into_the_folder_one_stands_in(tmp_path, monkeypatch, janus, folder):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    janus.save_pretrained(folder)
    assert (tmp_path / "there" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["there"], "nothing is left beside"


def test_options_of_other_types():
    for negative in (5, [5], ["a", 5]):
        with pytest.raises(ValueError, match="for negative_prompt: expected a text|negative prompts for 1"):
            unimm.load("metaquery-nano").generate("a red circle", negative_prompt=negative)
    model = unimm.load("uniworld-nano")
    with pytest.raises(ValueError, match="got image_embeds_shortcut 'x'"):
        model.generate("a red circle", images=picture(), image_embeds_shortcut="x")
    for prompt in (5, None, ["a red circle"]):
        with pytest.raises(ValueError, match="respond takes one at a time"):
            model.respond(prompt)
