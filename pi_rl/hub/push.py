"""Uploads of policies to the Hugging Face Hub: one commit, repeated where that can help, with the outcome as a value.

The Hub's client itself repeats requests of the upload (429, 5xx, broken connections); what it sends only once, the
creation of the repository and the commit, is repeated here. Contents that the Hub already has are not sent again, so a
push that was interrupted is completed by repeating it.
"""

import fnmatch
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pi_rl.progress import say
from pi_rl.secrets import redacted

WAITS_S = (1.0, 4.0, 16.0)
"""Seconds before each repetition of what the client sends once; the Hub's Retry-After counts where it is longer."""
_LONGEST_WAIT_S = 300.0
_SENT_ONCE = ("/api/repos/create", "/api/validate-yaml", "/api/models/")
_PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
_LONGEST_REASON = 400


@dataclass(frozen=True, kw_only=True)
class PushOutcome:
    """What became of a push.

    Attributes:
        repo_id: "user/name".
        command: Shell command that repeats it.
        url: Page of the repository (at the revision); None after a failure.
        commit: Hash of the commit that holds the files; None after a failure.
        changed: Whether a commit was made; False when the Hub had everything already.
        files: Paths in the repository of what was uploaded or was there already.
        size: Bytes of these files.
        removed: Paths that were there before and that these files replace.
        error: Why it failed and what helps, without access tokens; None after success.
        refused: Whether the Hub refused it for a reason that the user can change, rather than failed.
    """

    repo_id: str
    command: str
    url: str | None = None
    commit: str | None = None
    changed: bool = False
    files: tuple[str, ...] = ()
    size: int = 0
    removed: tuple[str, ...] = ()
    error: str | None = None
    refused: bool = False

    def describe(self) -> str:
        """One paragraph: the page and what is there, or what went wrong and the command that repeats it."""
        if self.error is not None:
            return (
                f"The push to {self.repo_id} failed: {self.error}. Nothing was published by it; what had arrived is "
                f"not sent again by: {self.command}"
            )
        state = "uploaded" if self.changed else "the Hub had it all"
        removed = f"; {len(self.removed)} of an earlier push removed" if self.removed else ""
        return f"{self.url} ({len(self.files)} files, {size_text(self.size)}: {state}{removed})"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    message: str = "Upload policy",
    private: bool | None = None,
    revision: str | None = None,
    whole: str | None = None,
    token: str | None = None,
) -> PushOutcome:
    """Uploads the policy of a folder with its card and results.

    A policy without a card gets one in its folder first. Files of an earlier push that are no part of this one are
    removed in the same commit; other files in the repository stay.

    Args:
        folder: A run's output folder, a checkpoint of one, or a policy folder.
        repo_id: "user/name"; the repository is created if it does not exist.
        message: Of the commit.
        private: True creates a private repository, and refuses a public one that exists; None leaves it to the Hub.
        revision: Branch to commit to; it is created if it does not exist. None is main.
        whole: Name of a subfolder, "last-checkpoint" or "checkpoint-N", for all of a checkpoint, to resume from.
        token: With write access; by default HF_TOKEN or that of `hf auth login`.

    Raises:
        ValueError: The folder holds no complete policy, or with `whole` no complete checkpoint; its card cannot be
            read; or `repo_id` is none. What goes wrong with the Hub is in the outcome.
    """
    from pi_rl.hub.push_contents import contents_to_push, with_card

    check_repo_id(repo_id)
    with_card(folder, repo_id)
    contents = contents_to_push(folder, repo_id, whole)
    return push_files(
        contents.files,
        repo_id,
        command=push_command(folder, repo_id, private=bool(private), revision=revision, whole=whole),
        replaces=contents.replaces,
        message=message,
        private=private,
        revision=revision,
        token=token,
    )


