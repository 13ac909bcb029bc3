"""Gymnasium environments with images in worker processes."""

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from pi_rl.envs.gymnasium_env import features
from pi_rl.envs.registry import make_env

IMAGE, STATE = "observation.image", "observation.state"
MODULE = '''
import gymnasium, numpy as np
from gymnasium.spaces import Box, Dict

class Tape(gymnasium.Env):
    """Two pictures of how far one has come: solved at 3, over at -2, cut after a step of 0.5."""

    instruction = "wind the tape"
    action_space = Box(-1.0, 1.0, (2,), np.float64)
    observation_space = Dict(
        left=Box(0, 255, (4, 6, 3), np.uint8),
        right=Box(0, 255, (2, 2, 3), np.uint8),
        where=Box(-9, 9, (1,), np.float64),
    )
    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def look(self):
        shade = np.uint8(100 + 10 * self.where)
        left = np.full((4, 6, 3), shade)
        left[0, 0] = self.start
        return {"left": left, "right": np.full((2, 2, 3), shade + 1), "where": np.array([self.where])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.where, self.start = 0.0, self.np_random.integers(256)
        return self.look(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.where += action[0]
        return self.look(), action[0] / 2, self.where <= -2, action[0] == 0.5, {"is_success": self.where >= 3}

    def render(self):
        return np.full((8, 8, 3), 33, np.uint8)

    def expert_action(self):
        return np.array([1.0, 0.0])

class Naive(Tape):
    expert_action = None

gymnasium.register("Tape-v0", Tape, max_episode_steps=6)
gymnasium.register("Naive-v0", Naive, max_episode_steps=6)
'''


@pytest.fixture(scope="module", autouse=True)
def _module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users_code")
    (folder / "pi_rl_test_tape.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    for name in ("Tape-v0", "Naive-v0"):
        gymnasium.registry.pop(name, None)


@pytest.fixture(scope="module")
def tape(_module):
    with make_env("gymnasium:pi_rl_test_tape:Tape-v0", 4, 2) as env:
        yield env


def ids(*states):
    return np.array([[0, state] for state in states])


def moves(*values):
    """The same number of steps for each environment: (B, C, 2)."""
    return np.stack([np.array(values, np.float32), np.zeros_like(values, np.float32)], -1)


def test_a_users_module_is_found_by_the_workers_and_described(tape):
    spec = tape.spec
    assert spec.cameras == {"observation.images.left": (4, 6), "observation.images.right": (2, 2)}
    assert (spec.state_dim, spec.action_dim, spec.max_episode_steps, spec.fps) == (1, 2, 6, 7)
    assert spec.instructions == ("wind the tape",)
    observation = tape.reset(ids(5, 6, 5, 7))
    left = observation["observation.images.left"]
    assert left[0, 0, 0].tolist() == left[2, 0, 0].tolist() != left[1, 0, 0].tolist()
    assert observation[STATE].dtype == np.float32
    assert all("pi_rl_test_tape" in report["modules"] for report in tape.worker_reports())


def test_the_three_endings(tape):
    tape.reset(ids(0, 1, 2, 3))
    chunk = tape.step_chunk(moves([1, 1, 9, 1], [-1, -1, 0, 0], [1, 0.5, 0, 0], [0, 0, 0, 0]))
    assert chunk.steps.tolist() == [3, 2, 2, 4]
    assert chunk.terminated.tolist() == [True, True, False, False]
    assert chunk.success.tolist() == [True, False, False, False]
    assert chunk.truncated.tolist() == [False, False, True, False]
    assert chunk.rewards[0].tolist() == [0.5, 0.5, 0.5, 0]  # the 9 was clipped to 1
    assert chunk.observation[STATE][2].tolist() == [1.5]
    assert chunk.observation["observation.images.left"][2, 1, 1].tolist() == [115] * 3
    assert chunk.observation["observation.images.right"][2, 1, 1].tolist() == [116] * 3
    last = tape.step_chunk(moves(*[[0, 0, 0]] * 4), [False, False, False, True])
    assert last.steps.tolist() == [0, 0, 0, 2]
    assert last.truncated.tolist() == [False, False, False, True]


def test_frames_are_the_first_picture_or_what_gymnasium_renders(tape):
    tape.reset(ids(0, 1, 2, 3))
    frame = tape.render([1], 8, 12)[0]
    assert frame.shape == (8, 12, 3)
    assert frame[2:, 2:].tolist() == np.full((6, 10, 3), 100).tolist()
    assert len({tuple(pixel) for pixel in frame[:2, :2].reshape(-1, 3).tolist()}) == 1  # one pixel became four
    options = {"make_kwargs": {"render_mode": "rgb_array"}, "max_episode_steps": 2}
    with make_env("gymnasium:pi_rl_test_tape:Tape-v0", 1, 1, **options) as env:
        env.reset(ids(0))
        assert (env.render([0], 5, 3) == 33).all()


def test_experts_are_the_environments_own(tape):
    (episode,) = tape.rollout_experts([{"task": 0, "state_id": 3, "noise_std": 0.1}])
    assert episode["success"]
    assert len(episode["actions"]) >= 3
    assert episode["images"]["observation.images.left"].shape[1:] == (4, 6, 3)
    with (
        make_env("gymnasium:pi_rl_test_tape:Naive-v0", 1, 1) as env,
        pytest.raises(ValueError, match=r"Naive has no scripted expert: give it a method expert_action\(\)"),
    ):
        list(env.rollout_experts([{"task": 0, "state_id": 3}]))


def test_an_id_of_the_main_program_alone_is_explained(tape):
    with (
        make_env("gymnasium:Tape-v0", 1, 1) as env,
        pytest.raises(ValueError, match="cannot make Tape-v0.* name the module, as in my_module:Tape-v0"),
    ):
        env.reset(ids(0))


def test_one_image_has_the_short_name():
    image, state = Box(0, 255, (4, 4, 3), np.uint8), Box(-1, 1, (3,), np.float32)
    assert features(Dict(pixels=image, agent_pos=state), "X") == ("agent_pos", {IMAGE: "pixels"})
    assert features(state, "X") == (None, {})


@pytest.mark.parametrize(
    "space",
    [
        Box(0, 255, (4, 4, 3), np.uint8),
        Dict(pixels=Box(0, 255, (4, 4, 3), np.uint8)),
        Dict(pixels=Box(0, 1, (4, 4, 3), np.float32), state=Box(-1, 1, (3,), np.float32)),
        Dict(state=Box(-1, 1, (3,), np.float32)),
    ],
)
def test_other_observations_are_refused(space):
    with pytest.raises(ValueError, match="observation space of X is .*AddRenderObservation adds an image"):
        features(space, "X")
