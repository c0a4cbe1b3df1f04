"""What UniWorld asks of its reader: a prompt with its pictures, up to where an answer would begin.

Made without the model, so that training can make its batches ahead. facts/metaquery_uniworld.md section 2.2.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from unimm.sequence.parts import Item
from unimm.vlms.qwen2_5_vl.processor import PLACEHOLDER, QwenPrompts


@dataclass(frozen=True, kw_only=True)
class UniWorldPrompts:
    """Prompts and pictures to items. system: of every prompt, "" for none, as released; in_front: where pictures stand."""

    reader: QwenPrompts
    system: str
    in_front: bool

    def drawing(self, prompt: str, pictures: Sequence[Image.Image] = ()) -> list[Item]:
        """A prompt and its pictures, which stand where it says the placeholder, or else all behind it or in front.

        A picture is resized twice, as in the original: the second time its size is another, since the first has rounded
        it. Raises ValueError for an empty prompt.
        """
        placed = PLACEHOLDER in prompt or self.in_front or not prompt.strip()
        content = prompt if placed else prompt + PLACEHOLDER * len(pictures)
        once = [self.reader.pixels(picture) for picture in pictures]
        return self.reader.conversation([{"role": "user", "content": content, "images": once}], system=self.system)
