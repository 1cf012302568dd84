"""A Linux guest is moved again and again, and looks at every page of its memory.

The destination of one migration is the source of the next. Among them are some
with the handler killed at a random moment after the commit, and some whose
destination is killed before it; then the source runs on, and is moved anew.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.qmp.support import private_directory
from tests.vm.series import Series

pytestmark = [pytest.mark.vm, pytest.mark.root]


@pytest.fixture
def series() -> Iterator[Series]:
    with private_directory() as directory, Series(directory) as made:
        yield made


def play(
    series: Series, kinds: Sequence[Callable[[Series, random.Random], None]], seed: int
) -> None:
    chance = random.Random(seed)
    for turn, kind in enumerate(kinds):
        kind(series, chance)
        if turn % 4 == 3:
            series.verify()
    series.verify()


def test_three_ways_to_move(series: Series) -> None:
    play(series, [Series.plain, Series.handler_killed, Series.destination_killed, Series.plain], 1)


@pytest.mark.slow
def test_more_than_twenty_in_a_row(series: Series) -> None:
    kinds = [
        Series.plain, Series.handler_killed, Series.plain, Series.handler_killed,
        Series.destination_killed,
    ] * 6  # fmt: skip
    moved = Counter(kind is not Series.destination_killed for kind in kinds)[True]
    assert moved >= 20
    play(series, kinds, 2)
