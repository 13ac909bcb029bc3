"""Two processes of a run of which one dies, hangs, fails or is told to end: the other does not wait for it."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from pi_rl.trainer.checkpoint_folders import checkpoints, newest_checkpoint

ROOT = Path(__file__).parents[2]
END_S = 60  # bounds a hang; the default time limit of a collective call is half an hour
PROGRAM = """
import os, pathlib, sys, time
import torch
torch.set_num_threads(1)
from pi_rl import FlowPPOConfig, FlowPPOTrainer

policy, out, mode = sys.argv[1:]
long = {"update_epochs": 64, "save_every_iterations": None} if mode == "long update" else {}
options = {"update_epochs": 1, "save_every_iterations": 1, **long}
args = FlowPPOConfig(output_dir=out, use_cpu=True, num_iterations=500, num_envs=8, rollout_chunks=4,
                     per_device_train_batch_size=16, eval_episodes=0, critic_hidden_sizes=[16], noise_std_min=0.4,
                     noise_std_max=1.0, save_total_limit=2, disable_tqdm=True, **options)
trainer = FlowPPOTrainer(policy, args, "toy:point-mass", {"max_episode_steps": 8})
shown = trainer.report.rollout_progress
def progress(done, total, text):
    if trainer.iteration == 2 and args.process_index == 1:
        pathlib.Path(out, "pid").write_text(str(os.getpid()))
        if mode == "raise":
            raise ValueError("the simulator of process 1 is broken")
        if mode == "kill":
            time.sleep(600)
    shown(done, total, text)
trainer.report.rollout_progress = progress
if mode == "long update":
    guard = trainer.guard
    def slow_guard(*call):
        if trainer.iteration == 2:
            if args.process_index == 1 and trainer.state.global_step > 128:
                pathlib.Path(out, "pid").write_text(str(os.getpid()))
            time.sleep(1)
        guard(*call)
    trainer.guard = slow_guard
trainer.train()
"""


def at_second_rollout(trainer, act):
    """Has the second process act in the rollout of iteration 1."""
    shown = trainer.report.rollout_progress

    def progress(done, total, text):
        if trainer.args.process_index == 1 and trainer.iteration == 1:
            act()
        shown(done, total, text)

    trainer.report.rollout_progress = progress


@pytest.mark.parametrize(("signum", "timeout"), [(signal.SIGKILL, 1800), (signal.SIGSTOP, 5)])
def test_the_other_process_ends_when_one_dies_or_hangs(toy_trainer, fork_ranks, tmp_path, signum, timeout):
    marker = tmp_path / "rollout"

    def run():
        trainer = toy_trainer(num_envs=8, ddp_timeout=timeout, eval_episodes=0)
        at_second_rollout(trainer, lambda: (marker.touch(), time.sleep(1)))
        trainer.train()

    first, second = fork_ranks(run)
    second.wait_for(marker)
    second.kill(signum)
    assert first.wait(END_S) == 1
    assert (
        f"ProcessLost: Process 0: another process of this run has ended, or has not answered for ddp_timeout={timeout}"
        in (first.output)
    )
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


def test_an_error_of_one_process_ends_both(toy_trainer, fork_ranks):
    def fail():
        raise ValueError("the simulator is broken")

    def run():
        trainer = toy_trainer(num_envs=8, eval_episodes=0)
        at_second_rollout(trainer, fail)
        trainer.train()

    first, second = fork_ranks(run)
    assert (first.wait(END_S), second.wait(END_S)) == (1, 1)
    assert "ValueError: the simulator is broken" in second.output
    assert "ProcessLost" in first.output


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_both_processes_end_and_save_when_one_is_told_to(toy_trainer, fork_ranks, tmp_path, assert_same_end, rank):
    marker, root = tmp_path / "rollout", tmp_path / "run"
    options = {"num_envs": 8, "eval_episodes": 0}

    def run():
        trainer = toy_trainer(root, save_every_iterations=None, **options)
        at_second_rollout(trainer, lambda: (marker.touch(), time.sleep(0.5)))
        trainer.train()

    ranks = fork_ranks(run)
    ranks[1].wait_for(marker)
    ranks[rank].kill(signal.SIGTERM)
    assert [process.wait(END_S) for process in ranks] == [75, 75]
    assert [path.name for path in checkpoints(root)] == ["checkpoint-4"]
    assert {"rng_state_0.json", "rng_state_1.json"} <= {path.name for path in (root / "checkpoint-4").iterdir()}
    assert "checkpoint-4 is complete" in ranks[0].output

    def again():
        trainer = toy_trainer(root, **options)
        trainer.train(resume_from_checkpoint=True)

    def straight():
        toy_trainer(tmp_path / "straight", **options).train()

    assert [process.wait() for process in fork_ranks(again)] == [0, 0]
    assert [process.wait() for process in fork_ranks(straight)] == [0, 0]
    assert_same_end(tmp_path / "straight", root)


@contextmanager
def launch(tmp_path, policy, out, mode, **environment):
    """A run of two processes under ``accelerate launch`` with the recipes' file; yields the launcher and the log."""
    script, log = tmp_path / "train.py", tmp_path / "log"
    script.write_text(PROGRAM)
    layout = ROOT / "recipes" / "accelerate" / "cpu_ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(layout), str(script)]
    with log.open("w") as file:
        launched = subprocess.Popen(
            [*command, str(policy), str(out), mode],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield launched, log
    finally:
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGKILL)
            launched.wait()


def wait_for_rank(launched, log, out):
    """Until the second process tells its number, at the point that its mode names."""
    until = time.monotonic() + 300
    while not (out / "pid").exists():
        assert launched.poll() is None, log.read_text()
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kill", "raise"])
def test_a_launched_run_ends_when_one_process_does(mlp_folder, tmp_path, mode):
    """``accelerate launch`` with the recipes' file: nothing is left running, and the reason is printed."""
    out = tmp_path / "run"
    with launch(tmp_path, mlp_folder, out, mode) as (launched, log):
        if mode == "kill":
            wait_for_rank(launched, log, out)
            time.sleep(0.5)
            os.kill(int((out / "pid").read_text()), signal.SIGKILL)
        assert launched.wait(300) != 0
        text = log.read_text()
        if mode == "kill":
            assert re.search(r"exitcode\s*: -9|Signal 9", text), text[-3000:]
        else:
            assert "ValueError: the simulator of process 1 is broken" in text
        assert newest_checkpoint(out) == out / "checkpoint-2"
        with pytest.raises(ProcessLookupError):  # nobody of its session is left
            os.killpg(launched.pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_launcher_told_to_end_lets_its_processes_save(mlp_folder, tmp_path, signum):
    """It kills them after 30 s, before the update of this run would end."""
    out = tmp_path / "run"
    handled = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1"}
    with launch(tmp_path, mlp_folder, out, "long update", **(handled if signum == signal.SIGUSR1 else {})) as started:
        launched, log = started
        wait_for_rank(launched, log, out)
        launched.send_signal(signum)
        assert launched.wait(300) == 1
        text = log.read_text()
    assert f"Ended by {signum.name}; {out / 'checkpoint-128'} is complete" in text, text[-3000:]
    assert "iteration 2/" not in text  # its update was cut short, in the first step or a later one
    assert "forcefully exiting via" not in text.lower()  # what torch says when it kills after 30 s
    assert newest_checkpoint(out) == out / "checkpoint-128"
