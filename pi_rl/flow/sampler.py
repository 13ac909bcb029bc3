"""How noise enters a denoising chain and which log-probability it gets: the options and what fits together.

Noise, MDP and likelihood are separate choices (paper sections 4.1.2, 4.2.2 and 4.2.3):

    mdp         stochastic steps            training samples of a chunk       log-probability of one
    one_layer   every one                   1, the chain                      joint over the steps (Eq. 5)
    two_layer   every one                   one per step                      that step's (Eq. 9)
    hybrid      one, drawn; the rest ODE    1, the drawn step                 that step's (Eq. 10)

The policy gradient of each is that of the actions it scores, at unchanged everything else: what the same weights do in
ODE steps, in a last step without noise and in the unscored elements (in either `noise_scope`) counts as environment.
With every element of every step scored it is the gradient of the expected return, exactly.
"""

from dataclasses import dataclass

from torch import Tensor

from pi_rl.flow.likelihood import LIKELIHOOD_LEVELS
from pi_rl.flow.transition import time_grid, validate_noise_level

MDPS = ("one_layer", "two_layer", "hybrid")
NOISE_SCOPES = ("scored", "all")
JOINT_REDUCTIONS = ("sum", "mean")
STEP_DRAWS = ("sample", "batch")


@dataclass(frozen=True)
class FlowSampler:
    """How noise enters the denoising chain and which of it the log-probability counts.

    Attributes:
        noise: ``flow_sde``, ``flow_noise`` or ``flow_cps``; ``ode`` through `FlowSampler.ode` only.
        mdp: ``one_layer`` makes every step stochastic and scores the joint chain (Eq. 5); ``two_layer`` makes every
            step stochastic and scores each as a sample of its own (section 4.2.2); ``hybrid`` makes one step per chain
            stochastic and the others ODE (section 4.2.3); ``none`` belongs to ``ode``.
        denoising_steps: K, at least 1.
        noise_level: ``a`` of ``flow_sde`` (positive) or ``flow_cps`` (in (0, 1]); None for the other kinds.
        ignore_last: Never make the last step stochastic. ``flow_cps`` implies it, because its last std is 0.
        noise_scope: ``scored`` injects noise into the scored elements alone, the others follow the ODE: whatever is
            random is in the log-prob. ``all`` is the published code's behaviour: noise in every element, of which the
            scored ones alone enter the log-prob.
        joint_reduction: ``sum`` is the exact joint log-prob of a ``one_layer`` chain. ``mean`` is the published
            code's: the standard-normal log-prob of the initial noise is added, then the total is divided by K + 1.
        likelihood_level: What one probability ratio covers: the whole ``chunk`` (Eq. 15), one ``action`` of it or one
            ``element``; see `pi_rl.flow.likelihood.reduce_to_units`.
        step_draw: Which stochastic step ``hybrid`` draws: one per ``sample``, or one for the whole ``batch`` as the
            published code does. Honoured by whoever draws the numbers for `draw_step_index`.
    """

    noise: str
    mdp: str
    denoising_steps: int
    noise_level: float | None
    ignore_last: bool = False
    noise_scope: str = "scored"
    joint_reduction: str = "sum"
    likelihood_level: str = "chunk"
    step_draw: str = "sample"

    def __post_init__(self) -> None:
        """Validate the combination.

        Raises:
            ValueError: If a name is unknown, a value out of range, an option has no meaning for the MDP, or no step
                would be stochastic.
        """
        validate_noise_level(self.noise, self.noise_level)
        time_grid(self.denoising_steps)
        _check_name("noise_scope", self.noise_scope, NOISE_SCOPES)
        _check_name("joint_reduction", self.joint_reduction, JOINT_REDUCTIONS)
        _check_name("likelihood_level", self.likelihood_level, LIKELIHOOD_LEVELS)
        _check_name("step_draw", self.step_draw, STEP_DRAWS)
        if self.noise == "ode":
            if self.mdp != "none":
                raise ValueError(
                    f"noise 'ode' is deterministic: it has no log-prob and cannot be trained with mdp {self.mdp!r}; "
                    f"use FlowSampler.ode({self.denoising_steps}) to evaluate, or another noise to train"
                )
            return
        _check_name("mdp", self.mdp, MDPS)
        self._check_combination()

    def _check_combination(self) -> None:
        if self.noise_level == 0.0:
            raise ValueError(
                f"`noise_level=0` gives noise {self.noise!r} no density; use a positive level such as 0.5"
            )
        if self.joint_reduction == "mean" and self.mdp != "one_layer":
            raise ValueError(
                f"`joint_reduction='mean'` averages over a joint chain, which only mdp 'one_layer' has; mdp "
                f"{self.mdp!r} scores one step at a time; use 'sum'"
            )
        if self.step_draw == "batch" and self.mdp != "hybrid":
            raise ValueError(
                f"`step_draw='batch'` shares the stochastic step that only mdp 'hybrid' draws; in mdp {self.mdp!r} "
                "every step is stochastic; use 'sample'"
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

    @property
    def transitions(self) -> int:
        """Training samples per chunk, S: the stochastic steps of ``two_layer``, 1 otherwise."""
        return len(self.stochastic_steps) if self.mdp == "two_layer" else 1

    def draw_step_index(self, uniform: Tensor) -> Tensor | None:
        """Which step of each sample is stochastic, uniformly over `stochastic_steps`.

        Args:
            uniform: (B,) numbers in [0, 1), one per sample. A constant vector gives the shared draw of
                ``step_draw='batch'``.

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


def _check_name(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{field}={value!r}` is unknown; choose one of {', '.join(allowed)}")
