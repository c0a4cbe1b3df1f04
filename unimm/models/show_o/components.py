"""The parts of a Show-o from repositories of their own: the image tokenizer, CLIP, Phi's text tokenizer."""

from collections.abc import Sequence
from pathlib import Path

from unimm.checkpoint import hub
from unimm.models.release import Components
from unimm.models.show_o import CLIP_FOLDER, CLIP_HUB_ID, TOKENIZER_HUB_ID, VQ_FOLDER, VQ_HUB_ID

# component -> its folder below a checkpoint, and the repository that the original names
SOURCES = {
    "vq": (VQ_FOLDER, VQ_HUB_ID),
    "clip": (CLIP_FOLDER, CLIP_HUB_ID),
    "tokenizer": ("", TOKENIZER_HUB_ID),
}


def find_component_folders(
    folder: Path, components: Components, *, wanted: Sequence[str], is_hub_id: bool
) -> dict[str, Path]:
    """The folders of the parts that exist, by component.

    components: folders or hub ids, None for a part that is left out. wanted: what the model takes. Unless given, parts
    lie below the checkpoint's folder, or are absent; those of a hub id come from the original's repositories. Raises
    ValueError for a part that was given and is not there.
    """
    found: dict[str, Path] = {}
    for name in [*wanted, *(one for one in components if one not in wanted and components[one] is not None)]:
        below, hub_id = SOURCES[name]
        given = components.get(name, hub_id if is_hub_id else None)
        place = folder / below if below else None
        if name in components and given is None:
            continue
        if given is not None and not (name not in components and place is not None and place.is_dir()):
            # a tokenizer is all that is wanted of Phi
            found[name] = hub.resolve(given, weights=name != "tokenizer")
            _check_has_config(name, found[name])
        elif place is not None and place.is_dir():
            found[name] = place
    return found


def _check_has_config(name: str, folder: Path) -> None:
    needed = "tokenizer.json" if name == "tokenizer" else "config.json"
    alternative = (folder / "vocab.json").is_file() if name == "tokenizer" else False
    if not (folder / needed).is_file() and not alternative:
        raise ValueError(f"got the component {name} {folder}, which lacks {needed}: expected {SOURCES[name][1]}")
