"""docs/custom_policy.md does what it says: its code runs as printed, its wrapper keeps the contract it states."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "custom_policy.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"<!-- (\w+\.py) -->\n```python\n(.*?)```", TEXT, re.DOTALL))

CONTRACT = """
import torch

import flow_token
from pi_rl import load_policy
from pi_rl.policies.wrap import wrap_policy

torch.manual_seed(0)
loaded = load_policy("start")
flow = wrap_policy(loaded.policy)
flow.freeze_vlm()
states, noise = torch.randn(5, 6), torch.randn(5, 2, 2)
batch = {"observation.state": states}

prefix = flow.encode_prefix(batch)
x, steps = noise, flow.denoising_steps
with torch.no_grad():
    for k in range(steps):
        x = x - flow.velocity(prefix, x, torch.full((5,), 1 - k / steps))[0] / steps
torch.testing.assert_close(x, loaded.policy.predict_action_chunk(batch, noise=noise))

rows, t = torch.tensor([3, 1]), torch.full((2,), 0.5)
part = flow.encode_prefix({"observation.state": states[rows]})
assert torch.equal(prefix.kv, flow.encode_prefix(batch).kv)
torch.testing.assert_close(prefix.index(rows).kv, part.kv)
of_part = flow.velocity(part, noise[rows], t)[0]
torch.testing.assert_close(flow.velocity(prefix.index(rows), noise[rows], t)[0], of_part)

velocity, tokens = flow.velocity(prefix, noise, torch.full((5,), 0.5))
assert tokens.shape == (5, flow.chunk_size, flow.feature_dim)
velocity.square().sum().backward()
reached = {name for name, parameter in loaded.policy.named_parameters() if parameter.grad is not None}
trained = {name for name, parameter in loaded.policy.named_parameters() if parameter.requires_grad}
assert reached == trained
assert trained and not any("encoder" in name for name in trained)

again = wrap_policy(load_policy("start").policy)
assert torch.equal(again.velocity(again.encode_prefix(batch), noise, torch.full((5,), 0.5))[0], velocity)
print("kept")
"""


def run(folder: Path, code: str) -> str:
    """Output of a script in the folder, in a process of its own: the page registers a policy type."""
    (folder / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    for name, code in CODE.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def test_the_page_has_all_files():
    assert list(CODE) == [
        "configuration_flow_token.py",
        "modeling_flow_token.py",
        "processor_flow_token.py",
        "flow_token.py",
        "train.py",
    ]


@pytest.mark.slow
def test_the_policy_learns_and_its_wrapper_keeps_the_contract(folder):
    output = run(folder, CODE["train.py"])
    before, after = (float(rate) for rate in re.findall(r"evaluation: success ([\d.]+)", output))
    assert after > before + 0.5
    assert (folder / "policy" / "model.safetensors").is_file()
    assert run(folder, CONTRACT) == "kept\n"


SMALL = {"num_iterations": 1, "num_envs": 16, "per_device_train_batch_size": 80, "eval_episodes": 4}


@pytest.mark.slow
def test_it_takes_learned_noise_and_grpo_as_the_page_says(folder):
    code = CODE["train.py"]
    for option, value in SMALL.items():
        code, count = re.subn(rf"\b{option}=\d+", f"{option}={value}", code)
        assert count == 1, option
    learned = code.replace('noise="flow_sde", noise_level=0.8', 'noise="flow_noise"')
    grpo = (
        re.sub(r"critic_\w+=[^ ]*, ", "", code)
        .replace("FlowPPO", "FlowGRPO")
        .replace("update_epochs=8", "update_epochs=1")
    )
    assert learned != code
    for variant in (learned, grpo):
        assert "evaluation: success" in run(folder, variant)


def test_the_table_of_the_interface_names_every_member():
    from pi_rl.policies.flow_policy import FlowPolicy

    rows = TEXT.split("## The interface")[1].split("Three rules")[0]
    sizes = set(FlowPolicy.__annotations__) - {"is_compiled", "prefix_is_live"}
    for name in FlowPolicy.__abstractmethods__ | sizes:
        assert f"`{name}" in rows, name
    for name in re.findall(r"`(\w+)`", rows.split("| sizes |")[1]):
        assert name in FlowPolicy.__annotations__, name


def test_named_files_exist():
    for path in re.findall(r"`((?:tests|docs|scripts|recipes|pi_rl)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