def push_and_tell(folder: str | Path, repo_id: str, *, private: bool | None = None) -> PushOutcome:
    """Pushes at the end of a run, prints what came of it, and never raises for it: the run's work is on the disk.

    Args:
        folder: See :func:`push_folder`.
        repo_id: "user/name".
        private: See :func:`push_folder`.
    """
    say("\nPushing to the Hub …")
    try:
        outcome = push_folder(folder, repo_id, private=private)
    except Exception as error:  # whatever is odd about the folder
        command = push_command(folder, repo_id, private=bool(private))
        outcome = PushOutcome(repo_id=repo_id, command=command, error=reason_of(error, repo_id), refused=True)
    if outcome.error is None:
        say(f"On the Hub: {outcome.describe()}")
    else:
        print(f"\nwarning: {outcome.describe()}", file=sys.stderr, flush=True)
    return outcome


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    command: str,
    replaces: Sequence[str] = (),
    message: str = "Upload policy",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    waits: Sequence[float] | None = None,
) -> PushOutcome:
    """Uploads chosen files as one commit.

    Args:
        files: Path in the repository to a local file or a content. Without any, repository and branch are created.
        repo_id: "user/name"; a name alone is the token owner's.
        command: What repeats it, for the outcome.
        replaces: Patterns of paths in the repository ("videos/*.mp4", "last-checkpoint/"; a star stands for part of
            one name): what matches and is none of `files` is removed in the same commit.
        message: Of the commit.
        private: See :func:`push_folder`.
        revision: See :func:`push_folder`.
        token: See :func:`push_folder`.
        waits: Seconds before each repetition; None takes `WAITS_S`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    size = sum(map(size_of, files.values()))
    try:
        repo_id, before = _prepare_repo(api, repo_id, private=private, revision=revision, waits=waits)
        commit, removed = before, tuple[str, ...]()
        if files:
            commit, removed = _repeating(lambda: _commit(api, files, replaces, repo_id, message, revision), waits)
    except Exception as error:
        return PushOutcome(
            repo_id=repo_id, command=command, error=reason_of(error, repo_id, token), refused=_is_refusal(error)
        )
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{quote(revision, safe='')}" if revision else "")
    return PushOutcome(
        repo_id=repo_id,
        command=command,
        url=url,
        commit=commit,
        changed=commit != before,
        files=tuple(files),
        size=size,
        removed=removed,
    )


def _prepare_repo(
    api: Any, repo_id: str, *, private: bool | None, revision: str | None, waits: Sequence[float] | None
) -> tuple[str, str]:
    """Creates repository and branch where they do not exist; gives the full name and the last commit's hash."""
    repo_id = _repeating(lambda: api.create_repo(repo_id, private=private, exist_ok=True), waits).repo_id
    if private and not _repeating(lambda: api.repo_info(repo_id), waits).private:
        raise ValueError(
            f"{repo_id} exists and is public, and a private repository was asked for; nothing was uploaded. Make it "
            "private on its settings page, or give another name."
        )
    if revision:
        _repeating(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), waits)
    return repo_id, _repeating(lambda: api.repo_info(repo_id, revision=revision), waits).sha


def _commit(
    api: Any,
    files: Mapping[str, Path | bytes],
    replaces: Sequence[str],
    repo_id: str,
    message: str,
    revision: str | None,
) -> tuple[str, tuple[str, ...]]:
    """Commits; gives the commit's hash and the paths that it removed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = api.list_repo_files(repo_id, revision=revision) if replaces else ()
    removed = tuple(sorted(name for name in there if name not in files and _matches(name, replaces)))
    # made anew for each try: the client then asks again what the Hub has, also of a commit whose answer was lost
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=source) for name, source in files.items()]
    different = {str(addition.path_or_fileobj): addition for addition in additions}.values()
    if len(different) < len(additions):  # the client sends the same content twice within a commit, but not after it
        api.preupload_lfs_files(repo_id, different, revision=revision, free_memory=False)
    operations = [*additions, *(CommitOperationDelete(path_in_repo=name) for name in removed)]
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision).oid, removed


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path is one of those that a pattern names, or below a folder that one names."""
    parent, _, last = name.rpartition("/")
    for pattern in patterns:
        folder, _, named = pattern.rpartition("/")
        if name.startswith(f"{folder}/") if not named else folder == parent and fnmatch.fnmatchcase(last, named):
            return True
    return False


def _repeating(action: Callable[[], Any], waits: Sequence[float] | None) -> Any:
    """The action's result; it is tried again after errors that pass and that the client does not repeat itself."""
    for wait in WAITS_S if waits is None else waits:
        try:
            return action()
        except Exception as error:
            asked = _wait_asked_for(error)
            if asked is None or asked > _LONGEST_WAIT_S:
                raise
            time.sleep(max(wait, asked))
    return action()


