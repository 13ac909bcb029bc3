"""ManiSkill on the CPU: one simulator per environment, pictures only when they are asked for.

ManiSkill, SAPIEN and torch are imported when the first simulator is made, not with this module.
"""

import importlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.maniskill_options import ManiSkillOptions, check_assets
from pi_rl.envs.maniskill_tasks.table import TASKS, ManiSkillTask
from pi_rl.envs.rewards import TaskReward
from pi_rl.envs.simulator import Images
from pi_rl.envs.vulkan import explain

MID_GREY = 127
MAX_SEED = 2**32
PANDA_OPENING = 0.08
"""Metres between the fingers of the Panda's open hand."""


def resolve(name: str) -> Any:
    """Imports what "module:name" stands for."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def hand_state(env: Any) -> Any:
    """State of a Panda: hand x, y, z in metres and its opening in [0, 1].

    Args:
        env: ManiSkill environment with one Panda.

    Returns:
        torch float32 (B, 4).
    """
    import torch

    opening = env.agent.robot.get_qpos()[:, -2:].sum(1, keepdim=True) / PANDA_OPENING
    return torch.cat([env.agent.tcp.pose.p, opening], dim=1).float()


def hand_and_goal_state(env: Any) -> Any:
    """`hand_state` followed by x, y, z of the goal in metres, which no image shows: torch float32 (B, 7)."""
    import torch

    return torch.cat([hand_state(env), env.goal_site.pose.p], dim=1).float()


def _no_observation(*_: Any, **__: Any) -> dict[str, Any]:
    """In place of `get_obs`, which would draw every camera at every step and reset."""
    return {}


class ManiSkillScene:
    """A ManiSkill environment of one task, single or batched, whose resets depend on nothing but the state id.

    Attributes:
        env: The environment itself, without wrappers.
        task: What is known of it.

    Args:
        task: The task.
        options: The options.
        num_envs: B; more than 1 needs a GPU.
        sim_backend: ManiSkill's name of the physics.
        render_backend: ManiSkill's name of the renderer.
    """

    def __init__(
        self,
        task: ManiSkillTask,
        options: ManiSkillOptions,
        num_envs: int = 1,
        sim_backend: str = "physx_cpu",
        render_backend: str = "sapien_cpu",
    ):
        self.task = task
        self._options = options
        self._num_envs = num_envs
        self._kwargs = options.kwargs(task)
        self._state = resolve(task.state)
        self._variant: Any = None
        self._bodies: list[Any] | None = None
        self._bodies_of: Any = None
        self._drawn_scene: Any = None
        self.env = self._make(sim_backend, render_backend)
        self.env.get_obs = _no_observation
        self._show_arm(False)

    def _make(self, sim_backend: str, render_backend: str) -> Any:
        import gymnasium
        import mani_skill.envs  # noqa: F401  (registers its tasks)

        if self.task.module is not None:
            importlib.import_module(self.task.module)
        env = gymnasium.make(
            self.task.env_id,
            num_envs=self._num_envs,
            obs_mode=self.task.obs_mode,
            reward_mode="none",
            control_mode=self.task.control_mode,
            sim_backend=sim_backend,
            render_backend=render_backend,
            sensor_configs=self._camera(),
            **self._kwargs,
        )
        return env.unwrapped

    def _camera(self) -> dict[str, Any]:
        """The policy's camera under the options."""
        from mani_skill.utils.sapien_utils import look_at

        if self.task.resampled:
            return {}
        options = self._options
        height, width = options.size(self.task)
        camera: dict[str, Any] = {"height": height, "width": width}
        if options.camera_pos is not None:
            camera["pose"] = look_at(options.camera_pos, options.camera_lookat)
        if options.camera_fovy is not None:
            camera["fov"] = math.radians(options.camera_fovy)
        return {self.task.camera: camera}

    def reset(self, rows: Sequence[int], state_ids: Sequence[int]) -> Any:
        """Starts episodes.

        Of a batch one after the other: ManiSkill draws all rows of a common reset from the first one's seed. Tasks
        that draw nothing (`ManiSkillTask.seedless`) start all of them at once.

        Args:
            rows: Environments, of B.
            state_ids: Their state ids.

        Returns:
            bool (B,), torch, whether an object is attached to the gripper; zeros where the task knows no such thing.
        """
        import torch

        info: dict[str, Any] = {}
        together = len(rows) if self.task.seedless and rows else 1
        for start in range(0, len(rows), together):
            states = list(state_ids[start : start + together])
            seed = [states[0] % MAX_SEED]
            options = {"episode_id": torch.tensor(states, device=self.env.device)}
            if self._num_envs > 1:
                options["env_idx"] = torch.tensor(rows[start : start + together], device=self.env.device)
            else:
                self._rebuild(seed, options, states[0])
                self._forget_contacts()
            _, info = self.env.reset(seed=seed, options=options)
            if info["reconfigure"]:
                self._show_arm(False)
        return self._attached(info)

    def _rebuild(self, seed: list[int], options: Mapping[str, Any], state_id: int) -> None:
        """Builds the scene anew if the episode needs another; the reset that follows is then as in an old one."""
        variant = None if self.task.variant is None else self.task.variant(state_id, self._kwargs)
        if variant != self._variant:
            self._variant = None  # in case of an error in the middle
            self.env.reset(seed=seed, options={**options, "reconfigure": True})
            self._variant = variant
            self._show_arm(False)

    def _forget_contacts(self) -> None:
        """Moves all bodies into a new physics scene.

        PhysX numbers contacts by a free list, so what touched in one episode decides in which order they are solved
        in the next; and bodies remember for how long they have been at rest. Neither is part of the state that a reset
        sets, and the results differ: of 20 episodes of PushCube that were repeated, 11 took another course.
        """
        from sapien import Scene, physx

        if self.env.gpu_sim_enabled:
            return
        scene = self.env.scene
        old = scene.sub_scenes[0]
        if self._bodies is None or self._bodies_of is not scene:
            self._bodies_of, self._drawn_scene = scene, old  # cameras and lights stay there
            self._bodies = [one for one in old.entities if _has_physics(one)]
        self.env._set_scene_config()  # a setting of the process; another simulator may have changed it
        new = Scene([physx.PhysxCpuSystem(), old.render_system])
        for body in self._bodies:
            old.remove_entity(body)
        for body in self._bodies:
            new.add_entity(body)
        new.physx_system.timestep = old.physx_system.timestep
        scene.sub_scenes[0], scene.px = new, new.physx_system
        for component in new.physx_system.rigid_dynamic_components:
            if not component.kinematic:
                component.put_to_sleep()
                component.wake_up()

    def _attached(self, info: Mapping[str, Any]) -> Any:
        import torch

        if self.task.attached is None:
            return torch.zeros(self._num_envs, dtype=torch.bool, device=self.env.device)
        return info[self.task.attached].bool()

    def step(self, actions: NDArray[np.float32]) -> tuple[Any, Any, Any]:
        """Executes one action (B, A) in all environments.

        Returns:
            Three torch bool (B,): solved now; failed for good (where the task knows that); object attached.
        """
        import torch

        _, _, _, _, info = self.env.step(torch.as_tensor(actions, device=self.env.device))
        solved = info["success"].bool()
        return solved, info["fail"].bool() if "fail" in info else torch.zeros_like(solved), self._attached(info)

    @contextmanager
    def kept(self, rows: Sequence[int]) -> Iterator[None]:
        """Puts environments back afterwards to where they were: a batch is only ever simulated as a whole.

        Args:
            rows: Environments, of B.
        """
        import torch

        if len(rows) == 0:
            yield
            return
        index = torch.as_tensor(rows, device=self.env.device)
        physics = _cloned(self.env.scene.get_sim_state())
        controller = _cloned(self.env.agent.get_controller_state())
        yield
        self.env.set_state_dict(_rows_of(physics, index), index)
        now = self.env.agent.get_controller_state()
        if now:
            self.env.agent.set_controller_state(_merged(now, controller, index))

    def states(self) -> Any:
        """`observation.state`, torch float32 (B, state_dim)."""
        return self._state(self.env)

    def images(self) -> Any:
        """What the policy's camera sees: torch uint8 (B, height, width, 3)."""
        return resized(self.env.get_sensor_images()[self.task.camera]["rgb"], *self._options.size(self.task))

    def frames(self, height: int, width: int, *, show_arm: bool) -> Any:
        """Draws frames for videos, cut to the wanted shape: torch uint8 (B, height, width, 3)."""
        self._show_arm(show_arm)
        if self.task.video_camera is None:
            drawn = self.env.get_sensor_images()[self.task.camera]["rgb"]
        else:
            drawn = self.env.render_rgb_array(self.task.video_camera)
        self._show_arm(False)
        return resized(_cut(drawn, height / width), height, width)

    def _show_arm(self, shown: bool) -> None:
        """With the option `hide_arm`, draws the links of the robot that are not its hand or leaves them out."""
        if not self._options.hide_arm:
            return
        from sapien.render import RenderBodyComponent

        for link in self.env.agent.robot.links:
            for one in link._objs if link.name not in self.task.hand else ():
                body = one.entity.find_component_by_type(RenderBodyComponent)
                if body is not None:
                    body.visibility = float(shown)

    def close(self) -> None:
        """Frees the scene."""
        self._bodies = self._bodies_of = self._drawn_scene = None
        self.env.close()


