"""One way to show that something moves on: a bar in a terminal or notebook, now and then a line in a log."""

import html
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Protocol, TextIO

from tqdm import tqdm

ProgressFn = Callable[[int, int, str], None]
"""``(done, total, text)``: what long functions report to; a :class:`Progress` is one."""
MAX_WIDTH = 119


class Progress:
    """Progress of one stage after the other; call it with what is done.

    In a terminal it is one bar that rewrites itself, in a notebook one cell output that does; elsewhere a line every
    ``interval`` seconds and one at the end, so that logs stay short.

    Args:
        title: Name of the stage; :meth:`stage` changes it.
        unit: What is counted.
        enabled: False shows nothing (further processes of a distributed run).
        leave: Keep the finished bar on the screen. One that is not kept belongs to something with lines of its own:
            outside a terminal it prints nothing at its end, and its clock is left out.
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
        self._display: _Display | None = None
        self._ended = False
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int, text: str = "") -> None:
        """Shows that ``done`` of ``total`` are finished, with a short text; ends the display when all are."""
        if not self.enabled or (self._ended and done >= total):
            return
        self._ended = done >= total
        if self._display is None:
            self._display = self._open()
        if self._display is not None:
            self._display.draw(done, total, text)
            if self._ended:
                self.close()
        elif (self._ended and self.leave) or time.monotonic() - self._last_line > self.interval:
            self.said_something()
            line = f"  {self.title} {done}/{total} {self.unit}"
            print(f"{line}  {text}".rstrip(), file=self.stream, flush=True)

    def stage(self, title: str, unit: str) -> None:
        """Goes on with another stage, on the same line of the screen."""
        if (title, unit) != (self.title, self.unit):
            self.close()
            self.title, self.unit, self._ended = title, unit, False

    def said_something(self) -> None:
        """Another line was printed, so that a log needs none for a while."""
        self._last_line = time.monotonic()

    def close(self) -> None:
        """Ends the display."""
        if self._display is not None:
            self._display.close()
            self._display = None

    def _open(self) -> "_Display | None":
        if self.stream.isatty():
            return _TerminalBar(self)
        return _NotebookBar(self) if in_notebook() else None


class _Display(Protocol):
    """Shows the present state in place of the last."""

    def draw(self, done: int, total: int, text: str) -> None:
        """Shows ``done`` of ``total`` and a text."""

    def close(self) -> None:
        """Ends it, and removes it unless it is to be left."""


class _TerminalBar:
    """A bar of tqdm, as wide as the terminal at its beginning: a wider one would break into several lines."""

    def __init__(self, owner: Progress) -> None:
        self._owner = owner
        self._bar: tqdm | None = None

    def draw(self, done: int, total: int, text: str) -> None:
        owner = self._owner
        if self._bar is None or self._bar.total != total:
            self.close()
            clock = " [{elapsed}<{remaining}]" if owner.leave else ""
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=f"  {owner.title}",
                unit=owner.unit,
                leave=owner.leave,
                file=owner.stream,
                ncols=_width(owner.stream),
                miniters=1,
                postfix=[text],
                bar_format=f"{{desc}} {{n_fmt}}/{{total_fmt}} {{unit}} |{{bar:10}}|{clock} {{postfix[0]}}",
            )
        self._bar.postfix[0] = text
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _NotebookBar:
    """A cell output that is updated."""

    _SECONDS_BETWEEN = 0.5

    def __init__(self, owner: Progress) -> None:
        ipython = import_module("IPython.display")
        self._owner, self._html = owner, ipython.HTML
        self._handle = ipython.display(ipython.HTML(""), display_id=True)
        self._content, self._drawn_at = "", -self._SECONDS_BETWEEN

    def draw(self, done: int, total: int, text: str) -> None:
        owner = self._owner
        self._content = (
            f"<div><progress value='{done}' max='{total}' style='vertical-align: middle'></progress> "
            f"{html.escape(f'{owner.title} {done}/{total} {owner.unit}  {text}')}</div>"
        )
        if time.monotonic() - self._drawn_at >= self._SECONDS_BETWEEN:
            self._handle.update(self._html(self._content))
            self._drawn_at = time.monotonic()

    def close(self) -> None:
        self._handle.update(self._html(self._content if self._owner.leave else ""))


class LogHandler(logging.Handler):
    """Prints log records to standard error without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one record."""
        tqdm.write(f"{record.levelname.lower()}: {self.format(record)}", file=sys.stderr)


def log_beside_progress() -> None:
    """Lets pi_rl's own log records take the way of :class:`LogHandler`; further calls change nothing."""
    logger = logging.getLogger("pi_rl")
    if not any(isinstance(handler, LogHandler) for handler in logger.handlers):
        logger.addHandler(LogHandler())


def say(text: str = "", *, enabled: bool = True) -> None:
    """Prints a line without tearing a progress bar apart."""
    if enabled:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "IPython" in sys.modules and hasattr(import_module("IPython").get_ipython(), "kernel")


def _width(stream: TextIO) -> int:
    """Columns that a bar may fill; the last one stays free, where some terminals already break."""
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return min(columns or shutil.get_terminal_size().columns, MAX_WIDTH) - 1
