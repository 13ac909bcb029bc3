import json
import math

import pytest

from pi_rl.hub.results import (
    RunResults,
    format_minutes,
    format_success,
    read_results,
    results_rows_markdown,
    results_table,
    runs_table,
    short_name,
    write_results,
)
from pi_rl.rollout.summary import wilson_interval


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (95, 200)])
def test_wilson_interval_ends_solve_the_score_equation(successes, n):
    low, high = wilson_interval(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    for end in (low, high):
        if 0.0 < end < 1.0:
            assert abs(successes / n - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), abs=1e-9)


def test_written_results_are_read_back(results, tmp_path):
    file = write_results(tmp_path, results)
    assert file == tmp_path / "results.json"
    assert read_results(tmp_path) == read_results(file) == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_results_json_holds_what_readers_rely_on(results, tmp_path):
    content = json.loads(write_results(tmp_path / "new" / "results.json", results).read_text())
    assert {"sft", "rl", "env_steps", "minutes", "seed", "noise", "blind", "versions", "config"} <= set(content)
    for summary in (content["sft"], content["rl"], *content["rl"]["per_task"].values()):
        assert {"success_rate", "n_episodes", "ci95", "mean_episode_length"} <= set(summary)
    assert set(content["rl"]["per_task"]) == {"press", "pull"}


def test_results_with_nan_are_not_written(make_results, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_results(tmp_path, make_results(minutes={"rl": float("nan")}))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"seed": 1}', '{"sft": {}}'])
def test_reading_something_else_says_so(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="not a results file"):
        read_results(tmp_path)


def test_reading_nothing_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"results\.json"):
        read_results(tmp_path)


def test_the_table_shows_both_policies_tasks_and_gain(results):
    lines = results_table(results).splitlines()
    assert lines[0].split()[:2] == ["policy", "task"]
    assert any(line.startswith("SFT ") and format_success(results.sft) in line for line in lines)
    assert any(line.startswith("SFT + RL") and "45,210" in line for line in lines)
    assert sum("press" in line for line in lines) == 2
    assert any("+0.300" in line for line in lines)
    assert lines[-1].endswith("total 5.8 min")


def test_columns_are_aligned(results):
    lines = results_table(results).splitlines()
    column = lines[0].index("episodes")
    assert all(line.ljust(column)[column - 1] == " " for line in lines[2:9])


def test_markdown_rows_have_equal_width(results):
    widths = {line.count("|") for line in results_rows_markdown(results).splitlines()}
    assert widths == {7}
    assert results_rows_markdown(results) in results_table(results, markdown=True)


def test_runs_table_has_a_row_per_run_and_marks_the_blind_one(make_results):
    table = runs_table([make_results(seed) for seed in range(3)] + [make_results(blind=True)], markdown=True)
    rows = table.splitlines()[2:]
    assert len(rows) == 4
    assert "blind" in rows[3]
    assert "camera" in rows[0]
    with pytest.raises(ValueError, match="at least one"):
        runs_table([])


def test_groups_and_their_mean_stand_between_all_and_tasks(grouped_results):
    rows = [
        [cell.strip() for cell in line.split("|")[1:4]] for line in results_rows_markdown(grouped_results).splitlines()
    ]
    assert [row[1] for row in rows[2:9]] == ["all", "mean of groups", "easy", "hard", "press", "pull", "lift"]
    assert [row[2][:5] for row in rows[2:6]] == ["0.467", "0.350", "0.700", "0.000"]
    assert [row[2][:5] for row in rows[9:13]] == ["0.833", "0.750", "1.000", "0.500"]
    assert [row[1:] for row in rows[-2:]] == [["", "+0.367"], ["mean of groups", "+0.400"]]


def test_runs_table_shows_the_mean_of_groups_where_there_are_groups(grouped_results, results):
    head, _, grouped, plain = runs_table([grouped_results, results], markdown=True).splitlines()
    assert head.count("|") == grouped.count("|") == plain.count("|")
    column = head.split("|").index(" mean of groups ")
    assert grouped.split("|")[column] == " 0.350 → 0.750 "
    assert "mean of groups" not in runs_table([results])


def test_group_results_survive_json(grouped_results, tmp_path):
    content = json.loads(write_results(tmp_path, grouped_results).read_text())
    assert content["rl"]["mean_of_groups"]["success_rate"] == pytest.approx(0.75)
    assert content["rl"]["per_group"]["easy"]["n_episodes"] == 20
    assert read_results(tmp_path) == grouped_results


def test_minutes_are_summed():
    assert format_minutes({"sft": 1.0, "final_evaluation": 0.5}) == "sft 1.0 · final evaluation 0.5 · total 1.5 min"


def test_gain_and_total(results):
    assert results.gain == pytest.approx(0.3)
    assert results.total_minutes == pytest.approx(5.75)
    assert RunResults.from_dict(results.to_dict()) == results


def test_long_lists_of_tasks_are_counted_in_headings():
    assert short_name("metaworld:handle-press-v3,coffee-button-v3") == "metaworld:handle-press-v3,coffee-button-v3"
    assert short_name("metaworld:" + ",".join(["button-press-topdown-v3"] * 3)) == "metaworld, 3 tasks"
