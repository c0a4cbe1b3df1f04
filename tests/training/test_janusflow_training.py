"""Training JanusFlow on the little world: batches without the model, labels, dropped prompts, packing, steps, the
release."""

import dataclasses
import functools
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from helpers.flops import check_counts
from helpers.paths import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from unimm import JanusFlow
from unimm.data.shapes import TASKS, example
from unimm.encoders.siglip import SiglipNaViT, navit_config_from_json
from unimm.kernels import attention
from unimm.models.janusflow.config import EXPERT, JanusFlowConfig
from unimm.models.janusflow.processor import bos_unconditional, noised_part
from unimm.sequence.packing import pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, text_part
from unimm.tokenizers.kl import AutoencoderKL, AutoencoderKLConfig
from unimm.training.config import read_recipe
from unimm.training.init import train_tokenizer
from unimm.training.lora_config import LoRAConfig
from unimm.training.losses import mean_losses
from unimm.training.tasks import janusflow
from unimm.training.tasks.base import build_task
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS, TEXT_KINDS
from unimm.training.tasks.janusflow import janusflow_config_json
from unimm.training.trainer import Trainer, train

RECIPE = ROOT / "unimm" / "training" / "recipes" / "janusflow-nano.yaml"
LLM = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48)
TOWER = dict(width=32, layers=1, heads=2, mlp_ratio=1.5)
VIT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, patch_size=16, image_size=128
)
PICTURE = 1 + 16  # rows of one: its marker and its tokens


