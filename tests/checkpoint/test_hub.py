"""Names to folders: what is downloaded from the hub, and whose licence is warned of."""

import logging
from pathlib import Path

import pytest

from unimm.checkpoint import hub


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """What would be downloaded: hub ids and patterns."""
    import huggingface_hub

    found = []

    def snapshot_download(name: str, *, revision, allow_patterns) -> Path:
        found.append((name, tuple(allow_patterns)))
        for pattern in allow_patterns:
            if pattern.endswith("*.safetensors"):
                made = tmp_path / pattern.replace("*", "model")
                made.parent.mkdir(exist_ok=True)
                made.touch()
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.warn_licence.cache_clear()
    return found


def test_a_licence_against_commercial_use_is_warned_of_once(downloads, caplog):
    with caplog.at_level(logging.WARNING, logger="unimm"):
        for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"):
            hub.resolve(name, non_commercial={"Qwen/Qwen2.5-VL-3B-Instruct": "Qwen Research License"})
    assert caplog.messages == ["Qwen/Qwen2.5-VL-3B-Instruct is not for commercial use: Qwen Research License"]
    assert len(downloads) == 3


def test_configs_alone(downloads, caplog):
    with caplog.at_level(logging.WARNING, logger="unimm"):
        licences = {"Qwen/Qwen2.5-VL-3B-Instruct": "Qwen Research License"}
        hub.resolve("Qwen/Qwen2.5-VL-3B-Instruct", weights=False, non_commercial=licences)
    ((_, patterns),) = downloads
    assert "*.json" in patterns and not any("safetensors" in pattern for pattern in patterns) and not caplog.messages


def test_folders_of_a_repository_alone(downloads):
    """FLUX.1-dev holds its transformer twice, 48 GB that UniWorld has no use for."""
    hub.resolve("black-forest-labs/FLUX.1-dev", subfolders=("vae", "tokenizer"))
    ((_, patterns),) = downloads
    assert {"vae/*.safetensors", "tokenizer/merges.txt"} <= {*patterns}
    assert all(pattern.startswith(("vae/", "tokenizer/")) for pattern in patterns)


def test_older_files_of_a_part(monkeypatch, tmp_path):
    """Without safetensors below a part, its .bin are fetched, and nothing of the other parts."""
    import huggingface_hub

    found = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, *, revision, allow_patterns: found.append(allow_patterns) or tmp_path,
    )
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.safetensors").touch()
    hub.resolve("a/b", subfolders=("vae",))
    first, second = found
    assert set(second) - set(first) == {"vae/*.bin"} and all(pattern.startswith("vae/") for pattern in second)
