"""Show-o's network: one transformer over text and image tokens of one table.

Text is predicted from left to right, the tokens of an image in place, from those that are not masked: text attends
causally, an image to itself in both directions. Images are understood as the same tokens, or by CLIP's features and a
projector. Xie et al. 2024, arXiv 2408.12528, section 3.

Axes: N packed rows, n image tokens, D model, V vocabulary, F features of CLIP.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from unimm.encoders.clip_vision import CLIPVisionEncoder
from unimm.generation.causal_lm import CausalLM
from unimm.kernels import attention
from unimm.models.show_o import CLIP_HUB_ID, VQ_HUB_ID
from unimm.models.show_o.config import ShowOConfig
from unimm.models.show_o.phi import PhiDecoder
from unimm.nn.decoder import AttentionFn, ExpertRouting, RowsByExpert
from unimm.nn.layers import MLP
from unimm.sequence.packing import ImageTokens, PackedBatch
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.magvit_v2 import MagvitV2
from unimm.vlms.llama_layout import EXPERT


@dataclass(frozen=True)
class ShowOLosses:
    """Cross entropy of every labelled text row [n], and of every labelled row of images that are generated [n]."""

    text: Tensor
    image: Tensor


class ShowONetwork(CausalLM):
    """A decoder over text and image tokens; beside it the image tokenizer and CLIP, from repositories of their own."""

    decoder: PhiDecoder

    def __init__(self, config: ShowOConfig):
        super().__init__()
        self.config = config
        dim = config.decoder.dim
        self.decoder = PhiDecoder(config.decoder)
        self.projector = MLP(config.clip_dim, dim, dim, "gelu") if config.with_clip else None
        self.vq: MagvitV2 | None = None
        self.clip: CLIPVisionEncoder | None = None

    @property
    def required_vq(self) -> MagvitV2:
        """The image tokenizer. Raises ValueError where it was not found."""
        if self.vq is None:
            raise ValueError(
                "this checkpoint was loaded without its image tokenizer: give from_pretrained "
                f'components={{"vq": "{VQ_HUB_ID}"}}'
            )
        return self.vq

    @property
    def required_clip(self) -> CLIPVisionEncoder:
        """CLIP. Raises ValueError where it was not found."""
        if self.clip is None:
            raise ValueError(
                "this checkpoint understands images by CLIP, and was loaded without it: give from_pretrained "
                f'components={{"clip": "{CLIP_HUB_ID}"}}'
            )
        return self.clip

    # ---- from parts to rows of the decoder

    def embed(self, batch: PackedBatch) -> Tensor:
        """The embeddings of every row of a batch, in order [N, D]: text, images to understand, images to generate."""
        embeds = {"text": self.decoder.embed(batch.ids)}
        rows = {"text": batch.id_rows}
        if batch.und_images:
            embeds["und_image"] = self.embed_und_images(batch.und_images)
            rows["und_image"] = batch.und_images.rows
        if batch.gen_images:
            embeds["gen_image"] = self.embed_image_tokens(batch.gen_images.content)
            rows["gen_image"] = batch.gen_images.rows
        return ExpertRouting(rows).join(embeds)

    def embed_image_tokens(self, tokens: Tensor) -> Tensor:
        """Image tokens [n], of which `n_codes` is a masked one, as rows of the decoder [n, D]."""
        return self.decoder.embed(tokens + self.config.first_code_id)

    def embed_und_images(self, images: ImageTokens) -> Tensor:
        """The rows of images to understand [n, D]."""
        if self.projector is not None:
            return self.projector(self.clip_features(images))
        return self.embed_image_tokens(self.encode_image_tokens(images))

    def clip_features(self, images: ImageTokens) -> Tensor:
        """CLIP's features of a batch's images [n, F]; it is never trained."""
        if images.encoded:
            return images.content.to(self.dtype)
        clip = self.required_clip
        with torch.no_grad():
            pixels = _unpatchify(images.content, clip.config.grid_side, clip.config.patch_size)
            return clip(pixels.to(clip.pos_embed.dtype)).flatten(0, 1).to(self.dtype)

    def encode_image_tokens(self, images: ImageTokens) -> Tensor:
        """The image tokens [n] of a batch's images; the image tokenizer is never trained along."""
        if images.encoded:
            return images.content
        vq = self.required_vq
        side = self.config.token_grid[0]
        with torch.no_grad():
            pixels = _unpatchify(images.content, side, vq.config.stride)
            return vq.encode_ids(pixels.to(vq.encoder.conv_in.weight.dtype)).flatten()

    # ---- the decoder and its heads

    def backbone(self, batch: PackedBatch, attend: AttentionFn) -> RowsByExpert:
        """The last hidden states of every row of a batch [N, D], before the final norm."""
        position_ids = batch.layout.position_ids
        return self.decoder(self.embed(batch), position_ids, {EXPERT: torch.arange(len(position_ids))}, attend)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states at image tokens [n, D] -> the logits of these tokens themselves [n, V], of codes alone."""
        first = self.config.first_code_id
        return self.decoder.logits_between(hidden, first, first + self.config.n_codes)

    def forward(self, batch: PackedBatch, image_labels: Tensor | None = None) -> ShowOLosses:
        """Training: next-id loss of the labelled text rows, and the loss of labelled rows of images in place.

        image_labels [n]: of the tokens of images to generate, the right ones where they are masked, IGNORE_INDEX
        elsewhere. As released, the ids before and behind each image are predicted in place, too, and all of the
        vocabulary competes.
        """
        hidden = self.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[EXPERT]
        labelled = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        text = self._row_losses(hidden, batch.id_rows[labelled], batch.labels[labelled])
        if batch.gen_images is None or image_labels is None:
            return ShowOLosses(text, text.new_zeros(0))
        rows, labels = self.image_targets(batch.gen_images, image_labels)
        return ShowOLosses(text, self._row_losses(hidden, rows, labels))

    def image_targets(self, images: ImageTokens, image_labels: Tensor) -> tuple[Tensor, Tensor]:
        """The rows [n] of images to generate that carry loss, and the ids that they hold, or are to be given."""
        masked = image_labels != IGNORE_INDEX
        ends = torch.tensor(images.lengths, device=images.rows.device).cumsum(0)
        first = images.rows[torch.cat((ends.new_zeros(1), ends[:-1]))]
        last = images.rows[ends - 1]
        special = self.config.special_tokens
        rows = torch.cat((images.rows[masked], first - 1, last + 1))
        labels = (image_labels[masked] + self.config.first_code_id, first * 0 + special.soi, last * 0 + special.eoi)
        return rows, torch.cat(labels)

    def _row_losses(self, hidden: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy [n] of rows of the hidden states [N, D] against ids."""
        # not `linear_cross_entropy`: this head has a bias
        return F.cross_entropy(self.decoder.logits(hidden[rows]).float(), labels, reduction="none")


def _unpatchify(patches: Tensor, side: int, p: int) -> Tensor:
    """Patches [n, p*p*3] of square images of `side` patches -> images [B, 3, S, S]."""
    return rearrange(patches, "(b h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)
