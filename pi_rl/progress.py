"""One way to show that a long stage moves on: a bar in a terminal, now and then a line in a log."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

ProgressFn = Callable[[int, int, str], None]
"""``(done, total, text)``: what long functions report to; a :class:`Progress` is one."""


class Progress:
    """Progress of one stage; call it with what is done.

    In a terminal it is a bar that rewrites itself; elsewhere a line every ``interval`` seconds and one at the end, so
    that logs stay short.

    Args:
        title: Name of the stage.
        unit: What is counted.
        enabled: False shows nothing (further processes of a distributed run).
        leave: Keep the finished bar on the screen; a bar that is not kept shows nothing outside a terminal.
        interval: Seconds between lines outside a terminal.
        stream: Where to write; standard error by default, as other progress bars.
    """

    def __init__(
        self,
        title: str,
        unit: str = "",
        *,
        enabled: bool = True,
        leave: bool = True,
        interval: float = 15.0,
        stream: TextIO | None = None,
    ) -> None:
        self.title, self.unit, self.enabled, self.leave, self.interval = title, unit, enabled, leave, interval
        self.stream = stream or sys.stderr
        self._bar: tqdm | None = None
        self._ended = False
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Shows that ``done`` of ``total`` are finished, with a short text; ends the display when all are."""
        if not self.enabled or (self._ended and done >= total):
            return
        self._ended = done >= total
        if self.stream.isatty():
            self._draw(done, total, text)
        elif self.leave and (done >= total or time.monotonic() - self._last_line > self.interval):
            self._last_line = time.monotonic()
            print(f"  {self.title} {done}/{total} {self.unit} {text}".rstrip(), file=self.stream, flush=True)

    def _draw(self, done: int, total: int, text: str) -> None:
        if self._bar is None or self._bar.total != total:
            self.close()
            self._bar = tqdm(
                total=total, desc=f"  {self.title}", unit=self.unit, leave=self.leave, file=self.stream, ncols=100
            )
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Ends the display."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def say(text: str = "", *, enabled: bool = True) -> None:
    """Prints a line without tearing a progress bar apart."""
    if enabled:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
