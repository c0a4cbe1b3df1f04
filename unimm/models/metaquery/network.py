"""MetaQuery's network: a frozen MLLM with learned queries, the connector and a denoiser."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.denoisers.sana import SanaCondition, SanaTransformer
from unimm.generation.flow import add_noise
from unimm.kernels import attention
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.connector import Connector
from unimm.models.metaquery.mllms import mllm_spec_of
from unimm.models.metaquery.processor import N_BOUNDARY_TOKENS, QueryBatch
from unimm.nn.decoder import AttentionFn, Decoder, RowsByExpert
from unimm.sequence.packing import PackedBatch
from unimm.tokenizers.dc_ae import DCAE
from unimm.vlms.base import VisionLanguageModel

INIT_COVARIANCE_SCALE = 1e-9  # of new rows of a table, of the covariance of the old ones


class NoLanguageHead(nn.Module):
    """In place of a language head that a checkpoint does not hold: MetaQuery draws without one."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("this checkpoint holds no language head: ask its `understand`, which takes the reader's own")


class MetaQueryNetwork(nn.Module):
    """A reader with queries beside its table, a connector, a painter and its autoencoder."""

    def __init__(self, config: MetaQueryConfig):
        super().__init__()
        self.config = config
        self.mllm_spec = mllm_spec_of(config.mllm)
        self.mllm: VisionLanguageModel = self.mllm_spec.model_class(config.mllm)
        # <begin_of_img>, <end_of_img>, then the queries; apart from the reader's table, which never changes
        self.queries = nn.Parameter(torch.zeros(N_BOUNDARY_TOKENS + config.n_queries, config.mllm.decoder.dim))
        self.connector = Connector(config.connector)
        self.denoiser, self.vae = SanaTransformer(config.denoiser), DCAE(config.vae)

    @property
    def decoder(self) -> Decoder:
        """The reader's."""
        return self.mllm.decoder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.mllm.dtype

    def embed(self, batch: PackedBatch) -> Tensor:
        """Every row of a pack, in its order [n, D]: the reader's, and the queries."""
        vocab = self.config.mllm.decoder.vocab_size
        is_query = batch.ids >= vocab
        x = self.mllm.embed(replace(batch, ids=batch.ids.masked_fill(is_query, 0)))
        return x.index_copy(
            0, batch.id_rows[is_query], F.embedding(batch.ids[is_query] - vocab, self.queries).to(x.dtype)
        )

    def backbone(self, batch: PackedBatch, attend: AttentionFn) -> RowsByExpert:
        """Last hidden states of a pack's rows, before the final norm."""
        x = self.embed(batch)
        (stream,) = self.decoder.config.experts
        return self.decoder(x, self.mllm.position_ids(batch), {stream: torch.arange(len(x), device=x.device)}, attend)

    def query_hidden_states(self, batch: PackedBatch, attend: AttentionFn) -> Tensor:
        """The reader's last hidden states at the queries of each sample that has them, after the final norm [R, N, D]."""
        (hidden,), (stream,) = self.backbone(batch, attend).values(), self.decoder.config.experts
        first = self.config.mllm.decoder.vocab_size + N_BOUNDARY_TOKENS
        query_rows = batch.id_rows[batch.ids >= first]
        return self.decoder.norms[stream](hidden[query_rows]).unflatten(0, (-1, self.config.n_queries))

    def condition(self, query_states: Tensor) -> SanaCondition:
        """Answers [R, N, D] -> what the painter is told: its keys and values, computed once a picture."""
        return self.denoiser.condition(self.connector(query_states))

    @torch.inference_mode()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, height, width], about [-1, 1]."""
        return self.vae.decode(latents.to(self.dtype)).float()

    # ---- training

    def forward(self, batch: QueryBatch, latents: Tensor, noise: Tensor, times: Tensor, samples: Tensor) -> Tensor:
        """Training: the squared error of the velocity of each noised picture [B]; gradients reach the queries, not the reader.

        latents and noise [B, C, h, w], times [B], samples [B]: which of those asked each is drawn from.
        """
        condition = self.condition(self.query_states_with_grad(batch)).select_rows(samples)
        noised = add_noise(latents.flatten(1), noise.flatten(1), times).view_as(latents)
        v = self.denoiser(noised, times, condition)
        return (v.float() - (noise - latents).float()).square().flatten(1).mean(1)

    def query_states_with_grad(self, batch: QueryBatch) -> Tensor:
        """Answers [R, N, D] that carry gradients to the queries; nothing before these depends on what they learn."""
        prompt_keys_values: list[tuple[Tensor, Tensor]] = []

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prompt_keys_values.append((k, v))
            return attention(q, k, v, batch.prompts.layout.mask)

        with torch.no_grad():
            self.backbone(batch.prompts, keep)
        order = batch.row_order()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            past = prompt_keys_values[layer]
            keys, values = (torch.cat((old, new)).index_select(0, order) for old, new in zip(past, (k, v), strict=True))
            return attention(q, keys, values, batch.queries.layout.mask)

        return self.query_hidden_states(batch.queries, attend)

    @torch.no_grad()
    def init_queries(self, generator: torch.Generator | None = None) -> None:
        """New rows of a table as they begin: around the mean of the old rows, spread as they are, by next to nothing."""
        embeddings = self.decoder.embed.weight.float()
        deviations = (embeddings - embeddings.mean(0)) * (INIT_COVARIANCE_SCALE / len(embeddings)) ** 0.5
        coefficients = torch.randn(len(self.queries), len(embeddings), generator=generator).to(embeddings.device)
        self.queries.copy_(embeddings.mean(0) + coefficients @ deviations)
