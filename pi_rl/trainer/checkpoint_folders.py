"""Checkpoint folders of a run on disk: which are complete, which is the newest, what may be deleted.

A checkpoint is written into `.incomplete/`, flushed to disk and renamed, so a killed process leaves the earlier ones
as they were. `rl_state.json` is written last and lists the other files; its `save` counts the run's saves.
"""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from pi_rl.__about__ import __version__
from pi_rl.argument_values import load_yaml
from pi_rl.arguments import CONFIG_NAME
from pi_rl.checkpoint_order import RL_STATE_NAME, by_age, checkpoints, step_of
from pi_rl.policies.checkpoints import CONFIG_FILE, POSTPROCESSOR_FILE, PREPROCESSOR_FILE
from pi_rl.policies.weight_files import WEIGHTS_FILE, read_header, some_of
from pi_rl.policies.weights import flush_to_disk
from pi_rl.progress import say
from pi_rl.trainer.plain_state import (
    OPTIMIZER_TENSORS,
    OPTIMIZER_VALUES,
    SCHEDULER_FILE,
    check_entries,
    check_plain_state,
    read_json,
    rng_file,
)

logger = logging.getLogger(__name__)
STAGING_NAME = ".incomplete"
_REPLACED = "replaced-"
FORMAT = 1
"""Number of the layout of a checkpoint; raised when an older pi_rl could not read a newer one's."""
_COUNTERS = {"algorithm": str, "iteration": int, "env_steps": int, "episodes": int, "evaluation_due": bool}
_REQUIRED = (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    POSTPROCESSOR_FILE,
    WEIGHTS_FILE,
    CONFIG_NAME,
    OPTIMIZER_TENSORS,
    OPTIMIZER_VALUES,
    SCHEDULER_FILE,
    rng_file(0),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed; the message says why and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint of a run that nothing can resume: a file is missing, or does not hold what it should."""


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Refuses a checkpoint that is incomplete, damaged, foreign or of a newer pi_rl; reads no tensors.

    Args:
        folder: A checkpoint-N folder.

    Returns:
        What its rl_state.json holds.

    Raises:
        CheckpointError: Naming the file and what is wrong with it; a :class:`DamagedCheckpointError` where the disk
            or another pi_rl has no part in it.
    """
    try:
        return _checked(folder)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read now: {error}. Try again when the disk answers.") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(str(error)) from error


def _checked(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"The checkpoint {folder} does not exist; give a checkpoint-N folder of a run.")
    missing = [name for name in (RL_STATE_NAME, TRAINER_STATE_NAME) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is no checkpoint of a training run ({', '.join(missing)} missing); give a checkpoint-N folder, "
            "or start RL from it with model=."
        )
    state = read_json(folder / RL_STATE_NAME)
    _check_format(folder, state)
    listed = state.get("files")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise DamagedCheckpointError(f"{folder / RL_STATE_NAME} lists no files; copy or download it again.")
    missing = sorted(name for name in {*_REQUIRED, *listed} if not (folder / name).is_file())
    if missing or not listed:
        lacking = some_of(missing) or f"the list of files in {RL_STATE_NAME}"
        raise DamagedCheckpointError(
            f"The checkpoint {folder} is incomplete: {lacking} missing. "
            "Give another checkpoint-N folder of that run, or copy this one again."
        )
    _check_files(folder)
    check_entries(folder / RL_STATE_NAME, state, _COUNTERS)
    _check_trainer_state(folder / TRAINER_STATE_NAME)
    check_plain_state(folder)
    return state


def _check_trainer_state(path: Path) -> None:
    value = read_json(path)
    check_entries(path, value, {"global_step": int, "max_steps": int, "log_history": list, "stateful_callbacks": dict})
    try:
        TrainerState(**value)
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"{path} is no state of the Trainer ({error}); copy or download it again.") from error


def _check_format(folder: Path, state: dict[str, Any]) -> None:
    if not isinstance(state.get("format"), int):
        raise CheckpointError(
            f"{folder / RL_STATE_NAME} is no state of pi_rl (format missing); give a checkpoint-N folder of a run."
        )
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} was written by pi_rl {state.get('pi_rl')} in format {state['format']}; this is pi_rl "
            f"{__version__}, which reads formats up to {FORMAT}. Install that version or a later one."
        )


