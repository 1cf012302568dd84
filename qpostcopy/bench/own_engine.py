"""Our own engine, used as an operator would: a plan, and the command `qpostcopy migrate`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from qpostcopy.bench.engine import Faults, Moved, NotMovedError, Pair
from qpostcopy.bench.usage import MigrationUsage
from qpostcopy.lab.operator import Message, run_migrate
from qpostcopy.report import Result


@dataclass(frozen=True, slots=True)
class OwnEngine:
    """:ivar precopy: `precopy.mode` of the plan."""

    precopy: str = "never"
    shared_ram: bool = True

    def prepare(self, pair: Pair) -> None:
        """Nothing: all that `migrate` does is timed."""

    def move(self, pair: Pair) -> Moved:
        run_directory = pair.directory / "run"
        plan = pair.directory / "plan.yaml"
        plan.write_text(yaml.safe_dump(self._plan(pair), sort_keys=False))
        usage = MigrationUsage(run_directory)
        heard: list[Message] = []

        def take(message: Message) -> None:
            heard.append(message)
            usage.look()

        migrated = run_migrate(plan, run_directory, take, pair.environment, usage.started)
        ended_s = time.monotonic()
        processes = usage.collect(migrated.rusage)
        result = _result_of(heard, migrated.status)
        return Moved(ended_s, _placed_s(heard), _faults(result), processes)

    def _plan(self, pair: Pair) -> dict[str, object]:
        return {
            "version": 1,
            "name": "bench",
            # Kept: what the source QEMU used is asked of it afterwards.
            "source": {**_side(pair.source.qmp_path, pair.ends.source.netns), "after": "keep"},
            "destination": _side(pair.destination.qmp_path, pair.ends.destination.netns),
            "lanes": {"listen": pair.ends.destination.address, "insecure": True},
            "precopy": {"mode": self.precopy},
        }


def _side(qmp: Path, netns: str) -> dict[str, object]:
    return {"qmp": str(qmp), "netns": netns}


def _result_of(heard: Sequence[Message], status: int) -> Result:
    """:raise NotMovedError: the migration did not complete."""
    last = heard[-1] if heard else {}
    if last.get("type") != "result":
        raise NotMovedError(f"`qpostcopy migrate` ended with {status} and without a result")
    if status != 0:
        error = last.get("error") or {}
        raise NotMovedError(f"{last['status']}: {error.get('message', 'no reason was given')}")
    return Result.model_validate({k: last[k] for k in Result.model_fields if k in last})


def _placed_s(heard: Sequence[Message]) -> float:
    """Phase `complete` begins once every page is placed."""
    return next(
        float(message["ts"])
        for message in heard
        if message["type"] == "phase" and message["phase"] == "complete"
    )


def _faults(result: Result) -> Faults:
    faults = result.faults
    quantiles = {"p50": faults.p50_us, "p90": faults.p90_us, "p99": faults.p99_us}
    if not faults.count:
        return Faults(0, None)
    return Faults(faults.count, mean_us(faults.histogram), quantiles, faults.histogram)


def mean_us(histogram: Sequence[tuple[float, int]]) -> float | None:
    """Each fault counted at the middle of its bucket; None without faults."""
    count = sum(faults for _, faults in histogram)
    total = sum((upper_us - _width_us(upper_us) / 2) * faults for upper_us, faults in histogram)
    return total / count if count else None


def _width_us(upper_us: float) -> float:
    """Eight buckets to a power of two, none narrower than 1 us (core/handler.c)."""
    return max(1.0, 2.0 ** (math.ceil(math.log2(upper_us)) - 4))
