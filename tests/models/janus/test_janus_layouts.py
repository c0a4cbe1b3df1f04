"""Janus's files: the released shapes, both layouts, every kind of file, and models unseen."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.files import change, rewrite
from helpers.paths import GOLDEN as STORE
from helpers.toys import JANUS, UNREAD, differences, janus, janus_files, made, picture
from safetensors.torch import load_file, save_file

import unimm
from unimm import Bagel, Janus, JanusFlow, TextSampling
from unimm.checkpoint.load import CheckpointError, check_keys, released_shape
from unimm.models.janus.config import JanusConfig
from unimm.models.registry import family_class

GOLDEN = STORE / "janus"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return janus(tmp_path_factory.mktemp("janus") / "toy", 1)


@pytest.fixture
def folder(toy, tmp_path) -> Path:
    """A small Janus, to be changed."""
    return Path(shutil.copytree(toy, tmp_path / "model"))


# ---- the releases: their manifests, with a range of layers written as the number of them

STORED = json.loads((GOLDEN / "manifests.json").read_text())
# deepseek-ai/Janus-1.3B has the shapes of Janus-Pro-1B, byte for byte of its manifest
RELEASES = {"deepseek-ai/Janus-1.3B": "1b", "deepseek-ai/Janus-Pro-1B": "1b", "deepseek-ai/Janus-Pro-7B": "7b"}
LLM = {
    "1b": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16
    ),
    "7b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=30, num_attention_heads=32, num_key_value_heads=32
    ),
}


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Every name and shape of a release."""
    shapes = {}
    for key, shape in STORED[name].items():
        layers = re.search(r"\{(\d+)\}", key)
        for i in range(int(layers[1]) if layers else 1):
            shapes[key.replace(layers[0], str(i)) if layers else key] = tuple(shape)
    return shapes


def original(size: str) -> dict:
    """The released config.json: docs/originals/janus.md, "Numbers" and "Original layout"."""
    d = LLM[size]["hidden_size"]
    mlp = {"depth": 2, "n_embed": d, "projector_type": "mlp_gelu"}
    tower = {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1}
    head = {"image_token_embed": d, "image_token_size": 16384, "n_embed": d}
    llm = LLM[size] | {
        "model_type": "llama",
        "vocab_size": 102400,
        "max_position_embeddings": 16384,
        "torch_dtype": "bfloat16",
    }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": tower},
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": mlp | {"input_dim": 1024}},
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": 16384, "n_embed": 8},
        },
        "gen_aligner_config": {"cls": "MlpProjector", "model_type": "gen_aligner", "params": mlp | {"input_dim": 8}},
        "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": head},
        # Janus-1.3B asks for a kernel by name, which is no business of a config
        "language_config": llm | {"_attn_implementation": "flash_attention_2"},
    }


def ported(size: str) -> dict:
    """The config.json of transformers' layout, what equals the defaults of its classes left out, as was usual."""
    usual = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    llm = {key: number for key, number in LLM[size].items() if usual.get(key) != number}
    wide = {} if size == "1b" else {"projection_dim": 4096}
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "image_token_id": 100581,
        "text_config": llm | {"model_type": "llama", "vocab_size": 102400, "max_position_embeddings": 16384},
        "vision_config": wide | {"model_type": "janus_vision_model"},
        "vq_config": wide | {"model_type": "janus_vqgan"} | ({"image_token_embed_dim": 4096} if wide else {}),
    }


@pytest.fixture(scope="module")
def released() -> dict[tuple[str, bool], Janus]:
    """The releases on meta, of each size in each layout."""
    return {}


def release(known: dict, folder: Path, size: str, port: bool) -> Janus:
    """A release on meta, from its config files."""
    if (size, port) not in known:
        (folder / "config.json").write_text(json.dumps(ported(size) if port else original(size)))
        with torch.device("meta"):
            known[size, port] = Janus.from_folder(folder)
    return known[size, port]


@pytest.mark.parametrize("port", [False, True], ids=["original", "transformers"])
@pytest.mark.parametrize("name", RELEASES)
def test_manifests_fit_the_released_models(released, tmp_path, name, port):
    size = RELEASES[name]
    model, shapes = release(released, tmp_path, size, port), manifest(f"janus_pro_{size}{'_hf' * port}")
    (table,) = model.key_maps().values()
    state = model.state_dict()
    wanted = {key: x for key, x in state.items() if not (port and key.startswith(UNREAD))}
    # what from_pretrained does: parameters that the table knows
    assert {key for key in state if table.released_tensors(key)} == set(wanted)
    found = check_keys(shapes, table, wanted, name)
    assert set(found) == set(shapes) and {ours for transform in found.values() for ours in transform.our_names} == set(
        wanted
    )
    # and back: every parameter has the names, and the shapes, that the manifest gives it
    names = {ours: table.released_tensors(ours) for ours in wanted}
    assert {
        key: released_shape(transform, wanted) for keys in names.values() for key, transform in keys.items()
    } == shapes
    assert sum(x.numel() for x in state.values()) == Janus.RELEASES[name].parameters
    assert len(shapes) == {"1b": 882, "7b": 936}[size] + 82 * port


