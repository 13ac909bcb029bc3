"""Do the trainers learn at all? A target to repeat and a mass to push, to a threshold, by every algorithm and noise.

The quick cases run in the default suite, the others with `-m slow`. All start from an untrained `flow_mlp` policy.
"""

import pytest
import torch

from pi_rl import make_env
from pi_rl.policies.mlp.create import create_mlp_policy
from pi_rl.trainer.flow_grpo_config import FlowGRPOConfig
from pi_rl.trainer.flow_grpo_trainer import FlowGRPOTrainer
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig
from pi_rl.trainer.flow_ppo_trainer import FlowPPOTrainer

ALGORITHMS = {"ppo": (FlowPPOConfig, FlowPPOTrainer), "grpo": (FlowGRPOConfig, FlowGRPOTrainer)}
NOISES = ("flow_sde", "flow_noise", "flow_cps")
COMMON = {
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "eval_episodes": 200,
    "noise_std_min": 0.1,
    "noise_std_max": 0.4,
}
PPO = {"critic_hidden_sizes": [64, 64], "critic_learning_rate": 1e-3}


def learn(folder, algorithm, env_name, env_kwargs, executed, seed, **options):
    """Success rate of the deterministic policy before and after training."""
    torch.set_num_threads(1)
    config_class, trainer_class = ALGORITHMS[algorithm]
    options = {**COMMON, **(PPO if algorithm == "ppo" else {}), **options}
    args = config_class(output_dir=str(folder / "run"), seed=seed, **options)
    with make_env(env_name, args.num_envs, **env_kwargs) as env:
        policy = create_mlp_policy(
            state_dim=env.spec.state_dim,
            action_dim=env.spec.action_dim,
            chunk_size=executed,
            n_action_steps=executed,
            denoising_steps=4,
            output_dir=folder / "policy",
            seed=seed,
        )
        trainer = trainer_class(policy, args, env)
        trainer.train()
        assert all(log.get("policy/ratio_error_first", 0) < 1e-5 for log in trainer.state.log_history)
        first = next(log for log in trainer.state.log_history if "eval_success_rate" in log)
        return first["eval_success_rate"], trainer.evaluate()["eval_success_rate"]


def learn_identity(folder, algorithm, seed=0, **options):
    sizes = {"num_envs": 128, "rollout_chunks": 1, "per_device_train_batch_size": 32, "num_iterations": 12}
    return learn(folder, algorithm, "toy:identity", {}, 1, seed, **{**sizes, **options})


def learn_point_mass(folder, algorithm, seed=0, **options):
    sizes = {"num_envs": 128, "rollout_chunks": 5, "per_device_train_batch_size": 64, "num_iterations": 30}
    if algorithm == "grpo":
        sizes |= {"num_envs": 256, "group_size": 16, "per_device_train_batch_size": 160}
    return learn(folder, algorithm, "toy:point-mass", {"reward": "distance"}, 4, seed, **{**sizes, **options})


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_identity_is_learned(tmp_path, algorithm, noise):
    before, after = learn_identity(tmp_path, algorithm, noise=noise)
    assert before < 0.2
    assert after > 0.9


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_point_mass_is_learned(tmp_path, algorithm):
    before, after = learn_point_mass(tmp_path, algorithm, noise="flow_sde")
    assert before < 0.2
    assert after > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_point_mass_is_learned_with_every_noise(tmp_path, algorithm, noise, seed):
    before, after = learn_point_mass(tmp_path, algorithm, seed=seed, noise=noise)
    assert before < 0.2
    assert after > 0.8


OPTIONS = (
    {"noise": "flow_sde", "mdp": "two_layer"},
    {"noise": "flow_cps", "mdp": "two_layer"},
    {"noise": "flow_noise", "mdp": "two_layer"},
    {"noise": "flow_sde", "mdp": "one_layer"},
    {"noise": "flow_noise", "mdp": "hybrid"},
    {"noise": "flow_noise", "likelihood_level": "action"},
    {"noise": "flow_sde", "likelihood_level": "element"},
    {"noise": "flow_sde", "step_draw": "batch"},
    {"noise": "flow_sde", "noise_scope": "all"},
    {"noise": "flow_sde", "noise_level_end": 0.2},
    {"noise": "flow_noise", "joint_reduction": "mean"},
)
CRITIC_OPTIONS = (
    {"noise": "flow_sde", "critic": "expert"},
    {"noise": "flow_sde", "mdp": "two_layer", "critic": "expert"},
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        *((algorithm, options) for algorithm in ALGORITHMS for options in OPTIONS),
        *(("ppo", o) for o in CRITIC_OPTIONS),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_the_identity_is_learned_with_every_option(tmp_path, algorithm, options):
    before, after = learn_identity(tmp_path, algorithm, num_iterations=35, lr_scheduler_type="linear", **options)
    assert before < 0.2
    assert after > 0.9
