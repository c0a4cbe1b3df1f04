"""The state of images while their masked tokens are decoded: cached prompts, and the rows that every step overwrites.

Axes: B branches (with guidance two for an image), n tokens of an image, D model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimm.generation.kv_cache import KVCache, allocate_kv_buffer
from unimm.models.show_o.config import ShowOConfig
from unimm.models.show_o.phi import PhiDecoder
from unimm.sequence.segments import Segment, build_layout
from unimm.vlms.llama_layout import EXPERT


class MaskedImageSession:
    """Images behind the KV caches of their prompts, a branch each: a prompt is read once, an image at every step.

    No text attends to an image, so the caches stay right while the tokens change.
    """

    def __init__(self, decoder: PhiDecoder, config: ShowOConfig, caches: Sequence[KVCache], n_tokens: int):
        device = decoder.embed.weight.device
        special = config.special_tokens
        n_rows = n_tokens + 2
        self.decoder = decoder
        self.first_code_id = config.first_code_id
        self.boundary_ids = torch.tensor([special.soi, special.eoi], device=device)
        buffer = allocate_kv_buffer(decoder, caches, [n_rows] * len(caches))
        prefixes = [buffer.prefix(i) for i in range(len(caches))]
        # nothing follows these rows: the position does not move past them
        rows = Segment(length=n_rows, attention="full", visible=False, advance=0, distinct_positions=True)
        layout = build_layout([[rows]] * len(caches), prefixes, device=device)
        self.position_ids = layout.position_ids
        self.rows_by_expert = {EXPERT: torch.arange(len(layout.position_ids), device=device)}
        self.attend = buffer.attend(prefixes, layout.mask)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Image tokens of every branch [B, n] -> their last hidden states [B, n, D], before the final norm."""
        b = len(tokens)
        soi, eoi = self.boundary_ids.expand(b, 2).split(1, 1)
        ids = torch.cat((soi, tokens + self.first_code_id, eoi), 1)
        x = self.decoder.embed(ids.flatten())
        hidden = self.decoder(x, self.position_ids, self.rows_by_expert, self.attend)[EXPERT]
        return hidden.unflatten(0, (b, -1))[:, 1:-1]
