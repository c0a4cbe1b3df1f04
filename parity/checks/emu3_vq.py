"""What an Emu3 case stores of its vision tokenizer, layer by layer. docs/originals/emu3.md, "Vision tokenizer"."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from parity.case import Case
from parity.checks.vq import pixels as as_bytes
from unimm.tokenizers.emu3_vq import Emu3VQModel


class Recorder:
    """The outputs of some modules, or their inputs, by name, in the calls made while it is open; the last call counts."""

    def __init__(self, outputs: dict[str, nn.Module], inputs: dict[str, nn.Module]) -> None:
        self.found: dict[str, Tensor] = {}
        self.hooks = [module.register_forward_hook(self.output(name)) for name, module in outputs.items()]
        self.hooks += [module.register_forward_pre_hook(self.input(name)) for name, module in inputs.items()]

    def output(self, name: str):
        return lambda module, args, out: self.found.update({name: out})

    def input(self, name: str):
        return lambda module, args: self.found.update({name: args[0]})

    def __enter__(self) -> dict[str, Tensor]:
        return self.found

    def __exit__(self, *exception: object) -> None:
        for hook in self.hooks:
            hook.remove()


def check_codes(case: Case, vq: Emu3VQModel) -> None:
    """Images to codes and back, a video to codes and back."""
    image = case.input("vq/pixels")
    with encoder_layers(vq) as layers:
        z = vq.encode(image)
    for name, x in layers.items():
        case.compare(f"vq/enc/{name}", x[: len(case.tensors.get(f"vq/enc/{name}", x))])
    case.compare("vq/enc/out", rearrange(layers["last"], "B Z t h w -> B t Z h w"))
    case.compare("vq/quant_conv", z[:, :, None])
    ids = vq.encode_ids(image)
    case.compare("vq/codes", ids)
    with decoder_layers(vq) as layers:
        decoded = vq.decode(case.tensors["vq/codes"])
    for name, x in layers.items():
        case.compare(f"vq/dec/{name}", x[: len(case.tensors.get(f"vq/dec/{name}", x))])
    case.compare("vq/decoded", decoded)
    case.compare("vq/decoded_uint8", torch.stack([as_bytes(one) for one in decoded]))
    case.compare("vq/decoded_frames", vq.decode_video(case.tensors["vq/codes"][:1, None]))
    check_all_frames(case, vq)
    case.compare("vq/video_codes", vq.encode_video_ids(case.input("vq/video")))
    case.compare("vq/video_decoded", vq.decode_video(case.tensors["vq/video_codes"]))


def check_all_frames(case: Case, vq: Emu3VQModel) -> None:
    """The layers over time of the decoder, on every frame of an image."""
    ids = case.tensors["vq/codes"]
    codes = vq.quantize.lookup(ids.flatten(1), (ids.shape[1], ids.shape[2]))[:, :, None]
    outputs = {f"time_conv{i}": block.conv for i, block in enumerate(vq.decoder.time_conv)}  # type: ignore[union-attr]
    with Recorder({**outputs, "time_res": vq.decoder.time_res_stack}, {}) as layers:
        latents = vq.post_quant_conv(codes)
        vq.decoder.split_frames(latents, codes)
    case.compare("vq/post_quant", latents)
    for name, x in layers.items():
        case.compare(f"vq/dec/{name}", x)


def encoder_layers(vq: Emu3VQModel) -> Recorder:
    """The stored layers of the encoder."""
    encoder = vq.encoder
    *levels, last = encoder.down
    outputs = {"conv_in": encoder.conv_in, f"level{len(levels)}": last, "mid": encoder.mid, "frames": encoder.conv_out}
    outputs |= {f"time_conv{i}": block.conv for i, block in enumerate(encoder.time_conv)}  # type: ignore[dict-item]
    outputs |= {f"time_res{i}": block for i, block in enumerate(encoder.time_res_stack)}
    before = {f"level{i}": level.downsample for i, level in enumerate(levels)}
    return Recorder({**outputs, "last": encoder.time_res_stack}, before)  # type: ignore[arg-type]


def decoder_layers(vq: Emu3VQModel) -> Recorder:
    """The stored layers of the decoder behind those over time."""
    decoder = vq.decoder
    finest, *levels = decoder.up
    outputs = {"conv_in": decoder.conv_in, "mid_block_1": decoder.mid.block_1, "mid": decoder.mid, "up0": finest}
    before = {f"up{i + 1}": level.upsample for i, level in enumerate(levels)}
    return Recorder(outputs, before)  # type: ignore[arg-type]
