"""Dialogues of texts and pictures in the three contexts of guidance, and the canvas on which a picture is denoised.

For models that draw inside the language model, over its cache. Axes: N packed tokens, L latent tokens of a picture,
D model, C features of a latent token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from unimm.generation.causal_lm import Speaker
from unimm.generation.decode import speak
from unimm.generation.guidance import Branch
from unimm.generation.kv_cache import EMPTY, Context, cache_of
from unimm.generation.prefill import extend
from unimm.generation.text_sampling import TextSampling
from unimm.models.bagel.processor import Items
from unimm.nn.decoder import Parts
from unimm.sequence.parts import Item
from unimm.sequence.segments import Layout, Segment, lay_out

CONTEXTS = ("main", "text", "image")


class Painter(Speaker, Protocol):
    """A speaker that draws inside its language model."""

    @property
    def items(self) -> Items: ...

    def latent_tokens(self, x: Tensor, times: Tensor, where: Tensor) -> Tensor:
        """Latent tokens [n, C] at times [n] or [1] and places [n] -> [n, D]."""


@dataclass(frozen=True, eq=False)
class Dialogue:
    """What was said so far, thrice: all of it, without the last text, without the pictures. Equal ones are one object."""

    main: Context = EMPTY
    text: Context = EMPTY
    image: Context = EMPTY
    size: tuple[int, int] | None = None  # (height, width) of the last picture


def say(
    model: Speaker, dialogues: Sequence[Dialogue], texts: Sequence[Item], *, system: bool = False
) -> list[Dialogue]:
    """Append a text to each dialogue; the context without the last text is then the one before it.

    A `system` prompt leaves that context behind: the text that comes next moves it past the prompt.
    """
    grown = _append(model, dialogues, [[text] for text in texts], ("main", "image"))
    return [
        replace(d, main=more["main"], image=more["image"], text=d.text if system else d.main)
        for d, more in zip(dialogues, grown, strict=True)
    ]


def reason(model: Speaker, dialogues: Sequence[Dialogue], texts: Sequence[Item]) -> list[Dialogue]:
    """Append the model's own reasoning, which the original keeps from both contexts of guidance."""
    grown = _append(model, dialogues, [[text] for text in texts], ("main",))
    return [replace(d, main=more["main"]) for d, more in zip(dialogues, grown, strict=True)]


def show(
    model: Speaker, dialogues: Sequence[Dialogue], pictures: Sequence[Sequence[tuple[Sequence[Item], tuple[int, int]]]]
) -> list[Dialogue]:
    """Append each dialogue's pictures, (items, (height, width)) each, but not to the context without pictures.

    The first ones of all dialogues go through one forward, then the second ones, and so on.
    """
    out = list(dialogues)
    for turn in range(max(map(len, pictures))):
        at = [i for i, some in enumerate(pictures) if len(some) > turn]
        grown = _append(model, [out[i] for i in at], [pictures[i][turn][0] for i in at], ("main",))
        for i, more in zip(at, grown, strict=True):
            out[i] = replace(out[i], main=more["main"], text=more["main"], size=pictures[i][turn][1])
    return out


def _append(
    model: Speaker, dialogues: Sequence[Dialogue], items: Sequence[Sequence[Item]], names: Sequence[str]
) -> list[dict[str, Context]]:
    """Extend the named contexts of each dialogue by its items, equal ones once."""
    jobs = {
        (i, id(context)): context for i, d in enumerate(dialogues) for context in (getattr(d, name) for name in names)
    }
    done = dict(zip(jobs, extend(model, list(jobs.values()), [items[i] for i, _ in jobs]), strict=True))
    return [{name: done[i, id(getattr(d, name))] for name in names} for i, d in enumerate(dialogues)]


def write(
    model: Painter, contexts: Sequence[Context], sampling: TextSampling, seeds: Sequence[int]
) -> Iterator[list[int | None]]:
    """Text after each context, from bos to eos: one id a context at a time, None for those that have ended."""
    markers = model.items.markers
    first = [markers.bos] * len(contexts)
    return speak(model, contexts, first, end=markers.eos, sampling=sampling, seeds=seeds)


class Canvas:
    """The block [boi] noised latents [eoi] of every branch of guidance, packed over [context; itself] in one buffer."""

    def __init__(self, model: Painter, dialogues: Sequence[Dialogue], grids: Sequence[tuple[int, int]]):
        items = model.items
        self.model, self.markers = model, torch.tensor([items.markers.boi, items.markers.eoi], device=model.device)
        self.lengths = [h * w for h, w in grids]
        self.where = torch.cat([items.latent_grid(h, w) for h, w in grids]).to(model.device)
        names: dict[tuple[int, int], Branch] = {}  # (sample, context) -> the first branch that has it
        branches = [(i, name) for i in range(len(dialogues)) for name in CONTEXTS]
        same = {(i, name): names.setdefault((i, id(getattr(dialogues[i], name))), (i, name)) for i, name in branches}
        self.canonical = same.__getitem__
        self.slots = {branch: slot for slot, branch in enumerate(names.values())}
        contexts = [getattr(dialogues[i], name) for i, name in self.slots]
        self.cache = cache_of(model, contexts, [self.lengths[i] + 2 for i, _ in self.slots])
        self.plans: dict[tuple[Branch, ...], tuple[Layout, Tensor, Parts, Any]] = {}

    def features(self, x: Tensor, time: float, branches: Sequence[Branch]) -> list[Tensor]:
        """x [N, C] of all pictures -> for each branch the last hidden states [L, D] of its picture's latent tokens."""
        layout, source, rows, attend = self._plan(tuple(branches))
        tokens = self.model.latent_tokens(x, torch.tensor([time], device=x.device), self.where)
        block = torch.cat((tokens, self.model.decoder.embed(self.markers))).index_select(0, source)
        hidden = self.model.decoder(block, layout.positions, rows, attend)["gen"]
        return list(hidden.split([self.lengths[i] for i, _ in branches]))

    def _plan(self, branches: tuple[Branch, ...]) -> tuple[Layout, Tensor, Parts, Any]:
        """Where the branches' rows come from and go to: the same at every step that asks for the same branches."""
        if branches not in self.plans:
            device, total = self.model.device, sum(self.lengths)
            past = [self.cache.past(self.slots[branch]) for branch in branches]
            blocks = [
                [Segment(length=self.lengths[i] + 2, attend="full", visible=False, advance=0)] for i, _ in branches
            ]
            layout = lay_out(blocks, past, device=device)
            # rows of [all latents; boi; eoi] in pack order: a sample's branches begin from the same latents
            spans = torch.arange(total).split(self.lengths)
            boi, eoi = torch.tensor([total]), torch.tensor([total + 1])
            source = torch.cat([torch.cat((boi, spans[i], eoi)) for i, _ in branches]).to(device)
            rows = {"und": (source >= total).nonzero().squeeze(1), "gen": (source < total).nonzero().squeeze(1)}
            self.plans[branches] = (layout, source, rows, self.cache.attend(past, layout.mask))
        return self.plans[branches]
