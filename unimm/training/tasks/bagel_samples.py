"""BAGEL's samples of records, by the released plans, and the packs that they make; without the model.

docs/originals/bagel.md, "Training plans" (data/interleave_datasets, data/dataset_base.py of the released code).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from unimm.data.records import Record, RecordImage, RecordText, choose_wordings, sample_edit
from unimm.generation.flow import shift_timesteps
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.processor import BagelImageProcessor, BagelProcessor
from unimm.sequence.packing import PackedBatch, pack_sequences
from unimm.sequence.parts import ImagePart, Part
from unimm.tokenizers.text import TextTokenizer
from unimm.training.config import from_mapping
from unimm.training.fields import AtLeastOne, Fraction, Positive, RecipeSection
from unimm.training.tasks.bagel_plans import ConditionDropout, PlannedPart, drop_conditions


@dataclass(frozen=True, kw_only=True)
class BagelTransformConfig(RecipeSection):
    """The numbers of an image processor (unimm.models.bagel.processor)."""

    max_image_size: AtLeastOne
    min_image_size: AtLeastOne
    image_stride: AtLeastOne
    # of all images of a sample together
    max_pixels: AtLeastOne = 14 * 14 * 9 * 1024

    def processor(self) -> BagelImageProcessor:
        """The image processor."""
        return BagelImageProcessor(
            max_size=self.max_image_size,
            min_size=self.min_image_size,
            stride=self.image_stride,
            max_pixels=self.max_pixels,
        )


@dataclass(frozen=True, kw_only=True)
class BagelSampleConfig(RecipeSection):
    """How records become samples: part of the recipe's `options`."""

    # noised copies of a target, each at its own timestep; the released code has one
    timesteps_per_image: AtLeastOne
    # of the distribution of timesteps
    timestep_shift: Positive
    # the part of the records with reasoning whose reasoning is written out
    think_prob: Fraction
    # rates of ConditionDropout
    dropout: Mapping[str, Fraction]
    # of images for the VAE; of images for the ViT in records that generate images, and in those that do not; null for
    # the model's own
    vae_transform: BagelTransformConfig | None = None
    vit_transform: BagelTransformConfig | None = None
    understand_transform: BagelTransformConfig | None = None

    def __post_init__(self) -> None:
        self.condition_dropout()

    def condition_dropout(self) -> ConditionDropout:
        """The rates of `dropout`."""
        return from_mapping(ConditionDropout, self.dropout, where="dropout of the options")


