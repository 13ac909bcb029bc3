"""What of a folder goes to the Hub: the policy, its card and results; no pickles, no data sets, no paths of a machine.

Files are chosen by name, so that nothing is published because it happened to lie there. Small text files are sent
without access tokens and without paths of this machine; everything else is sent as it is.
"""

import fnmatch
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pi_rl.arguments import CONFIG_NAME
from pi_rl.hub.card import for_repository, is_hub_id, is_unchanged, mark_written
from pi_rl.hub.push import size_of
from pi_rl.hub.run_record import Entry, run_folder_of
from pi_rl.policies.checkpoints import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    CRITIC_FILE,
    NOISE_NETWORK_FILE,
    PREPROCESSOR_FILE,
    TOKENIZER_FILES,
    has_tokenizer_files,
    set_tokenizer_name,
)
from pi_rl.policies.lora import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from pi_rl.policies.untrusted import WHOLE_CHECKPOINT, read_json, read_steps
from pi_rl.policies.weight_files import INDEX_FILE
from pi_rl.policies.wrap import supported_config_types
from pi_rl.secrets import redacted

CARD_NAME = "README.md"
POLICY_FOLDER = "policy"
_POLICY_FILES = (
    CARD_NAME,
    CONFIG_FILE,
    "model*.safetensors",
    INDEX_FILE,
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    "policy_preprocessor*",
    "policy_postprocessor*",
    CRITIC_FILE,
    NOISE_NETWORK_FILE,
    "rl_state.json",
    "train_config.json",
    CONFIG_NAME,
    "sft_config.yaml",
    "results.json",
    "*.png",
    "*.gif",
    "*.mp4",
    *TOKENIZER_FILES,
)
_RUN_FILES = ("results.json", "learning_curve.png", "before_after.mp4", CONFIG_NAME)
_SUBFOLDERS = {ADAPTER_FOLDER: ("*.safetensors", "*.json", "README.md"), "videos": ("*.mp4", "*.gif", "*.png")}
_FOREIGN = ("*.png", "*.gif", "*.mp4")
"""Uploaded from a policy folder under any name, so in a repository they may be somebody's own."""
_REPLACED = (
    *(name for name in _POLICY_FILES if name not in _FOREIGN),
    *("learning_curve.png", "before_after.mp4", ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE),
    *(f"{folder}/{name}" for folder, names in _SUBFOLDERS.items() for name in names),
)
_SUFFIXES = (".safetensors", ".json", ".yaml", ".md", ".png", ".gif", ".mp4", ".model", ".jinja")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_TEXTS = (".json", ".yaml", ".md")
_PATH_BEGINS = r"(?:(?<![\w./~-])|(?<=file://))"
"""Not inside of an address or a relative path; "PATH:/folder" and "file:///folder" name a folder of this machine."""
_PATH = re.compile(r"(?<![\w/.:~-])/(?P<first>[^\s/\"'`<>]+)(?:/[^\s/\"'`<>,;:)\]}]+)+")


@dataclass(frozen=True)
class Contents:
    """What is uploaded, and what is not.

    Attributes:
        files: Path in the repository to a local file, or to the content itself where it differs from the file.
        left_out: Path below the folder to the reason why it stays here.
        replaces: Patterns of what such contents replace in the repository; see `pi_rl.hub.push.push_files`.
    """

    files: dict[str, Path | bytes]
    left_out: dict[str, str]
    replaces: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(map(size_of, self.files.values()))


def policy_folder_of(folder: str | Path) -> Path:
    """The policy in a folder that a user names.

    Args:
        folder: A run's output folder, a checkpoint of one, or a policy folder.

    Returns:
        The folder itself, or its `policy/`.

    Raises:
        ValueError: There is no policy, or one of a type that this package does not know.
    """
    given = Path(folder)
    if not given.is_dir():
        raise ValueError(f"{given} is no folder; give a run's output folder, a checkpoint-N or a policy folder.")
    for candidate in (given, given / POLICY_FOLDER):
        if (candidate / CONFIG_FILE).is_file():
            _check_policy(candidate)
            return candidate
    raise ValueError(
        f"{given} holds no policy ({CONFIG_FILE} is missing in it and in its {POLICY_FOLDER}/). Give a finished run's "
        "output folder, a checkpoint-N folder or a policy folder."
    )


def _check_policy(folder: Path) -> None:
    try:
        kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not a policy's configuration: {error}") from error
    if kind not in (types := supported_config_types()):
        raise ValueError(f"{folder / CONFIG_FILE} has type {kind!r}; supported types are {types}.")
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        _check_adapter(folder)
    elif not any(folder.glob("model*.safetensors")):
        raise ValueError(f"{folder} has no weights (model.safetensors is missing); give a complete policy folder.")


