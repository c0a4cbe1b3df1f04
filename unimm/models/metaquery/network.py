"""MetaQuery's network: learned queries in a frozen MLLM, a connector, and a diffusion transformer with its autoencoder.

Pan et al. 2025, arXiv 2504.06256. The queries are rows behind the MLLM's embedding table and are read causally after
the prompt; the MLLM's last hidden states at the queries become the caption of a Sana. Time 0 is data, 1 is noise.

Axes: R prompts, N queries, D model (the MLLM's), P images, C latent channels, h w latent grid.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.denoisers.sana import SanaCondition, SanaTransformer
from unimm.generation.flow import add_noise
from unimm.generation.step_cache import RowStepCache
from unimm.kernels import attention
from unimm.models.metaquery.config import MetaQueryConfig
from unimm.models.metaquery.connector import Connector
from unimm.models.metaquery.mllms import mllm_spec_of
from unimm.models.metaquery.processor import N_BOUNDARY_TOKENS, QueryBatch
from unimm.nn.decoder import AttentionFn, Decoder, RowsByExpert
from unimm.sequence.packing import PackedBatch
from unimm.tokenizers.dc_ae import DCAE
from unimm.vlms.base import VisionLanguageModel

INIT_COVARIANCE_SCALE = 1e-9  # covariance of new embedding rows, as a part of the old rows'


class NoLanguageHead(nn.Module):
    """Placeholder for a language head that the checkpoint lacks; MetaQuery generates images without one."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("this checkpoint holds no language head: call its `understand`, which loads the MLLM's own")


@dataclass(frozen=True)
class GuidanceBranches:
    """The conditions of P images under guidance: branch i belongs to image `owners[i]` and weighs `weights[i]`.

    condition: n rows, one a branch; owners [n] int; weights [n, 1, 1, 1] float32, whose sum over an image's branches is
    1.
    """

    condition: SanaCondition
    owners: Tensor
    weights: Tensor


