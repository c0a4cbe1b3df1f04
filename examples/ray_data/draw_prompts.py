"""A file of prompts drawn by Ray Data on all machines of a cluster, into Parquet files. See README.md.

python draw_prompts.py prompts.txt OUT --model bagel-nano --workers 2
"""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import ray

import unimm
from unimm.evaluation.items import EvalItem
from unimm.evaluation.prompts import read_prompt_requests


class ImageWriter:
    """A model in one of Ray's workers, which draws batch after batch."""

    def __init__(self, model: str, options: dict[str, Any], **load_options: Any) -> None:
        self.model = unimm.load(model, **load_options)
        self.options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The rows with their images as PNG files."""
        prompts = [str(prompt) for prompt in batch["prompt"]]
        seeds = [int(seed) for seed in batch["seed"]]
        images = self.model.generate(prompts, seed=seeds, **self.options).images
        return {**batch, "png": [png_bytes(image) for image in images]}


def png_bytes(image: Any) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def to_row(item: EvalItem) -> dict[str, Any]:
    """What a worker needs to know of an image. Raises ValueError for what this example leaves to `unimm generate`."""
    if item.images or item.size or item.think:
        raise ValueError(f"got images, size or think for {item.id}: expected a prompt and a seed, or `unimm generate`")
    return {"id": item.id, "prompt": item.prompt, "seed": item.seed}


def main() -> None:
    """Read the prompts, draw them on the cluster, write id, prompt, seed and png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", type=Path, help="a .txt file, a prompt a line, or .jsonl with id, seed, n")
    parser.add_argument("out", help="a folder, or an address such as s3://bucket/folder")
    parser.add_argument("--model", default="bagel-nano")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; each further one has the next")
    parser.add_argument("--n", type=int, default=1, help="images a prompt")
    parser.add_argument("--steps", type=int, help="of the sampler; the model's own number unless given")
    parser.add_argument("--batch", type=int, default=4, help="images at a time in a worker")
    parser.add_argument("--workers", type=int, default=1, help="each loads the model")
    parser.add_argument("--cpus", type=float, default=1, help="a worker's")
    parser.add_argument("--gpus", type=float, default=0, help="a worker's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    rows = [to_row(item) for item in read_prompt_requests(args.prompts, seed=args.seed, n=args.n)]
    drawn = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // args.batch)).map_batches(
        ImageWriter,
        fn_constructor_args=(args.model, {} if args.steps is None else {"steps": args.steps}),
        fn_constructor_kwargs={"device": args.device, "dtype": args.dtype},
        batch_size=args.batch,
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )
    drawn.write_parquet(args.out)


if __name__ == "__main__":
    main()
