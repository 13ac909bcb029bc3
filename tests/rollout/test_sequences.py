import json

import pytest

from pi_rl.hub.results import RunResults, results_table
from pi_rl.rollout.sequences import SequenceSummary, summarize_sequences
from pi_rl.rollout.summary import EvalSummary, summarize_episodes
from pi_rl.trainer.callbacks import evaluation_line


def test_the_average_length_is_the_sum_of_the_shares():
    summary = summarize_sequences([5, 3, 0, 1, 5.0, 2, 4, 0], 5)
    assert summary.average_length == 2.5
    assert summary.in_a_row == (6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8)
    assert sum(summary.in_a_row) == pytest.approx(summary.average_length)
    low, high = summary.ci95
    assert high - 2.5 == pytest.approx(2.5 - low) == pytest.approx(1.96 * 2.0702 / 8**0.5, rel=1e-4)
    assert summarize_sequences([5, 5], 5).ci95 == (5.0, 5.0)
    assert summarize_sequences([0, 5], 5).ci95 == (0.0, 5.0)


@pytest.mark.parametrize(
    ("solved", "message"),
    [([], "no evaluation episodes"), ([6], "0 to 5 of them, got 6"), ([1, 0.5], "got 0.5"), ([-1], "got -1")],
)
def test_what_is_not_a_number_of_subtasks_is_refused(solved, message):
    with pytest.raises(ValueError, match=message):
        summarize_sequences(solved, 5)


def test_an_evaluation_of_sequences_says_how_far_they_got():
    summary = summarize_episodes(
        ["abc_d"] * 4, [True, False, False, False], [300, 400, 500, 360], [5, 2, 3, 0], None, 5
    )
    assert (summary.success_rate, summary.mean_return) == (0.25, 2.5)
    metrics = summary.metrics()
    assert metrics["average_length"] == 2.5
    assert [metrics[f"in_a_row/{position}"] for position in range(1, 6)] == [0.75, 0.75, 0.5, 0.25, 0.25]
    written = json.loads(json.dumps(summary.to_dict()))
    assert EvalSummary.from_dict(written) == summary
    assert SequenceSummary.from_dict(written["sequences"]) == summary.sequences
    line = evaluation_line({f"eval_{name}": value for name, value in {**metrics, "runtime": 1.0}.items()})
    assert "average length 2.500" in line
    plain = summarize_episodes(["a"], [True], [1], [1.0])
    assert plain.sequences is None
    assert "average_length" not in plain.metrics()
    assert EvalSummary.from_dict(plain.to_dict()) == plain


def test_results_tables_show_the_average_length():
    plain = summarize_episodes(["d_d"], [True], [300], [1.0])
    solved = summarize_episodes(["d_d"] * 2, [True, False], [300, 400], [5, 2], None, 5)
    run = {"env_steps": 1, "minutes": {}, "seed": 0, "noise": "flow_sde", "versions": {}, "config": {}}
    table = results_table(RunResults(sft=plain, rl=solved, **run), markdown=True)
    assert "|  | solved of 5 | 3.500 [0.56, 5.00] |" in table
    assert "|  | at least 1, 2, … | 1.000 / 1.000 / 0.500 / 0.500 / 0.500 |" in table
