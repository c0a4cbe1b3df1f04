"""Images in and out: resizing, modes, patches and places."""

import io
import json
import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.torch import load_file

from unimm.models.bagel.processor import BagelImageProcessor
from unimm.nn.patches import patchify, unpatchify
from unimm.nn.pos_embed import grid_position_ids
from unimm.processing.chat_templates import parse_messages
from unimm.processing.images import io as pixels
from unimm.processing.images.deepseek_vl import DeepseekVLImageProcessor
from unimm.processing.images.io import center_crop, load_image, pil_to_tensor, resize, tensor_to_pil
from unimm.processing.requests import parse_images

PREPROC = GOLDEN / "janus" / "preproc"
NOTES = json.loads((PREPROC / "io.json").read_text())
SIZES = {name: entry["desc"] for name, entry in NOTES.items() if "image_size" in entry["desc"]}


def test_modes_become_rgb(tmp_path):
    grey = Image.fromarray(np.full((4, 5), 100, np.uint8))
    assert np.asarray(load_image(grey)).tolist() == [[[100] * 3] * 5] * 4
    sixteen = Image.fromarray(np.full((4, 5), 100 * 257, np.uint16))
    assert np.asarray(load_image(sixteen)).tolist() == [[[100] * 3] * 5] * 4
    clear = Image.new("RGBA", (5, 4), (10, 20, 30, 0))
    assert np.asarray(load_image(clear)).min() == 255, "transparency shows white"
    half = np.asarray(load_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))[0, 0]
    assert abs(int(half[0]) - 127) <= 1
    palette = Image.new("P", (2, 2))
    palette.info["transparency"] = 0
    assert load_image(palette).mode == "RGB"
    sixteen.save(tmp_path / "sixteen.png")
    assert np.asarray(load_image(tmp_path / "sixteen.png"))[0, 0].tolist() == [100] * 3


def test_broken_images_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no image at"):
        load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot read"):
        load_image(tmp_path / "text.png")
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(data, "PNG")
    (tmp_path / "short.png").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    with pytest.raises(ValueError, match="broken or cut short"):
        load_image(tmp_path / "short.png")
    with pytest.raises(ValueError, match="type ndarray.*expected a PIL image or a path"):
        load_image(np.zeros((4, 4, 3)))
    monkeypatch.setattr(pixels, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="11x10: expected at most 100 pixels"):
        load_image(Image.new("RGB", (11, 10)))


@pytest.mark.parametrize(
    ("source", "size", "filter_", "crc"),
    [
        # columns first: the height loses more than twice as many pixels as the width
        ((37, 53), (32, 32), Image.Resampling.BILINEAR, 1874369966),
        ((37, 53), (32, 32), Image.Resampling.BICUBIC, 3092773824),
        ((20, 90), (40, 80), Image.Resampling.LANCZOS, 1513726949),
        # rows first
        ((37, 53), (30, 39), Image.Resampling.BICUBIC, 2205733482),
        ((53, 37), (32, 32), Image.Resampling.BICUBIC, 2392801077),
        ((37, 53), (37, 53), Image.Resampling.BICUBIC, 3165400818),
    ],
)
def test_resized_pixels_are_those_of_any_pillow(source, size, filter_, crc):
    """Checksums of what Pillow 13 makes of noise in one call."""
    noise = np.random.default_rng(0).integers(0, 256, (source[1], source[0], 3), dtype=np.uint8)
    assert zlib.crc32(resize(Image.fromarray(noise), size, filter_).tobytes()) == crc


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto showpage\n"


@pytest.mark.parametrize("name", ["picture.png", "picture.eps", "picture.jpg"])
def test_an_image_that_is_a_program_starts_none(monkeypatch, tmp_path, name):
    # a Ghostscript that says whether it ran
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\necho 10.0\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once
    path = tmp_path / name
    path.write_bytes(EPS)
    with pytest.raises(ValueError, match=rf"{name} as an image: got contents of another kind, expected PNG, JPEG"):
        load_image(path)
    with Image.open(path) as opened, pytest.raises(ValueError, match="of format EPS: expected PNG.*load"):
        load_image(opened)
    assert not (tmp_path / "ran").exists()


