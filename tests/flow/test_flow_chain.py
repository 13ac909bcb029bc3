import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from pi_rl.flow.chain import Chain, sample_chain, score_chain
from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.flow.sampler import MDPS, FlowSampler
from pi_rl.flow.transition import time_grid, transition

B, K, H, D, F = 24, 4, 5, 4, 8
SCORED = torch.zeros(H, D, dtype=torch.bool)
SCORED[:3, :2] = True

SAMPLERS = [
    FlowSampler("flow_sde", "hybrid", K, 0.5),
    FlowSampler("flow_sde", "hybrid", K, 0.5, ignore_last=True),
    FlowSampler("flow_sde", "one_layer", K, 0.5),
    FlowSampler("flow_sde", "one_layer", K, 0.5, ignore_last=True),
    FlowSampler("flow_noise", "one_layer", K, None),
    FlowSampler("flow_noise", "one_layer", K, None, joint_reduction="mean"),
    FlowSampler("flow_noise", "hybrid", K, None),
    FlowSampler("flow_cps", "hybrid", K, 0.5),
    FlowSampler("flow_cps", "one_layer", K, 0.5, joint_reduction="mean"),
    FlowSampler("flow_sde", "two_layer", K, 0.5),
    FlowSampler("flow_noise", "two_layer", K, None, ignore_last=True),
    FlowSampler("flow_cps", "two_layer", K, 0.5),
    FlowSampler("flow_sde", "two_layer", K, 0.5, likelihood_level="action"),
    FlowSampler("flow_noise", "one_layer", K, None, likelihood_level="action", joint_reduction="mean"),
    FlowSampler("flow_noise", "one_layer", K, None, likelihood_level="element"),
    FlowSampler("flow_cps", "hybrid", K, 0.5, likelihood_level="element"),
]
UNITS = {"chunk": 1, "action": 3, "element": 6}
SAMPLERS += [replace(sampler, noise_scope="all") for sampler in SAMPLERS]
IDS = [
    f"{s.noise}-{s.mdp}-{s.likelihood_level}-{s.noise_scope}-{s.joint_reduction}{'-skip' * s.ignore_last}"
    for s in SAMPLERS
]


class Velocity(nn.Module):
    """Couples all elements of the chunk, as attention does; counts its calls."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.mix = nn.Parameter(scale * torch.randn(H * D, H * D, generator=generator) / math.sqrt(H * D))
        self.features = nn.Parameter(torch.randn(D, F, generator=generator))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == t.dtype == torch.float32
        assert t.shape == x.shape[:1]
        self.calls += 1
        u = torch.tanh(x.flatten(1) @ self.mix).view_as(x) + t[:, None, None] * x
        return u, torch.tanh(u @ self.features)


class Setup:
    def __init__(self, sampler: FlowSampler, size: int = B) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sampler = sampler
        self.velocity = Velocity()
        torch.manual_seed(1)
        self.net = NoiseNetwork(F, D, 0.08, 0.16)
        nn.init.normal_(self.net.layers[-1].weight)  # type: ignore[arg-type]
        self.std_fn = self.net if sampler.noise == "flow_noise" else None
        self.x = torch.randn(size, H, D, generator=generator)
        self.eps = torch.randn(size, sampler.denoising_steps, H, D, generator=generator)
        self.index = sampler.draw_step_index(torch.rand(size, generator=generator))

    def sample(self, **changes) -> tuple[Chain, Tensor]:
        given = {"eps": self.eps, "step_index": self.index} | changes
        eps, index = given["eps"], given["step_index"]
        with torch.no_grad():
            return sample_chain(self.velocity, self.x, eps, self.sampler, SCORED, step_index=index, std_fn=self.std_fn)

    def samples(self, chain: Chain, log_prob: Tensor) -> tuple[Chain, Tensor]:
        """The chain's training samples, (B * S) chains and (B * S, U) log-probs: one per transition in two_layer."""
        if self.sampler.mdp == "two_layer":
            steps = torch.tensor(self.sampler.stochastic_steps)
            chain = Chain(chain.x.repeat_interleave(len(steps), 0), steps.repeat(len(chain.x)))
        return chain, log_prob.flatten(0, 1)

    def score(self, chain: Chain):
        return score_chain(self.velocity, chain, self.sampler, SCORED, std_fn=self.std_fn)


@pytest.fixture(params=SAMPLERS, ids=IDS)
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup(request.param)


