"""The training loop: warm-up, clipping, averaged weights, checkpoints that continue exactly. One device."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from unimm.checkpoint import hub
from unimm.checkpoint.atomic import atomic_file
from unimm.checkpoint.devices import parse_device
from unimm.data.mix import MixGroup
from unimm.generation.numbers import parse_float, parse_int
from unimm.models.base import UnifiedModel
from unimm.training.batches import BatchSource, StopSignal, group_batches
from unimm.training.cache import use_feature_cache
from unimm.training.checkpoints import (
    EMA_FILE,
    WEIGHTS_FILE,
    check_undamaged,
    copy_into,
    list_checkpoints,
    load_into,
    load_train_state,
    named_tensors,
    offer_earlier,
    save_checkpoint,
    save_release,
    tensor_names,
)
from unimm.training.config import TrainConfig
from unimm.training.ema import EMA
from unimm.training.failures import explain_failures
from unimm.training.loggers import RunLog
from unimm.training.logging import format_losses, format_report
from unimm.training.lora import release_writer
from unimm.training.losses import LossSum
from unimm.training.optim import build_optimizers
from unimm.training.record_batches import build_batches, describe_figures, open_groups
from unimm.training.tasks.base import TrainingTask
from unimm.training.throughput import TERA, Throughput
from unimm.training.validation import Validation

logger = logging.getLogger(__name__)


def train(
    task: TrainingTask,
    recipe: TrainConfig,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    resume: bool = False,
    init: str | Path | None = None,
    workers: int = 1,
    hours: float | None = None,
    groups: Sequence[MixGroup] | None = None,
) -> int:
    """Train until recipe.steps, `hours`, SIGTERM or ctrl-C, and return the step reached.

    `out` receives log.jsonl, samples/, checkpoints/ and release/ (the task's own files, of the averaged weights).
    `resume` continues the newest checkpoint in `out`; `init` starts from the averaged weights of another run, which may
    have trained other parts of the same model (its folder, or that of a checkpoint), or from a release. Batches are
    made by `workers` processes ahead of the loop, or in the loop where that is 0. Where the recipe has a `cache`, it is
    computed first. groups: the datasets of the recipe's `data`, where they have been opened.
    """
    out = Path(out)
    workers, deadline = check_run(out, resume=resume, init=init, workers=workers, hours=hours)
    if recipe.data is not None and groups is None:
        groups = open_groups(recipe.data)
    source = build_batches(task, recipe, groups)
    validation = None if recipe.validation is None else Validation(task, recipe, groups)
    trainer = Trainer(task, recipe, parse_device(device))
    load_start(trainer, out, resume=resume, init=init)
    if recipe.cache is not None:
        # after weights were loaded: the cache holds what they compute
        use_feature_cache(task, recipe, out, workers=workers)
    if resume and trainer.step >= recipe.steps:  # the run may have been killed between its checkpoint and its release
        trainer.save_release(out)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    logs = closing(RunLog(out, recipe, after=trainer.step))
    n = recipe.gradient_accumulation
    trainer.use_source(source)
    batches = closing(source.iterate(trainer.step * n, recipe.steps * n, workers=workers))
    bars = tqdm(total=recipe.steps, initial=trainer.step, desc=task.name, disable=None)
    trainer.start_clock()
    with explain_failures(out), StopSignal() as stop, logs as log, batches as made, bars as bar:
        for group in group_batches(made, n):
            trainer.update(*group)
            bar.update()
            stopping = stop.requested or time.monotonic() > deadline or trainer.step == recipe.steps
            if trainer.step % recipe.log_every == 0:
                report = trainer.report()
                log.write(report)
                bar.set_postfix_str(format_report(report))
                logger.info("step %d of %d  %s", trainer.step, recipe.steps, format_report(report))
            with trainer.untimed():
                if validation is not None and validation.due(trainer.step):
                    trainer.validate(validation, log, workers=workers)
                if trainer.step % recipe.sample_every == 0 or trainer.step == recipe.steps:
                    log.write_image(trainer.step, trainer.sample(out / "samples" / f"{trainer.step:08d}.png"))
                if trainer.step % recipe.save_every == 0 or stopping:
                    trainer.save(out)
            if stopping:
                break
    return trainer.step


def check_run(out: Path, *, resume: bool, init: str | Path | None, workers: Any, hours: Any) -> tuple[int, float]:
    """The number of workers, and the time of `time.monotonic` at which to stop, of the arguments of a run.

    Raises ValueError for wrong ones, before anything is built: where a run would be overwritten, too.
    """
    workers = parse_int(workers, "workers", low=0)
    if hours is not None:
        hours = parse_float(hours, "hours", "a number of 0 or more", low=0)
    found = list_checkpoints(out)
    if resume and init is not None:
        raise ValueError("got both resume and init, expected one: resume continues a run, init starts another from it")
    if resume and not found:
        raise ValueError(f"got resume, but {out} holds no checkpoint: leave resume out to start the run")
    if found and not resume:
        raise ValueError(f"{out} holds a run of {int(found[-1].name)} steps: resume it, or choose another folder")
    if init is not None:
        initial_checkpoint(init)
    return workers, math.inf if hours is None else time.monotonic() + 3600 * hours


def load_start(trainer: Trainer, out: Path, *, resume: bool, init: str | Path | None) -> None:
    """Load the newest checkpoint to resume, or weights to start from."""
    if resume:
        found = list_checkpoints(out)
        with offer_earlier(found, "remove {damaged} to go on from {before}"):
            trainer.resume(found[-1])
    if init is not None:
        found = list_checkpoints(Path(init)) or [Path(init)]
        with offer_earlier(found, "start from the one before, init {before}"):
            trainer.init_from(init)


def initial_checkpoint(init: str | Path) -> Path | None:
    """The checkpoint to start from: the newest of a run, or the one that is given; None for a release.

    Raises ValueError for what is none of these.
    """
    folder = Path(init)
    if found := list_checkpoints(folder):
        return found[-1]
    if all((folder / name).is_file() for name in (WEIGHTS_FILE, EMA_FILE)):
        return folder
    try:
        release = hub.resolve(init, weights=False)
    except ValueError as error:
        raise ValueError(f"got init {init}, expected a run, one of its checkpoints, or a release: {error}") from error
    if not (release / "config.json").is_file():
        raise ValueError(
            f"got init {init}, expected the folder of a run, that of a checkpoint, with files {WEIGHTS_FILE} and "
            f"{EMA_FILE}, or a release, with a config.json"
        )
    return None


class Trainer:
    """A model, its optimisers and its averaged weights, and the step they have reached."""

    def __init__(self, task: TrainingTask, recipe: TrainConfig, device: torch.device) -> None:
        if set(task.loss_names) != set(recipe.loss_weights):
            raise ValueError(
                f"got loss_weights for {sorted(recipe.loss_weights)}, expected one for each of "
                f"{sorted(task.loss_names)}, the losses of {task.name!r}: correct the recipe"
            )
        self.task = task
        self.recipe = recipe
        self.device = device
        self.model = task.model.to(device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError(f"every parameter of {task.name!r} is frozen: train at least one part")
        self.optimizers = build_optimizers(self.model, recipe)
        self.ema = EMA(self.model, recipe.ema_decay)
        self.step = 0
        # sums since the last line of the log: loss name -> [sum, count]
        self.sums: dict[str, list[float]] = {}
        peak = recipe.peak_tflops and recipe.peak_tflops * TERA
        self.throughput = Throughput(task, device, precision_dtype(recipe), peak_flops=peak)
        # since when, and from which step, samples a second are counted: a resumed run counts its own
        self.since = (time.monotonic(), 0)
        # what makes the batches, and where those of each rank of the run that is resumed stood
        self.source: BatchSource | None = None
        self.source_states: Sequence[Mapping[str, Any]] = ()

    def use_source(self, source: BatchSource) -> None:
        """Save where a source's batches go on from now on; it goes on where those of a resumed run stood."""
        self.source = source
        if self.source_states:
            source.load_state_dict(self.source_states)

    def update(self, *batches: Any) -> None:
        """Take one step by the gradients of some batches, over all of which each loss is normalised.

        Raises FloatingPointError, before any weight changes, for a loss or gradient that is not finite.
        """
        lr = self.recipe.lr_at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        self.model.train()
        for batch in batches:
            self.throughput.add(batch)
        counts = self.loss_counts(batches)
        losses: dict[str, float] = {}
        for batch in batches:
            for name, value in self.backward(batch, counts).items():
                losses[name] = losses.get(name, 0.0) + value
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.recipe.max_grad_norm)
        # a step would spoil every weight, and the next checkpoint
        if not math.isfinite(norm.item()):
            raise FloatingPointError(
                f"the gradient's norm is {norm.item()} at step {self.step}: lower lr or max_grad_norm and resume the "
                "last checkpoint"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        for name, value in {**losses, "grad_norm": norm.item()}.items():
            total = self.sums.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def loss_counts(self, batches: Sequence[Any]) -> Counter[str]:
        """The count of every loss over the batches of a step."""
        counts: Counter[str] = Counter()
        for batch in batches:
            counts.update(self.task.loss_counts(batch))
        return counts

    def backward(self, batch: Any, counts: Mapping[str, int]) -> dict[str, float]:
        """Add up the gradient of a batch; returns its share of every loss's mean over `counts`, and of their sum,
        "loss".

        Raises FloatingPointError for a loss that is not finite.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            losses = self.task.losses(batch)
        self.check_losses(losses, self.task.loss_counts(batch))
        # a loss that the step has nothing of is 0: what it is computed by takes part with gradients of 0
        means = {name: loss.total / max(1, counts[name]) for name, loss in losses.items()}
        loss = torch.stack([self.recipe.loss_weights[name] * x.float() for name, x in means.items()]).sum()
        shares = {name: x.item() for name, x in means.items() if counts[name]}
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step} ({shares}): lower lr or max_grad_norm and resume the "
                "last checkpoint"
            )
        loss.backward()
        return shares | {"loss": loss.item()}

    def check_losses(self, losses: Mapping[str, LossSum], counts: Mapping[str, int]) -> None:
        """Raise ValueError for losses that the recipe gives no weight, or whose counts are not those that the task
        said."""
        unknown = sorted(losses.keys() - self.recipe.loss_weights.keys())
        if unknown or not losses:
            raise ValueError(
                f"{self.task.name!r} returned the losses {sorted(losses)}, expected some of "
                f"{sorted(self.recipe.loss_weights)}: correct its loss_names"
            )
        found = {name: loss.count for name, loss in losses.items()}
        if found != dict(counts):
            raise ValueError(
                f"{self.task.name!r} returned losses over {found}, expected {dict(counts)}, the counts of the batch: "
                "correct its loss_counts"
            )

    def report(self) -> dict[str, Any]:
        """Means since the last report, as a line of the log."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        now = time.monotonic()
        then, first_step = self.since
        n_samples = self.recipe.batch_size * self.recipe.gradient_accumulation
        rate = (self.step - first_step) * n_samples / max(now - then, 1e-9)
        self.sums = {}
        self.since = (now, self.step)
        totals = {name: means.pop(name) for name in ("loss", "grad_norm")}
        lr = self.recipe.lr_at(self.step - 1)
        figures = {} if self.source is None else self.source.figures()
        rates = describe_figures(figures, now - then) if figures else {"samples_per_s": round(rate, 2)}
        rates |= self.throughput.report(now - then)
        return {"step": self.step, **totals, "losses": means, "lr": lr, **rates}

    def start_clock(self) -> None:
        """Count rates from now on, with the device's peak measured before."""
        self.throughput.measure_peak()
        self.since = (time.monotonic(), self.step)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Leave the time of the body out of the rates: they are those of training."""
        start = time.monotonic()
        yield
        then, step = self.since
        self.since = (then + time.monotonic() - start, step)

    def validate(self, validation: Validation, log: RunLog, *, workers: int) -> None:
        """Log the losses on the held-out batches, by the averaged weights or the current ones."""
        self.model.eval()
        averaged = self.ema.swap_in() if validation.config.weights == "average" else nullcontext()
        with averaged:
            found = validation.run(self.device, workers=workers)
        log.write({"step": self.step, "validation": found})
        logger.info("step %d of %d  validation: %s", self.step, self.recipe.steps, format_losses(found["losses"]))

    @torch.no_grad()
    def sample(self, path: Path) -> Image.Image | None:
        """Save the task's sample image, made with the averaged weights, and return it; None where it makes none."""
        self.model.eval()
        with self.ema.swap_in():
            image = self.task.sample_image()
        if image is None:
            return None
        with atomic_file(path) as partial:
            image.save(partial, format="PNG")
        return image

    @torch.no_grad()
    def save(self, out: Path) -> None:
        """Write a checkpoint, then the release."""
        state = {
            "step": self.step,
            "updates": self.ema.n_updates,
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "sums": self.sums,
            "batches": [] if self.source is None else [self.source.state_dict()],
            "rng": rng_states(self.device),
            "recipe": dataclasses.asdict(self.recipe),
        }
        save_checkpoint(out, self.step, self.model, ema=self.ema.weights, state=state)
        self.save_release(out)

    @torch.no_grad()
    def save_release(self, out: Path) -> None:
        """Write the release, of the averaged weights."""
        self.model.eval()
        with self.ema.swap_in():
            save_release(out / "release", release_writer(self.task))

    def resume(self, folder: Path) -> None:
        """Continue a checkpoint exactly. Raises ValueError for one of another model."""
        state = load_train_state(folder)
        ours = dataclasses.asdict(self.recipe)
        changed = [name for name in ours if ours[name] != state["recipe"].get(name)]
        if changed:
            logger.warning("the recipe differs from that of %s in %s: the run goes on by the new one", folder, changed)
        check_undamaged(folder)  # first: a damaged name would be taken for another model's
        load_into(folder / WEIGHTS_FILE, named_tensors(self.model))
        load_into(folder / EMA_FILE, self.ema.weights)
        if len(self.optimizers) != len(state["optimizers"]):
            raise ValueError(
                f"got a checkpoint of {len(state['optimizers'])} optimisers in {folder}, the recipe's muon asks for "
                f"{len(self.optimizers)}: use the recipe that it was trained by"
            )
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step = state["step"]
        self.ema.n_updates = state["updates"]
        self.sums = state["sums"]
        # earlier checkpoints have none: their runs' batches are numbered by the steps
        self.source_states = state.get("batches", ())
        self.since = (time.monotonic(), self.step)
        restore_rng_states(state["rng"], self.device)

    def init_from(self, init: str | Path) -> None:
        """Load the averaged weights of another run, of its newest checkpoint or of the one that is given, or a
        release."""
        ours = named_tensors(self.model)
        folder = initial_checkpoint(init)
        if folder is None:
            copy_into(ours, self.release_tensors(init), str(init))
        else:
            check_undamaged(folder)
            load_into(folder / WEIGHTS_FILE, ours)
            # the average holds what that run trained, which need not be what this one trains
            load_into(folder / EMA_FILE, {name: ours[name] for name in tensor_names(folder / EMA_FILE)})
        self.ema = EMA(self.model, self.recipe.ema_decay)

    def release_tensors(self, name: str | Path) -> dict[str, Tensor]:
        """The weights of a release of the model that the task trains. Raises ValueError for a task that trains a part,
        and for a release whose tokenizer is not the recipe's."""
        if not isinstance(self.model, UnifiedModel):
            raise ValueError(
                f"got init {name}, a release, and the task {self.task.name!r}, which trains no whole model"
            )
        if self.recipe.lora is not None:
            raise ValueError(
                f"got init {name}, a release, for a recipe with lora: expected a run of such a recipe, whose adapter to "
                "start from; the release that it stands on is model.from_pretrained"
            )
        released = type(self.model).from_pretrained(name)
        if tokenizer_files(self.model) != tokenizer_files(released):
            raise ValueError(f"got init {name}, whose tokenizer is not the recipe's: the rows of its embeddings differ")
        return named_tensors(released)


def precision_dtype(recipe: TrainConfig) -> torch.dtype:
    """What the products of a run are computed in."""
    return torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32


def tokenizer_files(model: nn.Module) -> dict[str, bytes]:
    """The files of the tokenizers of a model and of its parts, by their names and the parts'."""
    files: dict[str, bytes] = {}
    for part, module in model.named_modules():
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save(Path(folder))
            files |= {f"{part}/{path.name}": path.read_bytes() for path in Path(folder).iterdir()}
    return files


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_rng_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators' states to those that `rng_states` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
