"""Released files to models and back: the 7B's manifest, round trips, layouts of files, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.files import change, rewrite
from helpers.paths import GOLDEN as STORE
from helpers.toys import picture, toy
from safetensors.torch import load_file, save_file

from unimm import Bagel
from unimm.checkpoint import load
from unimm.checkpoint.keymap import Concat, Ignore, KeyMap, Rename, Squeeze, equal_slices, renames
from unimm.checkpoint.load import CheckpointError, check_keys, load_weights, materialize, read_shapes
from unimm.checkpoint.save import released_state_dict
from unimm.models.bagel.config import WEIGHT_FILES, BagelConfig
from unimm.models.bagel.weights import VAE_KEY_MAP

GOLDEN = STORE / "bagel"
DEV = GOLDEN / "dev"
MANIFEST = {
    name: {key: tuple(shape) for key, shape in shapes.items()}
    for name, shapes in json.loads((GOLDEN / "manifest_7b_mot.json").read_text()).items()
}
# docs/originals/bagel.md, "Configs": the released files' numbers, without the fields that the released code sets itself
LLM = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 152064,
}
VIT = {
    "hidden_size": 1152,
    "image_size": 980,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,  # one more than the weights hold
    "patch_size": 14,
}
TOP = {
    "model_type": "bagel",
    "visual_gen": True,
    "visual_und": True,
    "vae_config": {"z_channels": 16, "downsample": 8},
    "latent_patch_size": 2,
    "max_latent_size": 32,  # stale: the weights hold 64
    "vit_max_num_patch_per_side": 70,
    "connector_act": "gelu_pytorch_tanh",
    "interpolate_pos": False,
    "timestep_shift": 1.0,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """The dev case's model, to be changed."""
    target = tmp_path / "model"
    shutil.copytree(DEV, target, ignore=shutil.ignore_patterns("io.*"))
    return target


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) and x[key].dtype == y[key].dtype for key in x)


# ---- the released 7B


def full_size(monkeypatch, folder: Path, top: dict | None) -> Bagel:
    """The 7B on meta from released files that hold shapes only: a manifest stands for the weights."""
    contents = {"llm_config.json": LLM, "vit_config.json": VIT} | ({"config.json": top} if top else {})
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "ema.safetensors").touch()
    monkeypatch.setattr("unimm.checkpoint.load.read_shapes", lambda paths: MANIFEST[paths[0].name])
    with torch.device("meta"):
        return Bagel.from_folder(folder)


@pytest.mark.parametrize("top", [TOP, None], ids=["config.json", "no config.json"])
def test_manifest_fits_the_released_model(monkeypatch, tmp_path, top):
    model = full_size(monkeypatch, tmp_path, top)
    assert (model.config.latent_grid, model.config.vit_grid) == (64, 70)
    assert model.config.vision.n_layers == 26 and model.config.decoder.qk_norm
    state, met = model.state_dict(), set()
    for names, key_map in model.key_maps().items():
        of_file = {key: x for key, x in state.items() if key.startswith("vae.") == (key_map is VAE_KEY_MAP)}
        found = check_keys(MANIFEST[names[0]], key_map, of_file, names[0])
        assert len(set(found.values())) == len(found) == len(MANIFEST[names[0]])
        met |= {name for transform in found.values() for name in transform.our_names}
        # and back: every parameter of ours has the name that the manifest gives it
        assert {key for name in of_file for key in key_map.released_tensors(name)} == set(MANIFEST[names[0]])
    assert met == set(state)
    assert sum(x.numel() for x in state.values()) == Bagel.RELEASES["ByteDance-Seed/BAGEL-7B-MoT"].parameters


@pytest.mark.parametrize(
    "key", ["vit_pos_embed.pos_embed", "language_model.model.layers.27.mlp_moe_gen.up_proj.weight"]
)
def test_manifest_walk_can_fail(monkeypatch, tmp_path, key):
    model = full_size(monkeypatch, tmp_path, TOP)
    key_map = model.key_maps()[WEIGHT_FILES]
    wanted = {name: x for name, x in model.state_dict().items() if not name.startswith("vae.")}
    shapes = MANIFEST["ema.safetensors"]
    with pytest.raises(CheckpointError, match=f"missing keys: {key}"):
        check_keys({k: s for k, s in shapes.items() if k != key}, key_map, wanted, "here")
    with pytest.raises(CheckpointError, match=rf"unexpected keys: {key}\.more"):
        check_keys(shapes | {f"{key}.more": (1,)}, key_map, wanted, "here")
    with pytest.raises(CheckpointError, match=rf"wrong shapes: {key}: got \[1, 2\], expected \[\d+, 3584\]"):
        check_keys(shapes | {key: (1, 2)}, key_map, wanted, "here")


