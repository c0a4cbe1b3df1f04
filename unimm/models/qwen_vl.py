"""Qwen2.5-VL: a language model that reads texts and pictures; a part of MetaQuery, UniWorld and Qwen-Image.

Bai et al. 2025, arXiv 2502.13923. Everything is read causally; positions are (time, row, column), which are equal for text.
facts/metaquery_uniworld.md section 3.1.

Axes: N packed rows, n rows or cells, D model, V vocabulary.
"""
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from unimm import checkpoint, hub
from unimm.checkpoint import Table
from unimm.kernels import attention, linear_cross_entropy
from unimm.models.conversing import llama_keys
from unimm.models.decoder import Attend, Decoder, DecoderConfig, Parts, Route
from unimm.models.preparing import prepared
from unimm.models.qwen_prompts import QwenMarkers, QwenPrompts, Turn
from unimm.models.qwen_vision import QwenVision, QwenVisionConfig, vision_keys
from unimm.models.speaking import cache_of, check_position, extend, speak
from unimm.sampling import EMPTY, Context, TextSampling, TextStream
from unimm.sequence import IGNORE, Item, Pack, Tokens, pack, text_item
from unimm.tokenizers.smart_resize import SmartResize
from unimm.tokenizers.text import load_tokenizer
from unimm.unified import Picture, TextTokenizer, parse_dtype, pictures_of, seeds

