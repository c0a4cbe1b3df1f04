"""GenEval: its rules on planted detections, its detectors on planted logits and with tiny random models, its files."""

import json

import numpy as np
import pytest
import torch
from helpers.evaluation import run_toy, scores_of
from PIL import Image

from unimm.evaluation.benchmarks.base import BenchmarkOptions
from unimm.evaluation.benchmarks.geneval.benchmark import GenEvalBenchmark, read_metadata
from unimm.evaluation.benchmarks.geneval.detector import (
    ColourNamer,
    DetectorJudge,
    ObjectDetector,
    cut_out,
    instances,
)
from unimm.evaluation.benchmarks.geneval.protocol import (
    COLOURS,
    TAGS,
    Detection,
    check_image,
    keep_detections,
    relative_position,
)
from unimm.evaluation.judges.readers import JudgeSpec
from unimm.models.base import Generation


def found(x: float, y: float = 0.0, side: float = 10.0, score: float = 0.95) -> Detection:
    """A square object about a centre."""
    return Detection(box=(x - side / 2, y - side / 2, x + side / 2, y + side / 2), score=score)


def no_colours(name, objects):
    raise AssertionError("no colour is asked for")


def right(tag, include, detections, exclude=(), colours=no_colours) -> bool:
    metadata = {"tag": tag, "include": include, "exclude": list(exclude), "prompt": ""}
    return check_image(detections, metadata, colours)[0]


CUP = {"class": "cup", "count": 1}
DOG = {"class": "dog", "count": 1}


def test_single_objects():
    assert right("single_object", [CUP], {"cup": [found(0, score=0.31)]})
    assert not right("single_object", [CUP], {"cup": [found(0, score=0.3)]})
    assert not right("single_object", [CUP], {"dog": [found(0)]})
    assert right("single_object", [CUP], {"cup": [found(0), found(20)], "dog": [found(0)]}), "others do no harm"


def test_two_objects():
    assert right("two_object", [CUP, DOG], {"cup": [found(0)], "dog": [found(0)]})
    assert not right("two_object", [CUP, DOG], {"cup": [found(0)]})


def test_counting():
    include, exclude = [{"class": "cup", "count": 2}], [{"class": "cup", "count": 3}]
    surely = [found(20 * i, score=0.91) for i in range(3)]
    assert right("counting", include, {"cup": surely[:2]}, exclude)
    assert not right("counting", include, {"cup": surely}, exclude) and not right(
        "counting", include, {"cup": surely[:1]}, exclude
    )
    # of counting an object must be surer
    assert right("counting", include, {"cup": [*surely[:2], found(90, score=0.89)]}, exclude)
    assert not right("two_object", include, {"cup": [*surely[:2], found(90, score=0.89)]}, exclude)


def test_colours():
    def named(*colours):
        return lambda name, objects: colours[: len(objects)]

    clause = {**CUP, "color": "red"}
    assert right("colors", [clause], {"cup": [found(0)]}, colours=named("red"))
    assert not right("colors", [clause], {"cup": [found(0)]}, colours=named("blue"))
    two = {"class": "cup", "count": 2, "color": "red"}
    cups = {"cup": [found(0), found(20)]}
    assert right("colors", [two], cups, colours=named("red", "red"))
    assert not right("colors", [two], cups, colours=named("red", "blue"))


def test_only_the_surest_objects_are_looked_at():
    asked = []

    def colours(name, objects):
        asked.append([one.score for one in objects])
        return ["red"] * len(objects)

    cups = {"cup": [found(0, score=0.5), found(20, score=0.9), found(40, score=0.7)]}
    assert right("colors", [{**CUP, "color": "red"}], cups, colours=colours) and asked == [[0.9]]
    many = {"cup": [found(i, score=0.4 + i / 100) for i in range(20)]}
    assert [one.score for one in keep_detections(many, "colors")["cup"]] == pytest.approx(
        [0.59 - i / 100 for i in range(16)]
    )


