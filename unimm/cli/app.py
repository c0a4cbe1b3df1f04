"""The command `unimm app`."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from unimm.cli.options import DeviceOption, DtypeOption, OffloadOption, QuantizeOption, load_model, load_options


def app_command(
    *,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A bundled name, a folder, or a hub id; several may be given. All bundled ones unless given."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; loopback unless given.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 7860,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Listen at an address that others reach, for anybody.")
    ] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quantize: QuantizeOption = None,
    offload: OffloadOption = None,
) -> None:
    """Open a page in the browser's reach: draw, edit, ask, think and chat."""
    # read where Gradio is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with TemporaryDirectory(prefix="unimm-app-") as folder:
        # uploads and images go with the server
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            from unimm.app.page import build_page
            from unimm.app.server import page_application, page_rules, serve_page
        except ModuleNotFoundError as error:
            raise ValueError(f"{error.name} is not installed: pip install 'unimm[app]'") from error
        from unimm.app.capabilities import can_be_served
        from unimm.checkpoint.hub import bundled_names
        from unimm.serving.engine import Engine
        from unimm.serving.server import listen

        rules = page_rules(host, no_auth=no_auth)
        options = load_options(device, dtype, quantize=quantize, offload=offload)
        models = {name: load_model(name, options) for name in model or bundled_names()}
        unserved = [name for name, one in models.items() if not can_be_served(one)]
        if model and unserved:
            raise ValueError(f"got --model {', '.join(unserved)}, which cannot be served yet: take another family")
        engine = Engine({name: one for name, one in models.items() if name not in unserved})
        page = build_page(engine, folder=Path(folder) / "album", load=options)
        application = page_application(page, rules=rules, limits=engine.limits)
        with listen(host, port) as sock, engine:
            shown = f"[{host}]" if ":" in host else host
            typer.echo(f"the page is at http://{shown}:{sock.getsockname()[1]}")
            serve_page(application, sock, limits=engine.limits)
