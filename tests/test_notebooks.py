"""The notebooks run as they are, in a fresh kernel of this interpreter, and what they teach is learned."""

import ast
import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
GAIN = {"quickstart": 0.15, "custom_env": 0.8}
"""By how much success rises at least, on the notebook's fixed initial states."""


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "scripts" / "run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def result(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """The last cell's value: success before and after."""
    return ast.literal_eval(notebook.cells[-1].outputs[-1].data["text/plain"])


def check_gain(name: str, notebook: nbformat.NotebookNode) -> None:
    found = result(notebook)
    assert found["success after"] >= found["success before"] + GAIN[name], found


def test_there_is_a_margin_for_every_notebook():
    assert sorted(GAIN) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_saved_outputs_are_those_of_one_whole_run(name, runner):
    notebook = read(name)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    check_gain(name, notebook)
    kinds = [kind for cell in notebook.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert "image/gif" in kinds  # the film
    assert "image/png" in kinds  # the curve
    assert not any(output.get("name") == "stderr" for cell in notebook.cells for output in cell.get("outputs", ()))
    runner.check((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"), name)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_their_progress_is_compact(name):
    for cell in read(name).cells:
        lines = [line for output in cell.get("outputs", ()) for line in output.get("text", "").splitlines()]
        assert len(lines) <= 12, lines


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_and_the_policy_improves(name, runner):
    check_gain(name, runner.execute(read(name), timeout_s=3600))


def test_a_cell_that_fails_ends_the_run_with_its_error_and_saves_nothing(runner, monkeypatch, tmp_path, capsys):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("raise KeyError('no such state')")])
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    before = (tmp_path / "broken.ipynb").read_bytes()
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    assert runner.main(["broken", "--output_dir", str(tmp_path)]) == 1
    assert "no such state" in capsys.readouterr().err
    assert (tmp_path / "broken.ipynb").read_bytes() == before


def test_the_kernel_is_this_interpreter_whatever_is_installed(runner, monkeypatch, tmp_path):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "other", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    cell = nbformat.v4.new_code_cell("import sys; print(sys.executable)")
    executed = runner.execute(nbformat.v4.new_notebook(cells=[cell]), timeout_s=300)
    assert executed.cells[0].outputs[0].text.strip() == sys.executable


def test_paths_of_the_machine_and_large_outputs_are_refused(runner):
    with pytest.raises(ValueError, match="shows the path /tmp/ of this machine"):
        runner.check("saved in /tmp/x", "n")
    with pytest.raises(ValueError, match=r"n has 300,001 bytes with its outputs; at most 300,000"):
        runner.check("a" * 300_001, "n")


def test_an_unknown_notebook_is_an_error_that_lists_the_known(runner, capsys):
    with pytest.raises(SystemExit) as ended:
        runner.main(["quikstart"])
    assert ended.value.code == 2
    assert "there are custom_env, quickstart" in capsys.readouterr().err
