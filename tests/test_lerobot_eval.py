"""The same checkpoint does the same in this package's evaluation and in LeRobot's, up to float32 rounding."""

import numpy as np
import pytest
import torch

from pi_rl.envs.registry import check_name_and_options, make_env
from pi_rl.envs.vector_env import VectorEnv
from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.small.create import create_small_policy
from pi_rl.rollout.evaluator import evaluate_policy, ode_actions
from pi_rl.rollout.policy_io import PolicyIO
from pi_rl.rollout.randomness import EVAL_STREAM, chunk_noise
from pi_rl.trainer.build import build_actor_critic
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig
from tests.envs.assets import libero_assets

HORIZON, EXECUTED, CHUNKS, SEED = 6, 4, 2, 5


class MetaWorldCase:
    """LeRobot's environment is put into the state of a simulator of ours: its own reset is no function of its seed."""

    name, state_id = "metaworld:drawer-open-v3", 3

    def __init__(self, metaworld):
        self.options = {"image_size": 480, "max_episode_steps": EXECUTED * CHUNKS}
        self._backend = metaworld.MetaWorldBackend(["drawer-open-v3"], {})

    def config(self):
        from lerobot.envs.configs import MetaworldEnv

        return MetaworldEnv(task="drawer-open-v3")

    def lerobot_env(self):
        from tests.envs.lerobot_metaworld import MetaworldEnvInState

        sim = self._backend.make(0)
        sim.reset(self.state_id)
        return MetaworldEnvInState(sim, max_steps=EXECUTED * CHUNKS)


class LiberoCase:
    """LeRobot's environment starts from the same stored state by itself."""

    name, state_id = "libero:spatial-0", 4

    def __init__(self, libero):
        self.options = {"assets": str(libero_assets()), "max_episode_steps": EXECUTED * CHUNKS}
        libero.LiberoBackend(["spatial-0"], {"assets": self.options["assets"]})  # LeRobot finds the files then

    def config(self):
        from lerobot.envs.configs import LiberoEnv

        return LiberoEnv(task="libero_spatial")

    def lerobot_env(self):
        from lerobot.envs.libero import LiberoEnv, _get_suite

        env = LiberoEnv(
            _get_suite("libero_spatial"),
            0,
            "libero_spatial",
            obs_type="pixels_agent_pos",
            episode_index=self.state_id,
        )
        env._max_episode_steps = EXECUTED * CHUNKS
        return env


@pytest.fixture(params=[MetaWorldCase, LiberoCase], ids=["metaworld", "libero"])
def case(request):
    from pi_rl.envs import libero, metaworld

    return request.param(metaworld if request.param is MetaWorldCase else libero)


@pytest.fixture
def loaded(case, tmp_path):
    """A small π0 with statistics, as a fine-tuned checkpoint has them: actions of a third of their range."""
    spec = check_name_and_options(case.name, case.options)
    size = {"observation.state": spec.state_dim, "action": spec.action_dim}
    stats = {
        key: {"mean": torch.linspace(-0.1, 0.2, n), "std": torch.linspace(0.2, 0.4, n)} for key, n in size.items()
    }
    folder = create_small_policy(
        "pi0",
        cameras=spec.cameras,
        state_dim=spec.state_dim,
        action_dim=spec.action_dim,
        image_size=64,
        chunk_size=HORIZON,
        n_action_steps=EXECUTED,
        denoising_steps=3,
        instructions=spec.instructions,
        output_dir=tmp_path / "policy",
        seed=0,
        dataset_stats=stats,
    )
    torch.set_num_threads(1)
    return load_policy(folder)


class Watched(VectorEnv):
    """Remembers the observations that actions were asked for, and the actions."""

    def __init__(self, env):
        self._env, self.spec, self.num_envs = env, env.spec, env.num_envs
        self.seen, self.actions = [], []

    def reset(self, ids, indices=None):
        self._observation = self._env.reset(ids, indices)
        return self._observation

    @property
    def pending_chunks(self):
        return self._env.pending_chunks

    def start_chunk(self, actions, active=None):
        self.seen.append({key: self._observation[key] for key in (*self.spec.cameras, "observation.state", "task")})
        self.seen[-1] = {key: value.copy() for key, value in self.seen[-1].items()}
        self.actions.append(np.asarray(actions).copy())
        self._env.start_chunk(actions, active)

    def finish_chunk(self):
        result = self._env.finish_chunk()
        self._observation = result.observation
        return result

    def render(self, *args, **kwargs):
        return self._env.render(*args, **kwargs)

    def close(self):
        self._env.close()


