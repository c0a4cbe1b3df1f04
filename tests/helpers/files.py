"""Files of checkpoints, changed in place."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def change(path: Path, **changes: object) -> None:
    """Change fields of a json file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(path: Path, edit) -> None:
    """Pass a safetensors file's contents through a function."""
    tensors = load_file(path)
    edit(tensors)
    path.unlink()
    save_file(tensors, path)
