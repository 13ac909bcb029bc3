"""Sampling a denoising chain and scoring it again (paper sections 4.1.2, 4.2.2 and 4.2.3).

Shapes: B samples, K denoising steps, H horizon, D padded action dimensions, F expert features. All maths is float32.
`sample_chain` and `score_chain` share the grid, the transition and the log-density, so that with unchanged weights the
probability ratio of a chain is exactly 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pi_rl.flow.likelihood import (
    gaussian_entropy,
    gaussian_log_prob,
    masked_mean,
    masked_sum,
    standard_normal_log_prob,
)
from pi_rl.flow.transition import Transition, time_grid, transition, validate_noise_level

MDPS = ("one_layer", "hybrid")
NOISE_SCOPES = ("scored", "all")
JOINT_REDUCTIONS = ("sum", "mean")

VelocityFn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(x (B, H, D), t (B,)) -> (velocity (B, H, D), features (B, H, F))``."""

StdFn = Callable[[Tensor], Tensor]
"""``features (B, H, F) -> std (B, H, D)``, usually a `NoiseNetwork`."""


@dataclass(frozen=True)
class FlowSampler:
    """How noise enters the denoising chain and which of it the log-probability counts.

    Attributes:
        noise: ``flow_sde``, ``flow_noise`` or ``flow_cps``; ``ode`` through `FlowSampler.ode` only.
        mdp: ``one_layer`` makes every step stochastic and scores the joint chain (Eq. 5); ``hybrid`` makes one step
            per sample stochastic and the others ODE (section 4.2.3); ``none`` belongs to ``ode``.
        denoising_steps: K, at least 1.
        noise_level: ``a`` of ``flow_sde`` (positive) or ``flow_cps`` (in (0, 1]); None for the other kinds.
        ignore_last: Never make the last step stochastic. ``flow_cps`` implies it, because its last std is 0.
        noise_scope: ``scored`` injects noise into the scored elements alone, the others follow the ODE, and the
            log-prob is the exact likelihood of the transition. ``all`` is the published code's behaviour: noise in
            every element, of which the scored ones alone enter the log-prob.
        joint_reduction: ``sum`` is the exact joint log-prob of a ``one_layer`` chain. ``mean`` is the published
            code's: the standard-normal log-prob of the initial noise is added, then the total is divided by K + 1.
    """

    noise: str
    mdp: str
    denoising_steps: int
    noise_level: float | None
    ignore_last: bool = False
    noise_scope: str = "scored"
    joint_reduction: str = "sum"

    def __post_init__(self) -> None:
        """Validate the combination.

        Raises:
            ValueError: If a name is unknown, a value out of range, or no step would be stochastic.
        """
        validate_noise_level(self.noise, self.noise_level)
        time_grid(self.denoising_steps)
        _check_name("noise_scope", self.noise_scope, NOISE_SCOPES)
        _check_name("joint_reduction", self.joint_reduction, JOINT_REDUCTIONS)
        if self.noise == "ode":
            if self.mdp != "none":
                raise ValueError(
                    f"noise 'ode' has no log-prob and cannot be trained with mdp {self.mdp!r}; use "
                    f"FlowSampler.ode({self.denoising_steps}) to evaluate, or another noise to train"
                )
            return
        _check_name("mdp", self.mdp, MDPS)
        if self.noise_level == 0.0:
            raise ValueError(
                f"`noise_level=0` gives noise {self.noise!r} no density; use a positive level such as 0.5"
            )
        if self.joint_reduction == "mean" and self.mdp != "one_layer":
            raise ValueError(
                f"`joint_reduction='mean'` averages over a joint chain and mdp {self.mdp!r} scores one step; use 'sum'"
            )
        if not self.stochastic_steps:
            raise ValueError(
                f"noise {self.noise!r} with denoising_steps={self.denoising_steps} and ignore_last={self.ignore_last} "
                "leaves no stochastic step; use at least 2 denoising steps"
            )

    @classmethod
    def ode(cls, denoising_steps: int) -> "FlowSampler":
        """Deterministic sampler for evaluation and deployment: K Euler steps."""
        return cls(noise="ode", mdp="none", denoising_steps=denoising_steps, noise_level=None)

    @property
    def stochastic_steps(self) -> range:
        """Indices of the steps that may be stochastic: none for ``ode``, else 0 up to K - 1 or K - 2."""
        if self.noise == "ode":
            return range(0)
        return range(self.denoising_steps - int(self.ignore_last or self.noise == "flow_cps"))

    def draw_step_index(self, uniform: Tensor) -> Tensor | None:
        """Which step of each sample is stochastic, uniformly over `stochastic_steps`.

        Args:
            uniform: (B,) numbers in [0, 1), one per sample. A constant vector gives the published code's shared draw.

        Returns:
            (B,) int64 for ``hybrid``; None for the others, whose stochastic steps are fixed.

        Raises:
            ValueError: If ``uniform`` is not a vector.
        """
        if uniform.ndim != 1:
            raise ValueError(f"`uniform` has shape {tuple(uniform.shape)}; it must be (B,), one number per sample")
        if self.mdp != "hybrid":
            return None
        count = len(self.stochastic_steps)
        # in float32 the product can round up to `count`
        return (uniform * count).long().clamp(0, count - 1)


@dataclass
class Chain:
    """A denoising chain.

    Attributes:
        x: (B, K + 1, H, D) float32 from the initial noise to the action chunk.
        step_index: (B,) int64 stochastic step of each sample for ``hybrid``, else None.
    """

    x: Tensor
    step_index: Tensor | None


