"""UniWorld-V1's network: a frozen MLLM and SigLIP2, projected to the condition of a FLUX.

Lin et al. 2025, arXiv 2506.03147. The MLLM's last hidden states of all of a prompt's tokens are projected to FLUX's
text width; each input image's SigLIP2 features are inserted after its tokens, before the token that ends the image.
Time 0 is data, 1 is noise.

Axes: B samples, N tokens of a prompt, M tokens of a condition, D model (the MLLM's), C channels, P images, h w latent
grid, k images of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.denoisers.flux import FluxTransformer, flux_position_ids
from unimm.denoisers.mmdit import PATCH_SIZE, patchify_latents, unpatchify_latents
from unimm.generation.flow import add_noise
from unimm.generation.kv_cache import EMPTY_CACHE, KVCache
from unimm.generation.prefill import plan_prefill
from unimm.models.uniworld.auxiliary_encoders import AuxiliaryEncoders, require_part
from unimm.models.uniworld.config import UniWorldConfig
from unimm.nn.layers import MLP
from unimm.sequence.parts import Part
from unimm.vlms.llama_layout import EXPERT
from unimm.vlms.qwen2_5_vl.model import QwenVL


@dataclass(frozen=True)
class MLLMOutput:
    """The MLLM's output for a sample: hidden states after the final norm [N, D], and what decoding an answer begins
    with."""

    parts: Sequence[Part]
    hidden_states: Tensor
    cache: KVCache  # of all rows but the last
    last_id: int  # the id of the last row


class UniWorldNetwork(nn.Module):
    """An MLLM, three projectors, a FLUX denoiser, a head that routes requests, and the auxiliary encoders."""

    def __init__(self, config: UniWorldConfig):
        super().__init__()
        self.config = config
        self.mllm = QwenVL(config.mllm)
        self.denoiser = FluxTransformer(config.denoiser)
        self.auxiliary = AuxiliaryEncoders()
        mllm_dim = config.mllm.decoder.dim
        condition_dim = config.denoiser.text_dim
        self.mllm_projector = MLP(mllm_dim, config.mllm_projector_hidden, condition_dim, "silu")
        self.siglip_projector = MLP(config.siglip_dim, config.siglip_projector_hidden, condition_dim, "silu")
        self.vae_projector = MLP(config.denoiser.in_channels, config.vae_projector_hidden, condition_dim, "silu")
        self.task_head = MLP(mllm_dim, config.task_head_hidden, 2, "silu") if config.task_head_hidden else None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.mllm.dtype

    # ---- MLLM

    @torch.no_grad()
    def encode_prompts(
        self, samples: Sequence[Sequence[Part]], *, image_embeds_shortcut: float = 0.0
    ) -> list[MLLMOutput]:
        """The MLLM's output for samples of `processor`, in one forward.

        image_embeds_shortcut: weight in [0, 1] of the vision encoder's output, against the hidden states of its tokens.
        """
        mllm = self.mllm
        lengths = [sum(part.segment.length for part in parts) for parts in samples]
        plan = plan_prefill(mllm.decoder, [EMPTY_CACHE] * len(samples), samples)
        batch = plan.batch
        x = mllm.embed(batch)
        rows = {EXPERT: torch.arange(sum(lengths), device=mllm.device)}
        hidden = mllm.decoder(x, mllm.position_ids(batch), rows, plan.attend)[EXPERT]
        states = mllm.decoder.norms[EXPERT](hidden)
        if image_embeds_shortcut and batch.und_images:
            image_rows = batch.und_images.rows
            mixed = torch.lerp(states[image_rows], x[image_rows], image_embeds_shortcut)
            states = states.index_copy(0, image_rows, mixed)
        # the cache leaves out the last row, whose id decoding feeds first
        caches = [
            EMPTY_CACHE.appended(plan.buffer.copy_new_rows(i, length - 1), next_position - 1)
            for i, (length, next_position) in enumerate(zip(lengths, batch.layout.next_positions, strict=True))
        ]
        return [
            MLLMOutput(parts=parts, hidden_states=hidden_states, cache=cache, last_id=int(parts[-1].ids[-1]))
            for parts, hidden_states, cache in zip(samples, states.split(lengths), caches, strict=True)
        ]

    # ---- conditions

    def condition(
        self, samples: Sequence[Sequence[Part]], hidden_states: Sequence[Tensor], siglip_features: Tensor | None = None
    ) -> list[Tensor]:
        """The MLLM's hidden states of each sample [N, D] -> its condition [M, C].

        siglip_features [k, patches, C]: of all input images in order, each inserted after its image's tokens.
        """
        image_ends = [image_end_rows(parts) for parts in samples]
        return self.condition_at(image_ends, hidden_states, siglip_features)

    def condition_at(
        self, image_ends: Sequence[Sequence[int]], hidden_states: Sequence[Tensor], siglip_features: Tensor | None
    ) -> list[Tensor]:
        """`condition` of samples whose images end before these of their rows."""
        projected = self.mllm_projector(torch.cat(list(hidden_states))).split([len(one) for one in hidden_states])
        if siglip_features is None:
            return list(projected)
        features = iter(self.siglip_projector(siglip_features))
        conditions = []
        for ends, tokens in zip(image_ends, projected, strict=True):
            first, *others = tokens.tensor_split(list(ends))
            conditions.append(torch.cat([first, *(x for one in others for x in (next(features), one))]))
        return conditions

    def reference_condition(self, latents: Tensor) -> Tensor:
        """VAE latents of reference images [k, C, h, w] as condition tokens [M, C], at half their resolution."""
        return self.vae_projector(patchify_latents(F.avg_pool2d(latents, 2)).to(self.dtype)).flatten(0, 1)

    def clip_embedding(self, texts: Sequence[str], *, clip: bool | None = None) -> Tensor:
        """CLIP's pooled embedding of each text [B, C]; zeros where the model was trained without it, or `clip` is
        False."""
        if self.config.uses_clip if clip is None else clip:
            return self.auxiliary.encode_clip(texts)
        device = self.mllm_projector.fc1.weight.device
        return torch.zeros(len(texts), self.config.denoiser.pooled_dim, dtype=self.dtype, device=device)

    # ---- routing

    def task_head_logits(self, state: Tensor) -> Tensor:
        """The MLLM's state at the last "assistant" token [D] -> logits [2] of answering and of generating an image.

        An image is generated where the second is larger. Raises ValueError for a checkpoint without the head.
        """
        head = require_part(self.task_head, "task head", "a folder with task_head_final.pt or .safetensors")
        return head(state.to(next(head.parameters()).dtype))

    # ---- training

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
        """Conditions [M, C], noised latents [P, C, h, w], timesteps [P], CLIP's embeddings [P, C] -> velocity [P, C, h,
        w].

        reference_latents [P, C, k h, w]: concatenated below the noised ones.
        """
        h, w = noised.shape[2:]
        text, key_padding_mask = pad_conditions(conditions)
        latents = noised if reference_latents is None else torch.cat((noised, reference_latents.to(noised)), 2)
        position_ids = flux_position_ids(latents.shape[2] // PATCH_SIZE, w // PATCH_SIZE).to(text.device)
        condition = self.denoiser.condition(text, position_ids, key_padding_mask=key_padding_mask)
        scale = guidance if self.config.denoiser.guidance_embeds else None
        (modulation,) = self.denoiser.modulations(timesteps[None], pooled, guidance=scale)
        v = self.denoiser(patchify_latents(latents).to(text.dtype), condition, modulation)
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
        """The flow matching loss, squared error of each image's velocity [P]; weights [P, 1, h, w]: of each
        position."""
        noised = add_noise(latents.flatten(1), noise.flatten(1), timesteps).view_as(latents)
        v = self.velocity(
            conditions, noised, timesteps, pooled=pooled, guidance=guidance, reference_latents=reference_latents
        )
        squared_error = (v.float() - (noise - latents).float()).square()
        return (squared_error if weights is None else weights * squared_error).flatten(1).mean(1)


def image_end_rows(parts: Sequence[Part]) -> list[int]:
    """The rows of a sample that follow its images."""
    ends = accumulate(part.segment.length for part in parts)
    return [end for part, end in zip(parts, ends, strict=True) if part.kind == "und_image"]


def pad_conditions(conditions: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Conditions [M, C] padded to one batch [B, M, C], and its key padding mask [B, M] (True: no padding), None without
    any."""
    lengths = torch.tensor([len(one) for one in conditions])
    batch = nn.utils.rnn.pad_sequence(list(conditions), batch_first=True)
    if lengths.unique().numel() == 1:
        return batch, None
    return batch, (torch.arange(batch.shape[1]) < lengths[:, None]).to(batch.device)
