import matplotlib
import numpy as np
import pytest
from PIL import Image

from pi_rl.hub.plots import RunCurve, plot_before_after, plot_learning_curve


def ink(path, colour):
    """Share of pixels close to a colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    target = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((np.abs(pixels - target).max(-1) < 12).mean())


def test_learning_curve_shows_training_evaluation_and_baseline(history, results, tmp_path):
    from pi_rl.hub import plots

    path = plot_learning_curve(history, tmp_path / "a" / "curve.png", sft_baseline=results.sft, final=results.rl)
    for colour in (plots.BLUE, plots.VERMILION, plots.GREY):
        assert ink(path, colour) > 1e-4
    assert [file.name for file in path.parent.iterdir()] == ["curve.png"]


@pytest.mark.parametrize("kept", [{"rollout/success_rate"}, {"eval_success_rate"}, set()])
def test_missing_quantities_are_left_out(history, tmp_path, kept):
    thin = [{key: value for key, value in record.items() if key in kept | {"env_steps"}} for record in history]
    assert plot_learning_curve(thin, tmp_path / "curve.png", sft_baseline=0.4).is_file()


def test_nan_and_foreign_records_are_skipped(history, tmp_path):
    odd = [*history, {"train_runtime": 3.0}, {"env_steps": 7000.0, "rollout/success_rate": float("nan")}]
    plot_learning_curve(odd, tmp_path / "odd.png")
    plot_learning_curve([*history, {"env_steps": 7000.0}], tmp_path / "plain.png")
    assert (tmp_path / "odd.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_history_without_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match="env_steps"):
        plot_learning_curve([{"loss": 1.0}], tmp_path / "curve.png")


def test_before_after_draws_every_run(history, make_results, tmp_path):
    from pi_rl.hub import plots

    runs = [
        RunCurve(label=f"run {i}", history=history if i else [], sft=run.sft, rl=run.rl, blind=i == 2)
        for i, run in enumerate(make_results(seed) for seed in range(3))
    ]
    path = plot_before_after(runs, tmp_path / "figure.png", subtitle="three runs")
    for colour in (plots.BLUE, plots.ORANGE, plots.GREY):
        assert ink(path, colour) > 1e-4
    with pytest.raises(ValueError, match="at least one"):
        plot_before_after([], tmp_path / "none.png")


def test_global_matplotlib_settings_stay(history, tmp_path):
    before = dict(matplotlib.rcParams)
    plot_learning_curve(history, tmp_path / "curve.png")
    assert dict(matplotlib.rcParams) == before
