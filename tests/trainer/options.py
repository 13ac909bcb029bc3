"""Options of the short trainings in these tests."""


def small_options(output_dir, **overrides):
    """Four environments, four updates in every iteration, noise enough to explore."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "seed": 3,
        "num_iterations": 2,
        "num_envs": 4,
        "rollout_chunks": 4,
        "per_device_train_batch_size": 8,
        "update_epochs": 2,
        "noise_std_min": 0.4,
        "noise_std_max": 1.0,
        "critic_hidden_sizes": [16],
        "learning_rate": 1e-3,
        "eval_episodes": 4,
        "eval_on_start": False,
        "disable_tqdm": True,
        **overrides,
    }
