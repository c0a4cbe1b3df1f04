"""Keys of recipes: reading them from YAML, what they were called before, and which one was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import yaml

# keys of recipes of earlier versions -> what they are called now, where a class has a field of that name
RENAMED_KEYS: Mapping[str, tuple[str, ...]] = {
    # of TrainConfig
    "objective": ("task",),
    "batch": ("batch_size",),
    "warmup": ("warmup_steps",),
    "final": ("min_lr_ratio",),
    "clip": ("max_grad_norm",),
    "average": ("ema_decay",),
    "undecayed": ("no_weight_decay",),
    # of the tasks' options and of their sections of `model`
    "begun": ("append_vision_start",),
    "captions": ("text_encoders",),
    "compiled": ("compile",),
    "draw": ("vae",),
    "free": ("unquantized_steps",),
    "hidden": ("hidden_dim",),
    "judged": ("scored_scenes", "scored_examples"),
    "looked": ("vision_batch_size",),
    "look": ("vit",),
    "looks": ("vision",),
    "measured": ("measured_scenes",),
    "nameless_colours": ("novel_colours",),
    "nameless_shapes": ("novel_shapes",),
    "noise": ("latent_noise",),
    "painter": ("denoiser",),
    "plan": ("plan_system_prompt",),
    "planned": ("planned_characters",),
    "reader": ("mllm",),
    "reader_dtype": ("mllm_dtype",),
    "revived": ("revive_fraction",),
    "shift": ("timestep_shift",),
    "side": ("image_size",),
    "sighted": ("vision_steps",),
    "start": ("init_from",),
    "targets": ("timesteps_per_image",),
    "thinks": ("think_prob",),
    "vocabulary": ("vocab_size",),
    "weights": ("edit_weights",),
}


class RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader that refuses keys written twice, which YAML forbids, and of which it would take the last.

    It also takes 1e-3 for a number, which YAML 1.1 takes for a string without a point.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping. Raises ValueError for a key that is written twice; one that `<<` merges may be written again."""
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):  # which the loader says below
                continue
            if key in lines:
                raise ValueError(f"got the key {key!r} twice, in lines {lines[key]} and {line}: leave one of them out")
            lines[key] = line
        return super().construct_mapping(node, deep=deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the new name of a renamed key, else the known name that is nearest."""
    names = sorted(known)
    for renamed in RENAMED_KEYS.get(name, ()):
        if renamed in names:
            return f": it is called {renamed!r} now"
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {close[0]!r}?" if close else f": known are {', '.join(names)}"
