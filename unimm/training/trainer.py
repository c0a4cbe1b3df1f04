"""The training loop: warm-up, clipping, averaged weights, checkpoints that continue exactly. One process a device."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import unimm
from unimm.checkpoint.atomic import atomic_file
from unimm.checkpoint.devices import parse_device
from unimm.checkpoint.save import own_name, read_values_by
from unimm.data.mix import MixGroup
from unimm.distributed.ranks import Ranks, start_ranks
from unimm.distributed.serving import serve_tensors
from unimm.distributed.sharding import copy_to_cpu
from unimm.training.alignment import without_new_head
from unimm.training.background_saves import BackgroundSaves
from unimm.training.batches import BatchSource, StopSignal, group_batches
from unimm.training.cache import use_feature_cache
from unimm.training.checkpoints import (
    EMA_WEIGHTS,
    OPTIMIZER,
    WEIGHTS,
    check_undamaged,
    copy_into,
    list_checkpoints,
    load_into,
    load_train_state,
    named_tensors,
    offer_earlier,
    save_checkpoint,
    save_release,
    saved_shapes,
)
from unimm.training.config import TrainConfig
from unimm.training.ema import EMA
from unimm.training.failures import explain_failures
from unimm.training.image_cache import use_image_cache
from unimm.training.loggers import RunLog
from unimm.training.logging import format_losses, format_report
from unimm.training.lora import release_writer
from unimm.training.optim import Optimizers
from unimm.training.parallel import DistributedModel
from unimm.training.precision import precision_dtype, resolve_precision
from unimm.training.record_batches import build_batches, describe_figures, describe_groups, open_groups
from unimm.training.start import check_run, initial_checkpoint, release_tensors
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

    Of the processes that torchrun starts each has a device of its own, and all see `out`.
    """
    out = Path(out)
    with start_ranks(parse_device(device)) as ranks:
        workers, deadline = check_run(out, resume=resume, init=init, workers=workers, hours=hours)
        recipe = resolve_precision(recipe, ranks.device)
        # before a rank writes what another is still looking for
        ranks.check_equal(describe_run(recipe, resume=resume, init=init), what="settings")
        if recipe.data is not None and groups is None:
            groups = open_groups(recipe.data)
        if groups is not None:
            # or ranks would deal rows of other numbers, some of them twice
            ranks.check_equal(describe_groups(groups), what="datasets")
        build_batches(task, recipe, groups)  # what is wrong of them is said before weights are loaded
        validation = None if recipe.validation is None else Validation(task, recipe, groups, ranks=ranks)
        trainer = Trainer(task, recipe, ranks.device, ranks=ranks)
        load_start(trainer, out, resume=resume, init=init)
        encoding: AbstractContextManager[Any] = nullcontext()
        if recipe.cache is not None and recipe.data is not None:
            encoding = use_image_cache(task, recipe, out, ranks=ranks)
        elif recipe.cache is not None:
            # after weights were loaded: the cache holds what they compute
            with trainer.distributed.whole():
                use_feature_cache(task, recipe, out, workers=workers, ranks=ranks)
        trainer.use_source(build_batches(task, recipe, groups, rank=ranks.rank, world_size=ranks.size))
        if resume and trainer.step >= recipe.steps:  # it may have been killed between its checkpoint and its release
            trainer.save_release(out)
        with explain_failures(out, ranks), encoding:
            run_steps(trainer, out, validation, workers=workers, deadline=deadline)
    return trainer.step


def describe_run(recipe: TrainConfig, *, resume: bool, init: str | Path | None) -> dict[str, Any]:
    """What all processes of a run must have in common."""
    versions = {"unimm": unimm.__version__, "torch": torch.__version__}
    return {**dataclasses.asdict(recipe), "resume": resume, "init": init and str(init), **versions}


