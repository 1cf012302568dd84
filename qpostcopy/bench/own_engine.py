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
        directory = run_directory(pair.directory)
        plan = pair.directory / "plan.yaml"
        plan.write_text(yaml.safe_dump(self._plan(pair), sort_keys=False))
        usage = MigrationUsage(directory)
        heard: list[Message] = []

        def take(message: Message) -> None:
            heard.append(message)
            usage.look()

        migrated = run_migrate(plan, directory, take, pair.environment, usage.started)
        if migrated.interrupted:
            raise KeyboardInterrupt  # it meant the benchmark, too
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


def run_directory(directory: Path) -> Path:
    """Below which the migration's state directory is made, in a pair's directory."""
    return directory / "run"


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
    for message in heard:
        if message["type"] == "phase" and message["phase"] == "complete":
            return float(message["ts"])
    raise NotMovedError("`qpostcopy migrate` completed and never told of phase `complete`")


def _faults(result: Result) -> Faults:
    faults = result.faults
    quantiles = {"p50": faults.p50_us, "p90": faults.p90_us, "p99": faults.p99_us}
    if not faults.count:
        return Faults(0, None)
    mean = mean_us(faults.histogram)
    return Faults(faults.count, mean, quantiles, faults.histogram, local=faults.local)


def mean_us(histogram: Sequence[tuple[float, int]]) -> float | None:
    """Each fault counted at the middle of its bucket; None without faults."""
    count = sum(faults for _, faults in histogram)
    total = sum((upper_us - _width_us(upper_us) / 2) * faults for upper_us, faults in histogram)
    return total / count if count else None


def _width_us(upper_us: float) -> float:
    """Eight buckets to a power of two, none narrower than 1 us (core/handler.c)."""
    return max(1.0, 2.0 ** (math.ceil(math.log2(upper_us)) - 4))
