"""Every format, from the example script: what its rows become, any range of rows, and what is refused at once or counted."""

import io
import json
import pickle
import re
import tarfile

import pytest
from PIL import Image

from examples.data import make
from unimm.data.records import BrokenRow, Record, load_images_of, map_records
from unimm.data.sources.base import SourceOptions
from unimm.data.sources.formats import FORMATS, open_source
from unimm.data.sources.json_rows import JsonRows
from unimm.data.sources.video import middle_frames

NEEDS = {
    "bagel-t2i": "pyarrow",
    "bagel-edit": "pyarrow",
    "parquet": "pyarrow",
    "huggingface": "datasets",
    "bagel-vlm": "av",
}
KINDS = {
    "bagel-t2i": ["generate"] * 6,
    "bagel-edit": ["edit", "multi_edit", "edit", "multi_edit"],
    "bagel-vlm": ["understand", "understand", "text", "understand"],
    "huggingface": ["generate"] * 6,
    "imagefolder": ["generate"] * 6,
    "llava": ["understand", "understand", "text"],
    "pairs": ["generate"] * 5 + ["edit"],
    "parquet": ["generate"] * 6,
    "records": ["generate", "interleaved"],
    "uniworld": ["edit", "generate", "understand", "understand", "text"],
    "webdataset": ["generate"] * 6,
}
each_format = pytest.mark.parametrize("name", sorted(KINDS))


