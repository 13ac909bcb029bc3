"""Policies to and from folders in LeRobot's layout, and the value head and noise network beside them.

config.json                      LeRobot configuration with "type"
model.safetensors                all weights, keys "model.*" (openpi's names and shards can be read, too)
policy_preprocessor.json, policy_postprocessor.json and their *.safetensors
tokenizer.json, tokenizer_config.json, …     only when the policy carries its own tokenizer
critic.safetensors, noise_network.safetensors     for continued RL; LeRobot ignores them
adapter/     LoRA adapters in PEFT's format, also for continued RL; model.safetensors holds the merged weights
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline, TokenizerProcessorStep
from torch import Tensor, nn

from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.adapted_weights import adapted_weights, load_adapted_weights, read_lora_config
from pi_rl.policies.flow_policy import check_compatibility as check_compatibility
from pi_rl.policies.lora import ADAPTER_CONFIG_FILE, MergedState, has_lora, save_adapter
from pi_rl.policies.untrusted import (
    POSTPROCESSOR_FILE,
    PREPROCESSOR_FILE,
    TOKENIZER_FILES,
    TOKENIZER_STEP,
    check_policy_folder,
    download_policy,
    load_tokenizer,
    read_json,
)
from pi_rl.policies.weight_files import INDEX_FILE, WEIGHTS_FILE, StoredWeights, shards_of, stored_weights
from pi_rl.policies.weights import (
    build_with_weights,
    check_tensors,
    flush_to_disk,
    load_weights,
    read_tensors,
    write_tensors,
)
from pi_rl.policies.wrap import supported_config_types

CONFIG_FILE = "config.json"
CRITIC_FILE = "critic.safetensors"
NOISE_NETWORK_FILE = "noise_network.safetensors"
ADAPTER_FOLDER = "adapter"
# layers that LeRobot holds in bfloat16 when its dtype is that (norms and vision stay float32)
_REDUCED_LAYERS = ("self_attn.q_proj.weight", "mlp.up_proj.weight")
_DEVICE_STEP = "device_processor"


@dataclass
class LoadedPolicy:
    """A policy with its processors.

    Attributes:
        policy: LeRobot policy in eval mode; `pi_rl.policies.wrap.wrap_policy` prepares it for reinforcement learning.
        preprocessor: Raw observations → batch for the policy.
        postprocessor: Normalised actions (B, T, A) → environment actions.
        path: Folder it was read from; None for a policy made in memory.
        origin: That folder, or the Hub id that was asked for; recorded in LoRA adapters as their base.
    """

    policy: PreTrainedPolicy
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline
    path: Path | None
    origin: str | None = None


def load_policy(
    path_or_hub_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    n_action_steps: int | None = None,
    denoising_steps: int | None = None,
) -> LoadedPolicy:
    """Loads a flow policy, strictly: it has the file's weights or there is an error.

    Args:
        path_or_hub_id: Folder in LeRobot's layout, or a Hub id "user/name"; the weights may have openpi's names and be
            sharded, or be a LoRA adapter that names its base.
        device: Device of the policy and of the preprocessor's output; unused language heads stay on the CPU.
        revision: Hub commit, branch or tag; only for Hub ids.
        n_action_steps: Executed steps C; None keeps the stored value.
        denoising_steps: Deployment denoising steps K; None keeps the stored value.

    Raises:
        ValueError: If files are missing or do not belong together, or a setting is out of range.
        RuntimeError: If the tokenizer cannot be loaded.
    """
    folder = policy_folder(path_or_hub_id, revision)
    config = _read_config(folder)
    override_steps(config, n_action_steps, denoising_steps)
    config.device = None  # LeRobot's constructors then leave the (empty) weights where they are
    policy = build_with_weights(lambda: get_policy_class(config.type)(config), policy_weights(folder), device)
    config.device = str(device)
    policy.eval()
    preprocessor, postprocessor = _read_processors(folder, config)
    origin = str(path_or_hub_id if not Path(path_or_hub_id).expanduser().is_dir() else folder)
    return LoadedPolicy(policy, preprocessor, postprocessor, path=folder, origin=origin)


def read_without_weights(
    folder: Path,
) -> tuple[PreTrainedConfig, tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]]:
    """Configuration and processors of a policy folder, on the CPU; its weights may be missing.

    Raises:
        ValueError: If files are missing or do not belong together.
        RuntimeError: If the tokenizer cannot be loaded.
    """
    config = _read_config(folder)
    device, config.device = config.device, "cpu"
    processors = _read_processors(folder, config)
    config.device = device
    return config, processors


def policy_weights(folder: Path, base: str | Path | None = None) -> StoredWeights:
    """The weights of a policy folder; those of an adapter-only folder are merged into its base's as they are read.

    Args:
        folder: The policy folder.
        base: Folder or Hub id of an adapter's base; None is the one that its adapter_config.json names.

    Raises:
        ValueError: If files are missing or do not belong together.
    """
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return stored_weights(folder)
    config = read_lora_config(folder)
    named = config.base_model_name_or_path if base is None else base
    try:
        if not named:
            raise ValueError(f"{folder / ADAPTER_CONFIG_FILE} names no base policy.")
        found = policy_folder(named, config.revision if base is None else None)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"The base policy of the adapter {folder} cannot be read: {error} With the base at hand, "
            f"`pi-rl convert {folder} NEW_FOLDER --to merged --base FOLDER_OR_HUB_ID` writes a whole policy."
        ) from error
    return adapted_weights(folder, stored_weights(found))


def load_policy_weights(
    policy: PreTrainedPolicy, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Copies the weights of a policy folder into an existing policy of the same sizes, in place.

    With LoRA, adapters come from the folder's `adapter/` and everything outside the VLM from its weights; the VLM
    under the adapters stays, after a check that merging gives the folder's weights.

    Args:
        policy: The policy; a sharded one takes its part of every tensor.
        folder: Folder in LeRobot's layout.
        state_dict: The weights that the policy has, gathered from a sharded one with LoRA.

    Raises:
        ValueError: If the weights are missing or do not fit, only one of policy and folder has adapters, or the
            folder's adapters were trained on another VLM; the policy is unchanged then.
    """
    folder = Path(folder)
    stored, live = (folder / ADAPTER_FOLDER).is_dir(), has_lora(policy)
    if stored != live:
        raise ValueError(
            f"{folder} was trained with{'' if stored else 'out'} LoRA, this run is with{'' if live else 'out'} it. "
            "Continue with the settings of that run, or start anew from the folder with model=, which reads the "
            "merged weights."
        )
    if live:
        live_weights = policy.state_dict() if state_dict is None else state_dict
        load_adapted_weights(policy, folder, folder / ADAPTER_FOLDER, live_weights)
    else:
        load_weights(policy, folder)


