"""Trainers that push while they train: what is on the Hub afterwards, and that no failure of the Hub stops them."""

import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from transformers import TrainerCallback

from pi_rl import FlowPPOConfig, FlowPPOTrainer, load_policy
from pi_rl.cli.main import main
from pi_rl.hub.push_process import PushJob, PushProcess, run_push
from pi_rl.trainer import hub_push
from tests.hub.hub_server import File

REPO = "user/policy"


def config(tmp_path, **overrides):
    options = {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "seed": 3,
        "num_iterations": 2,
        "num_envs": 4,
        "rollout_chunks": 2,
        "per_device_train_batch_size": 8,
        "update_epochs": 1,
        "critic_hidden_sizes": [8],
        "env_workers": 1,
        "eval_episodes": 0,
        "save_every_iterations": 1,
        "disable_tqdm": True,
        "push_to_hub": True,
        "hub_model_id": REPO,
    }
    return FlowPPOConfig(**{**options, **overrides})


def warnings_in(text):
    return [line for line in text.splitlines() if line.startswith("warning:")]


@pytest.fixture
def train(mlp_folder, tmp_path):
    """Trains two iterations on a toy, with pushes; gives the trainer, still open."""
    made = []

    def run(model=mlp_folder, callbacks=None, resume=None, **overrides):
        trainer = FlowPPOTrainer(model, config(tmp_path, **overrides), "toy:point-mass", callbacks=callbacks)
        made.append(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run.made = made
    yield run
    for trainer in made:
        trainer.close()


def test_every_save_pushes_the_checkpoint_as_a_policy(hub_here, train, tmp_path):
    trainer = train(hub_always_push=True)
    repo = hub_here.repos[REPO]
    assert repo.messages == ["initial commit", "Training in progress, step 1", "Training in progress, step 2"]
    held = repo.files()
    last = tmp_path / "run" / "checkpoint-2"
    for name in ("model.safetensors", "critic.safetensors", "noise_network.safetensors"):
        assert held[name] == (last / name).read_bytes(), name
    state = json.loads((last / "rl_state.json").read_text())
    assert json.loads(held["rl_state.json"]) == state | {"start": Path(state["start"]).name}
    assert "iterations" in held["README.md"].decode()
    assert not [name for name in held if name.startswith("last-checkpoint") or name.endswith((".pt", ".pth", ".bin"))]
    assert not list((tmp_path / "run").glob(".push-*"))
    assert trainer.hub_model_id == REPO


def test_strategy_end_pushes_when_the_model_is_saved(hub_here, train, tmp_path):
    trainer = train(hub_strategy="end", hub_private_repo=True)
    assert hub_here.repos[REPO].messages == ["initial commit"]
    assert hub_here.repos[REPO].private
    trainer.save_model(str(tmp_path / "run" / "policy"))
    assert hub_here.repos[REPO].messages == ["initial commit", "Model save"]


def test_strategy_checkpoint_adds_the_whole_checkpoint(hub_here, train, tmp_path):
    of_an_adapted_run = {"last-checkpoint/adapter/adapter_config.json": File(b"{}", lfs=False)}
    hub_here.create(REPO).commit("main", of_an_adapted_run, "Earlier")
    train(hub_strategy="checkpoint", hub_always_push=True, save_total_limit=1, hub_revision="runs")
    held = hub_here.repos[REPO].files("runs")
    inside = {name.removeprefix("last-checkpoint/") for name in held if name.startswith("last-checkpoint/")}
    there = {path.relative_to(tmp_path / "run" / "checkpoint-2").as_posix()
             for path in (tmp_path / "run" / "checkpoint-2").rglob("*") if path.is_file()}  # fmt: skip
    assert inside == {name for name in there if not name.endswith((".pt", ".pth", ".bin"))}
    assert json.loads(held["last-checkpoint/trainer_state.json"])["global_step"] == 2
    assert str(tmp_path).encode() not in held["last-checkpoint/trainer_state.json"]
    for name in ("model.safetensors", "critic.safetensors", "noise_network.safetensors"):
        assert held[name] == held[f"last-checkpoint/{name}"]
        assert hub_here.count("PUT", hashlib.sha256(held[name]).hexdigest()) == 1  # there twice, sent once


@pytest.mark.slow
def test_strategy_all_checkpoints_keeps_each(hub_here, train):
    train(hub_strategy="all_checkpoints", hub_always_push=True)
    held = hub_here.repos[REPO].files()
    for step in (1, 2):
        assert json.loads(held[f"checkpoint-{step}/trainer_state.json"])["global_step"] == step
        assert f"checkpoint-{step}/model.safetensors" in held


def test_push_to_hub_saves_writes_the_card_and_uploads(hub_here, train, tmp_path):
    trainer = train(push_to_hub=False, save_every_iterations=None)
    assert not hub_here.repos
    outcome = trainer.push_to_hub("Mine", license="mit", tags="mine", dataset="user/demos")
    assert outcome.error is None
    assert hub_here.repos[REPO].messages[-1] == "Mine"
    card = hub_here.repos[REPO].files()["README.md"].decode()
    for text in ("license: mit", "- mine", "- lerobot", "user/demos"):
        assert text in card
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="card takes"):
        trainer.push_to_hub(color="red")


