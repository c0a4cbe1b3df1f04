"""Emu3's files: the released shapes, both layouts, every kind of file, the vision tokenizer apart."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.emu3_toys import emu3
from helpers.files import change
from helpers.paths import GOLDEN as STORE
from helpers.toys import differences, picture
from safetensors.torch import load_file, save_file

import unimm
from unimm import Emu3, TextSampling
from unimm.checkpoint.load import CheckpointError, check_keys, released_shape
from unimm.models.emu3.config import Emu3Config
from unimm.models.emu3.text_tokenizer import Emu3SpecialTokens
from unimm.models.emu3.transformers_layout import (
    CURRENT_NAMES,
    RELEASED_NAMES,
    emu3_from_transformers,
    vocabulary_of_ids,
)

GOLDEN = STORE / "emu3"
STORED = json.loads((GOLDEN / "manifests.json").read_text())
SHORT = TextSampling(max_tokens=4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return emu3(tmp_path_factory.mktemp("emu3") / "toy", 1)


@pytest.fixture
def folder(toy, tmp_path) -> Path:
    """A small Emu3, to be changed."""
    return Path(shutil.copytree(toy, tmp_path / "model"))


# ---- the releases: their manifests, with a range of layers written as the number of them


def language_manifest() -> dict[str, tuple[int, ...]]:
    """Every name and shape of the language model, the original's."""
    shapes = {}
    for key, shape in STORED["language"].items():
        for i in range(32 if "{32}" in key else 1):
            shapes[key.replace("{32}", str(i))] = tuple(shape)
    return shapes


def vision_manifest() -> dict[str, tuple[int, ...]]:
    """Every name and shape of the vision tokenizer, the original's."""
    return {key: tuple(shape) for key, shape in STORED["vision_tokenizer"].items()}


def transformers_manifest(names: tuple[str, str, str]) -> dict[str, tuple[int, ...]]:
    """Every name and shape of one file of both, with the names of an age of transformers."""
    language, head, vq = names
    shapes = {
        f"{head}.weight" if key == "lm_head.weight" else language + key.removeprefix("model."): shape
        for key, shape in language_manifest().items()
    }
    for key, shape in vision_manifest().items():
        theirs = STORED["vision_tokenizer_transformers"][key]
        squeezed = theirs.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"))
        shapes[vq + theirs] = shape[:2] if squeezed else shape
    return shapes


@pytest.fixture(scope="module")
def released() -> Emu3:
    """A release with its vision tokenizer on meta; every number is a default of the configs."""
    special = Emu3SpecialTokens()
    files = {"vq_config": {}, "text_config": {}, "vocabulary_map": vocabulary_of_ids(special, 32768)}
    original = Emu3Config.from_json({"vision_tokenizer": {
        "codebook_size": 32768, "embed_dim": 4, "z_channels": 4, "ch": 256, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 2,
        "attn_resolutions": [3], "temporal_downsample_factor": 4, "in_channels": 3,
    }}, {})  # fmt: skip
    assert Emu3Config.from_json(emu3_from_transformers(files), {}) == original
    with torch.device("meta"):
        return Emu3(original)


LAYOUTS = {"original": None, "released names": RELEASED_NAMES, "current names": CURRENT_NAMES}


