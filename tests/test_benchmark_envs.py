"""The speed benchmark end to end, too short to say anything about speed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_envs.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("benchmark_envs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_it_measures_with_and_without_pictures_and_writes_table_and_record(script, monkeypatch, tmp_path, capsys):
    arguments = ["--env", "metaworld:reach-v3", "--options", '{"image_size": 32, "fast_rendering": true}']
    arguments += ["--workers", "1", "--seconds", "0.02", "--repetitions", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    script.main()
    blind, seen = json.loads((tmp_path / "environments.json").read_text())
    assert blind["options"] == {"blind": True}
    for row in (blind, seen):
        assert row["steps"] >= 10
        assert row["bare"] > 0
        assert list(row["workers"]) == ["1"]
        assert row["memory_mb"] > 50
    text = (tmp_path / "environments.md").read_text()
    assert [line.split(" | ")[1] for line in text.splitlines()[2:]] == ["none", "32 x 32, fast_rendering"]
    assert text.splitlines()[-1] in capsys.readouterr().out


def test_a_broken_simulator_is_not_measured(script):
    config = {"simulator": "metaworld", "tasks": ["no-such-task-v3"], "options": {}, "cameras": {}, "chunk": 1}
    bare = script.Bare({**config, "low": [0], "high": [1]})
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        bare(1)
    bare.close()
