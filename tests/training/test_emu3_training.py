"""Training Emu3: the stored loss and gradients through the task's samples, steps of both recipes, what a release holds."""

import copy
import dataclasses
import json
import random

import pytest
import torch
from helpers.flops import check_counts
from helpers.paths import GOLDEN, RECIPES
from helpers.toys import picture
from PIL import Image
from safetensors.torch import load_file

from parity.checks.emu3 import gradient_norms
from unimm import Emu3
from unimm.data.shapes import HELD_OUT
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.emu3_vq import NearestCodeQuantizer
from unimm.training.config import read_recipe
from unimm.training.losses import mean_losses
from unimm.training.tasks import emu3_start
from unimm.training.tasks.base import build_task
from unimm.training.tasks.emu3 import Emu3SampleBuilder, Emu3Task, blank_processor, encode_images, place_codes
from unimm.training.tasks.emu3_start import train_emu3_tokenizer
from unimm.training.tasks.emu3_vq import revive_unused_codes
from unimm.training.trainer import train

CASE = GOLDEN / "emu3" / "dev"
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48)
NUMBERS = dict(
    steps=3, save_every=3, sample_every=100, log_every=1, warmup_steps=0, precision="float32", muon=(), schedule="constant",
)  # fmt: skip


@pytest.fixture(scope="module")
def vq_recipe():
    full = read_recipe(RECIPES / "emu3-nano-vq.yaml")
    model = full.model | dict(multipliers=[1, 1, 1, 1, 1], n_codes=48, attention_levels=[4])
    options = full.options | dict(unquantized_steps=1, scored_scenes=2)
    return dataclasses.replace(full, model=model, options=options, batch_size=2, **NUMBERS)


@pytest.fixture(scope="module")
def recipe(vq_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    build_task(vq_recipe).save(folder)
    full = read_recipe(RECIPES / "emu3-nano.yaml")
    model = full.model | dict(language=full.model["language"] | SMALL)
    model["images"] = model["images"] | dict(spatial_factor=16)
    options = full.options | dict(vq=str(folder), compile=False, n_ranks=300)
    return dataclasses.replace(full, model=model, options=options, batch_size=8, **NUMBERS)


@pytest.fixture(scope="module")
def task(recipe) -> Emu3Task:
    tokenizer = train_emu3_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            emu3_start,
            "train_emu3_tokenizer",
            lambda n_ranks, *, n_codes: tokenizer(n_ranks, n_codes=n_codes, lines=300),
        )
        return build_task(recipe)


def test_the_stored_loss_and_gradients():
    """Captions, one of them dropped, and codes: the original's mean loss, and the norm of every gradient."""
    model = Emu3.from_pretrained(CASE)
    stored = json.loads((CASE / "io.json").read_text())["meta"]["train"]
    io = load_file(CASE / "io.safetensors")
    builder = Emu3SampleBuilder(processor=blank_processor(model))
    height, width = (side * model.config.image_processor.stride for side in io["train/codes"].shape[1:])
    images = model.config.image_processor
    object.__setattr__(
        builder.processor, "image_processor", dataclasses.replace(images, min_pixels=1, max_pixels=10**6)
    )
    target = Image.new("RGB", (width, height))
    samples = [builder.generation_sample("draw", [text], target, random.Random(0)) for text in stored["captions"]]
    batch = dataclasses.replace(builder.collate(samples), codes=tuple(io["train/codes"]))
    task = Emu3Task(model, None)
    losses = task.losses(batch)
    assert losses.keys() == {"draw"} and losses["draw"].count == io["train/codes"].numel()
    loss = losses["draw"].mean
    assert float(loss.detach()) == pytest.approx(stored["loss"], abs=1e-4 * stored["loss"])
    loss.backward()
    norms = gradient_norms(model)
    largest = max(stored["grad_norms"].values())
    assert all(abs(norms[name] - norm) <= 1e-4 * largest for name, norm in stored["grad_norms"].items())


def test_codes_are_put_in_place(task):
    """In order: each image's codes as ids, those of targets as labels of the rows before them, and nothing else."""
    batch = task.batch(0)
    special = task.model.config.special_tokens
    pack = place_codes(task.model, batch)
    codes = torch.cat([task.model.encode_image(image).flatten() for image in batch.images])
    is_code = batch.pack.ids >= special.code0
    assert torch.equal(pack.ids[is_code], special.code0 + codes)
    assert torch.equal(pack.ids[~is_code], batch.pack.ids[~is_code])
    labelled = (pack.labels != IGNORE_INDEX).nonzero().squeeze(1)
    assert torch.equal(pack.labels[labelled], pack.ids[labelled + 1]) and len(labelled) == len(batch.kinds)
    assert not torch.isin(pack.labels, torch.tensor([special.eol, special.eof, special.eoi, special.boi])).any()
    assert batch.codes is None and int((batch.pack.labels >= special.code0).sum()) % 16 == 0