@pytest.mark.slow
def test_a_name_without_an_owner_is_the_tokens_owners(hub_here, train):
    trainer = train(hub_model_id=None)
    assert trainer.hub_model_id == "user/run"
    assert "model.safetensors" in hub_here.repos["user/run"].files()


def test_a_bad_repository_name_is_refused_before_training(hub_here, mlp_folder, tmp_path):
    with pytest.raises(ValueError, match="hub_model_id='a b'"):
        FlowPPOTrainer(mlp_folder, config(tmp_path, hub_model_id="a b"), "toy:point-mass")


def test_a_hub_that_refuses_everything_stops_nothing(hub_here, train, tmp_path, capfd):
    hub_here.fail("", 403, times=10_000)
    trainer = train(hub_always_push=True)
    run = tmp_path / "run"
    told = warnings_in(capfd.readouterr().err)
    assert "could not be prepared" in told[0]
    assert "2 of 2 pushes to the Hub failed" in told[-1]  # also without close()
    assert f"pi-rl push {run / 'checkpoint-2'} --repo {REPO}" in told[-1]
    assert trainer.state.global_step == 2
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    load_policy(run / "checkpoint-2")
    outcome = trainer.push_saved(run / "checkpoint-2")
    assert outcome.error is not None
    trainer.close()
    report = warnings_in(capfd.readouterr().err)[-1]
    assert "1 of 1 pushes to the Hub failed" in report
    assert f"pi-rl push {run / 'checkpoint-2'} --repo {REPO}" in report
    assert hub_here.write_token not in report
    trainer.close()
    assert "pushes" not in capfd.readouterr().err  # each failure is told once


@pytest.mark.slow
def test_the_command_of_a_failed_push_repeats_exactly_that_push(hub_here, train, tmp_path, capfd):
    hub_here.fail("/commit/", 403, times=2)
    trainer = train(hub_strategy="checkpoint", num_iterations=1, hub_private_repo=True)
    command = shlex.split(warnings_in(capfd.readouterr().err)[-1].partition("latest state: ")[2])
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    assert command == ["pi-rl", "push", checkpoint, "--repo", REPO, "--private", "--whole", "last-checkpoint"]
    outcome = trainer.push_to_hub(revision="candidate")
    assert shlex.split(outcome.command)[-2:] == ["--revision", "candidate"]
    trainer.push_to_hub()
    trainer.close()
    report = warnings_in(capfd.readouterr().err)[-1]
    assert "1 of 2 pushes to the Hub failed" in report
    assert report.endswith(outcome.command)  # main has its push, the other branch has not
    assert main(command[1:]) == 0
    assert main(shlex.split(outcome.command)[1:]) == 0
    repo = hub_here.repos[REPO]
    assert "model.safetensors" in repo.files("candidate")
    held = repo.files()
    trainer._left_out = trainer._checkpoint_push(Path(checkpoint))
    trainer._finish_current_push()
    assert repo.files() == held  # the run's own push is the same
    assert "last-checkpoint/optimizer.safetensors" in held


def test_an_odd_folder_is_a_failed_push(hub_here, train, tmp_path):
    trainer = train(num_iterations=1)
    (tmp_path / "run" / "checkpoint-1" / "policy_preprocessor.json").write_text('{"stages": []}')
    outcome = trainer.push_saved(tmp_path / "run" / "checkpoint-1")
    assert "steps" in outcome.error
    assert not list((tmp_path / "run").glob(".push-*"))


