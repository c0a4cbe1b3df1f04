"""UniWorld's config: the released config.json and, for what it leaves out, the shapes of the weights.

The projectors are SiLUs, whatever config.json says. docs/originals/uniworld.md, "Files".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Self

from unimm.checkpoint.config_io import JsonLayout, PositiveInt, read_config, write_config
from unimm.checkpoint.json_files import naming_place, read_preprocessor_json
from unimm.checkpoint.load import HUB_WEIGHT_FILES, Shapes, read_folder_shapes, read_size
from unimm.denoisers.flux import FluxConfig
from unimm.denoisers.mmdit import PATCH_SIZE
from unimm.vlms.qwen2_5_vl.config import QwenVLConfig, read_qwen_config

# (width, height). The original's lists of 1, 5, 7, 9 and 11 ratios are the beginnings of this one
ASPECT_RATIOS = ((1, 1), (16, 9), (9, 16), (4, 3), (3, 4), (3, 2), (2, 3), (5, 4), (4, 5), (7, 5), (5, 7))
N_ASPECT_RATIOS = len(ASPECT_RATIOS)
DENOISE_TOWER = "denoise_tower."  # prefix of all released names but the MLLM's
# auxiliary encoders, by the folders below a checkpoint that may hold them
SIGLIP_FOLDER = "siglip"
FLUX_FOLDERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
TASK_HEAD_FILES = ("task_head_final.safetensors", "task_head_final.pt")
MLLM_IMAGE_PIXELS = 448 * 448  # of an input image, in the released app
# widths between the two layers of each projector; the original's code fixes them, so that only the weights' shapes tell
PROJECTOR_HIDDEN = {"denoise_projector": 12288, "siglip_projector": 12288, "vae_projector": 3072}
SIGLIP_DIM = 1152

LAYOUT = JsonLayout(
    name="config.json",
    source="UniWorld-V1",
    keys={
        "denoiser": "denoise_tower.denoiser_config",
        # a section of this library's own: no released config has it
        "image_pixels": "generation.pixels",
        "n_aspect_ratios": "generation.ratios",
        "steps": "generation.steps",
        "guidance": "generation.guidance",
        "true_cfg_scale": "generation.text_guidance",
        "system_prompt": "generation.system",
        "images_first": "generation.in_front",
        "t5_tokens": "generation.t5_length",
        "max_answer_tokens": "generation.max_tokens",
        "uses_clip": "generation.captioned",
        "reference_latents": "generation.references",
        "part_sources": "generation.parts",
        "mllm_projector_hidden": "generation.hidden.denoise_projector",
        "siglip_projector_hidden": "generation.hidden.siglip_projector",
        "vae_projector_hidden": "generation.hidden.vae_projector",
        "siglip_dim": "generation.hidden.siglip",
    },
    defaults={
        **{f"generation.hidden.{name}": width for name, width in PROJECTOR_HIDDEN.items()},
        "generation.hidden.siglip": SIGLIP_DIM,
    },
    fixed={
        "shortcut_image_embeds": False,
        "shortcut_projector_type": None,
        "denoise_tower.denoiser_type": "flux",
        "denoise_tower.denoise_projector_type": "mlp2x_gelu",  # which is a SiLU all the same
        "denoise_tower.vae_projector_type": "mlp2x_gelu",
    },
    derived={
        "denoise_tower.input_hidden_size": "mllm.decoder.dim",
        "denoise_tower.output_hidden_size": "denoiser.text_dim",
        "denoise_tower.vae_input_hidden_size": "denoiser.in_channels",
    },
    constants={
        "architectures": ["UnivaQwen2p5VLForConditionalGeneration"],
        "model_type": "univa_qwen2p5vl",
        "denoise_tower.model_type": "univa_denoise_tower",
    },
)


@dataclass(frozen=True, kw_only=True)
class UniWorldConfig:
    """`*_hidden`: widths between the two layers of the projectors and of the task head; 0 for a checkpoint without the
    head."""

    mllm: QwenVLConfig
    denoiser: FluxConfig
    mllm_projector_hidden: PositiveInt
    siglip_dim: PositiveInt
    siglip_projector_hidden: PositiveInt
    vae_projector_hidden: PositiveInt
    task_head_hidden: int
    # the released app's
    image_pixels: PositiveInt = 1024 * 1024  # of a generated image, about
    n_aspect_ratios: PositiveInt = N_ASPECT_RATIOS
    steps: PositiveInt = 28
    guidance: float = 3.5
    true_cfg_scale: float = 1.0  # the release was not trained for classifier-free guidance
    system_prompt: str = ""  # in generation
    images_first: bool = False  # whether input images stand before the text
    t5_tokens: PositiveInt = 256
    max_answer_tokens: PositiveInt = 128  # of an answer in place of an image
    uses_clip: bool = True  # whether it was trained with CLIP's embedding of the prompt
    reference_latents: Literal["tokens", "condition"] | None = (
        None  # how the input images' VAE latents are used, if at all
    )
    # folders, hub ids or bundled names of encoders that lie neither below the checkpoint nor where the original has
    # them
    part_sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive = {name: value for name, value in vars(self).items() if name.endswith(("_hidden", "_dim"))}
        del positive["task_head_hidden"]
        counts = ("image_pixels", "n_aspect_ratios", "steps", "t5_tokens", "max_answer_tokens")
        positive |= {name: getattr(self, name) for name in counts}
        if wrong := [f"{name} {n}" for name, n in positive.items() if n < 1]:
            raise ValueError(f"got {', '.join(wrong)}: expected positive numbers")
        if self.n_aspect_ratios > len(ASPECT_RATIOS):
            raise ValueError(
                f"got n_aspect_ratios {self.n_aspect_ratios}: expected at most {len(ASPECT_RATIOS)} ratios"
            )
        if unknown := sorted({*self.part_sources} - {SIGLIP_FOLDER, *FLUX_FOLDERS}):
            raise ValueError(
                f"got parts {', '.join(unknown)}: expected some of {', '.join((SIGLIP_FOLDER, *FLUX_FOLDERS))}"
            )
        channels = self.denoiser.in_channels, self.denoiser.out_channels
        if channels[0] % PATCH_SIZE**2 or channels[0] != channels[1]:
            raise ValueError(
                f"got a denoiser from {channels[0]} channels to {channels[1]}: expected as many, and a multiple of "
                f"{PATCH_SIZE**2}, patches of {PATCH_SIZE} x {PATCH_SIZE} latents"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the VAE's latents."""
        return self.denoiser.in_channels // PATCH_SIZE**2

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json, preprocessor_config.json, generation_config.json and the headers of the weights."""
        preprocessor = read_preprocessor_json(folder)
        shapes = read_folder_shapes(folder, HUB_WEIGHT_FILES)
        task_head_shapes = read_folder_shapes(folder, TASK_HEAD_FILES)
        with naming_place(folder):
            return cls.from_json(
                read_qwen_config(folder), preprocessor, shapes=shapes, task_head_shapes=task_head_shapes
            )

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        preprocessor: Mapping[str, Any],
        *,
        shapes: Shapes | None = None,
        task_head_shapes: Shapes | None = None,
    ) -> Self:
        """Read the contents of the released files. shapes: those of the weights, else the file's or the release's
        widths.

        A preprocessor_config.json with two limits is the MLLM's own: the released app resizes input images to 448 x 448
        pixels whatever that says. Raises ValueError for another model's config, and for what no release has.
        """
        if data.get("model_type") != "univa_qwen2p5vl":
            raise ValueError(
                f"config.json describes no UniWorld: got model_type {data.get('model_type')!r}, expected "
                "'univa_qwen2p5vl'"
            )
        mllm = QwenVLConfig.from_json(data, preprocessor)
        if mllm.image_processor.min_pixels != mllm.image_processor.max_pixels:
            processor = replace(mllm.image_processor, min_pixels=MLLM_IMAGE_PIXELS, max_pixels=MLLM_IMAGE_PIXELS)
            mllm = replace(mllm, image_processor=processor)
        given: dict[str, Any] = {"mllm": mllm, "task_head_hidden": 0}
        if task_head_shapes and "0.bias" in task_head_shapes:
            given["task_head_hidden"] = read_size(task_head_shapes, "0.bias", axis=0, n_axes=1)
        return read_config(cls, data, LAYOUT, given=given | _widths(shapes or {}))

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of config.json and preprocessor_config.json."""
        files = self.mllm.to_json()
        special_tokens = self.mllm.special_tokens
        top = files["config.json"] | write_config(self, LAYOUT)
        top |= {
            "image_begin_token_id": special_tokens.vision_start,
            "image_end_token_id": special_tokens.vision_end,
            "image_token_length": None,
        }
        return files | {"config.json": top}


def _widths(shapes: Shapes) -> dict[str, int]:
    """The projectors' widths that the shapes of a checkpoint's weights tell, by their fields."""
    fields = {
        "mllm_projector_hidden": ("denoise_projector.0.bias", 0, 1),
        "siglip_projector_hidden": ("siglip_projector.0.bias", 0, 1),
        "vae_projector_hidden": ("vae_projector.0.bias", 0, 1),
        "siglip_dim": ("siglip_projector.0.weight", 1, 2),
    }
    return {
        name: read_size(shapes, DENOISE_TOWER + key, axis=axis, n_axes=n_axes)
        for name, (key, axis, n_axes) in fields.items()
        if DENOISE_TOWER + key in shapes
    }