def _has_physics(entity: Any) -> bool:
    from sapien.physx import PhysxBaseComponent

    return any(isinstance(component, PhysxBaseComponent) for component in entity.components)


def _cloned(tree: Any) -> Any:
    return {key: _cloned(value) for key, value in tree.items()} if isinstance(tree, dict) else tree.clone()


def _rows_of(tree: Any, index: Any) -> Any:
    return {key: _rows_of(value, index) for key, value in tree.items()} if isinstance(tree, dict) else tree[index]


def _merged(tree: Any, other: Any, index: Any) -> Any:
    """The tensors of `tree` with those rows taken from `other`."""
    if isinstance(tree, dict):
        return {key: _merged(value, other[key], index) for key, value in tree.items()}
    return tree.index_copy(0, index, other[index])


def _cut(images: Any, aspect: float) -> Any:
    """The middle of images (B, h, w, 3) that has `aspect` = height / width."""
    height, width = images.shape[1:3]
    inner_height, inner_width = min(height, round(width * aspect)), min(width, round(height / aspect))
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    return images[:, top : top + inner_height, left : left + inner_width]


def resized(images: Any, height: int, width: int) -> Any:
    """Scales images (B, h, w, 3), torch uint8, each pixel the weighted mean of those it covers."""
    import torch

    if tuple(images.shape[1:3]) == (height, width):
        return images
    channels_first = images.permute(0, 3, 1, 2).float()
    scaled = torch.nn.functional.interpolate(channels_first, (height, width), mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


class ManiSkillSim:
    """One simulator of one task.

    Attributes:
        scene: The simulation.
        steps: Steps since the reset.
        reward: Of the last step, under the option `reward`.
        over: Whether the episode ended unsolved: the task tells that it cannot be solved any more.
    """

    def __init__(self, task: ManiSkillTask, options: ManiSkillOptions):
        """Makes the simulator; `reset` must come before anything else."""
        self.scene = ManiSkillScene(task, options)
        self._blind = options.blind
        self._reward = TaskReward(options.reward)
        self._low, self._high = (np.array(bounds, np.float32) for bounds in (task.action_low, task.action_high))
        self._expert: Any = None
        self.steps = 0
        self.reward = 0.0
        self.over = False

    def reset(self, state_id: int) -> None:
        """Starts the episode `state_id`; the result is the same to the bit whatever was simulated before."""
        attached = self.scene.reset([0], [state_id])
        self._reward.reset(attached.item())
        self._expert = None
        self.steps, self.reward, self.over = 0, 0.0, False

    def step(self, action: NDArray[np.float32]) -> bool:
        """Executes one action (A,), clipped to the bounds; returns whether the task is solved now."""
        solved, failed, attached = self.scene.step(np.clip(action, self._low, self._high)[None])
        self.steps += 1
        self.over = bool(failed)
        self.reward = float(self._reward.step(solved.item(), attached.item()))
        return bool(solved)

    @property
    def state(self) -> NDArray[np.float32]:
        """`observation.state`, float32 (state_dim,)."""
        return self.scene.states()[0].numpy()

    def draw(self, images: Images) -> None:
        """Writes the policy's image."""
        for image in images.values():
            image[...] = MID_GREY if self._blind else self.scene.images()[0].numpy()

    def frame(self, height: int, width: int, *, show_arm: bool) -> NDArray[np.uint8]:
        """Draws a frame for a video, also when the policy is blind.

        Args:
            height: Pixels.
            width: Pixels.
            show_arm: Draw the arm also where the option `hide_arm` leaves it out of the policy's images.

        Returns:
            uint8 (height, width, 3).
        """
        return self.scene.frames(height, width, show_arm=show_arm)[0].numpy()

    def expert_action(self) -> NDArray[np.float32]:
        """The scripted expert's action, float32 (A,); the expert starts afresh with each episode."""
        if self._expert is None:
            expert = self.scene.task.expert
            if expert is None:
                able = ", ".join(key for key, task in TASKS.items() if task.expert is not None)
                raise ValueError(f"{self.scene.task.env_id} has no scripted expert; those that have: {able}")
            self._expert = resolve(expert)(self.scene.env)
        return np.clip(np.asarray(self._expert(), np.float32), self._low, self._high)

    def close(self) -> None:
        """Frees the scene."""
        self.scene.close()


class ManiSkillBackend:
    """All tasks of a vector environment inside one worker process.

    Simulators of a process share meshes, textures and shaders: the first costs 0.3 to 0.4 GB beside the 0.7 GB of the
    imports, and 7 s; each further one of the same task 3 MB and 0.2 s (PickCube) or 26 MB and 0.8 s (SIMPLER).

    Attributes:
        max_idle: Simulators kept beside those in use.
    """

    max_idle = 16

    def __init__(self, tasks: Sequence[str], options: Mapping[str, Any]):
        """Prepares.

        Args:
            tasks: Task names; indices below point into this.
            options: Fields of `ManiSkillOptions`.

        Raises:
            FileNotFoundError: Files of a task are missing; the message says where they come from.
            RuntimeError: SAPIEN finds no Vulkan it can draw with; the message says what to install.
        """
        self._options = ManiSkillOptions(**options)
        self._tasks = [TASKS[task] for task in tasks]
        load_maniskill(self._tasks, self._options)

    def make(self, task: int) -> ManiSkillSim:
        """Makes one more simulator of the task with that index."""
        return ManiSkillSim(self._tasks[task], self._options)

    def expert_action(self, sim: ManiSkillSim) -> NDArray[np.float32]:
        """The scripted expert's action, float32 (A,)."""
        return sim.expert_action()

    def close(self) -> None:
        """Nothing is shared that would have to be freed."""


def load_maniskill(tasks: Sequence[ManiSkillTask], options: ManiSkillOptions, device: str = "cpu") -> None:
    """Checks that the tasks' files are there and that SAPIEN can draw, and imports ManiSkill.

    Args:
        tasks: The tasks.
        options: The options.
        device: What will draw, one of `pi_rl.envs.vulkan.DEVICES`.

    Raises:
        FileNotFoundError: Files of a task are missing; the message says where they come from.
        RuntimeError: SAPIEN finds no Vulkan it can draw with, with what to install; or ManiSkill was imported before
            with another folder of assets, which it reads but once.
    """
    check_assets(tasks, options.asset_folder)
    os.environ["MS_ASSET_DIR"] = str(options.asset_folder)
    import mani_skill
    import sapien

    if mani_skill.ASSET_DIR.parent != options.asset_folder:
        raise RuntimeError(
            f"ManiSkill was imported in this process with its assets in {mani_skill.ASSET_DIR.parent} and cannot "
            f"change to {options.asset_folder}; set MS_ASSET_DIR before the start"
        )
    try:
        sapien.render.RenderSystem(sapien.Device(device))
    except RuntimeError as error:
        raise RuntimeError(explain(str(error), device)) from error
