"""The floating-point operations of a training step of MetaQuery, counted as in unimm.nn.flops."""

from collections.abc import Sequence
from typing import cast

from unimm.denoisers.flops import sana_flops
from unimm.models.metaquery.connector import Connector, ConnectorBlock
from unimm.models.metaquery.network import MetaQueryNetwork
from unimm.models.metaquery.processor import QueryBatch
from unimm.nn.flops import StepFlops, attended_pairs, decoder_flops, is_trained, swiglu_flops
from unimm.tokenizers.flops import dc_ae_encode_flops
from unimm.vlms.flops import vlm_rows_flops
from unimm.vlms.llama_layout import EXPERT


def query_states_flops(count: StepFlops, network: MetaQueryNetwork, batch: QueryBatch) -> bool:
    """The MLLM's hidden states at the queries, over keys and values of the prompts. Returns whether they have
    gradients."""
    prompts = vlm_rows_flops(count, network.mllm, batch.prompts)
    rows = {EXPERT: len(batch.prompts.layout.position_ids)}
    pairs = batch.prompts.layout.mask.spans.n_visible_pairs
    # of the last hidden states of prompts nothing is used
    decoder_flops(count, network.decoder, rows, pairs, {EXPERT: prompts}, with_loss=())
    queries = network.queries.requires_grad or network.decoder.embed.weight.requires_grad
    rows = {EXPERT: len(batch.queries.layout.position_ids)}
    pairs = batch.queries.layout.mask.spans.n_visible_pairs
    return decoder_flops(count, network.decoder, rows, pairs, {EXPERT: queries}, prefix_carries=prompts)[EXPERT]


def metaquery_flops(
    network: MetaQueryNetwork,
    queries: QueryBatch | None,
    *,
    n_samples: int,
    n_images: int,
    latent_size: tuple[int, int],
    encodes: bool = True,
) -> StepFlops:
    """A step on samples with noised copies of their targets, n_images in all, whose latents have these sides.

    queries: the samples for the MLLM, None where a cache holds their states; encodes: whether targets are encoded.
    """
    count = StepFlops()
    if encodes:
        encoding = StepFlops()
        stride = network.config.vae.stride
        dc_ae_encode_flops(encoding, network.vae, n_samples, (latent_size[0] * stride, latent_size[1] * stride))
        count.add_forward(encoding)
    states = False
    if queries is not None:
        states = query_states_flops(count, network, queries) or is_trained(network.decoder.norms[EXPERT])
    n_queries = network.config.n_queries
    caption = connector_flops(count, network.connector, n_samples, n_queries, states)
    n_tokens = latent_size[0] * latent_size[1] // network.config.denoiser.patch_size**2
    sana_flops(count, network.denoiser, (n_samples, n_queries, n_images, n_tokens), caption=caption)
    return count


def connector_flops(count: StepFlops, connector: Connector, n_samples: int, n_queries: int, carries: bool) -> bool:
    """The condition of samples of so many queries each."""
    config = connector.config
    rows = n_samples * n_queries
    pairs = attended_pairs([n_queries] * n_samples)
    for block in cast("Sequence[ConnectorBlock]", connector.blocks):
        attention = block.attention
        v = count.chain(rows, carries or is_trained(block.attn_norm), attention.qkv)
        qk = v or attention.q_scale.requires_grad or attention.k_scale.requires_grad
        y = count.attention(pairs, config.dim // config.head_dim, config.head_dim, q=qk, k=qk, v=v)
        carries = count.chain(rows, y, attention.out_proj) or carries
        carries = swiglu_flops(count, block.mlp, rows, carries or is_trained(block.mlp_norm)) or carries
    return count.chain(rows, carries, connector.fc1, connector.fc2, connector.norm)
