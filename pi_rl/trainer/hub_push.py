"""The Trainer's pushes to the Hub: checkpoints while training goes on, the result at the end, failures as a report."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers.trainer_utils import HubStrategy

from pi_rl.hub.card import is_unchanged, mark_written
from pi_rl.hub.push import PushOutcome, push_command, reason_of
from pi_rl.hub.push_contents import (
    POLICY_FOLDER,
    contents_to_push,
    with_card,
)
from pi_rl.hub.push_process import PushJob, PushQueue, local_files, run_push
from pi_rl.progress import say
from pi_rl.run_report import note_warning
from pi_rl.trainer.checkpointing import CheckpointedTrainer

CREATE_LIMIT_S, FINISH_LIMIT_S = 60.0, 2 * 3600.0
"""Longest waits: for the repository at the start, for the pushes at the end."""
LAST_CHECKPOINT = "last-checkpoint"
_STAGING = ".push-"
_CARD_FIELDS = ("language", "license", "tags", "model_name", "finetuned_from", "dataset")


@dataclass(frozen=True, kw_only=True)
class _Push:
    """What is pushed, and where to.

    Attributes:
        folder: Complete on the disk.
        message: Of the commit.
        revision: Branch; None is main.
        whole: Subfolder of the repository for a whole checkpoint; None is none.
        linked: Whether it is pushed from links, because the run deletes old checkpoints.
    """

    folder: Path
    message: str
    revision: str | None
    whole: str | None = None
    linked: bool = False


class PushingTrainer(CheckpointedTrainer):
    """Pushes as `transformers.Trainer` does, with `push_to_hub` and the options `hub_*`, but never stops for the Hub.

    Every push is one commit of a complete policy folder with a card. The first process pushes, in a process of its
    own; a failure is remembered, and told after the training and in `close` with the command that repeats the push.
    """

    hub_model_id: str | None
    _queue: PushQueue | None = None
    _newest_pushes: dict[str | None, str]  # by branch, what pushes the newest state there, until it is reported
    _left_out: _Push | None = None  # the newest checkpoint, if it was not pushed because a push went on
    _pushes_skipped: int = 0
    _failure_announced: bool = False
    _card_metadata: Mapping[str, Any] = MappingProxyType({})

    # ---- the Trainer's hooks ---------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None) -> None:
        """Creates the repository; if the Hub refuses that is told at once, and tried again with every push.

        Args:
            token: Access token; by default `hub_token`, HF_TOKEN or that of `hf auth login`.

        Raises:
            ValueError: `hub_model_id` cannot be a repository.
        """
        if not self.is_world_process_zero() or self.args.dry_run:
            return
        name = str(self.args.hub_model_id or Path(self.args.output_dir).absolute().name)
        _check_name(name)
        if self._queue is None:
            self._queue, self._newest_pushes = PushQueue(), {}
            for left in Path(self.args.output_dir).glob(f"{_STAGING}*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        self._queue.token = token = token or self.args.hub_token
        job = PushJob(
            repo_id=name,
            command=push_command(self.args.output_dir, name),
            files={},
            private=self.args.hub_private_repo,
            revision=self.args.hub_revision,
            once=True,
        )
        outcome = run_push(job, token=token, limit_s=CREATE_LIMIT_S)
        if outcome.error is None:
            self.hub_model_id = outcome.repo_id
            return
        self.hub_model_id = name if "/" in name else None
        _warn(f"The repository {name} could not be prepared: {outcome.error}. Training starts nevertheless.")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy folder, and with `push_to_hub` uploads it when the user calls this.

        Args:
            output_dir: The folder; by default `output_dir` of the arguments.
            _internal_call: Save only.
        """
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_saved(output_dir or self.args.output_dir, "Model save")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Begins to push a checkpoint, unless the last push goes on (`hub_always_push` lets it wait in line)."""
        if not self._pushes or self.args.hub_strategy == HubStrategy.END or self._queue is None:
            return
        busy, push = self._queue.busy, self._checkpoint_push(Path(checkpoint_folder))
        self._announce_first_failure()
        if busy and not self.args.hub_always_push:
            self._left_out = push
            self._pushes_skipped += 1
            self._newest_pushes[push.revision] = self._command(push, self._known_name)
            return
        self._left_out = None
        self._begin(push)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PushOutcome | None:
        """Saves the policy into `output_dir`'s `policy/` and uploads it with its card and the run's results.

        Args:
            commit_message: Message of the commit.
            blocking: Wait for the end of the upload; otherwise it begins, and `close` or the next push waits for it.
            token: Access token; by default `hub_token`, HF_TOKEN or that of `hf auth login`.
            revision: Branch; by default `hub_revision`.
            **kwargs: Metadata of the card, see :meth:`create_model_card`.

        Returns:
            The outcome; None on other processes, and when it is not waited for.
        """
        folder = Path(self.args.output_dir) / POLICY_FOLDER
        self.save_model(str(folder), _internal_call=True)
        if not self.is_world_process_zero():
            return None
        if self._queue is None or token is not None:
            self.init_hf_repo(token)
        self.create_model_card(**kwargs)
        return self.push_saved(folder, commit_message or "End of training", revision=revision, blocking=blocking)

    def create_model_card(self, **metadata: Any) -> None:
        """Writes the card of the policy in `output_dir`'s `policy/`, with metadata that later cards of it keep.

        A card that somebody else wrote or changed stays; the metadata is added to it.

        Args:
            **metadata: language, license, tags, model_name, finetuned_from or dataset, as in `Trainer`.

        Raises:
            ValueError: Other metadata was given.
        """
        if not self.is_world_process_zero():
            return
        if unknown := set(metadata) - set(_CARD_FIELDS):
            raise ValueError(f"The card takes {', '.join(_CARD_FIELDS)}; got {', '.join(sorted(unknown))}.")
        self._card_metadata = {**self._card_metadata, **metadata}
        self._renew_card(Path(self.args.output_dir) / POLICY_FOLDER, self.hub_model_id or "")

    def _renew_card(self, folder: Path, repo_id: str) -> None:
        """The card of the policy as it is now; one that the user made is kept."""
        from huggingface_hub import ModelCard

        path = with_card(folder, repo_id, Path(self.args.output_dir), self.state.log_history)
        if not self._card_metadata:
            return
        own = is_unchanged(path)
        card = ModelCard.load(path)
        names = {"finetuned_from": "base_model", "dataset": "datasets"}
        given = {names.get(name, name): value for name, value in self._card_metadata.items() if value is not None}
        tags = given.pop("tags", [])
        for name, value in given.items():
            setattr(card.data, name, value)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *([tags] if isinstance(tags, str) else tags)]))
        card.save(path)
        if own:
            mark_written(path)

    def _finish_current_push(self) -> None:
        """At the end of the training: pushes the newest checkpoint if it was left out, and reports."""
        if self._queue is None:
            return
        if self._left_out is not None:
            self._pushes_skipped -= 1
            self._begin(self._left_out)
        self._left_out = None
        # the other processes of a distributed run must not wait for the upload, longer than their limit: `close` does
        if self.args.world_size == 1:
            self._wait_for_pushes()
        self._report()
        if self._queue.busy:
            say("A push to the Hub goes on; trainer.close() waits for it and reports.")

    # ---- what is ours ----------------------------------------------------------------------------------------------

    @property
    def _pushes(self) -> bool:
        return self.args.push_to_hub and not self.args.dry_run and self.is_world_process_zero()

    def push_saved(
        self,
        folder: str | Path,
        message: str = "End of training",
        *,
        revision: str | None = None,
        blocking: bool = True,
    ) -> PushOutcome | None:
        """Uploads a folder that is complete on the disk, after the pushes that go on; never raises for the Hub.

        Args:
            folder: Output folder of the run, or a policy folder.
            message: Message of the commit.
            revision: Branch; by default `hub_revision`.
            blocking: Wait for the end of the upload.

        Returns:
            The outcome; None on other processes, in a dry run, and when it is not waited for.
        """
        if self._queue is None or self.args.dry_run or not self.is_world_process_zero():
            return None
        self._wait_for_pushes()
        revision = revision or self.args.hub_revision
        self._begin(_Push(folder=Path(folder), message=message, revision=revision))
        if not blocking:
            return None
        say("Pushing to the Hub …")
        self._wait_for_pushes()
        outcome = self._queue.outcomes[-1]
        if outcome.error is None:
            say(f"On the Hub: {outcome.describe()}")
        return outcome

    def report_pushes(self) -> None:
        """Tells on standard error which pushes failed since the last report, and how to repeat the last.

        Waits for pushes that go on, and ends them if the training was broken off.
        """
        if self._queue is None:
            return
        if not self.is_in_train:  # which stays True when the training ends by an exception
            self._wait_for_pushes()
        self._queue.end()
        self._report()

    def _report(self) -> None:
        assert self._queue is not None
        busy = self._queue.busy
        outcomes, self._queue.outcomes = self._queue.outcomes, []
        skipped, self._pushes_skipped = self._pushes_skipped, 0
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        last = {outcome.command: outcome.error for outcome in outcomes}
        unknown = None if busy else "never begun"
        missing = [command for command in self._newest_pushes.values() if last.get(command, unknown) is not None]
        parts = []
        if failed:
            parts.append(f"{len(failed)} of {len(outcomes)} pushes to the Hub failed; training went on.")
            parts.append(f"The last failure: {failed[-1].error}.")
        if skipped:
            parts.append(f"Checkpoints that were not pushed because an earlier push went on: {skipped}.")
        if missing:
            parts.append(f"Everything is in {self.args.output_dir}. To push the latest state: {'; '.join(missing)}")
        elif parts and not busy:
            parts.append("The Hub has the latest state.")
        self._newest_pushes = {place: told for place, told in self._newest_pushes.items() if busy and told not in last}
        text = " ".join(parts)
        if failed or missing:
            note_warning(self.args.output_dir, text)
            _warn(text)
        elif text:
            say(text)

    def _wait_for_pushes(self) -> None:
        if self._queue is not None:
            self._queue.finish(FINISH_LIMIT_S)

    def _announce_first_failure(self) -> None:
        assert self._queue is not None
        failed = next((outcome for outcome in self._queue.outcomes if outcome.error is not None), None)
        if failed is not None and not self._failure_announced:
            self._failure_announced = True
            _warn(f"A push to {failed.repo_id} failed: {failed.error}. Training goes on; a report follows at the end.")

    def _command(self, push: _Push, repo_id: str) -> str:
        private = bool(self.args.hub_private_repo)
        return push_command(push.folder, repo_id, private=private, revision=push.revision, whole=push.whole)

    @property
    def _known_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or "user/name"

    def _repo(self) -> str:
        """The repository's full name.

        Raises:
            ValueError: Its owner could not be asked for.
        """
        if self.hub_model_id is None:
            self.init_hf_repo()
        if self.hub_model_id is None:
            raise ValueError("the owner of the repository is unknown; give hub_model_id as user/name")
        return self.hub_model_id

    def _checkpoint_push(self, folder: Path) -> _Push:
        names = {HubStrategy.CHECKPOINT: LAST_CHECKPOINT, HubStrategy.ALL_CHECKPOINTS: folder.name}
        return _Push(
            folder=folder,
            message=f"Training in progress, step {folder.name.rpartition('-')[2]}",
            revision=self.args.hub_revision,
            whole=names.get(self.args.hub_strategy),
            linked=True,
        )

    def _begin(self, push: _Push) -> None:
        """Lets a push begin; whatever keeps it from beginning is an outcome, too."""
        assert self._queue is not None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        repo_id = self._known_name
        command = self._command(push, repo_id)
        try:
            repo_id = self._repo()
            command = self._command(push, repo_id)
            self._queue.add(self._job(push, repo_id, command))
        except Exception as error:  # the Hub, and whatever is odd about the folder, stops no training
            why = reason_of(error, repo_id, self._queue.token)
            self._queue.outcomes.append(PushOutcome(repo_id=repo_id, command=command, error=why))
        self._newest_pushes[push.revision] = command

    def _job(self, push: _Push, repo_id: str, command: str) -> PushJob:
        """The push of a folder, with its files or links to them, on the file system of the run."""
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.args.output_dir))
        try:
            folder = push.folder
            if push.linked:
                folder = staging / push.folder.name
                shutil.copytree(push.folder, folder, copy_function=_link)
                with_card(folder, repo_id, Path(self.args.output_dir), self.state.log_history)
            else:
                self._renew_card(folder, repo_id)
            contents = contents_to_push(folder, repo_id, push.whole)
            return PushJob(
                repo_id=repo_id,
                command=command,
                files=local_files(contents.files, staging / "texts"),
                replaces=contents.replaces,
                message=push.message,
                private=self.args.hub_private_repo,
                revision=push.revision,
                staging=str(staging),
            )
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for a file; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"hub_model_id={name!r} cannot be a repository: {error}") from error


def _warn(text: str) -> None:
    print(f"\nwarning: {text}", file=sys.stderr, flush=True)
