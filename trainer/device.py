"""The GPU, or the CPU, that a rank computes on: what it can do, its memory, its generator, and copies to the host."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Device:
    """What of a device does not depend on how many ranks there are."""

    def __init__(self, device: torch.device):
        self.device = device
        self._copy_stream: torch.cuda.Stream | None = None  # for copies of the state
        self._copied: torch.cuda.Event | None = None  # of the newest copy, if steps have not waited for it yet

    @property
    def has_bf16(self) -> bool:
        """Whether the device is a GPU that computes in bf16, and not by way of fp32."""
        return self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def seed_dropout(self, seed: int) -> None:
        """Make layers that draw from the device's own generator (nn.Dropout) depend on `seed` alone."""
        if self.device.type == "cuda":
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
        elif self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every backend there might be: 0.3 ms
        else:
            torch.manual_seed(seed)

    @property
    def queues_steps(self) -> bool:
        """Whether the host runs ahead of its device, which has to have work queued to stay busy."""
        return self.device.type == "cuda"

    def copy_to_host(self, values: Tensor) -> Callable[[], Tensor]:
        """Gives `values` on the host, once they are there: waits for what was queued up to now, for nothing later."""
        if self.device.type != "cuda":
            return lambda: values
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)  # from torch's own store of such memory
        host.copy_(values, non_blocking=True)
        there = torch.cuda.Event()
        there.record()

        def arrived() -> Tensor:
            there.synchronize()
            return host

        return arrived

    @contextlib.contextmanager
    def copies_to_host(self) -> Iterator[Callable[[], None]]:
        """Within it copies to the host are queued on a stream of their own; what it gives waits for them.

        Whoever changes what is copied calls `finish_copies` before.
        """
        if self.device.type != "cuda":
            yield lambda: None
            return
        self._copy_stream = self._copy_stream or torch.cuda.Stream()
        self._copy_stream.wait_stream(torch.cuda.current_stream())
        self._copied = torch.cuda.Event()
        with torch.cuda.stream(self._copy_stream):
            yield self._copied.synchronize
            self._copied.record()

    def finish_copies(self) -> None:
        """Let the device change nothing before the copies are done; the host goes on."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def forget_peak_memory(self) -> None:
        """From now on `memory` has the peak of what follows."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # Linux alone has it
            Path("/proc/self/clear_refs").write_text("5")

    def memory(self) -> dict[str, int]:
        """Bytes that this rank has held at most: of the GPU, with what was reserved, or of the process without one."""
        if self.device.type == "cuda":
            return {
                "peak_memory_bytes": torch.cuda.max_memory_allocated(),
                "reserved_memory_bytes": torch.cuda.max_memory_reserved(),
            }
        with contextlib.suppress(OSError, IndexError, ValueError):  # some sandboxes leave the line out
            text = Path("/proc/self/status").read_text()
            return {"peak_memory_bytes": 1024 * int(text.partition("VmHWM:")[2].split(maxsplit=1)[0])}
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_memory_bytes": peak if sys.platform == "darwin" else 1024 * peak}
