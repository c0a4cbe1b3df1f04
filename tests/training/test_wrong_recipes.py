"""Recipes that are wrong: a key written twice, numbers that do not fit, tasks that are not known. All is said when a
recipe is read, with its key, before anything is built."""

import copy
import dataclasses
import json
from importlib import import_module
from math import inf, nan
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from helpers.paths import RECIPES
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from unimm.training.config import RecipeLoader, RecipeSection, TrainConfig, from_mapping, read_recipe
from unimm.training.init import train_tokenizer
from unimm.training.start import check_run
from unimm.training.tasks.base import RECORD_TASKS, TRAINING_TASKS, build_task

TEXTS = {path: path.read_text() for path in sorted(RECIPES.glob("*.yaml"))}
CONTENTS = {path.stem: yaml.load(text, Loader=RecipeLoader) for path, text in TEXTS.items()}


# recipes that name tasks of the shapes world
WITH_TASKS = sorted(name for name, contents in CONTENTS.items() if "tasks" in contents["options"])


def options_class(contents: dict[str, Any]) -> type[RecipeSection]:
    """The class that reads the `options` of a recipe."""
    if "data" in contents:
        module_name, _, task = RECORD_TASKS[contents["task"]].partition(":")
        return getattr(import_module(module_name), task.removesuffix("Task") + "Config")
    module = import_module(TRAINING_TASKS[contents["task"]].partition(":")[0])
    known = [one for name, one in vars(module).items() if name.endswith("TrainingConfig")]
    (found,) = [one for one in known if one.__module__ == module.__name__] or known
    return found


