"""The signals that end a run: SIGTERM, SIGINT (Ctrl-C), SIGUSR1; noted while there is a state to save.

For :mod:`pi_rl.trainer.preemption` (RL) and :mod:`pi_rl.trainer.sft`; imports no torch.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

SAVED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h, "try again": the state is saved and the same command goes on. 143 and 130 are what a
shell reports of a process that a signal killed, and would say nothing about that."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
SAME_REQUEST_S = 3.0
"""Within it signals are one request: Ctrl-C in a terminal reaches every process, and a launcher passes it on."""


class Preempted(SystemExit):
    """The run was told to end by a signal other than Ctrl-C and keeps its state; ends the program with code 75.

    Attributes:
        checkpoint: What to resume; None where nothing was complete.
    """

    def __init__(self, message: str, checkpoint: Path | None) -> None:
        super().__init__(SAVED_EXIT_CODE)
        self.message, self.checkpoint = message, checkpoint

    def __str__(self) -> str:
        return self.message


class SavedInterrupt(KeyboardInterrupt):
    """Ctrl-C, after the state was saved.

    Attributes:
        checkpoint: What to resume; None where nothing was complete.
    """

    def __init__(self, message: str, checkpoint: Path | None) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


@contextmanager
def ending_on_signals(*, announce: bool) -> Iterator[None]:
    """Outside of training, ends what runs in the block at a signal, as Ctrl-C does anyway; nothing to save is held.

    While a :class:`StopSignals` block runs in it, that takes the signals. An ignored signal stays ignored. Only the
    main thread can take signals.

    Args:
        announce: Whether this process says that it was told to end.

    Raises:
        Preempted: A SystemExit with code 75, at SIGTERM or SIGUSR1.
    """

    def end(signum: int, frame: FrameType | None) -> NoReturn:
        name = signal.Signals(signum).name
        if announce:  # not print: the signal may have interrupted one
            os.write(2, f"\n{name}: the run ends; what is complete is kept.\n".encode())
        raise Preempted(f"Ended by {name}.", None)

    before: dict[int, Any] = {}
    main = threading.current_thread() is threading.main_thread()
    for signum in SIGNALS if main else ():
        if signum != signal.SIGINT and signal.getsignal(signum) is not signal.SIG_IGN:
            before[signum] = signal.signal(signum, end)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def holding_back_signals() -> Iterator[None]:
    """Lets the signals wait that arrive in the block; a process started in it lets them wait until it asks for them.

    It may then be told to end before it can note it, as every process of a terminal, a launcher's or a scheduler's
    group is, and does not die of it. :func:`let_signals_in` ends that.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_signals_in() -> None:
    """Delivers the signals that waited since :func:`holding_back_signals` of the process that started this one."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore_signals(*_: object) -> None:
    """Leaves it to the process that started this one, a data loader's worker, to end it."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def under_launcher() -> bool:
    """Whether torchrun or ``accelerate launch`` started this process and kills it 30 s after passing a signal on."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class StopSignals:
    """Notes signals instead of dying of them, while the block runs; only in the main thread, which alone can.

    A signal that was ignored before (``nohup``) stays ignored.

    Attributes:
        received: The first signal's number; 0 before there was one.
        active: Whether the block runs and signals are noted.
        saving: Whether the state is being written: no further signal ends that.

    Args:
        announce: What this process says of when the run ends, such as "after this iteration"; None says nothing.
        pass_on: Called with the first signal's number, by its handler: to tell another process.
    """

    def __init__(self, *, announce: str | None, pass_on: Callable[[int], object] | None = None) -> None:
        self.received = 0
        self.active = False
        self.saving = False
        self._announce = announce
        self._pass_on = pass_on
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.received = 0
        self.active = threading.current_thread() is threading.main_thread()
        for signum in SIGNALS if self.active else ():
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        self.active = False

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._since = signum, now
            if self._announce is not None:  # not print: the signal may have interrupted one
                text = f"\n{signal.Signals(signum).name}: the run ends {self._announce} and is saved. "
                os.write(2, f"{text}Once more ends it at once, without saving.\n".encode())
            if self._pass_on is not None:
                self._pass_on(signum)
        elif now - self._since > SAME_REQUEST_S and not self.saving:
            self._restore()
            signal.raise_signal(signum)