def _wait_asked_for(error: Exception) -> float | None:
    """Seconds that the Hub asks to wait, 0 if it does not say; None if repeating does not help."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, json.JSONDecodeError):
        return 0.0  # the client reads an overloaded server's error page as the answer to its check of the card
    if isinstance(error, HfHubHTTPError):
        response = error.response
        if response.status_code not in _PASSING or not _sent_once(response.request):
            return None
        after = response.headers.get("Retry-After", "")
        return float(after) if after.isdecimal() else 0.0
    return 0.0 if isinstance(error, httpx.TransportError) and _sent_once(error.request) else None


def _sent_once(request: Any) -> bool:
    """Whether the client sends a request only once."""
    path = request.url.path
    return "/preupload/" not in path and any(part in path for part in _SENT_ONCE)


def reason_of(error: BaseException, repo_id: str, token: str | None = None) -> str:
    """What went wrong with the Hub and what helps, in one paragraph without access tokens.

    Args:
        error: What the client raised.
        repo_id: "user/name".
        token: The token that was used, if it was given.
    """
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    error = _cause(error)
    if isinstance(error, OfflineModeIsEnabled):
        text = "the offline mode is on (HF_HUB_OFFLINE=1); unset it to upload"
    elif isinstance(error, HfHubHTTPError):
        text = f"{_help_for(error.response.status_code, repo_id)} ({_told(error)})"
    elif isinstance(error, httpx.TransportError):
        text = f"the Hub cannot be reached ({type(error).__name__}: {error}); check the network and HF_ENDPOINT"
    else:
        text = f"{error}" or type(error).__name__
    text = " ".join(text.split())
    if token:
        text = text.replace(token, "hf_***")
    return redacted(text)


def _is_refusal(error: BaseException) -> bool:
    """Whether the same push will fail again until the user changes something."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code not in _PASSING
    return isinstance(error, OfflineModeIsEnabled | ValueError) and not isinstance(error, json.JSONDecodeError)


def _cause(error: BaseException) -> BaseException:
    """What is behind the client's "Error while uploading"."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    while not isinstance(error, HfHubHTTPError) and isinstance(error.__cause__, httpx.HTTPError):
        error = error.__cause__
    return error


def _told(error: Any) -> str:
    """Status and the server's own words."""
    words = error.server_message or str(error)
    return f"{error.response.status_code}: {' '.join(words.split())[:_LONGEST_REASON]}"


def _help_for(status: int, repo_id: str) -> str:
    namespace = repo_id.partition("/")[0]
    texts = {
        401: "the Hub did not accept the access: log in with `hf auth login` or set HF_TOKEN, and check that "
        f"{repo_id} is yours",
        403: f"the token may not write to {namespace}: give one with write access to it",
        404: f"the Hub does not know {repo_id}, or hides it from this token",
        409: f"{repo_id} is being changed by somebody else; repeat the push",
        412: f"{repo_id} was changed meanwhile; repeat the push",
        429: "the Hub asks for fewer requests; repeat the push later",
    }
    return texts.get(status, "the Hub failed; repeat the push later" if status >= 500 else "the Hub refused")


def check_repo_id(repo_id: str) -> None:
    """Refuses what cannot be a repository's name.

    Raises:
        ValueError: It is not of the form "user/name".
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be a repository: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} has no owner: give the repository as user/name.")


def push_command(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    whole: str | None = None,
) -> str:
    """The shell command that pushes a folder.

    Args:
        folder: As the user knows it.
        repo_id: "user/name".
        private: Whether a private repository was asked for.
        revision: Branch, if it is not main.
        whole: See :func:`push_folder`.
    """
    words = ["pi-rl", "push", str(folder), "--repo", repo_id]
    words += [*(["--private"] if private else []), *(["--revision", revision] if revision else [])]
    words += ["--whole", whole] if whole else []
    return shlex.join(words)


def size_of(source: Path | bytes) -> int:
    """Bytes of a file, or of a content."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def size_text(count: int) -> str:
    """A number of bytes for people."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
