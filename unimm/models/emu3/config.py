"""Emu3's config: the released config files to and from numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

from unimm.checkpoint.config_io import JsonLayout, PositiveInt, read_config, read_value, write_config
from unimm.checkpoint.json_files import at_place_of, drop_nulls, naming_place, read_json, read_preprocessor_json
from unimm.generation.image_tokens import ImageTokenSampling
from unimm.models.emu3 import VISION_TOKENIZER_FOLDER
from unimm.models.emu3.image_processor import Emu3ImageProcessor
from unimm.models.emu3.text_tokenizer import Emu3SpecialTokens
from unimm.models.emu3.transformers_layout import emu3_from_transformers
from unimm.nn.decoder import DecoderConfig
from unimm.tokenizers.emu3_vq import Emu3VQConfig
from unimm.vlms.llama_layout import EXPERT, decoder_config_to_json, llama_config_from_json

# of the released examples
NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
PROMPT_SUFFIX = " masterpiece, film grained, best quality."
# whatever it is called, it acts on embedded rows and on both residual branches, too
DROPOUT_KEY = "attention_dropout"
# what the original takes for missing keys of the language model
LANGUAGE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 184622,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 9216,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    DROPOUT_KEY: 0.1,
}


@dataclass(frozen=True, kw_only=True)
class Emu3ChatConfig:
    """The format of a conversation: the released ones, unless config.json has others under "generation".

    template: "chat" as Emu3-Chat was trained, or "plain", image and text alone, as Emu3-Stage1 was.
    """

    system: str = "You are a helpful assistant."
    template: Literal["chat", "plain"] = "chat"
    max_tokens: PositiveInt = 1024


@dataclass(frozen=True, kw_only=True)
class Emu3GenerationConfig:
    """The defaults of generating images: of the released example, unless config.json has others under "generation"."""

    guidance: float = 3.0
    negative_prompt: str = NEGATIVE_PROMPT
    sampling: ImageTokenSampling = ImageTokenSampling(top_k=2048)  # noqa: RUF009


@dataclass(frozen=True, kw_only=True)
class Emu3Config:
    """The configs of the parts, and the defaults of generation.

    image_area: pixels of an image that is generated, where its size is not given.
    """

    decoder: DecoderConfig
    special_tokens: Emu3SpecialTokens
    image_area: PositiveInt
    vision_tokenizer: Emu3VQConfig | None  # None where it lies elsewhere
    image_processor: Emu3ImageProcessor
    image_generation: Emu3GenerationConfig
    chat: Emu3ChatConfig

    def __post_init__(self) -> None:
        special = {field.name: getattr(self.special_tokens, field.name) for field in fields(self.special_tokens)}
        if len(set(special.values())) < len(special) or max(special.values()) >= self.decoder.vocab_size - 1:
            raise ValueError(
                f"got the special tokens {special} in the config: expected different ids below the vocabulary's "
                f"{self.decoder.vocab_size} rows"
            )
        if self.vision_tokenizer is not None:
            self.check_vision_tokenizer(self.vision_tokenizer)

    @property
    def n_codes(self) -> int:
        """The number of codes that the vocabulary has a token for."""
        return self.decoder.vocab_size - self.special_tokens.code0

    def check_vision_tokenizer(self, config: Emu3VQConfig) -> None:
        """Raise ValueError for a vision tokenizer of another number of codes, or another size of a code's square."""
        if config.n_codes != self.n_codes:
            raise ValueError(
                f"got a vision tokenizer of {config.n_codes} codes: expected {self.n_codes}, as many tokens as the "
                "vocabulary has for them; give the one that the language model was trained with"
            )
        if config.stride != self.image_processor.stride:
            raise ValueError(
                f"got images in multiples of {self.image_processor.stride} pixels for a vision tokenizer with codes of "
                f"{config.stride}: expected the same; correct spatial_factor in preprocessor_config.json"
            )

    def with_vision_tokenizer(self, config: Emu3VQConfig, image_processor: Emu3ImageProcessor) -> "Emu3Config":
        """The config with a vision tokenizer and the image processor that was released with it."""
        return replace(self, vision_tokenizer=config, image_processor=image_processor)

    def size_of_ratio(self, ratio: str) -> tuple[int, int]:
        """(height, width) in pixels of an image of about `image_area` pixels, by its ratio "width:height", say "16:9".

        Raises ValueError for another text.
        """
        sides = ratio.split(":") if isinstance(ratio, str) else []
        if len(sides) != 2 or not all(side.isascii() and side.isdecimal() and int(side) for side in sides):
            raise ValueError(f"got ratio {ratio!r:.80}: expected width:height in whole numbers, say '4:3'")
        width, height = map(int, sides)
        stride = self.image_processor.stride
        scale = sqrt(self.image_area / (height * width)) / stride
        return max(1, round(height * scale)) * stride, max(1, round(width * scale)) * stride

    @classmethod
    def from_folder(cls, folder: Path) -> "Emu3Config":
        """Read the config files of either layout; those of the vision tokenizer where they are there."""
        files = read_json(folder / "config.json", required=True)
        if "text_config" in files:
            return cls.from_json(emu3_from_transformers(files), read_preprocessor_json(folder))
        below = folder / VISION_TOKENIZER_FOLDER
        if not below.is_dir():
            return cls.from_json(files, {})
        vision = read_json(below / "config.json", required=True)
        return cls.from_json(
            at_place_of(files, {**files, VISION_TOKENIZER_FOLDER: vision}), read_preprocessor_json(below)
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> "Emu3Config":
        """Read the contents of the original layout's files; the vision tokenizer's config.json as a section, or none.

        Raises ValueError for missing keys.
        """
        language = at_place_of(data, {**LANGUAGE_DEFAULTS, **drop_nulls(data)})
        vision = data.get(VISION_TOKENIZER_FOLDER)
        decoder = llama_config_from_json(language, expert=EXPERT)
        dropout = read_value(language, DROPOUT_KEY, float, layout=LAYOUT)
        with naming_place(data):
            decoder = replace(decoder, dropout=dropout)
        given: dict[str, Any] = {
            "decoder": decoder,
            "special_tokens": Emu3SpecialTokens.from_json(data),
            "vision_tokenizer": None if vision is None else Emu3VQConfig.from_json(vision),
            "image_processor": Emu3ImageProcessor.from_json(preprocessor),
        }
        return read_config(cls, data, LAYOUT, given=given)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of the original layout's files, by their paths below a checkpoint."""
        config = decoder_config_to_json(self.decoder) | {DROPOUT_KEY: self.decoder.dropout}
        config |= self.special_tokens.to_json() | write_config(self, LAYOUT)
        files = {"config.json": config}
        if self.vision_tokenizer is not None:
            files[f"{VISION_TOKENIZER_FOLDER}/config.json"] = self.vision_tokenizer.to_json()
            files[f"{VISION_TOKENIZER_FOLDER}/preprocessor_config.json"] = self.image_processor.to_json()
        return files


LAYOUT = JsonLayout(
    name="config.json",
    source="a released Emu3, fetch it again",
    keys={"image_area": "image_area", "image_generation": "generation.image", "chat": "generation.chat"},
    # the section `generation` is of our own making: no released config has it
    defaults={"image_area": 720 * 720, "generation.image": {}, "generation.chat": {}},
    constants={"architectures": ["Emu3ForCausalLM"], "model_type": "Emu3"},
)
