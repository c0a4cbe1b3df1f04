"""Janus's network: a causal decoder between two encoders and two heads."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimm.encoders.timm_vit import TimmVisionEncoder
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.common.deepseek_network import DeepseekNetwork
from unimm.models.janus.config import EXPERT, JanusConfig, ProjectorConfig
from unimm.nn.decoder import Decoder, ExpertRouting, RowsByExpert
from unimm.nn.layers import MLP
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import IGNORE_INDEX, Part, image_part
from unimm.tokenizers.vq import VQModel


class Projector(nn.Module):
    """Features of an encoder to rows of the language model."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        dims = [config.dim_in] + [config.dim_out] * config.depth
        linears = [nn.Linear(a, b) for a, b in pairwise(dims)]
        self.layers = nn.Sequential(*[part for linear in linears for part in (linear, nn.GELU())][:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@dataclass(frozen=True)
class JanusLosses:
    """Cross entropy of every labelled row [n], and of every code that is drawn [m]."""

    text: Tensor
    image: Tensor


class JanusNetwork(DeepseekNetwork):
    """A decoder, a tower to look with, a VQ tokenizer to draw with, and an aligner for each."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.config = config
        d, codes = config.decoder.dim, config.vq.n_codes
        self.decoder = Decoder(config.decoder)
        self.vision, self.aligner = TimmVisionEncoder(config.vision), Projector(config.aligner)
        if (width := self.vision.trunk.num_features) != config.aligner.dim_in:
            raise ValueError(
                f"got an aligner_config with input_dim {config.aligner.dim_in} for {config.vision.model_name}: expected {width}, its width"
            )
        self.vq = VQModel(config.vq)
        self.gen_embed, self.gen_aligner = nn.Embedding(codes, config.vq.code_dim), Projector(config.gen_aligner)
        self.gen_head = MLP(d, config.gen_head_dim, codes, "gelu")

    def embed(self, batch: PackedBatch) -> Tensor:
        """Every row of a pack, in its order [N, D]: texts and markers, pictures seen, codes drawn."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.und_images:
            parts["look"], rows["look"] = self.aligner(self.image_features(batch.und_images)), batch.und_images.rows
        if batch.gen_images:
            parts["draw"], rows["draw"] = self.embed_image_tokens(batch.gen_images.content), batch.gen_images.rows
        return ExpertRouting(rows).join(parts)

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """Codes [n] as rows of the language model [n, D]."""
        return self.gen_aligner(self.gen_embed(tokens))

    def backbone(self, batch: PackedBatch, attend: Any) -> RowsByExpert:
        """Last hidden states of a pack's rows, before the final norm."""
        positions = batch.layout.position_ids
        return self.decoder(self.embed(batch), positions, {EXPERT: torch.arange(len(positions))}, attend)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [n, D] -> the next code [n, V]."""
        return self.gen_head(self.decoder.norms[EXPERT](hidden))

    def forward(self, batch: PackedBatch) -> JanusLosses:
        """Training: next-id loss at the labelled rows; each code of a drawn picture is predicted by the row before it."""
        hidden = self.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[EXPERT]
        at = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        said = self.decoder.norms[EXPERT](hidden[batch.id_rows[at]])
        text = linear_cross_entropy(said, self.decoder.head.weight, batch.labels[at])
        if batch.gen_images is None:
            return JanusLosses(text, text.new_zeros(0))
        logits = self.image_logits(hidden[batch.gen_images.rows - 1])
        return JanusLosses(text, F.cross_entropy(logits.float(), batch.gen_images.content, reduction="none"))

    def image_token_part(self, tokens: Tensor, boi: int) -> Part:
        """A picture to draw, codes [n], behind its marker."""
        return image_part("gen_image", tokens, torch.arange(len(tokens)), boundary_ids=(boi,), causal=True)
