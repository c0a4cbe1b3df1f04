"""UniWorld's numbers: the released config.json and, of what it leaves out, the shapes of the weights.

The projectors are SiLUs, whatever config.json says. docs/originals/uniworld.md, "Files".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from typing_extensions import Self

from unimm.checkpoint.config_io import read_json
from unimm.checkpoint.load import HUB_WEIGHTS, read_shapes, weight_files
from unimm.denoisers.flux import FluxConfig
from unimm.denoisers.mmdit import SIDE
from unimm.vlms.qwen2_5_vl.config import QwenVLConfig, with_ends

Shapes = Mapping[str, tuple[int, ...]]

# width to height. Each list begins with those before it
RATIOS = ((1, 1), (16, 9), (9, 16), (4, 3), (3, 4), (3, 2), (2, 3), (5, 4), (4, 5), (7, 5), (5, 7))
TOWER = "denoise_tower."  # what the released names of all but the reader begin with
# parts of repositories of their own, by the folders below a checkpoint that may hold them
SIGLIP_FOLDER, FLUX_FOLDERS = "siglip", ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
DECIDER = ("task_head_final.safetensors", "task_head_final.pt")
LOOKED = 448 * 448  # pixels of a picture as the released app shows it to the reader
# widths between the two layers of the projectors and of the head that decides, and of SigLIP2: hard-coded in the original,
# so that only the weights tell them; these are the release's
HIDDEN = {"denoise_projector": 12288, "siglip_projector": 12288, "vae_projector": 3072}
LOOK_DIM, DECIDE_HIDDEN = 1152, 10240


@dataclass(frozen=True, kw_only=True)
class UniWorldConfig:
    """`*_hidden`: the widths inside what leads to the painter; `decide_hidden`: 0 without the head that decides."""

    reader: QwenVLConfig
    painter: FluxConfig
    read_hidden: int
    look_dim: int
    look_hidden: int
    latent_hidden: int
    decide_hidden: int
    # the released app's
    pixels: int = 1024 * 1024  # of what is drawn, about
    ratios: int = len(RATIOS)
    steps: int = 28
    guidance: float = 3.5
    text_guidance: float = 1.0  # classifier-free; the release was trained without
    system: str = ""  # of prompts to draw
    in_front: bool = False  # whether pictures stand before the text
    t5_length: int = 256  # ids of a caption
    max_tokens: int = 128  # of an answer in place of a picture
    captioned: bool = True  # whether it was trained beside CLIP's pooled vector of the text
    references: Literal["tokens", "condition"] | None = None  # how the painter sees the pictures' latents, if it does
    # folders, hub ids or bundled names of parts that lie neither below the checkpoint nor where the original has them
    parts: Mapping[str, str] = field(default_factory=dict)

    # of our own making: no released config has the section
    OURS: ClassVar = (
        *("pixels", "ratios", "steps", "guidance", "text_guidance", "system", "in_front", "t5_length", "max_tokens"),
        *("captioned", "references", "parts"),
    )
    # what a config could say and the released one does not
    FIXED: ClassVar = {"shortcut_image_embeds": False, "shortcut_projector_type": None}
    FIXED_TOWER: ClassVar = {
        "denoiser_type": "flux",
        "denoise_projector_type": "mlp2x_gelu",  # which is a SiLU all the same
        "vae_projector_type": "mlp2x_gelu",
    }

    def __post_init__(self) -> None:
        widths = {name: value for name, value in vars(self).items() if name.endswith(("_hidden", "_dim"))}
        counts = {name: getattr(self, name) for name in ("pixels", "ratios", "steps", "t5_length", "max_tokens")}
        wrong = [f"{name} {n}" for name, n in (widths | counts).items() if n < (name != "decide_hidden")]
        if wrong or self.ratios > len(RATIOS):
            raise ValueError(
                f"got {', '.join(wrong) or f'ratios {self.ratios}'}: expected positive numbers, at most {len(RATIOS)} ratios"
            )
        if lost := sorted({*self.parts} - {SIGLIP_FOLDER, *FLUX_FOLDERS}):
            raise ValueError(
                f"got parts {', '.join(lost)}: expected some of {', '.join((SIGLIP_FOLDER, *FLUX_FOLDERS))}"
            )
        if self.painter.in_channels % SIDE**2 or self.painter.out_channels != self.painter.in_channels:
            raise ValueError(
                f"got a painter from {self.painter.in_channels} channels to {self.painter.out_channels}: expected as many, and "
                f"a multiple of {SIDE**2}, patches of {SIDE} x {SIDE} latents"
            )

    @property
    def latent_channels(self) -> int:
        """Of what the painter's tokens are patches of."""
        return self.painter.in_channels // SIDE**2

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json, what preprocessor_config.json and generation_config.json add, and the headers of the weights."""
        held = [_shapes(folder, HUB_WEIGHTS), _shapes(folder, DECIDER)]
        look = read_json(folder / "preprocessor_config.json")
        return cls.from_files(with_ends(folder), look, shapes=held[0], head=held[1])

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, Any],
        look: Mapping[str, Any],
        *,
        shapes: Shapes | None = None,
        head: Shapes | None = None,
    ) -> Self:
        """From the contents of the released files; shapes: of the weights, and of the head's; the release's unless given.

        A preprocessor_config.json whose limits differ is the reader's own: the released app shows it pictures of 448 x 448
        pixels whatever that says. Raises ValueError for another model's, or for what no release has.
        """
        if files.get("model_type") != "univa_qwen2p5vl":
            raise ValueError(f"config.json describes no UniWorld: got model_type {files.get('model_type')!r}, expected "
                             "'univa_qwen2p5vl'")  # fmt: skip
        tower = files.get("denoise_tower", {})
        for told, fixed in ((files, cls.FIXED), (tower, cls.FIXED_TOWER)):
            for key, expected in fixed.items():
                if told.get(key, expected) != expected:
                    raise ValueError(
                        f"got {key} {told[key]!r} in config.json, expected {expected!r}, as in UniWorld-V1"
                    )
        reader, painter = QwenVLConfig.from_files(files, look), FluxConfig.from_files(tower.get("denoiser_config", {}))
        if reader.pixels.min_pixels != reader.pixels.max_pixels:
            reader = replace(reader, pixels=replace(reader.pixels, min_pixels=LOOKED, max_pixels=LOOKED))
        widths = {"input_hidden_size": reader.decoder.dim, "output_hidden_size": painter.text_dim}
        widths |= {"vae_input_hidden_size": painter.in_channels}
        if wrong := [f"{key} {tower[key]}" for key, n in widths.items() if tower.get(key, n) != n]:
            raise ValueError(
                f"got {', '.join(wrong)} in denoise_tower: expected {widths}, as the reader and the painter say"
            )
        ours, shapes, head = files.get("generation", {}), shapes or {}, head or {}
        hidden = {
            name: shapes.get(f"{TOWER}{name}.0.bias", (ours.get("hidden", {}).get(name, n),))[0]
            for name, n in HIDDEN.items()
        }
        look_dim = ours.get("hidden", {}).get("siglip", LOOK_DIM)
        return cls(
            reader=reader,
            painter=painter,
            read_hidden=hidden["denoise_projector"],
            look_dim=shapes.get(f"{TOWER}siglip_projector.0.weight", (0, look_dim))[1],
            look_hidden=hidden["siglip_projector"],
            latent_hidden=hidden["vae_projector"],
            decide_hidden=head.get("0.bias", (0,))[0],
            **{name: value for name, value in ours.items() if name in cls.OURS},
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of config.json and preprocessor_config.json."""
        files = self.reader.to_files()
        markers = self.reader.markers
        tower: dict[str, Any] = {"model_type": "univa_denoise_tower", **self.FIXED_TOWER}
        tower |= {"denoiser_config": self.painter.to_files(), "vae_input_hidden_size": self.painter.in_channels}
        tower |= {"input_hidden_size": self.reader.decoder.dim, "output_hidden_size": self.painter.text_dim}
        hidden = dict(zip(HIDDEN, (self.read_hidden, self.look_hidden, self.latent_hidden), strict=True))
        hidden["siglip"] = self.look_dim
        top = files["config.json"] | self.FIXED | {"denoise_tower": tower}
        top |= {"architectures": ["UnivaQwen2p5VLForConditionalGeneration"], "model_type": "univa_qwen2p5vl"}
        top |= {"image_begin_token_id": markers.look, "image_end_token_id": markers.looked, "image_token_length": None}
        top |= {"generation": {name: getattr(self, name) for name in self.OURS} | {"hidden": hidden}}
        return files | {"config.json": top}


def _shapes(folder: Path, names: tuple[str, ...]) -> Shapes:
    return read_shapes(weight_files(folder, names)) if any((folder / name).exists() for name in names) else {}
