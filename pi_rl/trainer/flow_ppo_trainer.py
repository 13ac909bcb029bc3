"""PPO with GAE and a critic for flow-matching policies."""

from typing import Any

from torch import Tensor

from pi_rl.policies.critic import ValueHead
from pi_rl.policies.flow_policy import FlowPolicy
from pi_rl.rl.advantages import two_layer_gae
from pi_rl.rl.buffer import Minibatch
from pi_rl.rl.losses import (
    clipped_value_loss,
    explained_variance_from_moments,
    explained_variance_moments,
)
from pi_rl.rl.reward_normalizer import RewardNormalizer
from pi_rl.rollout.rollout import Rollout
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig
from pi_rl.trainer.flow_trainer import Estimates, FlowTrainer


class FlowPPOTrainer(FlowTrainer):
    """Fine-tunes a flow-matching policy with PPO in simulators (πRL, arXiv 2510.25889, section 4).

    One Hugging Face epoch is one iteration: at its first tick the policy acts for ``rollout_chunks`` chunks in every
    environment, then the usual training loop runs ``update_epochs`` passes over those samples. The VLM is frozen, or
    trained through LoRA with ``peft_config``; a frozen one's prefix keys and values are computed once per observation
    in the rollout and reused in every pass. ``evaluate()`` runs the deterministic (ODE) policy once from each of
    ``eval_episodes`` fixed initial states.

    The arguments are those of :class:`~pi_rl.trainer.flow_trainer.FlowTrainer`.
    """

    algorithm = "PPO"
    config_class = FlowPPOConfig
    args: FlowPPOConfig
    _reward_normalizer: RewardNormalizer | None = None

    def make_critic(self, policy: FlowPolicy) -> ValueHead:
        """The value head that the configuration asks for."""
        return ValueHead(policy, self.args.critic_hidden_sizes, self.args.critic)

    @property
    def critic_learning_rate(self) -> float:
        """Learning rate of the value head."""
        return self.args.critic_learning_rate

    @property
    def reward_normalizer(self) -> RewardNormalizer | None:
        """The running scale of rewards, or None when they are used as they are."""
        if self._reward_normalizer is None and self.args.normalize_rewards:
            self._reward_normalizer = RewardNormalizer(self.args.gamma)
        return self._reward_normalizer

    def estimate(self, rollout: Rollout) -> Estimates:
        """GAE over the chunks, or over all denoising steps in the two-layer MDP (paper section 4.3.1)."""
        args, rewards, metrics = self.args, rollout.rewards, {}
        if self.reward_normalizer is not None:
            self.reward_normalizer.update(rewards, rollout.done, rollout.valid, reduce=self.reduce)
            rewards = rewards / self.reward_normalizer.scale
            metrics["rollout/reward_scale"] = self.reward_normalizer.scale
        assert rollout.values is not None
        assert rollout.next_values is not None
        advantages, returns = two_layer_gae(
            rewards,
            rollout.values,
            rollout.next_values,
            rollout.terminated,
            rollout.done,
            gamma=args.gamma,
            gae_lambda=args.gae_lambda,
            denoising_gamma=args.denoising_gamma,
            denoising_lambda=args.denoising_lambda,
            valid=rollout.valid,
        )
        values = rollout.of_chunks(rollout.values).flatten()
        moments = self.reduce(explained_variance_moments(values, rollout.of_chunks(returns).flatten()))
        metrics["critic/explained_variance"] = explained_variance_from_moments(moments)
        return Estimates(advantages, returns, metrics=metrics)

    def critic_loss(self, values: Tensor | None, batch: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Clipped Huber regression of the returns."""
        assert values is not None
        assert batch.values is not None
        assert batch.returns is not None
        args = self.args
        loss, diagnostics = clipped_value_loss(
            values, batch.values, batch.returns, clip_range=args.value_clip_range, huber_delta=args.huber_delta
        )
        metrics = {"critic/loss": loss, "critic/clip_fraction": diagnostics["value_clip_fraction"]}
        return args.value_loss_coefficient * loss, metrics

    def policy_loss_weight(self) -> float:
        """0 while the critic warms up."""
        return float(self.iteration >= self.args.critic_warmup_iterations)

    def rl_state(self) -> dict[str, Any]:
        """Counters, and the running scale of rewards."""
        state = super().rl_state()
        if self.reward_normalizer is not None:
            state["reward_normalizer"] = self.reward_normalizer.state_dict()
        return state

    def load_rl_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`rl_state` wrote."""
        super().load_rl_state(state)
        if ("reward_normalizer" in state) != self.args.normalize_rewards:
            raise ValueError(
                f"The checkpoint's run had normalize_rewards={str(not self.args.normalize_rewards).lower()}, this one "
                "has the opposite. Resume with the settings of that run."
            )
        if self.reward_normalizer is not None:
            self.reward_normalizer.load_state_dict(state["reward_normalizer"])
