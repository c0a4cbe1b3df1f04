"""The images that were made in one visit of the page: their files, captions and recipes."""

import hashlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from unimm.app.scripts import Piece, Recipe, Upload

MAX_IMAGES = 100  # of a visit; the oldest go first


@dataclass(frozen=True, kw_only=True)
class AlbumImage:
    """An image that was made: its PNG file, and how."""

    path: Path
    caption: str
    recipe: Recipe


@dataclass
class Album:
    """The images of one visit, newest first, in files of folders whose names nobody can guess."""

    folder: Path
    images: list[AlbumImage] = field(default_factory=list)
    recipes: dict[str, Recipe] = field(default_factory=dict)  # by the pixels of the image

    def add(self, image: Image.Image, recipe: Recipe, caption: str) -> AlbumImage:
        """Write an image's file and put it first."""
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir(parents=True)
        entry = AlbumImage(path=folder / f"unimm-seed-{recipe.seed}.png", caption=caption, recipe=recipe)
        image.save(entry.path)
        self.images.insert(0, entry)
        self.recipes[pixel_hash(image)] = recipe
        while len(self.images) > MAX_IMAGES:
            self._delete(self.images.pop())
        return entry

    def source(self, image: Image.Image, name: str) -> Piece:
        """Where an image comes from: the recipe of one of these, or else the file of that name."""
        return self.recipes.get(pixel_hash(image)) or Upload(name)

    def find(self, path: str | None) -> AlbumImage | None:
        """The image of a file; None for another file."""
        return next((one for one in self.images if str(one.path) == path), None)

    def discard(self) -> None:
        """Delete all files: the visit is over."""
        while self.images:
            self._delete(self.images.pop())

    @staticmethod
    def _delete(entry: AlbumImage) -> None:
        entry.path.unlink(missing_ok=True)
        entry.path.parent.rmdir()


def pixel_hash(image: Image.Image) -> str:
    """Equal for equal RGB images."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()
