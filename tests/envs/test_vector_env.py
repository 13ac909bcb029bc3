from dataclasses import replace

import numpy as np
import pytest

from pi_rl.envs.vector_env import (
    EVAL_STATES,
    TRAIN_STATE_OFFSET,
    EnvSpec,
    ExpertRequest,
    check_actions,
    check_active,
    check_indices,
    check_reset,
)

SPEC = EnvSpec(
    "x:both", ("reach-v3", "push-v3"), ("reach", "push"), {}, 2, 4, 9, 80, (-1.0,) * 4, (1.0,) * 4, eval_states=50
)
ALL = np.ones(3, bool)


def test_training_and_evaluation_states_are_disjoint():
    assert EVAL_STATES <= TRAIN_STATE_OFFSET


def test_valid_arguments_come_back_in_the_interface_types():
    ids, slots = check_reset([[1, 5], [0, 7]], [2, 0], 3, SPEC)
    assert ids.dtype == slots.dtype == np.int64
    assert ids.tolist() == [[1, 5], [0, 7]]
    assert slots.tolist() == [2, 0]
    assert check_reset(np.zeros((3, 2), np.int32), None, 3, SPEC)[1].tolist() == [0, 1, 2]
    assert check_actions(np.zeros((3, 2, 4)), ALL, 4, 9).dtype == np.float32


@pytest.mark.parametrize(
    ("ids", "indices", "message"),
    [
        ([[0, 0]], None, r"shape \(3, 2\).*got int64 of shape \(1, 2\)"),
        ([[0.0, 1.0]] * 3, None, "integers .*got float64"),
        ([[0, 0], [2, 0], [0, 0]], None, r"task index 2 \(row 1\).*2 task\(s\), 0 to 1 \(reach-v3, push-v3\)"),
        ([[0, 0], [-1, 0], [0, 0]], None, "task index -1"),
        ([[0, 0], [0, 0], [0, -4]], None, r"state id -4 \(row 2\)"),
        (
            [[0, 0], [0, 49], [1, 50]],
            None,
            r"state id 50 \(row 2\) does not exist: x:both .* 0 to 49, .*from 1000000 up",
        ),
        ([[0, 0]], [3], r"0 to 2, got \[3\]"),
        ([[0, 0], [0, 1]], [1, 1], r"named twice in \[1, 1\]"),
    ],
)
def test_reset_arguments_are_checked_with_numbers(ids, indices, message):
    with pytest.raises(ValueError, match=message):
        check_reset(ids, indices, 3, SPEC)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 4), r"shape \(3, C, 4\), got \(3, 4\)"),
        ((2, 5, 4), r"got \(2, 5, 4\)"),
        ((3, 5, 7), r"got \(3, 5, 7\)"),
        ((3, 0, 4), "1 to 9 actions .*got 0"),
        ((3, 10, 4), "1 to 9 actions .*got 10"),
    ],
)
def test_action_shapes_are_checked_with_numbers(shape, message):
    with pytest.raises(ValueError, match=message):
        check_actions(np.zeros(shape, np.float32), ALL, 4, 9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_actions_that_are_not_finite_are_located_but_only_where_they_matter(value):
    actions = np.zeros((3, 2, 4), np.float32)
    actions[1, 1, 3] = value
    with pytest.raises(ValueError, match="environment 1 at step 1 .*must be finite"):
        check_actions(actions, ALL, 4, 9)
    check_actions(actions, np.array([True, False, True]), 4, 9)


def test_stepping_an_ended_episode_is_refused():
    running = np.array([True, False, False])
    with pytest.raises(ValueError, match=r"\[1, 2\] have no running episode"):
        check_active(None, running)
    assert check_active([True, False, False], running).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="3 booleans, got int64"):
        check_active([1, 0, 0], running)


def test_indices_may_be_empty_but_not_text():
    assert check_indices([], 3).shape == (0,)
    with pytest.raises(ValueError, match="list of integers"):
        check_indices(["a"], 3)


@pytest.mark.parametrize(
    "wrong",
    [{"state_id": -1}, {"noise_std": np.nan}, {"noise_rho": 1.0}, {"max_steps": 0}, {"noise_seed": -1}],
)
def test_expert_requests_name_the_bad_field(wrong):
    (field,) = wrong
    with pytest.raises(ValueError, match=field):
        ExpertRequest(**{"task": 0, "state_id": 0, **wrong})


def test_the_instruction_is_the_tasks_unless_the_episode_says_more():
    assert SPEC.instruction(1, 7) == "push"
    told = replace(SPEC, subtasks=3, instruction_of=lambda task, state, solved: f"{task}, {state}, {solved}")
    assert told.instruction(1, 7, 2) == "1, 7, 2"
    assert told.sentences(2) == ("0, 0, 0", "0, 0, 1", "0, 0, 2", "0, 1, 0", "0, 1, 1", "0, 1, 2",
                                 "1, 0, 0", "1, 0, 1", "1, 0, 2", "1, 1, 0", "1, 1, 1", "1, 1, 2")  # fmt: skip
    assert replace(told, instruction_of=lambda *_: "do it").sentences() == ("do it",)
    assert SPEC.sentences() == ("reach", "push")


def test_training_states_exist_whatever_the_number_of_evaluation_states():
    check_reset([[0, TRAIN_STATE_OFFSET], [1, 2**40], [0, 0]], None, 3, SPEC)
