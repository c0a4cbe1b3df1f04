"""What a case of Janus's preprocessing stores: images to squares to pixels, and conversations to text.

io.safetensors holds groups `<name>/image`, `/resized`, `/pixel_values`; io.json says the sizes of each in its words,
and prompts.json holds conversations with the text that the original made. docs/originals/janus.md, "Image processor".
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from PIL import Image

from parity.case import Case
from unimm.processing.chat_templates import DEFAULT_SYSTEM_PROMPT, TemplateMessage, apply_chat_template
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor

EXPECTS = "prompts.json"


def recognise(folder: Path) -> bool:
    """Whether a case's files are those of preprocessing alone."""
    return (folder / "prompts.json").exists()


def check(case: Case) -> None:
    """Compare every image and every conversation that the case stores."""
    notes = json.loads((case.folder / "io.json").read_text())
    for name in case.names(".*/image"):
        check_image(case, name.removesuffix("/image"), notes[name]["desc"])
    if (case.folder / "prompts.json").exists():
        check_prompts(case, json.loads((case.folder / "prompts.json").read_text()))


def check_image(case: Case, group: str, words: str) -> None:
    """An image to its square, exactly, and to its pixels."""
    numbers = {name: int(n) for name, n in re.findall(r"\b(image_size|min_size)=(\d+)", words)}
    rule = DeepseekVLImageProcessor.from_json(numbers, size=numbers["image_size"])
    image = Image.fromarray(case.input(f"{group}/image").numpy())
    square = torch.frombuffer(bytearray(rule(image).tobytes()), dtype=torch.uint8).view(rule.size, rule.size, 3)
    case.compare_note(f"{group}/resized", square.permute(2, 0, 1).tolist(), case.tensors[f"{group}/resized"].tolist())
    case.compare(f"{group}/pixel_values", rule.preprocess(image)[None])


def check_prompts(case: Case, stored: dict) -> None:
    """Every conversation to its text, exactly."""
    case.compare_note("prompts: default_system_prompt", DEFAULT_SYSTEM_PROMPT, stored["default_system_prompt"])
    for i, entry in enumerate(stored["prompts"]):
        messages = [TemplateMessage(said["role"], said["content"]) for said in entry["conversation"]]
        system = DEFAULT_SYSTEM_PROMPT if entry["system"] == "default" else entry["system"]
        text = "".join(apply_chat_template(messages, system=system, template=entry["sft_format"]))
        case.compare_note(
            f"prompts: {i} {entry['sft_format']} {entry['case']} system={entry['system']!r}", text, entry["text"]
        )
