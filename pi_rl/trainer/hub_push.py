"""The Trainer's pushes to the Hub: checkpoints while training goes on, the result at the end, failures as a report."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers.trainer_utils import HubStrategy

from pi_rl.hub.card import is_unchanged, mark_written
from pi_rl.hub.push import PushOutcome, push_command
from pi_rl.hub.push_contents import (
    POLICY_FOLDER,
    checkpoint_contents,
    policy_contents,
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


class PushingTrainer(CheckpointedTrainer):
    """Pushes as `transformers.Trainer` does, with `push_to_hub` and the options `hub_*`, but never stops for the Hub.

    Every push is one commit of a complete policy folder with a card. The first process pushes, in a process of its
    own; a failure is remembered, and told at the end with the command that repeats the push.
    """

    hub_model_id: str | None
    _queue: PushQueue | None = None
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
            self._queue = PushQueue()
            for left in Path(self.args.output_dir).glob(f"{_STAGING}*"):  # of a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        self._queue.token = token = token or self.args.hub_token
        job = PushJob(
            repo_id=name,
            command=self._command(Path(self.args.output_dir), name),
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
        busy = self._queue.busy
        self._announce_first_failure()
        if busy and not self.args.hub_always_push:
            self._pushes_skipped += 1
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        # by the name that it has when it is complete
        final = Path(self.args.output_dir) / Path(checkpoint_folder).name
        self._add(lambda: self._checkpoint_job(Path(checkpoint_folder), final, message), final)

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
        # the other processes of a distributed run must not wait for the upload, longer than their limit: `close` does
        if self.args.world_size == 1:
            self._wait_for_pushes()

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
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._wait_for_pushes()
        self._add(lambda: self._saved_job(Path(folder), message, revision), Path(folder))
        if not blocking:
            return None
        say("Pushing to the Hub …")
        self._wait_for_pushes()
        outcome = self._queue.outcomes[-1]
        if outcome.error is None:
            say(f"On the Hub: {outcome.describe()}")
        return outcome

    def report_pushes(self) -> None:
        """Tells on standard error which pushes failed and how to repeat the last.

        Waits for pushes that go on if the training is complete, and ends them if it was broken off.
        """
        if self._queue is None:
            return
        if self.state.global_step >= self.state.max_steps:
            self._wait_for_pushes()
        self._queue.end()
        outcomes, self._queue.outcomes = self._queue.outcomes, []
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if not failed:
            return
        skipped = self._pushes_skipped
        parts = [
            f"{len(failed)} of {len(outcomes)} pushes to the Hub failed; training went on.",
            f"The last failure: {failed[-1].error}.",
            f"{skipped} checkpoints were not pushed because an earlier push went on." if skipped else "",
            "The last push succeeded, so the Hub has the latest state."
            if outcomes[-1].error is None
            else f"Everything is in {self.args.output_dir}. To push it: {outcomes[-1].command}",
        ]
        text = " ".join(filter(None, parts))
        note_warning(self.args.output_dir, text)
        _warn(text)

    def _wait_for_pushes(self) -> None:
        if self._queue is not None:
            self._queue.finish(FINISH_LIMIT_S)

    def _announce_first_failure(self) -> None:
        assert self._queue is not None
        failed = next((outcome for outcome in self._queue.outcomes if outcome.error is not None), None)
        if failed is not None and not self._failure_announced:
            self._failure_announced = True
            _warn(f"A push to {failed.repo_id} failed: {failed.error}. Training goes on; a report follows at the end.")

    def _command(self, folder: Path, repo_id: str) -> str:
        return push_command(folder, repo_id, private=bool(self.args.hub_private_repo), revision=self.args.hub_revision)

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

    def _add(self, make_job: Callable[[], PushJob], folder: Path) -> None:
        """Lets a push begin; what keeps it from beginning is an outcome, too."""
        assert self._queue is not None
        try:
            self._queue.add(make_job())
        except (ValueError, OSError) as error:
            name = self.hub_model_id or self.args.hub_model_id or "user/name"
            self._queue.outcomes.append(
                PushOutcome(repo_id=name, command=self._command(folder, name), error=f"{error}")
            )

    @contextmanager
    def _folder_to_push(self) -> Iterator[Path]:
        """A folder for what is pushed, on the file system of the run; it stays unless the block fails."""
        folder = Path(tempfile.mkdtemp(prefix=_STAGING, dir=self.args.output_dir))
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _checkpoint_job(self, folder: Path, final: Path, message: str) -> PushJob:
        """A push of a checkpoint from links to its files, because the run deletes old checkpoints."""
        repo_id = self._repo()
        with self._folder_to_push() as staging:
            copy = staging / final.name
            shutil.copytree(folder, copy, copy_function=_link)
            whole = {}
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                last = self.args.hub_strategy == HubStrategy.CHECKPOINT
                whole = checkpoint_contents(copy, repo_id, LAST_CHECKPOINT if last else final.name).files
            with_card(copy, repo_id, Path(self.args.output_dir), self.state.log_history)
            files = local_files(policy_contents(copy, repo_id).files | whole, staging / "texts")
            return self._job(files, repo_id, final, message, None, staging)

    def _saved_job(self, folder: Path, message: str, revision: str | None) -> PushJob:
        repo_id = self._repo()
        with self._folder_to_push() as staging:
            self._renew_card(folder, repo_id)
            files = local_files(policy_contents(folder, repo_id).files, staging / "texts")
            return self._job(files, repo_id, folder, message, revision, staging)

    def _job(
        self, files: dict[str, str], repo_id: str, folder: Path, message: str, revision: str | None, staging: Path
    ) -> PushJob:
        return PushJob(
            repo_id=repo_id,
            command=self._command(folder, repo_id),
            files=files,
            message=message,
            private=self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            staging=str(staging),
        )


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
