"""Policies come from elsewhere: what is in a folder or a Hub repository is data, and nothing of it is executed.

Only safetensors and JSON are read, pickles never. JSON may not name code: a policy's type, its processors' steps and
its tokenizer must be installed ones. A file lies in the folder, under a plain name, and is not absurdly large.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from lerobot.processor import ProcessorStepRegistry
from transformers import AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MB = 10**6
LARGEST = {".json": 100 * MB, ".model": 100 * MB, ".jinja": MB, ".md": 10 * MB, ".safetensors": 100_000 * MB}
"""Largest files that are downloaded, in bytes by the end of the name; nothing else is downloaded."""
LARGEST_PARSED = 20 * MB
DEEPEST = 50
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# steps of π0, π0.5 and flow_mlp; other registered steps of LeRobot load models or run code that a folder names
_LEROBOT_STEPS = frozenset(
    {
        "absolute_actions_processor",
        "device_processor",
        "normalizer_processor",
        "pi05_prepare_state_tokenizer_processor_step",
        "pi0_new_line_processor",
        "relative_actions_processor",
        "rename_observations_processor",
        "smolvla_new_line_processor",
        "to_batch_processor",
        "tokenizer_processor",
        "unnormalizer_processor",
    }
)
PREPROCESSOR_FILE, POSTPROCESSOR_FILE = "policy_preprocessor.json", "policy_postprocessor.json"
TOKENIZER_STEP = "tokenizer_processor"
_CODE_KEYS = ("auto_map", "custom_pipelines")
WHOLE_CHECKPOINT = re.compile(r"last-checkpoint|checkpoint-\d+")
"""Folders of a repository that hold a run's whole state beside its policy."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONVERT = (
    "python -c \"import torch, safetensors.torch as s; w = torch.load('pytorch_model.bin', weights_only=True); "
    "s.save_file({k: v.clone() for k, v in w.items()}, 'model.safetensors')\""
)


def download_policy(hub_id: str, revision: str | None = None) -> Path:
    """Downloads a policy from the Hub, after a look at the names and sizes of its files.

    Where the Hub does not answer, or refuses to, the copy in its cache is used, with a line that says so.

    Args:
        hub_id: "user/name".
        revision: Commit, branch or tag.

    Returns:
        The folder in the Hub's cache.

    Raises:
        ValueError: The repository holds what `names_to_download` refuses.
        OSError: The Hub has no such repository or revision, it may not be read, or it cannot be reached and the cache
            has no copy.
    """
    return _download(hub_id, revision, [f"*{suffix}" for suffix in LARGEST if suffix != ".md"], lambda name: True)


def _download(hub_id: str, revision: str | None, cached: Sequence[str], wanted: Callable[[str], bool]) -> Path:
    """Downloads what is wanted of a repository, unless it is refused; ``cached`` are the patterns for a copy of it."""
    try:
        info = HfApi().model_info(hub_id, revision=revision, files_metadata=True)
    except RevisionNotFoundError:
        raise
    except (httpx.ConnectError, httpx.TimeoutException, OfflineModeIsEnabled, HfHubHTTPError) as error:
        return _cached(hub_id, revision, cached, error)
    listed = ((file.rfilename, file.size) for file in info.siblings or [] if wanted(file.rfilename))
    # the commit that was listed: a branch may have moved since
    folder = Path(snapshot_download(hub_id, revision=info.sha, allow_patterns=names_to_download(listed, hub_id)))
    if revision != info.sha:  # so that the cache knows the branch without the Hub
        reference = folder.parents[1] / "refs" / (revision or "main")
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(folder.name)
    return folder


def _cached(hub_id: str, revision: str | None, patterns: Sequence[str], reason: Exception) -> Path:
    """The copy of an earlier download; `reason` is why there is none from the Hub itself."""
    try:
        folder = Path(
            snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=list(patterns))
        )
    except LocalEntryNotFoundError:
        if isinstance(reason, HfHubHTTPError):
            raise reason from None
        raise ConnectionError(
            f"{hub_id} is not in the Hub's cache on this computer, and the Hub cannot be reached ({reason}). Connect, "
            "unset HF_HUB_OFFLINE if it is set, or give a folder."
        ) from reason
    if not isinstance(reason, OfflineModeIsEnabled):
        said = (str(reason).splitlines() or [type(reason).__name__])[0]
        logger.warning(f"The Hub did not give {hub_id} ({said}); commit {folder.name[:8]} from its cache is used.")
    return folder


