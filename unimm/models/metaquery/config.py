"""MetaQuery's config: its own config.json, and those of its parts, in folders or repositories of their own.

docs/originals/metaquery.md, "Files".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar

from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.config_io import JsonLayout, PositiveFloat, PositiveInt, read_config, read_value, write_config
from unimm.checkpoint.contents import is_there
from unimm.checkpoint.json_files import read_json
from unimm.denoisers.sana import SanaConfig
from unimm.models.metaquery.connector import ConnectorConfig
from unimm.models.metaquery.mllms import RELEASED_PREFIX, mllm_spec_for, mllm_spec_of
from unimm.models.metaquery.processor import N_BOUNDARY_TOKENS
from unimm.tokenizers.dc_ae import DCAEConfig

DEFAULT_SYSTEM_PROMPT = (
    "You will be given an image or its caption. Please describe the content of the image in detail in your own words."
)
SCHEDULER_LAYOUT = JsonLayout(
    name="the scheduler's config",
    source="Sana's scheduler_config.json",
    keys={"timestep_shift": "flow_shift", "n_train_timesteps": "num_train_timesteps"},
    fixed={
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
    },
)
LAYOUT = JsonLayout(
    name="config.json",
    source="the released config.json of a MetaQuery",
    keys={
        "n_queries": "num_metaqueries",
        "max_text_tokens": "max_input_text_tokens",
        "system_prompt": "system_prompt",
        "latent_size": "input_size",
        # a section of this library's own: no released config has it
        "min_pixels": "generation.min_pixels",
        "max_pixels": "generation.max_pixels",
        "steps": "generation.steps",
        "guidance": "generation.guidance",
        "image_guidance": "generation.image_guidance",
    },
    fixed={"loss_type": "flow"},
    derived={
        "in_channels": "vae.latent_channels",
        "vae_downsample_f": "vae.stride",
        "connector_num_hidden_layers": "connector.n_blocks",
    },
    constants={"architectures": ["MetaQuery"], "model_type": "metaquery"},
)


@dataclass(frozen=True, kw_only=True)
class DPMSolverConfig:
    """Numbers of Sana's DPM-Solver++: scheduler_config.json."""

    timestep_shift: PositiveFloat
    n_train_timesteps: PositiveInt

    def __post_init__(self) -> None:
        if not self.timestep_shift > 0 or self.n_train_timesteps < 1:
            raise ValueError(f"got {self}: expected positive numbers; correct scheduler_config.json")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a scheduler_config.json. Raises ValueError for another scheduler's."""
        # where a file of diffusers leaves these out, it means another scheduler
        required = ("prediction_type", "use_flow_sigmas") if "_class_name" in data else ()
        if missing := [key for key in required if key not in data]:
            raise ValueError(f"{SCHEDULER_LAYOUT.name} lacks {', '.join(missing)}: expected {SCHEDULER_LAYOUT.source}")
        return read_config(cls, data, SCHEDULER_LAYOUT)

    def to_json(self) -> dict[str, Any]:
        """The contents of the file that `from_json` reads."""
        return write_config(self, SCHEDULER_LAYOUT)


