"""What an engine has done so far, counted by its thread and read by anyone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Totals since the engine was made. seconds, forwards and rows by stage; choices by how they ended.

    on_stage: called with (stage, seconds, rows) of each forward. on_choice: with the seconds from submitting to the end
    of each answer that was finished.
    """

    n_requests: int = 0
    n_refused: int = 0
    n_restarts: int = 0
    n_images: int = 0
    n_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    forwards: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    choices: Counter[str] = field(default_factory=Counter)
    on_stage: Callable[[str, float, int], None] | None = None
    on_choice: Callable[[float], None] | None = None

    def add_stage(self, stage: str, seconds: float, n: int) -> None:
        """A forward: prefill, decode_step, denoise_step or image_decode, with n rows of the batch."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        self.forwards[stage] += 1
        self.rows[stage] += n
        if self.on_stage is not None:
            self.on_stage(stage, seconds, n)

    def add_choice(self, seconds: float, *, n_tokens: int, n_images: int) -> None:
        """An answer that was finished."""
        self.n_tokens += n_tokens
        self.n_images += n_images
        self.choices["finished"] += 1
        if self.on_choice is not None:
            self.on_choice(seconds)
