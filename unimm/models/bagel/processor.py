"""From texts and images to parts of BAGEL's sequences: image processor, special tokens, processor; and the verbs'
defaults.

Axes: h w sides of an image or of its latent, z channels of a latent, C channels of a latent token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from unimm.checkpoint.config_io import JsonConfig, JsonLayout, PositiveFloat, PositiveInt, read_config, write_config
from unimm.generation.flow import parse_shift, parse_steps
from unimm.generation.guidance import Guidance, parse_guidance
from unimm.generation.numbers import parse_flag
from unimm.generation.step_cache import StepCacheOptions, parse_step_cache
from unimm.nn.patches import patchify
from unimm.nn.pos_embed import grid_position_ids
from unimm.processing.images.io import resize
from unimm.processing.requests import parse_size
from unimm.sequence.parts import IGNORE_INDEX, ImagePart, Part, image_part, text_part
from unimm.tokenizers.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class BagelImageProcessor:
    """The released resize: sides from min_size to max_size where both fit, multiples of stride, at most max_pixels."""

    max_size: PositiveInt
    min_size: PositiveInt
    stride: PositiveInt
    max_pixels: PositiveInt = 14 * 14 * 9 * 1024  # of all images of a sample together

    JSON: ClassVar = JsonLayout(
        keys={
            "max_size": "max_image_size",
            "min_size": "min_image_size",
            "stride": "image_stride",
            "max_pixels": "max_pixels",
        },
    )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, max_size: int, min_size: int, stride: int) -> "BagelImageProcessor":
        """Read a vae_transform or vit_transform; the numbers given for what is missing."""
        defaults = {"max_image_size": max_size, "min_image_size": min_size, "image_stride": stride}
        return read_config(cls, data, replace(cls.JSON, defaults=defaults))

    def to_json(self) -> dict[str, int]:
        """The mapping that `from_json` reads."""
        return write_config(self, self.JSON)

    def output_size(self, width: int, height: int, *, n_images: int = 1) -> tuple[int, int]:
        """(width, height) after the resize, for one of `n_images` images that share max_pixels.

        As the released data/transforms.py does: rounds twice, to even, and shrinks by the ratio of pixels where its
        root is meant; both kept, since the models were trained with them.
        """
        scale = max(min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height))
        w, h = self._scaled_size(width, height, scale)
        if w * h > self.max_pixels / n_images:
            w, h = self._scaled_size(w, h, self.max_pixels / n_images / (w * h))
        if max(w, h) > self.max_size:
            w, h = self._scaled_size(w, h, self.max_size / max(w, h))
        return w, h

    def _scaled_size(self, width: int, height: int, scale: float) -> tuple[int, int]:
        w, h = (max(self.stride, self.stride * round(round(side * scale) / self.stride)) for side in (width, height))
        return w, h

    def __call__(self, image: Image.Image, *, n_images: int = 1) -> Image.Image:
        """The resized image (PIL's bicubic, with its antialias)."""
        return resize(image, self.output_size(image.width, image.height, n_images=n_images))


THINK_TEMPLATE = (
    "You should first think about the {0} process in the mind and {1} \n"
    "The {0} process is enclosed within <think> </think> tags, i.e. <think> {0} process here </think> {2} here"
)


@dataclass(frozen=True, kw_only=True)
class BagelDefaults(JsonConfig):
    """Defaults of the verbs' options: the released app's numbers; a bundled model has its own."""

    steps: PositiveInt = 49  # between the app's 50 timesteps
    timestep_shift: PositiveFloat = 3.0
    generate_guidance: Guidance = Guidance()
    edit_guidance: Guidance = Guidance(image_scale=2.0, interval=(0.0, 1.0), renorm="text_channel")
    size: tuple[PositiveInt, PositiveInt] = (1024, 1024)  # (height, width) in pixels
    max_think_tokens: PositiveInt = 1000
    think_generate_prompt: str = THINK_TEMPLATE.format("planning", "then generate the image.", "image")
    think_understand_prompt: str = THINK_TEMPLATE.format(
        "reasoning", "then provide the user with the answer.", "answer"
    )

    # of "generation" in a bundled model's config.json
    JSON: ClassVar = JsonLayout(
        keys={
            "steps": "steps",
            "timestep_shift": "shift",
            "generate_guidance": "draw",
            "edit_guidance": "edit",
            "size": "size",
            "max_think_tokens": "think_tokens",
            "think_generate_prompt": "think_draw",
            "think_understand_prompt": "think_answer",
        },
    )


@dataclass(frozen=True, kw_only=True)
class BagelImageOptions:
    """Options of one call that generates images; None is the default of `BagelDefaults`."""

    size: tuple[int, int] | None  # (height, width) in pixels
    guidance: Sequence[Guidance | float] | None
    steps: int | None
    timestep_shift: float | None = None
    step_cache: StepCacheOptions | bool | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        parsers: dict[str, Callable] = {
            "size": parse_size,
            "steps": parse_steps,
            "timestep_shift": partial(parse_shift, name="timestep_shift"),
            "guidance": lambda given: [parse_guidance(one) for one in given],
            "step_cache": parse_step_cache,
            "progress": partial(parse_flag, name="progress"),
        }
        for name, parse in parsers.items():
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse(given))


