"""Training Janus: what its batches hold, which losses they make, what each stage trains, and how stages follow each
other."""

import dataclasses
import os
import pickle
import random
import signal

import pytest
import torch
from helpers.flops import check_counts
from helpers.janus_recipes import RECIPES, parts, small, text_model
from PIL import Image
from safetensors.torch import load_file

from unimm import Janus
from unimm.data.batching import THOUGHT_TASKS, training_example
from unimm.data.shapes import HELD_OUT, example, parse_scene
from unimm.sequence.parts import IGNORE_INDEX
from unimm.training.config import read_recipe
from unimm.training.losses import mean_losses
from unimm.training.tasks import janus
from unimm.training.tasks.base import build_task
from unimm.training.tasks.deepseek_chat import IMAGE_KINDS, TEXT_KINDS
from unimm.training.trainer import Trainer, train

STAGES = ("janus-nano-stage1", "janus-nano-stage2", "janus-nano-stage3")
TABLE = {  # docs/originals/janus.md, "Training": lr, schedule, weight decay, understanding : text : drawing
    STAGES[0]: (1e-3, "cosine", 0.0, (1, 0, 1)),
    STAGES[1]: (1e-4, "constant", 0.0, (2, 3, 5)),
    STAGES[2]: (2e-5, "constant", 0.1, (7, 3, 10)),
}
ADAPTORS = {"aligner", "gen_aligner", "gen_head"}
TRAINED = {
    STAGES[0]: ADAPTORS,
    STAGES[1]: ADAPTORS | {"gen_embed", "decoder"},
    STAGES[2]: ADAPTORS | {"gen_embed", "decoder", "vision"},
    "janus-nano": ADAPTORS | {"gen_embed", "decoder"},
}


@pytest.fixture(scope="module", autouse=True)
def quick_text_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(janus, "train_tokenizer", text_model)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def objective(folder):
    """janus-nano, one sample of each of its tasks, and texts without images."""
    tasks = dict.fromkeys(
        [*read_recipe(RECIPES / "janus-nano.yaml").options["tasks"], "fact.forward", "fact.math2", "reason.map1"], 1
    )
    return build_task(small("janus-nano", folder, options={"tasks": tasks, "dropout": 0.2}, batch_size=len(tasks)))


def dropping(worlds, part):
    """The batches with another part of their prompts dropped."""
    return dataclasses.replace(worlds, builder=dataclasses.replace(worlds.builder, dropout=part))


def of(objective, *tasks, dropout=0.0, seed=0):
    """A batch of examples of some tasks."""
    worlds = dropping(objective.batch, dropout)
    return worlds.batch([training_example(task, i, seed=seed) for i, task in enumerate(tasks)], random.Random(0))


def same(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "text_kinds", "image_kinds")
    ) and (torch.equal(a.pack.ids, b.pack.ids) and torch.equal(a.pack.gen_images.content, b.pack.gen_images.content))


# batches


def test_batches_are_a_function_of_seed_and_step_and_need_no_model(objective):
    travelled = pickle.loads(pickle.dumps(objective.batch))  # noqa: S301  (made here)
    a, b = objective.batch(3), travelled(3)
    assert same(a, b) and not same(a, travelled(4))
    assert not same(a, dataclasses.replace(objective.batch, seed=1)(3))
    assert b"torch" not in pickle.dumps(objective.batch), "no weights travel"


def test_a_batch_holds_every_kind_and_fits_its_losses(objective):
    batch = objective.batch(0)
    assert set(batch.image_kinds.tolist()) == set(range(len(IMAGE_KINDS)))
    assert set(batch.text_kinds.tolist()) == set(range(len(TEXT_KINDS)))
    assert len(batch.image_kinds) == len(batch.pack.gen_images.content) == 16 * len(batch.images)
    assert len(batch.text_kinds) == int((batch.pack.labels != IGNORE_INDEX).sum())
    assert len(batch.pack.layout.position_ids) % 256 == 0
    losses = mean_losses(objective.losses(batch))
    assert set(losses) == set(IMAGE_KINDS + TEXT_KINDS) and all(torch.isfinite(loss) for loss in losses.values())


def test_only_the_assistants_words_and_the_end_carry_labels(objective):
    tasks = ("answer.count", "answer.relation", "caption.full", "fact.inverse", "fact.map3")
    batch, markers = of(objective, *tasks), objective.model.special_tokens
    labels = batch.pack.labels[batch.pack.labels != IGNORE_INDEX].tolist()
    spoken, words = [], []
    for label in labels:
        if label == markers.eos:
            spoken.append(objective.model.tokenizer.decode(words))
            words = []
        else:
            words.append(label)
    assert not words, "the last label is the end"
    assert spoken == [training_example(task, i, seed=0).answer for i, task in enumerate(tasks)]
    # a label is the id of the next row
    ids = torch.full((len(batch.pack.layout.position_ids) + 1,), -1).index_copy(0, batch.pack.id_rows, batch.pack.ids)
    at = (batch.pack.labels != IGNORE_INDEX).nonzero().squeeze(1)
    assert torch.equal(ids[batch.pack.id_rows[at] + 1], batch.pack.labels[at])