def _written_formats() -> list[str]:
    """PIL's formats that it both writes, without another program, and reads."""
    Image.init()
    return sorted(Image.SAVE.keys() & Image.OPEN.keys())


@pytest.mark.filterwarnings("ignore:.*image format is deprecated:DeprecationWarning")
@pytest.mark.parametrize("form", _written_formats())
def test_images_are_opened_from_a_closed_list_of_formats(tmp_path, monkeypatch, form):
    # PIL makes the suffix of what it writes as SPIDER one of SPIDER's, for all later files
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    path = tmp_path / "picture.png"  # PIL looks at the contents
    image = Image.new("RGB", (32, 32), (200, 30, 60))
    for mode in ("RGB", "L", "1", "P"):
        try:
            image.convert(mode).save(path, form)
            break
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    else:
        pytest.skip(f"PIL cannot write this as {form}")
    with Image.open(path) as written:
        opens_as = written.format
    if opens_as in pixels.IMAGE_FORMATS:
        assert load_image(path).size == (32, 32)
        return
    with pytest.raises(ValueError, match="got contents of another kind"):
        load_image(path)
    with Image.open(path) as opened:
        if opened.tile:
            with pytest.raises(ValueError, match=f"of format {opens_as}"):
                load_image(opened)
            if opens_as != "EPS" and opened.mode != "F":
                opened.load()
                assert load_image(opened).size == opened.size, "what the caller has decoded is an image like any other"


def test_pixels_go_there_and_back():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    x = pil_to_tensor(image)
    assert x.shape == (3, 6, 9) and -1 <= x.min() and x.max() <= 1
    assert np.abs(np.asarray(tensor_to_pil(x)).astype(int) - np.asarray(image)).max() <= 1
    assert np.asarray(tensor_to_pil(torch.full((3, 1, 1), 9.0))).tolist() == [[[255] * 3]]


