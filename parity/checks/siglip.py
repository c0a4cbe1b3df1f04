"""What a case of SigLIP2's vision tower stores: images as it sees them, every layer, and what is pooled."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from parity.case import Case
from unimm.encoders.siglip import SiglipVisionEncoder

EXPECTS = 'config.json with model_type "siglip_vision_model"'


def recognise(folder: Path) -> bool:
    """Whether a case's files are a SigLIP tower's, alone or in a whole SigLIP's."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("model_type") in ("siglip_vision_model", "siglip")


@torch.inference_mode()
def check(case: Case) -> None:
    """Compare the preprocessing, the layers and the ends of the tower."""
    tower = SiglipVisionEncoder.from_pretrained(case.folder)
    if raw := sorted(case.names(r"raw\d+_uint8"), key=lambda name: int(name[3:].partition("_")[0])):
        pixels = [tower.image_processor.preprocess(Image.fromarray(case.input(name).numpy())) for name in raw]
        case.compare("pixel_values", torch.stack(pixels))
    # the stored pixels, so that a difference there shows in one place only
    images = case.tensors["pixel_values"] if raw else case.input("pixel_values")
    outs: list[Tensor] = [tower.embed_patches(images)]
    hooks = [block.register_forward_hook(lambda module, args, out: outs.append(out)) for block in tower.blocks]
    features = tower(images)
    for hook in hooks:
        hook.remove()
    for i, out in enumerate(outs):
        case.compare(f"hidden.{i}", out.reshape(features.shape))
    case.compare("last_hidden_state", features)
    if tower.pooling_head is not None:
        case.compare("pooler_output", tower.pool_features(features))
