"""`torch.compile` on or off: the same chains, scores and gradients. Backend aot_eager, which needs no C++ compiler."""

import math

import pytest
import torch
from torch import Tensor, nn

from pi_rl.flow.chain import Chain, ChainScore, sample_chain, score_chain
from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.flow.sampler import FlowSampler

B, K, H, D = 6, 2, 4, 3
SCORED = torch.zeros(H, D, dtype=torch.bool)
SCORED[:2, :2] = True


class Policy(nn.Module):
    """A velocity and a noise network behind one `forward`, as the trainer's model is."""

    def __init__(self, sampler: FlowSampler) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sampler = sampler
        self.mix = nn.Parameter(torch.randn(H * D, H * D) / math.sqrt(H * D))
        self.net = NoiseNetwork(D, D, 0.08, 0.3, hidden=(5,))
        nn.init.normal_(self.net.layers[-1].weight)  # type: ignore[arg-type]

    def velocity(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.tanh(x.flatten(1) @ self.mix).view_as(x) + t[:, None, None] * x
        return u, torch.tanh(u)

    def std_fn(self):
        return self.net if self.sampler.noise == "flow_noise" else None

    def forward(self, chain: Chain) -> ChainScore:
        return score_chain(self.velocity, chain, self.sampler, SCORED, std_fn=self.std_fn())


@pytest.mark.parametrize(
    "sampler",
    [
        FlowSampler("flow_noise", "one_layer", K, None, joint_reduction="mean"),
        pytest.param(FlowSampler("flow_sde", "two_layer", K, 0.5, likelihood_level="action"), marks=pytest.mark.slow),
        pytest.param(FlowSampler("flow_cps", "hybrid", K, 0.5), marks=pytest.mark.slow),
    ],
    ids=lambda sampler: f"{sampler.noise}-{sampler.mdp}",
)
def test_compiled_scores_and_gradients(sampler: FlowSampler) -> None:
    policy = Policy(sampler)
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(B, H, D, generator=generator), torch.randn(B, K, H, D, generator=generator)
    index = torch.arange(B) % len(sampler.stochastic_steps)
    drawn = None if sampler.mdp != "hybrid" else index
    with torch.no_grad():
        chain, _ = sample_chain(policy.velocity, x, eps, sampler, SCORED, step_index=drawn, std_fn=policy.std_fn())
    chain = Chain(chain.x, None if sampler.mdp == "one_layer" else index)
    results = []
    for model in (policy, torch.compile(policy, backend="aot_eager")):
        policy.zero_grad()
        score = model(chain)
        (score.log_prob.sum() + score.entropy.sum()).backward()
        grads = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        results.append((score.log_prob.detach(), score.entropy.detach(), score.std_mean.detach(), *grads))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