class StopAt(TrainerCallback):
    """Ends the training after a step, long before its last."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_push_after_a_training_that_stopped_early_is_waited_for(hub_here, train):
    trainer = train(num_iterations=3, callbacks=[StopAt(1)], hub_strategy="end")
    assert trainer.state.global_step < trainer.state.max_steps
    trainer.push_to_hub("Early", blocking=False)
    trainer.close()
    assert hub_here.repos[REPO].messages == ["initial commit", "Early"]


@pytest.mark.slow
def test_failures_before_a_success_are_reported_as_such(hub_here, train, capfd):
    hub_here.fail("/commit/", 403)
    trainer = train(hub_always_push=True)
    assert hub_here.repos[REPO].messages == ["initial commit", "Training in progress, step 2"]
    assert "1 of 2 pushes to the Hub failed" in (told := capfd.readouterr().err)
    assert "The Hub has the latest state" in told
    trainer.close()
    assert "pushes" not in capfd.readouterr().err


class ReleaseAtSave(TrainerCallback):
    """Lets the Hub answer again after the save of a step."""

    def __init__(self, hub, step):
        self.hub, self.step = hub, step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.hub.paused.set()


@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
def test_saves_during_a_push_are_left_out_or_wait_in_line(hub_here, train, always, capfd):
    hub_here.paused.clear()  # the first push waits for the answer to its commit
    train(num_iterations=3, hub_always_push=always, callbacks=[ReleaseAtSave(hub_here, 3)])
    steps = [message.rpartition(" ")[2] for message in hub_here.repos[REPO].messages[1:]]
    assert steps == (["1", "2", "3"] if always else ["1", "3"])  # the newest is never left out
    told = "an earlier push went on: 1. The Hub has the latest state."
    assert (told in capfd.readouterr().out) is not always


def test_a_newest_checkpoint_that_was_left_out_is_named_when_the_training_breaks_off(hub_here, train, tmp_path, capfd):
    class Break(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("broken off")

    hub_here.paused.clear()
    with pytest.raises(RuntimeError, match="broken off"):
        train(callbacks=[Break()])
    train.made[-1].close()
    report = warnings_in(capfd.readouterr().err)[-1]
    assert "the run ended first" in report
    assert "an earlier push went on: 1" in report
    assert f"pi-rl push {tmp_path / 'run' / 'checkpoint-2'} --repo {REPO}" in report


def test_a_push_that_hangs_is_given_up(hub_here, train, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hub_push, "FINISH_LIMIT_S", 1.0)
    hub_here.paused.clear()
    trainer = train(num_iterations=1)
    trainer.close()
    assert "was not finished after 1 s and" in capfd.readouterr().err
    assert not list((tmp_path / "run").glob(".push-*"))
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()


def test_a_push_process_that_dies_is_a_failure(tmp_path):
    (tmp_path / "s").mkdir()
    files = {"a": str(tmp_path / "missing")}
    job = PushJob(repo_id=REPO, command="pi-rl push", files=files, staging=str(tmp_path / "s"))
    process = PushProcess(job)
    assert "ended with code 1" in process.outcome(60).error
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("code", "told"), [("print('hello')", None), ("os._exit(0)", "ended without an answer")])
def test_what_libraries_print_is_no_answer_and_no_answer_is_a_failure(hub_here, tmp_path, monkeypatch, code, told):
    """A module that Python imports at its start prints, or ends the process that pushes."""
    (tmp_path / "sitecustomize.py").write_text(f"import os\n{code}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(":")]))
    (tmp_path / "notes.md").write_text("words")
    outcome = run_push(PushJob(repo_id=REPO, command="", files={"notes.md": str(tmp_path / "notes.md")}), limit_s=60)
    assert (told is None and outcome.error is None) or told in outcome.error
    assert (told is None) == (REPO in hub_here.repos)


def test_a_push_process_that_cannot_start_is_a_failure(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    assert "could not be started" in run_push(PushJob(repo_id=REPO, command="", files={}), limit_s=60).error


@pytest.mark.slow
def test_training_continues_from_the_hub(hub_here, train, mlp_folder):
    train(hub_strategy="end").push_to_hub()
    trainer = train(model=REPO, push_to_hub=False, num_iterations=1)
    assert trainer.state.global_step == 1
    assert Path(trainer._loaded.path).is_relative_to(os.environ["HF_HOME"])


@pytest.mark.slow
def test_a_run_continues_from_the_last_checkpoint_on_the_hub(hub_here, train, tmp_path):
    """On another machine: nothing is left but the Hub."""
    train(hub_strategy="checkpoint", hub_always_push=True)
    run = tmp_path / "run"
    weights = (run / "checkpoint-2" / "model.safetensors").read_bytes()
    shutil.rmtree(run)
    snapshot_download(REPO, allow_patterns=["last-checkpoint/*"], local_dir=run)
    assert (run / "last-checkpoint" / "model.safetensors").read_bytes() == weights
    trainer = train(resume=str(run / "last-checkpoint"), push_to_hub=False, num_iterations=3)
    assert trainer.state.global_step == 3
    assert [entry["iteration"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
