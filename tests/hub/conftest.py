import pytest

from pi_rl.hub.results import RunResults
from pi_rl.rollout.summary import summarize_episodes


def evaluation(rate, episodes=40, tasks=("press", "pull")):
    names = [tasks[i % len(tasks)] for i in range(episodes)]
    solved = round(rate * episodes)
    success = [i < solved for i in range(episodes)]
    return summarize_episodes(names, success, [30 if won else 80 for won in success], [float(won) for won in success])


def run_results(seed=0, before=0.5, after=0.8, **changes):
    values = {
        "sft": evaluation(before),
        "rl": evaluation(after),
        "env_steps": 45_210,
        "minutes": {"demonstrations": 0.5, "sft": 1.25, "rl": 4.0},
        "seed": seed,
        "noise": "flow_noise",
        "versions": {"lerobot": "0.6.1"},
        "config": {"num_envs": 48},
    }
    return RunResults(**{**values, **changes})


def training_history(iterations=6):
    history = [{"eval_success_rate": 0.5, "eval_ci95_low": 0.4, "eval_ci95_high": 0.6, "env_steps": 0.0}]
    for i in range(1, iterations + 1):
        history.append(
            {
                "loss": 0.1,
                "env_steps": 1000.0 * i,
                "rollout/success_rate": 0.5 + 0.05 * i,
                "policy/approx_kl": 0.03 / i,
                "policy/clip_fraction": 0.2 / i,
                "critic/explained_variance": 0.1 * i,
            }
        )
    return history


@pytest.fixture
def results():
    return run_results()


@pytest.fixture
def grouped_results():
    """Three tasks in two groups of unlike sizes, so that the mean of the groups is not that of the episodes."""
    groups = {"easy": ("press", "pull"), "hard": ("lift",)}
    before, after = (
        summarize_episodes(
            ["press"] * 10 + ["pull"] * 10 + ["lift"] * 10,
            [i < press for i in range(10)] + [i < 10 for i in range(10)] + [i < lift for i in range(10)],
            [20.0] * 30,
            [0.0] * 30,
            groups,
        )
        for press, lift in ((4, 0), (10, 5))
    )
    return run_results(sft=before, rl=after)


@pytest.fixture
def make_results():
    return run_results


@pytest.fixture
def history():
    return training_history()
