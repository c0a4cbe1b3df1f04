"""What cases of CLIP's text encoder and of T5's encoder store: states of captions, and what is pooled."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from parity.case import Case
from unimm.encoders.clip_text import CLIPTextEncoder
from unimm.encoders.t5 import T5Encoder

EXPECTS = 'config.json with model_type "clip_text_model" or "t5"'


def kind(folder: Path) -> str:
    """What a case's config says it is."""
    config = folder / "config.json"
    return json.loads(config.read_text()).get("model_type", "") if config.exists() else ""


def recognise(folder: Path) -> bool:
    """Whether a case's files are one of the two."""
    return kind(folder) in ("clip_text_model", "t5")


@torch.inference_mode()
def check(case: Case) -> None:
    """Compare the states of all ids, and CLIP's pooled vectors."""
    ids = case.input("input_ids")
    if kind(case.folder) == "t5":
        case.compare("last_hidden_state", T5Encoder.from_pretrained(case.folder)(ids))
        return
    model = CLIPTextEncoder.from_pretrained(case.folder)
    states = model(ids)
    case.compare("last_hidden_state", states)
    case.compare("pooler_output", model.pool(ids, states))