def example(name, folder):
    """The example's path; skips where its library is not installed."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return getattr(make, f"make_{name.replace('-', '_')}")(folder)


def rows_of(source):
    return list(source.read(range(source.n_rows)))


def copy_of(source):
    """The source as a worker process gets it."""
    return pickle.loads(pickle.dumps(source))  # noqa: S301


def reasons(path, **options):
    """Why rows are broken; None for whole ones."""
    return [getattr(row, "reason", None) for row in rows_of(open_source(path, **options))]


def parts(record):
    """A record in short: texts, and images by their middle pixel."""

    def short(part):
        if hasattr(part, "wordings"):
            return "|".join(part.wordings)
        image = part.load()
        return image.getpixel((image.width // 2, image.height // 2))

    return [(short(part), part.loss) for part in record.parts]


def test_every_format_has_an_example():
    assert FORMATS.keys() == KINDS.keys()


@each_format
def test_a_format_is_recognised_and_read(name, tmp_path):
    source = open_source(example(name, tmp_path))
    assert source.FORMAT == name
    records = list(map_records(rows_of(source), load_images_of))
    assert [record.kind for record in records] == KINDS[name]


@each_format
def test_any_rows_can_be_read_and_again(name, tmp_path):
    source = open_source(example(name, tmp_path), format=name)
    everything = rows_of(source)
    assert len(everything) == source.n_rows
    again = copy_of(source)
    for start in range(source.n_rows + 1):
        for stop in range(start, source.n_rows + 1):
            assert list(again.read(range(start, stop))) == everything[start:stop]
    for wrong in (range(source.n_rows + 1), range(0, source.n_rows, 2), range(-1, 1)):
        with pytest.raises(ValueError, match="expected rows that follow one another"):
            list(source.read(wrong))


@each_format
def test_rows_know_their_file_and_number(name, tmp_path):
    rows = rows_of(open_source(example(name, tmp_path)))
    assert len({(row.source, row.row) for row in rows}) == len(rows)


RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


def test_bagel_text_to_image(tmp_path):
    source = open_source(example("bagel-t2i", tmp_path))
    assert source.chunk_ends.tolist() == [2, 3, 5, 6]  # row groups of two, in two files of three rows
    first = rows_of(source)[0]
    assert parts(first) == [("a plain red image|a plain red image, and nothing else", False), (RED, True)]
    assert first.source.endswith("part-0.parquet") and first.row == 0


def test_bagel_edits(tmp_path):
    record = rows_of(open_source(example("bagel-edit", tmp_path)))[1]
    assert [part[1] for part in parts(record)] == [False, False, True, False, True, False, True]
    assert [text.wordings[0] for text in record.instructions] == ["make it green", "make it blue", "make it yellow"]


def test_bagel_conversations(tmp_path):
    one, two, none, video = rows_of(open_source(example("bagel-vlm", tmp_path)))
    assert parts(one) == [
        *[(RED, False), ("What colour is it?", False), ("Red.", True), ("Is it green?", False)],
        *[("It is red, and red is not green.", True), ("No.", True)],
    ]
    assert [text.text for text in one.thinking] == ["It is red, and red is not green."]
    assert parts(two)[:4] == [("Compare", False), (GREEN, False), ("with", False), (BLUE, False)]
    assert [text.role for text in none.texts] == ["user", "assistant"]
    assert len(video.images) == 12
    colours = [part[0] for part in parts(video)[:12]]
    assert all(abs(colours[0][i] - RED[i]) < 24 and abs(colours[-1][i] - GREEN[i]) < 24 for i in range(3))


def test_frames_of_a_video(tmp_path):
    path = example("bagel-vlm", tmp_path)
    video = rows_of(open_source(path, options=SourceOptions(video_frames=3)))[3]
    assert len(video.images) == 3
    assert middle_frames(24, 3) == [4, 12, 20] and middle_frames(2, 8) == [0, 1] and middle_frames(7, 1) == [3]
    (tmp_path / "bagel-vlm" / "clip.mp4").write_text("#EXTM3U\nhttp://localhost/x.ts\n")
    assert "cannot read the video" in reasons(path)[3]


def test_uniworld(tmp_path):
    edit, drawn, *answers = rows_of(open_source(example("uniworld", tmp_path)))
    assert parts(edit) == [(RED, False), ("make it green", False), (GREEN, True)]
    assert parts(drawn) == [("a plain blue image", False), (BLUE, True)]
    assert edit.edit_weights and not any(one.edit_weights for one in answers)
    assert edit.source.endswith("edits.json") and answers[0].source.endswith("answers.json") and answers[0].row == 0


def test_webdataset_reads_what_webdataset_reads(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder = example("webdataset", tmp_path)
    with webdataset.TarWriter(str(folder / "00002.tar")) as writer:
        writer.write({"__key__": "a/x", "jpg": Image.new("RGB", (9, 9)), "txt": "from webdataset"})
    records = rows_of(open_source(folder))
    assert [text.text for record in records for text in record.texts] == [
        *map(make.caption, range(6)),
        "from webdataset",
    ]
    samples = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file:
            members = webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
            samples += webdataset.tariterators.group_by_keys(members)
    images = [next(one[key] for key in ("png", "jpg") if key in one) for one in samples]
    assert [record.images[0].data for record in records] == images


def test_pairs(tmp_path):
    records = rows_of(open_source(make.make_pairs(tmp_path)))
    assert parts(records[-1]) == [(RED, False), ("make it green", False), (GREEN, True)]


def test_broken_pairs(tmp_path):
    lines = {
        "{": "line 1 of .* is no JSON",
        '{"target": "a"}': "neither text nor images",
        '{"target": 3, "text": "a"}': "expected the name of a file, and a list of names",
        '{"target": "a.png", "images": "a.png"}': "expected the name of a file, and a list of names",
        '{"target": "a.png", "images": [null]}': "expected the name of a file, and a list of names",
        '{"target": "a.png", "text": "a", "caption": "b"}': "expected target, perhaps text and images",
        '{"target": "a.png", "text": "half \\ud83d"}': "the text in line 7 of .* is no text",
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    found = reasons(path, format="pairs")
    for i, (reason, expected) in enumerate(zip(found, lines.values(), strict=True)):
        assert re.search(expected.replace("line 1", f"line {i + 1}"), reason), (reason, expected)


@pytest.mark.parametrize("letter", [*"\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\xa0", "\U0001f600"], ids=ascii)
def test_lines_of_pairs_end_at_newlines_alone(tmp_path, letter):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    record = {"target": "a.png", "text": f"a cat{letter}on a mat"}
    # JSON escapes control characters below 32, and no others
    lines = [json.dumps(record, ensure_ascii=letter < " "), '{"target": "a.png", "text": null, "images": ["a.png"]}',
             '{"target": "a.png", "text": "a", "images": null}']  # fmt: skip
    (tmp_path / "list.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = rows_of(open_source(tmp_path / "list.jsonl"))
    assert [row.kind for row in rows] == ["generate", "edit", "generate"]
    assert rows[0].texts[0].text == record["text"] and not rows[1].texts


def test_columns_are_named(tmp_path):
    folder = example("imagefolder", tmp_path)
    lines = [{"file_name": "1.png", "before": "0.png", "order": "make it green", "note": "x"}]
    make.write_lines(folder / "metadata.jsonl", lines)
    with pytest.raises(
        ValueError, match="has the columns file_name, before, order, note: expected an image and a text"
    ):
        open_source(folder)
    options = SourceOptions(columns={"images": "before", "text": "order"})
    assert parts(rows_of(open_source(folder, options=options))[0]) == [
        *[(RED, False), ("make it green", False), (GREEN, True)],
    ]
    with pytest.raises(ValueError, match="no column text=ordr: expected some of its file_name, before"):
        open_source(folder, options=SourceOptions(columns={"text": "ordr"}))
    with pytest.raises(ValueError, match="columns for txt: expected some of target, images"):
        open_source(folder, options=SourceOptions(columns={"txt": "order"}))


def test_an_answer_makes_an_image_one_that_is_asked_about(tmp_path):
    folder = example("imagefolder", tmp_path)
    make.write_lines(folder / "metadata.jsonl", [{"file_name": "0.png", "text": "What colour?", "answer": "red"}])
    assert parts(rows_of(open_source(folder))[0]) == [(RED, False), ("What colour?", False), ("red", True)]


def test_huggingface_lists_of_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = {"source_images": datasets.Sequence(datasets.Image()), "prompt": datasets.Value("string")}
    features |= {"target_image": datasets.Image()}
    columns = {"source_images": [[make.image(0), make.image(1)]], "prompt": ["mix"], "target_image": [make.image(2)]}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(tmp_path / "d" / "train")
    assert parts(rows_of(open_source(tmp_path / "d" / "train"))[0]) == [
        *[(RED, False), (GREEN, False), ("mix", False), (BLUE, True)],
    ]
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match="holds the splits train: expected one, as in .*/d/train"):
        open_source(tmp_path / "d")


# ---- what is recognised


def test_unknown_and_ambiguous_paths(tmp_path):
    with pytest.raises(ValueError, match="no dataset at .*none"):
        open_source(tmp_path / "none")
    with pytest.raises(
        ValueError, match=r"holds no dataset that is known: expected .jsonl .* one of bagel-edit, bagel-t2i"
    ):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="unknown format 'bagel': expected one of bagel-edit"):
        open_source(tmp_path, format="bagel")
    folder = make.make_imagefolder(tmp_path)
    with tarfile.open(folder / "a.tar", "w"):
        pass
    with pytest.raises(ValueError, match="more than one thing to read: metadata.jsonl; a.tar"):
        open_source(folder)
    assert open_source(folder, format="imagefolder").n_rows == 6
    both = make.write_lines(tmp_path / "both.jsonl", [{"target": "a.png", "conversations": []}])
    with pytest.raises(ValueError, match="more than one thing to read: conversations; target"):
        open_source(both)
    path = make.make_llava(tmp_path)
    options = SourceOptions(columns={"text": "a"}, video_frames=3)
    with pytest.raises(ValueError, match="got columns for .* of format llava: it takes images, video_frames"):
        open_source(path, options=options)


def test_a_named_format_checks_the_rows(tmp_path):
    with pytest.raises(ValueError, match="have parts: expected target, as format pairs"):
        open_source(make.make_records(tmp_path), format="pairs")


def test_missing_columns_are_named_at_once(tmp_path):
    folder = example("bagel-t2i", tmp_path)
    with pytest.raises(
        ValueError, match=r"part-0.parquet has no column image_list, instruction_list, as format bagel-edit"
    ):
        open_source(folder, format="bagel-edit")
    make.write_tables(folder / "more", [{"image": b"x", "caption": "a"}] * 2)
    with pytest.raises(ValueError, match=r"more/part-0.parquet has no column captions"):
        open_source(folder, format="bagel-t2i")


def test_a_missing_library_says_what_to_install(tmp_path, monkeypatch):
    folder = example("bagel-t2i", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match="reading parquet files needs pyarrow: pip install 'unimm.data.'"):
        open_source(folder)


# ---- files that are broken


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b"rubbish\n", "none of the first 1 rows of .* is a JSON object"),
        ("a.json", b"{}", "got '{}' at byte 0 of .*expected '\\['"),
        ("a.json", b'[{"a": 1}, {"a": ]', "value 1 of the list in .* is no JSON"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "expected ','"),
        ("a.json", b'[{"a": 1}', "got its end at byte 9"),
        ("a.json", b'[{"conversations": 1}] 3', "goes on behind its list with '3'"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.json", b'[{"image": "a"}]', "the rows of .* have image: expected conversations, as format llava"),
        ("a.tar", b"rubbish" * 99, "a.tar is no whole tar"),
        ("a.tar", b"", "a.tar is no whole tar: .*; it is empty"),
        ("a.txt", b"images,a.json\n", "in line 1 of .*expected IMAGES,ANNOTATIONS.json,true or false"),
        ("a.txt", b"\nnone,a.json,true\n", "line 2 of .* names the folder of images .*none, which is not there"),
        ("a.txt", b".,none.json,false\n", "line 1 of .*: cannot read .*none.json: no such file"),
        ("a.txt", b"\n\n", "a.txt has no rows"),
    ],
)
def test_broken_files_are_errors_at_once(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name)


def test_a_broken_parquet_file(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 rubbish PAR1")
    with pytest.raises(ValueError, match="a.parquet is no parquet file"):
        open_source(tmp_path / "a.parquet")


def test_a_tar_that_is_cut_short(tmp_path):
    folder = make.make_webdataset(tmp_path)
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[:1600])
    with pytest.raises(ValueError, match="00001.tar is (cut short|no whole tar)"):
        open_source(folder)
    (folder / "00001.tar").write_bytes(__import__("gzip").compress(whole))
    with pytest.raises(ValueError, match="compressed with gzip: unpack it"):
        open_source(folder)


# ---- rows that are broken


def test_broken_row_groups_are_broken_rows(tmp_path):
    """A page's bytes are overwritten: its rows are counted, and the next row group is read."""
    folder = example("bagel-t2i", tmp_path)
    path = folder / "part-0.parquet"
    data = bytearray(path.read_bytes())
    data[10:40] = b"\xff" * 30
    path.write_bytes(bytes(data))
    found = reasons(folder)
    assert all("cannot read row group 0" in reason for reason in found[:2]) and found[2:] == [None] * 4
    assert [row.row for row in rows_of(open_source(folder))] == [0, 1, 2, 0, 1, 2]


