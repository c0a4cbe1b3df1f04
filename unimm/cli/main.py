"""The command `unimm`: demo, generate, understand, train, eval, releases.

What a user can put right is said in one line on stderr, with exit code 2. Results go to stdout, all else to stderr.
"""

from typing import Any

import typer
from typer.core import TyperGroup

from unimm.cli.demo import demo
from unimm.cli.eval import evaluate
from unimm.cli.generate import generate
from unimm.cli.releases import releases
from unimm.cli.train import train
from unimm.cli.understand import understand

USER_ERRORS = (ValueError, NotImplementedError, MemoryError, OSError, FloatingPointError)


class CommandGroup(TyperGroup):
    """Commands whose user errors end in a line, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command asked for."""
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            typer.echo(f"error: {error_line(error)}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=CommandGroup,
    help="Models that understand pictures and draw them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, generate, understand, train):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(releases)


def main() -> None:
    """The entry point."""
    app()


def error_line(error: BaseException) -> str:
    """An error as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
