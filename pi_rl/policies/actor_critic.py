"""The one module that the trainer wraps: policy, critic and noise network behind a single `forward`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pi_rl.flow.chain import Chain, ChainScore, VelocityFn, sample_chain, score_chain
from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.flow.sampler import FlowSampler
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.execution import Execution, encode_in_passes, velocity_in_passes
from pi_rl.policies.flow_policy import FlowPolicy, Prefix

LEARNED_NOISE = "flow_noise"


@dataclass
class Sample:
    """What acting in B observations leaves behind: S transitions, U ratio units each.

    Attributes:
        chain: The denoising chains; their last states are the normalised actions.
        log_prob: (B, S, U).
        critic_input: (B, V, width) features of the critic, or None without a critic.
        values: (B, S), or None without a critic.
    """

    chain: Chain
    log_prob: Tensor
    critic_input: Tensor | None
    values: Tensor | None


class FlowActorCritic(nn.Module):
    """Actor and critic of πRL.

    Distributed wrappers hook `forward` and nothing else, so every computation is a mode of it. No `config` attribute:
    Trainer callbacks would take it for a Transformers configuration.

    Args:
        policy: The flow policy; call `policy.freeze_vlm()` before training.
        value_head: The critic; None for critic-free algorithms.
        noise_network: Standard deviations of Flow-Noise; required by it, None for everything else.
        sampler: How chains are drawn and scored.
        execution: Numeric type and rows of the network's passes, the same in rollout and update.

    Raises:
        ValueError: If the noise network is missing or superfluous.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        value_head: ValueHead | None,
        noise_network: NoiseNetwork | None,
        sampler: FlowSampler,
        execution: Execution | None = None,
    ):
        super().__init__()
        if (noise_network is None) == (sampler.noise == LEARNED_NOISE):
            given = "none was given" if noise_network is None else "one was given"
            raise ValueError(
                f"noise={sampler.noise!r} and a noise network do not fit: {given}; it belongs to "
                f"{LEARNED_NOISE!r} alone."
            )
        self.policy = policy
        self.value_head = value_head
        self.noise_network = noise_network
        self.sampler = sampler
        self.execution = execution or Execution()
        self._modes: dict[str, Callable[..., Any]] = {
            "encode": self._encode,
            "sample": self._sample,
            "ode": self._ode,
            "score": self._score,
            "value": self._value,
        }

    def forward(self, mode: str, **inputs: Any) -> Any:
        """Runs one computation.

        Args:
            mode: One of
                "encode": batch, and pooled=False where nobody reads the VLM's output → `Prefix` (gradient only where
                the policy's prefix is live);
                "sample": prefix, x_init (B, H, D), eps (B, K, H, D), step_index (B,) or None → `Sample` (no gradient);
                "ode": prefix, x_init (B, H, D), denoising_steps or None for the sampler's K →
                normalised actions (B, H, D) (no gradient);
                "score": inputs (`Prefix`, or a batch to encode), chain, critic_input or None →
                (`ChainScore`, values (M,) or None), differentiable;
                "value": prefix, and for V_expert x_init, eps, step_index → value of the first transition (B,)
                (no gradient).
            **inputs: Inputs of the mode.

        Raises:
            ValueError: If the mode is unknown.
        """
        if mode not in self._modes:
            raise ValueError(f"mode={mode!r} is unknown; use one of {sorted(self._modes)}.")
        if self.policy.is_compiled:
            torch.compiler.cudagraph_mark_step_begin()  # what earlier calls returned is no longer needed
        with self.execution.autocast(next(self.parameters()).device):
            return self._modes[mode](**inputs)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Trades time for memory in the update; called by the Trainer for ``gradient_checkpointing=True``.

        Raises:
            ValueError: If the policy has no layers to recompute, or settings are given (there are none).
        """
        if gradient_checkpointing_kwargs:
            raise ValueError(
                f"gradient_checkpointing_kwargs={gradient_checkpointing_kwargs} is not supported; leave it out."
            )
        self.policy.checkpoint_activations()

    def parameter_groups(
        self, learning_rate: float, critic_learning_rate: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups of everything trainable; norms and biases are not decayed.

        Args:
            learning_rate: Of the policy and the noise network.
            critic_learning_rate: Of the value head.
            weight_decay: AdamW's decay of matrices.

        Returns:
            Up to four groups (actor / critic × decayed / not), each with "name", "params", "lr", "weight_decay".
        """
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = "critic" if name.startswith("value_head.") else "actor"
                decayed = parameter.ndim > 1 and "norm" not in name.removeprefix("policy.")
                groups.setdefault((part, decayed), []).append(parameter)
        return [
            {
                "name": f"{part}{'' if decayed else '_no_decay'}",
                "params": parameters,
                "lr": critic_learning_rate if part == "critic" else learning_rate,
                "weight_decay": weight_decay if decayed else 0.0,
            }
            for (part, decayed), parameters in groups.items()
        ]

    @property
    def critic_per_step(self) -> bool:
        """Whether a denoising state is valued by itself (V_expert in the two-layer MDP)."""
        return self.sampler.mdp == "two_layer" and self.value_head is not None and self.value_head.critic == "expert"

    def _velocity(self, prefix: Prefix, features: list[Tensor] | None = None) -> VelocityFn:
        """The policy's velocity on a prefix; the expert's output tokens of every call are added to ``features``."""
        passes = velocity_in_passes(self._policy_velocity, prefix, self.execution.expert_rows)

        def velocity(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            u, tokens = passes(x, t)
            if features is not None:
                features.append(tokens)
            return u, tokens

        return velocity

    def _policy_velocity(self, prefix: Prefix, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compiled code rounds differently with and without gradients: acting runs what scoring will run."""
        if torch.is_grad_enabled() or not self.policy.is_compiled:
            return self.policy.velocity(prefix, x, t)
        with torch.enable_grad():
            u, tokens = self.policy.velocity(prefix, x, t)
        return u.detach(), tokens.detach()

    def _encode(self, batch: Mapping[str, Any], pooled: bool = True) -> Prefix:
        read = pooled and self.value_head is not None and self.value_head.critic == "vlm"
        encode = partial(self.policy.encode_prefix, pooled=read)
        return encode_in_passes(encode, batch, self.execution.encode_rows)

    @torch.no_grad()
    def _sample(self, prefix: Prefix, x_init: Tensor, eps: Tensor, step_index: Tensor | None = None) -> Sample:
        features: list[Tensor] = []
        chain, log_prob = sample_chain(
            self._velocity(prefix, features),
            x_init,
            eps,
            self.sampler,
            self.policy.scored_mask(),
            step_index=step_index,
            std_fn=self.noise_network,
        )
        if self.value_head is None:
            return Sample(chain, log_prob, None, None)
        critic_input = self.value_head.observe(prefix, features)
        if self.critic_per_step:
            values = self.value_head.per_entry(critic_input)[:, list(self.sampler.stochastic_steps)]
        else:
            values = self.value_head(critic_input).unsqueeze(1).expand(-1, log_prob.shape[1])
        return Sample(chain, log_prob, critic_input, values)

    @torch.no_grad()
    def _ode(self, prefix: Prefix, x_init: Tensor, denoising_steps: int | None = None) -> Tensor:
        sampler = FlowSampler.ode(denoising_steps or self.sampler.denoising_steps)
        chain, _ = sample_chain(self._velocity(prefix), x_init, None, sampler, self.policy.scored_mask())
        return chain.x[:, -1]

    def _score(
        self, inputs: Prefix | Mapping[str, Any], chain: Chain, critic_input: Tensor | None = None
    ) -> tuple[ChainScore, Tensor | None]:
        prefix = inputs if isinstance(inputs, Prefix) else self._encode(inputs, pooled=False)
        score = score_chain(
            self._velocity(prefix), chain, self.sampler, self.policy.scored_mask(), std_fn=self.noise_network
        )
        if self.value_head is None or critic_input is None:
            return score, None
        return score, self.value_head(critic_input)

    @torch.no_grad()
    def _value(
        self,
        prefix: Prefix,
        x_init: Tensor | None = None,
        eps: Tensor | None = None,
        step_index: Tensor | None = None,
    ) -> Tensor:
        if self.value_head is None:
            raise ValueError("this model has no critic, hence no values; build it with a value head.")
        if self.value_head.critic == "vlm":
            return self.value_head(self.value_head.observe(prefix))
        if x_init is None or eps is None:
            raise ValueError("critic 'expert' values an observation by its denoising chain; pass x_init and eps.")
        if self.critic_per_step:
            t = torch.ones(len(x_init), device=x_init.device)
            _, tokens = self._velocity(prefix)(x_init.float(), t)
            return self.value_head(self.value_head.observe(prefix, [tokens]))
        values = self._sample(prefix, x_init, eps, step_index).values
        assert values is not None
        return values[:, 0]