@pytest.mark.parametrize(
    ("x", "y", "relations"),
    [
        *((-30, 0, {"left of"}), (30, 0, {"right of"}), (0, -30, {"above"}), (0, 30, {"below"})),
        (-30, -30, {"left of", "above"}),
        (30, 30, {"right of", "below"}),
        (0, 0, set()),
        # within a tenth of both sizes, which is 2
        (-2, 0, set()),
        (-3, 0, set()),  # 1 of 3 is left, which is no direction
        (-5, 0, {"left of"}),
        (-30, 12, {"left of"}),  # 10 of 32 downwards is too little
        (-30, 25, {"left of", "below"}),
    ],
)
def test_positions(x, y, relations):
    assert relative_position(found(x, y), found(0, 0)) == relations


def test_positions_in_a_prompt():
    include = [DOG, {**CUP, "position": ["left of", 0]}]
    assert right("position", include, {"cup": [found(0)], "dog": [found(40)]})
    assert not right("position", include, {"cup": [found(80)], "dog": [found(40)]})
    assert not right("position", include, {"cup": [found(0)]})
    # the dog has another colour: there is nothing for the cup to stand in relation to
    coloured = [{**DOG, "color": "red"}, include[1]]
    verdict = check_image(
        {"cup": [found(0)], "dog": [found(40)]},
        {"tag": "position", "include": coloured, "prompt": ""},
        lambda name, objects: ["blue"],
    )
    assert verdict == (False, "expected red dog>=1, found blue; no target for cup to be left of")


# ---- detectors


def planted(objects: list[tuple[int, float, tuple[int, int, int, int]]], n_classes: int = 3, grid: int = 8):
    """Logits of queries that see these objects: class, logit, and (left, top, right, bottom) in cells."""
    classes = torch.full((len(objects), n_classes + 1), -9.0)
    masks = torch.full((len(objects), grid, grid), -9.0)
    for i, (kind, logit, (left, top, far, bottom)) in enumerate(objects):
        classes[i, kind] = logit
        masks[i, top:bottom, left:far] = 9.0
    return classes, masks


def test_instances():
    classes, masks = planted([(1, 9.0, (0, 0, 4, 2)), (2, 9.0, (4, 4, 8, 8)), (3, 9.0, (0, 0, 8, 8))])
    seen = instances(classes, masks, (32, 64), ("dog", "cup", "tie"))
    assert {
        name: [one.box for one in some if one.score > 0.3] for name, some in seen.items() if some[0].score > 0.3
    } == {
        # cells are 4 x 8 pixels, and the edge lies half way between two cells
        "cup": [(0, 0, 32, 8)],
        "tie": [(32, 16, 64, 32)],
    }
    # less than 1 by the pixels at the edge, whose logits are between those of both sides; its corner is rounded
    assert 0.95 < seen["cup"][0].score < 1 and seen["cup"][0].mask[:7, :28].all()
    assert seen["cup"][0].mask.shape == (32, 64)


def test_an_instances_score_is_that_of_its_class_and_of_its_mask():
    classes = torch.tensor([[0.6, 0.3, 0.05, 0.05]]).log()
    seen = instances(classes, torch.full((1, 8, 8), float(np.log(4))), (8, 8), ("dog", "cup", "tie"))
    # probabilities times 0.8, that of a logit of log 4: one for each class
    assert [seen[name][0].score for name in ("dog", "cup", "tie")] == pytest.approx([0.48, 0.24, 0.04])
    assert instances(classes, torch.full((1, 8, 8), -1.0), (8, 8), ("dog", "cup", "tie")) == {}


def test_objects_are_cut_out_on_grey():
    image = Image.new("RGB", (4, 4), "red")
    mask = np.zeros((4, 4), bool)
    mask[1, 1] = True
    cut = cut_out(image, Detection(box=(1, 1, 3, 3), score=1, mask=mask))
    assert cut.size == (2, 2) and cut.getpixel((0, 0)) == (255, 0, 0) and cut.getpixel((1, 1)) == (153, 153, 153)