def test_numbers_that_no_config_states(released, tmp_path):
    for size, port in (("1b", False), ("1b", True), ("7b", False), ("7b", True)):
        cfg = release(released, tmp_path, size, port).config
        llm = cfg.decoder
        assert (llm.norm_eps, llm.rope_theta, llm.max_positions, llm.vocab_size) == (1e-6, 1e4, 16384, 102400)
        assert (cfg.image_size, cfg.token_grid, cfg.guidance) == ((384, 384), (24, 24), 5.0)
        assert (cfg.image_processor.size, cfg.image_processor.min_size, cfg.image_processor.background_color) == (
            384,
            14,
            (127, 127, 127),
        )
        assert (cfg.image_sampling.temperature, cfg.image_sampling.top_k, cfg.image_sampling.top_p) == (1.0, None, 1.0)
    a, b = (release(released, tmp_path, "7b", port).config for port in (False, True))
    assert a == b


@pytest.mark.parametrize("port", [False, True], ids=["original", "transformers"])
def test_manifest_walk_can_fail(released, tmp_path, port):
    model, shapes = release(released, tmp_path, "1b", port), manifest(f"janus_pro_1b{'_hf' * port}")
    (table,) = model.key_maps().values()
    wanted = {key: x for key, x in model.state_dict().items() if table.released_tensors(key)}
    for key in ("model.aligner.fc1.bias", "lm_head.weight") if port else ("aligner.layers.0.bias", "gen_embed.weight"):
        with pytest.raises(CheckpointError, match=f"missing keys: {key}"):
            check_keys({k: s for k, s in shapes.items() if k != key}, table, wanted, "here")
        with pytest.raises(CheckpointError, match=rf"unexpected keys: surprise\.{key}"):
            check_keys(shapes | {f"surprise.{key}": (1,)}, table, wanted, "here")
        with pytest.raises(CheckpointError, match=rf"wrong shapes: {key}: got \[3, 2\], expected \["):
            check_keys(shapes | {key: (3, 2)}, table, wanted, "here")


# ---- kinds of files