def test_an_entry_that_no_key_meets_is_an_error():
    with pytest.raises(CheckpointError, match="entries of the key map that no key meets: nothing"):
        check_keys({"a.x": (1,)}, renames({"a.{}": "b.{}", "nothing.{}": "c.{}"}), {"b.x": torch.zeros(1)}, "here")


class Fused(torch.nn.Module):
    """Projections in one matrix, and a table with an axis of length 1."""

    def __init__(self):
        super().__init__()
        self.qkv, self.table = torch.nn.Linear(4, 6), torch.nn.Parameter(torch.randn(1, 3, 4))


FUSED_KEY_MAP = equal_slices([f"layer.{p}.{{}}" for p in "qkv"], "qkv.{}") + KeyMap(
    Squeeze("table", "table"), Ignore("{*}.old_buffer", because="older files hold it")
)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_key_maps_slice_squeeze_and_ignore(tmp_path, suffix):
    model, path = Fused(), tmp_path / f"model.{suffix}"
    state = released_state_dict(model, FUSED_KEY_MAP)
    assert {key: tuple(x.shape) for key, x in state.items()} == {
        **{f"layer.{p}.weight": (2, 4) for p in "qkv"},
        **{f"layer.{p}.bias": (2,) for p in "qkv"},
        "table": (3, 4),
    }
    assert torch.equal(state["layer.k.weight"], model.qkv.weight[2:4])
    state["layer.old_buffer"] = torch.zeros(5)
    torch.save(state, path) if suffix == "bin" else save_file(state, path)
    with torch.device("meta"):
        loaded = Fused()
    load_weights(loaded, [path], FUSED_KEY_MAP, dtype=torch.float32, device=torch.device("cpu"))
    assert same(model, loaded)
    del state["layer.v.bias"]
    torch.save(state, path) if suffix == "bin" else save_file(state, path)
    with pytest.raises(CheckpointError, match=r"missing keys: layer\.v\.bias"):
        load_weights(loaded, [path], FUSED_KEY_MAP, dtype=torch.float32, device=torch.device("cpu"))


def test_key_maps_concatenate_rows(tmp_path):
    """One released table is two of our parameters, which share no memory once loaded."""
    key_map = KeyMap(Concat("table", ("old.weight", "new")), Rename("norm.{}", "norm.{}"))

    class Stacked(torch.nn.Module):
        def __init__(self, n: int = 2):
            super().__init__()
            self.old, self.norm = torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4)
            self.new = torch.nn.Parameter(torch.randn(n, 4))

    model, path = Stacked(), tmp_path / "model.safetensors"
    state = released_state_dict(model, key_map)
    assert torch.equal(state["table"], torch.cat((model.old.weight, model.new))) and set(state) == {
        "table", "norm.weight", "norm.bias",
    }  # fmt: skip
    save_file(state, path)
    with torch.device("meta"):
        loaded, other = Stacked(), Stacked(3)
    load_weights(loaded, [path], key_map, dtype=torch.float32, device=torch.device("cpu"))
    assert same(model, loaded)
    assert loaded.old.weight.untyped_storage().data_ptr() != loaded.new.untyped_storage().data_ptr()
    with pytest.raises(CheckpointError, match=r"wrong shapes: table: got \[7, 4\], expected \[8, 4\]"):
        load_weights(other, [path], key_map, dtype=torch.float32, device=torch.device("cpu"))


def test_each_header_is_read_once(monkeypatch):
    """One opening of each file, however often a load reads its names, shapes and tensors."""
    opened, open_file = [], load._open_file
    monkeypatch.setattr(load, "_open_file", lambda path: opened.append(path.name) or open_file(path))
    Bagel.from_pretrained(DEV)
    assert sorted(opened) == ["ae.safetensors", "ema.safetensors"]
    with pytest.raises(CheckpointError, match="cannot read"), load.keep_weights_open():
        read_shapes([DEV / "nothing.safetensors"])
    assert load._kept_open.get() is None


def test_a_bin_of_code_is_refused(tmp_path):
    torch.save({"x": Path("x")}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="expected tensors alone"):
        load_weights(Fused(), [tmp_path / "model.bin"], FUSED_KEY_MAP, dtype=torch.float32, device=torch.device("cpu"))


def test_materialize_is_for_unused_parameters():
    with torch.device("meta"):
        model = Fused()
    with pytest.raises(CheckpointError, match=r"no file holds table"):
        materialize(model, ("qkv.{}",), dtype=torch.float32, device=torch.device("cpu"))
    materialize(model, ("qkv.{}", "table"), dtype=torch.float32, device=torch.device("cpu"))
    assert not model.table.is_meta and not model.table.any()


# ---- saving and loading


