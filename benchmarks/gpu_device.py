"""The device that is measured: when its steps ended, what they held of its memory, how fast its clock ran meanwhile."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
SAMPLE_MILLISECONDS = 100


class Marks:
    """The ends of steps: on the device's own clock where it has one, and on the host's."""

    def __init__(self, device: torch.device):
        self.device = device
        self.host: list[float] = []
        self.events: list[Any] = []

    def add(self) -> None:
        """A step ends here: what is queued on the device up to now belongs to it. Waits for nothing."""
        self.host.append(time.perf_counter())
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(event)

    def gaps(self) -> tuple[list[float], list[float]]:
        """Milliseconds from each mark to the next: on the device, and on the host. Waits for the device."""
        host = [1000 * (later - earlier) for earlier, later in zip(self.host, self.host[1:], strict=False)]
        if not self.events:
            return host, host
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False)], host


def wait_for(device: torch.device) -> None:
    """Until all that was queued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device: torch.device) -> None:
    """Hand back what nobody holds any more, so that the next row begins with an empty device."""
    import gc

    gc.unfreeze()  # a run freezes what exists as it begins: its networks would never be collected
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def forget_peak(device: torch.device) -> None:
    """From now on `peak` is that of what follows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> dict[str, float]:
    """GB that tensors held at most, and GB that were reserved for them; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_gb": round(allocated / 1e9, 2), "reserved_gb": round(reserved / 1e9, 2)}


def spread(milliseconds: list[float]) -> dict[str, float]:
    """Median and range of steps, rounded to microseconds."""
    values = {"ms": statistics.median(milliseconds), "ms_low": min(milliseconds), "ms_high": max(milliseconds)}
    return {name: round(value, 3) for name, value in values.items()}


class Telemetry:
    """What nvidia-smi says while rows are measured, from a process of its own; says nothing without nvidia-smi."""

    def __init__(self, device: torch.device):
        self.device = device
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "telemetry.csv"
        self._process: subprocess.Popen[bytes] | None = None
        smi = shutil.which("nvidia-smi") if device.type == "cuda" else None
        if smi is not None:
            index = device.index if device.index is not None else torch.cuda.current_device()
            ask = [f"--id={index}", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
            with self._file.open("wb") as out:
                self._process = subprocess.Popen(
                    [smi, *ask, f"--loop-ms={SAMPLE_MILLISECONDS}"], stdout=out, stderr=subprocess.DEVNULL
                )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    @contextlib.contextmanager
    def during(self, row: dict[str, Any]) -> Iterator[None]:
        """Put medians of what was said within into `row`: MHz, W and degrees Celsius."""
        before = self._lines()
        yield
        samples = [line for line in self._lines()[len(before) :] if line.count(",") == QUERY.count(",")]
        columns = zip(*(each.split(",") for each in samples), strict=True)
        for name, values in zip(QUERY.split(","), columns, strict=False):
            with contextlib.suppress(ValueError):  # `[N/A]`, where a card does not say
                row[name.replace(".", "_")] = round(statistics.median(float(value) for value in values), 1)

    def _lines(self) -> list[str]:
        return self._file.read_text().splitlines() if self._file.is_file() else []
