"""Segments to positions and masks, parts to packed batches, and what the training plans drop."""

import itertools

import pytest
import torch

from unimm.sequence.packing import label_weights, pack_sequences
from unimm.sequence.parts import IGNORE_INDEX, image_part, position_gap, text_part
from unimm.sequence.segments import CachedPrefix, Segment, build_layout
from unimm.training.tasks.bagel_plans import (
    ConditionDropout,
    ImageForms,
    PlannedPart,
    drop_conditions,
    plan_answer,
    plan_edit,
    plan_text_to_image,
)

TEXT = Segment(length=3, attention="causal", advance=3)
CLEAN = Segment(length=4, attention="full", advance=1)
NOISED = Segment(length=3, attention="full", visible=False, advance=0)


def image(kind="gen_image", n=2, **options):
    return image_part(kind, torch.full((n, 5), 7.0), torch.arange(n), boundary_ids=(90, 91), **options)


def test_the_rows_of_the_docstring():
    layout = build_layout([[TEXT, CLEAN, NOISED]])
    row = next(line for line in build_layout.__doc__.splitlines() if line.strip().startswith("position"))
    assert layout.position_ids.tolist() == [int(word) for word in row.split() if word.isdigit()][:10]
    assert layout.next_positions == (4,)
    assert layout.segment_starts == ((0, 3, 7),)


def test_positions_continue_after_a_cached_prefix():
    layout = build_layout(
        [[TEXT], [CLEAN]],
        [
            CachedPrefix(length=5, next_position=2, buffer_start=0),
            CachedPrefix(length=1, next_position=9, buffer_start=8),
        ],
    )
    assert layout.position_ids.tolist() == [2, 3, 4, 9, 9, 9, 9]
    assert layout.next_positions == (5, 10)
    dense = layout.mask.dense(16)
    assert dense[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]  # all of the prefix, and itself
    assert dense[3].nonzero().flatten().tolist() == [8, 9, 10, 11, 12]  # full: the prefix and the whole segment


def test_frames_of_a_video_are_one_block_that_later_parts_attend_to():
    frames = [
        image(noised=True, video_frame=(3, False)),
        image(noised=True, video_frame=(2, True)),
        image(noised=True, video_frame=(0, True)),
    ]
    packed = pack_sequences([[*frames, text_part([1, 2])]])
    assert packed.layout.position_ids.tolist() == [0] * 4 + [3] * 4 + [5] * 4 + [5, 6]
    dense = packed.layout.mask.dense()
    assert dense[:12, :12].all() and dense[12, :12].all()
    assert packed.noised.all()


def test_packed_rows_of_ids_and_images():
    packed = pack_sequences(
        [[text_part([1, 2, 3], labels=[2, 3, IGNORE_INDEX]), image("und_image")], [image(timestep=0.25, noised=True)]]
    )
    assert packed.ids.tolist() == [1, 2, 3, 90, 91, 90, 91]
    assert packed.id_rows.tolist() == [0, 1, 2, 3, 6, 7, 10]
    assert packed.und_images.rows.tolist() == [4, 5] and packed.und_images.lengths == (2,)
    assert packed.gen_images.rows.tolist() == [8, 9]
    assert packed.timesteps.tolist() == [0.25, 0.25] and packed.noised.tolist() == [True, True]
    assert packed.rows_by_expert["gen"].tolist() == [8, 9]
    assert sorted(torch.cat(list(packed.rows_by_expert.values())).tolist()) == list(range(11))
    assert packed.label_weights.tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0, 0, 0, 0])


def test_a_dropped_text_leaves_nothing_and_a_dropped_image_a_position():
    text, target = text_part([1, 2]), image(noised=True)
    source = ImageForms(vae=image(), vit=image("und_image"), noised=target)
    always = iter([0.0, 0.0, 0.0])
    kept = drop_conditions(plan_edit(source, [(text, source)]), ConditionDropout(), lambda: next(always))
    layout = pack_sequences([kept]).layout
    assert layout.lengths == (4,) and layout.position_ids.tolist() == [2, 2, 2, 2]
    assert next(always, None) is None  # one draw for each droppable part, none for the target


def test_plans():
    text, noised, vit, clean = text_part([1, 2]), image(noised=True), image("und_image"), image()
    forms = ImageForms(vae=clean, vit=vit, noised=noised)
    assert [part.droppable for part in plan_text_to_image(text, noised)] == [True, False]
    steps = plan_edit(forms, [(text, forms), (text, forms)])
    assert [part.part for part in steps] == [clean, vit, text, noised, clean, vit, text, noised]
    assert [part.droppable for part in steps] == [True, True, True, False, True, True, True, False]
    assert not any(part.droppable for part in plan_answer([vit], [text, text]))
    never = drop_conditions(
        [PlannedPart(item, droppable=True) for item in (text, vit, clean)], ConditionDropout(), lambda: 0.999
    )
    assert never == [text, vit, clean]


def test_dropout_rates_are_those_of_the_kind():
    rates = ConditionDropout(text=0.25, vae=0.5, vit=0.75)
    draws = itertools.cycle([i / 20 for i in range(20)])
    for item, rate in ((text_part([1]), 0.25), (image(), 0.5), (image("und_image"), 0.75)):
        kept = [drop_conditions([PlannedPart(item, droppable=True)], rates, lambda: next(draws)) for _ in range(20)]
        assert sum(item in one for one in kept) == 20 - round(20 * rate)


def test_label_weights():
    assert label_weights(torch.tensor([5, 6, 7, 8, IGNORE_INDEX])).tolist() == pytest.approx([0.5] * 4 + [0.0])
    assert label_weights(torch.tensor([IGNORE_INDEX, IGNORE_INDEX, 9])).tolist() == [0, 0, 1]
    assert label_weights(torch.tensor([5, 6, 7, 8, 9])).tolist() == pytest.approx([0.5] * 4 + [1.0])


def test_a_position_gap_has_no_rows():
    layout = pack_sequences([[position_gap(1), text_part([1])]]).layout
    assert layout.lengths == (1,) and layout.position_ids.tolist() == [1]
