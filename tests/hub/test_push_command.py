"""`pi-rl push`, and what users do with a policy on the Hub: each in processes of their own, as they start them."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from pi_rl.cli.main import main
from pi_rl.policies.small.create import create_small_policy
from tests.hub.hub_client import run_client

REPO = "user/policy"
BIN = Path(sys.executable).parent
METAWORLD = ["--env.type=metaworld", "--env.task=handle-press-v3", "--env.discover_packages_path=pi_rl.policies.small",
             "--eval.n_episodes=1", "--eval.batch_size=1", "--policy.device=cpu", "--seed=0"]  # fmt: skip


@pytest.fixture
def folder(mlp_folder, tmp_path):
    return Path(shutil.copytree(mlp_folder, tmp_path / "policy"))


def test_push_prints_the_page_and_the_numbers(hub_here, folder, capsys):
    assert main(["push", str(folder), "--repo", REPO]) == 0
    printed = capsys.readouterr().out
    assert f"{hub_here.address}/{REPO} (" in printed
    assert f"{len(hub_here.repos[REPO].files()) - 1} files" in printed
    assert "uploaded" in printed
    assert main(["push", str(folder), "--repo", REPO]) == 0
    assert "the Hub had it all" in capsys.readouterr().out


def test_json_holds_the_outcome(hub_here, folder, capsys):
    assert main(["push", str(folder), "--repo", REPO, "--json", "--revision", "test", "--message", "Words"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["commit"] == hub_here.repos[REPO].branches["test"]
    assert told["error"] is None
    assert hub_here.repos[REPO].messages[-1] == "Words"


def test_dry_run_lists_and_sends_nothing(hub_here, folder, capsys):
    (folder / "optimizer.pt").write_bytes(b"x")
    assert main(["push", str(folder), "--repo", REPO, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed
    assert "written before the upload" in printed
    assert "a pickle" in printed
    assert main(["push", str(folder), "--repo", REPO, "--dry_run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert hub_here.seen == []
    assert not (folder / "README.md").exists()


def test_refusals_are_code_2_and_failures_code_1(hub_here, folder, capsys, monkeypatch):
    monkeypatch.setattr("pi_rl.hub.push.WAITS_S", ())
    hub_here.fail("/create", 500)
    assert main(["push", str(folder), "--repo", REPO]) == 1
    assert f"pi-rl push {folder} --repo {REPO}" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", hub_here.read_token)
    assert main(["push", str(folder), "--repo", REPO, "--json"]) == 2
    captured = capsys.readouterr()
    assert "may not write" in captured.err
    assert json.loads(captured.out)["refused"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere", "--repo", REPO], "no folder"),
        (["empty", "--repo", REPO], "no policy"),
        (["policy", "--repo", "policy"], "user/name"),
        (["policy", "--repo", REPO, "--message", " "], "--message is empty"),
        (["policy", "--repo", REPO, "--token", "x"], "not an option"),
        (["policy", "--repo", REPO, "--whole", "best"], "named last-checkpoint or checkpoint-N"),
        (["policy", "--repo", REPO, "--whole", "checkpoint-4"], "no checkpoint of a training run"),
        (["policy"], "--repo"),
        (["stages", "--repo", REPO], "must list its steps, got None"),
        (["settings", "--repo", REPO], "must list its steps, got"),
        (["cut", "--repo", REPO, "--dry_run"], "is not readable as JSON"),
    ],
)
def test_what_the_user_can_put_right_is_said_without_traceback(folder, monkeypatch, capsys, words, told):
    (folder.parent / "empty").mkdir()
    damaged = {"stages": '{"stages": []}', "settings": '{"steps": [{"config": []}]}', "cut": '{"steps": ['}
    for name, text in damaged.items():
        shutil.copytree(folder, folder.parent / name)
        (folder.parent / name / "policy_preprocessor.json").write_text(text)
    monkeypatch.chdir(folder.parent)
    assert main(["push", *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def ended_well(done):
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_user_pushes_downloads_and_evaluates_with_both_packages(hub, tmp_path, monkeypatch):
    """`pi-rl push`, `hf download`, `pi-rl eval` and `lerobot-eval`, the latter from the Hub and from the folder."""
    from pi_rl.envs.registry import check_name_and_options
    from pi_rl.envs.renderer import choose_renderer

    monkeypatch.setenv("MUJOCO_GL", choose_renderer())
    spec = check_name_and_options("metaworld:handle-press-v3", {})
    policy = create_small_policy(
        "pi0", cameras=spec.cameras, state_dim=spec.state_dim, action_dim=spec.action_dim, image_size=32,
        chunk_size=50, n_action_steps=50, denoising_steps=1, instructions=spec.instructions,
        output_dir=tmp_path / "policy", seed=0,
    )  # fmt: skip
    home = tmp_path / "hf"
    told = json.loads(ended_well(run_client(hub, home, BIN / "pi-rl", "push", policy, "--repo", REPO, "--json")))
    assert told["url"] == f"{hub.address}/{REPO}"
    shutil.rmtree(policy)  # from here on there is only the Hub
    local = tmp_path / "downloaded"
    ended_well(run_client(hub, home, BIN / "hf", "download", REPO, "--local-dir", local))
    assert (local / "model.safetensors").read_bytes() == hub.repos[REPO].files()["model.safetensors"]
    steps = json.loads((local / "policy_preprocessor.json").read_text())["steps"]
    named = [step["config"]["tokenizer_name"] for step in steps if step["registry_name"] == "tokenizer_processor"]
    assert named == [REPO]  # which LeRobot goes by: the folder that the policy was made in is gone

    env = ["--env", "metaworld:handle-press-v3", "--env_options", "max_episode_steps=50"]
    words = [
        "eval",
        "--policy",
        REPO,
        *env,
        "--episodes",
        "1",
        "--env_workers",
        "1",
        "--output_dir",
        tmp_path / "ours",
    ]
    ended_well(run_client(hub, home, BIN / "pi-rl", *words, "--device", "cpu"))
    assert json.loads((tmp_path / "ours" / "eval.json").read_text())["policy"]["id"] == REPO

    for name, path in (("hub", REPO), ("folder", local)):
        words = [f"--policy.path={path}", f"--output_dir={tmp_path / name}", *METAWORLD]
        ended_well(run_client(hub, home, BIN / "lerobot-eval", *words, timeout=1800))  # 500 steps of 480 x 480 pixels
        assert json.loads((tmp_path / name / "eval_info.json").read_text())["overall"]["n_episodes"] == 1
