"""The attention mask of packed sequences: the ranges of rows that attend to each key, and the tiles of a kernel.

Axes: N query rows, M key rows, R ranges of a key (1 or 2), B samples of a padded call, n and m their rows.
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
# longer ones get a call per key range, which computes nothing that is masked out
MAX_PADDED_ROWS = 512
# lengths and counts of samples are rounded up to multiples of these before they share a call
BUCKET_ROW_MULTIPLE = 32
BUCKET_SAMPLE_MULTIPLE = 8
# the rows of a mask's table are rounded up to at least this, then to the next power of two
TABLE_ROW_MULTIPLE = 16
# a call of a long sample takes at most this many query rows, which bounds the size of its scores
MAX_CALL_ROWS = 512


def cached_tensor_property(make: Callable[[Any], T]) -> "cached_property[T]":
    """A cached_property whose tensors can also be used in training when they were first computed in inference mode."""

    @wraps(make)
    def made(self: Any) -> T:
        with torch.inference_mode(False):
            return make(self)

    return cached_property(made)


@dataclass(frozen=True)
class KeyRange:
    """Consecutive keys of one sample under one rule: causal or full among themselves, visible or not to later rows.

    seen_before: of a full range, whether the rows before it attend to it, too (the images that Show-o understands).
    """

    length: int
    full: bool = False
    visible: bool = True
    seen_before: bool = False

    def __post_init__(self) -> None:
        if self.seen_before and not self.full:
            raise ValueError(f"got {self}: expected a full range to be seen by the rows before it")


class SDPACall(NamedTuple):
    """A call on gathered rows: query rows [B, n], key rows [B, m], attn_mask [B, n, m], None where no key is hidden."""

    q_rows: Tensor
    k_rows: Tensor
    attn_mask: Tensor | None


class AttentionMask:
    """A mask of query rows by keys: row q attends to key k when first[k] <= q < last[k].

    `samples` lists the key ranges of each sample in order. Inside a sample, q attends to k when k's range is visible or
    is q's own, and k stands before q (or is q), or both stand in one full range, or q before a range that is seen
    before. For a key that means: from its own row (causal), its range's first row (full) or its sample's (seen before),
    to the end of its sample (visible) or of its range (not).

        text(3) causal, image(2) full, noised(2) full and invisible, text(1) causal

            key    0 1 2 | 3 4 | 5 6 | 7      of a key: first last
            row 0  x . . | . . | . . | .                0     8
            row 1  x x . | . . | . . | .                1     8
            row 2  x x x | . . | . . | .                2     8
            row 3  x x x | x x | . . | .                3     8
            row 4  x x x | x x | . . | .                3     8
            row 5  x x x | x x | x x | .                5     7
            row 6  x x x | x x | x x | .                5     7
            row 7  x x x | x x | . . | x                7     8

    query_lengths: how many rows at the end of each sample are queries; all of them unless given (the rest is a cache).
    key_starts: where each sample's keys begin in the key buffer; end to end unless given.
    spans: the same mask as spans of keys, where they are known already; `from_ranges` makes a mask of spans alone.
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
        self.samples = tuple(tuple(one for one in key_ranges if one.length) for key_ranges in samples)
        self.key_lengths = tuple(sum(one.length for one in key_ranges) for key_ranges in self.samples)
        self.query_lengths = self.key_lengths if query_lengths is None else tuple(query_lengths)
        self.query_starts = _exclusive_cumsum(self.query_lengths)
        self.key_starts = _exclusive_cumsum(self.key_lengths) if key_starts is None else tuple(key_starts)
        self.device = torch.device(device)
        if any(n > m for n, m in zip(self.query_lengths, self.key_lengths, strict=True)):
            raise ValueError(
                f"got query_lengths {self.query_lengths} of samples of {self.key_lengths} rows: "
                "expected no more queries than rows"
            )
        self.spans = spans or self._build_spans()
        self.n_queries = self.spans.n_queries
        self.n_keys = self.spans.n_keys
        # many short samples are padded to one length where no kernel packs them
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
        """Any mask of one range of rows per key, or two: rows [first[k], last[k]) attend to key k, or `second`'s.

        first and last [M]; `n_queries` is N, M unless given. Documents, prefix-LM, sliding windows, cross-attention and
        the omni masks of Show-o and Transfusion have one range per key. Two are for keys that some rows between do not
        attend to; ranges may overlap, and an empty one is last <= first.

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
                f"ranges reach from {ranges.min()} to {ranges.max()}: expected rows 0 to {n}; give `n_queries`"
            )
        return cls((), device=device, spans=KeySpans.from_ranges(ranges, n))

    def to(self, device: torch.device | str) -> "AttentionMask":
        """The same mask on a device; what was computed on the host is kept."""
        if torch.device(device) == self.device:
            return self
        lengths = dict(query_lengths=self.query_lengths, key_starts=self.key_starts)
        return AttentionMask(self.samples, **lengths, device=device, spans=self.spans)

    # ---- for kernels

    @cached_tensor_property
    def ranges(self) -> Tensor:
        """The rows that attend to each key, [R, 2, M] int32, in rows of the packed q; (0, 0) where there are none."""
        return torch.from_numpy(self.spans.ranges()).to(self.device)

    def schedule(self, rows: int, keys: int) -> TileSchedule:
        """The tiles of rows x keys that are fully and partly visible, on the device; computed once for each size."""
        if (rows, keys) not in self._schedules:
            with torch.inference_mode(False):  # as `cached_tensor_property` does
                self._schedules[rows, keys] = self.spans.schedule(rows, keys).to(self.device)
        return self._schedules[rows, keys]

    @cached_tensor_property
    def decode_ranges(self) -> tuple[Tensor, Tensor] | None:
        """The first key of each sample and its number of keys, [B] int32 each, in decoding; None for other masks."""
        if not self.is_decoding:
            return None
        starts, lengths = (
            torch.tensor(x, dtype=torch.int32).to(self.device) for x in (self.key_starts, self.key_lengths)
        )
        return starts, lengths

    @cached_property
    def sees_ahead(self) -> bool:
        """Whether rows attend to a range behind their own."""
        return any(one.seen_before for key_ranges in self.samples for one in key_ranges)

    @cached_property
    def is_decoding(self) -> bool:
        """Whether every sample has one query row, which attends to all its keys."""
        hides = any(not one.visible for key_ranges in self.samples for one in key_ranges[:-1])
        return not hides and bool(self.samples) and set(self.query_lengths) == {1}

    @cached_property
    def uniform_decode(self) -> tuple[int, int, int] | None:
        """Of evenly spaced decoding samples of one length: where the first keys begin, the step, their length.

        None for any other mask.
        """
        if not self.is_decoding or len(set(self.key_lengths)) > 1:
            return None
        n = self.key_lengths[0]
        steps = {b - a for a, b in pairwise(self.key_starts)} or {n}
        return (self.key_starts[0], steps.pop(), n) if len(steps) == 1 and min(steps) >= n else None

    @cached_property
    def table(self) -> Tensor:
        """The samples as numbers, [n, 4] int64 on the host, which `from_table` reads; a mask made from ranges has none.

        (1, query length, key start, 0) of a sample, (2, length, full + 2 seen before, visible) of each of its ranges, then
        zeros.
        """
        rows = []
        for key_ranges, query_length, start in zip(self.samples, self.query_lengths, self.key_starts, strict=True):
            rows.append((1, query_length, start, 0))
            rows += [(2, one.length, one.full + 2 * one.seen_before, one.visible) for one in key_ranges]
        out = torch.zeros(max(TABLE_ROW_MULTIPLE, 1 << (len(rows) - 1).bit_length()), 4, dtype=torch.int64)
        out[: len(rows)] = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
        return out

    @staticmethod
    def from_table(table: Tensor, device: torch.device | str = "cpu") -> "AttentionMask":
        """The mask that `table` describes."""
        samples: list[list[KeyRange]] = []
        query_lengths = []
        key_starts = []
        for kind, a, b, c in table.tolist():
            if kind == 1:
                samples.append([])
                query_lengths.append(a)
                key_starts.append(b)
            elif kind == 2:
                samples[-1].append(KeyRange(a, full=bool(b & 1), visible=bool(c), seen_before=bool(b & 2)))
        return AttentionMask(samples, query_lengths=query_lengths, key_starts=key_starts, device=device)

    def precompute(self, rows: int | None = None, keys: int | None = None) -> "AttentionMask":
        """Compute now the tensors that a compiled graph needs, with the tiles of rows x keys if given.

        Their lengths are marked as dynamic, so that a batch of another layout does not compile the graph again.
        """
        from torch._dynamo import maybe_mark_dynamic

        maybe_mark_dynamic(self.ranges, 2)
        maybe_mark_dynamic(self.table, 0)
        for tensor in self.decode_ranges or ():
            maybe_mark_dynamic(tensor, 0)
        if rows and keys:
            for runs in self.schedule(rows, keys)[:2]:
                for tensor in runs:
                    maybe_mark_dynamic(tensor, 0)
        return self

    @cached_property
    def default_block_mask(self) -> "BlockMask":
        """`block_mask` of the usual size, computed once."""
        return self.block_mask()

    def block_mask(self, rows: int = 128, keys: int = 128) -> "BlockMask":
        """The same mask for torch's flex_attention, made from the tiles: nothing of N x M is computed."""
        from torch.nn.attention.flex_attention import BlockMask

        ranges = self.ranges

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (q >= ranges[0, 0, k]) & (q < ranges[0, 1, k])
            return seen | ((q >= ranges[1, 0, k]) & (q < ranges[1, 1, k])) if len(ranges) == 2 else seen

        full, partial = (_block_lists(tiles, self.device) for tiles in self.spans.tile_visibility(rows, keys))
        return BlockMask.from_kv_blocks(
            *partial, *full, BLOCK_SIZE=(rows, keys), mask_mod=visible, seq_lengths=(self.n_queries, self.n_keys)
        )

    # ---- for calls of PyTorch's attention

    def dense(self, n_keys: int | None = None) -> Tensor:
        """The whole mask, [N, M] bool: the definition, for tests and the reference. n_keys: M of a larger buffer."""
        rows = torch.arange(self.n_queries, device=self.device)[:, None]
        seen = ((rows >= self.ranges[:, :1]) & (rows < self.ranges[:, 1:])).any(0)
        return seen if n_keys is None else torch.nn.functional.pad(seen, (0, n_keys - seen.shape[1]))

    def dense_sample(self, sample: int) -> Tensor:
        """The mask of one sample, [n, m] bool."""
        row = self.query_starts[sample]
        key = self.key_starts[sample]
        first, last = self.ranges[0, :, key : key + self.key_lengths[sample]]
        rows = torch.arange(row, row + self.query_lengths[sample], device=self.device)[:, None]
        return (rows >= first) & (rows < last)

    @cached_tensor_property
    def sdpa_calls(self) -> tuple[list[SDPACall], Tensor]:
        """The mask as calls on gathered rows; and where each packed row lies in their results laid end to end, [N]."""
        return self.padded_calls if self.use_padding else self.unpadded_calls

    @cached_tensor_property
    def padded_calls(self) -> tuple[list[SDPACall], Tensor]:
        """A padded call for each bucket of samples of similar length; where each packed row lies in the results [N]."""
        buckets: dict[int, list[int]] = {}
        for i, n_k in enumerate(self.key_lengths):
            if self.query_lengths[i]:  # a sample may have no queries
                buckets.setdefault(_round_up(n_k, BUCKET_ROW_MULTIPLE), []).append(i)
        ranges = self.spans.ranges()[0]
        calls = []
        result_rows = np.empty(self.n_queries, np.int64)
        total = 0
        for samples in buckets.values():
            # few different shapes: oneDNN compiles a matrix product for each new one, which costs more than padding
            b = _round_up(len(samples), BUCKET_SAMPLE_MULTIPLE)
            n = max(self.query_lengths[i] for i in samples)
            n = n if n == 1 else _round_up(n, BUCKET_ROW_MULTIPLE)
            m = _round_up(max(self.key_lengths[i] for i in samples), BUCKET_ROW_MULTIPLE)
            sizes = [
                (self.query_lengths[i], self.key_lengths[i], self.query_starts[i], self.key_starts[i]) for i in samples
            ]
            sizes += [(0, 0, 0, self.key_starts[samples[0]])] * (b - len(samples))
            n_q, n_k, q_start, k_start = np.array(sizes).T[:, :, None]
            row = np.arange(n)[None]
            key = np.arange(m)[None]
            q_rows = np.where(row < n_q, row + q_start, 0)
            # padding keys point at a written row: unwritten rows of a buffer may hold nan
            k_rows = k_start + np.where(key < n_k, key, 0)
            first, last = (np.where(key < n_k, x[k_rows], 0)[:, None] for x in ranges)
            rows = np.where(row < n_q, row + q_start, -1)[:, :, None]
            attn_mask = (rows >= first) & (rows < last)
            attn_mask[:, :, 0] |= row >= n_q  # a padding row attends to something, since the softmax of no score is nan
            result_rows[q_rows[row < n_q]] = total + np.flatnonzero(row < n_q)
            total += b * n
            calls.append(SDPACall(*(torch.from_numpy(x).to(self.device) for x in (q_rows, k_rows, attn_mask))))
        return calls, torch.from_numpy(result_rows).to(self.device)

    @cached_tensor_property
    def unpadded_calls(self) -> tuple[list[SDPACall], Tensor]:
        """A call for at most `MAX_CALL_ROWS` rows of a range, over just the keys that some of them attend to."""
        ranges = self.spans.ranges()
        calls = []
        for row, row_end, key, key_end in self._query_chunks():
            first, last = ranges[:, :, key:key_end].transpose(1, 0, 2)
            keys = np.flatnonzero(((first < row_end) & (last > row)).any(0))
            if not len(keys):
                keys = np.zeros(1, np.int64)  # a call needs a key; no row attends to it
            rows = np.arange(row, row_end)
            attn_mask = ((rows[:, None] >= first[:, None, keys]) & (rows[:, None] < last[:, None, keys])).any(0)
            q_rows, k_rows, pairs = (torch.from_numpy(x)[None].to(self.device) for x in (rows, key + keys, attn_mask))
            calls.append(SDPACall(q_rows, k_rows, None if attn_mask.all() else pairs))
        return calls, torch.arange(self.n_queries, device=self.device)

    def _query_chunks(self) -> Iterator[tuple[int, int, int, int]]:
        """Query rows [begin, end) that attend to much the same keys, and the key rows [begin, end) that hold those."""
        if not self.samples:
            for row in range(0, self.n_queries, MAX_CALL_ROWS):
                yield row, min(row + MAX_CALL_ROWS, self.n_queries), 0, self.n_keys
        for key_ranges, n, m, q, k in self._numbered_samples():
            end = q + n - m  # where the sample would begin if all its rows were queries
            for one in key_ranges:
                row = max(end, q)
                end = end + one.length
                for at in range(row, end, MAX_CALL_ROWS):
                    yield at, min(at + MAX_CALL_ROWS, end), k, k + m

    def _build_spans(self) -> KeySpans:
        """A span for each range, or two for a causal one of which only the end are queries."""
        spans = []
        for key_ranges, n, m, q, k in self._numbered_samples():
            cached = m - n
            at = 0
            for one in key_ranges:
                begin = at
                at = at + one.length
                last = q + max((m if one.visible else at) - cached, 0)
                queries = (
                    at if one.full else min(max(begin, cached), at)
                )  # from here on a causal key's first row is its own
                first = q + max(begin - cached, 0) if one.full and not one.seen_before else q
                spans.append((k + begin, queries - begin, first, last, 0))
                spans.append((k + queries, at - queries, q + queries - cached, last, 1))
        ends = [k + m for k, m in zip(self.key_starts, self.key_lengths, strict=True)]
        return KeySpans.from_rows(spans, sum(self.query_lengths), max(ends, default=0))

    def _numbered_samples(self) -> Iterator[tuple[tuple[KeyRange, ...], int, int, int, int]]:
        """(key ranges, query length, key length, first query row, first key row) of each sample."""
        lengths = (self.query_lengths, self.key_lengths, self.query_starts, self.key_starts)
        yield from zip(self.samples, *lengths, strict=True)

    # ---- as an image

    def plot(self, *, size: int = 480, tiles: tuple[int, int] | None = None) -> "Image.Image":
        """An image, query rows over key columns; `tiles` (rows, keys) marks the tiles that a kernel visits."""
        from unimm.kernels.attention.mask_plot import plot_mask

        return plot_mask(self, size=size, tiles=tiles)


def _block_lists(tiles: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tiles as flex_attention lists them: their number in each row of tiles [1, 1, I], their columns [1, 1, I, J]."""
    order = np.argsort(~tiles, axis=1, kind="stable")
    count, columns = (torch.from_numpy(x.astype(np.int32))[None, None] for x in (tiles.sum(1), order))
    return count.to(device), columns.to(device)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _exclusive_cumsum(lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))[: len(lengths)]
