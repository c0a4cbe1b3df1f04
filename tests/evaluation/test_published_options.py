"""The options that published scores were generated with: for released defaults alone, and taken by the family."""

import copy
import dataclasses

import pytest
from helpers.toys import LLM, TOP, VIT, toy

from unimm.evaluation.setup import model_source
from unimm.generation.guidance import Guidance
from unimm.generation.text_sampling import TextSampling
from unimm.models.bagel.config import BagelConfig
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.model import MetaQuery


def bagel_with_released_defaults():
    model = toy()
    released = {name: value for name, value in copy.deepcopy(TOP).items() if name != "generation"}
    model.config = BagelConfig.from_json(LLM, VIT, released)
    return model


def options_of(model, benchmark):
    return model_source("bagel", benchmark).options_for(model)


@pytest.mark.parametrize(
    ("benchmark", "options"),
    [
        ("unisandbox", {"guidance": Guidance(image_scale=1.0)}),
        (
            "wise",
            {"guidance": Guidance(image_scale=1.0), "text_sampling": TextSampling(temperature=0.3, max_tokens=2048)},
        ),
        ("geneval", {"guidance": Guidance(image_scale=1.0, interval=(0.0, 1.0))}),
        ("imgedit", {"guidance": Guidance(image_scale=1.5, interval=(0.0, 1.0), renorm="text_channel")}),
        ("shapes", {}),
    ],
)
def test_bagel(benchmark, options):
    """As the evaluation scripts have them: cfg_text_scale 4 everywhere."""
    model = bagel_with_released_defaults()
    assert options_of(model, benchmark) == options
    assert all(one.text_scale == 4.0 for one in options.values() if isinstance(one, Guidance))
    assert options_of(toy(), benchmark) == {}, "a model with defaults of its own keeps them"
    assert model.generate("a cat", size=(16, 16), steps=1, **options).image.size == (16, 16)


def test_metaquery():
    released = {field.name: None for field in dataclasses.fields(MetaQueryConfig)} | {"guidance": 4.5}
    config = object.__new__(MetaQueryConfig)
    vars(config).update(released)
    for benchmark in ("geneval", "wise"):
        assert MetaQuery.BENCHMARK_OPTIONS[benchmark](config) == {"guidance": 7.5}
    vars(config).update(guidance=3.0)
    assert MetaQuery.BENCHMARK_OPTIONS["geneval"](config) == {}
