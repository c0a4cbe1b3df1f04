"""The record: what it refuses, its kind, wordings and edits chosen at random, and rows that are broken later."""

import random
from collections import Counter
from io import BytesIO

import pytest
from PIL import Image

from unimm.data.records import (
    BrokenRow,
    Record,
    RecordImage,
    RecordText,
    choose_wordings,
    load_images_of,
    map_records,
    sample_edit,
    sample_edit_step,
)


def png(size=(8, 6), colour="red"):
    buffer = BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def say(text, **options):
    return RecordText(wordings=(text,), **options)


def record(*parts, row=0):
    return Record(parts=parts, source="a.jsonl", row=row)


SEEN, MADE, ASKED, TOLD = RecordImage(data=png()), RecordImage(data=png(), loss=True), say("a"), say("b", loss=True)
THOUGHT = say("c", loss=True, thinking=True)


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ((ASKED, MADE), "generate"),
        ((ASKED, THOUGHT, MADE), "generate"),
        ((SEEN, ASKED, MADE), "edit"),
        ((SEEN, ASKED, MADE, ASKED, MADE), "multi_edit"),
        ((SEEN, ASKED, TOLD), "understand"),
        ((ASKED, TOLD), "text"),
        ((ASKED, TOLD, MADE), "interleaved"),
        ((ASKED, MADE, MADE), "interleaved"),
    ],
)
def test_kind(parts, kind):
    assert record(*parts).kind == kind


def test_views_of_a_record():
    one = record(say("be brief", role="system"), SEEN, ASKED, THOUGHT, MADE, say("after"))
    assert one.instructions == (ASKED,) and one.thinking == (THOUGHT,) and one.images == (SEEN, MADE)
    assert one.where == "row 0 of a.jsonl"


def test_a_record_refuses():
    with pytest.raises(ValueError, match="nothing carries loss"):
        record(SEEN, ASKED)
    with pytest.raises(ValueError, match="without wordings"):
        RecordText(wordings=())
    with pytest.raises(ValueError, match="role 'gpt'"):
        say("a", role="gpt")
    with pytest.raises(ValueError, match="is no text"):
        say("half \ud83d")
    with pytest.raises(ValueError, match="of 2 wordings: choose one"):
        _ = RecordText(wordings=("a", "b")).text


def test_images_load_from_bytes_files_and_pil(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    for data in (png(), tmp_path / "a.png", Image.new("RGB", (8, 6), "red")):
        image = RecordImage(data=data)
        assert image.size == (8, 6)
        assert image.load().getpixel((0, 0)) == (255, 0, 0)


def test_a_size_is_that_of_the_upright_image():
    buffer = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(buffer, format="JPEG", exif=exif)
    image = RecordImage(data=buffer.getvalue())
    assert image.size == image.load().size == (6, 8)


def test_broken_images_are_broken_rows(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    rows = [record(ASKED, RecordImage(data=data, loss=True, name="image"), row=i) for i, data in enumerate(
        (png(), b"rubbish", png((300, 300))[:-40], tmp_path / "none.png", eps))]  # fmt: skip
    early = BrokenRow(source="a.jsonl", row=9, reason="no JSON")
    found = list(map_records([*rows, early], load_images_of))
    assert isinstance(found[0], Record) and found[0].images[0].data.size == (8, 6)
    assert [one.row for one in found[1:]] == [1, 2, 3, 4, 9]
    reasons = [one.reason for one in found[1:]]
    assert "cannot read image: got 7 bytes of another kind" in reasons[0]
    assert "cut short" in reasons[1] and "none.png" in reasons[2] and "of another kind" in reasons[3]
    assert str(found[-1]) == "row 9 of a.jsonl: no JSON"
    for i in (1, 3, 4):
        with pytest.raises(ValueError, match="cannot read image"):
            _ = rows[i].images[0].size


def test_wordings_are_chosen_evenly_and_by_the_generator_alone():
    one = record(RecordText(wordings=("a", "b", "c")), MADE)
    chosen = Counter(choose_wordings(one, random.Random(seed)).texts[0].text for seed in range(600))
    assert chosen.keys() == {"a", "b", "c"} and min(chosen.values()) > 140  # 200 expected, 5 sigma are 58
    assert choose_wordings(one, random.Random(1)) == choose_wordings(one, random.Random(1))


def chain(n):
    parts = [RecordImage(data=png(), name="0")]
    for i in range(1, n):
        parts += [say(f"do {i}."), RecordImage(data=png(), loss=True, name=str(i))]
    return record(*parts)


def test_edits_are_sampled_as_bagel_does():
    seen = Counter()
    for seed in range(900):
        one = sample_edit(chain(4), random.Random(seed))
        names = tuple(int(image.name) for image in one.images)
        texts = tuple(text.text for text in one.texts)
        seen[names, texts] += 1
        assert [image.loss for image in one.images] == [False] + [True] * (len(names) - 1)
    joined = {((i, i + 2), (f"do {i + 1}. do {i + 2}.",)) for i in (0, 1)}
    steps = {((i, i + 1, i + 2), (f"do {i + 1}.", f"do {i + 2}.")) for i in (0, 1)}
    single = {((i, i + 1), (f"do {i + 1}.",)) for i in (0, 1, 2)}
    assert seen.keys() == joined | steps | single
    # 900 / 3 starts, half of them two steps, half of those joined: 75; the last start has one step alone: 300
    assert all(abs(seen[key] - 75) < 5 * 75**0.5 for key in joined | steps)
    assert abs(seen[(2, 3), ("do 3.",)] - 300) < 5 * 300**0.5


def test_other_records_are_no_chains_of_edits():
    for one in (record(ASKED, MADE), record(SEEN, ASKED, TOLD), record(SEEN, SEEN, ASKED, MADE)):
        assert sample_edit(one, random.Random(0)) is one
    pair = chain(2)
    assert sample_edit(pair, random.Random(0)) == pair


def test_one_step_of_a_chain():
    images = [RecordImage(data=Image.new("RGB", (8, 6), (i, 0, 0)), loss=i > 0) for i in range(4)]
    chain = record(images[0], say("a"), images[1], say("b"), images[2], say("c"), images[3])
    steps = [sample_edit_step(chain, random.Random(seed)) for seed in range(30)]
    assert {step.parts[1].text for step in steps} == {"a", "b", "c"}
    for step in steps:
        first, instruction, last = step.parts
        i = "abc".index(instruction.text)
        assert (first.data, last.data) == (images[i].data, images[i + 1].data)
        assert step.kind == "edit" and last.loss and not first.loss
    other = record(ASKED, MADE)
    assert sample_edit_step(other, random.Random(0)) is other
