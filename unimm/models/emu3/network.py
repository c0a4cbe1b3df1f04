"""Emu3's network: a causal decoder over one vocabulary of text and of the codes of images.

Everything is predicted from left to right, the rows of an image too. Wang et al. 2024, arXiv 2409.18869, section 2.

Axes: N packed rows, n rows that are asked for, D model, V vocabulary, C codes.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from unimm.generation.causal_lm import CausalLM
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.emu3.config import Emu3Config
from unimm.nn.decoder import AttentionFn, Decoder, RowsByExpert
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.emu3_vq import Emu3VQModel
from unimm.vlms.llama_layout import EXPERT

# the released limit is one of training: images to understand take more, and angles are computed for any position
MAX_POSITIONS = 2**31 - 1


class SplitHead(nn.Module):
    """A language head in two parts, so that the logits of the codes alone can be asked for."""

    def __init__(self, dim: int, n_text: int, n_codes: int) -> None:
        super().__init__()
        self.text = nn.Linear(dim, n_text, bias=False)
        self.visual = nn.Linear(dim, n_codes, bias=False)

    @property
    def weight(self) -> Tensor:
        """[V, D], a copy."""
        return torch.cat((self.text.weight, self.visual.weight))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, D] -> logits [n, V]"""
        return torch.cat((self.text(x), self.visual(x)), -1)


class Emu3Network(CausalLM):
    """A decoder with a head in two parts; the vision tokenizer, where it is there."""

    decoder: Decoder
    vq: Emu3VQModel | None

    def __init__(self, config: Emu3Config) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(replace(config.decoder, max_positions=MAX_POSITIONS))
        head = SplitHead(config.decoder.dim, config.special_tokens.code0, config.n_codes)
        self.decoder.head = head  # type: ignore[assignment]
        self.vq = None if config.vision_tokenizer is None else Emu3VQModel(config.vision_tokenizer)

    @property
    def vision_tokenizer(self) -> Emu3VQModel:
        """The vision tokenizer. Raises ValueError where the model was loaded without it."""
        if self.vq is None:
            raise ValueError(
                "this checkpoint was loaded without its vision tokenizer: give from_pretrained "
                'components={"vision_tokenizer": "BAAI/Emu3-VisionTokenizer"}, or put that folder below the '
                "checkpoint's as vision_tokenizer"
            )
        return self.vq

    def backbone(self, batch: PackedBatch, attend: AttentionFn) -> RowsByExpert:
        """The last hidden states of every row of a batch [N, D], before the final norm."""
        position_ids = batch.layout.position_ids
        rows = {EXPERT: torch.arange(len(position_ids))}
        return self.decoder(self.decoder.embed(batch.ids), position_ids, rows, attend)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [n, D] -> the logits of the codes [n, C], where nothing else may follow."""
        head: SplitHead = self.decoder.head  # type: ignore[assignment]
        return head.visual(self.decoder.norms[EXPERT](hidden))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Training: the next-id loss of the labelled rows, in order [n]."""
        mask = batch.layout.mask
        dropout = self.config.decoder.dropout if self.training else 0.0
        (hidden,) = self.backbone(batch, lambda layer, q, k, v: attention(q, k, v, mask, dropout=dropout)).values()
        labelled = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        states = self.decoder.norms[EXPERT](hidden[batch.id_rows[labelled]])
        return linear_cross_entropy(states, self.decoder.head.weight, batch.labels[labelled])
