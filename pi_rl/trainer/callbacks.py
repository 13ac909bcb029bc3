"""What a run prints: a line per iteration and evaluation, a bar within them."""

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pi_rl.progress import Progress, say

# what only some algorithms log: (key, name, format)
_ALGORITHM_FIGURES = (
    ("critic/explained_variance", "explained variance", "+.2f"),
    ("groups/informative", "informative groups", ".2f"),
)


class IterationReport(TrainerCallback):
    """Prints one line per iteration and evaluation, and shows progress within.

    Args:
        main: Whether this process prints.
        bars: Whether it shows progress within iterations too.
    """

    def __init__(self, *, main: bool, bars: bool = True) -> None:
        self._main = main
        self._progress = Progress("rollout", enabled=main and bars, leave=False, interval=60.0)
        self._started = time.monotonic()
        self._first_iteration: float | None = None
        self._per_iteration: float | None = None
        self._ends_at = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock of the estimated time."""
        self._first_iteration = self._per_iteration = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops it, and takes the bar away, also where training stopped within an iteration."""
        self._per_iteration = None
        self._progress.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints an iteration's or an evaluation's line."""
        if not logs or not self._main:
            return
        if "loss" in logs:
            say(self._iteration_line(logs, args))
        elif "eval_success_rate" in logs:
            say(evaluation_line(logs))
        self._progress.said_something()

    def rollout_progress(self, done: int, total: int, text: str) -> None:
        """Shows chunks simulated in the current rollout."""
        self._show("rollout", "chunks", done, total, text)

    def update_progress(self, done: int, total: int, diagnostics: Mapping[str, Tensor]) -> None:
        """Shows forward-backward passes of the current update.

        Args:
            done: Passes made.
            total: Passes of this iteration.
            diagnostics: Of the last one, as ``clipped_surrogate`` returns them.
        """
        if not self._progress.enabled:
            return  # reading a number from a GPU waits for it
        kl, clipped = diagnostics["approx_kl"].item(), diagnostics["clip_fraction"].item()
        self._show("update", "batches", done, total, f"KL {kl:.3f}  clipped {clipped:.2f}")

    def evaluation_progress(self, done: int, total: int, text: str) -> None:
        """Shows evaluation episodes."""
        self._show("evaluate", "episodes", done, total, text)

    def _show(self, title: str, unit: str, done: int, total: int, text: str) -> None:
        self._progress.stage(title, unit)
        if self._per_iteration is not None:
            text += f"  left {_clock(max(0.0, self._ends_at - time.monotonic()))}"
        self._progress(done, total, text)

    def _iteration_line(self, logs: dict[str, float], args: TrainingArguments) -> str:
        done, total = round(logs["iteration"]), int(args.num_train_epochs)
        seconds = logs["time/rollout"] + logs["time/update"]
        now = time.monotonic()
        if self._first_iteration is None:
            self._first_iteration, self._started = done - 1, now - seconds
        self._per_iteration = (now - self._started) / (done - self._first_iteration)
        left = self._per_iteration * (total - done)
        self._ends_at = now + left
        parts = [
            f"iteration {done:>{len(str(total))}}/{total}",
            f"success {_number(logs.get('rollout/success_rate'), '.2f')}",
            *_return_part(logs.get("rollout/success_rate"), logs.get("rollout/return")),
            f"length {_number(logs.get('rollout/episode_length'), '.0f')}",
            f"KL {_number(logs.get('policy/approx_kl'), '.3f')}",
            f"clipped {_number(logs.get('policy/clip_fraction'), '.2f')}",
            *(f"{name} {logs[key]:{form}}" for key, name, form in _ALGORITHM_FIGURES if key in logs),
            f"env steps {int(logs['env_steps']):,}",
            f"{logs['time/rollout']:.1f}+{logs['time/update']:.1f} s",
            f"left {_clock(left)}",
        ]
        return "  " + "  ".join(parts)


def _clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def evaluation_line(logs: dict[str, float]) -> str:
    """One line for an evaluation's metrics."""
    parts = _return_part(logs["eval_success_rate"], logs["eval_return"])
    if "eval_success_rate_mean_of_groups" in logs:
        parts.insert(0, f"mean of groups {logs['eval_success_rate_mean_of_groups']:.3f}")
    if "eval_average_length" in logs:
        parts = [f"average length {logs['eval_average_length']:.3f}"]
    return (
        f"  evaluation: success {logs['eval_success_rate']:.3f} "
        f"[{logs['eval_ci95_low']:.2f}, {logs['eval_ci95_high']:.2f}], {''.join(f'{part}, ' for part in parts)}"
        f"length {logs['eval_episode_length']:.1f}, {int(logs['eval_n_episodes'])} episodes, "
        f"{logs['eval_runtime']:.1f} s"
    )


def _return_part(success: float | None, paid: float | None) -> list[str]:
    """The return, where it says more than the success rate."""
    return [] if paid is None or paid == success else [f"return {paid:.4g}"]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
