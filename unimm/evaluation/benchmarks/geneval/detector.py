"""What GenEval looks with: a Mask2Former for objects and a CLIP for their colours, both of transformers.

The original takes its Mask2Former (Swin-S, COCO instances) from mmdet; the weights on the hub are the same, converted.
Axes: Q queries of the detector, C classes, h w sides of an image or of a mask.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from unimm.evaluation.benchmarks.geneval.protocol import COLOURS, THRESHOLD, Detection, Detections, check_image
from unimm.evaluation.generating import describe_weights
from unimm.evaluation.judges.base import ItemJudge, JudgeTask, Verdict

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
# GenEval's names of three of COCO's classes
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
# the surest objects of an image, of all classes
MOST_INSTANCES = 100
GREY = "#999"
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


def instances(
    class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int], names: Sequence[str]
) -> dict[str, list[Detection]]:
    """Objects from a detector's class logits [Q, C + 1], the last class for nothing, and mask logits [Q, h, w].

    Every pair of query and class is one; its score is the class's probability times the mean probability of its mask's
    pixels. size: (height, width) of the image. As in mmdet's instance inference.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    n_classes = probabilities.shape[1]
    scores, places = probabilities.flatten().topk(min(MOST_INSTANCES, probabilities.numel()))
    masks = F.interpolate(mask_logits.float()[None], size=size, mode="bilinear", align_corners=False)[0]
    found: dict[str, list[Detection]] = {}
    for score, place in zip(scores.tolist(), places.tolist(), strict=True):
        logits = masks[place // n_classes]
        inside = logits > 0
        if not inside.any():
            continue
        rows = inside.any(1).nonzero().squeeze(1)
        columns = inside.any(0).nonzero().squeeze(1)
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        confidence = score * logits[inside].sigmoid().mean().item()
        detection = Detection(box=box, score=confidence, mask=inside.cpu().numpy())
        found.setdefault(names[place % n_classes], []).append(detection)
    return found


def cut_out(image: Image.Image, one: Detection) -> Image.Image:
    """An object's box, grey outside its mask."""
    if one.mask is not None:
        blank = Image.new("RGB", image.size, GREY)
        image = Image.composite(image, blank, Image.fromarray(one.mask.astype(np.uint8) * 255))
    left, top, right, bottom = one.box
    return image.crop((int(left), int(top), int(right), int(bottom)))


class ObjectDetector:
    """Finds the objects of an image, by class."""

    def __init__(self, model: nn.Module, prepare: Callable[[Image.Image], Tensor], names: Sequence[str]) -> None:
        """prepare: an image to pixels [1, 3, h, w]. names: of the classes, in order."""
        self.model = model.eval()
        self.names = tuple(RENAMED.get(name, name) for name in names)
        self._prepare = prepare

    @classmethod
    def from_pretrained(cls, name: str, device: str) -> "ObjectDetector":
        """A Mask2Former of the hub, or of a folder."""
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        model: Any = Mask2FormerForUniversalSegmentation.from_pretrained(name)
        model.to(device)
        processor = AutoImageProcessor.from_pretrained(name)
        labels = model.config.id2label
        return cls(
            model,
            lambda image: processor(images=image, return_tensors="pt")["pixel_values"],
            [labels[i] for i in range(len(labels))],
        )

    @torch.inference_mode()
    def detect(self, image: Image.Image) -> dict[str, list[Detection]]:
        """The objects of an RGB image."""
        device = next(self.model.parameters()).device
        out = self.model(pixel_values=self._prepare(image).to(device))
        size = (image.height, image.width)
        return instances(out.class_queries_logits[0], out.masks_queries_logits[0], size, self.names)


class ColourNamer:
    """Names the colour of objects, by a CLIP, zero-shot."""

    def __init__(
        self,
        model: nn.Module,
        prepare: Callable[[list[Image.Image]], Tensor],
        tokenize: Callable[[list[str]], Mapping[str, Tensor]],
    ) -> None:
        """prepare: images to pixels [n, 3, h, w]. tokenize: texts to the model's arguments."""
        self.model = model.eval()
        self._prepare = prepare
        self._tokenize = tokenize
        self._classifiers: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(cls, name: str, device: str) -> "ColourNamer":
        """A CLIP of the hub, or of a folder."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        processor = AutoImageProcessor.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = CLIPModel.from_pretrained(name)
        model.to(device)
        return cls(
            model,
            lambda images: processor(images=images, return_tensors="pt")["pixel_values"],
            lambda texts: tokenizer(texts, padding=True, return_tensors="pt"),
        )

    @torch.inference_mode()
    def name_colours(self, image: Image.Image, name: str, objects: Sequence[Detection]) -> list[str]:
        """The colour of each object of a class."""
        device = next(self.model.parameters()).device
        pixels = self._prepare([cut_out(image, one) for one in objects]).to(device)
        model = cast("Any", self.model)
        features = F.normalize(_embedding(model.get_image_features(pixel_values=pixels)), dim=-1)
        return [COLOURS[i] for i in (features @ self._classifier(name).T).argmax(-1).tolist()]

    def _classifier(self, name: str) -> Tensor:
        """An embedding a colour, the mean over the templates [10, D]."""
        if name not in self._classifiers:
            device = next(self.model.parameters()).device
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            arguments = {key: value.to(device) for key, value in self._tokenize(texts).items()}
            embedded = _embedding(cast("Any", self.model).get_text_features(**arguments))
            means = F.normalize(embedded, dim=-1).view(len(COLOURS), len(TEMPLATES), -1).mean(1)
            self._classifiers[name] = F.normalize(means, dim=-1)
        return self._classifiers[name]


def _embedding(out: Any) -> Tensor:
    """An embedding, which newer versions of transformers return as a part of an output."""
    return out if isinstance(out, Tensor) else out.pooler_output


class DetectorJudge(ItemJudge):
    """Judges by GenEval's rules what a detector finds."""

    name = "detector"

    def __init__(self, detector: ObjectDetector, colours: ColourNamer, *, models: tuple[str, str]) -> None:
        """models: what the two were loaded by."""
        self._detector = detector
        self._colours = colours
        self._models = models
        self._weights = [describe_weights(one.model) for one in (detector, colours)]

    def identity(self) -> dict[str, Any]:
        detector, clip = self._models
        weights = {"detector": self._weights[0], "clip": self._weights[1]}
        return {"kind": "detector", "detector": detector, "clip": clip, "weights": weights}

    def judge(self, tasks: Sequence[JudgeTask]) -> Iterator[tuple[JudgeTask, Verdict]]:
        """Verdicts, in order; what was detected is kept with each. Raises ValueError for a class that is not known."""
        asked = {clause["class"] for task in tasks for clause in clauses(task.item.payload)}
        if unknown := sorted(asked - set(self._detector.names)):
            raise ValueError(f"the detector does not know {', '.join(unknown)}: expected one for COCO's 80 classes")
        for task in tasks:
            yield task, self._verdict(task)

    def _verdict(self, task: JudgeTask) -> Verdict:
        image = task.load_image()
        found = self._detector.detect(image)
        right, faults = check_image(
            found, task.item.payload, lambda name, objects: self._colours.name_colours(image, name, objects)
        )
        return Verdict(score=float(right), reason=faults, details={"detections": describe_detections(found)})


def clauses(metadata: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All clauses of a prompt."""
    return [*metadata.get("include", []), *metadata.get("exclude", [])]


def describe_detections(found: Detections) -> dict[str, list[list[float]]]:
    """Boxes with their scores, by class, of those that may count."""
    boxes = {
        name: [[*map(float, one.box), round(one.score, 4)] for one in some if one.score > THRESHOLD]
        for name, some in found.items()
    }
    return {name: some for name, some in boxes.items() if some}
