"""UniWorld's network: a reader, what leads from it and from SigLIP2 to FLUX, and FLUX."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.denoisers.flux import Flux, grid
from unimm.denoisers.mmdit import SIDE, pack, unpack
from unimm.generation.flow import add_noise
from unimm.models.uniworld.auxiliary_encoders import Parts
from unimm.models.uniworld.config import UniWorldConfig
from unimm.nn.layers import MLP
from unimm.sequence.parts import Item
from unimm.vlms.qwen2_5_vl.model import QwenVL


class UniWorldNetwork(nn.Module):
    """A reader, a painter, what leads from one to the other, and the parts that lie apart."""

    def __init__(self, cfg: UniWorldConfig):
        super().__init__()
        self.cfg = cfg
        self.reader, self.painter, self.parts = QwenVL(cfg.reader), Flux(cfg.painter), Parts()
        wide = cfg.painter.text_dim
        self.from_reader = MLP(cfg.reader.decoder.dim, cfg.read_hidden, wide, "silu")
        self.from_look = MLP(cfg.look_dim, cfg.look_hidden, wide, "silu")
        self.from_latents = MLP(cfg.painter.in_channels, cfg.latent_hidden, wide, "silu")
        self.decide = MLP(cfg.reader.decoder.dim, cfg.decide_hidden, 2, "silu") if cfg.decide_hidden else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.reader.dtype

    def told(
        self, samples: Sequence[Sequence[Item]], states: Sequence[Tensor], looks: Tensor | None = None
    ) -> list[Tensor]:
        """What the painter is told of each sample [m, C], of what was read of it [n, D].

        looks [k, patches, C]: features of all pictures, in order, each put between its cells and the marker behind them.
        """
        projected = self.from_reader(torch.cat(list(states))).split([len(one) for one in states])
        left = iter(()) if looks is None else iter(self.from_look(looks))
        told = []
        for items, tokens in zip(samples, projected, strict=True):
            parts = []
            for item, rows in zip(items, tokens.split([one.segment.length for one in items]), strict=True):
                parts += [rows, next(left)] if item.kind == "look" and looks is not None else [rows]
            told.append(torch.cat(parts))
        return told

    def pooled(self, texts: Sequence[str], *, clip: bool | None = None) -> Tensor:
        """CLIP's vector of each text [B, C]; zeros where the model was trained without, or `clip` is False."""
        if self.cfg.captioned if clip is None else clip:
            return self.parts.pooled(texts)
        return torch.zeros(
            len(texts), self.cfg.painter.pooled_dim, dtype=self.dtype, device=self.from_reader.fc1.weight.device
        )

    def beside(self, latents: Tensor) -> Tensor:
        """Latents of references [k, C, h, w] as what the painter is told [m, C]: half as fine, projected."""
        return self.from_latents(pack(F.avg_pool2d(latents, 2)).to(self.dtype)).flatten(0, 1)

    def velocity(
        self,
        told: Sequence[Tensor],
        noised: Tensor,
        times: Tensor,
        *,
        pooled: Tensor,
        guidance: float | Tensor,
        references: Tensor | None = None,
    ) -> Tensor:
        """Training: told [m, C] of each sample, noised latents [B, C, h, w], times [B] -> velocity [B, C, h, w].

        references [B, C, k h, w]: latents that stand below those drawn.
        """
        h, w = noised.shape[2:]
        text, seen = padded(told)
        whole = noised if references is None else torch.cat((noised, references.to(noised)), 2)
        condition = self.painter.condition(text, grid(whole.shape[2] // SIDE, w // SIDE).to(text.device), seen=seen)
        (step,) = self.painter.modulations(times[None], pooled, guidance=guidance if self.cfg.painter.guided else None)
        v = self.painter(pack(whole).to(text.dtype), condition, step)
        return unpack(v[:, : h * w // SIDE**2], height=h, width=w)

    def forward(
        self,
        told: Sequence[Tensor],
        latents: Tensor,
        noise: Tensor,
        times: Tensor,
        *,
        pooled: Tensor,
        weights: Tensor | None = None,
        guidance: float = 1.0,
        references: Tensor | None = None,
    ) -> Tensor:
        """Training: the squared error of the velocity of each picture [B]; weights [B, 1, h, w]: of its places."""
        noised = add_noise(latents.flatten(1), noise.flatten(1), times).view_as(latents)
        v = self.velocity(told, noised, times, pooled=pooled, guidance=guidance, references=references)
        off = (v.float() - (noise - latents).float()).square()
        return (off if weights is None else weights * off).flatten(1).mean(1)


def padded(told: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """What samples are told [m, C] as one batch [B, M, C], and which of it is no padding [B, M]; None where all is."""
    lengths = torch.tensor([len(one) for one in told])
    batch = nn.utils.rnn.pad_sequence(list(told), batch_first=True)
    if lengths.unique().numel() == 1:
        return batch, None
    return batch, (torch.arange(batch.shape[1]) < lengths[:, None]).to(batch.device)
