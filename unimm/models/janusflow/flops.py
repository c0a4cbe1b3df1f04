"""The floating-point operations of a training step of JanusFlow, counted as in unimm.nn.flops."""

from collections.abc import Sequence
from typing import cast

from unimm.models.common.deepseek_flops import chat_rows_flops
from unimm.models.janusflow.network import JanusFlowNetwork
from unimm.models.janusflow.uvit import UPSAMPLE_FACTOR, ConvNeXtBlock, ConvNeXtStack
from unimm.nn.flops import StepFlops, count_by_size, decoder_flops, head_flops, is_trained
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.flops import kl_encode_flops
from unimm.vlms.llama_layout import EXPERT


def janusflow_flops(
    network: JanusFlowNetwork, pack: PackedBatch, vae_image_sizes: Sequence[tuple[int, int]]
) -> StepFlops:
    """A step on a pack. vae_image_sizes: (height, width) in pixels of each image that the VAE encodes."""
    count = StepFlops()
    encoding = StepFlops()
    if network.vae is not None:
        for size, n in count_by_size(vae_image_sizes):
            kl_encode_flops(encoding, network.vae, n, size)
    count.add_forward(encoding)
    carries = chat_rows_flops(count, network, network.aligner, pack)
    carries |= pack.und_images is not None and network.und_start_embed.requires_grad
    lengths = () if pack.gen_images is None else pack.gen_images.lengths
    time, skip = _uvit_encoder_flops(count, network, lengths) if lengths else (False, False)
    rows = {EXPERT: len(pack.layout.position_ids)}
    pairs = pack.layout.mask.spans.n_visible_pairs
    tokens = count.chain(sum(lengths), skip, network.gen_encoder_aligner) if lengths else False
    flags = {EXPERT: carries or time or tokens}
    hidden = decoder_flops(count, network.decoder, rows, pairs, flags)[EXPERT]
    head_flops(count, network.decoder, int((pack.labels != IGNORE_INDEX).sum()), hidden)
    if lengths:
        _uvit_decoder_flops(count, network, lengths, time=time, skip=skip, hidden=hidden)
    return count


def _uvit_encoder_flops(count: StepFlops, network: JanusFlowNetwork, lengths: Sequence[int]) -> tuple[bool, bool]:
    """Whether the embedded times, and the tokens of the noised latents, have gradients. lengths: tokens an image."""
    encoder = network.gen_encoder
    time = count.chain(len(lengths), False, encoder.time_embed)
    x = count.chain(sum(lengths), False, encoder.in_conv)
    return time, _convnext_flops(count, encoder.mid_block, lengths, x, time)


def _uvit_decoder_flops(
    count: StepFlops, network: JanusFlowNetwork, lengths: Sequence[int], *, time: bool, skip: bool, hidden: bool
) -> None:
    decoder = network.gen_decoder
    n = sum(lengths)
    states = hidden or is_trained(network.decoder.norms[EXPERT], network.gen_decoder_norm)
    aligned = count.chain(n, states, network.gen_decoder_aligner)
    x = aligned or skip or is_trained(decoder.input_norm)
    x = _convnext_flops(count, decoder.mid_block, lengths, x, time)
    for out_conv in decoder.out_convs:
        x = count.chain(n, x, out_conv)
        n *= UPSAMPLE_FACTOR**2


def _convnext_flops(count: StepFlops, stack: ConvNeXtStack, lengths: Sequence[int], x: bool, time: bool) -> bool:
    n = sum(lengths)
    for block in cast("Sequence[ConvNeXtBlock]", stack.res_blocks):
        layers = (block.depthwise, block.norm, block.channelwise_linear_1, block.channelwise_norm)
        x = count.chain(n, x, *layers, block.channelwise_linear_2) or x
        x = count.chain(len(lengths), time, block.cond_embeds_mapper) or x
    return x
