"""UniWorld's network: a reader, what leads from it and from SigLIP2 to FLUX, and FLUX."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.denoisers.flux import FluxTransformer, flux_position_ids
from unimm.denoisers.mmdit import PATCH_SIZE, patchify_latents, unpatchify_latents
from unimm.generation.flow import add_noise
from unimm.models.uniworld.auxiliary_encoders import AuxiliaryEncoders
from unimm.models.uniworld.config import UniWorldConfig
from unimm.nn.layers import MLP
from unimm.sequence.parts import Part
from unimm.vlms.qwen2_5_vl.model import QwenVL


class UniWorldNetwork(nn.Module):
    """A reader, a painter, what leads from one to the other, and the parts that lie apart."""

    def __init__(self, config: UniWorldConfig):
        super().__init__()
        self.config = config
        self.mllm, self.denoiser, self.auxiliary = (
            QwenVL(config.mllm),
            FluxTransformer(config.denoiser),
            AuxiliaryEncoders(),
        )
        condition_dim = config.denoiser.text_dim
        self.mllm_projector = MLP(config.mllm.decoder.dim, config.mllm_projector_hidden, condition_dim, "silu")
        self.siglip_projector = MLP(config.siglip_dim, config.siglip_projector_hidden, condition_dim, "silu")
        self.vae_projector = MLP(config.denoiser.in_channels, config.vae_projector_hidden, condition_dim, "silu")
        self.task_head = (
            MLP(config.mllm.decoder.dim, config.task_head_hidden, 2, "silu") if config.task_head_hidden else None
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.mllm.dtype

    def condition(
        self, samples: Sequence[Sequence[Part]], hidden_states: Sequence[Tensor], siglip_features: Tensor | None = None
    ) -> list[Tensor]:
        """What the painter is told of each sample [m, C], of what was read of it [n, D].

        looks [k, patches, C]: features of all pictures, in order, each put between its cells and the marker behind them.
        """
        projected = self.mllm_projector(torch.cat(list(hidden_states))).split([len(one) for one in hidden_states])
        features = iter(()) if siglip_features is None else iter(self.siglip_projector(siglip_features))
        conditions = []
        for items, tokens in zip(samples, projected, strict=True):
            pieces = []
            for item, rows in zip(items, tokens.split([one.segment.length for one in items]), strict=True):
                pieces += [rows, next(features)] if item.kind == "und_image" and siglip_features is not None else [rows]
            conditions.append(torch.cat(pieces))
        return conditions

    def clip_embedding(self, texts: Sequence[str], *, clip: bool | None = None) -> Tensor:
        """CLIP's vector of each text [B, C]; zeros where the model was trained without, or `clip` is False."""
        if self.config.uses_clip if clip is None else clip:
            return self.auxiliary.encode_clip(texts)
        return torch.zeros(
            len(texts), self.config.denoiser.pooled_dim, dtype=self.dtype, device=self.mllm_projector.fc1.weight.device
        )

    def reference_condition(self, latents: Tensor) -> Tensor:
        """Latents of references [k, C, h, w] as what the painter is told [m, C]: half as fine, projected."""
        return self.vae_projector(patchify_latents(F.avg_pool2d(latents, 2)).to(self.dtype)).flatten(0, 1)

    def velocity(
        self,
        conditions: Sequence[Tensor],
        noised: Tensor,
        timesteps: Tensor,
        *,
        pooled: Tensor,
        guidance: float | Tensor,
        reference_latents: Tensor | None = None,
    ) -> Tensor:
        """Training: told [m, C] of each sample, noised latents [B, C, h, w], times [B] -> velocity [B, C, h, w].

        references [B, C, k h, w]: latents that stand below those drawn.
        """
        h, w = noised.shape[2:]
        text, seen = pad_conditions(conditions)
        with_references = noised if reference_latents is None else torch.cat((noised, reference_latents.to(noised)), 2)
        condition = self.denoiser.condition(
            text,
            flux_position_ids(with_references.shape[2] // PATCH_SIZE, w // PATCH_SIZE).to(text.device),
            key_padding_mask=seen,
        )
        (modulation,) = self.denoiser.modulations(
            timesteps[None], pooled, guidance=guidance if self.config.denoiser.guidance_embeds else None
        )
        v = self.denoiser(patchify_latents(with_references).to(text.dtype), condition, modulation)
        return unpatchify_latents(v[:, : h * w // PATCH_SIZE**2], height=h, width=w)

    def forward(
        self,
        conditions: Sequence[Tensor],
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        pooled: Tensor,
        weights: Tensor | None = None,
        guidance: float = 1.0,
        reference_latents: Tensor | None = None,
    ) -> Tensor:
        """Training: the squared error of the velocity of each picture [B]; weights [B, 1, h, w]: of its places."""
        noised = add_noise(latents.flatten(1), noise.flatten(1), timesteps).view_as(latents)
        v = self.velocity(
            conditions, noised, timesteps, pooled=pooled, guidance=guidance, reference_latents=reference_latents
        )
        squared_error = (v.float() - (noise - latents).float()).square()
        return (squared_error if weights is None else weights * squared_error).flatten(1).mean(1)


def pad_conditions(conditions: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """What samples are told [m, C] as one batch [B, M, C], and which of it is no padding [B, M]; None where all is."""
    lengths = torch.tensor([len(one) for one in conditions])
    batch = nn.utils.rnn.pad_sequence(list(conditions), batch_first=True)
    if lengths.unique().numel() == 1:
        return batch, None
    return batch, (torch.arange(batch.shape[1]) < lengths[:, None]).to(batch.device)