def mappings(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths to the mappings of a recipe that hold something."""
    if not isinstance(value, dict) or not value:
        return []
    return [path, *(found for key, one in value.items() for found in mappings(one, (*path, key)))]


def write(value: Any, path: tuple[str, ...] | None, twice: str) -> str:
    """YAML of a value, in which the mapping at a path holds a key twice."""
    if not isinstance(value, dict):
        return json.dumps(value)
    rests = {key: path[1:] if path and path[0] == key else None for key in value}
    lines = [f"{json.dumps(key)}: {write(one, rests[key], twice)}" for key, one in value.items()]
    return "{" + ",\n".join(lines + ([f"{json.dumps(twice)}: 1"] if path == () else [])) + "}"


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_key_written_twice_is_refused_at_any_depth(tmp_path_factory, data):
    contents = CONTENTS[data.draw(st.sampled_from(sorted(CONTENTS)))]
    path = data.draw(st.sampled_from(mappings(contents)))
    section = contents
    for key in path:
        section = section[key]
    twice = data.draw(st.sampled_from(sorted(section)))
    file = tmp_path_factory.getbasetemp() / "twice.yaml"
    file.write_text(write(contents, path, twice))
    with pytest.raises(ValueError, match=rf"twice\.yaml: got the key '{twice}' twice, in lines \d+ and \d+: leave"):
        read_recipe(file)


def test_a_key_may_be_merged_and_written_again(tmp_path):
    text = TEXTS[RECIPES / "bagel-nano-vae.yaml"]
    (tmp_path / "merged.yaml").write_text(text.replace("seed: 0", "<<: {seed: 1, lr: 5.0}\nseed: 0"))
    assert read_recipe(tmp_path / "merged.yaml") == read_recipe(RECIPES / "bagel-nano-vae.yaml")


@pytest.mark.parametrize(
    "text", [b"\xff\xfe\x00", b"a: [", b"[" * 100_000, b"- 1", b"", b"lr: 2001-13-01", b"a: &a [*a]"]
)
def test_files_that_are_no_recipe(tmp_path, text):
    (tmp_path / "mine.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        read_recipe(tmp_path / "mine.yaml")


# ---- numbers and names


WRONG = {
    int: [-1, 0.5, 2.0, "2", True, None, nan, [1]],
    float: [-0.5, "0.1", True, None, nan, inf, [0.1]],
    bool: [0, 1, "true", None],
    str: [5, True, ["a"]],
    list: [5, "draw.one", {"a": 1}, None],
    dict: [5, "draw.one", [1], None],
}


# sections that a recipe may leave out
NULLABLE = ("data", "packing", "cache", "columns", "vae_transform", "vit_transform", "understand_transform")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """The paths to all that a recipe's section holds, with what lies there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [found for key, one in inner for found in leaves(one, (*path, key))]
    return [*([(path, value)] if path else []), *below]


def changed(section: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(section)
    place: Any = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return made


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_does_not_fit_is_refused_by_the_name_of_its_key(data):
    contents = CONTENTS[data.draw(st.sampled_from(sorted(CONTENTS)))]
    section, cls = data.draw(
        st.sampled_from([
            ({key: value for key, value in contents.items() if key not in ("options", "model")}, TrainConfig),
            (contents["options"], options_class(contents)),
        ])
    )  # fmt: skip
    assert from_mapping(cls, section, where="here")
    path, value = data.draw(st.sampled_from(leaves(section)))
    wrong = data.draw(st.sampled_from(WRONG[type(value)] if value is not None else [5, ["a"]]))
    if (path == ("guidance",) and wrong == 2.0) or (wrong is None and path[-1] in NULLABLE):
        return
    with pytest.raises(ValueError, match=next(key for key in reversed(path) if isinstance(key, str))):
        from_mapping(cls, changed(section, path, wrong), where="here")


@pytest.mark.parametrize("name", sorted(CONTENTS))
def test_every_number_of_a_recipe_has_bounds(name):
    """An int or a float of a field's type, at any depth, says from where on it makes sense; an image's side is one."""
    for cls in (TrainConfig, options_class(CONTENTS[name])):
        hints = get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            schema = json.dumps(TypeAdapter(hints[field.name]).json_schema())
            numbers = schema.count('"integer"') + schema.count('"number"')
            assert schema.count("inimum") >= numbers or field.name == "image_size", field.name


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(WITH_TASKS),
    st.text(max_size=12) | st.sampled_from(["draw.on", "caption.ful", "draw", "Draw.one"]),
)
def test_tasks_that_are_not_known(name, task):
    contents = CONTENTS[name]
    given_tasks = contents["options"]["tasks"]
    tasks = {**given_tasks, task: 1} if isinstance(given_tasks, dict) else [*given_tasks, task]
    with pytest.raises(ValueError, match="task"):
        from_mapping(options_class(contents), {**contents["options"], "tasks": tasks}, where="options")


@pytest.mark.parametrize("name", WITH_TASKS)
def test_tasks_that_are_none(name):
    contents = CONTENTS[name]
    tasks = contents["options"]["tasks"]
    for none in ({}, dict.fromkeys(tasks, 0)) if tasks and isinstance(tasks, dict) else ([],) if tasks else ():
        with pytest.raises(ValueError, match="tasks"):
            from_mapping(options_class(contents), {**contents["options"], "tasks": none}, where="options")


@pytest.mark.parametrize("cache", [{"samples": 4, "foldr": "x"}, {"samples": 0}, {"samples": "4"}, 5, []])
def test_caches(cache):
    with pytest.raises(ValueError, match="cache.* (in|of) here"):
        from_mapping(TrainConfig, {**CONTENTS["uniworld-nano"], "cache": cache}, where="here")


@pytest.mark.parametrize("weights", [{"l1": 0.0, "mse": 0.0, "kl": 0.0}, {"l1": -1.0, "mse": 1.0, "kl": 0.0}, {}])
def test_weights_of_losses(weights):
    contents = {**CONTENTS["bagel-nano-vae"], "loss_weights": weights}
    with pytest.raises(ValueError, match="loss_weights.* in here"):
        from_mapping(TrainConfig, contents, where="here")


@pytest.mark.parametrize(
    ("name", "section", "change", "message"),
    [
        ("bagel-nano-vae", "options", {"image_size": 32}, "image_size in options.*got 32, expected 64"),
        ("bagel-nano-vae", "model", {"multipliers": [1] * 8}, "a stride of 128.*divisor of the images' 64"),
        ("bagel-nano-vae", "model", {"multipliers": []}, "multipliers in model"),
        ("bagel-nano-vae", "model", {"n_blocks": 0}, "got 0 for n_blocks in model"),
        ("bagel-nano-vit", "model", {"patch_size": 7}, "got patch_size 7.*divisor of the images' 64"),
        ("bagel-nano-vit", "model", {"train_image_size": 0}, "train_image_size.*got 0, expected 64"),
        ("bagel-nano-vit", "model", {"image_size": 32}, "got image_size 32.*64"),
        ("bagel-nano", "options", {"dropout": {"text": 2.0}}, "got 2.0 for dropout.text in options"),
        ("bagel-nano", "model", {"llm": 5}, "got 5 for llm in model of the recipe, expected a mapping"),
        ("bagel-nano", "model", {"config": {"generation": {}}}, "lacks config.generation.think_draw, config.gen"),
        ("janus-nano", "model", {"language": {}}, "model of the recipe lacks language.hidden_size"),
        ("janusflow-nano", "model", {"flow": None}, "got None for flow in model of the recipe"),
        ("metaquery-nano-mllm", "model", {"pixels": [1]}, "for pixels in model of the recipe, expected a mapping"),
        ("metaquery-nano", "model", {"config": {}}, "lacks config.diffusion_model_id"),
        ("uniworld-nano", "model", {"denoiser": {}}, "lacks denoiser.joint_attention_dim"),
        ("bagel-nano", "options", {"dropout": {"txt": 0.5}}, "got 'txt' in dropout of the options"),
        ("metaquery-nano-mllm", "options", {"vision": {}}, "vision of the options lacks"),
        ("metaquery-nano-mllm", "options", {"planned_characters": []}, "planned_characters for the task plan.favourite"),
        ("metaquery-nano", "options", {"data": "list.jsonl"}, "got data in the options: it is a section of the recipe now"),
        ("uniworld-nano", "options", {"edit_weights": "cubic"}, "got 'cubic' for edit_weights"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together(name, section, change, message):
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    changed = dataclasses.replace(recipe, **{section: {**getattr(recipe, section), **change}})
    with pytest.raises(ValueError, match=message):
        build_task(changed)


def test_a_vocabulary_that_is_too_small():
    with pytest.raises(ValueError, match="got vocab_size 7, expected one that the texts' characters fit into"):
        train_tokenizer(7, special_tokens=(), lines=100)


# ---- a run's arguments


def test_arguments_of_a_run(tmp_path):
    free = dict(resume=False, init=None, workers=0, hours=None)
    for option, values in {"hours": [nan, inf, -1, "2", True], "workers": [-1, 0.5, "2", None, nan, True]}.items():
        for value in values:
            with pytest.raises(ValueError, match=f"got {option} .*expected"):
                check_run(tmp_path, **{**free, option: value})
    assert check_run(tmp_path, **{**free, "hours": torch.tensor(0.5), "workers": 2.0})[0] == 2
    with pytest.raises(ValueError, match="got init"):
        check_run(tmp_path, **{**free, "init": tmp_path / "nowhere"})
