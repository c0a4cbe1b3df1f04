"""CUDA graphs of a step: what a step launches is recorded once and launched again at once, without Python in between.

A graph reads and writes the tensors that it was recorded with. What changes from step to step (latents, times, ids, places in
a buffer) therefore lies in buffers of its own, into which every call is copied; what stays the same in a run (conditions,
keys and values of prompts) is read where it is. All else that Python decides in a step has to be the same at each: of
what differs, such as the branches of guidance, there is a graph for each.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

# kernels are chosen, compiled and tuned before a step is recorded
WARMUP_STEPS = 2

# recorded: launches what was recorded, on the tensors that it was recorded with
Replay = Callable[[], None]


class StaticStep:
    """A function of tensors, recorded with buffers for them."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]):
        self.inputs = [one.clone() for one in inputs]
        self.replay, self.output = capture(function, self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function of these inputs, of the shapes of the first ones; the next call does not change it."""
        for buffer, one in zip(self.inputs, inputs, strict=True):
            buffer.copy_(one)
        self.replay()
        return self.output.clone()


def capture(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Replay, Tensor]:
    """Record a function of tensors on a GPU as a CUDA graph: what launches it, and where its result then lies.

    It may write into tensors of its own, where writing twice is the same as once.
    """
    device = inputs[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP_STEPS):
            function(*inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)
    return graph.replay, output


class StepGraphs:
    """The recorded steps of a run, by what Python decides in them; where they are not wanted, functions are called."""

    def __init__(self, network: nn.Module, *, unless: bool = False):
        """network: the module of the run that `use_step_graphs` is said of. unless: whether steps of this run cannot be
        recorded, as where a step cache decides anew at each.
        """
        self.is_on = bool(getattr(network, "uses_step_graphs", False)) and not unless
        self._steps: dict[Hashable, StaticStep] = {}

    def run(self, key: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """The function of these inputs. key: equal for steps that differ by their inputs alone."""
        if not self.is_on:
            return function(*inputs)
        if key not in self._steps:
            self._steps[key] = StaticStep(function, inputs)
        return self._steps[key](*inputs)


def use_step_graphs(network: nn.Module) -> None:
    """Let runs of a network, on a GPU, record their steps."""
    for module in network.modules():
        module.uses_step_graphs = True  # type: ignore[assignment]
