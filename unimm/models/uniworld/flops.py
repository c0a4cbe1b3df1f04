"""The floating-point operations of a training step of UniWorld, counted as in unimm.nn.flops."""

from collections.abc import Sequence
from dataclasses import dataclass

from unimm.denoisers.flops import MMDiTRows, flux_flops
from unimm.denoisers.mmdit import PATCH_SIZE
from unimm.encoders.flops import clip_text_flops, siglip_flops
from unimm.models.uniworld.network import UniWorldNetwork
from unimm.nn.flops import StepFlops, count_by_size, is_trained
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import Part
from unimm.tokenizers.flops import kl_encode_flops
from unimm.vlms.flops import vlm_states_flops
from unimm.vlms.llama_layout import EXPERT


@dataclass(frozen=True, kw_only=True)
class UniWorldEncoding:
    """What is encoded in a step: prompts, images for SigLIP2, (height, width) of images for the VAE."""

    prompts: Sequence[Sequence[Part]]
    n_siglip_images: int
    vae_image_sizes: Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class DenoisedGroup:
    """Noised images that FLUX takes at once: latents of (height, width), and the rows of each one's condition."""

    latent_size: tuple[int, int]
    condition_lengths: Sequence[int]

    @property
    def rows(self) -> MMDiTRows:
        """The rows of its step."""
        n_tokens = self.latent_size[0] * self.latent_size[1] // PATCH_SIZE**2
        return MMDiTRows(n_image_tokens=n_tokens, condition_lengths=self.condition_lengths)


def uniworld_flops(
    network: UniWorldNetwork,
    encoding: UniWorldEncoding | None,
    groups: Sequence[DenoisedGroup],
    *,
    n_mllm_rows: int,
    n_siglip_images: int,
) -> StepFlops:
    """A step on samples whose conditions have n_mllm_rows rows of the MLLM, and so many images' features, in all.

    encoding: None where a cache holds what is encoded.
    """
    count = StepFlops()
    states, siglip = (False, False) if encoding is None else _encoding_flops(count, network, encoding)
    text = count.chain(n_mllm_rows, states, network.mllm_projector)
    if n_siglip_images:
        assert network.auxiliary.siglip is not None, "which made the features"
        rows = n_siglip_images * network.auxiliary.siglip.config.grid_side**2
        text |= count.chain(rows, siglip, network.siglip_projector)
    for group in groups:
        if network.config.uses_clip and network.auxiliary.clip is not None:
            pooled = StepFlops()
            clip_text_flops(pooled, network.auxiliary.clip, 1, network.auxiliary.clip.config.max_positions)
            count.add_forward(pooled)
        flux_flops(count, network.denoiser, group.rows, text=text)
    return count


def _encoding_flops(count: StepFlops, network: UniWorldNetwork, encoding: UniWorldEncoding) -> tuple[bool, bool]:
    """Whether the MLLM's hidden states, and SigLIP2's features, have gradients."""
    states = vlm_states_flops(count, network.mllm, pack_sequences(encoding.prompts))
    states |= is_trained(network.mllm.decoder.norms[EXPERT])
    frozen = StepFlops()
    for size, n in count_by_size(encoding.vae_image_sizes):
        kl_encode_flops(frozen, network.auxiliary.required_vae, n, size)
    count.add_forward(frozen)
    siglip = network.auxiliary.siglip
    features = siglip is not None and siglip_flops(count, siglip, encoding.n_siglip_images)
    return states, features
