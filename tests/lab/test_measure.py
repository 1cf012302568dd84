"""The cost of a migration, from reports that were made up so that it is known."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpostcopy.lab.guest import GuestError, Report
from qpostcopy.lab.measure import Measurement

RATE = 1000
STEP_S = 0.02


def reports(*stretches: tuple[float, float], guest_stops_at: int | None = None) -> list[Report]:
    """Stretches of (seconds, share of full speed), a report every 20 ms.

    :param guest_stops_at: index of a stretch in which the guest's clock stands.
    """
    found = [Report(0, 0.0, 0, 1, 0, 0, 0)]
    operations = guest_s = host_s = 0.0
    for index, (seconds, share) in enumerate(stretches):
        for _ in range(round(seconds / STEP_S)):
            host_s += STEP_S
            guest_s += 0 if index == guest_stops_at else STEP_S
            operations += STEP_S * RATE * share
            last = found[-1]
            found.append(
                Report(0, host_s, round(guest_s * 1e6), last.sequence + 1, round(operations), 0, 0)
            )
    return found


def test_speed_is_operations_over_our_time() -> None:
    measurement = Measurement(reports((1, 1.0), (1, 0.5)))
    assert measurement.speed(0, 1) == pytest.approx(RATE)
    assert measurement.speed(1, 2) == pytest.approx(RATE / 2)
    assert measurement.speed(0.5, 1.5) == pytest.approx(RATE * 0.75)


def test_between_two_reports_we_interpolate() -> None:
    measurement = Measurement([Report(0, 1.0, 0, 1, 100, 0, 0), Report(0, 2.0, 0, 2, 200, 0, 0)])
    assert measurement.operations_at(1.25) == pytest.approx(125)
    assert measurement.operations_at(0.5) == 100
    assert measurement.operations_at(9.0) == 200


def test_no_disturbance_loses_nothing() -> None:
    measurement = Measurement(reports((4, 1.0)))
    assert measurement.work_lost_ms(1, 2, RATE) == pytest.approx(0, abs=1)
    assert measurement.late_ms(1, 3) == pytest.approx(0, abs=1)


def test_work_lost_is_the_sum_of_what_is_missing() -> None:
    # 200 ms at nothing, 500 ms at half speed: 450 ms of full-speed work.
    measurement = Measurement(reports((1, 1.0), (0.2, 0.0), (0.5, 0.5), (2, 1.0)))
    assert measurement.work_lost_ms(1.0, 1.2, RATE) == pytest.approx(450, abs=15)


def test_work_that_is_caught_up_later_stays_lost() -> None:
    measurement = Measurement(reports((1, 1.0), (0.2, 0.0), (0.5, 2.0), (2, 1.0)))
    assert measurement.work_lost_ms(1.0, 1.2, RATE) == pytest.approx(200, abs=15)


def test_a_short_burst_is_no_recovery() -> None:
    measurement = Measurement(reports((1, 1.0), (0.1, 1.0), (1, 0.2), (2, 1.0)))
    assert measurement.recovered_s(1.0, RATE) == pytest.approx(2.1, abs=0.05)


def test_a_guest_that_never_recovers_is_counted_to_the_end() -> None:
    measurement = Measurement(reports((1, 1.0), (2, 0.5)))
    assert measurement.recovered_s(1.0, RATE) == pytest.approx(3.0)
    assert measurement.work_lost_ms(1.0, 1.0, RATE) == pytest.approx(1000, abs=1)


def test_standing_still_is_told_by_the_two_clocks() -> None:
    measurement = Measurement(reports((1, 1.0), (0.1, 0.0), (1, 1.0), guest_stops_at=1))
    assert measurement.stood_still_ms(0.5, 2.0) == pytest.approx(100, abs=1)


def test_late_is_the_guests_lateness_and_the_time_it_stood() -> None:
    rows = reports((1, 1.0), (0.1, 0.0), (1, 1.0), guest_stops_at=1)
    late = [row._replace(late_us=30_000) if row.host_s > 1.05 else row for row in rows]
    assert Measurement(late).late_ms(0.5, 2.0) == pytest.approx(130, abs=1)


@pytest.mark.parametrize("field", ["sequence", "operations"])
def test_a_guest_that_goes_back_is_found(field: str) -> None:
    rows = reports((0.2, 1.0))
    rows[5] = rows[5]._replace(**{field: getattr(rows[3], field)})
    with pytest.raises(GuestError, match="went back"):
        Measurement(rows)


def test_one_report_is_no_measurement() -> None:
    with pytest.raises(GuestError, match="often enough"):
        Measurement(reports()[:1])


@given(st.lists(st.tuples(st.floats(0.02, 1), st.floats(0, 2)), min_size=1, max_size=6))
def test_operations_never_go_back_in_between(stretches: list[tuple[float, float]]) -> None:
    rows = reports(*stretches, (0.1, 1.0))
    measurement = Measurement(rows)
    moments = [index * rows[-1].host_s / 37 for index in range(38)]
    done = [measurement.operations_at(moment) for moment in moments]
    assert all(before <= after for before, after in pairwise(done))
    assert done[-1] == pytest.approx(rows[-1].operations)
