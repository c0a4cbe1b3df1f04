"""Models that read texts and pictures and answer in words: the half that Qwen2.5-VL and LLaVA-OneVision share.

Everything is read causally. MetaQuery and UniWorld have one of them inside.

Axes: N packed rows, n rows, D model.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.atomic import atomic_directory
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import (
    HUB_WEIGHT_FILES,
    keep_weights_open,
    load_weights,
    parse_dtype,
    read_shapes,
    weight_files,
)
from unimm.checkpoint.save import released_state_dict, save_safetensors
from unimm.generation.causal_lm import CausalLM
from unimm.generation.decode import TextStream, decode_text
from unimm.generation.kv_cache import KVCache, check_max_positions
from unimm.generation.prefill import plan_prefill
from unimm.generation.text_sampling import TextSampling
from unimm.kernels import attention, linear_cross_entropy
from unimm.nn.decoder import AttentionFn, Decoder, ExpertRouting, RowsByExpert
from unimm.nn.packed_linear import optimize_for_cpu
from unimm.sequence.packing import ImageTokens, PackedBatch, pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, Part
from unimm.tokenizers.text import TextTokenizer, load_tokenizer
from unimm.vlms.chat import MLLMChat
from unimm.vlms.processor import VLMProcessor

EXPERT = "all"


class VisionLanguageModel(MLLMChat, CausalLM):
    """A decoder and a tower to look with."""

    config_class: ClassVar[Any]  # of the family; its `from_folder` reads what is released
    SPECIAL_TOKENS: ClassVar[tuple[str, ...]] = ()  # markers that a tokenizer.json may not call special
    config: Any
    NON_COMMERCIAL: ClassVar[Mapping[str, str]] = {}  # hub ids whose licence forbids commercial use, and that licence
    decoder: Decoder
    tokenizer: TextTokenizer | None = None

    @abstractmethod
    def key_map(self, shapes: Mapping[str, Any]) -> KeyMap:
        """The key table for files of these names; for none the layout that is written."""

    @property
    @abstractmethod
    def processor(self) -> VLMProcessor:
        """How this model's prompts are made."""

    @abstractmethod
    def image_features(self, tokens: ImageTokens) -> Tensor:
        """Pictures of a pack -> a row for each of their tokens [n, D]."""

    def position_ids(self, batch: PackedBatch) -> Tensor:
        """Rotary positions of a pack [N], or [N, axes] where the model turns several."""
        return batch.layout.position_ids

    # ---- files

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The model of a folder's config files, with its tokenizer, without weights."""
        model = cls(cls.config_class.from_folder(folder))
        model.tokenizer = load_tokenizer(folder, special_tokens=model.SPECIAL_TOKENS)
        return model

    @classmethod
    @keep_weights_open()
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> Self:
        """Load a folder or a hub id, strictly, in evaluation mode; the weights in either spelling of their names.

        Raises ValueError for a config of something else, CheckpointError for weights that do not fit, MemoryError where
        they cannot.
        """
        folder = hub.resolve(name, revision=revision, non_commercial=cls.NON_COMMERCIAL)
        with torch.device("meta"):
            model = cls.from_folder(folder)
        paths = weight_files(folder, HUB_WEIGHT_FILES)
        key_map = model.key_map(read_shapes(paths))
        load_weights(model, paths, key_map, dtype=parse_dtype(dtype), device=torch.device(device))
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Write config, weights and tokenizer in the hub's layout. dtype: what the weights are cast to, if given."""
        with atomic_directory(Path(folder)) as partial:
            for name, contents in self.config.to_json().items():
                (partial / name).write_text(json.dumps(contents, indent=2) + "\n")
            state = released_state_dict(self, self.key_map({}))
            kind = None if dtype is None else parse_dtype(dtype)
            save_safetensors({key: x.to(kind or x.dtype) for key, x in state.items()}, partial / HUB_WEIGHT_FILES[0])
            if self.tokenizer is not None:
                self.tokenizer.save(partial)

    def optimize_for_cpu(self, *, int8: bool = False) -> Self:
        """This model made ready to write on a CPU, over the same weights; the tower stays as it is.

        int8: the decoder's blocks are rounded to int8, a byte a weight; such a model neither trains nor saves. Weights
        that change later are not packed again. Raises ValueError for int8 where the CPU, or PyTorch, has none.
        """
        return optimize_for_cpu(self, skip=("vision",), int8=("decoder.blocks",) if int8 else ())

    # ---- reading

    def embed(self, batch: PackedBatch) -> Tensor:
        """Every row of a pack, in its order [N, D]: texts and markers, pictures."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.und_images:
            parts["look"], rows["look"] = self.image_features(batch.und_images), batch.und_images.rows
        return ExpertRouting(rows).join(parts)

    def backbone(self, batch: PackedBatch, attend: AttentionFn) -> RowsByExpert:
        """Last hidden states of a pack's rows, before the final norm."""
        rows = torch.arange(len(batch.layout.position_ids), device=self.device)
        return self.decoder(self.embed(batch), self.position_ids(batch), {EXPERT: rows}, attend)

    def last_hidden_state(
        self, batch: PackedBatch, attend: AttentionFn | None = None, *, rows: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm of a pack's rows [N, D], or of some of them [n, D]."""
        hidden = self.backbone(batch, attend or (lambda layer, q, k, v: attention(q, k, v, batch.layout.mask)))[EXPERT]
        return self.decoder.norms[EXPERT](hidden if rows is None else hidden[rows])

    def encode(self, sequences: Sequence[Sequence[Part]], *, caches: Sequence[KVCache] | None = None) -> list[Tensor]:
        """Hidden states after the final norm of each sample's rows, [n, D] each. contexts: what each comes after, read before.

        Raises ValueError where a sample would outgrow the positions that the model knows.
        """
        lengths = [sum(item.segment.length for item in items) for items in sequences]
        if caches is None:
            batch = pack_sequences(sequences, device=self.device)
            check_max_positions(self.config.decoder, max(batch.layout.next_positions))
            return list(self.last_hidden_state(batch).split(lengths))
        plan = plan_prefill(self.decoder, caches, sequences)
        return list(self.last_hidden_state(plan.batch, plan.attend).split(lengths))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Training: the next-id loss at each labelled row [n]."""
        at = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        said = self.last_hidden_state(batch, rows=batch.id_rows[at])
        return linear_cross_entropy(said, self.decoder.head.weight, batch.labels[at])

    # ---- speaking

    def decode_answer(
        self, prompts: Sequence[list[Part]], text_sampling: TextSampling | None, seed: Sequence[int]
    ) -> TextStream:
        """The assistant's words after each prompt, which ends with a text."""
        text_sampling = text_sampling or TextSampling()
        contexts, last = self.prefill_prompts(prompts)
        session = self.decode_session(contexts, text_sampling.token_limit)
        end = self.config.special_tokens.eos_ids
        steps = decode_text(session, last, end=end, sampling=text_sampling, seeds=seed)
        return TextStream(steps, self.processor.text_tokenizer.decode, len(prompts), text_sampling.stop)


def drop_nulls(files: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says; null says nothing."""
    return {key: value for key, value in files.items() if value is not None}
