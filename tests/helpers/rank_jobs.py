"""What every process of a run of several does for the tests that start this file through helpers/ranks.py.

The processes are forks of one that has imported what they need. A process ends without torch's teardown, in which gloo's
threads may crash.
"""

import dataclasses
import faulthandler
import os
import pickle
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path
from unittest.mock import patch

import numpy as np
import peft  # noqa: F401, which takes seconds
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.bagel_widths import PackTask, few_layers
from helpers.family_recipes import use_quick_tokenizers
from helpers.peak_memory import allocated_peak
from helpers.trainer_toy import Toy
from unimm import MetaQuery, TextSampling, UniWorld, load
from unimm.cli.train import train_command
from unimm.denoisers.flux import FluxTransformer
from unimm.denoisers.sana import SanaTransformer
from unimm.distributed.ranks import Ranks, start_ranks
from unimm.distributed.sharding import build_mesh, copy_to_cpu, local_tensor, shard_like, whole_tensor, with_local
from unimm.distributed.tensor_parallel import parallelize
from unimm.training import checkpoints, optim
from unimm.training.checkpoints import list_checkpoints, load_into, save_checkpoint, saved_shapes
from unimm.training.data_config import DataConfig, DataGroupConfig, ValidationConfig
from unimm.training.losses import LossSum
from unimm.training.memory import tensor_bytes
from unimm.training.optim import Optimizers
from unimm.training.record_batches import open_groups
from unimm.training.tasks import base
from unimm.training.tasks.base import build_task
from unimm.training.trainer import Trainer, train
from unimm.training.validation import Validation

CPU = torch.device("cpu")
# seconds after which a process says where it stands
HANGING = 800


