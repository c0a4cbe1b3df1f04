"""The command `unimm fetch`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from unimm.cli.releases import format_bytes


def fetch_command(
    name: Annotated[str, typer.Argument(help="A hub id owner/name: a release, or a part that models are made of.")],
    *,
    revision: Annotated[str | None, typer.Option(help="A branch, a tag or a commit.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Look for what is there, and reach for nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Download what loading a model reads, and no other file of its repository; a stopped download goes on."""
    from unimm.checkpoint import hub
    from unimm.models.registry import FAMILIES, files_to_fetch, releases

    licences = {key: value for family in FAMILIES.values() for key, value in family.files.non_commercial.items()}
    more_files, subfolders = files_to_fetch(name)
    folder = hub.resolve(
        name,
        revision=revision,
        known_names=tuple(row.name for row in releases()),
        subfolders=subfolders,
        more_files=more_files,
        non_commercial=licences,
        offline=offline,
    )
    size = folder_bytes(folder)
    if as_json:
        typer.echo(json.dumps({"name": name, "folder": str(folder), "bytes": size}))
    else:
        typer.echo(f"{folder}  {format_bytes(size)}")


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
