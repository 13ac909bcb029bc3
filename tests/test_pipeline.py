"""The recipes as a user starts them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pi_rl import FlowPPOConfig, RecipeArguments, run_recipe
from pi_rl.arguments import dump_config, parse_recipe_arguments

ROOT = Path(__file__).parents[1]
CONFIGS = [ROOT / "recipes/configs/metaworld" / name for name in ("quickstart.yaml", "quickstart_ci.yaml")]
ENV = '{"image_size": 32, "fast_rendering": true, "hide_arm": true, "max_episode_steps": 15}'
SMALL = ["--env_options", ENV, "--num_envs", "4", "--env_workers", "1", "--critic_hidden_sizes", "16",
         "--use_cpu", "true", "--rollout_chunks", "4", "--update_epochs", "1", "--per_device_train_batch_size", "16",
         "--num_iterations", "1", "--noise_std_min", "0.4", "--noise_std_max", "1.0", "--eval_episodes", "2",
         "--gradient_accumulation_steps", "1"]  # fmt: skip


def recipe(tmp_path, *extra, noise="flow_noise"):
    return run_recipe("A test.", None, noise, ["--output_dir", str(tmp_path / "run"), *SMALL, *extra])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_quick_start_parses(path, tmp_path):
    arguments, ppo = parse_recipe_arguments(
        (RecipeArguments, FlowPPOConfig),
        default_config=path,
        description="",
        argv=["--use_cpu", "true", "--output_dir", str(tmp_path)],
    )
    assert ppo.num_minibatches >= 1
    assert arguments.env.split(":")[0] == path.parent.name
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.slow
def test_a_run_from_a_checkpoint_leaves_all_its_artefacts(small_pi0_folder, tmp_path, capsys):
    folder = recipe(tmp_path, "--model", str(small_pi0_folder))
    printed = capsys.readouterr().out
    assert "4 envs x 4 chunks = 16 samples" in printed
    assert "SFT + RL" in printed
    results = json.loads((folder / "results.json").read_text())
    assert results["sft"]["n_episodes"] == results["rl"]["n_episodes"] == 2
    assert results["env_steps"] > 0
    for name in ("learning_curve.png", "before_after.mp4", "policy/model.safetensors", "policy/README.md",
                 "policy/noise_network.safetensors", "pi_rl_config.yaml", "trainer_state.json",
                 "metrics.jsonl", "report.html"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    with pytest.raises(ValueError, match="holds a finished run"):
        recipe(tmp_path, "--model", str(small_pi0_folder))


def test_dry_run_prints_the_runs_arithmetic_saves_and_cleans_up(small_pi0_folder, tmp_path, capsys):
    recipe(tmp_path, "--model", str(small_pi0_folder), "--dry_run", noise="flow_sde")
    printed = capsys.readouterr().out
    assert "4 envs x 4 chunks = 16 samples" in printed
    assert "one save" in printed
    assert not list(tmp_path.glob("run*"))


def test_a_written_configuration_can_be_varied(tmp_path):
    kinds = (RecipeArguments, FlowPPOConfig)
    words = ["--output_dir", str(tmp_path), *SMALL, "--eval_every_iterations", "1", "--save_every_iterations", "1"]
    written = tmp_path / "config.yaml"
    dump_config(parse_recipe_arguments(kinds, argv=words), written)
    varied = ["--num_iterations", "5", "--update_epochs", "3", "--eval_every_iterations", "2"]
    _, ppo = parse_recipe_arguments(kinds, default_config=written, argv=varied)
    assert (ppo.num_train_epochs, ppo.logging_steps, ppo.eval_steps, ppo.save_steps) == (5, 3, 6, 3)


def test_a_run_that_cannot_begin_leaves_nothing_behind(small_pi0_folder, tmp_path):
    with pytest.raises(ValueError, match="nearest: handle-press-v3"):
        recipe(tmp_path, "--env", "metaworld:handle-pres-v3")
    with pytest.raises(ValueError, match="neither an existing folder nor a Hub id"):
        recipe(tmp_path, "--model", str(tmp_path / "nowhere"))
    broken = tmp_path / "broken"
    shutil.copytree(small_pi0_folder, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing"):
        recipe(tmp_path, "--model", str(broken))
    with pytest.raises(ValueError, match="n_action_steps=9"):
        recipe(tmp_path, "--n_action_steps", "9")
    with pytest.raises(ValueError, match="env_options must not set blind"):
        recipe(tmp_path, "--env_options", '{"blind": true}')
    with pytest.raises(ValueError, match="3 evaluation episodes cannot be shared equally by 2 tasks"):
        recipe(tmp_path, "--env", "metaworld:handle-press-v3,reach-v3", "--eval_episodes", "3")
    with pytest.raises(ValueError, match="demo_max_speed=2"):
        recipe(tmp_path, "--demo_max_speed", "2")
    assert not (tmp_path / "run").exists()


def test_dry_run_needs_no_checkpoint_and_checks_the_arithmetic(tmp_path, capsys):
    recipe(tmp_path, "--dry_run", "--image_resolution", "32")
    assert "Dry run finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="do not divide"):
        recipe(tmp_path, "--dry_run", "--per_device_train_batch_size", "7")


@pytest.mark.slow
def test_an_output_folder_of_another_run_is_refused(small_pi0_folder, tmp_path):
    folder = recipe(tmp_path, "--model", str(small_pi0_folder))
    (folder / "results.json").unlink()
    with pytest.raises(ValueError, match=r"other settings .*seed: 9"):
        recipe(tmp_path, "--model", str(small_pi0_folder), "--seed", "9")
    again = recipe(tmp_path, "--model", str(small_pi0_folder))
    assert (again / "results.json").is_file()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds no run of pi_rl"):
        run_recipe("", None, "flow_noise", ["--output_dir", str(strange), "--model", str(small_pi0_folder), *SMALL])
    assert [file.name for file in strange.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["ppo_flow_noise.py", "ppo_flow_sde.py"])
@pytest.mark.slow
def test_help_is_grouped_and_unknown_options_name_the_nearest(name):
    command = [sys.executable, str(ROOT / "recipes" / name)]
    text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    for group in ("Flow sampling", "PPO", "Rollout", "Environment"):
        assert group in text
    wrong = subprocess.run([*command, "--nois", "flow_sde"], capture_output=True, text=True)
    assert wrong.returncode != 0
    assert "noise" in wrong.stderr
    assert "Traceback" not in wrong.stderr
