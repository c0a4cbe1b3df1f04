"""The command `unimm convert`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

    from unimm.checkpoint.safetensors_file import TensorHeader

FLUX_LAYOUTS = ("bfl", "diffusers")


def convert_command(
    source: Annotated[
        str,
        typer.Argument(help="A model, or FLUX's transformer or autoencoder: a name, a folder, a hub id, or a file."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    *,
    layout: Annotated[
        str | None,
        typer.Option(help="original or transformers (Janus, Emu3), bfl or diffusers (FLUX); unless given, as it is."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; unless given, that of most weights.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Of a model: weights of more bytes are split into shards, as 5GB; none for one file.")
    ] = "5GB",
) -> None:
    """Write a checkpoint in another layout, or another dtype: every tensor checked, whole or not at all."""
    from unimm.checkpoint import hub
    from unimm.checkpoint.load import parse_dtype
    from unimm.models.registry import detect_family, load, releases

    wanted = parse_dtype(dtype) if dtype else None
    with Console(stderr=True).status(f"converting {source}"):
        is_file = hub.expand_path(source).is_file()
        known = tuple(row.name for row in releases())
        folder = hub.expand_path(source) if is_file else hub.resolve(source, known_names=known)
        if is_file or detect_family(folder) is None:
            convert_part(folder, out, layout=layout, dtype=wanted)
        else:
            model = load(source, dtype=wanted or common_dtype(folder_headers(folder)))
            model.save_pretrained(
                out, layout=layout, max_shard_size=None if max_shard_size == "none" else max_shard_size
            )
    typer.echo(out)


def convert_part(source: Path, out: Path, *, layout: str | None, dtype: "torch.dtype | None") -> None:
    """Write FLUX's transformer, or its autoencoder, in one of its layouts, that of the other unless it is named.

    source: a folder, or a file of weights. Raises ValueError for what is neither.
    """
    from unimm.checkpoint.load import read_headers, weight_files
    from unimm.denoisers.flux import FluxTransformer, in_bfl_layout
    from unimm.tokenizers.kl import AutoencoderKL
    from unimm.tokenizers.kl_layouts import in_flux_layout

    if layout is not None and layout not in FLUX_LAYOUTS:
        raise ValueError(f"got --layout {layout} for a part of FLUX: expected {' or '.join(FLUX_LAYOUTS)}")
    # a folder of the original files has both: the transformer counts, the other is named by its file
    names = dict.fromkeys((*FluxTransformer.WEIGHT_FILES, *AutoencoderKL.WEIGHT_FILES))
    headers = read_headers([source] if source.is_file() else weight_files(source, tuple(names)))
    wanted = dtype or common_dtype(headers)
    if any(key.startswith("decoder.") for key in headers):
        vae = AutoencoderKL.from_pretrained(source, dtype=wanted)
        vae.save_pretrained(out, layout=layout or ("diffusers" if in_flux_layout(headers) else "bfl"))
    else:
        flux = FluxTransformer.from_pretrained(source, dtype=wanted)
        flux.save_pretrained(out, layout=layout or ("diffusers" if in_bfl_layout(headers) else "bfl"))


def folder_headers(folder: Path) -> dict[str, "TensorHeader"]:
    """The headers of all safetensors of a folder."""
    from unimm.checkpoint.load import read_headers

    return {
        f"{path.name}/{key}": header
        for path in sorted(folder.glob("*.safetensors"))
        for key, header in read_headers([path]).items()
    }


def common_dtype(headers: "dict[str, TensorHeader]") -> "torch.dtype":
    """The dtype of most numbers. Raises ValueError for files without a dtype that weights can be loaded in."""
    import torch

    from unimm.checkpoint.safetensors_file import DTYPE_NAMES

    known = {DTYPE_NAMES[one]: one for one in (torch.float32, torch.bfloat16, torch.float16)}
    counts: Counter[torch.dtype] = Counter()
    for header in headers.values():
        if header.dtype in known:
            n = 1
            for side in header.shape:
                n *= side
            counts[known[header.dtype]] += n
    if not counts:
        raise ValueError("got files without weights in float32, bfloat16 or float16: expected released ones")
    return counts.most_common(1)[0][0]
