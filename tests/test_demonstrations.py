import json

import numpy as np
import pytest

from pi_rl.demonstrations import collect_demonstrations
from pi_rl.envs.vector_env import EVAL_STATES, TRAIN_STATE_OFFSET, EnvSpec, ExpertEpisode

SPEC = EnvSpec(
    name="fake:a,b",
    tasks=("a", "b"),
    instructions=("do a", "do b"),
    cameras={"observation.image": (8, 8)},
    state_dim=2,
    action_dim=2,
    max_episode_steps=20,
    fps=10,
    action_low=(-1.0, -1.0),
    action_high=(1.0, 1.0),
)


class FakeExperts:
    """Experts whose outcome depends on the request only; ``ahead`` attempts are under way at once."""

    def __init__(self, spec=SPEC, ahead=1, success_every=3):
        self.spec, self.ahead, self.success_every = spec, ahead, success_every
        self.seen = []

    def rollout_experts(self, requests):
        waiting = []
        requests = iter(requests)
        while True:
            while len(waiting) < self.ahead and (request := next(requests, None)) is not None:
                waiting.append(request)
            if not waiting:
                return
            yield self.attempt(waiting.pop(0))

    def attempt(self, request):
        self.seen.append(request)
        rng = np.random.default_rng(request.noise_seed)
        length = int(rng.integers(2, 7))
        success = request.state_id % self.success_every == 0
        return ExpertEpisode(
            task=request.task,
            state_id=request.state_id,
            success=success,
            actions=rng.uniform(-1, 1, (length, 2)).astype(np.float32),
            states=rng.uniform(-1, 1, (length, 2)).astype(np.float32),
            images={
                camera: rng.integers(0, 256, (length, *size, 3), dtype=np.uint8)
                for camera, size in self.spec.cameras.items()
            }
            if success
            else None,
        )


def collect(env, folder, episodes=3, **options):
    return collect_demonstrations(env, episodes_per_task=episodes, output_dir=folder, repo_id="local/test", **options)


def read(folder, repo_id="local/test"):
    from lerobot.datasets import LeRobotDataset

    return LeRobotDataset(repo_id, root=folder, video_backend="pyav")


def test_dataset_holds_the_successful_attempts_in_order(tmp_path):
    env = FakeExperts()
    summary = collect(env, tmp_path / "demos")
    kept = [FakeExperts().attempt(request) for request in env.seen if request.state_id % 3 == 0]
    dataset = read(tmp_path / "demos")
    assert dataset.num_episodes == len(kept) == summary.episodes == 6
    assert dataset.num_frames == sum(len(episode["actions"]) for episode in kept) == summary.frames
    frames = [dataset[i] for i in range(dataset.num_frames)]
    for key, name in (("actions", "action"), ("states", "observation.state")):
        stored = np.stack([frame[name].numpy() for frame in frames])
        np.testing.assert_array_equal(stored, np.concatenate([episode[key] for episode in kept]))
    images = np.stack([(frame["observation.image"].permute(1, 2, 0) * 255).round().byte().numpy() for frame in frames])
    np.testing.assert_array_equal(images, np.concatenate([episode["images"]["observation.image"] for episode in kept]))
    tasks = [SPEC.instructions[episode["task"]] for episode in kept for _ in episode["actions"]]
    assert [frame["task"] for frame in frames] == tasks
    assert dataset.fps == SPEC.fps


def test_every_camera_is_recorded(tmp_path):
    two = EnvSpec(**{**SPEC.__dict__, "cameras": {"observation.images.a": (8, 8), "observation.images.b": (4, 6)}})
    env = FakeExperts(two, success_every=1)
    collect(env, tmp_path / "demos", episodes=1, trailing_steps=15)
    first = FakeExperts(two, success_every=1).attempt(env.seen[0])
    frame = read(tmp_path / "demos")[0]
    for camera in two.cameras:
        seen = (frame[camera].permute(1, 2, 0) * 255).round().byte().numpy()
        np.testing.assert_array_equal(seen, first["images"][camera][0])
    assert {request.trailing_steps for request in env.seen} == {15}


