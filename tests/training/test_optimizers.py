"""Optimisers by recipe: learning rates of parts, Adam in 8 bits."""

import dataclasses
import sys

import pytest
import torch
from helpers.rank_jobs import Matrices, matrices_job
from helpers.trainer_toy import RECIPE, Toy

from unimm.distributed.muon import Muon, orthogonalize
from unimm.distributed.ranks import Ranks
from unimm.training import optim
from unimm.training.config import from_mapping
from unimm.training.optim import Optimizers
from unimm.training.precision import resolve_precision
from unimm.training.trainer import Trainer

SGD_LIKE = dataclasses.replace(RECIPE, weight_decay=0.0, warmup_steps=0, schedule="constant", betas=(0.0, 0.0))


def moved_by(recipe, step=0):
    """How far each parameter moves at a step, by gradients of ones: as far as its learning rate says."""
    model = Matrices()
    optimizers = Optimizers(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers.set_lr(recipe.lr_at(step))
    optimizers.step()
    assert all(p.grad is None for p in model.parameters())
    return {name: (before[name] - p.detach()).mean().item() for name, p in model.named_parameters()}


def test_learning_rates_of_parts():
    multipliers = {"a": 0.5, "adam": 0.1, "bias": 3.0}
    moved = moved_by(dataclasses.replace(SGD_LIKE, lr_multipliers=multipliers))
    expected = {"muon": 1.0, "adam": 0.1, "bias": 3.0}  # of two prefixes the longer one counts
    assert moved == pytest.approx({name: RECIPE.lr * x for name, x in expected.items()}, rel=1e-4)


def test_multiplied_rates_follow_the_schedule():
    recipe = dataclasses.replace(SGD_LIKE, warmup_steps=4, lr_multipliers={"bias": 2.0})
    moved = moved_by(recipe, step=1)
    assert moved["adam"] == pytest.approx(RECIPE.lr / 2, rel=1e-4) and moved["bias"] == pytest.approx(
        RECIPE.lr, rel=1e-4
    )


def test_rates_of_parts_that_are_not_there_or_frozen():
    wrong = {"4.": r"got lr_multipliers \['4.'\], expected", "0.": "all of these are frozen"}
    for prefix, match in wrong.items():
        with pytest.raises(ValueError, match=match):
            Trainer(Toy(), dataclasses.replace(RECIPE, lr_multipliers={prefix: 0.5}), torch.device("cpu"))
    values = {**dataclasses.asdict(RECIPE), "lr_multipliers": {"3.": 0.0}}
    with pytest.raises(ValueError, match="got 0.0 for lr_multipliers.3. in there, expected more than 0"):
        from_mapping(type(RECIPE), values, where="there")


def test_eight_bits_are_nearly_adamw(tmp_path):
    """The averages' error is a part of the largest of its block: steps differ by a part of the learning rate."""
    recipe = dataclasses.replace(RECIPE, warmup_steps=0)
    expected = matrices_job(Ranks(), recipe=recipe)
    found = matrices_job(Ranks(), recipe=dataclasses.replace(recipe, optimizer="adamw8bit"))
    start = dict(Matrices().named_parameters())
    for name in ("muon", "adam"):
        moved = (expected[name] - start[name]).abs().mean()
        error = (found[name] - expected[name]).abs().mean()
        assert 0 < error < 0.1 * moved, name
    assert torch.equal(found["bias"], expected["bias"]), "a vector is held in full"


def test_eight_bits_go_on_exactly(tmp_path):
    recipe = dataclasses.replace(RECIPE, optimizer="adamw8bit")
    expected = matrices_job(Ranks(), recipe=recipe, out=tmp_path)
    found = matrices_job(Ranks(), recipe=recipe, resumed=tmp_path / "checkpoints" / "00000002")
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_what_another_optimiser_held(tmp_path):
    recipe = dataclasses.replace(RECIPE, optimizer="adamw8bit")
    matrices_job(Ranks(), recipe=recipe, out=tmp_path)
    with pytest.raises(ValueError, match=r"there holds exp_avg.codes.* of (muon|adam).*use the recipe"):
        matrices_job(Ranks(), recipe=RECIPE, resumed=tmp_path / "checkpoints" / "00000002")


def test_small_parameters_and_rows_of_parts_of_blocks_are_held_in_full():
    recipe = dataclasses.replace(RECIPE, optimizer="adamw8bit")
    shapes = {"a": (4096, 256), "b": (4096, 255), "c": (4095, 256)}
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
    assert Optimizers(model, recipe).kinds == {"a": "adamw8bit", "b": "adamw", "c": "adamw"}
    assert optim.MIN_8BIT_SIZE == 4096 * 256


def test_torchao_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setattr(optim, "MIN_8BIT_SIZE", 1)
    with pytest.raises(ValueError, match=r"pip install 'unimm\[torchao\]'"):
        Optimizers(Matrices(), dataclasses.replace(RECIPE, optimizer="adamw8bit"))


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_muon_is_torchs(shape):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([{"params": [ours], "weight_decay": 0.1}], lr=0.1),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    # theirs orthogonalises in bfloat16; a step moves an element by 0.02
    assert (ours - theirs).abs().max() < 0.003
    assert (ours - start).abs().max() > 0.03


@pytest.mark.parametrize("tiles", [True, False])
def test_automatic_precision(tiles, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    recipe = dataclasses.replace(RECIPE, precision="auto")
    trainer = Trainer(Toy(), recipe, torch.device("cpu"))
    assert trainer.recipe.precision == ("bfloat16" if tiles else "float32")
    assert trainer.throughput.dtype == (torch.bfloat16 if tiles else torch.float32)
    assert resolve_precision(recipe, torch.device("cuda")).precision == "bfloat16"
    named = dataclasses.replace(RECIPE, precision="bfloat16")
    assert resolve_precision(named, torch.device("cpu")) is named


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_orthogonal_matrices(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))).float())
    # the iterations leave singular values between about 0.7 and 1.2
    assert values.min() > 0.6 and values.max() < 1.3