def test_ratio_is_one_and_gradients_flow(setup: Setup) -> None:
    drawn, log_prob = setup.sample()
    units, transitions = UNITS[setup.sampler.likelihood_level], setup.sampler.transitions
    assert log_prob.shape == (B, transitions, units)
    chain, log_prob = setup.samples(drawn, log_prob)
    score = setup.score(chain)
    assert log_prob.dtype == score.log_prob.dtype == torch.float32
    assert score.entropy.shape == (B * transitions,)
    ratio = (score.log_prob - log_prob).exp()
    if setup.sampler.mdp == "two_layer":  # matrix products of another size round otherwise
        torch.testing.assert_close(ratio, torch.ones(B * transitions, units), rtol=0, atol=2e-4)
    else:
        assert torch.equal(ratio, torch.ones(B, units))
    ratio.sum().backward()
    assert setup.velocity.mix.grad is not None
    assert setup.velocity.mix.grad.abs().sum() > 0
    if setup.std_fn is not None:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in setup.net.parameters())


def test_rows_of_a_chain_score_alike(setup: Setup) -> None:
    chain, log_prob = setup.samples(*setup.sample())
    rows = torch.randperm(len(chain.x), generator=torch.Generator().manual_seed(5))[:7]
    part = Chain(chain.x[rows], None if chain.step_index is None else chain.step_index[rows])
    torch.testing.assert_close(setup.score(part).log_prob, log_prob[rows], rtol=1e-4, atol=1e-4)


