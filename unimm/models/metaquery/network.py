"""MetaQuery's network: a frozen MLLM with learned queries, the connector and a denoiser."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.denoisers.sana import Condition, Sana
from unimm.generation.flow import add_noise
from unimm.kernels import attention
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.connector import Connector
from unimm.models.metaquery.mllms import kind_of
from unimm.models.metaquery.processor import MARKERS, Asking
from unimm.nn.decoder import Attend, Decoder, Parts
from unimm.sequence.packing import Pack
from unimm.tokenizers.dc_ae import DCAE
from unimm.vlms.base import Reader

TINY_SPREAD = 1e-9  # of new rows of a table, of the covariance of the old ones


class LostHead(nn.Module):
    """In place of a language head that a checkpoint does not hold: MetaQuery draws without one."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("this checkpoint holds no language head: ask its `understand`, which takes the reader's own")


class MetaQueryNetwork(nn.Module):
    """A reader with queries beside its table, a connector, a painter and its autoencoder."""

    def __init__(self, cfg: MetaQueryConfig):
        super().__init__()
        self.cfg = cfg
        self.kind = kind_of(cfg.reader)
        self.reader: Reader = self.kind.home(cfg.reader)
        # <begin_of_img>, <end_of_img>, then the queries; apart from the reader's table, which never changes
        self.queries = nn.Parameter(torch.zeros(MARKERS + cfg.n_queries, cfg.reader.decoder.dim))
        self.connector = Connector(cfg.connector)
        self.painter, self.vae = Sana(cfg.painter), DCAE(cfg.vae)

    @property
    def decoder(self) -> Decoder:
        """The reader's."""
        return self.reader.decoder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.reader.dtype

    def embed(self, batch: Pack) -> Tensor:
        """Every row of a pack, in its order [n, D]: the reader's, and the queries."""
        vocab = self.cfg.reader.decoder.vocab
        new = batch.ids >= vocab
        x = self.reader.embed(replace(batch, ids=batch.ids.masked_fill(new, 0)))
        return x.index_copy(0, batch.id_rows[new], F.embedding(batch.ids[new] - vocab, self.queries).to(x.dtype))

    def hidden(self, batch: Pack, attend: Attend) -> Parts:
        """Last hidden states of a pack's rows, before the final norm."""
        x = self.embed(batch)
        (stream,) = self.decoder.cfg.streams
        return self.decoder(x, self.reader.positions(batch), {stream: torch.arange(len(x), device=x.device)}, attend)

    def answers(self, batch: Pack, attend: Attend) -> Tensor:
        """The reader's last hidden states at the queries of each sample that has them, after the final norm [R, N, D]."""
        (hidden,), (stream,) = self.hidden(batch, attend).values(), self.decoder.cfg.streams
        first = self.cfg.reader.decoder.vocab + MARKERS
        at = batch.id_rows[batch.ids >= first]
        return self.decoder.norms[stream](hidden[at]).unflatten(0, (-1, self.cfg.n_queries))

    def told(self, answers: Tensor) -> Condition:
        """Answers [R, N, D] -> what the painter is told: its keys and values, computed once a picture."""
        return self.painter.condition(self.connector(answers))

    @torch.inference_mode()
    def paint(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, height, width], about [-1, 1]."""
        return self.vae.decode(latents.to(self.dtype)).float()

    # ---- training

    def forward(self, asking: Asking, latents: Tensor, noise: Tensor, times: Tensor, samples: Tensor) -> Tensor:
        """Training: the squared error of the velocity of each noised picture [B]; gradients reach the queries, not the reader.

        latents and noise [B, C, h, w], times [B], samples [B]: which of those asked each is drawn from.
        """
        condition = self.told(self.learning(asking)).rows(samples)
        noised = add_noise(latents.flatten(1), noise.flatten(1), times).view_as(latents)
        v = self.painter(noised, times, condition)
        return (v.float() - (noise - latents).float()).square().flatten(1).mean(1)

    def learning(self, asking: Asking) -> Tensor:
        """Answers [R, N, D] that carry gradients to the queries; nothing before these depends on what they learn."""
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.append((k, v))
            return attention(q, k, v, asking.prompts.layout.mask)

        with torch.no_grad():
            self.hidden(asking.prompts, keep)
        order = asking.order()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            past = kept[layer]
            keys, values = (torch.cat((old, new)).index_select(0, order) for old, new in zip(past, (k, v), strict=True))
            return attention(q, keys, values, asking.queries.layout.mask)

        return self.answers(asking.queries, attend)

    @torch.no_grad()
    def reset_queries(self, generator: torch.Generator | None = None) -> None:
        """New rows of a table as they begin: around the mean of the old rows, spread as they are, by next to nothing."""
        old = self.decoder.embed.weight.float()
        off = (old - old.mean(0)) * (TINY_SPREAD / len(old)) ** 0.5
        draws = torch.randn(len(self.queries), len(old), generator=generator).to(old.device)
        self.queries.copy_(old.mean(0) + draws @ off)
