"""The one module that the trainer wraps: policy, critic and noise network behind a single `forward`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pi_rl.flow.chain import Chain, ChainScore, FlowSampler, VelocityFn, sample_chain, score_chain
from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.flow_policy import FlowPolicy, Prefix

LEARNED_NOISE = "flow_noise"


class FlowActorCritic(nn.Module):
    """Actor and critic of πRL.

    Distributed wrappers hook `forward` and nothing else, so every computation is a mode of it. No `config` attribute:
    Trainer callbacks would take it for a Transformers configuration.

    Args:
        policy: The flow policy; call `policy.freeze_vlm()` before training.
        value_head: The critic.
        noise_network: Standard deviations of Flow-Noise; required by it, None for everything else.
        sampler: How chains are drawn and scored.

    Raises:
        ValueError: If the noise network is missing or superfluous.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        value_head: ValueHead,
        noise_network: NoiseNetwork | None,
        sampler: FlowSampler,
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
                "encode": batch → `Prefix` (no gradient);
                "sample": prefix, x_init (B, H, D), eps (B, K, H, D), step_index (B,) or None →
                (`Chain`, log_prob (B,)) (no gradient);
                "ode": prefix, x_init (B, H, D), denoising_steps or None for the sampler's K →
                normalised actions (B, H, D) (no gradient);
                "score": prefix, chain → (`ChainScore`, values (B,)), differentiable;
                "value": prefix → values (B,), differentiable.
            **inputs: Inputs of the mode.

        Raises:
            ValueError: If the mode is unknown.
        """
        if mode not in self._modes:
            raise ValueError(f"mode={mode!r} is unknown; use one of {sorted(self._modes)}.")
        return self._modes[mode](**inputs)

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

    def _velocity(self, prefix: Prefix) -> VelocityFn:
        return lambda x, t: self.policy.velocity(prefix, x, t)

    def _encode(self, batch: dict[str, Any]) -> Prefix:
        return self.policy.encode_prefix(batch)

    @torch.no_grad()
    def _sample(
        self, prefix: Prefix, x_init: Tensor, eps: Tensor, step_index: Tensor | None = None
    ) -> tuple[Chain, Tensor]:
        return sample_chain(
            self._velocity(prefix),
            x_init,
            eps,
            self.sampler,
            self.policy.scored_mask(),
            step_index=step_index,
            std_fn=self.noise_network,
        )

    @torch.no_grad()
    def _ode(self, prefix: Prefix, x_init: Tensor, denoising_steps: int | None = None) -> Tensor:
        sampler = FlowSampler.ode(denoising_steps or self.sampler.denoising_steps)
        chain, _ = sample_chain(self._velocity(prefix), x_init, None, sampler, self.policy.scored_mask())
        return chain.x[:, -1]

    def _score(self, prefix: Prefix, chain: Chain) -> tuple[ChainScore, Tensor]:
        score = score_chain(
            self._velocity(prefix), chain, self.sampler, self.policy.scored_mask(), std_fn=self.noise_network
        )
        return score, self.value_head(prefix)

    def _value(self, prefix: Prefix) -> Tensor:
        return self.value_head(prefix)