def test_drawings_carry_no_text_loss(objective):
    batch = of(objective, "draw.one", "edit.add", "reason.math1")
    assert not (batch.pack.labels != IGNORE_INDEX).any()


def test_a_dropped_prompt_is_pads_between_its_ends(objective):
    markers = objective.model.special_tokens
    kept, dropped = (of(objective, "draw.two", "edit.swap", dropout=part) for part in (0.0, 1.0))
    assert kept.pack.layout.segment_starts[-1] == dropped.pack.layout.segment_starts[-1], "as long"
    for start, length in zip(dropped.pack.layout.segment_starts, dropped.pack.layout.lengths, strict=True):
        mine = (dropped.pack.id_rows >= start[0]) & (dropped.pack.id_rows < start[0] + length)
        ids = dropped.pack.ids[mine].tolist()
        if markers.boi in ids:
            assert len(ids) == length - 16  # all but the codes
            assert ids == [markers.bos, *[markers.pad] * (len(ids) - 2), markers.boi]
    assert dropped.pack.und_images is None and kept.pack.und_images is not None
    assert torch.equal(kept.images, dropped.images)


def test_a_tenth_of_drawings_loses_its_prompt(objective):
    dice, pad = random.Random(0), objective.model.special_tokens.pad
    worlds = dropping(objective.batch, 0.1)
    one = example("draw.one", 0)
    dropped = sum(int(worlds.sample(one, dice).parts[0].ids[1]) == pad for _ in range(1000))
    assert 70 <= dropped <= 130  # three standard deviations of a binomial


def test_no_held_out_pair_is_shown_or_named(objective):
    plain = dataclasses.replace(objective.batch.options, novel_colours=0.0, novel_shapes=0.0)
    worlds = dataclasses.replace(dropping(objective.batch, 0.0), options=plain)
    words = objective.model.tokenizer
    for step in range(3):
        batch = worlds(step)
        pixels = ((batch.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        drawn = {(one.shape, one.colour) for image in pixels for one in parse_scene(image.numpy())}
        assert drawn and not drawn & set(HELD_OUT)
        text = words.decode(batch.pack.ids.tolist())
        assert "red" in text and not any(f"{colour} {shape}" in text for shape, colour in HELD_OUT)


def test_thoughts_are_texts(objective):
    for task, source in THOUGHT_TASKS.items():
        one = training_example(task, 4, seed=0)
        assert one.task == task and one.answer == example(source, 4).think and one.target is None and not one.images
    assert training_example("draw.one", 2, seed=5).prompt == example("draw.one", 2, seed=5).prompt


# losses


def losses_of(objective, batch):
    with torch.no_grad():
        return objective.model(objective.encode_image_tokens(batch))


def test_a_pack_equals_its_samples_one_by_one(objective):
    tasks = ("draw.two", "answer.count", "edit.remove", "caption", "fact.forward", "draw.scene")
    dice = random.Random(0)
    worlds = dropping(objective.batch, 0.0)
    together = losses_of(objective, of(objective, *tasks))
    alone = [
        losses_of(objective, worlds.batch([training_example(task, i, seed=0)], dice)) for i, task in enumerate(tasks)
    ]
    for name in ("text", "image"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(one, name) for one in alone]), rtol=1e-4, atol=1e-5
        )


def test_a_code_is_predicted_from_the_rows_before_it(objective):
    encoded = objective.encode_image_tokens(of(objective, "draw.one"))
    codes = encoded.gen_images.content

    def losses(content):
        with torch.no_grad():
            return objective.model(
                dataclasses.replace(encoded, gen_images=dataclasses.replace(encoded.gen_images, content=content))
            ).image

    before = losses(codes)
    for k in (0, 7, 15):
        other = codes.clone()
        other[k] = (codes[k] + 1) % 48
        after = losses(other)
        assert torch.equal(after[:k], before[:k]), "no row sees a later code"
        # its own loss is of another label after the same rows; those after it are told of the change
        assert after[k] != before[k] and (after[k + 1 :] != before[k + 1 :]).all()
    # the rows that predict are the marker's and those of all codes but the last, as in drawing
    boi = (encoded.ids == objective.model.special_tokens.boi).nonzero().squeeze(1)
    assert encoded.gen_images.rows[0] - 1 == encoded.id_rows[boi].item()


def test_codes_are_those_of_each_image_alone(objective):
    batch = objective.batch(1)
    encoded = objective.encode_image_tokens(batch)
    for picture, codes in zip(batch.images, encoded.gen_images.content.split(16), strict=True):
        assert torch.equal(codes, objective.model.vq.encode_ids(picture[None])[0])


