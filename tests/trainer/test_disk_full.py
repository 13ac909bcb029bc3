"""Disks that are full or refuse: what failed is said with numbers, earlier checkpoints stay, nothing half remains."""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from transformers import TrainerCallback

from pi_rl.hub.report_notes import notes_of
from pi_rl.hub.run_record import read_run
from pi_rl.run_report import RunLog
from pi_rl.trainer.checkpoint_folders import check_checkpoint, checkpoints

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
LIBC = ctypes.CDLL(None, use_errno=True)


def own_mounts():
    """Lets this process mount file systems that nobody else sees; as an ordinary user, in a user namespace."""
    ids = (os.getuid(), os.getgid())
    if LIBC.unshare(CLONE_NEWNS | (CLONE_NEWUSER if ids[0] else 0)) != 0:
        return False
    if ids[0]:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {ids[0]} 1")
        Path("/proc/self/gid_map").write_text(f"0 {ids[1]} 1")
    return LIBC.mount(b"none", b"/", None, 0x4000 | 0x40000, None) == 0  # private, recursively


def mount_tmpfs(folder, size, flags=0):
    folder.mkdir(exist_ok=True)
    return LIBC.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, f"size={size}".encode()) == 0


@pytest.fixture(scope="module")
def mounts_work(tmp_path_factory):
    """Whether the kernel lets this user mount a small disk; asked in a process of its own."""
    folder = tmp_path_factory.mktemp("mount")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if own_mounts() and mount_tmpfs(folder / "disk", "1m") else 1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        pytest.skip("this kernel lets the user mount nothing; the tests with RLIMIT_FSIZE run all the same")


def on_small_disk(disk, size, act, report):
    """A function to fork: acts with a full disk mounted, then copies what the disk holds to where all can see it."""

    def run():
        assert own_mounts()
        assert mount_tmpfs(disk, size)
        try:
            act()
        finally:
            shutil.copytree(disk, report)

    return run


@pytest.mark.usefixtures("mounts_work")
def test_a_full_disk_costs_the_checkpoint_that_did_not_fit_and_training_goes_on(toy_trainer, fork, tmp_path):
    """Room for two checkpoints of about 0.3 MB; the last one, which has to be written, is an error."""
    disk, report = tmp_path / "disk", tmp_path / "report"
    run = fork(on_small_disk(disk, "800k", lambda: toy_trainer(disk / "run").train(), report))
    assert run.wait() == 1
    assert "checkpoint-12 could not be written to" in run.output
    assert "No space left on device" in run.output
    assert "Earlier checkpoints are intact and training goes on; checkpoints that failed so far: 1." in run.output
    assert "iteration 4/4" in run.output
    assert "NotWritten: checkpoint-16 could not be written to" in run.output
    assert " MB are free there" in run.output
    assert "Little room in" in run.output
    kept = checkpoints(report / "run")
    assert [path.name for path in kept] == ["checkpoint-4", "checkpoint-8"]
    for folder in kept:
        check_checkpoint(folder)
    assert {path.name for path in (report / "run").iterdir()} == {path.name for path in kept}


def write_config(mlp_folder, root, *extra):
    return [
        "--model", str(mlp_folder), "--env", "toy:point-mass", "--env_options", "{max_episode_steps: 8}", "--no_video",
        "--output_dir", str(root), "--use_cpu", "--num_envs", "4", "--rollout_chunks", "4", "--update_epochs", "1",
        "--per_device_train_batch_size", "16", "--num_iterations", "2", "--eval_episodes", "2",
        "--critic_hidden_sizes", "16", *extra,
    ]  # fmt: skip


@pytest.mark.usefixtures("mounts_work")
def test_a_recipe_that_cannot_save_its_policy_ends_with_2(mlp_folder, fork, tmp_path):
    from pi_rl import recipe_main

    disk, report = tmp_path / "disk", tmp_path / "report"
    words = write_config(mlp_folder, disk / "run")
    run = fork(on_small_disk(disk, "60k", lambda: recipe_main("", None, "flow_noise", words), report))
    assert run.wait() == 2
    assert "error: policy could not be written to" in run.output
    assert "No space left on device" in run.output
    assert "Traceback" not in run.output
    assert not (report / "run" / "policy").exists()
    assert not list((report / "run").glob(".policy-*"))


