"""The schedule against a model that looks at every single page."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qpostcopy.config import Profile, RangeStep, SequentialStep, Step, TraceStep
from qpostcopy.errors import ExitCode
from qpostcopy.source.schedule import Extent, ScheduleError, compile_schedule
from qpostcopy.trace import PAGE_BITS, Trace, TracedBlock, encode

PAGE = 4096


@dataclass(frozen=True)
class Block:
    name: str
    size_bytes: int


def compiled(profile: Profile, blocks: Sequence[Block]) -> list[Extent]:
    return list(compile_schedule(profile, blocks))


def vm(*pages: int) -> list[Block]:
    return [Block(f"ram{index}", count * PAGE) for index, count in enumerate(pages)]


def pages(start: int, end: int | None, block: str | None = None) -> RangeStep:
    end_offset = None if end is None else end * PAGE
    return RangeStep(block=block, start_offset=start * PAGE, end_offset=end_offset)


def profile(*steps: Step) -> Profile:
    return Profile(name="p", push=steps)


# --- by hand --------------------------------------------------------------------------------


def test_no_steps_is_address_order() -> None:
    assert compiled(profile(), vm(3, 5)) == [Extent(0, 0, 3), Extent(1, 0, 5)]


def test_the_first_step_that_names_a_page_wins() -> None:
    order = compiled(profile(pages(4, 6), pages(2, 8)), vm(10))
    assert order == [Extent(0, 4, 2), Extent(0, 2, 2), Extent(0, 6, 2), Extent(0, 0, 2), (0, 8, 2)]


def test_offsets_count_through_all_blocks() -> None:
    order = compiled(profile(pages(2, 5)), vm(3, 1, 4))
    assert order == [(0, 2, 1), (1, 0, 1), (2, 0, 1), (0, 0, 2), (2, 1, 3)]


def test_offsets_in_a_block_count_from_its_start() -> None:
    order = compiled(profile(pages(1, 3, "ram1")), vm(3, 4))
    assert order == [(1, 1, 2), (0, 0, 3), (1, 0, 1), (1, 3, 1)]


def test_an_end_beyond_ram_is_cut_off() -> None:
    assert compiled(profile(pages(1, 1000)), vm(3)) == [(0, 1, 2), (0, 0, 1)]
    assert compiled(profile(pages(1, 9, "ram0")), vm(3, 2)) == [
        (0, 1, 2),
        (0, 0, 1),
        (1, 0, 2),
    ]


def test_a_range_without_an_end_goes_to_the_end() -> None:
    assert compiled(profile(pages(2, None)), vm(2, 2)) == [(1, 0, 2), (0, 0, 2)]
    assert compiled(profile(pages(0, None, "ram1")), vm(2, 2)) == [(1, 0, 2), (0, 0, 2)]


def test_neighbours_are_merged() -> None:
    steps = profile(pages(0, 1), pages(1, 2), pages(0, 4), SequentialStep())
    assert compiled(steps, vm(8)) == [Extent(0, 0, 8)]


def test_steps_after_sequential_find_nothing_left() -> None:
    assert compiled(profile(SequentialStep(), pages(3, 4)), vm(8)) == [(0, 0, 8)]


def test_no_ram_at_all() -> None:
    assert compiled(profile(SequentialStep()), []) == []


@pytest.mark.parametrize(
    ("step", "message", "remedy"),
    [
        (
            pages(0, 1, "ram7"),
            'profile "p": push[1].range.block: "ram7" is no RAM block of this VM,'
            " which has ram0 (8KiB), ram1 (1MiB)",
            "name one of these blocks, or leave `block` out to count through all of them",
        ),
        (
            pages(258, None),
            'profile "p": push[1].range.start: 1032KiB is beyond the end of RAM, 1032KiB;'
            " this VM has ram0 (8KiB), ram1 (1MiB)",
            "choose another profile, or take the step out of this one",
        ),
        (
            pages(2, 3, "ram0"),
            'profile "p": push[1].range.start: 8KiB is beyond the end of block "ram0", 8KiB;'
            " this VM has ram0 (8KiB), ram1 (1MiB)",
            "choose another profile, or take the step out of this one",
        ),
    ],
)
def test_ram_that_is_not_there(step: Step, message: str, remedy: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        compiled(profile(SequentialStep(), step), vm(2, 256))
    assert str(caught.value) == message
    assert caught.value.remedy == remedy
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("size_bytes", [0, -4096, 4095, 4097])
def test_a_block_of_broken_pages(size_bytes: int) -> None:
    with pytest.raises(ScheduleError, match="expected whole 4KiB pages"):
        compiled(profile(), [Block("ram0", size_bytes)])


# --- traces ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


def traced(folder: Path, faults: Sequence[tuple[int, int]], blocks: Sequence[Block]) -> TraceStep:
    """The step of a trace of these (block, page); each file is another."""
    path = folder / f"{sum(1 for _ in folder.iterdir())}.trace"
    locations = [block << PAGE_BITS | page for block, page in faults]
    table = tuple(TracedBlock(block.name, block.size_bytes) for block in blocks)
    path.write_bytes(encode(Trace(table, locations, range(len(locations)))))
    return TraceStep(file=path)


def test_the_order_of_a_trace(folder: Path) -> None:
    """Each page where it came first; neighbours in a row are one extent."""
    faults = [(1, 2), (0, 5), (0, 6), (1, 2), (0, 4), (0, 5), (1, 0)]
    order = compiled(profile(traced(folder, faults, vm(8, 4))), vm(8, 4))
    rest = [(0, 0, 4), (0, 7, 1), (1, 1, 1), (1, 3, 1)]
    assert order == [(1, 2, 1), (0, 5, 2), (0, 4, 1), (1, 0, 1), *rest]


def test_a_trace_among_other_steps(folder: Path) -> None:
    step = traced(folder, [(0, 9), (0, 3), (0, 2)], vm(10))
    assert compiled(profile(pages(2, 4), step, pages(8, 10)), vm(10)) == [
        (0, 2, 2),
        (0, 9, 1),
        (0, 8, 1),
        (0, 0, 2),
        (0, 4, 4),
    ]


def test_neighbours_across_blocks_are_not_joined(folder: Path) -> None:
    step = traced(folder, [(0, 2), (1, 0), (1, 1)], vm(3, 3))
    assert compiled(profile(step), vm(3, 3)) == [(0, 2, 1), (1, 0, 2), (0, 0, 2), (1, 2, 1)]


def test_the_blocks_of_a_trace_go_by_name(folder: Path) -> None:
    """Its table may have them in another order than this VM has."""
    here = [Block("low", 4 * PAGE), Block("high", 2 * PAGE)]
    step = traced(folder, [(0, 1), (1, 3)], list(reversed(here)))
    assert compiled(profile(step), here) == [(1, 1, 1), (0, 3, 1), (0, 0, 3), (1, 0, 1)]


@pytest.mark.parametrize(
    "there", [vm(8, 5), vm(8), vm(8, 4, 1), [Block("x", 8 * PAGE), *vm(8, 4)[1:]]]
)
def test_a_trace_of_another_vm(folder: Path, there: list[Block]) -> None:
    step = traced(folder, [(0, 1)], vm(8, 4))
    with pytest.raises(ScheduleError, match="is a trace of another VM, with ram0 ") as caught:
        compiled(profile(SequentialStep(), step), there)
    assert str(caught.value).startswith(f'profile "p": push[1].trace.file: {step.file}: ')
    assert "leaves a trace of it" in str(caught.value.remedy)
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_error_names_where_the_step_was_written(folder: Path) -> None:
    step = TraceStep(file=folder / "none", named_in="web.yaml:5: push[0].trace.file")
    with pytest.raises(
        ScheduleError, match=r"^web\.yaml:5: push\[0\]\.trace\.file: .*no such file"
    ):
        compiled(profile(step), vm(4))


def test_many_faults_in_a_tebibyte_take_seconds(folder: Path) -> None:
    """Not minutes: nothing is done for each page of RAM, and no list is searched for each fault."""
    blocks = vm((1 << 27), (1 << 27))
    chance = random.Random(1)
    faults = [(chance.getrandbits(1), chance.getrandbits(27)) for _ in range(1 << 18)]
    steps = profile(pages(0, 1000), traced(folder, faults, blocks), pages(7, 1 << 20))
    began = process_time()
    schedule = compile_schedule(steps, blocks)
    assert process_time() - began < 5  # a million: 5 s here, all cores shared
    assert sum(schedule.table[2::3]) == 1 << 28
    assert len(schedule) > 1 << 18


# --- against the naive model ----------------------------------------------------------------


#: A list stands for the step of a trace with these faults.
Drawn = Step | list[tuple[int, int]]


def naive(steps: tuple[Drawn, ...], sizes: list[int]) -> list[tuple[int, int]]:
    """Every page (block, page) in order, one by one; sizes in pages."""
    everything = [(block, page) for block, size in enumerate(sizes) for page in range(size)]
    order: dict[tuple[int, int], None] = {}
    for step in [*steps, SequentialStep()]:
        named = step if isinstance(step, list) else everything
        if isinstance(step, RangeStep):
            if step.block is not None:
                named = [page for page in everything if f"ram{page[0]}" == step.block]
            end = None if step.end_offset is None else step.end_offset // PAGE
            named = named[step.start_offset // PAGE : end]
        order.update(dict.fromkeys(named))
    return list(order)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Drawn, ...], list[int]]:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    page = st.integers(0, len(sizes) - 1).flatmap(
        lambda block: st.tuples(st.just(block), st.integers(0, sizes[block] - 1))
    )
    steps: list[Drawn] = []
    for _ in range(draw(st.integers(0, 12))):
        if draw(st.integers(0, 2)) == 0:
            steps.append(draw(st.lists(page, max_size=30)))
            continue
        block = draw(st.none() | st.integers(0, len(sizes) - 1))
        limit = sum(sizes) if block is None else sizes[block]
        start = draw(st.integers(0, limit - 1))
        end = draw(st.none() | st.integers(start + 1, limit + 5))
        name = None if block is None else f"ram{block}"
        steps.append(SequentialStep() if draw(st.integers(0, 9)) == 0 else pages(start, end, name))
    return tuple(steps), sizes


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases())
def test_as_the_naive_model(folder: Path, case: tuple[tuple[Drawn, ...], list[int]]) -> None:
    """So every page is in it once, whatever a trace says."""
    steps, sizes = case
    blocks = vm(*sizes)
    made = [traced(folder, step, blocks) if isinstance(step, list) else step for step in steps]
    extents = compiled(profile(*made), blocks)
    for path in folder.iterdir():
        path.unlink()
    flat = [(e.block, e.first_page + index) for e in extents for index in range(e.page_count)]
    assert flat == naive(steps, sizes)
    for one, next_one in pairwise(extents):
        assert one.page_count > 0
        touching = one.block == next_one.block
        assert not (touching and one.first_page + one.page_count == next_one.first_page)


@given(data=st.data())
def test_every_page_of_a_huge_vm_once(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 1 << 28), min_size=1, max_size=6))
    total = sum(sizes)
    starts = data.draw(st.lists(st.integers(0, total - 1), max_size=30))
    steps = [pages(start, start + data.draw(st.integers(1, total))) for start in starts]
    extents = compiled(profile(*steps), vm(*sizes))
    for block, size in enumerate(sizes):
        mine = sorted(extent for extent in extents if extent.block == block)
        position = 0
        for extent in mine:
            assert extent.first_page == position
            position += extent.page_count
        assert position == size


def test_many_steps_over_a_tebibyte_take_no_time() -> None:
    """Interval arithmetic: 5,000 scattered ranges in 1 TiB, far below a second for each 1,000."""
    tebibyte = (1 << 40) // PAGE
    steps = [pages(start := (7919 * n * 4097) % tebibyte, start + 3) for n in range(5000)]
    began = perf_counter()
    extents = compiled(profile(*steps), vm(tebibyte // 2, tebibyte // 2))
    assert perf_counter() - began < 5
    assert sum(extent.page_count for extent in extents) == tebibyte
    assert len(extents) > 5000