GOOD = {"image": make.image_bytes(0), "captions": "{}"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": None}, "got None for image: expected the bytes of an image file"),
        ({"image": b""}, "got b'' for image"),
        ({"captions": "a cat"}, "got captions 'a cat', which is no JSON"),
        ({"captions": "[1]"}, "expected a JSON object of names and captions"),
        ({"captions": '{"a": 1}'}, "expected a JSON object of names and captions"),
        ({"captions": None}, "got captions None"),
        ({"captions": '{"a": "\\ud83d"}'}, "is no text"),
    ],
)
def test_broken_rows_of_text_to_image(tmp_path, row, reason):
    pytest.importorskip("pyarrow")
    found = reasons(make.write_tables(tmp_path, [GOOD, GOOD | row, GOOD, GOOD]))
    assert reason in found[1] and found[2:] == [None, None]


def test_no_caption_is_a_blank(tmp_path):
    pytest.importorskip("pyarrow")
    assert rows_of(open_source(make.write_tables(tmp_path, [GOOD, GOOD])))[0].texts[0].text == " "


@pytest.mark.parametrize(
    ("n_images", "instructions", "reason"),
    [
        (2, [], "got 0 instructions for 2 images: expected 1, a list of wordings for each edit"),
        (2, [["a"], ["b"]], "got 2 instructions for 2 images"),
        (1, [], "got 1 images in image_list: expected two or more"),
        (0, [], "got 0 images"),
        (3, [["a"], []], "got instruction 2 of 2 []: expected a list of wordings"),
        (2, None, "got no list of instructions for 2 images"),
        (2, [[""]], "expected a list of wordings"),
    ],
)
def test_instruction_lists_that_do_not_fit(tmp_path, n_images, instructions, reason):
    pytest.importorskip("pyarrow")
    good = {"image_list": [make.image_bytes(0)] * 2, "instruction_list": [["a", "b"]]}
    row = {"image_list": [make.image_bytes(0)] * n_images, "instruction_list": instructions}
    found = reasons(make.write_tables(tmp_path, [good, row, good, good]))
    assert reason in found[1] and found[2:] == [None, None]


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "0.png", "conversations": turns("a", "b")}, "got 1 images and 0 of <image> in conversations"),
        ({"conversations": turns("<image>", "b")}, "got 0 images and 1 of <image>"),
        ({"image": 3, "conversations": turns("a", "b")}, "got image 3: expected the name of a file"),
        ({"image": ["0.png", ""], "conversations": turns("a", "b")}, "expected the name of a file"),
        ({"conversations": turns("a")}, "nothing carries loss"),
        ({"conversations": turns("a", " ")}, "got an empty answer"),
        ({"conversations": turns("a", "<gen_image>")}, "expected it in annotations that a UniWorld data.txt names"),
        ({"conversations": []}, "got conversations []: expected a list of turns"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "got turn 0 {'from': 'bot'"),
        ({"conversations": ["a"]}, "got turn 0 'a'"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "got turn 0"),
        ({"video": "a.mp4", "image": "0.png", "conversations": turns("a", "b")}, "expected one of them, a name"),
        ({"video": "a.mp4", "conversations": turns("a", "b")}, "expected <video> once, in a turn of the user's"),
        ([], "expected a JSON object"),
    ],
)
def test_broken_conversations(tmp_path, row, reason):
    good = make.conversations()[2]
    path = make.write_lines(tmp_path / "a.jsonl", [good, row, good])
    found = reasons(path, format="bagel-vlm")
    assert found[0] is None and reason in found[1] and found[2] is None


