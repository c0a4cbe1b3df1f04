"""MetaQuery's numbers: its own config.json, and those of its parts, which lie in folders or repositories of their own.

docs/originals/metaquery.md, "Files".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.config_io import read_json
from unimm.denoisers.sana import SanaConfig
from unimm.models.metaquery.connector import ConnectorConfig
from unimm.models.metaquery.mllms import RELEASED_PREFIX, mllm_spec_for, mllm_spec_of
from unimm.models.metaquery.processor import N_BOUNDARY_TOKENS
from unimm.tokenizers.dc_ae import DCAEConfig

DEFAULT_SYSTEM_PROMPT = (
    "You will be given an image or its caption. Please describe the content of the image in detail in your own words."
)


@dataclass(frozen=True, kw_only=True)
class DPMSolverConfig:
    """Numbers of Sana's sampler: scheduler_config.json."""

    timestep_shift: float
    n_train_timesteps: int

    FILES: ClassVar = {"timestep_shift": "flow_shift", "n_train_timesteps": "num_train_timesteps"}
    # what a config could say, and Sana's does not
    FIXED: ClassVar = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "euler_at_final": False,
        "thresholding": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_dynamic_shifting": False,
    }
    # where a file of diffusers' is silent, it means something else
    WITHOUT_DIFFUSERS_DEFAULT: ClassVar = ("prediction_type", "use_flow_sigmas")

    def __post_init__(self) -> None:
        if not self.timestep_shift > 0 or self.n_train_timesteps < 1:
            raise ValueError(f"got {self}: expected positive numbers; correct scheduler_config.json")

    @classmethod
    def from_json(cls, files: Mapping[str, Any]) -> Self:
        """Read a scheduler_config.json. Raises ValueError for another sampler's."""
        for key, expected in cls.FIXED.items():
            if files.get(key, expected) != expected:
                raise ValueError(
                    f"got {key} {files[key]!r} in the scheduler's config, expected {expected!r}, as Sana's says"
                )
        required = (*cls.FILES.values(), *(cls.WITHOUT_DIFFUSERS_DEFAULT if "_class_name" in files else ()))
        if missing := [name for name in required if name not in files]:
            raise ValueError(
                f"the scheduler's config lacks {', '.join(missing)}: expected Sana's scheduler_config.json"
            )
        return cls(**{ours: files[theirs] for ours, theirs in cls.FILES.items()})

    def to_json(self) -> dict[str, Any]:
        """The mapping that `from_json` reads."""
        return self.FIXED | {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}


