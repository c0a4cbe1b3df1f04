"""What a server takes and for how long; every limit has a default that is safe, and an answer: docs/serving.md."""

from dataclasses import dataclass, fields

import torch

from unimm.checkpoint.load import free_memory

UNKNOWN_MEMORY = 2**32  # taken for half of the free memory where nothing says how much is free


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """Limits of one server. The engine holds those of the first group, the HTTP application the others.

    max_running: choices that are worked on at once. max_waiting: choices that wait for a place. memory_bytes: what
    the caches and activations of running choices may take by estimate; None is half of what is free when the engine
    starts. timeout_s: seconds from submitting to the end. max_n: choices of one request. max_tokens: new ids of a text.
    max_steps: of a sampler. max_image_pixels: of a generated image.
    """

    max_running: int = 32
    max_waiting: int = 64
    memory_bytes: int | None = None
    timeout_s: float = 300.0
    max_n: int = 10
    max_tokens: int = 4096
    max_steps: int = 250
    max_image_pixels: int = 2048 * 2048

    max_body_bytes: int = 32 * 2**20
    max_messages: int = 256
    max_text_chars: int = 200_000
    max_input_images: int = 16
    max_input_pixels: int = 32_000_000
    read_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    max_connections: int = 256
    drain_s: float = 60.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and value <= 0:
                raise ValueError(f"got {one.name} {value}: expected a positive number")

    def budget(self, device: torch.device) -> int:
        """Bytes for the caches and activations of running choices on a device."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        free = free_memory(device)
        return UNKNOWN_MEMORY if free is None else free // 2
