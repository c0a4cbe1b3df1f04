"""Configs as transformers 5 writes them: processor_config.json, and rope_parameters for every family."""

import json

import pytest
import torch
from helpers import llava_toys
from helpers.config_edits import link_copy
from helpers.paths import GOLDEN

from unimm.checkpoint.json_files import read_preprocessor_json
from unimm.models.registry import family_class
from unimm.vlms.llava_onevision.config import LlavaConfig

# folder, file, the section with the language model's numbers, and what its rotary positions are called
LANGUAGE_MODELS = {
    "bagel": ("bagel/dev", "llm_config.json", (), "default"),
    "janus": ("janus/dev", "config.json", ("language_config",), "default"),
    "janus of transformers": ("janus/dev_hf", "config.json", ("text_config",), "default"),
    "janusflow": ("janus/flow_dev", "config.json", ("language_config",), "default"),
    "metaquery": ("metaquery/dev", "Qwen2.5-VL-tiny/config.json", (), "mrope"),
    "uniworld": ("uniworld/dev", "config.json", (), "mrope"),
}
NOT_BUILT = [
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"factor": 2.0}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"rope_scaling": "linear"},
    {"rope_scaling": {"type": ["linear"]}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": "1e6"}},
    {"partial_rotary_factor": 0.5},
    {"use_sliding_window": True},
    {"layer_types": ["full_attention", "sliding_attention"]},
]
PLAIN = [
    {"rope_scaling": None},
    {"rope_scaling": {}},
    {"rope_scaling": {"type": "default"}},
    {"rope_scaling": {"rope_type": "default"}, "rope_parameters": None},
    {"layer_types": ["full_attention"], "use_sliding_window": False},
]


def config_of(name, tmp_path, changes):
    case, file, section, _ = LANGUAGE_MODELS[name]
    folder = tmp_path / "model"
    if not folder.exists():
        link_copy(GOLDEN / case, folder)
    config = json.loads((GOLDEN / case / file).read_text())
    part = config
    for key in section:
        part = part[key]
    if "rope_parameters" in changes and "rope_theta" in (changes["rope_parameters"] or {}):
        part.pop("rope_theta", None)
    part |= changes
    (folder / file).write_text(json.dumps(config))
    with torch.device("meta"):
        return family_class(folder).from_folder(folder).config


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_rotary_positions_that_are_plain(name, tmp_path):
    before = config_of(name, tmp_path, {})
    case, file, section, kind = LANGUAGE_MODELS[name]
    numbers = json.loads((GOLDEN / case / file).read_text())
    for key in section:
        numbers = numbers[key]
    plain = PLAIN if kind == "default" else [PLAIN[-1]]
    for changes in plain:
        assert config_of(name, tmp_path, changes) == before, changes
    theta = numbers.get("rope_theta", 10000.0)
    sections = numbers.get("rope_scaling") or {}
    moved = {"rope_parameters": {**sections, "rope_theta": theta, "rope_type": "default"}, "rope_scaling": None}
    moved["rope_parameters"].pop("type", None)
    assert config_of(name, tmp_path, moved) == before


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("changes", NOT_BUILT, ids=str)
def test_rotary_positions_that_are_not_built(name, changes, tmp_path):
    with pytest.raises(ValueError, match="rope|partial_rotary_factor|use_sliding_window|layer_types"):
        config_of(name, tmp_path, changes)


@pytest.mark.parametrize("changes", NOT_BUILT, ids=str)
def test_llavas_rotary_positions_that_are_not_built(changes):
    files = llava_toys.TOP | {"text_config": llava_toys.TEXT | changes, "vision_config": llava_toys.VISION}
    with pytest.raises(ValueError, match="rope|partial_rotary_factor|use_sliding_window|layer_types"):
        LlavaConfig.from_json(files, {})


def test_null_key_value_heads_are_as_many_as_the_heads():
    text = llava_toys.TEXT | {"num_key_value_heads": None}
    files = llava_toys.TOP | {"text_config": text, "vision_config": llava_toys.VISION}
    decoder = LlavaConfig.from_json(files, {}).decoder
    assert decoder.n_kv_heads == decoder.n_heads


@pytest.mark.parametrize("case", ["metaquery/dev/Qwen2.5-VL-tiny", "uniworld/dev", "uniworld/dev/siglip"])
def test_rules_for_images_in_processor_config(case, tmp_path):
    rules = json.loads((GOLDEN / case / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": rules, "processor_class": "X"}))
    assert read_preprocessor_json(tmp_path) == rules
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert read_preprocessor_json(tmp_path) == rules
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    assert read_preprocessor_json(tmp_path) == {}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": "X"}))
    with pytest.raises(ValueError, match="image_processor 'X' in .*processor_config.json"):
        read_preprocessor_json(tmp_path)


def test_a_folders_images_are_prepared_by_its_processor_config(tmp_path):
    folder = tmp_path / "model"
    link_copy(GOLDEN / "metaquery/dev", folder)
    with torch.device("meta"):
        before = family_class(folder).from_folder(folder).config
    part = folder / "Qwen2.5-VL-tiny"
    rules = json.loads((part / "preprocessor_config.json").read_text())
    (part / "preprocessor_config.json").unlink()
    (part / "processor_config.json").write_text(json.dumps({"image_processor": rules}))
    with torch.device("meta"):
        assert family_class(folder).from_folder(folder).config == before
