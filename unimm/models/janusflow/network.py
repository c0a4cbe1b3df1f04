"""JanusFlow's network: a causal decoder with a flow head between two U-ViTs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from unimm.encoders.timm_vit import Tower
from unimm.generation.flow import add_noise
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.common.deepseek_network import DeepseekNetwork
from unimm.models.janusflow.config import STREAM, THOUSAND, JanusFlowConfig
from unimm.models.janusflow.uvit import ShallowUViTDecoder, ShallowUViTEncoder
from unimm.nn.decoder import Decoder, Parts, Route
from unimm.nn.layers import RMSNorm
from unimm.nn.patches import patchify
from unimm.sequence.packing import Pack, Tokens
from unimm.sequence.parts import IGNORE, Item, gap_item, image_item, text_item
from unimm.tokenizers.kl import VAE


@dataclass(frozen=True)
class Losses:
    """Cross entropy of every labelled row [m], squared error of every noised token [n, p*p*C]."""

    text: Tensor
    mse: Tensor


@dataclass(frozen=True)
class Entered:
    """Noised latents inside the language model: a row for the time, one for each token, and what skips it."""

    time: Tensor  # [B, D]
    rows: Tensor  # [B, n, D]
    skip: Tensor  # [B, C, h, w]

    def __getitem__(self, at: Tensor) -> "Entered":
        return Entered(self.time[at], self.rows[at], self.skip[at])


def target(tokens: Tensor, boi: int, *, time: float) -> Item:
    """Tokens [n, ...] of a latent to be noised up to `time`, 0 data and 1 noise; the row of its marker holds the time.

    Nothing sees them and the clock does not count them, so copies at other times may follow the same prompt, exactly.
    """
    item = image_item("draw", tokens, torch.arange(len(tokens)), markers=(boi,), causal=True, time=time, noised=True)
    return replace(item, segment=replace(item.segment, advance=0))


def unconditional(prompt: Sequence[Item]) -> list[Item]:
    """What guidance compares with, in place of a prompt: its first id, and nothing until where the prompt ends."""
    length = sum(item.segment.length for item in prompt)
    return [text_item([int(prompt[0].ids[0])]), gap_item(length - 1)]


def starts(tokens: Tokens) -> Tensor:
    """Which of a pack's image tokens begin a picture, [pictures]."""
    lengths = torch.tensor(tokens.lengths, device=tokens.rows.device)
    return lengths.cumsum(0) - lengths


def before(tokens: Tokens) -> Tensor:
    """The row before each picture of a pack, [pictures]."""
    return tokens.rows[starts(tokens)] - 1


class JanusFlowNetwork(DeepseekNetwork):
    """A decoder, a tower to look with, and a way in and a way out for latents; the autoencoder may lie elsewhere."""

    def __init__(self, cfg: JanusFlowConfig):
        super().__init__()
        self.cfg = cfg
        dim = cfg.decoder.dim
        self.decoder, self.vision = Decoder(cfg.decoder), Tower(cfg.tower)
        self.aligner = nn.Linear(self.vision.trunk.num_features, dim)
        self.look_start = nn.Parameter(torch.zeros(1, dim))  # stands where the marker before a picture would
        self.encoder, self.painter = ShallowUViTEncoder(cfg.encoder), ShallowUViTDecoder(cfg.painter)
        self.from_grid = nn.Linear(cfg.encoder.width, dim)
        self.to_grid_norm, self.to_grid = RMSNorm(dim, cfg.decoder.norm_eps), nn.Linear(dim, cfg.painter.in_channels)
        self.vae: VAE | None = VAE(cfg.vae) if cfg.vae else None

    def embed(self, batch: Pack, drawn: Entered | None = None) -> Tensor:
        """Every row of a pack, in its order [N, D]: texts and markers, pictures seen, and pictures to draw."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.look:
            parts["look"], rows["look"] = self.aligner(self.seen(batch.look)), batch.look.rows
        if batch.draw and drawn:
            parts["draw"], rows["draw"] = drawn.rows.flatten(0, 1), batch.draw.rows
        x = Route(rows).join(parts)
        if batch.look:
            begun = self.look_start.expand(len(batch.look.lengths), -1)
            x = x.index_copy(0, before(batch.look), begun.to(x.dtype))
        return x.index_copy(0, before(batch.draw), drawn.time.to(x.dtype)) if batch.draw and drawn else x

    def hidden(self, batch: Pack, attend: Any, drawn: Entered | None = None) -> Parts:
        """Last hidden states of a pack's rows, before the final norm."""
        return self._decode(self.embed(batch, drawn), batch.layout.positions, attend)

    def _decode(self, x: Tensor, positions: Tensor, attend: Any) -> Parts:
        return self.decoder(x, positions, {STREAM: torch.arange(len(x), device=x.device)}, attend)

    def enter(self, x: Tensor, times: Tensor, *, bf16_time: bool = False) -> Entered:
        """Noised latents x [B, C, H, W] at times [B], 0 data and 1 noise."""
        clock = (1 - times) * THOUSAND
        clock = clock.bfloat16().float() if bf16_time else clock
        grid, time = self.encoder(x.to(self.dtype), clock)
        return Entered(time, self.from_grid(rearrange(grid, "B C h w -> B (h w) C")), grid)

    def leave(self, hidden: Tensor, entered: Entered) -> Tensor:
        """Last hidden states of the tokens [B, n, D] -> velocity [B, C, H, W], noise - data."""
        y = self.to_grid(self.to_grid_norm(self.decoder.norms[STREAM](hidden)))
        grid = rearrange(y, "B (h w) C -> B C h w", h=entered.skip.shape[2])
        return -self.painter(grid, entered.skip, entered.time)

    def forward(self, batch: Pack, noise: Tensor) -> Losses:
        """Training: next-id loss at the labelled rows, flow loss at the noised tokens; noise [n draw tokens, p*p*C]."""
        drawn = None
        if batch.draw:
            z = add_noise(batch.draw.content, noise, batch.times)
            drawn = self.enter(self._latents(z), batch.times[starts(batch.draw)])
        hidden = self.hidden(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask), drawn)[STREAM]
        at = (batch.labels != IGNORE).nonzero().squeeze(1)
        said = self.decoder.norms[STREAM](hidden[batch.id_rows[at]])
        text = linear_cross_entropy(said, self.decoder.head.weight, batch.labels[at])
        if batch.draw is None or drawn is None:
            return Losses(text, noise.new_zeros(0, noise.shape[-1]))
        v = self.leave(hidden[batch.draw.rows].unflatten(0, drawn.rows.shape[:2]), drawn)
        target = self._latents(noise - batch.draw.content)
        error = (v.float() - target).square()
        return Losses(text, torch.cat([patchify(one, self.cfg.patch) for one in error]))

    def _latents(self, tokens: Tensor) -> Tensor:
        """Tokens of pictures [n, p*p*C], one after the other -> [B, C, H, W]."""
        p, (height, width) = self.cfg.patch, self.cfg.latent
        return rearrange(tokens, "(B h w) (p q C) -> B C (h p) (w q)", h=height // p, w=width // p, p=p, q=p)

    def drawn(self, latent: Tensor, boi: int, *, time: float) -> Item:
        """A latent [C, H, W] to be noised up to `time`, 0 data and 1 noise."""
        return target(patchify(latent, self.cfg.patch), boi, time=time)

    def noise(self, generator: torch.Generator) -> Tensor:
        """What a picture is drawn from, [C, H, W]."""
        shape = self.cfg.encoder.in_channels, *self.cfg.latent
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
