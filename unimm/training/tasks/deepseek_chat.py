"""What training Janus and training JanusFlow on the little world share: conversations by step, and what they begin from.

Samples are packed, all kinds in every batch (arXiv 2410.13848, sections 3.3 and 3.4; facts/janus.md section 7).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from unimm.data.batching import dealt
from unimm.data.shapes import Example, example
from unimm.data.shapes.novel_attributes import unnamed
from unimm.encoders.timm_vit import Tower
from unimm.models.common.deepseek_processor import PLACEHOLDER, ROLES, Markers, Prompts
from unimm.sequence.packing import Pack, pack
from unimm.sequence.parts import Item, text_item
from unimm.training.tasks.bagel import ROUND_ROWS

# a loss for each kind of sample
DRAWINGS = ("draw", "edit", "reason")
TEXTS = ("caption", "answer", "fact")
# a reasoning task's question and the thoughts about it, as a text without a picture: more text than the facts have
THOUGHTS = {f"fact.{kind}{level}": f"reason.{kind}{level}" for kind in ("math", "map") for level in (1, 2, 3)}
SYMBOLS = (*Markers.STRINGS.values(), PLACEHOLDER, *ROLES)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What the `options` of both recipes may say."""

    # samples of each task in a batch, or their weights (training/tasks.py)
    tasks: Mapping[str, int]
    # the part of drawings whose prompt is dropped, so that guidance has something to compare with
    dropout: float
    # the part of things in drawings and edits whose colour, or whose shape, has no name
    nameless_colours: float
    nameless_shapes: float
    # pieces of the text model
    vocabulary: int
    # the folder of a trained ViT, which the tower begins from
    vit: str
    # parts that are not trained, by the beginning of their parameters' names; what makes latents or codes never is
    frozen: tuple[str, ...]
    # whether torch.compile fuses what a token meets before and after attention
    compiled: bool


@dataclass(frozen=True, kw_only=True)
class Conversations(ABC):
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: Common
    prompts: Prompts
    size: int
    seed: int

    @abstractmethod
    def batch(self, examples: Sequence[Example], dice: random.Random) -> Any:
        """Examples as one pack; the dice drop conditions."""

    def __call__(self, step: int) -> Any:
        dice = random.Random(f"{self.seed}/{step}")
        tasks = dealt(self.options.tasks, self.size, dice)
        examples = [taken(task, step * self.size + i, seed=self.seed) for i, task in enumerate(tasks)]
        return self.batch([self.unnamed(one, dice) for one in examples], dice)

    def unnamed(self, one: Example, dice: random.Random) -> Example:
        """The example, if it draws or edits with some things that have no name; facts stay as they are."""
        return unnamed(one, dice, colours=self.options.nameless_colours, shapes=self.options.nameless_shapes)

    def asked(self, one: Example) -> list[Item]:
        """A question with its labelled answer, or a prompt to draw from, with a picture where it edits one."""
        shown = [Image.fromarray(image) for image in one.images]
        if one.answer is not None:
            return self.prompts.answered([{"role": "user", "content": one.prompt, "images": shown}], one.answer)
        assert one.target is not None, f"{one.task} has neither an answer nor a picture"
        return self.prompts.drawing(one.prompt, shown)

    def packed(self, samples: Sequence[Sequence[Item]]) -> Pack:
        """One pack, rounded up with a sample without loss: new shapes cost a CPU more than these rows."""
        rows = sum(item.segment.length for items in samples for item in items)
        filler = [[text_item([self.prompts.markers.pad] * (-rows % ROUND_ROWS))]] if rows % ROUND_ROWS else []
        return pack([*samples, *filler])


def taken(task: str, index: int, *, seed: int) -> Example:
    """A training example of a task of the little world, or of THOUGHTS."""
    one = example(THOUGHTS.get(task, task), index, seed=seed)
    return replace(one, task=task, answer=one.think, target=None) if task in THOUGHTS else one


def labels(samples: Sequence[Sequence[Item]]) -> list[int]:
    """How many rows of each sample carry a label."""
    return [sum(int((item.labels >= 0).sum()) for item in items) for items in samples]


def drawn_tokens(samples: Sequence[Sequence[Item]]) -> list[int]:
    """How many tokens of each sample are drawn."""
    return [sum(item.n_tokens for item in items if item.kind == "draw") for items in samples]


def groups(names: Sequence[str], examples: Sequence[Example], times: Sequence[int]) -> Tensor:
    """The place of each example's group among the names (-1 for none), as often as said."""
    found = [names.index(g) if (g := one.task.split(".")[0]) in names else -1 for one in examples]
    return torch.tensor(found).repeat_interleave(torch.tensor(times))


def to_images(drawn: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 [h, w, 3] -> [P, 3, h, w] in [-1, 1]; no pixels where there is no picture."""
    if not drawn:
        return torch.zeros(0, 3, 0, 0)
    return rearrange(torch.from_numpy(np.stack(drawn)), "n h w c -> n c h w").contiguous().float() / 127.5 - 1


def by_group(names: Sequence[str], groups: Tensor, losses: Tensor) -> dict[str, Tensor]:
    """The mean loss of every group that is there."""
    return {name: losses[at].mean() for i, name in enumerate(names) if (at := groups == i).any()}


def load_tower(tower: Tower, ours: Mapping[str, Tensor]) -> None:
    """The weights of a NaViT (unimm.encoders.siglip_navit) in a tower of the same numbers: one image size, one grid.

    The ViT's table of places may be larger than the tower's grid, which then is its corner. Raises ValueError where the
    numbers differ.
    """
    side, p = round(len(ours["positions.weight"]) ** 0.5), tower.patch
    state = {name: x for name, x in tower.trunk.state_dict().items() if name.startswith("attn_pool.")}
    places = rearrange(ours["positions.weight"], "(h w) d -> h w d", h=side)[: tower.side, : tower.side]
    state["pos_embed"] = rearrange(places, "h w d -> 1 (h w) d")
    state["patch_embed.proj.weight"] = rearrange(ours["patch.weight"], "d (p q c) -> d c p q", p=p, q=p)
    state["patch_embed.proj.bias"] = ours["patch.bias"]
    for name in ("weight", "bias"):
        state[f"norm.{name}"] = ours[f"norm.{name}"]
        for i in range(len(tower.trunk.blocks)):
            block = f"blocks.{i}."
            state[f"{block}attn.qkv.{name}"] = torch.cat([ours[f"{block}{part}.{name}"] for part in "qkv"])
            renamed = {"attn.proj": "o", "norm1": "attn_norm", "norm2": "mlp_norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
            state |= {f"{block}{theirs}.{name}": ours[f"{block}{mine}.{name}"] for theirs, mine in renamed.items()}
    try:
        tower.trunk.load_state_dict({name: x.float() for name, x in state.items()})
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"the trained ViT has other numbers than the recipe's vision: {error}") from error
