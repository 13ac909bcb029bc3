"""Demonstrations: noisy scripted experts act, their successful episodes become a LeRobotDataset."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pi_rl.envs.vector_env import STATE_KEY, TRAIN_STATE_OFFSET, EnvSpec, ExpertEpisode, ExpertRequest, VectorEnv
from pi_rl.progress import ProgressFn

ACTION_KEY = "action"
_STATE_RANGE = 2**31
_DEMONSTRATION_STREAM = 0xDE30


@dataclass(frozen=True, kw_only=True)
class DemonstrationSummary:
    """What was collected.

    Attributes:
        episodes: Episodes in the dataset.
        frames: Frames in the dataset.
        tries: Attempts of the experts until the last kept episode of each task.
        tries_per_task: The same per task.
        mean_length: Mean number of steps of the kept episodes, per task.
        seconds: Wall-clock time.
    """

    episodes: int
    frames: int
    tries: int
    tries_per_task: dict[str, int]
    mean_length: dict[str, float]
    seconds: float

    @property
    def success_rate(self) -> float:
        """Share of the attempts that were kept."""
        return self.episodes / self.tries

    def __str__(self) -> str:
        lengths = ", ".join(f"{task} {length:.0f}" for task, length in self.mean_length.items())
        return (
            f"{self.episodes} episodes of {self.tries} tries ({self.success_rate:.0%}), {self.frames} frames, "
            f"mean length {lengths}, {self.seconds:.1f} s"
        )


def collect_demonstrations(
    env: VectorEnv,
    *,
    episodes_per_task: int,
    output_dir: str | Path,
    repo_id: str,
    noise_std: float = 0.0,
    noise_rho: float = 0.8,
    noise_window: int = 0,
    max_speed: float = 1.0,
    seed: int = 0,
    min_length: int = 2,
    max_steps: int | None = None,
    trailing_steps: int = 0,
    max_tries: int | None = None,
    progress: ProgressFn | None = None,
) -> DemonstrationSummary:
    """Writes a LeRobotDataset of successful scripted episodes with camera images.

    Attempt i of a task starts from a state and with action noise that depend on (seed, task, i) only, and the first
    successes in that order are kept: the dataset depends neither on the number of workers nor on their speed. States
    come from the training range, so that no evaluation state is demonstrated.

    Args:
        env: Environment with scripted experts (``rollout_experts``) and cameras; its running episodes stay as they
            are.
        episodes_per_task: Successful episodes to keep of each task, positive.
        output_dir: New folder of the dataset; it appears only when complete.
        repo_id: Name recorded in the dataset, for example ``"local/metaworld"``.
        noise_std: Standard deviation of the experts' action noise, in action units.
        noise_rho: Correlation of successive noise values, in [0, 1).
        noise_window: Noise is on or off, each with probability 1/2, in windows of so many steps; 0 leaves it on.
        max_speed: Largest component of the experts' own actions, in (0, 1]: below 1 they demonstrate slowly.
        seed: Seed of states and noise.
        min_length: Shorter successes are not kept.
        max_steps: Steps after which an attempt is given up; the environment's limit by default.
        trailing_steps: Frames recorded after success, in which the expert goes on acting (the paper: 15 in ManiSkill).
        max_tries: Attempts per task after which collecting fails; by default 100 per wanted episode.
        progress: Called as ``progress(kept, wanted, text)``.

    Returns:
        Counts, lengths and time.

    Raises:
        ValueError: If a number does not fit, the folder exists, or the environment has no experts or no camera.
        RuntimeError: If a task needs more than ``max_tries`` attempts.
    """
    started = time.perf_counter()
    output = Path(output_dir)
    _check(env.spec, output, episodes_per_task, min_length)
    rollout_experts = getattr(env, "rollout_experts", None)
    if rollout_experts is None:
        raise ValueError(f"{env.spec.name} has no scripted experts; give a dataset or a fine-tuned policy instead.")
    tally = _Tally(
        tasks=env.spec.tasks,
        wanted=episodes_per_task,
        min_length=min_length,
        max_tries=100 * episodes_per_task if max_tries is None else max_tries,
    )
    expert = {
        "noise_std": noise_std,
        "noise_rho": noise_rho,
        "noise_window": noise_window,
        "max_speed": max_speed,
        "max_steps": env.spec.max_episode_steps if max_steps is None else max_steps,
        "trailing_steps": trailing_steps,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        with (
            _dataset_writer(scratch / "dataset", repo_id, env.spec) as write,
            closing(rollout_experts(_requests(tally, seed, expert))) as episodes,
        ):
            for episode in episodes:
                if tally.keep(episode):
                    write(episode)
                if progress is not None:
                    progress(sum(tally.kept), len(tally.tasks) * tally.wanted, f"{sum(tally.tries)} tries")
        if output.exists():
            output.rmdir()
        os.replace(scratch / "dataset", output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return tally.summary(time.perf_counter() - started)


@dataclass
class _Tally:
    """Which attempts count and which successes are kept."""

    tasks: tuple[str, ...]
    wanted: int
    min_length: int
    max_tries: int
    kept: list[int] = field(init=False)
    tries: list[int] = field(init=False)
    frames: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.kept, self.tries, self.frames = ([0] * len(self.tasks) for _ in range(3))

    def keep(self, episode: ExpertEpisode) -> bool:
        """Counts an attempt and says whether it goes into the dataset."""
        task, length = episode["task"], len(episode["actions"])
        if self.kept[task] >= self.wanted:
            return False  # another worker was still busy with the task when it was complete
        self.tries[task] += 1
        kept = episode["success"] and length >= self.min_length
        if kept:
            self.kept[task] += 1
            self.frames[task] += length
        if self.kept[task] < self.wanted and self.tries[task] >= self.max_tries:
            raise RuntimeError(
                f"The expert of {self.tasks[task]} gave {self.kept[task]} of {self.wanted} episodes in "
                f"{self.tries[task]} tries; lower the noise or raise the number of steps or tries."
            )
        return kept

    def summary(self, seconds: float) -> DemonstrationSummary:
        """Totals, once every task is complete."""
        return DemonstrationSummary(
            episodes=sum(self.kept),
            frames=sum(self.frames),
            tries=sum(self.tries),
            tries_per_task=dict(zip(self.tasks, self.tries, strict=True)),
            mean_length={task: n / self.wanted for task, n in zip(self.tasks, self.frames, strict=True)},
            seconds=seconds,
        )


def _requests(tally: _Tally, seed: int, expert: dict[str, Any]) -> Iterator[ExpertRequest]:
    """Attempts of one task after the other, each until the task is complete."""
    for task in range(len(tally.tasks)):
        rng = np.random.default_rng([seed, _DEMONSTRATION_STREAM, task])
        for _ in range(tally.max_tries):
            if tally.kept[task] >= tally.wanted:
                break
            state, noise = (int(number) for number in rng.integers(_STATE_RANGE, size=2))
            yield ExpertRequest(task=task, state_id=TRAIN_STATE_OFFSET + state, noise_seed=noise, **expert)


@contextmanager
def _dataset_writer(root: Path, repo_id: str, spec: EnvSpec) -> Iterator[Callable[[ExpertEpisode], None]]:
    """A function that adds an episode in a thread: importing LeRobot and writing overlap with the simulation."""
    with ThreadPoolExecutor(1, thread_name_prefix="dataset") as pool:
        opened = pool.submit(_open_dataset, root, repo_id, spec)
        pending: list[Future[None]] = []
        try:
            yield lambda episode: pending.append(pool.submit(_add_episode, opened, spec, episode))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        for future in pending:
            future.result()
        opened.result().finalize()


def _open_dataset(root: Path, repo_id: str, spec: EnvSpec) -> Any:
    from lerobot.datasets import LeRobotDataset

    axes = ["height", "width", "channel"]
    features = {
        **{camera: {"dtype": "image", "shape": (*size, 3), "names": axes} for camera, size in spec.cameras.items()},
        STATE_KEY: _vector_feature("state", spec.state_dim),
        ACTION_KEY: _vector_feature("action", spec.action_dim),
    }
    # Images, not videos: PNG in parquet is written and read several times faster at these sizes.
    return LeRobotDataset.create(
        repo_id,
        spec.fps,
        features,
        root=root,
        use_videos=False,
        robot_type=spec.name.split(":")[0],
        video_backend="pyav",
    )


def _vector_feature(name: str, size: int) -> dict[str, Any]:
    return {"dtype": "float32", "shape": (size,), "names": [f"{name}_{i}" for i in range(size)]}


def _add_episode(opened: "Future[Any]", spec: EnvSpec, episode: ExpertEpisode) -> None:
    dataset = opened.result()
    images = episode["images"]
    if images is None:
        raise RuntimeError("A successful episode came without images; the environment must render them.")
    task = spec.instruction(episode["task"], episode["state_id"])
    for step, (state, action) in enumerate(zip(episode["states"], episode["actions"], strict=True)):
        frame = {camera: images[camera][step] for camera in spec.cameras}
        dataset.add_frame({**frame, STATE_KEY: state, ACTION_KEY: action, "task": task})
    with _no_progress_bars():
        dataset.save_episode()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silences the bars that the datasets library draws for every episode."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _check(spec: EnvSpec, output: Path, episodes_per_task: int, min_length: int) -> None:
    if episodes_per_task < 1 or min_length < 1:
        raise ValueError(
            f"collect_demonstrations got episodes_per_task={episodes_per_task}, min_length={min_length}; "
            "both must be at least 1."
        )
    if not spec.cameras:
        raise ValueError(f"Demonstrations are images, states and actions, but {spec.name} has no camera.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} already exists; give a new folder or remove the old one.")
