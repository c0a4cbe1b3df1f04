"""Dialogues of texts and pictures in the three contexts of guidance, and the canvas on which a picture is denoised.

For models that draw inside the language model, over its cache. Axes: N packed tokens, L latent tokens of a picture,
D model, C features of a latent token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from unimm.generation.causal_lm import CausalLM
from unimm.generation.decode import decode_text
from unimm.generation.guidance import Branch
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache, allocate_kv_buffer
from unimm.generation.prefill import prefill
from unimm.generation.text_sampling import TextSampling
from unimm.models.bagel.processor import BagelProcessor
from unimm.nn.decoder import RowsByExpert
from unimm.sequence.parts import Part
from unimm.sequence.segments import PackedLayout, Segment, build_layout

CFG_CONTEXTS = ("full", "no_text", "no_image")


class BagelDenoisingModel(CausalLM, Protocol):
    """A speaker that draws inside its language model."""

    @property
    def processor(self) -> BagelProcessor: ...

    def embed_latents(self, x: Tensor, timesteps: Tensor, position_ids: Tensor) -> Tensor:
        """Latent tokens [n, C] at times [n] or [1] and places [n] -> [n, D]."""


@dataclass(frozen=True, eq=False)
class CFGContexts:
    """What was said so far, thrice: all of it, without the last text, without the pictures. Equal ones are one object."""

    full: KVCache = EMPTY_CACHE
    no_text: KVCache = EMPTY_CACHE
    no_image: KVCache = EMPTY_CACHE
    image_size: tuple[int, int] | None = None  # (height, width) of the last picture


def append_text(
    model: CausalLM, contexts: Sequence[CFGContexts], texts: Sequence[Part], *, system: bool = False
) -> list[CFGContexts]:
    """Append a text to each dialogue; the context without the last text is then the one before it.

    A `system` prompt leaves that context behind: the text that comes next moves it past the prompt.
    """
    grown = _append(model, contexts, [[text] for text in texts], ("full", "no_image"))
    return [
        replace(d, full=more["full"], no_image=more["no_image"], no_text=d.no_text if system else d.full)
        for d, more in zip(contexts, grown, strict=True)
    ]


def append_reasoning(model: CausalLM, contexts: Sequence[CFGContexts], texts: Sequence[Part]) -> list[CFGContexts]:
    """Append the model's own reasoning, which the original keeps from both contexts of guidance."""
    grown = _append(model, contexts, [[text] for text in texts], ("full",))
    return [replace(d, full=more["full"]) for d, more in zip(contexts, grown, strict=True)]


def append_images(
    model: CausalLM, contexts: Sequence[CFGContexts], images: Sequence[Sequence[tuple[Sequence[Part], tuple[int, int]]]]
) -> list[CFGContexts]:
    """Append each dialogue's pictures, (items, (height, width)) each, but not to the context without pictures.

    The first ones of all dialogues go through one forward, then the second ones, and so on.
    """
    out = list(contexts)
    for turn in range(max(map(len, images))):
        at = [i for i, some in enumerate(images) if len(some) > turn]
        grown = _append(model, [out[i] for i in at], [images[i][turn][0] for i in at], ("full",))
        for i, more in zip(at, grown, strict=True):
            out[i] = replace(out[i], full=more["full"], no_text=more["full"], image_size=images[i][turn][1])
    return out


def _append(
    model: CausalLM, dialogues: Sequence[CFGContexts], items: Sequence[Sequence[Part]], names: Sequence[str]
) -> list[dict[str, KVCache]]:
    """Extend the named contexts of each dialogue by its items, equal ones once."""
    jobs = {
        (i, id(context)): context for i, d in enumerate(dialogues) for context in (getattr(d, name) for name in names)
    }
    done = dict(zip(jobs, prefill(model, list(jobs.values()), [items[i] for i, _ in jobs]), strict=True))
    return [{name: done[i, id(getattr(d, name))] for name in names} for i, d in enumerate(dialogues)]


def decode_after(
    model: BagelDenoisingModel, contexts: Sequence[KVCache], sampling: TextSampling, seeds: Sequence[int]
) -> Iterator[list[int | None]]:
    """Text after each context, from bos to eos: one id a context at a time, None for those that have ended."""
    markers = model.processor.special_tokens
    first = [markers.bos] * len(contexts)
    return decode_text(model, contexts, first, end=markers.eos, sampling=sampling, seeds=seeds)


class LatentDenoiser:
    """The block [boi] noised latents [eoi] of every branch of guidance, packed over [context; itself] in one buffer."""

    def __init__(self, model: BagelDenoisingModel, dialogues: Sequence[CFGContexts], grids: Sequence[tuple[int, int]]):
        items = model.processor
        self.model, self.markers = (
            model,
            torch.tensor([items.special_tokens.boi, items.special_tokens.eoi], device=model.device),
        )
        self.lengths = [h * w for h, w in grids]
        self.where = torch.cat([items.latent_position_ids(h, w) for h, w in grids]).to(model.device)
        names: dict[tuple[int, int], Branch] = {}  # (sample, context) -> the first branch that has it
        branches = [(i, name) for i in range(len(dialogues)) for name in CFG_CONTEXTS]
        same = {(i, name): names.setdefault((i, id(getattr(dialogues[i], name))), (i, name)) for i, name in branches}
        self.canonical = same.__getitem__
        self.slots = {branch: slot for slot, branch in enumerate(names.values())}
        contexts = [getattr(dialogues[i], name) for i, name in self.slots]
        self.cache = allocate_kv_buffer(model, contexts, [self.lengths[i] + 2 for i, _ in self.slots])
        self.plans: dict[tuple[Branch, ...], tuple[PackedLayout, Tensor, RowsByExpert, Any]] = {}

    def features(self, x: Tensor, time: float, branches: Sequence[Branch]) -> list[Tensor]:
        """x [N, C] of all pictures -> for each branch the last hidden states [L, D] of its picture's latent tokens."""
        layout, source, rows, attend = self._plan(tuple(branches))
        tokens = self.model.embed_latents(x, torch.tensor([time], device=x.device), self.where)
        block = torch.cat((tokens, self.model.decoder.embed(self.markers))).index_select(0, source)
        hidden = self.model.decoder(block, layout.position_ids, rows, attend)["gen"]
        return list(hidden.split([self.lengths[i] for i, _ in branches]))

    def _plan(self, branches: tuple[Branch, ...]) -> tuple[PackedLayout, Tensor, RowsByExpert, Any]:
        """Where the branches' rows come from and go to: the same at every step that asks for the same branches."""
        if branches not in self.plans:
            device, total = self.model.device, sum(self.lengths)
            past = [self.cache.prefix(self.slots[branch]) for branch in branches]
            blocks = [
                [Segment(length=self.lengths[i] + 2, attention="full", visible=False, advance=0)] for i, _ in branches
            ]
            layout = build_layout(blocks, past, device=device)
            # rows of [all latents; boi; eoi] in pack order: a sample's branches begin from the same latents
            spans = torch.arange(total).split(self.lengths)
            boi, eoi = torch.tensor([total]), torch.tensor([total + 1])
            source = torch.cat([torch.cat((boi, spans[i], eoi)) for i, _ in branches]).to(device)
            rows = {"und": (source >= total).nonzero().squeeze(1), "gen": (source < total).nonzero().squeeze(1)}
            self.plans[branches] = (layout, source, rows, self.cache.attend(past, layout.mask))
        return self.plans[branches]
