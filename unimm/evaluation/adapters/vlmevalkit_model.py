"""Models of this library in VLMEvalKit, by its documented interface (a BaseModel with `generate_inner`).

VLMEvalKit is installed from its repository; a model is then one entry of its list:

    from functools import partial
    from unimm.evaluation.adapters.vlmevalkit_model import VLMEvalKitModel
    from vlmeval.config import supported_VLM
    supported_VLM["bagel-7b"] = partial(VLMEvalKitModel, "bagel-7b", device="cuda", dtype="bfloat16")
"""

from collections.abc import Mapping, Sequence

from vlmeval.vlm.base import BaseModel

from unimm.evaluation.adapters.harness_model import HarnessModel, split_message


class VLMEvalKitModel(BaseModel):
    """A model of this library under VLMEvalKit's interface."""

    # messages with several images are taken whole; the images come ahead of the text
    INTERLEAVE = True

    def __init__(
        self, model: str, *, dtype: str = "float32", device: str = "cpu", max_tokens: int | None = None
    ) -> None:
        """model: a bundled name, a folder or a hub id. max_tokens: the most new tokens of an answer."""
        super().__init__()
        self.harness = HarnessModel(model, dtype=dtype, device=device, max_tokens=max_tokens)

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to a message, greedily. dataset: the name of the benchmark, which changes nothing."""
        images, text = split_message(message)
        return self.harness.answer([images], [text], self.harness.sampling({}))[0]
