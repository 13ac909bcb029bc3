"""The benchmark script end to end, at a size that learns nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import gymnasium
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gymnasium_benchmark.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gymnasium_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    small = {"num_iterations": 3, "rollout_chunks": 5, "per_device_train_batch_size": 40, "eval_episodes": 2}
    monkeypatch.setattr(module, "COMMON", {**module.COMMON, **small, "update_epochs": 1})
    monkeypatch.setattr(module, "STATISTICS_STEPS", 20)
    monkeypatch.setattr(gymnasium.spec("Pendulum-v1"), "max_episode_steps", 20)
    return module


def run(script, monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["gymnasium_benchmark.py", "--output", str(folder), *arguments])
    script.main()


def test_it_writes_table_record_and_picture_and_repeats_nothing(script, monkeypatch, tmp_path, capsys):
    run(script, monkeypatch, tmp_path, "--seeds", "2", "--envs", "Pendulum-v1")
    record = json.loads((tmp_path / "results.json").read_text())
    assert [(run["env"], run["seed"]) for run in record["runs"]] == [("Pendulum-v1", 0), ("Pendulum-v1", 1)]
    first = record["runs"][0]
    assert (first["env_steps"], first["episodes"], len(first["curve"])) == (240, 2, 2)
    assert first["mean"] == pytest.approx(first["curve"][-1][1])
    assert -20 * 17 < first["mean"] < 0  # at most 16.3 a step
    text = (tmp_path / "results.md").read_text()
    assert "2 seed(s)" in text
    for figure in record["published"]["Pendulum-v1"]:
        assert figure["url"] in text
        assert figure["result"] in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert text in capsys.readouterr().out
    monkeypatch.setattr(script, "train", lambda *arguments: pytest.fail("ran again"))
    run(script, monkeypatch, tmp_path, "--seeds", "1", "--envs", "Pendulum-v1")
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 2
    assert "1 seed(s)" in (tmp_path / "results.md").read_text()
