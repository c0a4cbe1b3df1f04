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
from unimm.models.metaquery.mllms import READER, kind_in, kind_of
from unimm.models.metaquery.processor import MARKERS
from unimm.tokenizers.dc_ae import DCAEConfig

SYSTEM = (
    "You will be given an image or its caption. Please describe the content of the image in detail in your own words."
)


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Numbers of Sana's sampler: scheduler_config.json."""

    shift: float
    trained: int

    FILES: ClassVar = {"shift": "flow_shift", "trained": "num_train_timesteps"}
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
    SPOKEN: ClassVar = ("prediction_type", "use_flow_sigmas")

    def __post_init__(self) -> None:
        if not self.shift > 0 or self.trained < 1:
            raise ValueError(f"got {self}: expected positive numbers; correct scheduler_config.json")

    @classmethod
    def from_files(cls, files: Mapping[str, Any]) -> Self:
        """Read a scheduler_config.json. Raises ValueError for another sampler's."""
        for key, expected in cls.FIXED.items():
            if files.get(key, expected) != expected:
                raise ValueError(
                    f"got {key} {files[key]!r} in the scheduler's config, expected {expected!r}, as Sana's says"
                )
        wanted = (*cls.FILES.values(), *(cls.SPOKEN if "_class_name" in files else ()))
        if lost := [name for name in wanted if name not in files]:
            raise ValueError(f"the scheduler's config lacks {', '.join(lost)}: expected Sana's scheduler_config.json")
        return cls(**{ours: files[theirs] for ours, theirs in cls.FILES.items()})

    def to_files(self) -> dict[str, Any]:
        """The mapping that `from_files` reads."""
        return self.FIXED | {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}