@dataclass(frozen=True, kw_only=True)
class MetaQueryConfig:
    """part_ids: key of config.json -> the folder below the checkpoint, or the hub id, of a part with a config of its
    own."""

    mllm: Any  # a config of one of `MLLMS`
    connector: ConnectorConfig
    denoiser: SanaConfig
    vae: DCAEConfig
    scheduler: DPMSolverConfig
    part_ids: Mapping[str, str]
    n_queries: PositiveInt
    max_text_tokens: PositiveInt
    system_prompt: str
    latent_size: PositiveInt  # latents a side of an image of the default size
    # of input images, in place of the limits in the MLLM's own config
    min_pixels: PositiveInt = 256 * 28 * 28
    max_pixels: PositiveInt = 1280 * 28 * 28
    # those of the released demo
    steps: PositiveInt = 30
    guidance: float = 4.5
    image_guidance: float = 1.5

    # key of config.json -> the path of the part's config below its folder
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
                f"got {self.n_queries} queries, max_text_tokens {self.max_text_tokens}, latent_size "
                f"{self.latent_size}, steps {self.steps}: expected positive numbers"
            )
        widths = self.connector.dim, self.connector.condition_dim
        expected = self.mllm.decoder.dim, self.denoiser.caption_dim
        if widths != expected:
            raise ValueError(f"got a connector of widths {widths}: expected {expected}, the MLLM's and the denoiser's")
        channels = self.denoiser.in_channels, self.denoiser.out_channels
        if channels != (self.vae.latent_channels,) * 2 or self.latent_size % self.denoiser.patch_size:
            raise ValueError(
                f"got a denoiser of {channels} channels and patches of {self.denoiser.patch_size} for latents of "
                f"{self.vae.latent_channels} channels and {self.latent_size} a side: expected as many channels, and a "
                "multiple of the patch"
            )

    @property
    def embedding_rows(self) -> int:
        """Rows of the released embedding table: the MLLM's, the boundary tokens' and the queries'."""
        return self.mllm.decoder.vocab_size + N_BOUNDARY_TOKENS + self.n_queries

    @property
    def image_size(self) -> tuple[int, int]:
        """The default (height, width) in pixels of a generated image."""
        return self.latent_size * self.vae.stride, self.latent_size * self.vae.stride

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json and the configs of the parts that it names, from folders below this one or from the hub."""
        data = read_required_json(folder / "config.json")
        if data.get("model_type") != "metaquery":
            raise ValueError(f"{folder}/config.json describes no MetaQuery: got model_type {data.get('model_type')!r}")
        if missing := [key for key in ("mllm_id", "diffusion_model_id") if data.get(key) is None]:
            raise ValueError(f"{folder}/config.json lacks {', '.join(missing)}: expected {LAYOUT.source}")
        denoiser_id = read_value(data, "diffusion_model_id", str, layout=LAYOUT)
        part_ids = {key: read_value(data, key, str, denoiser_id, layout=LAYOUT) for key in cls.PART_CONFIGS}
        for name in part_ids.values():
            _relative_path(name)  # refuses one that is no folder of its own, whether it is read or not
        if data.get("loss_type", "flow") != "flow" or "stable-diffusion" in part_ids["diffusion_model_id"]:
            raise ValueError(
                f"got loss_type {data.get('loss_type')!r} with {part_ids['diffusion_model_id']!r}: the variants on "
                "Stable Diffusion 1.5 are not built; expected 'flow', with a Sana"
            )
        # the noise scheduler is the original's for training: nothing here reads it
        read = {key: path for key, path in cls.PART_CONFIGS.items() if key != "noise_scheduler_id"}
        folders = {key: part_folder(folder, part_ids[key]) for key in read}
        parts = {key: read_required_json(folders[key] / path) for key, path in read.items()}
        mllm_class = mllm_spec_for(parts["mllm_id"]).model_class
        return cls.from_json(
            data,
            mllm_class.config_class.from_folder(folders["mllm_id"]),
            parts["diffusion_model_id"],
            parts["vae_id"],
            parts["scheduler_id"],
            part_ids=part_ids,
        )

    @classmethod
    def from_json(
        cls,
        data: Mapping[str, Any],
        mllm: Any,
        denoiser: Mapping[str, Any],
        vae: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        *,
        part_ids: Mapping[str, str],
    ) -> Self:
        """Read the contents of config.json and of the parts' configs; the MLLM's is read already."""
        denoiser_config = SanaConfig.from_json(denoiser)
        connector = ConnectorConfig(
            dim=mllm.decoder.dim,
            condition_dim=denoiser_config.caption_dim,
            n_blocks=read_value(data, "connector_num_hidden_layers", Annotated[int, range(10_001)], 24, layout=LAYOUT),
        )
        given = {
            "mllm": mllm,
            "connector": connector,
            "denoiser": denoiser_config,
            "vae": DCAEConfig.from_json(vae),
            "scheduler": DPMSolverConfig.from_json(scheduler),
            "part_ids": dict(part_ids),
        }
        return read_config(cls, data, LAYOUT, given=given)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """The contents of every file that `from_folder` reads, by its path below the folder."""
        part_ids = {key: _relative_path(name) for key, name in self.part_ids.items()}
        embedding = mllm_spec_of(self.mllm).embedding_key(self.mllm).removesuffix(".weight")
        top = write_config(self, LAYOUT) | part_ids
        top |= {"modules_to_freeze": ["vae", RELEASED_PREFIX[:-1]], "modules_to_unfreeze": [embedding]}
        files = {"config.json": top}
        files |= {f"{part_ids['mllm_id']}/{path}": data for path, data in self.mllm.to_json().items()}
        parts: dict[str, Any] = {
            "diffusion_model_id": self.denoiser,
            "vae_id": self.vae,
            "scheduler_id": self.scheduler,
        }
        return files | {f"{part_ids[key]}/{self.PART_CONFIGS[key]}": part.to_json() for key, part in parts.items()}


def part_folder(folder: Path, name: str, *, weights: bool = False) -> Path:
    """The folder of a part of a checkpoint: below the checkpoint's own, or else that of a path or hub id."""
    below = folder / _relative_path(name)
    return below if below.is_dir() else hub.resolve(name, weights=weights)


def _relative_path(name: str) -> str:
    """A part's name as a path below a checkpoint's folder; of a path that leads out of it, the last component.

    Raises ValueError where that is no folder of its own: what is written there would lie beside or above the
    checkpoint's files.
    """
    path = PurePosixPath(name)
    below = path.name if path.is_absolute() or ".." in path.parts else str(path)
    if below in ("", ".", ".."):
        raise ValueError(
            f"got a part named {name!r} in config.json: expected a folder below the checkpoint's, or a hub id; put the "
            "part's files into a folder of its own and name that"
        )
    return below


def read_required_json(path: Path) -> dict[str, Any]:
    """The contents of a config file. Raises ValueError where it does not exist, or is no JSON."""
    if not is_there(path):
        raise ValueError(f"no {path}: expected a MetaQuery's config.json, and the configs of the parts that it names")
    return read_json(path)