@dataclass(frozen=True, kw_only=True)
class BagelSpecialTokens(JsonConfig):
    """Ids around every text (bos, eos) and every image (boi, eoi)."""

    bos: int
    eos: int
    boi: int
    eoi: int

    TOKENS: ClassVar = {"bos": "<|im_start|>", "eos": "<|im_end|>", "boi": "<|vision_start|>", "eoi": "<|vision_end|>"}
    # of new_token_ids in config.json
    JSON: ClassVar = JsonLayout(
        name="new_token_ids",
        keys={"bos": "bos_token_id", "eos": "eos_token_id", "boi": "start_of_image", "eoi": "end_of_image"},
    )

    @classmethod
    def from_tokenizer(cls, tokenizer: TextTokenizer) -> "BagelSpecialTokens":
        """The ids of `TOKENS`. Raises ValueError for a tokenizer that lacks one."""
        ids = {name: found for name, token in cls.TOKENS.items() if (found := tokenizer.token_id(token)) is not None}
        if missing := [token for name, token in cls.TOKENS.items() if name not in ids]:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}: expected the Qwen2.5 special tokens")
        return cls(**ids)


@dataclass(frozen=True, kw_only=True)
class BagelProcessor:
    """Makes the parts of a sequence: the tokens of a text or an image, between their special tokens."""

    special_tokens: BagelSpecialTokens
    vit_patch_size: int | None  # pixels a side of a ViT patch; None for a checkpoint without a ViT
    vit_grid: int  # the table of the ViT's positions has vit_grid^2 rows
    latent_patch_size: int | None  # latents a side of a latent token; None for a checkpoint that does not generate
    latent_grid: int  # likewise, of latent positions
    interpolate_pos_embed: bool

    def text_part(self, ids: Sequence[int]) -> Part:
        """[bos] ids [eos], without loss."""
        return text_part([self.special_tokens.bos, *ids, self.special_tokens.eos])

    def answer_part(self, ids: Sequence[int]) -> Part:
        """[bos] ids [eos], with the loss of the next id at all but the last."""
        return text_part(
            [self.special_tokens.bos, *ids, self.special_tokens.eos],
            labels=[*ids, self.special_tokens.eos, IGNORE_INDEX],
        )

    def vit_part(self, pixels: Tensor) -> ImagePart:
        """An image [3, h, w] in [-1, 1] as the ViT's patches."""
        if self.vit_patch_size is None:
            raise NotImplementedError(
                "this checkpoint was trained without its ViT (visual_und false): it takes no images"
            )
        p = self.vit_patch_size
        position_ids = grid_position_ids(
            pixels.shape[1] // p, pixels.shape[2] // p, self.vit_grid, interpolate=self.interpolate_pos_embed
        )
        return image_part(
            "und_image",
            patchify(pixels, p),
            position_ids,
            boundary_ids=(self.special_tokens.boi, self.special_tokens.eoi),
        )

    def latent_part(self, latent: Tensor, *, timestep: float = 0.0, noised: bool = False) -> ImagePart:
        """A latent [z, h, w]: of an image in the context, clean, or of one to generate, noised."""
        p = self.check_visual_gen()
        return self.latent_token_part(
            patchify(latent, p), latent.shape[1] // p, latent.shape[2] // p, timestep=timestep, noised=noised
        )

    def latent_token_part(
        self, tokens: Tensor, height: int, width: int, *, timestep: float = 0.0, noised: bool = False
    ) -> ImagePart:
        """Latent tokens [height * width, C], or in their place numbers by which they are found later."""
        boundary_ids = (self.special_tokens.boi, self.special_tokens.eoi)
        return image_part(
            "gen_image",
            tokens,
            self.latent_position_ids(height, width),
            boundary_ids=boundary_ids,
            timestep=timestep,
            noised=noised,
        )

    def latent_position_ids(self, height: int, width: int) -> Tensor:
        """The latent tokens' rows in the table of latent positions, [height * width]."""
        return grid_position_ids(height, width, self.latent_grid, interpolate=self.interpolate_pos_embed)

    def check_visual_gen(self) -> int:
        """The latent patch size. Raises NotImplementedError for a checkpoint that cannot generate images."""
        if self.latent_patch_size is None:
            raise NotImplementedError(
                "this checkpoint was trained to understand only (visual_gen false): it generates no images"
            )
        return self.latent_patch_size
