"""The small flow policy without a VLM: closed forms, a float64 reference, LeRobot's factories, exact ratios."""

import copy
import math

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_pre_post_processors

from pi_rl.flow.chain import sample_chain, score_chain
from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.flow.sampler import FlowSampler
from pi_rl.policies.checkpoints import load_policy, load_policy_weights, save_policy
from pi_rl.policies.mlp.configuration_flow_mlp import FlowMLPConfig
from pi_rl.policies.mlp.create import action_bounds, create_mlp_policy
from pi_rl.policies.mlp.flow_policy import MlpFlowPolicy
from pi_rl.policies.prefix_cache import PrefixStore

STATE, ACTION, HORIZON, EXECUTED, STEPS, STD = 5, 3, 4, 2, 4, 0.3
STATS = {
    **action_bounds((-2.0, -1.0, 0.0), (2.0, 1.0, 4.0)),
    "observation.state": {"mean": torch.arange(5.0), "std": torch.full((5,), 2.0)},
}


def write(folder, **fields):
    defaults = {
        "state_dim": STATE,
        "action_dim": ACTION,
        "chunk_size": HORIZON,
        "n_action_steps": EXECUTED,
        "denoising_steps": STEPS,
        "hidden": (16, 24),
        "seed": 0,
        "initial_std": STD,
        "feature_dim": 8,
    }
    return create_mlp_policy(output_dir=folder, **{**defaults, **fields})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return load_policy(write(tmp_path_factory.mktemp("policies") / "mlp", dataset_stats=STATS))


@pytest.fixture
def loaded(original):
    return copy.deepcopy(original)


@pytest.fixture
def trained(loaded):
    """With an output layer that does something, as after training."""
    torch.nn.init.normal_(loaded.policy.model.action_out.weight, std=0.5)
    torch.nn.init.normal_(loaded.policy.model.action_out.bias, std=0.5)
    return loaded


def prefix_of(policy, samples=6):
    return policy.encode_prefix({"observation.state": torch.randn(samples, STATE)})


def slope(t, std=STD):
    return (t - (1 - t) * std**2) / (t**2 + (1 - t) ** 2 * std**2)


def test_an_untrained_flow_is_that_of_a_gaussian(loaded):
    """Euler's steps exactly, and N(0, initial_std²) in the limit of many."""
    policy = loaded.policy
    batch = {"observation.state": torch.randn(7, STATE)}
    noise = torch.randn(7, HORIZON, ACTION)
    contraction = math.prod(1 - slope((STEPS - i) / STEPS) / STEPS for i in range(STEPS))
    torch.testing.assert_close(policy.predict_action_chunk(batch, noise=noise), noise * contraction)
    many = policy.predict_action_chunk(batch, noise=noise, num_steps=1000)
    torch.testing.assert_close(many, STD * noise, rtol=5e-3, atol=0)


def test_a_constant_offset_moves_the_gaussian(loaded):
    offset = torch.tensor([0.5, -0.7, 0.2])
    batch, noise = {"observation.state": torch.randn(7, STATE)}, torch.randn(7, HORIZON, ACTION)
    before = loaded.policy.predict_action_chunk(batch, noise=noise)
    loaded.policy.model.action_out.bias.data[:] = offset
    torch.testing.assert_close(loaded.policy.predict_action_chunk(batch, noise=noise), before + offset)