def steps_of(recipe, *, ranks=None, saved=None, resumed=None):
    """Three steps of a recipe, or the third one after a checkpoint: the losses of each, and then the weights and the
    averages, whole. saved: where a checkpoint is written after the second step."""
    ranks = ranks or Ranks()
    trainer = Trainer(build_task(recipe), recipe, CPU, ranks=ranks)
    if resumed is not None:
        trainer.resume(resumed)
    lines = []
    for step in range(trainer.step, 3):
        numbers = [recipe.gradient_accumulation * step + i for i in range(recipe.gradient_accumulation)]
        trainer.update(*(trainer.task.batch(number * ranks.size + ranks.rank) for number in numbers))
        report = trainer.report()
        lines.append({"loss": report["loss"], "grad_norm": report["grad_norm"], **report["losses"]})
        if saved is not None and step == 1:
            trainer.save(saved)
    weights = {name: whole_tensor(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    averages = {name: whole_tensor(x).clone() for name, x in trainer.ema.weights.items()}
    if saved is not None:
        trainer.save_release(saved)
    return lines, weights, averages


def run_job(ranks, *, recipe, out, resume=False):
    """A run, with its files; its sample is made in no time."""
    task = build_task(recipe)
    task.sample_image = lambda: Image.new("RGB", (2, 2), (int(task.model.training), 0, 0))
    return train(task, recipe, out, workers=0, resume=resume)


def sample_job(ranks, *, recipe, path):
    """A sample image of the first rank after a step."""
    trainer = Trainer(build_task(recipe), recipe, CPU, ranks=ranks)
    trainer.update(trainer.task.batch(ranks.rank))
    trainer.sample(path)
    trainer.update(trainer.task.batch(ranks.rank + 2))
    return trainer.report()["loss"]


def other_recipe_job(ranks, *, recipe, out):
    """A run whose processes have other learning rates."""
    return error_of(lambda: train(Toy(), dataclasses.replace(recipe, lr=recipe.lr * (1 + ranks.rank)), out, workers=0))


def other_command_job(ranks, *, out):
    """The command with other learning rates, which must be said before a model is built."""
    settings = [f"lr={1 + ranks.rank}"]
    with patch.object(base, "build_task", side_effect=AssertionError("built")):
        return error_of(lambda: train_command("bagel-nano", out, set_=settings))


def other_datasets_job(ranks, *, recipe, datasets, out):
    """A run each of whose processes has opened a dataset of its own, to train on and then to validate on."""
    own, shared = (
        DataConfig(groups={"mine": DataGroupConfig(paths=(str(path),))}) for path in (datasets[ranks.rank], datasets[0])
    )
    validated = dataclasses.replace(recipe, data=shared, validation=ValidationConfig(every=1, batches=1, data=own))
    return [
        error_of(lambda: train(Toy(), recipe, out, workers=0, groups=open_groups(own))),
        error_of(lambda: Validation(Toy(), validated, open_groups(shared), ranks=ranks)),
    ]


def spoilt_job(ranks, *, recipe, out):
    """A run of whose ranks the second meets a loss that is no number in the sixth step."""
    toy = Toy()

    def losses(batch):
        losses = Toy.losses(toy, batch)
        return losses | {"near": LossSum(losses["near"].total * float("nan"), losses["near"].count)}

    def spoil():
        toy.losses = losses

    toy.batch.at, toy.batch.action = 11, spoil  # batches 0 to 9 are of the first five steps
    return error_of(lambda: train(toy, recipe, out, workers=0))


def full_disk_job(ranks, *, recipe, out):
    """A run whose second rank can write no more when its second checkpoint is due."""
    task = build_task(recipe)
    task.sample_image = lambda: Image.new("RGB", (2, 2))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = task.batch

    def batch(number):
        if number == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return made(number)

    task.batch = batch
    try:
        return error_of(lambda: train(task, recipe, out, workers=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def lost_job(ranks, *, recipe, out):
    """A run of which the second process is killed in the sixth step."""
    toy = Toy()
    toy.batch.at, toy.batch.action = 11, lambda: os.kill(os.getpid(), signal.SIGKILL)
    return error_of(lambda: train(toy, recipe, out, workers=0))


def killed_saving_job(ranks, *, recipe, out):
    """A run whose first process is killed while it writes the second checkpoint, once training has gone on meanwhile."""
    toy = Toy()
    has_gone_on = threading.Event()
    toy.batch.at, toy.batch.action = 12 + ranks.rank, has_gone_on.set  # the seventh step's
    write = checkpoints._write_state

    def write_or_die(folder, state, checksums):
        if state["step"] < 6:
            write(folder, state, checksums)
            return
        assert has_gone_on.wait(60) and not list_checkpoints(out)[1:], "neither training nor saving waits for the other"
        os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(checkpoints, "_write_state", write_or_die):
        return error_of(lambda: train(toy, recipe, out, workers=0))


def offloaded_job(ranks):
    """Whether tensors of shards in the CPU's memory, on a mesh of GPUs, are that memory itself; and copies."""
    mesh = DeviceMesh("cuda", torch.arange(ranks.size), _init_backend=False)
    local = torch.randn(2, 3)
    spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(torch.Size([4, 3]), (3, 1), local.dtype))
    x = with_local(DTensor(local, spec, requires_grad=False), local)
    copied = copy_to_cpu(x)
    same = [local_tensor(one).data_ptr() == local.data_ptr() for one in (x, copied)]
    return same, tuple(copied.shape), torch.equal(local_tensor(copied), local)


def memory_job(ranks, *, recipe, llm):
    """The bytes that a rank holds of a BAGEL in shards, and what a step allocates beside them at its peak."""
    task = PackTask(few_layers(values=True, llm=llm))
    batch = task.batch(0)
    counts = {name: loss.count for name, loss in task.losses(batch).items()}
    task.loss_counts = lambda batch: counts
    trainer = Trainer(task, recipe, CPU, ranks=ranks)
    trainer.update(batch)  # the optimiser's states are there from now on
    weights = [*trainer.model.parameters(), *trainer.model.buffers()]
    held = {
        "weights": weights,
        "optimizers": trainer.optimizers.tensors().values(),
        "average": trainer.ema.weights.values(),
    }
    sizes = {name: tensor_bytes(local_tensor(x.detach()) for x in tensors) for name, tensors in held.items()}
    return sizes, allocated_peak(lambda: trainer.update(batch))


def error_of(action):
    """The error that something raises, as (class, message)."""
    try:
        return action()
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        return type(error).__name__, str(error)


class Matrices(nn.Module):
    """Parameters that Muon, AdamW and AdamW in 8 bits train."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("muon", "adam"):
            self.register_parameter(name, nn.Parameter(torch.randn(65, 256, generator=generator)))
        self.bias = nn.Parameter(torch.randn(5, generator=generator))


def matrices_job(ranks, *, recipe, out=None, resumed=None):
    """Three steps of optimisers, or the third one after a checkpoint, by gradients that all ranks have: the parameters,
    whole. out: where a checkpoint is written after the second step."""
    model = Matrices()
    if ranks.size > 1:
        fully_shard(model, mesh=build_mesh(ranks, shard=ranks.size, replicate=1))
    parameters = dict(model.named_parameters())
    first = 0
    with patch.object(optim, "MIN_8BIT_SIZE", 1), patch.object(torch, "compile", lambda function, **options: function):
        optimizers = Optimizers(model, recipe)
        if resumed is not None:
            load_into(resumed, "model", parameters, ranks)
            held = optimizers.allocate(saved_shapes(resumed, "optimizer"), "there")
            load_into(resumed, "optimizer", held, ranks)
            first = 2
        for step in range(first, 3):
            optimizers.set_lr(recipe.lr_at(step))
            for i, p in enumerate(parameters.values()):
                gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                p.grad = with_local(p.detach(), shard_like(gradient, p))
            optimizers.step()
            if out is not None and step == 1:
                tensors = {"model": parameters, "optimizer": optimizers.tensors()}
                save_checkpoint(out, 2, tensors, state={}, ranks=ranks, sharded=ranks.size > 1)
    return {name: whole_tensor(p.detach()).clone() for name, p in parameters.items()}


# what is compared: the method of a model, or of a part, that gives velocities or logits
STEPS = {
    "bagel-nano": "guided_velocity",
    "janus-nano": "decode_image_step",
    "janusflow-nano": "decode_velocity",
    "metaquery-nano": "guided_velocity",
    "uniworld-nano": "denoiser.forward",
}


def with_even_heads(model):
    """The model, with an untrained denoiser where the heads of its own are odd."""
    torch.manual_seed(1)
    if isinstance(model, MetaQuery):
        config = dataclasses.replace(model.config.denoiser, n_cross_heads=10, cross_head_dim=32)
        model.denoiser = SanaTransformer(config).eval()
        for p in model.denoiser.parameters():
            nn.init.normal_(p, std=0.05)
    if isinstance(model, UniWorld):
        config = dataclasses.replace(model.denoiser.config, n_heads=10, head_dim=12, rope_axes_dims=(4, 4, 4))
        model.denoiser = FluxTransformer(config).eval()
    return model.requires_grad_(False)


def generate_job(ranks, *, name):
    """What the first steps of generating an image give on these ranks together, and the image."""
    model = with_even_heads(load(name))
    parallelize(model, ranks)
    owner = model.get_submodule(STEPS[name].rpartition(".")[0])
    method = STEPS[name].rpartition(".")[2]
    plain = getattr(owner, method)
    seen = []

    def recorded(*args, **options):
        seen.append(plain(*args, **options))
        return seen[-1]

    with patch.object(owner, method, recorded):
        steps = {} if name == "janus-nano" else {"steps": 3}
        image = model.generate("two blue squares", seed=3, **steps).image
    answer = model.understand(None, "what is a circle?", text_sampling=TextSampling(max_tokens=8))
    return [one.clone() for one in seen[:3]], np.asarray(image, int), answer


JOBS = {
    "generate": generate_job,
    "matrices": matrices_job,
    "steps": lambda ranks, **arguments: steps_of(**arguments, ranks=ranks),
    "error of steps": lambda ranks, **arguments: error_of(lambda: steps_of(**arguments, ranks=ranks)),
    "run": run_job,
    "sample": sample_job,
    "other recipe": other_recipe_job,
    "other command": other_command_job,
    "other datasets": other_datasets_job,
    "spoilt": spoilt_job,
    "full disk": full_disk_job,
    "lost": lost_job,
    "killed saving": killed_saving_job,
    "memory": memory_job,
    "offloaded": offloaded_job,
}


def do_jobs(folder: Path) -> None:
    """Do the jobs in a folder, a pickled list of (name, job, arguments), and leave what they give beside it, by name."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(HANGING)
    use_quick_tokenizers()
    jobs = pickle.loads((folder / "jobs.pickle").read_bytes())  # noqa: S301, as the test wrote it
    results = {}
    with start_ranks(CPU) as ranks:
        for name, job, arguments in jobs:
            results[name] = JOBS[job](ranks, **arguments)
            (folder / f"results{ranks.rank}.pickle").write_bytes(pickle.dumps(results))
        if job not in ("lost", "killed saving"):
            dist.barrier()


def start_rank(rank: int, folder: Path) -> int:
    """Fork a process that does the jobs as one of the ranks; its id."""
    if process := os.fork():
        return process
    code = 1
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        do_jobs(folder)
        code = 0
    except BaseException:  # noqa: BLE001, the process ends here
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(folder: Path, n: int) -> None:
    """Do the jobs in a folder with n processes, and leave there how each of them ended."""
    processes = [start_rank(rank, folder) for rank in range(n)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    (folder / "codes.pickle").write_bytes(pickle.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
