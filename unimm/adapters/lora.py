"""The adapters of a model: PEFT's layers around its linears, several adapters by name, of which some are active."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unimm.adapters.config import ADAPTABLE, AdapterConfig, require_peft
from unimm.adapters.updates import LowRankUpdate, Updates
from unimm.checkpoint.save import own_name, parameter_value
from unimm.nn.packed_linear import PackedLinear
from unimm.nn.quantized_linear import QuantizedLinear


class LoRAAdapters:
    """The adapters of a model, which is changed in place; the model itself is frozen while there are any."""

    def __init__(self, model: nn.Module) -> None:
        require_peft()
        self.model = model
        # what was trained before, and is again once the adapters are gone
        self.trained = [own_name(name) for name, p in model.named_parameters() if p.requires_grad]
        # peft's LoraModel around the model, made with the first adapter
        self.tuner: Any = None

    # ---- which there are

    @property
    def names(self) -> list[str]:
        """All adapters."""
        return [] if self.tuner is None else list(self.tuner.peft_config)

    @property
    def active(self) -> list[str]:
        """The adapters whose updates are added."""
        return [] if self.tuner is None else list(self.tuner.active_adapters)

    def layers(self, name: str) -> dict[str, Any]:
        """PEFT's layers that hold an adapter, by the names of the linears. Raises ValueError for one that there is not."""
        if name not in self.names:
            raise ValueError(
                f"got the adapter {name!r}: expected one of {', '.join(self.names) or 'none, since none is'}"
            )
        return {linear: layer for linear, layer in self._layers().items() if name in layer.lora_A}

    def _layers(self) -> dict[str, Any]:
        from peft.tuners.lora import LoraLayer

        return {own_name(name): layer for name, layer in self.model.named_modules() if isinstance(layer, LoraLayer)}

    # ---- adding

    def add(self, name: str, config: AdapterConfig, linears: Sequence[str]) -> None:
        """Begin an adapter of these linears, which changes nothing yet, and make it the only active and trained one."""
        self._check_new(name)
        self._check_trainable(linears)
        self._inject(name, self._peft_config(linears, config.rank, config.alpha, config.dropout, dora=config.dora))
        self.activate([name], trainable=True)

    def load(self, name: str, updates: Updates, *, dropout: float = 0.0, trainable: bool = False) -> None:
        """Add an adapter of these updates, by the names of linears, and make it the only active one."""
        self._check_new(name)
        if trainable:
            self._check_trainable(updates)
        dora = any(update.magnitude is not None for update in updates.values())
        if dora:
            self._check_has_weights(updates)
        rank = Counter(update.rank for update in updates.values()).most_common(1)[0][0]
        config = self._peft_config(list(updates), rank, rank, dropout, dora=dora)
        patterns = {linear: f"^{re.escape(self._module_names()[linear])}" for linear in updates}
        config.rank_pattern = {patterns[linear]: update.rank for linear, update in updates.items()}
        config.alpha_pattern = {patterns[linear]: update.rank * update.scale for linear, update in updates.items()}
        self._inject(name, config)
        layers = self.layers(name)
        with torch.no_grad():
            for linear, update in updates.items():
                parts = adapter_tensors(layers[linear], name)
                for part, values in (("a", update.a), ("b", update.b), ("magnitude", update.magnitude)):
                    if values is not None:
                        parts[part].copy_(values)
        self.activate([name], trainable=trainable)

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"got {name!r:.80} for an adapter's name: expected a word without dots")
        if name in self.names:
            raise ValueError(f"there is an adapter {name!r} already: unload it first, or give another name")

    def _check_trainable(self, linears: Iterable[str]) -> None:
        self._check_has_weights(linears, "an adapter that is trained")

    def _check_has_weights(self, linears: Iterable[str], what: str = "a DoRA") -> None:
        found = dict(self.model.named_modules())
        names = self._module_names()
        for name in linears:
            if isinstance(linear := _base(found[names[name]]), QuantizedLinear):
                raise ValueError(
                    f"{name} is in {linear.format.NAME}, which {what} cannot be of: take the model that this one was made "
                    "from"
                )

    def _module_names(self) -> dict[str, str]:
        """The names of modules by those that they have where no part is compiled."""
        return {own_name(name): name for name, _ in self.model.named_modules()}

    def _peft_config(self, linears: Sequence[str], rank: int, alpha: float, dropout: float, *, dora: bool) -> Any:
        from peft import LoraConfig
        from peft.tuners.lora import Linear

        names = self._module_names()
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # it is only divided by the rank
            target_modules=[names[linear] for linear in linears],
            lora_dropout=dropout,
            use_dora=dora,
        )
        config._register_custom_module({PackedLinear: Linear, QuantizedLinear: Linear})
        return config

    def _inject(self, name: str, config: Any) -> None:
        from peft import LoraModel

        with warnings.catch_warnings():
            # packed and rounded linears, which are registered above
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            if self.tuner is None:
                self.tuner = LoraModel(self.model, config, adapter_name=name)
            else:
                self.tuner.peft_config[name] = config
                self.tuner.inject_adapter(self.model, name)
        self._keep_modes()
        for tensor in self._tensors(name):
            # whatever the linears are in: steps of training are smaller than what half precision can add
            tensor.data = tensor.data.float()

    def _keep_modes(self) -> None:
        """Put PEFT's layers into the mode of their linears: new ones are in training mode, with dropout."""
        for layer in self._layers().values():
            layer.train(layer.get_base_layer().training)
            if keep_autocast_dtype not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(keep_autocast_dtype)

    # ---- switching

    def activate(self, names: Sequence[str], *, trainable: bool = False) -> None:
        """Add the updates of these adapters, and of no other; none for the model as it was. trainable: train them."""
        for name in names:
            self.layers(name)
        if self.tuner is not None:
            self.tuner.set_adapter(list(names), inference_mode=not trainable)

    def combine(self, weights: Mapping[str, float], name: str) -> None:
        """Add an adapter whose update is the weighted sum of others', exactly, and make it the only active one.

        Its rank is the sum of theirs. Raises ValueError for DoRAs, whose updates cannot be summed.
        """
        self._check_new(name)
        for other in weights:
            if any(other in layer.lora_magnitude_vector for layer in self.layers(other).values()):
                raise ValueError(f"the adapter {other!r} is a DoRA, which no sum of updates is: merge it first")
        if not weights:
            raise ValueError("got no adapters to combine: expected the weights of one or more, by their names")
        self.tuner.add_weighted_adapter(list(weights), list(weights.values()), name, combination_type="cat")
        self._keep_modes()
        self.activate([name])

    # ---- ending

    def merge(self) -> None:
        """Add the active adapters' updates to the weights, for good, and remove all adapters.

        Raises ValueError, and changes nothing, for weights that are packed or in few bits, and for an adapter that holds
        infinities or NaN.
        """
        layers = self._layers()
        if packed := [name for name, layer in layers.items() if not isinstance(layer.get_base_layer(), nn.Linear)]:
            raise ValueError(
                f"{packed[0]} is packed or in few bits: merge the adapter into the model that this one was made from, then "
                "optimize that for the CPU"
            )
        if broken := [
            name for one in self.active for name, layer in self.layers(one).items() if _is_broken(layer, one)
        ]:
            raise ValueError(f"the adapter of {broken[0]} holds infinities or NaN: train it again")
        if self.active:
            for layer in layers.values():
                layer.merge(adapter_names=self.active)
        self.unload()

    def remove(self, name: str) -> None:
        """Remove an adapter; with the last one all of PEFT's layers go, as in `unload`."""
        self.layers(name)
        if self.names == [name]:
            self.unload()
            return
        others = [other for other in self.active if other != name]
        trainable = any(tensor.requires_grad for one in others for tensor in self._tensors(one))
        self.activate(others, trainable=trainable)
        self.tuner.delete_adapter(name)

    def _tensors(self, name: str) -> list[Tensor]:
        return [tensor for layer in self.layers(name).values() for tensor in adapter_tensors(layer, name).values()]

    def unload(self) -> None:
        """Remove all adapters: the model is as it was, and what was trained before may be trained again."""
        if self.tuner is None:
            return
        names = self._module_names()
        for name, layer in self._layers().items():
            self.model.set_submodule(names[name], layer.get_base_layer())
        del self.model.peft_config
        self.tuner = None
        for name, p in self.model.named_parameters():
            p.requires_grad_(own_name(name) in self.trained)

    # ---- reading

    def dropout(self, name: str) -> float:
        """The dropout of an adapter's inputs in training."""
        self.layers(name)
        return self.tuner.peft_config[name].lora_dropout

    def updates(self, name: str) -> dict[str, LowRankUpdate]:
        """The updates of an adapter by the names of linears."""
        found: dict[str, LowRankUpdate] = {}
        for linear, layer in self.layers(name).items():
            parts = {part: parameter_value(tensor) for part, tensor in adapter_tensors(layer, name).items()}
            found[linear] = LowRankUpdate(parts["a"], parts["b"], layer.scaling[name], parts.get("magnitude"))
        return found