def test_what_is_written_is_what_was_read(golden, tmp_path):
    golden.save_pretrained(tmp_path / "saved")
    for name in ("ema.safetensors", "ae.safetensors"):
        ours, theirs = load_file(tmp_path / "saved" / name), load_file(DEV / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_round_trip_in_float32(tmp_path):
    model = toy(top={"connector_act": "gelu", "timestep_shift": 4.0, "interpolate_pos": True})
    model.tokenizer = None
    model.save_pretrained(tmp_path / "saved")
    again = Bagel.from_pretrained(tmp_path / "saved")
    assert same(model, again) and not again.training
    # config.json has no word for markers that only a tokenizer knows
    assert again.config == model.config
    assert all(p.requires_grad for p in again.parameters())
    assert not any(x.is_meta for x in again.state_dict().values())


def test_round_trip_in_bfloat16(tmp_path):
    model = toy()
    model.tokenizer = None
    model.save_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert {x.dtype for x in load_file(tmp_path / "saved" / "ema.safetensors").values()} == {torch.bfloat16}
    again = Bagel.from_pretrained(tmp_path / "saved", dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    assert {x.dtype for x in again.vae.state_dict().values()} == {torch.float32}, "the autoencoder stays in float32"
    for name, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].to(torch.bfloat16), x.to(torch.bfloat16)), name
    # what bfloat16 holds, float32 holds exactly
    assert all(x.dtype == torch.float32 for x in Bagel.from_pretrained(tmp_path / "saved").state_dict().values())


def test_saving_over_a_folder_replaces_it(golden, folder):
    rewrite(folder / "ema.safetensors", lambda t: t["llm2vae.bias"].add_(1))
    assert not same(golden, Bagel.from_pretrained(folder))
    golden.save_pretrained(folder)
    assert same(golden, Bagel.from_pretrained(folder))


@pytest.mark.parametrize("failing", [1, 2])
def test_nothing_is_half_saved(golden, folder, monkeypatch, failing):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []

    def save(state, path):
        calls.append(path)
        if len(calls) == failing:
            raise OSError("no space left on device")
        path.write_bytes(b"a part")

    monkeypatch.setattr("unimm.checkpoint.save.save_safetensors", save)
    with pytest.raises(OSError, match="no space"):
        golden.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    calls.clear()
    with pytest.raises(OSError, match="no space"):
        golden.save_pretrained(folder.parent / "new")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing is left beside"


# ---- layouts of files


