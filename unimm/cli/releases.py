"""The command `unimm releases`."""

from rich.console import Console
from rich.table import Column, Table


def releases_command() -> None:
    """List the released checkpoints that are known by name."""
    from unimm.models.registry import releases

    # a name that does not fit goes on in the next line, whole, so that it can be copied
    columns = (
        Column("name", overflow="fold", ratio=2),
        "family",
        "parameters",
        Column("licence", overflow="fold"),
        Column("can", ratio=1),
        "where",
    )
    table = Table(*columns)
    for row in releases():
        limit = "" if row.commercial else ", no commercial use"
        where = "hub" if row.hub else "bundled"
        table.add_row(
            row.name, row.family, format_count(row.parameters), row.licence + limit, ", ".join(row.verbs), where
        )
    Console().print(table)


def format_count(n: int) -> str:
    """A number of parameters, rounded: 12800000 -> 12.8 M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.1f} {letter}"
    return str(n)