def _check_adapter(folder: Path) -> None:
    """Refuses an adapter-only folder that others could not load."""
    if not (folder / ADAPTER_WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} is a LoRA adapter without {ADAPTER_WEIGHTS_FILE}; give a complete policy folder.")
    base = read_json(folder / ADAPTER_CONFIG_FILE, "adapter configuration").get("base_model_name_or_path")
    if not isinstance(base, str) or not is_hub_id(base) or Path(base).is_dir():
        raise ValueError(
            f"{folder} is a LoRA adapter whose base is {base!r}; others need a Hub id, user/name, to load it. Push "
            f"the base and write its id as base_model_name_or_path into {ADAPTER_CONFIG_FILE}, or push the whole "
            f"policy that `pi-rl convert {folder} NEW_FOLDER --to merged` writes."
        )


def policy_contents(folder: str | Path, repo_id: str) -> Contents:
    """What of a folder becomes the root of a repository.

    Args:
        folder: A run's output folder, a checkpoint of one, or a policy folder.
        repo_id: "user/name": the name by which the uploaded configuration refers to the uploaded tokenizer.

    Raises:
        ValueError: There is no policy, or it refers to a tokenizer that is only on this machine.
    """
    policy = policy_folder_of(folder)
    run = run_folder_of(Path(folder))
    files: dict[str, Path | bytes] = {}
    left_out: dict[str, str] = {}
    for path in _all_files(policy):
        name = path.relative_to(policy).as_posix()
        if _belongs_to_policy(name):
            files[name] = path
        else:
            left_out[name] = _reason(path)
    if run is not None:
        for name in _RUN_FILES:
            # beside a checkpoint lie the results of the run's end, which are not that checkpoint's
            if (run / name).is_file() and (policy.name == POLICY_FOLDER or name == CONFIG_NAME):
                files.setdefault(name, run / name)
        if policy.name == POLICY_FOLDER:
            files |= {f"videos/{path.name}": path for path in sorted((run / "videos").glob("*.mp4"))}
    return Contents(_publishable(files, policy, repo_id), left_out)


def with_card(
    folder: str | Path, repo_id: str, run_folder: Path | None = None, history: Iterable[Entry] | None = None
) -> Path:
    """The policy's card; one is written if there is none.

    Args:
        folder: A run's output folder, a checkpoint of one, or a policy folder.
        repo_id: "user/name".
        run_folder: Output folder of the run it is from; None looks around the folder.
        history: Log entries of the trainer that holds the policy. With them a card that this function wrote earlier,
            and nobody changed, is written anew.

    Raises:
        ValueError: The folder holds no policy, or the card's metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    from pi_rl.hub.checkpoint_card import write_checkpoint_card

    policy = policy_folder_of(folder)
    card = policy / CARD_NAME
    if not card.is_file() or (history is not None and is_unchanged(card)):
        write_checkpoint_card(policy, run_folder=run_folder, repo_id=repo_id, history=history)
        mark_written(card)
    try:
        ModelCard.load(card)
    except Exception as error:  # the YAML parser has error classes of its own
        raise ValueError(f"The metadata of {card} cannot be read: {' '.join(str(error).split())}") from error
    return card


def checkpoint_contents(folder: str | Path, repo_id: str, inside: str) -> Contents:
    """A whole checkpoint, with the state of optimiser and Trainer, as a subfolder of a repository.

    Args:
        folder: A checkpoint-N folder.
        repo_id: "user/name".
        inside: Name of the subfolder.

    Raises:
        ValueError: There is no policy, or it refers to a tokenizer that is only on this machine.
    """
    checkpoint = Path(folder)
    _check_policy(checkpoint)
    chosen: dict[str, Path | bytes] = {}
    left_out: dict[str, str] = {}
    for path in _all_files(checkpoint):
        name = path.relative_to(checkpoint).as_posix()
        if name == CARD_NAME:
            left_out[f"{inside}/{name}"] = "the card is for the policy, at the root"
        elif path.suffix in _SUFFIXES:
            chosen[name] = path
        else:
            left_out[f"{inside}/{name}"] = _reason(path)
    ready = _publishable(chosen, checkpoint, repo_id)
    return Contents({f"{inside}/{name}": source for name, source in ready.items()}, left_out)


def contents_to_push(folder: str | Path, repo_id: str, whole: str | None = None) -> Contents:
    """Everything of a push, and what it replaces.

    Args:
        folder: A run's output folder, a checkpoint of one, or a policy folder.
        repo_id: "user/name".
        whole: Name of a subfolder for all of a checkpoint, "last-checkpoint" or "checkpoint-N"; None is none.

    Raises:
        ValueError: There is no policy, it refers to a tokenizer that is only on this machine, `whole` is another name,
            or `folder` is no complete checkpoint.
    """
    if whole is None:
        policy = policy_contents(folder, repo_id)
        return Contents(policy.files, policy.left_out, _REPLACED)
    from pi_rl.trainer.checkpoint_folders import check_checkpoint

    if not WHOLE_CHECKPOINT.fullmatch(whole):
        raise ValueError(f"A whole checkpoint is named last-checkpoint or checkpoint-N on the Hub; got {whole!r}.")
    check_checkpoint(Path(folder))
    policy, checkpoint = policy_contents(folder, repo_id), checkpoint_contents(folder, repo_id, whole)
    left_out = {name: why for name, why in policy.left_out.items() if f"{whole}/{name}" not in checkpoint.files}
    return Contents(policy.files | checkpoint.files, left_out, (*_REPLACED, f"{whole}/"))


def _all_files(folder: Path) -> list[Path]:
    """Files of a folder and its subfolders; hidden ones are no part of it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _belongs_to_policy(name: str) -> bool:
    parent, _, last = name.rpartition("/")
    if Path(name).suffix in _PICKLES:
        return False
    patterns = _SUBFOLDERS.get(parent, ()) if parent else _POLICY_FILES
    return any(fnmatch.fnmatchcase(last, pattern) for pattern in patterns)


