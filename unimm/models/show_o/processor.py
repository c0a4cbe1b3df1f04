"""Show-o's sequences: prompts to generate from, conversations about images, image and mask to tokens.

docs/originals/show_o.md, "Prompts" and "Images".
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unimm.models.show_o.config import ShowOSpecialTokens
from unimm.models.show_o.tokenizer import END_OF_TEXT
from unimm.nn.patches import patchify
from unimm.processing.chat_templates import ChatMessage, Prompt
from unimm.processing.images.clip import CLIPImageProcessor, resize_short_side
from unimm.processing.images.io import pil_to_tensor
from unimm.processing.requests import parse_images
from unimm.sequence.parts import ImagePart, Part, text_part
from unimm.sequence.segments import Segment
from unimm.vlms.processor import ChatProcessor, with_placeholders

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)


def show_o_image_part(kind: Any, tokens: Tensor, ids: Sequence[int]) -> ImagePart:
    """An image between the ids of its ends, or without: its rows attend to each other, each at its own position.

    One to understand is seen by the rows before it, too.
    """
    n = len(tokens) + len(ids)
    is_und = kind == "und_image"
    return ImagePart(
        kind=kind,
        segment=Segment(length=n, attention="full", advance=n, distinct_positions=True, seen_before=is_und),
        ids=torch.tensor(ids, dtype=torch.long),
        labels=torch.full((len(ids),), -100),
        tokens=tokens,
        image_position_ids=torch.arange(len(tokens)),
    )


def square_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image whose short side was resized to `size`."""
    resized = resize_short_side(image, size)
    # rounded halves go to the even number, as in the original
    left = round((resized.width - size) / 2)
    top = round((resized.height - size) / 2)
    return resized.crop((left, top, left + size, top + size))