def save_policy(
    folder: str | Path,
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    tokenizer_source: str | Path | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    tokenizer_name: str | None = None,
) -> Path:
    """Writes a policy folder that `load_policy` and LeRobot's commands read.

    Files are written beside the folder, flushed to disk and renamed: a new folder appears complete or not at all; in
    an existing one each file is replaced whole, the weights last, and files of other names are left alone.

    A policy with LoRA is written with merged weights, as any other, and its adapters into `adapter/`.

    Args:
        folder: Target folder.
        policy: LeRobot policy, with LoRA adapters or without.
        preprocessor: Its preprocessor.
        postprocessor: Its postprocessor.
        tokenizer_source: Folder whose tokenizer files go into the checkpoint. None, or a folder without
            them, stands for the preprocessor's own tokenizer: copied from a local folder, only referred to on the Hub.
        extra_files: Contents of further files by name, for instance README.md.
        state_dict: Weights to write instead of `policy.state_dict()`, for instance gathered from a sharded model.
        tokenizer_name: Name recorded for a copied tokenizer; None is the folder itself. Give the Hub id of a
            checkpoint that is going to be uploaded.

    Returns:
        The folder as an absolute path.

    Raises:
        ValueError: If `state_dict` does not fit the policy, or an extra file's name is a path or taken.
    """
    folder = Path(folder).absolute()
    tensors = dict(policy.state_dict() if state_dict is None else state_dict)
    if state_dict is not None:
        check_tensors(tensors, policy.state_dict(), "state_dict")
    adapted = has_lora(policy)
    merged = MergedState(policy, tensors)

    def write_weights(temporary: Path) -> None:
        _write_extra_files(temporary, extra_files or {})
        if adapted:
            save_adapter(temporary / ADAPTER_FOLDER, policy, tensors)
        write_tensors(temporary / WEIGHTS_FILE, merged.shapes, merged.__getitem__)

    write_policy_folder(
        folder,
        deployment_config(policy.config, merged.shapes),
        (preprocessor, postprocessor),
        write_weights,
        tokenizer_source=tokenizer_source,
        tokenizer_name=tokenizer_name,
    )
    if not adapted:
        shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)  # of a policy that was there before
    _remove_shards(folder)
    return folder


