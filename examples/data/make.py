"""Makes a small dataset of every format that training reads: python examples/data/make.py FOLDER.

docs/data.md says what is in them. Images are plain colours; parquet needs pyarrow, a video needs PyAV, and the folder of
Hugging Face's needs datasets: all of `pip install 'unimm[data]'`.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ((64, 48), (48, 64), (64, 64))


def main() -> None:
    """Make all datasets in the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    for name, path in make_all(Path(sys.argv[1])).items():
        print(f"{name:12} {path}")


def make_all(folder: Path) -> dict[str, Path]:
    """The path of a dataset of each format."""
    makers = (
        *(make_pairs, make_imagefolder, make_records, make_bagel_vlm, make_llava, make_uniworld, make_webdataset),
        *(make_bagel_t2i, make_bagel_edit, make_parquet, make_huggingface),
    )
    return {maker.__name__.removeprefix("make_").replace("_", "-"): maker(folder) for maker in makers}


def image(i: int) -> Image.Image:
    """The example image of a number."""
    return Image.new("RGB", SIZES[i % len(SIZES)], COLOURS[i % len(COLOURS)])


def image_bytes(i: int) -> bytes:
    """The same as a PNG file."""
    buffer = io.BytesIO()
    image(i).save(buffer, format="PNG")
    return buffer.getvalue()


def caption(i: int) -> str:
    """What it shows."""
    return f"a plain {COLOURS[i % len(COLOURS)]} image"


def save_images(folder: Path, n: int = 6) -> None:
    """Image files 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        image(i).save(folder / f"{i}.png")


def write_lines(path: Path, rows: list[dict]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_pairs(folder: Path) -> Path:
    """JSON lines of images to generate: from a text, or from images too."""
    save_images(folder / "pairs")
    rows = [{"target": f"{i}.png", "text": caption(i)} for i in range(5)]
    rows += [{"target": "1.png", "text": "make it green", "images": ["0.png"]}]
    return write_lines(folder / "pairs" / "pairs.jsonl", rows)


def make_imagefolder(folder: Path) -> Path:
    """A folder with a metadata.jsonl."""
    save_images(folder / "imagefolder")
    write_lines(
        folder / "imagefolder" / "metadata.jsonl", [{"file_name": f"{i}.png", "text": caption(i)} for i in range(6)]
    )
    return folder / "imagefolder"


def make_records(folder: Path) -> Path:
    """JSON lines of records: thinking ahead of an image, and texts and images by turns."""
    save_images(folder / "records")
    planned = [
        {"text": "an image of the colour of grass"},
        {"text": "Grass is green.", "loss": True, "thinking": True},
        {"image": "1.png", "loss": True},
    ]
    story = [
        {"text": "A traffic light in three images."},
        {"text": "First it is red.", "loss": True},
        {"image": "0.png", "loss": True},
        {"text": "Then it is green.", "loss": True},
        {"image": "1.png", "loss": True},
    ]
    return write_lines(folder / "records" / "records.jsonl", [{"parts": planned}, {"parts": story}])


def conversations() -> list[dict]:
    """Questions about no image, one image and two."""
    one = [
        {"from": "human", "value": "<image>\nWhat colour is it?"},
        {"from": "gpt", "value": "Red."},
        {"from": "human", "value": "Is it green?"},
        {"from": "gpt", "value": "<think>It is red, and red is not green.</think>No."},
    ]
    two = [
        {"from": "human", "value": "Compare <image> with <image>"},
        {"from": "gpt", "value": "The first is green, the second blue."},
    ]
    none = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]
    return [
        {"image": "0.png", "conversations": one},
        {"image": ["1.png", "2.png"], "conversations": two},
        {"conversations": none},
    ]


def make_bagel_vlm(folder: Path) -> Path:
    """BAGEL's JSON lines, with a video where PyAV is installed."""
    save_images(folder / "bagel-vlm")
    rows = conversations()
    if make_video(folder / "bagel-vlm" / "clip.mp4"):
        asked = [
            {"from": "human", "value": "<video>\nWhat happens?"},
            {"from": "gpt", "value": "Red turns to green."},
        ]
        rows.append({"video": "clip.mp4", "conversations": asked})
    return write_lines(folder / "bagel-vlm" / "vlm.jsonl", rows)