def test_score_matches_torch_distributions_in_float64(setup: Setup) -> None:
    chain, _ = setup.samples(*setup.sample())
    size = len(chain.x)
    sampler, grid = setup.sampler, time_grid(K)
    total, entropy, std_sum = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    for k in sampler.stochastic_steps:
        x, t, t_next = chain.x[:, k], grid[k].expand(size), grid[k + 1].expand(size)
        u, features = setup.velocity(x, t)
        std = None if setup.std_fn is None else setup.net(features)
        got = transition(sampler.noise, x, u, t, t_next, noise_level=sampler.noise_level, learned_std=std)
        normal = Normal(got.mean.double(), got.std.double().expand(size, H, D))
        chosen = torch.ones(size) if chain.step_index is None else (chain.step_index == k)
        total += normal.log_prob(chain.x[:, k + 1].double())[:, SCORED].sum(1) * chosen
        entropy += normal.entropy()[:, SCORED].mean(1) * chosen
        std_sum += normal.stddev[:, SCORED].mean(1) * chosen
    count = 1 if chain.step_index is not None else len(sampler.stochastic_steps)
    if sampler.joint_reduction == "mean":
        total = (total + Normal(0.0, 1.0).log_prob(chain.x[:, 0].double())[:, SCORED].sum(1)) / (K + 1)
    score = setup.score(chain)
    torch.testing.assert_close(score.log_prob.double().sum(1), total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(score.entropy.double(), entropy / count, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score.std_mean.double(), (std_sum / count).mean(), rtol=1e-5, atol=1e-6)


def test_number_of_velocity_calls(setup: Setup) -> None:
    chain, _ = setup.samples(*setup.sample())
    assert setup.velocity.calls == K
    setup.velocity.calls = 0
    setup.score(chain)
    expected = len(setup.sampler.stochastic_steps) if setup.sampler.mdp == "one_layer" else 1
    assert setup.velocity.calls == expected


def test_states_follow_the_transition_and_the_ode(setup: Setup) -> None:
    """Rebuilds every step: noise where it belongs, the Euler step everywhere else, bit for bit."""
    chain, _ = setup.sample()
    sampler, grid = setup.sampler, time_grid(K)
    assert torch.equal(chain.x[:, 0], setup.x)
    for k in range(K):
        x, t, t_next = chain.x[:, k], grid[k].expand(B), grid[k + 1].expand(B)
        u, features = setup.velocity(x, t)
        ode = transition("ode", x, u, t, t_next).mean
        noisy = torch.zeros(B, H, D, dtype=torch.bool)
        if k in sampler.stochastic_steps:
            noisy |= SCORED if sampler.noise_scope == "scored" else torch.ones_like(SCORED)
            if chain.step_index is not None:
                noisy &= (chain.step_index == k)[:, None, None]
        std = None if setup.std_fn is None else setup.net(features)
        got = transition(sampler.noise, x, u, t, t_next, noise_level=sampler.noise_level, learned_std=std)
        expected = torch.where(noisy, got.mean + got.std * setup.eps[:, k], ode)
        assert torch.equal(chain.x[:, k + 1], expected)


@pytest.mark.parametrize("mdp", MDPS)
def test_unscored_elements_receive_no_noise(mdp: str) -> None:
    setup = Setup(FlowSampler("flow_sde", mdp, K, 0.5))
    chain, log_prob = setup.sample()
    louder = torch.where(SCORED, setup.eps, 100 * setup.eps + 7)
    other, other_log_prob = setup.sample(eps=louder)
    assert torch.equal(chain.x, other.x)
    assert torch.equal(log_prob, other_log_prob)
    setup.sampler = replace(setup.sampler, noise_scope="all")
    assert not torch.equal(setup.sample()[0].x, chain.x)


def test_ode_is_deterministic_euler() -> None:
    setup = Setup(FlowSampler.ode(K))
    chain, log_prob = setup.sample(eps=None)
    assert torch.equal(log_prob, torch.zeros(B, 1, 1))
    assert chain.step_index is None
    x = setup.x.double()
    mix = setup.velocity.mix.double()
    for k in range(K):
        x = x - (torch.tanh(x.flatten(1) @ mix).view_as(x) + (1 - k / K) * x) / K
    torch.testing.assert_close(chain.x[:, -1].double(), x, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has no log-prob"):
        setup.score(chain)


@pytest.mark.parametrize("noise", ["flow_sde", "flow_noise", "flow_cps"])
@pytest.mark.parametrize("mdp", MDPS)
def test_vanishing_noise_gives_the_ode_actions(noise: str, mdp: str) -> None:
    setup = Setup(FlowSampler(noise, mdp, K, None if noise == "flow_noise" else 1e-5))
    setup.std_fn = (lambda features: torch.full((B, H, D), 1e-5)) if noise == "flow_noise" else None
    ode = Setup(FlowSampler.ode(K)).sample()[0].x[:, -1]
    torch.testing.assert_close(setup.sample()[0].x[:, -1], ode, rtol=0, atol=2e-4)


@pytest.mark.parametrize("mdp", MDPS)
@pytest.mark.parametrize("noise", ["flow_sde", "flow_noise", "flow_cps"])
def test_importance_weights_average_one(noise: str, mdp: str) -> None:
    """E[p_new / p_old] under p_old is 1 only if both are normalised densities of what was drawn."""
    size = 8_000 if noise == "flow_noise" else 40_000
    setup = Setup(FlowSampler(noise, mdp, K, None if noise == "flow_noise" else 0.5), size)
    chain, log_prob = setup.samples(*setup.sample())
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        setup.velocity.mix += 0.01 * torch.randn(H * D, H * D, generator=generator)
        weights = (setup.score(chain).log_prob - log_prob).double().exp().unflatten(0, (size, -1)).mean(1)
    error = weights.std().item() / math.sqrt(size)
    assert weights.std() > 0.005
    assert weights.mean().item() == pytest.approx(1.0, abs=5 * error)


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (FlowSampler("flow_sde", "hybrid", 4, 0.5), 4),
        (FlowSampler("flow_sde", "hybrid", 4, 0.5, ignore_last=True), 3),
        (FlowSampler("flow_cps", "hybrid", 4, 0.5), 3),
        (FlowSampler("flow_cps", "hybrid", 4, 0.5, ignore_last=True), 3),
        (FlowSampler("flow_noise", "hybrid", 4, None), 4),
    ],
)
def test_step_index_is_uniform_over_the_allowed_steps(sampler: FlowSampler, steps: int) -> None:
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    index = sampler.draw_step_index(uniform)
    assert index is not None
    assert index.dtype == torch.int64
    counts = index.bincount(minlength=4).double() / len(index)
    expected = torch.tensor([1 / steps] * steps + [0.0] * (4 - steps), dtype=torch.float64)
    assert (counts - expected).abs().max() < 5 * math.sqrt(0.25 / len(index))
    assert not counts[steps:].any()
    edges = sampler.draw_step_index(torch.tensor([0.0, 1 - 2**-24]))
    assert edges is not None
    assert edges.tolist() == [0, steps - 1]


