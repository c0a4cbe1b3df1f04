"""Training Show-o and its image tokenizer: what batches hold, which rows carry loss, that all learns, and a few steps."""

import dataclasses

import pytest
import torch
from helpers.paths import RECIPES

import unimm
from unimm import ShowO, TextSampling
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.magvit_v2 import MagvitV2
from unimm.training.config import read_recipe
from unimm.training.losses import mean_losses
from unimm.training.tasks.base import build_task
from unimm.training.tasks.show_o import IMAGE_KINDS, TEXT_KINDS, train_bpe_tokenizer

LANGUAGE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48)


@pytest.fixture(scope="module")
def vq_task():
    recipe = read_recipe(RECIPES / "showo-nano-vq.yaml")
    return build_task(dataclasses.replace(recipe, batch_size=2, precision="float32"))


@pytest.fixture(scope="module")
def task(vq_task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq")
    vq_task.save(folder)
    recipe = read_recipe(RECIPES / "showo-nano.yaml")
    model = {**recipe.model, "language": {**recipe.model["language"], **LANGUAGE}}
    options = {**recipe.options, "vq": str(folder), "vocab_size": 300}
    return build_task(dataclasses.replace(recipe, model=model, options=options, batch_size=12, precision="float32"))


def has_gradients(task) -> list[str]:
    """The trained parameters without a gradient after a step's losses."""
    losses = mean_losses(task.losses(task.batch(0)))
    assert losses.keys() <= set(task.loss_names) and all(torch.isfinite(x) for x in losses.values())
    torch.stack([x.float() for x in losses.values()]).sum().backward()
    without = [
        name for name, p in task.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    task.model.zero_grad()
    return without


def test_the_image_tokenizer_learns_and_is_saved(vq_task, tmp_path):
    with torch.no_grad():
        for p in vq_task.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert not has_gradients(vq_task)
    batch = vq_task.batch(0)
    assert {name: one.count for name, one in vq_task.losses(batch).items()} == vq_task.loss_counts(batch)
    vq_task.save(tmp_path)
    again = MagvitV2.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in vq_task.model.state_dict().items())


def test_every_trained_parameter_learns(task):
    assert not has_gradients(task)
    frozen = {name for name, p in task.model.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith("vq.") for name in frozen)


def test_losses_are_of_masked_tokens_their_ends_and_answers(task):
    batch = task.batch(3)
    codes, labels = task.encode_targets(batch)
    n_codes = task.model.config.n_codes
    masked = batch.masked.flatten()
    assert torch.equal(codes == n_codes, masked) and torch.equal(labels != IGNORE_INDEX, masked)
    assert torch.equal(labels[masked], task.model.vq.encode_ids(batch.images).flatten()[masked])
    found = task.losses(batch)
    assert {name: one.count for name, one in found.items()} == task.loss_counts(batch)
    of_images = sum(one.count for name, one in found.items() if name in IMAGE_KINDS)
    assert of_images == int(masked.sum()) + 2 * len(batch.images)
    assert any(name in TEXT_KINDS for name in found)


def test_batches_are_made_by_their_number(task):
    a, b = task.batch(5), task.batch(5)
    assert torch.equal(a.pack.ids, b.pack.ids) and torch.equal(a.masked, b.masked)
    assert not torch.equal(a.masked, task.batch(6).masked) or not torch.equal(a.pack.ids, task.batch(6).pack.ids)
    assert not torch.equal(a.pack.ids, task.held_out_batch(5).pack.ids)


def test_a_few_steps_lower_the_loss_and_the_release_loads(task, tmp_path):
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], lr=3e-3)
    batch = task.batch(0)
    totals = []
    for _ in range(8):
        total = torch.stack(list(mean_losses(task.losses(batch)).values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(float(total.detach()))
    assert totals[-1] < 0.9 * totals[0]
    task.save(tmp_path)
    model = unimm.load(tmp_path)
    assert isinstance(model, ShowO)
    image = model.generate("a red circle", steps=2).image
    assert image.size == (64, 64)
    assert isinstance(model.understand(image, "how many", text_sampling=TextSampling(max_tokens=3)), str)


def test_the_small_model_takes_8_megabytes_at_most():
    recipe = read_recipe(RECIPES / "showo-nano.yaml")
    vq = read_recipe(RECIPES / "showo-nano-vq.yaml")
    from unimm.models.show_o.config import ShowOConfig
    from unimm.training.tasks.magvit_v2 import MagvitV2Task
    from unimm.training.tasks.show_o import show_o_config_json

    tokenizer = MagvitV2Task.from_recipe(vq).model
    config = show_o_config_json(recipe.model, n_text=512, n_codes=tokenizer.config.n_codes)
    with torch.device("meta"):
        model = ShowO(ShowOConfig.from_json(config, recipe.model["language"]))
    n_bytes = sum(2 * p.numel() for p in model.parameters()) + sum(4 * p.numel() for p in tokenizer.parameters())
    assert n_bytes < 8e6


def test_the_tokenizer_reads_back_what_it_writes():
    tokenizer = train_bpe_tokenizer(300, lines=200)
    text = "draw a red circle left of a blue square"
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.n_text == 300
