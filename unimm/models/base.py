"""The contract of every family: loading, saving, and the verbs; what they return."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn
from typing_extensions import Self

from unimm.checkpoint import hub
from unimm.checkpoint.atomic import atomic_directory
from unimm.checkpoint.keymap import KeyMap
from unimm.checkpoint.load import keep_weights_open, load_weights, materialize, parse_dtype, weight_files
from unimm.checkpoint.save import released_state_dict, save_safetensors
from unimm.generation.guidance import Guidance
from unimm.generation.text_sampling import TextSampling
from unimm.models.release import Release
from unimm.processing.requests import ImageInput, parse_size
from unimm.tokenizers.text import TextTokenizer


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
class ImageOptions:
    """How a call draws; None is the model's default."""

    size: tuple[int, int] | None
    guidance: Sequence[Guidance | float] | None
    steps: int | None
    timestep_shift: float | None = None
    step_cache: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", parse_size(self.size))


class UnifiedModel(nn.Module, ABC):
    """One model that understands pictures and draws them."""

    RELEASES: ClassVar[dict[str, Release]]
    supports_thinking: ClassVar[bool] = False  # whether the verbs have a think mode
    # what every key of some files begins with; and parameters that nothing reads, zeros where a file lacks them
    KEY_PREFIX: ClassVar[str] = ""
    UNUSED_PARAMETERS: ClassVar[tuple[str, ...]] = ()
    # parts that stay in float32, as released, by the beginning of their parameters' names
    KEEP_FLOAT32: ClassVar[tuple[str, ...]] = ("vae.",)
    tokenizer: TextTokenizer | None

    @classmethod
    @abstractmethod
    def _build(cls, folder: Path) -> Self:
        """The model that a folder's config describes, with its tokenizer, on the current default device, without weights."""

    @abstractmethod
    def key_maps(self) -> dict[tuple[str, ...], KeyMap]:
        """The key table of each file of weights; a file may go by several names, the first is the one written."""

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Write the released config files."""

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """`from_folder`, whose errors say whose folder it is if it is another family's."""
        from unimm.models.registry import detect_family

        try:
            return cls._build(folder)
        except (ValueError, KeyError) as error:
            if (family := detect_family(folder)) not in (None, cls.__name__):
                raise ValueError(
                    f"{folder} holds a {family}: load it with unimm.{family}, or with unimm.load"
                ) from error
            raise

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
        """Load a bundled name, a folder or a hub id, strictly, in evaluation mode.

        dtype: "float32" or "bfloat16"; a KL autoencoder stays in float32, as released. Raises ValueError for an unknown
        name, CheckpointError (a ValueError) for weights that do not fit, MemoryError where they cannot.
        """
        folder = hub.resolve(name, revision=revision, known_names=tuple(cls.RELEASES))
        with torch.device("meta"):
            model = cls.from_folder(folder)
        for names, table in model.key_maps().items():
            paths = weight_files(folder, names)
            kind = torch.float32 if _all_targets_below(table, cls.KEEP_FLOAT32) else parse_dtype(dtype)
            load_weights(model, paths, table, prefix=cls.KEY_PREFIX, dtype=kind, device=torch.device(device))
        materialize(model, cls.UNUSED_PARAMETERS, dtype=parse_dtype(dtype), device=torch.device(device))
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, dtype: str | torch.dtype | None = None) -> None:
        """Write the released layout: config, weights, tokenizer; beside first, then renamed into place.

        dtype: what the weights are cast to, but for a KL autoencoder's; unless given, they are written as they are.
        """
        with atomic_directory(Path(folder)) as partial:
            self.save_config(partial)
            for names, table in self.key_maps().items():
                state = released_state_dict(self, table)
                if dtype is not None and not _all_targets_below(table, self.KEEP_FLOAT32):
                    state = {key: tensor.to(parse_dtype(dtype)) for key, tensor in state.items()}
                save_safetensors(state, partial / names[0])
            if self.tokenizer is not None:
                self.tokenizer.save(partial)

    @abstractmethod
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: ImageInput | Sequence | None = None,
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
        images: ImageInput | Sequence | None,
        question: str | Sequence[str],
        *,
        think: bool = False,
        stream: bool = False,
        text_sampling: TextSampling | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Any:
        """Answer a question about pictures: a str, a list of them for a batch, or an iterator of pieces."""

    @abstractmethod
    def interleave(
        self, inputs: Sequence[str | ImageInput], *, outputs: Sequence[str] = ("image",), seed: int = 0
    ) -> Iterator[str | Image.Image]:
        """Go on with a dialogue of texts and pictures, in texts and pictures."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


def _all_targets_below(key_map: KeyMap, prefixes: tuple[str, ...]) -> bool:
    return all(name.startswith(prefixes) for name in key_map.our_names)
