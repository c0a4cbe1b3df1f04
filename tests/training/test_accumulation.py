"""A step over several batches: losses normalised over all of them, batches numbered and continued."""

import dataclasses
import os
import signal

import pytest
import torch
from helpers.trainer_toy import RECIPE, Draw, Toy, assert_same_files, log_of, run
from safetensors.torch import load_file

from unimm.training.batches import StepBatches, group_batches
from unimm.training.checkpoints import load_train_state
from unimm.training.losses import LossSum, count_by_kind, mean_losses, sum_by_kind
from unimm.training.trainer import Trainer


class Uneven(Toy):
    """Losses over unequal counts: rows of each batch, of which `small` has those whose first number is positive."""

    loss_names = ("near", "small")

    def __init__(self):
        super().__init__()
        self.model[1] = torch.nn.Identity()  # dropout would draw otherwise for two batches than for both in one

    def losses(self, batch):
        errors = (self.model(batch) - batch).square().mean(1)
        kinds = (batch[:, 0] <= 0).long()
        return {"near": LossSum.over(errors)} | sum_by_kind(("small",), kinds, errors)

    def loss_counts(self, batch):
        return {"near": len(batch)} | count_by_kind(("small",), (batch[:, 0] <= 0).long())


def test_two_batches_of_a_step_are_one_of_both():
    batches = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (5, 2)]
    batches[1][:, 0] = -1.0  # without one of the losses
    one, two = (Trainer(Uneven(), RECIPE, torch.device("cpu")) for _ in range(2))
    for _ in range(3):
        one.update(torch.cat(batches))
        two.update(*batches)
    for name, p in one.model.named_parameters():
        # adam divides by the gradient's size: where that is as small as the rounding, steps are of any sign
        torch.testing.assert_close(two.model.get_parameter(name), p, rtol=1e-5, atol=1e-6)
    assert two.report()["losses"] == pytest.approx(one.report()["losses"], rel=1e-5)
    assert {"near", "small"} == set(mean_losses(two.task.losses(batches[0])))


def test_a_run_of_two_batches_a_step_goes_on_exactly(tmp_path):
    recipe = dataclasses.replace(RECIPE, gradient_accumulation=2)
    run(tmp_path / "whole", recipe=recipe)
    # stopped in the third step, by its second batch
    stopping = Toy(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tmp_path / "parts", recipe=recipe, toy=stopping)[1] == 3
    state = load_train_state(tmp_path / "parts/checkpoints/00000003")
    assert state["batches"] == [{"n_consumed": 6}]
    run(tmp_path / "parts", recipe=recipe, resume=True)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    for name in ("model", "average"):
        path = f"checkpoints/00000008/{name}.safetensors"
        assert_same_files(tmp_path / "parts" / path, tmp_path / "whole" / path)
    run(tmp_path / "single")
    single = load_file(tmp_path / "single/release/model.safetensors")
    whole = load_file(tmp_path / "whole/release/model.safetensors")
    assert not torch.equal(single["3.weight"], whole["3.weight"]), "the second batch of a step counts"


def test_ranks_take_batches_in_turn():
    def numbers(source, start, stop):
        return list(source.iterate(start, stop, workers=0))

    sources = [StepBatches(int, rank=rank, world_size=2) for rank in range(2)]
    assert [numbers(source, 0, 3) for source in sources] == [[0, 2, 4], [1, 3, 5]]
    # on one rank they go on after all that both have had
    alone = StepBatches(int)
    alone.load_state_dict([source.state_dict() for source in sources])
    assert numbers(alone, 6, 9) == [6, 7, 8]
    assert numbers(StepBatches(int, rank=1, world_size=3), 2, 4) == [7, 10], "without a state, after the first ones"


def test_the_place_is_that_after_the_last_batch_that_was_taken():
    source = StepBatches(Draw(1))
    batches = source.iterate(0, 8, workers=1)  # which has made more ahead
    next(batches), next(batches)
    assert source.state_dict() == {"n_consumed": 2}
    batches.close()
    other = StepBatches(Draw(1))
    other.load_state_dict([source.state_dict()])
    assert torch.equal(next(other.iterate(2, 8, workers=0)), Draw(1)(2))


def test_groups():
    assert list(group_batches(range(7), 3)) == [[0, 1, 2], [3, 4, 5]]


def test_counts_that_are_not_those_of_the_losses():
    task = Toy()
    task.loss_counts = lambda batch: {"near": 1, "small": batch.numel()}
    with pytest.raises(ValueError, match=r"over \{'near': 12, 'small': 12\}, expected \{'near': 1, .*loss_counts"):
        Trainer(task, RECIPE, torch.device("cpu")).update(task.batch(0))


def test_losses_by_kind():
    kinds = torch.tensor([0, 2, -1, 0])
    losses = sum_by_kind(("a", "b", "c"), kinds, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert {name: (loss.total.item(), loss.count) for name, loss in losses.items()} == {"a": (5.0, 2), "c": (2.0, 1)}
    assert count_by_kind(("a", "b", "c"), kinds) == {"a": 2, "c": 1}
    assert LossSum.from_mean(torch.tensor(2.5), 4).mean == 2.5


def test_a_row_with_several_values_counts_once():
    """Squared errors of a latent token are over its channels: their mean is what it was before losses were sums."""
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0], [2.0, 4.0]])
    (loss,) = sum_by_kind(("a",), torch.tensor([0, 0, -1]), values).values()
    assert loss.count == 2 and loss.mean.item() == 4.0 == values[:2].mean()
