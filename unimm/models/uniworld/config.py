"""UniWorld's numbers: the released config.json and, of what it leaves out, the shapes of the weights.

The projectors are SiLUs, whatever config.json says. docs/originals/uniworld.md, "Files".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from typing_extensions import Self

from unimm.checkpoint.config_io import read_json
from unimm.checkpoint.load import HUB_WEIGHT_FILES, read_shapes, weight_files
from unimm.denoisers.flux import FluxConfig
from unimm.denoisers.mmdit import PATCH_SIZE
from unimm.vlms.qwen2_5_vl.config import QwenVLConfig, read_qwen_config

Shapes = Mapping[str, tuple[int, ...]]

# width to height. Each list begins with those before it
ASPECT_RATIOS = ((1, 1), (16, 9), (9, 16), (4, 3), (3, 4), (3, 2), (2, 3), (5, 4), (4, 5), (7, 5), (5, 7))
DENOISE_TOWER = "denoise_tower."  # what the released names of all but the reader begin with
# parts of repositories of their own, by the folders below a checkpoint that may hold them
SIGLIP_FOLDER, FLUX_FOLDERS = "siglip", ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
TASK_HEAD_FILES = ("task_head_final.safetensors", "task_head_final.pt")
MLLM_IMAGE_PIXELS = 448 * 448  # pixels of a picture as the released app shows it to the reader
# widths between the two layers of the projectors and of the head that decides, and of SigLIP2: hard-coded in the original,
# so that only the weights tell them; these are the release's
PROJECTOR_HIDDEN = {"denoise_projector": 12288, "siglip_projector": 12288, "vae_projector": 3072}
SIGLIP_DIM, TASK_HEAD_HIDDEN = 1152, 10240


@dataclass(frozen=True, kw_only=True)
class UniWorldConfig:
    """`*_hidden`: the widths inside what leads to the painter; `decide_hidden`: 0 without the head that decides."""

    mllm: QwenVLConfig
    denoiser: FluxConfig
    mllm_projector_hidden: int
    siglip_dim: int
    siglip_projector_hidden: int
    vae_projector_hidden: int
    task_head_hidden: int
    # the released app's
    image_pixels: int = 1024 * 1024  # of what is drawn, about
    n_aspect_ratios: int = len(ASPECT_RATIOS)
    steps: int = 28
    guidance: float = 3.5
    true_cfg_scale: float = 1.0  # classifier-free; the release was trained without
    system_prompt: str = ""  # of prompts to draw
    images_first: bool = False  # whether pictures stand before the text
    t5_tokens: int = 256  # ids of a caption
    max_answer_tokens: int = 128  # of an answer in place of a picture
    uses_clip: bool = True  # whether it was trained beside CLIP's pooled vector of the text
    reference_latents: Literal["tokens", "condition"] | None = (
        None  # how the painter sees the pictures' latents, if it does
    )
    # folders, hub ids or bundled names of parts that lie neither below the checkpoint nor where the original has them
    part_sources: Mapping[str, str] = field(default_factory=dict)

    # of our own making: no released config has the section
    GENERATION_FIELDS: ClassVar = {
        "image_pixels": "pixels",
        "n_aspect_ratios": "ratios",
        "steps": "steps",
        "guidance": "guidance",
        "true_cfg_scale": "text_guidance",
        "system_prompt": "system",
        "images_first": "in_front",
        "t5_tokens": "t5_length",
        "max_answer_tokens": "max_tokens",
        "uses_clip": "captioned",
        "reference_latents": "references",
        "part_sources": "parts",
    }
    # what a config could say and the released one does not
    FIXED: ClassVar = {"shortcut_image_embeds": False, "shortcut_projector_type": None}
    FIXED_TOWER: ClassVar = {
        "denoiser_type": "flux",
        "denoise_projector_type": "mlp2x_gelu",  # which is a SiLU all the same
        "vae_projector_type": "mlp2x_gelu",
    }

    def __post_init__(self) -> None:
        widths = {name: value for name, value in vars(self).items() if name.endswith(("_hidden", "_dim"))}
        counts = {
            name: getattr(self, name)
            for name in ("image_pixels", "n_aspect_ratios", "steps", "t5_tokens", "max_answer_tokens")
        }
        wrong = [f"{name} {n}" for name, n in (widths | counts).items() if n < (name != "task_head_hidden")]
        if wrong or self.n_aspect_ratios > len(ASPECT_RATIOS):
            raise ValueError(
                f"got {', '.join(wrong) or f'ratios {self.n_aspect_ratios}'}: expected positive numbers, at most {len(ASPECT_RATIOS)} ratios"
            )
        if unknown := sorted({*self.part_sources} - {SIGLIP_FOLDER, *FLUX_FOLDERS}):
            raise ValueError(
                f"got parts {', '.join(unknown)}: expected some of {', '.join((SIGLIP_FOLDER, *FLUX_FOLDERS))}"
            )
        if self.denoiser.in_channels % PATCH_SIZE**2 or self.denoiser.out_channels != self.denoiser.in_channels:
            raise ValueError(
                f"got a painter from {self.denoiser.in_channels} channels to {self.denoiser.out_channels}: expected as many, and "
                f"a multiple of {PATCH_SIZE**2}, patches of {PATCH_SIZE} x {PATCH_SIZE} latents"
            )

    @property
    def latent_channels(self) -> int:
        """Of what the painter's tokens are patches of."""
        return self.denoiser.in_channels // PATCH_SIZE**2

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json, what preprocessor_config.json and generation_config.json add, and the headers of the weights."""
        shapes = [_folder_shapes(folder, HUB_WEIGHT_FILES), _folder_shapes(folder, TASK_HEAD_FILES)]
        preprocessor = read_json(folder / "preprocessor_config.json")
        return cls.from_json(read_qwen_config(folder), preprocessor, shapes=shapes[0], task_head_shapes=shapes[1])

    @classmethod
    def from_json(
        cls,
        files: Mapping[str, Any],
        preprocessor: Mapping[str, Any],
        *,
        shapes: Shapes | None = None,
        task_head_shapes: Shapes | None = None,
    ) -> Self:
        """From the contents of the released files; shapes: of the weights, and of the head's; the release's unless given.

        A preprocessor_config.json whose limits differ is the reader's own: the released app shows it pictures of 448 x 448
        pixels whatever that says. Raises ValueError for another model's, or for what no release has.
        """
        if files.get("model_type") != "univa_qwen2p5vl":
            raise ValueError(f"config.json describes no UniWorld: got model_type {files.get('model_type')!r}, expected "
                             "'univa_qwen2p5vl'")  # fmt: skip
        tower = files.get("denoise_tower", {})
        for section, fixed in ((files, cls.FIXED), (tower, cls.FIXED_TOWER)):
            for key, expected in fixed.items():
                if section.get(key, expected) != expected:
                    raise ValueError(
                        f"got {key} {section[key]!r} in config.json, expected {expected!r}, as in UniWorld-V1"
                    )
        mllm, denoiser = (
            QwenVLConfig.from_json(files, preprocessor),
            FluxConfig.from_json(tower.get("denoiser_config", {})),
        )
        if mllm.image_processor.min_pixels != mllm.image_processor.max_pixels:
            mllm = replace(
                mllm,
                image_processor=replace(
                    mllm.image_processor, min_pixels=MLLM_IMAGE_PIXELS, max_pixels=MLLM_IMAGE_PIXELS
                ),
            )
        widths = {"input_hidden_size": mllm.decoder.dim, "output_hidden_size": denoiser.text_dim}
        widths |= {"vae_input_hidden_size": denoiser.in_channels}
        if wrong := [f"{key} {tower[key]}" for key, n in widths.items() if tower.get(key, n) != n]:
            raise ValueError(
                f"got {', '.join(wrong)} in denoise_tower: expected {widths}, as the reader and the painter say"
            )
        generation, shapes, task_head_shapes = files.get("generation", {}), shapes or {}, task_head_shapes or {}
        hidden = {
            name: shapes.get(f"{DENOISE_TOWER}{name}.0.bias", (generation.get("hidden", {}).get(name, n),))[0]
            for name, n in PROJECTOR_HIDDEN.items()
        }
        siglip_dim = generation.get("hidden", {}).get("siglip", SIGLIP_DIM)
        return cls(
            mllm=mllm,
            denoiser=denoiser,
            mllm_projector_hidden=hidden["denoise_projector"],
            siglip_dim=shapes.get(f"{DENOISE_TOWER}siglip_projector.0.weight", (0, siglip_dim))[1],
            siglip_projector_hidden=hidden["siglip_projector"],
            vae_projector_hidden=hidden["vae_projector"],
            task_head_hidden=task_head_shapes.get("0.bias", (0,))[0],
            **{field: generation[name] for field, name in cls.GENERATION_FIELDS.items() if name in generation},
        )

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of config.json and preprocessor_config.json."""
        files = self.mllm.to_json()
        markers = self.mllm.special_tokens
        tower: dict[str, Any] = {"model_type": "univa_denoise_tower", **self.FIXED_TOWER}
        tower |= {"denoiser_config": self.denoiser.to_json(), "vae_input_hidden_size": self.denoiser.in_channels}
        tower |= {"input_hidden_size": self.mllm.decoder.dim, "output_hidden_size": self.denoiser.text_dim}
        hidden = dict(
            zip(
                PROJECTOR_HIDDEN,
                (self.mllm_projector_hidden, self.siglip_projector_hidden, self.vae_projector_hidden),
                strict=True,
            )
        )
        hidden["siglip"] = self.siglip_dim
        top = files["config.json"] | self.FIXED | {"denoise_tower": tower}
        top |= {"architectures": ["UnivaQwen2p5VLForConditionalGeneration"], "model_type": "univa_qwen2p5vl"}
        top |= {
            "image_begin_token_id": markers.vision_start,
            "image_end_token_id": markers.vision_end,
            "image_token_length": None,
        }
        top |= {
            "generation": {name: getattr(self, field) for field, name in self.GENERATION_FIELDS.items()}
            | {"hidden": hidden}
        }
        return files | {"config.json": top}


def _folder_shapes(folder: Path, names: tuple[str, ...]) -> Shapes:
    return read_shapes(weight_files(folder, names)) if any((folder / name).exists() for name in names) else {}
