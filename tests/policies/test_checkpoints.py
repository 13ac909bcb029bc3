"""Folders round-trip exactly, and anything that does not fit is refused."""

import json
import os
import shutil

import pytest
import torch
from lerobot.policies.factory import get_policy_class
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pi_rl.policies.checkpoints import (
    ADAPTER_FOLDER,
    has_tokenizer_files,
    load_heads,
    load_policy,
    load_policy_weights,
    save_heads,
    save_policy,
    set_tokenizer_name,
)
from pi_rl.policies.lora import VLM_PREFIX, add_lora, has_lora, lora_parameters, save_adapter, vlm_lora_config
from pi_rl.policies.pi import PiFlowPolicy

EMBEDDING = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
VLM_HEAD = "model.paligemma_with_expert.paligemma.lm_head.weight"
EXPERT_HEAD = "model.paligemma_with_expert.gemma_expert.lm_head.weight"


def actions(loaded, toolbox, samples=2):
    batch = loaded.preprocessor(toolbox.observations(samples))
    config = loaded.policy.config
    noise = torch.randn(samples, config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(1))
    return loaded.postprocessor(loaded.policy.predict_action_chunk(batch, noise=noise))


@pytest.fixture
def copied(loaded, tmp_path):
    return shutil.copytree(loaded.path, tmp_path / "copy")


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    tensors = edit(tensors) or tensors
    save_file(tensors, folder / "model.safetensors")


def test_save_and_load_gives_the_same_actions(loaded, toolbox, tmp_path):
    with torch.no_grad():
        for parameter in loaded.policy.parameters():
            parameter.mul_(1.01)
    expected = actions(loaded, toolbox)
    folder = save_policy(tmp_path / "a" / "b", loaded.policy, loaded.preprocessor, loaded.postprocessor)
    again = load_policy(folder)
    assert torch.equal(actions(again, toolbox), expected)
    assert not again.policy.training
    assert not any(p.is_meta for p in again.policy.parameters())
    assert [p.name for p in folder.parent.iterdir()] == ["b"]


def test_lerobot_reads_the_folder(loaded, toolbox):
    policy = get_policy_class(loaded.policy.config.type).from_pretrained(loaded.path, strict=True)
    for name, tensor in loaded.policy.state_dict().items():
        assert torch.equal(policy.state_dict()[name], tensor), name
    policy.eval()
    loaded_actions = actions(loaded, toolbox)
    loaded.policy = policy
    assert torch.equal(actions(loaded, toolbox), loaded_actions)


def test_layout(loaded, tmp_path):
    loaded.policy.config.push_to_hub = True
    folder = save_policy(
        tmp_path / "p", loaded.policy, loaded.preprocessor, loaded.postprocessor, extra_files={"README.md": "# x"}
    )
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    config = json.loads((folder / "config.json").read_text())
    assert config["type"] == loaded.policy.config.type
    assert (config["n_action_steps"], config["num_inference_steps"]) == (4, 3)
    assert config["push_to_hub"] is False
    assert config["use_peft"] is False
    assert config["pretrained_path"] is None
    assert loaded.policy.config.push_to_hub is True
    assert set(load_file(folder / "model.safetensors")) == set(loaded.policy.state_dict())


