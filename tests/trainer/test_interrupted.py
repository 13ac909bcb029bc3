"""Runs that are killed while they save, and checkpoints that are damaged: the last good one is found and kept."""

import json
import random
import signal
import time

import pytest

from pi_rl.trainer import checkpoint_folders, checkpointing
from pi_rl.trainer.checkpoint_folders import CheckpointError, check_checkpoint, checkpoints, newest_checkpoint

MOMENTS = {
    "policy": (checkpointing, "save_heads"),
    "optimizer": (checkpointing, "write_optimizer"),
    "state": (checkpointing, "write_scheduler"),
    "rename": (checkpointing, "publish"),
    "flush": (checkpoint_folders, "flush_to_disk"),
}


def pause_at(module, name, marker, saves_before):
    """Makes the process wait in a function once it has been called for that many checkpoints."""
    real, done = getattr(module, name), set()

    def waiting(*args):
        staged = next((path for path in checkpoints(marker.parent / "run" / ".incomplete")), None)
        if staged is not None:
            done.add(staged.name)
            if len(done) > saves_before:
                marker.touch()
                time.sleep(600)
        return real(*args)

    setattr(module, name, waiting)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(toy_trainer, fork, tmp_path, moment, capsys):
    marker, root = tmp_path / "saving", tmp_path / "run"

    def run():
        pause_at(*MOMENTS[moment], marker, saves_before=1)
        toy_trainer(num_iterations=3).train()

    killed = fork(run)
    killed.wait_for(marker)
    killed.kill(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert (root / ".incomplete" / "checkpoint-8").is_dir()
    assert newest_checkpoint(root) == root / "checkpoint-4"
    trainer = toy_trainer(num_iterations=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    assert [path.name for path in checkpoints(root)] == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert not (root / ".incomplete").exists()
    # what was on disk to the last byte, and only not renamed, is kept
    complete = moment in ("rename", "flush")
    assert ("not written to the end" in capsys.readouterr().out) == (not complete)


def test_a_policy_that_was_half_saved_by_a_killed_run_is_removed(toy_trainer, fork, tmp_path):
    from pi_rl.policies import checkpoints as policy_folders

    marker, root = tmp_path / "saving", tmp_path / "run"

    def run():
        trainer = toy_trainer()
        policy_folders.flush_to_disk = lambda path: (marker.touch(), time.sleep(600))
        trainer.save_model(str(root / "policy"))

    killed = fork(run)
    killed.wait_for(marker)
    killed.kill(signal.SIGKILL)
    killed.wait()
    assert [path.name.startswith(".policy-") for path in root.iterdir()] == [True]
    toy_trainer(num_iterations=1).train()
    assert [path.name for path in root.iterdir()] == ["checkpoint-4"]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_never_was(toy_trainer, fork, tmp_path, assert_same_end):
    """SIGKILL at random moments; kills within a save, each at its place, are another test's."""
    toy_trainer(tmp_path / "straight").train()
    delays = random.Random(0)
    root = tmp_path / "run"

    def run():
        real = checkpointing.write_optimizer
        checkpointing.write_optimizer = lambda *args: (time.sleep(0.2), real(*args))
        trainer = toy_trainer(root)
        trainer.train(resume_from_checkpoint=newest_checkpoint(root) is not None)

    code = None
    for _ in range(25):
        attempt = fork(run)
        time.sleep(delays.uniform(0.3, 2.5))
        attempt.kill(signal.SIGKILL)
        code = attempt.wait()
        for folder in checkpoints(root):
            check_checkpoint(folder)
        if code == 0:
            break
    if code != 0:
        assert fork(run).wait() == 0
    assert_same_end(tmp_path / "straight", root)


def test_temporary_folders_of_killed_runs_are_removed_and_no_others(tmp_path):
    left = [".policy-ab3d_f9h", ".sft-abcdefgh", ".init-abcdefgh", ".sft.partial-abcdefgh", ".demos.partial-abcdefgh"]
    kept = [".policy-backup", ".sftx-abcdefgh", ".other-abcdefgh", "policy-abcdefgh", ".push-abcdefgh"]
    for name in (*left, *kept):
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / ".sft-abcdefg1").touch()
    checkpoint_folders.clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".sft-abcdefg1"])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES = {
    "model.safetensors": truncate,
    "critic.safetensors": lambda path: path.unlink(),
    "optimizer.safetensors": lambda path: path.write_bytes(b"\xff" * 40),
    "trainer_state.json": truncate,
    "rng_state_0.json": lambda path: path.write_text(""),
    "pi_rl_config.yaml": lambda path: path.write_text("a: [1"),
    "rl_state.json": truncate,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_on_one_line_and_refused_when_asked_for(finished, toy_trainer, name, capsys):
    newest = finished / "checkpoint-8"
    DAMAGES[name](newest / name)
    assert newest_checkpoint(finished) == finished / "checkpoint-4"
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("Skipping")]
    assert line.startswith("Skipping checkpoint-8: ")
    assert name in line
    trainer = toy_trainer(num_iterations=3)
    before = {key: value.clone() for key, value in trainer.actor_critic.state_dict().items()}
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        trainer.train(resume_from_checkpoint=str(newest))
    assert all(value.equal(before[key]) for key, value in trainer.actor_critic.state_dict().items())
    assert trainer.env_steps == 0


