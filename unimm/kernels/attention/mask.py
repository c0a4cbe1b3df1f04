"""Who sees whom in packed sequences, as ranges of rows a key, and as the tiles that a kernel visits.

Axes: N query rows, M key rows, R ranges a key (1 or 2), B samples of a padded call, n and m their rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unimm.kernels.attention.tile_schedule import KeySpans, TileRuns, TileSchedule

if TYPE_CHECKING:
    from PIL import Image
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["AttentionMask", "KeyRange", "SDPACall", "TileRuns", "TileSchedule", "cached_tensor_property"]
T = TypeVar("T")

# samples up to this many key rows share padded calls with a mask: many small calls cost more than what they skip;
# longer ones get a call a block, which computes nothing that is masked out
MAX_PADDED_ROWS = 512
BUCKET_ROW_MULTIPLE, BUCKET_SAMPLE_MULTIPLE = (
    32,
    8,
)  # lengths and counts are rounded up to these before they share a call
TABLE_ROW_MULTIPLE = 16  # and the rows of a mask's table to this, before the next power of two
MAX_CALL_ROWS = 512  # a plain call of a long sample takes at most this many rows, which bounds its scores


def cached_tensor_property(make: Callable[[Any], T]) -> "cached_property[T]":
    """A cached_property whose tensors serve training, too, where they are first asked for in inference mode."""

    @wraps(make)
    def made(self: Any) -> T:
        with torch.inference_mode(False):
            return make(self)

    return cached_property(made)


@dataclass(frozen=True)
class KeyRange:
    """Consecutive rows of one sample under one rule: causal or full inside, visible or not to later rows."""

    length: int
    full: bool = False
    visible: bool = True


class SDPACall(NamedTuple):
    """Rows that are attended in one plain call: query rows [B, n], key rows [B, m], who sees whom [B, n, m] (all: None)."""

    q_rows: Tensor
    k_rows: Tensor
    attn_mask: Tensor | None


class AttentionMask:
    """Who sees whom, as one range of rows a key: query row q sees key row k when first[k] <= q < last[k].

    `samples` lists the blocks of each sample in order. Inside a sample, q sees k when k's block is visible or is
    q's own, and k stands before q (or is q), or both stand in one full block. For a key that means: from its own
    row (causal) or its block's first row (full), to the end of its sample (visible) or of its block (not).

        text(3) causal, image(2) full, noised(2) full and invisible, text(1) causal

            key    0 1 2 | 3 4 | 5 6 | 7      as a key: first last
            row 0  x . . | . . | . . | .                0     8
            row 1  x x . | . . | . . | .                1     8
            row 2  x x x | . . | . . | .                2     8
            row 3  x x x | x x | . . | .                3     8
            row 4  x x x | x x | . . | .                3     8
            row 5  x x x | x x | x x | .                5     7
            row 6  x x x | x x | x x | .                5     7
            row 7  x x x | x x | . . | x                7     8

    queries: how many rows at the end of each sample ask; all of them unless given (the rest is a cache).
    key_starts: where each sample's keys begin in the key buffer; end to end unless given.
    spans: what the mask is made of, where it is known already; `from_ranges` makes a mask of spans alone.
    """

    def __init__(
        self,
        samples: Sequence[Sequence[KeyRange]],
        *,
        query_lengths: Sequence[int] | None = None,
        key_starts: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        spans: KeySpans | None = None,
    ):
        self.samples = tuple(tuple(block for block in blocks if block.length) for blocks in samples)
        self.key_lengths = tuple(sum(block.length for block in blocks) for blocks in self.samples)
        self.query_lengths = self.key_lengths if query_lengths is None else tuple(query_lengths)
        self.query_starts = _exclusive_cumsum(self.query_lengths)
        self.key_starts = _exclusive_cumsum(self.key_lengths) if key_starts is None else tuple(key_starts)
        self.device = torch.device(device)
        if any(n > m for n, m in zip(self.query_lengths, self.key_lengths, strict=True)):
            raise ValueError(
                f"a sample asks with more rows than it has: queries {self.query_lengths}, rows {self.key_lengths}"
            )
        self.spans = spans or self._build_spans()
        self.n_queries, self.n_keys = self.spans.n_queries, self.spans.n_keys
        # many short samples: the plain way pads them to one length
        self.use_padding = len(self.samples) > 1 and max(self.key_lengths) <= MAX_PADDED_ROWS
        self._schedules: dict[tuple[int, int], TileSchedule] = {}

    @classmethod
    def from_ranges(
        cls,
        first: Tensor,
        last: Tensor,
        second: tuple[Tensor, Tensor] | None = None,
        *,
        n_queries: int | None = None,
        device: torch.device | str = "cpu",
    ) -> "AttentionMask":
        """Any mask of one range of rows a key, or two: key k is seen by rows [first[k], last[k]), and by those of `second`.

        first and last [M]; `queries` is N, M unless given. Documents, prefix-LM, sliding windows, cross-attention and
        the omni masks of Show-o and Transfusion have one range a key. Two are for keys that some rows between do not
        see; ranges may overlap, and an empty one is last <= first.

            sliding window of 3                prefix of 2, then causal          two answers to one question

            key    0 1 2 3 4   first last     key    0 1 2 3 4   first last     key    0 1 2 3 4   first last second
            row 0  x . . . .     0    3       row 0  x x . . .     0    5       row 0  x . . . .     0    2    3 5
            row 1  x x . . .     1    4       row 1  x x . . .     0    5       row 1  x x . . .     1    2    3 5
            row 2  x x x . .     2    5       row 2  x x x . .     2    5       row 2  . . x . .     2    3    0 0
            row 3  . x x x .     3    5       row 3  x x x x .     3    5       row 3  x x . x .     3    5    0 0
            row 4  . . x x x     4    5       row 4  x x x x x     4    5       row 4  x x . x x     4    5    0 0

        """
        pairs = [(first, last), *([second] if second else [])]
        ranges = np.stack(
            [np.stack([np.asarray(torch.as_tensor(x).cpu(), dtype=np.int64) for x in pair]) for pair in pairs]
        )
        n = ranges.shape[2] if n_queries is None else n_queries
        if ranges.size and (ranges.min() < 0 or ranges.max() > n):
            raise ValueError(
                f"ranges reach from {ranges.min()} to {ranges.max()}: expected rows 0 to {n}; give `queries`"
            )
        return cls((), device=device, spans=KeySpans.from_ranges(ranges, n))

    def to(self, device: torch.device | str) -> "AttentionMask":
        """The same mask on a device; what was computed on the host is kept."""
        if torch.device(device) == self.device:
            return self
        return AttentionMask(
            self.samples, query_lengths=self.query_lengths, key_starts=self.key_starts, device=device, spans=self.spans
        )

    # ---- for kernels

    @cached_tensor_property
    def ranges(self) -> Tensor:
        """The rows that see each key, [R, 2, M] int32, in rows of the packed q; nobody's: (0, 0)."""
        return torch.from_numpy(self.spans.ranges()).to(self.device)

    def schedule(self, rows: int, keys: int) -> TileSchedule:
        """The tiles of rows x keys that are fully and partly visible, on the device; computed once for each size."""
        if (rows, keys) not in self._schedules:
            with torch.inference_mode(False):  # as `kept` does
                self._schedules[rows, keys] = self.spans.schedule(rows, keys).to(self.device)
        return self._schedules[rows, keys]

    @cached_tensor_property
    def decode_ranges(self) -> tuple[Tensor, Tensor] | None:
        """Decoding: where each sample's keys begin and how many there are, [B] int32 each, if every sample asks with one
        row, which sees them all. None for any other mask."""
        if not self.is_decoding:
            return None
        starts, lengths = (
            torch.tensor(x, dtype=torch.int32).to(self.device) for x in (self.key_starts, self.key_lengths)
        )
        return starts, lengths

    @cached_property
    def is_decoding(self) -> bool:
        """Whether every sample asks with one row, which sees all its keys."""
        hides = any(not block.visible for blocks in self.samples for block in blocks[:-1])
        return not hides and bool(self.samples) and set(self.query_lengths) == {1}

    @cached_property
    def uniform_decode(self) -> tuple[int, int, int] | None:
        """Decoding samples of one length: where the first one's keys begin, how far the next begin after it, and how many
        keys each has. None for any other mask."""
        if not self.is_decoding or len(set(self.key_lengths)) > 1:
            return None
        n = self.key_lengths[0]
        steps = {b - a for a, b in pairwise(self.key_starts)} or {n}
        return (self.key_starts[0], steps.pop(), n) if len(steps) == 1 and min(steps) >= n else None

    @cached_property
    def table(self) -> Tensor:
        """The samples as numbers, [n, 4] int64 on the host: (1, queries, key start, 0) of a sample, (2, length, full,
        visible) of each of its blocks, zeros to a round number. `from_table` reads it; a mask made from ranges has none."""
        rows = []
        for blocks, queries, start in zip(self.samples, self.query_lengths, self.key_starts, strict=True):
            rows.append((1, queries, start, 0))
            rows += [(2, block.length, block.full, block.visible) for block in blocks]
        out = torch.zeros(max(TABLE_ROW_MULTIPLE, 1 << (len(rows) - 1).bit_length()), 4, dtype=torch.int64)
        out[: len(rows)] = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
        return out

    @staticmethod
    def from_table(table: Tensor, device: torch.device | str = "cpu") -> "AttentionMask":
        """The mask that `table` describes."""
        samples: list[list[KeyRange]] = []
        queries, starts = [], []
        for what, a, b, c in table.tolist():
            if what == 1:
                samples.append([])
                queries.append(a)
                starts.append(b)
            elif what == 2:
                samples[-1].append(KeyRange(a, full=bool(b), visible=bool(c)))
        return AttentionMask(samples, query_lengths=queries, key_starts=starts, device=device)

    def precompute(self, rows: int | None = None, keys: int | None = None) -> "AttentionMask":
        """Compute now what a compiled graph will ask for, the tiles of rows x keys too if given, and mark the lengths as
        changing, so that a pack of another layout does not compile the graph again."""
        from torch._dynamo import maybe_mark_dynamic

        maybe_mark_dynamic(self.ranges, 2)
        maybe_mark_dynamic(self.table, 0)
        for t in self.decode_ranges or ():
            maybe_mark_dynamic(t, 0)
        if rows and keys:
            for runs in self.schedule(rows, keys)[:2]:
                for t in runs:
                    maybe_mark_dynamic(t, 0)
        return self

    @cached_property
    def default_block_mask(self) -> "BlockMask":
        """`block_mask` of the usual size, computed once."""
        return self.block_mask()

    def block_mask(self, rows: int = 128, keys: int = 128) -> "BlockMask":
        """The same for torch's flex_attention, made from the tiles: nothing of N x M is computed."""
        from torch.nn.attention.flex_attention import BlockMask

        ranges = self.ranges

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (q >= ranges[0, 0, k]) & (q < ranges[0, 1, k])
            return seen | ((q >= ranges[1, 0, k]) & (q < ranges[1, 1, k])) if len(ranges) == 2 else seen

        full, part = (_block_lists(visits, self.device) for visits in self.spans.tile_visibility(rows, keys))
        return BlockMask.from_kv_blocks(
            *part, *full, BLOCK_SIZE=(rows, keys), mask_mod=visible, seq_lengths=(self.n_queries, self.n_keys)
        )

    # ---- for plain calls

    def dense(self, n_keys: int | None = None) -> Tensor:
        """The whole mask, [N, M] bool: the definition, for tests and the reference. M is `n_keys` for a larger buffer."""
        rows = torch.arange(self.n_queries, device=self.device)[:, None]
        seen = ((rows >= self.ranges[:, :1]) & (rows < self.ranges[:, 1:])).any(0)
        return seen if n_keys is None else torch.nn.functional.pad(seen, (0, n_keys - seen.shape[1]))

    def dense_sample(self, sample: int) -> Tensor:
        """The mask of one sample, [N, M] bool."""
        (q, n), (k, m) = (
            (x[sample], y[sample])
            for x, y in ((self.query_starts, self.query_lengths), (self.key_starts, self.key_lengths))
        )
        first, last = self.ranges[0, :, k : k + m]
        rows = torch.arange(q, q + n, device=self.device)[:, None]
        return (rows >= first) & (rows < last)

    @cached_tensor_property
    def sdpa_calls(self) -> tuple[list[SDPACall], Tensor]:
        """The mask as plain calls on gathered rows; and where each packed row lies in their results end to end, [N]."""
        return self.padded_calls if self.use_padding else self._unpadded_calls()

    @cached_tensor_property
    def padded_calls(self) -> tuple[list[SDPACall], Tensor]:
        """A call for each bucket of samples of like length, padded; and where each packed row lies in their results [N]."""
        groups: dict[int, list[int]] = {}
        for i, n_k in enumerate(self.key_lengths):
            if self.query_lengths[i]:  # a sample may be empty, or only looked at
                groups.setdefault(_round_up(n_k, BUCKET_ROW_MULTIPLE), []).append(i)
        ranges = self.spans.ranges()[0]
        out, back, total = [], np.empty(self.n_queries, np.int64), 0
        for samples in groups.values():
            # few different shapes: a matrix product compiles itself for each one (oneDNN), which costs more than padding
            b, n = _round_up(len(samples), BUCKET_SAMPLE_MULTIPLE), max(self.query_lengths[i] for i in samples)
            n, m = (
                n if n == 1 else _round_up(n, BUCKET_ROW_MULTIPLE),
                _round_up(max(self.key_lengths[i] for i in samples), BUCKET_ROW_MULTIPLE),
            )
            numbers = np.array(
                [
                    (self.query_lengths[i], self.key_lengths[i], self.query_starts[i], self.key_starts[i])
                    for i in samples
                ]
            )
            fill = np.array([(0, 0, 0, self.key_starts[samples[0]])] * (b - len(samples)), np.int64).reshape(-1, 4)
            n_q, n_k, q_start, k_start = np.concatenate((numbers, fill)).T[:, :, None]
            row, key = np.arange(n)[None], np.arange(m)[None]
            q_rows = np.where(row < n_q, row + q_start, 0)
            # padding keys are a row that holds numbers: unwritten ones may not
            k_rows = k_start + np.where(key < n_k, key, 0)
            first, last = (np.where(key < n_k, x[k_rows], 0)[:, None] for x in ranges)
            rows = np.where(row < n_q, row + q_start, -1)[:, :, None]
            allowed = (rows >= first) & (rows < last)
            allowed[:, :, 0] |= row >= n_q  # a padding row looks at something, so that its softmax is a number
            back[q_rows[row < n_q]] = total + np.flatnonzero(row < n_q)
            total += b * n
            out.append(SDPACall(*(torch.from_numpy(x).to(self.device) for x in (q_rows, k_rows, allowed))))
        return out, torch.from_numpy(back).to(self.device)

    def _unpadded_calls(self) -> tuple[list[SDPACall], Tensor]:
        """A call for at most `CALL_ROWS` rows of a block, over just the keys that some of them see."""
        ranges, out = self.spans.ranges(), []
        for row, end, key, key_end in self._query_chunks():
            first, last = ranges[:, :, key:key_end].transpose(1, 0, 2)
            keys = np.flatnonzero(((first < end) & (last > row)).any(0))
            if not len(keys):
                keys = np.zeros(1, np.int64)  # a row that nobody sees stands in for no row
            rows = np.arange(row, end)
            allowed = ((rows[:, None] >= first[:, None, keys]) & (rows[:, None] < last[:, None, keys])).any(0)
            q_rows, k_rows, pairs = (torch.from_numpy(x)[None].to(self.device) for x in (rows, key + keys, allowed))
            out.append(SDPACall(q_rows, k_rows, None if allowed.all() else pairs))
        return out, torch.arange(self.n_queries, device=self.device)

    def _query_chunks(self) -> Iterator[tuple[int, int, int, int]]:
        """Query rows [begin, end) that see much the same, and the key rows [begin, end) to look for that in."""
        if not self.samples:
            for row in range(0, self.n_queries, MAX_CALL_ROWS):
                yield row, min(row + MAX_CALL_ROWS, self.n_queries), 0, self.n_keys
        for blocks, n, m, q, k in zip(
            self.samples, self.query_lengths, self.key_lengths, self.query_starts, self.key_starts, strict=True
        ):
            end = q + n - m  # where the sample would begin if all its rows asked
            for block in blocks:
                row, end = max(end, q), end + block.length
                for at in range(row, end, MAX_CALL_ROWS):
                    yield at, min(at + MAX_CALL_ROWS, end), k, k + m

    def _build_spans(self) -> KeySpans:
        """A span for each block, or two for a causal one of which only the end asks."""
        rows = []
        for blocks, n, m, q, k in zip(
            self.samples, self.query_lengths, self.key_lengths, self.query_starts, self.key_starts, strict=True
        ):
            at = 0
            for block in blocks:
                begin, at = at, at + block.length
                last = q + max((m if block.visible else at) - (m - n), 0)
                asks = at if block.full else min(max(begin, m - n), at)  # from this row on, each row asks for itself
                rows.append((k + begin, asks - begin, q + max(begin - (m - n), 0) if block.full else q, last, 0))
                rows.append((k + asks, at - asks, q + asks - (m - n), last, 1))
        ends = [k + m for k, m in zip(self.key_starts, self.key_lengths, strict=True)]
        return KeySpans.from_rows(rows, sum(self.query_lengths), max(ends, default=0))

    # ---- to look at

    def plot(self, *, size: int = 480, tiles: tuple[int, int] | None = None) -> "Image.Image":
        """A picture, rows of queries over columns of keys; `tiles` (rows, keys) marks those that a kernel visits."""
        from unimm.kernels.attention.mask_plot import plot_mask

        return plot_mask(self, size=size, tiles=tiles)


def _block_lists(visits: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tiles as flex_attention lists them: how many a row [1, 1, I], and which, first, of all [1, 1, I, J]."""
    order = np.argsort(~visits, axis=1, kind="stable")
    count, listed = (torch.from_numpy(x.astype(np.int32))[None, None] for x in (visits.sum(1), order))
    return count.to(device), listed.to(device)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _exclusive_cumsum(lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))[: len(lengths)]
