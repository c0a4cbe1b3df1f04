"""What a case of the Qwen-Image transformer stores: the velocity and the turns of both streams."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from parity.case import Case
from unimm.denoisers.qwen_image import QwenImageTransformer

EXPECTS = 'config.json with _class_name "QwenImageTransformer2DModel"'


def recognise(folder: Path) -> bool:
    """Whether a case's files are a Qwen-Image transformer's."""
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text()).get("_class_name") == "QwenImageTransformer2DModel"


@torch.inference_mode()
def check(case: Case) -> None:
    """Compare the velocity, and cosines and sines of text and images."""
    model, text = QwenImageTransformer.from_pretrained(case.folder), case.input("encoder_hidden_states")
    pictures = [(f, h, w) for f, h, w in case.input("img_shapes").tolist()]
    seen = case.input("encoder_hidden_states_mask") if "encoder_hidden_states_mask" in case else None
    condition = model.condition(text, pictures, key_padding_mask=seen)
    (modulation,) = model.modulations(case.input("timestep")[None])
    case.compare("velocity", model(case.input("hidden_states"), condition, modulation))
    of_text, of_pictures = torch.view_as_real(condition.rotations).split(
        (text.shape[1], len(condition.rotations) - text.shape[1])
    )
    case.compare("rope.txt_angle", of_text)
    case.compare("rope.img_angle", of_pictures)
