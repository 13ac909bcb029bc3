"""MetaWorld's groups of tasks: difficulties as in SmolVLA's and the paper's tables, ML45's division."""

import pytest

from pi_rl.envs.metaworld_options import ML45_TEST, difficulty_groups, task_groups, task_instructions
from pi_rl.envs.registry import check_name_and_options, parse_name

# SmolVLA reports MetaWorld in four difficulties; written out here so that a change in LeRobot's file is noticed.
MEDIUM = (
    "basketball bin-picking box-close coffee-pull coffee-push hammer peg-insert-side push-wall soccer sweep sweep-into"
)
HARD = "assembly hand-insert pick-out-of-hole pick-place push push-back"
VERY_HARD = "disassemble pick-place-wall shelf-place stick-pull stick-push"


def versioned(names):
    return {f"{name}-v3" for name in names.split()}


def test_difficulties_are_those_of_the_papers_table():
    groups = difficulty_groups()
    assert list(groups) == ["easy", "medium", "hard", "very_hard"]
    assert [len(members) for members in groups.values()] == [28, 11, 6, 5]
    assert set(groups["medium"]) == versioned(MEDIUM)
    assert set(groups["hard"]) == versioned(HARD)
    assert set(groups["very_hard"]) == versioned(VERY_HARD)
    assert sorted(sum(groups.values(), ())) == sorted(task_instructions())


def test_ml45_is_metaworlds_own_division(metaworld):
    from metaworld.env_dict import ML45_V3

    assert set(task_groups()["ml45_train"]) == set(ML45_V3["train"])
    assert set(task_groups()["ml45_test"]) == set(ML45_TEST) == set(ML45_V3["test"])


@pytest.mark.parametrize(
    ("name", "number"),
    [("mt50", 50), ("ml45_train", 45), ("ml45_test", 5), ("easy", 28), ("medium", 11), ("hard", 6), ("very_hard", 5)],
)
def test_groups_are_environment_names(name, number):
    assert parse_name(f"metaworld:{name}")[1] == parse_name(f"metaworld_{name}")[1]
    assert len(check_name_and_options(f"metaworld:{name}", {}).instructions) == number


def test_an_environment_is_divided_into_the_difficulties_it_has():
    whole = check_name_and_options("metaworld:mt50", {}).task_groups
    assert dict(whole) == difficulty_groups()
    held_out = check_name_and_options("metaworld:ml45_test", {}).task_groups
    assert dict(held_out) == {
        "easy": ("door-lock-v3", "door-unlock-v3"),
        "medium": ("bin-picking-v3", "box-close-v3"),
        "hard": ("hand-insert-v3",),
    }


@pytest.mark.parametrize("name", ["reach-v3", "reach-v3,door-open-v3", "hard"])
def test_one_difficulty_alone_is_no_division(name):
    assert not check_name_and_options(f"metaworld:{name}", {}).task_groups