@pytest.fixture(scope="module", autouse=True)
def _quick_text_model():
    """One text model for all tests, with less text to learn from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(janusflow, "train_tokenizer", functools.cache(functools.partial(train_tokenizer, lines=2000)))
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe with small numbers, around an untrained VAE and ViT, and a fact beside what it teaches."""
    folder, full = tmp_path_factory.mktemp("trained"), read_recipe(RECIPE)
    torch.manual_seed(0)
    vae = AutoencoderKLConfig(
        width=32,
        channel_multipliers=(1, 1, 1, 1),
        n_res_blocks=1,
        latent_channels=8,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    save_file(AutoencoderKL(vae).state_dict(), folder / "ae.safetensors")
    (folder / "vae_config.json").write_text(json.dumps(vae.to_json()))
    save_file(SiglipNaViT(navit_config_from_json(VIT)).state_dict(), folder / "vision.safetensors")
    model = {
        "language": full.model["language"] | LLM,
        "vision": full.model["vision"] | TOWER,
        "flow": {"width": 16, "blocks": 1},
        "generation": full.model["generation"] | {"steps": 2},
    }
    tasks = {
        "draw.one": 2,
        "draw.two": 1,
        "edit.recolour": 2,
        "caption": 1,
        "answer.count": 1,
        "fact.forward": 1,
        "reason.math1": 1,
    }
    options = dict(full.options) | dict(vae=str(folder), vit=str(folder), compile=False, tasks=tasks)
    options |= dict(timesteps_per_image=2, alignment_block=None)
    weights = {name: x for name, x in full.loss_weights.items() if name != "align"}
    return dataclasses.replace(
        full,
        model=model,
        options=options,
        loss_weights=weights,
        batch_size=10,
        precision="float32",
        warmup_steps=0,
        lr=3e-3,
    )


@pytest.fixture(scope="module")
def objective(recipe):
    return build_task(recipe)


def dropping(objective, part: float):
    """The batches with another part of their prompts dropped."""
    return dataclasses.replace(objective.batch, builder=dataclasses.replace(objective.batch.builder, dropout=part))


def test_batches_are_a_function_of_seed_and_step_without_the_model(objective):
    worlds = pickle.loads(pickle.dumps(objective.batch))  # noqa: S301, as for a worker process
    a, b, other = worlds(3), objective.batch(3), worlds(4)
    assert torch.equal(a.pack.ids, b.pack.ids) and torch.equal(a.images, b.images)
    assert (
        torch.equal(a.noise, b.noise)
        and torch.equal(a.posterior, b.posterior)
        and torch.equal(a.pack.timesteps, b.pack.timesteps)
    )
    assert not torch.equal(a.images, other.images) and not torch.equal(a.noise[0], other.noise[0])
    seeded = dataclasses.replace(worlds, seed=1)(3)
    assert not torch.equal(a.images[: len(seeded.images)], seeded.images[: len(a.images)])


def test_a_batch_holds_every_kind_and_fits_its_losses(objective):
    batch = objective.batch(0)
    assert set(batch.image_kinds.tolist()) == set(range(len(IMAGE_KINDS)))
    assert set(batch.text_kinds.tolist()) == set(range(len(TEXT_KINDS)))
    assert len(batch.image_kinds) == int(batch.pack.noised.sum()) == len(batch.noise) == 2 * 16 * len(batch.images)
    assert len(batch.text_kinds) == int((batch.pack.labels != IGNORE_INDEX).sum())
    assert len(batch.pack.layout.position_ids) % 256 == 0
    losses = mean_losses(objective.losses(batch))
    assert set(losses) == set(IMAGE_KINDS + TEXT_KINDS) and all(torch.isfinite(loss) for loss in losses.values())


def test_answers_alone_carry_labels(objective):
    one = example("answer.count", 0)
    words, markers = objective.model.processor.text_tokenizer, objective.model.special_tokens
    items = objective.batch.sample(one, random.Random(0)).parts
    said = torch.cat([item.labels for item in items])
    assert said[said != IGNORE_INDEX].tolist() == [*words.encode(one.answer), markers.eos]
    # a row's label is the id of the row behind it
    last = items[-1]
    at = (last.labels != IGNORE_INDEX).nonzero().squeeze(1)
    assert torch.equal(last.labels[at], last.ids[at + 1])


def test_copies_have_times_of_their_own_and_one_image(objective):
    sample = objective.batch.sample(example("edit.recolour", 1), random.Random(0))
    *prompt, first, second = sample.parts
    assert [item.kind for item in prompt] == ["text", "und_image", "text"] and sample.target.shape == (64, 64, 3)
    assert torch.equal(first.tokens, second.tokens) and 0 < first.timestep != second.timestep < 1
    assert not first.segment.visible and first.segment.advance == 0
    times = torch.cat([objective.batch(step).pack.timesteps[::16] for step in range(12)])
    normals = times.logit()
    # 12 steps of about 15 draws: three deviations of a mean and of a deviation
    assert abs(normals.mean()) < 3 * len(normals) ** -0.5 and abs(normals.std() - 1) < 3 * (2 * len(normals)) ** -0.5


def test_dropped_prompts_are_what_guidance_compares_with(objective):
    for task in ("draw.one", "edit.recolour"):
        kept, lost = (dropping(objective, part).sample(example(task, 1), random.Random(0)).parts for part in (0.0, 1.0))
        prompt = objective.batch.prompt_parts(example(task, 1))
        assert len(kept) == len(prompt) + 2
        assert [item.segment for item in lost[:-2]] == [item.segment for item in bos_unconditional(prompt)]
        assert lost[0].ids.tolist() == [objective.model.special_tokens.bos]
        # the image stands where it would have stood
        ends = [pack_sequences([items]).layout.position_ids[-PICTURE:] for items in (kept, lost)]
        assert torch.equal(*ends)
    samples = [dropping(objective, 0.25).sample(example("draw.one", i), random.Random(i)).parts for i in range(400)]
    # three deviations of 400 draws
    assert abs(sum(items[0].segment.length == 1 for items in samples) / 400 - 0.25) < 3 * (0.25 * 0.75 / 400) ** 0.5
    answers = dropping(objective, 1.0).sample(example("answer.count", 0), random.Random(0)).parts
    assert sum(item.segment.length for item in answers) > 16


def test_latents_are_those_of_each_image_alone(objective):
    batch = objective.batch(1)
    tokens = objective.encode_latents(batch).gen_images.content
    picture, token = batch.pack.gen_images.content[40].tolist()
    alone = objective.model.vae.encode(
        batch.images[picture : picture + 1], noise=batch.posterior[picture : picture + 1]
    )
    h, w = divmod(token, alone.shape[3] // 2)
    expected = alone[0, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].permute(1, 2, 0).flatten()
    torch.testing.assert_close(tokens[40], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_plan(objective, task):
    batch = objective.batch.batch([example(task, 5), example("draw.one", 0)], random.Random(0))
    assert len(batch.pack.layout.lengths) == 3  # two samples and the filler


@torch.no_grad()
def test_packing_equals_one_by_one(objective):
    """Every sample, and every copy of an image, has the loss that it has alone behind its prompt."""
    model, generator = stirred(objective.model), torch.Generator().manual_seed(0)
    tasks = ("draw.one", "answer.count", "edit.recolour", "caption")
    samples = []
    for i, task in enumerate(tasks):
        items = dropping(objective, float(i == 0)).sample(example(task, i), random.Random(i)).parts
        latent = torch.randn(16, 32, generator=generator)
        samples.append(
            [dataclasses.replace(item, tokens=latent) if item.kind == "gen_image" else item for item in items]
        )
    noise = torch.randn(4 * 16, 32, generator=generator)
    together = model(pack_sequences(samples), noise)
    mse, text = [], []
    for items in samples:
        prompt, copies = [i for i in items if i.kind != "gen_image"], [i for i in items if i.kind == "gen_image"]
        for copy in copies:
            alone = noise[16 * len(mse) : 16 * (len(mse) + 1)]
            mse.append(model(pack_sequences([[*prompt, copy]]), alone).mse)
        if not copies:
            text.append(model(pack_sequences([items]), noise[:0]).text)
    # float32 sums in other orders
    torch.testing.assert_close(together.mse, torch.cat(mse), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.text, torch.cat(text), rtol=1e-4, atol=1e-4)


def stirred(model):
    """A copy whose velocity is not 0, and whose norms of responses count."""
    found = JanusFlow(model.config)
    found.load_state_dict(model.state_dict())
    found.tokenizer = model.tokenizer
    torch.manual_seed(0)
    for name, parameter in found.named_parameters():
        if "channelwise_norm" in name or name.startswith("gen_decoder.out_convs"):
            parameter.normal_(std=0.2)
    return found.eval()


@torch.no_grad()
def test_text_loss_is_the_cross_entropy_of_the_words_that_chat_would_say(objective):
    model, one = objective.model.eval(), example("answer.count", 3)
    items = objective.batch.sample(one, random.Random(0)).parts
    loss = model(pack_sequences([items]), torch.zeros(0, 32)).text
    last = items[-1]
    said = (last.labels != IGNORE_INDEX).nonzero().squeeze(1)
    # the prompt as `understand` reads it, then the words behind it
    asked = model.processor.conversation_parts(
        [{"role": "user", "content": one.prompt, "images": Image.fromarray(one.images[0])}]
    )
    batch = pack_sequences([[*asked, text_part(last.ids[said + 1].tolist())]])
    hidden = model.backbone(batch, lambda layer, q, k, v: attention(q, k, v, batch.layout.mask))[EXPERT]
    logits = model.decoder.head(model.decoder.norms[EXPERT](hidden[-1 - len(said) : -1]))
    torch.testing.assert_close(loss, cross_entropy(logits, last.labels[said], reduction="none"), rtol=1e-4, atol=1e-4)


def test_steps_teach(recipe):
    objective = build_task(recipe)
    trainer = Trainer(objective, recipe, torch.device("cpu"))
    batch = objective.batch(0)
    before = {name: loss.item() for name, loss in mean_losses(objective.losses(batch)).items()}
    frozen = objective.model.vae.decoder.conv_in.weight.clone()
    start = objective.model.und_start_embed.detach().clone()
    for _ in range(12):
        trainer.update(batch)
    after = {name: loss.item() for name, loss in mean_losses(objective.losses(batch)).items()}
    assert all(after[name] < before[name] for name in before), (before, after)
    assert torch.equal(frozen, objective.model.vae.decoder.conv_in.weight)
    assert not torch.equal(start, objective.model.und_start_embed)


def test_every_trained_parameter_is_reached(recipe):
    objective = build_task(recipe)
    torch.manual_seed(0)
    for name, parameter in objective.model.named_parameters():
        if "unpatch_conv" in name:  # zeros pass nothing on
            torch.nn.init.normal_(parameter, std=0.1)
    sum(mean_losses(objective.losses(objective.batch(0))).values()).backward()
    missed = [
        n for n, p in objective.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not missed


def test_another_vit_is_refused(recipe):
    changed = dataclasses.replace(recipe, model={**recipe.model, "vision": recipe.model["vision"] | {"width": 64}})
    with pytest.raises(ValueError, match="the trained ViT has other numbers than the recipe's vision"):
        build_task(changed)
    with pytest.raises(ValueError, match=r"no ae.safetensors in /nowhere: run `unimm train bagel-nano-vae"):
        build_task(dataclasses.replace(recipe, options={**recipe.options, "vae": "/nowhere"}))


def test_a_few_steps_and_their_release(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, steps=2, save_every=2, sample_every=2, log_every=1)
    objective = build_task(recipe)
    assert train(objective, recipe, tmp_path, workers=0) == 2
    assert (tmp_path / "samples" / "00000002.png").is_file()
    release = tmp_path / "release"
    source = Path(recipe.options["vae"]) / "ae.safetensors"
    assert (release / "ae.safetensors").read_bytes() == source.read_bytes()
    model = JanusFlow.from_pretrained(release)
    assert (model.config.image_size, model.config.steps, model.config.guidance, model.config.chat.system) == (
        (64, 64),
        2,
        2.0,
        "",
    )
    (image,) = model.generate("a red circle", seed=3).images
    assert image.size == (64, 64) and image.tobytes() == model.generate("a red circle", seed=3).images[0].tobytes()
    edited = model.generate("make the circle blue", images=image, seed=3)
    assert edited.images[0].size == (64, 64)
    assert isinstance(model.understand(image, "how many?"), str)


def test_numbers_of_the_recipe_fit_the_bundle():
    """At most 20 MB in bfloat16 beside a VAE of 2.1 MB."""
    recipe = read_recipe(RECIPE)
    vae = AutoencoderKLConfig(
        width=32,
        channel_multipliers=(1, 1, 2, 2),
        n_res_blocks=1,
        latent_channels=8,
        scaling_factor=1.0,
        shift_factor=0.0,
    ).to_json()
    with torch.device("meta"):
        model = JanusFlow(JanusFlowConfig.from_json(janusflow_config_json(recipe.model, vae, 512), {}, vae))
    assert model.config.latent_size == (8, 8) and model.config.gen_encoder.in_channels == 8
    assert 2 * sum(x.numel() for name, x in model.state_dict().items() if not name.startswith("vae.")) < 17.9e6


def test_a_target_is_behind_its_prompt_alone():
    one = noised_part(torch.zeros(4, 2, dtype=torch.long), 7, timestep=0.25)
    layout = pack_sequences([[text_part([1, 2]), one, dataclasses.replace(one, timestep=0.5)]]).layout
    assert layout.position_ids.tolist() == [0, 1, *range(2, 7), *range(2, 7)]
    sees = [[q >= k and not (q >= 7 and 2 <= k < 7) for k in range(12)] for q in range(12)]
    assert torch.equal(layout.mask.dense(), torch.tensor(sees))


def test_texts_alone_make_a_batch(objective):
    batch = objective.batch.batch([example("answer.count", 1), example("caption", 1)], random.Random(0))
    assert batch.pack.gen_images is None and set(mean_losses(objective.losses(batch))) == {"answer", "caption"}


def test_flops_are_those_that_torch_counts(objective):
    check_counts(objective, objective.batch(0))


# ---- alignment with the vision encoder's features


@pytest.fixture(scope="module")
def aligned_recipe(recipe):
    """The recipe with hidden states aligned behind its first block."""
    return dataclasses.replace(
        recipe,
        options={**recipe.options, "alignment_block": 1},
        loss_weights={**recipe.loss_weights, "align": 0.5},
    )


def test_alignment_is_the_distance_of_hidden_states_from_each_images_own_features(aligned_recipe):
    objective = build_task(aligned_recipe)
    batch = objective.batch(0)
    found = objective.losses(batch)["align"]
    assert found.count == objective.loss_counts(batch)["align"] == len(batch.image_kinds)
    model = objective.model
    pack = objective.encode_latents(batch)
    seen = []
    handle = model.decoder.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0][EXPERT]))
    with torch.no_grad():
        model(pack, batch.noise)
    handle.remove()
    # token by token: which image it is of, and which patch of that image it covers
    expected = []
    with torch.no_grad():
        predicted = model.alignment_head(seen[0][pack.gen_images.rows])
        for row, (image, token) in zip(predicted, batch.pack.gen_images.content.tolist(), strict=True):
            y, x = divmod(token, 4)
            feature = model.vision(batch.images[image : image + 1])[0, 4 * y + x]
            expected.append(1 - row @ feature / (row.norm() * feature.norm()))
    torch.testing.assert_close(found.total.detach(), torch.stack(expected).sum(), rtol=1e-4, atol=1e-4)


def test_alignment_trains_the_first_blocks_and_leaves_the_encoder(aligned_recipe):
    recipe = dataclasses.replace(
        aligned_recipe, options={**aligned_recipe.options, "frozen": []}, muon=(), no_weight_decay=()
    )
    objective = build_task(recipe)
    objective.losses(objective.batch(0))["align"].mean.backward()
    grads = {name: p.grad for name, p in objective.model.named_parameters()}
    reached = {name.split(".")[0] for name, grad in grads.items() if grad is not None and grad.any()}
    # an edit's image is read by the encoder, too, as features that the hidden states depend on
    assert reached == {
        "decoder", "gen_encoder", "gen_encoder_aligner", "alignment_head", "aligner", "vision", "und_start_embed"
    }  # fmt: skip
    first, second = (grads[f"decoder.blocks.{i}.experts.{EXPERT}.q.weight"] for i in range(2))
    assert first.any() and second is None
    drawn = objective.batch.batch([example("draw.one", 0)], random.Random(0))
    objective.model.zero_grad()
    objective.losses(drawn)["align"].mean.backward()
    assert all(p.grad is None for p in objective.model.vision.parameters())


def test_flops_of_alignment_are_those_that_torch_counts(aligned_recipe):
    objective = build_task(aligned_recipe)
    check_counts(objective, objective.batch(0))


def test_an_aligned_run_starts_from_a_release_and_from_a_run_without(recipe, aligned_recipe, tmp_path):
    short = dict(steps=1, save_every=1, sample_every=9, log_every=1)
    recipe, aligned_recipe = (dataclasses.replace(one, **short) for one in (recipe, aligned_recipe))
    train(build_task(recipe), recipe, tmp_path / "plain", workers=0)
    for init in ("plain", "plain/release"):
        out = tmp_path / f"aligned {init.replace('/', ' ')}"
        objective = build_task(aligned_recipe)
        start = objective.model.alignment_head[0].weight.detach().clone()
        assert train(objective, aligned_recipe, out, workers=0, init=tmp_path / init) == 1
        # the head is trained, and no part of a release
        assert not torch.equal(start, objective.model.alignment_head[0].weight)
        assert read_header_names(out) == read_header_names(tmp_path / "plain")
        longer = dataclasses.replace(aligned_recipe, steps=2)
        assert train(build_task(longer), longer, out, workers=0, resume=True) == 2


def read_header_names(out):
    with safe_open(out / "release" / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_a_cache_holds_the_features_that_hidden_states_are_aligned_with(aligned_recipe):
    objective = build_task(aligned_recipe)
    inputs = objective.cache_inputs(0)
    records = objective.cache_records(inputs)
    batch = inputs[1]
    drawn = [record for record in records if len(record["target"])]
    assert len(drawn) == len(batch.images) < len(records)
    cached = objective.batch.encoded(batch, drawn)
    torch.testing.assert_close(cached.features, objective.target_features(batch))
    with torch.no_grad():
        torch.testing.assert_close(objective.losses(cached)["align"].total, objective.losses(batch)["align"].total)


def test_what_cannot_be_aligned_is_refused(aligned_recipe):
    deep = dataclasses.replace(aligned_recipe, options={**aligned_recipe.options, "alignment_block": 3})
    with pytest.raises(ValueError, match="got alignment_block 3 for 2 blocks"):
        build_task(deep)
    coarse = {**aligned_recipe.model, "generation": {**aligned_recipe.model["generation"], "latent": [16, 16]}}
    with pytest.raises(ValueError, match="expected the same of both; leave alignment_block out"):
        build_task(dataclasses.replace(aligned_recipe, model=coarse))
    weightless = {name: x for name, x in aligned_recipe.loss_weights.items() if name != "align"}
    with pytest.raises(ValueError, match="loss_weights"):
        Trainer(
            build_task(aligned_recipe),
            dataclasses.replace(aligned_recipe, loss_weights=weightless),
            torch.device("cpu"),
        )


def test_alignment_beside_an_adapter_is_refused():
    recipe = read_recipe(RECIPE.with_name("janusflow-stage2.yaml"))
    lora = LoRAConfig(rank=2, alpha=4.0, targets=("decoder",))
    with pytest.raises(ValueError, match="got alignment_block and lora"):
        build_task(dataclasses.replace(recipe, lora=lora))
