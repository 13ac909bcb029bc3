"""A LoRA run's folder → an adapter-only folder that LeRobot loads onto its base, and back to merged weights."""

import copy
from dataclasses import replace
from pathlib import Path

from lerobot.configs import PreTrainedConfig

from pi_rl.conversion.report import ADDED, CONVERTED, UNCHANGED, Key, Report, keys_of
from pi_rl.conversion.to_lerobot import check_kind, model_tensors, shapes_in_file, template_like, write_streaming
from pi_rl.policies.adapted_weights import AdaptedWeights, adapted_weights, read_lora_config, same_weights
from pi_rl.policies.checkpoints import (
    ADAPTER_FOLDER,
    deployment_config,
    policy_folder,
    policy_weights,
    write_policy_folder,
)
from pi_rl.policies.lora import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, STORED_PREFIX, VLM_PREFIX
from pi_rl.policies.weight_files import EXPERT_HEAD, WEIGHTS_FILE, StoredWeights, read_header, some_of, stored_weights
from pi_rl.policies.weights import check_stored, empty_like


def convert_to_adapter(source: Path, destination: Path, *, base: str | None = None) -> Report:
    """Writes what a LoRA run changed: the factors, and whole every module outside the VLM that was trained.

    The base is compared with the run's merged weights tensor by tensor, so that base and adapter give this policy.

    Args:
        source: Policy folder of a run with LoRA: merged weights, and the factors in adapter/.
        destination: A new folder.
        base: Folder or Hub id of the policy that the run began from; None is the one that the run recorded.

    Returns:
        What became of every tensor.

    Raises:
        ValueError: If the folder has no adapters, or the base is not known, not the run's, or not in LeRobot's form.
    """
    template = template_like(source)
    own = source / ADAPTER_FOLDER
    if not own.is_dir():
        raise ValueError(
            f"{source} has no {ADAPTER_FOLDER} folder. Give the policy or checkpoint folder of a run with LoRA "
            "(lora_rank above 0)."
        )
    lora = read_lora_config(own)
    named = base or lora.base_model_name_or_path
    if not named:
        raise ValueError(f"{own} does not say which policy the run began from; give it with --base.")
    weights = stored_weights(source)
    merged = adapted_weights(own, _base_for_lerobot(policy_folder(named), template.config))
    whole = _trained_whole(weights, merged)
    modules = sorted({name.rpartition(".")[0] for name in whole})

    lora = copy.copy(lora)
    lora.base_model_name_or_path = str(Path(named).absolute()) if Path(named).is_dir() else named
    lora.revision = None
    lora.modules_to_save = modules
    lora.target_modules = sorted(lora.target_modules)  # sets have another order in every process
    config = deployment_config(template.config, {name: empty_like(t) for name, t in weights.tensors.items()})
    config.use_peft = True
    tensors = {**read_header(own / ADAPTER_WEIGHTS_FILE), **{STORED_PREFIX + n: weights.tensors[n] for n in whole}}
    stored = StoredWeights(weights.source, tensors)
    shapes = {name: empty_like(tensor) for name, tensor in tensors.items()}

    def write(folder: Path) -> None:
        lora.save_pretrained(str(folder))
        write_streaming(folder / ADAPTER_WEIGHTS_FILE, shapes, stored)

    write_policy_folder(destination, config, template.processors, write, tokenizer_source=source)
    size = sum(tensor.nbytes for tensor in shapes.values())
    facts = {
        "base": str(lora.base_model_name_or_path),
        "holds": f"r={lora.r} on {len(merged.factors)} layers, and {len(modules)} whole modules; {size / 1e6:.1f} MB",
    }
    keys = [_key(name, weights, merged, whole) for name in weights.tensors]
    return Report(str(source), str(destination), "adapter", keys, facts)