@dataclass(frozen=True, kw_only=True)
class MetaQueryConfig:
    """homes: the folders below a checkpoint, or hub ids, of the parts whose configs lie apart, by their ids in config.json."""

    mllm: Any  # of one of the readers in query_readers
    connector: ConnectorConfig
    denoiser: SanaConfig
    vae: DCAEConfig
    scheduler: DPMSolverConfig
    part_ids: Mapping[str, str]
    n_queries: int
    max_text_tokens: int  # ids of a caption
    system_prompt: str
    latent_size: int  # latents a side of what is drawn unless a size is asked for
    # of pictures to draw from, in place of what the reader's own config says
    min_pixels: int = 256 * 28 * 28
    max_pixels: int = 1280 * 28 * 28
    # the released demo's; its evaluation takes 7.5 for texts
    steps: int = 30
    guidance: float = 4.5
    image_guidance: float = 1.5

    FILES: ClassVar = {
        "n_queries": "num_metaqueries",
        "max_text_tokens": "max_input_text_tokens",
        "system_prompt": "system_prompt",
        "latent_size": "input_size",
    }
    # of our own making: no released config has the section
    GENERATION_FIELDS: ClassVar = ("min_pixels", "max_pixels", "steps", "guidance", "image_guidance")
    # id in config.json -> where its config lies below that id's folder
    PART_CONFIGS: ClassVar = {
        "mllm_id": "config.json",
        "diffusion_model_id": "transformer/config.json",
        "vae_id": "vae/config.json",
        "scheduler_id": "scheduler/scheduler_config.json",
        "noise_scheduler_id": "scheduler/scheduler_config.json",
    }

    def __post_init__(self) -> None:
        if min(self.n_queries, self.max_text_tokens, self.latent_size, self.steps) < 1:
            raise ValueError(
                f"got {self.n_queries} queries, max_text {self.max_text_tokens}, side {self.latent_size}, steps {self.steps}"
            )
        widths = (self.connector.dim, self.connector.condition_dim), (self.mllm.decoder.dim, self.denoiser.caption_dim)
        if widths[0] != widths[1]:
            raise ValueError(
                f"got a connector of widths {widths[0]}: expected {widths[1]}, the reader's and the painter's"
            )
        channels = self.denoiser.in_channels, self.denoiser.out_channels
        if channels != (self.vae.latent_channels,) * 2 or self.latent_size % self.denoiser.patch_size:
            raise ValueError(
                f"got a painter of {channels} channels and patches of {self.denoiser.patch_size} for {self.vae.latent_channels} "
                f"latents on a grid of {self.latent_size}: expected as many channels, and a multiple of the patch"
            )

    @property
    def embedding_rows(self) -> int:
        """Rows of the table of embeddings as it is released."""
        return self.mllm.decoder.vocab_size + N_BOUNDARY_TOKENS + self.n_queries

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what is drawn unless another size is asked for."""
        return self.latent_size * self.vae.stride, self.latent_size * self.vae.stride

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json, and what it refers to: from folders below this one, or from the hub, configs alone."""
        files = read_config(folder / "config.json")
        if files.get("model_type") != "metaquery":
            raise ValueError(f"{folder}/config.json describes no MetaQuery: got model_type {files.get('model_type')!r}")
        part_ids = {name: str(files.get(name, files.get("diffusion_model_id"))) for name in cls.PART_CONFIGS}
        if files.get("loss_type", "flow") != "flow" or "stable-diffusion" in part_ids["diffusion_model_id"]:
            raise ValueError(
                f"got loss_type {files.get('loss_type')!r} with {part_ids['diffusion_model_id']!r}: the variants on Stable "
                "Diffusion 1.5 are not built; expected 'flow', with a Sana"
            )
        if missing := [
            theirs for theirs in (*cls.FILES.values(), "mllm_id", "diffusion_model_id") if theirs not in files
        ]:
            raise ValueError(
                f"{folder}/config.json lacks {', '.join(missing)}: expected the released config.json of a MetaQuery"
            )
        mllm_folder = part_folder(folder, part_ids["mllm_id"])
        mllm_class = mllm_spec_for(read_config(mllm_folder / "config.json")).model_class.config_class
        parts = [
            read_config(part_folder(folder, part_ids[name]) / at) for name, at in list(cls.PART_CONFIGS.items())[1:4]
        ]
        return cls.from_json(files, mllm_class.from_folder(mllm_folder), *parts, part_ids=part_ids)

    @classmethod
    def from_json(
        cls,
        files: Mapping[str, Any],
        mllm: Any,
        denoiser: Mapping[str, Any],
        vae: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        *,
        part_ids: Mapping[str, str],
    ) -> Self:
        """From the contents of the released files."""
        denoiser_config = SanaConfig.from_json(denoiser)
        n_layers = files.get("connector_num_hidden_layers", 24)
        config = cls(
            mllm=mllm,
            connector=ConnectorConfig(
                dim=mllm.decoder.dim, condition_dim=denoiser_config.caption_dim, n_blocks=n_layers
            ),
            denoiser=denoiser_config,
            vae=DCAEConfig.from_json(vae),
            scheduler=DPMSolverConfig.from_json(scheduler),
            part_ids=dict(part_ids),
            **{ours: files[theirs] for ours, theirs in cls.FILES.items()},
            **{name: value for name, value in files.get("generation", {}).items() if name in cls.GENERATION_FIELDS},
        )
        expected = {"in_channels": config.vae.latent_channels, "vae_downsample_f": config.vae.stride}
        if wrong := [f"{key} {files[key]}" for key, n in expected.items() if files.get(key, n) != n]:
            raise ValueError(f"got {', '.join(wrong)} in config.json: expected {expected}, as the autoencoder says")
        return config

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of every file that `from_folder` reads, by its path below the folder."""
        part_ids = {name: _relative_path(at) for name, at in self.part_ids.items()}
        top: dict[str, Any] = {"architectures": ["MetaQuery"], "model_type": "metaquery", **part_ids}
        top |= {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        top |= {"in_channels": self.vae.latent_channels, "vae_downsample_f": self.vae.stride, "loss_type": "flow"}
        top |= {
            "connector_num_hidden_layers": self.connector.n_blocks,
            "modules_to_freeze": ["vae", RELEASED_PREFIX[:-1]],
        }
        top |= {"modules_to_unfreeze": [mllm_spec_of(self.mllm).embedding_key(self.mllm).removesuffix(".weight")]}
        top |= {"generation": {name: getattr(self, name) for name in self.GENERATION_FIELDS}}
        parts = {f"{part_ids['mllm_id']}/{name}": contents for name, contents in self.mllm.to_json().items()}
        other_parts: dict[str, Any] = {
            "diffusion_model_id": self.denoiser,
            "vae_id": self.vae,
            "scheduler_id": self.scheduler,
        }
        parts |= {f"{part_ids[name]}/{self.PART_CONFIGS[name]}": part.to_json() for name, part in other_parts.items()}
        return {"config.json": top, **parts}


def part_folder(folder: Path, name: str, *, weights: bool = False) -> Path:
    """The folder of a part of a checkpoint: below its own, or else of that name or hub id."""
    below = folder / _relative_path(name)
    return below if below.is_dir() else hub.resolve(name, weights=weights)


def _relative_path(name: str) -> str:
    """A part's name as a path below a checkpoint's folder; of a path that leads out of it, the last step."""
    path = PurePosixPath(name)
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


def read_config(path: Path) -> dict:
    """A config file's contents. Raises ValueError where it is not there, or is no JSON."""
    if not path.exists():
        raise ValueError(f"no {path}: expected a MetaQuery's config.json, and the configs of the parts that it names")
    return read_json(path)
