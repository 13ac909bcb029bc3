"""Weights of openpi, RLinf or LeRobot → one LeRobot folder with a single file of weights."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor

from pi_rl.conversion.heads import PolicySizes, heads_from_rlinf
from pi_rl.conversion.norm_stats import apply_norm_stats, find_norm_stats, read_norm_stats
from pi_rl.conversion.report import ADDED, Key, Report, keys_of
from pi_rl.conversion.sources import kind_of
from pi_rl.policies.checkpoints import (
    CONFIG_FILE,
    deployment_config,
    policy_folder,
    read_without_weights,
    write_policy_folder,
)
from pi_rl.policies.weight_files import EXPERT_HEAD, WEIGHTS_FILE, StoredWeights
from pi_rl.policies.weights import check_stored, empty_like, write_tensors
from pi_rl.policies.wrap import supported_config_types
from pi_rl.progress import Progress, ProgressFn

KINDS: dict[str, type] = {"pi0": PI0Policy, "pi05": PI05Policy}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Template:
    """What a folder of weights lacks to be a LeRobot policy.

    Attributes:
        config: LeRobot configuration.
        processors: (preprocessor, postprocessor).
        tokenizer_source: Folder whose tokenizer files are copied; None leaves the preprocessor's reference.
        origin: Where it comes from, for the report.
        has_statistics: Whether the processors know how to normalise, as those of an existing policy do.
    """

    config: PreTrainedConfig
    processors: tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]
    tokenizer_source: Path | None
    origin: str
    has_statistics: bool = True


def template_like(like: str | Path) -> Template:
    """Configuration, processors and tokenizer of an existing policy.

    Args:
        like: LeRobot folder or Hub id; its weights are not read.

    Raises:
        ValueError: If it is none.
        RuntimeError: If its tokenizer cannot be loaded.
    """
    folder = policy_folder(like)
    return Template(*read_without_weights(folder), folder, str(like))


def convert_to_lerobot(
    weights: StoredWeights,
    source: Path,
    destination: Path,
    template: Template,
    *,
    norm_stats: Path | None = None,
    dtype: str | None = None,
) -> Report:
    """Writes a LeRobot folder, all or nothing; one tensor is in memory at a time.

    Args:
        weights: As `open_weights` gives them.
        source: Where they were found; norm_stats.json is looked for there.
        destination: A new folder.
        template: What the weights lack.
        norm_stats: openpi's statistics; None takes those of `source`, or else the template's.
        dtype: "float32" or "bfloat16"; None keeps the stored types.

    Returns:
        What became of every tensor.

    Raises:
        ValueError: If weights, template and statistics do not belong together; nothing has been written then.
    """
    expected = _expected(weights, template)
    found = norm_stats or find_norm_stats(source)
    facts = {"configuration": f"{template.config.type} of {template.origin}"}
    if found is None and not template.has_statistics:
        raise ValueError(
            f"{source} has no norm_stats.json, and nothing else says how to normalise: give --norm_stats."
        )
    if found is None:
        facts["statistics"] = (
            f"those of {template.origin}: {source} has no norm_stats.json, and --norm_stats gave none"
        )
    else:
        facts["statistics"] = f"{apply_norm_stats(template.processors, read_norm_stats(found))}, from {found}"
    kept = replace(weights, set_aside={})
    aside = replace(weights, tensors=weights.set_aside, set_aside={})
    files, head_keys = heads_from_rlinf(aside, PolicySizes.of(weights))
    keys = [*keys_of(weights, {name: name for name in expected if name in weights.tensors}), *head_keys]
    shapes = shapes_in_file(weights, expected, dtype)
    if EXPERT_HEAD not in weights.tensors:
        keys.append(Key("", (EXPERT_HEAD,), ADDED, "zeros; nothing computes with it"))
    config = deployment_config(template.config, shapes)
    config.dtype = dtype or config.dtype
    facts["computes in"] = config.dtype

    def write(folder: Path) -> None:
        for file, names in files.items():
            tensors = dict(aside.read(names.values()))
            write_tensors(folder / file, {ours: tensors[theirs].float() for ours, theirs in names.items()})
        write_streaming(folder / WEIGHTS_FILE, shapes, kept)

    write_policy_folder(destination, config, template.processors, write, tokenizer_source=template.tokenizer_source)
    if files:
        facts["heads"] = f"{', '.join(files)}: for load_heads; a run that starts from the folder makes new ones"
    return Report(str(source), str(destination), "lerobot", keys, facts)


def write_streaming(
    path: Path, shapes: Mapping[str, Tensor], weights: StoredWeights, names: Mapping[str, str] | None = None
) -> None:
    """Writes weights tensor by tensor; what they lack is zeros.

    Args:
        path: The file.
        shapes: Tensors on the meta device, by their names in the file.
        weights: The contents.
        names: Names in the file → names in `weights`; None if they are the same.
    """
    progress: ProgressFn = Progress(f"writing {path.name}", "tensors")
    done = 0

    def content(name: str) -> Tensor:
        nonlocal done
        done += 1
        progress(done, len(shapes), "")
        stored = names[name] if names else name
        if stored not in weights.tensors:
            return torch.zeros(shapes[name].shape, dtype=shapes[name].dtype)
        ((_, tensor),) = weights.read([stored])
        return tensor

    write_tensors(path, shapes, content)


def model_tensors(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Names and shapes of a policy's weights, on the meta device."""
    config = copy.copy(config)
    config.device = None  # LeRobot's constructor then leaves the empty weights where they are
    with init_empty_weights():
        return dict(get_policy_class(config.type)(config).state_dict())


def check_kind(weights: StoredWeights, config: PreTrainedConfig, origin: str) -> None:
    """Whether weights are of a configuration's model.

    Raises:
        ValueError: If they are not.
    """
    kind = kind_of(weights)
    if not issubclass(get_policy_class(config.type), KINDS[kind]):
        raise ValueError(
            f"{weights.source} holds a {kind}, and the configuration of {origin} is a {config.type}. Give a "
            f"{kind} policy with --like."
        )


def _expected(weights: StoredWeights, template: Template) -> dict[str, Tensor]:
    check_kind(weights, template.config, template.origin)
    expected = model_tensors(template.config)
    check_stored(replace(weights, set_aside={}), expected)
    return expected


def shapes_in_file(
    weights: StoredWeights, expected: Mapping[str, Tensor], dtype: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a LeRobot file on the meta device: of the stored type, or of one for all."""
    stored = weights.tensors
    return {
        name: typed(empty_like(stored[name]) if name in stored else tensor.to("meta"), dtype)
        for name, tensor in expected.items()
    }


def typed(tensor: Tensor, dtype: str | None) -> Tensor:
    """A tensor in another floating type, if one is given."""
    return tensor.to(DTYPES[dtype]) if dtype is not None and tensor.is_floating_point() else tensor


def is_lerobot_folder(source: Path) -> bool:
    """Whether a folder has what a template needs, whatever the names of its weights; openpi's config.json has not."""
    path = source / CONFIG_FILE
    try:
        return path.is_file() and json.loads(path.read_text("utf-8")).get("type") in supported_config_types()
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a configuration ({error}); copy it again.") from error