def test_foreign_and_newer_checkpoints_are_refused(finished, toy_trainer, mlp_folder):
    trainer = toy_trainer(num_iterations=3)
    with pytest.raises(CheckpointError, match=r"is no checkpoint of a training run \(rl_state.json, trainer_state"):
        trainer.train(resume_from_checkpoint=str(mlp_folder))
    with pytest.raises(CheckpointError, match="does not exist"):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-5"))
    state = finished / "checkpoint-8" / "rl_state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "format": 99, "pi_rl": "7.1"}))
    with pytest.raises(CheckpointError, match=r"written by pi_rl 7\.1 in format 99; this is pi_rl \d"):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-8"))
    state.write_text(json.dumps({"step": 3}))
    with pytest.raises(CheckpointError, match="format missing"):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-8"))


def test_the_limit_of_checkpoints_never_costs_the_last_good_one(toy_trainer, tmp_path):
    root = tmp_path / "run"
    toy_trainer(num_iterations=3).train()
    truncate(root / "checkpoint-12" / "model.safetensors")
    truncate(root / "checkpoint-4" / "model.safetensors")
    # goes on from 8, with the damaged 12 the newest on disk
    trainer = toy_trainer(num_iterations=3, save_total_limit=1)
    real = trainer.write_checkpoint
    seen = []

    def watched(**options):
        written = real(**options)
        seen.append([path.name for path in checkpoints(root)])
        return written

    trainer.write_checkpoint = watched
    trainer.train(resume_from_checkpoint=True)
    assert seen == [["checkpoint-12"]]
    check_checkpoint(root / "checkpoint-12")


def test_a_checkpoint_that_cannot_be_read_back_costs_no_other(toy_trainer, tmp_path, monkeypatch):
    """A disk that loses what was written to it: nothing else is given up for it."""
    real = checkpointing.publish

    def lossy(staged, root):
        final = real(staged, root)
        if final.name == "checkpoint-12":
            truncate(final / "optimizer.safetensors")
        return final

    monkeypatch.setattr(checkpointing, "publish", lossy)
    toy_trainer(num_iterations=3, save_total_limit=1).train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-8", "checkpoint-12"]
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-8"


def test_the_best_checkpoint_is_kept_beside_the_newest(toy_trainer, tmp_path):
    trainer = toy_trainer(num_iterations=4, save_total_limit=2, eval_every_iterations=1)
    trainer.train()
    kept = [path.name for path in checkpoints(tmp_path / "run")]
    assert len(kept) == 2
    assert {f"checkpoint-{trainer.state.best_global_step}", "checkpoint-16"} <= set(kept)
