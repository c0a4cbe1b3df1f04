"""The command `unimm demo`: generate, answer, edit and think with a nano model, all images in one captioned grid."""

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

# of the grid, in pixels, but for the number of lines
COLUMNS = 4
TILE_SIZE = 192
MARGIN = 16
FONT_SIZE = 15
CAPTION_LINES = 3
Panel = tuple[Image.Image, str]


def demo_command(
    out: Annotated[Path, typer.Option(help="Where the grid of images goes.")] = Path("demo.png"),
    model: ModelOption = "bagel-nano",
    seed: SeedOption = 0,
) -> None:
    """Generate scenes with a nano model, question one, edit it, and generate one after thinking, if the model can."""
    run_demo(out, Console(), model=model, seed=seed)


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread for torch: a nano's matrices are so small that on a busy machine several take 63 s, one takes 3 s."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@single_thread()
def run_demo(out: Path, console: Console, *, model: str = "bagel-nano", seed: int = 0) -> None:
    """Run the demo with the model of that name, report on the console, and save the grid."""
    from unimm.models.registry import load

    began = time.monotonic()
    with console.status(f"loading {model}"):
        loaded = load(model)
    with console.status(f"generating {len(SCENES)} scenes"):
        generated = loaded.generate(SCENES, seed=seed)
    scene = generated.image
    _print_lines(console, "generated", SCENES)

    with console.status(f"answering {len(QUESTIONS)} questions"):
        answers = loaded.understand([scene] * len(QUESTIONS), QUESTIONS)
    console.print(_answer_table(answers))

    with console.status("editing"):
        edited = loaded.generate(EDIT_PROMPT, images=scene, seed=seed)
    _print_lines(console, "edited", [EDIT_PROMPT])

    panels = list(zip(generated.images, SCENES, strict=True))
    panels += [(scene, "input"), (edited.image, EDIT_PROMPT)]
    if loaded.supports_thinking:
        with console.status("thinking, then generating"):
            reasoned = loaded.generate(THINK_PROMPT, seed=seed, **loaded.supported_options(think=True))
        _print_lines(console, "reasoned", [THINK_PROMPT, reasoned.text])
        panels.append((reasoned.image, THINK_PROMPT))
    _save_grid(panels, out)
    console.print(Text(f"saved {out} after {time.monotonic() - began:.0f} s"))


def caption_grid(panels: Sequence[Panel], *, columns: int = COLUMNS) -> Image.Image:
    """Images, enlarged, row by row, each with its caption beneath."""
    from unimm.training.samples import image_grid

    return image_grid([_tile(image, caption) for image, caption in panels], columns=columns, padding=MARGIN)


def _tile(image: Image.Image, caption: str) -> Image.Image:
    """An image of TILE_SIZE pixels a side with its caption beneath."""
    tile = Image.new("RGB", (TILE_SIZE, TILE_SIZE + CAPTION_LINES * (FONT_SIZE + 4)), "white")
    tile.paste(image.convert("RGB").resize((TILE_SIZE, TILE_SIZE), Image.Resampling.LANCZOS))
    lines = textwrap.wrap(caption, width=2 * TILE_SIZE // FONT_SIZE, max_lines=CAPTION_LINES, placeholder=" ...")
    draw = ImageDraw.Draw(tile)
    draw.rectangle((0, 0, TILE_SIZE - 1, TILE_SIZE - 1), outline="lightgrey")
    draw.multiline_text((0, TILE_SIZE + 4), "\n".join(lines), fill="black", font=ImageFont.load_default(FONT_SIZE))
    return tile


def _save_grid(panels: Sequence[Panel], out: Path) -> None:
    from unimm.checkpoint.atomic import atomic_file

    with atomic_file(out) as partial:
        caption_grid(panels).save(partial, format="PNG")


def _answer_table(answers: Sequence[str]) -> Table:
    table = Table("question", "answer", title=f"about: {SCENES[0]}", title_justify="left")
    for question, answer in zip(QUESTIONS, answers, strict=True):
        table.add_row(Text(question), Text(answer))
    return table


def _print_lines(console: Console, title: str, lines: Sequence[str]) -> None:
    console.print(Text(title, style="bold"))
    for line in lines:
        console.print(Text(f"  {line}"))
