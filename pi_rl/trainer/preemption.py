"""What a run does when it is told to end: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (SLURM's ``--signal=USR1@600``).

An update goes on to the end of its iteration. A rollout or evaluation ends at once: it has not changed the weights, so
the state is that of the last completed iteration. That state is saved, and the run ends. The same signal a second
time ends it at once, without saving.

Under ``accelerate launch`` or torchrun there is no time for that: the launcher, told to end, passes the signal on and
kills its processes 30 s later. There an update ends before its next forward pass. What is saved then are the counters
of the last completed iteration with the weights as its updates have left them, so that a resumed run repeats the
iteration; where the iteration's checkpoint is on disk already, it stays as it is.
"""

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pi_rl.checkpoint_order import RL_STATE_NAME
from pi_rl.progress import ProgressFn, say
from pi_rl.trainer.metrics import all_reduce
from pi_rl.trainer.not_finite import FiniteTrainer
from pi_rl.trainer.plain_state import read_json
from pi_rl.trainer.processes import leave_process_group, naming_lost_processes
from pi_rl.trainer.stop_signals import Preempted, SavedInterrupt, StopSignals, under_launcher

logger = logging.getLogger(__name__)


class _Stop(Exception):
    """All processes have agreed to end the run because of a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _CutShort(Exception):
    """This process was told to end during a rollout or evaluation."""


class InterruptibleTrainer(FiniteTrainer):
    """A trainer that saves its state when it is told to end."""

    _signals: StopSignals | None = None
    _evaluation_due = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; a signal to end saves the last completed iteration first.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the newest readable one in ``output_dir``.
            *args: Of ``Trainer.train``.
            **kwargs: Of ``Trainer.train``.

        Raises:
            SavedInterrupt: A KeyboardInterrupt, after Ctrl-C.
            Preempted: A SystemExit with code 75, after another signal.
            CheckpointError: If the checkpoint cannot be resumed.
            NotWritten: If the last checkpoint cannot be written.
            ProcessLost: If another process of the run has ended or does not answer.
        """
        self._asked_first_evaluation = self.args.eval_on_start
        self._last_end = self._saved_step = None
        self._evaluation_due = False
        when = "as soon as it can" if under_launcher() else "after this iteration"
        announce = when if self.args.process_index == 0 else None
        with StopSignals(announce=announce) as signals, naming_lost_processes(self.args.ddp_timeout):
            self._signals = signals
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            except _Stop as stop:
                signals.saving = True
                self._end_after_saving(stop.signum)
            finally:
                self._signals = None
                self.args.eval_on_start = self._asked_first_evaluation

    def _end_after_saving(self, signum: int) -> NoReturn:
        """Writes the checkpoint of the last completed iteration, unless there is one, and raises."""
        name = signal.Signals(signum).name
        if self._last_end is None:
            checkpoint, text = None, f"Ended by {name} before an iteration was complete: there is nothing to resume."
        else:
            in_update = self.state.global_step != self._last_end.step
            self.rewind()
            checkpoint = self.checkpoint_of_last_iteration()
            text = f"Ended by {name}; {checkpoint} is complete, resume_from_checkpoint=True goes on from it."
            text += " It repeats the iteration whose updates were cut short." if in_update else ""
        say(text, enabled=self.args.process_index == 0)
        self._finish_chunks()
        if signum == signal.SIGINT:
            raise SavedInterrupt(text, checkpoint) from None
        leave_process_group()
        raise Preempted(text, checkpoint) from None

    def _finish_chunks(self) -> None:
        """Lets the simulators end what they were asked, for whoever goes on with them; last, as it may fail."""
        try:
            while self.env.pending_chunks:
                self.env.finish_chunk()
        except Exception as error:  # whatever a simulator raises: the state is saved
            logger.warning(f"The simulators did not end the chunk that they were in: {error}")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch; a run under a launcher, which does not wait for the iteration's end, may end before it."""
        if under_launcher():
            self.end_if_told()
        return super().training_step(model, inputs, num_items_in_batch)

    def until_told[T](self, act: Callable[[ProgressFn], T], progress: ProgressFn) -> T:
        """Runs a rollout or an evaluation, which ends when any process was told to end; a collective call.

        Args:
            act: Takes the function to report progress to, which ends it. A sharded model's processes agree there: all
                of them have to report equally often.
            progress: Shows progress.
        """

        def watched(done: int, total: int, text: str) -> None:
            progress(done, total, text)
            told = self._signals is not None and self._signals.received > 0
            if self.agree(told):
                raise _CutShort

        try:
            result = act(watched)
        except _CutShort:
            self.end_if_told()
            raise RuntimeError("The processes do not agree on the end of the run.") from None
        self.end_if_told()
        return result

    def end_if_told(self) -> None:
        """Ends the run on all processes if any of them was told to; a collective call."""
        if self._signals is None or not self._signals.active:
            return
        told = all_reduce(self.accelerator, torch.tensor(self._signals.received), "max")
        if told:
            raise _Stop(int(told))

    def rl_state(self) -> dict[str, Any]:
        """Counters, and whether the checkpoint's evaluation was cut short."""
        return {**super().rl_state(), "evaluation_due": self._evaluation_due}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # a resumed run has had its first evaluation; it makes up for one that was cut short
        self._evaluation_due = read_json(Path(resume_from_checkpoint) / RL_STATE_NAME)["evaluation_due"]
        self.args.eval_on_start = self._evaluation_due

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except _Stop:
            self._evaluation_due = self._last_end is not None
            raise
        if self._evaluation_due:
            self._evaluation_due = False
            self._determine_best_metric(metrics, trial)
        return metrics

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.args.eval_on_start = self._asked_first_evaluation
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """At the end of an iteration, its state can be saved: here the run ends if it was told to."""
        complete = self.state.global_step % self.args.updates_per_iteration == 0
        if complete:
            self.check_parameters()
            self.remember_iteration()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if complete:
            self.remember_iteration()
            self.end_if_told()