@dataclass(frozen=True, kw_only=True)
class BagelSample:
    """What a record became: parts whose latent tokens are indices (image, token of it) and whose patches are uint8."""

    parts: tuple[Part, ...]
    # those for the VAE, [h, w, 3]
    images: tuple[NDArray[np.uint8], ...]

    @property
    def n_tokens(self) -> int:
        """The rows that it takes of a pack."""
        return sum(part.segment.length for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class BagelRecordBatch:
    """A pack whose latent tokens are indices (image, token of it), until the VAE has encoded the images."""

    pack: PackedBatch
    # uint8, those of one size together: [P, 3, h, w] each
    images: tuple[Tensor, ...]
    posterior: tuple[Tensor, ...]  # noise [P, C, h / 8, w / 8] for each
    token_starts: Tensor  # of every image the first of its tokens, among those of all images, size after size
    noise: Tensor  # [latent tokens, p * p * C]
    n_labels: int
    n_noised: int


@dataclass(frozen=True, kw_only=True)
class BagelSampleBuilder:
    """Makes samples of records, and packs of samples (unimm.training.packing.SampleBuilder)."""

    options: BagelSampleConfig
    config: BagelConfig
    processor: BagelProcessor
    tokenizer: TextTokenizer

    def __post_init__(self) -> None:
        config = self.config
        units = {"vae_transform": (config.latent_downsample, config.latent_grid)}
        if config.vision is not None:
            vit = config.vision.patch_size, config.vit_grid
            units |= {"vit_transform": vit, "understand_transform": vit}
        for name, (unit, grid) in units.items():
            transform = self.transforms[name]
            most = transform.max_size if config.interpolate_pos_embed else unit * grid
            if transform.stride % unit or not transform.stride <= transform.max_size <= most:
                raise ValueError(
                    f"got {name} with image_stride {transform.stride} and max_image_size {transform.max_size}, expected a "
                    f"multiple of {unit} and at most {unit * grid}, the model's table of positions: correct the options"
                )

    @property
    def transforms(self) -> dict[str, BagelImageProcessor]:
        """The image processors, by the names of the options."""
        ours = {
            "vae_transform": self.config.vae_transform,
            "vit_transform": self.config.vit_transform,
            "understand_transform": self.config.vit_transform,
        }
        given = {name: getattr(self.options, name) for name in ours}
        return {name: given[name].processor() if given[name] else ours[name] for name in ours}

    @property
    def least_image_tokens(self) -> int:
        """The rows of the smallest image to generate: of a square one."""
        transform = self.transforms["vae_transform"]
        side = transform.output_size(transform.min_size, transform.min_size)[0] // self.config.latent_downsample
        return side**2 + 2

    def prepare(self, record: Record, rng: random.Random) -> BagelSample:
        """The sample of a record: its steps, wordings, reasoning, timesteps and what is dropped, by chance.

        Raises ValueError for a record that the model has no parts for.
        """
        record = choose_wordings(sample_edit(record, rng), rng)
        generates = any(image.loss for image in record.images)
        if generates and not self.config.visual_gen:
            raise ValueError("an image to generate, and a model that generates none (visual_gen false)")
        if record.images and self.config.vision is None:
            raise ValueError("an image to understand, and a model without a ViT (visual_und false)")
        if not generates and not any(text.loss and not text.thinking for text in record.texts):
            raise ValueError("neither a text nor an image carries loss: expected an answer, or an image to generate")
        images = BagelSampleImages(self, rng, generates=generates, n_images=len(record.images))
        planned = self.plan(record, images, rng)
        parts = drop_conditions(planned, self.options.condition_dropout(), rng.random)
        return BagelSample(parts=tuple(parts), images=tuple(images.arrays))

    def plan(self, record: Record, images: BagelSampleImages, rng: random.Random) -> list[PlannedPart]:
        """The parts of a record with one wording of each text, in its order, and which of them may be dropped.

        An image to generate that something follows is a target first, and then a condition, as latents and as patches.
        Where images are generated, texts and images without loss are conditions that may be dropped, the system's text
        apart; reasoning ahead of an image goes with the prompt.
        """
        thinks = bool(record.thinking) and rng.random() < self.options.think_prob
        planned: list[PlannedPart] = []
        if thinks and not any(text.role == "system" for text in record.texts):
            defaults = self.config.defaults
            system = defaults.think_generate_prompt if images.generates else defaults.think_understand_prompt
            planned.append(PlannedPart(self.text_part(system, loss=False)))
        reasoning = ""
        for part, following in zip_longest(record.parts, record.parts[1:]):
            if isinstance(part, RecordImage):
                planned += images.planned(part, ends=following is None)
            elif not part.thinking:
                droppable = images.generates and not part.loss and part.role != "system"
                planned.append(PlannedPart(self.text_part(reasoning + part.text, loss=part.loss), droppable=droppable))
                reasoning = ""
            elif thinks:
                reasoning = f"<think>{part.text}</think>"
                # reasoning and answer are one message
                if not (isinstance(following, RecordText) and following.loss and not following.thinking):
                    text = self.text_part(reasoning, loss=part.loss)
                    planned.append(PlannedPart(text, with_text=images.generates))
                    reasoning = ""
        return planned

    def text_part(self, text: str, *, loss: bool) -> Part:
        """A text between its special tokens."""
        ids = self.tokenizer.encode(text)
        return self.processor.answer_part(ids) if loss else self.processor.text_part(ids)

    def collate(self, samples: Sequence[BagelSample], rng: random.Random) -> BagelRecordBatch:
        """Samples as one pack. One without patches, or without latents, gets a smallest image without loss: on several
        ranks every part of the model must take part in every step."""
        samples = [*samples, *self.fillers(samples)]
        arrays = [image for sample in samples for image in sample.images]
        pack = pack_sequences(numbered_images(samples))
        sizes: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(arrays):
            sizes.setdefault(image.shape[:2], []).append(i)
        groups = tuple(
            rearrange(torch.from_numpy(np.stack([arrays[i] for i in some])), "P h w C -> P C h w").contiguous()
            for some in sizes.values()
        )
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        vae = self.config.vae
        posterior = tuple(
            torch.randn(len(x), vae.latent_channels, *(side // vae.stride for side in x.shape[2:]), generator=generator)
            for x in groups
        )
        return BagelRecordBatch(
            pack=pack,
            images=groups,
            posterior=posterior,
            token_starts=self._token_starts(sizes, len(arrays)),
            noise=torch.randn(len(pack.timesteps), self.config.latent_dim, generator=generator),
            n_labels=int((pack.labels >= 0).sum()),
            n_noised=int(pack.noised.sum()),
        )

    def _token_starts(self, sizes: Mapping[tuple[int, int], Sequence[int]], n_images: int) -> Tensor:
        starts = [0] * n_images
        n_tokens = 0
        for (height, width), images in sizes.items():
            for i in images:
                starts[i] = n_tokens
                n_tokens += height * width // self.config.latent_downsample**2
        return torch.tensor(starts)

    def fillers(self, samples: Sequence[BagelSample]) -> list[BagelSample]:
        """Samples without loss, each of the smallest image, for the kinds of image that the pack lacks."""
        kinds = {part.kind for sample in samples for part in sample.parts}
        fillers = []
        images = BagelSampleImages(self, random.Random(0), generates=True, n_images=1)
        if self.config.vision and "und_image" not in kinds:
            side = self.config.vision.patch_size
            fillers.append(BagelSample(parts=(images.vit_part(blank(side)),), images=()))
        if self.config.visual_gen and "gen_image" not in kinds:
            part = images.latent_part(blank(self.config.latent_downsample))
            fillers.append(BagelSample(parts=(part,), images=tuple(images.arrays)))
        return fillers


class BagelSampleImages:
    """The images of one sample, and their parts."""

    def __init__(self, builder: BagelSampleBuilder, rng: random.Random, *, generates: bool, n_images: int) -> None:
        self.builder = builder
        self.rng = rng
        # whether the sample generates images: then those without loss are conditions of it
        self.generates = generates
        self.n_images = n_images
        self.vae_transform = builder.transforms["vae_transform"]
        self.vit_transform = builder.transforms["vit_transform" if generates else "understand_transform"]
        self.arrays: list[NDArray[np.uint8]] = []

    def planned(self, image: RecordImage, *, ends: bool) -> list[PlannedPart]:
        """The parts of an image. ends: whether the sample ends with it. Raises ValueError for a broken one."""
        loaded = image.load()
        patches = self.vit_transform(loaded, n_images=1 if self.generates else self.n_images)
        vit = np.array(patches)
        if not self.generates:
            return [PlannedPart(self.vit_part(vit))]
        latents = self.latent_part(np.array(self.vae_transform(loaded)))
        targets = [PlannedPart(part) for part in self.noised_parts(latents)] if image.loss else []
        if image.loss and ends:
            return targets
        conditions = (latents, self.vit_part(vit))
        return [*targets, *(PlannedPart(part, droppable=True) for part in conditions)]

    def vit_part(self, image: NDArray[np.uint8]) -> ImagePart:
        """An image [h, w, 3] as the ViT's patches, uint8."""
        return self.builder.processor.vit_part(rearrange(torch.from_numpy(image), "h w C -> C h w"))

    def latent_part(self, image: NDArray[np.uint8]) -> ImagePart:
        """An image [h, w, 3] as clean latents: its tokens are (index, index of the token)."""
        self.arrays.append(image)
        h, w = (side // self.builder.config.latent_downsample for side in image.shape[:2])
        tokens = torch.stack((torch.full((h * w,), len(self.arrays) - 1), torch.arange(h * w)), -1)
        return self.builder.processor.latent_token_part(tokens, h, w)

    def noised_parts(self, clean: ImagePart) -> list[ImagePart]:
        """Noised copies of latents, each at t = sigmoid(n), n ~ N(0, 1), shifted (docs/originals/bagel.md, "Losses")."""
        options = self.builder.options
        normals = torch.tensor([self.rng.gauss(0, 1) for _ in range(options.timesteps_per_image)])
        timesteps = shift_timesteps(normals.sigmoid(), options.timestep_shift).tolist()
        # a target does not advance the position, and nothing behind it sees it
        segment = replace(clean.segment, visible=False, advance=0)
        return [replace(clean, segment=segment, timestep=t, noised=True) for t in timesteps]


def numbered_images(samples: Sequence[BagelSample]) -> list[list[Part]]:
    """The parts of samples, whose latent tokens name an image of all samples in place of one of their own."""
    numbered = []
    n_images = 0
    for sample in samples:
        first = torch.tensor([n_images, 0])
        numbered.append(
            [
                replace(part, tokens=part.tokens + first)
                if isinstance(part, ImagePart) and part.kind == "gen_image"
                else part
                for part in sample.parts
            ]
        )
        n_images += len(sample.images)
    return numbered


def blank(side: int) -> NDArray[np.uint8]:
    """A black image."""
    return np.zeros((side, side, 3), dtype=np.uint8)
