"""Streamed blocks: the same results, never more than two of them there, and every weight that is read is there."""

import pytest
import torch
from helpers.cases import small_model
from torch import nn

import unimm
from unimm.generation.kv_cache import EMPTY_CACHE
from unimm.models.registry import FAMILIES
from unimm.nn.block_stream import BlockStream, Place
from unimm.sequence.parts import text_part

CPU = torch.device("cpu")


class EmptyHome(BlockStream):
    """A stream whose blocks have no values while they are not resident: what reads one too early or too late fails."""

    def _leave(self, place: Place, tensor: torch.Tensor) -> None:
        empty = torch.empty_like(tensor, device="meta")
        place.tensors[place.name] = (
            nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )


class Chain(nn.Module):
    """Blocks in two lists, one after the other."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.second = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.first, *self.second):
            x = block(x)
        return self.last(x)


@pytest.mark.parametrize("n_resident", [1, 2, 3, 9])
def test_a_chain(n_resident):
    torch.manual_seed(0)
    model, x = Chain(), torch.randn(2, 8)
    with torch.no_grad():
        truth = model(x)
    kept = dict(model.named_parameters())
    stream = EmptyHome(model, ("first", "second"), CPU, n_resident=n_resident)
    block = 4 * (64 + 8)
    for _ in range(3):
        with torch.inference_mode():
            assert torch.equal(model(x), truth)
        assert stream.resident_bytes == min(n_resident, 3) * block  # of a list's blocks
    assert stream.peak_bytes == min(n_resident, 4) * block
    if n_resident <= 2:  # each pass copies each block once, and the first of each list is copied ahead in vain
        assert stream.n_copies == 3 * (7 + 2 * (n_resident - 1))
    stream.bring_home()
    assert not stream.resident_bytes
    assert all(p.is_meta == (name.split(".")[0] != "last") for name, p in model.named_parameters())
    assert model.last.weight.equal(kept["last.weight"])


def test_weights_are_at_home_afterwards():
    model, x = Chain(), torch.randn(2, 8)
    names = {name: p.detach().clone() for name, p in model.named_parameters()}
    stream = BlockStream(model, ("first", "second"), CPU)
    with torch.inference_mode():
        model(x)
    stream.bring_home()
    assert all(isinstance(p, nn.Parameter) and torch.equal(p, names[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="got 0 resident blocks: expected at least 1"):
        BlockStream(model, ("first",), CPU, n_resident=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    """Reading and drawing with blocks that have no values while they are not resident."""
    model = unimm.load(small_model(family))
    ids = list(range(5, 15))

    def results() -> list[torch.Tensor]:
        reader = getattr(model, "mllm", model)
        (cache,) = reader.prefill([EMPTY_CACHE], [[text_part(ids)]])
        image = model.generate("a red circle", **model.supported_options(steps=2)).image if draws else None
        found = [cache.chunks[0][-1]]
        return found if image is None else [*found, torch.tensor(list(image.tobytes()))]

    draws = family not in ("Janus", "Emu3")  # whose many image tokens each stream all blocks
    truth = results()
    lists = [len(model.get_submodule(path)) for path in model.QUANTIZED]
    sizes = [
        sum(p.nbytes for p in block.parameters()) for path in model.QUANTIZED for block in model.get_submodule(path)
    ]
    stream = EmptyHome(model, model.QUANTIZED, CPU)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results(), truth, strict=True))
    assert stream.n_copies > sum(lists) and stream.peak_bytes <= 2 * max(sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    whole, streamed = unimm.load("bagel-nano", device="cuda"), unimm.load("bagel-nano", device="cuda", offload="cpu")
    one, other = (model.generate("a red circle", steps=3).image.tobytes() for model in (whole, streamed))
    assert one == other and streamed.device.type == "cuda"
    assert streamed.block_stream is not None and streamed.block_stream.n_copies > 3


def test_where_it_needs_a_gpu():
    with pytest.raises(ValueError, match="got offload 'cpu' and device cpu: expected a GPU"):
        unimm.load("bagel-nano", offload="cpu")
    with pytest.raises(ValueError, match="got offload 'gpu': expected 'cpu', 'disk', or None"):
        unimm.load("bagel-nano", offload="gpu")
