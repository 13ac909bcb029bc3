"""A LeRobot folder → openpi's names, files and statistics, which RLinf reads too."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from pi_rl.conversion.heads import PolicySizes, heads_to_rlinf
from pi_rl.conversion.norm_stats import NORM_STATS_FILE, norm_stats_of, read_norm_stats, write_norm_stats
from pi_rl.conversion.report import SET_ASIDE, TIED, Key, Report, keys_of
from pi_rl.conversion.to_lerobot import check_kind, model_tensors, template_like, typed, write_streaming
from pi_rl.policies.checkpoints import policy_weights, replacing
from pi_rl.policies.weight_files import EMBEDDING, INDEX_FILE, VLM_HEAD, StoredWeights
from pi_rl.policies.weights import check_stored, empty_like

_ROOT = "model."
_GB = 10**9
_PATTERN = "model{suffix}.safetensors"
_ASSETS = "assets"


def convert_to_openpi(
    source: Path,
    destination: Path,
    *,
    asset_id: str,
    rlinf: bool = False,
    norm_stats: Path | None = None,
    shard_gb: float | None = None,
    dtype: str | None = None,
) -> Report:
    """Writes a folder that openpi's PyTorch policies load, all or nothing; one tensor is in memory at a time.

    Args:
        source: LeRobot folder; adapters are merged.
        destination: A new folder.
        asset_id: Folder of the statistics in openpi's configuration, such as "physical-intelligence/libero".
        rlinf: Put the statistics where RLinf looks, and write its value and noise head as far as they fit.
        norm_stats: Statistics to copy; None takes the processors'.
        shard_gb: Largest weight file in GB; None writes one file, the only form that openpi itself reads.
        dtype: "float32" or "bfloat16"; None keeps the stored types.

    Returns:
        What became of every tensor.

    Raises:
        ValueError: If the folder is no π0 or π0.5 of LeRobot, or lacks statistics that openpi needs.
    """
    template = template_like(source)
    config = template.config
    weights = policy_weights(source)
    check_kind(weights, config, str(source))
    check_stored(weights, model_tensors(config))
    stats = norm_stats_of(template.processors[0]) if norm_stats is None else read_norm_stats(norm_stats)
    names, keys = _names(weights)
    keys += [Key(tensor.name, (), SET_ASIDE, "another trainer's head") for tensor in weights.set_aside.values()]
    if rlinf:
        heads, head_keys = heads_to_rlinf(source, PolicySizes.of(weights))
        weights = replace(weights, tensors={**weights.tensors, **heads})
        names |= {name: name for name in heads}
        keys += head_keys
    shapes = {name: typed(empty_like(weights.tensors[stored]), dtype) for name, stored in names.items()}
    files = _files(shapes, shard_gb)
    place = (Path() if rlinf else Path(_ASSETS)) / asset_id / NORM_STATS_FILE
    with replacing(destination) as folder:
        for file, part in files.items():
            write_streaming(folder / file, {name: shapes[name] for name in part}, weights, names)
        if len(files) > 1:
            index = {name: file for file, part in files.items() for name in part}
            total = sum(tensor.nbytes for tensor in shapes.values())
            (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
        if stats is not None:
            write_norm_stats(folder / place, stats)
    facts = {
        "files": ", ".join(files),
        "statistics": f"{place}" if stats is not None else "none: the processors normalise neither state nor actions",
        "to load": f"a configuration of openpi's with {config.type.removesuffix('_small')}, action_horizon="
        f"{config.chunk_size}, action_dim={config.max_action_dim}, asset_id={asset_id}",
    }
    return Report(str(source), str(destination), "openpi", keys, facts)


def _names(weights: StoredWeights) -> tuple[dict[str, str], list[Key]]:
    """Openpi's names → the model's; the language embedding, which openpi ties to the head, goes under the head's."""
    names = {name.removeprefix(_ROOT): name for name in weights.tensors if name not in (EMBEDDING, VLM_HEAD)}
    keys = keys_of(weights, {stored: name for name, stored in names.items()})
    head = VLM_HEAD.removeprefix(_ROOT)
    names[head] = EMBEDDING
    keys.append(Key(weights.tensors[EMBEDDING].name, (head,), TIED, "openpi holds embedding and head once"))
    if weights.tensors[VLM_HEAD] != weights.tensors[EMBEDDING]:
        ((_, embedding),), ((_, own),) = weights.read([EMBEDDING]), weights.read([VLM_HEAD])
        note = (
            "equal to the embedding" if torch.equal(embedding, own) else "not the embedding; nothing computes with it"
        )
        keys.append(Key(weights.tensors[VLM_HEAD].name, (), SET_ASIDE, note))
    return names, keys


def _files(shapes: dict[str, Tensor], shard_gb: float | None) -> dict[str, list[str]]:
    """File names with the tensors in them."""
    split = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=_PATTERN,
        max_shard_size=sum(tensor.nbytes for tensor in shapes.values()) if shard_gb is None else int(shard_gb * _GB),
    )
    return split.filename_to_tensors