@pytest.mark.parametrize(
    "line", [b"", b'{"conversations": ', b"\xff\xfe{}", b"[" * 100_000, b'{"conversations": null}']
)
def test_lines_that_are_no_rows(tmp_path, line):
    good = json.dumps(make.conversations()[2]).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good, line, good]))
    first, broken, last = rows_of(open_source(tmp_path / "a.jsonl"))
    assert isinstance(broken, BrokenRow) and broken.row == 1
    assert isinstance(first, Record) and first.parts == last.parts


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"png": make.image_bytes(0)}, "got the files png: expected a text as txt, or in the json as text or caption"),
        ({"txt": b"a"}, "got the files txt: expected one image"),
        ({"png": make.image_bytes(0), "jpg": b"a", "txt": b"a"}, "expected one image"),
        ({"png": make.image_bytes(0), "json": b"{"}, "which is no JSON"),
        ({"png": make.image_bytes(0), "json": b'{"a": 1}'}, "and the keys a in the json: expected a text"),
        ({"png": make.image_bytes(0), "txt": b"\xff"}, "decode"),
    ],
)
def test_broken_rows_of_tars(tmp_path, files, reason):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, members in (("0", files), ("1", {"png": make.image_bytes(0), "txt": b"fine"})):
            for extension, data in members.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    found = reasons(tmp_path / "a.tar")
    assert reason in found[0] and found[1] is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"parts": {}}, "expected a list of parts"),
        ({"parts": [], "edit_weights": 1}, "got edit_weights 1: expected true or false"),
        ({"parts": [{"txt": "a"}]}, "got the part {'txt': 'a'}: expected text, loss"),
        ({"parts": ["a"]}, "got the part 'a'"),
        ({"parts": [{"text": "a", "loss": 1}]}, "got the part"),
        ({"parts": [{"text": []}]}, "got text []: expected a text"),
        ({"parts": [{"image": ["a"]}]}, "expected the name of a file"),
        ({"parts": [{"text": "a", "loss": True, "role": "gpt"}]}, "role 'gpt'"),
        ({"parts": [{"text": "a"}]}, "nothing carries loss"),
    ],
)
def test_broken_records(tmp_path, row, reason):
    good = {"parts": [{"text": "a", "loss": True}]}
    found = reasons(make.write_lines(tmp_path / "a.jsonl", [good, row]))
    assert found[0] is None and reason in found[1]