@pytest.mark.usefixtures("mounts_work")
def test_a_disk_that_cannot_be_written_to_is_refused_before_anything_is_simulated(mlp_folder, fork, tmp_path):
    from pi_rl import recipe_main

    disk = tmp_path / "disk"

    def run():
        assert own_mounts()
        assert mount_tmpfs(disk, "1m", flags=1)  # read-only
        recipe_main("", None, "flow_noise", write_config(mlp_folder, disk / "run"))

    refused = fork(run)
    assert refused.wait() == 2
    assert "cannot be written to (Read-only file system)" in refused.output
    assert "Baseline" not in refused.output


@pytest.mark.usefixtures("mounts_work")
def test_films_that_do_not_fit_on_the_disk_are_left_out_and_training_goes_on(filmed_trainer, fork, tmp_path):
    """The films have a disk of their own, with room for none; checkpoints fit on the other one."""
    disk, report = tmp_path / "run" / "videos", tmp_path / "report"
    disk.mkdir(parents=True)
    run = fork(on_small_disk(disk, "4k", lambda: filmed_trainer().train(), report))
    assert run.wait() == 0, run.output
    for episode in range(2):
        assert run.output.count(f"The film of evaluation episode {episode} failed: ") == 2
    assert "No space left on device" in run.output
    assert list(report.iterdir()) == []
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]
    record = read_run(tmp_path / "run")
    assert len(record.iterations) == 2
    films = [note.text for note in notes_of(record) if "film" in note.text]
    assert all(text.endswith("Training goes on.") for text in films)
    assert len(films) >= 2


class FillsDisk(TrainerCallback):
    """Leaves no room on a disk once an iteration has been logged."""

    def __init__(self, disk):
        self.disk = disk

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            return
        with (self.disk / f"filler-{state.global_step}").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))


