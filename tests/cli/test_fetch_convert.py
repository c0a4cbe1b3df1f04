"""`unimm fetch`, `unimm convert` and `unimm releases`: what is asked of the hub, what is written, what is told."""

import json

import pytest
import torch
from helpers.paths import GOLDEN
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from unimm.checkpoint.load import read_headers, weight_files
from unimm.checkpoint.safetensors_file import TensorHeader
from unimm.cli.convert import common_dtype
from unimm.cli.main import app
from unimm.models.registry import part_releases, releases
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "80"})


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What is asked of the hub."""
    import huggingface_hub

    found = []

    def snapshot_download(name, *, revision, allow_patterns, local_files_only=False):
        found.append((name, revision, tuple(allow_patterns), local_files_only))
        for place in {pattern.rpartition("/")[0] for pattern in allow_patterns}:
            (tmp_path / place).mkdir(exist_ok=True, parents=True)
            (tmp_path / place / "model.safetensors").write_bytes(b"12345678")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return found


def test_fetch_takes_what_the_family_reads(asked, tmp_path):
    found = json.loads(run("fetch", "LanguageBind/UniWorld-V1", "--revision", "abc", "--json").stdout)
    assert found == {"name": "LanguageBind/UniWorld-V1", "folder": str(tmp_path), "bytes": 8}
    ((name, revision, patterns, offline),) = asked
    assert (name, revision, offline) == ("LanguageBind/UniWorld-V1", "abc", False)
    assert {"*.json", "*.safetensors", "task_head_final.pt"} <= set(patterns) and not any(
        "*.bin" in p for p in patterns
    )


def test_fetch_of_a_part_takes_its_folders_alone_and_reaches_for_nothing_offline(asked):
    assert run("fetch", "black-forest-labs/FLUX.1-dev", "--offline").exit_code == 0
    ((_, _, patterns, offline),) = asked
    places = {pattern.partition("/")[0] for pattern in patterns}
    assert offline and places == {"transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    assert "16.0" not in run("fetch", "deepseek-ai/Janus-Pro-1B").stdout and "task_head_final.pt" not in asked[-1][2]
    result = run("fetch", "deepsek-ai")
    assert result.exit_code == 2 and "the nearest are deepseek-ai" in result.stderr


def test_convert_flux_there_and_back(tmp_path):
    golden = GOLDEN / "blocks" / "flux" / "dev"
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((golden / "config.json").read_bytes())
    tensors = load_file(golden / "model.safetensors")
    save_file({key: x.to(torch.bfloat16) for key, x in tensors.items()}, source / "diffusion_pytorch_model.safetensors")
    assert run("convert", source, tmp_path / "bfl").exit_code == 0
    assert (
        load_file(tmp_path / "bfl" / "flux1-dev.safetensors").keys()
        == load_file(golden / "model_bfl.safetensors").keys()
    )
    assert run("convert", tmp_path / "bfl", tmp_path / "back", "--layout", "diffusers").exit_code == 0
    back = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(back[key], x.to(torch.bfloat16)) for key, x in tensors.items()), "in the dtype that it had"
    result = run("convert", source, tmp_path / "no", "--layout", "original")
    assert result.exit_code == 2 and "expected bfl or diffusers" in result.stderr and not (tmp_path / "no").exists()


def test_convert_the_autoencoder_of_flux_there_and_back(tmp_path):
    """Also from the original's one file, which lies beside the transformer's."""
    config = AutoencoderKLConfig(
        width=32, channel_multipliers=(1, 2), n_res_blocks=1, latent_channels=4, shift_factor=0.5
    )
    vae = AutoencoderKL(config)
    vae.save_pretrained(tmp_path / "source")
    assert run("convert", tmp_path / "source", tmp_path / "bfl").exit_code == 0
    original = load_file(tmp_path / "bfl" / "ae.safetensors")
    assert original.keys() == vae.state_dict().keys()
    assert all(torch.equal(original[key], x) for key, x in vae.state_dict().items())
    file = tmp_path / "bfl" / "ae.safetensors"
    vae.save_pretrained(tmp_path / "source", layout="bfl")
    assert not (tmp_path / "source" / "diffusion_pytorch_model.safetensors").exists(), "it would be read first"
    assert run("convert", file, tmp_path / "back", "--dtype", "bfloat16").exit_code == 0
    back = AutoencoderKL.from_pretrained(tmp_path / "back")
    assert back.config == config and (tmp_path / "back" / "diffusion_pytorch_model.safetensors").exists()
    assert all(torch.equal(x, original[key].bfloat16().float()) for key, x in back.state_dict().items())
    assert run("convert", file, tmp_path / "no", "--layout", "transformers").exit_code == 2
    assert not (tmp_path / "no").exists()


def test_convert_a_model(tmp_path):
    assert run("convert", "janus-nano", tmp_path / "port", "--layout", "transformers").exit_code == 0
    headers = read_headers(weight_files(tmp_path / "port", ("model.safetensors",)))
    assert "model.language_model.norm.weight" in headers and common_dtype(headers) == torch.bfloat16
    sharded = ("--dtype", "float32", "--max-shard-size", "10MB")
    assert run("convert", tmp_path / "port", tmp_path / "wide", *sharded).exit_code == 0
    assert len(list((tmp_path / "wide").glob("model-*.safetensors"))) > 2
    wide = read_headers(weight_files(tmp_path / "wide", ("model.safetensors.index.json",)))
    assert wide.keys() == headers.keys() and common_dtype(wide) == torch.float32
    assert run("convert", "bagel-nano", tmp_path / "no", "--layout", "transformers").exit_code == 2
    assert run("convert", "bagel-nano", tmp_path / "no", "--dtype", "int8").exit_code == 2


def test_the_dtype_of_most_numbers():
    headers = {"a": TensorHeader((2, 3), "BF16"), "b": TensorHeader((5,), "F32"), "c": TensorHeader((9,), "I64")}
    assert common_dtype(headers) == torch.bfloat16
    with pytest.raises(ValueError, match="got files without weights in float32, bfloat16 or float16"):
        common_dtype({"c": headers["c"]})


def test_releases_tell_sizes_licences_and_what_they_can():
    rows = {row["name"]: row for row in json.loads(run("releases", "--json").stdout)}
    assert list(rows) == [row.name for row in releases()] + [part.hub for part in part_releases()]
    bagel = rows["ByteDance-Seed/BAGEL-7B-MoT"]
    assert bagel["file_bytes"] == pytest.approx(29.55e9, rel=1e-3) and "interleave" in bagel["can"]
    assert rows["LanguageBind/UniWorld-V1"]["commercial"] is False
    assert all(row["file_bytes"] for row in rows.values() if "Sana" not in row["name"])
    shown = run("releases").stdout.splitlines()
    assert max(map(len, shown)) <= 80 and all(name in shown for name in rows), "names stand whole, to be copied"
