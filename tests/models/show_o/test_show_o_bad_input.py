"""What Show-o refuses, with what was got, what was expected and what to do."""

import json

import pytest
import torch
from helpers.paths import GOLDEN
from helpers.toys import picture
from PIL import Image

import unimm
from unimm import MaskedSampling, ShowO

CASE = GOLDEN / "show_o" / "dev"


@pytest.fixture(scope="module")
def model() -> ShowO:
    return unimm.load(CASE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(images=picture(30, 40), mask=Image.new("L", (40, 30), 255)), "got a mask of 40x30.*expected 30x40"),
        (dict(mask=Image.new("L", (24, 24), 255)), "got 0 images and 1 masks.*expected one image"),
        (dict(images=picture(24, 24), mask=Image.new("L", (24, 24))), "leaves nothing to draw"),
        (dict(images=picture(24, 24), mask="no/such.png"), "no image at no/such.png"),
        (dict(images=[picture(), picture()], mask=Image.new("L", (24, 24), 255)), "got 2 images and 1 masks"),
        (dict(size=(23, 24)), "cannot generate .*multiples of 4"),
        (dict(size=(2048, 2048)), "cannot generate .*up to 1024"),
        (dict(size=(512, 512)), "the model knows 256: .*a smaller size"),
        (dict(steps=0), "got steps 0"),
        (dict(guidance=-1.0), "got guidances -1.0: expected scales of 0 or more"),
        (dict(masked_sampling="cosine"), "got masked_sampling 'cosine': expected a MaskedSampling"),
        (dict(images=picture(24, 24), mask=Image.new("L", (24, 24), 255), size=(16, 16)), "leave size out"),
    ],
)
def test_bad_calls_of_generate(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate("a red circle", **options)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (24, 24), 255), "got one mask for 2 prompts: expected a list of 2"),
        ([Image.new("L", (24, 24), 255)] * 3, "got 3 masks for 2 prompts"),
        ([None, "no/such.png"], "no image at no/such.png.*the mask of prompt 2"),
    ],
)
def test_masks_of_a_batch_are_called_masks(model, mask, message):
    with pytest.raises(ValueError, match=message):
        model.generate(["a", "b"], images=[picture(24, 24)] * 2, mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(directions="sideways"), "got the direction 'sideways': expected one of left, right, up, down"),
        (dict(directions=[]), "got directions"),
        (dict(directions=[("left", "")]), "or a pair of one and a text"),
        (dict(directions=5), "got directions 5"),
        (dict(directions="left", offset=3), "got offset 3: expected at most 2"),
        (dict(directions="left", offset=-3), "got offset -3: expected at least -2"),
        (dict(directions=["left"] * 300_000), "expected at most .* pixels"),
    ],
)
def test_bad_calls_of_extend(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.extend("a red circle", images=picture(24, 24), **options)


def test_an_image_a_prompt_is_extended(model):
    with pytest.raises(ValueError, match=r"got \[2\] images: expected one for each prompt"):
        model.extend("a", images=[picture(), picture()], directions="left")


@pytest.mark.parametrize(
    "options", [dict(schedule="quadratic"), dict(schedule=3), dict(temperature=-1), dict(token_temperature="hot")]
)
def test_samplings_that_are_none(options):
    with pytest.raises(ValueError, match="got .*expected"):
        MaskedSampling(**options)


# ---- folders


def copied(tmp_path, **changes):
    """The case's config files, changed, with its weights."""
    for name in ("config.json", "pytorch_model.safetensors"):
        (tmp_path / name).write_bytes((CASE / name).read_bytes())
    (tmp_path / "phi").mkdir()
    for file in (CASE / "phi").iterdir():
        (tmp_path / "phi" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=396), "got vocab_size 396 for 320 ids of text and 64 codes: expected 395"),
        (dict(num_vq_tokens=37), "got num_vq_tokens 37: expected a square number"),
        (dict(mask_token_id=393), "got mask_token_id 393, expected 394"),
        (dict(llm_model_path="no_such"), "got llm_model_path 'no_such'.*expected Phi's config.json"),
        (dict(codebook_size=None), "lacks codebook_size"),
        (dict(w_clip_vit=True), "missing keys|entries of the key map"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ShowO.from_pretrained(copied(tmp_path, **changes))


def test_a_model_without_its_image_tokenizer_says_so(tmp_path):
    model = ShowO.from_pretrained(copied(tmp_path))
    assert model.vq is None
    with pytest.raises(ValueError, match="without its image tokenizer.*showlab/magvitv2"):
        model.generate("a red circle")
    with pytest.raises(ValueError, match="without its image tokenizer"):
        model.understand(picture(), "what is it?")
    assert isinstance(model.understand(None, "what is it?"), str)


def test_a_model_without_clip_says_so():
    parts = {"vq": CASE / "magvitv2", "tokenizer": CASE / "phi"}
    model = ShowO.from_pretrained(CASE / "w_clip_vit", components=parts)
    with pytest.raises(ValueError, match="by CLIP, and was loaded without it.*openai/clip-vit-large"):
        model.understand(picture(), "what is it?")
    assert model.generate("a red circle", steps=1).image.size == (24, 24)


def test_a_tokenizer_can_be_left_out():
    """Also one that lies in the checkpoint's own folder."""
    model = ShowO.from_pretrained(CASE, components={"tokenizer": None, "vq": CASE / "magvitv2"})
    for call in (lambda: model.generate("a red circle"), lambda: model.understand(picture(), "what is it?")):
        with pytest.raises(ValueError, match="this checkpoint has no tokenizer"):
            call()


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({"vq": CASE / "clip"}, "_class_name|lacks|missing"),
        ({"vq": CASE / "phi" / "no"}, "no folder"),
        ({"tokenizer": CASE / "clip"}, "lacks tokenizer.json"),
        ({"nothing": "x"}, "got components nothing"),
    ],
)
def test_components_that_are_none(tmp_path, components, message):
    folder = copied(tmp_path)
    if "tokenizer" in components:
        for file in (folder / "phi").glob("*"):
            if file.name != "config.json":
                file.unlink()
    with pytest.raises(ValueError, match=message):
        ShowO.from_pretrained(folder, components=components)


def test_codes_out_of_range_and_other_grids(model):
    with pytest.raises(ValueError, match="for a grid of 5 x 6, expected whole numbers"):
        model.decode_image_tokens(torch.zeros(1, 36, dtype=torch.long), grid=(5, 6))
    with pytest.raises(ValueError, match="expected 0 to 63.*masked places"):
        model.decode_image_tokens(torch.full((1, 36), 64))
    with pytest.raises(ValueError, match="multiples of 4: resize or crop"):
        model.vq.encode(torch.zeros(1, 3, 22, 24))