class Clip(torch.nn.Module):
    """Embeds a colour's name, and a pixel of that colour, to the same place."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def get_text_features(self, ids):
        return torch.nn.functional.one_hot(ids, len(COLOURS)).float() * self.scale

    def get_image_features(self, pixel_values):
        names = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green"}
        middle = pixel_values[:, :, 0, 0].round().int().tolist()
        return torch.nn.functional.one_hot(
            torch.tensor([COLOURS.index(names[tuple(p)]) for p in middle]), len(COLOURS)
        ).float()


def namer():
    return ColourNamer(
        Clip(),
        lambda images: torch.stack(
            [torch.tensor(np.array(image.resize((1, 1), 0))).permute(2, 0, 1) for image in images]
        ),
        lambda texts: {"ids": torch.tensor([next(i for i, c in enumerate(COLOURS) if c in text) for text in texts])},
    )


def test_colours_are_named_zero_shot():
    image = Image.new("RGB", (8, 8), "red")
    image.paste("blue", (4, 0, 8, 8))
    objects = [Detection(box=(0, 0, 4, 8), score=1), Detection(box=(4, 0, 8, 8), score=1)]
    assert namer().name_colours(image, "cup", objects) == ["red", "blue"]


class Sees(torch.nn.Module):
    """A detector that sees a mouse in the red part of an image, and nothing else."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixel_values):
        red = (pixel_values[:, 0] > 200) & (pixel_values[:, 2] < 100)
        classes, _ = planted([(0, 9.0, (0, 0, 1, 1))])
        out = type("Output", (), {})()
        out.class_queries_logits, out.masks_queries_logits = classes[None], red[:, None].float() * 18 - 9
        return out


def tensor(image):
    return torch.tensor(np.array(image)).permute(2, 0, 1)[None]


def metadata_file(folder, rows):
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MOUSE = {"class": "computer mouse", "count": 1}
ROWS = [
    {"tag": "single_object", "include": [MOUSE], "prompt": "a photo of a computer mouse"},
    {"tag": "colors", "include": [{**MOUSE, "color": "red"}], "prompt": "a photo of a red computer mouse"},
    {"tag": "colors", "include": [{**MOUSE, "color": "green"}], "prompt": "a photo of a green computer mouse"},
]


def geneval(path, **options):
    return GenEvalBenchmark(BenchmarkOptions(items=str(path), **options))


class HalfRed:
    """Every other image has something red in it."""

    def generate(self, prompt, *, images, seed):
        images = [Image.new("RGB", (16, 16), "white") for _ in prompt]
        for image in images[::2]:
            image.paste((255, 0, 0), (2, 2, 9, 9))
        return Generation(images)


def test_a_run(tmp_path):
    made = geneval(metadata_file(tmp_path, ROWS))
    items = made.items()
    assert [item.id for item in items][:2] == ["00000/samples/00000", "00000/samples/00001"] and len(items) == 12
    assert len({item.seed for item in items}) == 12
    detector = ObjectDetector(Sees(), tensor, ("mouse", "cup", "tie"))
    judge = DetectorJudge(detector, namer(), models=("a", "b"))
    state = run_toy(tmp_path / "run", HalfRed(), benchmark=made, judge=lambda: judge, batch=4)
    assert scores_of(state) == {"single_object": 0.5, "colors": 0.25}, "there is no overall score without all tags"
    assert state.result["scores"]["colors"]["n"] == 2, "of prompts, each of four images"
    assert (tmp_path / "run" / "images" / "00002" / "samples" / "00003.png").is_file()
    rows = {
        row["id"]: row
        for row in map(json.loads, next((tmp_path / "run" / "verdicts").iterdir()).read_text().splitlines())
    }
    (box,) = rows["00000/samples/00000"]["details"]["detections"]["computer mouse"]
    assert box[:4] == [2, 2, 9, 9] and box[4] > 0.95
    assert rows["00002/samples/00000"]["reason"] == "expected green computer mouse>=1, found red"
    assert state.result["judge"]["weights"]["detector"]["numbers"] == 1


def test_a_detector_of_other_classes(tmp_path):
    made = geneval(metadata_file(tmp_path, ROWS))
    judge = DetectorJudge(ObjectDetector(Sees(), tensor, ("face",)), namer(), models=("a", "b"))
    with pytest.raises(ValueError, match="the detector does not know computer mouse"):
        run_toy(tmp_path / "run", HalfRed(), benchmark=made, judge=lambda: judge)


