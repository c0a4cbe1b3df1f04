"""The contract of every family: loading, saving, and the verbs; what they return."""
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint import load as checkpoint
from unimm.checkpoint.load import Table
from unimm.generation.flow import Guidance
from unimm.generation.kv_cache import TextSampling

Picture = Image.Image | str | Path
Turn = Mapping[str, Any]  # {"role": "user" or "assistant", "content": str, "images": one, several or absent}


class TextTokenizer(Protocol):
    """What a model needs of its tokenizer. markers: its special tokens by their strings."""

    @property
    def markers(self) -> dict[str, int]: ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, no markers added; markers written in the text are its users' words, not ids."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, markers left out."""

    def id(self, token: str) -> int | None:
        """The id of a special token by its string, or None."""

    def save(self, folder: Path) -> None:
        """Write the files that it was read from."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """A released checkpoint: where it lies, under which licence, how large it is, what it can do."""

    family: str
    hub: str | None  # None: bundled with the package
    licence: str
    parameters: int
    verbs: tuple[str, ...]

    @property
    def commercial(self) -> bool:
        """Whether the licence allows commercial use, in some form: it may name conditions."""
        return self.hub not in hub.NON_COMMERCIAL


@dataclass(frozen=True)
class Generation:
    """What `generate` made: one picture a prompt, and the reasoning that led to it in think mode."""

    images: list[Image.Image]
    texts: list[str] = field(default_factory=list)

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    @property
    def text(self) -> str:
        """The first reasoning text; empty without think mode."""
        return self.texts[0] if self.texts else ""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a call draws; None is the model's default."""

    size: tuple[int, int] | None
    guidance: Sequence[Guidance | float] | None
    steps: int | None
    shift: float | None = None
    taylor: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", sides(self.size))


class UnifiedModel(nn.Module, ABC):
    """One model that understands pictures and draws them."""

    RELEASES: ClassVar[dict[str, Release]]
    THINKS: ClassVar[bool] = False  # whether the verbs have a think mode
    # what every key of some files begins with; and parameters that nothing reads, zeros where a file lacks them
    PREFIX: ClassVar[str] = ""
    SPARE: ClassVar[tuple[str, ...]] = ()
    # parts that stay in float32, as released, by the beginning of their parameters' names
    FLOAT32: ClassVar[tuple[str, ...]] = ("vae.",)
    tokenizer: TextTokenizer | None

    @classmethod
    @abstractmethod
    def from_folder(cls, folder: Path) -> Self:
        """The model that a folder's config describes, with its tokenizer, on the current default device, without weights."""

    @abstractmethod
    def weights(self) -> dict[tuple[str, ...], Table]:
        """The key table of each file of weights; a file may go by several names, the first is the one written."""

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Write the released config files."""

    @classmethod
    def described(cls, folder: Path) -> Self:
        """`from_folder`, whose errors say whose folder it is if it is another family's."""
        from unimm.models.registry import owner

        try:
            return cls.from_folder(folder)
        except (ValueError, KeyError) as error:
            if (family := owner(folder)) not in (None, cls.__name__):
                raise ValueError(f"{folder} holds a {family}: load it with unimm.{family}, or with unimm.load") from error
            raise

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> Self:
        """Load a bundled name, a folder or a hub id, strictly, in evaluation mode.

        dtype: "float32" or "bfloat16"; a KL autoencoder stays in float32, as released. Raises ValueError for an unknown
        name, CheckpointError (a ValueError) for weights that do not fit, MemoryError where they cannot.
        """
        folder = hub.resolve(name, revision=revision, known=tuple(cls.RELEASES))
        with torch.device("meta"):
            model = cls.described(folder)
        for names, table in model.weights().items():
            paths = checkpoint.weight_files(folder, names)
            kind = torch.float32 if _within(table, cls.FLOAT32) else parse_dtype(dtype)
            checkpoint.load_into(model, paths, table, prefix=cls.PREFIX, dtype=kind, device=torch.device(device))
        checkpoint.fill(model, cls.SPARE, dtype=parse_dtype(dtype), device=torch.device(device))
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Write the released layout: config, weights, tokenizer; beside first, then renamed into place.

        dtype: what the weights are cast to, but for a KL autoencoder's; unless given, they are written as they are.
        """
        with checkpoint.written_beside(Path(folder)) as partial:
            self.save_config(partial)
            for names, table in self.weights().items():
                state = checkpoint.released_state(self, table)
                if dtype is not None and not _within(table, self.FLOAT32):
                    state = {key: tensor.to(parse_dtype(dtype)) for key, tensor in state.items()}
                checkpoint.save_state(state, partial / names[0])
            if self.tokenizer is not None:
                self.tokenizer.save(partial)

    @abstractmethod
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: Picture | Sequence | None = None,
        think: bool = False,
        size: tuple[int, int] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        progress: bool = False,
    ) -> Generation:
        """Draw a picture for each prompt, or edit the images given with it; a family may name more options."""

    @abstractmethod
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
        """Answer a question about pictures: a str, a list of them for a batch, or an iterator of pieces."""

    @abstractmethod
    def interleave(
        self, items: Sequence[str | Picture], *, outputs: Sequence[str] = ("image",), seed: int = 0
    ) -> Iterator[str | Image.Image]:
        """Go on with a dialogue of texts and pictures, in texts and pictures."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def _within(table: Table, beginnings: tuple[str, ...]) -> bool:
    return all(target is not None and target.startswith(beginnings) for target in table.values())


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating dtype from itself or its name. Raises ValueError for another."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"got dtype {dtype!r}: expected float32, bfloat16 or float16")
    return found


