"""UniWorld's edit weights: each stage against what it says, the four functions, and what is refused."""

import json

import numpy as np
import pytest
import torch
from helpers.paths import GOLDEN

from unimm.training.tasks.edit_weights import AREA_FUNCTIONS, EditWeights, SmallEditError, ellipse

TABLES = GOLDEN / "blocks" / "tables.json"


def pair(*boxes: tuple[int, int, int, int], size=(64, 96), color=(90, 90, 90)) -> tuple[np.ndarray, np.ndarray]:
    """A grey image, and the same with boxes (top, left, bottom, right) changed."""
    reference = np.full((*size, 3), 60, np.uint8)
    target = reference.copy()
    for top, left, bottom, right in boxes:
        target[top:bottom, left:right] += np.array(color, np.uint8)
    return reference, target


def test_functions():
    stored = json.loads(TABLES.read_text())["edit_weight_functions"]
    for name in ("log", "exp"):
        assert [AREA_FUNCTIONS[name](x) for x in stored["x"]] == pytest.approx(stored[name])
    # the released code has two of the four; the others are in the paper's equation
    assert [AREA_FUNCTIONS["linear"](x) for x in (1, 4, 16)] == [1, 4, 16]
    assert [AREA_FUNCTIONS["quadratic"](x) for x in (1, 4, 16)] == [1, 2, 10]


@pytest.mark.parametrize("function", AREA_FUNCTIONS)
def test_a_box(function):
    reference, target = pair((48, 64, 64, 96), size=(128, 160))
    weights = EditWeights(function=function)([reference], target)
    assert weights.shape == (1, 16, 20) and weights.dtype == torch.float32
    changed = torch.zeros(16, 20, dtype=torch.bool)
    changed[6:8, 8:12] = True
    x = 320 / 8
    assert torch.allclose(weights[0], torch.where(changed, AREA_FUNCTIONS[function](x), 1.0), atol=1e-5)


def test_brightness_at_the_threshold():
    rule = EditWeights()
    for change, white in (((18, 18, 18), True), ((17, 17, 17), False), ((0, 0, 160), True), ((0, 0, 150), False)):
        assert rule.difference_mask(*pair((0, 0, 4, 4), color=change))[:4, :4].all() == white


def test_closing():
    assert ellipse(5).astype(int).tolist() == [[0, 0, 1, 0, 0], [1] * 5, [1] * 5, [1] * 5, [0, 0, 1, 0, 0]]
    assert ellipse(1).tolist() == [[True]] and ellipse(3).astype(int).tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    white = np.zeros((16, 18), bool)
    white[5:11, 4:8] = white[5:11, 10:14] = True
    closed = EditWeights().close_gaps(white)
    assert (
        closed[7:9, 8:10].all()
        and not closed[:, :4].any()
        and not closed[:, 14:].any()
        and (closed & white == white).all()
    )
    # the border of the image is no edge of a region
    white = np.zeros((6, 6), bool)
    white[:, 0] = True
    assert (EditWeights().close_gaps(white) == white).all()


def test_small_regions_go_and_corners_join():
    white = np.zeros((20, 20), bool)
    white[:5, :5] = white[5:10, 5:10] = True  # they touch at a corner
    white[15:17, 15:17] = True
    kept = EditWeights().drop_small_components(white)
    assert kept[:10, :10].sum() == 50 and kept.sum() == 50
    # many equal ones: each under its share, nothing is left, and the weights are even
    four = pair(*((y, x, y + 8, x + 8) for y in (8, 40) for x in (8, 72)))
    assert (EditWeights()([four[0]], four[1]) == 1).all()


def test_pooling_drops_what_fills_no_cell():
    white = np.zeros((19, 17), bool)
    white[7, 8] = white[18, 16] = True
    assert EditWeights().pool(white).tolist() == [[False, True], [False, False]]


def test_several_references_share_an_edit():
    reference, target = pair((8, 8, 40, 40))
    other, _ = pair(size=target.shape[:2])
    other[8:40, 8:24] = target[8:40, 8:24]  # has that half already
    cells = EditWeights().latent_mask([reference, other], target)
    assert cells.any() and not cells[:, :3].any() and (cells == EditWeights().latent_mask([other], target)).all()
    with pytest.raises(ValueError, match="got 2 references whose edits share no pixel"):
        EditWeights()([reference, target], target)


def test_nothing_to_weigh():
    reference, target = pair()
    assert (EditWeights()([reference], target) == 1).all(), "no difference"
    assert (EditWeights()([], target) == 1).all(), "no reference"


def test_refusals():
    reference, target = pair((0, 0, 2, 2))
    with pytest.raises(SmallEditError, match=r"0\.0651% of an image, expected 0\.10%.*take another"):
        EditWeights()([reference], target)
    with pytest.raises(ValueError, match="expected one size"):
        EditWeights()([reference[1:]], target)
    with pytest.raises(ValueError, match="uint8"):
        EditWeights()([reference.astype(np.float32)], target)
    with pytest.raises(ValueError, match="unknown function 'root'.*linear, log, exp, quadratic"):
        EditWeights(function="root")
    with pytest.raises(ValueError, match="got closing 4"):
        EditWeights(closing=4)
