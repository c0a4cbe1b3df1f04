"""Janus's network: a causal decoder between two encoders and two heads.

Images are understood through a SigLIP encoder and an aligner; they are generated as the tokens of a VQ tokenizer, one
after the other, each fed back through an embedding and an aligner of its own. Everything is causal. arXiv 2410.13848,
section 3.

Axes: N packed rows, n image tokens, D model, V vocabulary (of image tokens), F features of the vision encoder.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.encoders.timm_vit import TimmVisionEncoder
from unimm.kernels import attention
from unimm.models.common.deepseek_chat import DeepseekNetwork
from unimm.models.janus.config import JanusConfig, ProjectorConfig
from unimm.nn.decoder import AttentionFn, Decoder, ExpertRouting, RowsByExpert
from unimm.nn.layers import MLP
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import Part, image_part
from unimm.tokenizers.vq import VQModel
from unimm.vlms.llama_layout import EXPERT


class Projector(nn.Module):
    """Features of an encoder to rows of the language model: linears with GELU between them."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        dims = [config.dim_in] + [config.dim_out] * config.depth
        layers: list[nn.Module] = []
        for dim_in, dim_out in pairwise(dims):
            layers += [nn.GELU()] if layers else []
            layers += [nn.Linear(dim_in, dim_out)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., F] -> [..., D]."""
        return self.layers(x)


@dataclass(frozen=True)
class JanusLosses:
    """Cross entropy of every labelled text row [n], and of every image token [n]."""

    text: Tensor
    image: Tensor


class JanusNetwork(DeepseekNetwork):
    """A decoder; a vision encoder with its aligner; a VQ tokenizer with embedding, aligner and head."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.config = config
        dim = config.decoder.dim
        n_codes = config.vq.n_codes
        self.decoder = Decoder(config.decoder)
        self.vision = TimmVisionEncoder(config.vision)
        self.aligner = Projector(config.aligner)
        if (width := self.vision.trunk.num_features) != config.aligner.dim_in:
            raise ValueError(
                f"got an aligner_config with input_dim {config.aligner.dim_in} for {config.vision.model_name}: "
                "expected "
                f"{width}, its width"
            )
        self.vq = VQModel(config.vq)
        self.gen_embed = nn.Embedding(n_codes, config.vq.code_dim)
        self.gen_aligner = Projector(config.gen_aligner)
        self.gen_head = MLP(dim, config.gen_head_dim, n_codes, "gelu")

    def embed(self, batch: PackedBatch) -> Tensor:
        """The embeddings of every row of a batch, in order [N, D]: text, images to understand, images to generate."""
        embeds = {"text": self.decoder.embed(batch.ids)}
        rows = {"text": batch.id_rows}
        if batch.und_images:
            embeds["und_image"] = self.aligner(self.image_features(batch.und_images))
            rows["und_image"] = batch.und_images.rows
        if batch.gen_images:
            embeds["gen_image"] = self.embed_image_tokens(batch.gen_images.content)
            rows["gen_image"] = batch.gen_images.rows
        return ExpertRouting(rows).join(embeds)

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """Image tokens [n] as rows of the language model [n, D]."""
        return self.gen_aligner(self.gen_embed(tokens))

    def backbone(self, batch: PackedBatch, attend: AttentionFn) -> RowsByExpert:
        """The last hidden states of every row of a batch [N, D], before the final norm."""
        position_ids = batch.layout.position_ids
        return self.decoder(self.embed(batch), position_ids, {EXPERT: torch.arange(len(position_ids))}, attend)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [n, D] -> the logits of the next image tokens [n, V]."""
        return self.gen_head(self.decoder.norms[EXPERT](hidden))

    def forward(self, batch: PackedBatch) -> JanusLosses:
        """Training: next-id loss of the labelled rows; each image token is predicted from the row before it."""
        hidden = self.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[EXPERT]
        text = self.text_loss(batch, hidden)
        if batch.gen_images is None:
            return JanusLosses(text, text.new_zeros(0))
        logits = self.image_logits(hidden[batch.gen_images.rows - 1])
        return JanusLosses(text, F.cross_entropy(logits.float(), batch.gen_images.content, reduction="none"))

    def image_token_part(self, tokens: Tensor, boi: int) -> Part:
        """The tokens [n] of an image to generate, behind the id that begins it."""
        return image_part("gen_image", tokens, torch.arange(len(tokens)), boundary_ids=(boi,), causal=True)
