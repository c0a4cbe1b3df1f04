"""Records as samples of Janus and JanusFlow: which rows carry loss, the shapes world's samples given as records, and
records that cannot be learned."""

import dataclasses
import pickle
import random

import numpy as np
import pytest
import torch
from helpers import toys
from helpers.janus_recipes import parts, small, text_model
from helpers.records import as_record, image, record, said, text
from PIL import Image

from tests.training.test_janusflow_training import recipe as janusflow_recipe  # noqa: F401
from unimm import Janus
from unimm.data.batching import training_example
from unimm.data.records import RecordImage
from unimm.processing.chat_templates import TemplateMessage, apply_chat_template
from unimm.sequence.parts import IGNORE_INDEX
from unimm.tokenizers.text import encode_prompt
from unimm.training.tasks import janus, janusflow
from unimm.training.tasks.base import build_task
from unimm.training.tasks.janus import janus_builder


@pytest.fixture(scope="module", autouse=True)
def quick_text_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(janus, "train_tokenizer", text_model)
        patch.setattr(janusflow, "train_tokenizer", text_model)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Janus on the shapes world, without dropped prompts."""
    folder = parts(tmp_path_factory.mktemp("parts"))
    return build_task(small("janus-nano", folder, options={"dropout": 0.0}))


@pytest.fixture(scope="module")
def flow_world(janusflow_recipe):  # noqa: F811
    return build_task(dataclasses.replace(janusflow_recipe, options={**janusflow_recipe.options, "dropout": 0.0}))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small Janus with a byte-level tokenizer, as the released ones have, and the builder of its samples."""
    model = Janus.from_pretrained(toys.janus(tmp_path_factory.mktemp("janus")))
    return model, janus_builder(model, dropout=0.0)


def labelled(parts) -> list[int]:
    labels = torch.cat([part.labels for part in parts])
    return labels[labels != IGNORE_INDEX].tolist()


def all_ids(parts) -> list[int]:
    return torch.cat([part.ids for part in parts]).tolist()


# ---- the shapes world, given both ways


@pytest.mark.parametrize("task", ["answer.count", "fact.forward", "caption", "draw.two", "edit.recolour"])
@torch.no_grad()
def test_a_sample_has_the_loss_that_the_shapes_world_gives_it(world, flow_world, task):
    one = training_example(task, 3, seed=0)
    for objective in (world, flow_world):
        builder = objective.batch.builder
        given = objective.batch.sample(one, random.Random(1))
        made = dataclasses.replace(builder.prepare(as_record(one), random.Random(1)), kind=given.kind)
        assert made.n_tokens == given.n_tokens
        losses = [objective.losses(builder.collate([sample], random.Random(2))) for sample in (given, made)]
        assert losses[0].keys() == losses[1].keys() == {task.split(".")[0]}
        for name, loss in losses[0].items():
            # the same rows, in other parts
            torch.testing.assert_close(losses[1][name].mean, loss.mean, rtol=1e-5, atol=1e-6)


def test_losses_are_by_the_kind_of_record(world):
    builder = dataclasses.replace(
        world.batch.builder, image_kinds=("generate", "edit"), text_kinds=("understand", "text")
    )
    tasks = {"answer.count": "understand", "fact.forward": "text", "draw.two": "generate", "edit.recolour": "edit"}
    samples = [builder.prepare(as_record(training_example(task, 0, seed=0)), random.Random(0)) for task in tasks]
    assert [sample.kind for sample in samples] == list(tasks.values())
    batch = builder.collate(samples, random.Random(0))
    assert set(batch.text_kinds.tolist()) == set(batch.image_kinds.tolist()) == {0, 1}
    assert len(batch.image_kinds) == 2 * builder.tokens_per_image == len(batch.pack.gen_images.content)
    # the second image's tokens are its own
    assert batch.pack.gen_images.content[:, 0].unique().tolist() == [0, 1]
    assert sum(sample.n_tokens for sample in samples) <= len(batch.pack.layout.position_ids)
    travelled = pickle.loads(pickle.dumps(builder))  # noqa: S301, as for a worker process
    assert torch.equal(travelled.collate(samples, random.Random(0)).pack.ids, batch.pack.ids)


# ---- conversations


def test_every_answer_carries_loss_and_nothing_else(released):
    model, builder = released
    sample = builder.prepare(
        record(
            text("Be brief.", role="system"), image(), text("What is it?"), said("A cat."), text("And"), image(seed=1),
            said("A dog."), text("thanks"),
        ),
        random.Random(0),
    )  # fmt: skip
    eos = model.special_tokens.eos
    encode = model.tokenizer.encode
    # behind "Assistant:" the answers begin with a blank, as the model's own do
    assert labelled(sample.parts) == [*encode(" A cat."), eos, *encode(" A dog."), eos]
    assert sample.kind == "understand" and sample.target is None
    for part in sample.parts:
        if part.kind == "text":
            at = (part.labels[:-1] != IGNORE_INDEX).nonzero().squeeze(1)
            assert torch.equal(part.labels[at], part.ids[at + 1]), "a label is the id of the next row"
    # what follows the last answer is left out
    assert sample.parts[-1].ids[-1] == eos


