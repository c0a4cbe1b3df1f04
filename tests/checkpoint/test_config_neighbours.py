"""Every config file of the stored cases and of the bundled models with one key removed, null or of another type: it
loads as before, or is a ValueError that names the file and the key."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from helpers.config_edits import REMOVED, VALUES, config_folders, link_copy, paths, problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unimm.models.registry import family_class

FOLDERS = {one.name: one for one in config_folders()}
NUMBERS_LACKING = {
    "bagel/dev": ("llm_config.json", "hidden_size"),
    "janus/dev": ("config.json", "vision_config.params.image_size"),
    "janus/flow_dev": ("config.json", "language_config.num_hidden_layers"),
    "metaquery/dev": ("Sana-tiny/transformer/config.json", "num_layers"),
    "uniworld/dev": ("config.json", "denoise_tower.denoiser_config.num_layers"),
    "uniworld/dev/siglip": ("preprocessor_config.json", "size.height"),
}


@cache
def copied(name: str) -> Path:
    """A copy of a folder whose configs may be changed, made once."""
    folder = Path(mkdtemp()) / "model"
    link_copy(FOLDERS[name].source, folder)
    return folder


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_key_of_another_kind(name, data):
    folder = copied(name)
    file = data.draw(st.sampled_from(FOLDERS[name].files()), "file")
    path = data.draw(st.sampled_from(list(paths(json.loads((folder / file).read_text())))), "key")
    value = data.draw(st.sampled_from(VALUES), "value")
    assert not problem(folder, file, path, value, FOLDERS[name].build)


def name_value(value: object) -> str:
    """The name of a value that is the same in every process."""
    return "removed" if value is REMOVED else str(value)


@pytest.mark.parametrize("name", [name for name in NUMBERS_LACKING if "siglip" not in name])
@pytest.mark.parametrize("value", [REMOVED, None, "2", 2.5, [], {}, -1, 10**12], ids=name_value)
def test_a_number_that_is_none_is_named_with_its_file(name, value):
    file, key = NUMBERS_LACKING[name]
    folder = copied(name)

    def build(place: Path) -> None:
        with pytest.raises(ValueError, match=key.replace(".", r"\.")) as caught:
            FOLDERS[name].build(place)
        assert str(folder / file) in str(caught.value)

    assert not problem(folder, file, tuple(key.split(".")), value, build)


NO_OBJECTS = (
    *(b"null", b"[1]", b'"x"', b"3", b"", b"<html>", b"version https://git-lfs.github.com/spec/v1"),
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"a": [' * 60 + b"]}" * 60,
    b'{"a": 1' + b"0" * 5000 + b"}",
    *(b'{"a": "\xe9"}', '{"a": 1}'.encode("utf-16")),
)


@pytest.mark.parametrize("contents", NO_OBJECTS, ids=lambda contents: repr(contents[:12]))
def test_a_config_that_is_no_object_is_named(tmp_path, contents):
    folder = tmp_path / "model"
    link_copy(FOLDERS["bagel/dev"].source, folder)
    (folder / "config.json").write_bytes(contents)
    with pytest.raises(ValueError, match=str(folder / "config.json")):
        family_class(folder).from_folder(folder)