@dataclass(frozen=True, kw_only=True)
class ShowOProcessor(ChatProcessor):
    """Prompts, conversations and images to parts.

    clip_processor, clip_patch_size: of a model that understands images by CLIP. image_size: pixels a side of images as
    tokens, and vq_stride those of a token, None without the image tokenizer.
    """

    special_tokens: ShowOSpecialTokens
    max_prompt_ids: int
    with_clip: bool
    clip_processor: CLIPImageProcessor | None = None
    clip_patch_size: int = 1
    image_size: int | None = None
    vq_stride: int = 1

    IMAGE_PLACEHOLDER: ClassVar[str] = "<image>"

    @property
    def default_system(self) -> str:
        """The system prompt, which a model without CLIP has none of."""
        return SYSTEM_PROMPT if self.with_clip else ""

    @property
    def answer_end_id(self) -> int:
        """The id of the end of a text."""
        return self.end_of_text

    @property
    def end_of_text(self) -> int:
        """The id that begins and ends texts."""
        found = self.text_tokenizer.token_id(END_OF_TEXT)
        assert found is not None, "a ShowOTokenizer has it"
        return found

    # ---- understanding

    def render(self, messages: Sequence[ChatMessage], system: str) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer begins. system: "" for none."""
        prompt: Prompt = [self.special_tokens.mmu]
        if self.with_clip and system:
            # a blank where the words of the user follow, and no image stands between
            first = messages[0]
            prompt.append(system if first.role == "assistant" or leading_images(first) else f"{system} ")
        for i, message in enumerate(messages):
            images = leading_images(message)
            if message.role == "assistant":
                said = [piece for piece in message.content if not isinstance(piece, Image.Image)]
                prompt += [" ", *said, self.end_of_text]
                continue
            prompt += images
            if i == 0 and not self.with_clip:
                # a system prompt that the caller wants has no place in the original's format
                prompt += [self.end_of_text, *([f"{system} "] if system else [])]
            # only the first message of a model without CLIP has the line break
            line_break = "\n" if i == 0 and not self.with_clip else ""
            prompt += [f"USER: {line_break}", *message.content[len(images) :], " ASSISTANT:"]
        return prompt

    def labelled_conversation(
        self, messages: Sequence[ChatMessage], *, learned: Collection[int], system: str | None = None
    ) -> list[Part]:
        """A whole conversation, in which some answers, and the id that ends each, carry labels.

        learned: the places of these messages, which are texts. system: in place of the default one; "" for none.
        """
        prompt = self.render(with_placeholders(messages, learned), self.default_system if system is None else system)
        return self.label_answers(prompt, messages)

    def labelled_texts(self, pieces: Sequence[str | Image.Image]) -> list[Part]:
        """Texts and images in order, without roles; the ids of all texts carry labels, and the one that ends the last.

        A text alone, and one behind images as tokens, begins with the id that ends texts, and one behind images for CLIP
        ends with a line break, as released.
        """
        images = leading_images(ChatMessage("user", list(pieces)))
        texts = list(pieces[len(images) :])
        start: Prompt = [self.special_tokens.mmu, *images] if images else []
        if not (images and self.with_clip):
            start.append(self.end_of_text)
        elif texts and isinstance(texts[-1], str):
            texts[-1] = f"{texts[-1].rstrip()}\n"
        return self.label_texts([*start, *texts])

    def image_prompt(self, image: Image.Image, n_images: int) -> list[str | int | Part]:
        """An RGB image as a part, between the ids of its ends."""
        special = self.special_tokens
        if not self.with_clip:
            return [show_o_image_part("und_image", self.image_patches(image), (special.soi, special.eoi))]
        if self.clip_processor is None:
            raise ValueError(
                "this checkpoint understands images by CLIP, and was loaded without it: give from_pretrained "
                'components={"clip": "openai/clip-vit-large-patch14-336"}'
            )
        # pixels at the right and the bottom edge that fill no patch are left out, as by the encoder's convolution
        side = self.clip_processor.size // self.clip_patch_size * self.clip_patch_size
        pixels = self.clip_processor.preprocess(image)[:, :side, :side]
        # the ids of the ends attend as text does
        tokens = patchify(pixels, self.clip_patch_size)
        return [special.soi, show_o_image_part("und_image", tokens, ()), special.eoi]

    # ---- generation

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of a prompt to generate from; one that is too long loses its end."""
        end = self.end_of_text
        ids = [self.special_tokens.t2i, end, *(self.text_tokenizer.encode(prompt) if prompt else []), end]
        return ids if len(ids) <= self.max_prompt_ids else [*ids[: self.max_prompt_ids - 1], end]

    def generation_parts(self, prompt: str, images: Sequence[Image.Image] = ()) -> list[Part]:
        """A prompt to generate an image from; images to condition on stand between its task's id and its text."""
        task, *ids = self.prompt_ids(prompt)
        return [*self.to_parts([task, *images]), text_part(ids)] if images else [text_part([task, *ids])]

    def gen_image_part(self, tokens: Tensor) -> ImagePart:
        """The tokens [n] of an image to generate, some of them masked, between the ids of its ends."""
        return show_o_image_part("gen_image", tokens, (self.special_tokens.soi, self.special_tokens.eoi))

    # ---- images as tokens

    @property
    def required_image_size(self) -> int:
        """Pixels a side of images as tokens. Raises ValueError without the image tokenizer."""
        if self.image_size is None:
            raise ValueError(
                "this checkpoint was loaded without its image tokenizer: give from_pretrained "
                'components={"vq": "showlab/magvitv2"}'
            )
        return self.image_size

    def image_pixels(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        """The middle square of an image as pixels [3, S, S] in [-1, 1]. size: in place of the trained S."""
        return pil_to_tensor(square_crop(image, size or self.required_image_size))

    def parse_masks(self, mask: Any, prompt: str | Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list:
        """The places to draw anew of each prompt's image [n] bool, None without a mask.

        Raises ValueError for a mask without an image, of another size than it, and for one that leaves nothing to draw.
        """
        masks = parse_images(mask, prompt, noun="mask") if mask is not None else [[] for _ in images]
        places: list[Tensor | None] = []
        for i, (some, own) in enumerate(zip(masks, images, strict=True)):
            of = "" if isinstance(prompt, str) else f" of prompt {i + 1}"
            if not some:
                places.append(None)
                continue
            if len(some) != 1 or len(own) != 1:
                raise ValueError(
                    f"got {len(own)} images and {len(some)} masks{of}: expected one image and one mask for it"
                )
            if some[0].size != own[0].size:
                got = "x".join(map(str, some[0].size))
                expected = "x".join(map(str, own[0].size))
                raise ValueError(f"got a mask of {got}{of}: expected {expected}, the image's; resize it")
            drawn = self.mask_places(some[0])
            if not drawn.any():
                raise ValueError(
                    f"got a mask{of} that leaves nothing to draw in the middle square: expected white where the image "
                    "is drawn anew"
                )
            places.append(drawn)
        return places

    def image_patches(self, image: Image.Image) -> Tensor:
        """An image as patches, one a token [n, p*p*3]."""
        return patchify(self.image_pixels(image), self.vq_stride)

    def mask_places(self, mask: Image.Image, *, size: int | None = None) -> Tensor:
        """A mask, white where an image is to be drawn anew, as places of its tokens [n] bool. size: as `image_pixels`."""
        side = size or self.required_image_size
        values = np.asarray(square_crop(mask.convert("L"), side)).astype(np.float32) / 255
        n = side // self.vq_stride
        shrunk = F.interpolate(torch.from_numpy(values)[None, None], size=(n, n), mode="bicubic", align_corners=False)
        return (shrunk >= 0.5).flatten()


def leading_images(message: ChatMessage) -> list[Image.Image]:
    """The images of a message that stand before its first text."""
    images = []
    for piece in message.content:
        if not isinstance(piece, Image.Image):
            break
        images.append(piece)
    return images
