"""The floating-point operations of a vision-language model, counted as in unimm.nn.flops."""

from unimm.nn.flops import StepFlops, decoder_flops, head_flops
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import IGNORE_INDEX
from unimm.vlms.base import VisionLanguageModel
from unimm.vlms.llama_layout import EXPERT


def vlm_rows_flops(count: StepFlops, mllm: VisionLanguageModel, batch: PackedBatch) -> bool:
    """Texts and images of a batch as rows of the decoder. Returns whether these have gradients."""
    carries = mllm.decoder.embed.weight.requires_grad
    if batch.und_images is not None:
        carries = mllm.count_image_flops(count, batch.und_images) or carries
    return carries


def vlm_states_flops(count: StepFlops, mllm: VisionLanguageModel, batch: PackedBatch) -> bool:
    """The last hidden states of a batch's rows: images and decoder, without the language head."""
    carries = vlm_rows_flops(count, mllm, batch)
    rows = {EXPERT: len(batch.layout.position_ids)}
    pairs = batch.layout.mask.spans.n_visible_pairs
    return decoder_flops(count, mllm.decoder, rows, pairs, {EXPERT: carries})[EXPERT]


def vlm_flops(count: StepFlops, mllm: VisionLanguageModel, batch: PackedBatch) -> None:
    """A training step: the next id of each labelled row."""
    carries = vlm_states_flops(count, mllm, batch)
    head_flops(count, mllm.decoder, int((batch.labels != IGNORE_INDEX).sum()), carries)
