"""Sampling a denoising chain and scoring it again (paper sections 4.1.2, 4.2.2 and 4.2.3).

Shapes: B samples, K denoising steps, H horizon, D padded action dimensions, F expert features, S training samples of a
chunk (`FlowSampler.transitions`), U ratio units of a chunk (`likelihood_level`). All maths is float32. `sample_chain`
and `score_chain` share the grid, the transition and the log-density, so that with unchanged weights every probability
ratio is exactly 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pi_rl.flow.likelihood import (
    gaussian_entropy,
    gaussian_log_prob,
    masked_mean,
    reduce_to_units,
    standard_normal_log_prob,
    unit_count,
)
from pi_rl.flow.sampler import FlowSampler
from pi_rl.flow.transition import Transition, time_grid, transition

VelocityFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x (B, H, D), t (B,)) -> (velocity (B, H, D), features (B, H, F))``."""

StdFn = Callable[[Tensor], Tensor]
"""``features (B, H, F) -> std (B, H, D)``, usually a `NoiseNetwork`."""


@dataclass
class Chain:
    """A denoising chain.

    Attributes:
        x: (B, K + 1, H, D) float32 from the initial noise to the action chunk.
        step_index: (B,) int64, the step that counts: the stochastic one of each ``hybrid`` chain; for ``two_layer``
            None when drawn and, to score, the step of each sample. None for ``one_layer``, where all steps count.
    """

    x: Tensor
    step_index: Tensor | None


@dataclass
class ChainScore:
    """What a policy says about a chain.

    Attributes:
        log_prob: (B, U) float32, summed over the scored elements of each unit; one step's for ``two_layer`` and
            ``hybrid``, reduced over the steps as the sampler says for ``one_layer``.
        entropy: (B,) float32 Gaussian entropy in nats, mean over scored elements and the steps that count.
        std_mean: () float32 std, mean over samples, scored elements and the steps that count.
    """

    log_prob: Tensor
    entropy: Tensor
    std_mean: Tensor


def sample_chain(
    velocity: VelocityFn,
    x_init: Tensor,
    eps: Tensor | None,
    sampler: FlowSampler,
    scored: Tensor,
    *,
    step_index: Tensor | None = None,
    std_fn: StdFn | None = None,
) -> tuple[Chain, Tensor]:
    """Denoise from given noise. A pure function of its arguments; call it under ``torch.no_grad`` in a rollout.

    Args:
        velocity: Model velocity, called K times with float32 ``x`` and ``t``.
        x_init: (B, H, D) initial standard-normal noise.
        eps: (B, K, H, D) standard-normal noise of the steps; may be None for ``ode``.
        sampler: How noise enters.
        scored: (H, D) bool, True for executed steps and real action dimensions.
        step_index: (B,) from `FlowSampler.draw_step_index`; required by ``hybrid`` and by nothing else.
        std_fn: Noise network, required by ``flow_noise``. Its input is the velocity's features, not detached.

    Returns:
        The chain and the (B, S, U) float32 log-prob of what was drawn, equal to that of `score_chain`: S is 1, and for
        ``two_layer`` the number of stochastic steps, in their order. Zeros (B, 1, U) for ``ode``.

    Raises:
        ValueError: If shapes or the optional arguments do not fit the sampler.
    """
    _check_inputs(x_init, scored, sampler, std_fn)
    _check_step_index(step_index, x_init, sampler, needed=sampler.mdp == "hybrid")
    expected = (x_init.shape[0], sampler.denoising_steps, *x_init.shape[1:])
    if sampler.stochastic_steps and (eps is None or eps.shape != expected):
        raise ValueError(f"`eps` is {_shape(eps)}; it must have shape {expected} = (B, K, H, D)")
    if step_index is not None and not ((step_index >= 0) & (step_index < len(sampler.stochastic_steps))).all():
        raise ValueError(f"`step_index` must lie in 0..{len(sampler.stochastic_steps) - 1}; use draw_step_index")
    grid = time_grid(sampler.denoising_steps, x_init.device)
    states = [x_init.float()]
    log_probs: list[Tensor] = []
    for k in range(sampler.denoising_steps):
        x, t, t_next = states[-1], grid[k].expand(len(x_init)), grid[k + 1].expand(len(x_init))
        u, features = velocity(x, t)
        following = transition("ode", x, u, t, t_next).mean
        if k in sampler.stochastic_steps and eps is not None:
            step = _stochastic_transition(sampler, x, u, features, t, t_next, std_fn)
            drawn = step.mean + step.std * eps[:, k].float()
            if sampler.noise_scope == "scored":
                drawn = torch.where(scored, drawn, following)
            log_prob = _step_log_prob(drawn, step, scored, sampler)
            if step_index is not None:
                chosen = step_index == k
                drawn = torch.where(chosen[:, None, None], drawn, following)
                log_prob = torch.where(chosen[:, None], log_prob, torch.zeros_like(log_prob))
            following = drawn
            log_probs.append(log_prob)
        states.append(following)
    chain = Chain(torch.stack(states, dim=1), step_index)
    if sampler.mdp == "two_layer":
        return chain, torch.stack(log_probs, dim=1)
    return chain, _reduce_steps(log_probs, chain, sampler, scored)[:, None]


