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
from torch import Tensor, nn
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.atomic import written_beside
from unimm.checkpoint.keymap import Table
from unimm.checkpoint.load import HUB_WEIGHTS, load_into, parse_dtype, read_shapes, weight_files
from unimm.checkpoint.save import released_state, save_state
from unimm.generation.causal_lm import check_position
from unimm.generation.decode import TextStream, speak
from unimm.generation.kv_cache import Context, cache_of
from unimm.generation.text_sampling import TextSampling
from unimm.kernels import attention, linear_cross_entropy
from unimm.nn.decoder import Attend, Decoder, Parts, Route
from unimm.nn.packed_linear import prepared
from unimm.sequence.packing import Pack, Tokens, pack
from unimm.sequence.parts import IGNORE, Item
from unimm.tokenizers.text import TextTokenizer, load_tokenizer
from unimm.vlms.chat import Chatting
from unimm.vlms.processor import ReaderPrompts

STREAM = "all"


class Reader(Chatting, nn.Module):
    """A decoder and a tower to look with."""

    Config: ClassVar[Any]  # of the family; its `from_folder` reads what is released
    SPECIAL: ClassVar[tuple[str, ...]] = ()  # markers that a tokenizer.json may not call special
    cfg: Any
    decoder: Decoder
    tokenizer: TextTokenizer | None = None

    @abstractmethod
    def keys(self, shapes: Mapping[str, Any]) -> Table:
        """The key table for files of these names; for none the layout that is written."""

    @property
    @abstractmethod
    def prompts(self) -> ReaderPrompts:
        """How this model's prompts are made."""

    @abstractmethod
    def seen(self, tokens: Tokens) -> Tensor:
        """Pictures of a pack -> a row for each of their tokens [n, D]."""

    def positions(self, batch: Pack) -> Tensor:
        """Rotary positions of a pack [N], or [N, axes] where the model turns several."""
        return batch.layout.positions

    # ---- files

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The model of a folder's config files, with its tokenizer, without weights."""
        model = cls(cls.Config.from_folder(folder))
        model.tokenizer = load_tokenizer(folder, special=model.SPECIAL)
        return model

    @classmethod
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
        folder = hub.resolve(name, revision=revision, known=())
        with torch.device("meta"):
            model = cls.from_folder(folder)
        paths = weight_files(folder, HUB_WEIGHTS)
        table = model.keys(read_shapes(paths))
        load_into(model, paths, table, dtype=parse_dtype(dtype), device=torch.device(device))
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Write config, weights and tokenizer in the hub's layout. dtype: what the weights are cast to, if given."""
        with written_beside(Path(folder)) as partial:
            for name, contents in self.cfg.to_files().items():
                (partial / name).write_text(json.dumps(contents, indent=2) + "\n")
            state = released_state(self, self.keys({}))
            kind = None if dtype is None else parse_dtype(dtype)
            save_state({key: x.to(kind or x.dtype) for key, x in state.items()}, partial / HUB_WEIGHTS[0])
            if self.tokenizer is not None:
                self.tokenizer.save(partial)

    def prepared(self, *, int8: bool = False) -> Self:
        """This model made ready to write on a CPU, over the same weights; the tower stays as it is.

        int8: the decoder's blocks are rounded to int8, a byte a weight; such a model neither trains nor saves. Weights
        that change later are not packed again. Raises ValueError for int8 where the CPU, or PyTorch, has none.
        """
        return prepared(self, but=("vision",), int8=("decoder.blocks",) if int8 else ())

    # ---- reading

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.decoder.embed.weight.dtype

    def embed(self, batch: Pack) -> Tensor:
        """Every row of a pack, in its order [N, D]: texts and markers, pictures."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.look:
            parts["look"], rows["look"] = self.seen(batch.look), batch.look.rows
        return Route(rows).join(parts)

    def hidden(self, batch: Pack, attend: Attend) -> Parts:
        """Last hidden states of a pack's rows, before the final norm."""
        rows = torch.arange(len(batch.layout.positions), device=self.device)
        return self.decoder(self.embed(batch), self.positions(batch), {STREAM: rows}, attend)

    def states(self, batch: Pack, attend: Attend | None = None, *, rows: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm of a pack's rows [N, D], or of some of them [n, D]."""
        hidden = self.hidden(batch, attend or (lambda layer, q, k, v: attention(q, k, v, batch.layout.mask)))[STREAM]
        return self.decoder.norms[STREAM](hidden if rows is None else hidden[rows])

    def read(self, samples: Sequence[Sequence[Item]], *, contexts: Sequence[Context] | None = None) -> list[Tensor]:
        """Hidden states after the final norm of each sample's rows, [n, D] each. contexts: what each comes after, read before.

        Raises ValueError where a sample would outgrow the positions that the model knows.
        """
        lengths = [sum(item.segment.length for item in items) for items in samples]
        if contexts is None:
            batch, attend = pack(samples, device=self.device), None
        else:
            cache = cache_of(self, contexts, lengths)
            past = [cache.past(i) for i in range(len(contexts))]
            batch = pack(samples, past, device=self.device)
            attend = cache.attend(past, batch.layout.mask)
        check_position(self, max(batch.layout.clocks))
        return list(self.states(batch, attend).split(lengths))

    def forward(self, batch: Pack) -> Tensor:
        """Training: the next-id loss at each labelled row [n]."""
        at = (batch.labels != IGNORE).nonzero().squeeze(1)
        said = self.states(batch, rows=batch.id_rows[at])
        return linear_cross_entropy(said, self.decoder.head.weight, batch.labels[at])

    # ---- speaking

    def written(self, prompts: Sequence[list[Item]], sampling: TextSampling | None, seed: Sequence[int]) -> TextStream:
        """The assistant's words after each prompt, which ends with a text."""
        sampling = sampling or TextSampling()
        contexts, last = self.prefilled(prompts)
        steps = speak(self, contexts, last, end=self.cfg.markers.ends, sampling=sampling, seeds=seed)
        return TextStream(steps, self.prompts.words.decode, len(prompts), sampling.stop)


def given(files: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says; null says nothing."""
    return {key: value for key, value in files.items() if value is not None}
