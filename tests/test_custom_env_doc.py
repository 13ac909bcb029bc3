"""docs/custom_env.md does what it says: its code is run as printed."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

from pi_rl.trainer import sft

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "custom_env.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", TEXT, re.DOTALL))
SMALL = {
    "episodes_per_task": 2,
    "num_iterations": 1,
    "num_envs": 4,
    "per_device_train_batch_size": 48,
    "eval_episodes": 4,
}


@pytest.fixture
def folder(tmp_path):
    for name, code in CODE.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def test_it_is_as_short_as_promised():
    assert list(CODE) == ["pixel_reach.py", "train.py"]
    assert CODE["train.py"].count("\n") <= 30


def test_the_code_runs(folder, monkeypatch):
    """With few episodes, and without the minute in which lerobot-train starts."""
    code = CODE["train.py"]
    for option, value in SMALL.items():
        code, count = re.subn(rf"\b{option}=\d+", f"{option}={value}", code)
        assert count >= 1, option

    def no_training(*arguments, **options):
        inspect.signature(run_sft).bind(*arguments, **options)
        assert (folder / "demos" / "meta").is_dir()
        return arguments[0]

    run_sft = sft.run_sft
    monkeypatch.setattr(sft, "run_sft", no_training)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    exec(compile(code, "train.py", "exec"), {"__name__": "__main__"})
    assert (folder / "policy" / "model.safetensors").is_file()
    del gymnasium.registry["PixelReach-v0"], sys.modules["pixel_reach"]


@pytest.mark.slow
def test_the_policy_learns(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = (float(rate) for rate in re.findall(r"evaluation: success ([\d.]+)", done.stdout + done.stderr))
    assert after > before + 0.15


def test_named_files_exist():
    for path in re.findall(r"`((?:tests|docs|scripts|recipes|pi_rl)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", TEXT):
        assert (ROOT / "docs" / link).exists(), link
