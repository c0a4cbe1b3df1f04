"""Models that talk in DeepSeek's conversation format about pictures of one size: the half that Janus and JanusFlow share.

A prompt is text whose placeholders become pictures; everything is read causally. facts/janus.md, sections 4 and 5.
"""
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from unimm.checkpoint import Table
from unimm.models.decoder import Decoder, Parts
from unimm.models.speaking import extend, speak
from unimm.models.tower import Tower
from unimm.sampling import EMPTY, Context, TextSampling, TextStream
from unimm.sequence import Item, Pack, Tokens, image_item, text_item
from unimm.tokenizers.conversation import DEFAULT_SYSTEM, Message, format_conversation
from unimm.tokenizers.pixels import PadSquare, open_image, patchify
from unimm.tokenizers.text import encode_marked, hide_markers
from unimm.unified import Picture, UnifiedModel, pictures_of, seeds

PLACEHOLDER = "<image_placeholder>"
# the roles of Janus-Pro, which are tokens of its own; earlier checkpoints spell them out
ROLES, OLD_ROLES = ("<|User|>", "<|Assistant|>"), ("User", "Assistant")
Turn = Mapping[str, Any]  # {"role": "user" or "assistant", "content": str, "images": [...] or absent}


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Ids that the format needs, looked up by their strings: they differ between the releases."""

    bos: int
    eos: int
    pad: int
    boi: int
    eoi: int

    STRINGS: ClassVar = {
        "bos": "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "eos": "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "pad": "<\uff5c\u2581pad\u2581\uff5c>",
        "boi": "<begin_of_image>",
        "eoi": "<end_of_image>",
    }


@dataclass(frozen=True, kw_only=True)
class Talk:
    """How a checkpoint talks unless told otherwise: the released numbers. A nano brings its own."""

    system: str = DEFAULT_SYSTEM
    template: str = "deepseek"
    max_tokens: int = 512


class Conversing(UnifiedModel):
    """A decoder that is shown pictures through a tower and an aligner, and asked about them."""

    decoder: Decoder
    vision: Tower
    pixels: PadSquare  # the rule for pictures that the tower sees
    talk: Talk
    special: Markers | None = None  # the markers of a checkpoint without tokenizer

    @abstractmethod
    def hidden(self, batch: Pack, attend: Any) -> Parts:
        """Last hidden states of every row of a pack, before the final norm."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.decoder.embed.weight.dtype

    # ---- the verbs

    def understand(
        self,
        images: Picture | Sequence | None,
        question: str | Sequence[str],
        *,
        think: bool = False,
        stream: bool = False,
        text: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str; for a batch of questions a list; with `stream`, pieces as they come.

        images: for one question a picture, several, or None; for a batch one of these each. They stand before the
        question, or where it says <image_placeholder>. Raises ValueError for bad input.
        """
        if think:
            raise NotImplementedError(f"{type(self).__name__} was not trained to think first: Bagel was")
        questions = [question] if isinstance(question, str) else list(question)
        shown = pictures_of(images, question)
        talks = [[{"role": "user", "content": q, "images": some}] for q, some in zip(questions, shown, strict=True)]
        if isinstance(question, str):
            return self.chat(talks[0], stream=stream, text=text, seed=seed)
        if stream:
            raise ValueError(f"got {len(questions)} questions to stream: expected one")
        return self.chat(talks, text=text, seed=seed)

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
        last one is the user's. system: instead of the model's own system prompt. Returns a str, a list of them for a
        batch, or (`stream`) pieces as they come. Raises ValueError for bad input.
        """
        if not turns:
            raise ValueError("got no turns: expected at least one, the user's")
        single = isinstance(turns[0], Mapping)
        batch: list[Any] = [turns] if single else list(turns)
        if stream and not single:
            raise ValueError(f"got {len(batch)} conversations to stream: expected one")
        items = [self.prompt(one, system=self.talk.system if system is None else system) for one in batch]
        written = self.written(items, text, seeds(seed, len(batch)))
        if stream:
            return written.pieces()
        return written.texts()[0] if single else written.texts()

    def interleave(self, items: Sequence[str | Picture], *, outputs: Sequence[str] = ("image",), seed: int = 0) -> Iterator:
        """Not for this family."""
        raise NotImplementedError(f"{type(self).__name__} gives one text or one kind of picture a call: Bagel interleaves")

    # ---- prompts

    @property
    def markers(self) -> Markers:
        """The ids of the markers. Raises ValueError for a checkpoint without tokenizer, or one that lacks a marker."""
        if self.special:
            return self.special
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer: add its tokenizer.json to the folder")
        ids = {name: found for name, token in Markers.STRINGS.items() if (found := self.tokenizer.id(token)) is not None}
        if lost := [token for name, token in Markers.STRINGS.items() if name not in ids]:
            raise ValueError(f"the tokenizer lacks {', '.join(lost)}: expected the files of a Janus checkpoint")
        return Markers(**ids)

    @property
    def placeholder(self) -> int | None:
        """The id of the placeholder of a picture; it never reaches the model, but files name it."""
        return self.tokenizer.id(PLACEHOLDER) if self.tokenizer else None

    @property
    def roles(self) -> tuple[str, str]:
        """What this checkpoint calls the user and the assistant."""
        known = self.tokenizer is not None and self.tokenizer.id(ROLES[0]) is not None
        return ROLES if known else OLD_ROLES

    def prompt(self, turns: Sequence[Turn], *, system: str) -> list[Item]:
        """A conversation up to where the assistant speaks: bos, texts, pictures."""
        messages, shown = [], []
        for turn in turns:
            message, images = self._message(turn)
            messages.append(message)
            shown += images
        if messages[-1].role != self.roles[0]:
            raise ValueError("got a conversation that ends with the assistant: expected the user to have the last word")
        messages.append(Message(self.roles[1], ""))
        return self.composed(format_conversation(messages, system=system, template=self.talk.template), shown)

    def _message(self, turn: Turn) -> tuple[Message, list[Picture]]:
        names = dict(zip(("user", "assistant"), self.roles, strict=True))
        unknown = turn.keys() - {"role", "content", "images"}
        if turn.get("role") not in names or not isinstance(turn.get("content"), str) or unknown:
            raise ValueError(f"got the turn {dict(turn)!r}: expected role 'user' or 'assistant', content, and perhaps images")
        content, images = turn["content"], list(turn.get("images") or [])
        if not content.strip():
            raise ValueError(f"got an empty text from the {turn['role']}: expected at least a word")
        assert self.tokenizer is not None, "roles are known, so a tokenizer is"
        if PLACEHOLDER not in content:
            content = f"{PLACEHOLDER}\n" * len(images) + content
        if (places := content.count(PLACEHOLDER)) != len(images):
            raise ValueError(
                f"got {places} {PLACEHOLDER} for {len(images)} pictures: expected one for each, or none to have them in front"
            )
        return Message(names[turn["role"]], hide_markers(self.tokenizer, content, but=[PLACEHOLDER])), images

    def composed(self, text: str, images: Sequence[Picture]) -> list[Item]:
        """Formatted text, with a picture at each placeholder, as items: bos first."""
        markers, items = self.markers, []
        assert self.tokenizer is not None, "markers are known, so a tokenizer is"
        pieces = text.split(PLACEHOLDER)
        for i, piece in enumerate(pieces):
            ids = encode_marked(self.tokenizer, piece)
            if i == 0:
                ids = [markers.bos, *ids]
            if ids:
                items.append(text_item(ids))
            if i < len(images):
                items.append(self.looked_at(self.pixels.pixels(open_image(images[i])), (markers.boi, markers.eoi)))
        return items

    def looked_at(self, pixels: Tensor, markers: tuple[int, int]) -> Item:
        """A picture [3, S, S] between its markers."""
        tokens = patchify(pixels, self.vision.patch)
        return image_item("look", tokens, torch.arange(len(tokens)), markers=markers, causal=True)

    def seen(self, tokens: Tokens) -> Tensor:
        """Pictures of a pack -> the tower's features [n, D of the tower]."""
        p, side = self.vision.patch, self.vision.side
        images = rearrange(tokens.content, "(b h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=p, q=p)
        return self.vision(images.to(self.dtype)).flatten(0, 1)

    def written(self, prompts: Sequence[list[Item]], sampling: TextSampling | None, seed: Sequence[int]) -> TextStream:
        """The assistant's words after each prompt."""
        assert self.tokenizer is not None, "prompts were encoded, so a tokenizer is there"
        sampling = sampling or TextSampling(max_tokens=self.talk.max_tokens)
        contexts, last = self.prefilled(prompts)
        steps = speak(self, contexts, last, end=self.markers.eos, sampling=sampling, seeds=seed)
        return TextStream(steps, self.tokenizer.decode, len(prompts), sampling.stop)

    def prefilled(self, prompts: Sequence[list[Item]]) -> tuple[list[Context], list[int]]:
        """Contexts of all but the last id of each prompt, and those last ids."""
        before = [[*items[:-1], *(text_item(ids) for ids in [items[-1].ids[:-1].tolist()] if ids)] for items in prompts]
        return extend(self, [EMPTY] * len(before), before), [int(items[-1].ids[-1]) for items in prompts]


def llama_keys(prefix: str, head: str, stream: str) -> Table:
    """Rows of a key table for a Llama: its body's names begin with `prefix`; the language head's name is `head`."""
    block = f"decoder.blocks.{{}}.streams.{stream}."
    return {
        prefix + "embed_tokens.{}": "decoder.embed.{}",
        prefix + "layers.{}.input_layernorm.{}": block + "attn_norm.{}",
        prefix + "layers.{}.post_attention_layernorm.{}": block + "mlp_norm.{}",
        **{prefix + f"layers.{{}}.self_attn.{p}_proj.{{}}": block + f"{p}.{{}}" for p in "qkvo"},
        **{prefix + f"layers.{{}}.mlp.{p}_proj.{{}}": block + f"mlp.{p}.{{}}" for p in ("gate", "up", "down")},
        prefix + "norm.{}": f"decoder.norms.{stream}.{{}}",
        head + ".{}": "decoder.head.{}",
        # buffers that older files hold
        prefix + "layers.{}.self_attn.rotary_emb.inv_freq": None,
    }
