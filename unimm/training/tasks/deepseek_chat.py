"""The shared half of training Janus and JanusFlow on the shapes world: options, and conversations by step.

Samples are packed, all kinds in every batch (arXiv 2410.13848, sections 3.3 and 3.4; docs/originals/janus.md,
"Training").
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimm.data.batching import THOUGHT_TASKS, sample_tasks, training_example
from unimm.data.shapes import TASKS, Example
from unimm.data.shapes.goal import AnswerGoal
from unimm.data.shapes.novel_attributes import augment_novel_attributes
from unimm.data.shapes.world import IMAGE_SIZE
from unimm.models.common.deepseek_chat import DeepseekChatModel
from unimm.models.common.deepseek_processor import IMAGE_PLACEHOLDER, ROLES, JanusSpecialTokens
from unimm.processing.requests import Message
from unimm.sequence.packing import PackedBatch
from unimm.sequence.parts import ImagePart, Part
from unimm.training.cache import SHARD_SIZE, FeatureCache, Record
from unimm.training.config import RecipeSection
from unimm.training.fields import AtLeastOne, Fraction, TaskWeights, held_out_seed, known_tasks
from unimm.training.samples import sample_grid
from unimm.training.tasks.chat_sample import ChatSample
from unimm.training.tasks.deepseek_samples import ChatSampleBuilder

# a loss for each kind of sample
IMAGE_KINDS = ("draw", "edit", "reason")
TEXT_KINDS = ("caption", "answer", "fact")
DEEPSEEK_TOKENS = (*JanusSpecialTokens.TOKENS.values(), IMAGE_PLACEHOLDER, *ROLES)


@dataclass(frozen=True, kw_only=True)
class DeepseekChatTrainingConfig(RecipeSection):
    """The `options` of both recipes."""

    # samples of each task in a batch, or their weights (unimm.data.batching.sample_tasks)
    tasks: Annotated[TaskWeights, known_tasks((*TASKS, *THOUGHT_TASKS))]
    # the part of generation samples whose prompt is dropped, which guidance compares with
    dropout: Fraction
    # the part of things in generation and editing with a novel colour, and with a novel shape
    novel_colours: Fraction
    novel_shapes: Fraction
    vocab_size: AtLeastOne
    # the folder of a trained ViT, which the vision encoder begins from
    vit: str
    # prefixes of the names of parameters that are not trained; the image tokenizer never is
    frozen: tuple[str, ...]
    # whether torch.compile fuses the decoder's layers around attention
    compile: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedExample(Example):
    """The example of a cache's record: its texts, blank images, and the features of the images [n, F]."""

    features: Tensor

    @classmethod
    def from_record(cls, record: Record) -> EncodedExample:
        """The example of a record."""
        blank = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        answer = bytes(record["answer"].tolist()).decode()
        return cls(
            task=bytes(record["task"].tolist()).decode(),
            prompt=bytes(record["prompt"].tolist()).decode(),
            goal=AnswerGoal(text=answer),
            images=(blank,) * int(record["n_images"]),
            answer=answer or None,
            target=blank if len(record["target"]) else None,
            features=record["features"],
        )