def make_video(path: Path, n_frames: int = 24) -> bool:
    """A second of red, then green. Whether it could be made."""
    try:
        import av
    except ImportError:
        return False
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(n_frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), COLOURS[i >= n_frames // 2]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return True


def make_llava(folder: Path) -> Path:
    """LLaVA's JSON."""
    save_images(folder / "llava")
    path = folder / "llava" / "llava.json"
    path.write_text(json.dumps(conversations(), indent=2), encoding="utf-8")
    return path


def make_uniworld(folder: Path) -> Path:
    """UniWorld's data.txt, with edits in one file and answers in another."""
    save_images(folder / "uniworld" / "images")
    edit = [{"from": "human", "value": "<image>\nmake it green"}, {"from": "gpt", "value": "<gen_image>"}]
    drawn = [{"from": "human", "value": caption(2)}, {"from": "gpt", "value": "<gen_image>"}]
    edits = [{"image": ["0.png", "1.png"], "conversations": edit}, {"image": ["2.png"], "conversations": drawn}]
    (folder / "uniworld" / "edits.json").write_text(json.dumps(edits), encoding="utf-8")
    (folder / "uniworld" / "answers.json").write_text(json.dumps(conversations()), encoding="utf-8")
    path = folder / "uniworld" / "data.txt"
    path.write_text("images,edits.json,true\nimages,answers.json,false\n", encoding="utf-8")
    return path


def make_webdataset(folder: Path) -> Path:
    """Two tars of images with a text beside each, as .txt or in a .json."""
    (folder / "webdataset").mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(folder / "webdataset" / f"{shard:05}.tar", "w") as tar:
            for i in range(3 * shard, 3 * shard + 3):
                text = (
                    ("txt", caption(i).encode())
                    if shard == 0
                    else ("json", json.dumps({"caption": caption(i)}).encode())
                )
                for extension, data in (("png", image_bytes(i)), text):
                    member = tarfile.TarInfo(f"{i:06}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder / "webdataset"


def make_bagel_t2i(folder: Path) -> Path:
    """BAGEL's parquet of text to image: two files of two row groups."""
    rows = [
        {
            "image": image_bytes(i),
            "captions": json.dumps({"short": caption(i), "long": f"{caption(i)}, and nothing else"}),
        }
        for i in range(6)
    ]
    return write_tables(folder / "bagel-t2i", rows)


def make_bagel_edit(folder: Path) -> Path:
    """BAGEL's parquet of edits: rows of one edit, and of three that follow one another."""
    rows = []
    for n in (2, 4, 2, 3):
        wordings = [[f"make it {COLOURS[i]}", f"change the colour to {COLOURS[i]}"] for i in range(1, n)]
        rows.append({"image_list": [image_bytes(3 * i) for i in range(n)], "instruction_list": wordings})
    return write_tables(folder / "bagel-edit", rows)


def make_parquet(folder: Path) -> Path:
    """Parquet as the hub has it: an image's file as a struct, and a text."""
    rows = [{"image": {"bytes": image_bytes(i), "path": f"{i}.png"}, "text": caption(i)} for i in range(6)]
    return write_tables(folder / "parquet", rows)


def write_tables(folder: Path, rows: list[dict]) -> Path:
    """Two parquet files of these rows, in row groups of two."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    half = (len(rows) + 1) // 2
    for i, part in enumerate((rows[:half], rows[half:])):
        parquet.write_table(pa.Table.from_pylist(part), folder / f"part-{i}.parquet", row_group_size=2)
    return folder


def make_huggingface(folder: Path) -> Path:
    """A folder that datasets.save_to_disk writes."""
    import datasets

    columns = {
        "image": [{"bytes": image_bytes(i), "path": None} for i in range(6)],
        "text": [caption(i) for i in range(6)],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder / "huggingface"))
    return folder / "huggingface"


if __name__ == "__main__":
    main()
