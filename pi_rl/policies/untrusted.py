"""Policies come from elsewhere: what is in a folder or a Hub repository is data, and nothing of it is executed.

Only safetensors and JSON are read, pickles never. JSON may not name code: a policy's type, its processors' steps and
its tokenizer must be installed ones. A file lies in the folder, under a plain name, and is not absurdly large.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from lerobot.processor import ProcessorStepRegistry

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
_PROCESSOR_FILES = ("policy_preprocessor.json", "policy_postprocessor.json")
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

    Where the Hub does not answer, or refuses to, the copy in its cache is used.

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
    try:
        listed = HfApi().model_info(hub_id, revision=revision, files_metadata=True).siblings or []
    except RevisionNotFoundError:
        raise
    except (httpx.ConnectError, httpx.TimeoutException, OfflineModeIsEnabled, HfHubHTTPError) as error:
        return _cached_policy(hub_id, revision, error)
    names = names_to_download(((file.rfilename, file.size) for file in listed), hub_id)
    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=names))


def _cached_policy(hub_id: str, revision: str | None, reason: Exception) -> Path:
    """The copy of an earlier download; `reason` is why there is none from the Hub itself."""
    kinds = [f"*{suffix}" for suffix in LARGEST if suffix != ".md"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=kinds))
    except LocalEntryNotFoundError:
        if isinstance(reason, HfHubHTTPError):
            raise reason from None
        raise ConnectionError(
            f"{hub_id} is not in the Hub's cache on this computer, and the Hub cannot be reached ({reason}). Connect, "
            "unset HF_HUB_OFFLINE if it is set, or give the folder of a policy."
        ) from reason


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
    if (folder / "config.json").is_file():
        read_json(folder / "config.json", "configuration")
    for name in TOKENIZER_FILES:  # tokenizer.json is data to the tokenizers library, which knows no code
        if name.endswith(".json") and name != "tokenizer.json" and (folder / name).is_file():
            read_json(folder / name, "tokenizer configuration")
    for name in _PROCESSOR_FILES:
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


def check_tokenizer_name(name: Any, place: Path) -> None:
    """Refuses a tokenizer that needs code of its own, or that is named by a path out of a folder.

    Args:
        name: Hub id, or a folder of this machine.
        place: The file that names it.

    Raises:
        ValueError: As above.
    """
    fix = f"Change tokenizer_name in {place} to a Hub id, or put the tokenizer's files beside it."
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place} has tokenizer_name={name!r}, which is no text. {fix}")
    path = Path(name)
    if not path.is_absolute() and not (_HUB_ID.fullmatch(name) and ".." not in name):
        raise ValueError(f"{place} has tokenizer_name={name!r}, which is neither a Hub id nor an absolute path. {fix}")
    if path.is_dir():
        for file in ("tokenizer_config.json", "config.json"):
            if (path / file).is_file():
                read_json(path / file, "tokenizer configuration")
    elif not path.is_absolute():
        for file in ("tokenizer_config.json", "config.json"):
            try:
                read_json(Path(hf_hub_download(name, file)), "tokenizer configuration")
            except (
                EntryNotFoundError,
                OSError,
            ):  # there is no such file; what else is wrong, the tokenizer's loader says
                continue


def _check_steps(path: Path) -> None:
    """Refuses steps of a processor that are not known: LeRobot would import whatever class a step names."""
    steps = read_json(path, "processor").get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{path} must list its steps, got {_short(steps)}; copy or download it again.")
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
