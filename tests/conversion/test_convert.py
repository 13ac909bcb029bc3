"""`pi-rl convert` between LeRobot's, openpi's and RLinf's layouts: same actions, every tensor accounted for."""

import errno
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from lerobot.policies.factory import get_policy_class
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pi_rl.cli.main import main
from pi_rl.policies.checkpoints import CRITIC_FILE, NOISE_NETWORK_FILE, load_policy
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.weight_files import EMBEDDING, EXPERT_HEAD, INDEX_FILE, VLM_HEAD, WEIGHTS_FILE
from tests.conversion.commands import convert, refused


def stored_names(folder):
    names = []
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            names += handle.keys()
    return sorted(names)


def sources(report):
    return sorted(key["source"] for key in report["keys"] if key["source"])


def mlp(widths, activation, seed):
    torch.manual_seed(seed)
    layers = []
    for width_in, width_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(width_in, width_out), activation()]
    return nn.Sequential(*layers[:-1])


def value_head(widths, seed=0):
    """RLinf's value head: the network, and its tensors by RLinf's names."""
    network = mlp(widths, nn.ReLU, seed)
    return network, {f"value_head.mlp.{name}": tensor.detach() for name, tensor in network.state_dict().items()}


def noise_head(widths, bounds=(0.08, 0.16), seed=0):
    network = mlp(widths, nn.Tanh, seed)
    tensors = {}
    for name, tensor in network.state_dict().items():
        layer, kind = name.split(".")
        tensors[f"noise_head.mlp_logvar.moduleList.{int(layer) // 2}.linear_1.{kind}"] = tensor.detach()
    for name, bound in zip(("logvar_min", "logvar_max"), bounds, strict=True):
        tensors[f"noise_head.{name}"] = torch.tensor([2 * math.log(bound)])
    return network, tensors


@pytest.mark.parametrize(("shards", "prefix"), [(1, ""), (3, "_fsdp_wrapped_module.")])
def test_openpi_to_lerobot(capsys, folder, tools, tmp_path, shards, prefix):
    tensors = tools.openpi_tensors(folder, prefix)
    source = tools.write_openpi(tmp_path / "openpi", tensors, shards, tools.statistics())
    report = convert(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", folder)
    assert sources(report) == stored_names(source)
    assert report["counts"] == {"tied": 1, "converted": len(tensors) - 1, "added": 1}
    assert torch.equal(tools.actions_of(tmp_path / "new", folder), tools.actions_of(folder))
    # with its own processors, which have openpi's ε
    torch.testing.assert_close(tools.actions_of(tmp_path / "new"), tools.actions_of(folder), rtol=0, atol=2e-4)
    written = load_file(tmp_path / "new" / WEIGHTS_FILE)
    theirs = get_policy_class(load_policy(folder).policy.config.type).from_pretrained(tmp_path / "new", strict=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, written[name]), name
    assert torch.equal(written[EMBEDDING], written[VLM_HEAD])
    assert not written[EXPERT_HEAD].any()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "openpi"]


@pytest.mark.parametrize("shard_gb", [None, 2e-4])
def test_lerobot_to_openpi_and_back(capsys, folder, tools, tmp_path, shard_gb):
    sharded = [] if shard_gb is None else ["--shard_gb", shard_gb]
    there = convert(capsys, folder, tmp_path / "openpi", "--to", "openpi", *sharded)
    assert sources(there) == stored_names(folder)
    assert (tmp_path / "openpi" / INDEX_FILE).is_file() == (shard_gb is not None)
    names = set(stored_names(tmp_path / "openpi"))
    original = load_file(folder / WEIGHTS_FILE)
    assert names == {name.removeprefix("model.") for name in original if name != EMBEDDING}
    back = convert(capsys, tmp_path / "openpi", tmp_path / "back", "--to", "lerobot", "--like", folder)
    assert sources(back) == sorted(names)
    again = load_file(tmp_path / "back" / WEIGHTS_FILE)
    assert [name for name in original if not torch.equal(again[name], original[name])] == [VLM_HEAD]  # untied here
    assert torch.equal(tools.actions_of(tmp_path / "back", folder), tools.actions_of(folder))
    convert(capsys, tmp_path / "back", tmp_path / "openpi2", "--to", "openpi", *sharded)
    for path in (path for path in (tmp_path / "openpi").rglob("*") if path.is_file()):
        assert (tmp_path / "openpi2" / path.relative_to(tmp_path / "openpi")).read_bytes() == path.read_bytes()