@pytest.mark.parametrize(
    "row",
    [
        {"target": "a.png", "text": "a cat"},
        {"parts": [{"text": "a", "loss": True}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ],
    ids=lambda row: next(iter(row)),
)
def test_blank_lines_at_the_end_are_no_rows(tmp_path, row):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    line = json.dumps(row)
    (tmp_path / "a.jsonl").write_bytes(f"{line}\r\n\r\n{line}\r\n\r\n \t\n\n".encode())
    # one in between is: a row may be lost there
    assert [type(one) for one in rows_of(open_source(tmp_path / "a.jsonl"))] == [Record, BrokenRow, Record]
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match="blank.jsonl is empty: expected a row or more"):
        open_source(tmp_path / "blank.jsonl")


def test_places_in_json_files_are_in_bytes(tmp_path):
    """Letters of several bytes, a byte order mark, and ends of lines that JSON leaves as they are."""
    values = [{"a": "\u2028\u00e9\U0001f600"}, {"b": "]"}, {"c": [1, {"d": "\x85"}]}]
    text = json.dumps(values, ensure_ascii=False, indent=1)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [json.loads(data) for _, data in JsonRows(tmp_path / "a.json").read(range(3))] == values
    lines = "\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    assert [json.loads(data) for _, data in JsonRows(tmp_path / "a.jsonl").read(range(1, 3))] == values[1:]