def run_steps(trainer: Trainer, out: Path, validation: Validation | None, *, workers: int, deadline: float) -> None:
    """Train until the recipe's steps, the deadline or a signal, which any rank may get; the first rank logs."""
    recipe = trainer.recipe
    is_first = trainer.ranks.is_first
    (out / "samples").mkdir(parents=True, exist_ok=True)
    logs = closing(RunLog(out, recipe, after=trainer.step)) if is_first else nullcontext()
    n = recipe.gradient_accumulation
    assert trainer.source is not None, "batches are made before"
    batches = closing(trainer.source.iterate(trainer.step * n, recipe.steps * n, workers=workers))
    is_hidden = None if is_first else True
    bars = tqdm(total=recipe.steps, initial=trainer.step, desc=trainer.task.name, disable=is_hidden)
    trainer.start_clock()
    saves = trainer.saves
    writing = nullcontext() if saves is None else saves.finished()
    with writing, StopSignal() as stop, logs as log, batches as made, bars as bar:
        for group in group_batches(made, n):
            trainer.update(*group)
            bar.update()
            if saves is not None:
                saves.check()
            is_stopped = trainer.ranks.any(stop.requested or time.monotonic() > deadline)
            stopping = is_stopped or trainer.step == recipe.steps
            if trainer.step % recipe.log_every == 0:
                report = trainer.report()
                if log is not None:
                    log.write(report)
                bar.set_postfix_str(format_report(report))
                logger.info("step %d of %d  %s", trainer.step, recipe.steps, format_report(report))
            with trainer.untimed():
                if validation is not None and validation.due(trainer.step):
                    trainer.validate(validation, log, workers=workers)
                if trainer.step % recipe.sample_every == 0 or trainer.step == recipe.steps:
                    image = trainer.sample(out / "samples" / f"{trainer.step:08d}.png")
                    if log is not None:
                        log.write_image(trainer.step, image)
                if trainer.step % recipe.save_every == 0 or stopping:
                    trainer.save(out)
                    # one of shards is sent through the first rank, and training waits for one: at the end alone
                    if stopping or (trainer.distributed.sharded is None and saves is None):
                        trainer.save_release(out)
            if stopping:
                break


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


