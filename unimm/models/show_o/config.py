"""Show-o's config: the released config.json to and from numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unimm.checkpoint.config_io import JsonLayout, PositiveInt, read_config, read_value, write_config
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.load import CheckpointError, read_folder_shapes
from unimm.generation.masked import MaskedSampling
from unimm.models.show_o import PHI_FOLDER, TOKENIZER_HUB_ID
from unimm.models.show_o.phi import PhiConfig

# as the released code and its trainer write them; the first is written
WEIGHT_FILES = (
    "pytorch_model.safetensors",
    "pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
CLIP_DIM = 1024  # of CLIP's features, as released
PROJECTOR_KEY = "mm_projector.0.weight"
# for images of up to so many tokens the released scripts take the first guidance and number of steps, above them the
# second
SMALL_IMAGE = 256
SMALL_DEFAULTS: dict[str, Any] = {"generation.guidance": 2.75, "generation.steps": 18}
LARGE_DEFAULTS: dict[str, Any] = {"generation.guidance": 6.0, "generation.steps": 50}


@dataclass(frozen=True, kw_only=True)
class ShowOSpecialTokens:
    """The ids of the special tokens, which follow the text tokenizer's in a fixed order; `TOKENS` are their strings."""

    pad: int
    soi: int
    eoi: int
    t2i: int
    mmu: int

    @classmethod
    def after(cls, n_text: int) -> "ShowOSpecialTokens":
        """The ids behind a text tokenizer of this length."""
        ids = {name: n_text + i for i, name in enumerate(SPECIAL_NAMES)}
        return cls(**{name: ids[name] for name in ("pad", "soi", "eoi", "t2i", "mmu")})


SPECIAL_NAMES = ("pad", "soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")
SPECIAL_TOKENS = tuple("[PAD]" if name == "pad" else f"<|{name}|>" for name in SPECIAL_NAMES)


