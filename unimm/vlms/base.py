"""Vision-language models, which read texts and images and answer in words: what Qwen2.5-VL and LLaVA-OneVision share.

All rows are causal. MetaQuery and UniWorld have one of them inside.

Axes: N packed rows, n rows, D model.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.atomic import atomic_directory
from unimm.checkpoint.building import building
from unimm.checkpoint.devices import parse_device
from unimm.checkpoint.json_files import write_json
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import (
    HUB_WEIGHT_FILES,
    check_weights,
    keep_weights_open,
    load_weights,
    parse_dtype,
    read_shapes,
    weight_files,
)
from unimm.checkpoint.save import MAX_SHARD_SIZE, check_all_saved, released_tensors, save_weights
from unimm.generation.kv_cache import KVCache, check_fits
from unimm.generation.prefill import plan_prefill
from unimm.generation.text_sampling import DEFAULT_MAX_TOKENS
from unimm.kernels import attention, linear_cross_entropy
from unimm.nn.decoder import AttentionFn, Decoder, ExpertRouting, RowsByExpert
from unimm.nn.flops import StepFlops
from unimm.sequence.packing import ImageTokens, PackedBatch, pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, Part
from unimm.tokenizers.text import TextTokenizer, load_tokenizer
from unimm.vlms.chat import MLLMChat
from unimm.vlms.llama_layout import EXPERT
from unimm.vlms.processor import VLMProcessor


class VisionLanguageModel(MLLMChat):
    """A causal decoder with a vision encoder, its tokenizer, its files and its verbs: understand, chat."""

    decoder: Decoder
    config_class: ClassVar[Any]  # of the family; its `from_folder` reads what is released
    SPECIAL_TOKENS: ClassVar[
        tuple[str, ...]
    ] = ()  # tokens that are special even where a tokenizer.json does not say so
    NON_COMMERCIAL: ClassVar[Mapping[str, str]] = {}  # hub ids whose licence forbids commercial use, and that licence
    config: Any
    tokenizer: TextTokenizer | None = None

    @abstractmethod
    def key_map(self, shapes: Mapping[str, Any]) -> KeyMap:
        """The key map for files whose tensors have these names; for none, that of the layout that is written."""

    @property
    @abstractmethod
    def processor(self) -> VLMProcessor:
        """Conversations to parts."""

    @abstractmethod
    def image_features(self, tokens: ImageTokens) -> Tensor:
        """The embeddings of a batch's images, one row for each of their tokens [n, D]."""

    @abstractmethod
    def whole_image_features(self, tokens: ImageTokens) -> Tensor:
        """The embeddings of P equally large images in the parts of `whole_image_part`, patch by patch [P, n, D]."""

    @abstractmethod
    def count_image_flops(self, count: StepFlops, tokens: ImageTokens) -> bool:
        """Add the FLOPs of `image_features`. Returns whether the embeddings have gradients."""

    @abstractmethod
    def position_ids(self, batch: PackedBatch) -> Tensor:
        """The rotary positions of a batch, [N], or [N, axes] for a model that has several."""

    @property
    def eos_ids(self) -> Sequence[int]:
        """The ids that end an answer."""
        return self.config.special_tokens.eos_ids

    @property
    def max_answer_tokens(self) -> int:
        """The most new ids of an answer, where a call does not say."""
        return DEFAULT_MAX_TOKENS

    # ---- files

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The model of a folder's config files, with its tokenizer, without weights."""
        with building(folder):
            model = cls(cls.config_class.from_folder(folder))
            model.tokenizer = load_tokenizer(
                folder, special_tokens=model.SPECIAL_TOKENS, vocab_size=model.config.decoder.vocab_size
            )
            return model

    @final
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
        """Load a folder or a hub id, strictly, in evaluation mode, in any of the released layouts of its weights.

        Raises ValueError for another model's config, CheckpointError (a ValueError) for weights that do not fit,
        MemoryError where they cannot.
        """
        dtype = parse_dtype(dtype)
        device = parse_device(device)
        folder = hub.resolve(name, revision=revision, non_commercial=cls.NON_COMMERCIAL)
        with torch.device("meta"):
            model = cls.from_folder(folder)
        paths = weight_files(folder, HUB_WEIGHT_FILES)
        key_map = model.key_map(read_shapes(paths))
        load_weights(model, paths, key_map, dtype=dtype, device=device)
        return model.eval()

    @final
    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        max_shard_size: int | str | None = MAX_SHARD_SIZE,
    ) -> None:
        """Write config, weights and tokenizer in the hub's layout. dtype: what the weights are cast to, if given.
        max_shard_size: bytes, or a text, beyond which weights are split; None for one file."""
        with atomic_directory(hub.parse_folder(folder), weight_names=[HUB_WEIGHT_FILES]) as partial:
            for name, contents in self.config.to_json().items():
                write_json(partial / name, contents)
            key_map = self.key_map({})
            check_all_saved(self, [key_map])
            state = released_tensors(self, key_map, dtype=None if dtype is None else parse_dtype(dtype))
            save_weights(state, partial, HUB_WEIGHT_FILES, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save(partial)
            with torch.device("meta"):
                again = self.from_folder(partial)
            check_weights(again, weight_files(partial, HUB_WEIGHT_FILES), again.key_map({}))

    # ---- forward

    def embed(self, batch: PackedBatch) -> Tensor:
        """The embeddings of every row of a batch, in order [N, D]: text and images."""
        embeds = {"text": self.decoder.embed(batch.ids)}
        rows = {"text": batch.id_rows}
        if batch.und_images:
            embeds["und_image"] = self.image_features(batch.und_images)
            rows["und_image"] = batch.und_images.rows
        return ExpertRouting(rows).join(embeds)

    def backbone(self, batch: PackedBatch, attend: AttentionFn) -> RowsByExpert:
        """The last hidden states of every row of a batch [N, D], before the final norm."""
        rows = torch.arange(len(batch.layout.position_ids), device=self.device)
        return self.decoder(self.embed(batch), self.position_ids(batch), {EXPERT: rows}, attend)

    def last_hidden_state(
        self, batch: PackedBatch, attend: AttentionFn | None = None, *, rows: Tensor | None = None
    ) -> Tensor:
        """The last hidden states of a batch's rows [N, D], or of some of them [n, D], after the final norm."""
        hidden = self.backbone(batch, attend or (lambda layer, q, k, v: attention(q, k, v, batch.layout.mask)))[EXPERT]
        return self.decoder.norms[EXPERT](hidden if rows is None else hidden[rows])

    def encode(self, sequences: Sequence[Sequence[Part]], *, caches: Sequence[KVCache] | None = None) -> list[Tensor]:
        """The last hidden states of each sequence's rows [n, D], after the final norm. caches: what each sequence
        follows.

        Raises ValueError where a sequence would reach a position beyond the decoder's last.
        """
        lengths = [sum(part.segment.length for part in parts) for parts in sequences]
        if caches is None:
            check_fits(self.config.decoder, sequences)
            batch = pack_sequences(sequences, device=self.device)
            return list(self.last_hidden_state(batch).split(lengths))
        plan = plan_prefill(self.decoder, caches, sequences)
        return list(self.last_hidden_state(plan.batch, plan.attend).split(lengths))

    def forward(self, batch: PackedBatch) -> Tensor:
        """Training: the next-id loss of each labelled row [n]."""
        labelled = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        states = self.last_hidden_state(batch, rows=batch.id_rows[labelled])
        return linear_cross_entropy(states, self.decoder.head.weight, batch.labels[labelled])
