"""Asking a model for the outputs of a benchmark's items, and keeping them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from unimm.checkpoint.save import held_tensors
from unimm.distributed.shared_model import SharedModel
from unimm.evaluation.folder import RunFolder
from unimm.evaluation.items import EvalItem
from unimm.evaluation.sharding import RunShard
from unimm.models.base import Generation

ImageLists = list[list[Image.Image]]


class BenchmarkModel(Protocol):
    """The verbs that are scored, in batches."""

    def generate(self, prompt: Sequence[str], *, images: ImageLists | None, seed: Sequence[int]) -> Generation: ...

    def understand(self, images: ImageLists, question: Sequence[str]) -> list[str]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelOutput:
    """What a model gave for an item: an image, with the reasoning that led to it in think mode, or a text."""

    image: Image.Image | None = None
    text: str = ""


def produce(
    model: BenchmarkModel, items: Sequence[EvalItem], options: Mapping[str, Any] | None = None
) -> list[ModelOutput]:
    """The outputs of a batch of items that are asked for in the same way. options: of `generate`."""
    prompts = [one.prompt for one in items]
    images = [one.load_images() for one in items]
    if items[0].output == "text":
        return [ModelOutput(text=text) for text in model.understand(images, prompts)]
    # only families that support it have the parameter
    think = {"think": True} if items[0].think else {}
    size = {"size": items[0].size} if items[0].size else {}
    seeds = [one.seed for one in items]
    given = images if any(images) else None
    made = model.generate(prompts, images=given, seed=seeds, **think, **{**(options or {}), **size})
    texts = made.texts or [""] * len(items)
    return [ModelOutput(image=image, text=text) for image, text in zip(made.images, texts, strict=True)]


def generate_outputs(
    model: BenchmarkModel | SharedModel,
    batches: Sequence[Sequence[EvalItem]],
    folder: RunFolder,
    shard: RunShard,
    *,
    options: Mapping[str, Any],
    done: Mapping[str, Any],
    progress: bool = True,
) -> None:
    """Produce and keep the outputs of a shard's batches. done: items whose outputs are there already.

    A batch is kept as soon as it is made. Of a batch that was kept in part all is made again, and what lacked is
    kept, so that an output never depends on where a run was stopped. Raises ValueError, with the items' ids, for what
    the model refuses.
    """
    mine = shard.pick(batches)
    n_done = sum(item.id in done for batch in mine for item in batch)
    with (
        folder.outputs_manifest(shard) as manifest,
        tqdm(total=sum(map(len, mine)), initial=n_done, unit="item", desc="generating", disable=not progress) as bar,
    ):
        for batch in mine:
            missing = [item for item in batch if item.id not in done]
            if not missing:
                continue
            try:
                outputs = _produce_together(model, batch, options)
            except ValueError as error:
                raise ValueError(f"item {' or '.join(item.id for item in batch)}: {error}") from error
            for item, output in zip(batch, outputs, strict=True):
                if item.id not in done:
                    manifest.append([_row(item, output, folder)])
            bar.update(len(missing))


def _produce_together(
    model: BenchmarkModel | SharedModel, batch: Sequence[EvalItem], options: Mapping[str, Any]
) -> list[ModelOutput]:
    if isinstance(model, SharedModel):
        return model.call(produce, batch, options)
    return produce(model, batch, options)


def _row(item: EvalItem, output: ModelOutput, folder: RunFolder) -> dict[str, Any]:
    saved: dict[str, Any] = {"image": None} if output.image is None else folder.save_image(item, output.image)
    return {
        "id": item.id,
        "group": item.group,
        "prompt": item.prompt,
        "answer": item.answer,
        "seed": item.seed,
        "think": item.think,
        "text": output.text,
        **saved,
    }


def describe_weights(model: Any) -> dict[str, Any]:
    """The SHA-256 of a model's weights as they are in memory, wherever they came from, and how many numbers they are; two
    of 4 bits in a byte are one.

    Empty for what is no module.
    """
    if not isinstance(model, nn.Module):
        return {}
    digest = hashlib.sha256()
    n = 0
    for name, tensor in held_tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values: Any = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(memoryview(values))
        n += tensor.numel()
    return {"sha256": digest.hexdigest(), "numbers": n}
