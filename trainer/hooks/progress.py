"""What a person sees while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import sys
from collections import deque
from typing import Any

from pydantic import PrivateAttr

from trainer.hook import MainHook, RunView


class Progress(MainHook):
    """Step, loss, lr, images/s over all ranks, share of time waiting for data, peak memory, time to go."""

    _seconds: deque[float] = PrivateAttr(default_factory=lambda: deque(maxlen=200))
    _bar: Any = PrivateAttr(None)

    def due(self, step: int, last: bool) -> bool:
        return self._bar is not None

    def on_start(self, view: RunView) -> None:
        if sys.stdout.isatty():
            from tqdm import tqdm

            layout = "step {n_fmt}/{total_fmt} |{bar:24}| {postfix}"
            self._bar = tqdm(total=view.max_steps, initial=view.step, bar_format=layout, file=sys.stdout)

    def on_metrics(self, view: RunView, lines: list[dict[str, Any]]) -> None:
        self._seconds.extend(line["timing"]["step_seconds"] for line in lines)
        newest, timing = lines[-1], lines[-1]["timing"]
        waited = sum(line["timing"]["data_wait_seconds"] for line in lines)
        spent = sum(line["timing"]["step_seconds"] for line in lines)
        to_go = statistics.median(self._seconds) * (view.max_steps - view.step)
        facts = [
            f"loss {newest['loss']:.4f}",
            f"lr {newest['lr']:.3g}",
            f"{timing['images_per_second']:.4g} img/s",
            f"data {waited / spent:.0%}",
            f"mem {timing['peak_memory_bytes'] / 2**30:.1f} GiB",
            f"{duration(to_go)} to go",
        ]
        if "validation_loss" in newest:
            facts.insert(1, f"held out {newest['validation_loss']:.4f}")
        if self._bar is None:
            print(f"step {newest['step']}/{view.max_steps}  " + "  ".join(facts), flush=True)
        else:
            self._bar.set_postfix_str(" ".join(facts), refresh=False)
        if skipped := sum(line["skipped"] for line in lines):
            self._say(
                f"warning: {skipped} of the last {len(lines)} steps had a non-finite gradient and changed nothing"
            )

    def after_step(self, view: RunView, last: bool) -> None:
        self._bar.update(view.step - self._bar.n)

    def on_end(self, view: RunView, state: str, exit_code: int, reason: str) -> None:
        if self._bar is not None:
            self._bar.close()

    def _say(self, line: str) -> None:
        print(line, flush=True) if self._bar is None else self._bar.write(line)


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m 20s or 5h 02m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
