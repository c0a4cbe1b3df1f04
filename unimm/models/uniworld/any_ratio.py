"""The sizes that UniWorld draws: the nearest of a few ratios, at about the wanted number of pixels.

facts/metaquery_uniworld.md, section 2.4.
"""
import math

STRIDE = 32  # pixels; of a side's unit
# width to height. Each list begins with those before it
RATIOS = ((1, 1), (16, 9), (9, 16), (4, 3), (3, 4), (3, 2), (2, 3), (5, 4), (4, 5), (7, 5), (5, 7))


def any_ratio(height: int, width: int, *, pixels: int, ratios: int = len(RATIOS), stride: int = STRIDE) -> tuple[int, int]:
    """(height, width) to draw for a picture of the size given: the nearest of the first `ratios` ratios (1, 5, 7, 9 or 11).

    A side is a whole multiple of `stride` times the ratio's number, so the area may be far from `pixels`: 16:9 at
    1024 x 1024 is 864 x 1536. Raises ValueError for sides, pixels or ratios below 1.
    """
    if min(height, width, pixels, stride) < 1 or not 1 <= ratios <= len(RATIOS):
        raise ValueError(
            f"got a picture of {width}x{height}, {pixels} pixels, {ratios} ratios: expected positive sizes, 1 to {len(RATIOS)}"
        )
    across, down = min(RATIOS[:ratios], key=lambda ratio: abs(ratio[0] / ratio[1] - width / height))
    scale = max(1, round(math.sqrt(pixels / (across * down * stride**2))))
    return down * stride * scale, across * stride * scale
