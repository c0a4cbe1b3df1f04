"""The configuration of STARS, read strictly from a recipe, and the training recipe of a round that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from unimm.training.config import TrainConfig, from_mapping, name_source, read_recipe_file
from unimm.training.fields import AtLeastOne, NotNegative, RecipeSection, Seed

STARS_RECIPES = Path(__file__).parent / "recipes"
# what a round sets in its training recipe
SET_BY_ROUNDS = ("data", "model.from_pretrained", "seed")

Level = Literal["math1", "math2", "math3", "mapping1", "mapping2", "mapping3"]


@dataclass(frozen=True, kw_only=True)
class StarsSamplingConfig(RecipeSection):
    """A recipe's `sampling`: how every image is generated, those to train on and those of the evaluations."""

    # images at a time
    batch_size: AtLeastOne
    # of the sampler; null for those of the model's published scores, or else its defaults
    steps: AtLeastOne | None = None
    guidance: NotNegative | None = None
    # height and width in pixels
    size: tuple[AtLeastOne, AtLeastOne] | None = None


@dataclass(frozen=True, kw_only=True)
class StarsEvaluationConfig(RecipeSection):
    """A recipe's `evaluation`: what the model is asked before the first round and after each, as by `unimm eval
    unisandbox` with the options of these names."""

    levels: Annotated[tuple[Level, ...], Field(min_length=1)]
    # questions, or pairs of them, a level
    n: AtLeastOne
    seed: Seed
    # null for the exact judge, which the world of shapes has
    judge: str | None = None
    # generated, or the path of UniSandBox's files
    items: str = "generated"
    labels: Literal["official", "corrected"] | None = None
    judge_prompts: str | None = None


@dataclass(frozen=True, kw_only=True)
class StarsConfig(RecipeSection):
    """A run of STARS: one round or several, each from the weights of the last."""

    # a bundled name, a folder or a hub id, of a family that thinks
    model: str
    dtype: Literal["float32", "bfloat16"]
    # of questions, noise and training
    seed: Seed
    # of the questions: the toy world, or everyday objects
    world: Literal["shapes", "photos"]
    # one for each round
    levels: Annotated[tuple[Level, ...], Field(min_length=1)]
    # questions a round, or pairs of them, each generated once
    questions: AtLeastOne
    # who decides what is trained on: the model itself, the exact judge, or nobody
    verifier: Literal["self", "exact", "none"]
    # a round trains on the first so many that are accepted; null for all
    max_accepted: AtLeastOne | None
    sampling: StarsSamplingConfig
    evaluation: StarsEvaluationConfig
    # a recipe of `unimm train` without SET_BY_ROUNDS
    train: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.world == "photos" and self.verifier == "exact":
            raise ValueError("got verifier exact for photos, which none can read: expected self or none")
        if self.world == "shapes" and self.evaluation.items != "generated":
            raise ValueError(
                "got evaluation.items for the world of shapes: expected generated; UniSandBox's are photos"
            )


def read_stars_recipe(path: str | Path, *, settings: Sequence[str] = ()) -> StarsConfig:
    """The configuration in a YAML file. settings: values set over the file's, as `key=value`.

    Raises ValueError for a file that is missing, is no YAML, or says something else, in its `train` too.
    """
    config = read_recipe_file(StarsConfig, path, settings=settings)
    with name_source(str(path)):
        round_recipe(config, number=1, model=config.model, dataset=Path("accepted"))
    return config


def round_recipe(config: StarsConfig, *, number: int, model: str, dataset: Path) -> TrainConfig:
    """The training recipe of a round, counted from 1, from a model and a dataset."""
    contents = dict(config.train)
    start = contents.get("model", {})
    given = {"data": "data" in contents, "seed": "seed" in contents}
    given["model.from_pretrained"] = not isinstance(start, Mapping) or "from_pretrained" in start
    if any(given.values()):
        raise ValueError(
            f"got {', '.join(name for name in SET_BY_ROUNDS if given[name])} in train: leave it out, each round has its own"
        )
    if contents.get("lora") is not None:
        raise ValueError("got lora in train: expected none, since the next round starts from a whole model")
    contents |= {
        "seed": (config.seed + number - 1) % 2**31,
        "model": {**start, "from_pretrained": model},
        "data": {"groups": {"accepted": {"paths": [str(dataset)], "format": "imagefolder"}}},
    }
    return from_mapping(TrainConfig, contents, where="train")
