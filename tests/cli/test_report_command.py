"""`pi-rl report` as a user types it."""

import json
import webbrowser

import pytest

from pi_rl.cli.main import main
from tests.hub.conftest import run_results
from tests.hub.runs import iteration_entry, write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", results=run_results(), video=True)


def test_a_page_is_written_into_the_runs_folder(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    captured = capsys.readouterr()
    assert str(folder / "report.html") in captured.out
    assert captured.err == ""


def test_json_holds_the_figures_alone_on_standard_output(folder, tmp_path, capsys):
    output = tmp_path / "new" / "page.html"
    assert main(["report", str(folder), "--output", str(output), "--embed", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["report"] == str(output)
    assert printed["bytes"] == output.stat().st_size
    assert printed["runs"][0]["after"]["success_rate"] == 0.8
    assert "data:video/mp4" in output.read_text()


def test_several_runs_make_one_page(folder, tmp_path, monkeypatch, capsys):
    other = write_run(tmp_path / "other", results=run_results(1))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(folder), str(other)]) == 0
    assert "2 runs compared" in (tmp_path / "comparison.html").read_text()
    assert "comparison.html" in capsys.readouterr().out


def test_warnings_go_to_standard_error(tmp_path, capsys):
    history = [iteration_entry(1, **{"rollout/failed_episodes": 3.0})]
    folder = write_run(tmp_path / "run", history=history)
    assert main(["report", str(folder)]) == 0
    assert "3 training episode(s) were lost" in capsys.readouterr().err


def test_the_page_is_opened_on_request(folder, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or False)
    assert main(["report", str(folder), "--open"]) == 0
    assert opened == [(folder / "report.html").as_uri()]
    assert "no browser was found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/none"], "not a folder"),
        (["{tmp}"], "holds no record of a run"),
        (["{run}", "--output", "{tmp}"], "is a folder; give a file"),
        (["{run}", "--embd"], "nearest: --embed"),
        ([], "folders"),
    ],
)
def test_what_does_not_fit_is_said_with_exit_code_2(folder, tmp_path, capsys, words, message):
    filled = [word.format(tmp=tmp_path, run=folder) for word in words]
    assert main(["report", *filled]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("DIR", "folders")
    assert "Traceback" not in error
