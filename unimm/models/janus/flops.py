"""The floating-point operations of a training step of Janus, counted as in unimm.nn.flops."""

from collections.abc import Sequence

from unimm.models.common.deepseek_flops import chat_rows_flops
from unimm.models.janus.network import JanusNetwork
from unimm.nn.flops import StepFlops, count_by_size, decoder_flops, head_flops, is_trained
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.flops import vq_encode_flops
from unimm.vlms.llama_layout import EXPERT


def janus_flops(network: JanusNetwork, pack: PackedBatch, vq_image_sizes: Sequence[tuple[int, int]]) -> StepFlops:
    """A step on a pack. vq_image_sizes: (height, width) in pixels of each image that the VQ tokenizer encodes."""
    count = StepFlops()
    encoding = StepFlops()
    for size, n in count_by_size(vq_image_sizes):
        vq_encode_flops(encoding, network.vq, n, size)
    count.add_forward(encoding)
    carries = chat_rows_flops(count, network, network.aligner, pack)
    n_codes = 0 if pack.gen_images is None else len(pack.gen_images.rows)
    if n_codes:
        carries |= count.chain(n_codes, network.gen_embed.weight.requires_grad, network.gen_aligner)
    rows = {EXPERT: len(pack.layout.position_ids)}
    pairs = pack.layout.mask.spans.n_visible_pairs
    carries = decoder_flops(count, network.decoder, rows, pairs, {EXPERT: carries})[EXPERT]
    head_flops(count, network.decoder, int((pack.labels != IGNORE_INDEX).sum()), carries)
    count.chain(n_codes, carries or is_trained(network.decoder.norms[EXPERT]), network.gen_head)
    return count
