"""Dialogues of texts and pictures in the three contexts of guidance, and the canvas on which a picture is denoised.

For models that draw inside the language model, over its cache. Axes: N packed tokens, L latent tokens of a picture,
D model, C features of a latent token.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from unimm.flow import Branch
from unimm.models.decoder import Decoder, Parts
from unimm.sampling import Cache, Context, TextSampling, decode
from unimm.sequence import Item, Layout, Pack, Segment, lay_out, pack

CONTEXTS = ("main", "text", "image")


class Speaker(Protocol):
    """What a model brings to a dialogue."""

    decoder: Decoder

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def hidden(self, batch: Pack, attend: Any) -> Parts:
        """Last hidden states of every row of a pack, by stream."""

    def latent_grid(self, height: int, width: int) -> Tensor:
        """Places in the table of latent positions of a picture of that many latent tokens, [height * width]."""

    def latent_tokens(self, x: Tensor, times: Tensor, where: Tensor) -> Tensor:
        """Latent tokens [n, C] at times [n] or [1] and places [n] -> [n, D]."""


@dataclass(frozen=True, eq=False)
class Dialogue:
    """What was said so far, thrice: all of it, without the last text, without the pictures. Equal ones are one object."""

    main: Context = Context()
    text: Context = Context()
    image: Context = Context()
    size: tuple[int, int] | None = None  # (height, width) of the last picture


def say(model: Speaker, dialogues: Sequence[Dialogue], texts: Sequence[Item], *, system: bool = False) -> list[Dialogue]:
    """Append a text to each dialogue; the context without the last text is then the one before it.

    A `system` prompt leaves that context behind: the text that comes next moves it past the prompt.
    """
    grown = _append(model, dialogues, [[text] for text in texts], ("main", "image"))
    return [replace(d, text=d.text if system else d.main, **more) for d, more in zip(dialogues, grown, strict=True)]


def reason(model: Speaker, dialogues: Sequence[Dialogue], texts: Sequence[Item]) -> list[Dialogue]:
    """Append the model's own reasoning, which the original keeps from both contexts of guidance."""
    grown = _append(model, dialogues, [[text] for text in texts], ("main",))
    return [replace(d, **more) for d, more in zip(dialogues, grown, strict=True)]


def show(
    model: Speaker, dialogues: Sequence[Dialogue], images: Sequence[Sequence[Item]], sizes: Sequence[tuple[int, int]]
) -> list[Dialogue]:
    """Append a picture's items to each dialogue, but not to the context without pictures."""
    grown = _append(model, dialogues, images, ("main",))
    return [replace(d, main=m["main"], text=m["main"], size=hw) for d, m, hw in zip(dialogues, grown, sizes, strict=True)]


def _append(
    model: Speaker, dialogues: Sequence[Dialogue], items: Sequence[Sequence[Item]], names: Sequence[str]
) -> list[dict[str, Context]]:
    """Extend the named contexts of each dialogue by its items, equal ones once."""
    jobs = {(i, id(context)): context for i, d in enumerate(dialogues) for context in (getattr(d, name) for name in names)}
    done = dict(zip(jobs, extend(model, list(jobs.values()), [items[i] for i, _ in jobs]), strict=True))
    return [{name: done[i, id(getattr(d, name))] for name in names} for i, d in enumerate(dialogues)]


@torch.inference_mode()
def extend(model: Speaker, contexts: Sequence[Context], items: Sequence[Sequence[Item]]) -> list[Context]:
    """Append items to each context, all in one packed forward; the contexts given stay as they are.

    Raises ValueError where a context would outgrow the positions that the model knows.
    """
    lengths = [sum(item.segment.length for item in more) for more in items]
    cache = _cache(model, contexts, lengths)
    past = [cache.past(i) for i in range(len(contexts))]
    batch = pack(items, past, device=model.device)
    _check_position(model, max(batch.layout.clocks))
    model.hidden(batch, cache.attend(past, batch.layout.mask))
    return [c.extended(cache.chunk(i, lengths[i]), batch.layout.clocks[i]) for i, c in enumerate(contexts)]


def write(
    model: Speaker, contexts: Sequence[Context], sampling: TextSampling, seeds: Sequence[int], *, begin: int, end: int
) -> Iterator[list[int | None]]:
    """Text after each context, from the marker `begin` to `end`: one id a context at a time, None for those that ended."""
    n = len(contexts)
    _check_position(model, max(c.clock for c in contexts) + sampling.max_tokens)
    cache = _cache(model, contexts, [sampling.max_tokens] * n)
    one = [[Segment(length=1, attend="causal", advance=1)]] * n
    rows = {model.decoder.cfg.streams[0]: torch.arange(n, device=model.device)}

    @torch.inference_mode()
    def step(ids: list[int], behind: int) -> Tensor:
        past = [cache.past(i, behind=behind) for i in range(n)]
        layout = lay_out(one, past, device=model.device)
        x = model.decoder.embed(torch.tensor(ids, device=model.device))
        hidden = model.decoder(x, layout.positions, rows, cache.attend(past, layout.mask))
        return model.decoder.logits(*hidden.values())

    return decode(step, [begin] * n, end=end, sampling=sampling, seeds=seeds)


class Canvas:
    """The block [boi] noised latents [eoi] of every branch of guidance, packed over [context; itself] in one buffer."""

    def __init__(
        self, model: Speaker, dialogues: Sequence[Dialogue], grids: Sequence[tuple[int, int]], *, markers: tuple[int, int]
    ):
        self.model, self.markers = model, torch.tensor(markers, device=model.device)
        self.lengths = [h * w for h, w in grids]
        self.where = torch.cat([model.latent_grid(h, w) for h, w in grids]).to(model.device)
        names: dict[tuple[int, int], Branch] = {}  # (sample, context) -> the first branch that has it
        same = {(i, name): names.setdefault((i, id(getattr(d, name))), (i, name)) for i, d in enumerate(dialogues) for name in CONTEXTS}
        self.canonical = same.__getitem__
        self.slots = {branch: slot for slot, branch in enumerate(names.values())}
        contexts = [getattr(dialogues[i], name) for i, name in self.slots]
        self.cache = _cache(model, contexts, [self.lengths[i] + 2 for i, _ in self.slots])
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
            blocks = [[Segment(length=self.lengths[i] + 2, attend="full", visible=False, advance=0)] for i, _ in branches]
            layout = lay_out(blocks, past, device=device)
            # rows of [all latents; boi; eoi] in pack order: a sample's branches begin from the same latents
            spans = torch.arange(total).split(self.lengths)
            boi, eoi = torch.tensor([total]), torch.tensor([total + 1])
            source = torch.cat([torch.cat((boi, spans[i], eoi)) for i, _ in branches]).to(device)
            rows = {"und": (source >= total).nonzero().squeeze(1), "gen": (source < total).nonzero().squeeze(1)}
            self.plans[branches] = (layout, source, rows, self.cache.attend(past, layout.mask))
        return self.plans[branches]


def _cache(model: Speaker, contexts: Sequence[Context], room: Sequence[int]) -> Cache:
    d = model.decoder.cfg
    empty = torch.empty(d.n_layers, 2, 0, d.n_kv_heads, d.head_dim, dtype=model.dtype, device=model.device)
    return Cache(contexts, room, empty=empty)


def _check_position(model: Speaker, clock: int) -> None:
    known = model.decoder.cfg.max_positions
    if clock > known:
        raise ValueError(f"the dialogue would reach position {clock}, the model knows {known}: shorten the prompt or max_tokens")