def names_to_download(files: Iterable[tuple[str, int | None]], source: str) -> list[str]:
    """Chooses what is downloaded of a repository.

    Args:
        files: Name and size in bytes of each file; None where it is not known.
        source: The repository, for messages.

    Returns:
        Names of JSON, safetensors and tokenizer files, and of the model card; whole checkpoints are left out.

    Raises:
        ValueError: A name would leave the folder, a file is absurdly large, or there are weights as pickles only.
    """
    listed = list(files)
    for name, _ in listed:
        path = PurePosixPath(name)
        odd = set(name) & set("\\*?[]:") or not name.isprintable()
        if odd or not name or path.is_absolute() or {"..", "~"} & set(path.parts):
            raise ValueError(
                f"{source} holds a file named {name!r}; names must be plain relative paths. Nothing was downloaded: "
                "do not use this repository, or have its author rename the file."
            )
    wanted = [
        (name, size)
        for name, size in listed
        if PurePosixPath(name).suffix in LARGEST and not WHOLE_CHECKPOINT.fullmatch(name.partition("/")[0])
    ]
    for name, size in wanted:
        _check_size(f"{name} of {source}", size or 0, LARGEST[PurePosixPath(name).suffix])
    _check_pickles([name for name, _ in listed], source)
    return [name for name, _ in wanted if not name.endswith(".md") or name == "README.md"]


def check_policy_folder(folder: Path) -> None:
    """Refuses a policy folder that names code, or whose files are not what they should be.

    Folders without a policy's configuration pass: whatever reads them says what is missing.

    Args:
        folder: The folder.

    Raises:
        ValueError: With the file, what is wrong with it, and what to do.
    """
    for path in _files_read(folder):
        _check_place(path, folder)
        _check_size(str(path), path.stat().st_size, LARGEST[path.suffix])
    _check_pickles([path.name for path in folder.iterdir() if path.is_file()], str(folder))
    _check_tokenizer_files(folder)
    for name in (PREPROCESSOR_FILE, POSTPROCESSOR_FILE):
        if (folder / name).is_file():
            _check_steps(folder / name)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON file of a policy folder.

    Args:
        path: The file.
        what: What it holds, for messages.

    Raises:
        ValueError: It is missing, too large, nested too deeply, no JSON object, holds NaN, or names code.
    """
    if not path.is_file():
        raise ValueError(f"No {what} in {path.parent}: {path.name} is missing. Give a folder in LeRobot's layout.")
    _check_size(str(path), path.stat().st_size, LARGEST_PARSED)
    try:
        value = json.loads(path.read_text("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ValueError(f"{path} is not readable as JSON ({error}); copy or download it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}; copy or download it again.")
    for key, entry, depth in _entries(value):
        if depth > DEEPEST:
            raise ValueError(
                f"{path} is nested more than {DEEPEST} levels deep, which no policy needs; do not use it."
            )
        if (key in _CODE_KEYS and entry) or (key == "trust_remote_code" and entry is True):
            raise ValueError(
                f"{path} asks for code of its own ({key}: {_short(entry)}), which is never run. Remove that entry if "
                "the policy works without the code; otherwise its author has to publish it without."
            )
    return value


def load_tokenizer(name: Any, place: Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer without running code of its own.

    Args:
        name: Hub id, or a folder of this machine.
        place: The file that names it.

    Raises:
        ValueError: It needs code of its own, a file of it is absurdly large, or it is named by a path out of a folder.
        RuntimeError: It cannot be downloaded or read.
    """
    fix = f"Change tokenizer_name in {place} to a Hub id, or put the tokenizer's files beside it."
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place} has tokenizer_name={name!r}, which is no text. {fix}")
    folder = Path(name)
    if not folder.is_absolute():
        if not _HUB_ID.fullmatch(name) or ".." in name:
            raise ValueError(
                f"{place} has tokenizer_name={name!r}, which is neither a Hub id nor an absolute path. {fix}"
            )
        files = (*TOKENIZER_FILES, "config.json")
        try:
            folder = _download(name, None, files, lambda file: file in files)
        except (OSError, httpx.HTTPError) as error:
            raise _tokenizer_error(name, place, error) from error
    _check_tokenizer_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library has errors of its own
        raise _tokenizer_error(name, place, error) from error


def _tokenizer_error(name: str, place: Path, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"The tokenizer {name!r} of {place} cannot be loaded: {error}\nAccept its licence and log in to the Hub, or "
        "put its files into the policy's folder."
    )


