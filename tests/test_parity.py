"""The library equals the originals on the stored cases; and the runner that says so can fail."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cases import cases, found
from helpers.paths import ROOT
from safetensors.torch import load_file, save_file

from parity.case import Case, Row
from parity.checks import bagel, janus
from parity.runner import check, main, report
from unimm import Janus

GOLDEN = ROOT / "tests" / "golden" / "bagel"
DEV = GOLDEN / "dev"
JANUS = GOLDEN.parent / "janus"
# a parameter of every part, and a table: what no stored output depended on could be wrong unseen
PARTS = [
    "decoder.embed.weight",
    "decoder.blocks.1.experts.gen.k.weight",
    "decoder.blocks.2.experts.und.mlp.up.weight",
    "decoder.norms.gen.weight",
    "vision.blocks.0.out_proj.weight",
    "connector.fc2.bias",
    "time_embedder.mlp.0.weight",
    "latent_pos_embed",
    "vae.encoder.conv_out.bias",
    "vae.decoder.mid.block_1.conv1.weight",
]

JANUS_PARTS = [
    "decoder.embed.weight",
    "decoder.blocks.1.experts.all.k.weight",
    "decoder.norms.all.weight",
    "vision.trunk.pos_embed",
    "vision.trunk.blocks.2.attn.qkv.bias",
    "vision.trunk.attn_pool.q.weight",
    "aligner.layers.2.bias",
    "gen_embed.weight",
    "gen_aligner.layers.0.weight",
    "gen_head.fc1.bias",
    "vq.encoder.conv_out.bias",
    "vq.decoder.mid.0.conv1.weight",
    "vq.quantize.embedding.weight",
]


@pytest.fixture
def case(tmp_path) -> Path:
    """The dev case, to be changed."""
    return Path(shutil.copytree(DEV, tmp_path / "case"))


def keep(case: Path, wanted, **added: torch.Tensor) -> None:
    """Leave only the stored tensors whose names satisfy `wanted`, and add some."""
    tensors = load_file(case / "io.safetensors")
    save_file({name: x for name, x in tensors.items() if wanted(name)} | added, case / "io.safetensors")


def forget(case: Path, wanted) -> None:
    """Leave only the notes whose names satisfy `wanted`."""
    io = json.loads((case / "io.json").read_text())
    io["meta"] = {name: note for name, note in io["meta"].items() if wanted(name)}
    (case / "io.json").write_text(json.dumps(io))


def bad(rows) -> list[str]:
    return [row.name for row in rows if not row.ok]


@pytest.mark.parametrize("name", cases())
def test_equals_the_original(name):
    path = found(name)
    rows = check(path)
    assert not bad(rows)
    tensors = load_file(path / "io.safetensors")
    assert tensors.keys() <= {row.name for row in rows}, "every stored tensor is accounted for"
    assert sum(row.kind == "compared" for row in rows) > len(tensors) / 3


def test_equals_the_original_in_transformers_layout(tmp_path):
    shutil.copytree(JANUS / "dev", tmp_path / "dev")
    Janus.from_pretrained(JANUS / "dev").save_pretrained(tmp_path / "dev_hf", layout="transformers")
    shutil.copytree(
        JANUS / "dev_hf", tmp_path / "dev_hf", dirs_exist_ok=True
    )  # its own config, and the keys that it has
    rows = check(tmp_path / "dev_hf")
    assert not bad(rows) and "keys.json: names and shapes as saved" in {row.name for row in rows}
    assert sum(row.kind == "compared" for row in rows) > 40


def test_sizes_after_the_resize(tmp_path):
    rows = check(GOLDEN / "resize_table.json")
    assert len(rows) == 6 and not bad(rows)
    shutil.copy(GOLDEN / "resize_table.json", tmp_path)
    assert not bad(check(tmp_path)), "a folder that holds only the table"


def test_a_wrong_size_fails(tmp_path):
    table = json.loads((GOLDEN / "resize_table.json").read_text())
    for sizes in table.values():
        entry = sizes[-1]
        entry["vit_wh" if "vit_wh" in entry else "out_wh"][0] += 14
    path = tmp_path / "resize_table.json"
    path.write_text(json.dumps(table))
    assert len(bad(check(path))) == 6


@pytest.mark.parametrize("name", [*PARTS, *(f"janus: {name}" for name in JANUS_PARTS)])
def test_a_changed_weight_fails(monkeypatch, name):
    family, _, name = name.rpartition(": ")
    module = janus if family else bagel
    loaded = module.Janus if family else module.Bagel

    def load(folder):
        model = original(folder)
        with torch.no_grad():
            x = model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name)
            x.add_(1e-2 * x.abs().mean() * torch.randn(x.shape))
        return model

    original = loaded.from_pretrained
    monkeypatch.setattr(loaded, "from_pretrained", load)
    case = Case(JANUS / "dev" if family else DEV)
    module.check(case)
    assert bad(case.account())


@pytest.mark.parametrize("source", [DEV, JANUS / "dev"], ids=["bagel", "janus"])
def test_every_compared_row_can_fail(tmp_path, source):
    """A stored output that is a little off is seen, whichever it is."""
    case = Path(shutil.copytree(source, tmp_path / "case"))
    tensors = load_file(case / "io.safetensors")
    compared = {row.name for row in check(source) if row.kind == "compared"}
    changed = [name for name in compared & tensors.keys() if tensors[name].numel()]
    for name in changed:
        x = tensors[name].view(-1)
        if x.dtype == torch.bool:
            x[0] ^= True
        elif x.is_floating_point():
            # a -inf, which stands for "clean", becomes a number
            x[-1] = x[-1].clamp(-1e9) + 2.1e-4 * x[x.isfinite()].abs().max()
        else:
            x[-1] += 2 if x[-1] < 250 else -2
    save_file(tensors, case / "io.safetensors")
    failed = bad(check(case))
    assert not [name for name in changed if name not in failed]


def test_what_nobody_compares_is_an_error(case):
    keep(case, lambda name: True, **{"t2i.something": torch.zeros(3), "new_group.x": torch.zeros(2)})
    rows = {row.name: row for row in check(case)}
    for name in ("t2i.something", "new_group.x"):
        assert rows[name].kind == "missed" and not rows[name].ok and "not compared" in rows[name].note
    assert len(bad(rows.values())) == 2


def test_a_wrong_note_fails(case):
    io = json.loads((case / "io.json").read_text())
    io["meta"]["und.inferencer_text"] += " 7"
    io["meta"]["inter.kvlen_rope"]["main"][0] += 1
    io["meta"]["train.loss"]["ce_reweighted"] *= 1.001
    io["meta"]["train.grad_norm"]["connector.fc1.bias"] = None
    io["meta"]["video"]["attn_modes"][2] = "noise"
    (case / "io.json").write_text(json.dumps(io))
    expected = {"und.inferencer_text", "inter.kvlen_rope", "train.loss: ce_reweighted", "video: attn_modes"}
    assert set(bad(check(case))) == expected | {"train.grad_norm: connector.fc1.bias"}


@pytest.mark.parametrize("group", ["vae", "und", "t2i", "video", "layout.drop_edit"])
def test_a_case_may_store_less(case, group):
    inputs = ("train.text_",) if group in ("video", "layout.drop_edit") else ()
    keep(case, lambda name: name.startswith((f"{group}.", *inputs)))
    forget(case, lambda name: name == group or name.startswith(f"{group}."))
    rows = check(case)
    if inputs:  # texts of other plans are stored with them and belong to nobody
        rows = [row for row in rows if not row.name.startswith("train.text_")]
    assert rows and not bad(rows)


def test_a_group_without_its_inputs_is_named(case):
    keep(case, lambda name: name.startswith("batch."))
    forget(case, lambda name: name.startswith("batch"))
    names = bad(check(case))
    assert "batch: the whole group" in names and "batch.x_channel_0" in names


def test_other_ways_to_lay_out_the_same_case(case):
    """Nested configs only, a stale table side, markers from io.json, and shards with a prefix."""
    for name in ("llm_config.json", "vit_config.json"):
        (case / name).unlink()
    config = json.loads((case / "config.json").read_text())
    config["max_latent_size"] = 32
    del config["new_token_ids"]
    (case / "config.json").write_text(json.dumps(config))
    weights = load_file(case / "ema.safetensors")
    (case / "ema.safetensors").unlink()
    shards = {
        f"model-{i}.safetensors": {f"bagel.{key}": weights[key] for key in sorted(weights)[i::2]} for i in range(2)
    }
    for name, shard in shards.items():
        save_file(shard, case / name)
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (case / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not bad(check(case))


def test_an_unknown_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no case.*io\.safetensors.*bagel: llm_config\.json.*resize_table\.json"):
        check(tmp_path)
    for name in ("io.safetensors", "io.json"):
        shutil.copy(DEV / name, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "something else"}')
    with pytest.raises(ValueError, match="is no case"):
        check(tmp_path)


def test_exit_codes(tmp_path, capsys):
    assert main([str(GOLDEN / "resize_table.json")]) == 0
    assert "6 of 6 outputs ok" in capsys.readouterr().out
    assert main([str(tmp_path), str(GOLDEN / "resize_table.json")]) == 2
    assert "is no case" in capsys.readouterr().out
    rows = [Row(name="a", kind="input"), Row(name="b", kind="compared", difference=float("nan"), allowed=1.0)]
    lines, passed = report(tmp_path, rows)
    assert not passed and "FAILED" in lines[1]
    assert not report(tmp_path, [])[1], "nothing compared is no success"
