"""The SFT recipe on a small dataset; training itself runs in this process, where LeRobot is imported already."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pi_rl.pipeline import RecipeError
from pi_rl.sft_recipe import run_sft_recipe
from pi_rl.trainer.stop_signals import StopSignals

ROOT = Path(__file__).parents[1]
REPO_ID = "local/two-tasks"
TASKS = ("Press a handle down", "Push the button")
VLM = "model.paligemma_with_expert.paligemma."
QUICK = ["--device", "cpu", "--num_workers", "0", "--batch_size", "4", "--save_every_steps", "0",
         "--warmup_steps", "1", "--learning_rate", "1e-3"]  # fmt: skip


@pytest.fixture(scope="module")
def dataset_root(two_task_dataset):
    return two_task_dataset


@pytest.fixture(autouse=True)
def training_in_this_process(monkeypatch):
    """Runs jobs here and undoes what lerobot-train leaves behind; a real process is tested in test_sft.py."""
    from accelerate.state import AcceleratorState, GradientState

    from pi_rl.trainer import sft_worker

    class Worker:
        def __init__(self, **options):
            self.report = None

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def write(self, line):
            message = json.loads(line)
            if "loss" in message:
                self.report(message["step"], self.steps, f"loss {message['loss']:.3f}")

        def flush(self):
            pass

        def run(self, job, progress=None):
            self.steps, self.report = job.steps, progress
            with StopSignals(announce=None) as signals:
                return sft_worker.run(job, self, signals)

    monkeypatch.setattr("pi_rl.trainer.sft.SftProcess", Worker)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def sft(small_policy_folders, dataset_root, tmp_path):
    """Runs the recipe: ``sft("pi0", "--steps", "2")``; options given replace the fixture's."""

    def run(kind, *words, output="policy"):
        return run_sft_recipe(
            "A test.",
            None,
            ["--model", str(small_policy_folders[kind]), "--dataset", REPO_ID, "--dataset_root", str(dataset_root),
             "--output_dir", str(tmp_path / output), "--steps", "2", *QUICK, *words],
        )  # fmt: skip

    return run


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
@pytest.mark.parametrize("expert_only", [False, True], ids=["full", "expert"])
def test_what_is_frozen_stays_and_what_is_trained_moves(sft, small_policy_folders, kind, expert_only):
    after = weights(sft(kind, "--expert_only", str(expert_only)))
    before = weights(small_policy_folders[kind])
    assert set(after) == set(before)
    same = {name for name in before if torch.equal(before[name], after[name])}
    unused = {name for name in before if name.endswith("lm_head.weight")}
    vlm = {name for name in before if name.startswith(VLM)} - unused
    expert = {name for name in before if ".gemma_expert." in name or "action_out_proj" in name} - unused
    assert len(expert - same) > len(expert) / 2
    if expert_only:
        assert vlm <= same
    else:
        assert len(vlm - same) > len(vlm) / 2


