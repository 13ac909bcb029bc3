"""Signals to a real `pi-rl sft`: the step is saved, and the resumed run ends as one that was never told."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pi_rl.cli.main import main
from pi_rl.trainer import stop_signals
from pi_rl.trainer.sft import SftProcess, last_checkpoint

STEPS = 120
pytestmark = pytest.mark.slow  # every run starts a process that imports LeRobot


@pytest.fixture(scope="module")
def words(small_pi0_folder, two_task_dataset):
    """A run without its output folder; data is loaded by processes, which signals to the group reach too."""
    return ["--model", str(small_pi0_folder), "--dataset", "local/two-tasks", "--dataset_root", str(two_task_dataset),
            "--steps", str(STEPS), "--batch_size", "8", "--warmup_steps", "1", "--learning_rate", "1e-3", "--device",
            "cpu", "--num_workers", "1", "--save_every_steps", "1000"]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(words, tmp_path_factory):
    """The weights of a run that nobody told to end."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "policy"
    assert main(["sft", *words, "--output_dir", str(folder)]) == 0
    return load_file(folder / "model.safetensors")


def pi_rl_sft(*words):
    """The command, which ends this process."""
    raise SystemExit(main(["sft", *words]))


def running(monkeypatch, words, act, first=1):
    """`pi-rl sft` in a process group of its own, which acts once when that step, or a later one, is reported."""

    class Reports:
        def __init__(self, *args, **kwargs):
            self.acted = False

        def __call__(self, step, steps, text):
            if step >= first and not self.acted:
                self.acted = True
                act()

    def run():
        os.setpgid(0, 0)
        monkeypatch.setattr("pi_rl.sft_recipe.Progress", Reports)
        pi_rl_sft(*words)

    return run


def saved_step(output):
    return int(last_checkpoint(output.with_name(f".{output.name}.partial")).name)


def assert_same(weights, folder):
    other = load_file(folder / "model.safetensors")
    assert set(weights) == set(other)
    assert [name for name in weights if not torch.equal(weights[name], other[name])] == []


@pytest.mark.parametrize(
    ("signum", "to_group", "every"),
    [
        (signal.SIGTERM, False, "1000"),
        (signal.SIGUSR1, True, "0"),
        (signal.SIGTERM, True, "1000"),
        (signal.SIGINT, True, "1000"),
    ],
    ids=["SIGTERM", "SIGUSR1 to the group", "SIGTERM to the group", "Ctrl-C"],
)
def test_a_signal_saves_the_step_and_resume_ends_bitwise_as_an_uninterrupted_run(
    fork, monkeypatch, words, uninterrupted, tmp_path, signum, to_group, every
):
    output = tmp_path / "policy"
    told = fork(
        running(
            monkeypatch,
            [*words, "--save_every_steps", every, "--output_dir", str(output)],
            lambda: os.killpg(0, signum) if to_group else os.kill(os.getpid(), signum),
        )
    )
    assert told.wait() == 75, told.output
    assert f"{signum.name}: the run ends after this step and is saved. Once more ends it at once" in told.output
    assert 1 <= (step := saved_step(output)) < STEPS
    assert f"the checkpoint after step {step} is kept. The same command, or pi-rl sft --resume {output}" in told.output
    assert "Traceback" not in told.output
    resumed = fork(lambda: pi_rl_sft("--resume", str(output)))
    assert resumed.wait() == 0, resumed.output
    assert f"Continuing from the checkpoint after step {step}" in resumed.output
    assert_same(uninterrupted, output)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["policy"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_step_keeps_it_and_resume_writes_the_policy(
    fork, monkeypatch, words, uninterrupted, tmp_path, signum
):
    output = ["--output_dir", str(tmp_path / "policy")]
    told = fork(running(monkeypatch, [*words, *output], lambda: os.kill(os.getpid(), signum), first=STEPS))
    assert told.wait() == 75, told.output
    assert f"the checkpoint after step {STEPS} is kept" in told.output
    assert not (tmp_path / "policy").exists()
    resumed = fork(lambda: pi_rl_sft(*words, *output))
    assert resumed.wait() == 0, resumed.output
    assert_same(uninterrupted, tmp_path / "policy")


def test_a_signal_before_training_ends_the_run_at_once_and_leaves_nothing(fork, monkeypatch, words, tmp_path):
    """Here while the fine-tuning process imports LeRobot, which takes seconds."""
    real = SftProcess.run

    def run(self, *args, **kwargs):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SftProcess, "run", run)
    told = fork(lambda: pi_rl_sft(*words, "--output_dir", str(tmp_path / "policy")))
    assert told.wait() == 75, told.output
    assert "SIGTERM: the run ends; what is complete is kept." in told.output
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_fine_tuning_process_does_not_die_of_a_signal_while_it_starts():
    """Ctrl-C in a terminal reaches it before it has imported what notes it; the process that started it decides."""
    with SftProcess() as process:
        for signum in stop_signals.SIGNALS:
            process._process.send_signal(signum)
        process._process.stdin.close()  # no job comes
        assert process._process.wait(120) == 0


def test_a_second_signal_ends_the_run_at_once(fork, monkeypatch, words, tmp_path):
    """Here the fine-tuning process stands still, so that it cannot end the step."""
    monkeypatch.setattr(stop_signals, "SAME_REQUEST_S", 0.2)
    output, marker = tmp_path / "policy", tmp_path / "stopped"
    real, children = SftProcess.run, []

    def run(self, *args, **kwargs):
        children.append(self._process)
        return real(self, *args, **kwargs)

    def stand_still():
        children[0].send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, children[0].pid, os.WSTOPPED | os.WNOWAIT)
        marker.write_text(str(children[0].pid))

    monkeypatch.setattr(SftProcess, "run", run)
    stubborn = fork(running(monkeypatch, [*words, "--output_dir", str(output)], stand_still))
    stubborn.wait_for(marker)
    stubborn.kill(signal.SIGTERM)
    while "Once more ends it at once" not in stubborn.output:
        time.sleep(0.01)
    time.sleep(0.3)  # longer than SAME_REQUEST_S, after the first was noted
    stubborn.kill(signal.SIGTERM)
    assert stubborn.wait() == 75
    assert "SIGTERM: the run ends after this step and is saved. Once more ends it at once" in stubborn.output
    assert "Stopped before the first checkpoint: the same command begins anew." in stubborn.output
    assert not Path("/proc", marker.read_text()).exists()
    assert not output.with_name(".policy.partial").exists()


def test_two_processes_agree_on_the_step_when_one_is_told(fork_ranks, monkeypatch, words, tmp_path):
    """Each has whole batches in an epoch (36 frames, 2 x 2 a step): others are filled up from where it was resumed."""

    def train(name, told=None):
        def tell():
            if os.environ["RANK"] == told:
                os.kill(os.getpid(), signal.SIGTERM)

        output = ["--batch_size", "4", "--output_dir", str(tmp_path / name)]
        return [process.wait() for process in fork_ranks(running(monkeypatch, [*words, *output], tell))]

    assert train("whole") == [0, 0]
    assert train("told", told="1") == [75, 75]
    assert 1 <= saved_step(tmp_path / "told") < STEPS
    assert train("told") == [0, 0]
    assert_same(load_file(tmp_path / "whole" / "model.safetensors"), tmp_path / "told")
