"""/v1/images/generations and /v1/images/edits: whole answers, and streams of partial images."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from PIL import Image

from unimm.generation.stepwise import ModelRequest, RequestMessage
from unimm.serving.chat import usage
from unimm.serving.events import ChoiceDone, ImageDone, ImagePreview, TextPiece
from unimm.serving.image_codec import encode_image
from unimm.serving.limits import ServingLimits
from unimm.serving.schemas import ImagesBody
from unimm.serving.sizes import parse_openai_size
from unimm.serving.streams import collect, server_sent_event
from unimm.serving.ticket import Answer, Ticket


def images_request(body: ImagesBody, images: Sequence[Image.Image], limits: ServingLimits) -> ModelRequest:
    """A body, and the images to edit, as a model's request. Raises ValueError."""
    if body.response_format == "url":
        raise ValueError("got response_format 'url': this server keeps no images; expected 'b64_json'")
    if len(body.prompt) > limits.max_text_chars:
        raise ValueError(f"got a prompt of {len(body.prompt):,} characters: expected at most {limits.max_text_chars:,}")
    if len(images) > limits.max_input_images:
        raise ValueError(f"got {len(images)} images: expected at most {limits.max_input_images}")
    return ModelRequest(
        messages=(RequestMessage(role="user", content=(*images, body.prompt)),),
        outputs=("image",),
        think=bool(body.think),
        seed=body.seed or 0,
        size=parse_openai_size(body.size),
        steps=body.steps,
        guidance=body.guidance,
        negative_prompt=body.negative_prompt,
    )


class ImagesAnswer:
    """The answer to a body, as one object or as events. kind: "image_generation" or "image_edit"."""

    def __init__(self, body: ImagesBody, ticket: Ticket, kind: str):
        self.body = body
        self.ticket = ticket
        self.kind = kind
        self.created = int(time.time())
        self.output_format = body.output_format or "png"

    def _encode(self, image: Image.Image) -> str:
        return encode_image(image, self.output_format, self.body.output_compression)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object; reasoning, where there was some, stands as the revised prompt."""
        answers = await collect(self.ticket)
        # files are made in a thread: the event loop goes on
        return await asyncio.to_thread(self._whole, answers)

    def _whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        data: list[dict[str, Any]] = []
        for answer in answers:
            one: dict[str, Any] = {"b64_json": self._encode(answer.images[0])}
            data.append(one | ({"revised_prompt": answer.reasoning} if answer.reasoning else {}))
        return {
            "created": self.created,
            "data": data,
            "background": "opaque",
            "output_format": self.output_format,
            "size": size_name(answers[0].images[0]),
            "usage": images_usage([one.done for one in answers if one.done is not None]),
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """Partial images, then the whole ones, as server-sent events named by their types."""
        reasoning = [""] * self.ticket.n
        images: dict[int, Image.Image] = {}
        async for event in self.ticket:
            if isinstance(event, TextPiece):
                reasoning[event.choice] += event.text
            elif isinstance(event, ImagePreview):
                place = {"partial_image_index": event.index}
                yield await asyncio.to_thread(
                    self._event, f"{self.kind}.partial_image", event.choice, event.image, place
                )
            elif isinstance(event, ImageDone):
                images[event.choice] = event.image
            else:
                more: dict[str, Any] = {"usage": images_usage([event])}
                if reasoning[event.choice]:
                    more["revised_prompt"] = reasoning[event.choice]
                yield await asyncio.to_thread(
                    self._event, f"{self.kind}.completed", event.choice, images[event.choice], more
                )

    def _event(self, name: str, choice: int, image: Image.Image, more: dict[str, Any]) -> bytes:
        data = {
            "type": name,
            "b64_json": self._encode(image),
            "created_at": self.created,
            "size": size_name(image),
            "quality": "auto",
            "background": "opaque",
            "output_format": self.output_format,
            "index": choice,  # of the n images; OpenAI streams one
            **more,
        }
        return server_sent_event(data, event=name)


def size_name(image: Image.Image) -> str:
    """WIDTHxHEIGHT."""
    return f"{image.width}x{image.height}"


def images_usage(done: Sequence[ChoiceDone]) -> dict[str, Any]:
    """Tokens of the prompt, and of the reasoning; images are made in steps, which are no tokens."""
    counts = usage(done)
    prompt = counts["prompt_tokens"]
    new = counts["completion_tokens"]
    details = {"text_tokens": prompt, "image_tokens": 0}
    return {"input_tokens": prompt, "input_tokens_details": details, "output_tokens": new, "total_tokens": prompt + new}
