"""Every config file of the stored cases and the bundled models, with what reads it, and edits of one key at any depth."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from helpers.paths import GOLDEN
from unimm.checkpoint.building import building
from unimm.checkpoint.hub import BUNDLED_FOLDER, bundled_names
from unimm.denoisers.flux import FluxTransformer
from unimm.denoisers.qwen_image import QwenImageTransformer
from unimm.denoisers.sana import SanaTransformer
from unimm.encoders.clip_text import CLIPTextEncoder
from unimm.encoders.siglip import SiglipVisionEncoder
from unimm.encoders.t5 import T5Encoder
from unimm.models.registry import family_class
from unimm.tokenizers.dc_ae import DCAE

FAMILIES = ("bagel/dev", "janus/dev", "janus/dev_hf", "janus/flow_dev", "metaquery/dev", "uniworld/dev")
PARTS = {
    "blocks/clip/dev": CLIPTextEncoder,
    "blocks/dcae": DCAE,
    "blocks/flux/dev": FluxTransformer,
    "blocks/qwenimage/dev": QwenImageTransformer,
    "blocks/sana/dev": SanaTransformer,
    "blocks/t5/dev": T5Encoder,
    "uniworld/dev/siglip": SiglipVisionEncoder,
}
CONFIGS = (
    *("config.json", "llm_config.json", "vit_config.json", "vae_config.json"),
    *("preprocessor_config.json", "generation_config.json", "scheduler_config.json"),
)
REMOVED = object()
NUMBERS = (2.5, 0.0, 0, -1, -1.5, 10**6, 10**12, 10**30, 1e300, float("nan"))
VALUES = (REMOVED, None, "zzz", "", True, False, *NUMBERS, [], [1, "x"], {}, {"a": {}})


@dataclass(frozen=True)
class ConfigFolder:
    """A folder with configs: its place, and the class of a part that reads it, None for a family's."""

    name: str
    source: Path
    part: Any = None

    def build(self, folder: Path) -> Any:
        """The module of a copy of the folder, on meta."""
        with torch.device("meta"):
            if self.part is None:
                return family_class(folder).from_folder(folder)
            with building(folder):
                return self.part.from_configs(folder, {})

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.source)) for name in CONFIGS for path in self.source.rglob(name))


def config_folders() -> list[ConfigFolder]:
    folders = [ConfigFolder(name, GOLDEN / name) for name in FAMILIES]
    folders += [ConfigFolder(name, BUNDLED_FOLDER / name) for name in bundled_names()]
    return folders + [ConfigFolder(name, GOLDEN / name, part) for name, part in PARTS.items()]


def paths(value: Any, above: tuple = ()) -> Iterator[tuple]:
    """The keys that lead to every value of an object, in lists too, those of objects and lists included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*above, key)
        yield from paths(one, (*above, key))


def edited(contents: dict, path: tuple, value: Any) -> dict:
    """A copy with another value at a path, or without it for `REMOVED`."""
    contents = copy.deepcopy(contents)
    at: Any = contents
    for key in path[:-1]:
        at = at[key]
    if value is REMOVED:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return contents


def at(contents: Any, path: tuple) -> Any:
    """The value at a path."""
    for key in path:
        contents = contents[key]
    return contents


def is_of_another_type(old: Any, new: Any) -> bool:
    """Whether a number was replaced by what is none, an object by what is none, or a text by what is none."""
    if isinstance(old, dict | str) or new is None or new is REMOVED:
        return isinstance(old, dict | str) and new not in (None, REMOVED) and not isinstance(new, type(old))
    return isinstance(old, int | float) and not isinstance(old, bool) and not isinstance(new, int | float)


def link_copy(source: Path, target: Path) -> None:
    """A copy of a folder whose configs may be replaced; the rest are links."""

    def place(here: str, there: str) -> None:
        if Path(here).name in CONFIGS:
            shutil.copyfile(here, there)
        else:
            Path(there).symlink_to(Path(here).resolve())

    shutil.copytree(source, target, copy_function=place, ignore=shutil.ignore_patterns("io.*"))


def problem(folder: Path, file: str, path: tuple, value: Any, build: Callable[[Path], Any]) -> str:
    """What is wrong with how an edited config is read: nothing where it works, or is a ValueError that names the file.

    Its error names the key, too, where the value is of another type.
    """
    target = folder / file
    whole = target.read_text()
    target.write_text(json.dumps(edited(json.loads(whole), path, value)))
    try:
        build(folder)
    except ValueError as error:
        said = str(error)
        if str(folder) not in said and target.name not in said:
            return f"no file is named: {said}"
        key = next(part for part in reversed(path) if isinstance(part, str))
        if is_of_another_type(at(json.loads(whole), path), value) and key not in said:
            return f"no key is named: {said}"
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    finally:
        target.write_text(whole)
    return ""
