"""The small policies are LeRobot policies: factories, training loss, determinism, tokenizer."""

import json

import pytest
import torch
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from transformers import AutoTokenizer

from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.small.tokenizer import train_tokenizer


def test_the_factory_finds_the_types(loaded):
    config = loaded.policy.config
    policy_class = get_policy_class(config.type)
    assert isinstance(loaded.policy, policy_class)
    assert issubclass(policy_class, PI0Policy | PI05Policy)
    assert config.type in ("pi0_small", "pi05_small")
    preprocessor, _ = make_pre_post_processors(config)
    assert [type(step) for step in preprocessor.steps] == [type(step) for step in loaded.preprocessor.steps]


def test_step_order_is_lerobots(loaded):
    names = [
        step["registry_name"] for step in json.loads((loaded.path / "policy_preprocessor.json").read_text())["steps"]
    ]
    first = ["rename_observations_processor", "to_batch_processor"]
    relative, device, normalise = "relative_actions_processor", "device_processor", "normalizer_processor"
    if loaded.policy.config.type == "pi0_small":
        expected = [*first, "pi0_new_line_processor", "tokenizer_processor", device, relative, normalise]
    else:
        prompt = "pi05_prepare_state_tokenizer_processor_step"
        expected = [*first, relative, normalise, prompt, "tokenizer_processor", device]
    assert names == expected


def test_the_imitation_loss_trains(loaded, toolbox):
    policy = loaded.policy
    raw = toolbox.observations(8)
    raw["action"] = torch.rand(8, toolbox.horizon, toolbox.action_dim) * 2 - 1
    batch = loaded.preprocessor(raw)
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        torch.manual_seed(0)
        loss, _ = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    without = {name for name, p in policy.named_parameters() if p.grad is None}
    assert all("lm_head" in name or "vlm" in name or "language_model" in name for name in without), without


def test_untrained_velocities_have_a_sensible_scale(loaded, toolbox):
    batch = loaded.preprocessor(toolbox.observations(8))
    chunk = loaded.policy.predict_action_chunk(batch)
    assert chunk.shape == (8, toolbox.horizon, toolbox.action_dim)
    assert 0.1 < chunk.std() < 10


def test_the_seed_decides(toolbox, folders, tmp_path):
    state = torch.get_rng_state()
    again = toolbox.write_policy("pi05", tmp_path / "again", seed=0)
    other = toolbox.write_policy("pi05", tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [folder / "model.safetensors" for folder in (folders["pi05"], again, other)]
    first, second, third = (path.read_bytes() for path in weights)
    assert first == second
    assert first != third


def test_no_prompt_is_cut(loaded, toolbox):
    raw = toolbox.observations(4)
    raw["observation.state"] = torch.tensor([-3.0, -1.0, 0.37, 3.0])[:, None].expand(4, toolbox.state_dim).clone()
    batch = loaded.preprocessor(raw)
    mask = batch["observation.language.attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(loaded.path)
    for tokens, valid, task in zip(batch["observation.language.tokens"], mask, toolbox.instructions * 2, strict=True):
        text = tokenizer.decode(tokens[valid], skip_special_tokens=True)
        assert task in text
        assert text.endswith("\n" if loaded.policy.config.type == "pi0_small" else ";\nAction: ")
    assert batch["observation.language.tokens"].max() < loaded.policy.config.vocab_size


def test_instructions_matter(loaded, toolbox):
    raw = toolbox.observations(2)
    raw = {key: value[:1].expand(2, *value.shape[1:]).clone() for key, value in raw.items() if key != "task"}
    batch = loaded.preprocessor({**raw, "task": list(toolbox.instructions)})
    config = loaded.policy.config
    noise = torch.zeros(2, config.chunk_size, config.max_action_dim)
    first, second = loaded.policy.predict_action_chunk(batch, noise=noise)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 4}, "num_heads=4"),
        ({"image_size": 40}, "multiple of patch_size=16"),
        ({"vision_heads": 5}, "vision_width=64 must be a multiple of 5"),
        ({"mlp_dim": 0}, "mlp_dim=0 must be positive"),
        ({"vocab_size": 100}, "vocab_size=100 is too small"),
        ({"n_action_steps": 9}, "n_action_steps"),
        ({"compile_model": True}, "compile_model"),
        ({"cameras": ()}, "at least one camera"),
    ],
)
def test_impossible_sizes_are_refused(toolbox, tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        toolbox.write_policy("pi0", tmp_path / "p", **sizes)
    assert not (tmp_path / "p").exists()


def test_unknown_kind_is_refused(toolbox, tmp_path):
    with pytest.raises(ValueError, match="pi05"):
        toolbox.write_policy("pi1", tmp_path / "p")


def test_sizes_are_honoured(toolbox, tmp_path):
    loaded = load_policy(toolbox.write_policy("pi0", tmp_path / "p", vlm_width=32, expert_width=48, depth=1))
    backbone = loaded.policy.model.paligemma_with_expert
    assert backbone.paligemma.model.language_model.config.hidden_size == 32
    assert backbone.gemma_expert.model.config.hidden_size == 48
    assert len(backbone.gemma_expert.model.layers) == 1


def test_a_tokenizer_is_required_and_must_fit(loaded):
    config = make_policy_config(
        loaded.policy.config.type,
        device="cpu",
        input_features=loaded.policy.config.input_features,
        output_features=loaded.policy.config.output_features,
    )
    with pytest.raises(ValueError, match="tokenizer_name is empty"):
        make_pre_post_processors(config)
    config.tokenizer_name, config.vocab_size = str(loaded.path), 10
    with pytest.raises(ValueError, match="raise vocab_size"):
        make_pre_post_processors(config)


def test_tokenizer_knows_every_byte():
    tokenizer = train_tokenizer(["open the drawer"], 300)
    text = "größer 😀 ∂x\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.pad_token_id == 0
