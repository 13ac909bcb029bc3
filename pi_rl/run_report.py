"""What a run writes about itself: its metrics line by line, a page kept up to date, and the result at the end."""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pi_rl.__about__ import package_versions
from pi_rl.arguments import CONFIG_NAME
from pi_rl.envs.registry import parse_name
from pi_rl.hub.results import RESULTS_NAME
from pi_rl.hub.run_record import BEGAN, METRICS_NAME, WARNING, read_run
from pi_rl.progress import say
from pi_rl.secrets import redacted

if TYPE_CHECKING:
    from pi_rl.hub.results import RunResults
    from pi_rl.pipeline import _Run

CURVE_NAME, FILM_NAME = "learning_curve.png", "before_after.mp4"


class RunLog(TrainerCallback):
    """Appends every log entry to ``metrics.jsonl`` and renews ``report.html`` at evaluations and checkpoints.

    A full disk is said and does not stop the run. One process only has it.

    Args:
        folder: The run's output folder.
        env: Name of the environment, whose packages' versions are noted.
    """

    def __init__(self, folder: str | Path, env: str) -> None:
        self.folder, self.simulator = Path(folder), parse_name(env)[0]
        self._begun = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Appends the entry that the Trainer has just added to its history."""
        if not state.log_history:
            return
        lines = [state.log_history[-1]]
        if not self._begun:
            versions = package_versions(self.simulator)
            lines.insert(0, {BEGAN: time.strftime("%Y-%m-%dT%H:%M:%S%z"), "versions": versions})
        try:
            _append(self.folder / METRICS_NAME, "".join(json.dumps(line) + "\n" for line in lines))
            self._begun = True
        except OSError as error:
            say(f"  {METRICS_NAME} lacks a line: {error}. The run goes on.")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Renews the page."""
        write_run_page(self.folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Renews the page."""
        write_run_page(self.folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Renews the page, which is the last one of a run without evaluation."""
        write_run_page(self.folder)


def note_warning(folder: str | Path, text: str) -> None:
    """Notes a warning, such as a failed push, in a run's metrics, so that its page tells it.

    Args:
        folder: The run's output folder; one without ``metrics.jsonl`` is left alone.
        text: One or two sentences; access tokens are replaced.
    """
    file = Path(folder) / METRICS_NAME
    if not file.is_file():
        return
    try:
        _append(file, json.dumps({WARNING: redacted(text)}) + "\n")
    except OSError as error:
        say(f"  {METRICS_NAME} lacks a line: {error}. The run goes on.")


def write_run_page(folder: Path) -> None:
    """Renews ``report.html`` of a run; a failure, such as a full disk, is said and stops nothing."""
    from pi_rl.hub.report import write_report

    try:
        write_report(read_run(folder))
    except Exception as error:  # a page is never worth a run
        say(f"  report.html could not be written: {error}. The run goes on; `pi-rl report {folder}` writes it later.")


def report_results(run: "_Run", trainer: Any, policy_path: str | Path, before: Any, after: Any) -> None:
    """Table, results.json, learning curve, film, model card and page of a run that has ended.

    The result is written first; a picture, film, card or page that cannot be made is told and costs nothing else.

    Args:
        run: The recipe's run.
        trainer: Its trainer, after training.
        policy_path: The policy that RL started from.
        before: Evaluation of that policy.
        after: Evaluation of the trained one on the same states.
    """
    from pi_rl.hub.results import RunResults, results_table, write_results

    folder, rl, recipe = run.folder, run.rl, run.recipe
    results = RunResults(
        sft=before.summary(),
        rl=after.summary(),
        env_steps=trainer.env_steps,
        minutes=run.minutes_of_all(),
        seed=rl.seed,
        noise=rl.noise,
        blind=recipe.blind,
        versions=package_versions(parse_name(recipe.env)[0]),
        config={
            **asdict(recipe),
            "model": model_name(recipe.model),
            "algorithm": trainer.algorithm,
            "sampler": asdict(rl.sampler()),
            "num_iterations": rl.num_iterations,
            "eval_seed": rl.eval_seed,
        },
    )
    write_results(folder, results)
    _attempt(folder, "The learning curve", lambda: _plot(run, trainer, results))
    if recipe.video:
        _attempt(folder, "The film", lambda: _film(run, trainer, policy_path, before, after))
    results.minutes = run.minutes_of_all()
    _attempt(folder, "The time of the film in results.json", lambda: write_results(folder, results))
    _attempt(folder, "The model card", lambda: _write_card(run, results))
    trainer_state = str(folder / "trainer_state.json")
    _attempt(folder, "trainer_state.json", lambda: trainer.state.save_to_json(trainer_state))
    _attempt(folder, "report.html", lambda: write_run_page(folder))
    say("\n" + results_table(results))
    say(f"\nPolicy, card, curve and video: {folder}\nReport: {folder / 'report.html'}")


def _attempt(folder: Path, what: str, make: Callable[[], object]) -> None:
    """Makes something of a run whose result is on the disk already; a failure is told, here and on the run's page."""
    try:
        make()
    except Exception as error:  # a renderer, a codec, memory of a device or the disk: nothing is worth the result
        text = f"{what} could not be made: {type(error).__name__}: {' '.join(str(error).split())}"
        print(f"\nwarning: {redacted(text)} The result is in {folder / RESULTS_NAME}.", file=sys.stderr, flush=True)
        note_warning(folder, text)


def _plot(run: "_Run", trainer: Any, results: "RunResults") -> None:
    from pi_rl.hub.plots import plot_learning_curve
    from pi_rl.hub.results import short_name

    plot_learning_curve(
        trainer.state.log_history,
        run.folder / CURVE_NAME,
        title=f"{short_name(run.recipe.env)}, {run.rl.noise}, seed {run.rl.seed}",
        sft_baseline=results.sft,
        final=results.rl,
    )


def _film(run: "_Run", trainer: Any, policy_path: str | Path, before: Any, after: Any) -> None:
    from pi_rl.hub.film import film_before_after

    with run.stage("video", "   Filming the same initial state before and after"):
        film_before_after(trainer, policy_path, run.folder / "policy", before, after, run.folder / FILM_NAME)


def model_name(model: str | None) -> str | None:
    """A Hub id as it is, a folder by its name: a card must not show paths of one machine."""
    return Path(model).name if model is not None and Path(model).is_dir() else model


def _write_card(run: "_Run", results: "RunResults") -> None:
    from pi_rl.hub.model_card import write_model_card

    folder, recipe = run.folder, run.recipe
    curve, film = folder / CURVE_NAME, folder / FILM_NAME
    write_model_card(
        folder / "policy",
        results,
        env_name=recipe.env,
        base_model=recipe.model,
        license=recipe.model_license,
        reproduce_command=run.command,
        configuration=(folder / CONFIG_NAME).read_text(encoding="utf-8"),
        learning_curve=curve if curve.is_file() else None,
        video=film if recipe.video and film.is_file() else None,
        repo_id=run.rl.hub_model_id if run.rl.push_to_hub else None,
    )


def _append(file: Path, text: str) -> None:
    """Adds lines; after half a line, which a killed process leaves, on a new one."""
    with file.open("ab+") as stream:
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            text = text if stream.read() == b"\n" else f"\n{text}"
        stream.write(text.encode())
