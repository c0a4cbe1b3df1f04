"""One run of STARS: generate, verify, fine-tune, evaluate; rounds, each from the last; every stage goes on where it was
stopped."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from unimm.evaluation.benchmarks.base import Benchmark, BenchmarkOptions
from unimm.evaluation.benchmarks.shapes import exact_shapes_judge
from unimm.evaluation.benchmarks.unisandbox.benchmark import UniSandBoxBenchmark
from unimm.evaluation.judges.base import ItemJudge
from unimm.evaluation.run import run_benchmark
from unimm.evaluation.setup import find_family, model_source, prepare_judge
from unimm.models.base import UnifiedModel
from unimm.models.load_options import LoadOptions
from unimm.self_training.config import StarsConfig, StarsSamplingConfig, round_recipe
from unimm.self_training.folder import TRAINED_FILE, StarsFolder
from unimm.self_training.questions import StarsQuestions, round_seed
from unimm.self_training.report import build_stars_result, stars_markdown
from unimm.self_training.selection import choose_candidates, write_dataset, write_selection
from unimm.self_training.verifiers import accept_all, self_judge
from unimm.training.checkpoints import list_checkpoints
from unimm.training.config import TrainConfig
from unimm.training.record_batches import open_groups
from unimm.training.tasks.base import build_task
from unimm.training.trainer import train

logger = logging.getLogger(__name__)

MODES = ("normal", "think")


@dataclass(frozen=True, kw_only=True)
class RoundModel:
    """A model that a run has come to. name: in results; path: what it is loaded by."""

    name: str
    path: str


def run_stars(
    config: StarsConfig, out: Path, *, device: str = "cpu", workers: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Run STARS in a folder, or go on with it; returns what result.json holds.

    workers: processes that make batches of the training. Raises ValueError for a model that cannot think, for the folder
    of another run and for a round of which nothing is accepted, OSError, with the file, for a full disk, and
    KeyboardInterrupt where the training was asked to stop; what was kept before that is whole.
    """
    family = find_family(config.model)
    if not family.supports_thinking:
        raise ValueError(
            f"got {config.model}, which cannot think before it generates: expected a model of a family that can, whose "
            "thinking it can learn from"
        )
    folder = StarsFolder(out)
    options = generate_options(family, config.sampling)
    run = StarsRun(config, folder, options=options, device=device, workers=workers, progress=progress)
    folder.claim(config)
    model = RoundModel(name=config.model, path=config.model)
    before = {mode: run.evaluate(model, out / "before" / mode, mode) for mode in MODES}
    rounds: list[dict[str, Any]] = []
    for number, level in enumerate(config.levels, start=1):
        model, done = run.round(model, number, level)
        rounds.append(done)
    result = build_stars_result(config, before, rounds)
    folder.write("result.json", result)
    folder.write_text("result.md", stars_markdown(result))
    return result


