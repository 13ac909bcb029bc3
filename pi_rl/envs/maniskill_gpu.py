"""ManiSkill on the GPU: all environments in one batched simulation, in the calling process.

What has been run: with one environment on the CPU it gives the same states, images and rewards as the worker processes
do. With several environments on a GPU it has not been run yet (`pytest -m gpu` has the test); a machine without a GPU
cannot simulate more than one environment in a process.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.deferred import DeferredVectorEnv
from pi_rl.envs.failures import FailureLog
from pi_rl.envs.maniskill import MID_GREY, ManiSkillScene, load_maniskill
from pi_rl.envs.maniskill_options import ManiSkillOptions
from pi_rl.envs.maniskill_tasks.table import TASKS
from pi_rl.envs.rewards import TaskReward
from pi_rl.envs.vector_env import (
    IMAGE_KEY,
    STATE_KEY,
    TASK_KEY,
    ChunkResult,
    EnvSpec,
    Observation,
    ResetIds,
    check_idle,
    check_indices,
    check_reset,
)


class ManiSkillBatchedVectorEnv(DeferredVectorEnv):
    """One batched simulation of a ManiSkill task.

    A step always moves all environments. Those whose episode has ended go on with actions of zero and none of it is
    reported; those that are left out while their episode runs are put back afterwards. Initial states are drawn on the
    device: a state id names another state than on the CPU.

    Attributes:
        spec: What a policy must know.
        num_envs: B.

    Args:
        spec: Description of the environment; one task.
        options: The options.
        num_envs: B, at least 1; more than 1 needs a GPU.
        sim_backend: ManiSkill's name of the physics: "physx_cuda", or "physx_cpu" for one environment.
        render_backend: ManiSkill's name of the renderer: "sapien_cuda" or "sapien_cpu".

    Raises:
        ValueError: A count below 1.
        FileNotFoundError: Files of the task are missing.
        RuntimeError: There is no GPU, or SAPIEN cannot draw with it.
    """

    def __init__(
        self,
        spec: EnvSpec,
        options: ManiSkillOptions,
        num_envs: int,
        sim_backend: str = "physx_cuda",
        render_backend: str = "sapien_cuda",
    ):
        super().__init__(spec, num_envs)
        [name] = spec.tasks
        _check_gpu(sim_backend)
        load_maniskill([TASKS[name]], options, "cuda" if "cuda" in render_backend else "cpu")
        self._blind = options.blind
        self._scene: ManiSkillScene | None = ManiSkillScene(
            TASKS[name], options, num_envs, sim_backend, render_backend
        )
        self._reward = TaskReward(options.reward, (num_envs,))
        self._attached = np.zeros(num_envs, bool)
        self._failures = FailureLog(spec, num_envs)
        self._low, self._high = (np.array(bounds, np.float32) for bounds in (spec.action_low, spec.action_high))
        self._ids = np.zeros((num_envs, 2), np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._states = np.zeros((num_envs, spec.state_dim), np.float32)
        self._images = np.zeros((num_envs, *spec.cameras[IMAGE_KEY], 3), np.uint8)

    def reset(self, ids: ResetIds, indices: Sequence[int] | NDArray[np.int64] | None = None) -> Observation:
        """Starts episodes; see `VectorEnv.reset`."""
        scene = self._open()
        array, slots = check_reset(ids, indices, self.num_envs, self.spec)
        check_idle(slots, self._busy)
        self._running[slots] = False
        with scene.kept(np.flatnonzero(self._running).tolist()):
            attached = scene.reset(slots.tolist(), array[:, 1].tolist()).cpu().numpy()
        self._attached[slots] = attached[slots]
        self._reward.reset(attached[slots], slots)
        self._ids[slots], self._steps[slots], self._running[slots] = array, 0, True
        self._observe(slots, slots)
        return self._observation()

    def _check_open(self) -> None:
        self._open()

    def _simulate(self, going: NDArray[np.bool_], checked: NDArray[np.float32]) -> ChunkResult:
        scene = self._open()
        asked = going.copy()
        commands = np.where(going[:, None, None], np.clip(checked, self._low, self._high), np.float32(0))
        rewards = np.zeros(checked.shape[:2], np.float32)
        terminated, truncated, success = (np.zeros(self.num_envs, bool) for _ in range(3))
        before = self._steps.copy()
        with scene.kept(np.flatnonzero(self._running & ~going).tolist() if going.any() else []):
            for step in range(checked.shape[1]):
                if not going.any():
                    break
                solved, over = self._advance(commands[:, step], going, rewards[:, step])
                cut = going & ~over & (self._steps >= self.spec.max_episode_steps)
                success |= solved
                terminated |= over
                truncated |= cut
                going &= ~(over | cut)
                if (over | cut).any():
                    self._observe(np.flatnonzero(over | cut), np.flatnonzero(cut))
            self._observe(np.flatnonzero(going), np.flatnonzero(going))
        return self._result(asked, rewards, terminated, truncated, success, self._steps - before)

    def _advance(
        self, commands: NDArray[np.float32], going: NDArray[np.bool_], rewards: NDArray[np.float32]
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Executes one action (B, A) and writes the rewards (B,); returns who is solved, and whose episode is over."""
        import torch

        # one transfer from the device for all three
        solved, failed, attached = torch.stack(self._open().step(commands)).cpu().numpy()
        solved, failed = solved & going, failed & going
        self._attached[going] = attached[going]
        rewards[:] = self._reward.step(solved, self._attached)
        self._steps[going] += 1
        return solved, solved | failed

    def _result(
        self,
        asked: NDArray[np.bool_],
        rewards: NDArray[np.float32],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        success: NDArray[np.bool_],
        steps: NDArray[np.int64],
    ) -> ChunkResult:
        """The outcome, without what came from environments whose state is not finite."""
        failed = asked & ~np.isfinite(self._states).all(1)
        for flags in (terminated, truncated, success):
            flags &= ~failed
        rewards[failed] = 0.0
        problems = {
            int(row): f"the state is not finite: {self._states[row].tolist()}" for row in np.flatnonzero(failed)
        }
        self._states[failed] = 0.0
        self._running &= ~(terminated | truncated | failed)
        self._failures.note(problems, self._ids, terminated | truncated)
        return ChunkResult(self._observation(), rewards, terminated, truncated, success, steps, failed)

    def _observe(self, rows: NDArray[np.int64], drawn: NDArray[np.int64]) -> None:
        """Notes the present state of some environments, and the image of some."""
        scene = self._open()
        if len(rows):
            self._states[rows] = scene.states().cpu().numpy()[rows]
        if len(drawn):
            self._images[drawn] = MID_GREY if self._blind else scene.images().cpu().numpy()[drawn]

    def _observation(self) -> Observation:
        return {
            IMAGE_KEY: self._images.copy(),
            STATE_KEY: self._states.copy(),
            TASK_KEY: [self.spec.instruction(task, state_id) for task, state_id in self._ids.tolist()],
        }

    def render(
        self, indices: Sequence[int] | NDArray[np.int64], height: int, width: int, *, show_arm: bool = True
    ) -> NDArray[np.uint8]:
        """Draws video frames; see `VectorEnv.render`."""
        slots = check_indices(indices, self.num_envs)
        return self._open().frames(height, width, show_arm=show_arm).cpu().numpy()[slots]

    def close(self) -> None:
        """Frees the simulation; calling it again does nothing."""
        if self._scene is not None:
            self._scene.close()
            self._scene = None

    def _open(self) -> ManiSkillScene:
        if self._scene is None:
            raise RuntimeError("this environment was closed; make a new one")
        return self._scene


def _check_gpu(sim_backend: str) -> None:
    import torch

    if "cuda" in sim_backend and not torch.cuda.is_available():
        raise RuntimeError(
            "ManiSkill's batched simulation (backend: gpu) needs an NVIDIA GPU, and PyTorch finds none; leave the "
            "option backend at 'cpu' to simulate in worker processes"
        )
