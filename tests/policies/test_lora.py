"""LoRA adapts what the actions read of the VLM, starts at the given policy, and merges back into a LeRobot policy."""

import copy
import json

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.lora import (
    ADAPTER_CONFIG_FILE,
    VLM_PREFIX,
    MergedState,
    add_lora,
    has_lora,
    load_adapter,
    lora_parameters,
    merge,
    save_adapter,
    vlm_lora_config,
)
from pi_rl.policies.mlp.flow_policy import MlpFlowPolicy
from pi_rl.policies.pi import PiFlowPolicy

LANGUAGE = "model.language_model.layers."
VISION = "model.vision_tower.vision_model.encoder.layers."
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def expected_layers(language_depth, vision_depth):
    names = set()
    for i in range(language_depth):
        names |= {
            f"{LANGUAGE}{i}.self_attn.{name}"
            for name in ATTENTION
            if i + 1 < language_depth or name in "k_proj v_proj"
        }
        names |= {f"{LANGUAGE}{i}.mlp.{name}" for name in MLP if i + 1 < language_depth}
    for i in range(vision_depth):
        names |= {f"{VISION}{i}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        names |= {f"{VISION}{i}.mlp.{name}" for name in ("fc1", "fc2")}
    return {VLM_PREFIX + name for name in names}


def adapted(lerobot_policy):
    return {name.partition(".lora_A")[0] for name in lerobot_policy.state_dict() if ".lora_A." in name}


def disturb(policy, scale=0.2, seed=0):
    """Random changes of everything trained, as if by some updates; large enough to change actions visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            spread = scale / max(parameter.shape[-1], 1) ** 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


@pytest.fixture
def adapted_policy(policy):
    add_lora(policy, vlm_lora_config(rank=4, alpha=6))
    return policy


def score(actor_critic, batch, chain):
    return actor_critic("score", inputs=batch, chain=chain)[0].log_prob


def lerobot_actions(lerobot_policy, batch):
    config = lerobot_policy.config
    noise = torch.randn(4, config.chunk_size, config.max_action_dim, generator=torch.Generator().manual_seed(1))
    return lerobot_policy.predict_action_chunk(batch, noise=noise)


def test_small_policies_are_adapted_where_the_actions_read(adapted_policy):
    config = adapted_policy.policy.config
    assert adapted(adapted_policy.policy) == expected_layers(config.depth, config.vision_depth)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in lora_parameters(adapted_policy))
    assert adapted_policy.prefix_is_live
    assert PiFlowPolicy(adapted_policy.policy).prefix_is_live


def test_only_adapters_and_expert_learn(adapted_policy):
    adapted_policy.freeze_vlm()
    for name, parameter in adapted_policy.named_parameters():
        expected = ".lora_" in name or (".paligemma." not in name and "gemma_expert.lm_head" not in name)
        assert parameter.requires_grad == expected, name
    adapted_policy.train()
    assert not any(module.training for module in adapted_policy.policy.model.paligemma_with_expert.paligemma.modules())


def test_training_starts_at_the_given_policy(policy, batch):
    before = policy.encode_prefix(batch)
    add_lora(policy, vlm_lora_config(rank=4, alpha=4))
    with torch.no_grad():
        after = policy.encode_prefix(batch)
    for (name, a), (_, b) in zip(before.tensors(), after.tensors(), strict=True):
        assert torch.equal(a, b), name


def test_every_trained_parameter_gets_a_gradient_from_the_action_loss(adapted_policy, batch, toolbox):
    disturb(adapted_policy)
    actor_critic = toolbox.make_actor_critic(adapted_policy)
    chain, _ = toolbox.draw(actor_critic, actor_critic("encode", batch=batch))
    actor_critic.train()
    score(actor_critic, batch, chain).sum().backward()
    for name, parameter in adapted_policy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    for parameter in lora_parameters(adapted_policy):
        assert parameter.grad.abs().sum() > 0


def test_what_is_left_out_would_get_no_gradient(policy, batch, toolbox):
    vlm = policy.policy.model.paligemma_with_expert.paligemma
    inject_adapter_in_model(LoraConfig(r=2, target_modules="all-linear"), vlm)
    policy.prefix_is_live = True
    policy.freeze_vlm()
    actor_critic = toolbox.make_actor_critic(policy)
    chain, _ = toolbox.draw(actor_critic, actor_critic("encode", batch=batch))
    score(actor_critic, batch, chain).sum().backward()
    dead = {n.partition(".lora_A")[0] for n, p in vlm.named_parameters() if ".lora_A." in n and p.grad is None}
    last = f"{LANGUAGE}{policy.policy.config.depth - 1}."
    unread = {f"{last}self_attn.{n}" for n in ("q_proj", "o_proj")} | {f"{last}mlp.{n}" for n in MLP}
    assert dead - {"lm_head"} == unread
    assert not any("lm_head.lora" in name and p.grad is not None for name, p in vlm.named_parameters())


def test_gradients_are_finite_differences(adapted_policy, batch, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())
    monkeypatch.setattr(functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))
    disturb(adapted_policy)
    adapted_policy.double()
    preprocess = adapted_policy.policy._preprocess_images

    def in_float64(batch):
        images, masks = preprocess(batch)
        return [image.double() for image in images], masks  # the images' type is that of the embeddings

    monkeypatch.setattr(adapted_policy.policy, "_preprocess_images", in_float64)
    batch = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in batch.items()}
    generator = torch.Generator().manual_seed(5)
    shape = (4, adapted_policy.chunk_size, adapted_policy.max_action_dim)
    x, weights = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    t = torch.linspace(1.0, 0.1, 4, dtype=torch.float64)

    def loss():
        return (adapted_policy.velocity(adapted_policy.encode_prefix(batch), x, t)[0] * weights).sum()

    loss().backward()
    assert loss().dtype == torch.float64
    parameters, step = list(lora_parameters(adapted_policy)), 1e-5
    with torch.no_grad():
        for parameter in parameters[:: len(parameters) // 8]:
            values = parameter.view(-1)
            i = int(parameter.grad.abs().argmax())
            value, sums = values[i].clone(), []
            for sign in (1, -1):
                values[i] = value + sign * step
                sums.append(loss())
            values[i] = value
            expected = (sums[0] - sums[1]) / (2 * step)
            assert expected.abs() > 1e-3
            torch.testing.assert_close(parameter.grad.view(-1)[i], expected, rtol=1e-6, atol=0)


def test_sampling_and_encoding_anew_give_the_same_numbers(adapted_policy, batch, toolbox):
    disturb(adapted_policy)
    actor_critic = toolbox.make_actor_critic(adapted_policy)
    with torch.no_grad():
        prefix = actor_critic("encode", batch=batch)
    assert not prefix.kv.requires_grad
    chain, log_prob = toolbox.draw(actor_critic, prefix)
    actor_critic.train()
    live = actor_critic("encode", batch=batch)
    assert live.kv.requires_grad
    assert live.pooled.requires_grad
    for (name, a), (_, b) in zip(prefix.tensors(), live.tensors(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(score(actor_critic, batch, chain), log_prob)
    rows = torch.tensor([2, 0])
    part = {name: value[rows] if torch.is_tensor(value) else value for name, value in batch.items()}
    ratio = (score(actor_critic, part, type(chain)(chain.x[rows], chain.step_index[rows])) - log_prob[rows]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)


def test_checkpointing_changes_nothing(adapted_policy, batch, toolbox):
    disturb(adapted_policy)
    actor_critic = toolbox.make_actor_critic(adapted_policy)
    chain, log_prob = toolbox.draw(actor_critic, actor_critic("encode", batch=batch))
    actor_critic.train()
    gradients = []
    for enable in (False, True):
        if enable:
            adapted_policy.policy.model.gradient_checkpointing_enable()
        adapted_policy.zero_grad()
        log_probs = score(actor_critic, batch, chain)
        log_probs.sum().backward()
        assert torch.equal(log_probs, log_prob)
        gradients.append([p.grad for p in adapted_policy.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bfloat16_vlm_with_float32_training(toolbox, tmp_path):
    loaded = load_policy(toolbox.write_policy("pi0", tmp_path / "p", dtype="bfloat16"))
    policy = PiFlowPolicy(loaded.policy)
    add_lora(policy, vlm_lora_config(rank=4, alpha=4))
    for parameter in policy.trainable_parameters():
        parameter.data = parameter.data.float()
    disturb(policy)
    batch = loaded.preprocessor(toolbox.observations(4))
    actor_critic = toolbox.make_actor_critic(policy)
    prefix = actor_critic("encode", batch=batch)
    assert prefix.kv.dtype == torch.bfloat16
    chain, log_prob = toolbox.draw(actor_critic, prefix)
    actor_critic.train()
    new = score(actor_critic, batch, chain)
    assert torch.equal(new, log_prob)
    new.sum().backward()
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    assert {p.grad.dtype for p in lora_parameters(policy)} == {torch.float32}
    frozen = policy.policy.model.paligemma_with_expert.paligemma.model.language_model
    assert frozen.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    merged = MergedState(policy.policy)
    assert merged[f"{VLM_PREFIX}{LANGUAGE}0.self_attn.q_proj.weight"].dtype == torch.float32
    assert merged[f"{VLM_PREFIX}model.language_model.embed_tokens.weight"].dtype == torch.bfloat16
    live = lerobot_actions(policy.policy.eval(), batch)
    plain = load_policy(tmp_path / "p").policy
    plain.load_state_dict(merged)
    torch.testing.assert_close(lerobot_actions(plain, batch), live, rtol=0, atol=0.05)  # 8 bits


def test_merging(adapted_policy, batch, originals, toolbox):
    disturb(adapted_policy)
    lerobot_policy = adapted_policy.policy
    before = {name: tensor.clone() for name, tensor in lerobot_policy.state_dict().items()}
    merged = MergedState(lerobot_policy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lerobot_policy.state_dict().items())
    plain = copy.deepcopy(originals["pi0" if adapted_policy.prefix_state_dim else "pi05"].policy)
    base = plain.state_dict()
    assert set(merged) == set(base)
    for name in adapted(lerobot_policy):
        a, b = (before[f"{name}.{factor}.default.weight"].double() for factor in ("lora_A", "lora_B"))
        expected = base[f"{name}.weight"].double() + 6 / 4 * b @ a
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=2**-23, atol=0)
    frozen = [
        name
        for name in base
        if name.startswith(VLM_PREFIX) and name.removesuffix(".weight") not in adapted(lerobot_policy)
    ]
    assert frozen
    assert all(torch.equal(merged[name], base[name]) for name in frozen)
    original = lerobot_actions(plain, batch)
    plain.load_state_dict(merged, strict=True)
    live = lerobot_actions(lerobot_policy.eval(), batch)
    torch.testing.assert_close(lerobot_actions(plain, batch), live, rtol=1e-4, atol=2e-5)
    assert (live - original).abs().max() > 0.05


def test_merged_weights_keep_what_bfloat16_would_lose():
    weight, a, b = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((2, 1), 1e-3), torch.full((1, 2), 1e-1)
    assert merge(weight, a, b, 0.5).item() == pytest.approx(1.0001, abs=1e-7)


def test_without_adapters_the_weights_are_the_policys(policy):
    merged = MergedState(policy.policy)
    assert all(
        merged[name] is not None and torch.equal(merged[name], t) for name, t in policy.policy.state_dict().items()
    )
    assert not has_lora(policy)


def test_peft_loads_the_adapter(adapted_policy, batch, originals, tmp_path):
    with torch.no_grad():
        for parameter in lora_parameters(adapted_policy):
            parameter.normal_(std=0.1)
    save_adapter(tmp_path, adapted_policy.policy)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    base = copy.deepcopy(originals["pi0" if adapted_policy.prefix_state_dim else "pi05"].policy)
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    live = lerobot_actions(adapted_policy.policy.eval(), batch)
    assert torch.equal(lerobot_actions(theirs.base_model.model, batch), live)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(lerobot_actions(merged, batch), live, rtol=1e-4, atol=2e-5)


def second_policy(originals, policy, config):
    other = PiFlowPolicy(copy.deepcopy(originals["pi0" if policy.prefix_state_dim else "pi05"].policy))
    add_lora(other, config)
    return other


def test_adapters_round_trip(adapted_policy, originals, tmp_path):
    disturb(adapted_policy)
    save_adapter(tmp_path, adapted_policy.policy)
    text = (tmp_path / ADAPTER_CONFIG_FILE).read_text()
    other = second_policy(originals, adapted_policy, vlm_lora_config(4, 6))
    load_adapter(tmp_path, other.policy)
    for mine, theirs in zip(lora_parameters(other), lora_parameters(adapted_policy), strict=True):
        assert torch.equal(mine, theirs)
    save_adapter(tmp_path, other.policy)
    assert (tmp_path / ADAPTER_CONFIG_FILE).read_text() == text
    assert json.loads(text)["target_modules"] == sorted(adapted(adapted_policy.policy))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (vlm_lora_config(2, 6), "r=4, this policy's have 2"),
        (vlm_lora_config(4, 4), "lora_alpha=6, this policy's have 4"),
        (vlm_lora_config(4, 6, ["fc1"]), "target_modules=21 layers, this policy's have 2 layers"),
    ],
)
def test_other_adapters_are_refused(policy, originals, tmp_path, config, message):
    add_lora(policy, vlm_lora_config(4, 6))
    save_adapter(tmp_path, policy.policy)
    other = second_policy(originals, policy, config)
    before = [p.clone() for p in lora_parameters(other)]
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, other.policy)
    assert all(torch.equal(a, b) for a, b in zip(before, lora_parameters(other), strict=True))
    with pytest.raises(ValueError, match="adapter_config.json is missing"):
        load_adapter(tmp_path / "nowhere", other.policy)
    with pytest.raises(ValueError, match="no LoRA adapters"):
        load_adapter(tmp_path, originals["pi0"].policy)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (LoraConfig(), 21),
        (vlm_lora_config(target_modules="all-linear"), 22),
        (LoraConfig(target_modules="all-linear", exclude_modules=["linear", "fc1"]), 19),
        (vlm_lora_config(target_modules=r".*language_model.*"), 9),
        (vlm_lora_config(target_modules=[r".*language_model.*"]), 9),
        (vlm_lora_config(target_modules=["self_attn.k_proj", "linear"]), 5),
        (LoraConfig(target_modules=["q_proj", "k_proj"], layers_to_transform=0, use_rslora=True), 4),
        (LoraConfig(target_modules=["q_proj", "k_proj"], exclude_modules=r".*vision_tower.*"), 3),
        (LoraConfig(r=4, rank_pattern={"fc1": 2}, alpha_pattern={"fc1": 1}), 21),
    ],
)
def test_choosing_layers(policy, config, layers):
    add_lora(policy, config)
    assert len(adapted(policy.policy)) == layers
    assert all(name.startswith(VLM_PREFIX) for name in adapted(policy.policy))
    assert len(policy.policy.peft_config["default"].target_modules) == layers
    if config.rank_pattern:
        fc1 = policy.policy.get_submodule(f"{VLM_PREFIX}{VISION}0.mlp.fc1")
        assert (fc1.r["default"], fc1.scaling["default"]) == (2, 0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(), "IA3Config; only peft.LoraConfig"),
        (LoraConfig(lora_dropout=0.1), "lora_dropout=0.1"),
        (LoraConfig(lora_alpha=0), "lora_alpha=0 must be positive"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(init_lora_weights=False), "init_lora_weights=False"),
        (LoraConfig(modules_to_save=["action_out_proj"]), "modules_to_save"),
        (LoraConfig(bias="all"), "bias='all'"),
        (LoraConfig(lora_bias=True), "lora_bias=True"),
        (LoraConfig(use_dora=True), "use_dora=True"),
        (LoraConfig(target_parameters=["weight"]), "target_parameters"),
        (LoraConfig(layer_replication=[(0, 1)]), "layer_replication"),
        (LoraConfig(target_modules=["query"]), "entry 'query' adapts no layer.*q_proj"),
        (LoraConfig(target_modules=["q_proj", "lm_head"]), "entry 'lm_head'"),
        (LoraConfig(target_modules=["q_proj", "action_out_proj"]), "entry 'action_out_proj'.*trained whole"),
        (LoraConfig(target_modules=["layers.1.mlp.up_proj"]), "up_proj' adapts no layer"),
        (LoraConfig(target_modules=[]), "adapts no layer"),
        (LoraConfig(target_modules=r".*nothing.*"), "adapts no layer"),
        (LoraConfig(target_modules=r".*\.q_proj"), "2 layers outside the VLM.*gemma_expert"),
        (LoraConfig(target_modules=["embed_tokens"]), "embed_tokens' adapts no layer"),
    ],
)
def test_configurations_are_refused(policy, config, message):
    before = policy.policy.state_dict()
    with pytest.raises(ValueError, match=message):
        add_lora(policy, config)
    assert not has_lora(policy)
    assert not policy.prefix_is_live
    assert set(policy.policy.state_dict()) == set(before)


def test_policies_without_a_vlm_and_second_adapters_are_refused(adapted_policy):
    with pytest.raises(ValueError, match="has LoRA adapters already"):
        add_lora(adapted_policy, vlm_lora_config())
    for other in (nn.Linear(1, 1), object.__new__(MlpFlowPolicy)):
        nn.Module.__init__(other) if isinstance(other, MlpFlowPolicy) else None
        with pytest.raises(ValueError, match="no VLM to adapt"):
            add_lora(other, vlm_lora_config())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}])
def test_ranks_are_positive(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        vlm_lora_config(**wrong)


def test_the_papers_configuration():
    config = vlm_lora_config()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (32, 32, 0.0, "none")


def test_stored_names_are_pefts(adapted_policy, tmp_path):
    save_adapter(tmp_path, adapted_policy.policy)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert names == {
        f"base_model.model.{layer}.{factor}.weight"
        for layer in adapted(adapted_policy.policy)
        for factor in ("lora_A", "lora_B")
    }
