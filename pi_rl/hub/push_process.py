"""Pushes in processes of their own, one after the other: training goes on, and one that hangs can be given up.

The Hub's client waits without limit for an answer, and Python at its end waits for the client's threads; a process can
be ended. What it uploads lies in a folder of its own, so that the run may delete or replace its files meanwhile.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_rl.hub.push import PushOutcome, push_files

_NEAR_IN_TIME_S = 0.1


@dataclass(frozen=True, kw_only=True)
class PushJob:
    """A push to make; see `pi_rl.hub.push.push_files`.

    Attributes:
        repo_id: "user/name", or a name of the token's owner.
        command: What repeats it.
        files: Path in the repository to a local file; without any, the repository is created.
        replaces: Patterns of what is removed unless it is one of `files`.
        message: Of the commit.
        private: Whether the repository shall be private.
        revision: Branch; None is main.
        staging: Folder that is deleted after the push.
        once: Whether to try only once.
    """

    repo_id: str
    command: str
    files: Mapping[str, str]
    replaces: Sequence[str] = ()
    message: str = "Upload policy"
    private: bool | None = None
    revision: str | None = None
    staging: str | None = None
    once: bool = False

    def failed(self, error: str) -> PushOutcome:
        """The outcome when it could not be carried out."""
        return PushOutcome(repo_id=self.repo_id, command=self.command, error=error)


class PushProcess:
    """A push that runs.

    Args:
        job: What to push.
        token: Access token; by default HF_TOKEN or that of `hf auth login`.
    """

    def __init__(self, job: PushJob, token: str | None = None) -> None:
        self.job = job
        self._answer, self._messages = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if token:
            environment["HF_TOKEN"] = token  # not an argument, which others could read in the list of processes
        answer = self._answer.fileno()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pi_rl.hub.push_process", str(answer)],
                stdin=subprocess.PIPE,
                stdout=self._messages,  # libraries print there, so the answer has a file of its own
                stderr=self._messages,
                pass_fds=[answer],
                env=environment,
            )
        except OSError:
            self._clean()
            raise
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stream:  # a process that died tells by its exit code
            stream.write(json.dumps(asdict(job)).encode())

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def outcome(self, limit_s: float) -> PushOutcome:
        """Waits for its end; after `limit_s` seconds it is given up."""
        try:
            code = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return self.give_up(limit_s)
        answer, lines = _text(self._answer), _text(self._messages).strip().splitlines()
        self._clean()
        last = lines[-1] if lines else "no message"
        if code != 0:
            return self.job.failed(f"its process ended with code {code}: {last}")
        try:
            told = json.loads(answer)
            return PushOutcome(**{**told, "files": tuple(told["files"]), "removed": tuple(told["removed"])})
        except (ValueError, TypeError, KeyError):
            return self.job.failed(f"its process ended without an answer: {last}")

    def give_up(self, limit_s: float) -> PushOutcome:
        """Ends it, because it took longer than `limit_s` seconds."""
        self.end()
        return self.job.failed(f"it was not finished after {_time_text(limit_s)} and was given up")

    def end(self) -> None:
        """Ends it now."""
        self._process.kill()
        self._process.wait()
        self._clean()

    def _clean(self) -> None:
        for file in (self._answer, self._messages):
            file.close()
        if self.job.staging is not None:
            shutil.rmtree(self.job.staging, ignore_errors=True)


def _time_text(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


class PushQueue:
    """Pushes in their order.

    Attributes:
        outcomes: Of those that have ended.
        token: Access token; None is HF_TOKEN or that of `hf auth login`.
    """

    def __init__(self) -> None:
        self.outcomes: list[PushOutcome] = []
        self.token: str | None = None
        self._waiting: deque[PushJob] = deque()
        self._running: PushProcess | None = None

    def add(self, job: PushJob) -> None:
        """Takes a push, which begins when those before it have ended."""
        self._waiting.append(job)
        self.advance()

    @property
    def busy(self) -> bool:
        """Whether a push runs or waits."""
        self.advance()
        return self._running is not None

    def advance(self) -> None:
        """Takes the outcome of a push that has ended, and begins the next."""
        if self._running is not None and self._running.done:
            self.outcomes.append(self._running.outcome(limit_s=0.0))
            self._running = None
        if self._running is None and self._waiting:
            job = self._waiting.popleft()
            try:
                self._running = PushProcess(job, self.token)
            except OSError as error:
                self._drop(job, f"its process could not be started: {error}")

    def finish(self, limit_s: float) -> None:
        """Waits until all have ended; what has not after `limit_s` seconds is given up."""
        until = time.monotonic() + limit_s
        while self.busy and time.monotonic() < until:
            time.sleep(_NEAR_IN_TIME_S)
        if self._running is not None:
            self.outcomes.append(self._running.give_up(limit_s))
            self._running = None
        self._give_up_waiting(f"it did not begin within {_time_text(limit_s)} and was given up")

    def end(self) -> None:
        """Ends everything now."""
        if self._running is not None:
            self._running.end()
            self.outcomes.append(self._running.job.failed("the run ended first"))
            self._running = None
        self._give_up_waiting("the run ended first")

    def _give_up_waiting(self, why: str) -> None:
        while self._waiting:
            self._drop(self._waiting.popleft(), why)

    def _drop(self, job: PushJob, why: str) -> None:
        self.outcomes.append(job.failed(why))
        if job.staging is not None:
            shutil.rmtree(job.staging, ignore_errors=True)


def run_push(job: PushJob, *, token: str | None = None, limit_s: float) -> PushOutcome:
    """Pushes, and gives up after `limit_s` seconds; never raises for it."""
    try:
        process = PushProcess(job, token)
    except OSError as error:
        return job.failed(f"its process could not be started: {error}")
    return process.outcome(limit_s)


def local_files(files: Mapping[str, Path | bytes], folder: Path) -> dict[str, str]:
    """The same files with their contents on the disk, for another process.

    Args:
        files: Path in the repository to a local file or a content.
        folder: An empty folder for the contents.
    """
    folder.mkdir()
    placed: dict[str, str] = {}
    for number, (name, source) in enumerate(files.items()):
        if isinstance(source, bytes):
            path = folder / str(number)
            path.write_bytes(source)
            source = path
        placed[name] = str(source.absolute())
    return placed


def main() -> None:
    """The process: a job as JSON on standard input, its outcome as JSON into the file descriptor that is given."""
    job = PushJob(**json.load(sys.stdin))
    outcome = push_files(
        {name: Path(path) for name, path in job.files.items()},
        job.repo_id,
        command=job.command,
        replaces=job.replaces,
        message=job.message,
        private=job.private,
        revision=job.revision,
        waits=() if job.once else None,
    )
    with os.fdopen(int(sys.argv[1]), "w") as answer:
        json.dump(asdict(outcome), answer)


if __name__ == "__main__":
    main()