@pytest.mark.parametrize("prefix", ["", "bagel."])
def test_shards(golden, folder, prefix):
    weights = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    keys, index = sorted(weights), {}
    for i in range(3):
        name = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({prefix + key: weights[key] for key in keys[i::3]}, folder / name)
        index |= {prefix + key: name for key in keys[i::3]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    change(folder / "config.json", max_latent_size=32)  # the side comes from the shards, prefix or not
    assert same(golden, Bagel.from_pretrained(folder))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        Bagel.from_pretrained(folder)


def test_a_trainers_file_name(golden, folder):
    (folder / "ema.safetensors").rename(folder / "model.safetensors")
    assert same(golden, Bagel.from_pretrained(folder))


def test_the_average_is_taken_where_both_are(golden, folder):
    shutil.copy(folder / "ema.safetensors", folder / "model.safetensors")
    rewrite(folder / "model.safetensors", lambda t: t["llm2vae.bias"].add_(1))
    assert same(golden, Bagel.from_pretrained(folder))


@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json"])
def test_configs_nested_in_config_json(golden, folder, file):
    (folder / file).unlink()
    assert same(golden, Bagel.from_pretrained(folder))


def test_missing_fields_are_the_released_codes_own():
    cfg = BagelConfig.from_json(LLM, VIT, {})
    assert (cfg.latent_patch_size, cfg.latent_grid, cfg.vit_grid, cfg.latent_downsample) == (2, 64, 70, 16)
    assert cfg.decoder.qk_norm and cfg.visual_gen and not cfg.interpolate_pos_embed and cfg.special_tokens is None
    assert (
        cfg.vae_transform.max_size,
        cfg.vae_transform.min_size,
        cfg.vit_transform.max_size,
        cfg.vit_transform.min_size,
    ) == (1024, 512, 980, 224)
    with pytest.raises(ValueError, match=r"lacks hidden_size.*llm_config\.json"):
        BagelConfig.from_json({}, VIT, {})
    with pytest.raises(ValueError, match=r"lacks patch_size.*vit_config\.json"):
        BagelConfig.from_json(LLM, {key: value for key, value in VIT.items() if key != "patch_size"}, {})


# ---- what is refused


def test_a_truncated_file(folder):
    for name in ("ema.safetensors", "ae.safetensors"):
        whole = (folder / name).read_bytes()
        for size in (len(whole) // 2, 100, 0):
            (folder / name).write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=rf"cannot read .*{name}.*cut short"):
                Bagel.from_pretrained(folder)
        (folder / name).write_bytes(whole)


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_no_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"no weights in .*expected .*{name}"):
        Bagel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "key"),
    [("ema.safetensors", "connector.fc1.weight"), ("ae.safetensors", "decoder.up.0.block.1.conv2.bias")],
)
def test_keys_that_do_not_fit(folder, file, key):
    path = folder / file
    whole = path.read_bytes()
    rewrite(path, lambda t: t.pop(key))
    with pytest.raises(CheckpointError, match=rf"{file} does not fit the model: .*missing keys: {key}"):
        Bagel.from_pretrained(folder)
    path.write_bytes(whole)
    rewrite(path, lambda t: t.update({"surprise.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=rf"{file} does not fit the model: unexpected keys: surprise\.weight"):
        Bagel.from_pretrained(folder)
    path.write_bytes(whole)
    rewrite(path, lambda t: t.update({key: torch.zeros(5, 7)}))
    with pytest.raises(CheckpointError, match=rf"{file} does not fit .*wrong shapes: {key}: got \[5, 7\], expected \["):
        Bagel.from_pretrained(folder)


def test_a_config_of_another_model(folder):
    change(folder / "llm_config.json", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"unexpected keys: language_model\.model\.layers\.2\..* and \d+ more"):
        Bagel.from_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float12", "int8", "nn", torch.int64])
def test_an_unknown_dtype(folder, dtype):
    with pytest.raises(ValueError, match=r"got dtype .*: expected float32, bfloat16 or float16"):
        Bagel.from_pretrained(folder, dtype=dtype)


def test_not_enough_memory(folder, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lead(Path.read_text, "/proc/meminfo", "MemAvailable:     100 kB\n"))
    with pytest.raises(MemoryError, match=r"need .* GiB on cpu, 0\.0 GiB are free; .*bfloat16"):
        Bagel.from_pretrained(folder)


def lead(read, path: str, text: str):
    """A `read_text` that finds `text` at a path."""
    return lambda self, *args, **options: text if str(self) == path else read(self, *args, **options)


# ---- checkpoints trained for one half


def without(folder: Path, *parts: str) -> None:
    """Leave out the weights whose names begin with one of `parts`."""

    def edit(tensors):
        for key in [key for key in tensors if key.startswith(parts)]:
            del tensors[key]

    rewrite(folder / "ema.safetensors", edit)


def test_a_checkpoint_that_only_generates(folder, tmp_path):
    without(folder, "vit_model.", "connector.", "vit_pos_embed.")
    with pytest.raises(CheckpointError, match=r"missing keys: connector\.fc1\.bias"):
        Bagel.from_pretrained(folder)
    change(folder / "config.json", visual_und=False)
    model = Bagel.from_pretrained(folder)
    assert model.config.vision is None and not any(name.startswith("vision") for name in model.state_dict())
    model.tokenizer = toy(llm={"vocab_size": model.config.decoder.vocab_size}).tokenizer
    assert model.generate("a circle", size=(16, 32), steps=1).image.size == (32, 16)
    for call in (
        lambda: model.understand(picture(), "what is it?"),
        lambda: model.generate("more of it", images=picture()),
    ):
        with pytest.raises(NotImplementedError, match=r"visual_und false"):
            call()
    model.tokenizer = None
    model.save_pretrained(tmp_path / "again")
    assert same(model, Bagel.from_pretrained(tmp_path / "again"))


@pytest.fixture
def understanding_only(folder) -> Bagel:
    """A model trained to understand only."""
    without(folder, "time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed.")
    (folder / "ae.safetensors").unlink()
    change(folder / "config.json", visual_gen=False)
    model = Bagel.from_pretrained(folder)
    model.tokenizer = toy(llm={"vocab_size": model.config.decoder.vocab_size}).tokenizer
    return model


def test_a_checkpoint_that_only_understands(understanding_only, tmp_path):
    assert not any(name.startswith(("vae", "time")) for name in understanding_only.state_dict())
    assert isinstance(understanding_only.understand(picture(), "what is it?"), str)
    assert isinstance(next(iter(understanding_only.interleave(["what is it?"], outputs=["text"]))), str)
    understanding_only.tokenizer = None
    understanding_only.save_pretrained(tmp_path / "again")
    assert same(understanding_only, Bagel.from_pretrained(tmp_path / "again"))


@pytest.mark.parametrize("images", [None, "a picture"])
def test_a_checkpoint_that_only_understands_refuses_to_generate(understanding_only, images):
    with pytest.raises(NotImplementedError, match=r"visual_gen false"):
        understanding_only.generate("a circle", images=images and picture(), size=(16, 32))
    with pytest.raises(NotImplementedError, match=r"visual_gen false"):
        next(iter(understanding_only.interleave(["a circle"], size=(16, 32))))
