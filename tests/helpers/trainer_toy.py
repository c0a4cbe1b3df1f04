"""A net that is trained in no time, its recipe, and the files that its runs write."""

import json

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from unimm.training.config import TrainConfig
from unimm.training.losses import LossSum
from unimm.training.trainer import train

RECIPE = TrainConfig(
    task="toy",
    seed=3,
    steps=8,
    batch_size=4,
    lr=0.01,
    betas=(0.9, 0.99),
    eps=1e-8,
    weight_decay=0.1,
    muon=(),
    warmup_steps=2,
    schedule="cosine",
    min_lr_ratio=0.1,
    max_grad_norm=1.0,
    ema_decay=0.9,
    precision="float32",
    loss_weights={"near": 1.0, "small": 0.5},
    save_every=4,
    sample_every=4,
    log_every=1,
)

# of a line of the log, what is not the same in every run
MEASURED = ("samples_per_s", "tokens_per_s", "images_per_s", "tflops", "mfu", "memory_mb")


class Draw:
    """Batches by (seed, step); does something else as well at one step, if asked."""

    def __init__(self, seed, at=None, action=None):
        self.seed, self.at, self.action = seed, at, action

    def __call__(self, step):
        if step == self.at:
            self.action()
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(self.seed * 1000 + step))


class Toy:
    """A net with dropout, so that a resumed run needs the random state, and a frozen first layer."""

    name = "toy"
    loss_names = ("near", "small")

    def __init__(self, at=None, action=None):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.LayerNorm(5), nn.Linear(5, 3))
        self.model[0].requires_grad_(False)
        self.batch = Draw(RECIPE.seed, at, action)

    def losses(self, batch):
        y = self.model(batch)
        return {"near": LossSum.over((y - batch).square()), "small": LossSum.over(y.abs())}

    def loss_counts(self, batch):
        return {"near": batch.numel(), "small": batch.numel()}

    def sample_image(self):
        assert not self.model.training
        return Image.new("RGB", (2, 2))

    def save(self, folder):
        save_file(self.model.state_dict(), folder / "model.safetensors")


def log_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def run(out, *, recipe=RECIPE, toy=None, **options):
    toy = toy or Toy()
    return toy, train(toy, recipe, out, **{"workers": 0, **options})


def assert_same_files(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
