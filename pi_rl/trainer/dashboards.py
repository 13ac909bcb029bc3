"""TensorBoard, Weights & Biases and Trackio: one record for the whole run, and films of evaluation episodes in it."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, default_logdir

from pi_rl.hub.videos import Frames, write_gif, write_video
from pi_rl.progress import say
from pi_rl.rollout.evaluator import evaluation_ids, record_episode
from pi_rl.run_report import note_warning
from pi_rl.secrets import redacted
from pi_rl.trainer.sharding import is_sharded

VIDEOS_NAME = "videos"
FILM_SIZE = (256, 256)
FRAMES_PER_SECOND = 40
"""At most so many frames of a simulated second are drawn."""
_EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))


class RunLongTrackio(TrackioCallback):
    """Trackio's callback, whose record stays open after training, for the evaluation that follows."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the record open; :func:`close_dashboards` ends it."""


def prepare_dashboards(trainer: Any) -> None:
    """Lets what is logged before and after training go where the training's log goes, guards it, and adds the films.

    Transformers' TensorBoard callback chooses its folder at the beginning of training, and its Trackio callback ends
    its record with it; recipes evaluate before and after. A dashboard that fails once training has begun is said,
    noted for the run's page and left out from then on; one that cannot start is an error of the first log entry or of
    the beginning of training, before anything is trained.

    Args:
        trainer: A trainer with its environment; its arguments say what is reported and filmed.

    Raises:
        ValueError: ``eval_videos`` is set, and there is nothing to film or no whole model to film it with.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(trainer.args.output_dir) / default_logdir())
    if trainer.pop_callback(TrackioCallback) is not None:
        trainer.add_callback(RunLongTrackio)
    for callback in trainer.callback_handler.callbacks:
        kind = TrackioCallback if isinstance(callback, RunLongTrackio) else type(callback)
        names = [name for name, known in INTEGRATION_TO_CALLBACK.items() if known is kind]  # not of a user's own class
        if names:
            _Guard(trainer, callback, names[0])
    if trainer.args.eval_videos:
        trainer.add_callback(EvaluationVideos(trainer))


def close_dashboards(trainer: Any) -> None:
    """Ends the records that this process has open; one that cannot be ended is said, and the others are.

    Args:
        trainer: The trainer that wrote them.
    """
    for callback in trainer.callback_handler.callbacks:
        _release(callback)
        name = "Trackio" if isinstance(callback, RunLongTrackio) else "TensorBoard"  # others end theirs by themselves
        with _said_if_it_fails(f"{name}'s record", trainer.args.output_dir, "It may lack its last entries."):
            _end_record(callback, trainer)


def _end_record(callback: TrainerCallback, trainer: Any) -> None:
    if isinstance(callback, RunLongTrackio) and callback._initialized and trainer.is_world_process_zero():
        callback._initialized = False
        callback._trackio.finish()
    elif isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        writer, callback.tb_writer = callback.tb_writer, None
        writer.close()


def _release(callback: TrainerCallback) -> None:
    """Takes the guard of an earlier trainer off a callback."""
    for event in _EVENTS:
        vars(callback).pop(event, None)


class _Guard:
    """Takes a dashboard's callback out of the run when it fails once training has begun with it.

    It stays out: vendors' clients try again by themselves what may work later, and TensorBoard's writer does not
    outlive its first error.

    Args:
        trainer: Its handler calls the callback.
        callback: Of Transformers; its events go through the guard.
        name: As in ``report_to``.
    """

    def __init__(self, trainer: Any, callback: TrainerCallback, name: str) -> None:
        self._trainer, self._callback, self._name = trainer, callback, name
        self._begun = False
        _release(callback)
        for event in _EVENTS:
            guarded = self._begin if event == "on_train_begin" else self._pass_on
            setattr(callback, event, partial(guarded, getattr(callback, event)))

    def _begin(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        control = act(*args, **kwargs)  # a missing package or wrong setting is the user's to hear, with nothing lost
        self._begun = True
        return control

    def _pass_on(self, act: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._begun:
            return act(*args, **kwargs)
        try:
            return act(*args, **kwargs)
        except Exception as error:  # from the vendors' clients: of any type
            handler = self._trainer.callback_handler
            # a new list: the handler is iterating over the old one
            handler.callbacks = [callback for callback in handler.callbacks if callback is not self._callback]
            what = f"The dashboard {self._name}"
            _say_failure(what, error, self._trainer.args.output_dir, "The run goes on without it.")
            _release(self._callback)
            with suppress(Exception):  # what went wrong is said
                _end_record(self._callback, self._trainer)
            return None


@dataclass(frozen=True)
class Film:
    """One filmed episode.

    Attributes:
        path: The MP4 file.
        frames: (n, height, width, 3) uint8.
        fps: Frames per second.
        caption: Instruction and outcome.
    """

    path: Path
    frames: Frames
    fps: float
    caption: str


class EvaluationVideos(TrainerCallback):
    """Films the first ``eval_videos`` episodes of every evaluation, for ``output_dir/videos`` and the dashboards.

    Every film is an episode of its own, from the initial state and the flow's noise of the evaluated one. The same
    states are filmed each time, of different tasks first. Training is not affected: every iteration resets its
    environments, and a film that fails (full disk, renderer, a dashboard's client) is said, noted for the run's page
    and left out.

    Args:
        trainer: Films with its model and environment.

    Raises:
        ValueError: The environment draws no pictures, or the model is spread over the processes.
    """

    def __init__(self, trainer: Any) -> None:
        spec = trainer.env.spec
        if not spec.cameras:
            raise ValueError(f"eval_videos={trainer.args.eval_videos}: {spec.name} has no pictures; set it to 0.")
        if is_sharded(trainer.actor_critic):
            raise ValueError(
                f"eval_videos={trainer.args.eval_videos}: no process has the whole model to film with; set it to 0, "
                "and film checkpoints with `pi-rl eval --videos`."
            )
        self._trainer = trainer

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Films, writes the files and hands them to the dashboards; on the first process."""
        if not state.is_world_process_zero:
            return
        trainer = self._trainer
        ids = evaluation_ids(trainer.env.spec, trainer.args.eval_episodes)[: trainer.args.eval_videos]
        for episode, reset_id in enumerate(ids):
            with _said_if_it_fails(f"The film of evaluation episode {episode}", args.output_dir, "Training goes on."):
                film = self._film(episode, reset_id)
                for callback in trainer.callback_handler.callbacks:
                    _hand_over(callback, film, f"eval/video/{episode}", state.global_step)

    def _film(self, episode: int, reset_id: np.ndarray) -> Film:
        trainer = self._trainer
        env, args = trainer.env, trainer.args
        every = max(1, env.spec.fps // FRAMES_PER_SECOND)
        was_training = trainer.actor_critic.training
        try:
            frames, success = record_episode(
                trainer.actor_critic, env, trainer.io, reset_id, seed=args.eval_seed, size=FILM_SIZE, every=every
            )
        finally:
            trainer.actor_critic.train(was_training)
        fps = env.spec.fps / every
        path = Path(args.output_dir) / VIDEOS_NAME / f"step-{trainer.env_steps}-episode-{episode}.mp4"
        write_video(frames, path, fps)
        instruction = env.spec.instruction(*reset_id.tolist())
        return Film(path, frames, fps, f"{instruction}: {'success' if success else 'failure'}")


@contextmanager
def _said_if_it_fails(what: str, folder: str, consequence: str) -> Iterator[None]:
    """Says and notes what failed in the block; the run, which does not need it, goes on."""
    try:
        yield
    except Exception as error:  # from encoders, renderers and the vendors' clients: of any type
        _say_failure(what, error, folder, consequence)


def _say_failure(what: str, error: Exception, folder: str, consequence: str) -> None:
    text = redacted(f"{what} failed: {str(error) or type(error).__name__}. {consequence}")
    say(f"  {text}")
    note_warning(folder, text)


def _hand_over(callback: TrainerCallback, film: Film, name: str, step: int) -> None:
    """Adds a film to the record that a callback of Transformers keeps, if it does."""
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        _add_gif(callback.tb_writer, film, name, step)
    elif isinstance(callback, WandbCallback) and callback._initialized:
        wandb = callback._wandb
        # as this callback's own logging: no step of its own, the x axis is train/global_step
        wandb.log({name: wandb.Video(str(film.path), caption=film.caption, format="mp4"), "train/global_step": step})
    elif isinstance(callback, TrackioCallback) and callback._initialized:
        trackio = callback._trackio
        trackio.log({name: trackio.Video(str(film.path), caption=film.caption), "train/global_step": step})


def _add_gif(writer: Any, film: Film, name: str, step: int) -> None:
    """An animated picture, which TensorBoard shows; its own add_video needs a package more, and writes the same."""
    summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
    with tempfile.TemporaryDirectory() as folder:
        content = write_gif(film.frames, Path(folder) / "film.gif", film.fps).read_bytes()
    height, width = film.frames.shape[1:3]
    image = summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    writer.file_writer.add_summary(summary(value=[summary.Value(tag=name, image=image)]), step)
    writer.add_text(f"{name}/caption", film.caption, step)
    writer.flush()
