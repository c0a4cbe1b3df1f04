"""/v1/chat/completions: conversations of texts and images, answered whole or streamed."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from PIL import Image

from unimm.generation.stepwise import ModelRequest, RequestMessage
from unimm.generation.text_sampling import TextSampling
from unimm.serving.events import ChoiceDone, Event, ImageDone, ImagePreview, TextPiece
from unimm.serving.image_codec import data_uri
from unimm.serving.limits import ServingLimits
from unimm.serving.schemas import ChatBody, TextContent
from unimm.serving.sizes import parse_openai_size
from unimm.serving.streams import collect, server_sent_event
from unimm.serving.thinking import ThinkSplitter
from unimm.serving.ticket import Answer, Ticket


def image_sources(body: ChatBody, limits: ServingLimits) -> list[str]:
    """The addresses of all images of a conversation, in order. Raises ValueError for more of anything than may be."""
    if len(body.messages) > limits.max_messages:
        raise ValueError(f"got {len(body.messages)} messages: expected at most {limits.max_messages}")
    parts = [part for message in body.messages for part in message.content or []]
    n_chars = sum(len(part.text) for part in parts if isinstance(part, TextContent))
    if n_chars > limits.max_text_chars:
        raise ValueError(f"got texts of {n_chars:,} characters: expected at most {limits.max_text_chars:,}")
    sources = [part.image_url.url for part in parts if not isinstance(part, TextContent)]
    if len(sources) > limits.max_input_images:
        raise ValueError(f"got {len(sources)} images: expected at most {limits.max_input_images}")
    return sources


def chat_request(body: ChatBody, images: Sequence[Image.Image]) -> ModelRequest:
    """A body as a model's request; images: those of `image_sources`, in order. Raises ValueError."""
    left = iter(images)
    systems: list[str] = []
    messages: list[RequestMessage] = []
    for i, message in enumerate(body.messages):
        content = [part.text if isinstance(part, TextContent) else next(left) for part in message.content or []]
        if message.role in ("system", "developer"):
            if messages or not all(isinstance(piece, str) for piece in content):
                raise ValueError(
                    f"got message {i + 1} of the {message.role}: expected texts, before all other messages"
                )
            systems += [piece for piece in content if isinstance(piece, str)]
        else:
            messages.append(RequestMessage(role=message.role, content=tuple(content)))
    if not messages or messages[-1].role != "user":
        raise ValueError("got a conversation that does not end with the user: add a message of the user's")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return ModelRequest(
        messages=tuple(messages),
        outputs=body.output_kinds,
        routed=body.is_routed,
        system="\n".join(systems) if systems else None,
        think=body.thinks,
        seed=body.seed or 0,
        size=parse_openai_size(body.size),
        steps=body.steps,
        guidance=body.guidance,
        negative_prompt=body.negative_prompt,
        text_sampling=TextSampling(
            temperature=0.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_tokens=max_tokens,
            stop=tuple(body.stop or ()),
        ),
    )


class ChatAnswer:
    """The answer to a body, as one object or as chunks."""

    def __init__(self, body: ChatBody, ticket: Ticket):
        self.body = body
        self.ticket = ticket
        self.has_images = "image" in body.output_kinds
        self.image_format = body.output_format or "png"
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": ticket.model}

    # ---- whole

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        answers = await collect(self.ticket)
        # files of images are made in a thread: the event loop goes on
        return await asyncio.to_thread(self._whole, answers)

    def _whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = []
        for i, answer in enumerate(answers):
            reasoning = answer.reasoning
            outputs: list[str | Image.Image] = []
            splitter = ThinkSplitter(enabled=self.body.thinks)
            for piece in answer.outputs:
                if not isinstance(piece, str):
                    outputs.append(piece)
                    continue
                for channel, text in [*splitter.push(piece), *splitter.rest()]:
                    if channel == "reasoning":
                        reasoning += text
                    else:
                        outputs.append(text)
            message = {"role": "assistant", "content": self._content(outputs), "refusal": None}
            if reasoning:
                message["reasoning_content"] = reasoning
            assert answer.done is not None
            choices.append(self._choice(i, "message", message, answer.done.finish_reason))
        done = [answer.done for answer in answers if answer.done is not None]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage(done)}

    def _content(self, outputs: Sequence[str | Image.Image]) -> Any:
        """A text, or content parts where images were asked for, or came."""
        if not (self.has_images or any(isinstance(one, Image.Image) for one in outputs)):
            return "".join(one for one in outputs if isinstance(one, str))
        return [self._part(one) for one in outputs if one != ""]

    def _part(self, output: str | Image.Image) -> dict[str, Any]:
        if isinstance(output, str):
            return {"type": "text", "text": output}
        return {"type": "image_url", "image_url": {"url": data_uri(output, self.image_format)}}

    @staticmethod
    def _choice(index: int, key: str, value: Any, finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, key: value, "finish_reason": finish_reason, "logprobs": None}

    # ---- streamed

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events: the role, then pieces, then why each choice ended, then the usage."""
        for i in range(self.ticket.n):
            yield self._chunk([self._choice(i, "delta", {"role": "assistant", "content": ""}, None)])
        splitters = [ThinkSplitter(enabled=self.body.thinks) for _ in range(self.ticket.n)]
        done: list[ChoiceDone] = []
        async for event in self.ticket:
            for delta in await asyncio.to_thread(self._deltas, event, splitters[event.choice]):
                yield self._chunk([self._choice(event.choice, "delta", delta, None)])
            if isinstance(event, ChoiceDone):
                done.append(event)
                yield self._chunk([self._choice(event.choice, "delta", {}, event.finish_reason)])
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield self._chunk([], usage=usage(done))
        yield server_sent_event("[DONE]")

    def _deltas(self, event: Event, splitter: ThinkSplitter) -> list[dict[str, Any]]:
        if isinstance(event, TextPiece):
            if event.channel == "reasoning":
                return [{"reasoning_content": event.text}]
            return [self._text_delta(*piece) for piece in splitter.push(event.text)]
        held = [self._text_delta(*piece) for piece in splitter.rest()]
        if isinstance(event, ImageDone):
            return [*held, {"content": [self._part(event.image)]}]
        if isinstance(event, ImagePreview):
            part = {**self._part(event.image), "partial_image_index": event.index}
            return [*held, {"content": [part]}]
        return held

    def _text_delta(self, channel: str, text: str) -> dict[str, Any]:
        if channel == "reasoning":
            return {"reasoning_content": text}
        return {"content": [self._part(text)] if self.has_images else text}

    def _chunk(self, choices: Sequence[dict[str, Any]], *, usage: dict[str, Any] | None = None) -> bytes:
        return server_sent_event(
            {**self.head, "object": "chat.completion.chunk", "choices": list(choices), "usage": usage}
        )


def usage(done: Sequence[ChoiceDone]) -> dict[str, Any]:
    """Tokens of an answer: of the prompt once, new ones of all choices. Images have none; `images` counts them."""
    prompt = max((one.n_prompt_tokens for one in done), default=0)
    new = sum(one.n_tokens for one in done)
    reasoning = sum(one.n_reasoning_tokens for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "images": sum(one.n_images for one in done),
    }
