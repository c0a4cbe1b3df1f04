"""The verbs for adapters that every family has: add one to train, load, save, switch, combine, merge, unload."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from torch import nn

from unimm.adapters.config import AdapterConfig, LinearGroups, adaptable_linears, require_peft, select_linears
from unimm.adapters.files import BaseModelFacts, read_adapter, write_adapter
from unimm.adapters.lora import LoRAAdapters, linear_shapes
from unimm.adapters.updates import from_released, to_released
from unimm.checkpoint import hub
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.save import own_name


class AdaptedModel(nn.Module, ABC):
    """A model whose linears may have adapters (LoRA and DoRA, through PEFT), by names, of which some are active."""

    # groups of linears that an adapter may have, as patterns of our names
    LORA_TARGETS: ClassVar[LinearGroups] = {}

    # the name, or the folder, that the model was loaded by
    loaded_from: str | None = None
    adapters: LoRAAdapters | None = None

    @abstractmethod
    def original_key_maps(self) -> list[KeyMap]:
        """The key maps of the original layout, whatever layout the model came in: adapters have its names."""

    def add_adapter(self, config: AdapterConfig, *, name: str = "default") -> None:
        """Begin an adapter that changes nothing yet. From now on it alone is active, and it alone is trained.

        Raises ValueError for groups of linears that the family or the model does not have.
        """
        adapters = self._adapters()
        linears = [own_name(one) for one in select_linears(self, self.LORA_TARGETS, config.targets)]
        adapters.add(name, config, linears)
        self.adapters = adapters

    def load_adapter(self, folder: str | Path, *, name: str = "default", trainable: bool = False) -> None:
        """Load an adapter from a folder or a hub id, in PEFT's layout by released names, and make it the only active one.

        trainable: whether its training goes on; else nothing of the model requires a gradient. Raises ValueError for an
        adapter of another family or size, and for what is no LoRA.
        """
        adapters = self._adapters()
        path = hub.resolve(hub.parse_name(folder, "an adapter"))
        found = read_adapter(path)
        if found.base is not None:
            self._base_facts().check(found.base, str(path))
        shapes = linear_shapes(adaptable_linears(self, self.LORA_TARGETS))
        updates = from_released(found.updates, shapes, self.original_key_maps(), str(path))
        adapters.load(name, updates, dropout=found.dropout, trainable=trainable)
        self.adapters = adapters

    def save_adapter(self, folder: str | Path, *, name: str = "default") -> None:
        """Write an adapter alone, in PEFT's layout by released names: adapter_model.safetensors, adapter_config.json."""
        adapters = self._adapters()
        dropout = adapters.dropout(name)
        updates = to_released(adapters.updates(name), self.original_key_maps())
        write_adapter(hub.parse_folder(folder), updates, dropout=dropout, base=self._base_facts())

    def set_adapter(self, names: str | Sequence[str], *, trainable: bool = False) -> None:
        """Make one adapter active, or several, whose updates are summed; with [] the model is as it is without any.

        trainable: whether they are trained from now on.
        """
        self._adapters().activate([names] if isinstance(names, str) else names, trainable=trainable)

    def combine_adapters(self, weights: Mapping[str, float], *, name: str) -> None:
        """Add an adapter whose update is the weighted sum of others', and make it the only active one."""
        self._adapters().combine(weights, name)

    def merge_adapter(self) -> None:
        """Add the active adapters' updates to the weights, for good, and remove all adapters: what is left is a model as
        it is released.

        A copy of `optimize_for_cpu` that was made before keeps packed weights of the old ones: make it again.
        """
        if self.adapters is not None:
            self.adapters.merge()

    def unload_adapter(self, *, name: str | None = None) -> None:
        """Remove an adapter, or all: with the last one the model is as it was before the first."""
        if name is not None:
            self._adapters().remove(name)
        elif self.adapters is not None:
            self.adapters.unload()

    def _adapters(self) -> LoRAAdapters:
        require_peft()
        return LoRAAdapters(self) if self.adapters is None or not self.adapters.names else self.adapters

    def _base_facts(self) -> BaseModelFacts:
        shapes = linear_shapes(adaptable_linears(self, self.LORA_TARGETS)).values()
        n_weights = sum(n_outputs * n_inputs for n_outputs, n_inputs in shapes)
        return BaseModelFacts(type(self).__name__, len(shapes), n_weights, self.loaded_from)
