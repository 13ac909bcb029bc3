"""Two gloo processes, the model sharded (FSDP2) or copied (DDP), learn what one process learns.

Accelerate has no FSDP for CPUs; pi_rl gives it the same model and the same launch file as on GPUs.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
LAYOUTS = {"one": ("cpu.yaml", 1), "ddp": ("cpu_ddp.yaml", 2), "fsdp": ("fsdp_8gpu.yaml", 2)}
# learning rate 1e-4, 4 updates of Adam: a parameter moves by up to 4e-4; sums in another order move it by up to this
TOLERANCE = {"rtol": 1e-4, "atol": 3e-5}
pytestmark = pytest.mark.slow


def launch(layout, cases, policies, out, *earlier):
    file, processes = LAYOUTS[layout]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    config = ["--config_file", str(ROOT / "recipes" / "accelerate" / file), "--num_processes", str(processes)]
    script = [str(Path(__file__).with_name("distributed_runs.py")), ",".join(cases), policies, out, *earlier]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, *map(str, script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def policies(small_policy_folders):
    return small_policy_folders["pi0"].parent


@pytest.fixture(scope="module")
def fsdp(policies, tmp_path_factory):
    cases = ("frozen", "lora", "full", "half", "uneven")
    return launch("fsdp", cases, policies, tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def one(policies, fsdp, tmp_path_factory):
    return launch("one", ("frozen", "lora", "full", "half"), policies, tmp_path_factory.mktemp("one"), fsdp)


@pytest.fixture(scope="module")
def ddp(policies, fsdp, tmp_path_factory):
    return launch("ddp", ("frozen",), policies, tmp_path_factory.mktemp("ddp"), fsdp)


def record(folder, case, rank=0):
    return json.loads((folder / f"{case}-{rank}.json").read_text())


def weights(folder, name, rank=0):
    return load_file(folder / f"{name}-{rank}.safetensors")


def assert_close(given, expected, **tolerance):
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_learned_alike(given, expected, case):
    assert_close(weights(given, case), weights(expected, case), **TOLERANCE)
    gradients = load_file(expected / f"{case}-0.grad")
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert_close(load_file(given / f"{case}-0.grad"), gradients, rtol=1e-3, atol=1e-5 * largest)
    logs = [record(folder, case)["history"] for folder in (given, expected)]
    assert [len(history) for history in logs] == [2, 2]
    for entry, alone in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "policy/loss", "policy/approx_kl", "rollout/return", "rollout/env_steps"):
            assert entry[key] == pytest.approx(alone[key], rel=2e-3, abs=1e-5), key


@pytest.mark.parametrize("case", ["frozen", "lora", "full"])
def test_a_sharded_model_learns_what_one_process_learns(fsdp, one, case):
    """Loss, gradients of the first update, parameters after 4 updates in 2 iterations, float32."""
    sharded = record(fsdp, case)
    assert sharded["sharded"]
    assert not record(one, case)["sharded"]
    assert sharded["local"] < 0.52 * sharded["whole"]  # odd sizes divide unequally
    assert_learned_alike(fsdp, one, case)


def test_copies_learn_what_one_process_learns(ddp, one):
    """Data parallel, the same ``global_batch_size`` by other numbers of micro-batches."""
    assert not record(ddp, "frozen")["sharded"]
    assert_learned_alike(ddp, one, "frozen")


def test_a_process_without_a_sample_takes_part(fsdp, one):
    assert_learned_alike(fsdp, one, "half")


@pytest.mark.parametrize("case", ["frozen", "lora", "full", "half", "uneven"])
def test_both_processes_have_the_same_model_after_the_same_calls(fsdp, case):
    first, second = (weights(fsdp, case, rank) for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    calls = [record(fsdp, case, rank)["calls"] for rank in range(2)]
    assert calls[0] == calls[1]
    assert {"encode", "sample", "ode", "score"} <= set(calls[0])


def test_episodes_of_other_lengths_and_numbers_do_not_hang(fsdp):
    """Episodes of 10 steps in one process and 15 in the other; three to evaluate; bfloat16 with passes of 2 rows."""
    uneven = record(fsdp, "uneven")
    assert uneven["evaluated"] == [10, 10, 15]
    assert uneven["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert max(entry["policy/ratio_error_first"] for entry in uneven["history"]) < 1e-4


@pytest.mark.parametrize("case", ["frozen", "lora", "full"])
def test_a_resumed_sharded_run_equals_the_uninterrupted_one_to_the_bit(fsdp, case):
    resumed, uninterrupted = weights(fsdp, f"{case}-resumed"), weights(fsdp, case)
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], value) for name, value in uninterrupted.items())


@pytest.mark.parametrize("case", ["frozen", "lora", "full"])
def test_one_process_goes_on_with_a_sharded_runs_checkpoint(fsdp, one, case):
    assert_close(weights(one, f"{case}-continued"), weights(fsdp, case), **TOLERANCE)


def test_copies_go_on_with_a_sharded_runs_checkpoint(fsdp, ddp):
    assert_close(weights(ddp, "frozen-continued"), weights(fsdp, "frozen"), **TOLERANCE)


@pytest.mark.parametrize("case", ["frozen", "lora", "full"])
def test_a_sharded_model_is_saved_as_one_process_saves_it(fsdp, one, case):
    """The same bytes before training, the same files after it; the unused language heads are among the weights."""
    folders = [folder / case for folder in (fsdp, one)]
    for name in ("model.safetensors", "critic.safetensors"):
        first, second = ((folder / "untrained" / name).read_bytes() for folder in folders)
        assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in folders]
    assert {path for path in names[0] if "rng_state" not in path.name} == {
        path for path in names[1] if "rng_state" not in path.name
    }
    saved = load_file(fsdp / case / "trained" / "model.safetensors")
    assert {"model.paligemma_with_expert.gemma_expert.lm_head.weight"} <= saved.keys()


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_processes_without_a_common_disk_resume(policies, tmp_path, layout):
    """Only the first process's folder holds checkpoints; the others get what they need from it."""
    out = launch(layout, ["separate"], policies, tmp_path / layout)
    assert not (out / "computer1" / "run" / "checkpoint-2").exists()
    assert (out / "computer0" / "run" / "checkpoint-2" / "rng_state_1.json").is_file()
    for name in ("resumed-first", "resumed-last"):
        for rank in range(2):
            resumed, uninterrupted = weights(out, name, rank), weights(out, "uninterrupted")
            assert all(torch.equal(resumed[key], value) for key, value in uninterrupted.items()), name
