import json
import os

import pytest

from pi_rl.hub.run_record import merged_history, read_run
from tests.hub.runs import evaluation_entry, full_history, iteration_entry, write_metrics, write_run


def test_a_finished_run_is_read_from_its_own_records(results, tmp_path):
    record = read_run(write_run(tmp_path / "run", results=results, video=True))
    assert record.complete
    assert record.problems == []
    assert (record.before, record.after) == (results.sft, results.rl)
    assert (record.env_steps, record.minutes) == (results.env_steps, results.minutes)
    assert (record.algorithm, record.env, record.starts) == ("PPO", "metaworld:press-v3,pull-v3", 1)
    assert [file.name for file in record.videos] == ["before_after.mp4"]
    assert len(record.iterations) == 6


def test_a_run_that_was_killed_is_known_up_to_its_last_line(tmp_path):
    folder = write_run(tmp_path / "run", history=full_history(4))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": 0.')
    record = read_run(folder)
    assert not record.complete
    assert len(record.iterations) == 4
    assert record.env_steps == 4000
    assert (record.before.success_rate, record.after.success_rate) == (0.5, 0.6)
    assert record.before.n_episodes == 40
    assert record.versions["lerobot"] == "0.6.1"


def test_a_continued_run_shows_every_iteration_once(tmp_path):
    folder = write_run(tmp_path / "run", history=full_history(3))
    lost = [iteration_entry(4, loss=9.0), evaluation_entry(16, 4000.0, 0.9)]
    again = [evaluation_entry(0, 0.0, 0.5), iteration_entry(4), iteration_entry(5)]
    write_metrics(folder, [*full_history(3), *lost, *again])
    record = read_run(folder)
    assert [entry["iteration"] for entry in record.iterations] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert record.iterations[3]["loss"] == 0.1
    assert [entry["step"] for entry in record.evaluations] == [0]


def test_half_a_line_before_a_new_start_is_no_problem_and_elsewhere_it_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(f'{text}{{"step": 3\n{{"began": "later"}}\n')
    record = read_run(folder)
    assert (record.problems, record.starts) == ([], 2)
    (folder / "metrics.jsonl").write_text(f'{{"step": 3\n{text}x\n{{"step": 30, "loss": 1.0}}\n')
    assert read_run(folder).problems == ["Line 11 of metrics.jsonl cannot be read."]


def test_a_trainers_folder_is_read_from_its_newest_readable_checkpoint(tmp_path):
    for number, text in ((8, json.dumps({"log_history": full_history(2)})), (12, '{"log_history": [')):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
        (folder / "pi_rl_config.yaml").write_text("env: toy:identity\ngroup_size: 4\n")
    record = read_run(tmp_path)
    assert len(record.iterations) == 2
    assert record.problems == ["checkpoint-12/trainer_state.json cannot be read: it is not JSON, or not a mapping."]
    assert (record.env, record.algorithm) == ("toy:identity", "GRPO")


@pytest.mark.parametrize("name", ["results.json", "stages.json", "pi_rl_config.yaml"])
def test_a_damaged_record_is_named_and_the_others_are_used(results, tmp_path, name):
    folder = write_run(tmp_path / "run", results=results)
    (folder / name).write_text("{: [")
    record = read_run(folder)
    assert len(record.problems) == 1
    assert name in record.problems[0]
    assert len(record.iterations) == 6


def test_configuration_with_a_python_tag_is_not_executed(tmp_path):
    folder = write_run(tmp_path / "run")
    canary = tmp_path / "canary"
    (folder / "pi_rl_config.yaml").write_text(f"x: !!python/object/apply:os.system ['touch {canary}']\n")
    assert "pi_rl_config.yaml cannot be read" in read_run(folder).problems[0]
    assert not canary.exists()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        read_run(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no record of a run"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "run")
    (folder / "demos").mkdir()
    with pytest.raises(ValueError, match=f"It lies in one: {folder}"):
        read_run(folder / "demos")


def test_tokens_in_a_configuration_are_not_kept(tmp_path):
    token = "hf_" + "b2" * 17
    folder = write_run(tmp_path / "run", config=f"hub_token: {token}\n")
    assert token not in read_run(folder).config_text


def test_films_are_ordered_by_number(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "videos").mkdir()
    for name in (
        "step-1000-episode-0.mp4",
        "step-200-episode-0.mp4",
        "step-200-episode-10.mp4",
        "step-200-episode-2.mp4",
    ):
        (folder / "videos" / name).write_bytes(b"x")
    assert [file.stem for file in read_run(folder).videos] == [
        "step-200-episode-0",
        "step-200-episode-2",
        "step-200-episode-10",
        "step-1000-episode-0",
    ]


def test_entries_without_an_iteration_again_stay_in_order():
    history = [*full_history(2), {"step": 8, "train_runtime": 3.0}]
    assert merged_history(history) == history


def test_the_youngest_record_dates_the_run(tmp_path):
    folder = write_run(tmp_path / "run")
    os.utime(folder / "metrics.jsonl", (2e9, 2e9))
    assert read_run(folder).written == 2e9