class MetaQueryNetwork(nn.Module):
    """An MLLM with extra query embeddings, a connector, a Sana denoiser and a DC-AE."""

    def __init__(self, config: MetaQueryConfig):
        super().__init__()
        self.config = config
        self.mllm_spec = mllm_spec_of(config.mllm)
        self.mllm: VisionLanguageModel = self.mllm_spec.model_class(config.mllm)
        # <begin_of_img>, <end_of_img>, then the queries; apart from the MLLM's own table, which stays frozen
        self.queries = nn.Parameter(torch.zeros(N_BOUNDARY_TOKENS + config.n_queries, config.mllm.decoder.dim))
        self.connector = Connector(config.connector)
        self.denoiser = SanaTransformer(config.denoiser)
        self.vae = DCAE(config.vae)

    @property
    def decoder(self) -> Decoder:
        """The MLLM's decoder."""
        return self.mllm.decoder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.mllm.dtype

    # ---- MLLM with queries

    def embed(self, batch: PackedBatch) -> Tensor:
        """Embeddings of all rows of a batch, in order [N, D]: the MLLM's own, and those of the queries."""
        vocab_size = self.config.mllm.decoder.vocab_size
        is_query = batch.ids >= vocab_size
        x = self.mllm.embed(replace(batch, ids=batch.ids.masked_fill(is_query, 0)))
        queries = F.embedding(batch.ids[is_query] - vocab_size, self.queries)
        return x.index_copy(0, batch.id_rows[is_query], queries.to(x.dtype))

    def backbone(self, batch: PackedBatch, attend: AttentionFn) -> RowsByExpert:
        """Last hidden states of all rows of a batch, before the final norm."""
        x = self.embed(batch)
        (expert,) = self.decoder.config.experts
        rows = {expert: torch.arange(len(x), device=x.device)}
        return self.decoder(x, self.mllm.position_ids(batch), rows, attend)

    def query_hidden_states(self, batch: PackedBatch, attend: AttentionFn) -> Tensor:
        """Last hidden states at the queries of each sample that has them, after the final norm [R, N, D]."""
        ((expert, hidden),) = self.backbone(batch, attend).items()
        first_query_id = self.config.mllm.decoder.vocab_size + N_BOUNDARY_TOKENS
        query_rows = batch.id_rows[batch.ids >= first_query_id]
        return self.decoder.norms[expert](hidden[query_rows]).unflatten(0, (-1, self.config.n_queries))

    def query_states_with_grad(self, batch: QueryBatch) -> Tensor:
        """Hidden states at the queries [R, N, D], with gradients to the queries, and to the MLLM where it is trained.

        Nothing before the queries depends on what they learn, so that with a frozen MLLM the prompts run without
        gradients and give only their keys and values.
        """
        prompt_keys_values: list[tuple[Tensor, Tensor]] = []

        def record(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prompt_keys_values.append((k, v))
            return attention(q, k, v, batch.prompts.layout.mask)

        trains_mllm = any(p.requires_grad for p in self.mllm.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains_mllm):
            self.backbone(batch.prompts, record)
        order = batch.row_order()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prompt_k, prompt_v = prompt_keys_values[layer]
            keys = torch.cat((prompt_k, k)).index_select(0, order)
            values = torch.cat((prompt_v, v)).index_select(0, order)
            return attention(q, keys, values, batch.queries.layout.mask)

        return self.query_hidden_states(batch.queries, attend)

    # ---- denoiser

    def condition(self, query_states: Tensor) -> SanaCondition:
        """Hidden states at the queries [R, N, D] -> the denoiser's cross-attention keys and values, R rows."""
        return self.denoiser.condition(self.connector(query_states))

    def guided_velocity(
        self, x: Tensor, timesteps: Tensor, branches: GuidanceBranches, *, step_cache: RowStepCache | None = None
    ) -> Tensor:
        """Velocity of latents [P, C, h, w] at timesteps [P] float32: the weighted sum over each image's branches."""
        owners = branches.owners
        v = self.denoiser(x[owners].to(self.dtype), timesteps[owners], branches.condition, step_cache=step_cache)
        return torch.zeros_like(x).index_add(0, owners, branches.weights * v.float())

    @torch.inference_mode()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [P, C, h, w] -> pixels [P, 3, height, width], about [-1, 1]."""
        return self.vae.decode(latents.to(self.dtype)).float()

    # ---- training

    def flow_matching_loss(self, condition: SanaCondition, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Squared error of each image's velocity [P]: latents, noise [P, C, h, w], timesteps [P], a condition of P
        rows."""
        noised = add_noise(latents.flatten(1), noise.flatten(1), timesteps).view_as(latents)
        v = self.denoiser(noised, timesteps, condition)
        return (v.float() - (noise - latents).float()).square().flatten(1).mean(1)

    def forward(
        self, batch: QueryBatch, latents: Tensor, noise: Tensor, timesteps: Tensor, sample_indices: Tensor
    ) -> Tensor:
        """The flow matching loss of each image [P], with gradients to the queries, and to the MLLM where it is trained.

        latents, noise [P, C, h, w]; timesteps [P]; sample_indices [P]: the prompt in `batch` that each image belongs
        to.
        """
        condition = self.condition(self.query_states_with_grad(batch)).select_rows(sample_indices)
        return self.flow_matching_loss(condition, latents, noise, timesteps)

    @torch.no_grad()
    def init_queries(self, generator: torch.Generator | None = None) -> None:
        """Initialize the query embeddings: the mean of the MLLM's embeddings plus noise of 1e-9 times their
        covariance."""
        embeddings = self.decoder.embed.weight.float()
        mean = embeddings.mean(0)
        deviations = (embeddings - mean) * (INIT_COVARIANCE_SCALE / len(embeddings)) ** 0.5
        coefficients = torch.randn(len(self.queries), len(embeddings), generator=generator).to(embeddings.device)
        self.queries.copy_(mean + coefficients @ deviations)
