"""Checkpoint folders of a run that are foreign, damaged, out of reach or in the way: what is kept and what is not."""

import errno
import json
import logging
import os
import shutil

import pytest
from transformers import TrainerCallback

from pi_rl.cli.eval_plan import policy_within
from pi_rl.policies import weights
from pi_rl.trainer import checkpoint_folders
from pi_rl.trainer.checkpoint_folders import (
    CheckpointError,
    DamagedCheckpointError,
    check_checkpoint,
    checkpoints,
    clean_up,
    newest_checkpoint,
    publish,
    remove_old,
)


def edited(**entries):
    """Changes entries of a JSON file; None removes one."""

    def change(path):
        value = {**json.loads(path.read_text()), **entries}
        path.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not None}))

    return change


def text(content):
    return lambda path: path.write_text(content)


FOREIGN = [
    ("rl_state.json", edited(files=[3])),
    ("rl_state.json", edited(files="model.safetensors")),
    ("rl_state.json", edited(iteration=None)),
    ("rl_state.json", edited(env_steps="8")),
    ("rl_state.json", edited(episodes=-1)),
    ("rl_state.json", edited(evaluation_due=None)),
    ("rl_state.json", edited(algorithm=["flow_ppo"])),
    ("trainer_state.json", text("[]")),
    ("trainer_state.json", text("[" * 100_000 + "]" * 100_000)),
    ("trainer_state.json", edited(global_step=True)),
    ("trainer_state.json", edited(of_another_trainer=1)),
    ("scheduler.json", text("{}")),
    ("optimizer.json", text("{}")),
    ("optimizer.json", edited(state={})),
    ("optimizer.json", edited(group={"0": {}})),
    ("optimizer.json", edited(group={"0": {"params": [[0]]}})),
    ("optimizer.json", edited(group={"0": {"params": [*range(1, 99), 0]}})),
    ("rng_state_0.json", edited(numpy=None)),
]


def test_valid_json_that_is_no_state_is_skipped_and_refused(finished, capsys):
    folder = finished / "checkpoint-9"
    for number, (name, damage) in enumerate(FOREIGN):
        shutil.copytree(finished / "checkpoint-8", folder)
        damage(folder / name)
        assert newest_checkpoint(finished) == finished / "checkpoint-8", FOREIGN[number]
        (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("Skipping")]
        assert name in line, number
        with pytest.raises(DamagedCheckpointError, match=name.replace(".", r"\.")):
            check_checkpoint(folder)
        shutil.rmtree(folder)


def copies(finished, *numbers):
    for number in numbers:
        shutil.copytree(finished / "checkpoint-8", finished / f"checkpoint-{number}")
    return [finished / f"checkpoint-{number}" for number in numbers]


def names(root):
    return [path.name for path in checkpoints(root)]


def test_only_what_is_surely_damaged_is_deleted(finished, monkeypatch):
    """A disk that does not answer for a moment, or a step back to an older pi_rl, must not cost checkpoints."""
    newer, foreign, away, damaged, best = copies(finished, 1, 2, 3, 5, 6)
    edited(format=99, pi_rl="7.1")(newer / "rl_state.json")
    (foreign / "rl_state.json").unlink()
    (damaged / "model.safetensors").write_bytes(b"1")
    (best / "model.safetensors").write_bytes(b"1")
    real = checkpoint_folders.read_header

    def stale(path):
        if path.parent == away:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path)

    monkeypatch.setattr(checkpoint_folders, "read_header", stale)
    with pytest.raises(CheckpointError, match="cannot be read now: .*Try again when the disk answers") as error:
        check_checkpoint(away)
    assert not isinstance(error.value, DamagedCheckpointError)
    remove_old(finished, 1, finished / "checkpoint-8", str(best))
    assert names(finished) == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-6", "checkpoint-8"]


def test_a_disk_that_lists_no_folders_costs_nothing(finished, monkeypatch, caplog):
    def stale(root):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(root))

    monkeypatch.setattr(checkpoint_folders, "by_age", stale)
    with caplog.at_level(logging.WARNING):
        remove_old(finished, 1, finished / "checkpoint-8", None)
    monkeypatch.undo()
    assert "No old checkpoint" in caplog.text
    assert names(finished) == ["checkpoint-4", "checkpoint-8"]


