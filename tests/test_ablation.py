"""The ablation script: its settings, its bookkeeping, and its arithmetic on made-up runs."""

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import ablation  # noqa: E402
import ablation_report as report  # noqa: E402
import ablation_runs as runs  # noqa: E402
from ablation_plots import band, plot_figure  # noqa: E402
from ablation_report import Records, judge  # noqa: E402
from ablation_settings import (  # noqa: E402
    BASE,
    FIGURES,
    FULL,
    SETTINGS,
    SMOKE,
    TABLE6,
    Claim,
    Size,
    quickstart,
    resolve,
)

CLI = ROOT / "scripts" / "ablation.py"


def made_up(ends, seeds=(0, 1, 2), spread=0.03, iterations=10):
    """Runs whose success rises from 0.5 to ``ends[setting]``, shifted by seed."""
    draw = random.Random(0)
    records = Records({}, {})
    for setting, end in ends.items():
        for seed in seeds:
            shift = spread * (seed - 1)
            rows = [{"iteration": 0.0, "env_steps": 0.0, "eval_success": 0.5, "eval_episodes": 64.0}]
            for i in range(1, iterations + 1):
                level = 0.5 + (end + shift - 0.5) * i / iterations
                row = {"iteration": float(i), "env_steps": 5000.0 * i, "train_success": level - 0.05}
                row |= {"clip_fraction": 0.2, "approx_kl": 0.02 + 0.002 * i, "noise_std": 0.6, "grad_norm": 2.0}
                row |= {"rollout_seconds": 5.0, "update_seconds": 1.0 + draw.random() / 10, "train_length": 50.0}
                if setting != "grpo":
                    row |= {"value_loss": 0.03 / i, "explained_variance": 0.08 * i}
                if i % 2 == 0:
                    row |= {"eval_success": level, "eval_episodes": 64.0}
                rows.append(row)
            records.curves[setting, seed] = rows
            records.runs[setting, seed] = {
                "iterations": float(iterations),
                "env_steps": 5000.0 * iterations,
                "rollout_episodes": 64.0,
                "sft_train": rows[1]["train_success"],
                "rl_train": rows[-1]["train_success"],
                "sft_eval_successes": 100.0,
                "rl_eval_successes": float(round(200 * (end + shift))),
                "eval_episodes": 200.0,
                "minutes": 1.5,
            }
    return records


EVERYTHING = {name: 0.6 + 0.02 * place for place, name in enumerate(SETTINGS)}


# ---- settings ----------------------------------------------------------------------------------------------------


def test_every_setting_and_claim_belongs_to_a_figure():
    used = {name for figure in FIGURES.values() for name in figure.settings}
    assert used == set(SETTINGS)
    assert list(FIGURES) == ["table6", *(f"fig{n}" for n in range(5, 13))]
    for figure in FIGURES.values():
        assert figure.claims
        for claim in figure.claims:
            assert claim.quantity in report.QUANTITIES
            assert claim.kind in ("greater", "at least", "similar", "faster", "as fast")
            assert {claim.more, claim.less} - {None} <= set(figure.settings)
        assert {column for column, _ in figure.panels} <= set(report.CURVE_COLUMNS)
        assert set(figure.shown) <= set(report.QUANTITIES)


def test_table_6_has_the_papers_columns_and_values():
    columns = [list(column.values["rl_eval"].values()) for column in TABLE6]
    assert columns == [[73.1, 94.5, 98.1], [88.5, 97.0, 94.5, 86.7], [94.5, 95.5, 89.2]]
    assert [list(c.values["sft_train"].values()) for c in TABLE6] == [
        [62.3, 56.0, 46.6], [9.4, 28.3, 56.1, 62.6], [56.0, 60.7, 70.3]
    ]  # fmt: skip
    levels = [resolve(SETTINGS[name], FULL, quickstart())["noise_level"] for name in TABLE6[0].settings]
    assert levels == [0.2, 0.5, 0.8, 1.0]
    steps = [resolve(SETTINGS[name], FULL, quickstart())["denoising_steps"] for name in TABLE6[1].settings]
    assert steps == [1, 2, 4, 8, 1]
    chunks = [resolve(SETTINGS[name], FULL, quickstart())["n_action_steps"] for name in TABLE6[2].settings]
    assert chunks == [5, 10, 20]
    assert {SETTINGS[name].chunk_size for name in TABLE6[2].settings} == {20}


