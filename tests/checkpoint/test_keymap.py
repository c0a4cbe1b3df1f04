"""Key maps: every transform both ways, names with placeholders, and the errors of a map that makes no sense."""

import pytest
import torch

from unimm.checkpoint.keymap import (
    Concat,
    Ignore,
    KeyMap,
    Rename,
    Slice,
    Squeeze,
    SwapHalves,
    equal_slices,
    matches,
    renames,
)

ROWS = torch.arange(20.0).view(10, 2)


@pytest.mark.parametrize(
    ("transform", "ours", "released"),
    [
        (Rename("a", "x"), ROWS, ROWS),
        (Squeeze("a", "x"), ROWS[None, :, None], ROWS),
        (SwapHalves("a", "x"), ROWS, torch.cat((ROWS[5:], ROWS[:5]))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_transforms_of_one_parameter_both_ways(transform, ours, released):
    assert transform.to_released([ours]).equal(released)
    (again,) = transform.to_ours(released, [torch.empty_like(ours, device="meta")])
    assert again.equal(ours)


def test_slices_fill_one_parameter_in_any_order():
    """Of the first the parameter is still on meta; the others write into what that made."""
    slices = [Slice("a", "x", 0, of=5), Slice("b", "x", 1, of=5), Slice("c", "x", 2, of=5, length=3)]
    parts = [one.to_released([ROWS]) for one in slices]
    assert [part.tolist() for part in parts] == [ROWS[:2].tolist(), ROWS[2:4].tolist(), ROWS[4:].tolist()]
    for order in ([0, 1, 2], [2, 0, 1]):
        x = torch.empty_like(ROWS, device="meta")
        for i in order:
            (x,) = slices[i].to_ours(parts[i], [x])
        assert x.equal(ROWS)


def test_concat_both_ways():
    """Its parts are views: a mapped tensor's stay mapped."""
    concat, ours = Concat("a", ("x", "y")), [ROWS[:3], ROWS[3:]]
    assert concat.to_released(ours).equal(ROWS)
    again = concat.to_ours(ROWS, [torch.empty_like(one, device="meta") for one in ours])
    assert all(a.equal(b) for a, b in zip(again, ours, strict=True))
    assert {one.untyped_storage().data_ptr() for one in again} == {ROWS.untyped_storage().data_ptr()}


def test_names():
    key_map = KeyMap(
        Concat("layer.{}.kv", ("blocks.{}.k", "blocks.{}.v")),
        *equal_slices(["q.{}.{}", "g.{}.{}"], "blocks.{}.qg.{}"),
        Rename("rest.{*}", "blocks.{*}"),
        Ignore("old.{*}", because="nothing reads it"),
    )
    assert key_map.released_tensors("blocks.3.v") == {"layer.3.kv": Concat("layer.3.kv", ("blocks.3.k", "blocks.3.v"))}
    assert key_map.released_tensors("blocks.0.qg.bias") == {
        "q.0.bias": Slice("q.0.bias", "blocks.0.qg.bias", 0, of=2),
        "g.0.bias": Slice("g.0.bias", "blocks.0.qg.bias", 1, of=2),
    }
    # the first entry that knows a name decides
    assert key_map.released_tensors("blocks.a.b") == {"rest.a.b": Rename("rest.a.b", "blocks.a.b")}
    assert key_map.released_tensors("head") == {} and key_map.ignores("old.a.b") and not key_map.ignores("older")
    assert matches("a.{}_b.{*}", "a.x_b.c.d") and not matches("a.{}", "a.b.c")


def test_prefixes_and_parts_of_maps():
    key_map = renames({"a.{}": "x.{}", "b": "y"}) + KeyMap(Ignore("c", because="old"))
    inside = key_map.prefixed(released="part.", ours="ours.")
    assert list(inside) == [
        Rename("part.a.{}", "ours.x.{}"),
        Rename("part.b", "ours.y"),
        Ignore("part.c", because="old"),
    ]
    assert inside.our_names == ("ours.x.{}", "ours.y")
    assert list(key_map.filtered(lambda entry: entry.released != "b")) == [
        Rename("a.{}", "x.{}"),
        Ignore("c", because="old"),
    ]


def test_maps_that_make_no_sense():
    with pytest.raises(ValueError, match="got two entries for a"):
        renames({"a": "x"}) + renames({"a": "y"})
    with pytest.raises(ValueError, match="expected the same number of placeholders in every name"):
        Rename("a.{}.{}", "x.{}")