def convert_to_merged(source: Path, destination: Path, *, base: str | None = None, dtype: str | None = None) -> Report:
    """Writes the policy that an adapter-only folder and its base are; adapted weights are float32.

    Args:
        source: Adapter-only folder, LeRobot's or of `convert_to_adapter`.
        destination: A new folder.
        base: Folder or Hub id of the base; None is the one that the adapter names.
        dtype: "float32" or "bfloat16" for all weights; None keeps types.

    Returns:
        What became of every tensor of base and adapter.

    Raises:
        ValueError: If the folder is no adapter, or the base cannot be read or does not fit.
    """
    if not (source / ADAPTER_CONFIG_FILE).is_file():
        raise ValueError(
            f"{source} is no adapter-only folder ({ADAPTER_CONFIG_FILE} is missing); the policy folders of this "
            "package's runs hold merged weights already."
        )
    template = template_like(source)
    weights = policy_weights(source, base)
    assert isinstance(weights, AdaptedWeights)  # the folder has an adapter configuration
    check_kind(weights, template.config, str(source))
    expected = model_tensors(template.config)
    check_stored(weights, expected)
    shapes = shapes_in_file(weights, expected, dtype)
    config = deployment_config(template.config, shapes)
    config.dtype = dtype or config.dtype
    write_policy_folder(
        destination,
        config,
        template.processors,
        lambda folder: write_streaming(folder / WEIGHTS_FILE, shapes, weights),
        tokenizer_source=source,
    )
    keys = []
    for name, (a, b, _) in weights.factors.items():
        keys += [Key(factor.name, (name,), CONVERTED, "merged") for factor in (a, b)]
    plain = [name for name in expected if name in weights.tensors and name not in weights.factors]
    own = {name for name in plain if weights.tensors[name].file == weights.source}
    keys += keys_of(weights, {name: name for name in own})
    keys += keys_of(weights, {name: name for name in plain if name not in own}, UNCHANGED)
    if EXPERT_HEAD not in weights.tensors:
        keys.append(Key("", (EXPERT_HEAD,), ADDED, "zeros; nothing computes with it"))
    return Report(str(source), str(destination), "merged", keys, {"computes in": config.dtype})


def _base_for_lerobot(folder: Path, config: PreTrainedConfig) -> StoredWeights:
    """A base's weights, if LeRobot itself would load all of them."""
    base = stored_weights(folder)
    expected = model_tensors(config)
    check_stored(replace(base, set_aside={}), expected)
    if base.source.name != WEIGHTS_FILE or base.set_aside or EXPERT_HEAD not in base.tensors:
        raise ValueError(
            f"LeRobot cannot load all of {base.source}: it reads one {WEIGHTS_FILE} with exactly the model's weights, "
            f"and random ones otherwise. Write such a base with `pi-rl convert {folder} NEW_FOLDER --to lerobot`, and "
            "give it with --base."
        )
    return base


def _trained_whole(weights: StoredWeights, merged: AdaptedWeights) -> set[str]:
    """The tensors of modules that were trained without LoRA.

    Raises:
        ValueError: If the VLM is not the base's with the adapters merged.
    """
    changed, foreign = set(), []
    for name in weights.tensors:
        pair = dict(weights.read([name])), dict(merged.read([name]))
        adapted = name in merged.factors
        ours, theirs = (part[name] if adapted else part[name].float() for part in pair)
        if not same_weights(ours, theirs, rounded=adapted):
            changed.add(name)
            if adapted or name.startswith(VLM_PREFIX):
                foreign.append(name)
    if foreign:
        raise ValueError(
            f"{merged.source.parent} was not trained on this base: {len(foreign)} tensors of the VLM, such as "
            f"{some_of(foreign[:1])}, are not the base's with the adapters merged. Give the run's own base with "
            "--base; if the run cast it to bfloat16 (vlm_dtype), write that with --to lerobot --dtype bfloat16 first."
        )
    modules = {name.rpartition(".")[0] for name in changed}
    return {name for name in weights.tensors if name.rpartition(".")[0] in modules}


def _key(name: str, weights: StoredWeights, merged: AdaptedWeights, whole: set[str]) -> Key:
    stored = weights.tensors[name].name
    if name in merged.factors:
        return Key(stored, tuple(factor.name for factor in merged.factors[name][:2]), CONVERTED)
    if name in whole:
        return Key(stored, (STORED_PREFIX + name,), CONVERTED)
    return Key(stored, (), UNCHANGED, "the base has it")
