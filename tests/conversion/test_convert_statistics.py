"""Normalisation statistics in `pi-rl convert`: openpi's norm_stats.json and LeRobot's processors."""

import json
import math

import numpy as np
import pytest
import torch

from pi_rl.policies.checkpoints import load_policy
from tests.conversion.commands import convert, refused


def test_statistics_are_openpis_closed_forms(capsys, policy_folders, tools, tmp_path):
    stats = tools.statistics(seed=5)
    raw = tools.observations()
    state = raw["observation.state"].double().numpy()
    normalised = np.random.default_rng(0).normal(size=(3, tools.horizon, tools.action_dim))
    for kind, folder in policy_folders.items():
        source = tools.write_openpi(tmp_path / f"{kind}-openpi", tools.openpi_tensors(folder), 1, stats)
        convert(capsys, source, tmp_path / kind, "--to", "lerobot", "--like", folder)
        numbers = {
            name: {key: np.array(values[:size]) for key, values in stats[name].items()}
            for name, size in (("state", tools.state_dim), ("actions", tools.action_dim))
        }
        s, a = numbers["state"], numbers["actions"]
        if kind == "pi0":
            expected_state = (state - s["mean"]) / (s["std"] + 1e-6)
            expected_actions = normalised * (a["std"] + 1e-6) + a["mean"]
        else:
            expected_state = (state - s["q01"]) / (s["q99"] - s["q01"] + 1e-6) * 2 - 1
            expected_actions = (normalised + 1) / 2 * (a["q99"] - a["q01"] + 1e-6) + a["q01"]
        loaded = load_policy(tmp_path / kind)
        found = loaded.preprocessor(dict(raw))["observation.state"].numpy()
        np.testing.assert_allclose(found, expected_state, rtol=2e-5, atol=5e-6)
        found = loaded.postprocessor(torch.tensor(normalised, dtype=torch.float32)).numpy()
        np.testing.assert_allclose(found, expected_actions, rtol=1e-5, atol=5e-6)


