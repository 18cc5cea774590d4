"""What a run prints may lose its reader, as with `| tee` at Ctrl-C or a closed terminal; the run must not end of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Deaf:
    """A text stream like the one given, on which a failed write is no error: what cannot be written is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """From now on into nothing; also what Python itself writes at its end, which would change the exit code."""
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Within it, nothing that is printed can fail."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Deaf, streams)
    try:
        yield
    finally:
        for deaf in (sys.stdout, sys.stderr):
            deaf.flush()
        sys.stdout, sys.stderr = streams
