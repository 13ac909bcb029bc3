"""Runs of a small policy in a toy environment, also in processes of their own that can be killed."""

import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest

from tests.trainer.options import small_options

TIMEOUT_S = 120  # bounds a hang; nothing here takes seconds on an idle computer


class ForkedRun:
    """A function in a process of its own, with everything imported already; its output goes to a file."""

    def __init__(self, act, folder, name, environment=None):
        self.folder = folder
        self.log = folder / f"{name}.log"
        self.pid = os.fork()
        if self.pid == 0:
            self._act(act, environment or {})

    def _act(self, act, environment):
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)  # not into pytest's records
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = 0
        try:
            act()
        except SystemExit as end:
            code = 0 if end.code is None else int(end.code)
        except KeyboardInterrupt as interrupt:
            print(f"KeyboardInterrupt: {interrupt}")
            code = 130
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, timeout=TIMEOUT_S):
        """Exit code; negative for the signal that killed it."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = None
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        raise AssertionError(f"still running after {timeout} s:\n{self.output}")

    def wait_for(self, path, timeout=TIMEOUT_S):
        """Until the process has made a file."""
        until = time.monotonic() + timeout
        while not path.exists():
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                self.pid = None
                raise AssertionError(f"ended before {path.name}:\n{self.output}")
            assert time.monotonic() < until, self.output
            time.sleep(0.005)

    def kill(self, signum=signal.SIGKILL):
        os.kill(self.pid, signum)


@pytest.fixture
def fork(tmp_path):
    """``fork(act)`` runs a function in a process of its own; what still runs at the end of the test is killed."""
    import torch
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    runs = []

    def start(act, environment=None):
        def fresh():
            AcceleratorState._reset_state(True)
            PartialState._reset_state()
            torch.set_num_threads(1)  # renews the pool that a fork leaves unusable, before threads do so at once
            act()

        runs.append(ForkedRun(fresh, tmp_path, f"run{len(runs)}", environment))
        return runs[-1]

    yield start
    for run in runs:
        if run.pid is not None:
            run.kill()
            os.waitpid(run.pid, 0)


@pytest.fixture
def fork_ranks(fork):
    """Starts a function in two processes of one distributed run."""

    def start(act):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        return [fork(act, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]

    return start


@pytest.fixture
def toy_trainer(mlp_folder, tmp_path):
    """Makes trainers of the toy environment: four environments, four updates in each of four iterations."""
    import torch

    from pi_rl import FlowPPOConfig, FlowPPOTrainer

    torch.set_num_threads(1)
    made = []

    def make(output_dir=tmp_path / "run", callbacks=None, env="toy:point-mass", env_kwargs=None, **overrides):
        options = small_options(output_dir, **{"num_iterations": 4, "save_every_iterations": 1, **overrides})
        kwargs = {"max_episode_steps": 8} if env_kwargs is None and isinstance(env, str) else env_kwargs
        made.append(FlowPPOTrainer(mlp_folder, FlowPPOConfig(**options), env, kwargs, callbacks=callbacks))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


@pytest.fixture
def filmed_trainer(small_pi0_folder, tmp_path):
    """Makes trainers of a small π0 in MetaWorld, which film both evaluated episodes after each of two iterations."""
    import torch

    from pi_rl import FlowPPOConfig, FlowPPOTrainer
    from pi_rl.run_report import RunLog

    torch.set_num_threads(1)
    made = []

    def make(output_dir=tmp_path / "run", **overrides):
        short = {"num_envs": 2, "rollout_chunks": 2, "per_device_train_batch_size": 4, "update_epochs": 1}
        filmed = {"eval_episodes": 2, "eval_videos": 2, "eval_every_iterations": 1, "save_every_iterations": 1}
        options = small_options(output_dir, **{**short, **filmed, **overrides})
        env, env_kwargs = "metaworld:handle-press-v3", {"image_size": 32, "fast_rendering": True, "hide_arm": True}
        env_kwargs["max_episode_steps"] = 15
        made.append(FlowPPOTrainer(str(small_pi0_folder), FlowPPOConfig(**options), env, env_kwargs))
        made[-1].add_callback(RunLog(output_dir, env))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


@pytest.fixture
def finished(toy_trainer, tmp_path):
    """The folder of a run with checkpoint-4 and checkpoint-8."""
    toy_trainer(num_iterations=2).train()
    return tmp_path / "run"


def _log_without_times(history):
    timed = ("time/", "eval_runtime", "train_")
    return [{key: value for key, value in entry.items() if not key.startswith(timed)} for entry in history]


@pytest.fixture
def assert_same_end():
    """Compares the last checkpoints of two runs, bit for bit: weights, optimiser, schedule, generators, log."""
    from safetensors.torch import load_file
    from torch import equal

    def compare(one, other, name="checkpoint-16"):
        first, second = Path(one) / name, Path(other) / name
        files = {path.name for path in first.iterdir()}
        assert files == {path.name for path in second.iterdir()}
        for file in sorted(files):
            if file.endswith(".safetensors"):
                ours, theirs = load_file(first / file), load_file(second / file)
                assert ours.keys() == theirs.keys()
                assert all(equal(ours[key], theirs[key]) for key in ours), file
            elif file in ("optimizer.json", "scheduler.json", "rl_state.json") or file.startswith("rng_state"):
                values = [json.loads((folder / file).read_text()) for folder in (first, second)]
                for value in values:
                    value.pop("save", None)  # a run that was told to end has saved once more
                assert values[0] == values[1], file
        logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (first, second)]
        assert _log_without_times(logs[0]) == _log_without_times(logs[1])

    return compare
