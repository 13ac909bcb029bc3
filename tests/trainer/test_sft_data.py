from collections import Counter
from types import SimpleNamespace

import pytest

from pi_rl.trainer.sft_data import camera_keys, check_dataset, choose_episodes

TASKS = [f"task {i % 4}" for i in range(40)] + ["rare"]  # ten episodes of four tasks, one of a fifth


def drawn(**options):
    chosen = choose_episodes(TASKS, **options)
    assert chosen == sorted(set(chosen))
    return chosen, Counter(TASKS[episode] for episode in chosen)


def test_all_episodes_by_default():
    assert drawn()[0] == list(range(41))


def test_a_draw_is_stratified_and_depends_on_its_seed_only():
    chosen, shown = drawn(num_episodes=18)
    assert len(chosen) == 18
    assert shown["rare"] == 1  # it has no more
    assert sorted(shown[f"task {i}"] for i in range(4)) == [4, 4, 4, 5]
    assert drawn(num_episodes=18)[0] == chosen
    assert drawn(num_episodes=18, seed=1)[0] != chosen


def test_a_number_per_task():
    _, shown = drawn(episodes_per_task=3, except_tasks=["rare"])
    assert set(shown.values()) == {3}
    _, shown = drawn(episodes_per_task=2, only_tasks=["task 1", "task 3"])
    assert shown == {"task 1": 2, "task 3": 2}
    assert drawn(except_tasks=["rare"])[0] == list(range(40))


def test_published_numbers_are_taken_as_they_are_and_guarded():
    assert drawn(episodes=[5, 0, 2, 7, 40], covers_tasks=5)[0] == [0, 2, 5, 7, 40]
    with pytest.raises(ValueError, match="show 4 tasks instead of covers_tasks=5"):
        choose_episodes(TASKS, episodes=[0, 1, 2, 3, 4], covers_tasks=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": [0], "num_episodes": 3}, "exclude each other"),
        ({"episodes": [0, 41, 99]}, r"\[41, 99\] are not in the dataset, which has 0 to 40"),
        ({"episodes": [1], "only_tasks": ["task 0"]}, "do not show the tasks asked for"),
        ({"episodes": [3, 3]}, r"\[3\] are there twice"),
        ({"episodes": []}, "at least one"),
        ({"num_episodes": 42}, "42 episodes of 5 tasks were asked for, and the dataset has 41"),
        ({"episodes_per_task": 2}, r"'rare' has 1"),
        (
            {"only_tasks": ["rare"], "except_tasks": ["rare"]},
            r"only_tasks=\['rare'\] and except_tasks=\['rare'\] leave no",
        ),
        ({"only_tasks": ["task4"]}, "No episode shows the task 'task4'; the nearest: task"),
    ],
)
def test_demands_that_cannot_be_met_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        choose_episodes(TASKS, **options)


def features(state=(8,), action=(7,), camera="observation.images.image"):
    return {
        camera: {"dtype": "image", "shape": (256, 256, 3)},
        "observation.state": {"dtype": "float32", "shape": state},
        "action": {"dtype": "float32", "shape": action},
    }


def config(mode="QUANTILES"):
    return SimpleNamespace(
        max_state_dim=32, max_action_dim=32, normalization_mapping={"STATE": mode, "ACTION": "MEAN_STD"}
    )


STATS = {key: dict.fromkeys(("mean", "std", "q01", "q99")) for key in ("observation.state", "action")}


def test_a_dataset_that_fits():
    check_dataset(features(), STATS, config())
    assert camera_keys(features()) == ["observation.images.image"]


@pytest.mark.parametrize(
    ("changed", "stats", "message"),
    [
        ({"camera": "image"}, STATS, "no camera named observation.image"),
        ({"action": (40,)}, STATS, r"'action' of the dataset has shape \(40,\); the policy takes vectors of up to 32"),
        ({"state": (2, 4)}, STATS, r"shape \(2, 4\)"),
        ({}, {**STATS, "observation.state": {"mean": 0, "std": 1}}, "lack q01 and q99, which the policy's quantiles"),
        ({}, {}, "'observation.state' lack"),
    ],
)
def test_a_dataset_that_does_not_fit_is_refused_before_training(changed, stats, message):
    with pytest.raises(ValueError, match=message):
        check_dataset(features(**changed), stats, config())


def test_missing_features_are_named():
    without = {key: value for key, value in features().items() if key != "action"}
    with pytest.raises(ValueError, match="no feature 'action'; its features are observation"):
        check_dataset(without, STATS, config())