def files_of(model: Emu3, names: tuple[str, str, str] | None) -> list[tuple]:
    """The manifest and the key map of each file."""
    if names is None:
        model.checkpoint_layout = "original"
        return list(zip((language_manifest(), vision_manifest()), model.key_maps().values(), strict=True))
    model.checkpoint_layout, model.transformers_names = "transformers", names
    (key_map,) = model.key_maps().values()
    return [(transformers_manifest(names), key_map)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_manifests_fit_the_released_models(released, layout):
    state = released.state_dict()
    met: set[str] = set()
    for shapes, key_map in files_of(released, LAYOUTS[layout]):
        wanted = {key: x for key, x in state.items() if key_map.released_tensors(key)}
        found = check_keys(shapes, key_map, wanted, layout)
        assert set(found) == set(shapes)
        names = {ours: key_map.released_tensors(ours) for ours in wanted}
        back = {key: released_shape(one, wanted) for keys in names.values() for key, one in keys.items()}
        assert back == shapes
        assert not met & set(wanted)
        met |= set(wanted)
    assert met == set(state)
    n = sum(x.numel() for x in state.values())
    assert n == Emu3.RELEASES["BAAI/Emu3-Gen-hf"].parameters
    assert n - Emu3.RELEASES["BAAI/Emu3-Gen"].parameters == sum(
        x.numel() for key, x in state.items() if key.startswith("vq.")
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_manifest_walk_can_fail(released, layout):
    for shapes, key_map in files_of(released, LAYOUTS[layout]):
        wanted = {key: x for key, x in released.state_dict().items() if key_map.released_tensors(key)}
        for key in (next(iter(shapes)), max(shapes, key=len)):
            with pytest.raises(CheckpointError, match="missing keys"):
                check_keys({k: s for k, s in shapes.items() if k != key}, key_map, wanted, "here")
            with pytest.raises(CheckpointError, match="wrong shapes"):
                check_keys(shapes | {key: (3, 2)}, key_map, wanted, "here")


def test_numbers_that_no_config_states(released):
    config = released.config
    decoder = config.decoder
    assert (decoder.norm_eps, decoder.rope_theta, decoder.n_kv_heads, decoder.vocab_size) == (1e-5, 1e6, 8, 184622)
    assert (config.image_area, config.n_codes, config.special_tokens.code0) == (518400, 32768, 151854)
    assert [config.size_of_ratio(ratio) for ratio in ("1:1", "4:3", "16:9")] == [(720, 720), (624, 832), (544, 960)]
    assert (config.image_generation.guidance, config.image_generation.sampling.top_k) == (3.0, 2048)


# ---- kinds of files


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("kind", ["one", "sharded"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_every_kind_of_file(toy, folder, layout, kind, suffix):
    model = Emu3.from_pretrained(toy)
    shutil.rmtree(folder)
    model.save_pretrained(folder, layout=layout)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    for place in (folder, folder / "vision_tokenizer")[: 2 if layout == "original" else 1]:
        state = load_file(place / "model.safetensors")
        (place / "model.safetensors").unlink()
        keys = sorted(state)
        names = [f"{stem}.{suffix}"] if kind == "one" else [f"{stem}-{i}-of-2.{suffix}" for i in (1, 2)]
        for i, name in enumerate(names):
            part = {key: state[key] for key in keys[i :: len(names)]}
            save_file(part, place / name) if suffix == "safetensors" else torch.save(part, place / name)
        if kind == "sharded":
            index = {key: names[i % 2] for i, key in enumerate(keys)}
            (place / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    again = Emu3.from_pretrained(folder)
    assert again.checkpoint_layout == layout and not again.training
    assert differences(model, again) == []


# ---- layouts


def made(model: Emu3) -> tuple[str, bytes]:
    """What a model says and draws."""
    answer = model.understand([picture(), picture(9, 9, 1)], "which", text_sampling=SHORT)
    return answer, model.generate("a cat", size=(4, 6)).image.tobytes()


def test_layouts_to_each_other_and_back(toy, tmp_path):
    model = Emu3.from_pretrained(toy)
    model.save_pretrained(tmp_path / "theirs", layout="transformers")
    assert model.checkpoint_layout == "original", "saving elsewhere changes nothing here"
    theirs = Emu3.from_pretrained(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "again")
    theirs.save_pretrained(tmp_path / "back", layout="original")
    again, back = (Emu3.from_pretrained(tmp_path / name) for name in ("again", "back"))
    assert [one.checkpoint_layout for one in (theirs, again, back)] == ["transformers", "transformers", "original"]
    for other in (theirs, again, back):
        assert differences(model, other) == [] and other.config == model.config and made(other) == made(model)
    assert (tmp_path / "theirs/tokenizer.json").exists()
    shutil.copytree(tmp_path / "theirs", tmp_path / "plain")
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        (tmp_path / "plain" / name).unlink()
    texts = ["the cat\u0301 in  caf\u00e9 DON'T 1234\n\n", "(the) e\u0301"]
    plain = Emu3.from_pretrained(tmp_path / "plain")
    assert [plain.tokenizer.encode(text) for text in texts] == [model.tokenizer.encode(text) for text in texts]


def test_newer_names_of_transformers(toy, tmp_path):
    model = Emu3.from_pretrained(toy)
    model.save_pretrained(tmp_path / "new", layout="transformers")
    path = tmp_path / "new" / "model.safetensors"
    state = load_file(path)
    path.unlink()
    renamed = {}
    for key, x in state.items():
        for old, new in zip(RELEASED_NAMES, CURRENT_NAMES, strict=True):
            if key.startswith(old):
                key = new + key.removeprefix(old)
                break
        renamed[key] = x
    save_file(renamed, path)
    again = Emu3.from_pretrained(tmp_path / "new")
    assert differences(model, again) == []
    again.save_pretrained(tmp_path / "same")
    assert load_file(tmp_path / "same" / "model.safetensors").keys() == renamed.keys()


def test_what_is_written_is_what_was_read(tmp_path):
    """The stored case of the original's files, and the names that transformers gives the same weights."""
    model = Emu3.from_pretrained(GOLDEN / "dev")
    model.save_pretrained(tmp_path / "same")
    for name in ("model.safetensors", "vision_tokenizer/model.safetensors"):
        ours, theirs = load_file(tmp_path / "same" / name), load_file(GOLDEN / "dev" / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    model.save_pretrained(tmp_path / "port", layout="transformers")
    port = load_file(tmp_path / "port" / "model.safetensors")
    keys = json.loads((GOLDEN / "dev_hf" / "keys.json").read_text())
    assert port.keys() == {entry["key"] for entry in keys.values()}
    files = {"lm": "model.safetensors", "vq": "vision_tokenizer/model.safetensors"}
    originals = {part: load_file(GOLDEN / "dev" / name) for part, name in files.items()}
    for name, entry in keys.items():
        part, _, key = name.partition(":")
        x = originals[part][key]
        assert torch.equal(port[entry["key"]], x if entry["op"] is None else x.flatten(1))
    # and the stored config of transformers' own, with these weights, is this model
    for path in (GOLDEN / "dev_hf").iterdir():
        shutil.copy(path, tmp_path / "port")
    again = unimm.load(tmp_path / "port")
    assert differences(model, again) == []
    assert again.config.decoder == model.config.decoder and again.config.special_tokens == model.config.special_tokens


def test_dtypes_of_the_parts(toy, tmp_path):
    """The vision tokenizer stays in float32 where it is a file of its own."""
    model = Emu3.from_pretrained(toy, dtype="bfloat16")
    assert model.decoder.embed.weight.dtype == torch.bfloat16
    assert {x.dtype for x in model.vq.parameters()} == {torch.float32}
    assert isinstance(made(model)[0], str)
    model.save_pretrained(tmp_path / "theirs", layout="transformers")
    theirs = Emu3.from_pretrained(tmp_path / "theirs", dtype="bfloat16")
    assert {x.dtype for x in theirs.parameters()} == {torch.bfloat16}
    assert isinstance(made(theirs)[0], str)


# ---- the vision tokenizer apart


def test_the_vision_tokenizer_from_elsewhere(toy, folder, tmp_path):
    model = Emu3.from_pretrained(toy)
    shutil.move(folder / "vision_tokenizer", tmp_path / "elsewhere")
    alone = Emu3.from_pretrained(folder)
    assert alone.understand(None, "who", text_sampling=SHORT) == model.understand(None, "who", text_sampling=SHORT)
    for call in (lambda: alone.generate("a cat"), lambda: alone.understand(picture(), "what")):
        with pytest.raises(ValueError, match=r"without its vision tokenizer.*components"):
            call()
    again = Emu3.from_pretrained(folder, components={"vision_tokenizer": tmp_path / "elsewhere"})
    assert differences(model, again) == [] and again.config == model.config and made(again) == made(model)
    again.save_pretrained(tmp_path / "whole")
    assert made(Emu3.from_pretrained(tmp_path / "whole")) == made(model)
    left_out = Emu3.from_pretrained(toy, components={"vision_tokenizer": None})
    assert left_out.vq is None
    left_out.save_pretrained(tmp_path / "saved")
    assert Emu3.from_pretrained(tmp_path / "saved").vq is None


def test_a_vision_tokenizer_of_other_numbers(toy, tmp_path):
    other = emu3(tmp_path / "other", 2) / "vision_tokenizer"
    change(other / "preprocessor_config.json", spatial_factor=4)
    with pytest.raises(ValueError, match="multiples of 4 pixels for a vision tokenizer with codes of 2"):
        Emu3.from_pretrained(toy, components={"vision_tokenizer": other})
    state = load_file(other / "model.safetensors")
    state["quantize.embedding.weight"] = state["quantize.embedding.weight"][:40].clone()
    save_file(state, other / "model.safetensors")
    change(other / "config.json", codebook_size=40)
    with pytest.raises(ValueError, match="a vision tokenizer of 40 codes: expected 48"):
        Emu3.from_pretrained(toy, components={"vision_tokenizer": other})


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("vision_tokenizer/config.json", {"z_channels": 8}, "expected the same number"),
        ("vision_tokenizer/config.json", {"double_z": True}, "double_z"),
        ("vision_tokenizer/config.json", {"attn_resolutions": [16]}, "expected levels, 0 to 1"),
        ("vision_tokenizer/config.json", {"temporal_downsample_factor": 3}, "a power of 2"),
        ("vision_tokenizer/preprocessor_config.json", {"max_pixels": 10}, "no fewer max_pixels"),
        ("vision_tokenizer/preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
        ("config.json", {"bos_token_id": 5}, "as config.json says"),
        ("config.json", {"eoi_token_id": 10**6}, "different ids below the vocabulary"),
        ("config.json", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("config.json", {"vocab_size": 100}, "ids below"),
        ("config.json", {"hidden_size": "wide"}, "hidden_size"),
        ("config.json", {"image_area": 0}, "image_area"),
    ],
)
def test_broken_configs_are_refused(folder, file, changes, message):
    change(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        Emu3.from_pretrained(folder)


def test_half_a_vision_tokenizer_is_refused(folder):
    """Weights without their config are not passed over."""
    (folder / "vision_tokenizer/config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json in .*vision_tokenizer"):
        Emu3.from_pretrained(folder)


@pytest.mark.parametrize("name", ["emu3.tiktoken", "emu3_vision_tokens.txt"])
def test_half_a_tokenizer_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"no {name}"):
        Emu3.from_pretrained(folder)


@pytest.mark.parametrize("line", ["AAAA 5", "!! 3", "YQ== x", "YQ==", ""])
def test_broken_ranks_are_refused(folder, line):
    path = folder / "emu3.tiktoken"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:100], line, *lines[101:]]))
    with pytest.raises(ValueError, match=r"cannot read .*emu3\.tiktoken"):
        Emu3.from_pretrained(folder)


def test_a_checkpoint_without_tokenizer(tmp_path):
    model = Emu3.from_pretrained(emu3(tmp_path / "toy", tokenizer=False))
    for call in (lambda: model.generate("a cat"), lambda: model.understand(None, "who")):
        with pytest.raises(ValueError, match="no tokenizer"):
            call()
    model.save_pretrained(tmp_path / "theirs", layout="transformers")
    assert Emu3.from_pretrained(tmp_path / "theirs").config.special_tokens == model.config.special_tokens


def test_another_familys_folder_is_named(toy):
    with pytest.raises(ValueError, match=r"holds a Emu3: load it with unimm\.Emu3"):
        unimm.Janus.from_pretrained(toy)