STREAM = "all"
SECTIONS = (16, 24, 24)
# what both releases say
RELEASED = {
    "max_position_embeddings": 128000,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


@dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    decoder: DecoderConfig
    vision: QwenVisionConfig
    markers: QwenMarkers
    pixels: SmartResize

    def __post_init__(self) -> None:
        if self.vision.out != self.decoder.dim:
            raise ValueError(f"got out_hidden_size {self.vision.out} in the vision_config: expected {self.decoder.dim}")
        if len(self.decoder.rope_sections) != 3:
            raise ValueError(f"got mrope_section {self.decoder.rope_sections}: expected three numbers: time, rows, columns")

    @classmethod
    def from_folder(cls, folder: Path) -> "QwenVLConfig":
        """Read config.json, and preprocessor_config.json, if it is there."""
        return cls.from_files(*(_read(folder / name) for name in ("config.json", "preprocessor_config.json")))

    @classmethod
    def from_files(cls, files: Mapping[str, Any], look: Mapping[str, Any]) -> "QwenVLConfig":
        """From the contents of the released files, the text's numbers at the top of config.json or in its text_config."""
        if "vision_config" not in files:
            raise ValueError(f"config.json describes no Qwen2.5-VL: expected a vision_config; found {', '.join(files)}")
        text = {**RELEASED, **_given(files), **_given(files.get("text_config", {}))}
        turning = {**text.get("rope_scaling", {}), **text.get("rope_parameters", {})}
        kinds = {turning.get(name, "default") for name in ("type", "rope_type")} - {"default", "mrope"}
        if kinds or text.get("use_sliding_window"):
            asked = f"rope_scaling of type {', '.join(kinds)}" if kinds else "use_sliding_window"
            raise ValueError(f"the config asks for {asked}, which no release does and is not built")
        text = {"num_key_value_heads": text.get("num_attention_heads"), "qk_norm": False, **text}
        text |= {"rope_theta": turning.get("rope_theta", text["rope_theta"])}
        vision = QwenVisionConfig.from_files(files["vision_config"])
        return cls(
            decoder=DecoderConfig.from_files(
                text,
                qkv_bias=True,
                streams=(STREAM,),
                rope_sections=tuple(turning.get("mrope_section", SECTIONS)),
                # the text_config's own word is that of a model without this one around it
                tied=files.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
            ),
            vision=vision,
            markers=QwenMarkers.from_files(text),
            pixels=SmartResize.from_files(look, patch=vision.patch, merge=vision.merge, frames=vision.frames),
        )

    def to_files(self) -> dict[str, dict[str, Any]]:
        """The contents of config.json and preprocessor_config.json."""
        top: dict[str, Any] = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
        text = self.decoder.to_files()
        del text["qk_norm"]
        turning = {"type": "mrope", "mrope_section": list(self.decoder.rope_sections)}
        top |= {**text, "rope_scaling": turning, "use_sliding_window": False, **self.markers.to_files()}
        return {
            "config.json": top | {"vision_config": self.vision.to_files()},
            "preprocessor_config.json": self.pixels.to_files(),
        }


def _given(files: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in files.items() if value is not None}


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again") from error


class QwenVL(nn.Module):
    """A decoder and a tower to look with."""

    def __init__(self, cfg: QwenVLConfig):
        super().__init__()
        self.cfg = cfg
        self.tokenizer: TextTokenizer | None = None
        self.decoder = Decoder(cfg.decoder)
        self.vision = QwenVision(cfg.vision)

    # ---- files

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """The model of a folder's config files, with its tokenizer, without weights."""
        model = cls(QwenVLConfig.from_folder(folder))
        model.tokenizer = load_tokenizer(folder)
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
        paths = checkpoint.weight_files(folder, WEIGHTS)
        keys = qwen_keys(head=not model.cfg.decoder.tied, nested=nested(checkpoint.read_shapes(paths)))
        checkpoint.load_into(model, paths, keys, dtype=parse_dtype(dtype), device=torch.device(device))
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Write config, weights and tokenizer in the hub's layout. dtype: what the weights are cast to, if given."""
        with checkpoint.written_beside(Path(folder)) as partial:
            for name, contents in self.cfg.to_files().items():
                (partial / name).write_text(json.dumps(contents, indent=2) + "\n")
            state = checkpoint.released_state(self, qwen_keys(head=not self.cfg.decoder.tied))
            kind = None if dtype is None else parse_dtype(dtype)
            checkpoint.save_state({key: x.to(kind or x.dtype) for key, x in state.items()}, partial / WEIGHTS[0])
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

    @property
    def prompts(self) -> QwenPrompts:
        """How this model's prompts are made."""
        cfg = self.cfg
        return QwenPrompts(tokenizer=self.tokenizer, pixels=cfg.pixels, vision=cfg.vision, markers=cfg.markers)

    def seen(self, tokens: Tokens) -> Tensor:
        """Pictures of a pack -> a row for each of their cells [n, D]."""
        m, grids = self.cfg.vision.merge, []
        for places in tokens.places.split(tokens.lengths):
            h, w = (places[:, 1:].amax(0) + 1).tolist()
            grids.append((len(places) // (h * w), h * m, w * m))
        return self.vision(rearrange(tokens.content, "n (s f) -> (n s) f", s=m * m).to(self.dtype), grids)

    def embed(self, batch: Pack) -> Tensor:
        """Every row of a pack, in its order [N, D]: texts and markers, pictures."""
        parts, rows = {"text": self.decoder.embed(batch.ids)}, {"text": batch.id_rows}
        if batch.look:
            parts["look"], rows["look"] = self.seen(batch.look), batch.look.rows
        return Route(rows).join(parts)

    def positions(self, batch: Pack) -> Tensor:
        """Rotary positions of a pack: [N] without pictures, else (time, row, column) [N, 3], equal at texts."""
        at, look = batch.layout.positions, batch.look
        if look is None:
            return at
        first = torch.tensor(look.lengths).cumsum(0) - torch.tensor(look.lengths)
        begin = at[look.rows[first.to(at.device)]].repeat_interleave(torch.tensor(look.lengths, device=at.device))
        return at[:, None].repeat(1, 3).index_copy(0, look.rows, begin[:, None] + look.places)

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

    def understand(
        self,
        images: Picture | Sequence | None,
        question: str | Sequence[str],
        *,
        stream: bool = False,
        text: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question a picture, several, or None; for a batch one of these each. They stand before the
        question, or where it says <|image_pad|>. Raises ValueError for bad input.
        """
        questions = [question] if isinstance(question, str) else list(question)
        shown = pictures_of(images, question)
        talks = [[{"role": "user", "content": q, "images": some}] for q, some in zip(questions, shown, strict=True)]
        return self.chat(talks[0] if isinstance(question, str) else talks, stream=stream, text=text, seed=seed)

    def chat(
        self,
        turns: Sequence[Turn] | Sequence[Sequence[Turn]],
        *,
        system: str | None = None,
        stream: bool = False,
        text: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Go on with a conversation of several turns, or with a batch of conversations: the assistant's next words.

        A turn is {"role": "user" or "assistant", "content": str, "images": [pictures]}, images where there are some; the
        last one is the user's. system: instead of the released system prompt. Returns a str, a list of them for a batch,
        or (`stream`) pieces as they come. Raises ValueError for bad input.
        """
        if not turns or isinstance(turns, Mapping):
            raise ValueError(f"got {turns!r} for a conversation: expected a list of turns, the last one the user's")
        single = isinstance(turns[0], Mapping)
        batch: list[Any] = [turns] if single else list(turns)
        if stream and not single:
            raise ValueError(f"got {len(batch)} conversations to stream: expected one")
        items = [self.prompts.conversation(one, system=system) for one in batch]
        written = self.written(items, text, seeds(seed, len(batch)))
        if stream:
            return written.pieces()
        return written.texts()[0] if single else written.texts()

    def written(self, prompts: Sequence[list[Item]], sampling: TextSampling | None, seed: Sequence[int]) -> TextStream:
        """The assistant's words after each prompt, which ends with a text."""
        sampling = sampling or TextSampling()
        contexts, last = self.prefilled(prompts)
        steps = speak(self, contexts, last, end=self.cfg.markers.end, sampling=sampling, seeds=seed)
        return TextStream(steps, self.prompts.words.decode, len(prompts), sampling.stop)

    def prefilled(self, prompts: Sequence[list[Item]]) -> tuple[list[Context], list[int]]:
        """Contexts of all but the last id of each prompt, which ends with a text, and those last ids."""
        before = [[*items[:-1], *(text_item(ids) for ids in [items[-1].ids[:-1].tolist()] if ids)] for items in prompts]
        return extend(self, [EMPTY] * len(before), before), [int(items[-1].ids[-1]) for items in prompts]


# ---- released files

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def nested(keys: Mapping[str, Any], *, prefix: str = "") -> bool:
    """Whether released names are in the newer spelling, the language model's and the tower's below `model`."""
    return any(key.startswith((f"{prefix}model.language_model.", f"{prefix}model.visual.")) for key in keys)


def qwen_keys(*, head: bool, nested: bool = False, prefix: str = "", ours: str = "") -> Table:
    """Released names on the left, ours on the right. head: the files hold a language head; else one may be there, unread.

    nested: the newer spelling. prefix: what their names begin with where the model is a part of another's files; ours:
    where it is in our model.
    """
    text, sight = ("model.language_model.", "model.visual.") if nested else ("model.", "visual.")
    rows = llama_keys(prefix + text, prefix + "lm_head", STREAM)
    rows = {theirs: ours + target if target else None for theirs, target in rows.items()}
    unread = {} if head else {prefix + "lm_head.{}": None}
    return {**rows, **unread, **vision_keys(prefix + sight, ours + "vision.")}
