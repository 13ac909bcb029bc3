"""The benchmark compares like with like: the simulators alone repeat what they did in the rollout."""

import importlib.util
from pathlib import Path

import pytest
import yaml

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_rollout.py"


@pytest.mark.slow
def test_simulators_alone_repeat_the_rollout(tmp_path):
    specification = importlib.util.spec_from_file_location("benchmark_rollout", SCRIPT)
    benchmark = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(benchmark)
    config = yaml.safe_load(benchmark.CONFIG.read_text())
    options = {**config["env_options"], "image_size": 32, "max_episode_steps": 12}
    setting = benchmark.Setting({**config, "image_resolution": 32}, options, 4, 0.0, tmp_path)
    with setting.environment(2, 1) as env:
        collector = setting.collector(env, 1)
        calls = benchmark.record(env, collector)
        steps = collector.collect(0).statistics.env_steps
        assert [name for name, _ in calls].count("start_chunk") == 4
        assert [name for name, _ in calls].count("reset") == 2  # the time limit ends an episode after three chunks
        assert benchmark.replay(env, calls) == steps == 2 * (12 + 5)
    result = benchmark.compare(setting, 2, 1, 1)
    assert result["one_stage"]["steps_per_s"] > 0
    assert set(result["ratios"]) == {"one_stage / simulators", "two_stages / simulators", "two_stages / one_stage"}
