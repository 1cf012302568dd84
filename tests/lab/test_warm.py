"""Touch-and-free touches every page once."""

from __future__ import annotations

import resource

import pytest

from qpostcopy.lab.warm import touch_and_free


@pytest.mark.parametrize("size_bytes", [1, 4096, 8 << 20, (8 << 20) + 1])
def test_every_page_is_touched(size_bytes: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch_and_free(size_bytes)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before >= -(-size_bytes // 4096)


def test_nothing_is_nothing() -> None:
    touch_and_free(0)
