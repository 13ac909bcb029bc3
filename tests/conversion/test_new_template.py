"""openpi's weights without a LeRobot policy like them: configuration and processors from a few options."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep

from pi_rl.cli.main import main
from pi_rl.conversion.new_template import NewPolicy, new_template
from pi_rl.conversion.norm_stats import apply_norm_stats, read_norm_stats
from pi_rl.conversion.sources import open_weights
from pi_rl.conversion.to_lerobot import convert_to_lerobot, template_like
from pi_rl.policies.checkpoints import read_without_weights, write_policy_folder
from pi_rl.policies.weight_files import stored_weights

CAMERAS = ("observation.images.image", "observation.images.image2")
NAMES = ("x", "y", "gripper")


def policy(folder, **options):
    return NewPolicy(
        **{"camera": CAMERAS, "state_dim": 4, "action_dim": 3, "chunk_size": 6, "tokenizer": str(folder), **options}
    )


def written(template, target):
    """The configuration and processors that a fresh read gives."""
    write_policy_folder(target, template.config, template.processors, lambda folder: None)
    return read_without_weights(target)


def raw_observation():
    generator = torch.Generator().manual_seed(0)
    raw = {camera: torch.rand(2, 3, 16, 16, generator=generator) for camera in CAMERAS}
    return {**raw, "observation.state": torch.rand(2, 4, generator=generator), "task": ["open the drawer"] * 2}


@pytest.mark.parametrize(("kind", "in_prompt"), [("pi0", None), ("pi05", None), ("pi05", False)])
def test_configuration_and_processors(policy_folders, tools, tmp_path, kind, in_prompt):
    weights = stored_weights(policy_folders[kind])
    template = new_template(kind, weights, policy(policy_folders[kind], state_in_prompt=in_prompt, n_action_steps=5))
    stats = read_norm_stats(tools.write_stats(tmp_path / "norm_stats.json", tools.statistics()))
    apply_norm_stats(template.processors, stats)
    config, (preprocessor, postprocessor) = written(template, tmp_path / "new")
    assert config == PreTrainedConfig.from_pretrained(tmp_path / "new")
    assert config.dtype == "bfloat16"
    assert (config.type, config.chunk_size, config.n_action_steps, config.max_action_dim) == (kind, 6, 5, tools.padded)
    assert tuple(config.image_features) == CAMERAS
    batch = preprocessor(raw_observation())
    steps = [type(step) for step in preprocessor.steps]
    assert (Pi05PrepareStateTokenizerProcessorStep in steps) == (kind == "pi05" and in_prompt is None)
    tokens = {"pi0": 48, "pi05": 200}[kind]
    assert batch["observation.language.tokens"].shape == (2, tokens)
    numbers = {key: np.array(values[:4], np.float32) for key, values in stats["state"].items()}
    state = raw_observation()["observation.state"].numpy()
    if kind == "pi0":
        expected = (state - numbers["mean"]) / (numbers["std"] + 1e-6)
    else:
        expected = 2 * (state - numbers["q01"]) / (numbers["q99"] - numbers["q01"]) - 1
    np.testing.assert_allclose(batch["observation.state"].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert postprocessor(torch.zeros(2, 6, 3)).shape == (2, 6, 3)


def test_relative_actions_are_added_to_the_state(policy_folders, tmp_path):
    weights = stored_weights(policy_folders["pi0"])
    template = new_template("pi0", weights, policy(policy_folders["pi0"], action_names=NAMES))
    _, (preprocessor, postprocessor) = written(template, tmp_path / "new")
    state = preprocessor(raw_observation())["observation.state"]
    actions = postprocessor(torch.full((2, 6, 3), 0.5))
    expected = torch.full((2, 6, 3), 0.5)
    expected[..., :2] += state[:, None, :2]  # the gripper stays absolute
    torch.testing.assert_close(actions, expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("pi0", {"state_in_prompt": False}, "state_in_prompt is for π0.5"),
        ("pi0", {"state_dim": 9}, "state_dim=9 is above the weights' 4"),
        ("pi05", {"action_dim": 6}, "action_dim=6 is above the weights' 5"),
        ("pi05", {"n_action_steps": 7}, "n_action_steps=7 is above chunk_size=6"),
        ("pi05", {"action_names": ("x",)}, "1 names for action_dim=3"),
        ("pi05", {"camera": ("a", "a")}, "given twice"),
        ("pi05", {"tokenizer": "/nowhere"}, "The tokenizer '/nowhere' cannot be loaded"),
    ],
)
def test_options_that_do_not_fit_are_refused(policy_folders, kind, options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        new_template(kind, stored_weights(policy_folders[kind]), policy(policy_folders[kind], **options))


def test_weights_of_another_size_are_refused(capsys, policy_folders, tmp_path):
    words = ["--state_dim", "4", "--action_dim", "3", "--chunk_size", "6", "--tokenizer", str(policy_folders["pi0"])]
    source, target = str(policy_folders["pi0"]), str(tmp_path / "new")
    assert main(["convert", source, target, "--to", "lerobot", "--camera", CAMERAS[0], *words]) == 2
    message = capsys.readouterr().err
    assert "does not fit the model" in message
    assert "wrong shape" in message
    assert not (tmp_path / "new").exists()
    assert json.loads((policy_folders["pi0"] / "config.json").read_text())["type"] == "pi0_small"


def test_without_statistics_options_alone_are_refused(policy_folders, tools, tmp_path):
    """Weights that a few options could describe have the published size; a small policy's template stands for them."""
    folder = policy_folders["pi0"]
    from_options = new_template("pi0", stored_weights(folder), policy(folder))
    assert not from_options.has_statistics
    source = tools.write_openpi(tmp_path / "o", tools.openpi_tensors(folder))
    template = dataclasses.replace(template_like(folder), has_statistics=from_options.has_statistics)
    words = (open_weights(source), source, tmp_path / "new", template)
    with pytest.raises(
        ValueError, match=r"has no norm_stats\.json, and nothing else says how to normalise: give --norm_st"
    ):
        convert_to_lerobot(*words)
    assert not (tmp_path / "new").exists()
    convert_to_lerobot(*words, norm_stats=tools.write_stats(tmp_path / "mine.json", tools.statistics()))
    assert (tmp_path / "new" / "config.json").is_file()
