"""Folders of adapters in PEFT's layout: adapter_model.safetensors, by released names, and adapter_config.json.

PEFT loads them onto the original code's model, and an adapter that was trained there is read here.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unimm.adapters.updates import LowRankUpdate, Updates
from unimm.checkpoint.atomic import atomic_directory
from unimm.checkpoint.contents import CheckpointError
from unimm.checkpoint.json_files import read_json, write_json
from unimm.checkpoint.load import keep_weights_open, open_weights, read_headers
from unimm.checkpoint.save import save_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."  # of the names of PEFT's files
LIBRARY = "unimm"
# what PEFT calls the tensors, by our names of them
TENSOR_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
# keys of adapter_config.json that are read here, or that change nothing once an adapter is trained
KNOWN_KEYS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "target_modules"),
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_type", "peft_version"),
    *("inference_mode", "exclude_modules", "layers_to_transform", "layers_pattern", "ephemeral_gpu_offload"),
)
# values of `init_lora_weights` that leave the base model's weights as they are
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class BaseModelFacts:
    """What an adapter's folder says of the model that it is for: the family, how many linears may be adapted and how
    many weights these have, and the name that the model was loaded by."""

    family: str
    n_linears: int
    n_weights: int
    name: str | None = None

    def check(self, other: "BaseModelFacts", where: str) -> None:
        """Raise ValueError unless `other`, read from `where`, is of such a model."""
        if other.family != self.family:
            raise ValueError(f"{where} is an adapter of a {other.family}: got it for a {self.family}")
        if (other.n_linears, other.n_weights) != (self.n_linears, self.n_weights):
            raise ValueError(
                f"{where} is an adapter of a {self.family} of another size, {other.name or 'of no name'}: its linears "
                f"are {other.n_linears:,} of {other.n_weights:,} weights, this model's {self.n_linears:,} of "
                f"{self.n_weights:,}"
            )


@dataclass(frozen=True)
class AdapterFolder:
    """What a folder holds: updates by released names, dropout, and facts of the base model; None where another library
    wrote it."""

    updates: dict[str, LowRankUpdate]
    dropout: float
    base: BaseModelFacts | None


def write_adapter(folder: Path, updates: Updates, *, dropout: float, base: BaseModelFacts) -> None:
    """Write updates by released names; all is written before the first file replaces an older one."""
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        parts = {"a": update.a, "b": update.b, "magnitude": update.magnitude}
        tensors |= {f"{PREFIX}{name}.{TENSOR_NAMES[part]}": x for part, x in parts.items() if x is not None}
    with atomic_directory(folder) as partial:
        write_json(partial / CONFIG_FILE, peft_json(updates, dropout=dropout, base=base))
        save_safetensors(tensors, partial / WEIGHTS_FILE)


def peft_json(updates: Updates, *, dropout: float, base: BaseModelFacts) -> dict[str, Any]:
    """The contents of adapter_config.json: the commonest rank and alpha, and what differs from them by name."""
    from peft import LoraConfig

    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: _plain(update.rank * update.scale) for name, update in updates.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # it is only divided by the rank
        target_modules=sorted(updates),
        lora_dropout=dropout,
        use_dora=any(update.magnitude is not None for update in updates.values()),
        rank_pattern={f"^{re.escape(name)}": one for name, one in ranks.items() if one != rank},
        alpha_pattern={f"^{re.escape(name)}": one for name, one in alphas.items() if one != alpha},
        base_model_name_or_path=base.name,
        inference_mode=True,
    )
    contents = config.to_dict() | {
        "auto_mapping": {
            "base_model_class": base.family,
            "parent_library": LIBRARY,
            "n_linears": base.n_linears,
            "n_weights": base.n_weights,
        }
    }
    return {key: sorted(value) if isinstance(value, set) else value for key, value in contents.items()}


def _plain(number: float) -> float:
    """A whole number as an int, as PEFT writes its alpha."""
    near = round(number)
    return near if abs(number - near) < 1e-6 * max(1, abs(near)) else number  # of the division by the rank


@keep_weights_open()
def read_adapter(folder: Path) -> AdapterFolder:
    """Read an adapter. Raises ValueError for what is no LoRA, or holds more than one."""
    config = read_json(folder / CONFIG_FILE, required=True)
    _check_is_plain(config, f"{folder / CONFIG_FILE}")
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"no {WEIGHTS_FILE} in {folder}: expected the weights of an adapter, in safetensors")
    tensors: dict[str, dict[str, Tensor]] = {}
    others = [key for key in read_headers([path]) if not _TENSOR.fullmatch(key)]
    if others:
        raise ValueError(
            f"{path} holds {others[0]} ({len(others)} in all), which is no part of a LoRA: expected one alone"
        )
    with open_weights(path) as file:
        for key in file.keys():
            found = _TENSOR.fullmatch(key)
            assert found is not None, "checked above"
            tensors.setdefault(found[1], {})[found[2]] = file.get_tensor(key).float()
    updates: dict[str, LowRankUpdate] = {}
    for name, parts in tensors.items():
        if not {"lora_A", "lora_B"} <= parts.keys() or parts["lora_A"].ndim != 2 or parts["lora_B"].ndim != 2:
            raise ValueError(f"{path} holds {', '.join(parts)} of {name}: expected the matrices lora_A and lora_B")
        scale = _scale(config, name, len(parts["lora_A"]))
        updates[name] = LowRankUpdate(parts["lora_A"], parts["lora_B"], scale, parts.get("lora_magnitude_vector"))
    if not updates:
        raise ValueError(f"{path} is empty: expected the weights of an adapter")
    return AdapterFolder(updates, float(config.get("lora_dropout") or 0.0), _base_facts(config))


def _check_is_plain(config: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for another kind of adapter than a LoRA or DoRA of linears alone."""
    from peft import LoraConfig

    if config.get("peft_type") != "LORA":
        raise ValueError(f"{where} has peft_type {config.get('peft_type')!r}: expected LORA")
    defaults = LoraConfig().to_dict()
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise ValueError(
            f"{where} has init_lora_weights {config['init_lora_weights']!r}, which changed the base model: convert it to "
            "a plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        )
    known = (*KNOWN_KEYS, "init_lora_weights")
    odd = [key for key, value in config.items() if key not in known and (value or None) != (defaults.get(key) or None)]
    if odd:
        raise ValueError(f"{where} has {odd[0]} {config[odd[0]]!r:.80}: expected a LoRA of linears, or a DoRA, alone")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{where} has lora_alpha {config.get('lora_alpha')!r:.80}: expected a number")


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What the update of a linear is multiplied by."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    alpha = next((one for key, one in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _base_facts(config: Mapping[str, Any]) -> BaseModelFacts | None:
    facts = config.get("auto_mapping")
    if not isinstance(facts, Mapping) or facts.get("parent_library") != LIBRARY:
        return None
    name = config.get("base_model_name_or_path")
    return BaseModelFacts(
        str(facts.get("base_model_class")), facts.get("n_linears", 0), facts.get("n_weights", 0), name
    )
