"""How a model is loaded, as one value: what the commands, the server and evaluations hand on to `load`."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from unimm.checkpoint.devices import parse_device
from unimm.checkpoint.load import parse_dtype
from unimm.kernels.weight_formats import WEIGHT_FORMATS
from unimm.models.registry import load
from unimm.nn.quantized_linear import check_can_pack

if TYPE_CHECKING:
    from unimm.models.base import UnifiedModel


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of `from_pretrained`."""

    device: str = "cpu"
    dtype: str = "float32"
    quantize: str | None = None
    offload: str | None = None

    def check(self) -> None:
        """Raise ValueError, before anything is fetched or built, for a device that is not there, for unknown names, and
        for options that exclude each other."""
        parse_dtype(self.dtype)
        device = parse_device(self.device)
        check_offload(self.offload, device)
        check_quantize(self.quantize, device, self.offload)

    def given(self) -> dict[str, str]:
        """The options that are not the defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def load(self, name: str) -> "UnifiedModel":
        """The model of that name. Raises what `from_pretrained` raises."""
        return load(name, device=self.device, dtype=self.dtype, quantize=self.quantize, offload=self.offload)


def check_offload(offload: Any, device: torch.device) -> None:
    """Raise ValueError for another place than "cpu" and "disk", and for a device that cannot have weights there."""
    if offload not in (None, "cpu", "disk"):
        raise ValueError(f"got offload {offload!r:.80}: expected 'cpu', 'disk', or None for weights on the device")
    if offload == "disk" and device.type != "cpu":
        raise ValueError(f"got offload 'disk' and device {device}: expected the CPU, which reads weights from files")
    if offload == "cpu" and device.type == "cpu":
        raise ValueError(
            f"got offload 'cpu' and device {device}: expected a GPU, to which blocks are streamed; weights of a CPU that "
            "are larger than its memory stay in their files with offload='disk'"
        )


def check_quantize(quantize: Any, device: torch.device, offload: str | None) -> None:
    """Raise ValueError for an unknown format, for one beside `offload`, and for int8 on a CPU that has no such
    products."""
    if quantize is None:
        return
    if not isinstance(quantize, str) or quantize not in WEIGHT_FORMATS:
        known = ", ".join(WEIGHT_FORMATS)
        raise ValueError(f"got quantize {quantize!r:.80}: expected one of {known}, or None for weights as they are")
    if offload is not None:
        raise ValueError(
            f'got quantize {quantize!r} and offload "{offload}": expected one of them, since weights in few bits are '
            "in no file, and are not streamed"
        )
    if quantize == "int8" and device.type == "cpu":
        check_can_pack()