def test_only_hybrid_draws_a_step() -> None:
    uniform = torch.rand(3)
    assert FlowSampler("flow_sde", "one_layer", 4, 0.5).draw_step_index(uniform) is None
    assert FlowSampler("flow_sde", "two_layer", 4, 0.5).draw_step_index(uniform) is None
    assert FlowSampler.ode(4).draw_step_index(uniform) is None
    with pytest.raises(ValueError, match="one number per sample"):
        FlowSampler("flow_sde", "hybrid", 4, 0.5).draw_step_index(uniform[None])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ode", "hybrid", 4, None), {}, r"FlowSampler.ode\(4\)"),
        (("flow_sde", "none", 4, 0.5), {}, "`mdp='none'` is unknown"),
        (("flow_sde", "hybrid", 4, None), {}, "needs a `noise_level`"),
        (("flow_sde", "hybrid", 4, 0.0), {}, "no density"),
        (("flow_sde", "hybrid", 4, -0.5), {}, "outside"),
        (("flow_sde", "hybrid", 4, math.nan), {}, "outside"),
        (("flow_noise", "one_layer", 4, 0.5), {}, "has no effect"),
        (("flow_sde", "hybrid", 0, 0.5), {}, "denoising_steps=0"),
        (("flow_cps", "hybrid", 1, 0.5), {}, "no stochastic step"),
        (("flow_sde", "one_layer", 1, 0.5), {"ignore_last": True}, "no stochastic step"),
        (("flow_sde", "hybrid", 4, 0.5), {"joint_reduction": "mean"}, "scores one step"),
        (("flow_sde", "two_layer", 4, 0.5), {"joint_reduction": "mean"}, "only mdp 'one_layer' has"),
        (("flow_cps", "two_layer", 1, 0.5), {}, "use at least 2 denoising steps"),
        (("flow_sde", "one_layer", 4, 0.5), {"step_draw": "batch"}, "every step is stochastic"),
        (("flow_sde", "two_layer", 4, 0.5), {"step_draw": "batch"}, "only mdp 'hybrid' draws"),
        (("flow_sde", "hybrid", 4, 0.5), {"step_draw": "chunk"}, "`step_draw='chunk'` is unknown"),
        (("flow_sde", "hybrid", 4, 0.5), {"likelihood_level": "token"}, "choose one of chunk, action, element"),
        (("ode", "one_layer", 4, None), {}, "noise 'ode' is deterministic"),
        (("flow_sde", "one_layer", 4, 0.5), {"joint_reduction": "max"}, "`joint_reduction='max'` is unknown"),
        (("flow_sde", "one_layer", 4, 0.5), {"noise_scope": "none"}, "`noise_scope='none'` is unknown"),
        (("sde", "one_layer", 4, 0.5), {}, "unknown noise"),
    ],
)
def test_sampler_rejects(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowSampler(*arguments, **options)


def test_chain_functions_reject_what_does_not_fit() -> None:
    setup = Setup(SAMPLERS[0])
    chain, _ = setup.sample()
    with pytest.raises(ValueError, match="`eps` is missing"):
        setup.sample(eps=None)
    with pytest.raises(ValueError, match="must have shape"):
        setup.sample(eps=setup.eps[:, :2])
    with pytest.raises(ValueError, match="'hybrid' needs one"):
        setup.sample(step_index=None)
    with pytest.raises(ValueError, match="one per sample"):
        setup.sample(step_index=torch.zeros(3, dtype=torch.int64))
    for mdp in ("one_layer", "two_layer"):
        with pytest.raises(ValueError, match="'two_layer' needs one to score only"):
            Setup(FlowSampler("flow_sde", mdp, K, 0.5)).sample(step_index=setup.index)
    with pytest.raises(ValueError, match="missing for mdp 'two_layer'"):
        Setup(FlowSampler("flow_sde", "two_layer", K, 0.5)).score(Chain(chain.x, None))
    with pytest.raises(ValueError, match="must lie in 0..3"):
        setup.sample(step_index=torch.full((B,), 4))
    with pytest.raises(ValueError, match="`chain.x` has shape"):
        setup.score(Chain(chain.x[:, 1:], chain.step_index))
    with pytest.raises(ValueError, match="bool"):
        sample_chain(setup.velocity, setup.x, setup.eps, setup.sampler, SCORED.float(), step_index=setup.index)
    learned = Setup(FlowSampler("flow_noise", "one_layer", K, None))
    learned.std_fn = None
    with pytest.raises(ValueError, match="needs `std_fn`"):
        learned.sample()