class Trainer:
    """A model, its optimisers and its averaged weights, and the step they have reached."""

    def __init__(
        self, task: TrainingTask, recipe: TrainConfig, device: torch.device, *, ranks: Ranks | None = None
    ) -> None:
        if set(task.loss_names) != set(recipe.loss_weights):
            raise ValueError(
                f"got loss_weights for {sorted(recipe.loss_weights)}, expected one for each of "
                f"{sorted(task.loss_names)}, the losses of {task.name!r}: correct the recipe"
            )
        recipe = resolve_precision(recipe, device)
        self.task = task
        self.recipe = recipe
        self.device = device
        self.ranks = ranks or Ranks(device=device)
        self.model = task.model
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(f"every parameter of {task.name!r} is frozen: train at least one part")
        self.distributed = DistributedModel(task, recipe, self.ranks)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = Optimizers(self.model, recipe)
        self.ema = EMA(self.model, recipe.ema_decay)
        self.saves = BackgroundSaves(self.ranks) if recipe.async_checkpoints else None
        self.step = 0
        if self.ranks.rank:
            # or all would drop the same features of other samples
            torch.manual_seed(recipe.seed * 2**20 + self.ranks.rank)
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
        self.optimizers.set_lr(self.recipe.lr_at(self.step))
        self.model.train()
        for batch in batches:
            self.throughput.add(batch)
        counts = self.loss_counts(batches)
        parts = [self.backward(batch, counts) for batch in batches]
        self.distributed.finish_gradients(self.params)
        losses = self.sum_losses(parts, counts)
        if not math.isfinite(losses["loss"]):
            raise FloatingPointError(
                f"the loss is {losses['loss']} at step {self.step} ({losses}): lower lr or max_grad_norm and resume the "
                "last checkpoint"
            )
        norm = self.distributed.clip_gradients(self.params, self.recipe.max_grad_norm)
        # a step would spoil every weight, and the next checkpoint
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm} at step {self.step}: lower lr or max_grad_norm and resume the last "
                "checkpoint"
            )
        self.optimizers.step()
        self.ema.update()
        self.step += 1
        for name, value in {**losses, "grad_norm": norm}.items():
            total = self.sums.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def loss_counts(self, batches: Sequence[Any]) -> dict[str, int]:
        """The count of every loss over the batches of a step, of all ranks; of those that occur."""
        counts: Counter[str] = Counter()
        for batch in batches:
            counts.update(self.task.loss_counts(batch))
        names = self.task.loss_names
        return {name: n for name, n in zip(names, self.ranks.sum([counts[name] for name in names]), strict=True) if n}

    def backward(self, batch: Any, counts: Mapping[str, int]) -> dict[str, Tensor]:
        """Add up the gradient of a batch; returns its share of every loss's mean over `counts`, and of their sum,
        "loss"."""
        totals = self.distributed.losses(batch)
        # a loss that the step has nothing of is 0: what it is computed by takes part with gradients of 0
        means = {name: total / counts.get(name, 1) for name, total in totals.items()}
        loss = torch.stack([self.recipe.loss_weights[name] * x.float() for name, x in means.items()]).sum()
        if not loss.requires_grad:
            raise ValueError(
                f"got a batch with the losses {', '.join(totals)}, none of which reaches a parameter that is trained: "
                "expected fewer `frozen`, or in every batch a sample that does; with `data`, make its group mandatory"
            )
        loss.backward()
        return {name: x.detach().float() for name, x in {**means, "loss": loss}.items() if name in (*counts, "loss")}

    def sum_losses(self, parts: Sequence[Mapping[str, Tensor]], counts: Mapping[str, int]) -> dict[str, float]:
        """The means of a step's losses, and "loss", from the shares of its batches, of all ranks."""
        names = [*counts, "loss"]
        none = torch.zeros((), device=self.device)
        shares = torch.stack([torch.stack([part.get(name, none) for part in parts]).sum() for name in names])
        return dict(zip(names, self.ranks.sum_tensor(shares).tolist(), strict=True))

    def report(self) -> dict[str, Any]:
        """Means since the last report, as a line of the log."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        now = time.monotonic()
        then, first_step = self.since
        n_samples = self.recipe.batch_size * self.recipe.gradient_accumulation * self.ranks.size
        rate = (self.step - first_step) * n_samples / max(now - then, 1e-9)
        self.sums = {}
        self.since = (now, self.step)
        totals = {name: means.pop(name) for name in ("loss", "grad_norm")}
        lr = self.recipe.lr_at(self.step - 1)
        figures = {} if self.source is None else self.sum_figures(self.source.figures())
        rates = describe_figures(figures, now - then) if figures else {"samples_per_s": round(rate, 2)}
        rates |= self.throughput.report(now - then, self.ranks)
        return {"step": self.step, **totals, "losses": means, "lr": lr, **rates}

    def sum_figures(self, figures: Mapping[str, int]) -> dict[str, int]:
        """The figures of all ranks' batches."""
        return dict(zip(figures, self.ranks.sum(list(figures.values())), strict=True))

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

    def validate(self, validation: Validation, log: RunLog | None, *, workers: int) -> None:
        """Log the losses on the held-out batches, by the averaged weights or the current ones."""
        self.model.eval()
        averaged = self.ema.swap_in() if validation.config.weights == "average" else nullcontext()
        with averaged:
            found = validation.run(self.distributed.losses, self.device, workers=workers)
        if log is not None:
            log.write({"step": self.step, "validation": found})
        logger.info("step %d of %d  validation: %s", self.step, self.recipe.steps, format_losses(found["losses"]))

    @torch.no_grad()
    def sample(self, path: Path) -> Image.Image | None:
        """Save the task's sample image, made with the averaged weights by the first rank, which returns it; None where it
        makes none."""
        self.model.eval()
        image = None
        with self.ema.swap_in(), self.distributed.whole():
            if self.ranks.is_first:
                image = self.task.sample_image()
        if image is not None:
            with atomic_file(path) as partial:
                image.save(partial, format="PNG")
        return image

    @torch.no_grad()
    def save(self, out: Path) -> None:
        """Write a checkpoint, together with all ranks; or begin to, where the recipe has `async_checkpoints`."""
        if self.saves is not None:
            self.saves.wait()  # before this one is copied: memory has room for one
        state = {
            "step": self.step,
            "updates": self.ema.n_updates,
            "sums": self.sums,
            "batches": [] if self.source is None else self.ranks.gather(self.source.state_dict()),
            "rng": self.ranks.gather(rng_states(self.device)),
            "recipe": dataclasses.asdict(self.recipe),
        }
        tensors = {
            WEIGHTS: named_tensors(self.model),
            EMA_WEIGHTS: self.ema.weights,
            OPTIMIZER: self.optimizers.tensors(),
        }
        is_sharded = self.distributed.sharded is not None
        if self.saves is None:
            save_checkpoint(out, self.step, tensors, state=state, ranks=self.ranks, sharded=is_sharded)
            return
        step = self.step
        kept = copy.deepcopy(state)
        copies = {kind: {name: copy_to_cpu(x) for name, x in some.items()} for kind, some in tensors.items()}
        self.saves.start(lambda ranks: save_checkpoint(out, step, copies, state=kept, ranks=ranks, sharded=is_sharded))

    @torch.no_grad()
    def save_release(self, out: Path) -> None:
        """Write the release, of the averaged weights: by the first rank, which is sent what is in shards."""
        self.model.eval()
        if self.distributed.sharded is None:
            with self.ema.swap_in():
                self.ranks.run_first(lambda: save_release(out / "release", release_writer(self.task)))
            return
        parameters = dict(self.model.named_parameters())
        values = [self.ema.weights.get(own_name(name), p.detach()) for name, p in parameters.items()]
        places = {id(p): i for i, p in enumerate(parameters.values())}

        def save(fetch: Callable[[int], Tensor]) -> None:
            with read_values_by(lambda p: fetch(places[id(p)]) if id(p) in places else p.detach()):
                save_release(out / "release", release_writer(self.task))

        serve_tensors(self.ranks, values, save)

    def resume(self, folder: Path) -> None:
        """Continue a checkpoint exactly, of as many ranks or of others. Raises ValueError for one of another model."""
        state = load_train_state(folder)
        ours = dataclasses.asdict(self.recipe)
        changed = [name for name in ours if ours[name] != state["recipe"].get(name)]
        if changed:
            logger.warning("the recipe differs from that of %s in %s: the run goes on by the new one", folder, changed)
        check_undamaged(folder, self.ranks)  # first: a damaged name would be taken for another model's
        load_into(folder, WEIGHTS, named_tensors(self.model), self.ranks)
        load_into(folder, EMA_WEIGHTS, self.ema.weights, self.ranks)
        held = self.optimizers.allocate(saved_shapes(folder, OPTIMIZER), str(folder))
        load_into(folder, OPTIMIZER, held, self.ranks)
        self.step = state["step"]
        self.ema.n_updates = state["updates"]
        self.sums = state["sums"]
        # earlier checkpoints have none: their runs' batches are numbered by the steps
        self.source_states = state.get("batches", ())
        self.since = (time.monotonic(), self.step)
        if self.ranks.rank < len(state["rng"]):
            restore_rng_states(state["rng"][self.ranks.rank], self.device)

    def init_from(self, init: str | Path) -> None:
        """Load the averaged weights of another run, of its newest checkpoint or of the one that is given, or a
        release."""
        ours = named_tensors(self.model)
        folder = initial_checkpoint(init)
        if folder is None:
            released = release_tensors(self.model, init, has_adapter=self.recipe.lora is not None)
            copy_into(without_new_head(ours, released), released, str(init))
        else:
            check_undamaged(folder, self.ranks)
            ours = without_new_head(ours, saved_shapes(folder, WEIGHTS))
            load_into(folder, WEIGHTS, ours, self.ranks)
            # the average holds what that run trained, which need not be what this one trains
            averaged = {name: ours[name] for name in saved_shapes(folder, EMA_WEIGHTS)}
            load_into(folder, EMA_WEIGHTS, averaged, self.ranks)
        self.ema = EMA(self.model, self.recipe.ema_decay)


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_rng_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators' states to those that `rng_states` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
