"""The floating-point operations that Janus and JanusFlow share: embedded texts, and images to understand."""

from torch import nn

from unimm.encoders.flops import timm_vit_flops
from unimm.models.common.deepseek_chat import DeepseekNetwork
from unimm.nn.flops import StepFlops
from unimm.sequence.packing import PackedBatch


def chat_rows_flops(count: StepFlops, network: DeepseekNetwork, aligner: nn.Module, pack: PackedBatch) -> bool:
    """Texts and images of a pack as rows of the decoder. Returns whether these have gradients."""
    carries = network.decoder.embed.weight.requires_grad
    if pack.und_images is None:
        return carries
    # features of a cache are not computed
    features = not pack.und_images.encoded and timm_vit_flops(count, network.vision, len(pack.und_images.lengths))
    return count.chain(sum(pack.und_images.lengths), features, aligner) or carries
