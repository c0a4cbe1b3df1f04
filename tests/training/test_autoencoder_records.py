"""The parts that learn from images alone, on datasets of one's own: crops, steps, measured scales, releases."""

import dataclasses
import json
import math
from contextlib import closing

import numpy as np
import pytest
import torch
from helpers import toys
from helpers.metaquery_toys import WIDTHS as DC_AE
from helpers.records import dice, image, record, said, text
from PIL import Image
from safetensors.torch import load_file

from examples.data import make
from unimm import Janus
from unimm.data.records import RecordImage
from unimm.tokenizers.dc_ae import DCAE
from unimm.tokenizers.kl import AutoencoderKL
from unimm.training.config import TrainConfig, from_mapping
from unimm.training.record_batches import build_batches
from unimm.training.tasks.base import build_task
from unimm.training.tasks.image_samples import ImageCropConfig, data_images, random_crop
from unimm.training.trainer import train

CROP = {"image_size": 32, "zoom": [1.0, 1.5], "mirrored": 0.5}
KL = {"width": 32, "multipliers": [1, 1], "n_blocks": 1, "latent_channels": 4}
VQ = KL | {"latent_channels": 8, "n_codes": 24, "code_dim": 4}
VQ_OPTIONS = CROP | dict(
    temperature=0.01,
    unquantized_steps=1,
    revive_every=2,
    revive_fraction=1.0,
    dtype="float32",
    init_from=None,
    frozen=[],
)
KL_OPTIONS = CROP | {"measured_images": 9, "dtype": "float32", "frozen": []}
LOSSES = {
    "kl_vae": ("l1", "mse", "kl"),
    "dc_ae": ("l1", "mse", "size"),
    "vq": ("l1", "mse", "codebook", "commitment", "entropy"),
}
TASKS = {
    "vq": {"options": VQ_OPTIONS, "model": VQ},
    "kl_vae": {"options": KL_OPTIONS, "model": KL},
    "dc_ae": {"options": KL_OPTIONS | {"latent_noise": 0.1}, "model": DC_AE},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [str(make.make_imagefolder(folder)), str(make.make_llava(folder))]


def recipe_of(task, data, **changes):
    numbers = dict(
        task=task, seed=3, steps=2, batch_size=3, lr=1e-3, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.0, muon=[],
        warmup_steps=0, schedule="constant", min_lr_ratio=1.0, max_grad_norm=1.0, ema_decay=0.9, precision="float32",
        save_every=2, sample_every=2, log_every=1, loss_weights=dict.fromkeys(LOSSES[task], 1.0),
        data={"groups": {"images": {"paths": data[:1]}}, "lanes": 2},
    )  # fmt: skip
    return from_mapping(TrainConfig, numbers | TASKS[task] | changes, where="here")


@pytest.mark.parametrize("task", TASKS)
def test_a_few_steps_and_their_release(task, data, tmp_path):
    recipe = recipe_of(task, data)
    built = build_task(recipe)
    before = {name: p.detach().clone() for name, p in built.model.named_parameters()}
    assert train(built, recipe, tmp_path, workers=0) == 2
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(math.isfinite(value) for line in lines for value in line["losses"].values())
    assert any(not torch.equal(p, before[name]) for name, p in built.model.named_parameters())
    with Image.open(tmp_path / "samples" / "00000002.png") as sample:
        assert sample.size == (8 * 32, 2 * 32)
    release = tmp_path / "release"
    if task == "vq":
        # the first step decodes vectors as they are
        assert [set(line["losses"]) for line in lines] == [{"l1", "mse"}, set(LOSSES["vq"])]
        assert (
            load_file(release / "vq.safetensors").keys()
            and json.loads((release / "report.json").read_text())["codes"] == 24
        )
        return
    family = AutoencoderKL if task == "kl_vae" else DCAE
    model = family.from_pretrained(release)
    # latents of the images that were measured have the deviation 1
    (images,) = data_images(built.sample_builder, recipe, 9)
    with torch.no_grad():
        # those of a KL autoencoder are samples of the posterior
        noise = torch.randn(9, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        latents = model.encode(images, noise=noise) if task == "kl_vae" else model.encode(images)
    assert 0.5 < latents.square().mean() < 2 and model.config.scaling_factor != 1


@pytest.mark.parametrize("task", ["kl_vae", "dc_ae"])
def test_a_release_goes_on_with_its_scale(task, data, tmp_path):
    first = build_task(recipe_of(task, data))
    (tmp_path / "a").mkdir()
    first.save(tmp_path / "a")
    options = TASKS[task]["options"] | {"measured_images": 0}
    recipe = recipe_of(task, data, options=options, model={"from_pretrained": str(tmp_path / "a")})
    built = build_task(recipe)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), built.model.parameters(), strict=True))
    (tmp_path / "b").mkdir()
    built.save(tmp_path / "b")
    names = {"kl_vae": "vae_config.json", "dc_ae": "config.json"}
    configs = [json.loads((tmp_path / run / names[task]).read_text()) for run in "ab"]
    assert configs[0] == configs[1]