@dataclass(frozen=True, kw_only=True)
class MetaQueryConfig:
    """homes: the folders below a checkpoint, or hub ids, of the parts whose configs lie apart, by their ids in config.json."""

    reader: Any  # of one of the readers in query_readers
    connector: ConnectorConfig
    painter: SanaConfig
    vae: DCAEConfig
    solver: Solver
    homes: Mapping[str, str]
    n_queries: int
    max_text: int  # ids of a caption
    system: str
    side: int  # latents a side of what is drawn unless a size is asked for
    # of pictures to draw from, in place of what the reader's own config says
    min_pixels: int = 256 * 28 * 28
    max_pixels: int = 1280 * 28 * 28
    # the released demo's; its evaluation takes 7.5 for texts
    steps: int = 30
    guidance: float = 4.5
    image_guidance: float = 1.5

    FILES: ClassVar = {
        "n_queries": "num_metaqueries",
        "max_text": "max_input_text_tokens",
        "system": "system_prompt",
        "side": "input_size",
    }
    # of our own making: no released config has the section
    OURS: ClassVar = ("min_pixels", "max_pixels", "steps", "guidance", "image_guidance")
    # id in config.json -> where its config lies below that id's folder
    HOMES: ClassVar = {
        "mllm_id": "config.json",
        "diffusion_model_id": "transformer/config.json",
        "vae_id": "vae/config.json",
        "scheduler_id": "scheduler/scheduler_config.json",
        "noise_scheduler_id": "scheduler/scheduler_config.json",
    }

    def __post_init__(self) -> None:
        if min(self.n_queries, self.max_text, self.side, self.steps) < 1:
            raise ValueError(
                f"got {self.n_queries} queries, max_text {self.max_text}, side {self.side}, steps {self.steps}"
            )
        widths = (self.connector.dim, self.connector.out), (self.reader.decoder.dim, self.painter.caption_dim)
        if widths[0] != widths[1]:
            raise ValueError(
                f"got a connector of widths {widths[0]}: expected {widths[1]}, the reader's and the painter's"
            )
        channels = self.painter.in_channels, self.painter.out_channels
        if channels != (self.vae.latent_channels,) * 2 or self.side % self.painter.patch:
            raise ValueError(
                f"got a painter of {channels} channels and patches of {self.painter.patch} for {self.vae.latent_channels} "
                f"latents on a grid of {self.side}: expected as many channels, and a multiple of the patch"
            )

    @property
    def n_rows(self) -> int:
        """Rows of the table of embeddings as it is released."""
        return self.reader.decoder.vocab + MARKERS + self.n_queries

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of what is drawn unless another size is asked for."""
        return self.side * self.vae.stride, self.side * self.vae.stride

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read config.json, and what it refers to: from folders below this one, or from the hub, configs alone."""
        files = read_config(folder / "config.json")
        if files.get("model_type") != "metaquery":
            raise ValueError(f"{folder}/config.json describes no MetaQuery: got model_type {files.get('model_type')!r}")
        homes = {name: str(files.get(name, files.get("diffusion_model_id"))) for name in cls.HOMES}
        if files.get("loss_type", "flow") != "flow" or "stable-diffusion" in homes["diffusion_model_id"]:
            raise ValueError(
                f"got loss_type {files.get('loss_type')!r} with {homes['diffusion_model_id']!r}: the variants on Stable "
                "Diffusion 1.5 are not built; expected 'flow', with a Sana"
            )
        if lost := [theirs for theirs in (*cls.FILES.values(), "mllm_id", "diffusion_model_id") if theirs not in files]:
            raise ValueError(
                f"{folder}/config.json lacks {', '.join(lost)}: expected the released config.json of a MetaQuery"
            )
        reader = home(folder, homes["mllm_id"])
        known = kind_in(read_config(reader / "config.json")).home.Config
        parts = [read_config(home(folder, homes[name]) / at) for name, at in list(cls.HOMES.items())[1:4]]
        return cls.from_files(files, known.from_folder(reader), *parts, homes=homes)

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, Any],
        reader: Any,
        painter: Mapping[str, Any],
        vae: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        *,
        homes: Mapping[str, str],
    ) -> Self:
        """From the contents of the released files."""
        painted = SanaConfig.from_files(painter)
        layers = files.get("connector_num_hidden_layers", 24)
        config = cls(
            reader=reader,
            connector=ConnectorConfig(dim=reader.decoder.dim, out=painted.caption_dim, n_layers=layers),
            painter=painted,
            vae=DCAEConfig.from_files(vae),
            solver=Solver.from_files(scheduler),
            homes=dict(homes),
            **{ours: files[theirs] for ours, theirs in cls.FILES.items()},
            **{name: value for name, value in files.get("generation", {}).items() if name in cls.OURS},
        )
        expected = {"in_channels": config.vae.latent_channels, "vae_downsample_f": config.vae.stride}
        if wrong := [f"{key} {files[key]}" for key, n in expected.items() if files.get(key, n) != n]:
            raise ValueError(f"got {', '.join(wrong)} in config.json: expected {expected}, as the autoencoder says")
        return config

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of every file that `from_folder` reads, by its path below the folder."""
        homes = {name: _below(at) for name, at in self.homes.items()}
        top: dict[str, Any] = {"architectures": ["MetaQuery"], "model_type": "metaquery", **homes}
        top |= {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}
        top |= {"in_channels": self.vae.latent_channels, "vae_downsample_f": self.vae.stride, "loss_type": "flow"}
        top |= {"connector_num_hidden_layers": self.connector.n_layers, "modules_to_freeze": ["vae", READER[:-1]]}
        top |= {"modules_to_unfreeze": [kind_of(self.reader).table(self.reader).removesuffix(".weight")]}
        top |= {"generation": {name: getattr(self, name) for name in self.OURS}}
        parts = {f"{homes['mllm_id']}/{name}": contents for name, contents in self.reader.to_files().items()}
        apart: dict[str, Any] = {"diffusion_model_id": self.painter, "vae_id": self.vae, "scheduler_id": self.solver}
        parts |= {f"{homes[name]}/{self.HOMES[name]}": part.to_files() for name, part in apart.items()}
        return {"config.json": top, **parts}


def home(folder: Path, name: str, *, weights: bool = False) -> Path:
    """The folder of a part of a checkpoint: below its own, or else of that name or hub id."""
    below = folder / _below(name)
    return below if below.is_dir() else hub.resolve(name, weights=weights)


def _below(name: str) -> str:
    """A part's name as a path below a checkpoint's folder; of a path that leads out of it, the last step."""
    path = PurePosixPath(name)
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


def read_config(path: Path) -> dict:
    """A config file's contents. Raises ValueError where it is not there, or is no JSON."""
    if not path.exists():
        raise ValueError(f"no {path}: expected a MetaQuery's config.json, and the configs of the parts that it names")
    return read_json(path)
