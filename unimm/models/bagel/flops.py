"""The floating-point operations of a training step of BAGEL, counted as in unimm.nn.flops."""

from collections.abc import Sequence

from unimm.encoders.flops import navit_flops
from unimm.models.bagel.network import BagelNetwork
from unimm.nn.flops import StepFlops, count_by_size, decoder_flops, head_flops, is_trained
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.flops import kl_encode_flops


def bagel_flops(network: BagelNetwork, pack: PackedBatch, vae_image_sizes: Sequence[tuple[int, int]]) -> StepFlops:
    """A step on a pack. vae_image_sizes: (height, width) in pixels of each image that the VAE encodes."""
    count = StepFlops()
    encoding = StepFlops()
    for size, n in count_by_size(vae_image_sizes):
        kl_encode_flops(encoding, network.vae, n, size)
    count.add_forward(encoding)
    carries = {"und": network.decoder.embed.weight.requires_grad, "gen": False}
    if pack.und_images is not None:
        features = navit_flops(count, network.vision, pack.und_images.lengths)
        carries["und"] |= count.chain(sum(pack.und_images.lengths), features, network.connector)
    n_latents = 0 if pack.gen_images is None else len(pack.gen_images.rows)
    if n_latents:
        carries["gen"] |= any(count.side_by_side(n_latents, False, network.vae2llm, network.time_embedder))
    rows = {name: len(rows) for name, rows in pack.rows_by_expert.items()}
    n_labels = int((pack.labels != IGNORE_INDEX).sum())
    n_noised = int(pack.noised.sum())
    with_loss = [name for name, n in (("und", n_labels), ("gen", n_noised)) if n]
    pairs = pack.layout.mask.spans.n_visible_pairs
    carries |= decoder_flops(count, network.decoder, rows, pairs, carries, with_loss=with_loss)
    if n_labels:
        head_flops(count, network.decoder, n_labels, carries["und"])
    if n_noised:
        count.chain(n_noised, carries["gen"] or is_trained(network.decoder.norms["gen"]), network.llm2vae)
    return count