@pytest.mark.parametrize(
    ("tasks", "names"),
    [(("answer.count", "fact.math1"), {"answer", "fact"}), (("draw.one", "edit.add"), {"draw", "edit"})],
)
def test_a_batch_may_only_say_or_only_draw(objective, tasks, names):
    batch = of(objective, *tasks)
    losses = mean_losses(objective.losses(batch))
    assert set(losses) == names
    objective.model.zero_grad(set_to_none=True)
    sum(losses.values()).backward()
    moved = {
        name.split(".")[0] for name, p in objective.model.named_parameters() if p.grad is not None and p.grad.any()
    }
    objective.model.zero_grad(set_to_none=True)
    assert ("gen_head" in moved) == ("draw" in names) and {"decoder", "aligner"} <= moved


# stages


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_those_of_the_table(name):
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    lr, schedule, decay, ratio = TABLE[name]
    assert (recipe.lr, recipe.schedule, recipe.weight_decay) == (lr, schedule, decay)
    assert (recipe.max_grad_norm, recipe.betas, recipe.muon, recipe.options["dropout"]) == (1.0, (0.9, 0.95), (), 0.1)
    tasks = recipe.options["tasks"]
    shares = [
        sum(n for task, n in tasks.items() if task.startswith(kinds))
        for kinds in (("caption", "answer"), "fact", "draw")
    ]
    assert sum(shares) == sum(tasks.values()) == recipe.batch_size, "the ratio is exact in every batch"
    assert [share * sum(ratio) for share in shares] == [part * recipe.batch_size for part in ratio]


def test_stages_are_one_model():
    first, *others = (read_recipe(RECIPES / f"{name}.yaml") for name in (*STAGES, "janus-nano"))
    assert all(one.model == first.model and one.options["vocab_size"] == first.options["vocab_size"] for one in others)


@pytest.mark.parametrize("name", TRAINED)
def test_frozen_parts_stay_and_trained_parts_move(folder, name):
    recipe = small(name, folder, lr=1e-2, warmup_steps=0)
    trainer = Trainer(build_task(recipe), recipe, torch.device("cpu"))
    before = {key: x.clone() for key, x in trainer.model.state_dict().items()}
    for _ in range(2):
        trainer.update(trainer.task.batch(0))
    moved = {key for key, x in trainer.model.state_dict().items() if not torch.equal(x, before[key])}
    assert {key.split(".")[0] for key in moved} == TRAINED[name]
    assert moved == {key for key, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any(key.startswith(("vq.", "vision.trunk.attn_pool.")) for key in moved)


def test_a_part_that_is_not_there_cannot_be_frozen(folder):
    with pytest.raises(ValueError, match=r"frozen \['visoin'\].*parts are decoder, vision"):
        build_task(small("janus-nano", folder, options={"frozen": ["visoin"]}))


def test_stages_follow_each_other_and_their_releases_work(folder, tmp_path):
    before = None
    for name in STAGES:
        recipe = small(name, folder)
        objective = build_task(recipe)
        if before:
            trainer = Trainer(objective, recipe, torch.device("cpu"))
            trainer.init_from(before)
            ours, theirs = (
                dict(trainer.model.named_parameters()),
                load_file(before / "checkpoints/00000002/model.safetensors"),
            )
            averaged = load_file(before / "checkpoints/00000002/average.safetensors")
            assert averaged.keys() != trainer.ema.weights.keys()
            assert all(torch.equal(ours[key], averaged.get(key, x)) for key, x in theirs.items() if key in ours)
        train(objective, recipe, tmp_path / name, init=before, workers=0)
        before = tmp_path / name
        check_release(before / "release")


def test_the_recipe_of_one_stage_makes_a_release(folder, tmp_path):
    recipe = small("janus-nano", folder, steps=1, batch_size=6)
    train(build_task(recipe), recipe, tmp_path, workers=0)
    check_release(tmp_path / "release")


def check_release(folder):
    """A release of the library's own: it loads, answers and draws."""
    model = Janus.from_pretrained(folder)
    assert isinstance(model.understand(Image.new("RGB", (64, 64)), "how many circles are there?"), str)
    assert model.generate("a red circle", seed=0).image.size == (64, 64)


def test_a_stopped_run_goes_on_exactly(folder, tmp_path):
    recipe = small(STAGES[1], folder, steps=3, batch_size=8)
    train(build_task(recipe), recipe, tmp_path / "whole", workers=0)
    stopped = build_task(recipe)
    make = stopped.batch

    def batch(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(step)

    stopped.batch = batch
    assert train(stopped, recipe, tmp_path / "parts", workers=0) == 2
    assert train(build_task(recipe), recipe, tmp_path / "parts", resume=True, workers=0) == 3
    for name in ("model", "average"):
        one, other = (
            load_file(tmp_path / run / f"checkpoints/00000003/{name}.safetensors") for run in ("whole", "parts")
        )
        assert one.keys() == other.keys() and all(torch.equal(x, other[key]) for key, x in one.items())


def test_flops_are_those_that_torch_counts(objective):
    check_counts(objective, objective.batch(0))
