"""The command `unimm releases`."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

# bytes of a number
WIDTHS = {"float32": 4, "bfloat16": 2}


def releases_command(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False
) -> None:
    """List the released checkpoints that are known by name, and those that models take parts from."""
    rows = release_rows()
    if as_json:
        typer.echo(json.dumps(rows))
        return
    console = Console()
    for row in rows:
        limit = "" if row["commercial"] else ", no commercial use"
        memory = [f"{name} {format_bytes(width * row['parameters'])}" for name, width in WIDTHS.items()]
        place = "bundled" if row["bundled"] else "disk"
        disk = f"{place} {format_bytes(row['file_bytes'])}" if row["file_bytes"] else "disk unknown"
        numbers = [row["family"], f"{format_count(row['parameters'])} parameters", disk, *memory]
        # a name stands alone in its line, whole, so that it can be copied
        console.print(Text(row["name"], style="bold"), soft_wrap=True)
        for line in (", ".join(numbers), f"{row['licence']}{limit}; {row['can']}"):
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    console.print(Text("disk, bundled: the weights' files; float32, bfloat16: the weights in memory", style="dim"))


def release_rows() -> list[dict[str, Any]]:
    """What is known of every release, and of every part that models are made of."""
    from unimm.checkpoint.hub import BUNDLED_FOLDER
    from unimm.models.registry import part_releases, releases

    rows = []
    for row in releases():
        bundled = sum(path.stat().st_size for path in (BUNDLED_FOLDER / row.name).rglob("*.safetensors"))
        rows.append(
            {
                "name": row.name,
                "family": row.family,
                "licence": row.licence,
                "commercial": row.commercial,
                "parameters": row.parameters,
                "file_bytes": bundled if row.hub is None else row.file_bytes,
                "can": ", ".join(row.verbs),
                "bundled": row.hub is None,
            }
        )
    parts = [
        {
            "name": part.hub,
            "family": "part",
            "licence": part.licence,
            "commercial": part.commercial,
            "parameters": part.parameters,
            "file_bytes": part.file_bytes,
            "can": part.what,
            "bundled": False,
        }
        for part in part_releases()
    ]
    return rows + parts


def format_count(n: int) -> str:
    """A number of parameters, rounded: 12800000 -> 12.8 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.1f} {letter}"
    return str(n)


def format_bytes(n: int) -> str:
    """Bytes, rounded: 29214520256 -> 29.2 GB."""
    return f"{format_count(n)}B"
