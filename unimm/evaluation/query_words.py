"""Which words the queries of a MetaQuery say: the MLLM's language head over its hidden states at the queries.

The probe of UniSandBox (arXiv 2511.20561, figure 4): where the words of an answer, or of what leads to it, are likely at
some query, what the MLLM reasons without a text is there in what the denoiser is given. A language head is made for
states that are followed by a token, and the queries are trained for the denoiser alone, so that what it says is a sign of
what they hold, and no proof of what they lack.

Axes: R prompts, N queries, W words, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from unimm.models.metaquery.model import MetaQuery
from unimm.processing.requests import ImageInput, parse_requests

# of a plot, in pixels
CELL = (88, 20)
MARGIN = 8
BLUE = np.array((47, 93, 145))
WHITE = np.array((255, 255, 255))


@dataclass(frozen=True, kw_only=True)
class QueryWords:
    """The likeliest tokens at each query of a prompt, N times k, the likeliest first, with their probabilities."""

    prompt: str
    tokens: list[list[str]]
    probabilities: list[list[float]]


def query_words(
    model: MetaQuery, prompt: str | Sequence[str], *, images: ImageInput | Sequence | None = None, k: int = 5
) -> list[QueryWords]:
    """The k likeliest tokens at each query of each prompt. images: as in `generate`.

    Raises ValueError for k below 1, for bad prompts, and for an MLLM whose language head cannot be had.
    """
    if k < 1:
        raise ValueError(f"got k {k}: expected at least 1 token a query")
    prompts, probabilities = _probabilities(model, prompt, images)
    tokenizer = model.processor.text_tokenizer
    likeliest = probabilities.topk(min(k, probabilities.shape[-1]))
    return [
        QueryWords(
            prompt=text,
            tokens=[[tokenizer.decode([token]).strip() for token in some] for some in ids],
            probabilities=values,
        )
        for text, ids, values in zip(prompts, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]


def word_probabilities(
    model: MetaQuery,
    prompt: str | Sequence[str],
    words: Sequence[str],
    *,
    images: ImageInput | Sequence | None = None,
) -> NDArray[np.float32]:
    """The probability of each word at each query of each prompt [R, W, N].

    A word that is several tokens counts by its first one; with and without a space before it are one word.
    """
    if not words or not all(word.strip() for word in words):
        raise ValueError(f"got the words {list(words)}: expected at least one, and none that is empty")
    _, probabilities = _probabilities(model, prompt, images)
    tokenizer = model.processor.text_tokenizer
    columns = []
    for word in words:
        spellings = [tokenizer.encode(text) for text in (word, f" {word}")]
        whole = {ids[0] for ids in spellings if len(ids) == 1}
        first = sorted(whole or {spellings[0][0]})
        columns.append(probabilities[:, :, first].sum(-1))
    return np.asarray(torch.stack(columns, 1).numpy(), np.float32)


def plot_query_words(words: QueryWords, *, columns: int = 10) -> Image.Image:
    """A column a query with its likeliest tokens, the darker the likelier; `columns` queries in a line."""
    if columns < 1:
        raise ValueError(f"got {columns} columns: expected at least 1")
    n = len(words.tokens)
    k = len(words.tokens[0])
    lines = -(-n // columns)
    width, height = CELL
    # above each line a row for the numbers of its queries
    size = (2 * MARGIN + width * min(n, columns), 3 * MARGIN + height * (1 + lines * (k + 1)))
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    draw.text((MARGIN, MARGIN), words.prompt, fill="black", font=font)
    for i, (tokens, probabilities) in enumerate(zip(words.tokens, words.probabilities, strict=True)):
        x = MARGIN + i % columns * width
        y = 2 * MARGIN + height * (1 + i // columns * (k + 1))
        draw.text((x + 3, y + 3), f"query {i + 1}", fill="grey", font=font)
        for row, (token, p) in enumerate(zip(tokens, probabilities, strict=True), start=1):
            shade = tuple((WHITE + (BLUE - WHITE) * p).astype(int).tolist())
            top = y + row * height
            draw.rectangle((x, top, x + width - 2, top + height - 2), fill=shade)
            draw.text((x + 3, top + 2), f"{token[:9]} {p:.2f}", fill="white" if p > 0.5 else "black", font=font)
    return image


def _probabilities(
    model: MetaQuery, prompt: str | Sequence[str], images: ImageInput | Sequence | None
) -> tuple[list[str], torch.Tensor]:
    """The prompts, and of each the probabilities at its queries [R, N, V], on the CPU."""
    prompts, inputs = parse_requests(prompt, images, allow_empty=True)
    samples = [model.processor.prompt_parts(text, some) for text, some in zip(prompts, inputs, strict=True)]
    return list(prompts), model.query_logits(samples).softmax(-1).cpu()
