"""`python -m unimm.training RECIPE OUT`: run a recipe, given by its file or by the name of one of ours."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from unimm.training.loop import train
from unimm.training.objective import build
from unimm.training.recipe import read_recipe

RECIPES = Path(__file__).parent / "recipes"


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(prog="python -m unimm.training", description=__doc__)
    parser.add_argument("recipe", help=f"a YAML file, or one of {', '.join(p.stem for p in RECIPES.glob('*.yaml'))}")
    parser.add_argument("out", type=Path, help="folder for the log, samples, checkpoints and the release")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true", help="continue the newest checkpoint in OUT")
    parser.add_argument("--init", type=Path, help="start from the averaged weights of this checkpoint folder")
    parser.add_argument("--workers", type=int, default=1, help="processes that make batches ahead")
    parser.add_argument("--hours", type=float, help="stop after this time, with a checkpoint")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    path = Path(args.recipe)
    recipe = read_recipe(path if path.suffix == ".yaml" else RECIPES / f"{args.recipe}.yaml")
    train(
        build(recipe), recipe, args.out, device=args.device, resume=args.resume, init=args.init,
        workers=args.workers, hours=args.hours,
    )  # fmt: skip


if __name__ == "__main__":
    main()
