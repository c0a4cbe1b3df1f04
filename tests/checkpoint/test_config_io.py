"""Config files and frozen dataclasses: what is read, what is refused, and that what was read is written back."""

import json
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from unimm.checkpoint.config_io import JsonConfig, JsonLayout, SameAs, read_config, write_config
from unimm.checkpoint.json_files import read_json


@dataclass(frozen=True, kw_only=True)
class ToyPlain:
    """A dataclass that knows nothing of files."""

    interval: tuple[float, float] = (0.0, 1.0)
    scale: float = 4.0


@dataclass(frozen=True, kw_only=True)
class ToyPart(JsonConfig):
    dim: int
    kernels: tuple[tuple[int, ...], ...] = ()

    JSON: ClassVar = JsonLayout(keys={"dim": "hidden_size", "kernels": "scales"}, defaults={"hidden_size": 8})


@dataclass(frozen=True, kw_only=True)
class ToyConfig(JsonConfig):
    in_channels: int
    out_channels: int
    channels: int
    levels: tuple[int, ...]
    part: ToyPart | None
    guidance: ToyPlain = field(default_factory=ToyPlain)
    flag: bool = False

    JSON: ClassVar = JsonLayout(
        name="the toy's config",
        source="the released toy.json",
        keys={
            "in_channels": "in_channels",
            "out_channels": "out_channels",
            "channels": ("num_channels", "old.channels"),
            "levels": "block_levels",
            "part": "part_config.params",
            "guidance": "generation.guidance",
            "flag": "use_flag",
        },
        defaults={"out_channels": SameAs("in_channels"), "num_channels": 3, "use_flag": False},
        fixed={"_class_name": "Toy", "norm": None, "part_config.cls": "Part"},
        derived={"n_levels": "n_levels"},
        constants={"architectures": ["Toy"]},
        section="toy_config",
    )

    @property
    def n_levels(self) -> int:
        return len(self.levels)


FILE = {
    "architectures": ["Toy"],
    "_class_name": "Toy",
    "norm": None,
    "in_channels": 4,
    "out_channels": 4,
    "num_channels": 3,
    "block_levels": [1, 2],
    "part_config": {"cls": "Part", "params": {"hidden_size": 8, "scales": [[3, 5], []]}},
    "generation": {"guidance": {"interval": [0.0, 0.5], "scale": 2.0}},
    "use_flag": False,
    "n_levels": 2,
}
CONFIG = ToyConfig(
    in_channels=4, out_channels=4, channels=3, levels=(1, 2), part=ToyPart(dim=8, kernels=((3, 5), ())),
    guidance=ToyPlain(interval=(0.0, 0.5), scale=2.0),
)  # fmt: skip


def test_a_file_is_read_and_written_back():
    assert ToyConfig.from_json(FILE) == CONFIG
    assert CONFIG.to_json() == FILE
    assert ToyConfig.from_json(json.loads(json.dumps(CONFIG.to_json()))) == CONFIG


def test_what_a_file_leaves_out_has_the_layouts_defaults_and_then_the_classes():
    short = {"in_channels": 4, "block_levels": [1, 2], "part_config": {"params": {}}}
    assert ToyConfig.from_json(short) == ToyConfig(
        in_channels=4, out_channels=4, channels=3, levels=(1, 2), part=ToyPart(dim=8)
    )


@pytest.mark.parametrize(
    ("data", "channels"), [({"old": {"channels": 1}}, 1), ({"old": {"channels": 1}, "num_channels": 2}, 2)]
)
def test_the_first_of_several_keys_counts(data, channels):
    assert ToyConfig.from_json({**{k: v for k, v in FILE.items() if k != "num_channels"}, **data}).channels == channels


def test_a_null_counts_as_left_out():
    assert ToyConfig.from_json({**FILE, "out_channels": None, "num_channels": None}) == CONFIG


def test_a_section_of_a_larger_file():
    assert ToyConfig.from_json({"model_type": "larger", "toy_config": FILE}) == CONFIG


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"in_channels": None, "block_levels": None},
            "the toy's config lacks in_channels, .*block_levels: expected the released toy.json",
        ),
        (
            {"_class_name": "Other"},
            "got _class_name 'Other', expected 'Toy', as in the released toy.json",
        ),
        ({"norm": "rms"}, "got norm 'rms', expected None"),
        ({"part_config": {"cls": "Other", "params": {}}}, "got part_config.cls 'Other'.*expected 'Part'"),
        ({"n_levels": 3}, "got n_levels 3, expected 2 by the rest of the toy.s config"),
        ({"generation": {"guidance": {"scales": 2}}}, "got scales in ToyPlain: expected some of interval, scale"),
        (
            {"generation": {"guidance": {"interval": [0.0]}}},
            r"got generation.guidance.interval \[0.0\] in ToyPlain: expected 2 values",
        ),
    ],
)
def test_wrong_files(changes, words):
    with pytest.raises(ValueError, match=words):
        ToyConfig.from_json({**FILE, **changes})


def test_a_list_of_the_only_supported_value_is_as_good():
    assert ToyConfig.from_json({**FILE, "_class_name": ["Toy", "Toy"]}) == CONFIG
    with pytest.raises(ValueError, match="got _class_name"):
        ToyConfig.from_json({**FILE, "_class_name": ["Toy", "Other"]})


def test_fields_that_the_caller_gives_are_not_read():
    layout = JsonLayout(keys={"dim": "hidden_size"}, source="a file")
    assert read_config(ToyPart, {"hidden_size": 3}, layout, given={"dim": 5, "kernels": ((1,),)}) == ToyPart(
        dim=5, kernels=((1,),)
    )
    with pytest.raises(ValueError, match="lacks hidden_size: expected a file"):
        read_config(ToyPart, {}, layout)


def test_defaults_may_be_left_unwritten():
    layout = JsonLayout(keys={"dim": "d", "kernels": "k"}, defaults={"k": ((3,),)}, omit_defaults=True)
    assert write_config(ToyPart(dim=2, kernels=((3,),)), layout) == {"d": 2}
    assert write_config(ToyPart(dim=2, kernels=((5,),)), layout) == {"d": 2, "k": [[5]]}
    assert read_config(ToyPart, {"d": 2}, layout) == ToyPart(dim=2, kernels=((3,),))


def test_a_dataclass_without_a_layout_has_its_own_names_and_no_others():
    assert write_config(ToyPlain(), JsonLayout()) == {"interval": [0.0, 1.0], "scale": 4.0}
    with pytest.raises(ValueError, match="got more in the config"):
        read_config(ToyPlain, {"more": 1}, JsonLayout())


def test_files(tmp_path):
    assert read_json(tmp_path / "none.json") == {}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON: .*fetch it again"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object; fetch it again"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("wrong", ["text", 5, [1]])
def test_a_section_that_is_no_mapping(wrong):
    with pytest.raises(ValueError, match="got part .* in the config: expected a mapping"):
        read_config(ToyPart, {"part": wrong}, JsonLayout(keys={"dim": "part.dim"}))
    with pytest.raises(ValueError, match="got part_config.params .* in the toy's config: expected a mapping"):
        ToyConfig.from_json({**FILE, "part_config": {"params": wrong}})
    with pytest.raises(ValueError, match="for the config: expected a mapping"):
        ToyPart.from_json(wrong)
