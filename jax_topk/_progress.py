"""Progress of long commands."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any


class Progress:
    """A bar on a terminal if tqdm is there, else a line every few seconds."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, total: int, unit: str, **options: Any):
        """Starts at 0 of `total`; `options` are those of the bar."""
        self._total, self._done = total, 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                tqdm = importlib.import_module("tqdm")
            except ModuleNotFoundError:
                self.say("progress as lines: tqdm is not installed")
            else:
                self._bar = tqdm.tqdm(total=total, unit=unit, leave=False, **options)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def advance(self, added: int, counted: str, latest: str, *, is_last: bool = False) -> None:
        """Counts `added` more.

        Args:
            added: since the call before.
            counted: what a line says of the count; `{done}` and `{total}` are filled in.
            latest: what to say besides.
            is_last: a line is due, however short ago the one before was.
        """
        self._done += added
        if self._bar is not None:
            self._bar.set_postfix_str(latest, refresh=False)
            self._bar.update(added)
            return
        now = time.monotonic()
        if now - self._last_line > self.SECONDS_BETWEEN_LINES or is_last:
            self._last_line = now
            count = counted.format(done=self._done, total=self._total)
            self.say(f"[{count}, {now - self._start:.0f} s] {latest}")

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