def test_a_dimension_that_never_moves_is_scaled_as_openpi_does(capsys, policy_folders, tools, tmp_path):
    stats = tools.statistics()
    stats["state"]["std"][0] = 0.0
    source = tools.write_openpi(tmp_path / "o", tools.openpi_tensors(policy_folders["pi0"]), 1, stats)
    convert(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", policy_folders["pi0"])
    raw = tools.observations()
    raw["observation.state"][:, 0] = torch.tensor(stats["state"]["mean"][0]) + 1e-3
    found = load_policy(tmp_path / "new").preprocessor(raw)["observation.state"][:, 0]
    torch.testing.assert_close(found, torch.full((3,), 1e-3 / 1e-6), rtol=1e-3, atol=0)


def test_statistics_survive_the_round_trip(capsys, folder, tools, tmp_path):
    stats = tools.statistics(seed=3)
    source = tools.write_openpi(tmp_path / "o", tools.openpi_tensors(folder))
    file = tools.write_stats(tmp_path / "mine.json", stats)
    convert(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", folder, "--norm_stats", file)
    report = convert(capsys, tmp_path / "new", tmp_path / "back", "--to", "openpi", "--asset_id", "droid")
    assert report["facts"]["statistics"] == "assets/droid/norm_stats.json"
    found = json.loads((tmp_path / "back" / "assets" / "droid" / "norm_stats.json").read_text())["norm_stats"]
    for name, size in (("state", tools.state_dim), ("actions", tools.action_dim)):
        assert set(found[name]) == {"mean", "std", "q01", "q99"}
        for key, values in found[name].items():
            assert values == [float(np.float32(value)) for value in stats[name][key][:size]]


def test_without_statistics_those_of_the_other_policy_stay(capsys, folder, tools, tmp_path):
    source = tools.write_openpi(tmp_path / "o", tools.openpi_tensors(folder))
    report = convert(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", folder)
    assert "has no norm_stats.json" in report["facts"]["statistics"]
    assert torch.equal(tools.actions_of(tmp_path / "new"), tools.actions_of(folder))


def drop_std(stats):
    del stats["state"]["std"]


def shorten(stats):
    stats["actions"] = {key: values[:2] for key, values in stats["actions"].items()}


def not_finite(stats):
    stats["actions"]["mean"][1] = math.inf


def mixed_up(stats):
    stats["state"]["q01"][0] = stats["state"]["q99"][0] + 1


def no_quantiles(stats):
    for values in stats.values():
        values["q01"] = values["q99"] = None


def renamed(stats):
    stats["action"] = stats.pop("actions")


def text_in_it(stats):
    stats["state"]["mean"] = "0.1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_std, "as many numbers in mean and std"),
        (shorten, "have 2 numbers for actions, the policy 3"),
        (not_finite, "not finite"),
        (mixed_up, "q01 above q99"),
        (no_quantiles, "lack q01, q99"),
        (renamed, "is not openpi's norm_stats.json"),
        (text_in_it, "is not openpi's norm_stats.json"),
    ],
)
def test_damaged_statistics_are_refused(capsys, policy_folders, tools, tmp_path, damage, message):
    stats = tools.statistics()
    damage(stats)
    source = tools.write_openpi(tmp_path / "o", tools.openpi_tensors(policy_folders["pi05"]), 1, stats)
    assert message in refused(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", policy_folders["pi05"])
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_several_statistics_must_be_chosen_from(capsys, folder, tools, tmp_path):
    source = tools.write_openpi(tmp_path / "o", tools.openpi_tensors(folder), 1, tools.statistics())
    other = tools.write_stats(source / "assets" / "droid" / "norm_stats.json", tools.statistics(1))
    words = (source, tmp_path / "new", "--to", "lerobot", "--like", folder)
    assert "assets/droid/norm_stats.json" in refused(capsys, *words)
    convert(capsys, *words, "--norm_stats", other)


def test_statistics_of_other_models_beside_a_weight_file_are_not_its_own(capsys, policy_folders, tools, tmp_path):
    folder = policy_folders["pi0"]
    models = tmp_path / "models"
    tools.write_openpi(models / "other", tools.openpi_tensors(folder), 1, tools.statistics(1))
    tools.write_stats(models / "libero" / "norm_stats.json", tools.statistics(2))
    torch.save(tools.openpi_tensors(folder), models / "a.pt")
    words = (models / "a.pt", "--to", "lerobot", "--like", folder)
    report = convert(capsys, *words, tmp_path / "new")
    assert report["facts"]["statistics"] == f"those of {folder}: {models / 'a.pt'} has no norm_stats.json, and " + (
        "--norm_stats gave none"
    )
    own = tools.write_stats(
        models / "assets" / "physical-intelligence" / "libero" / "norm_stats.json", tools.statistics()
    )
    assert convert(capsys, *words, tmp_path / "own")["facts"]["statistics"].endswith(f", from {own}")


def test_statistics_of_an_rlinf_checkpoint_are_found_from_its_weight_file(capsys, policy_folders, tools, tmp_path):
    folder = policy_folders["pi0"]
    for name in ("model_state_dict/full_weights.pt", "actor/model_state_dict/full_weights.pt"):
        root = tmp_path / name.replace("/", "-")
        path = root / name
        path.parent.mkdir(parents=True)
        torch.save(tools.openpi_tensors(folder), path)
        stats = tools.write_stats(root / "physical-intelligence" / "libero" / "norm_stats.json", tools.statistics())
        report = convert(capsys, path, root / "new", "--to", "lerobot", "--like", folder)
        assert report["facts"]["statistics"].endswith(f", from {stats}")


def test_openpi_needs_means(capsys, tools, tmp_path):
    quantiles = {
        feature: {key: values for key, values in stats.items() if key in ("q01", "q99")}
        for feature, stats in tools.lerobot_statistics(tools.statistics()).items()
    }
    folder = tools.write_policy("pi05", tmp_path / "p", dataset_stats=quantiles)
    assert "openpi needs mean and std" in refused(capsys, folder, tmp_path / "new", "--to", "openpi")
    file = tools.write_stats(tmp_path / "mine.json", tools.statistics())
    convert(capsys, folder, tmp_path / "new", "--to", "openpi", "--norm_stats", file)
