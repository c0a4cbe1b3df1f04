"""The floating-point operations of a training step of Emu3, counted as in unimm.nn.flops."""

from collections.abc import Sequence

from unimm.models.emu3.network import Emu3Network
from unimm.nn.flops import StepFlops, count_by_size, decoder_flops, is_trained
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.flops import emu3_vq_encode_flops
from unimm.vlms.llama_layout import EXPERT


def emu3_flops(network: Emu3Network, pack: PackedBatch, image_sizes: Sequence[tuple[int, int]]) -> StepFlops:
    """A step on a pack. image_sizes: (height, width) in pixels of each image that is encoded."""
    count = StepFlops()
    encoding = StepFlops()
    for size, n in count_by_size(image_sizes):
        emu3_vq_encode_flops(encoding, network.vision_tokenizer, n, size)
    count.add_forward(encoding)
    rows = {EXPERT: len(pack.layout.position_ids)}
    pairs = pack.layout.mask.spans.n_visible_pairs
    carries = {EXPERT: network.decoder.embed.weight.requires_grad}
    found = decoder_flops(count, network.decoder, rows, pairs, carries)[EXPERT]
    n = int((pack.labels != IGNORE_INDEX).sum())
    count.side_by_side(n, found or is_trained(network.decoder.norms[EXPERT]), network.decoder.head)
    return count
