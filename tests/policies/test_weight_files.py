"""Both layouts, single and sharded, give the same policy; what does not fit is refused before a tensor is read."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pi_rl.policies.checkpoints import load_policy, load_policy_weights, save_policy
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.weight_files import EMBEDDING, EXPERT_HEAD, INDEX_FILE, UNUSED_HEADS, VLM_HEAD, WEIGHTS_FILE
from pi_rl.policies.weights import _DTYPES, write_tensors

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def copied(loaded, tmp_path):
    return shutil.copytree(loaded.path, tmp_path / "copy")


def openpi(tensors, prefix=""):
    """openpi's names: no "model.", the embedding as lm_head alone."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING}
    return {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def write_shards(folder, tensors, files=SHARDS):
    names = sorted(tensors)
    weight_map = {name: files[position % len(files)] for position, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS_FILE).unlink()
    return weight_map


def equal_but_for_tied(policy, expected):
    state = policy.state_dict()
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        wanted = expected[VLM_HEAD] if name == EMBEDDING else tensor
        assert torch.equal(state[name], wanted), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_fsdp_wrapped_module."])
def test_openpi_layout(copied, caplog, sharded, prefix):
    tensors = load_file(copied / WEIGHTS_FILE)
    heads = {"value_head.0.weight": torch.ones(2), f"{prefix}noise_head.bias": torch.ones(1)}
    stored = {**openpi(tensors, prefix), **heads}
    if sharded:
        write_shards(copied, stored)
    else:
        save_file(stored, copied / WEIGHTS_FILE)
    with caplog.at_level(logging.WARNING):
        policy = load_policy(copied).policy
    equal_but_for_tied(policy, tensors)
    assert "2 tensors of another trainer's heads" in caplog.text
    policy.get_parameter(EMBEDDING).data.add_(1.0)  # one tensor in the file, two in the model
    assert torch.equal(policy.state_dict()[VLM_HEAD], tensors[VLM_HEAD])
    load_policy_weights(policy, copied)
    equal_but_for_tied(policy, tensors)


def test_shards_in_lerobots_layout(copied, loaded):
    write_shards(copied, load_file(copied / WEIGHTS_FILE))
    again = load_policy(copied)
    for name, tensor in loaded.policy.state_dict().items():
        assert torch.equal(again.policy.state_dict()[name], tensor), name
    save_policy(copied, again.policy, again.preprocessor, again.postprocessor)  # into the folder that is mapped
    assert not any((copied / name).exists() for name in (*SHARDS, INDEX_FILE))
    for name, tensor in load_policy(copied).policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], tensor), name


def break_missing(folder, weight_map):
    (folder / SHARDS[1]).unlink()


def break_keys(folder, weight_map):
    tensors = load_file(folder / SHARDS[0])
    tensors["model.other"] = tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / SHARDS[0])


def break_path(folder, weight_map):
    name = sorted(weight_map)[0]
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {**weight_map, name: f"../copy/{SHARDS[0]}"}}))


def break_index(folder, weight_map):
    (folder / INDEX_FILE).write_text("[]")


def break_duplicate(folder, weight_map):
    tensors = load_file(folder / SHARDS[0]) | load_file(folder / SHARDS[1])
    name = sorted(tensors)[0]
    save_file({**tensors, f"module.{name}": tensors[name].clone()}, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_missing, "1 of 2 files that are missing: model-00002"),
        (break_keys, "lacks 1 tensors"),
        (break_path, r"names \.\./copy/model-00001"),
        (break_index, "is not an index"),
        (break_duplicate, "which are both model"),
    ],
)
def test_shards_that_do_not_fit_are_refused(copied, damage, message):
    weight_map = write_shards(copied, load_file(copied / WEIGHTS_FILE))
    damage(copied, weight_map)
    with pytest.raises(ValueError, match=message):
        load_policy(copied)


def test_parked_heads_stay_mapped_and_are_saved_bit_for_bit(copied, loaded):
    expected = load_file(copied / WEIGHTS_FILE)
    again = load_policy(copied)
    PiFlowPolicy(again.policy).park_language_heads()
    assert not any("lm_head" in name for name, _ in again.policy.named_parameters())
    load_policy_weights(again.policy, copied)
    state = again.policy.state_dict()
    regions = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    for head in UNUSED_HEADS:
        address = state[head].data_ptr()
        (file,) = [r[-1] for r in regions if int(r[0].split("-")[0], 16) <= address < int(r[0].split("-")[1], 16)]
        assert file == str(copied / WEIGHTS_FILE)
    folder = save_policy(copied, again.policy, again.preprocessor, again.postprocessor)
    saved = load_file(folder / WEIGHTS_FILE)
    for head in (VLM_HEAD, EXPERT_HEAD):
        assert torch.equal(saved[head], expected[head])
        assert torch.equal(state[head], expected[head])  # the file under the mapping was replaced
    assert set(saved) == set(expected)


def test_files_are_those_of_safetensors(tmp_path):
    tensors = {
        f"{chr(122 - i)}.é{j}": torch.ones(3 + j, dtype=dtype) for i, dtype in enumerate(_DTYPES) for j in range(2)
    }
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "transposed": torch.arange(6.0).view(2, 3).T}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a", metadata={"format": "pt"}
    )
    write_tensors(tmp_path / "b", tensors)
    write_tensors(tmp_path / "c", {name: t.to("meta") for name, t in tensors.items()}, tensors.__getitem__)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    with pytest.raises(ValueError, match="complex64"):
        write_tensors(tmp_path / "d", {"x": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["lerobot", "openpi"])
def test_peak_memory_of_loading(toolbox, tmp_path, layout):
    """A few hundred MB in a fresh process: the growth of the highest resident set is at most 1.3 times the file."""
    folder = toolbox.write_policy("pi0", tmp_path / "p", vlm_width=1024, expert_width=512, mlp_dim=4096, depth=8,
                                  vocab_size=32768, dtype="bfloat16")  # fmt: skip
    if layout == "openpi":
        save_file(openpi(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE)
    size = (folder / WEIGHTS_FILE).stat().st_size
    assert size > 200e6
    script = Path(__file__).parents[2] / "scripts" / "full_size_checkpoint.py"
    command = [sys.executable, str(script), "--measure", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
    result = json.loads(done.stdout.splitlines()[-1])
    growth = result["after_load"]["peak"] - result["before"]["peak"]
    assert result["file_bytes"] == size
    assert growth <= 1.3 * size
