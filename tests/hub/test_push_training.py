"""Trainers that push while they train: what is on the Hub afterwards, and that no failure of the Hub stops them."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download
from transformers import TrainerCallback

from pi_rl import FlowPPOConfig, FlowPPOTrainer, load_policy
from pi_rl.hub.push_process import PushJob, PushProcess
from pi_rl.trainer import hub_push

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


@pytest.fixture
def train(mlp_folder, tmp_path):
    """Trains two iterations on a toy, with pushes; gives the trainer, still open."""
    made = []

    def run(model=mlp_folder, callbacks=None, resume=None, **overrides):
        trainer = FlowPPOTrainer(model, config(tmp_path, **overrides), "toy:point-mass", callbacks=callbacks)
        made.append(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

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
    counters = json.loads((last / "rl_state.json").read_text())
    assert json.loads(held["rl_state.json"]) == {**counters, "start": Path(counters["start"]).name}  # no path of here
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
    assert trainer.state.global_step == 2
    assert {path.name for path in run.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    load_policy(run / "checkpoint-2")
    assert "could not be prepared" in capfd.readouterr().err
    outcome = trainer.push_saved(run / "checkpoint-2")
    assert outcome.error is not None
    trainer.close()
    report = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning:")][-1]
    assert "3 of 3 pushes to the Hub failed" in report
    assert f"pi-rl push {run / 'checkpoint-2'} --repo {REPO}" in report
    assert hub_here.write_token not in report


@pytest.mark.slow
def test_failures_before_a_success_are_reported_as_such(hub_here, train, capfd):
    hub_here.fail("/commit/", 403)
    trainer = train(hub_always_push=True)
    assert hub_here.repos[REPO].messages == ["initial commit", "Training in progress, step 2"]
    trainer.close()
    assert "1 of 2 pushes to the Hub failed" in (told := capfd.readouterr().err)
    assert "The last push succeeded" in told


class ReleaseAtSave(TrainerCallback):
    """Lets the Hub answer again after the save of a step."""

    def __init__(self, hub, step):
        self.hub, self.step = hub, step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.hub.paused.set()


@pytest.mark.slow
@pytest.mark.parametrize("always", [False, True])
def test_saves_during_a_push_are_left_out_or_wait_in_line(hub_here, train, always):
    hub_here.paused.clear()  # the first push waits for the answer to its commit
    train(num_iterations=3, hub_always_push=always, callbacks=[ReleaseAtSave(hub_here, 3)])
    steps = [message.rpartition(" ")[2] for message in hub_here.repos[REPO].messages[1:]]
    assert steps == (["1", "2", "3"] if always else ["1"])


def test_a_push_that_hangs_is_given_up(hub_here, train, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hub_push, "FINISH_LIMIT_S", 1.0)
    hub_here.paused.clear()
    trainer = train(num_iterations=1)
    trainer.close()
    assert "was not finished after" in capfd.readouterr().err
    assert not list((tmp_path / "run").glob(".push-*"))
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()


def test_a_push_process_that_dies_is_a_failure(tmp_path):
    (tmp_path / "s").mkdir()
    files = {"a": str(tmp_path / "missing")}
    job = PushJob(repo_id=REPO, command="pi-rl push", files=files, staging=str(tmp_path / "s"))
    process = PushProcess(job)
    assert "ended with code 1" in process.outcome(60).error
    assert not (tmp_path / "s").exists()


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
