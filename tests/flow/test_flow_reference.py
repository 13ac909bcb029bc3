"""Every sampler against numpy in float64, written from the equations without a line of the package.

The reference denoises, scores and differentiates (central differences) on its own; sizes are tiny so that all noises,
MDPs, likelihood levels, scopes and reductions are covered.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pi_rl.flow.chain import Chain, ChainScore, sample_chain, score_chain
from pi_rl.flow.likelihood import LIKELIHOOD_LEVELS
from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.flow.sampler import JOINT_REDUCTIONS, MDPS, NOISE_SCOPES, FlowSampler

B, K, H, D, F, WIDTH = 3, 3, 3, 2, 2, 3
STD_MIN, STD_MAX = 0.08, 0.3
LEVELS = {"flow_sde": 0.5, "flow_noise": None, "flow_cps": 0.6}
SCORED = np.array([[True, True], [True, False], [False, False]])

OPTIONS = [
    options
    for options in itertools.product(LEVELS, MDPS, LIKELIHOOD_LEVELS, NOISE_SCOPES, JOINT_REDUCTIONS)
    if options[-1] == "sum" or options[1] == "one_layer"
]


class Reference:
    """The sampler in float64. Parameters come as one vector so that differences are easy to take."""

    shapes = {"mix": (H * D, H * D), "tilt": (H * D,), "read": (D, F), "in": (F, WIDTH), "out": (WIDTH, D)}

    def __init__(self, noise: str, mdp: str, level: str, scope: str, reduction: str) -> None:
        self.noise, self.mdp, self.level, self.scope, self.reduction = noise, mdp, level, scope, reduction
        self.stochastic = list(range(K - 1 if noise == "flow_cps" else K))
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.theta = np.random.default_rng(7).normal(0, 0.6, size=sum(sizes))

    def parameters(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1]
        parts = zip(self.shapes.items(), np.split(theta, ends), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in parts}

    def velocity(self, theta: np.ndarray, x: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        p = self.parameters(theta)
        u = (np.tanh(x.reshape(-1, H * D) @ p["mix"]) + t * p["tilt"]).reshape(x.shape) + t * x
        fraction = (1 + np.tanh(np.tanh(np.tanh(u @ p["read"]) @ p["in"]) @ p["out"])) / 2
        return u, np.exp(np.log(STD_MIN) + np.log(STD_MAX / STD_MIN) * fraction)

    def step(self, theta: np.ndarray, x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Euler step, and mean and std of the stochastic one, from t to s = t - delta."""
        t, s, delta = 1 - k / K, 1 - (k + 1) / K, 1 / K
        u, learned = self.velocity(theta, x, t)
        euler = x - delta * u
        if self.noise == "flow_noise":
            return euler, euler, learned
        a = LEVELS[self.noise]
        assert a is not None
        if self.noise == "flow_sde":
            sigma = a * math.sqrt(t / ((1 - s) if k == 0 else (1 - t)))
            mean = x - delta * (u + sigma**2 / (2 * t) * (x + (1 - t) * u))
            return euler, mean, np.full_like(x, sigma * math.sqrt(delta))
        action, noise = x - t * u, x + (1 - t) * u
        mean = (1 - s) * action + s * math.cos(math.pi * a / 2) * noise
        return euler, mean, np.full_like(x, s * math.sin(math.pi * a / 2))

    def noisy(self, k: int, index: np.ndarray | None) -> np.ndarray:
        """(B, H, D): which elements are drawn at step k."""
        mask = SCORED if self.scope == "scored" else np.ones_like(SCORED)
        rows = np.full(B, k in self.stochastic) if index is None else index == k
        return rows[:, None, None] & mask

    def sample(self, x: np.ndarray, eps: np.ndarray, index: np.ndarray | None) -> np.ndarray:
        states = [x]
        for k in range(K):
            euler, mean, std = self.step(self.theta, states[-1], k)
            states.append(np.where(self.noisy(k, index), mean + std * eps[:, k], euler))
        return np.stack(states, 1)

    def units(self, values: np.ndarray) -> np.ndarray:
        if self.level == "chunk":
            return (values * SCORED).sum((1, 2))[:, None]
        if self.level == "action":
            return np.stack([values[:, 0].sum(1), values[:, 1, 0]], 1)
        return np.stack([values[:, 0, 0], values[:, 0, 1], values[:, 1, 0]], 1)

    def score(self, theta: np.ndarray, chain: np.ndarray, index: np.ndarray | None):
        """Log-prob (B, U), entropy (B,) and std (B,) of the steps that count: those in ``index``, or all."""
        log_prob = 0.0
        entropy, spread = np.zeros(len(chain)), np.zeros(len(chain))
        for k in self.stochastic:
            _, mean, std = self.step(theta, chain[:, k], k)
            counts = np.ones(len(chain)) if index is None else (index == k).astype(float)
            density = np.exp(-((chain[:, k + 1] - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)
            log_prob = log_prob + self.units(np.log(density)) * counts[:, None]
            entropy += (0.5 * np.log(2 * np.pi * np.e * std**2) * SCORED).sum((1, 2)) / SCORED.sum() * counts
            spread += (std * SCORED).sum((1, 2)) / SCORED.sum() * counts
        if self.reduction == "mean":
            initial = np.log(np.exp(-(chain[:, 0] ** 2) / 2) / np.sqrt(2 * np.pi))
            log_prob = (log_prob + self.units(initial)) / (K + 1)
        steps = len(self.stochastic) if index is None else 1
        return log_prob, entropy / steps, spread / steps


class Model(nn.Module):
    """The reference's velocity and noise network in torch, with the package's noise network."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        p = {name: torch.tensor(value).float() for name, value in reference.parameters(reference.theta).items()}
        self.mix, self.tilt, self.read = (nn.Parameter(p[name]) for name in ("mix", "tilt", "read"))
        self.net = NoiseNetwork(F, D, STD_MIN, STD_MAX, hidden=(WIDTH,))
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                parameter.zero_()
                if name.endswith("weight"):
                    parameter.copy_(p["in"].T if parameter.shape == (WIDTH, F) else p["out"].T)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t[:, None, None]
        u = torch.tanh(x.flatten(1) @ self.mix).view_as(x) + t * self.tilt.view(H, D) + t * x
        return u, torch.tanh(u @ self.read)

    def gradient(self) -> np.ndarray:
        weights = [parameter for name, parameter in self.net.named_parameters() if name.endswith("weight")]
        tensors = [self.mix, self.tilt, self.read, *(weight.T for weight in weights)]
        grads = [self.mix.grad, self.tilt.grad, self.read.grad]
        grads += [None if weight.grad is None else weight.grad.T for weight in weights]
        filled = [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, grads, strict=True)]
        return np.concatenate([g.double().numpy().ravel() for g in filled])


class Case:
    def __init__(self, noise: str, mdp: str, level: str, scope: str, reduction: str) -> None:
        self.reference = Reference(noise, mdp, level, scope, reduction)
        self.sampler = FlowSampler(
            noise,
            mdp,
            K,
            LEVELS[noise],
            noise_scope=scope,
            joint_reduction=reduction,
            likelihood_level=level,
        )
        self.model = Model(self.reference)
        self.std_fn = self.model.net if noise == "flow_noise" else None
        rng = np.random.default_rng(11)
        self.x, self.eps = rng.normal(size=(B, H, D)), rng.normal(size=(B, K, H, D))
        self.index = np.arange(B) % len(self.reference.stochastic) if mdp == "hybrid" else None
        self.chain = self.reference.sample(self.x, self.eps, self.index)

    def transitions(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Chains and step indices of the training samples: every transition of every chain in two_layer."""
        if self.sampler.mdp != "two_layer":
            return self.chain, self.index
        steps = len(self.reference.stochastic)
        return np.repeat(self.chain, steps, 0), np.tile(np.arange(steps), B)

    def score(self, chain: np.ndarray, index: np.ndarray | None) -> ChainScore:
        rows = Chain(torch.tensor(chain).float(), None if index is None else torch.tensor(index))
        return score_chain(self.model, rows, self.sampler, torch.tensor(SCORED), std_fn=self.std_fn)


@pytest.fixture(params=OPTIONS, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def close(got: Tensor, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert tuple(got.shape) == expected.shape
    np.testing.assert_allclose(got.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)


def test_chains_and_their_log_probs(case: Case) -> None:
    chain, log_prob = sample_chain(
        case.model,
        torch.tensor(case.x).float(),
        torch.tensor(case.eps).float(),
        case.sampler,
        torch.tensor(SCORED),
        step_index=None if case.index is None else torch.tensor(case.index),
        std_fn=case.std_fn,
    )
    close(chain.x, case.chain)
    rows, index = case.transitions()
    expected = case.reference.score(case.reference.theta, rows, index)[0]
    close(log_prob, expected.reshape(B, case.sampler.transitions, -1), 1e-4)


def test_scores_and_their_gradients(case: Case) -> None:
    chain, index = case.transitions()
    score = case.score(chain, index)
    log_prob, entropy, spread = case.reference.score(case.reference.theta, chain, index)
    close(score.log_prob, log_prob, 1e-4)
    close(score.entropy, entropy)
    close(score.std_mean, spread.mean())

    rng = np.random.default_rng(13)
    weights, bonus = rng.normal(size=log_prob.shape), rng.normal(size=entropy.shape)
    objective = (score.log_prob * torch.tensor(weights).float()).sum()
    (objective + (score.entropy * torch.tensor(bonus).float()).sum()).backward()

    def value(theta: np.ndarray) -> float:
        log_prob, entropy, _ = case.reference.score(theta, chain, index)
        return (log_prob * weights).sum() + (entropy * bonus).sum()

    theta, width = case.reference.theta, 1e-5
    differences = [value(theta + width * one) - value(theta - width * one) for one in np.eye(len(theta))]
    expected = np.array(differences) / (2 * width)
    got = case.model.gradient()
    assert np.abs(expected[: H * D * H * D]).max() > 0.1
    assert (np.abs(expected[-WIDTH * D :]).max() > 0.01) == (case.sampler.noise == "flow_noise")
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 2e-5)


def test_two_layers_draw_the_chains_of_one_layer_and_their_log_probs_add_up() -> None:
    for noise, level, scope in itertools.product(LEVELS, LIKELIHOOD_LEVELS, NOISE_SCOPES):
        drawn = {}
        for mdp in ("one_layer", "two_layer"):
            case = Case(noise, mdp, level, scope, "sum")
            x, eps = torch.tensor(case.x).float(), torch.tensor(case.eps).float()
            drawn[mdp] = sample_chain(case.model, x, eps, case.sampler, torch.tensor(SCORED), std_fn=case.std_fn)
        assert torch.equal(drawn["one_layer"][0].x, drawn["two_layer"][0].x)
        steps = drawn["two_layer"][1]
        assert steps.shape[1] == case.sampler.transitions == (K - 1 if noise == "flow_cps" else K)
        torch.testing.assert_close(steps.sum(1), drawn["one_layer"][1][:, 0], rtol=1e-5, atol=1e-5)