def _reason(path: Path) -> str:
    return "a pickle, which can run code when it is loaded" if path.suffix in _PICKLES else "no part of a policy"


def _publishable(files: dict[str, Path | bytes], policy: Path, repo_id: str) -> dict[str, Path | bytes]:
    """The files with what is only true on this machine replaced in the small texts."""
    renamed = _with_tokenizer_name(policy, repo_id)
    known = sorted({str(path) for path in (policy.absolute(), policy.absolute().parent, Path.home(), Path.cwd())})
    return {
        name: _publishable_file(source, renamed.get(name), known, repo_id) for name, source in sorted(files.items())
    }


def _publishable_file(source: Path | bytes, text: str | None, known: list[str], repo_id: str) -> Path | bytes:
    if not isinstance(source, Path):
        return source
    vocabulary = source.name in TOKENIZER_FILES and source.name != "tokenizer_config.json"
    if source.suffix not in _TEXTS or vocabulary:
        return source
    original = source.read_text(encoding="utf-8")
    changed = without_machine(original if text is None else text, known)
    if source.name == CARD_NAME:
        changed = for_repository(changed, repo_id)
    return source if changed == original else changed.encode()


def without_machine(text: str, known: list[str]) -> str:
    """A text without access tokens, and with paths of this machine by their last part.

    Args:
        text: JSON, YAML or Markdown.
        known: Folders of this machine, which may have spaces in their names.
    """
    for prefix in sorted(known, key=len, reverse=True):
        if prefix != "/":
            text = re.sub(rf"{_PATH_BEGINS}{re.escape(prefix)}/", "", text)

    def last_part(match: re.Match[str]) -> str:
        # "/second" in a sentence or a task's name is no path: its first part is no folder here
        return match[0].rsplit("/", 1)[-1] if Path(f"/{match['first']}").is_dir() else match[0]

    return redacted(_PATH.sub(last_part, text))


def _with_tokenizer_name(policy: Path, repo_id: str) -> dict[str, str]:
    """Preprocessor and configuration that name the tokenizer as it is found after the upload, by file name."""
    if not (policy / PREPROCESSOR_FILE).is_file():
        raise ValueError(f"{policy} has no {PREPROCESSOR_FILE}; give a policy folder in LeRobot's layout.")
    read_steps(policy / PREPROCESSOR_FILE)  # whose error names this file and not its copy
    with tempfile.TemporaryDirectory() as staging:
        for name in (PREPROCESSOR_FILE, CONFIG_FILE):
            shutil.copyfile(policy / name, Path(staging) / name)
        if has_tokenizer_files(policy):
            set_tokenizer_name(staging, repo_id)
        texts = {name: (Path(staging) / name).read_text(encoding="utf-8") for name in (PREPROCESSOR_FILE, CONFIG_FILE)}
        steps = read_steps(Path(staging) / PREPROCESSOR_FILE)
    for named in (step.get("config", {}).get("tokenizer_name") for step in steps):
        if isinstance(named, str) and Path(named).is_absolute():
            raise ValueError(
                f"{policy} refers to the tokenizer in {named}, a folder of this machine that is not uploaded. Copy "
                f"its files ({', '.join(TOKENIZER_FILES[:3])}, …) into the policy folder."
            )
    return texts
