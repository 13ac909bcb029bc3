"""What a run notes about itself while it trains: metrics line by line, and its page."""

import json

import pytest

from pi_rl import FlowPPOConfig, FlowPPOTrainer
from pi_rl.hub.report_notes import notes_of
from pi_rl.hub.run_record import read_run
from pi_rl.run_report import RunLog, note_warning
from tests.hub.runs import full_history, write_metrics, write_run

ENV = "toy:point-mass"


@pytest.fixture
def train(mlp_folder, tmp_path):
    """Trains two iterations with a checkpoint of each; returns the trainer's log."""

    def run():
        args = FlowPPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            num_iterations=2,
            num_envs=4,
            rollout_chunks=4,
            per_device_train_batch_size=16,
            update_epochs=1,
            noise="flow_sde",
            critic_hidden_sizes=[8],
            eval_episodes=4,
            eval_on_start=False,
            eval_every_iterations=2,
            save_every_iterations=1,
        )
        trainer = FlowPPOTrainer(
            str(mlp_folder), args, ENV, {"max_episode_steps": 8}, callbacks=[RunLog(tmp_path, ENV)]
        )
        try:
            trainer.evaluate()
            trainer.train()
        finally:
            trainer.close()
        return trainer.state.log_history

    return run


def test_every_entry_is_written_as_it_comes_and_the_page_with_it(train, tmp_path):
    history = train()
    began, baseline, *lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == history
    assert began["versions"]["lerobot"] == "0.6.1"
    assert (baseline["step"], baseline["env_steps"]) == (0, 0.0)  # the Trainer forgets what came before training
    record = read_run(tmp_path)
    assert [entry["iteration"] for entry in record.iterations] == [1.0, 2.0]
    assert len(record.evaluations) == 2
    page = (tmp_path / "report.html").read_text()
    assert "success before RL" in page
    assert "KL of the update" in page


def test_what_cannot_be_written_is_said_and_training_goes_on(train, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "report.html").mkdir()
    history = train()
    assert sum("loss" in entry for entry in history) == 2
    printed = capsys.readouterr().out
    assert "metrics.jsonl lacks a line" in printed
    assert "report.html could not be written" in printed
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_a_page_that_cannot_be_made_stops_no_run(train, tmp_path, monkeypatch, capsys):
    """Whatever is wrong with it, also what is no mistake of the record."""
    monkeypatch.setattr("pi_rl.hub.report.write_report", lambda record: record.minutes["nothing"])
    assert sum("loss" in entry for entry in train()) == 2
    assert "report.html could not be written: 'nothing'. The run goes on" in capsys.readouterr().out


def test_a_new_process_begins_a_new_line_after_half_a_one(train, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"began": "x"}\n{"step": 4, "lo')
    train()
    record = read_run(tmp_path)
    assert (record.problems, record.starts, len(record.iterations)) == ([], 2, 2)


def test_warnings_of_a_run_reach_its_page_without_tokens(tmp_path):
    folder = write_run(tmp_path / "run")
    token = "hf_" + "e5" * 17
    note_warning(folder, f"A push failed with {token}.")
    record = read_run(folder)
    assert [note.text for note in notes_of(record) if note.level == "warning"] == ["A push failed with hf_***."]
    assert token not in (folder / "metrics.jsonl").read_text()
    assert len(record.iterations) == 6
    note_warning(tmp_path, "This folder has no metrics.")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_replaced_simulators_are_told(tmp_path):
    folder = write_run(tmp_path / "run")
    write_metrics(folder, [{**entry, "rollout/worker_restarts": 1.0} for entry in full_history(3) if "loss" in entry])
    assert any("3 simulator process(es) died" in note.text for note in notes_of(read_run(folder)))
