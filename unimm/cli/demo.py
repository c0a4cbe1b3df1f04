"""The main job on a nano model: draw scenes, ask about one, edit it, draw one after thinking; all on one sheet."""

import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unimm.cli.options import ModelOption, SeedOption

# yellow circles, purple squares, cyan triangles, orange stars, red diamonds and green crosses were never trained on
SCENES = (
    "a red circle left of a blue square",
    "three green triangles",
    "an orange star",
    "a purple square above a cyan triangle",
    "a large black cross and a small yellow circle",
    "draw two red diamonds",
    "a small green cross at the bottom right",
    "draw what Anna likes",
)
# about the first scene
QUESTIONS = (
    "describe the picture",
    "how many shapes are there?",
    "what colour is the square?",
    "what shape is the red thing?",
    "is the circle left of the square?",
)
EDIT_PROMPT = "make the circle green"
THINK_PROMPT = "as many red circles as 2 + 5 - 4"

# the sheet, in pixels
COLUMNS, TILE_SIZE, MARGIN, FONT_SIZE, CAPTION_LINES = 4, 192, 16, 15, 3
Panel = tuple[Image.Image, str]


def demo(
    out: Annotated[Path, typer.Option(help="Where the sheet of pictures goes.")] = Path("demo.png"),
    model: ModelOption = "bagel-nano",
    seed: SeedOption = 0,
) -> None:
    """Draw scenes with a nano model, ask about one, edit it, and draw one after thinking, where the model thinks."""
    run_demo(out, Console(), model=model, seed=seed)


@contextmanager
def single_thread() -> Iterator[None]:
    """The nano's matrices are too small to share: threads that wait for a core take 63 s on a busy machine, one takes 3 s."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@single_thread()
def run_demo(out: Path, console: Console, *, model: str = "bagel-nano", seed: int = 0) -> None:
    """Do the main job with the model of that name, telling of it on the console, and save the sheet."""
    from unimm.models.registry import load

    began = time.monotonic()
    with console.status(f"loading {model}"):
        loaded = load(model)
    with console.status(f"drawing {len(SCENES)} scenes"):
        drawn = loaded.generate(SCENES, seed=seed)
    scene = drawn.image
    _print_lines(console, "drawn", SCENES)

    with console.status(f"asking {len(QUESTIONS)} questions"):
        answers = loaded.understand([scene] * len(QUESTIONS), QUESTIONS)
    console.print(_answer_table(answers))

    with console.status("editing"):
        edited = loaded.generate(EDIT_PROMPT, images=scene, seed=seed)
    _print_lines(console, "edited", [EDIT_PROMPT])

    panels = list(zip(drawn.images, SCENES, strict=True))
    panels += [(scene, "input"), (edited.image, EDIT_PROMPT)]
    if loaded.supports_thinking:
        with console.status("thinking, then drawing"):
            thought = loaded.generate(THINK_PROMPT, seed=seed, **loaded.supported_options(think=True))
        _print_lines(console, "thought", [THINK_PROMPT, thought.text])
        panels.append((thought.image, THINK_PROMPT))
    fresh = out.with_name(f"{out.stem}.new.png")
    caption_grid(panels).save(fresh)
    fresh.replace(out)
    console.print(Text(f"saved {out} after {time.monotonic() - began:.0f} s"))


def caption_grid(panels: Sequence[Panel], *, columns: int = COLUMNS) -> Image.Image:
    """Pictures, enlarged, in rows, each with its caption beneath."""
    font = ImageFont.load_default(FONT_SIZE)
    width, height = TILE_SIZE + MARGIN, TILE_SIZE + MARGIN + CAPTION_LINES * (FONT_SIZE + 4)
    rows = -(-len(panels) // columns)
    page = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    pen = ImageDraw.Draw(page)
    for i, (picture, caption) in enumerate(panels):
        x, y = MARGIN + i % columns * width, MARGIN + i // columns * height
        page.paste(picture.convert("RGB").resize((TILE_SIZE, TILE_SIZE), Image.Resampling.LANCZOS), (x, y))
        pen.rectangle((x - 1, y - 1, x + TILE_SIZE, y + TILE_SIZE), outline="lightgrey")
        lines = textwrap.wrap(caption, width=2 * TILE_SIZE // FONT_SIZE, max_lines=CAPTION_LINES, placeholder=" ...")
        pen.multiline_text((x, y + TILE_SIZE + 4), "\n".join(lines), fill="black", font=font)
    return page


def _answer_table(answers: Sequence[str]) -> Table:
    table = Table("question", "answer", title=f"about: {SCENES[0]}", title_justify="left")
    for question, answer in zip(QUESTIONS, answers, strict=True):
        table.add_row(Text(question), Text(answer))
    return table


def _print_lines(console: Console, what: str, lines: Sequence[str]) -> None:
    console.print(Text(what, style="bold"))
    for line in lines:
        console.print(Text(f"  {line}"))
