"""A stop that was asked for by a signal: the step is finished, the state saved."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopRequest:
    """True once SIGINT or SIGTERM came; the second one ends the process at once, by the signal's own default."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def __bool__(self) -> bool:
        return self.signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number
        # Written past Python's buffers: a handler may run in the middle of another print.
        os.write(
            2, f"\n{signal.Signals(number).name}: finishing this step, then saving; again to stop at once\n".encode()
        )

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
