"""The families by name: which class loads a folder, and what is known to be released."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from unimm.checkpoint import hub
from unimm.checkpoint.config_io import read_json
from unimm.models.base import UnifiedModel
from unimm.models.release import Release


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family's class is, and how its folders are told apart."""

    class_path: str  # module:class, imported when needed
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    unique_file: str | None = (
        None  # a file that no other family has, for releases whose config.json is missing or says nothing
    )
    absent_key: str | None = (
        None  # a key of config.json that families of the same model_type have, and this one has not
    )
    required_key: str | None = None  # likewise, one that only this one has

    def load_class(self) -> type[UnifiedModel]:
        """The family's class."""
        module, name = self.class_path.split(":")
        return getattr(import_module(module), name)

    def matches(self, folder: Path, config: dict) -> bool:
        """Whether a folder with this config.json (empty if missing) is of this family."""
        if (self.required_key is not None and self.required_key not in config) or (
            self.absent_key is not None and self.absent_key in config
        ):
            return False
        if kind := config.get("model_type"):
            return kind in self.model_types
        if names := config.get("architectures"):
            return any(name in self.architectures for name in names)
        return self.unique_file is not None and (folder / self.unique_file).exists()


FAMILIES = {
    "Bagel": Family(
        class_path="unimm.models.bagel.model:Bagel",
        model_types=("bagel",),
        architectures=("BagelForConditionalGeneration",),
        unique_file="llm_config.json",
    ),
    "Janus": Family(
        class_path="unimm.models.janus.model:Janus",
        model_types=("multi_modality", "janus"),
        architectures=("MultiModalityCausalLM", "JanusForConditionalGeneration"),
        absent_key="vision_gen_enc_config",
    ),
    "JanusFlow": Family(
        class_path="unimm.models.janusflow.model:JanusFlow",
        model_types=("multi_modality",),
        architectures=("MultiModalityCausalLM",),
        required_key="vision_gen_enc_config",
    ),
    "MetaQuery": Family(
        class_path="unimm.models.metaquery.model:MetaQuery",
        model_types=("metaquery",),
        architectures=("MetaQuery",),
    ),
    "UniWorld": Family(
        class_path="unimm.models.uniworld.model:UniWorld",
        model_types=("univa_qwen2p5vl",),
        architectures=("UnivaQwen2p5VLForConditionalGeneration",),
    ),
}


@dataclass(frozen=True, kw_only=True)
class ReleaseInfo(Release):
    """A release and its name."""

    name: str

    @property
    def source(self) -> str:
        """The hub id, or "bundled"."""
        return self.hub or "bundled"


def releases() -> list[ReleaseInfo]:
    """All releases of all families that are known by name; other checkpoints of their layouts load as well."""
    return [
        ReleaseInfo(
            name=name, family=row.family, hub=row.hub, licence=row.licence, parameters=row.parameters, verbs=row.verbs
        )
        for family in FAMILIES.values()
        for name, row in family.load_class().RELEASES.items()
    ]


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> UnifiedModel:
    """Load a bundled name, a folder or a hub id, with the class that its config asks for.

    Raises ValueError for an unknown name or a folder of no known family, and what `from_pretrained` raises.
    """
    folder = hub.resolve(name, revision=revision, known_names=tuple(row.name for row in releases()))
    # by its name, which says more than the folder: where a family's other parts lie
    return family_class(folder).from_pretrained(name, dtype=dtype, device=device, revision=revision)


def detect_family(folder: Path) -> str | None:
    """The name of the family that a folder is of, by its config; None where none knows it."""
    config = read_json(folder / "config.json")
    return next((name for name, family in FAMILIES.items() if family.matches(folder, config)), None)


def family_class(folder: Path) -> type[UnifiedModel]:
    """The class for a folder, by its config. Raises ValueError where no family knows it."""
    if name := detect_family(folder):
        return FAMILIES[name].load_class()
    config = read_json(folder / "config.json")
    found = ", ".join(f"{key} {config[key]!r}" for key in ("model_type", "architectures") if key in config)
    known = ", ".join(
        f"{name} (model_type {' or '.join(map(repr, family.model_types))})" for name, family in FAMILIES.items()
    )
    raise ValueError(
        f"cannot tell the family of {folder}: got {found or 'no config that says'}, expected one of {known}"
    )
