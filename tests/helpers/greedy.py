"""Greedy decoding of a VLM, to compare with others' ids."""

import torch

from unimm.generation.decode import decode_text
from unimm.generation.text_sampling import TextSampling
from unimm.vlms.base import VisionLanguageModel


def greedy(model: VisionLanguageModel, samples: list[list], n: int = 8) -> torch.Tensor:
    """The likeliest ids after each sample [B, n]; nothing ends them."""
    contexts, last = model.prefill_prompts(samples)
    session = model.decode_session(contexts, n)
    sampling = TextSampling(max_tokens=n)
    return torch.tensor([*decode_text(session, last, end=-1, sampling=sampling, seeds=[0] * len(last))]).T
