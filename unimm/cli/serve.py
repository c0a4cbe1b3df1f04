"""The command `unimm serve`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from unimm.cli.options import DeviceOption, DtypeOption, OffloadOption, QuantizeOption, load_options


def serve_command(
    *,
    model: Annotated[
        list[str] | None, typer.Option(help="A bundled name, a folder, or a hub id; several may be given.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; others than loopback need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    quantize: QuantizeOption = None,
    offload: OffloadOption = None,
    threads: Annotated[int | None, typer.Option(help="Of a CPU's operations; torch's own number unless given.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file of API keys, one a line.")] = None,
    api_keys: Annotated[
        str | None,
        typer.Option(envvar="UNIMM_API_KEYS", help="API keys, by commas; other users of a machine see its commands."),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Serve a network without keys.")] = False,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch images from public https addresses.")
    ] = False,
    max_running: Annotated[int, typer.Option(help="Answers that are worked on at once.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="Answers that wait for a place; more get status 429.")] = 64,
    memory_mb: Annotated[
        int | None, typer.Option(help="MiB of caches and activations; half of what is free unless given.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 300.0,
    drain: Annotated[float, typer.Option(help="Seconds to finish what runs when told to stop.")] = 60.0,
) -> None:
    """Serve models over HTTP with OpenAI's API."""
    try:
        from unimm.serving.server import ServerPlan, listen, parse_access, run_server, served_name
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'unimm[serve]'") from error
    from unimm.serving.limits import ServingLimits

    names = tuple(model or ["bagel-nano"])
    check_model_names(names)
    if len({served_name(name) for name in names}) < len(names):
        raise ValueError(f"got models {', '.join(names)}: expected each name once")
    limits = ServingLimits(
        max_running=max_running,
        max_waiting=max_waiting,
        memory_bytes=None if memory_mb is None else memory_mb * 2**20,
        timeout_s=timeout,
        drain_s=drain,
    )
    plan = ServerPlan(
        models=names,
        load=load_options(device, dtype, quantize=quantize, offload=offload),
        threads=threads,
        allow_remote_images=allow_remote_images,
        limits=limits,
        rules=parse_access(host, api_keys=api_keys, key_file=api_key_file, no_auth=no_auth),
    )
    sock = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"serving {', '.join(map(served_name, names))} at http://{shown}:{sock.getsockname()[1]}/v1")
    run_server(plan, sock)


def check_model_names(names: Sequence[str]) -> None:
    """Raise ValueError for what names no model, before another process loads them."""
    from unimm.checkpoint import hub
    from unimm.models.registry import releases

    known = tuple(row.name for row in releases())
    for name in names:
        hub.resolve(name, known_names=known)
