"""The families by name: which class loads a folder, and which releases are known.

A family's package holds its releases as data, and is imported for them; its class is imported when a model is loaded.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unimm.checkpoint import hub
from unimm.checkpoint.devices import parse_device
from unimm.checkpoint.json_files import read_json
from unimm.checkpoint.load import parse_dtype
from unimm.models.release import Components, FamilyFiles, PartRelease, Release

if TYPE_CHECKING:
    from unimm.models.base import UnifiedModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family's class, by its path, and the marks of its folders."""

    package: str  # below unimm.models; its module `model` has the class
    class_name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    # a file that no other family has, for releases whose config.json is missing or names no model
    unique_file: str | None = None
    # a key of config.json that this family lacks, and one that it has, unlike others of the same model_type
    absent_key: str | None = None
    required_key: str | None = None

    def load_class(self) -> "type[UnifiedModel]":
        """The family's class."""
        return getattr(import_module(f"unimm.models.{self.package}.model"), self.class_name)

    @property
    def releases(self) -> dict[str, Release]:
        """The family's releases by name."""
        return import_module(f"unimm.models.{self.package}").RELEASES

    @property
    def parts(self) -> tuple[PartRelease, ...]:
        """Checkpoints that the family's models take parts from."""
        return tuple(getattr(import_module(f"unimm.models.{self.package}"), "PARTS", ()))

    @property
    def files(self) -> FamilyFiles:
        """The special files of the family."""
        return import_module(f"unimm.models.{self.package}").FILES

    def matches(self, folder: Path, config: dict[str, Any]) -> bool:
        """Whether a folder with this config.json (empty if missing) is of this family."""
        if self.required_key is not None and self.required_key not in config:
            return False
        if self.absent_key is not None and self.absent_key in config:
            return False
        if model_type := config.get("model_type"):
            return model_type in self.model_types
        names = config.get("architectures")
        if isinstance(diffusers_name := config.get("_class_name"), str):
            names = [diffusers_name]
        if isinstance(names, list) and names:
            return any(name in self.architectures for name in names)
        return self.unique_file is not None and (folder / self.unique_file).exists()


FAMILIES = {
    "Bagel": Family(
        package="bagel",
        class_name="Bagel",
        model_types=("bagel",),
        architectures=("BagelForConditionalGeneration",),
        unique_file="llm_config.json",
    ),
    "Emu3": Family(
        package="emu3",
        class_name="Emu3",
        model_types=("Emu3", "emu3"),
        architectures=("Emu3ForCausalLM", "Emu3ForConditionalGeneration"),
    ),
    "Janus": Family(
        package="janus",
        class_name="Janus",
        model_types=("multi_modality", "janus"),
        architectures=("MultiModalityCausalLM", "JanusForConditionalGeneration"),
        absent_key="vision_gen_enc_config",
    ),
    "JanusFlow": Family(
        package="janusflow",
        class_name="JanusFlow",
        model_types=("multi_modality",),
        architectures=("MultiModalityCausalLM",),
        required_key="vision_gen_enc_config",
    ),
    "MetaQuery": Family(
        package="metaquery",
        class_name="MetaQuery",
        model_types=("metaquery",),
        architectures=("MetaQuery",),
    ),
    "ShowO": Family(
        package="show_o",
        class_name="ShowO",
        model_types=(),
        architectures=("Showo",),
    ),
    "UniWorld": Family(
        package="uniworld",
        class_name="UniWorld",
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
        ReleaseInfo(name=name, **vars(release))
        for family in FAMILIES.values()
        for name, release in family.releases.items()
    ]


def part_releases() -> list[PartRelease]:
    """The checkpoints that models of all families take parts from, each once."""
    every = {part.hub: part for family in FAMILIES.values() for part in family.parts}
    return list(every.values())


def files_to_fetch(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of a release, or a part of models: the names of files beside the usual ones, and the subfolders that are read."""
    for part in part_releases():
        if part.hub == name:
            return (), part.subfolders
    known = [family.files.downloads for family in FAMILIES.values() if name in family.releases]
    return (known[0] if known else tuple(one for family in FAMILIES.values() for one in family.files.downloads)), ()


def optional_files() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files, and folders, that a folder of some family may hold or not, and that make it another model."""
    every = [family.files for family in FAMILIES.values()]
    files = tuple(name for one in every for name in one.optional)
    folders = tuple(name for one in every for name in one.optional_folders)
    return files, folders


def load(
    name: str | Path,
    *,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    components: Components | None = None,
    offload: str | None = None,
    quantize: str | None = None,
) -> "UnifiedModel":
    """Load a bundled name, a folder or a hub id, with the class that its config names; options as in `from_pretrained`.

    Raises ValueError for an unknown name or a folder of no known family, and what `from_pretrained` raises.
    """
    # before anything is fetched
    dtype = parse_dtype(dtype)
    device = parse_device(device)
    folder = hub.resolve(name, revision=revision, known_names=tuple(row.name for row in releases()))
    # by its name, which says more than the folder: where the family's other parts are
    model_class = family_class(folder)
    return model_class.from_pretrained(
        name,
        dtype=dtype,
        device=device,
        revision=revision,
        components=components,
        offload=offload,
        quantize=quantize,
    )


def detect_family(folder: Path) -> str | None:
    """The name of the family that a folder is of, by its config; None where no family knows it."""
    config = read_json(folder / "config.json")
    return next((name for name, family in FAMILIES.items() if family.matches(folder, config)), None)


def family_class(folder: Path) -> "type[UnifiedModel]":
    """The class for a folder, by its config. Raises ValueError where no family knows it."""
    if name := detect_family(folder):
        return FAMILIES[name].load_class()
    config = read_json(folder / "config.json")
    found = ", ".join(
        f"{key} {config[key]!r}" for key in ("model_type", "architectures", "_class_name") if key in config
    )
    known = ", ".join(
        f"{name} (model_type {' or '.join(map(repr, one.model_types))})" for name, one in FAMILIES.items()
    )
    raise ValueError(
        f"cannot tell the family of {folder}: got {found or 'no config that says'}, expected one of {known}"
    )
