"""Which part of a step takes how long on the host: calls are timed where they are, without a profiler."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

LOG_EVERY = 10  # steps of a group, of which one is a log step
WARM_GROUPS = 5  # that are not looked at
NETWORK = ("forward", "backward")  # the parts that are not counted


class Stopwatch:
    """Seconds by part. What a part calls that is a part too is counted there alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # seconds of the parts within the one that runs, and so on outwards

    def times(self, owner: Any, name: str, part: str) -> None:
        """From now on calls of `owner.name` belong to `part`."""
        act = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            self._inner.append(0.0)
            began = time.thread_time()
            try:
                return act(*arguments, **named)
            finally:
                spent = time.thread_time() - began
                self.seconds[part] += spent - self._inner.pop()
                self._inner[-1] += spent

        setattr(owner, name, timed)


class Groups:
    """Seconds of each part in each group of LOG_EVERY steps."""

    def __init__(self, watch: Stopwatch):
        self.watch, self.found = watch, []
        self._last: dict[str, float] = {}
        self._began = (0.0, 0.0)

    def step(self, number: int) -> None:
        """Step `number` has ended."""
        if number % LOG_EVERY:
            return
        cpu, wall, seconds = time.thread_time(), time.perf_counter(), dict(self.watch.seconds)
        if self._last:
            group = {part: total - self._last.get(part, 0.0) for part, total in seconds.items()}
            group["rest"] = cpu - self._began[0] - sum(group.values())
            group["all"] = cpu - self._began[0] - sum(group.get(part, 0.0) for part in NETWORK)
            self.found.append({**group, "wall": wall - self._began[1]})
        self._last, self._began = seconds, (time.thread_time(), time.perf_counter())

    def microseconds(self) -> dict[str, float]:
        """Of a step, by part, the median over the groups; `rest` belongs to no part, `all` is all but the network and
        `low` its lowest tenth, `wall` is everything on the wall."""
        looked_at = self.found[WARM_GROUPS:]
        medians = {
            part: statistics.median(group.get(part, 0.0) for group in looked_at) for part in set().union(*looked_at)
        }
        medians["low"] = sorted(group["all"] for group in looked_at)[len(looked_at) // 10]
        return {part: round(1e6 * seconds / LOG_EVERY, 1) for part, seconds in medians.items()}
