"""A sharded model (FSDP2) on two processes: NaN, signals and resuming, as for a whole one."""

import os
import signal
import time

import pytest

from pi_rl.trainer.checkpoint_folders import checkpoints
from pi_rl.trainer.sharding import is_sharded

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
OPTIONS = {"num_envs": 8, "eval_episodes": 0}


def sharded(act):
    def run():
        os.environ.update(SHARDED)
        act()

    return run


@pytest.mark.slow
def test_a_sharded_run_told_to_end_resumes_to_the_bit(toy_trainer, fork_ranks, tmp_path, assert_same_end):
    """The signal reaches the second process alone, in its rollout, which ends at once on both."""
    marker, root = tmp_path / "rollout", tmp_path / "run"

    def run():
        trainer = toy_trainer(root, save_every_iterations=None, **OPTIONS)
        assert is_sharded(trainer.actor_critic)
        shown = trainer.report.rollout_progress

        def progress(done, total, text):
            if trainer.args.process_index == 1 and trainer.iteration == 1 and done == 1:
                marker.touch()
                until = time.monotonic() + 60
                while not trainer._signals.received:
                    assert time.monotonic() < until
                    time.sleep(0.01)
            assert trainer.iteration != 1 or done < total
            shown(done, total, text)

        trainer.report.rollout_progress = progress
        trainer.train()

    ranks = fork_ranks(sharded(run))
    ranks[1].wait_for(marker)
    ranks[1].kill(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [75, 75], ranks[0].output
    assert [path.name for path in checkpoints(root)] == ["checkpoint-4"]
    again = fork_ranks(sharded(lambda: toy_trainer(root, **OPTIONS).train(resume_from_checkpoint=True)))
    assert [rank.wait() for rank in again] == [0, 0], again[0].output
    straight = fork_ranks(sharded(lambda: toy_trainer(tmp_path / "straight", **OPTIONS).train()))
    assert [rank.wait() for rank in straight] == [0, 0], straight[0].output
    assert_same_end(tmp_path / "straight", root)


def test_nan_in_one_part_of_a_sharded_model_ends_both_processes(toy_trainer, fork_ranks, tmp_path):
    def run():
        trainer = toy_trainer(save_every_iterations=None, **OPTIONS)
        assert is_sharded(trainer.actor_critic)
        begin = trainer._begin_iteration

        def poisoned():
            begin()
            if trainer.args.process_index == 1 and trainer.iteration == 2:
                trainer._buffer.returns[:] = float("nan")

        trainer._begin_iteration = poisoned
        trainer.train()

    ranks = fork_ranks(sharded(run))
    assert [rank.wait() for rank in ranks] == [1, 1]
    assert "The loss is nan in iteration 2, tick 0; not finite: returns" in ranks[1].output
    assert "Process 1 on " in ranks[0].output
    assert checkpoints(tmp_path / "run") == [tmp_path / "run" / "checkpoint-8"]
