"""The command `unimm`: app, demo, generate, understand, serve, train, plan, eval, stars, data, releases, fetch, convert.

An error that the user can correct is one line on stderr, with exit code 2. Results go to stdout, all else to stderr.
"""

import os
from typing import Any

import typer
from typer.core import TyperGroup

from unimm.cli.app import app_command
from unimm.cli.convert import convert_command
from unimm.cli.data import data_app
from unimm.cli.demo import demo_command
from unimm.cli.eval import eval_command
from unimm.cli.fetch import fetch_command
from unimm.cli.generate import generate_command
from unimm.cli.plan import plan_command
from unimm.cli.releases import releases_command
from unimm.cli.serve import serve_command
from unimm.cli.stars import stars_command
from unimm.cli.train import train_command
from unimm.cli.understand import understand_command

USER_ERRORS = (ValueError, NotImplementedError, MemoryError, OSError, FloatingPointError)


class CommandGroup(TyperGroup):
    """Commands whose user errors end in a line, not in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that is named."""
        try:
            return super().invoke(ctx)
        except USER_ERRORS as error:
            typer.echo(f"error: {error_line(error)}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=CommandGroup,
    help="Models that understand images and generate them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("app")(app_command)
app.command("demo")(demo_command)
app.command("generate")(generate_command)
app.command("understand")(understand_command)
app.command("serve")(serve_command)
app.command("train")(train_command)
app.command("plan")(plan_command)
app.command("eval")(eval_command)
app.command("stars")(stars_command)
app.add_typer(data_app, name="data")
app.command("releases")(releases_command)
app.command("fetch")(fetch_command)
app.command("convert")(convert_command)


def main() -> None:
    """Run the command line."""
    # torch's threads wait for each other by spinning, which on a busy machine makes two thirty times slower than one;
    # read where torch is imported, which is in the commands
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def error_line(error: BaseException) -> str:
    """An error's message as one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()
