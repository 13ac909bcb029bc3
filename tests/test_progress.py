"""Progress in a real pseudo-terminal, in a log, and in a notebook's cell."""

import fcntl
import io
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from pi_rl.progress import LogHandler, Progress, in_notebook, log_beside_progress
from pi_rl.trainer.callbacks import IterationReport

COLUMNS = 80
ITERATION = {"loss": 0.1, "iteration": 1.0, "time/rollout": 2.0, "time/update": 3.0, "env_steps": 1280.0,
             "policy/approx_kl": 0.0123, "policy/clip_fraction": 0.25, "rollout/success_rate": 0.5,
             "rollout/return": 0.5, "rollout/episode_length": 40.0}  # fmt: skip


def in_terminal(code, columns=COLUMNS):
    """What a program writes to a terminal, byte for byte."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-c", textwrap.dedent(code)]
    child = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other side was closed
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert child.wait(timeout=120) == 0, written.decode()
    return written.decode()


def screen(written, columns=COLUMNS):
    """The lines that a terminal shows in the end; a line that is too long goes on in the next."""
    lines, row, column = [""], 0, 0

    def to_row(new):
        lines.extend([""] * (new + 1 - len(lines)))
        return new

    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]", written):
        if token == "\r":
            column = 0
        elif token == "\n":
            row = to_row(row + 1)
        elif token == "\x1b[A":
            row -= 1
        elif token.startswith("\x1b"):
            raise AssertionError(f"unexpected control sequence {token!r}")
        else:
            if column == columns:
                row, column = to_row(row + 1), 0
            lines[row] = lines[row].ljust(column)[:column] + token + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


RUN = """
    import torch
    from pi_rl.progress import say
    from pi_rl.trainer.callbacks import IterationReport
    from types import SimpleNamespace

    report, args = IterationReport(main=True), SimpleNamespace(num_train_epochs=2)
    figures = {"approx_kl": torch.tensor(0.0123), "clip_fraction": torch.tensor(0.25)}
    report.on_train_begin(args, None, None)
    for iteration in (1, 2):
        for chunk in range(1, 5):
            report.rollout_progress(chunk, 4, f"success 0.50  {320 * chunk:,} steps  612/s")
            if chunk == 2 and iteration == 2:
                say("  a line in between")
                logging.getLogger("pi_rl.envs.failures").warning("one broke down")
        for batch in range(1, 4):
            report.update_progress(batch, 3, figures)
        report.on_log(args, None, None, {**LOGS, "iteration": float(iteration)})
    report.evaluation_progress(1, 2, "success 1.00")
    report.on_train_end(args, None, None)