@pytest.mark.parametrize("with_roles", [True, False], ids=["pro", "first"])
def test_a_conversation_is_written_as_the_chat_template_writes_it(tmp_path, with_roles):
    model = Janus.from_pretrained(toys.janus(tmp_path, roles=with_roles))
    builder = janus_builder(model, dropout=0.0)
    sample = builder.prepare(record(text("one?"), said("two."), text("three?"), said("four.")), random.Random(0))
    roles = builder.processor.roles
    turns = [("user", "one?"), ("assistant", "two."), ("user", "three?"), ("assistant", "four.")]
    written = apply_chat_template(
        [TemplateMessage(roles[role], [words]) for role, words in turns],
        system=model.chat_config.system, special=builder.processor.special,
    )  # fmt: skip
    assert all_ids(sample.parts) == encode_prompt(model.tokenizer, [model.special_tokens.bos, *written])
    # an image stands in front of the question, on a line of its own, as `understand` places it
    seen = builder.prepare(record(image(), text("what?"), said("a cat")), random.Random(0))
    asked = builder.processor.conversation_parts([toys.user("what?", toys.picture(30, 22))])
    assert all_ids(seen.parts)[: len(all_ids(asked))] == all_ids(asked)
    assert [part.kind for part in seen.parts][:3] == [part.kind for part in asked]


def test_texts_that_nobody_says_are_learned_as_they_are(released):
    model, builder = released
    special, encode = model.special_tokens, model.tokenizer.encode
    plain = builder.prepare(record(text("a cat sat", loss=True)), random.Random(0))
    assert all_ids(plain.parts) == [special.bos, *encode("a cat sat"), special.eos]
    assert labelled(plain.parts) == [*encode("a cat sat"), special.eos] and plain.kind == "text"
    captioned = builder.prepare(record(image(), text("a cat", loss=True)), random.Random(0))
    assert all_ids(captioned.parts) == [special.bos, special.boi, special.eoi, *encode("a cat"), special.eos]
    assert captioned.parts[1].labels.tolist() == [IGNORE_INDEX, encode("a cat")[0]], "the image's end predicts the text"


def test_reasoning_stands_ahead_of_its_answer(released):
    model, builder = released
    sample = builder.prepare(record(text("why?"), said("because", thinking=True), said("so")), random.Random(0))
    assert labelled(sample.parts) == [*model.tokenizer.encode(" <think>because</think>so"), model.special_tokens.eos]


# ---- images to generate


def test_targets_cover_the_image_and_are_cropped_in_the_middle(released):
    _, builder = released
    assert builder.image_size == (24, 24)
    wide = Image.new("RGB", (96, 48), "red")
    wide.paste("blue", (24, 0, 72, 48))
    sample = builder.prepare(record(text("a"), RecordImage(data=wide, loss=True)), random.Random(0))
    assert sample.target.shape == (24, 24, 3)
    assert np.array_equal(sample.target[:, 3:-3], np.full((24, 18, 3), (0, 0, 255))), "the sides are cut"


def test_wordings_dropout_and_first_sentences_are_of_the_rows_own_chance(released):
    model, builder = released
    one = record(text("A cat. It sleeps.", "Cats!"), image(loss=True))
    wordings = {tuple(all_ids(builder.prepare(one, random.Random(i)).parts)) for i in range(20)}
    assert len(wordings) == 2
    assert all_ids(builder.prepare(one, random.Random(3)).parts) == all_ids(
        builder.prepare(one, random.Random(3)).parts
    )
    cut = dataclasses.replace(builder, first_sentence=0.5)
    long = record(text("A cat. It sleeps."), image(loss=True))
    lengths = [cut.prepare(long, random.Random(i)).n_tokens for i in range(60)]
    n = len(model.tokenizer.encode(" It sleeps."))
    assert set(lengths) == {max(lengths), max(lengths) - n} and 15 <= lengths.count(max(lengths)) <= 45
    dropped = dataclasses.replace(builder, dropout=1.0).prepare(long, random.Random(0))
    assert set(all_ids(dropped.parts)[1:-1]) == {model.special_tokens.pad}


def test_one_step_of_several_edits(released):
    _, builder = released
    chain = record(image(), text("a"), image(loss=True, seed=1), text("b"), image(loss=True, seed=2))
    samples = [builder.prepare(chain, random.Random(i)) for i in range(10)]
    assert {sample.kind for sample in samples} == {"edit"}
    assert len({sample.target.tobytes() for sample in samples}) == 2
    assert all(sum(part.kind == "und_image" for part in sample.parts) == 1 for sample in samples)


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ((text("a"), said("b"), image(loss=True)), "of the kind interleaved, which Janus does not learn"),
        ((text("a"), said("b", thinking=True), image(loss=True)), "Janus does not think before it generates"),
        ((image(loss=True),), "without a text or an image"),
        ((text(" "), image(loss=True)), "without a text or an image"),
        ((image(loss=True), text("a")), "a text behind the image to generate"),
        ((said("a"), text("b"), said("c")), "begins with an answer"),
        ((text("a"), text("b", role="system"), said("c")), "a system prompt behind another part"),
        ((text("a" * 600), said("c")), "positions: expected at most 512, the decoder's"),
        ((text("a"), RecordImage(data=b"no image", loss=True, name="the target")), "cannot read the target"),
    ],
)
def test_records_that_cannot_be_learned(released, items, reason):
    _, builder = released
    with pytest.raises(ValueError, match=reason):
        builder.prepare(record(*items), random.Random(0))


def test_another_template_cannot_be_learned(released):
    _, builder = released
    processor = builder.processor
    plain = dataclasses.replace(processor, chat_config=dataclasses.replace(processor.chat_config, template="plain"))
    with pytest.raises(
        ValueError, match="the chat template 'plain', which ends no answer by an id: expected 'deepseek'"
    ):
        dataclasses.replace(builder, processor=plain).prepare(record(text("a"), said("b")), random.Random(0))