@pytest.mark.parametrize("layout", ["original", "transformers"])
@pytest.mark.parametrize("kind", ["one", "sharded"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_every_kind_of_file(toy, folder, layout, kind, suffix):
    model = Janus.from_pretrained(toy)
    model.save_pretrained(folder, layout=layout)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"

    def write(name: str, tensors: dict) -> None:
        save_file(tensors, folder / name) if suffix == "safetensors" else torch.save(tensors, folder / name)

    if kind == "one":
        write(f"{stem}.{suffix}", state)
    else:
        keys, names = sorted(state), [f"{stem}-{i}-of-00002.{suffix}" for i in ("00001", "00002")]
        for i, name in enumerate(names):
            write(name, {key: state[key] for key in keys[i::2]})
        index = {key: names[i % 2] for i, key in enumerate(keys)}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    again = Janus.from_pretrained(folder)
    assert again.checkpoint_layout == layout and not again.training
    unread = [name for name in differences(model, again) if not name.startswith(UNREAD)]
    assert unread == []
    if kind == "sharded":
        (folder / names[1]).unlink()
        with pytest.raises(CheckpointError, match=f"cannot read .*{names[1]}"):
            Janus.from_pretrained(folder)


def test_old_buffers_are_ignored(toy, folder):
    old = {f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    rewrite(folder / "model.safetensors", lambda t: t.update(old))
    assert differences(Janus.from_pretrained(toy), Janus.from_pretrained(folder)) == []
    rewrite(
        folder / "model.safetensors",
        lambda t: t.update({"language_model.model.layers.0.self_attn.rotary": torch.ones(4)}),
    )
    with pytest.raises(CheckpointError, match=r"unexpected keys: language_model\.model\.layers\.0\.self_attn\.rotary"):
        Janus.from_pretrained(folder)


def test_pickles_with_code_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state | {"aligner.layers.0.bias": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected tensors alone"):
        Janus.from_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(
        CheckpointError, match=r"no weights in .*model\.safetensors or .*pytorch_model\.bin\.index\.json"
    ):
        Janus.from_pretrained(folder)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cut short"):
        Janus.from_pretrained(folder)


# ---- layouts


def test_layouts_to_each_other_and_back(toy, tmp_path):
    model = Janus.from_pretrained(toy)
    model.save_pretrained(tmp_path / "theirs", layout="transformers")
    assert model.checkpoint_layout == "original", "saving elsewhere changes nothing here"
    theirs = Janus.from_pretrained(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "again")  # as it came
    theirs.save_pretrained(tmp_path / "back", layout="original")
    again, back = (Janus.from_pretrained(tmp_path / name) for name in ("again", "back"))
    assert (theirs.checkpoint_layout, again.checkpoint_layout, back.checkpoint_layout) == (
        "transformers",
        "transformers",
        "original",
    )
    assert differences(theirs, again) == differences(theirs, back) == []
    assert {name for name in differences(model, back) if not name.startswith(UNREAD)} == set()
    assert not any(x.any() for name, x in back.state_dict().items() if name.startswith(UNREAD)), (
        "zeros, where nothing reads"
    )
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(toy / "model.safetensors").keys()
    for other in (theirs, again, back):
        assert other.config == model.config or other.config.vision.model_name == "siglip"
        assert (other.config.decoder, other.config.vq, other.config.image_processor, other.config.chat) == (
            model.config.decoder, model.config.vq, model.config.image_processor, model.config.chat,
        )  # fmt: skip
        assert made(other) == made(model)
    assert {unimm.load(tmp_path / name).checkpoint_layout for name in ("theirs", "back")} == {
        "transformers",
        "original",
    }


def test_what_is_written_is_what_was_read(tmp_path):
    """The stored case of the original's files, and the keys that transformers gives the same weights."""
    model = Janus.from_pretrained(GOLDEN / "dev")
    model.save_pretrained(tmp_path / "same")
    ours, theirs = load_file(tmp_path / "same" / "model.safetensors"), load_file(GOLDEN / "dev" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    saved, source = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "same", GOLDEN / "dev"))
    for section in (name for name in source if name.endswith("_config")):
        flat, theirs = (one[section] | one[section].get("params", {}) for one in (saved, source))
        # VQ-16 has two blocks a level, so they go without saying
        assert {key for key, value in theirs.items() if flat.get(key) != value} <= {
            "params",
            "torch_dtype",
            "num_res_blocks",
        }
    assert Janus.from_pretrained(tmp_path / "same").config == model.config
    model.save_pretrained(tmp_path / "port", layout="transformers")
    shapes = {key: list(x.shape) for key, x in load_file(tmp_path / "port" / "model.safetensors").items()}
    assert shapes == json.loads((GOLDEN / "dev_hf" / "keys.json").read_text())
    saved, source = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "port", GOLDEN / "dev_hf"))
    for section in ("vision_config", "vq_config"):
        assert {key for key, value in saved[section].items() if source[section][key] != value} == set()
    # and the stored config of transformers' own, with these weights, is this model
    shutil.copy(GOLDEN / "dev_hf" / "config.json", tmp_path / "port")
    port = Janus.from_pretrained(tmp_path / "port")
    assert {name for name in differences(model, port) if not name.startswith(UNREAD)} == set()
    assert (port.config.decoder, port.config.vq, port.config.vision.vit) == (
        model.config.decoder,
        model.config.vq,
        model.config.vision.vit,
    )


def test_a_saved_config_keeps_what_is_its_own(tmp_path):
    generation = dict(size=[16, 8], guidance=3.5, sampling=dict(temperature=0.9, top_k=40, top_p=0.8))
    generation["talk"] = dict(system="be short", template="deepseek_old", max_tokens=7)
    model = Janus.from_pretrained(janus(tmp_path / "toy", generation=generation, vision_config=dict(select_layer=-2)))
    assert (
        model.config.image_size,
        model.config.guidance,
        model.config.image_sampling.top_k,
        model.chat_config.max_tokens,
    ) == ((16, 8), 3.5, 40, 7)
    assert len(model.vision.trunk.blocks) == 1
    for layout in ("original", "transformers"):
        model.save_pretrained(tmp_path / layout, layout=layout, dtype="bfloat16")
        again = Janus.from_pretrained(tmp_path / layout)
        assert (again.config.image_size, again.config.guidance, again.config.image_sampling, again.config.chat) == (
            model.config.image_size, model.config.guidance, model.config.image_sampling, model.config.chat,
        )  # fmt: skip
        assert {x.dtype for x in load_file(tmp_path / layout / "model.safetensors").values()} == {torch.bfloat16}
        assert again.generate("a").image.size == (8, 16)
        assert torch.equal(again.vision.trunk.norm.weight, model.vision.trunk.norm.weight)


def test_what_transformers_layout_cannot_say(tmp_path):
    for name, changes, message in (
        ("head", dict(gen_head_config=dict(image_token_embed=40)), r"image head of width 40 in a model of width 32"),
        (
            "tower",
            dict(vision_config=dict(model_name="test_vit", image_size=32), aligner_config=dict(input_dim=64)),
            r"got the encoder test_vit: .*SigLIP alone",
        ),
        (
            "identity",
            dict(gen_aligner_config=dict(projector_type="identity", n_embed=8), language_config=dict(hidden_size=8)),
            r"got an identity as gen_aligner_config",
        ),
    ):
        if name == "tower":
            for key in ("width", "layers", "heads"):
                changes["vision_config"][key] = None
        if name == "identity":
            changes |= dict(aligner_config=dict(n_embed=8), gen_head_config=dict(n_embed=8))
        where = tmp_path / name
        files = janus_files(**changes)
        params = files["vision_config"]["params"]
        files["vision_config"]["params"] = {key: value for key, value in params.items() if value is not None}
        where.mkdir()
        (where / "config.json").write_text(json.dumps(files))
        model = Janus.from_folder(where)
        with pytest.raises(ValueError, match=message + r'.*; save it with layout="original"'):
            model.save_pretrained(tmp_path / "port", layout="transformers")
        assert not (tmp_path / "port").exists()
        model.save_pretrained(where)
        assert differences(model, Janus.from_pretrained(where)) == []
    with pytest.raises(ValueError, match="got layout 'huggingface': expected one of original, transformers"):
        model.save_pretrained(tmp_path / "port", layout="huggingface")


# ---- which family a folder is of


def test_a_folder_of_another_family(folder, tmp_path):
    assert type(unimm.load(folder)) is Janus and family_class(GOLDEN / "flow_dev") is JanusFlow
    with pytest.raises(ValueError, match=r"flow_dev holds a JanusFlow: load it with unimm\.JanusFlow"):
        Janus.from_pretrained(GOLDEN / "flow_dev")
    with pytest.raises(ValueError, match=r"dev holds a Bagel: load it with unimm\.Bagel"):
        Janus.from_pretrained(GOLDEN.parent / "bagel" / "dev")
    with pytest.raises(ValueError, match=r"holds a Janus: load it with unimm\.Janus"):
        Bagel.from_pretrained(folder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"describes no Janus: expected a vision_config; found"):
        Janus.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no model 'deepseek-ai/Janus-Pro-2B/x'.*nearest are .*Janus-Pro"):
        Janus.from_pretrained("deepseek-ai/Janus-Pro-2B/x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gen_head_config=None), r"config\.json lacks gen_head_config\.\S+: expected a released Janus, fetch"),
        (dict(generation={"size": [10, 24]}), r"got the size \(10, 24\) to generate: expected .*multiples of 4"),
        (dict(generation={"size": [0, 24]}), r"got generation.size 0 .*a positive whole number"),
        (dict(aligner=dict(n_embed=48)), r"got a width of 48 in the config of the aligner: expected 32"),
        (dict(aligner=dict(input_dim=48)), r"aligner_config with input_dim 48 for siglip_toy: expected 24"),
        (
            dict(aligner=dict(projector_type="low_high")),
            r"got aligner_config.params.projector_type .low_high. .*: expected one of .identity., .linear.",
        ),
        (dict(gen_aligner=dict(input_dim=4)), r"got a width of 4 in the config of the gen_aligner's input: expected 8"),
        (
            dict(vision=dict(model_name="no_such_vit", width=None)),
            r"unknown vision encoder 'no_such_vit': expected .*timm",
        ),
        (
            dict(vision=dict(select_feature="cls")),
            r"got vision_config.params.select_feature 'cls' in .*, expected 'same'",
        ),
        (dict(vision=dict(image_size=6)), r"got images of 6 pixels for siglip_toy: expected 8 or more"),
        (dict(language=dict(num_attention_heads=5)), r"dim 32 must be a multiple of n_heads 5"),
        (dict(language=dict(attention_bias=True)), r"got language_config.attention_bias True in .*, expected False"),
        (dict(gen_vision=dict(ch=20)), r"multiple of 32"),
    ],
)
def test_configs_that_do_not_fit(folder, changes, message):
    files = json.loads((folder / "config.json").read_text())
    for name, numbers in changes.items():
        section = files.get(f"{name}_config", {})
        if numbers is None:
            del files[name]
        elif name == "generation":
            files[name] |= numbers
        else:
            section.get("params", section).update(numbers)
            section["params" if "params" in section else "x"] = {
                key: value for key, value in section.get("params", section).items() if value is not None
            }
    (folder / "config.json").write_text(json.dumps(files))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=message):
        Janus.from_pretrained(folder)