def test_the_same_dataset_whatever_is_under_way_at_once(tmp_path):
    summaries = [collect(FakeExperts(ahead=n), tmp_path / str(n)) for n in (1, 4)]
    assert summaries[0].tries_per_task == summaries[1].tries_per_task
    first, second = (read(tmp_path / name) for name in ("1", "4"))
    assert first.num_frames == second.num_frames
    np.testing.assert_array_equal(
        first.hf_dataset.data.column("action").to_pylist(), second.hf_dataset.data.column("action").to_pylist()
    )


def test_states_come_from_the_training_range_and_follow_the_seed(tmp_path):
    runs = [FakeExperts() for _ in range(3)]
    for i, (env, seed) in enumerate(zip(runs, (0, 0, 1), strict=True)):
        collect(env, tmp_path / str(i), episodes=1, seed=seed)
    states = [[request.state_id for request in env.seen] for env in runs]
    assert min(min(row) for row in states) >= TRAIN_STATE_OFFSET > EVAL_STATES
    assert states[0] == states[1] != states[2]


def test_summary_counts_tries_until_the_last_kept_episode(tmp_path):
    env = FakeExperts(ahead=5)
    summary = collect(env, tmp_path / "demos", episodes=2)
    assert summary.tries == sum(summary.tries_per_task.values()) <= len(env.seen)
    assert summary.success_rate == pytest.approx(4 / summary.tries)
    assert set(summary.mean_length) == {"a", "b"}
    assert "4 episodes" in str(summary)


def test_short_successes_are_not_kept(tmp_path):
    collect(FakeExperts(), tmp_path / "demos", min_length=5)
    assert min(read(tmp_path / "demos").meta.episodes["length"]) >= 5


def test_progress_ends_with_all_episodes(tmp_path):
    calls = []
    collect(FakeExperts(), tmp_path / "demos", progress=lambda *call: calls.append(call))
    assert calls[-1][:2] == (6, 6)


def test_a_hopeless_expert_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="0 of 1 episodes in 7 tries; lower the noise"):
        collect(FakeExperts(success_every=2**40), tmp_path / "demos", episodes=1, max_tries=7)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_writer_leaves_nothing(tmp_path):
    class NoImages(FakeExperts):
        def attempt(self, request):
            return {**super().attempt(request), "images": None}

    with pytest.raises(RuntimeError, match="without images"):
        collect(NoImages(), tmp_path / "demos", episodes=1)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_refused_before_anything_runs(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    env = FakeExperts()
    with pytest.raises(ValueError, match="already exists"):
        collect(env, tmp_path / "old")
    with pytest.raises(ValueError, match="at least 1"):
        collect(env, tmp_path / "demos", episodes=0)
    sightless = EnvSpec(**{**SPEC.__dict__, "cameras": {}})
    with pytest.raises(ValueError, match="has no camera"):
        collect(FakeExperts(sightless), tmp_path / "demos")
    assert env.seen == []

    class NoExperts:
        spec = SPEC

    with pytest.raises(ValueError, match="no scripted experts"):
        collect(NoExperts(), tmp_path / "demos")


def test_metaworld_demonstrations_solve_the_task_in_the_simulator(metaworld_env, tmp_path):
    env = metaworld_env(num_envs=1)
    states = []

    class Watched:
        spec = env.spec

        def rollout_experts(self, requests):
            for episode in env.rollout_experts(requests):
                if episode["success"]:
                    states.append(episode["state_id"])
                yield episode

    collect(Watched(), tmp_path / "demos", episodes=1, noise_std=0.5)
    dataset = read(tmp_path / "demos")
    frames = [dataset[i] for i in range(dataset.num_frames)]
    start = env.reset(np.array([[0, states[0]]]))
    np.testing.assert_array_equal(frames[0]["observation.state"].numpy(), start["observation.state"][0])
    image = (frames[0]["observation.image"].permute(1, 2, 0) * 255).round().byte().numpy()
    np.testing.assert_array_equal(image, start["observation.image"][0])
    actions = np.stack([frame["action"].numpy() for frame in frames])
    result = env.step_chunk(actions[None])
    assert result.success[0]
    assert result.steps[0] == len(actions)
    assert json.loads((tmp_path / "demos" / "meta" / "info.json").read_text())["robot_type"] == "metaworld"
