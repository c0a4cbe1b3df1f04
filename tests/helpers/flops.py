"""Our count of a step's FLOPs beside torch's, which runs the step and looks at what it does.

They differ by what is the machine's and not the model's, and are equal to the last operation once these are set right:

- torch counts a product that is done; under the reference's kernels a mask hides pairs after they are computed, over all
  samples of a pack, and a batch of FLUX is padded. So a test counts ours with every pair visible and the padding as rows
  (`dense_masks`).
- torch does not look into our operators: linear_cross_entropy is given its products here, without those that its
  backward does again to save memory.
- torch counts the weight gradient of a grouped convolution as if it were not grouped: `grouped_excess` is that
  difference.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unimm.denoisers.flops import MMDiTRows
from unimm.encoders import flops as encoders
from unimm.kernels import use_kernels
from unimm.kernels.attention.tile_schedule import KeySpans
from unimm.models.metaquery import flops as metaquery
from unimm.vlms.qwen2_5_vl import flops as qwen

# modules that count pairs of rows that all attend to each other, in samples of a mask
WITH_SAMPLES = (encoders, metaquery, qwen)


def _cross_entropy(x, weight, *args, **options):
    return 2 * x[0] * x[1] * weight[0]


def _cross_entropy_backward(grad, x, weight, *args, **options):
    needs_grad = args[-1]
    return 2 * x[0] * x[1] * weight[0] * sum(needs_grad)


MAPPING = {
    torch.ops.unimm.linear_cross_entropy: _cross_entropy,
    torch.ops.unimm.linear_cross_entropy_backward: _cross_entropy_backward,
}


def torch_flops(task, batch) -> int:
    """What torch counts of one step of a task on a batch, forward and backward."""
    task.model.zero_grad(set_to_none=True)
    with (
        use_kernels("reference"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=MAPPING) as counter,
    ):
        sum(x.total.float() for x in task.losses(batch).values()).backward()
    return counter.get_total_flops()


@contextmanager
def dense_masks() -> Iterator[None]:
    """Let every row of a mask attend to every key of it, and be a condition's padding rows like others."""
    with ExitStack() as stack:
        for module in WITH_SAMPLES:
            stack.enter_context(mock.patch.object(module, "attended_pairs", lambda lengths: sum(lengths) ** 2))
        for owner, name, dense in (
            (KeySpans, "n_visible_pairs", lambda spans: spans.n_queries * spans.n_keys),
            (MMDiTRows, "text", lambda rows: rows.n_images * max(rows.condition_lengths)),
            (MMDiTRows, "pairs", lambda rows: (rows.image + rows.text) ** 2 // rows.n_images),
        ):
            stack.enter_context(mock.patch.object(owner, name, property(dense)))
        yield


@contextmanager
def grouped_excess() -> Iterator[list[int]]:
    """A list of what torch counts too much for each weight gradient of a grouped convolution that runs."""
    found: list[int] = []

    def note(layer, args, output):
        positions = output.numel() // output.shape[1]
        if layer.groups > 1 and layer.weight.requires_grad and torch.is_grad_enabled():
            found.append(2 * positions * layer.weight.numel() * (layer.groups - 1))

    call = nn.Conv2d.forward

    def forward(self, x):
        output = call(self, x)
        note(self, (x,), output)
        return output

    with mock.patch.object(nn.Conv2d, "forward", forward):
        yield found


def check_counts(task, batch, *, masked: bool = True) -> None:
    """Assert that ours is torch's count but for the differences above, and below it where a mask hides something."""
    with grouped_excess() as excess:
        counted = torch_flops(task, batch) - sum(excess)
    with dense_masks():
        dense = task.step_counts(batch)
    counts = task.step_counts(batch)
    assert dense.flops == counted
    assert 0 < counts.flops < counted if masked else counts.flops == counted
    assert counts.tokens > 0 and counts.images > 0
