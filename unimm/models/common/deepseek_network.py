"""The half of a network that Janus and JanusFlow share: a decoder, and a tower to look with."""

from einops import rearrange
from torch import Tensor

from unimm.encoders.timm_vit import TimmVisionEncoder
from unimm.generation.causal_lm import CausalLM
from unimm.sequence.packing import ImageTokens


class DeepseekNetwork(CausalLM):
    """A decoder that is shown pictures through a tower."""

    vision: TimmVisionEncoder

    def image_features(self, tokens: ImageTokens) -> Tensor:
        """Pictures of a pack -> the tower's features [n, D of the tower]."""
        p, side = self.vision.patch_size, self.vision.grid_side
        images = rearrange(tokens.content, "(b h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)
        return self.vision(images.to(self.dtype)).flatten(0, 1)
