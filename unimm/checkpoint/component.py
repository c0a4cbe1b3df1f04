"""A component with files of its own, such as a text encoder, an autoencoder or a denoiser, loaded from its released
folder."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.atomic import atomic_directory
from unimm.checkpoint.building import building
from unimm.checkpoint.devices import parse_device
from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import (
    HUB_WEIGHT_FILES,
    Shapes,
    WeightFile,
    check_weights,
    keep_weights_open,
    load_weights,
    parse_dtype,
    read_shapes,
    weight_files,
)
from unimm.checkpoint.save import MAX_SHARD_SIZE, check_all_saved, released_tensors, save_weights

# where diffusers keeps a component's weights; the first that a folder holds counts
DIFFUSERS_WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
)


def write_component(
    component: "PretrainedComponent", folder: Path, names: Sequence[str], key_map: KeyMap, config: Mapping[str, Any]
) -> None:
    """Write a component's config.json, and its weights under the released names of a key map; all or nothing, and only
    what loads.

    names: of the file of weights, and of the index of its shards where it may have some. Files of another layout that would
    be read instead are deleted.
    """
    with atomic_directory(folder, weight_names=[component.WEIGHT_FILES]) as partial:
        write_json(partial / "config.json", config)
        check_all_saved(component, [key_map])
        save_weights(released_tensors(component, key_map), partial, names, max_shard_size=MAX_SHARD_SIZE)
        component.check_loads(partial)


class PretrainedComponent(nn.Module, ABC):
    """A module that is built from the configs of a folder and loaded through a key map of its weights."""

    WEIGHT_FILES: ClassVar[tuple[str, ...]] = HUB_WEIGHT_FILES

    @classmethod
    @abstractmethod
    def from_configs(cls, folder: Path, shapes: Shapes) -> Self:
        """The module without weights. shapes: of the weights, for what the configs leave out. Raises ValueError for
        others' configs."""

    @abstractmethod
    def key_map(self, shapes: Shapes) -> KeyMap:
        """The key map of weights of these names and shapes."""

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: str | torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Self:
        """Load a released folder, or a file of weights in one, strictly; in evaluation mode.

        Raises ValueError for another class's config, CheckpointError for weights that do not fit it.
        """
        dtype = parse_dtype(dtype)
        path = hub.expand_path(hub.parse_name(path, cls.__name__))
        paths: list[WeightFile] = [path] if path.is_file() else weight_files(path, cls.WEIGHT_FILES)
        with keep_weights_open():
            shapes = read_shapes(paths)
            folder = path.parent if path.is_file() else path
            with torch.device("meta"), building(folder):
                module = cls.from_configs(folder, shapes)
            load_weights(module, paths, module.key_map(shapes), dtype=dtype, device=parse_device(device))
        return module.eval()

    @classmethod
    @keep_weights_open()
    def check_loads(cls, folder: Path) -> None:
        """Raise CheckpointError where a folder that was just written would not load; reads no weights."""
        paths = weight_files(folder, cls.WEIGHT_FILES)
        shapes = read_shapes(paths)
        with torch.device("meta"), building(folder):
            module = cls.from_configs(folder, shapes)
        check_weights(module, paths, module.key_map(shapes))
