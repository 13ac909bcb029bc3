"""The policy gradient on a one-step bandit whose true gradient is known, for every noise, MDP and likelihood option.

The velocity is linear in its shared parameters and affine in the state, so that a chain is Gaussian, and the reward is
quadratic in the executed elements: expected reward and gradient follow from the moments, in float64 and without the
package. To tell apart what a score-function estimate can see, the parameters are copied per denoising step and for
scored and unscored elements: `total` differentiates with respect to all copies, `policy` to those of the scored
elements in stochastic steps. The rest is environment to the estimate: ODE steps, a last step without noise, and what
the unscored elements do, whether noise enters them or not.
"""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pi_rl.flow.chain import Chain, VelocityFn, sample_chain, score_chain
from pi_rl.flow.likelihood import LIKELIHOOD_LEVELS
from pi_rl.flow.sampler import MDPS, FlowSampler
from pi_rl.rl.losses import clipped_surrogate

H, D, K, P = 3, 2, 3, 4
LEVELS = {"flow_sde": 0.5, "flow_noise": None, "flow_cps": 0.5}
PART = torch.tensor([[True, True], [True, False], [False, False]])
EVERYTHING = torch.ones(H, D, dtype=torch.bool)
EXECUTED = PART.flatten()
PAIRS = 50_000

_generator = torch.Generator().manual_seed(4)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64)


# strong mixing, so that what unscored elements do matters to the executed ones
MIX, OFFSET = 2 * _normal(P, H * D, H * D) / math.sqrt(H * D), _normal(P, 2, H * D)
# P parameters of the velocity, then log-std of learned noise: constant and slope in t
THETA = torch.cat([0.5 * _normal(P), torch.tensor([-2.0, 0.8], dtype=torch.float64)])
GOAL = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
SLOPE = torch.tensor([1.0, 0.5, -0.7], dtype=torch.float64)


def sampler_of(noise: str, mdp: str, **options) -> FlowSampler:
    return FlowSampler(noise, mdp, K, LEVELS[noise], **options)