def test_a_pickled_checkpoint_of_rlinf(capsys, folder, tools, tmp_path):
    _, head = value_head((tools.expert_width, 16, 8, 4, 1))
    state = {**tools.openpi_tensors(folder, "_fsdp_wrapped_module."), **head}
    state[f"_fsdp_wrapped_module.{EMBEDDING.removeprefix('model.')}"] = load_file(folder / WEIGHTS_FILE)[EMBEDDING]
    path = tmp_path / "step" / "actor" / "model_state_dict" / "full_weights.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    report = convert(capsys, tmp_path / "step", tmp_path / "new", "--to", "lerobot", "--like", folder)
    assert sources(report) == sorted(state)
    convert(capsys, path, tmp_path / "again", "--to", "lerobot", "--like", folder)
    for name in (WEIGHTS_FILE, CRITIC_FILE):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    written = load_file(tmp_path / "new" / WEIGHTS_FILE)
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        if name not in (VLM_HEAD, EXPERT_HEAD):
            assert torch.equal(written[name], tensor), name


class Evil:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_does_not_run(capsys, folder, tmp_path):
    torch.save({"state": Evil(tmp_path / "executed")}, tmp_path / "full_weights.pt")
    message = refused(capsys, tmp_path / "full_weights.pt", tmp_path / "new", "--to", "lerobot", "--like", folder)
    assert "cannot be read without running code from it" in message
    assert [path.name for path in tmp_path.iterdir()] == ["full_weights.pt"]


@pytest.mark.parametrize("content", [{"step": 3}, [1, 2], {"model": {"w": torch.zeros(1)}}])
def test_a_pickle_that_is_no_state_dict_is_refused(capsys, folder, tmp_path, content):
    torch.save(content, tmp_path / "full_weights.pt")
    message = refused(capsys, tmp_path / "full_weights.pt", tmp_path / "new", "--to", "lerobot", "--like", folder)
    assert "state dict" in message


@pytest.mark.parametrize("critic", ["expert", "vlm"])
def test_a_value_head_becomes_the_critic(capsys, policy_folders, tools, tmp_path, critic):
    folder = policy_folders["pi05"]
    width = tools.expert_width if critic == "expert" else tools.vlm_width
    network, tensors = value_head((width, 16, 8, 4, 1))
    source = tools.write_openpi(tmp_path / "o", {**tools.openpi_tensors(folder), **tensors})
    report = convert(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", folder)
    assert sources(report) == stored_names(source)
    notes = {key["note"] for key in report["keys"] if key["source"].startswith("value_head.")}
    assert notes == {f"critic={critic}, critic_hidden_sizes=[16, 8, 4]"}
    head = ValueHead(PiFlowPolicy(load_policy(tmp_path / "new").policy), (16, 8, 4), critic)
    head.load_state_dict(load_file(tmp_path / "new" / CRITIC_FILE), strict=True)
    features = torch.randn(5, 1, width)
    assert torch.equal(head(features), network(features).squeeze(-1).mean(1))
    exported = convert(capsys, tmp_path / "new", tmp_path / "rlinf", "--to", "openpi", "--rlinf")
    again = load_file(tmp_path / "rlinf" / WEIGHTS_FILE)
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor), name
    assert {key["source"] for key in exported["keys"]} >= {f"{CRITIC_FILE}: layers.0.weight"}
    assert (tmp_path / "rlinf" / "physical-intelligence" / "libero" / "norm_stats.json").is_file()