class StarsRun:
    """The stages of a run."""

    def __init__(
        self,
        config: StarsConfig,
        folder: StarsFolder,
        *,
        options: Mapping[str, Any],
        device: str,
        workers: int,
        progress: bool,
    ) -> None:
        """options: of `generate`. Raises ValueError for an evaluation that cannot be judged."""
        self._options = options
        self.config = config
        self.folder = folder
        self.device = device
        self._load_options = LoadOptions(device=device, dtype=config.dtype)
        self.workers = workers
        self.progress = progress
        asked = self._benchmark("normal")
        judge = config.evaluation.judge
        self._make_judge = prepare_judge(judge, asked, device=device, dtype=config.dtype)
        self._evaluated = frozenset(item.prompt for item in asked.items())

    def round(self, model: RoundModel, number: int, level: str) -> tuple[RoundModel, dict[str, Any]]:
        """One round from a model: the model that it ends with, and what it says of itself."""
        place = self.folder.round(number, level)
        selection = self.select(model, number, level, place)
        training = self.train(model, number, place)
        made = RoundModel(name=f"{self.config.model} after {place.name}", path=str(place / "training" / "release"))
        scores = {mode: self.evaluate(made, place / mode, mode) for mode in MODES}
        return made, {"level": level, "selection": selection, "training": training, **scores}

    def evaluate(self, model: RoundModel, out: Path, mode: str) -> dict[str, Any]:
        """The result of a model on the evaluation's questions."""
        benchmark = self._benchmark(mode)
        logger.info("%s on %s, %s", model.name, ", ".join(self.config.evaluation.levels), mode)
        return self._run(benchmark, model, self._make_judge, out)

    def select(self, model: RoundModel, number: int, level: str, place: Path) -> dict[str, Any]:
        """Let a model generate and verify, and make the dataset of what is accepted; returns its counts and rates.

        Raises ValueError where nothing is accepted.
        """
        config = self.config
        options = BenchmarkOptions(
            n=config.questions,
            seed=round_seed(config.seed, number),
            think=True,
            tasks=(level,),
            world=config.world,
            supports_thinking=True,
        )
        questions = StarsQuestions(options, left_out=self._evaluated)
        run = partial(self._run, questions, model, out=place / "generated")
        logger.info("%s: generating images to learn from", place.name)
        judges: dict[str, Callable[[], ItemJudge]] = {
            "self": lambda: self_judge(self._load(model), config.world),
            "exact": exact_shapes_judge,
            "none": accept_all,
        }
        verified = _scores(run(judges[config.verifier]))
        right = _scores(run(exact_shapes_judge)) if config.world == "shapes" else None
        items = questions.items()
        candidates = choose_candidates(items, verified=verified, right=right, most=config.max_accepted)
        selection = write_selection(place, candidates)
        if not selection["used"]:
            raise ValueError(
                f"{place}: the verifier {config.verifier} accepted none of {len(candidates)} images, so that there is "
                "nothing to train on: take more questions, another level or another verifier, in another folder"
            )
        write_dataset(place / "accepted", candidates, place / "generated" / "images")
        logger.info("%s: %d of %d accepted", place.name, selection["accepted"], selection["generated"])
        return selection

    def train(self, model: RoundModel, number: int, place: Path) -> dict[str, Any]:
        """Fine-tune a model on the accepted images, unless that was done; returns what is known of it."""
        files = StarsFolder(place)
        if done := files.read(TRAINED_FILE):
            return done
        out = place / "training"
        recipe = round_recipe(self.config, number=number, model=model.path, dataset=place / "accepted")
        assert recipe.data is not None
        groups = open_groups(recipe.data)
        resume = bool(list_checkpoints(out))
        step = train(
            build_task(recipe), recipe, out, device=self.device, resume=resume, workers=self.workers, groups=groups
        )
        if step < recipe.steps:
            raise KeyboardInterrupt(f"the training stopped at step {step} of {recipe.steps}; run again to go on")
        done = describe_training(recipe, out)
        files.write(TRAINED_FILE, done)
        return done

    def _benchmark(self, mode: str) -> UniSandBoxBenchmark:
        asked = self.config.evaluation
        generated = asked.items == "generated"
        options = BenchmarkOptions(
            items=asked.items,
            labels=asked.labels,
            n=asked.n,
            seed=asked.seed,
            think=mode == "think",
            tasks=asked.levels,
            world=self.config.world if generated else None,
            judge_prompts=None if asked.judge_prompts is None else Path(asked.judge_prompts),
            supports_thinking=True,
        )
        return UniSandBoxBenchmark(options)

    def _run(
        self, benchmark: Benchmark, model: RoundModel, make_judge: Callable[[], ItemJudge], out: Path
    ) -> dict[str, Any]:
        config = self.config
        source = model_source(model.path, UniSandBoxBenchmark.NAME, load=self._load_options, options=self._options)
        # a folder that was moved is still that of the run
        source = replace(source, name=model.name)
        size = config.sampling.batch_size
        state = run_benchmark(benchmark, source, make_judge, out, batch_size=size, progress=self.progress)
        assert state.result is not None, "a run in one piece has a result"
        return state.result

    def _load(self, model: RoundModel) -> UnifiedModel:
        return self._load_options.load(model.path)


def generate_options(family: type[UnifiedModel], sampling: StarsSamplingConfig) -> dict[str, Any]:
    """The options of `generate` that a recipe gives. Raises NotImplementedError for those that the family does not have."""
    given = {"guidance": sampling.guidance, "size": sampling.size}
    return {name: value for name, value in given.items() if value is not None} | family.supported_options(
        steps=sampling.steps
    )


def describe_training(recipe: TrainConfig, out: Path) -> dict[str, Any]:
    """Steps of a training, and its last losses."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    losses: Mapping[str, float] = next((row["losses"] for row in reversed(rows) if "losses" in row), {})
    return {"steps": recipe.steps, "losses": losses}


def _scores(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The score of each question, which is a unit by itself."""
    return {name: unit["score"] for name, unit in result["units"].items()}
