"""Frames of a video, spread evenly over its length, through PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from unimm.data.sources.base import import_library
from unimm.processing.images.io import MAX_PIXELS

# libav's names of the containers that are opened, whatever a file is called: some of its others fetch what they name
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,gif"


def read_frames(path: Path, n_frames: int) -> list[Image.Image]:
    """The frames in the middle of so many pieces of a video that are equally long; all frames of a shorter one.

    Raises ValueError for a file that is missing or is no video.
    """
    av = import_library("av", "frames of a video")
    if not path.is_file():
        raise ValueError(f"no video at {path}: expected a file")
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    try:
        with av.open(str(path), options=options) as container:
            if not container.streams.video:
                raise ValueError(f"{path} holds no video: expected one of {CONTAINERS}")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise ValueError(
                    f"got {path} of {stream.width}x{stream.height}: expected at most {MAX_PIXELS:,} pixels"
                )
            total = stream.frames or sum(1 for _ in container.decode(stream))
            if not total:
                raise ValueError(f"{path} has no frames: expected one or more")
            return _frames_at(container, stream, middle_frames(total, n_frames))
    except (av.FFmpegError, EOFError) as error:
        raise ValueError(f"cannot read the video {path}: {error}") from error


def middle_frames(total: int, n_frames: int) -> list[int]:
    """The numbers of the frames in the middle of `n_frames` equal pieces of a video of `total` frames."""
    n_frames = min(n_frames, total)
    return [(2 * i + 1) * total // (2 * n_frames) for i in range(n_frames)]


def _frames_at(container: Any, stream: Any, numbers: list[int]) -> list[Image.Image]:
    container.seek(0, stream=stream)
    wanted = set(numbers)
    frames: list[Image.Image] = []
    last = None
    for i, frame in enumerate(container.decode(stream)):
        last = frame
        if i in wanted:
            frames.append(frame.to_image())
        if i >= numbers[-1]:
            break
    if last is None:
        raise ValueError("the video has no frame that can be decoded: expected one or more")
    # a header may promise more frames than there are
    return frames or [last.to_image()]
