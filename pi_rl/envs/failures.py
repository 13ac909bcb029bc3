"""Environments that break down: each is reported, its episode is dropped, and the others go on."""

import logging
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.vector_env import EnvSpec

logger = logging.getLogger(__name__)
MAX_FAILURES_IN_A_ROW = 3


class FailureLog:
    """Counts how often in a row each environment broke down.

    Attributes:
        total: Episodes that were lost.

    Args:
        spec: Description of the environments.
        num_envs: B.
    """

    def __init__(self, spec: EnvSpec, num_envs: int):
        self._spec = spec
        self._in_a_row = np.zeros(num_envs, np.int64)
        self.total = 0

    def note(
        self,
        problems: Mapping[int, str],
        ids: NDArray[np.int64],
        ended: NDArray[np.bool_],
        not_its_own: Collection[int] = (),
    ) -> None:
        """Notes the outcome of a chunk.

        Args:
            problems: What went wrong, by environment.
            ids: (B, 2) task index and state id of the running episodes.
            ended: bool (B,), environments whose episode came to its end.
            not_its_own: Environments whose episode was lost with the process that they share with others: that tells
                nothing about this one, so it is no failure in a row.

        Raises:
            RuntimeError: `MAX_FAILURES_IN_A_ROW` episodes of one environment broke down with none between that ended.
        """
        self._in_a_row[ended] = 0
        for slot, problem in problems.items():
            self.total += 1
            self._in_a_row[slot] += slot not in not_its_own
            task, state_id = ids[slot].tolist()
            where = f"environment {slot} ({self._spec.tasks[task]}, state {state_id})"
            if self._in_a_row[slot] >= MAX_FAILURES_IN_A_ROW:
                raise RuntimeError(
                    f"{where} broke down in {MAX_FAILURES_IN_A_ROW} episodes in a row, the last time: {problem}. "
                    "Something is wrong with the simulator or with the actions it is given; nothing was trained on it."
                )
            logger.warning(f"{where} broke down: {problem}. Its episode is dropped, the others go on.")