def evaluate_here(case, loaded, folder):
    """Observations and actions (CHUNKS, EXECUTED, A) of this package's evaluation, and how it acts on any other."""
    args = FlowPPOConfig(output_dir=str(folder), use_cpu=True, num_envs=1, rollout_chunks=2, noise="flow_sde",
                         per_device_train_batch_size=2, denoising_steps=3)  # fmt: skip
    model = build_actor_critic(loaded, args, make_critic=lambda policy: None)
    ids = np.array([[0, case.state_id]])
    with Watched(make_env(case.name, 1, 1, **case.options)) as env:
        io = PolicyIO(loaded.preprocessor, loaded.postprocessor, env.spec, EXECUTED)
        evaluate_policy(model, env, io, ids, seed=SEED)

    @torch.no_grad()
    def act(observation, chunk):
        model.eval()
        return ode_actions(model, io, observation, np.arange(1), ids, np.array([chunk]), seed=SEED)[0]

    return env.seen, np.concatenate(env.actions), act


def evaluate_with_lerobot(case, loaded, monkeypatch):
    """Observations and actions (CHUNKS · EXECUTED, A) of `lerobot-eval`'s rollout, with the initial noise of ours."""
    import gymnasium
    from lerobot.envs.factory import make_env_pre_post_processors
    from lerobot.scripts.lerobot_eval import rollout

    chunks = iter(range(CHUNKS))

    def noise(shape, device):
        drawn = chunk_noise((SEED, EVAL_STREAM), np.array([[0, case.state_id]]), np.array([next(chunks)]),
                            denoising_steps=0, chunk_shape=shape[1:], device=device)  # fmt: skip
        return drawn.x_init

    monkeypatch.setattr(loaded.policy.model, "sample_noise", noise)
    seen = []

    def preprocess(observation):
        seen.append({key: value.clone() if torch.is_tensor(value) else value for key, value in observation.items()})
        return loaded.preprocessor(observation)

    before, after = make_env_pre_post_processors(case.config(), loaded.policy.config)
    env = gymnasium.vector.SyncVectorEnv([case.lerobot_env])
    try:
        done = rollout(env, loaded.policy, before, after, preprocess, loaded.postprocessor, seeds=[case.state_id])
    finally:
        env.close()
    return seen, done["action"][0].numpy()


@pytest.mark.slow
def test_both_evaluations_act_alike(case, loaded, tmp_path, monkeypatch):
    seen_here, here, act = evaluate_here(case, loaded, tmp_path)
    seen_there, there = evaluate_with_lerobot(case, loaded, monkeypatch)
    assert here.shape == (CHUNKS, EXECUTED, here.shape[-1])
    there = np.clip(there.reshape(here.shape), -1, 1)  # LeRobot leaves the clipping to the simulators
    assert (np.abs(here) < 1).mean() > 0.9
    assert np.abs(here[0] - here[1]).max() > 0.01
    for chunk, (ours, theirs) in enumerate(zip(seen_here, seen_there[::EXECUTED], strict=True)):
        seen = as_observation(theirs, loaded.policy.config.image_features)
        np.testing.assert_allclose(act(seen, chunk), there[chunk], rtol=0, atol=1e-5)
        assert ours["task"] == seen["task"]
        np.testing.assert_allclose(ours["observation.state"], seen["observation.state"], rtol=0, atol=1e-5)
        # each evaluation goes on with its own simulator: four steps carry the rounding on, to a pixel here and there
        np.testing.assert_allclose(here[chunk], there[chunk], rtol=0, atol=1e-5 if chunk == 0 else 1e-3)
        for camera in loaded.policy.config.image_features:
            assert (ours[camera] != seen[camera]).mean() <= (0 if chunk == 0 else 5e-3)


def as_observation(lerobot, cameras):
    """What LeRobot gave to the policy's preprocessor, in this package's form."""
    observation = {key: (lerobot[key].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy() for key in cameras}
    return observation | {"observation.state": lerobot["observation.state"].numpy(), "task": lerobot["task"]}
