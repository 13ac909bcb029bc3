"""Configuration of :class:`~pi_rl.trainer.flow_ppo_trainer.FlowPPOTrainer`."""

from dataclasses import dataclass

from pi_rl.arguments import option
from pi_rl.policies.critic import CRITICS
from pi_rl.trainer.flow_config import ROLLOUT, FlowConfig, check_rules

PPO = "PPO"


@dataclass
class FlowPPOConfig(FlowConfig):
    """Arguments of PPO with GAE and a critic (πRL, sections 4.3.1 and 4.3.2), on top of :class:`FlowConfig`.

    Raises:
        ValueError: At construction, when a value is out of range; the message says what is allowed.
    """

    gamma: float = option(0.99, PPO, "discount per chunk")
    gae_lambda: float = option(0.95, PPO, "λ of GAE, per chunk")
    denoising_gamma: float = option(1.0, PPO, "two_layer: discount per denoising step")
    denoising_lambda: float = option(1.0, PPO, "two_layer: λ of GAE per denoising step")
    critic: str = option(
        "vlm", PPO, "vlm: value from the VLM's output (and π0's state); expert: from the action expert's (Eq. 16)"
    )
    critic_hidden_sizes: list[int] = option(
        [1024, 512, 256], PPO, "hidden layers of the value head; no numbers at all: one layer"
    )
    critic_learning_rate: float = option(1e-4, PPO, "learning rate of the value head")
    critic_warmup_iterations: int = option(0, PPO, "first iterations in which the critic alone is trained")
    value_clip_range: float | None = option(0.2, PPO, "clip of the value change; none switches it off")
    huber_delta: float | None = option(10.0, PPO, "threshold of the Huber value loss; none: squared error")
    value_loss_coefficient: float = option(1.0, PPO, "weight of the value loss")
    normalize_rewards: bool = option(False, ROLLOUT, "divide rewards by the running std of the discounted return")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        rules = [
            *((name, 0 <= getattr(self, name) <= 1, "between 0 and 1") for name in ("gamma", "gae_lambda")),
            *((name, 0 <= getattr(self, name) <= 1, "between 0 and 1") for name in _DENOISING),
            ("critic", self.critic in CRITICS, " or ".join(CRITICS)),
            ("critic_learning_rate", self.critic_learning_rate > 0, "above 0"),
            (
                "critic_warmup_iterations",
                0 <= self.critic_warmup_iterations < max(2, self.num_iterations),
                f"0 or more and below num_iterations={self.num_iterations}",
            ),
            ("value_loss_coefficient", self.value_loss_coefficient > 0, "above 0: GAE needs a trained critic"),
            *(
                (name, getattr(self, name) is None or getattr(self, name) > 0, "above 0, or none")
                for name in _OPTIONAL
            ),
        ]
        check_rules(self, rules)
        changed = [name for name in _DENOISING if getattr(self, name) != 1]
        if changed and self.sampler().mdp != "two_layer":
            raise ValueError(
                f"{changed[0]}={getattr(self, changed[0])} has no effect with mdp {self.sampler().mdp!r}, where a "
                "chunk is one transition; leave it out, or set mdp=two_layer."
            )


_DENOISING = ("denoising_gamma", "denoising_lambda")
_OPTIONAL = ("value_clip_range", "huber_delta")
