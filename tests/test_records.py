"""What is recorded: written and read back the same, and nothing else is ever read."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ftpvfs.backend.backend import Entry
from ftpvfs.cache.ranges import RangeSet
from ftpvfs.cache.records import DirtyRecord, ItemRecord, PartialRecord, Record, id_prefix

ids = st.text("0123456789abcdef", min_size=32, max_size=32)
names = st.text(min_size=1, max_size=20).filter(
    lambda name: not set(name) & set("/\r\n\0") and name not in (".", "..") and name.isprintable()
)
paths = st.lists(names | st.sampled_from(["caf\udce9", "🙂", "a b"]), min_size=1, max_size=4).map("/".join)
sizes = st.integers(0, 2**62)
times = st.floats(-1e12, 1e12)
texts = st.text(max_size=30)
present = st.lists(st.tuples(st.integers(0, 500), st.integers(1, 50)), max_size=8).map(
    lambda pairs: tuple(RangeSet((start, start + length) for start, length in pairs))
)

flags = st.booleans()
items = st.builds(
    ItemRecord, paths, ids, st.integers(550, 2**62), st.none() | times, texts, st.none() | texts, present, times, flags
)
files = st.builds(
    DirtyRecord, paths, st.none(), sizes, times, sizes, st.none() | texts, flags, flags, texts, times, sizes, texts,
    times, ids,
)  # fmt: skip
partials = st.builds(PartialRecord, paths, ids, sizes, texts, times, texts)


@given(items | files | partials)
def test_every_record_is_read_back_as_it_was_written(record: Record) -> None:
    assert type(record).from_json(record.to_json()) == record


@given(files)
def test_a_file_is_called_as_the_record_beside_it(record: DirtyRecord) -> None:
    file = dataclasses.replace(record, id=record.beside)
    assert DirtyRecord.from_json(file.to_json()) == file
    stranger = dataclasses.replace(record, id="0" * 32, beside="1" * 32)
    with pytest.raises(ValueError, match="beside"):
        DirtyRecord.from_json(stranger.to_json())


ITEM = ItemRecord("a/b", "0" * 32, 10, 1.5, "v", "f", ((0, 3), (5, 10)), 7.0)
DIRTY = DirtyRecord("a/b", "1" * 32, 10, 1.5, 3, None, beside="1" * 32)
PARTIAL = PartialRecord("a/b", "2" * 32, 10, "alice", 7.0)


@settings(max_examples=500)
@given(st.sampled_from([ITEM, DIRTY, PARTIAL]), st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_is_noticed_wherever_it_is(record: Record, place: int, bit: int) -> None:
    data = bytearray(record.to_json())
    data[place % len(data)] ^= 1 << bit
    with pytest.raises(ValueError):  # noqa: PT011 - of JSON, of UTF-8, of ours
        type(record).from_json(bytes(data))


anything = st.recursive(
    st.none() | flags | st.integers() | st.text(), lambda each: st.lists(each) | st.dictionaries(st.text(), each)
)


@given(st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_whatever_else_may_be_there_is_refused(data: bytes) -> None:
    for kind in (ItemRecord, DirtyRecord, PartialRecord):
        with pytest.raises(ValueError):  # noqa: PT011 - of JSON, of UTF-8, of ours
            kind.from_json(data)


def test_json_in_json_in_json_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON in JSON"):
        ItemRecord.from_json(b"[" * 100_000)


def sealed(record: Record, **changed: Any) -> bytes:
    """The record with other values, as a program would write it that knows how."""
    fake = object.__new__(type(record))
    for name in record.__dataclass_fields__:
        object.__setattr__(fake, name, changed.get(name, getattr(record, name)))
    return fake.to_json()


@pytest.mark.parametrize(
    ("record", "changed"),
    [
        (ITEM, {"path": ""}),
        (ITEM, {"path": "/a"}),
        (ITEM, {"path": "../etc/passwd"}),
        (ITEM, {"path": "a\nb"}),
        (ITEM, {"path": 7}),
        (ITEM, {"id": "../../etc/passwd"}),
        (ITEM, {"id": "A" * 32}),
        (ITEM, {"size": -1}),
        (ITEM, {"size": True}),
        (ITEM, {"size": 9.5}),
        (ITEM, {"mtime": "now"}),
        (ITEM, {"present": [[0, 11]]}),
        (ITEM, {"present": [[5, 10], [0, 3]]}),
        (ITEM, {"present": [[0, 3], [3, 5]]}),
        (ITEM, {"present": [[3, 3]]}),
        (ITEM, {"present": "all"}),
        (ITEM, {"verified": 1}),
        (DIRTY, {"generation": -1}),
        (DIRTY, {"mtime": None}),
        (DIRTY, {"attempted": None}),
        (DIRTY, {"beside": "x"}),
        (PARTIAL, {"user": None}),
        (PARTIAL, {"since": "then"}),
    ],
)
def test_values_that_cannot_be_are_refused_though_the_checksum_fits(record: Record, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cannot be|missing"):
        type(record).from_json(sealed(record, **changed))


def test_a_record_of_another_kind_or_version_is_refused() -> None:
    with pytest.raises(ValueError, match="no item record"):
        ItemRecord.from_json(DIRTY.to_json())
    more = json.loads(PARTIAL.to_json())
    more["new"] = 1
    with pytest.raises(ValueError, match="checksum"):
        PartialRecord.from_json(json.dumps(more).encode())


def test_a_record_is_of_the_object_whose_bytes_it_describes() -> None:
    assert ITEM.is_of(Entry("b", False, 10, 99.0, "f", stamp=7))
    assert not ITEM.is_of(Entry("b", False, 11, 1.5, "f"))
    assert not ITEM.is_of(Entry("b", False, 10, 1.5, "g"))
    assert not ITEM.is_of(Entry("b", False, 10, 1.5, None))


def test_different_paths_have_different_ids() -> None:
    assert len({id_prefix(path) for path in ("a", "A", "a/b", "a b", "caf\udce9")}) == 5