def test_the_output_is_what_rl_starts_from(sft, metaworld_env, small_policy_folders, tmp_path):
    from pi_rl import FlowPPOConfig, FlowPPOTrainer, load_policy

    folder = sft("pi05", "--state_in_prompt", "false", "--n_action_steps", "3", "--denoising_steps", "2",
                 "--gradient_checkpointing", "true", "--output_dtype", "bfloat16")  # fmt: skip
    loaded = load_policy(folder)
    config = loaded.policy.config
    assert (config.chunk_size, config.n_action_steps, config.num_inference_steps) == (5, 3, 2)
    assert not config.gradient_checkpointing
    assert not config.train_expert_only
    assert list(config.input_features) == ["observation.image", "observation.state"]
    assert weights(folder)["model.action_out_proj.weight"].dtype == torch.float32  # as LeRobot's bfloat16 policies
    image = torch.zeros(1, 3, 32, 32)
    prompts = [
        loaded.preprocessor({"observation.image": image, "observation.state": state, "task": [TASKS[0]]})
        for state in (torch.zeros(1, 4), torch.ones(1, 4))
    ]
    assert torch.equal(*(prompt["observation.language.tokens"] for prompt in prompts))
    for file in folder.glob("*.json"):
        assert str(tmp_path) not in file.read_text().replace(str(folder), "")
        assert str(small_policy_folders["pi05"]) not in file.read_text()
    card = (folder / "README.md").read_text()
    assert (
        f"--model {small_policy_folders['pi05'].name} --dataset {REPO_ID} --dataset_root data --output_dir pol" in card
    )
    assert not re.search(r"[\s='\"(]/\w", card)
    args = FlowPPOConfig(output_dir=str(tmp_path / "rl"), num_envs=2, rollout_chunks=2, num_iterations=1,
                         per_device_train_batch_size=4, eval_episodes=0, use_cpu=True, update_epochs=1)  # fmt: skip
    trainer = FlowPPOTrainer(str(folder), args, metaworld_env(num_envs=2, max_episode_steps=6))
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_subset_is_the_same_each_time_and_is_recorded(sft, capsys, monkeypatch):
    import pi_rl.sft_recipe

    jobs = []
    monkeypatch.setattr(pi_rl.sft_recipe, "run_sft", lambda *args, **options: jobs.append(options) or 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            sft("pi0", "--episodes_per_task", "1")
    assert jobs[0]["episodes"] == jobs[1]["episodes"]
    assert sorted(episode % 2 for episode in jobs[0]["episodes"]) == [0, 1]
    assert "2 of 6 episodes of local/two-tasks: 2 tasks, 12 frames" in capsys.readouterr().out


def test_a_run_that_was_killed_continues_bitwise(sft, monkeypatch, tmp_path, capsys):
    whole = sft("pi0", "--steps", "4", "--save_every_steps", "2", "--episodes", "0", "1", "5", output="whole")

    class Killed(BaseException):
        pass

    def die(step, steps, text):
        if step == 3:
            raise Killed

    words = ("--steps", "4", "--save_every_steps", "2", "--episodes", "0", "1", "5")
    with monkeypatch.context() as patch:
        patch.setattr("pi_rl.sft_recipe.Progress", lambda *_, **__: die)
        with pytest.raises(Killed):
            sft("pi0", *words, output="killed")
    assert "checkpoint after step 2 is kept" in capsys.readouterr().out
    assert not (tmp_path / "killed").exists()
    with pytest.raises(RecipeError, match="unfinished run with other settings.*seed: 7"):
        sft("pi0", *words, "--seed", "7", output="killed")
    continued = sft("pi0", *words, output="killed")
    assert "Continuing from the checkpoint after step 2" in capsys.readouterr().out
    first, second = weights(whole), weights(continued)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    assert json.loads((continued / "train_config.json").read_text())["dataset"]["episodes"] == [0, 1, 5]
    card = (continued / "README.md").read_text()
    assert "Episodes: 0, 1, 5" in card
    assert "has not been measured" in card
    with pytest.raises(RecipeError, match="exists already"):
        sft("pi0", *words, output="killed")


@pytest.mark.parametrize(("told", "every"), [(3, 0), (5, 4), (9, 0), (9, 4), (11, 4)], ids=lambda value: str(value))
def test_a_run_that_is_told_to_end_saves_its_step_and_continues_bitwise(
    sft, monkeypatch, tmp_path, capsys, told, every
):
    """Also where an epoch ends (step 9 of 4 samples of 36)."""
    from pi_rl.trainer import sft_worker

    words = ("--steps", "12", "--save_every_steps", str(every))
    whole = sft("pi0", *words, output="whole")
    monkeypatch.setattr(sft_worker, "_PROGRESS_INTERVAL_S", 0.0)

    def tell(step, steps, text):
        if step == told:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("pi_rl.sft_recipe.Progress", lambda *_, **__: tell)
        with pytest.raises(sft_worker.Stopped, match=f"Ended by SIGTERM after step {told}"):
            sft("pi0", *words, output="told")
    resume = f"The same command, or pi-rl sft --resume {tmp_path}/told, continues from it"
    assert f"the checkpoint after step {told} is kept. {resume}" in capsys.readouterr().out
    checkpoints = tmp_path / ".told.partial" / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"{told:06d}", "last"]
    continued = sft("pi0", *words, output="told")
    assert f"Continuing from the checkpoint after step {told}" in capsys.readouterr().out
    first, second = weights(whole), weights(continued)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_dry_run_checks_and_writes_nothing(sft, tmp_path, capsys):
    sft("pi0", "--dry_run", "--expert_only")
    assert "pi0_small from " in (printed := capsys.readouterr().out)
    assert "2 steps x 4 samples (4 per process x 1) = 0.2 passes" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--episodes", "0", "6"], r"Episodes \[6\] are not in the dataset"),
        (["--covers_tasks", "40"], "2 tasks instead of covers_tasks=40"),
        (["--dataset_root", "/nowhere"], "There is no LeRobotDataset at dataset_root=/nowhere"),
        (["--model", "nowhere"], "neither an existing folder nor a Hub id"),
        (["--n_action_steps", "9"], "more than the chunk_size=5"),
        (["--normalization", "min_max"], "normalization='min_max' is unknown"),
        (["--state_in_prompt", "false"], "state_in_prompt is for π0.5"),
        (["--steps", "0"], "steps=0 is not allowed"),
        (["--warmup_steps", "2"], "warmup_steps=2 is not allowed: it must be 0 or more and below steps=2"),
        (["--seed", "-1"], "seed=-1 is not allowed: it must be 0 or more"),
        (["--subset_seed", "-1"], "subset_seed=-1 is not allowed"),
        (["--only_tasks", TASKS[0], "--except_tasks", TASKS[0]], "only_tasks=.* and except_tasks=.* leave no task"),
        (["--learning_rat", "1"], "nearest: --learning_rate"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(sft, tmp_path, words, message):
    with pytest.raises(RecipeError, match=message):
        sft("pi0", *words)
    assert list(tmp_path.iterdir()) == []


def test_processes_share_the_batch(sft, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="batch_size=4 cannot be shared equally by 3 processes"):
        sft("pi0")


def test_other_processes_draw_their_own_noise_in_every_step(monkeypatch):
    """Whatever was saved before: a run that is resumed after a step draws what one that was not does."""
    from pi_rl.trainer import sft_worker
    from pi_rl.trainer.sft import SftJob

    job = SftJob(**{**dict.fromkeys(SftJob.__dataclass_fields__), "seed": 3, "device": "cpu", "save_every_steps": 2})
    accelerator = sft_worker.SftAccelerator(job, io.StringIO(), None, StopSignals(announce=None))

    def noise(rank, step):
        torch.manual_seed(job.seed)  # as lerobot-train does on every process
        monkeypatch.setattr(sft_worker.SftAccelerator, "process_index", rank)
        accelerator._step = step
        with accelerator.autocast():
            return torch.randn(4).tolist()

    torch.manual_seed(job.seed)
    alone = torch.randn(4).tolist()
    assert noise(0, 0) == noise(0, 1) == alone
    drawn = [noise(rank, step) for rank in (1, 2) for step in (0, 1, 2)]
    assert len({tuple(values) for values in (alone, *drawn)}) == 7
    accelerator._first = 1  # a resumed run
    assert noise(1, 1) == drawn[1]


def test_a_failure_before_the_first_checkpoint_leaves_nothing(sft, small_policy_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("pi_rl.trainer.sft_worker.train", lambda *_: (_ for _ in ()).throw(RuntimeError("on fire")))
    with pytest.raises(RecipeError, match="on fire"):
        sft("pi0", "--save_every_steps", "1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_train_together(small_policy_folders, dataset_root, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file",
         str(ROOT / "recipes/accelerate/cpu_ddp.yaml"), str(ROOT / "recipes/sft.py"),
         "--config", str(ROOT / "recipes/configs/sft/base.yaml"), "--model", str(small_policy_folders["pi0"]),
         "--dataset", REPO_ID, "--dataset_root", str(dataset_root), "--output_dir", str(tmp_path / "policy"),
         "--steps", "3", "--dtype", "float32", *QUICK],
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "(2 per process x 2)" in result.stdout
    assert "reduction" not in result.stderr
    assert json.loads((tmp_path / "policy/train_config.json").read_text())["batch_size"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_the_policy_is_pushed_with_its_card(sft, hub_here, capfd):
    folder = sft("pi0", "--push_to_hub", "--hub_model_id", "user/sft", "--hub_private_repo")
    repo = hub_here.repos["user/sft"]
    assert repo.private
    held = repo.files()
    assert held["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b"imitation-learning" in held["README.md"]
    assert f"{hub_here.address}/user/sft (" in capfd.readouterr().out


def test_a_hub_that_refuses_leaves_the_policy_and_says_how_to_repeat(sft, hub_here, capfd):
    hub_here.fail("", 403, times=100)
    folder = sft("pi0", "--push_to_hub", "--hub_model_id", "user/sft")
    assert (folder / "model.safetensors").is_file()
    assert f"pi-rl push {folder} --repo user/sft" in capfd.readouterr().err
    with pytest.raises(RecipeError, match="user/name"):
        sft("pi0", "--push_to_hub", "--hub_model_id", "sft", output="other")
