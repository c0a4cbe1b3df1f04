"""What a text or an image is in BAGEL's sequences: tokens, special tokens, image processor, defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image
from torch import Tensor

from unimm.generation.guidance import Guidance
from unimm.nn.patches import patchify, places
from unimm.sequence.parts import IGNORE, Item, image_item, text_item
from unimm.tokenizers.text import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Resize:
    """The released resize: sides between `shortest` and `longest` where both fit, multiples of `stride`, few pixels."""

    longest: int
    shortest: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024

    FILES: ClassVar = {
        "longest": "max_image_size",
        "shortest": "min_image_size",
        "stride": "image_stride",
        "max_pixels": "max_pixels",
    }

    @classmethod
    def from_files(cls, files: Mapping[str, int], *, longest: int, shortest: int, stride: int) -> "Resize":
        """Read a vae_transform or vit_transform; the numbers given for what is missing."""
        known = {ours: files[theirs] for ours, theirs in cls.FILES.items() if theirs in files}
        return cls(**{"longest": longest, "shortest": shortest, "stride": stride, **known})

    def to_files(self) -> dict[str, int]:
        """The mapping that `from_files` reads."""
        return {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}

    def size(self, width: int, height: int, *, images: int = 1) -> tuple[int, int]:
        """(width, height) after the resize, for one of `images` pictures that share max_pixels.

        As the released data/transforms.py does: rounds twice, to even, and shrinks by the ratio of pixels where its
        root is meant; both kept, since the models were trained with them.
        """
        scale = max(min(self.longest / max(width, height), 1.0), self.shortest / min(width, height))
        w, h = self._scaled(width, height, scale)
        if w * h > self.max_pixels / images:
            w, h = self._scaled(w, h, self.max_pixels / images / (w * h))
        if max(w, h) > self.longest:
            w, h = self._scaled(w, h, self.longest / max(w, h))
        return w, h

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        w, h = (max(self.stride, self.stride * round(round(side * scale) / self.stride)) for side in (width, height))
        return w, h

    def __call__(self, image: Image.Image, *, images: int = 1) -> Image.Image:
        """The resized picture (PIL's bicubic, with its antialias)."""
        return image.resize(self.size(image.width, image.height, images=images), Image.Resampling.BICUBIC)


THINK = (
    "You should first think about the {0} process in the mind and {1} \n"
    "The {0} process is enclosed within <think> </think> tags, i.e. <think> {0} process here </think> {2} here"
)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What the verbs do unless told otherwise: the released app's numbers. A nano brings its own."""

    steps: int = 49  # the app's 50 "timesteps" are knots
    shift: float = 3.0
    draw: Guidance = Guidance()
    edit: Guidance = Guidance(image=2.0, interval=(0.0, 1.0), renorm="text_channel")
    size: tuple[int, int] = (1024, 1024)
    think_tokens: int = 1000
    think_draw: str = THINK.format("planning", "then generate the image.", "image")
    think_answer: str = THINK.format("reasoning", "then provide the user with the answer.", "answer")

    @classmethod
    def from_files(cls, files: Mapping) -> "Defaults":
        """From the mapping that a nano's config.json carries under "generation"; the released numbers for what is missing."""
        guidance = {
            k: Guidance(**files[k] | {"interval": tuple(files[k]["interval"])}) for k in ("draw", "edit") if k in files
        }
        size = {"size": tuple(files["size"])} if "size" in files else {}
        return cls(**{**files, **guidance, **size})


@dataclass(frozen=True, kw_only=True)
class Markers:
    """Ids around every text (bos, eos) and every image (boi, eoi)."""

    bos: int
    eos: int
    boi: int
    eoi: int

    STRINGS: ClassVar = {"bos": "<|im_start|>", "eos": "<|im_end|>", "boi": "<|vision_start|>", "eoi": "<|vision_end|>"}
    FILES: ClassVar = {"bos": "bos_token_id", "eos": "eos_token_id", "boi": "start_of_image", "eoi": "end_of_image"}

    @classmethod
    def of(cls, tokenizer: TextTokenizer) -> "Markers":
        """The ids of the markers by their strings. Raises ValueError for a tokenizer that lacks one."""
        ids = {name: found for name, token in cls.STRINGS.items() if (found := tokenizer.id(token)) is not None}
        if lost := [token for name, token in cls.STRINGS.items() if name not in ids]:
            raise ValueError(f"the tokenizer lacks {', '.join(lost)}: expected the Qwen2.5 special tokens")
        return cls(**ids)

    @classmethod
    def from_files(cls, files: Mapping[str, int]) -> "Markers":
        """From the new_token_ids of a config."""
        return cls(**{ours: files[theirs] for ours, theirs in cls.FILES.items()})

    def to_files(self) -> dict[str, int]:
        """The mapping that `from_files` reads."""
        return {theirs: getattr(self, ours) for ours, theirs in self.FILES.items()}


@dataclass(frozen=True, kw_only=True)
class Items:
    """What a text or a picture is in the sequence: its tokens and the markers around them. A patch of None: it has none."""

    markers: Markers
    patch: int | None  # pixels a side of the ViT's patches
    look_side: int
    latent_patch: int | None  # latents a side of a token to draw
    latent_side: int
    interpolate: bool

    def text(self, ids: Sequence[int]) -> Item:
        """[bos] ids [eos], without loss."""
        return text_item([self.markers.bos, *ids, self.markers.eos])

    def answer(self, ids: Sequence[int]) -> Item:
        """[bos] ids [eos], with the loss of the next id at all but the last."""
        return text_item([self.markers.bos, *ids, self.markers.eos], labels=[*ids, self.markers.eos, IGNORE])

    def looked_at(self, pixels: Tensor) -> Item:
        """An image [3, h, w] in [-1, 1] as the ViT's patches."""
        if self.patch is None:
            raise NotImplementedError("this checkpoint was trained without its ViT (visual_und false): it cannot look")
        p = self.patch
        where = places(pixels.shape[1] // p, pixels.shape[2] // p, self.look_side, interpolate=self.interpolate)
        return image_item("look", patchify(pixels, p), where, markers=(self.markers.boi, self.markers.eoi))

    def drawn(self, latent: Tensor, *, time: float = 0.0, noised: bool = False) -> Item:
        """A latent [z, h, w]: a clean picture of the past, or a noised target."""
        p = self.check_draws()
        return self.named(patchify(latent, p), latent.shape[1] // p, latent.shape[2] // p, time=time, noised=noised)

    def named(self, tokens: Tensor, height: int, width: int, *, time: float = 0.0, noised: bool = False) -> Item:
        """Latent tokens [height * width, C], or whatever names them until they are there."""
        markers = (self.markers.boi, self.markers.eoi)
        return image_item("draw", tokens, self.latent_grid(height, width), markers=markers, time=time, noised=noised)

    def latent_grid(self, height: int, width: int) -> Tensor:
        """Places in the table of latent positions, [height * width]."""
        return places(height, width, self.latent_side, interpolate=self.interpolate)

    def check_draws(self) -> int:
        """The latent patch. Raises NotImplementedError for a checkpoint that cannot draw."""
        if self.latent_patch is None:
            raise NotImplementedError("this checkpoint was trained to look only (visual_gen false): it cannot draw")
        return self.latent_patch
