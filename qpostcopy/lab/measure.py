"""What a migration cost the guest, told from the guest's own reports. Pure.

The definitions are the operator contract's:

- `work_lost_ms`: the sum over time of (1 - speed / baseline), from the start of
  the migration until the speed is back at 95% of the baseline.
- `late_ms`: the time during which requests were overdue by the guest's clock,
  plus the time the guest stood still by ours.

A report tells how far the guest was at a moment of our clock; between two
reports we interpolate. All times are seconds of `time.monotonic()`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from qpostcopy.lab.guest import GuestError, Report
from qpostcopy.qmp.schema import Model

_RECOVERED_SHARE = 0.95
#: The speed is back when it holds for this long, beginning with its first fifth.
_RECOVERED_SECONDS = 0.5
_STEP_SECONDS = 0.02


class GuestCost(Model):
    """`guest` of the result object.

    :ivar late_ms: None where requests fall due at no rate, and none can be late.
    """

    workload: str
    work_lost_ms: float
    late_ms: float | None
    corrupt_pages: int
    baseline_ops_per_second: float


class Measurement:
    """The reports of one run, to be asked about stretches of it.

    :param reports: in order of time; at least two.
    :raise GuestError: there are fewer, or the guest went back: its memory is
        older than what it had already said.
    """

    def __init__(self, reports: Sequence[Report]) -> None:
        if len(reports) < 2:
            raise GuestError("the guest did not report often enough to measure anything")
        for before, after in pairwise(reports):
            if after.sequence <= before.sequence or after.operations < before.operations:
                raise GuestError(
                    f"the guest went back: after report {before.sequence} "
                    f"({before.operations} operations) came {after.sequence} ({after.operations})"
                )
        self._reports = reports
        self._times = [report.host_s for report in reports]

    def operations_at(self, host_s: float) -> float:
        """Operations done by a moment; before the first and after the last report, theirs."""
        return self._at(host_s, lambda report: report.operations)

    def speed(self, from_s: float, to_s: float) -> float:
        """Operations a second."""
        return (self.operations_at(to_s) - self.operations_at(from_s)) / (to_s - from_s)

    def stood_still_ms(self, from_s: float, to_s: float) -> float:
        """By how much the guest's clock fell behind ours; both moments lie within the reports."""
        guest_us = self._grown(from_s, to_s, lambda report: report.guest_us)
        return max(0.0, (to_s - from_s) * 1e3 - guest_us / 1e3)

    def late_ms(self, from_s: float, to_s: float) -> float:
        """Lateness by the guest's clock, plus the time it stood still by ours."""
        late_us = self._grown(from_s, to_s, lambda report: report.late_us)
        return late_us / 1e3 + self.stood_still_ms(from_s, to_s)

    def recovered_s(self, resumed_s: float, baseline: float) -> float:
        """When the speed is back, not before the guest resumed; the last report if it is not."""
        moment, last_s = resumed_s, self._times[-1]
        while moment + _RECOVERED_SECONDS <= last_s:
            spans = (_RECOVERED_SECONDS / 5, _RECOVERED_SECONDS)
            if all(self.speed(moment, moment + s) >= _RECOVERED_SHARE * baseline for s in spans):
                return moment
            moment += _STEP_SECONDS
        return last_s

    def work_lost_ms(self, started_s: float, resumed_s: float, baseline: float) -> float:
        """Full-speed work lost from the start of the migration until the speed is back."""
        until_s = self.recovered_s(resumed_s, baseline)
        done = self.operations_at(until_s) - self.operations_at(started_s)
        # The integral of (1 - speed / baseline) over time.
        return ((until_s - started_s) - done / baseline) * 1e3

    def _grown(self, from_s: float, to_s: float, of: Callable[[Report], int]) -> float:
        return self._at(to_s, of) - self._at(from_s, of)

    def _at(self, host_s: float, of: Callable[[Report], int]) -> float:
        """A counter at a moment, interpolated between the reports around it."""
        index = bisect_right(self._times, host_s)
        if index in (0, len(self._times)):
            return of(self._reports[max(0, index - 1)])
        before, after = self._reports[index - 1], self._reports[index]
        # Strictly later than `before`, by bisect_right.
        share = (host_s - before.host_s) / (after.host_s - before.host_s)
        return of(before) + share * (of(after) - of(before))
