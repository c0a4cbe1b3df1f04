"""The peak of what a call allocates."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated_peak(call: Callable[[], Any]) -> int:
    """Bytes that the CPU's allocator gave out at the peak of a call, by torch's profiler; what lay there before is not
    in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