@pytest.mark.parametrize(("patch", "h", "w"), [(1, 3, 2), (2, 4, 6), (3, 3, 9)])
def test_patches(patch, h, w):
    x = torch.randn(5, h, w)
    tokens = patchify(x, patch)
    assert tokens.shape == (h * w // patch**2, patch**2 * 5)
    assert torch.equal(unpatchify(tokens, patch, h // patch), x)
    # features are ordered (row in patch, column in patch, channel)
    assert torch.equal(tokens[0].view(patch, patch, 5)[0, -1], x[:, 0, patch - 1])


def test_places():
    assert grid_position_ids(2, 3, 10).tolist() == [0, 1, 2, 10, 11, 12]
    with pytest.raises(ValueError, match="2x11 patches.*at most 10x10"):
        grid_position_ids(2, 11, 10)
    spread = grid_position_ids(2, 2, 10, interpolate=True)
    assert spread.tolist() == [0, 5, 50, 55]


def test_resize_keeps_its_promises():
    rule = BagelImageProcessor(max_size=112, min_size=48, stride=16)
    for size in ((1, 1), (300, 20), (20, 300), (57, 91), (112, 112), (5000, 5000)):
        w, h = rule.output_size(*size)
        assert w % 16 == h % 16 == 0 and 16 <= min(w, h) and max(w, h) <= 112
    assert rule(Image.new("RGB", (57, 91))).size == rule.output_size(57, 91)


@pytest.mark.parametrize("name", SIZES)
def test_squares_equal_the_original(name):
    stored, group = load_file(PREPROC / "io.safetensors"), name.removesuffix("/image")
    size, least = map(int, re.findall(r"size=(\d+)", SIZES[name]))
    rule, image = DeepseekVLImageProcessor(size=size, min_size=least), Image.fromarray(stored[name].numpy())
    assert np.array_equal(np.asarray(rule(image)).transpose(2, 0, 1), stored[f"{group}/resized"].numpy())
    # the same operations in the same precisions: equal, and one rounding is allowed
    assert (rule.preprocess(image)[None] - stored[f"{group}/pixel_values"]).abs().max() <= 1e-6
    assert torch.equal(rule.preprocess(rule(image)), rule.preprocess(image)), (
        "a square of the right size stays as it is"
    )


def test_square_config():
    files = {"image_size": 96, "min_size": 8, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.3, 0.2, 0.1]}
    rule = DeepseekVLImageProcessor.from_json(
        files | {"background_color": [0, 0, 0], "image_processor_type": "VLMImageProcessor"}, size=32
    )
    assert rule == DeepseekVLImageProcessor(size=96, min_size=8, mean=(0.48, 0.46, 0.41), std=(0.3, 0.2, 0.1))
    assert rule.background_color == (122, 117, 104), "cut, not rounded"
    assert DeepseekVLImageProcessor.from_json(json.loads(json.dumps(rule.to_json())), size=1) == rule
    assert DeepseekVLImageProcessor.from_json({}, size=32) == DeepseekVLImageProcessor(size=32)
    assert DeepseekVLImageProcessor(size=32).background_color == (127, 127, 127)
    assert rule.preprocess(Image.new("RGB", (20, 40))).shape == (3, 96, 96)


@pytest.mark.parametrize(
    "files", [{"image_size": 0}, {"image_mean": [0.5]}, {"image_std": [0.5, 0.0, 0.5]}, {"do_normalize": False}]
)
def test_wrong_square_configs(files):
    with pytest.raises(ValueError, match=r"got .*expected .*"):
        DeepseekVLImageProcessor.from_json(files, size=32)


@pytest.mark.parametrize("size", [(48, 31), (31, 48), (16, 16), (7, 500), (33, 20)])
def test_crop_keeps_the_middle(size):
    assert center_crop(Image.new("RGB", size), 16).size == (16, 16)
    mark = Image.new("RGB", (64, 32))
    mark.paste((255, 255, 255), (16, 0, 48, 32))
    assert np.asarray(center_crop(mark, 16))[:, 1:-1].min() > 200 and np.asarray(center_crop(mark, 32)).min() == 255


@pytest.mark.parametrize(
    ("size", "kept"), [((64, 16), (16, 0, 48, 16)), ((32, 64), (0, 24, 32, 40)), ((32, 16), (0, 0, 32, 16))]
)
def test_a_crop_to_a_rectangle_is_the_middle_that_covers_it(size, kept):
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), kept)
    cropped = np.asarray(center_crop(image, (8, 16)))
    # the filter mixes in what is cut off, at the edges alone
    assert cropped.shape == (8, 16, 3) and cropped[1:-1, 1:-1].min() > 200 and cropped.mean() > 230


@pytest.mark.parametrize("size", [(1, 8000), (8000, 1), (3, 200_000)])
def test_a_line_is_no_square(size):
    with pytest.raises(ValueError, match="to crop to 512x512: .*expected at most 64,000,000"):
        center_crop(Image.new("RGB", size), 512)


# ---- rubbish beside the pixels


def jpeg_with_exif(extra: tuple[int, int, int, bytes], tail: bytes, orientation: int) -> bytes:
    """A JPEG of 40 x 24 whose EXIF has an orientation and one more tag of any kind: (tag, kind, count, value)."""
    made = io.BytesIO()
    Image.new("RGB", (40, 24), (200, 10, 10)).save(made, "JPEG")
    entries = struct.pack("<HHI4s", 0x0112, 3, 1, bytes([orientation])) + struct.pack("<HHI4s", *extra)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + b"\0\0\0\0" + tail
    data = made.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


TAGS = st.sampled_from([0x0100, 0x0101, 0x0102, 0x010F, 0x011A, 0x011B, 0x0128, 0x0132, 0x8769, 0x8825, 0x9286])