@pytest.mark.parametrize("size", [FULL, SMOKE], ids=["full", "smoke"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_accepted_and_make_the_same_number_of_optimiser_steps(name, size, tmp_path):
    from pi_rl import FlowGRPOConfig, FlowPPOConfig

    setting = SETTINGS[name]
    options = resolve(setting, size, quickstart())
    kind = {"ppo": FlowPPOConfig, "grpo": FlowGRPOConfig}[setting.algorithm]
    config = kind(**options, output_dir=str(tmp_path), use_cpu=True)
    assert config.num_minibatches == 4
    assert config.updates_per_iteration == 16
    assert options["n_action_steps"] <= setting.chunk_size
    chunk_steps = options["rollout_chunks"] * options["n_action_steps"]
    assert chunk_steps == (65 if setting.algorithm == "grpo" else 80)
    if size is FULL:
        chunks = options["num_envs"] * options["rollout_chunks"] * options["n_action_steps"]
        assert abs(chunks / (64 * 80) - 1) < 0.02


def test_the_matched_level_is_the_last_noise_of_four_steps():
    import torch

    from pi_rl.flow.transition import transition

    x = torch.zeros(1, 1, 1)
    last = transition("flow_sde", x, x, torch.tensor([0.25]), torch.tensor([0.0]), noise_level=1.0).std
    level = SETTINGS["steps-1-matched"].options["noise_level"]
    only = transition("flow_sde", x, x, torch.tensor([1.0]), torch.tensor([0.0]), noise_level=level).std
    assert only.item() == pytest.approx(last.item(), abs=0.005)


# ---- jobs, keys, resuming ----------------------------------------------------------------------------------------


def test_figures_share_runs_and_settings_do_not():
    plan = runs.make_plan(SETTINGS, [0, 1], FULL)
    folders = [job.folder(Path()) for job in plan.runs.values()]
    assert len(set(folders)) == len(folders) == 2 * len(SETTINGS)
    assert set(plan.sft) == {5, 20}
    # K = 1, 2, 4, 8 of one policy and C = 5, 10, 20 of the other
    assert len({job.folder(Path()) for job in plan.baselines.values()}) == 7
    one = runs.make_plan(FIGURES["fig9"].settings, [0], FULL).runs[BASE, 0].folder(Path())
    other = runs.make_plan(FIGURES["fig12"].settings, [0], FULL).runs[BASE, 0].folder(Path())
    assert one == other == plan.runs[BASE, 0].folder(Path())
    assert one != runs.make_plan([BASE], [0], Size(iterations=11)).runs[BASE, 0].folder(Path())
    assert one != runs.make_plan([BASE], [1], FULL).runs[BASE, 1].folder(Path())


def test_finished_jobs_are_not_repeated_and_a_failure_stops_nothing(tmp_path, monkeypatch):
    plan = runs.make_plan([BASE, "grpo"], [0, 1], SMOKE)
    jobs = list(plan.runs.values())
    ran = []

    class Process:
        """Does the work at once; the second job dies."""

        def __init__(self, target, args, name):
            self.job, self.output = args[0], args[1]

        def start(self):
            ran.append(self.job.name)
            folder = self.job.folder(self.output)
            folder.mkdir(parents=True)
            if self.job is jobs[1]:
                (folder / runs.LOG).write_text("Traceback\nValueError: no such luck\n\n")
            else:
                (folder / runs.RESULT).write_text('{"text": "fine"}')
            self.sentinel = len(ran)

        def join(self):
            pass

    preloaded = []
    context = SimpleNamespace(Process=Process, set_forkserver_preload=preloaded.extend)
    monkeypatch.setattr(runs, "get_context", lambda kind: context)
    monkeypatch.setattr(runs, "wait", lambda sentinels: sentinels[:1])
    lines = []
    failed = runs.run_jobs(jobs, tmp_path, parallel=2, report=lines.append)
    assert ran == [job.name for job in jobs]
    assert failed == [jobs[1]]
    assert any("no such luck" in line for line in lines)
    assert sum("fine" in line for line in lines) == 3
    assert "pi_rl.trainer.flow_ppo_trainer" in preloaded
    ran.clear()
    shutil.rmtree(jobs[1].folder(tmp_path))
    runs.run_jobs(jobs, tmp_path, parallel=2, report=lines.append)
    assert ran == [jobs[1].name]


def test_runs_become_rows(tmp_path):
    plan = runs.make_plan([BASE], [4], Size(iterations=2, eval_every=1, curve_episodes=2, final_episodes=4))
    job, baseline = plan.runs[BASE, 4], plan.baselines[BASE]
    history = [
        {"step": 16, "loss": 1.0, "env_steps": 10.0, "rollout/success_rate": 0.25, "policy/clip_fraction": 0.5},
        {"step": 16, "eval_success_rate": 0.5, "eval_n_episodes": 2.0, "env_steps": 10.0},
        {"step": 32, "loss": 1.0, "env_steps": 20.0, "rollout/success_rate": 0.75, "critic/loss": 0.1},
        {"step": 32, "eval_success_rate": 1.0, "eval_n_episodes": 2.0, "env_steps": 20.0},
        {"step": 32, "train_runtime": 3.0},
    ]
    result = {"spec": job.spec, "history": history, "updates_per_iteration": 16, "final": "1101", "seconds": 60.0}
    for one, written in ((job, result), (baseline, {"final": "0100"})):
        one.folder(tmp_path).mkdir(parents=True)
        (one.folder(tmp_path) / runs.RESULT).write_text(json.dumps(written))
    records = report.collect(plan, tmp_path)
    run, curve = records.runs[BASE, 4], records.curves[BASE, 4]
    assert (run["sft_train"], run["rl_train"], run["env_steps"]) == (0.25, 0.75, 20.0)
    assert (run["sft_eval_successes"], run["rl_eval_successes"], run["eval_episodes"]) == (1, 3, 4)
    assert [row["eval_success"] for row in curve] == [0.5, 0.5, 1.0]
    assert [row.get("train_success") for row in curve] == [None, 0.25, 0.75]
    assert curve[2]["value_loss"] == 0.1
    assert "value_loss" not in curve[1]


def test_csv_files_hold_everything(tmp_path):
    records = made_up({BASE: 0.9, "grpo": 0.8})
    report.write_csv(records, tmp_path)
    again = report.read_csv(tmp_path)
    for key, run in records.runs.items():
        assert again.runs[key] == pytest.approx(run, rel=1e-5)
        for read, written in zip(again.curves[key], records.curves[key], strict=True):
            assert read == pytest.approx(written, rel=1e-5)


# ---- verdicts ----------------------------------------------------------------------------------------------------


def test_t_interval_covers_the_mean_as_often_as_it_says():
    generator = np.random.default_rng(0)
    for n in (3, 5):
        draws = generator.normal(0.3, 0.1, (4000, n))
        covered = [low <= 0.3 <= high for _, (low, high) in (report.t_interval(list(row)) for row in draws)]
        assert np.mean(covered) == pytest.approx(0.95, abs=0.01)
    assert report.t_interval([0.5]) == (0.5, None)


def test_newcombe_matches_its_published_example():
    # Newcombe 1998, method 10, example (a): 56/70 against 48/80
    difference, (low, high) = report.newcombe((56, 70), (48, 80))
    assert difference == pytest.approx(0.2)
    assert (low, high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


@pytest.mark.parametrize(
    ("more", "less", "spread", "kind", "word"),
    [
        (0.9, 0.6, 0.03, "greater", report.REPRODUCED),
        (0.6, 0.9, 0.03, "greater", report.OPPOSITE),
        (0.8, 0.8, 0.0, "similar", report.REPRODUCED),
        (0.9, 0.6, 0.03, "similar", report.NOT),
        (0.8, 0.83, 0.0, "at least", report.REPRODUCED),
        (0.6, 0.9, 0.0, "at least", report.OPPOSITE),
    ],
)
def test_verdicts_follow_from_the_numbers(more, less, spread, kind, word):
    records = made_up({BASE: more, "grpo": less}, spread=spread)
    verdict = judge(Claim("", "", "rl_eval", BASE, "grpo", kind), records)
    assert verdict.word == word
    assert verdict.seeds == 3
    assert verdict.estimate == pytest.approx(more - less, abs=0.01)


def test_seeds_that_disagree_make_a_claim_uncertain():
    records = made_up({BASE: 0.85, "grpo": 0.8})
    records.runs[BASE, 0]["rl_eval_successes"] = 120.0
    records.runs[BASE, 2]["rl_eval_successes"] = 200.0
    assert judge(Claim("", "", "rl_eval", BASE, "grpo"), records).word == report.LEANS
    assert judge(Claim("", "", "rl_eval", "grpo", BASE), records).word == report.NOT
    assert judge(Claim("", "", "rl_eval", BASE, "grpo", "similar"), records).word == report.UNCERTAIN


def test_a_shared_policys_episodes_are_pooled():
    records = made_up({BASE: 0.9, "steps-1": 0.9})
    for seed in range(3):
        records.runs["steps-1", seed]["sft_train"] = 0.125
    verdict = judge(Claim("", "", "sft_train", BASE, "steps-1"), records)
    successes = sum(round(64 * records.runs[BASE, seed]["sft_train"]) for seed in range(3))
    assert verdict.interval == report.newcombe((successes, 192), (24, 192))[1]
    assert verdict.word == report.REPRODUCED
    # one deterministic measurement for all seeds, not three
    same = judge(Claim("", "", "sft_eval", BASE, "steps-1", "similar"), records)
    assert same.interval == report.newcombe((100, 200), (100, 200))[1]


def test_ratios_of_time_and_one_seed_and_no_seed():
    records = made_up({BASE: 0.9, "mdp-two-layer": 0.9})
    for seed in range(3):
        for row in records.curves["mdp-two-layer", seed]:
            if "update_seconds" in row:
                row["update_seconds"] *= 2
    claim = next(claim for claim in FIGURES["fig8"].claims if claim.kind == "faster")
    verdict = judge(claim, records)
    assert verdict.word == report.REPRODUCED
    assert verdict.estimate == pytest.approx(2, rel=0.1)
    assert report.difference_text(claim, verdict).startswith(f"{verdict.estimate:.2f} times [")
    single = judge(Claim("", "", "rl_eval", BASE, "grpo"), made_up({BASE: 0.9, "grpo": 0.8}, seeds=[0]))
    assert (single.word, single.interval) == (report.LEANS, None)
    assert judge(Claim("", "", "rl_eval", BASE, "grpo"), records).word == report.NO_DATA
    assert judge(Claim("", "", "explained_variance", BASE, "grpo"), made_up(EVERYTHING)).word == report.NO_DATA


def test_growth_within_a_run_is_judged_against_zero():
    records = made_up({BASE: 0.9})
    verdict = judge(next(claim for claim in FIGURES["fig12"].claims if claim.less is None), records)
    assert verdict.word == report.REPRODUCED
    # KL is 0.02 + 0.002 i: mean over i = 8 … 10 minus mean over i = 3 … 5
    assert verdict.estimate == pytest.approx(0.002 * (9 - 4))


# ---- tables, plots, document -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_renders(name, tmp_path):
    records = made_up(EVERYTHING)
    text = report.figure_markdown(name, records, f"{name}.png" if FIGURES[name].panels else None)
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    for claim in FIGURES[name].claims:
        assert claim.text in text
    if FIGURES[name].panels:
        path = plot_figure(name, records, tmp_path / f"{name}.png")
        assert path.read_bytes().startswith(b"\x89PNG")
    if name == "table6":
        assert "| *RL, deterministic, paper* | *73.1* | *94.5* | *98.1* | *–* |" in text


def test_runs_that_are_missing_leave_gaps_only(tmp_path):
    records = made_up({BASE: 0.9})
    text = report.figure_markdown("fig8", records, None)
    assert "| two-layer | 0 | – |" in text
    assert report.NO_DATA in text
    plot_figure("fig8", records, tmp_path / "fig8.png")


def test_a_band_is_the_spread_of_the_seeds_at_the_policys_age():
    records = made_up({BASE: 0.9})
    success = band(records, BASE, "train_success")
    # the first rollout is the SFT policy's
    assert [point[0] for point in success] == list(range(10))
    x, mean, low, high = band(records, BASE, "eval_success")[-1]
    assert (x, low, high) == (10, pytest.approx(0.87), pytest.approx(0.93))
    assert mean == pytest.approx(0.9)


def test_the_document_has_a_place_for_every_figure():
    text = ablation.DOCUMENT.read_text(encoding="utf-8")
    records = made_up(EVERYTHING)
    for name in FIGURES:
        text = report.replace_section(text, name, report.figure_markdown(name, records, None))
    text = report.replace_section(text, "summary", report.summary_markdown(FIGURES, records))
    again = report.replace_section(text, "summary", report.summary_markdown(FIGURES, records))
    assert text == again
    with pytest.raises(ValueError, match="fig13: begin"):
        report.replace_section(text, "fig13", "")


def test_published_rows_are_complete():
    """Whatever is committed under docs/ablations has every run of every figure it shows."""
    records = report.read_csv(ablation.DOCUMENT_DATA)
    for name in SETTINGS:
        assert len(records.seeds(name)) >= 3, name
    for key, run in records.runs.items():
        assert math.isfinite(run["rl_eval_successes"]), key
        assert len(records.curves[key]) == run["iterations"] + 1


# ---- command line and real runs ----------------------------------------------------------------------------------


def test_names_on_the_command_line():
    assert ablation.figure_names(["6", "fig9", "table6"]) == ["table6", "fig9"]
    assert ablation.figure_names(["all"]) == list(FIGURES)
    arguments = ablation.parse_arguments(["--table", "fig9", "--seeds", "3", "4", "--jobs", "1"])
    assert (arguments.figures, arguments.seeds, arguments.jobs) == (["fig9"], [3, 4], 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table", "fig4"], "choose 6, fig5"),
        (["--jobs", "0"], "at least 1"),
        (["--seeds", "1", "1"], "different numbers"),
        (["--smoke", "--docs"], "gives no results"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        ablation.parse_arguments(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_render_uses_what_is_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "DOCUMENT_DATA", tmp_path / "docs")
    assert ablation.main(["--render", "--output", str(tmp_path / "out")]) == 1
    assert "no finished run" in capsys.readouterr().err
    report.write_csv(made_up(EVERYTHING), tmp_path / "docs")
    assert ablation.main(["--render", "--table", "fig9", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "fig9.png").is_file()
    assert "| a = 0.2 | 3 |" in (tmp_path / "out" / "fig9.md").read_text()


@pytest.mark.slow
def test_a_run_from_policy_to_row(small_pi0_folder, tmp_path):
    """A real run of one iteration, in this process, on an untrained policy."""
    size = Size(iterations=1, num_envs=4, eval_every=1, curve_episodes=2, final_episodes=3)
    plan = runs.make_plan([BASE], [0], size)
    quick = {"image_size": 32, "fast_rendering": True, "hide_arm": True, "max_episode_steps": 10}
    for job in (plan.baselines[BASE], plan.runs[BASE, 0]):
        job.spec["env_options"] = quick
        job.spec["options"] |= {"rollout_chunks": 2, "per_device_train_batch_size": 4, "update_epochs": 1}
        policy = tmp_path / job.inputs["policy"] / "policy"
        if not policy.exists():
            shutil.copytree(small_pi0_folder, policy)
        result = runs.work(job, tmp_path)
        assert result == job.result(tmp_path)
        assert len(result["final"]) == 3
    records = report.collect(plan, tmp_path)
    (curve,) = records.curves.values()
    assert [row["iteration"] for row in curve] == [0, 1]
    assert curve[1]["eval_episodes"] == 2
    assert 0 <= curve[1]["train_success"] <= 1
    assert curve[1]["update_seconds"] > 0
    assert set(report.CURVE_COLUMNS) - {"setting", "seed"} == set(curve[1])
    assert not (plan.runs[BASE, 0].folder(tmp_path) / "scratch").exists()


@pytest.mark.slow
def test_the_script_runs_and_goes_on(tmp_path):
    """Demonstrations, SFT, baseline, one setting twice: the second start has nothing to do."""
    output = tmp_path / "out"
    words = [sys.executable, str(CLI), "--table", "fig5", "--smoke", "--seeds", "0", "--output", str(output)]
    first = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "| GRPO | 1 |" in first.stdout
    assert (output / "fig5.png").is_file()
    second = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert "Baselines and RL: 0 to do, 3 there" in second.stdout
