"""LeRobot's MetaWorld environment in a state of ours: its own reset is no function of its seed.

Importing this module costs 15 s: it imports LeRobot's environments.
"""

from typing import Any

import mujoco
import numpy as np
from lerobot.envs.metaworld import MetaworldEnv

from pi_rl.envs.metaworld import PLACEMENT, MetaWorldSim


class MetaworldEnvInState(MetaworldEnv):
    """Resets to the present state of a simulator of ours; all that follows is LeRobot's.

    Args:
        sim: A simulator after its reset.
        max_steps: Steps after which LeRobot's evaluation stops.
    """

    def __init__(self, sim: MetaWorldSim, max_steps: int = 500):
        super().__init__(task=sim.task, obs_type="pixels_agent_pos")
        self._sim = sim
        self._max_episode_steps = max_steps

    def reset(self, seed: int | None = None, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Puts placement and physics of `sim` into LeRobot's model; returns the observation."""
        super().reset(seed=seed)
        env, ours = self._env, self._sim.env
        self._sim._scene.activate(self._sim)
        for field in PLACEMENT:
            getattr(env.model, field)[:] = getattr(ours.model, field)
        whole = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.zeros(mujoco.mj_stateSize(ours.model, whole))
        mujoco.mj_getState(ours.model, ours.data, state, whole)
        mujoco.mj_setState(env.model, env.data, state, whole)
        mujoco.mj_forward(env.model, env.data)
        return self.observe(), {"is_success": False}

    def observe(self) -> Any:
        """LeRobot's observation, drawn in its own context, which Gymnasium does not make current by itself."""
        viewer = self._env.mujoco_renderer._get_viewer("rgb_array")
        viewer.make_context_current()
        return self._format_raw_obs(self._env._get_obs())