def adapter_tensors(layer: Any, name: str) -> dict[str, Tensor]:
    """The parameters of an adapter in one of PEFT's layers, by the names that they have in a `LowRankUpdate`."""
    tensors = {"a": layer.lora_A[name].weight, "b": layer.lora_B[name].weight}
    if name in layer.lora_magnitude_vector:
        tensors["magnitude"] = layer.lora_magnitude_vector[name].weight
    return tensors


def keep_autocast_dtype(layer: Any, args: tuple[Tensor, ...]) -> None:
    """Leave a layer's input as it is under autocast, which casts it for every product.

    PEFT casts it to the adapter's float32 first, and every linear then keeps a copy of it for its backward: 4.7 of the
    43.7 GiB that BAGEL-7B keeps for 8,400 tokens where both experts are adapted (counted by unimm.training.memory).
    """
    layer.cast_input_dtype_enabled = not torch.is_autocast_enabled(args[0].device.type)


def linear_shapes(linears: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of linears, by the names that they have where no part is compiled."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, linear in linears.items():
        assert isinstance(linear, ADAPTABLE)
        shapes[own_name(name)] = (linear.out_features, linear.in_features)
    return shapes


def _base(module: nn.Module) -> nn.Module:
    return getattr(module, "base_layer", module)


def _is_broken(layer: Any, name: str) -> bool:
    return not all(bool(tensor.isfinite().all()) for tensor in adapter_tensors(layer, name).values())
