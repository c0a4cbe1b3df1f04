"""Names to folders: what is asked of the hub, and whose licence is called to mind."""
import logging
from pathlib import Path

import pytest

from unimm import hub


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What would be downloaded: hub ids and patterns."""
    import huggingface_hub

    found = []

    def snapshot_download(name: str, *, revision, allow_patterns) -> Path:
        found.append((name, tuple(allow_patterns)))
        (tmp_path / "model.safetensors").touch()
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    hub.remind.cache_clear()
    return found


def test_a_licence_against_commercial_use_is_said_once(asked, caplog):
    with caplog.at_level(logging.WARNING, logger="unimm"):
        for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"):
            hub.resolve(name)
    assert caplog.messages == ["Qwen/Qwen2.5-VL-3B-Instruct is not for commercial use: Qwen Research License"]
    assert len(asked) == 3


def test_configs_alone(asked, caplog):
    with caplog.at_level(logging.WARNING, logger="unimm"):
        hub.resolve("Qwen/Qwen2.5-VL-3B-Instruct", weights=False)
    ((_, patterns),) = asked
    assert "*.json" in patterns and not any("safetensors" in pattern for pattern in patterns) and not caplog.messages


def test_folders_of_a_repository_alone(asked):
    """FLUX.1-dev holds its transformer twice, 48 GB that UniWorld has no use for."""
    hub.resolve("black-forest-labs/FLUX.1-dev", parts=("vae", "tokenizer"))
    ((_, patterns),) = asked
    assert {"vae/*.safetensors", "tokenizer/merges.txt"} <= {*patterns}
    assert all(pattern.startswith(("vae/", "tokenizer/")) for pattern in patterns)