def write_policy_folder(
    folder: Path,
    config: PreTrainedConfig,
    processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline],
    write_weights: Callable[[Path], None],
    *,
    tokenizer_source: str | Path | None = None,
    tokenizer_name: str | None = None,
) -> None:
    """Writes configuration, processors, tokenizer and weights, all or nothing; see `save_policy`.

    Args:
        folder: Target folder, absolute.
        config: As it is to be written.
        processors: (preprocessor, postprocessor).
        write_weights: Writes everything else into the folder that it is given.
        tokenizer_source: As in `save_policy`.
        tokenizer_name: As in `save_policy`.
    """
    source = _tokenizer_source(processors[0], tokenizer_source)
    with replacing(folder) as temporary:
        for pipeline in processors:
            pipeline.save_pretrained(temporary)
        config._save_pretrained(temporary)
        if source is not None:
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, temporary / name)
            set_tokenizer_name(temporary, tokenizer_name or str(folder))
        write_weights(temporary)


def _remove_shards(folder: Path) -> None:
    """Removes the sharded weights of a policy that was there before; one file holds the new ones."""
    index = folder / INDEX_FILE
    if index.is_file():
        files = set(shards_of(index).values()) - {WEIGHTS_FILE}
        index.unlink()
        for name in files:
            (folder / name).unlink(missing_ok=True)


def set_tokenizer_name(folder: str | Path, name: str) -> None:
    """Changes the tokenizer that a policy folder refers to (a folder or a Hub id).

    `load_policy` finds a tokenizer inside the folder by itself; LeRobot's commands go by this name.

    Raises:
        ValueError: If the folder has no preprocessor or configuration.
    """
    path = Path(folder) / PREPROCESSOR_FILE
    pipeline = read_json(path, "preprocessor")
    for step in pipeline["steps"]:
        if step.get("registry_name") == TOKENIZER_STEP:
            step.setdefault("config", {})["tokenizer_name"] = name
    path.write_text(json.dumps(pipeline, indent=2))
    path = Path(folder) / CONFIG_FILE
    config = read_json(path, "configuration")
    if "tokenizer_name" in config:
        config["tokenizer_name"] = name
        path.write_text(json.dumps(config, indent=4))


def has_tokenizer_files(folder: Path) -> bool:
    """Whether a tokenizer can be loaded from the folder itself."""
    vocabulary = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return vocabulary and (folder / "tokenizer_config.json").is_file()


def save_heads(
    folder: str | Path, actor_critic: FlowActorCritic, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes critic.safetensors and noise_network.safetensors, each atomically, as far as the model has them.

    They stay out of model.safetensors: LeRobot refuses unknown keys there.

    Args:
        folder: Target folder.
        actor_critic: The model.
        state_dict: The model's weights, for instance gathered from a sharded one; None takes those it has.
    """
    with replacing(Path(folder).absolute()) as temporary:
        for name, head in _heads(actor_critic).items():
            tensors = head.state_dict()
            if state_dict is not None:
                prefix = next(key for key, module in actor_critic.named_children() if module is head)
                tensors = {key: state_dict[f"{prefix}.{key}"] for key in tensors}
            write_tensors(temporary / name, tensors)


def load_heads(folder: str | Path, actor_critic: FlowActorCritic) -> None:
    """Loads what `save_heads` wrote, strictly, in place.

    Raises:
        ValueError: If a file is missing or does not fit; nothing is loaded then.
    """
    heads = _heads(actor_critic)
    loaded = {name: read_tensors(Path(folder) / name, Path(name).stem.replace("_", " ")) for name in heads}
    for name, head in heads.items():
        check_tensors(loaded[name], head.state_dict(), str(Path(folder) / name))
    for name, head in heads.items():
        head.load_state_dict(loaded[name])


def _heads(actor_critic: FlowActorCritic) -> dict[str, nn.Module]:
    heads = {CRITIC_FILE: actor_critic.value_head, NOISE_NETWORK_FILE: actor_critic.noise_network}
    return {name: head for name, head in heads.items() if head is not None}


def policy_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """The folder of a policy; a Hub id is downloaded. Nothing that a folder names is executed.

    Args:
        path_or_hub_id: Folder, or a Hub id "user/name".
        revision: Hub commit, branch or tag; only for Hub ids.

    Raises:
        ValueError: If it is neither, a revision comes with a folder, or `pi_rl.policies.untrusted` refuses what it
            holds.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} was given with the local folder {path}; it is for Hub ids only.")
        check_policy_folder(path)
        return path.absolute()
    text = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ValueError(f"{text!r} is neither an existing folder nor a Hub id of the form 'user/name'.")
    folder = download_policy(text, revision)
    check_policy_folder(folder)
    return folder


