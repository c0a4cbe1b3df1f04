"""Segments to positions and blocks, items to packs, and what the training plans drop."""

import itertools

import pytest
import torch

from unimm.sequence.packing import label_weights, pack
from unimm.sequence.parts import IGNORE, gap_item, image_item, text_item
from unimm.sequence.segments import Past, Segment, lay_out
from unimm.training.tasks.bagel_plans import Dropout, Part, Shown, answer, drop, edit, text_to_image

TEXT = Segment(length=3, attend="causal", advance=3)
CLEAN = Segment(length=4, attend="full", advance=1)
NOISED = Segment(length=3, attend="full", visible=False, advance=0)


def image(kind="draw", n=2, **options):
    return image_item(kind, torch.full((n, 5), 7.0), torch.arange(n), markers=(90, 91), **options)


def test_the_rows_of_the_docstring():
    layout = lay_out([[TEXT, CLEAN, NOISED]])
    row = next(line for line in lay_out.__doc__.splitlines() if line.strip().startswith("position"))
    assert layout.positions.tolist() == [int(word) for word in row.split() if word.isdigit()][:10]
    assert layout.clocks == (4,)
    assert layout.starts == ((0, 3, 7),)


def test_positions_go_on_after_a_past():
    layout = lay_out([[TEXT], [CLEAN]], [Past(length=5, clock=2, start=0), Past(length=1, clock=9, start=8)])
    assert layout.positions.tolist() == [2, 3, 4, 9, 9, 9, 9]
    assert layout.clocks == (5, 10)
    dense = layout.mask.dense(16)
    assert dense[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]  # all of the past, and itself
    assert dense[3].nonzero().flatten().tolist() == [8, 9, 10, 11, 12]  # full: the past and the whole block


def test_frames_of_a_video_are_one_block_that_later_items_see():
    frames = [
        image(noised=True, frame=(3, False)),
        image(noised=True, frame=(2, True)),
        image(noised=True, frame=(0, True)),
    ]
    packed = pack([[*frames, text_item([1, 2])]])
    assert packed.layout.positions.tolist() == [0] * 4 + [3] * 4 + [5] * 4 + [5, 6]
    dense = packed.layout.mask.dense()
    assert dense[:12, :12].all() and dense[12, :12].all()
    assert packed.noised.all()


def test_pack_places_everything():
    packed = pack([[text_item([1, 2, 3], labels=[2, 3, IGNORE]), image("look")], [image(time=0.25, noised=True)]])
    assert packed.ids.tolist() == [1, 2, 3, 90, 91, 90, 91]
    assert packed.id_rows.tolist() == [0, 1, 2, 3, 6, 7, 10]
    assert packed.look.rows.tolist() == [4, 5] and packed.look.lengths == (2,)
    assert packed.draw.rows.tolist() == [8, 9]
    assert packed.times.tolist() == [0.25, 0.25] and packed.noised.tolist() == [True, True]
    assert packed.streams["gen"].tolist() == [8, 9]
    assert sorted(torch.cat(list(packed.streams.values())).tolist()) == list(range(11))
    assert packed.weights.tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0, 0, 0, 0])


def test_dropped_text_leaves_nothing_and_a_dropped_picture_moves_the_clock():
    text, target = text_item([1, 2]), image(noised=True)
    source = Shown(clean=image(), look=image("look"), noised=target)
    always = iter([0.0, 0.0, 0.0])
    kept = drop(edit(source, [(text, source)]), Dropout(), lambda: next(always))
    layout = pack([kept]).layout
    assert layout.lengths == (4,) and layout.positions.tolist() == [2, 2, 2, 2]
    assert next(always, None) is None  # one draw for each droppable part, none for the target


def test_plans():
    text, noised, look, clean = text_item([1, 2]), image(noised=True), image("look"), image()
    shown = Shown(clean=clean, look=look, noised=noised)
    assert [part.droppable for part in text_to_image(text, noised)] == [True, False]
    steps = edit(shown, [(text, shown), (text, shown)])
    assert [part.item for part in steps] == [clean, look, text, noised, clean, look, text, noised]
    assert [part.droppable for part in steps] == [True, True, True, False, True, True, True, False]
    assert not any(part.droppable for part in answer([look], [text, text]))
    never = drop([Part(item, droppable=True) for item in (text, look, clean)], Dropout(), lambda: 0.999)
    assert never == [text, look, clean]


def test_dropout_rates_are_those_of_the_kind():
    rates = Dropout(text=0.25, draw=0.5, look=0.75)
    draws = itertools.cycle([i / 20 for i in range(20)])
    for item, rate in ((text_item([1]), 0.25), (image(), 0.5), (image("look"), 0.75)):
        kept = [drop([Part(item, droppable=True)], rates, lambda: next(draws)) for _ in range(20)]
        assert sum(item in one for one in kept) == 20 - round(20 * rate)


def test_label_weights():
    assert label_weights(torch.tensor([5, 6, 7, 8, IGNORE])).tolist() == pytest.approx([0.5] * 4 + [0.0])
    assert label_weights(torch.tensor([IGNORE, IGNORE, 9])).tolist() == [0, 0, 1]
    assert label_weights(torch.tensor([5, 6, 7, 8, 9])).tolist() == pytest.approx([0.5] * 4 + [1.0])


def test_gap_moves_only_the_clock():
    layout = pack([[gap_item(1), text_item([1])]]).layout
    assert layout.lengths == (1,) and layout.positions.tolist() == [1]