@pytest.mark.usefixtures("mounts_work")
def test_a_full_disk_costs_tensorboards_record_and_training_goes_on(toy_trainer, fork, tmp_path, assert_same_end):
    """The event file has a disk of its own, which is full after the first iteration; checkpoints fit on the other."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    disk, report = tmp_path / "run" / "runs", tmp_path / "report"
    disk.mkdir(parents=True)

    def train():
        # each iteration logs more than is left of the event file's last block
        callbacks = [RunLog(tmp_path / "run", "toy:point-mass"), FillsDisk(disk)]
        trainer = toy_trainer(callbacks=callbacks, report_to=["tensorboard"], num_iterations=8)
        trainer.train()
        trainer.evaluate()
        trainer.close()

    run = fork(on_small_disk(disk, "200k", train, report))
    assert run.wait() == 0, run.output
    said = [line.strip() for line in run.output.splitlines() if "The dashboard tensorboard" in line]
    assert len(said) == 1, run.output
    assert "No space left on device" in said[0]
    assert said[0].endswith("The run goes on without it.")
    assert "iteration 8/8" in run.output
    assert [note.text for note in notes_of(read_run(tmp_path / "run")) if "tensorboard" in note.text] == said
    (folder,) = (path for path in report.iterdir() if path.is_dir())
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/policy/loss")][0] == 4
    toy_trainer(tmp_path / "plain", num_iterations=8).train()
    assert_same_end(tmp_path / "plain", tmp_path / "run", "checkpoint-32")


def test_a_folder_that_cannot_be_made_is_refused(toy_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir='.*file/run' cannot be written to \(Not a directory\)"):
        toy_trainer(tmp_path / "file" / "run")


def test_a_limit_of_file_sizes_costs_one_checkpoint_and_no_other(toy_trainer, fork, tmp_path):
    """The kernel refuses to write more than so many bytes to one file, as with a quota; lifted again, saving works."""

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        trainer = toy_trainer()
        real = trainer.write_checkpoint

        def limited(**options):
            limit = 100_000 if trainer.state.global_step == 8 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return real(**options)

        trainer.write_checkpoint = limited
        trainer.train()

    run = fork(run)
    assert run.wait() == 0, run.output
    assert "checkpoint-8 could not be written to" in run.output
    assert "File too large" in run.output
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-12", "checkpoint-16"]
    assert not (tmp_path / "run" / ".incomplete").exists()


def test_both_processes_go_on_when_the_first_cannot_save(toy_trainer, fork_ranks, tmp_path):
    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        trainer = toy_trainer(num_envs=8, eval_episodes=0, num_iterations=3)
        real = trainer.write_checkpoint

        def limited(**options):
            limit = 100_000 if trainer.state.global_step == 8 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            return real(**options)

        trainer.write_checkpoint = limited
        trainer.train()
        assert trainer.failed_saves == 1

    ranks = fork_ranks(run)
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert "checkpoint-8 could not be written to" in ranks[0].output
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-12"]


def test_a_recipe_refuses_checkpoints_that_it_cannot_resume_with_2(toy_trainer, mlp_folder, fork, tmp_path):
    """Damaged, of a newer pi_rl, or with a misspelt setting; nothing is simulated and no folder is made."""
    from pi_rl import recipe_main

    toy_trainer(tmp_path / "earlier", num_iterations=1).train()
    earlier = tmp_path / "earlier" / "checkpoint-4"

    def refused(*extra):
        words = write_config(mlp_folder, tmp_path / "run", *extra)
        run = fork(lambda: recipe_main("", None, "flow_noise", words))
        assert run.wait() == 2, run.output
        assert "Traceback" not in run.output
        assert "Baseline" not in run.output
        assert not (tmp_path / "run").exists()
        return run.output

    assert "is no checkpoint of a training run" in refused("--resume_from_checkpoint", str(mlp_folder))
    config = earlier / "pi_rl_config.yaml"
    config.write_text(config.read_text().replace("rollout_chunks:", "rolout_chunks:"))
    text = refused("--config", str(config))
    assert "rolout_chunks" in text
    assert "the nearest: rollout_chunks" in text
    state = json.loads((earlier / "rl_state.json").read_text())
    (earlier / "rl_state.json").write_text(json.dumps({**state, "format": 99, "pi_rl": "7.1"}))
    assert "was written by pi_rl 7.1 in format 99" in refused("--resume_from_checkpoint", str(earlier))
    (earlier / "optimizer.safetensors").write_bytes(b"")
    (earlier / "rl_state.json").write_text(json.dumps(state))
    assert "optimizer.safetensors is not a readable" in refused("--resume_from_checkpoint", str(earlier))


def test_a_recipe_begins_with_the_checkpoint_it_is_given(toy_trainer, mlp_folder, fork, tmp_path):
    from pi_rl import recipe_main

    words = write_config(mlp_folder, tmp_path / "first", "--save_every_iterations", "1", "--num_iterations", "3")
    first = fork(lambda: recipe_main("", None, "flow_noise", words))
    assert first.wait() == 0, first.output
    other = [word.replace(str(tmp_path / "first"), str(tmp_path / "second")) for word in words]
    given = ["--resume_from_checkpoint", str(tmp_path / "first" / "checkpoint-2"), "--learning_rate", "1e-6"]
    second = fork(lambda: recipe_main("", None, "flow_noise", [*other, *given]))
    assert second.wait() == 0, second.output
    assert "iteration 3/3" in second.output
    assert "iteration 2/3" not in second.output
    assert [path.name for path in checkpoints(tmp_path / "second")] == ["checkpoint-3"]
    (tmp_path / "first" / "results.json").unlink()  # not finished, so the run would go on
    own = fork(lambda: recipe_main("", None, "flow_noise", [*words, *given[:2]]))
    assert own.wait() == 2, own.output
    assert "give another --output_dir" in own.output
    assert "resume_from_checkpoint" not in (tmp_path / "second" / "pi_rl_config.yaml").read_text()
