"""Config files."""
import json
from pathlib import Path


def read_json(path: Path) -> dict:
    """A config, or nothing where there is no file. Raises ValueError for a file that is no JSON."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; fetch it again") from error
