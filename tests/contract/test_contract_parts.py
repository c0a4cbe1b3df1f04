"""The contract of parts, on every stored case of one: strictly loaded, every number of its file used, dtype and device
kept."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from helpers.cases import cases, found
from safetensors.torch import load_file, save_file
from walk import GOLDENS, PARTS, WEIGHTLESS, numbers

from unimm.checkpoint.load import CheckpointError

# where a part is loaded: module:function(folder, *, dtype, device)
LOADERS = {
    "blocks/clip/dev": "unimm.encoders.clip_text:CLIPTextEncoder.from_pretrained",
    "blocks/dcae/dev": "unimm.tokenizers.dc_ae:DCAE.from_pretrained",
    "blocks/flux/dev": "unimm.denoisers.flux:FluxTransformer.from_pretrained",
    "blocks/fluxvae/dev": "unimm.tokenizers.kl:AutoencoderKL.from_pretrained",
    "blocks/qwen2p5vl/dev": "unimm.vlms.qwen2_5_vl.model:QwenVL.from_pretrained",
    "blocks/qwenimage/dev": "unimm.denoisers.qwen_image:QwenImageTransformer.from_pretrained",
    "blocks/sana/dev": "unimm.denoisers.sana:SanaTransformer.from_pretrained",
    "blocks/siglip2/dev": "unimm.encoders.siglip:SiglipVisionEncoder.from_pretrained",
    "blocks/t5/dev": "unimm.encoders.t5:T5Encoder.from_pretrained",
}
each_part = pytest.mark.parametrize("case", LOADERS)


def loader(case: str) -> Callable[..., torch.nn.Module]:
    """What loads a part."""
    module, _, names = LOADERS[case].partition(":")
    thing = import_module(module)
    for name in names.split("."):
        thing = getattr(thing, name)
    return thing


def test_every_case_is_walked():
    assert {*GOLDENS, *LOADERS, *WEIGHTLESS} == set(cases()), (
        "add the new case to LOADERS, or say why it has no weights"
    )
    assert set(PARTS) == set(LOADERS)


@each_part
def test_every_number_of_the_file_is_used(case):
    """The model holds the file's numbers, all of them and no others, whatever they are called and however they are
    stacked."""
    model = loader(case)(found(case))
    assert torch.equal(numbers(load_file(found(case) / "model.safetensors")), numbers(model.state_dict()))
    assert not model.training


@each_part
def test_a_key_too_many_or_too_few_is_refused(case, tmp_path):
    for path in found(case).iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = load_file(found(case) / "model.safetensors")
    last = max(whole, key=len)
    for broken in (whole | {"no.such.key": torch.zeros(1)}, {key: x for key, x in whole.items() if key != last}):
        save_file(broken, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"no.such.key|missing keys|entries of the key map"):
            loader(case)(tmp_path)


@each_part
def test_dtype_and_device_are_the_ones_that_were_asked_for(case):
    with torch.device("meta"):
        wide = loader(case)(found(case), device="cpu")
        half = loader(case)(found(case), dtype=torch.bfloat16, device="cpu")
    for model, dtype in ((wide, torch.float32), (half, torch.bfloat16)):
        assert {x.device.type for x in [*model.parameters(), *model.buffers()]} == {"cpu"}
        assert {p.dtype for p in model.parameters()} == {dtype}
    theirs = half.state_dict()
    assert all(torch.equal(x.to(theirs[key].dtype), theirs[key]) for key, x in wide.state_dict().items())