def _check_files(folder: Path) -> None:
    """Opens every file: headers and sizes of tensors, all of the texts."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            read_header(path)  # which compares the file's size with what it should hold
        elif path.suffix == ".json":
            read_json(path)
    try:
        load_yaml((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:  # also text that is not UTF-8
        raise DamagedCheckpointError(f"{folder / CONFIG_NAME} is not valid YAML: {error}") from error


def newest_checkpoint(root: Path) -> Path | None:
    """The checkpoint written last that is complete and readable; says which later ones are not, and why.

    After a run was resumed from an early checkpoint these are the ones of its new branch, not those with a higher N.

    Args:
        root: Output folder of the run.
    """
    for folder in reversed(by_age(root)):
        try:
            check_checkpoint(folder)
        except CheckpointError as error:
            say(f"Skipping {folder.name}: {error}")
        else:
            return folder
    return None


def publish(staged: Path, root: Path) -> Path:
    """Gives a complete checkpoint its name in the run's folder, in place of an earlier one of that name.

    Args:
        staged: The folder below `.incomplete/`.
        root: Output folder of the run.

    Returns:
        Where the checkpoint is now.

    Raises:
        OSError: It could not be renamed; an earlier one of that name is where it was.
    """
    for path in (*staged.rglob("*"), staged):
        flush_to_disk(path)
    final = root / staged.name
    if final.exists():
        os.rename(final, staged.with_name(_REPLACED + staged.name))
    try:
        os.rename(staged, final)
    except OSError:
        _restore_replaced(root)
        raise
    try:
        flush_to_disk(root)
        shutil.rmtree(staged.parent)
    except OSError as error:  # the checkpoint has its name
        logger.warning(f"{final} is written, but {error}. A power cut may cost it; {staged.parent} may be left over.")
    return final


def discard_staged(root: Path) -> None:
    """Removes what was being written; a checkpoint that it was to replace gets its name back.

    Args:
        root: Output folder of the run.
    """
    _restore_replaced(root)
    shutil.rmtree(root / STAGING_NAME, ignore_errors=True)


def _restore_replaced(root: Path) -> None:
    for folder in (root / STAGING_NAME).glob(f"{_REPLACED}checkpoint-*"):
        final = root / folder.name.removeprefix(_REPLACED)
        if not final.exists():
            os.rename(folder, final)


def clean_up(root: Path) -> None:
    """Removes what a killed process was writing; what was complete, but not renamed yet, becomes a checkpoint.

    Args:
        root: Output folder of the run.
    """
    staging = root / STAGING_NAME
    remove_leftovers(root, "policy", "init", "demos", "sft")
    for folder in checkpoints(staging):
        if not (root / folder.name).exists() and _problem(folder) is None:
            publish(folder, root)
            return
    if staging.exists():
        discard_staged(root)
        say(f"Removed a checkpoint that was not written to the end ({staging}).")


def remove_leftovers(root: Path, *names: str) -> None:
    """Removes the temporary siblings in which a killed process was writing folders.

    Args:
        root: Where the folders are.
        names: Of the folders; what was written lies in ``.NAME-abcd1234`` or ``.NAME.partial-abcd1234``.
    """
    temporary = re.compile(rf"\.({'|'.join(map(re.escape, names))})(\.partial)?-[a-z0-9_]{{8}}")  # as mkdtemp names
    for folder in root.glob(".*") if root.is_dir() else ():
        if temporary.fullmatch(folder.name) and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def remove_old(root: Path, limit: int | None, keep: Path, best: str | None) -> None:
    """Deletes checkpoints beyond ``save_total_limit``, never the last readable one.

    Others do not count. Damaged ones are deleted where a readable one is at least as new; what the disk does not let
    read, a newer pi_rl wrote or was not written by a run stays, and so does the best one in any state.

    Args:
        root: Output folder of the run.
        limit: Readable checkpoints to keep, the best among them; None keeps all.
        keep: The checkpoint that was just written.
        best: Folder of the best one, if any.
    """
    if limit is None or limit <= 0:
        return
    try:
        folders = by_age(root)
    except OSError as error:
        logger.warning(f"No old checkpoint of {root} is deleted this time: {error}.")
        return
    problems = {folder: _problem(folder) for folder in folders}
    readable = [folder for folder in folders if problems[folder] is None]
    protected = {folder for folder in folders if folder == keep or (best and folder.name == Path(best).name)}
    if keep not in readable:
        return  # what was written cannot be read: nothing else may be given up for it
    old = [folder for folder in readable if folder not in protected]
    for folder in old[: max(0, len(readable) - max(limit, len(protected.intersection(readable))))]:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in folders:
        damaged = isinstance(problems[folder], DamagedCheckpointError)
        if damaged and folder not in protected and step_of(folder) <= step_of(keep):
            shutil.rmtree(folder, ignore_errors=True)


def _problem(folder: Path) -> CheckpointError | None:
    """Why a checkpoint cannot be resumed."""
    try:
        check_checkpoint(folder)
    except CheckpointError as error:
        return error
    return None