def score_chain(
    velocity: VelocityFn,
    chain: Chain,
    sampler: FlowSampler,
    scored: Tensor,
    *,
    std_fn: StdFn | None = None,
) -> ChainScore:
    """Log-prob and entropy of a chain under the present weights, differentiable in them.

    Args:
        velocity: Model velocity; called once for ``hybrid`` and ``two_layer``, once per stochastic step for
            ``one_layer``.
        chain: A chain from `sample_chain`, or rows of one. ``two_layer`` scores the transitions in
            ``chain.step_index``, (B,) of `FlowSampler.stochastic_steps`; one chain may occur in several rows.
        sampler: The sampler that drew it.
        scored: (H, D) bool, the mask that it was drawn with.
        std_fn: Noise network, required by ``flow_noise``.

    Returns:
        The score. The initial noise's log-prob, a constant, enters under ``joint_reduction='mean'`` alone.

    Raises:
        ValueError: If the sampler is ``ode``, or shapes or optional arguments do not fit the sampler.
    """
    if sampler.noise == "ode":
        raise ValueError("an 'ode' chain is deterministic and has no log-prob; score chains of a stochastic sampler")
    if chain.x.ndim != 4 or chain.x.shape[1] != sampler.denoising_steps + 1:
        raise ValueError(
            f"`chain.x` has shape {tuple(chain.x.shape)}; with denoising_steps={sampler.denoising_steps} it must be "
            f"(B, {sampler.denoising_steps + 1}, H, D)"
        )
    _check_inputs(chain.x[:, 0], scored, sampler, std_fn)
    _check_step_index(chain.step_index, chain.x, sampler, needed=sampler.mdp != "one_layer")
    size, device = len(chain.x), chain.x.device
    grid, rows = time_grid(sampler.denoising_steps, device), torch.arange(size, device=device)
    if chain.step_index is not None:
        indices = [chain.step_index]
    else:
        indices = [torch.full((size,), k, device=device) for k in sampler.stochastic_steps]
    log_probs: list[Tensor] = []
    entropy, std_sum = torch.zeros(size, device=device), torch.zeros((), device=device)
    for index in indices:
        x, following = chain.x[rows, index].float(), chain.x[rows, index + 1].float()
        t, t_next = grid[index], grid[index + 1]
        u, features = velocity(x, t)
        step = _stochastic_transition(sampler, x, u, features, t, t_next, std_fn)
        log_probs.append(_step_log_prob(following, step, scored, sampler))
        entropy = entropy + masked_mean(gaussian_entropy(step.std), scored)
        std_sum = std_sum + masked_mean(step.std, scored).mean()
    log_prob = _reduce_steps(log_probs, chain, sampler, scored)
    return ChainScore(log_prob, entropy / len(indices), std_sum / len(indices))


def _stochastic_transition(
    sampler: FlowSampler,
    x: Tensor,
    u: Tensor,
    features: Tensor,
    t: Tensor,
    t_next: Tensor,
    std_fn: StdFn | None,
) -> Transition:
    learned_std = std_fn(features) if std_fn is not None and sampler.noise == "flow_noise" else None
    return transition(sampler.noise, x, u, t, t_next, noise_level=sampler.noise_level, learned_std=learned_std)


def _step_log_prob(following: Tensor, step: Transition, scored: Tensor, sampler: FlowSampler) -> Tensor:
    """(B, U) log-prob of one transition: the single expression behind sampling and scoring."""
    return reduce_to_units(gaussian_log_prob(following, step.mean, step.std), scored, sampler.likelihood_level)


def _reduce_steps(log_probs: list[Tensor], chain: Chain, sampler: FlowSampler, scored: Tensor) -> Tensor:
    """(B, U) from the steps' (B, U); one after the other, in the same order for sampling and scoring."""
    units = unit_count(scored, sampler.likelihood_level)
    log_prob = torch.zeros(len(chain.x), units, device=chain.x.device)
    for step in log_probs:
        log_prob = log_prob + step
    if sampler.joint_reduction == "sum":
        return log_prob
    initial = reduce_to_units(standard_normal_log_prob(chain.x[:, 0]), scored, sampler.likelihood_level)
    return (log_prob + initial) / (sampler.denoising_steps + 1)


def _check_inputs(x: Tensor, scored: Tensor, sampler: FlowSampler, std_fn: StdFn | None) -> None:
    if x.ndim != 3 or scored.shape != x.shape[1:] or scored.dtype != torch.bool:
        raise ValueError(
            f"the state has shape {tuple(x.shape)} and `scored` is {scored.dtype} of shape {tuple(scored.shape)}; "
            "they must be (B, H, D) and bool (H, D)"
        )
    if std_fn is None and sampler.noise == "flow_noise":
        raise ValueError("noise 'flow_noise' needs `std_fn`, the noise network; pass a NoiseNetwork")


def _check_step_index(step_index: Tensor | None, x: Tensor, sampler: FlowSampler, *, needed: bool) -> None:
    if (step_index is not None) != needed:
        raise ValueError(
            f"the step index is {_shape(step_index)} for mdp {sampler.mdp!r}: 'hybrid' needs one from draw_step_index "
            "to sample and to score, 'two_layer' needs one to score only, 'one_layer' and 'ode' take none"
        )
    if step_index is not None and step_index.shape != x.shape[:1]:
        raise ValueError(f"the step index is {_shape(step_index)}; it must have shape ({len(x)},), one per sample")


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
