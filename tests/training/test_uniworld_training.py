"""Training UniWorld on the little world: batches, weights, what each stage trains, steps, the release."""

import dataclasses
import functools
import json
import logging
import pickle
import random
from pathlib import Path

import pytest
import torch
from helpers import metaquery_toys as toys
from helpers.adapters import move_trained, slope_against_gradient
from helpers.flops import check_counts
from helpers.paths import RECIPES
from PIL import Image
from safetensors.torch import save_file

from unimm import TextSampling, UniWorld
from unimm.adapters.config import AdapterConfig
from unimm.data.batching import image_to_uint8
from unimm.data.shapes import example
from unimm.denoisers.flux import FluxConfig, FluxTransformer
from unimm.encoders.siglip import SiglipNaViT, navit_config_from_json
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig
from unimm.training.alignment import resize_features
from unimm.training.config import read_recipe
from unimm.training.ema import EMA, ramped_decay
from unimm.training.init import init_siglip, train_tokenizer
from unimm.training.losses import mean_losses
from unimm.training.tasks.base import build_task
from unimm.training.tasks.uniworld_data import encoded_from_records
from unimm.training.trainer import Trainer, train

PAINTER = dict(in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=12,
               axes_dims_rope=[4, 4, 4], joint_attention_dim=20, pooled_projection_dim=6, guidance_embeds=True)  # fmt: skip
VIT = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, patch_size=16, image_size=128
)
TASKS = {"draw.one": 2, "draw.two": 1, "edit.recolour": 2, "reason.math1": 1}