def test_tiny_random_models_of_transformers(tmp_path):
    """Through `from_pretrained`, from folders."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        PreTrainedTokenizerFast,
        SwinConfig,
    )

    torch.manual_seed(0)
    swin = SwinConfig(
        *(), embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=32,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=7,
        id2label={0: "mouse", 1: "cup"}, label2id={"mouse": 0, "cup": 1},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "detector")
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "detector")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=64, max_position_embeddings=16, eos_token_id=1, bos_token_id=2, pad_token_id=0)
    vision = dict(image_size=32, patch_size=16)
    clip = CLIPConfig(text_config=small | text, vision_config=small | vision, projection_dim=8)
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "clip"
    )
    words = [
        "[PAD]",
        "[EOS]",
        "[BOS]",
        *["a", "photo", "of", "object", "computer", "mouse", "cup", "-", "colored"],
        *COLOURS,
        "[UNK]",
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]").save_pretrained(
        tmp_path / "clip"
    )

    made = geneval(metadata_file(tmp_path, ROWS[:1]))
    spec = JudgeSpec(kind="detector", where=f"{tmp_path / 'detector'},{tmp_path / 'clip'}")
    judge = made.judge_maker(spec, device="cpu")(None)
    state = run_toy(tmp_path / "run", HalfRed(), benchmark=made, judge=lambda: judge, batch=4)
    assert state.result["scores"]["single_object"]["n"] == 1 and state.result["failed"] == 0
    again = made.judge_maker(spec, device="cpu")(None)
    assert again.key() == judge.key() and judge.identity()["detector"] == str(tmp_path / "detector")
    image = Image.new("RGB", (20, 12), "red")
    assert all(set(some) <= {"computer mouse", "cup"} for some in [judge._detector.detect(image)])
    colours = judge._colours.name_colours(image, "cup", [Detection(box=(0, 0, 9, 9), score=1)] * 2)
    assert len(colours) == 2 and set(colours) <= set(COLOURS)


# ---- files


def test_some_of_the_prompts(tmp_path):
    path = metadata_file(tmp_path, ROWS)
    assert [item.unit for item in geneval(path, n=1).items()] == ["00000"] * 4 + ["00001"] * 4
    assert {item.group for item in geneval(tmp_path, tasks=("colors",)).items()} == {"colors"}
    with pytest.raises(ValueError, match="got the task 'colour'"):
        geneval(path, tasks=("colour",)).items()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 4, is no JSON"),
        ({"tag": "x", "prompt": "a", "include": [CUP]}, "expected a prompt and a tag of single_object"),
        ({"tag": "colors", "include": [CUP]}, "expected a prompt and a tag"),
        ({"tag": "colors", "prompt": "a", "include": []}, "includes nothing"),
        ({"tag": "colors", "prompt": "a", "include": [3]}, "include 1: got 3, expected an object with a class"),
        ({"tag": "colors", "prompt": "a", "include": [{"class": "cup"}]}, "got count None"),
        (
            {"tag": "colors", "prompt": "a", "include": [CUP], "exclude": [{**CUP, "count": 0}]},
            "exclude 1: got count 0",
        ),
        ({"tag": "colors", "prompt": "a", "include": [{**CUP, "color": "grey"}]}, "got color 'grey'"),
        (
            {"tag": "position", "prompt": "a", "include": [DOG, {**CUP, "position": ["near", 0]}]},
            "include 2: got position",
        ),
        (
            {"tag": "position", "prompt": "a", "include": [DOG, {**CUP, "position": ["above", 1]}]},
            "expected an earlier clause",
        ),
    ],
)
def test_malformed_files(tmp_path, row, message):
    path = metadata_file(tmp_path, ROWS)
    path.write_text(path.read_text() + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(ValueError, match=message):
        read_metadata(path)


def test_files_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*evaluation_metadata\.jsonl"):
        geneval(tmp_path).items()
    with pytest.raises(ValueError, match="got no --items for geneval"):
        GenEvalBenchmark(BenchmarkOptions(items="generated"))
    with pytest.raises(ValueError, match="expected detector:MASK2FORMER,CLIP"):
        geneval(tmp_path).judge_maker(JudgeSpec(kind="detector", where="a"), device="cpu")


def test_the_overall_score_is_the_mean_of_the_tags():
    assert set(geneval("x").weights) == set(TAGS) and set(geneval("x").weights.values()) == {1.0}
