"""Ends the process where a batch hangs, after saying what it was doing and how to do it again."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

__all__ = ["EXIT_STATUS", "Watchdog"]

EXIT_STATUS = 2


class Watchdog:
    """A thread that looks at a deadline.

    A hanging kernel cannot be interrupted, and Python's own exit would wait for it; so the process
    ends by `os._exit` with status 2.
    """

    def __init__(self, seconds: float):
        """Starts the thread.

        Args:
            seconds: how long a guarded block may take.
        """
        self.seconds = seconds
        self._deadline: float | None = None
        self._describe: Callable[[], str] = lambda: ""
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._watch, name="fuzz watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def guard(self, describe: Callable[[], str]) -> Iterator[None]:
        """Ends the process if the block takes too long.

        Args:
            describe: says what the block is doing, when it hangs; may not touch a device.
        """
        with self._changed:
            self._describe = describe
            self._deadline = time.monotonic() + self.seconds
            self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._deadline = None

    def close(self) -> None:
        """Stops the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._is_closed:
                if self._deadline is None:
                    self._changed.wait(timeout=self.seconds)
                    continue
                remaining = self._deadline - time.monotonic()
                if remaining > 0:
                    self._changed.wait(timeout=remaining)
                    continue
                print(f"\nHANG: nothing came back in {self.seconds:g} s.", file=sys.stderr)
                print(self._describe(), file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(EXIT_STATUS)