@functools.cache
def words():
    return train_tokenizer(
        640, lines=2000, special_tokens=toys.SPECIAL_TOKENS, extra=["system user assistant"], kind="bpe"
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe with small numbers, around an untrained MLLM, autoencoder and ViT."""
    folder, full = tmp_path_factory.mktemp("trained"), read_recipe(RECIPES / "uniworld-nano.yaml")
    torch.manual_seed(0)
    vae = AutoencoderKLConfig(
        width=32,
        channel_multipliers=(1, 1, 1, 1),
        n_res_blocks=1,
        latent_channels=4,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    save_file(AutoencoderKL(vae).state_dict(), folder / "ae.safetensors")
    (folder / "vae_config.json").write_text(json.dumps(vae.to_json()))
    save_file(SiglipNaViT(navit_config_from_json(VIT)).state_dict(), folder / "vision.safetensors")
    painter = FluxTransformer(FluxConfig.from_json(PAINTER))
    for p in painter.parameters():
        torch.nn.init.normal_(p, std=0.2)
    painter.save_pretrained(folder / "flux" / "transformer")
    vision = {**full.model["vision"], **VIT, "num_hidden_layers": 1, "image_size": 64}
    generation = full.model["generation"] | {"steps": 2}
    model = {"generation": generation, "hidden": {"vae_projector": 5}, "denoiser": PAINTER, "vision": vision}
    reader = toys.save_mllm(folder / "reader", words())
    paths = dict(mllm=str(reader), vae=str(folder), vit=str(folder))
    options = dict(full.options) | paths | dict(compile=False, tasks=TASKS, frozen=[])
    return dataclasses.replace(
        full,
        cache=None,
        model=model,
        options=options,
        batch_size=8,
        precision="float32",
        warmup_steps=0,
        lr=3e-3,
        muon=(),
    )


def changed(recipe, **options):
    """The recipe with other options."""
    return dataclasses.replace(recipe, options={**recipe.options, **options})


def staged(recipe, stage: str):
    """The recipe of a stage, around a denoiser that is trained already."""
    return changed(recipe, trained=stage, denoiser=str(Path(recipe.options["vae"]) / "flux"), append_vision_start=True)


@pytest.fixture(scope="module")
def objective(recipe):
    return build_task(recipe)


def test_batches_are_a_function_of_seed_and_step_without_the_model(objective):
    worlds = pickle.loads(pickle.dumps(objective.batch))  # noqa: S301, as for a worker process
    a, b, other = worlds(3), objective.batch(3), worlds(4)
    for name in ("noise", "times", "sample_indices"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    for name in ("images", "siglip_images", "weights", "conditioned"):
        assert torch.equal(getattr(a.samples, name), getattr(b.samples, name))
    assert not torch.equal(a.samples.images, other.samples.images) and not torch.equal(a.noise, other.noise)
    assert not torch.equal(a.samples.images, dataclasses.replace(worlds, seed=1)(3).samples.images)


def test_a_batch_holds_every_kind_and_fits_its_losses(objective):
    batch = objective.batch(0)
    samples = batch.samples
    assert set(samples.image_kinds.tolist()) == {0, 1, 2}
    assert batch.sample_indices.tolist() == [i // 2 for i in range(16)]
    assert sum(one.segment.length for items in samples.prompts for one in items) % 256 == 0
    shown = sum(item.kind == "und_image" for items in samples.prompts for item in items)
    assert len(samples.siglip_images) == shown > 0 and samples.weights.shape == (8, 1, 8, 8)
    losses = mean_losses(objective.losses(batch))
    assert set(losses) == {"draw", "edit", "reason"} and all(torch.isfinite(loss) for loss in losses.values())


def test_an_edit_counts_more_where_it_changed_the_image(objective, recipe):
    edit, drawing = example("edit.recolour", 3), example("draw.one", 3)
    weights = objective.batch.loss_weights(edit)
    moved = torch.from_numpy((edit.images[0] != edit.target).any(-1))
    inside = torch.nn.functional.max_pool2d(moved[None].float(), 8).bool()
    assert float(weights.min()) == 1 and float(weights.max()) > 2 and (weights[inside] == weights.max()).all()
    assert (objective.batch.loss_weights(drawing) == 1).all()
    even = dataclasses.replace(objective.batch, options=dataclasses.replace(objective.batch.options, edit_weights=""))
    assert (even.loss_weights(edit) == 1).all()


def test_losses_are_those_of_each_copy_alone(objective):
    """Padding in a batch, of text and of the other group's, does not count."""
    batch, model = objective.batch(0), objective.model
    samples = batch.samples
    latents = objective.encode_latents(samples)
    with torch.no_grad():
        torch.manual_seed(0)
        for p in model.denoiser.parameters():  # a denoiser from scratch says nothing
            p.add_(0.1 * torch.randn_like(p))
        losses = mean_losses(objective.losses(batch))
        found = {}
        left = iter(samples.siglip_images)
        for i, items in enumerate(samples.prompts[: len(samples.conditioned)]):
            shown = [next(left) for item in items if item.kind == "und_image"]
            looks = model.auxiliary.siglip(torch.stack(shown)) if shown else None
            (told,) = model.condition([items], model.mllm.encode([items]), looks)
            at = int(samples.reference_indices[i])
            below = model.auxiliary.vae.encode(samples.reference_images[at : at + 1]) if at >= 0 else None
            assert (at >= 0) == bool(shown)
            for row in (batch.sample_indices == i).nonzero().squeeze(1).tolist():
                loss = model(
                    [told if samples.conditioned[i] else told[:0]], latents[i : i + 1], batch.noise[row : row + 1],
                    batch.times[row : row + 1], pooled=torch.zeros(1, 6), weights=samples.weights[i : i + 1],
                    reference_latents=below,
                )  # fmt: skip
                found.setdefault(int(samples.image_kinds[i]), []).append(loss)
    for group, name in enumerate(("draw", "edit", "reason")):
        torch.testing.assert_close(losses[name], torch.cat(found[group]).mean(), rtol=1e-4, atol=1e-4)


def test_the_denoiser_may_be_shown_the_images(recipe):
    """As the release has them or not: latents of an edit's image beside the one that is drawn."""
    generation = recipe.model["generation"] | {"references": None}
    plain = build_task(dataclasses.replace(recipe, model={**recipe.model, "generation": generation}))
    shown = build_task(recipe)
    batch = shown.batch(0)
    references = shown.encode_references(batch.samples)
    first = int((batch.samples.image_kinds == 1).nonzero()[0])
    at = int(batch.samples.reference_indices[first])
    expected = shown.model.auxiliary.vae.encode(batch.samples.reference_images[at : at + 1])
    torch.testing.assert_close(references[at : at + 1], expected, rtol=0, atol=1e-5)
    assert not plain.encode_references(batch.samples).any() and references.any()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in shown.model.denoiser.parameters():
            p.add_(0.1 * torch.randn_like(p))
        plain.model.load_state_dict(shown.model.state_dict())
        with_references, without = mean_losses(shown.losses(batch)), mean_losses(plain.losses(batch))
        torch.testing.assert_close(with_references["draw"], without["draw"])
        assert (with_references["edit"] - without["edit"]).abs() > 1e-4


def test_dropped_prompts_tell_nothing(recipe):
    objective = build_task(changed(recipe, dropout=1.0))
    batch = objective.batch(0)
    assert not batch.samples.conditioned.any()
    sum(mean_losses(objective.losses(batch)).values()).backward()
    assert (
        objective.model.mllm_projector.fc1.weight.grad is None
        or not objective.model.mllm_projector.fc1.weight.grad.any()
    )
    draws = torch.cat([build_task(changed(recipe, dropout=0.25)).batch(step).samples.conditioned for step in range(40)])
    assert abs(1 - draws.float().mean() - 0.25) < 3 * (0.25 * 0.75 / len(draws)) ** 0.5


def test_a_training_prompt_may_end_with_the_marker(objective):
    builder = objective.batch.builder
    begun = dataclasses.replace(builder, options=dataclasses.replace(builder.options, append_vision_start=True))
    plain, marked = (one.prompt_parts("a cat", [])[-1].ids.tolist() for one in (builder, begun))
    assert marked == [*plain, objective.model.config.mllm.special_tokens.vision_start]


def trained(objective) -> set[str]:
    """The parameters that a step changes, those of a fused table by their rows."""
    recipe = dataclasses.replace(
        read_recipe(RECIPES / "uniworld-nano.yaml"),
        lr=1e-2,
        warmup_steps=0,
        weight_decay=0.0,
        muon=(),
        precision="float32",
    )
    trainer = Trainer(objective, recipe, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in objective.model.named_parameters()}
    for step in range(2):
        trainer.update(objective.batch(step))
    return {name for name, p in objective.model.named_parameters() if not torch.equal(p, before[name])}


def test_stage_1_trains_what_leads_from_the_mllm(recipe):
    objective = build_task(staged(recipe, "stage 1"))
    calls = []
    objective.model.auxiliary.siglip.register_forward_hook(lambda *_: calls.append(1))
    assert trained(objective) == {f"mllm_projector.{fc}.{kind}" for fc in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert not calls, "stage 1 is told no features"


def test_stage_2_trains_the_attention_of_the_image(recipe):
    objective = build_task(staged(recipe, "stage 2"))
    into = objective.model.denoiser.mmdit.single_blocks[0].qkv_mlp
    old, q = into.weight.detach().clone(), objective.model.denoiser.mmdit.single_blocks[0].split_sizes[0]
    names = trained(objective)
    parts = {name.rpartition(".")[0] for name in names}
    image = {
        f"denoiser.mmdit.double_blocks.0.image.{part}" for part in ("qkv", "q_norm", "k_norm", "out_proj", "modulation")
    }
    single = {f"denoiser.mmdit.single_blocks.0.{part}" for part in ("qkv_mlp", "q_norm", "k_norm", "modulation")}
    ends = {f"{part}.{fc}" for part in ("mllm_projector", "siglip_projector") for fc in ("fc1", "fc2")}
    assert parts == image | single | ends
    moved = (into.weight != old).any(1)
    assert moved[:q].any() and not moved[q:].any(), "rows of the feed-forward stay"


def test_everything_else_is_trained_from_scratch(recipe):
    objective = build_task(recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in objective.model.denoiser.parameters():
            p.add_(0.1 * torch.randn_like(p))
    sum(mean_losses(objective.losses(objective.batch(0))).values()).backward()
    missed = [
        n for n, p in objective.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert missed == ["denoiser.pooled_embed.fc1.weight"], "which sees zeros: the nano is told no caption"
    still = {n.split(".")[0] if not n.startswith("auxiliary.") else n[:13] for n, p in objective.model.named_parameters()
             if not p.requires_grad}  # fmt: skip
    assert still == {"mllm", "vae_projector", "auxiliary.vae"}


def test_steps_teach(recipe):
    objective = build_task(recipe)
    trainer = Trainer(objective, recipe, torch.device("cpu"))
    batch = objective.batch(0)
    before = {name: loss.item() for name, loss in mean_losses(objective.losses(batch)).items()}
    for _ in range(12):
        trainer.update(batch)
    after = {name: loss.item() for name, loss in mean_losses(objective.losses(batch)).items()}
    assert all(after[name] < before[name] for name in before), (before, after)


def test_the_encoder_begins_as_the_first_blocks_of_the_vit(objective, recipe):
    """On an image whose patches have no other place: features of a shorter NaViT."""
    vit = SiglipNaViT(navit_config_from_json({**VIT, "num_hidden_layers": 2})).eval()
    tower = init_siglip(recipe.model["vision"], recipe.options["vit"]).eval()
    state = torch.nn.Module.state_dict(tower)
    assert state["patch_embed.weight"].shape == (32, 3, 16, 16) and state["pos_embed"].shape == (16, 32)
    assert {name for name in vit.state_dict() if name.startswith("blocks.")} == {
        n for n in state if n.startswith("blocks.")
    }
    with pytest.raises(ValueError, match="the trained ViT has other numbers"):
        init_siglip({**recipe.model["vision"], "hidden_size": 64}, recipe.options["vit"])


def test_the_average_follows_the_published_ramp():
    model = torch.nn.Linear(1, 1, bias=False)
    average = EMA(model, 0.999)
    with torch.no_grad():
        model.weight.fill_(5.0)
    average.update()
    assert average.weights["weight"] == 5.0, "the first update copies"
    with torch.no_grad():
        model.weight.fill_(0.0)
    average.update()
    assert float(average.weights["weight"]) == pytest.approx(5.0 * 2 / 11) and ramped_decay(1, 0.999) == 2 / 11


@pytest.mark.parametrize(
    ("options", "words"),
    [({"tasks": {"answer.count": 1}}, "got task 'answer.count', expected"), ({"vit": "/nowhere"}, "no model '/nowhere'"),
     ({"trained": "stage 3"}, "got 'stage 3' for trained"), ({"edit_weights": "cubic"}, "got 'cubic' for edit_weights")],
)  # fmt: skip
def test_wrong_recipes(recipe, options, words):
    with pytest.raises(ValueError, match=words):
        build_task(changed(recipe, **options)).batch(0)


def test_a_few_steps_and_their_release(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, steps=2, save_every=2, sample_every=2, log_every=1)
    objective = build_task(recipe)
    assert train(objective, recipe, tmp_path, workers=0) == 2
    assert (tmp_path / "samples" / "00000002.png").is_file()
    release, source = tmp_path / "release", Path(recipe.options["vae"]) / "ae.safetensors"
    assert (release / "vae" / "ae.safetensors").read_bytes() == source.read_bytes()
    model = UniWorld.from_pretrained(release)
    cfg = model.config
    assert (cfg.image_pixels, cfg.n_aspect_ratios, cfg.steps, cfg.true_cfg_scale, cfg.uses_clip) == (
        4096,
        1,
        2,
        3.0,
        False,
    )
    assert (cfg.system_prompt, cfg.images_first, cfg.reference_latents) == ("say what to draw.", True, "tokens")
    (image,) = model.generate("a red circle", seed=3).images
    assert image.size == (64, 64) and image.tobytes() == model.generate("a red circle", seed=3).images[0].tobytes()
    edited = model.generate("make the circle blue", images=image, seed=3)
    assert edited.images[0].size == (64, 64)
    assert isinstance(model.understand(image, "how many?", text_sampling=TextSampling(max_tokens=3)), str)


def test_the_head_learns_who_answers(recipe, tmp_path, caplog):
    """On a model of the recipe, whose other parts stay as they are."""
    caplog.set_level(logging.INFO, logger="unimm")
    model = build_task(recipe).model
    model.save_pretrained(tmp_path / "model")
    full = read_recipe(RECIPES / "uniworld-nano-task-head.yaml")
    options = {
        "model": str(tmp_path / "model"),
        "hidden_dim": 16,
        "tasks": {"draw.one": 2, "edit.add": 1, "answer.count": 3},
    }
    deciding = dataclasses.replace(
        full, options=options, batch_size=12, steps=40, save_every=40, sample_every=40, warmup_steps=0
    )
    objective = build_task(deciding)
    batch = pickle.loads(pickle.dumps(objective.batch))(0)  # noqa: S301, as for a worker process
    assert sorted(batch.targets.tolist()[:6]) == [0, 0, 0, 1, 1, 1]
    before = {name: p.clone() for name, p in objective.model.named_parameters()}
    train(objective, deciding, tmp_path / "run", workers=0)
    moved = {name.split(".")[0] for name, p in objective.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"task_head"}
    again = UniWorld.from_pretrained(tmp_path / "run" / "release")
    test = objective.batch.batch(
        [example(task, i, split="test") for i in range(6) for task in ("draw.one", "answer.count")]
    )
    votes = torch.stack([again.route_logits(one) for one in again.encode_prompts(test.prompts)])
    assert votes.argmax(1).tolist() == test.targets.tolist() and again.task_head.fc1.weight.dtype == torch.float32
    # another run may go on from it, whose recipe builds no head
    trainer = Trainer(build_task(recipe), recipe, torch.device("cpu"))
    trainer.init_from(str(tmp_path / "run" / "release"))
    found = trainer.model.state_dict()
    assert found and all(torch.equal(found[name], x) for name, x in again.state_dict().items() if name in found)
    assert "left out: the recipe's model has none" in caplog.text


def test_numbers_of_the_recipes_and_their_stages():
    nano, one, two = (read_recipe(RECIPES / f"uniworld-{name}.yaml") for name in ("nano", "stage1", "stage2"))
    assert (one.options["trained"], two.options["trained"], nano.options["trained"]) == ("stage 1", "stage 2", "all")
    for stage in (one, two):
        assert (stage.betas, stage.weight_decay, stage.ema_decay, stage.schedule) == (
            (0.9, 0.99),
            0.0,
            0.999,
            "constant",
        )
    assert (one.lr, two.lr, two.warmup_steps) == (1e-3, 1e-6, 5000)
    assert random.Random(0).random() >= nano.options["dropout"] > 0


@pytest.mark.parametrize("stage", ["all", "stage 1", "stage 2"])
def test_flops_are_those_that_torch_counts(recipe, stage):
    objective = build_task(staged(recipe, stage))
    check_counts(objective, objective.batch(0))


def test_an_adapter_of_the_mllm_gets_its_whole_gradient(recipe):
    """Through the prompt and its images, which run without gradients where the MLLM is frozen."""
    task = build_task(recipe)
    move_trained(task.model)  # the velocity is 0 where training begins, and so are gradients before it
    task.model.add_adapter(AdapterConfig(rank=2, alpha=4, targets=("mllm_vision",)))
    move_trained(task.model, std=0.2)
    batch = task.batch(0)
    # differences in float32, of a loss about 1, a hundredth apart
    slope = slope_against_gradient(
        task.model, lambda: torch.stack([x.total for x in task.losses(batch).values()]).sum()
    )
    assert slope == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("targets", [("mllm.attention",), ("projectors", "denoiser.single")])
def test_flops_of_adapters_are_those_that_torch_counts(recipe, targets):
    objective = build_task(staged(recipe, "all"))
    objective.model.add_adapter(AdapterConfig(rank=2, alpha=4, targets=targets))
    check_counts(objective, objective.batch(0))


# ---- alignment with SigLIP2's features of the target


def aligned(recipe, block: int, **options):
    """The recipe with hidden states aligned behind a block: of two, the second is a single one."""
    weights = {**recipe.loss_weights, "align": 0.5}
    return changed(dataclasses.replace(recipe, loss_weights=weights), alignment_block=block, **options)


@pytest.mark.parametrize("block", [1, 2])
def test_alignment_is_the_distance_of_each_tokens_state_from_its_targets_feature(recipe, block):
    """Also beside references, whose rows stand behind those of the noised image."""
    objective = build_task(aligned(recipe, block))
    batch = objective.batch(0)
    model = objective.model
    has_reference = batch.samples.reference_indices[batch.sample_indices] >= 0
    assert has_reference.any() and not has_reference.all()
    encoded = objective.encode(batch.samples)
    conditions = objective.conditions(encoded)
    blocks = [*model.denoiser.mmdit.double_blocks, *model.denoiser.mmdit.single_blocks]
    expected = []
    with torch.no_grad():
        found = objective.losses(batch)["align"]
        for i, sample in enumerate(batch.sample_indices.tolist()):
            outputs = []
            handle = blocks[block - 1].register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[2]))
            objective.flow_losses(batch, encoded, torch.tensor([i]), conditions)
            handle.remove()
            n_text = len(conditions[sample])
            image = outputs[0][0] if block == 1 else outputs[0][:, n_text:]
            predicted = model.alignment_head(image[0, :16])
            target = model.auxiliary.siglip.image_processor.preprocess(
                Image.fromarray(image_to_uint8(batch.samples.images[sample][None])[0])
            )
            features = model.auxiliary.siglip(target[None])[0]
            expected.append(1 - torch.nn.functional.cosine_similarity(predicted, features, dim=-1))
    assert found.count == objective.loss_counts(batch)["align"] == 16 * 16
    torch.testing.assert_close(found.total, torch.cat(expected).sum(), rtol=1e-3, atol=1e-3)


def test_alignment_trains_its_head_in_every_stage_and_leaves_no_trace_in_a_release(recipe, tmp_path):
    for stage in ("stage 1", "stage 2"):
        model = build_task(aligned(staged(recipe, stage), 1)).model
        assert all(p.requires_grad for p in model.alignment_head.parameters())
    recipe = aligned(recipe, 1, frozen=["auxiliary.siglip."])
    recipe = dataclasses.replace(recipe, steps=1, save_every=1, sample_every=9, log_every=1, batch_size=4)
    objective = build_task(recipe)
    start = objective.model.alignment_head[0].weight.detach().clone()
    assert train(objective, recipe, tmp_path, workers=0) == 1
    assert not torch.equal(start, objective.model.alignment_head[0].weight)
    assert not hasattr(UniWorld.from_pretrained(tmp_path / "release"), "alignment_head")


def test_a_cache_holds_the_features_that_hidden_states_are_aligned_with(recipe):
    objective = build_task(aligned(recipe, 2, frozen=["auxiliary.siglip."]))
    batch = objective.batch(0)
    records = objective.cache_records(batch.samples)
    cached = dataclasses.replace(batch, samples=encoded_from_records(records))
    with torch.no_grad():
        whole, read = (objective.losses(one)["align"].total for one in (batch, cached))
    torch.testing.assert_close(read, whole, rtol=1e-4, atol=1e-4)
    check_counts(objective, batch)
    check_counts(objective, cached)


def test_features_are_resized_to_the_tokens_of_other_images():
    features = torch.arange(4.0).view(1, 4, 1)  # 2 x 2 patches
    assert resize_features(features, (2, 2)) is features
    wide = resize_features(features, (1, 2))
    assert wide.flatten().tolist() == [1.0, 2.0]  # each between the patches above and below it


def test_an_aligned_block_that_the_denoiser_has_not_is_refused(recipe):
    with pytest.raises(ValueError, match="got alignment_block 3 for 2 blocks: expected one of them"):
        build_task(aligned(recipe, 3))
