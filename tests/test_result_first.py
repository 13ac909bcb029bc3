"""The measured result of a run outlives whatever fails after it: pictures, film, card, page."""

import json

import pytest
import torch

from pi_rl import run_recipe
from pi_rl import run_report as reports
from pi_rl.hub import film
from pi_rl.hub.push_contents import policy_contents, with_card
from pi_rl.hub.run_record import read_run
from pi_rl.pipeline import RecipeError

ENV = '{"image_size": 32, "fast_rendering": true, "hide_arm": true, "max_episode_steps": 15}'


@pytest.fixture
def words(small_pi0_folder, tmp_path):
    return [
        "--model", str(small_pi0_folder), "--output_dir", str(tmp_path / "run"), "--env", "metaworld:handle-press-v3",
        "--env_options", ENV, "--num_envs", "4", "--env_workers", "1", "--critic_hidden_sizes", "16", "--use_cpu",
        "true", "--rollout_chunks", "4", "--update_epochs", "1", "--per_device_train_batch_size", "16",
        "--num_iterations", "1", "--eval_episodes", "2", "--gradient_accumulation_steps", "1",
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["memory", "disk"])
def test_a_film_curve_or_page_that_fails_does_not_cost_the_result(words, tmp_path, monkeypatch, capsys, fault):
    """Folders stand where the files are to be written; or the second policy does not fit into memory."""
    folder = tmp_path / "run"
    report_results = reports.report_results

    def after_the_evaluation(*args):
        if fault == "disk":
            for name in ("learning_curve.png", "before_after.mp4", "report.html"):
                (folder / name).unlink(missing_ok=True)
                (folder / name).mkdir()
        report_results(*args)

    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 13 GiB.")

    monkeypatch.setattr(reports, "report_results", after_the_evaluation)
    if fault == "memory":
        monkeypatch.setattr(film, "load_model", too_large)
    assert run_recipe("A test.", None, "flow_sde", words) == folder

    told = capsys.readouterr()
    assert "warning: The film could not be made: " in told.err
    assert ("Tried to allocate 13 GiB." in told.err) is (fault == "memory")
    assert ("The learning curve could not be made: IsADirectoryError" in told.err) is (fault == "disk")
    assert ("report.html could not be written" in told.out) is (fault == "disk")
    results = json.loads((folder / "results.json").read_text())
    assert results["rl"]["n_episodes"] == 2
    assert "video" in results["minutes"]
    record = read_run(folder)
    assert record.complete
    assert any("The film could not be made" in text for text in record.warnings)
    card = with_card(folder, "user/policy").read_text()
    assert "before_after.mp4" not in card
    assert ("learning_curve.png" in card) is (fault == "memory")
    assert {"results.json", "README.md", "model.safetensors"} <= set(policy_contents(folder, "user/policy").files)
    with pytest.raises(RecipeError, match="holds a finished run"):
        run_recipe("A test.", None, "flow_sde", words)
