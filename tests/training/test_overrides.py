"""Values set over a recipe's: dotted keys, YAML, and which key was meant."""

import pytest
from helpers.paths import RECIPES

from unimm.training.config import read_recipe

NANO, FINETUNE = RECIPES / "bagel-nano.yaml", RECIPES / "bagel-nano-finetune.yaml"


def test_values_are_set_over_the_recipe():
    recipe = read_recipe(NANO, settings=["options.tasks.draw.one=5", "lr=1e-3", "model.llm.hidden_size=64", "lr=2e-3"])
    assert recipe.options["tasks"]["draw.one"] == 5 and recipe.lr == 2e-3 and recipe.model["llm"]["hidden_size"] == 64
    assert recipe.options["tasks"]["draw.count"] == read_recipe(NANO).options["tasks"]["draw.count"]
    own = read_recipe(FINETUNE, settings=["data.groups.t2i.paths=[a, b]", "data.groups.new.paths=[c]", "data.lanes=2"])
    assert own.data is not None and own.data.groups["t2i"].paths == ("a", "b") and own.data.groups["t2i"].mandatory
    assert own.data.groups["new"].paths == ("c",) and own.data.lanes == 2
    assert read_recipe(NANO, settings=["cache.samples=5"]).cache.samples == 5
    assert read_recipe(FINETUNE, settings=["packing=null", "batch_size=4"]).packing is None


@pytest.mark.parametrize(
    ("path", "setting", "words"),
    [
        (NANO, "stepz=5", "got --set 'stepz=5', but there is no 'stepz' to set: did you mean 'steps'"),
        (NANO, "batch=5", "'batch' to set: it is called 'batch_size' now"),
        (NANO, "options.tasks.draw.onee=5", "there is no 'draw.onee' to set: did you mean 'draw.one'"),
        (NANO, "model.llm.hiden_size=64", "there is no 'hiden_size' to set: did you mean 'hidden_size'"),
        (NANO, "model.lllm.hidden_size=64", "there is no 'lllm.hidden_size' to set: did you mean 'llm'"),
        (NANO, "cache.sample=5", "there is no 'sample' to set: did you mean 'samples'"),
        (FINETUNE, "data.groups.t2i.path=[a]", "there is no 'path' to set: did you mean 'paths'"),
        (FINETUNE, "data.grups.t2i.paths=[a]", "did you mean 'groups'"),
        (FINETUNE, "model.from_pretraind=a", "did you mean 'from_pretrained'"),
        (
            FINETUNE,
            "data.groups.new={paths: [a], wieght: 1}",
            "got 'wieght' in data.groups.new of .* did you mean 'weight'",
        ),
        (FINETUNE, "data.groups.new.weight=1.0", "data.groups.new in .* lacks paths"),
        (NANO, "steps", "got --set 'steps': expected key=value"),
        (NANO, "steps=[1", r"got --set 'steps=\[1', whose value is no YAML"),
        (NANO, "steps=1.5", "got 1.5 for steps in .*, expected int"),
        (NANO, "steps.a=1", "but steps is 9000: set steps itself"),
        (FINETUNE, "data=null", "got packing without data: expected both"),
        (FINETUNE, "batch_size=2", "got batch_size 2 and packing: expected 1"),
        (FINETUNE, "packing.max_tokens=100", "packing in .*: got expected_tokens 400 and max_tokens 100"),
    ],
)
def test_wrong_settings(path, setting, words):
    with pytest.raises(ValueError, match=words):
        read_recipe(path, settings=[setting])
