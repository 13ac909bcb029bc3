"""The process that simulates: takes commands over a socket, exchanges arrays over shared memory.

`pi_rl.envs.workers` starts it as `python -m pi_rl.envs.worker SOCKET_FD MEMORY_FD`. It imports numpy and the
simulator, never torch, transformers or lerobot.
"""

import faulthandler
import importlib
import itertools
import mmap
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.simulator import Backend, Images, Sim
from pi_rl.envs.vector_env import ExpertEpisode, ExpertRequest

BACKENDS = {
    "calvin": "pi_rl.envs.calvin:CalvinBackend",
    "libero": "pi_rl.envs.libero:LiberoBackend",
    "gymnasium": "pi_rl.envs.gymnasium_images:GymnasiumBackend",
    "maniskill": "pi_rl.envs.maniskill:ManiSkillBackend",
    "metaworld": "pi_rl.envs.metaworld:MetaWorldBackend",
}
"""Simulator to its `Backend`; in its place, "module:Class" of any other backend that the worker can import."""
PARENT_CHECK_S = 2.0
_ALIGNMENT = 64


@dataclass(frozen=True)
class Layout:
    """Sizes of the shared arrays.

    Attributes:
        num_envs: B.
        max_chunk: Largest number of actions in a chunk.
        action_dim: A.
        state_dim: Size of the state.
        cameras: Camera key to image (height, width) in pixels.
    """

    num_envs: int
    max_chunk: int
    action_dim: int
    state_dim: int
    cameras: Mapping[str, tuple[int, int]]

    def fields(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Returns shape and dtype of each shared array; the first axis is the environment."""
        envs = self.num_envs
        return {
            "reset_ids": ((envs, 2), np.int64),
            "actions": ((envs, self.max_chunk, self.action_dim), np.float32),
            "rewards": ((envs, self.max_chunk), np.float32),
            "terminated": ((envs,), np.bool_),
            "truncated": ((envs,), np.bool_),
            "success": ((envs,), np.bool_),
            "failed": ((envs,), np.bool_),
            "steps": ((envs,), np.int64),
            "pulse": ((envs,), np.int64),  # by worker, of which there are never more than environments
            "states": ((envs, self.state_dim), np.float32),
            **{camera: ((envs, height, width, 3), np.uint8) for camera, (height, width) in self.cameras.items()},
        }

    def _offsets(self) -> tuple[dict[str, int], int]:
        offsets, end = {}, 0
        for name, (shape, dtype) in self.fields().items():
            offsets[name] = end
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return offsets, end

    def nbytes(self) -> int:
        """Returns the size of the shared memory in bytes."""
        return self._offsets()[1]

    def arrays(self, memory: mmap.mmap) -> dict[str, NDArray[Any]]:
        """Returns the arrays as views into the memory."""
        offsets, _ = self._offsets()
        return {
            name: np.ndarray(shape, dtype, buffer=memory, offset=offsets[name])
            for name, (shape, dtype) in self.fields().items()
        }


class Worker:
    """Simulators of one process: some of the environments, and one for scripted experts."""

    def __init__(
        self, backend: Backend, layout: Layout, arrays: dict[str, NDArray[Any]], max_episode_steps: int, index: int
    ):
        """Starts without simulators; resets make them.

        Args:
            backend: Makes simulators.
            layout: Sizes of the arrays.
            arrays: Shared arrays of the layout.
            max_episode_steps: Steps after which an episode is truncated.
            index: The worker's number, from 0.
        """
        self._backend = backend
        self._cameras = layout.cameras
        self._arrays = arrays
        self._max_episode_steps = max_episode_steps
        self._index = index
        self._slots: dict[int, tuple[int, Sim]] = {}  # environment -> task index, simulator
        self._idle: list[tuple[int, Sim]] = []  # task index, simulator; the least recently used first
        self._expert: tuple[int, Sim] | None = None  # task index, simulator of the last expert
        self._made = 0
        self.commands: dict[str, Callable[..., Any]] = {
            "reset": self.reset,
            "step_chunk": self.step_chunk,
            "release": self.release,
            "render": self.render,
            "rollout_expert": self.rollout_expert,
            "report": self.report,
        }

    def _simulator(self, slot: int, task: int) -> Sim:
        """The environment's simulator if it is of that task, else an idle or a new one."""
        current = self._slots.get(slot)
        if current is not None and current[0] == task:
            return current[1]
        if current is not None:
            self._idle.append(self._slots.pop(slot))
        sim = self._take_idle(task) or self._make(task)
        self._slots[slot] = (task, sim)
        self._bound_idle()
        return sim

    def _expert_simulator(self, task: int) -> Sim:
        """The last expert's simulator if it is of that task, else an idle or a new one."""
        if self._expert is None or self._expert[0] != task:
            if self._expert is not None:
                self._idle.append(self._expert)
                self._expert = None
            self._expert = (task, self._take_idle(task) or self._make(task))
            self._bound_idle()
        return self._expert[1]

    def _bound_idle(self) -> None:
        while len(self._idle) > self._backend.max_idle:
            self._idle.pop(0)[1].close()

    def _take_idle(self, task: int) -> Sim | None:
        for position, (of_task, sim) in enumerate(self._idle):
            if of_task == task:
                del self._idle[position]
                return sim
        return None

    def _make(self, task: int) -> Sim:
        self._made += 1
        sim = self._backend.make(task)
        self._beat()
        return sim

    def _beat(self) -> None:
        """Tells the parent that one more call of a simulator has returned."""
        self._arrays["pulse"][self._index] += 1

    def reset(self, slots: list[int]) -> dict[int, str]:
        """Resets environments to the shared `reset_ids` and writes their first observations.

        Returns:
            What went wrong, by environment: of those that cannot start, not even with a new simulator.
        """
        problems: dict[int, str] = {}
        for slot in slots:
            task, state_id = (int(number) for number in self._arrays["reset_ids"][slot])
            try:
                self._start(slot, task, state_id)
            except (ValueError, FileNotFoundError):
                raise  # what was asked for cannot be had, with another simulator neither
            except Exception:  # the last episode may have broken the simulator
                traceback.print_exc()
                self._close(self._slots.pop(slot, (task, None))[1])
                try:
                    self._start(slot, task, state_id)
                except Exception as error:
                    traceback.print_exc()
                    problems[slot] = f"it cannot start: {type(error).__name__}: {error}"
                    self._close(self._slots.pop(slot, (task, None))[1])
        return problems

    def _start(self, slot: int, task: int, state_id: int) -> None:
        sim = self._simulator(slot, task)
        sim.reset(state_id)
        self._beat()
        self._observe(slot, sim)

    def _observe(self, slot: int, sim: Sim, *, draw: bool = True) -> None:
        state = sim.state
        if not np.isfinite(state).all():
            raise FloatingPointError(f"the state is not finite: {state.tolist()}")
        self._arrays["states"][slot] = state
        if draw:
            sim.draw({camera: self._arrays[camera][slot] for camera in self._cameras})
        self._beat()

    def step_chunk(self, slots: list[int], chunk: int) -> dict[int, str]:
        """Executes the first `chunk` shared actions of each of the environments `slots`.

        Returns:
            What went wrong, by environment. Its simulator is given up: the next reset makes another.
        """
        problems: dict[int, str] = {}
        arrays = self._arrays
        for slot in slots:
            arrays["rewards"][slot, :chunk] = 0.0
            for flag in ("terminated", "truncated", "success", "failed"):
                arrays[flag][slot] = False
            arrays["steps"][slot] = 0
            try:
                self._step_environment(slot, chunk)
            except Exception as error:  # one simulator must not take the others with it; the parent is told
                traceback.print_exc()
                problems[slot] = f"{type(error).__name__}: {error}"
                self._give_up(slot)
        return problems

    def release(self, slots: list[int]) -> None:
        """Gives up the simulators of environments that another process may simulate from now on."""
        for slot in slots:
            if slot in self._slots:
                self._close(self._slots.pop(slot)[1])

    def _step_environment(self, slot: int, chunk: int) -> None:
        """Executes a chunk in one environment, up to the end of its episode."""
        arrays, sim = self._arrays, self._slots[slot][1]
        solved = over = cut = False
        steps = 0
        while steps < chunk and not (over or cut):
            solved = sim.step(arrays["actions"][slot, steps])
            self._beat()
            over = solved or getattr(sim, "over", False)
            cut = sim.steps >= self._max_episode_steps or getattr(sim, "cut", False)
            if not np.isfinite(sim.reward):
                raise FloatingPointError(f"the reward of step {sim.steps} is {sim.reward}")
            arrays["rewards"][slot, steps] = sim.reward
            steps += 1
        arrays["steps"][slot] = steps
        arrays["terminated"][slot], arrays["success"][slot] = over, solved
        arrays["truncated"][slot] = cut and not over
        self._observe(slot, sim, draw=not over)  # nobody needs the image of a finished task, and images cost most

    def _give_up(self, slot: int) -> None:
        arrays = self._arrays
        arrays["rewards"][slot] = 0.0
        for flag in ("terminated", "truncated", "success"):
            arrays[flag][slot] = False
        arrays["failed"][slot] = True
        self._close(self._slots.pop(slot)[1])

    def _close(self, sim: Sim | None) -> None:
        """Closes a simulator that may be broken: what closing it raises tells nothing more."""
        try:
            if sim is not None:
                sim.close()
        except Exception:
            traceback.print_exc()

    def render(self, slots: list[int], height: int, width: int, show_arm: bool) -> dict[int, NDArray[np.uint8]]:
        """Draws video frames of environments that were reset before."""
        frames = {}
        for slot in slots:
            frames[slot] = self._slots[slot][1].frame(height, width, show_arm=show_arm)
            self._beat()
        return frames

    def rollout_expert(self, request: ExpertRequest) -> ExpertEpisode:
        """Runs a scripted expert once without images, and again with images if it succeeded and they are wanted.

        Most noisy attempts fail and an image costs as much as ten steps, so only kept episodes are drawn; resets and
        physics are deterministic, so the second run is the first one.
        """
        task = int(request.task)
        sim = self._expert_simulator(task)
        actions: list[NDArray[np.float32]] = []
        states: list[NDArray[np.float32]] = []
        try:
            success = self._act_as_expert(sim, request, actions, states)
        except (ValueError, FileNotFoundError):
            raise
        except Exception:  # one attempt of many: it failed, and so did its simulator
            traceback.print_exc()
            success, self._expert = False, None
            self._close(sim)
        images = self._replay(sim, request.state_id, actions) if success and request.frames else None
        length = len(actions)
        return ExpertEpisode(
            task=task,
            state_id=request.state_id,
            success=success,
            actions=np.array(actions, np.float32).reshape(length, self._arrays["actions"].shape[2]),
            states=np.array(states, np.float32).reshape(length, self._arrays["states"].shape[1]),
            images=images,
        )

    def _act_as_expert(
        self, sim: Sim, request: ExpertRequest, actions: list[NDArray[np.float32]], states: list[NDArray[np.float32]]
    ) -> bool:
        """Runs an episode, adds its actions and the states before them to the lists; returns whether it succeeded."""
        noise = _expert_noise(request)
        success, trailing = False, 0
        sim.reset(request.state_id)
        while trailing < request.trailing_steps if success else len(actions) < request.max_steps:
            action = np.clip(self._backend.expert_action(sim), -request.max_speed, request.max_speed)
            if success:
                trailing += 1
            else:
                action[:3] = np.clip(action[:3] + next(noise)[: len(action)], -1.0, 1.0)
            state = sim.state
            if not np.isfinite(state).all():
                raise FloatingPointError(f"the state is not finite: {state.tolist()}")
            states.append(state)
            actions.append(action)
            success = sim.step(action) or success
            self._beat()
        return success

    def _replay(self, sim: Sim, state_id: int, actions: list[NDArray[np.float32]]) -> dict[str, NDArray[np.uint8]]:
        """Images before each action, by camera uint8 (n, H, W, 3)."""
        images: dict[str, NDArray[np.uint8]] = {
            camera: np.empty((len(actions), height, width, 3), np.uint8)
            for camera, (height, width) in self._cameras.items()
        }
        sim.reset(state_id)
        success = False
        for step, action in enumerate(actions):
            frame: Images = {camera: drawn[step] for camera, drawn in images.items()}
            sim.draw(frame)
            success = sim.step(action) or success
            self._beat()
        if not success:
            raise RuntimeError(
                f"the replay of state {state_id} did not repeat the episode: the simulator is not deterministic"
            )
        return images

    def report(self) -> dict[str, Any]:
        """Tells what this process holds: imported top-level modules, simulators made, CPU seconds, renderer."""
        return {
            "pid": os.getpid(),
            "modules": sorted({name.partition(".")[0] for name in sys.modules}),
            "simulators": self._made,
            "cpu_seconds": time.process_time(),
            "renderer": os.environ.get("MUJOCO_GL", ""),
        }


def _expert_noise(request: ExpertRequest) -> Iterator[NDArray[np.float64]]:
    """The noise of each step of an expert's episode, (3,), as `ExpertRequest` defines it."""
    generator = np.random.default_rng(request.noise_seed)
    innovation = np.sqrt(1.0 - request.noise_rho**2) * request.noise_std
    drift, acting = np.zeros(3), 1.0
    for step in itertools.count():
        if request.noise_window and step % request.noise_window == 0:
            acting = float(generator.random() < 0.5)
        drift = request.noise_rho * drift + innovation * generator.standard_normal(3)
        yield acting * drift


def serve(connection: Connection, memory: mmap.mmap) -> None:
    """Answers commands until told to close, or until the parent process is gone.

    The first message is the configuration (dict: simulator, tasks, options, layout, max_episode_steps, index, path:
    what to add to `sys.path`). Each later one is (command, arguments); each answer is ("ok", result) or ("error",
    exception name, message, traceback).
    """
    config = connection.recv()
    try:
        sys.path.extend(entry for entry in config["path"] if entry not in sys.path)
        module, _, name = BACKENDS.get(config["simulator"], config["simulator"]).partition(":")
        backend = getattr(importlib.import_module(module), name)(config["tasks"], config["options"])
    except Exception as error:
        connection.send(_error_reply(error))
        return
    layout = Layout(**config["layout"])
    worker = Worker(backend, layout, layout.arrays(memory), config["max_episode_steps"], config["index"])
    try:
        connection.send(("ok", None))
        _answer(connection, worker)
    finally:
        backend.close()  # before the interpreter ends: OpenGL contexts freed during shutdown print errors


def _error_reply(error: Exception) -> tuple[str, str, str, str]:
    """What the parent needs to raise an error of the worker again; to be called while it is handled."""
    return ("error", type(error).__name__, str(error), traceback.format_exc())


def _answer(connection: Connection, worker: Worker) -> None:
    while True:
        command, arguments = connection.recv()
        if command == "close":
            return
        try:
            reply: tuple[Any, ...] = ("ok", worker.commands[command](*arguments))
        except Exception as error:  # the parent raises it: this is the border between the processes
            reply = _error_reply(error)
        connection.send(reply)


def _end_with(parent: int) -> None:
    """Ends this process some seconds after its parent is gone.

    As a rule the closed socket has ended it by then. A simulator that hangs never reads the socket, and a process
    forked from the parent may hold it open.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    time.sleep(PARENT_CHECK_S)
    os._exit(1)


def main() -> None:
    """Entry point: descriptors of the socket and of the shared memory are the two arguments."""
    faulthandler.enable()  # a crash in a simulator's C code says where it was
    faulthandler.register(signal.SIGUSR1)  # so does a hang: the parent asks before it gives us up
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # they may reach the whole group; the parent closes its workers
    warnings.filterwarnings("ignore")
    socket_fd, memory_fd = (int(argument) for argument in sys.argv[1:3])
    memory = mmap.mmap(memory_fd, 0)
    os.close(memory_fd)
    try:
        serve(Connection(socket_fd), memory)
    except (EOFError, ConnectionError):
        return  # the parent is gone


if __name__ == "__main__":
    main()