@given(
    st.tuples(TAGS, st.integers(0, 20), st.integers(0, 9), st.binary(max_size=4)),
    st.binary(max_size=12),
    st.integers(1, 8),
)
@settings(deadline=None)
@pytest.mark.filterwarnings("ignore")  # Pillow's, of the rubbish
def test_rubbish_in_exif_hides_no_picture(extra, tail, orientation):
    opened = Image.open(io.BytesIO(jpeg_with_exif(extra, tail, orientation)))
    assert load_image(opened).size == ((24, 40) if orientation >= 5 else (40, 24))


@given(st.binary(max_size=40) | st.text(max_size=9) | st.none() | st.integers())
def test_exif_that_is_none(exif):
    image = Image.new("RGB", (40, 24))
    image.info |= {"exif": exif, "xmp": exif}
    assert load_image(image).size == (40, 24)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_upright_once(file_format, orientation):
    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(data, file_format, exif=exif)
    upright = load_image(Image.open(data))
    assert np.array_equal(upright, ImageOps.exif_transpose(Image.open(data)).convert("RGB"))
    assert np.array_equal(load_image(upright), upright), "what is upright is not turned again"


KEYS = st.none() | st.integers() | st.binary(max_size=300) | st.lists(st.integers(), max_size=4).map(tuple) | st.text()
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "La", "RGBa", "CMYK", "YCbCr", "HSV", "I", "I;16")


@given(st.sampled_from(MODES), KEYS)
def test_transparency_of_any_type(mode, key):
    image = Image.new(mode, (5, 4))
    image.info["transparency"] = key
    assert load_image(image).size == (5, 4) and image.info["transparency"] == key


@pytest.mark.parametrize("key", [b"\0\xff\xff", b"", "0", 3, (1, 2), (-1, 0, 0)], ids=repr)
def test_transparency_that_does_not_fit_is_none(key):
    image = Image.new("RGB", (5, 4), (9, 99, 200))
    image.info["transparency"] = key
    assert np.array_equal(load_image(image), image)


def test_transparency_is_white():
    for mode, level, key in (("L", 100, 100), ("I;16", 25700, 25700), ("1", 0, 0)):
        image = Image.new(mode, (2, 1), level)
        image.info["transparency"] = key
        assert np.asarray(load_image(image)).min() == 255, mode
        image.putpixel((0, 0), 255 if mode == "1" else level + 1)
        shown = np.asarray(load_image(image))
        assert shown[0, 1].tolist() == [255] * 3 and (mode == "1" or shown[0, 0].max() < 255)
    for key in ((9, 99, 200), (9 * 257, 99 * 257, 200 * 257)):  # as a PNG of 16 bits gives it
        image = Image.new("RGB", (5, 4), (9, 99, 200))
        image.info["transparency"] = key
        assert np.asarray(load_image(image)).min() == 255


def test_the_broken_one_is_named(tmp_path):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(data, "JPEG")
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(data.getvalue()[: 2000 if i == 2 else None])
    Image.new("F", (4, 4)).save(tmp_path / "floats.tiff")
    paths = [tmp_path / f"{i}.jpg" for i in range(4)]
    with pytest.raises(ValueError, match=r"image 3 of 4, .*2\.jpg, that is broken"):
        parse_images(paths, "a prompt")
    with pytest.raises(ValueError, match=r"the image of prompt 3, .*2\.jpg, that is broken"):
        parse_images(paths, ["what"] * 4)
    with (
        Image.open(paths[2]) as opened,
        pytest.raises(ValueError, match="image 2 of prompt 1 that is broken"),
    ):
        parse_images([[paths[0], opened], None], ["a", "b"])
    with pytest.raises(ValueError, match=r"floats\.tiff, of floats"):
        parse_images(tmp_path / "floats.tiff", "a prompt")
    with pytest.raises(ValueError, match=r"no image at .*9\.jpg, image 2 of prompt 2"):
        parse_images([None, [paths[0], tmp_path / "9.jpg"]], ["a", "b"])
    messages = [{"role": "user", "content": "a", "images": [paths[0], paths[2]]}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match=r"image 2 of message 1, .*2\.jpg, that is broken"):
        parse_messages(messages, placeholder="<i>")
