"""The framer cuts what a JSON parser would, whatever the pieces it arrives in."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.qmp.framing import Framer, OversizeError

_leaf = st.none() | st.booleans() | st.integers() | st.text(max_size=20)
_value = st.recursive(
    _leaf,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
_object = st.dictionaries(st.text(max_size=8), _value, max_size=4)


def feed_in_pieces(data: bytes, cuts: list[int], limit_bytes: int = 1 << 20) -> list[bytes]:
    framer = Framer(limit_bytes)
    edges = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    texts: list[bytes] = []
    for start, end in itertools.pairwise(edges):
        texts.extend(framer.feed(data[start:end]))
    return texts


@given(
    objects=st.lists(_object, max_size=5),
    gap=st.sampled_from([b"", b"\n", b"\r\n", b"  \t"]),
    cuts=st.lists(st.integers(0, 10_000), max_size=30),
    ascii_only=st.booleans(),
)
def test_objects_come_out_as_they_went_in(
    objects: list[dict[str, object]], gap: bytes, cuts: list[int], ascii_only: bool
) -> None:
    stream = b"".join(
        json.dumps(item, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass") + gap
        for item in objects
    )
    assert [json.loads(text) for text in feed_in_pieces(stream, cuts)] == objects


@pytest.mark.fuzz
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=20))
def test_any_bytes_are_cut_alike_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    """Nothing is lost, invented, or cut otherwise because of how it arrived."""
    whole = feed_in_pieces(data, [])
    assert feed_in_pieces(data, cuts) == whole
    rest = data
    for text in whole:
        before, found, rest = rest.partition(text)
        assert found
        assert not before.strip()


def test_garbage_ends_with_its_line_and_the_next_object_is_whole() -> None:
    assert list(Framer(100).feed(b'rubbish { "\n{"a": 1}')) == [b'rubbish { "', b'{"a": 1}']


@pytest.mark.parametrize("start", [b"{", b'{"', b"x", b'{"a\\'])
def test_an_endless_text_is_refused(start: bytes) -> None:
    framer = Framer(1000)
    assert list(framer.feed(start)) == []
    with pytest.raises(OversizeError):
        list(framer.feed(b"y" * 1000))