def failing_at(monkeypatch, name, when):
    """Makes os.rename, shutil.rmtree or flush_to_disk fail where ``when`` of its arguments holds."""
    place = {"rename": os, "rmtree": shutil, "flush_to_disk": checkpoint_folders}[name]
    real = getattr(place, name)

    def act(*args, **options):
        if when(*args) and not options.get("ignore_errors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(args[0]))
        return real(*args, **options)

    monkeypatch.setattr(place, name, act)


@pytest.mark.parametrize("name", ["flush_to_disk", "rmtree"])
def test_an_error_after_the_rename_costs_no_checkpoint(toy_trainer, tmp_path, monkeypatch, name, caplog):
    root = tmp_path / "run"
    complete = {"flush_to_disk": lambda path: path == root, "rmtree": lambda path, *_: path == root / ".incomplete"}
    trainer = toy_trainer(num_iterations=1)
    failing_at(monkeypatch, name, complete[name])
    trainer.train()
    monkeypatch.undo()
    assert trainer.failed_saves == 0
    assert newest_checkpoint(root) == root / "checkpoint-4"
    assert "checkpoint-4 is written, but" in caplog.text


def test_a_checkpoint_that_cannot_be_replaced_stays(finished, monkeypatch):
    staged = finished / ".incomplete" / "checkpoint-8"
    shutil.copytree(finished / "checkpoint-8", staged)
    (finished / "checkpoint-8" / "README.md").write_text("the earlier one")
    failing_at(monkeypatch, "rename", lambda source, _: source == staged)
    with pytest.raises(OSError, match="Input/output error"):
        publish(staged, finished)
    monkeypatch.undo()
    assert (finished / "checkpoint-8" / "README.md").read_text() == "the earlier one"
    check_checkpoint(finished / "checkpoint-8")


def test_a_run_that_cannot_replace_a_checkpoint_ends_with_the_earlier_one(finished, toy_trainer, monkeypatch):
    (finished / "checkpoint-8" / "README.md").write_text("the earlier one")
    failing_at(monkeypatch, "rename", lambda source, _: source == finished / ".incomplete" / "checkpoint-8")
    with pytest.raises(OSError, match="checkpoint-8 could not be written"):
        toy_trainer(num_iterations=2).train(resume_from_checkpoint=str(finished / "checkpoint-4"))
    monkeypatch.undo()
    assert (finished / "checkpoint-8" / "README.md").read_text() == "the earlier one"
    assert not (finished / ".incomplete").exists()


def test_a_checkpoint_set_aside_by_a_killed_run_gets_its_name_back(finished):
    aside = finished / ".incomplete" / "replaced-checkpoint-8"
    aside.parent.mkdir()
    (finished / "checkpoint-8").rename(aside)
    clean_up(finished)
    check_checkpoint(finished / "checkpoint-8")
    assert not (finished / ".incomplete").exists()


class Broken(TrainerCallback):
    """Ends the training by an exception at the first update after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_that_began_again_goes_on_with_its_new_branch(toy_trainer, tmp_path):
    """Also after its folder was copied, which changes the times of files."""
    root, copied = tmp_path / "run", tmp_path / "copied"
    toy_trainer(num_iterations=4).train()
    branched = toy_trainer(num_iterations=4, learning_rate=1e-4, callbacks=[Broken(8)], save_total_limit=3)
    with pytest.raises(KeyboardInterrupt):
        branched.train(resume_from_checkpoint=str(root / "checkpoint-4"))
    assert names(root) == ["checkpoint-8", "checkpoint-12", "checkpoint-16"]  # the oldest, 4, was deleted
    for name in reversed(names(root)):
        shutil.copytree(root / name, copied / name, copy_function=shutil.copy)
    for folder in (root, copied):
        assert newest_checkpoint(folder) == policy_within(folder) == folder / "checkpoint-8"
    toy_trainer(num_iterations=4, learning_rate=1e-4).train(resume_from_checkpoint=True)
    assert newest_checkpoint(root) == root / "checkpoint-16"
    saves = {name: json.loads((root / name / "rl_state.json").read_text())["save"] for name in names(root)}
    assert saves == {"checkpoint-8": 5, "checkpoint-12": 6, "checkpoint-16": 7}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_cannot_flush_folders_is_fine(tmp_path, monkeypatch, code):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refuse)
    weights.flush_to_disk(tmp_path)
    with pytest.raises(OSError, match="."):
        weights.flush_to_disk(tmp_path / "file")
