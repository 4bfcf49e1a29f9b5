"""Turns a hang into a failure that says what was running.

A kernel that never ends, or threads that wait for each other, would hold pytest for good: nothing
in the process can interrupt them. `Watchdog` ends the process instead, after printing what the test
noted last and where every thread is.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from typing import Any, TextIO

EXIT_STATUS = 70


class Watchdog:
    """A context that ends the process if nobody calls `note` for `seconds`.

    Args:
        seconds: without any note that count as a hang.
        out: where the report goes; the file must have a descriptor.
    """

    def __init__(self, seconds: float, out: TextIO):
        self._seconds = seconds
        self._out = out
        self._lock = threading.Lock()
        self._notes: dict[str, str] = {}
        self._last = time.monotonic()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def note(self, what: Any) -> None:
        """Says what the calling thread is about to do."""
        with self._lock:
            self._notes[threading.current_thread().name] = str(what)
            self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(min(0.2, self._seconds / 5)):
            with self._lock:
                if time.monotonic() - self._last < self._seconds:
                    continue
                print(f"\nHANG: no progress for {self._seconds:g} s; last notes:", file=self._out)
                for thread, what in self._notes.items():
                    print(f"  {thread}: {what}", file=self._out)
                self._out.flush()
                faulthandler.dump_traceback(self._out, all_threads=True)
                os._exit(EXIT_STATUS)