def texts_of(given: Any) -> list[str]:
    """A text, or a list of them, as a list. Raises ValueError for anything else, and for halves of characters."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"got {given!r:.80} for a prompt: expected a text, or a list of texts")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"got a prompt that is no text: {error}; decode it with errors='replace'") from error
    return list(texts)


def asked(prompt: Any, images: Any) -> tuple[list[str], list[list]]:
    """Texts, and the pictures of each. Raises ValueError as `texts_of` and `pictures_of` do."""
    return texts_of(prompt), pictures_of(images, prompt)


def plain(value: Any) -> Any:
    """A number, or lists of them, in place of numpy's and torch's; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | torch.Tensor) else value


def each(value: Any, n: int, what: str) -> list:
    """One value a sample: a sequence, or an array, of n, or one value for all. Raises ValueError for another length."""
    value = plain(value)
    values = [value] * n if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
    if len(values) != n:
        raise ValueError(f"got {len(values)} {what} for {n} prompts: give one, or one for each")
    return values


def seeds(seed: int | Sequence[int], n: int, *, copies: int = 1) -> list[int]:
    """A seed a sample, and for `copies` of each the ones after it; from one number, that number and the ones after it.

    Raises ValueError for a negative one, one of more than 63 bits, and for what is no whole number.
    """
    given = plain(seed)
    try:
        if isinstance(given, Sequence):
            first = [index(one) for one in each(given, n, "seeds")]
        else:
            first = [index(given) + copies * i for i in range(n)]
    except TypeError:
        raise ValueError(f"got seed {seed!r}: expected a whole number, or one for each prompt") from None
    found = [one + i for one in first for i in range(copies)]
    if wrong := [one for one in found if not 0 <= one < 2**63]:
        raise ValueError(f"got seed {wrong[0]}: expected 0 or more, and below 2^63")
    return found


def pictures_of(images: Any, prompt: str | Sequence[str]) -> list[list]:
    """Input pictures as a list for each prompt: for one prompt a picture or several, for a batch one of these each.

    Raises ValueError for no prompts, and where the images are not one entry a prompt.
    """
    if isinstance(prompt, str):
        return [_listed(images)]
    if not prompt:
        raise ValueError("got no prompts: expected at least one")
    if images is not None and (not isinstance(images, list | tuple) or len(images) != len(prompt)):
        n = len(prompt)
        raise ValueError(f"got images for {n} prompts: expected a list of {n}, each a picture, a list or None")
    return [[] for _ in prompt] if images is None else [_listed(one) for one in images]


def _listed(images: Any) -> list:
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def sides(size: Any) -> tuple[int, int]:
    """(height, width) in pixels. Raises ValueError for anything else."""
    try:
        height, width = map(index, plain(size))
    except (TypeError, ValueError):
        raise ValueError(f"got size {size!r}: expected (height, width) in pixels, for all pictures") from None
    return height, width


def drawable(size: tuple[int, int], stride: int, most: int) -> tuple[int, int]:
    """The (height, width) to draw. Raises ValueError, with the nearest that works, for other than multiples of stride."""
    given = sides(size)
    height, width = (min(most, max(stride, round(side / stride) * stride)) for side in given)
    if (height, width) != given:
        raise ValueError(
            f"cannot draw (height, width) {given}: expected multiples of {stride} up to {most}; "
            f"the nearest is {(height, width)}"
        )
    return height, width