@dataclass
class ChainScore:
    """What a policy says about a chain.

    Attributes:
        log_prob: (B,) float32, summed over the scored elements, reduced over steps as the sampler says.
        entropy: (B,) float32 Gaussian entropy in nats, mean over scored elements and stochastic steps.
        std_mean: () float32 std, mean over samples, scored elements and stochastic steps.
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
        The chain and the (B,) float32 log-prob of what was drawn, equal to that of `score_chain`; zeros for ``ode``.

    Raises:
        ValueError: If shapes or the optional arguments do not fit the sampler.
    """
    _check_inputs(x_init, scored, sampler, step_index, std_fn)
    expected = (x_init.shape[0], sampler.denoising_steps, *x_init.shape[1:])
    if sampler.stochastic_steps and (eps is None or eps.shape != expected):
        raise ValueError(f"`eps` is {_shape(eps)}; it must have shape {expected} = (B, K, H, D)")
    if step_index is not None and not ((step_index >= 0) & (step_index < len(sampler.stochastic_steps))).all():
        raise ValueError(f"`step_index` must lie in 0..{len(sampler.stochastic_steps) - 1}; use draw_step_index")
    grid = time_grid(sampler.denoising_steps, x_init.device)
    states = [x_init.float()]
    log_prob = torch.zeros(len(x_init), device=x_init.device)
    for k in range(sampler.denoising_steps):
        x, t, t_next = states[-1], grid[k].expand(len(x_init)), grid[k + 1].expand(len(x_init))
        u, features = velocity(x, t)
        following = transition("ode", x, u, t, t_next).mean
        if k in sampler.stochastic_steps and eps is not None:
            step = _stochastic_transition(sampler, x, u, features, t, t_next, std_fn)
            drawn = step.mean + step.std * eps[:, k].float()
            if sampler.noise_scope == "scored":
                drawn = torch.where(scored, drawn, following)
            step_log_prob = _step_log_prob(drawn, step, scored)
            if step_index is not None:
                chosen = step_index == k
                drawn = torch.where(chosen[:, None, None], drawn, following)
                step_log_prob = torch.where(chosen, step_log_prob, torch.zeros_like(step_log_prob))
            following, log_prob = drawn, log_prob + step_log_prob
        states.append(following)
    chain = Chain(torch.stack(states, dim=1), step_index)
    return chain, _reduce_steps(log_prob, chain, sampler, scored)


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
        velocity: Model velocity; called once for ``hybrid``, once per stochastic step for ``one_layer``.
        chain: A chain from `sample_chain`, or rows of one.
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
    _check_inputs(chain.x[:, 0], scored, sampler, chain.step_index, std_fn)
    size, device = len(chain.x), chain.x.device
    grid, rows = time_grid(sampler.denoising_steps, device), torch.arange(size, device=device)
    if chain.step_index is not None:
        indices = [chain.step_index]
    else:
        indices = [torch.full((size,), k, device=device) for k in sampler.stochastic_steps]
    log_prob, entropy = torch.zeros(size, device=device), torch.zeros(size, device=device)
    std_sum = torch.zeros((), device=device)
    for index in indices:
        x, following = chain.x[rows, index].float(), chain.x[rows, index + 1].float()
        t, t_next = grid[index], grid[index + 1]
        u, features = velocity(x, t)
        step = _stochastic_transition(sampler, x, u, features, t, t_next, std_fn)
        log_prob = log_prob + _step_log_prob(following, step, scored)
        entropy = entropy + masked_mean(gaussian_entropy(step.std), scored)
        std_sum = std_sum + masked_mean(step.std, scored).mean()
    log_prob = _reduce_steps(log_prob, chain, sampler, scored)
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


def _step_log_prob(following: Tensor, step: Transition, scored: Tensor) -> Tensor:
    """(B,) log-prob of one transition: the single expression behind sampling and scoring."""
    return masked_sum(gaussian_log_prob(following, step.mean, step.std), scored)


def _reduce_steps(log_prob: Tensor, chain: Chain, sampler: FlowSampler, scored: Tensor) -> Tensor:
    if sampler.joint_reduction == "sum":
        return log_prob
    initial = masked_sum(standard_normal_log_prob(chain.x[:, 0]), scored)
    return (log_prob + initial) / (sampler.denoising_steps + 1)


def _check_inputs(
    x: Tensor, scored: Tensor, sampler: FlowSampler, step_index: Tensor | None, std_fn: StdFn | None
) -> None:
    if x.ndim != 3 or scored.shape != x.shape[1:] or scored.dtype != torch.bool:
        raise ValueError(
            f"the state has shape {tuple(x.shape)} and `scored` is {scored.dtype} of shape {tuple(scored.shape)}; "
            "they must be (B, H, D) and bool (H, D)"
        )
    if (step_index is not None) != (sampler.mdp == "hybrid"):
        raise ValueError(
            f"the step index is {_shape(step_index)} for mdp {sampler.mdp!r}; 'hybrid' needs one from "
            "draw_step_index, the others take none"
        )
    if step_index is not None and step_index.shape != x.shape[:1]:
        raise ValueError(f"the step index is {_shape(step_index)}; it must have shape ({len(x)},), one per sample")
    if std_fn is None and sampler.noise == "flow_noise":
        raise ValueError("noise 'flow_noise' needs `std_fn`, the noise network; pass a NoiseNetwork")


def _check_name(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{field}={value!r}` is unknown; choose one of {', '.join(allowed)}")


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