def test_another_image_tokenizer(folder):
    files = json.loads((folder / "config.json").read_text())
    files["gen_vision_config"]["cls"] = "VQ-99"
    (folder / "config.json").write_text(json.dumps(files))
    with pytest.raises(ValueError, match=r"got gen_vision_config\.cls 'VQ-99' in .*, expected 'VQ-16'"):
        Janus.from_pretrained(folder)


def test_files_that_do_not_fit_each_other(folder):
    change(folder / "preprocessor_config.json", image_size=32)
    with pytest.raises(
        ValueError, match=r"got images of 32 pixels a side for a vision encoder of 24: expected the same; correct"
    ):
        Janus.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        Janus.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="describes no Janus"):
        Janus.from_pretrained(folder)


def test_the_image_processor_is_read(folder):
    change(folder / "preprocessor_config.json", image_mean=[0.4, 0.5, 0.6], image_std=[0.3, 0.3, 0.2], min_size=3)
    model = Janus.from_pretrained(folder)
    pixels = model.processor.conversation_parts([{"role": "user", "content": "a", "images": picture(24, 24)}])[1].tokens
    plain = Janus.from_pretrained(folder).image_processor
    assert plain.mean == (0.4, 0.5, 0.6) and plain.background_color == (102, 127, 153) and plain.min_size == 3
    usual = JanusConfig.from_json(janus_files(), {}).image_processor
    a, b = plain.preprocess(picture(24, 24)), usual.preprocess(picture(24, 24))
    torch.testing.assert_close(a[2] * 0.2 + 0.6, b[2] * 0.5 + 0.5)
    assert pixels.shape == (9, 8 * 8 * 3)


