"""What a case of DC-AE stores: latents, pixels, and what lies between."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from parity.case import Case
from unimm.tokenizers.dc_ae import DCAE

EXPECTS = 'config.json with _class_name "AutoencoderDC"'


def recognise(folder: Path) -> bool:
    """Whether a case's files are a DC-AE's."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("_class_name") == "AutoencoderDC"


@torch.inference_mode()
def check(case: Case) -> None:
    """Compare both ways."""
    model, image = DCAE.from_pretrained(case.folder), case.input("image")
    latent = model.encode(image)
    case.compare("latent", latent / model.config.scaling_factor)
    case.compare("latent_scaled", latent)
    case.compare("decoded", model.decode(model.config.scaling_factor * case.input("z")))
    case.compare("reconstruction", model.decode(latent))
    x = model.encoder.conv_in(image)
    case.compare("stage.encoder_conv_in", x)
    for i, level in enumerate(model.encoder.down_blocks):
        x = level(x)
        case.compare(f"stage.encoder_down{i}", x)
    if case.names(r"stage\.decoder_up\d+"):
        z = case.tensors["z"]
        x = model.decoder.conv_in(z)
        x = x + z.repeat_interleave(x.shape[1] // z.shape[1], 1)
        for i in reversed(range(len(model.decoder.up_blocks))):
            x = model.decoder.up_blocks[i](x)
            case.compare(f"stage.decoder_up{i}", x)
