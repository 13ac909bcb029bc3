"""Configuration of :class:`~pi_rl.trainer.flow_grpo_trainer.FlowGRPOTrainer`."""

from dataclasses import dataclass

from pi_rl.arguments import option
from pi_rl.rollout.stages import check_stages
from pi_rl.trainer.flow_config import ROLLOUT, FlowConfig, check_rules

GRPO = "GRPO"


@dataclass
class FlowGRPOConfig(FlowConfig):
    """Arguments of GRPO (πRL, appendix A), on top of :class:`FlowConfig`.

    Raises:
        ValueError: At construction, when a value is out of range; the message says what is allowed.
    """

    group_size: int = option(8, GRPO, "G, episodes from the same initial state that are compared")
    filter_groups: bool = option(
        True,
        GRPO,
        "leave groups out whose episodes all have the same return (all succeed, all fail): they teach nothing",
    )
    auto_reset: bool = option(False, ROLLOUT, "must stay off: groups compare whole episodes, one per environment")

    def _shrink(self) -> None:
        super()._shrink()
        self.filter_groups = False  # after one chunk all returns may be equal, and the update has to be tried

    def _check_ranges(self) -> None:
        super()._check_ranges()
        check_rules(
            self,
            [
                ("group_size", self.group_size >= 2, "at least 2"),
                ("auto_reset", not self.auto_reset, "false: groups compare whole episodes, one per environment"),
            ],
        )
        local = self.num_envs // self._world_size_hint()
        if local % self.group_size:
            lower = max(local // self.group_size, 1) * self.group_size * self._world_size_hint()
            raise ValueError(
                f"num_envs={self.num_envs} over {self._world_size_hint()} process(es) does not divide into groups of "
                f"{self.group_size}; use {lower} or {lower + self.group_size * self._world_size_hint()}."
            )
        check_stages(local, self.group_size, self.pipeline_stages, self.inference_batch_size)