# ---- unseen models of the format

VARIANTS = {
    "grouped heads, theta, eps": dict(language_config=dict(num_key_value_heads=1, rope_theta=500.0, rms_norm_eps=1e-4)),
    "a code head of its own width": dict(gen_head_config=dict(image_token_embed=56)),
    "more codes than patches": dict(
        vision_config=dict(image_size=16), gen_vision_config=dict(ch_mult=[1, 2], num_res_blocks=2, z_channels=24)
    ),
    "a wider model": dict(
        language_config=dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, num_hidden_layers=3),
        vision_config=dict(width=32, heads=4, layers=1, patch_size=6, mlp_ratio=3.7),
        aligner_config=dict(input_dim=32, n_embed=48, depth=3),
        gen_vision_config=dict(n_embed=4, image_token_size=96, ch_mult=[2, 1, 1, 1], ch=32),
        gen_aligner_config=dict(input_dim=4, n_embed=48, depth=1, projector_type="linear"),
        gen_head_config=dict(image_token_embed=48, image_token_size=96, n_embed=48),
    ),
    "the last layers of the tower left out": dict(vision_config=dict(layers=4, select_layer=-3)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_unseen_models_load_run_and_return(tmp_path, name):
    changes = VARIANTS[name]
    model = Janus.from_pretrained(janus(tmp_path / "toy", 5, **changes))
    numbers = {key: JANUS[key] | changes.get(key, {}) for key in JANUS}
    llm = numbers["language_config"]
    assert model.config.decoder.n_kv_heads == llm["num_key_value_heads"]
    assert model.config.decoder.rope_theta == llm.get("rope_theta", 10000.0)
    assert model.config.decoder.norm_eps == llm.get("rms_norm_eps", 1e-6)
    stride = 2 ** (len(numbers["gen_vision_config"]["ch_mult"]) - 1)
    assert model.config.token_grid == (numbers["vision_config"]["image_size"] // stride,) * 2
    texts, images = made(model)
    assert len(texts) == len(images) == 2
    assert isinstance(
        "".join(model.understand(picture(), "what?", stream=True, text_sampling=TextSampling(max_tokens=3))), str
    )
    model.save_pretrained(tmp_path / "again")
    again = Janus.from_pretrained(tmp_path / "again")
    assert again.config == model.config and differences(model, again) == []
    assert made(again) == (texts, images)
    if "own width" not in name:
        model.save_pretrained(tmp_path / "port", layout="transformers")
        assert made(Janus.from_pretrained(tmp_path / "port")) == (texts, images)