@dataclass(frozen=True, kw_only=True)
class DeepseekChatDataset(ABC):
    """Batches by step: the same for a seed on every machine, and made without the model."""

    options: DeepseekChatTrainingConfig
    builder: ChatSampleBuilder
    batch_size: int
    seed: int
    # in place of new samples, where there is one
    cache: FeatureCache | None = None

    @abstractmethod
    def encoded(self, batch: Any, records: list[Record]) -> Any:
        """The batch with its targets as they were encoded. records: of the samples that have one, in order."""

    def __call__(self, step: int) -> Any:
        rng = random.Random(f"{self.seed}/{step}")
        if self.cache is None:
            return self.batch(self.examples(step, self.batch_size, rng), rng)
        records = [self.cache[i] for i in self.cache.batch_indices(step, self.batch_size, self.seed)]
        with_target = [record for record in records if len(record["target"])]
        return self.encoded(self.batch([EncodedExample.from_record(record) for record in records], rng), with_target)

    def batch(self, examples: Sequence[Example], rng: random.Random) -> Any:
        """Examples as one pack, with conditions dropped at random."""
        return self.builder.collate([self.sample(one, rng) for one in examples], rng)

    def sample(self, one: Example, rng: random.Random) -> ChatSample:
        """A question with its labelled answer, or an image to generate behind its prompt."""
        kind = one.task.split(".")[0]
        prompt = self.prompt_parts(one)
        if one.target is None:
            return ChatSample(kind=kind, parts=prompt, target=None)
        return self.builder.generation_sample(kind, prompt, one.target, rng)

    def examples(self, step: int, size: int, rng: random.Random) -> list[Example]:
        """The examples of a step, or of a shard of a cache."""
        tasks = sample_tasks(self.options.tasks, size, rng)
        examples = [training_example(task, step * size + i, seed=self.seed) for i, task in enumerate(tasks)]
        return [self.augment(one, rng) for one in examples]

    def cache_inputs(self, shard: int) -> tuple[list[Example], Any]:
        """The examples of one shard of a cache, and their batch."""
        rng = random.Random(f"{self.seed}/cache/{shard}")
        examples = self.examples(shard, SHARD_SIZE, rng)
        # which conditions are dropped is another matter at every step
        whole = replace(self, builder=replace(self.builder, dropout=0.0))
        return examples, whole.batch(examples, rng)

    def augment(self, one: Example, rng: random.Random) -> Example:
        """The example, with some novel attributes if it is about things; facts stay as they are."""
        return augment_novel_attributes(one, rng, colours=self.options.novel_colours, shapes=self.options.novel_shapes)

    def prompt_parts(self, one: Example) -> list[Part]:
        """A question with its labelled answer, or a prompt to generate from, after the image that it edits, if any."""
        images = [Image.fromarray(image) for image in one.images]
        if one.answer is not None:
            message: Message = {"role": "user", "content": one.prompt, "images": images}
            parts = self.builder.processor.with_answer([message], one.answer)
        else:
            assert one.target is not None, f"{one.task} has neither an answer nor an image"
            parts = self.builder.processor.generation_parts(one.prompt, images)
        return with_features(parts, one.features) if isinstance(one, EncodedExample) else parts


class DeepseekChatTask(ABC):
    """The half of both tasks that trains on a cache: features of images, and targets as they are encoded."""

    model: DeepseekChatModel
    batch: DeepseekChatDataset

    @abstractmethod
    def encode_targets(self, batch: Any) -> Tensor:
        """What the image tokenizer makes of a batch's targets, one an image."""

    @property
    def cache_inputs(self) -> Callable[[int], tuple[list[Example], Any]]:
        """The samples of one shard of a cache."""
        return self.batch.cache_inputs

    def cache_records(self, inputs: tuple[list[Example], Any]) -> list[Record]:
        """Texts, features of the images to understand, encoded targets."""
        examples, batch = inputs
        targets = list(self.encode_targets(batch)) if len(batch.images) else []
        return chat_records(examples, self.image_features(batch.pack), targets)

    def image_features(self, pack: PackedBatch) -> list[Tensor]:
        """The features of each image of a pack to understand, [n, F] each."""
        if pack.und_images is None:
            return []
        features = self.model.image_features(pack.und_images.to(self.model.device)).cpu()
        return list(features.split(pack.und_images.lengths))

    def use_cache(self, cache: FeatureCache) -> None:
        """Make batches of the cache's records from now on."""
        if any(parameter.requires_grad for parameter in self.model.vision.parameters()):
            raise ValueError(
                "got a cache, and a vision encoder that is trained, which changes the features it would hold: add "
                "`vision.` to frozen, or leave `cache` out"
            )
        self.batch = replace(self.batch, cache=cache)

    @property
    def held_out_batch(self) -> DeepseekChatDataset:
        """Batches of scenes that no run trains on."""
        return replace(self.batch, seed=held_out_seed(self.batch.seed), cache=None)

    def sample_image(self) -> Image.Image:
        """Images of test prompts."""
        return sample_grid(self.model)


def chat_records(examples: Sequence[Example], features: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Record]:
    """A cache's records of examples.

    features: of the examples' images in order, [n, F] each; targets: the encoded target of each example that has one.
    """
    left = iter(features)
    drawn = iter(targets)
    none = torch.zeros(0)
    no_features = features[0][:0] if features else none
    no_target = targets[0][:0] if targets else none
    records = []
    for one in examples:
        seen = [next(left) for _ in one.images]
        records.append({
            "task": text_bytes(one.task),
            "prompt": text_bytes(one.prompt),
            "answer": text_bytes(one.answer or ""),
            "n_images": torch.tensor([len(seen)]),
            "features": torch.cat(seen) if seen else no_features,
            "target": next(drawn) if one.target is not None else no_target,
        })  # fmt: skip
    return records


def text_bytes(text: str) -> Tensor:
    """A text as its bytes in UTF-8 [n]."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def with_features(parts: Sequence[Part], features: Tensor) -> list[Part]:
    """The parts, with features [n, F] in place of the patches of their images."""
    images = iter(features.split([part.n_tokens for part in parts if isinstance(part, ImagePart)]))
    return [replace(part, tokens=next(images), encoded=True) if isinstance(part, ImagePart) else part for part in parts]
