"""A walk over a dataset: how many rows of each kind, sizes of images, lengths of texts, and which rows are broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from unimm.data.records import BrokenRow, Record, load_images_of, map_records
from unimm.data.sources.base import DataSource
from unimm.tokenizers.text import TextTokenizer

# broken rows that a report lists, and sizes of images
LISTED = 20
COMMON_SIZES = 5


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Numbers in short."""

    n: int
    least: int
    median: int
    most: int
    total: int


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """What a dataset holds. Lengths of texts are of the longest wording; tokens are None without a tokenizer."""

    path: str
    format: str
    n_rows: int
    n_read: int
    kinds: dict[str, int]
    images: int
    generated_images: int
    # of images, in pixels; the commonest (width, height), with how many there are
    widths: Spread | None
    heights: Spread | None
    common_sizes: list[tuple[int, int, int]]
    # of texts, and of a row's texts together
    characters: Spread | None
    tokens: Spread | None
    row_tokens: Spread | None
    n_broken: int
    # the first of them
    broken: list[BrokenRow]

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)


@dataclass
class _Findings:
    """What a walk has seen."""

    kinds: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    generated: int = 0
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)
    n_broken: int = 0
    broken: list[BrokenRow] = field(default_factory=list)

    def add(self, record: Record, counts: Sequence[int] | None) -> None:
        """Count a record. counts: tokens of each of its texts."""
        self.kinds[record.kind] += 1
        self.sizes.update(image.size for image in record.images)
        self.generated += sum(image.loss for image in record.images)
        self.characters += [max(map(len, text.wordings)) for text in record.texts]
        if counts is not None:
            self.tokens += counts
            self.row_tokens.append(sum(counts))

    def add_broken(self, row: BrokenRow) -> None:
        """Count a broken row."""
        self.n_broken += 1
        self.broken += [row] if len(self.broken) < LISTED else []


def check_dataset(
    source: DataSource,
    *,
    tokenizer: TextTokenizer | None = None,
    max_tokens: int | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DatasetReport:
    """Read a dataset, decoding its images, and say what it holds.

    max_tokens: a row whose texts have more is a broken one. limit: rows to read, from the first. progress: is
    called with how many rows were read. Raises ValueError for max_tokens without a tokenizer.
    """
    if max_tokens is not None and tokenizer is None:
        raise ValueError(f"got max_tokens {max_tokens} and no tokenizer: expected one to count tokens by")
    n_read = source.n_rows if limit is None else min(limit, source.n_rows)
    found = _Findings()
    examine = partial(_examine, tokenizer=tokenizer, max_tokens=max_tokens)
    for i, made in enumerate(map_records(source.read(range(n_read)), examine)):
        if isinstance(made, BrokenRow):
            found.add_broken(made)
        else:
            found.add(*made)
        if progress is not None:
            progress(i + 1)
    return _report(source, n_read, found)


def _examine(
    record: Record, *, tokenizer: TextTokenizer | None, max_tokens: int | None
) -> tuple[Record, Sequence[int] | None]:
    """The record with its images decoded, and the tokens of its texts. Raises ValueError for a broken one."""
    counts = token_counts(record, tokenizer) if tokenizer else None
    if counts is not None and max_tokens is not None and sum(counts) > max_tokens:
        raise ValueError(f"got {sum(counts)} tokens of text, expected at most {max_tokens}: cut it, or raise the limit")
    return load_images_of(record), counts


def token_counts(record: Record, tokenizer: TextTokenizer) -> list[int]:
    """How many tokens the longest wording of each text of a record has."""
    return [max(len(tokenizer.encode(wording)) for wording in text.wordings) for text in record.texts]


def _report(source: DataSource, n_read: int, found: _Findings) -> DatasetReport:
    sizes = list(found.sizes.elements())
    return DatasetReport(
        path=str(source.path),
        format=source.FORMAT,
        n_rows=source.n_rows,
        n_read=n_read,
        kinds=dict(found.kinds.most_common()),
        images=len(sizes),
        generated_images=found.generated,
        widths=_spread([width for width, _ in sizes]),
        heights=_spread([height for _, height in sizes]),
        common_sizes=[(width, height, n) for (width, height), n in found.sizes.most_common(COMMON_SIZES)],
        characters=_spread(found.characters),
        tokens=_spread(found.tokens),
        row_tokens=_spread(found.row_tokens),
        n_broken=found.n_broken,
        broken=found.broken,
    )


def _spread(values: Sequence[int]) -> Spread | None:
    ordered = sorted(values)
    if not ordered:
        return None
    middle = ordered[len(ordered) // 2]
    return Spread(n=len(ordered), least=ordered[0], median=middle, most=ordered[-1], total=sum(ordered))