def test_heads_that_do_not_fit_are_set_aside_by_name(capsys, policy_folders, tools, tmp_path):
    folder = policy_folders["pi0"]
    heads = {
        **value_head((tools.vlm_width, 16, 1))[1],  # π0's critic reads the state, too
        **noise_head((tools.expert_width, 128, 64, tools.padded))[1],
        "rlt_module.weight": torch.zeros(2),
    }
    source = tools.write_openpi(tmp_path / "o", {**tools.openpi_tensors(folder), **heads})
    report = convert(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", folder)
    aside = {key["source"]: key["note"] for key in report["keys"] if key["what"] == "set aside"}
    assert set(aside) == set(heads)
    assert "reads 48 numbers, this package's critics 32 (expert) or 52 (vlm)" in aside["value_head.mlp.0.weight"]
    noise = aside["noise_head.mlp_logvar.moduleList.0.linear_1.weight"]
    assert noise == "its layers are 32-128-64-5, this package's 32-128-64-32-5"
    assert aside["noise_head.logvar_min"] == "set noise_std_min=0.08"
    assert aside["noise_head.logvar_max"] == "set noise_std_max=0.16"
    assert not (tmp_path / "new" / CRITIC_FILE).exists()
    assert not (tmp_path / "new" / NOISE_NETWORK_FILE).exists()
    assert main(["convert", str(source), str(tmp_path / "text"), "--to", "lerobot", "--like", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in heads)


def test_a_noise_head_of_this_packages_size_is_converted(capsys, policy_folders, tools, tmp_path):
    from pi_rl.flow.noise_network import NoiseNetwork

    folder = policy_folders["pi0"]
    network, tensors = noise_head((tools.expert_width, 128, 64, 32, tools.padded))
    source = tools.write_openpi(tmp_path / "o", {**tools.openpi_tensors(folder), **tensors})
    convert(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", folder)
    ours = NoiseNetwork(tools.expert_width, tools.padded, 0.08, 0.16)
    ours.load_state_dict(load_file(tmp_path / "new" / NOISE_NETWORK_FILE), strict=True)
    features = torch.randn(4, 2, tools.expert_width)
    low, high = (2 * math.log(bound) for bound in (0.08, 0.16))
    expected = torch.exp(0.5 * (low + (high - low) * (torch.tanh(network(features)) + 1) / 2))
    torch.testing.assert_close(ours(features), expected)
    report = convert(capsys, tmp_path / "new", tmp_path / "rlinf", "--to", "openpi", "--rlinf")
    aside = {key["note"] for key in report["keys"] if key["source"].startswith(NOISE_NETWORK_FILE)}
    assert aside == {"its layers are 32-128-64-32-5, RLinf's noise head's 32-128-64-5"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types(capsys, policy_folders, tmp_path, dtype):
    folder = policy_folders["pi0"]
    report = convert(capsys, folder, tmp_path / "new", "--to", "lerobot", "--dtype", dtype)
    assert report["facts"]["computes in"] == dtype
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == dtype
    written = load_file(tmp_path / "new" / WEIGHTS_FILE)
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        assert torch.equal(written[name], tensor.to(getattr(torch, dtype))), name
    load_policy(tmp_path / "new")


# ---- what is refused ------------------------------------------------------------------------------------------------


def edited(tools, folder, target, edit):
    tensors = tools.openpi_tensors(folder)
    edit(tensors)
    return tools.write_openpi(target, tensors)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected: model.extra"),
        (lambda t: t.pop("action_in_proj.bias"), "1 missing: model.action_in_proj.bias"),
        (lambda t: t.update({"action_in_proj.bias": torch.zeros(2)}), "1 wrong shape"),
        (lambda t: [t.pop(n) for n in list(t) if "state_proj" in n or "time_mlp" in n], "neither π0 nor π0.5"),
    ],
)
def test_weights_that_do_not_fit_are_refused(capsys, folder, tools, tmp_path, edit, message):
    source = edited(tools, folder, tmp_path / "o", edit)
    assert message in refused(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", folder)
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_an_existing_folder_is_left_alone(capsys, folder, tmp_path):
    (tmp_path / "new").mkdir()
    assert "exists" in refused(capsys, folder, tmp_path / "new", "--to", "openpi")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_other_model_is_refused(capsys, policy_folders, tools, tmp_path):
    source = tools.write_openpi(tmp_path / "o", tools.openpi_tensors(policy_folders["pi0"]))
    words = (source, tmp_path / "new", "--to", "lerobot", "--like", policy_folders["pi05"])
    assert "holds a pi0, and the configuration of" in refused(capsys, *words)


def test_openpi_weights_need_a_configuration(capsys, policy_folders, tools, tmp_path):
    source = tools.write_openpi(tmp_path / "o", tools.openpi_tensors(policy_folders["pi0"]))
    (source / "config.json").write_text(json.dumps({"action_dim": 32, "action_horizon": 50}))
    message = refused(capsys, source, tmp_path / "new", "--to", "lerobot")
    assert "--like" in message
    assert "--camera" in message
    message = refused(capsys, source, tmp_path / "new", "--to", "lerobot", "--camera", "observation.image")
    assert "--state_dim, --action_dim, --chunk_size must be given" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "openpi", "--base", "x"], "--base belongs to --to adapter or merged"),
        (["--to", "lerobot", "--asset_id", "x"], "--asset_id belongs to --to openpi"),
        (["--to", "adapter", "--dtype", "float32"], "--dtype belongs to"),
        (["--to", "openpi", "--shard_gb", "0"], "must be a number of gigabytes above 0"),
        (["--to", "lerobot", "--norm_stats", "nowhere.json"], "is no file"),
        (["--to", "lerobot", "--like", "x/y", "--state_dim", "3"], "leave out --state_dim"),
        (["--to", "merged"], "is no adapter-only folder"),
        (["--to", "adapter"], "has no adapter folder"),
        ([], "--to"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, policy_folders, tmp_path, words, message):
    assert message in refused(capsys, policy_folders["pi0"], tmp_path / "new", *words)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "README.md"])