def test_batches_depend_on_their_number_alone(task):
    first, again, other = task.batch(3), task.batch(3), task.batch(4)
    assert torch.equal(first.pack.ids, again.pack.ids) and not torch.equal(first.pack.ids, other.pack.ids)
    assert all(torch.equal(*pair) for pair in zip(first.images, again.images, strict=True))
    assert HELD_OUT


def test_dropped_prompts_are_empty(task):
    builder = dataclasses.replace(task.batch.builder, dropout=1.0)
    sample = builder.generation_sample("draw", [picture(64, 64), "a red circle"], picture(64, 64), random.Random(0))
    special = task.model.config.special_tokens
    ids = torch.cat([part.ids for part in sample.parts]).tolist()
    labels = torch.cat([part.labels for part in sample.parts])
    assert ids[:2] == [special.bos, special.boi] and len(sample.pixel_values) == 2
    middle = ids.index(special.eoi)
    assert ids[middle + 1] == special.boi, "no text between the two images"
    assert bool((labels[:middle] == IGNORE_INDEX).all()), "an image that is given is not learned"


def test_every_trained_parameter_gets_a_gradient_and_flops_are_torchs(task):
    task.model.train()
    batch = task.batch(1)
    losses = mean_losses(task.losses(batch))
    assert losses.keys() <= set(task.loss_names) and task.loss_counts(batch).keys() == losses.keys()
    torch.stack([*losses.values()]).sum().backward()
    trained = {name: p.grad for name, p in task.model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("vq.") for name in trained)
    assert [name for name, grad in trained.items() if grad is None or not grad.any()] == []
    task.model.zero_grad()
    check_counts(task, batch)
    codes = tuple(map(task.model.encode_image, batch.images))
    known = dataclasses.replace(batch, codes=codes)
    check_counts(task, known)