"""


@pytest.mark.slow
def test_a_terminal_shows_one_bar_that_leaves_nothing_but_the_lines():
    log = "import logging\nfrom pi_rl.progress import log_beside_progress\nlog_beside_progress()\n"
    written = in_terminal(f"{log}LOGS = {ITERATION!r}\n" + textwrap.dedent(RUN), columns=COLUMNS)
    # iteration lines are longer than this terminal; everything else has to fit a line of it
    shown = [line for line in screen(written, columns=400) if line]
    assert [line.split()[0] for line in shown] == ["iteration", "a", "warning:", "iteration"]
    bars = re.findall(r"  (?:rollout|update|evaluate) [^\r\n]*", written)
    assert bars
    assert max(map(len, bars)) < COLUMNS
    assert any(re.search(r"rollout 1/4 chunks \|█.*\| success 0.50  320 steps  612/s", bar) for bar in bars)
    assert any(re.search(r"update 1/3 batches \|.*\| KL 0.012  clipped 0.25  left 0:0\d", bar) for bar in bars)


def test_a_narrow_terminal_cuts_the_bar_and_keeps_it_on_one_line():
    code = """
        from pi_rl.progress import Progress
        show = Progress("demonstrations", "episodes")
        for done in range(1, 41):
            show(done, 40, "a text that is much longer than a terminal of forty columns is wide")
    """
    shown = [line for line in screen(in_terminal(code, columns=40), columns=40) if line]
    assert len(shown) == 1
    assert shown[0].startswith("  demonstrations 40/40 episodes")


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pi_rl.progress.time.monotonic", lambda: now[0])
    stages, phases = io.StringIO(), io.StringIO()
    kept = Progress("SFT", "steps", interval=15, stream=stages)
    passing = Progress("rollout", "chunks", interval=15, leave=False, stream=phases)
    for done in range(1, 41):
        now[0] = done  # a second each
        kept(done, 40, "loss 0.1")
        passing(done, 40, "success 0.5")
        if done == 30:
            passing.said_something()
    assert stages.getvalue().splitlines() == [f"  SFT {done}/40 steps  loss 0.1" for done in (16, 32, 40)]
    assert phases.getvalue().splitlines() == ["  rollout 16/40 chunks  success 0.5"]


@pytest.mark.parametrize("settings", [{"main": False}, {"main": True, "bars": False}])
def test_other_processes_and_disable_tqdm_show_no_progress(settings, capsys, tmp_path):
    report = IterationReport(**settings)
    args = TrainingArguments(output_dir=str(tmp_path), num_train_epochs=2, use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    report.on_train_begin(args, state, control)
    report._progress.interval = -1.0  # as if every call were due
    report.rollout_progress(1, 4, "success 0.5")
    report.update_progress(1, 3, {"approx_kl": torch.tensor(0.1), "clip_fraction": torch.tensor(0.1)})
    report.on_log(args, state, control, ITERATION)
    out, err = capsys.readouterr()
    assert err == ""
    assert ("iteration 1/2" in out) == settings["main"]


def test_the_time_left_is_that_of_the_whole_run(monkeypatch, tmp_path, capsys):
    now = [100.0]
    monkeypatch.setattr("pi_rl.trainer.callbacks.time.monotonic", lambda: now[0])
    report = IterationReport(main=True)
    report._progress.interval = -1.0
    args = TrainingArguments(output_dir=str(tmp_path), num_train_epochs=11, use_cpu=True)
    report.on_train_begin(args, TrainerState(), TrainerControl())
    report.rollout_progress(1, 4, "success 0.5")
    now[0] += 5.0
    report.on_log(args, TrainerState(), TrainerControl(), ITERATION)  # 5 s; ten more to go
    now[0] += 2.0
    report.rollout_progress(1, 4, "success 0.5")
    out, err = capsys.readouterr()
    assert "left 0:50" in out
    first, second = err.splitlines()
    assert "left" not in first
    assert second.endswith("left 0:48")


def test_log_records_are_printed_once_and_beside_the_bar(capsys):
    logger = logging.getLogger("pi_rl")
    before = list(logger.handlers)
    try:
        log_beside_progress()
        log_beside_progress()
        assert sum(isinstance(handler, LogHandler) for handler in logger.handlers) == 1
        logging.getLogger("pi_rl.somewhere").warning("watch %s", "out")
        assert capsys.readouterr().err == "warning: watch out\n"
    finally:
        logger.handlers[:] = before


def test_a_notebook_shows_one_output_that_changes():
    import nbclient
    import nbformat

    cell = nbformat.v4.new_code_cell(
        "from pi_rl.progress import Progress, in_notebook, say\n"
        "print(in_notebook())\n"
        "show = Progress('SFT', 'steps')\n"
        "for done in range(1, 201):\n    show(done, 200, 'loss <0.1>')\n"
        "passing = Progress('rollout', 'chunks', leave=False)\n"
        "for done in range(1, 51):\n    passing(done, 50, 'success 0.5')\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    client = nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3")
    client.execute()
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    assert text == "True\n"
    shown = [output.data["text/html"] for output in cell.outputs if output.output_type == "display_data"]
    assert len(shown) == 2
    assert "SFT 200/200 steps  loss &lt;0.1&gt;" in shown[0]
    assert shown[1] == ""
    assert not in_notebook()