def test_settings_are_overridden(loaded):
    again = load_policy(loaded.path, n_action_steps=2, denoising_steps=7)
    policy = PiFlowPolicy(again.policy)
    assert (policy.n_action_steps, policy.denoising_steps) == (2, 7)
    for wrong in ({"n_action_steps": 7}, {"n_action_steps": 0}, {"denoising_steps": 0}, {"revision": "main"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            load_policy(loaded.path, **wrong)


def test_bfloat16_policies_round_trip(toolbox, tmp_path):
    folder = toolbox.write_policy("pi0", tmp_path / "bf16", dtype="bfloat16")
    loaded = load_policy(folder)
    plain = get_policy_class("pi0_small")(loaded.policy.config)
    plain.load_state_dict(loaded.policy.state_dict())
    for (name, a), (_, b) in zip(loaded.policy.named_buffers(), plain.named_buffers(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    expected = actions(loaded, toolbox)
    loaded.policy = plain.eval()
    assert torch.equal(actions(loaded, toolbox), expected)


def drop(key):
    def edit(tensors):
        del tensors[key]

    return edit


OUTPUT = "model.action_out_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop(OUTPUT), f"1 missing: {OUTPUT}"),
        (
            lambda tensors: tensors.update({"value_head.weight": torch.zeros(1)}),
            "1 unexpected: value_head.weight",
        ),
        (
            lambda tensors: tensors.update({OUTPUT: torch.zeros(2, 3)}),
            r"1 wrong shape: .*\(2, 3\) instead of \(5, 64\)",
        ),
        (lambda tensors: {OUTPUT: tensors[OUTPUT]}, r"missing: .*, … and \d+ more"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied, edit, message):
    edit_weights(copied, edit)
    with pytest.raises(ValueError, match=message):
        load_policy(copied)


def test_refused_weights_leave_a_policy_as_it_was(loaded, copied):
    before = {name: tensor.clone() for name, tensor in loaded.policy.state_dict().items()}
    edit_weights(copied, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items() if name != OUTPUT})
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_policy_weights(loaded.policy, copied)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.policy.state_dict().items())


def test_weights_are_loaded_in_place(loaded, copied):
    edit_weights(copied, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    parameter = loaded.policy.get_parameter(OUTPUT)
    before = parameter.detach().clone()
    load_policy_weights(loaded.policy, copied)
    assert torch.equal(parameter, before + 1)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
    ],
)
def test_missing_files_are_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_policy(copied)


def test_missing_statistics_are_named(toolbox, tmp_path):
    stats = {
        key: {"mean": torch.zeros(size), "std": torch.ones(size)}
        for key, size in (("observation.state", toolbox.state_dim), ("action", toolbox.action_dim))
    }
    folder = toolbox.write_policy("pi0", tmp_path / "p", dataset_stats=stats)
    load_policy(folder)
    (file,) = folder.glob("policy_preprocessor_*normalizer*.safetensors")
    file.unlink()
    with pytest.raises(ValueError, match=file.name):
        load_policy(folder)


def test_damaged_weights_are_named(copied):
    (copied / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable safetensors"):
        load_policy(copied)


@pytest.mark.parametrize("change", [{"type": "act"}, {"use_peft": True}])
def test_other_configurations_are_refused(copied, change):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match="supported types are|without adapter_config.json"):
        load_policy(copied)


@pytest.mark.parametrize("path", ["./nowhere", "nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_path_that_is_no_folder_is_refused(path):
    with pytest.raises(ValueError, match="neither an existing folder nor a Hub id"):
        load_policy(path)


def test_openpi_names_and_tied_embedding(copied, loaded, toolbox):
    def openpi(tensors):
        tensors[VLM_HEAD] = tensors.pop(EMBEDDING)
        del tensors[EXPERT_HEAD]
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    edit_weights(copied, openpi)
    again = load_policy(copied)
    assert torch.equal(actions(again, toolbox), actions(loaded, toolbox))
    state = again.policy.state_dict()
    assert torch.equal(state[VLM_HEAD], state[EMBEDDING])
    assert state[VLM_HEAD].data_ptr() != state[EMBEDDING].data_ptr()
    assert not state[EXPERT_HEAD].any()


def test_a_lone_embedding_is_enough(copied, loaded, toolbox):
    edit_weights(copied, drop(VLM_HEAD))
    assert torch.equal(actions(load_policy(copied), toolbox), actions(loaded, toolbox))


def test_a_moved_folder_keeps_its_tokenizer(loaded, toolbox, tmp_path, monkeypatch):
    expected = actions(loaded, toolbox)
    first = save_policy(tmp_path / "first", loaded.policy, loaded.preprocessor, loaded.postprocessor)
    moved = tmp_path / "elsewhere" / "second"
    moved.parent.mkdir()
    first.rename(moved)
    monkeypatch.chdir(moved.parent)
    again = load_policy("./second")
    assert torch.equal(actions(again, toolbox), expected)
    again = load_policy(save_policy("third", again.policy, again.preprocessor, again.postprocessor))
    shutil.rmtree(moved)
    assert torch.equal(actions(again, toolbox), expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "elsewhere" / "third")
    assert tokenizer.decode(tokenizer("open the drawer\n")["input_ids"], skip_special_tokens=True) == (
        "open the drawer\n"
    )


def test_a_tokenizer_that_is_gone_is_reported(copied):
    for path in copied.glob("tokenizer*"):
        path.unlink()
    assert not has_tokenizer_files(copied)
    set_tokenizer_name(copied, str(copied / "gone"))
    assert str(copied / "gone") in (copied / "config.json").read_text()
    with pytest.raises(RuntimeError, match="gone"):
        load_policy(copied)


def test_the_recorded_tokenizer_can_be_a_hub_id(loaded, tmp_path):
    folder = save_policy(
        tmp_path / "p", loaded.policy, loaded.preprocessor, loaded.postprocessor, tokenizer_name="user/policy"
    )
    assert '"user/policy"' in (folder / "policy_preprocessor.json").read_text()
    load_policy(folder)  # the folder's own files come first


def test_saving_into_a_used_folder_replaces_only_its_own_files(loaded, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "notes.txt").write_text("kept")
    (folder / "model.safetensors").write_text("old")
    save_policy(folder, loaded.policy, loaded.preprocessor, loaded.postprocessor)
    assert (folder / "notes.txt").read_text() == "kept"
    assert (folder / "checkpoint-1").is_dir()
    load_policy(folder)


def test_a_failed_save_leaves_nothing(loaded, tmp_path):
    with pytest.raises(ValueError, match="plain name"):
        save_policy(
            tmp_path / "p",
            loaded.policy,
            loaded.preprocessor,
            loaded.postprocessor,
            extra_files={"../README.md": "x"},
        )
    with pytest.raises(ValueError, match="state_dict"):
        save_policy(tmp_path / "p", loaded.policy, loaded.preprocessor, loaded.postprocessor, state_dict={})
    assert os.listdir(tmp_path) == []


def test_processors_round_trip_with_statistics(toolbox, tmp_path):
    state_stats = {"mean": torch.arange(4.0), "std": torch.full((4,), 2.0)}
    action_stats = {"mean": torch.ones(3), "std": torch.full((3,), 0.5)}
    stats = {"observation.state": state_stats, "action": action_stats}
    loaded = load_policy(toolbox.write_policy("pi0", tmp_path / "p", dataset_stats=stats))
    raw = toolbox.observations(3)
    batch = loaded.preprocessor(dict(raw))
    expected = (raw["observation.state"] - state_stats["mean"]) / 2.0
    torch.testing.assert_close(batch["observation.state"], expected)
    torch.testing.assert_close(loaded.postprocessor(torch.zeros(3, 2, 3)), torch.ones(3, 2, 3))
    again = load_policy(save_policy(tmp_path / "q", loaded.policy, loaded.preprocessor, loaded.postprocessor))
    for key, value in again.preprocessor(dict(raw)).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, batch[key]), key


@pytest.mark.parametrize("noise", ["flow_sde", "flow_noise"])
def test_heads_are_strict(policy, toolbox, tmp_path, noise):
    actor_critic = toolbox.make_actor_critic(policy, noise)
    with pytest.raises(ValueError, match="critic.safetensors is missing"):
        load_heads(tmp_path, actor_critic)
    save_heads(tmp_path, actor_critic)
    names = {"critic.safetensors"} | ({"noise_network.safetensors"} if noise == "flow_noise" else set())
    assert {path.name for path in tmp_path.iterdir()} == names
    other = toolbox.make_actor_critic(policy, noise, seed=1)
    load_heads(tmp_path, other)
    for name, tensor in actor_critic.value_head.state_dict().items():
        assert torch.equal(other.value_head.state_dict()[name], tensor)
    save_file({"layers.0.weight": torch.zeros(1)}, tmp_path / "critic.safetensors")
    with pytest.raises(ValueError, match="wrong shape"):
        load_heads(tmp_path, other)


def test_a_model_without_critic_has_no_critic_file(policy, toolbox, tmp_path):
    actor_critic = toolbox.make_actor_critic(policy, "flow_noise")
    save_heads(tmp_path / "both", actor_critic)
    actor_critic.value_head = None
    save_heads(tmp_path / "noise", actor_critic)
    assert [path.name for path in (tmp_path / "noise").iterdir()] == ["noise_network.safetensors"]
    load_heads(tmp_path / "both", actor_critic)
    actor_critic.noise_network = None
    save_heads(tmp_path / "none", actor_critic)
    load_heads(tmp_path / "none", actor_critic)
    assert list((tmp_path / "none").iterdir()) == []


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def with_lora(loaded, seed=None):
    """Adapters on a loaded policy; with a seed, everything trained is moved a little."""
    policy = PiFlowPolicy(loaded.policy)
    add_lora(policy, vlm_lora_config(rank=4, alpha=6))
    for parameter in policy.trainable_parameters():
        parameter.data = parameter.data.float()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return loaded


def save(loaded, folder):
    return save_policy(folder, loaded.policy, loaded.preprocessor, loaded.postprocessor)


def test_adapted_policies_are_deployed_merged(loaded, toolbox, tmp_path):
    before = actions(loaded, toolbox)
    with_lora(loaded, seed=0)
    live = actions(loaded, toolbox)
    assert (live - before).abs().max() > 0.05
    folder = save(loaded, tmp_path / "p")
    assert json.loads((folder / "config.json").read_text())["use_peft"] is False
    assert not any("lora" in name or "base_layer" in name for name in load_file(folder / "model.safetensors"))
    assert {path.name for path in (folder / ADAPTER_FOLDER).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again = load_policy(folder)
    assert not has_lora(again.policy)
    torch.testing.assert_close(actions(again, toolbox), live, rtol=1e-4, atol=2e-5)
    plain = get_policy_class(loaded.policy.config.type).from_pretrained(folder, strict=True)
    for name, tensor in again.policy.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
    again.policy = plain.eval()
    torch.testing.assert_close(actions(again, toolbox), live, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapted_policies_resume_bitwise(toolbox, tmp_path, dtype):
    base = toolbox.write_policy("pi05", tmp_path / "base", dtype=dtype)
    trained = with_lora(load_policy(base), seed=0)
    folder = save(trained, tmp_path / "checkpoint")
    resumed = with_lora(load_policy(base))
    tensors = {name: tensor.data_ptr() for name, tensor in resumed.policy.state_dict().items()}
    load_policy_weights(resumed.policy, folder)
    for name, tensor in trained.policy.state_dict().items():
        mine = resumed.policy.state_dict()[name]
        assert mine.dtype == tensor.dtype, name
        assert torch.equal(mine, tensor), name
        assert mine.data_ptr() == tensors[name], name
    save(resumed, folder)  # over the old one
    load_policy_weights(with_lora(load_policy(base)).policy, folder)
    assert torch.equal(actions(resumed, toolbox), actions(trained, toolbox))


def test_resuming_on_another_base_is_refused(toolbox, tmp_path):
    base = toolbox.write_policy("pi0", tmp_path / "base")
    folder = save(with_lora(load_policy(base), seed=0), tmp_path / "checkpoint")
    key = f"{VLM_PREFIX}model.language_model.layers.0.self_attn.q_proj.base_layer.weight"
    for name in (key, f"{VLM_PREFIX}model.language_model.norm.weight"):
        other = with_lora(load_policy(base))
        with torch.no_grad():
            other.policy.get_parameter(name).view(-1)[0] += 1e-5
        before = {name: tensor.clone() for name, tensor in other.policy.state_dict().items()}
        with pytest.raises(ValueError, match=r"another base policy: 1 of \d+ VLM tensors"):
            load_policy_weights(other.policy, folder)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.policy.state_dict().items())
    with pytest.raises(ValueError, match="another base policy"):  # its own merged weights are another base, too
        load_policy_weights(with_lora(load_policy(folder)).policy, folder)


def test_runs_with_and_without_lora_do_not_mix(loaded, tmp_path):
    without = save(loaded, tmp_path / "without")
    with_lora(loaded, seed=0)
    adapted = save(loaded, tmp_path / "with")
    with pytest.raises(ValueError, match="was trained without LoRA, this run is with it"):
        load_policy_weights(loaded.policy, without)
    with pytest.raises(ValueError, match="was trained with LoRA, this run is without it"):
        load_policy_weights(load_policy(without).policy, adapted)
    merged = load_policy(adapted)
    save(merged, adapted)  # a policy without adapters leaves none behind
    assert not (adapted / ADAPTER_FOLDER).exists()
    load_policy_weights(merged.policy, adapted)


def test_adapted_weights_can_be_given(loaded, toolbox, tmp_path):
    with_lora(loaded, seed=0)
    gathered = {name: tensor.clone() for name, tensor in loaded.policy.state_dict().items()}
    live = actions(loaded, toolbox)
    with torch.no_grad():
        for parameter in lora_parameters(loaded.policy):
            parameter.zero_()
    folder = save_policy(tmp_path / "p", loaded.policy, loaded.preprocessor, loaded.postprocessor, state_dict=gathered)
    torch.testing.assert_close(actions(load_policy(folder), toolbox), live, rtol=1e-4, atol=2e-5)
    stored = load_file(folder / ADAPTER_FOLDER / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in stored.values())


def test_damaged_adapters_are_refused(loaded, tmp_path):
    with_lora(loaded, seed=0)
    folder = save(loaded, tmp_path / "p")
    (folder / ADAPTER_FOLDER / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        load_policy_weights(loaded.policy, folder)
    with torch.no_grad():
        next(lora_parameters(loaded.policy)).add_(1.0)
    save_adapter(folder / ADAPTER_FOLDER, loaded.policy)  # newer than the weights beside them
    with pytest.raises(ValueError, match="adapters merged"):
        load_policy_weights(loaded.policy, folder)
