"""The training loop: AdamW, warm-up, clipping, averaged weights, checkpoints that continue exactly. One device."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from unimm.training.checkpoints import (
    EMA_FILE,
    WEIGHTS_FILE,
    JsonlLog,
    list_checkpoints,
    load_into,
    load_train_state,
    named_tensors,
    save_checkpoint,
    save_release,
    tensor_names,
)
from unimm.training.config import TrainConfig
from unimm.training.ema import EMA
from unimm.training.freezing import check_prefixes
from unimm.training.tasks.base import TrainingTask

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
) -> int:
    """Train until recipe.steps, `hours`, SIGTERM or ctrl-C, and return the step reached.

    `out` receives log.jsonl, samples/, checkpoints/ and release/ (the objective's own files, of the averaged weights).
    `resume` continues the newest checkpoint in `out`; `init` starts from the averaged weights of another run, which may
    have trained other parts of the same model: its folder, or that of a checkpoint. Batches are made by `workers`
    processes ahead of the loop, or in the loop where that is 0.
    """
    out = Path(out)
    trainer = Trainer(task, recipe, torch.device(device))
    load_start(trainer, out, resume=resume, init=init)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    log = JsonlLog(out / "log.jsonl", after=trainer.step)
    deadline = math.inf if hours is None else time.monotonic() + 3600 * hours
    ahead = closing(iterate_batches(task.batch, trainer.step, recipe.steps, workers=workers))
    bars = tqdm(total=recipe.steps, initial=trainer.step, desc=task.name, disable=None)
    with StopSignal() as stop, ahead as made, bars as bar:
        for batch in made:
            trainer.update(batch)
            bar.update()
            stopping = stop.requested or time.monotonic() > deadline or trainer.step == recipe.steps
            if trainer.step % recipe.log_every == 0:
                line = trainer.report()
                log.write(line)
                bar.set_postfix_str(format_report(line))
                logger.info("step %d of %d  %s", trainer.step, recipe.steps, format_report(line))
            if trainer.step % recipe.sample_every == 0 or trainer.step == recipe.steps:
                trainer.sample(out / "samples" / f"{trainer.step:08d}.png")
            if trainer.step % recipe.save_every == 0 or stopping:
                trainer.save(out)
            if stopping:
                break
    return trainer.step


def load_start(trainer: Trainer, out: Path, *, resume: bool, init: str | Path | None) -> None:
    """Bring in earlier weights, if asked for; refuse to overwrite a run by accident."""
    found = list_checkpoints(out)
    if resume and init is not None:
        raise ValueError("got both resume and init, expected one: resume continues a run, init starts another from it")
    if resume and not found:
        raise ValueError(f"got resume, but {out} holds no checkpoint: leave resume out to start the run")
    if found and not resume:
        raise ValueError(f"{out} holds a run of {int(found[-1].name)} steps: resume it, or choose another folder")
    if resume:
        trainer.resume(found[-1])
    if init is not None:
        trainer.init_from(Path(init))


class Trainer:
    """A model, its optimisers and its averaged weights, and the step they have reached."""

    def __init__(self, task: TrainingTask, recipe: TrainConfig, device: torch.device) -> None:
        if set(task.loss_names) != set(recipe.loss_weights):
            raise ValueError(
                f"got loss_weights for {sorted(recipe.loss_weights)}, expected one for each of "
                f"{sorted(task.loss_names)}, the losses of {task.name!r}: correct the recipe"
            )
        self.task, self.recipe, self.device = task, recipe, device
        self.model = task.model.to(device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError(f"every parameter of {task.name!r} is frozen: train at least one part")
        self.optimizers = build_optimizers(self.model, recipe)
        self.ema = EMA(self.model, recipe.ema_decay)
        self.step = 0
        # sums since the last line of the log: loss name -> [sum, count]
        self.sums: dict[str, list[float]] = {}
        # since when, and from which step, the samples a second are counted: a resumed run counts its own
        self.since = (time.monotonic(), 0)

    def update(self, batch: Any) -> None:
        """One step."""
        recipe = self.recipe
        lr = recipe.lr_at(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            losses = self.task.losses(batch)
        loss = self.weighted_sum(losses)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step} ({ {k: x.item() for k, x in losses.items()} }): "
                f"lower lr or clip and resume the last checkpoint"
            )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params, recipe.max_grad_norm)
        if not math.isfinite(norm.item()):  # a step would spoil every weight, and the next checkpoint
            raise FloatingPointError(
                f"the gradient's norm is {norm.item()} at step {self.step}: lower lr or clip and resume the last checkpoint"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        for name, value in {**losses, "loss": loss, "grad_norm": norm}.items():
            total = self.sums.setdefault(name, [0.0, 0])
            total[0] += value.item()
            total[1] += 1

    def weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """The sum that is minimised, in float32."""
        unknown = sorted(losses.keys() - self.recipe.loss_weights.keys())
        if unknown or not losses:
            raise ValueError(
                f"{self.task.name!r} returned the losses {sorted(losses)}, expected some of "
                f"{sorted(self.recipe.loss_weights)}: correct its loss_names"
            )
        return torch.stack([self.recipe.loss_weights[name] * x.float() for name, x in losses.items()]).sum()

    def report(self) -> dict[str, Any]:
        """Means since the last report, as a line of the log."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        now, (then, first) = time.monotonic(), self.since
        rate = (self.step - first) * self.recipe.batch_size / max(now - then, 1e-9)
        self.sums, self.since = {}, (now, self.step)
        ends = {name: means.pop(name) for name in ("loss", "grad_norm")}
        lr = self.recipe.lr_at(self.step - 1)
        return {"step": self.step, **ends, "losses": means, "lr": lr, "samples_per_s": round(rate, 2)}

    @torch.no_grad()
    def sample(self, path: Path) -> None:
        """Save the objective's picture, drawn by the averaged weights."""
        self.model.eval()
        with self.ema.swap_in():
            image = self.task.sample_image()
        fresh = path.with_suffix(".new.png")
        image.save(fresh)
        fresh.replace(path)

    @torch.no_grad()
    def save(self, out: Path) -> None:
        """Write a checkpoint, then the release."""
        state = {
            "step": self.step,
            "updates": self.ema.n_updates,
            "optimizers": [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "sums": self.sums,
            "rng": rng_states(self.device),
            "recipe": dataclasses.asdict(self.recipe),
        }
        save_checkpoint(out, self.step, self.model, ema=self.ema.weights, state=state)
        self.model.eval()
        with self.ema.swap_in():
            save_release(out / "release", self.task.save)

    def resume(self, folder: Path) -> None:
        """Continue a checkpoint exactly."""
        state = load_train_state(folder)
        theirs, ours = state["recipe"], dataclasses.asdict(self.recipe)
        changed = [name for name in ours if ours[name] != theirs.get(name)]
        if changed:
            logger.warning("the recipe differs from that of %s in %s: the run goes on by the new one", folder, changed)
        load_into(folder / WEIGHTS_FILE, named_tensors(self.model))
        load_into(folder / EMA_FILE, self.ema.weights)
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
        self.step, self.ema.n_updates, self.sums = state["step"], state["updates"], state["sums"]
        self.since = (time.monotonic(), self.step)
        restore_rng_states(state["rng"], self.device)

    def init_from(self, folder: Path) -> None:
        """Take over the averaged weights of another run: of its newest checkpoint, or of the checkpoint that is given."""
        folder = next(reversed(list_checkpoints(folder)), folder)
        if not all((folder / name).is_file() for name in (WEIGHTS_FILE, EMA_FILE)):
            raise ValueError(
                f"got init {folder}, expected the folder of a run, or that of a checkpoint, with files {WEIGHTS_FILE} and {EMA_FILE}"
            )
        ours = named_tensors(self.model)
        load_into(folder / WEIGHTS_FILE, ours)
        # the average holds what that run trained, which need not be what this one trains
        load_into(folder / EMA_FILE, {name: ours[name] for name in tensor_names(folder / EMA_FILE)})
        self.ema = EMA(self.model, self.recipe.ema_decay)


def build_optimizers(model: nn.Module, recipe: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024; scaled as in arXiv 2502.16982 section 2.2, so that AdamW's learning rate serves) for the
    matrices that the recipe names, AdamW for the rest; weight decay on matrices only, but for those it leaves out."""
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    check_prefixes(model, recipe.muon, where="muon")
    check_prefixes(model, recipe.no_weight_decay, where="no_weight_decay")
    for name, p in model.named_parameters():
        if p.requires_grad:
            (hidden if p.ndim == 2 and name.startswith(recipe.muon) else others).append(p)
    kept = {id(p) for name, p in model.named_parameters() if p.ndim < 2 or name.startswith(recipe.no_weight_decay)}

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        parts = (
            ([p for p in params if id(p) not in kept], recipe.weight_decay),
            ([p for p in params if id(p) in kept], 0.0),
        )
        return [{"params": part, "weight_decay": decay} for part, decay in parts if part]

    found: list[torch.optim.Optimizer] = []
    if hidden:
        found.append(torch.optim.Muon(groups(hidden), lr=recipe.lr, adjust_lr_fn="match_rms_adamw"))
    if others:
        found.append(torch.optim.AdamW(groups(others), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True))
    return found


@dataclasses.dataclass(frozen=True)
class BatchError:
    """What a batch's maker raised, for whoever asked for the batch."""

    error: Exception


class BatchDataset(Dataset[Any]):
    """Batches by step, for a DataLoader."""

    def __init__(self, batch: Callable[[int], Any]) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> Any:
        try:
            return self.batch(step)
        except (ValueError, TypeError, LookupError, OSError, RuntimeError, ArithmeticError) as error:
            # raised again in `batches`: the loader would wrap its words in a worker's trace
            return BatchError(error)


def iterate_batches(batch: Callable[[int], Any], start: int, stop: int, *, workers: int) -> Generator[Any, None, None]:
    """batch(start) ... batch(stop - 1), in order, made ahead by worker processes; close it to be rid of these.

    Raises what `batch` raises.
    """
    loader = DataLoader(
        BatchDataset(batch),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_signals,
        # its own generator, so that starting workers does not move the global one and with it a resumed run
        generator=torch.Generator(),
    )
    for made in loader:
        if isinstance(made, BatchError):
            raise made.error
        yield made


def ignore_signals(worker: int) -> None:
    """Let only the main process answer ctrl-C and SIGTERM: it must still get its batches to reach a checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class StopSignal:
    """Turns SIGTERM and ctrl-C into a wish that the loop reads after its step; a second one acts as ever."""

    def __init__(self) -> None:
        self.requested = False
        self.previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # python allows handlers in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous_handlers[number] = signal.signal(number, self.request)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        logger.warning("got %s: saving a checkpoint after this step", signal.Signals(number).name)
        signal.signal(number, self.previous_handlers[number])


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_rng_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def format_report(line: dict[str, Any]) -> str:
    """A line of the log, for people."""
    losses = "  ".join(f"{name} {value:.4f}" for name, value in line["losses"].items())
    return f"{losses}  norm {line['grad_norm']:.2f}  {line['samples_per_s']:.0f}/s"
