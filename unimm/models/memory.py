"""How much memory a model takes to generate images, predicted from its configs, without weights and without the device.

Weights are counted from their shapes; all else by a call of `generate` without values (unimm.nn.fake_device), of whose
steps, which are alike, one is taken. What the allocator and the libraries take for themselves is left out.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimm.checkpoint.valueless import without_values
from unimm.kernels.weight_formats import WEIGHT_FORMATS
from unimm.models.base import UnifiedModel
from unimm.models.registry import load
from unimm.nn.block_stream import RESIDENT_BLOCKS
from unimm.nn.decoder import CausalDecoder
from unimm.nn.fake_device import FakeDevice

# a prompt of usual length
PROMPT = "A photograph of a red bicycle that leans against the white wall of a small house by the sea, in the evening."
# in inference mode, and outside of it
CONVOLUTIONS = frozenset((torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default))
PLANNED_FORMATS = ("int8", "int4")  # fp8 takes what int8 takes, nf4 nearly what int4 does
# the stages of a call, by what it does
GENERATES = "generates"
DECODES = "decodes"


@dataclass(frozen=True, kw_only=True)
class InferencePlan:
    """Bytes that a device holds when images are generated, in one dtype of the weights, by one way of loading.

    weights: all, with what stays in float32. kv_cache: keys and values at their most, 0 for a family that has none.
    step: what else is there at the peak of prefill and steps. decode: what is there when pixels are made of one image.
    quantize, offload: as in `from_pretrained`.
    """

    name: str
    device_type: str
    dtype: str
    size: tuple[int, int]
    batch: int
    n_parameters: int
    weights: int
    kv_cache: int
    step: int
    decode: int
    quantize: str | None = None
    offload: str | None = None

    @property
    def total(self) -> int:
        """The peak: weights, and the greater of the two stages."""
        return self.weights + max(self.kv_cache + self.step, self.decode)

    def to_json(self) -> dict[str, Any]:
        """All numbers, with the peak."""
        return {**asdict(self), "total": self.total}


class StagedDevice(FakeDevice):
    """Counts what is alive apart for each stage of a call, and of that what KV caches are."""

    def __init__(self, device_type: str, model: nn.Module) -> None:
        super().__init__(device_type)
        self.stage = GENERATES
        self.peaks = {GENERATES: 0, DECODES: 0}
        self.kv_cache = 0
        self._n_layers = {one.config.n_layers for one in model.modules() if isinstance(one, CausalDecoder)}
        self._caches: dict[str, int] = {}

    def _count(self, tensor: Tensor) -> None:
        is_new = tensor.untyped_storage() not in self.storages
        super()._count(tensor)
        # a cache, or a buffer of several: [layers, 2, rows, key/value heads, head]
        if is_new and tensor.ndim == 5 and tensor.shape[0] in self._n_layers and tensor.shape[1] == 2:
            self.kv_cache = max(self.kv_cache, tensor.untyped_storage().nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func in CONVOLUTIONS and self.device_type == "cpu":
            # a CPU's convolution has its result twice while it runs, once in a layout of its own
            self.peaks[self.stage] = max(self.peaks[self.stage], self.live.total + out.nbytes)
        return out

    def _note_peak(self) -> None:
        super()._note_peak()
        self.peaks[self.stage] = max(self.peaks[self.stage], self.live.total)


def plan_inference(
    name: str | Path,
    *,
    dtype: str = "float32",
    device_type: str = "cpu",
    size: tuple[int, int] | None = None,
    batch: int = 1,
    revision: str | None = None,
    ways: bool = False,
) -> list[InferencePlan]:
    """The memory of generating `batch` images of one prompt each; of the model nothing is read but configs.

    size: (height, width), the model's own unless given. ways: the same with weights in few bits and with streamed
    blocks, too, after it. Raises ValueError for another type of device than cpu and cuda,
    for a batch below 1, and what loading and `generate` raise for their arguments.
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"got the device {device_type!r}: expected cpu or cuda")
    if batch < 1:
        raise ValueError(f"got a batch of {batch}: expected at least 1 image")
    with without_values():
        model = load(name, dtype=dtype, revision=revision)
        plan = plan_model(model, name=str(name), dtype=dtype, device_type=device_type, size=size, batch=batch)
        return [plan, *plan_ways(model, plan)] if ways else [plan]