def _check_tokenizer_files(folder: Path) -> None:
    for path in (folder / name for name in (*TOKENIZER_FILES, "config.json")):
        if path.is_file():
            _check_size(str(path), path.stat().st_size, LARGEST[path.suffix])
            if path.suffix == ".json" and path.name != "tokenizer.json":  # which is data to a library that runs none
                read_json(path, "tokenizer configuration" if path.name != "config.json" else "configuration")


def read_steps(path: Path) -> list[dict[str, Any]]:
    """Steps of a processor's JSON file.

    Raises:
        ValueError: If the file is missing, is no JSON object or does not list steps with their settings.
    """
    steps = read_json(path, "processor").get("steps")
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and isinstance(step.get("config", {}), dict) for step in steps
    ):
        raise ValueError(f"{path} must list its steps, got {_short(steps)}; copy or download it again.")
    return steps


def _check_steps(path: Path) -> None:
    """Refuses steps of a processor that are not known: LeRobot would import whatever class a step names."""
    steps = read_steps(path)
    _check_tokenizer_steps(path, [step.get("registry_name") for step in steps])
    for step in steps:
        name, config, state = step.get("registry_name"), step.get("config", {}), step.get("state_file", "")
        if not isinstance(name, str) or not _is_known(name):
            raise ValueError(
                f"{path} has a step {_short(name or step.get('class'))}, which is none of "
                f"{', '.join(sorted(_LEROBOT_STEPS))} and is not registered by code of yours. A step may name any "
                "code, so it is not loaded. Import the module that registers it with "
                "lerobot.processor.ProcessorStepRegistry if you trust it."
            )
        if not isinstance(config, dict):
            raise ValueError(f"The step {name} in {path} has the settings {_short(config)}; a JSON object is needed.")
        if not isinstance(state, str) or (state and (Path(state).name != state or not state.endswith(".safetensors"))):
            raise ValueError(
                f"The step {name} in {path} names the state file {_short(state)}; it may name a .safetensors file "
                "beside it only."
            )


def _check_tokenizer_steps(path: Path, names: list[Any]) -> None:
    """Refuses more tokenizers than the one that is checked before it is loaded."""
    allowed = 1 if path.name == PREPROCESSOR_FILE else 0
    if names.count(TOKENIZER_STEP) > allowed:
        raise ValueError(
            f"{path} has {names.count(TOKENIZER_STEP)} steps {TOKENIZER_STEP}; at most {allowed} is allowed there. "
            "Remove the others, or have the policy's author do so."
        )


def _is_known(name: str) -> bool:
    """Whether a step is a harmless one of LeRobot, or one whose module we or the user have imported already."""
    if name in _LEROBOT_STEPS:
        return True
    return (
        name in ProcessorStepRegistry.list()
        and ProcessorStepRegistry.get(name).__module__.partition(".")[0] != "lerobot"
    )


def _check_size(what: str, size: int, largest: int) -> None:
    if size > largest:
        raise ValueError(
            f"{what} has {size / MB:,.0f} MB; more than {largest / MB:,.0f} MB is not read from such a file. Do not "
            "use it, or replace it by one of the usual size."
        )


def _check_pickles(names: Iterable[str], source: str) -> None:
    listed = list(names)
    pickles = sorted(name for name in listed if name.endswith(PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in listed):
        raise ValueError(
            f"{source} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run code when they are "
            f"read, so they are not read. Convert them to safetensors, for instance with `{_CONVERT}`."
        )


def _files_read(folder: Path) -> Iterator[Path]:
    """Files of a policy folder that something may read or copy."""
    for pattern in ("*", "adapter/*"):
        yield from sorted(path for path in folder.glob(pattern) if path.suffix in LARGEST and path.is_file())


def _check_place(path: Path, folder: Path) -> None:
    """Refuses links out of the folder: what they show might be copied into a checkpoint and published."""
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # the Hub's cache: files are links to its blobs
        allowed.append(root.parents[1] / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(f"{path} is a link to {target}, outside the folder; put a copy of that file in its place.")


def _short(value: Any) -> str:
    return f"{value!r:.80}"


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _entries(value: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Every (key, value, depth) of nested objects and lists; elements of a list have none."""
    waiting: list[tuple[str, Any, int]] = [(key, entry, 1) for key, entry in value.items()]
    while waiting:
        key, entry, depth = waiting.pop()
        yield key, entry, depth
        if isinstance(entry, dict):
            waiting += [(inner, below, depth + 1) for inner, below in entry.items()]
        elif isinstance(entry, list):
            waiting += [("", below, depth + 1) for below in entry]
