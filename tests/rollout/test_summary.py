"""Averages of an evaluation: over episodes, tasks and groups, with intervals, as the paper's tables have them."""

import numpy as np
import pytest

from pi_rl.envs.metaworld_options import difficulty_groups
from pi_rl.rollout.summary import EvalSummary, mean_summary, summarize_episodes, wilson_interval

# Table 4 of the paper: easy, medium, hard, very hard, "Avg."; all in per cent
TABLE_4 = [
    ("Diffusion Policy", (23.1, 10.7, 1.9, 6.1), 10.5),
    ("TinyVLA", (77.6, 21.5, 11.4, 15.8), 31.6),
    ("SmolVLA", (87.1, 51.8, 70.0, 64.0), 68.2),
    ("π0 SFT", (77.9, 51.8, 53.3, 20.0), 50.8),
    ("π0 Flow-SDE", (92.1, 74.6, 61.7, 84.0), 78.1),
    ("π0 Flow-Noise", (91.1, 81.8, 78.3, 92.0), 85.8),
    ("π0.5 SFT", (68.2, 37.3, 41.7, 28.0), 43.8),
    ("π0.5 Flow-SDE", (86.4, 55.5, 75.0, 66.0), 70.7),
    ("π0.5 Flow-Noise", (86.8, 58.1, 63.3, 56.0), 66.1),
]
GROUPS = difficulty_groups()


def evaluation(solved, per_task=10):
    """Ten episodes of each of MetaWorld's 50 tasks; `solved` is the number of them solved, by task."""
    tasks = [task for members in GROUPS.values() for task in members]
    names = [task for task in tasks for _ in range(per_task)]
    success = [episode < solved[task] for task in tasks for episode in range(per_task)]
    return summarize_episodes(names, success, [50.0] * len(names), np.asarray(success, float).tolist(), GROUPS)


def spread(group, successes):
    """So many successes over a group's tasks, as evenly as they go."""
    members = GROUPS[group]
    return {task: successes // len(members) + (i < successes % len(members)) for i, task in enumerate(members)}


@pytest.mark.parametrize(("name", "rates", "average"), TABLE_4)
def test_the_papers_average_is_the_mean_of_the_groups(name, rates, average):
    # ten episodes per task come within a percentage point of each published rate
    solved = {}
    for (group, members), rate in zip(GROUPS.items(), rates, strict=True):
        solved |= spread(group, round(rate / 100 * 10 * len(members)))
    summary = evaluation(solved)
    found = [100 * part.success_rate for part in summary.per_group.values()]
    assert found == pytest.approx(rates, abs=1.0)
    assert sum(rates) / 4 == pytest.approx(average, abs=0.0501)  # 10.45 is printed as 10.5, 66.05 as 66.1
    assert 100 * summary.mean_of_groups.success_rate == pytest.approx(sum(found) / 4)
    weights = [len(members) / 50 for members in GROUPS.values()]
    assert 100 * summary.success_rate == pytest.approx(float(np.dot(weights, found)))


def test_the_two_averages_of_the_papers_best_policy_differ():
    """π0 with Flow-Noise: 85.8 over groups, 87.6 over tasks."""
    solved = {}
    for group, successes in (("easy", 255), ("medium", 90), ("hard", 47), ("very_hard", 46)):
        solved |= spread(group, successes)
    summary = evaluation(solved)
    assert [round(100 * part.success_rate, 1) for part in summary.per_group.values()] == [91.1, 81.8, 78.3, 92.0]
    assert round(100 * summary.mean_of_groups.success_rate, 1) == 85.8
    assert round(100 * summary.success_rate, 1) == round(100 * summary.mean_of_tasks.success_rate, 1) == 87.6


def test_group_intervals_are_wilsons_and_their_mean_combines_them():
    summary = evaluation(spread("easy", 280) | spread("medium", 55) | spread("hard", 0) | spread("very_hard", 25))
    for group, (successes, n) in zip(GROUPS, ((280, 280), (55, 110), (0, 60), (25, 50)), strict=True):
        assert summary.per_group[group].ci95 == wilson_interval(successes, n)
        assert summary.per_group[group].n_episodes == n
    mean = summary.mean_of_groups
    assert (mean.success_rate, mean.n_episodes) == (0.5, 500)
    # half the widest interval is not reached: the four errors are independent
    widest = max(part.ci95[1] - part.ci95[0] for part in summary.per_group.values())
    assert mean.ci95[0] < 0.5 < mean.ci95[1]
    assert 0.02 < mean.ci95[1] - mean.ci95[0] < widest / 2


def test_the_interval_of_the_mean_covers_what_it_says():
    rng = np.random.default_rng(0)
    true, n = np.array([0.95, 0.6, 0.4, 0.1]), np.array([280, 110, 60, 50])
    covered = 0
    for _ in range(2000):
        parts = []
        for successes, episodes in zip(rng.binomial(n, true).tolist(), n.tolist(), strict=True):
            outcome = [i < successes for i in range(episodes)]
            parts.append(summarize_episodes(["a"] * episodes, outcome, [1.0] * episodes, [0.0] * episodes))
        low, high = mean_summary(parts).ci95
        covered += low <= true.mean() <= high
    assert 0.935 < covered / 2000 < 0.97


def test_means_over_unequal_numbers_of_episodes():
    summary = summarize_episodes(
        ["a", "a", "a", "b"], [True, True, True, False], [10, 20, 30, 100], [1, 1, 1, 0], {"one": ["a"], "two": ["b"]}
    )
    assert summary.success_rate == 0.75
    assert summary.mean_of_tasks.success_rate == summary.mean_of_groups.success_rate == 0.5
    assert summary.mean_of_tasks.mean_episode_length == 60
    assert mean_summary([summary.per_task["a"]]).ci95 == pytest.approx(summary.per_task["a"].ci95)
    with pytest.raises(ValueError, match="at least one"):
        mean_summary([])


def test_groups_without_episodes_are_left_out_and_so_is_a_single_one():
    groups = {"one": ["a", "b"], "two": ["c"], "three": ["d"]}
    summary = summarize_episodes(["a", "c"], [True] * 2, [1.0] * 2, [1.0] * 2, groups)
    assert list(summary.per_group) == ["one", "two"]
    assert not summarize_episodes(["a"], [True], [1.0], [1.0], groups).per_group
    assert summarize_episodes(["a"], [True], [1.0], [1.0]).mean_of_groups is None


def test_metrics_name_groups_tasks_and_means():
    summary = summarize_episodes(["a", "b"], [True, False], [1, 2], [1.0, 0.0], {"one": ["a"], "two": ["b"]})
    metrics = summary.metrics()
    assert {key: value for key, value in metrics.items() if key.startswith("success_rate")} == {
        "success_rate": 0.5,
        "success_rate_mean_of_groups": 0.5,
        "success_rate/one": 1.0,
        "success_rate/two": 0.0,
        "success_rate/a": 1.0,
        "success_rate/b": 0.0,
    }
    assert "success_rate_mean_of_groups" not in summarize_episodes(["a"], [True], [1], [1.0]).metrics()


def test_a_summary_survives_json():
    summary = evaluation(spread("easy", 10) | spread("medium", 0) | spread("hard", 60) | spread("very_hard", 3))
    data = summary.to_dict()
    assert EvalSummary.from_dict(data) == summary
    assert data["mean_of_groups"]["success_rate"] == summary.mean_of_groups.success_rate
    assert data["mean_of_tasks"]["success_rate"] == pytest.approx(summary.success_rate)
    assert set(data["per_group"]) == set(GROUPS)