def test_the_velocity_against_a_float64_reference(trained):
    """Written from the docstring's equation with numpy; also checks that nothing is lost in float32."""
    model, policy = trained.policy.model, MlpFlowPolicy(trained.policy)
    prefix, x, t = prefix_of(policy), torch.randn(6, HORIZON, ACTION), torch.rand(6) * 0.95 + 0.05
    velocity, features = policy.velocity(prefix, x, t)
    layers = [layer for layer in (*model.tokens, model.action_out) if isinstance(layer, torch.nn.Linear)]
    weights = [(layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in layers]
    times = t.double().numpy()
    angles = times[:, None] * math.pi * 2.0 ** np.arange(4)
    hidden = np.concatenate([prefix.pooled.double(), x.flatten(1).double(), np.sin(angles), np.cos(angles)], axis=1)
    for weight, bias in weights[:-1]:
        hidden = hidden @ weight.T + bias
        hidden = hidden / (1 + np.exp(-hidden))
    tokens = hidden.reshape(6, HORIZON, 8)
    offset = tokens @ weights[-1][0].T + weights[-1][1]
    s = times[:, None, None]
    expected = slope(s) * (x.double().numpy() - (1 - s) * offset) - offset
    np.testing.assert_allclose(features.detach(), tokens, atol=1e-5)
    np.testing.assert_allclose(velocity.detach(), expected, atol=1e-5)
    trained.policy.double()
    np.testing.assert_allclose(trained.policy.model(prefix.pooled.double(), x.double(), t.double())[0].detach(),
                               expected, atol=1e-12)  # fmt: skip


SAMPLERS = [
    FlowSampler("flow_sde", "hybrid", STEPS, 0.5),
    FlowSampler("flow_sde", "two_layer", STEPS, 0.5),
    FlowSampler("flow_sde", "one_layer", STEPS, 0.5, noise_scope="all", joint_reduction="mean"),
    FlowSampler("flow_noise", "one_layer", STEPS, None, likelihood_level="action"),
    FlowSampler("flow_cps", "hybrid", STEPS, 0.5, likelihood_level="element"),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: f"{sampler.noise}-{sampler.mdp}")
def test_sampling_and_scoring_agree_to_the_bit(trained, sampler):
    """Through the prefix store, rows in another order: the probability ratio is exactly 1."""
    policy = MlpFlowPolicy(trained.policy)
    network = NoiseNetwork(policy.feature_dim, policy.max_action_dim, 0.1, 0.4) if "noise" in sampler.noise else None
    store = PrefixStore(capacity=2)
    prefix = prefix_of(policy)
    store.append(prefix)
    assert store.nbytes >= prefix.pooled.nbytes
    scored = policy.scored_mask()
    assert scored.sum() == EXECUTED * ACTION
    shape = (HORIZON, ACTION)
    with torch.no_grad():
        chain, log_prob = sample_chain(
            lambda x, t: policy.velocity(prefix, x, t),
            torch.randn(6, *shape),
            torch.randn(6, STEPS, *shape),
            sampler,
            scored,
            step_index=sampler.draw_step_index(torch.rand(6)),
            std_fn=network,
        )
    order = torch.tensor([3, 0, 5, 5, 1, 2])
    for transition, step in enumerate(sampler.stochastic_steps if sampler.mdp == "two_layer" else [None]):
        rows = copy.copy(chain)
        rows.x = chain.x[order]
        if chain.step_index is not None:
            rows.step_index = chain.step_index[order]
        elif step is not None:
            rows.step_index = torch.full((6,), step)
        gathered = store[order]
        score = score_chain(lambda x, t, p=gathered: policy.velocity(p, x, t), rows, sampler, scored, std_fn=network)
        assert torch.equal(score.log_prob, log_prob[order, transition])
    score.log_prob.sum().backward()
    assert trained.policy.model.action_out.weight.grad.abs().max() > 0


def test_the_factory_finds_the_type_and_the_folder_holds_everything(loaded, tmp_path):
    config = loaded.policy.config
    assert config.type == "flow_mlp"
    assert type(loaded.policy) is get_policy_class("flow_mlp")
    assert config.hidden_sizes == (16, 24)
    preprocessor, _ = make_pre_post_processors(config)
    assert [type(step) for step in preprocessor.steps] == [type(step) for step in loaded.preprocessor.steps]
    folder = save_policy(tmp_path / "again", loaded.policy, loaded.preprocessor, loaded.postprocessor)
    again = load_policy(folder, n_action_steps=1, denoising_steps=7)
    assert (again.policy.config.n_action_steps, again.policy.config.num_inference_steps) == (1, 7)
    theirs = get_policy_class("flow_mlp").from_pretrained(folder)
    for name, tensor in loaded.policy.state_dict().items():
        assert torch.equal(tensor, again.policy.state_dict()[name])
        assert torch.equal(tensor, theirs.state_dict()[name])
    load_policy_weights(again.policy, folder)


def test_statistics_normalise_the_state_and_fill_the_action_bounds(loaded):
    batch = loaded.preprocessor({"observation.state": torch.arange(5.0)[None] + 2.0, "task": ["x"]})
    torch.testing.assert_close(batch["observation.state"], torch.ones(1, 5))
    chunk = torch.tensor([[[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]]])
    torch.testing.assert_close(
        loaded.postprocessor(chunk), torch.tensor([[[-2.0, -1.0, 0.0], [2.0, 1.0, 4.0]]]), atol=1e-5, rtol=0
    )


def test_the_prefix_is_the_state(loaded):
    policy = MlpFlowPolicy(loaded.policy)
    state = torch.randn(6, STATE)
    prefix = policy.encode_prefix({"observation.state": state})
    assert len(prefix) == 6
    assert torch.equal(prefix.pooled, state)
    assert (policy.pooled_dim, policy.prefix_state_dim, policy.state_dim, policy.cameras) == (STATE, 0, STATE, ())
    assert (policy.action_dim, policy.max_action_dim, policy.feature_dim) == (ACTION, ACTION, 8)
    assert torch.equal(prefix.index(torch.tensor([4, 1])).pooled, state[[4, 1]])
    policy.requires_grad_(False)
    policy.freeze_vlm()
    assert len(policy.trainable_parameters()) == len(list(policy.parameters()))
    for wrong in ({}, {"observation.state": torch.zeros(6, STATE + 1)}):
        with pytest.raises(ValueError, match=rf"must have shape \(B, {STATE}\)"):
            policy.encode_prefix(wrong)


def test_the_imitation_loss_learns_two_modes(tmp_path):
    """Actions of ±0.8: a policy that averaged them would say 0."""
    policy = load_policy(write(tmp_path / "p", state_dim=1, action_dim=1, chunk_size=1, n_action_steps=1)).policy
    policy.train()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(400):
        actions = 0.8 * torch.randint(0, 2, (128, 1, 1)).float().mul(2).sub(1)
        batch = {"observation.state": torch.zeros(128, 1), "action": actions}
        loss, logged = policy.forward(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logged["loss"] == pytest.approx(loss.item())
    chunk = policy.predict_action_chunk({"observation.state": torch.zeros(500, 1)}, num_steps=20)
    assert ((chunk.abs() - 0.8).abs() < 0.25).float().mean() > 0.8
    assert abs(chunk.sign().mean()) < 0.3


def test_padding_does_not_enter_the_loss(trained):
    batch = {"observation.state": torch.randn(4, STATE), "action": torch.randn(4, HORIZON, ACTION)}
    padding = torch.zeros(4, HORIZON, dtype=torch.bool)
    padding[:, 2:] = True

    def losses(**changes):
        torch.manual_seed(0)
        return trained.policy.forward({**batch, **changes}, reduction="none")[0]

    whole = losses()
    assert whole.shape == (4,)
    assert torch.equal(losses(action_is_pad=torch.zeros_like(padding)), whole)
    far = batch["action"].clone()
    far[padding] = 100.0
    part = losses(action_is_pad=padding)
    assert not torch.equal(part, whole)
    # what is padding still reaches the network's input, as in LeRobot's policies, but has no error of its own
    assert losses(action_is_pad=padding, action=far).max() < losses(action=far).min() / 10


def test_select_action_plays_a_chunk_and_then_asks_again(loaded):
    policy, batch = loaded.policy, {"observation.state": torch.randn(3, STATE)}
    noise = torch.randn(3, HORIZON, ACTION)
    chunk = policy.predict_action_chunk(batch, noise=noise)
    for _ in range(2):
        for step in range(EXECUTED):
            assert torch.equal(policy.select_action(batch, noise=noise), chunk[:, step])
    policy.select_action(batch, noise=noise)
    policy.reset()
    assert torch.equal(policy.select_action(batch, noise=noise), chunk[:, 0])


def test_the_seed_decides_and_the_global_generator_is_left_alone(tmp_path):
    state = torch.get_rng_state()
    first, again, other = (write(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_action_steps": 5}, "n_action_steps=5 is outside 1 … chunk_size=4"),
        ({"denoising_steps": 0}, "num_inference_steps=0"),
        ({"hidden": ()}, "at least one width"),
        ({"hidden": (8, 0)}, "all positive"),
        ({"initial_std": 0.0}, "initial_std=0.0 must be above 0"),
        ({"feature_dim": 0}, "feature_dim=0"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "p", **fields)
    assert not (tmp_path / "p").exists()


def test_features_must_be_one_state_and_one_action(loaded):
    policy_class, features = get_policy_class("flow_mlp"), FlowMLPConfig.vector_features(2, 1)
    with pytest.raises(ValueError, match="'observation.state'; it is missing"):
        policy_class(FlowMLPConfig(device="cpu", output_features=features["output_features"]))
    features["input_features"]["observation.image"] = PolicyFeature(type=FeatureType.VISUAL, shape=(3, 8, 8))
    with pytest.raises(ValueError, match=r"sees no images.*observation.image"):
        policy_class(FlowMLPConfig(device="cpu", **features))
    with pytest.raises(ValueError, match="wraps a FlowMLPPolicy, got Linear"):
        MlpFlowPolicy(torch.nn.Linear(1, 1))