def test_a_few_steps_and_the_release(task, recipe, tmp_path):
    before = {name: x.clone() for name, x in task.model.state_dict().items()}
    train(task, recipe, tmp_path, workers=0)
    changed = {name for name, x in task.model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed and all(name.startswith("decoder.") for name in changed), "the vision tokenizer stays as it is"
    release = tmp_path / "release"
    model = Emu3.from_pretrained(release)
    assert model.config == task.model.config
    assert model.generate("a red circle").image.size == (64, 64)
    assert isinstance(model.understand(picture(64, 64), "how many?"), str)
    dtypes = {x.dtype for x in load_file(release / "vision_tokenizer" / "model.safetensors").values()}
    assert dtypes == {torch.float16, torch.float32, torch.int64}


def test_the_vision_tokenizer_learns(vq_recipe):
    """Every parameter but those over frames that an image does not have, with the codebook and before it."""
    task = build_task(vq_recipe)
    task.model.train()
    with torch.no_grad():
        for p in task.model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    # the batch of number 1 starts the codebook
    for number, names in ((0, {"l1", "mse"}), (2, set(task.loss_names))):
        batch = task.batch(number)
        losses = mean_losses(task.losses(batch))
        assert losses.keys() == names == task.loss_counts(batch).keys()
        torch.stack([*losses.values()]).sum().backward()
        without = [name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.any()]
        # a bias before batch norm moves nothing in training; before the codebook it is not used
        odd = [name for name in without if not name.endswith("conv1.conv.bias") and name != "quantize.embedding.weight"]
        assert odd == []
        task.model.zero_grad(set_to_none=True)
        check_counts(task, batch, masked=False)


@torch.no_grad()
def test_images_are_encoded_several_at_once(task, monkeypatch):
    """Each gets its own codes, in the order of the images, whatever their sizes."""
    vq = task.model.vision_tokenizer.eval()
    sizes = [(64, 64), (32, 64), (64, 64), (64, 32), (64, 64), (64, 64)]
    images = [torch.rand(3, *size, generator=torch.Generator().manual_seed(i)) for i, size in enumerate(sizes)]
    n_calls = []
    encode = vq.encode_ids
    monkeypatch.setattr(vq, "encode_ids", lambda pixels: (n_calls.append(len(pixels)), encode(pixels))[1])
    monkeypatch.setattr("unimm.training.tasks.emu3.PIXELS_AT_ONCE", 3 * 64 * 64)
    codes = encode_images(vq, images)
    assert sorted(n_calls) == [1, 1, 1, 3]
    for image, found in zip(images, codes, strict=True):
        assert torch.equal(found, encode(image[None])[0])


def test_steps_of_the_vision_tokenizer(vq_recipe, tmp_path):
    task = build_task(vq_recipe)
    train(task, vq_recipe, tmp_path, workers=0)
    report = json.loads((tmp_path / "release" / "report.json").read_text())
    assert report and (tmp_path / "release" / "config.json").exists()


def test_unused_codes_move_to_vectors(vq_recipe):
    """The codebook starts as vectors of images; later, codes that are far from all vectors become some of them."""
    task = build_task(vq_recipe)
    task.model.train()
    codebook = task.model.quantize.embedding.weight
    assert task.options.revive_every == 50
    task.revive_until = 200
    task.losses(task.batch(1))
    start = codebook.detach().clone()
    task.losses(task.batch(49))
    assert torch.equal(codebook, start)
    with torch.no_grad():
        codebook[:40] = 1e3
    task.losses(task.batch(50))
    assert codebook.abs().max() < 100
    assert len(torch.unique(codebook[:40], dim=0)) == 40
    with torch.no_grad():
        codebook[:40] = 1e3
    task.losses(task.batch(200))
    assert (codebook[:40] == 1e3).all()


def test_moving_codes_depends_on_weights_and_number_alone(vq_recipe):
    """A task that begins at a checkpoint moves the same codes as the one that came there step by step."""
    task, resumed = build_task(vq_recipe), build_task(vq_recipe)
    for one in (task, resumed):
        one.model.train()
        one.revive_until = 200
    task.losses(task.batch(1))
    with torch.no_grad():
        task.model.quantize.embedding.weight[:20] = 1e3
    resumed.model.load_state_dict(task.model.state_dict())
    for one in (task, resumed):
        one.losses(one.batch(100))
    assert torch.equal(task.model.quantize.embedding.weight, resumed.model.quantize.embedding.weight)


def test_revived_codes_are_the_unused_ones():
    quantize = NearestCodeQuantizer(6, 2)
    with torch.no_grad():
        quantize.embedding.weight.copy_(torch.tensor([[0.0, 0], [1, 0], [50, 0], [60, 0], [70, 0], [80, 0]]))
    z = torch.tensor([[0.2, 0.1, 0.9, 1.2], [0, 3, 0, 0]])[None, :, None]
    n = revive_unused_codes(quantize, z, torch.Generator().manual_seed(0))
    codes = quantize.embedding.weight
    vectors = {tuple(v) for v in z[0, :, 0].T.tolist()}
    assert n == 4 and torch.equal(codes[:2], torch.tensor([[0.0, 0], [1, 0]]))
    assert {tuple(v) for v in codes[2:].tolist()} == vectors
    # once every code is used, none moves
    assert revive_unused_codes(quantize, codes.detach().T[None, :, None], torch.Generator()) == 0


def test_one_device_trains_the_codebook(vq_recipe, monkeypatch):
    monkeypatch.setattr("unimm.training.tasks.vq.world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 devices for a codebook"):
        build_task(vq_recipe)


@torch.no_grad()
def test_near_codes_begin_with_near_embeddings_and_rows_of_the_head(task):
    """As large as the others, and nothing but codes is set."""
    model = copy.deepcopy(task.model)
    vectors = model.vision_tokenizer.quantize.embedding.weight
    vectors[1] = vectors[0] + 0.01
    before = [model.decoder.embed.weight.clone(), model.decoder.head.weight.clone()]
    emu3_start.init_codes(model)
    code0, n = model.config.special_tokens.code0, len(vectors)
    for was, now in zip(before, (model.decoder.embed.weight, model.decoder.head.weight), strict=True):
        assert (now != was).any(1).nonzero().flatten().tolist() == list(range(code0, code0 + n))
        codes = now[code0 : code0 + n]
        distances = (codes - codes[0]).norm(dim=1)
        assert distances[1] < 0.1 * distances[2:].median()
        assert codes.std() == pytest.approx(was[code0 : code0 + n].std().item(), rel=0.5)


def test_a_nano_is_small():
    """The whole release of the recipes is at most 8 MB."""
    vq = build_task(read_recipe(RECIPES / "emu3-nano-vq.yaml")).model
    model = read_recipe(RECIPES / "emu3-nano.yaml").model["language"]
    dim, mlp = model["hidden_size"], model["intermediate_size"]
    kv = dim * model["num_key_value_heads"] // model["num_attention_heads"]
    vocab = 512 + 208 + 3 + 512
    n = 2 * vocab * dim + dim + model["num_hidden_layers"] * (2 * dim * dim + 2 * dim * kv + 3 * dim * mlp + 2 * dim)
    assert 2 * (n + sum(p.numel() for p in vq.parameters())) < 7.9e6


@pytest.mark.parametrize(("n_ranks", "message"), [(100, "at least 256"), (10**6, "at most")])
def test_too_few_or_too_many_ranks(n_ranks, message):
    with pytest.raises(ValueError, match=message):
        train_emu3_tokenizer(n_ranks, n_codes=4, lines=50)