def affine_step(sampler: FlowSampler, theta: Tensor, k: int, noisy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix, offset and std of one step, x <- matrix x + offset + std eps, from the equations."""
    t, s, delta = 1 - k / K, 1 - (k + 1) / K, 1 / K
    x_part, u_part, std = 1.0, -delta, torch.zeros((), dtype=torch.float64)
    if noisy and sampler.noise == "flow_noise":
        std = (theta[P] + theta[P + 1] * t).exp()
    elif noisy and sampler.noise == "flow_sde":
        sigma = LEVELS["flow_sde"] * math.sqrt(t / ((1 - s) if k == 0 else (1 - t)))
        pull = delta * sigma**2 / (2 * t)
        x_part, u_part, std = 1 - pull, -delta - pull * (1 - t), std + sigma * math.sqrt(delta)
    elif noisy:
        angle = math.pi * LEVELS["flow_cps"] / 2
        kept = s * math.cos(angle)
        x_part, u_part, std = 1 - s + kept, -(1 - s) * t + kept * (1 - t), std + s * math.sin(angle)
    matrix = torch.einsum("p,pij->ij", theta[:P], MIX)
    offset = torch.einsum("p,pi->i", theta[:P], OFFSET[:, 0] + t * OFFSET[:, 1])
    return x_part * torch.eye(H * D, dtype=torch.float64) + u_part * matrix, u_part * offset, std.expand(H * D)


def expected_reward(copies: Tensor, sampler: FlowSampler, scored: Tensor, only: int | None) -> Tensor:
    """Of parameters (K, 2, P + 2), per step and for scored and unscored elements; ``only`` one step is stochastic."""
    mean, covariance = torch.zeros(H * D, dtype=torch.float64), torch.eye(H * D, dtype=torch.float64)
    rows = scored.flatten()
    for k in range(K):
        stochastic = k in sampler.stochastic_steps and only in (None, k)
        inside = affine_step(sampler, copies[k, 0], k, stochastic)
        outside = affine_step(sampler, copies[k, 1], k, stochastic and sampler.noise_scope == "all")
        matrix = torch.where(rows[:, None], inside[0], outside[0])
        offset, std = (torch.where(rows, a, b) for a, b in zip(inside[1:], outside[1:], strict=True))
        mean, covariance = matrix @ mean + offset, matrix @ covariance @ matrix.T + torch.diag(std**2)
    action, variance = mean[EXECUTED], covariance.diagonal()[EXECUTED]
    return (SLOPE * action).sum() - 0.5 * ((action - GOAL).square() + variance).sum()


@dataclass
class Known:
    """Of the sampler's own expected reward. ``by_step`` holds, for hybrid, the policy's part at each step."""

    reward: float
    total: Tensor
    policy: Tensor
    by_step: Tensor


def known(sampler: FlowSampler, scored: Tensor) -> Known:
    draws = list(sampler.stochastic_steps) if sampler.mdp == "hybrid" else [None]
    rewards, totals, policies = [], [], []
    for only in draws:
        copies = THETA.expand(K, 2, -1).clone().requires_grad_()
        reward = expected_reward(copies, sampler, scored, only)
        (gradient,) = torch.autograd.grad(reward, copies)
        rewards.append(reward.item())
        totals.append(gradient.sum((0, 1)))
        policies.append(gradient[list(sampler.stochastic_steps) if only is None else [only], 0].sum(0))
    by_step = torch.stack(policies)
    return Known(sum(rewards) / len(draws), torch.stack(totals).mean(0), by_step.mean(0), by_step)


def velocity_of(theta: Tensor) -> VelocityFn:
    """Velocity with a copy of the parameters for every sample, (B, P + 2); its features are the learned std."""
    mix, offset = MIX.float(), OFFSET.float()

    def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        time = t[:, None]
        basis = torch.einsum("pij,bj->bpi", mix, x.flatten(1)) + offset[:, 0] + time[:, :, None] * offset[:, 1]
        u = torch.einsum("bp,bpi->bi", theta[:, :P], basis).view_as(x)
        return u, (theta[:, P : P + 1] + theta[:, P + 1 :] * time).exp()[:, :, None].expand_as(x)

    return velocity


@dataclass
class Estimate:
    """Gradients (B, P + 2) that the clipped surrogate gives for each chain, summed over its samples, and rewards."""

    gradients: Tensor
    rewards: Tensor


def estimate(
    sampler: FlowSampler, scored: Tensor, pairs: int, baseline: float = 0.0, shared: float | None = None
) -> Estimate:
    """Through the package: sample, score, and differentiate the loss at ratio 1. Noise comes in pairs eps, -eps."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * pairs
    x = torch.randn(pairs, H, D, generator=generator).repeat(2, 1, 1)
    eps = torch.randn(pairs, K, H, D, generator=generator)
    uniform = torch.rand(pairs, generator=generator) if shared is None else torch.full((pairs,), shared)
    index = sampler.draw_step_index(uniform.repeat(2))
    std_fn = (lambda features: features) if sampler.noise == "flow_noise" else None
    theta = THETA.float().expand(size, -1).clone().requires_grad_()
    with torch.no_grad():
        noise = torch.cat([eps, -eps])
        chain, old = sample_chain(velocity_of(theta), x, noise, sampler, scored, step_index=index, std_fn=std_fn)
        action = chain.x[:, -1].flatten(1)[:, EXECUTED].double()
        rewards = (SLOPE * action).sum(1) - 0.5 * (action - GOAL).square().sum(1)
    samples = sampler.transitions
    if sampler.mdp == "two_layer":
        steps = torch.tensor(sampler.stochastic_steps).repeat(size)
        chain = Chain(chain.x.repeat_interleave(samples, 0), steps)
    score = score_chain(velocity_of(theta.repeat_interleave(samples, 0)), chain, sampler, scored, std_fn=std_fn)
    advantages = (rewards - baseline).float().repeat_interleave(samples)
    loss, _ = clipped_surrogate(score.log_prob, old.flatten(0, 1), advantages, 0.2)
    (gradients,) = torch.autograd.grad(loss, theta)
    # the loss is a mean over samples, and to be minimised
    return Estimate(-gradients.double() * size * samples, rewards)


def agrees(got: Estimate, truth: Tensor, precision: float) -> bool:
    """Within 4.5 standard errors in every component; those errors must lie below a share of the gradient."""
    pairs = got.gradients.view(2, -1, P + 2).mean(0)
    error = pairs.std(0) / math.sqrt(len(pairs))
    assert error.norm() < precision * truth.norm()
    return bool(((pairs.mean(0) - truth).abs() <= 4.5 * error + 1e-6).all())


def deviation(gradient: Tensor, truth: Tensor) -> float:
    return ((gradient - truth).norm() / truth.norm()).item()


def coverage(sampler: FlowSampler, scored: Tensor) -> tuple[float, float]:
    """How far the expected estimate lies from the gradient of the sampler's own expected reward: error and cosine.

    A hybrid chain scores one step of those it could draw, so that its estimate is multiplied by their number.
    """
    truth = known(sampler, scored)
    scale = len(sampler.stochastic_steps) if sampler.mdp == "hybrid" else 1
    cosine = torch.cosine_similarity(truth.policy, truth.total, dim=0).item()
    return deviation(scale * truth.policy, truth.total), cosine


@pytest.mark.parametrize("scope", ["scored", "all", "everything scored"])
@pytest.mark.parametrize("mdp", ["one_layer", "hybrid"])
@pytest.mark.parametrize("noise", LEVELS)
def test_the_estimate_is_the_gradient_of_what_is_scored(noise: str, mdp: str, scope: str) -> None:
    """The Monte-Carlo mean lies within its interval around the known gradient; `two_layer` follows below."""
    whole = scope == "everything scored"
    sampler = sampler_of(noise, mdp, noise_scope="all" if whole else scope)
    scored = EVERYTHING if whole else PART
    truth = known(sampler, scored)
    got = estimate(sampler, scored, PAIRS, baseline=truth.reward)
    error = got.rewards.std().item() / math.sqrt(PAIRS)
    assert got.rewards.mean().item() == pytest.approx(truth.reward, abs=5 * error)
    assert agrees(got, truth.policy, 0.045)
    complete = whole and mdp == "one_layer" and noise != "flow_cps"
    if complete or not whole:  # with every element scored, what hybrid leaves out is too little to see here
        scale = len(sampler.stochastic_steps) if mdp == "hybrid" else 1
        assert agrees(got, truth.total / scale, 0.045) == complete


@pytest.mark.parametrize("noise", LEVELS)
def test_two_layers_add_up_to_the_gradient_of_one_layer(noise: str) -> None:
    """With equal advantages, chain by chain; as a mean over samples, the two-layer loss is S times smaller."""
    for scope, level in itertools.product(("scored", "all"), LIKELIHOOD_LEVELS):
        one, two = (
            estimate(sampler_of(noise, mdp, noise_scope=scope, likelihood_level=level), PART, 200).gradients
            for mdp in ("one_layer", "two_layer")
        )
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("noise", "mdp"), list(itertools.product(LEVELS, MDPS)))
def test_every_likelihood_level_has_the_same_gradient(noise: str, mdp: str) -> None:
    """At ratio 1, chain by chain: units share the advantage and add up."""
    for scope in ("scored", "all"):
        chunk, *others = (
            estimate(sampler_of(noise, mdp, noise_scope=scope, likelihood_level=level), PART, 200).gradients
            for level in LIKELIHOOD_LEVELS
        )
        for gradients in others:
            torch.testing.assert_close(gradients, chunk, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("noise", LEVELS)
def test_the_mean_over_the_joint_chain_divides_the_gradient(noise: str) -> None:
    """The published code's reduction: 1 / (K + 1) of the exact gradient, chain by chain, and so far outside of it."""
    exact, mean = (
        estimate(sampler_of(noise, "one_layer", joint_reduction=reduction), PART, 20_000)
        for reduction in ("sum", "mean")
    )
    torch.testing.assert_close((K + 1) * mean.gradients, exact.gradients, rtol=1e-4, atol=1e-3)
    truth = known(sampler_of(noise, "one_layer"), PART).policy
    assert deviation(mean.gradients.mean(0), truth) == pytest.approx(K / (K + 1), abs=0.05)


def test_the_mean_over_the_joint_chain_widens_the_clip_and_hides_the_divergence() -> None:
    """The reported ratio is the (K + 1)-th root of the exact one, and its KL about (K + 1)^2 times too small."""
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(4000, H, D, generator=generator), torch.randn(4000, K, H, D, generator=generator)
    old, new = (velocity_of((THETA * scale).float().expand(4000, -1)) for scale in (1.0, 1.01))
    ratios, divergences = [], []
    for reduction in ("sum", "mean"):
        sampler = sampler_of("flow_sde", "one_layer", joint_reduction=reduction)
        chain, log_prob = sample_chain(old, x, eps, sampler, PART)
        score = score_chain(new, chain, sampler, PART).log_prob
        ratios.append((score - log_prob[:, 0]).double().exp())
        divergences.append(clipped_surrogate(score, log_prob[:, 0], torch.ones(4000), 0.2)[1]["approx_kl"].item())
    torch.testing.assert_close(ratios[1] ** (K + 1), ratios[0], rtol=1e-3, atol=1e-3)
    assert divergences[0] / divergences[1] == pytest.approx((K + 1) ** 2, rel=0.15)


def test_noise_drawn_and_scored_everywhere_leaves_nothing_out() -> None:
    for noise in ("flow_sde", "flow_noise"):
        for mdp in ("one_layer", "two_layer"):
            truth = known(sampler_of(noise, mdp), EVERYTHING)
            torch.testing.assert_close(truth.policy, truth.total, rtol=1e-12, atol=1e-12)


# error and cosine of `coverage` where half of the elements is scored: with noise in them alone, and in every element
LEFT_OUT = {
    ("flow_sde", "one_layer"): ((0.168, 0.991), (0.168, 0.992)),
    ("flow_sde", "hybrid"): ((0.123, 0.993), (0.120, 0.993)),
    ("flow_noise", "one_layer"): ((0.146, 0.994), (0.145, 0.994)),
    ("flow_noise", "hybrid"): ((0.156, 0.993), (0.158, 0.993)),
    ("flow_cps", "one_layer"): ((0.475, 0.958), (0.475, 0.959)),
    ("flow_cps", "hybrid"): ((0.451, 0.962), (0.448, 0.964)),
}


@pytest.mark.parametrize(("noise", "mdp"), LEFT_OUT)
def test_what_the_unscored_elements_contribute_is_left_out_in_either_scope(noise: str, mdp: str) -> None:
    """The scopes differ in the noise of the environment, and hardly in what the gradient misses."""
    for scope, expected in zip(("scored", "all"), LEFT_OUT[noise, mdp], strict=True):
        assert coverage(sampler_of(noise, mdp, noise_scope=scope), PART) == pytest.approx(expected, abs=1e-3)


# the same with every element scored: what the deterministic steps leave out, 1 / K or so for a last step without noise
DETERMINISTIC = {
    ("flow_sde", "hybrid", False): (0.065, 1.000),
    ("flow_noise", "hybrid", False): (0.039, 0.999),
    ("flow_cps", "hybrid", False): (0.312, 0.993),
    ("flow_cps", "one_layer", False): (0.335, 0.992),
    ("flow_sde", "one_layer", True): (0.344, 0.992),
}


@pytest.mark.parametrize(("noise", "mdp", "ignore_last"), DETERMINISTIC)
def test_what_deterministic_steps_contribute_is_left_out(noise: str, mdp: str, ignore_last: bool) -> None:
    got = coverage(sampler_of(noise, mdp, ignore_last=ignore_last), EVERYTHING)
    assert got == pytest.approx(DETERMINISTIC[noise, mdp, ignore_last], abs=1e-3)


def test_a_shared_draw_is_unbiased_but_does_not_average_out_within_a_batch() -> None:
    sampler = sampler_of("flow_sde", "hybrid", step_draw="batch")
    truth = known(sampler, PART)
    for k, expected in enumerate(truth.by_step):
        got = estimate(sampler, PART, 20_000, baseline=truth.reward, shared=(k + 0.5) / K)
        assert agrees(got, expected, 0.08)
    spread = truth.by_step.std(0, correction=0).norm() / truth.policy.norm()
    assert spread.item() == pytest.approx(0.315, abs=1e-3)