def test_the_tokenizer_of_a_janus_goes_on(data, tmp_path):
    folder = toys.janus(tmp_path / "janus")
    frozen = ["encoder", "quant_conv", "quantize"]
    options = VQ_OPTIONS | {"image_size": 24, "unquantized_steps": 0, "revive_fraction": 0.0, "frozen": frozen}
    built = build_task(recipe_of("vq", data, options=options, model={"from_pretrained": str(folder)}))
    ours = Janus.from_pretrained(folder).vq
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), built.model.parameters(), strict=True))
    assert not any(p.requires_grad for name, p in built.model.named_parameters() if name.startswith(tuple(frozen)))
    both = recipe_of("vq", data, options=options | {"init_from": "x"}, model={"from_pretrained": str(folder)})
    with pytest.raises(ValueError, match="got model.from_pretrained and init_from: expected one of both"):
        build_task(both)


def test_crops_are_squares_of_the_images_own_pixels():
    crop = ImageCropConfig(image_size=32, zoom=(1.0, 1.0))
    # an image of the size of its crops is not resized
    whole = toys.picture(32, 32)
    assert np.array_equal(np.asarray(random_crop(whole, crop, dice())), np.asarray(whole))
    wide = Image.new("RGB", (128, 64))
    wide.paste("white", (64, 0, 128, 64))
    found = [np.asarray(random_crop(wide, crop, dice(i))).mean() for i in range(60)]
    assert min(found) < 10 and max(found) > 245 and any(60 < one < 200 for one in found), "from the left to the right"
    mirrored = dataclasses.replace(crop, mirrored=1.0)
    assert np.array_equal(np.asarray(random_crop(whole, mirrored, dice())), np.asarray(whole)[:, ::-1])
    near = dataclasses.replace(crop, zoom=(2.0, 2.0))
    dot = Image.new("RGB", (64, 64))
    dot.paste("white", (0, 0, 32, 64))
    assert {random_crop(dot, near, dice(i)).size for i in range(5)} == {(32, 32)}


def test_any_image_of_a_record_is_a_sample(data):
    builder = build_task(recipe_of("kl_vae", data)).sample_builder
    one = record(image(seed=0), text("a"), image(loss=True, seed=1))
    assert len({builder.prepare(one, dice(i)).image.tobytes() for i in range(8)}) > 2
    sample = builder.prepare(one, dice(3))
    assert sample.image.shape == (32, 32, 3) and sample.n_tokens == 16 * 16
    assert np.array_equal(sample.image, builder.prepare(one, dice(3)).image)
    with pytest.raises(ValueError, match="got a record without an image"):
        builder.prepare(record(text("a"), said("b")), dice())
    with pytest.raises(ValueError, match="cannot read the image"):
        builder.prepare(record(text("a"), RecordImage(data=b"x", loss=True, name="the image")), dice())


def test_batches_know_their_number(data):
    recipe = recipe_of("vq", data, gradient_accumulation=2)
    source = build_batches(build_task(recipe), recipe)
    with closing(source.iterate(0, 5, workers=2)) as made:
        assert [batch.number for batch in made] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("vq", {"image_size": 33}, "got image_size 33 in options, expected a multiple of 2, the model's stride"),
        ("kl_vae", {"zoom": [0.5, 1.0]}, r"got zoom \[0.5, 1.0\]: expected two numbers of 1 or more"),
        ("kl_vae", {"zoom": [1.5, 1.0]}, "the smaller one first"),
        ("kl_vae", {"measured_images": 0}, "an autoencoder from scratch, whose latents have no scale yet"),
        ("vq", {"perceptual": "vgg"}, "the perceptual loss is not available"),
        ("vq", {"tasks": ["draw.one"]}, "got 'tasks' in options"),
    ],
)
def test_wrong_recipes(task, changes, reason, data):
    with pytest.raises(ValueError, match=reason):
        build_task(recipe_of(task, data, options=TASKS[task]["options"] | changes))