def _read_config(folder: Path) -> PreTrainedConfig:
    stored = read_json(folder / CONFIG_FILE, "configuration")
    types = supported_config_types()
    if stored.get("type") not in types:
        raise ValueError(f"{folder / CONFIG_FILE} has type {stored.get('type')!r}; supported types are {types}.")
    if stored.get("use_peft") and not (folder / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"{folder} is a PEFT adapter (use_peft is true) without {ADAPTER_CONFIG_FILE}; copy it from the adapter's "
            "source."
        )
    config = PreTrainedConfig.from_pretrained(folder)
    config.use_peft = False  # its weights are merged as they are read
    return config


def override_steps(config: PreTrainedConfig, n_action_steps: int | None, denoising_steps: int | None) -> None:
    """Changes C and K of a configuration in place; None keeps the stored value.

    Raises:
        ValueError: If a value is out of range.
    """
    if n_action_steps is not None:
        if not 1 <= n_action_steps <= config.chunk_size:
            raise ValueError(f"n_action_steps={n_action_steps} is outside 1 … chunk_size={config.chunk_size}.")
        config.n_action_steps = n_action_steps
    if denoising_steps is not None:
        if denoising_steps < 1:
            raise ValueError(f"denoising_steps={denoising_steps} must be at least 1.")
        config.num_inference_steps = denoising_steps


def _read_processors(
    folder: Path, config: PreTrainedConfig
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    stored = {
        name: read_json(folder / name, what)
        for name, what in ((PREPROCESSOR_FILE, "preprocessor"), (POSTPROCESSOR_FILE, "postprocessor"))
    }
    for name, pipeline in stored.items():
        for file in (step.get("state_file") for step in pipeline["steps"]):
            if file and not (folder / file).is_file():
                raise ValueError(f"{folder / name} refers to {file}, which is missing; copy it into the folder.")
    steps = {step.get("registry_name"): step.get("config", {}) for step in stored[PREPROCESSOR_FILE]["steps"]}
    overrides: dict[str, dict[str, Any]] = {}
    if _DEVICE_STEP in steps:
        overrides[_DEVICE_STEP] = {"device": config.device}
    if TOKENIZER_STEP in steps:
        name = str(folder) if has_tokenizer_files(folder) else steps[TOKENIZER_STEP].get("tokenizer_name")
        tokenizer = load_tokenizer(name, folder / PREPROCESSOR_FILE)
        overrides[TOKENIZER_STEP] = {"tokenizer_name": name, "tokenizer": tokenizer}
    try:
        processors = make_pre_post_processors(config, pretrained_path=str(folder), preprocessor_overrides=overrides)
    except Exception as error:  # LeRobot wraps every cause in its own ValueError
        raise RuntimeError(f"The processors of {folder} could not be built: {error}") from error
    for step in processors[0].steps:
        if isinstance(step, TokenizerProcessorStep):
            step.tokenizer = None  # it has it as input_tokenizer, and would be saved without its name
    return processors


def _tokenizer_source(preprocessor: PolicyProcessorPipeline, source: str | Path | None) -> Path | None:
    named = [step.tokenizer_name for step in preprocessor.steps if isinstance(step, TokenizerProcessorStep)]
    candidates = [Path(name) for name in (source, *named) if name]
    return next((path for path in candidates if has_tokenizer_files(path)), None)


def deployment_config(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedConfig:
    """What the weights are deployed with: in float32 where some were trained in it, so that loading rounds nothing."""
    config = copy.deepcopy(config)
    reduced = [
        tensor
        for name, tensor in weights.items()
        if any(part in name for part in _REDUCED_LAYERS) and "vision_tower" not in name
    ]
    if getattr(config, "dtype", None) == "bfloat16" and any(tensor.dtype == torch.float32 for tensor in reduced):
        config.dtype = "float32"
    config.push_to_hub = False
    config.use_peft = False
    config.pretrained_path = None
    return config


def _write_extra_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        if Path(name).name != name or (folder / name).exists() or name == WEIGHTS_FILE:
            raise ValueError(f"Extra file {name!r} must be a plain name that the policy itself does not use.")
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives a temporary sibling folder whose files become the folder's when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        entries = sorted(temporary.iterdir(), key=lambda path: path.name == WEIGHTS_FILE)
        for path in (*temporary.rglob("*"), temporary):
            flush_to_disk(path)
        if folder.exists():
            for path in entries:
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                os.replace(path, folder / path.name)
            flush_to_disk(folder)
        else:
            temporary.chmod(0o755)  # mkdtemp makes private folders
            temporary.rename(folder)
        flush_to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