def plan_model(
    model: UnifiedModel, *, name: str, dtype: str, device_type: str, size: tuple[int, int] | None, batch: int
) -> InferencePlan:
    """The plan of a model that was loaded without values; it is left without, on no device."""
    parts = external_parts(model)
    every = [tensor for part in (model, *parts) for tensor in (*part.parameters(), *part.buffers())]
    weights = sum(tensor.nbytes for tensor in {id(one): one for one in every}.values())
    device = StagedDevice(device_type, model)
    for part in (model, *parts):
        device.place(part)
    with without_values(), decoding_marked(model, device), device.run():
        made = model.generate([PROMPT] * batch, size=size)
    image = made.images[0]
    return InferencePlan(
        name=name,
        device_type=device_type,
        dtype=dtype,
        size=(image.height, image.width),
        batch=batch,
        n_parameters=sum(p.numel() for part in (model, *parts) for p in part.parameters()),
        weights=weights,
        kv_cache=device.kv_cache,
        step=max(0, device.peaks[GENERATES] - device.kv_cache),
        decode=device.peaks[DECODES],
    )


def plan_ways(model: UnifiedModel, plan: InferencePlan) -> list[InferencePlan]:
    """The plans of the same generation with weights in few bits and, on a GPU, with streamed blocks.

    plan: the model's own, whose weights are as they are.
    """
    blocks = [model.get_submodule(path) for path in model.QUANTIZED]
    linears = [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]
    ways = []
    for name in PLANNED_FORMATS:
        one = WEIGHT_FORMATS[name]
        rounded = [linear.weight for linear in linears if one.fits(linear.in_features)]
        whole = sum(weight.nbytes for weight in rounded)
        small = int(sum(weight.numel() for weight in rounded) * one.BYTES_PER_WEIGHT)
        # int8 has no product of its own on a GPU: the weights of one linear are there in the dtype for a moment
        more = max(weight.nbytes for weight in rounded) if name == "int8" and plan.device_type != "cpu" else 0
        ways.append(replace(plan, quantize=name, weights=plan.weights - whole + small, step=plan.step + more))
    if plan.device_type != "cpu":
        sizes = [sum(p.nbytes for p in block.parameters()) for part in blocks for block in part.children()]
        there = sum(sorted(sizes)[-RESIDENT_BLOCKS:])
        ways.append(replace(plan, offload="cpu", weights=plan.weights - sum(sizes) + there))
    return ways


def external_parts(model: UnifiedModel) -> list[nn.Module]:
    """Parts that generation takes from elsewhere, and that are no modules of the model."""
    part = getattr(model, "autoencoder", None)
    return [part] if isinstance(part, nn.Module) and all(one is not part for one in model.modules()) else []


@contextmanager
def decoding_marked(model: UnifiedModel, device: StagedDevice) -> Iterator[None]:
    """Count what the model's `DECODES_IMAGES` takes as that stage's, in the body."""
    path, _, name = model.DECODES_IMAGES.rpartition(".")
    owner = model.get_submodule(path)
    decode: Callable[..., Tensor] = getattr(owner, name)

    def marked(*args: Any) -> Tensor:
        before = device.stage
        device.stage = DECODES
        try:
            return decode(*args)
        finally:
            device.stage = before

    owner.__dict__[name] = marked
    try:
        yield
    finally:
        del owner.__dict__[name]


def hub_weights(name: str, *, revision: str | None = None) -> Mapping[str, int]:
    """How many numbers of each dtype a hub repository's safetensors hold, from their headers alone.

    Raises ValueError where there are none, or where the hub cannot be reached.
    """
    # costs half a second to import, and only hub ids need it
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        NotASafetensorsRepoError,
        SafetensorsParsingError,
    )

    try:
        counts = get_safetensors_metadata(name, revision=revision).parameter_count
    except NotASafetensorsRepoError as error:
        raise ValueError(f"{name} holds no model.safetensors, nor an index of several: expected either") from error
    except (HfHubHTTPError, HFValidationError, SafetensorsParsingError, OSError) as error:
        raise ValueError(f"cannot read the headers of {name} on the hub: {' '.join(str(error).split())}") from error
    return {str(dtype): n for dtype, n in counts.items()}