def test_a_source_that_is_none_is_refused(capsys, folder, tmp_path, source):
    message = refused(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", folder)
    assert "neither an existing folder nor a Hub id" in message or "is no weight file" in message


@pytest.mark.parametrize("inside", ["policy", "checkpoint-8"])
def test_a_run_folder_stands_for_its_policy(capsys, folder, tools, tmp_path, inside):
    run = tmp_path / "run"
    shutil.copytree(folder, run / inside)
    (run / "pi_rl_config.yaml").write_text("num_envs: 4\n")
    there = convert(capsys, run, tmp_path / "openpi", "--to", "openpi")
    assert sources(there) == stored_names(folder)
    convert(capsys, tmp_path / "openpi", tmp_path / "back", "--to", "lerobot", "--like", run)
    assert torch.equal(tools.actions_of(tmp_path / "back", folder), tools.actions_of(folder))
    convert(capsys, run, tmp_path / "again", "--to", "lerobot")
    assert torch.equal(tools.actions_of(tmp_path / "again"), tools.actions_of(folder))


def test_a_run_folder_without_a_policy_is_refused(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pi_rl_config.yaml").write_text("num_envs: 4\n")
    text = refused(capsys, tmp_path / "run", tmp_path / "new", "--to", "openpi")
    assert f"{tmp_path / 'run'} holds no policy" in text
    assert "checkpoint-N" in text
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_nothing(capsys, folder, tmp_path, monkeypatch):
    def fill_the_disk(path, tensors, contents):
        path.write_bytes(b"half of a header")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pi_rl.conversion.to_lerobot.write_tensors", fill_the_disk)
    for to in ("lerobot", "openpi"):
        assert "No space left on device" in refused(capsys, folder, tmp_path / "new", "--to", to)
        assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_refused(capsys, folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "p")
    (copied / WEIGHTS_FILE).write_bytes((copied / WEIGHTS_FILE).read_bytes()[:-10])
    assert "not a readable safetensors file" in refused(capsys, copied, tmp_path / "new", "--to", "openpi")


def test_a_foreign_tensor_type_is_refused(capsys, policy_folders, tools, tmp_path):
    folder = policy_folders["pi0"]
    tensors = tools.openpi_tensors(folder)
    tensors["action_in_proj.bias"] = tensors["action_in_proj.bias"].to(torch.float8_e4m3fn)
    source = tmp_path / "o"
    source.mkdir()
    save_file(tensors, source / WEIGHTS_FILE)
    assert "F8_E4M3" in refused(capsys, source, tmp_path / "new", "--to", "lerobot", "--like", folder)


MEASURED = """
import json, sys
from pathlib import Path
from pi_rl.cli.main import main
import pi_rl.conversion.new_template, pi_rl.conversion.to_openpi

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
code = main(["convert", *sys.argv[1:]])
print(json.dumps({"code": code, "growth": peak() - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["lerobot", "openpi"])
def test_the_model_is_never_in_memory(tools, tmp_path, to):
    """About 200 MB in a fresh process: the highest resident set grows by a part of it, the largest tensor is 67 MB."""
    sizes = {"vlm_width": 1024, "expert_width": 512, "mlp_dim": 4096, "depth": 8, "vocab_size": 32768}
    folder = tools.write_policy("pi0", tmp_path / "p", dtype="bfloat16", **sizes)
    size = (folder / WEIGHTS_FILE).stat().st_size
    assert size > 200e6
    command = [sys.executable, "-c", MEASURED, str(folder), str(tmp_path / "new"), "--to", to]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] == 0
    assert told["growth"] < 0.75 * size