@dataclass(frozen=True, kw_only=True)
class ShowOConfig:
    """The numbers of the parts, and the defaults of generation.

    clip_dim: of the features that a model with CLIP understands images by. image_tokens: of an image that it generates,
    a square. max_prompt_ids: beyond them a prompt to generate from loses its end. guidance: 1 is none, the original's
    number plus 1.
    """

    decoder: PhiConfig
    n_text: PositiveInt  # ids of the text tokenizer
    n_codes: PositiveInt
    with_clip: bool
    clip_dim: PositiveInt
    image_tokens: PositiveInt
    llm_path: str
    guidance: float
    steps: PositiveInt
    masked_sampling: MaskedSampling
    max_prompt_ids: PositiveInt
    max_answer_tokens: PositiveInt

    def __post_init__(self) -> None:
        if self.n_new_tokens != len(SPECIAL_TOKENS):
            raise ValueError(
                f"got vocab_size {self.decoder.vocab_size} for {self.n_text} ids of text and {self.n_codes} codes: "
                f"expected {self.n_text + len(SPECIAL_TOKENS) + self.n_codes + 1}, with {len(SPECIAL_TOKENS)} special "
                "ids and the mask's; correct config.json"
            )
        if math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise ValueError(f"got num_vq_tokens {self.image_tokens}: expected a square number; correct config.json")

    @property
    def n_new_tokens(self) -> int:
        """The special ids between those of text and the codes."""
        return self.decoder.vocab_size - 1 - self.n_codes - self.n_text

    @property
    def mask_token_id(self) -> int:
        """The id of a masked place, the last of all; as an image token it is `n_codes`."""
        return self.decoder.vocab_size - 1

    @property
    def first_code_id(self) -> int:
        """The id of image token 0."""
        return self.mask_token_id - self.n_codes

    @property
    def special_tokens(self) -> ShowOSpecialTokens:
        """The ids of the special tokens."""
        return ShowOSpecialTokens.after(self.n_text)

    @property
    def token_grid(self) -> tuple[int, int]:
        """(rows, columns) of an image's tokens."""
        side = math.isqrt(self.image_tokens)
        return side, side

    def for_image_tokens(self, n: int) -> "ShowOConfig":
        """The config of a release that is known to generate images of so many tokens, whatever its file says."""
        if self.image_tokens == n:
            return self
        defaults = SMALL_DEFAULTS if n <= SMALL_IMAGE else LARGE_DEFAULTS
        return replace(
            self,
            image_tokens=n,
            guidance=defaults["generation.guidance"],
            steps=defaults["generation.steps"],
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "ShowOConfig":
        """Read config.json, and Phi's where it is there; without one the numbers are Phi-1.5's."""
        data = read_json(folder / "config.json", required=True)
        path = read_value(data, "llm_model_path", str, TOKENIZER_HUB_ID, layout=LAYOUT)
        phi_file = folder / path / "config.json"
        if not phi_file.is_file() and path != TOKENIZER_HUB_ID:
            raise ValueError(
                f"got llm_model_path {path!r} in {folder}/config.json, and no {phi_file}: expected Phi's config.json "
                f"there, or {TOKENIZER_HUB_ID}, whose numbers are known"
            )
        shape = read_folder_shapes(folder, WEIGHT_FILES).get(PROJECTOR_KEY, (0, CLIP_DIM))
        if len(shape) != 2:
            raise CheckpointError(f"{PROJECTOR_KEY} has shape {list(shape)}: expected two axes; fetch it again")
        return cls.from_json(data, read_json(phi_file), clip_dim=shape[1])

    @classmethod
    def from_json(cls, data: Mapping[str, Any], phi: Mapping[str, Any], *, clip_dim: int = CLIP_DIM) -> "ShowOConfig":
        """Read the contents of config.json and of Phi's. clip_dim: of the projector's weights. Raises ValueError for
        missing keys."""
        vocab_size = read_value(data, "vocab_size", PositiveInt, layout=LAYOUT)
        decoder = PhiConfig.from_json(phi, vocab_size=vocab_size)
        n = read_value(data, "num_vq_tokens", PositiveInt, layout=LAYOUT)
        defaults = SMALL_DEFAULTS if n <= SMALL_IMAGE else LARGE_DEFAULTS
        layout = replace(LAYOUT, defaults={**LAYOUT.defaults, **defaults})
        return read_config(cls, data, layout, given={"decoder": decoder, "clip_dim": clip_dim})

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of config.json, and of Phi's where it is not Phi-1.5."""
        vocab_size = self.decoder.vocab_size
        path = self.llm_path
        files: dict[str, dict[str, Any]] = {}
        if self.decoder != PhiConfig(vocab_size=vocab_size):
            path = PHI_FOLDER
            files[f"{PHI_FOLDER}/config.json"] = self.decoder.to_json() | {"vocab_size": vocab_size}
        config = write_config(replace(self, llm_path=path), LAYOUT) | {"vocab_size": vocab_size}
        return {"config.json": config} | files


LAYOUT = JsonLayout(
    name="config.json",
    source="a released Show-o, fetch it again",
    keys={
        "n_text": "llm_vocab_size",
        "n_codes": "codebook_size",
        "with_clip": "w_clip_vit",
        "image_tokens": "num_vq_tokens",
        "llm_path": "llm_model_path",
        "guidance": "generation.guidance",
        "steps": "generation.steps",
        "masked_sampling": "generation.masked_sampling",
        "max_prompt_ids": "generation.max_prompt_ids",
        "max_answer_tokens": "generation.max_answer_tokens",
    },
    defaults={
        "llm_model_path": TOKENIZER_HUB_ID,
        # of our own making: no released config has the section
        "generation.masked_sampling": {},
        "generation.max_prompt_ids": 129,
        "generation.max_answer_tokens": 100,
    },
    fixed={"_class_name": "Showo"},
    derived={"mask_token_id": "mask_token_id"},
    constants={"load_from_showo": True},
)
