"""The bodies of requests, in OpenAI's shape with the models' own options beside it; unknown fields are refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import Self

# sent by clients, of no effect here: docs/serving.md lists them
IGNORED_FIELDS = (
    "user",
    "safety_identifier",
    "metadata",
    "store",
    "service_tier",
    "moderation",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
# values of OpenAI's options that ask for nothing
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "style": ("natural", "vivid"),
    "input_fidelity": ("low", "high"),
}
OutputFormat = Literal["png", "jpeg", "webp"]
# a text in place of a number, or a truth value, is refused
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
MAX_STOPS = 16
MAX_STOP_CHARS = 1000


class RequestBody(BaseModel):
    """A body: fields that are ignored are left out first, options that are not supported are refused by name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    stream: Flag | None = None
    # the models' own
    steps: Whole | None = None
    guidance: Number | None = None
    negative_prompt: str | None = None
    think: Flag | None = None
    partial_images: Annotated[Whole, Field(ge=0, le=8)] | None = None
    size: str | None = None
    timeout: Annotated[Number, Field(gt=0)] | None = None
    output_format: OutputFormat | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if name not in IGNORED_FIELDS and value is not None}
        for name, neutral in NEUTRAL_VALUES.items():
            if name in kept and name not in cls.model_fields:
                value = kept.pop(name)
                if value not in neutral:
                    raise ValueError(f"got {name} {value!r:.80}: this server does not support it; leave it out")
        return kept


class TextContent(BaseModel):
    """A text in a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """Where an image is: a data URI, or an address where remote images are allowed. detail has no effect."""

    model_config = ConfigDict(extra="forbid")

    url: str
    detail: str | None = None


class ImageContent(BaseModel):
    """An image in a message."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextContent | ImageContent, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | None):
        raise ValueError(f"got content {content!r:.80}: expected a string, or a list of parts")
    return content


def _as_stops(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list | None):
        raise ValueError(f"got stop {value!r:.80}: expected a string, or a list of strings")
    return value


class ChatMessageBody(BaseModel):
    """A message of a conversation. What an assistant's message carries beside its content is left out."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[ContentPart] | None, BeforeValidator(_as_parts)] = None  # a text is one part


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="ignore")

    include_usage: Flag = False


class ChatBody(RequestBody):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessageBody], Field(min_length=1)]
    modalities: list[Literal["text", "image"]] | None = None
    outputs: Annotated[list[Literal["text", "image"]], Field(min_length=1, max_length=16)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    stop: Annotated[
        list[Annotated[str, Field(max_length=MAX_STOP_CHARS)]] | None,
        Field(max_length=MAX_STOPS),
        BeforeValidator(_as_stops),
    ] = None
    stream_options: StreamOptions | None = None
    reasoning_effort: str | None = None

    @property
    def thinks(self) -> bool:
        """Whether the reasoning is written first."""
        if self.think is not None:
            return self.think
        return self.reasoning_effort not in (None, "none")

    @property
    def output_kinds(self) -> tuple[Literal["text", "image"], ...]:
        """The texts and images to answer with, in order: `outputs`, or else `modalities`, each once."""
        return tuple(self.outputs or dict.fromkeys(self.modalities or ["text"]))

    @property
    def is_routed(self) -> bool:
        """Whether the model may decide by itself to answer with an image: nothing was said of what is wanted."""
        return not (self.outputs or self.modalities)


class ImagesBody(RequestBody):
    """The body of /v1/images/generations, and the fields of /v1/images/edits beside the images."""

    prompt: str
    response_format: Literal["b64_json", "url"] | None = None
    output_compression: Annotated[Whole, Field(ge=0, le=100)] | None = None

    @model_validator(mode="after")
    def _check_formats(self) -> Self:
        if self.output_compression not in (None, 100) and self.output_format in (None, "png"):
            raise ValueError("got output_compression for PNG, which has none: give output_format 'jpeg' or 'webp'")
        return self
