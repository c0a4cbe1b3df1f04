"""Loading a checkpoint: seconds and memory, against reading its files and against transformers.

    python benchmarks/loading.py                                   # BAGEL-7B's widths, 1 layer: 3.9 GB of bfloat16
    python benchmarks/loading.py --release janus-pro-7b --layers 6 # also by transformers, from the same bytes
    python benchmarks/loading.py --folder /tmp/synthetic --keep    # keeps the checkpoint for the next time

The checkpoint is synthetic: the layout of a release at its real widths, with as many layers as asked, of random values.
Its files are read once before anything is timed, so that they are in the page cache. Each row is a process of its own,
which imports
everything first; the memory is sampled while it works: `anonymous` is its own, `file` what it has mapped
of files and shares with every other process that maps them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from timing import Machine, save, show
from torch import Tensor

from unimm.checkpoint.save import MAX_SHARD_SIZE, PendingTensor, released_tensors, save_weights
from unimm.models.bagel.config import BagelConfig
from unimm.models.bagel.model import Bagel
from unimm.models.bagel.processor import BagelSpecialTokens
from unimm.models.base import UnifiedModel
from unimm.models.janus.config import JanusConfig
from unimm.models.janus.model import Janus

# of the released config files: width, feed-forward, heads, layers
JANUS_SIZES = {"janus-pro-1b": (2048, 5632, 16, 24), "janus-pro-7b": (4096, 11008, 32, 30), "janus-toy": (64, 96, 4, 2)}
# width, feed-forward, heads, key/value heads, layers, vocabulary; layers of the ViT
BAGEL_SIZES = {"bagel-7b": (3584, 18944, 28, 4, 28, 152064, 26), "bagel-toy": (64, 96, 4, 2, 2, 256, 2)}
BLOCK = 2**22  # random values, which the tensors repeat
MODES = ("read again", "read", "mapped", "float32", "int8", "cuda", "transformers")


def bagel(name: str, layers: int) -> Bagel:
    """A BAGEL on meta."""
    dim, mlp, heads, kv_heads, _, vocab, vit_layers = BAGEL_SIZES[name]
    llm = {"hidden_size": dim, "intermediate_size": mlp, "num_attention_heads": heads, "vocab_size": vocab}
    llm |= {"num_key_value_heads": kv_heads, "num_hidden_layers": layers, "max_position_embeddings": 32768}
    llm |= {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    vit = {"hidden_size": 1152, "num_hidden_layers": vit_layers, "num_attention_heads": 16, "intermediate_size": 4304}
    vit |= {"patch_size": 14, "image_size": 980}
    top = {"new_token_ids": BagelSpecialTokens(bos=1, eos=2, boi=3, eoi=4).to_json()}
    return Bagel(BagelConfig.from_json(llm, vit, top))


def janus(name: str, layers: int) -> Janus:
    """A Janus on meta, to be saved in transformers' layout."""
    dim, mlp, heads, _ = JANUS_SIZES[name]
    projector = {"projector_type": "mlp_gelu", "depth": 2, "n_embed": dim}
    vision = {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_layer": -1}
    llm = {"hidden_size": dim, "intermediate_size": mlp, "num_attention_heads": heads, "num_hidden_layers": layers}
    files = {
        "vision_config": {"params": vision},
        "aligner_config": {"params": projector | {"input_dim": 1024}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "gen_aligner_config": {"params": projector | {"input_dim": 8}},
        "gen_head_config": {"params": {"image_token_embed": dim, "image_token_size": 16384, "n_embed": dim}},
        "language_config": llm | {"vocab_size": 102400, "max_position_embeddings": 16384},
    }
    model = Janus(JanusConfig.from_json(files, {}))
    model.checkpoint_layout = "transformers"
    return model


def write_checkpoint(name: str, layers: int, folder: Path) -> None:
    """Write a synthetic checkpoint, tensor by tensor: bfloat16, but for the autoencoder of BAGEL, as released."""
    with torch.device("meta"):
        model: UnifiedModel = bagel(name, layers) if name in BAGEL_SIZES else janus(name, layers)
    torch.manual_seed(0)
    block = torch.randn(BLOCK) * 0.02
    model.save_config(folder)
    for names, key_map in model.key_maps().items():
        dtype = torch.float32 if names[0] == "ae.safetensors" else torch.bfloat16
        values = block.to(dtype)
        state = {
            key: PendingTensor(one.shape, dtype, partial(repeated, values, one.shape))
            for key, one in released_tensors(model, key_map).items()
        }
        save_weights(state, folder, names, max_shard_size=MAX_SHARD_SIZE)


def repeated(block: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a block's values, over and over."""
    n = torch.Size(shape).numel()
    return block.repeat(-(-n // len(block)))[:n].reshape(shape)


# ---- what a child process does


def load(folder: Path, mode: str) -> Callable[[], object]:
    """What a row times."""
    weights = sorted(folder.glob("*.safetensors"))
    if mode == "transformers":
        from transformers import JanusForConditionalGeneration

        return lambda: JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    if mode in ("mapped", "float32", "int8", "cuda"):
        options = {"int8": {"quantize": "int8"}, "cuda": {"device": "cuda"}}.get(mode, {})
        family = Bagel if (folder / "llm_config.json").exists() else Janus
        with torch.device("meta"):
            family.from_folder(folder)  # imports what a model of this family imports when it is built
        return lambda: family.from_pretrained(folder, dtype="float32" if mode == "float32" else "bfloat16", **options)
    if mode == "read":
        return lambda: [path.read_bytes() for path in weights]
    return lambda: [read_again(path) for path in weights]


def read_again(path: Path) -> None:
    """Read a file through one small buffer."""
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


@contextmanager
def sampled_memory() -> Iterator[dict[str, float]]:
    """The most memory of each kind while the body works, in GB; filled in at its end."""
    peaks = {"anonymous GB": 0.0, "file GB": 0.0}
    done = threading.Event()

    def sample() -> None:
        while True:
            is_last = done.wait(0.005)
            lines = Path("/proc/self/status").read_text().splitlines()
            status = {line.split(":")[0]: line.split()[1] for line in lines if "kB" in line}
            for name, key in (("anonymous GB", "RssAnon"), ("file GB", "RssFile")):
                peaks[name] = max(peaks[name], 1024 * int(status[key]) / 1e9)
            if is_last:
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peaks
    finally:
        done.set()
        sampler.join()


def child(folder: Path, mode: str) -> None:
    """Load once, and print what it took."""
    call = load(folder, mode)
    with sampled_memory() as peaks:
        start, used = time.perf_counter(), time.process_time()
        kept = call()
        seconds, processor = time.perf_counter() - start, time.process_time() - used
    del kept
    print(json.dumps({"seconds": seconds, "processor s": processor, **peaks}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", choices=[*BAGEL_SIZES, *JANUS_SIZES], default="bagel-7b")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is, or is written; a temporary one unless given"
    )
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.folder, args.child)
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="unimm-loading-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob("*.safetensors")):
            write_checkpoint(args.release, args.layers, folder)
        files = sorted(folder.glob("*.safetensors"))
        for path in files:
            read_again(path)
        gb = sum(path.stat().st_size for path in files) / 1e9
        rows = []
        for mode in args.modes:
            if mode == "transformers" and args.release in BAGEL_SIZES:
                continue
            if mode == "cuda" and not torch.cuda.is_available():
                continue
            command = [sys.executable, __file__, "--folder", str(folder), "--child", mode]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
                for _ in range(args.repeats)
            ]
            best = {key: min(run[key] for run in runs) for key in ("seconds", "processor s")}
            peaks = {key: max(run[key] for run in runs) for key in ("anonymous GB", "file GB")}
            rows.append({"how": mode, **best, "median s": statistics.median(run["seconds"] for run in runs), **peaks})
        machine = Machine.here(torch.bfloat16)
        show(rows, title=f"{args.release}, {args.layers} layers, {gb:.2f} GB of files; best of {args.repeats}")
        print(machine)
        if args.json:
            save(args.json, machine, rows)
    finally:
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
