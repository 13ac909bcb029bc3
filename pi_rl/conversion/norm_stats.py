"""openpi's norm_stats.json, and the normaliser states of LeRobot's processors.

Both normalise to (x - mean) / (std + ε) or, with quantiles, to 2 (x - q01) / (q99 - q01) - 1, and back. openpi adds
ε = 10⁻⁶ everywhere, LeRobot where it divides by a standard deviation, or by quantiles that are equal. Converted
policies get openpi's ε: observations are normalised as there, and actions differ by at most 10⁻⁶ of their unit per
unit of normalised action.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, UnnormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from pi_rl.conversion.sources import checkpoint_folder

NORM_STATS_FILE = "norm_stats.json"
OPENPI_EPS = 1e-6
STATISTICS = ("mean", "std", "q01", "q99")
FEATURES = {"state": (OBS_STATE, FeatureType.STATE), "actions": (ACTION, FeatureType.ACTION)}
_NEEDED = {NormalizationMode.MEAN_STD: ("mean", "std"), NormalizationMode.QUANTILES: ("q01", "q99")}

Statistics = dict[str, dict[str, list[float]]]
"""Numbers by "state" or "actions", then by name of the statistic."""


def find_norm_stats(source: Path) -> Path | None:
    """The norm_stats.json of a checkpoint: openpi has it in assets/<asset id>, RLinf in <asset id>.

    Args:
        source: The checkpoint's folder, or a weight file. Among files of other models, in a folder that is no
            checkpoint's, only what lies beside the file and in assets/ there is its own.

    Raises:
        ValueError: If there are several with different contents.
    """
    checkpoint = checkpoint_folder(source)
    folder = checkpoint or source.parent
    places = ("", "assets/**/", "*/", "*/*/") if checkpoint else ("", "assets/**/")  # an id may be organisation/name
    found = sorted({path for place in places for path in folder.glob(f"{place}{NORM_STATS_FILE}")})
    if len({path.read_bytes() for path in found}) > 1:
        raise ValueError(
            f"{folder} holds several {NORM_STATS_FILE}: {', '.join(str(path.relative_to(folder)) for path in found)}. "
            "Say which one is this policy's with --norm_stats."
        )
    return found[0] if found else None


def read_norm_stats(path: Path) -> Statistics:
    """Reads a norm_stats.json.

    Raises:
        ValueError: If it is not one, or numbers are missing, not finite or out of order.
    """
    try:
        content = json.loads(path.read_text("utf-8"))["norm_stats"]
        stats = {
            name: {key: _numbers(content[name][key]) for key in STATISTICS if content[name].get(key) is not None}
            for name in FEATURES
        }
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not openpi's {NORM_STATS_FILE} ({error!r}); it holds norm_stats with state and actions, each "
            f"with lists of numbers {', '.join(STATISTICS)}."
        ) from error
    for name, values in stats.items():
        _check(path, name, values)
    return stats


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return [float(value) for value in values]


def _check(path: Path, name: str, values: Mapping[str, Sequence[float]]) -> None:
    lengths = {key: len(numbers) for key, numbers in values.items()}
    if not {"mean", "std"} <= set(values) or len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"{path}: {name} must have as many numbers in mean and std as in q01 and q99, got {lengths}.")
    if not all(math.isfinite(number) for numbers in values.values() for number in numbers):
        raise ValueError(f"{path}: {name} has numbers that are not finite; compute the statistics again.")
    if min(values["std"]) < 0 or any(
        low > high for low, high in zip(values.get("q01", ()), values.get("q99", ()), strict=True)
    ):
        raise ValueError(f"{path}: {name} has a negative std, or q01 above q99; compute the statistics again.")


def apply_norm_stats(processors: Sequence[PolicyProcessorPipeline], stats: Statistics) -> str:
    """Gives the normalisers of processors openpi's statistics, in place.

    Args:
        processors: (preprocessor, postprocessor).
        stats: As `read_norm_stats` gives them; of padded ones the first numbers count, as in openpi.

    Returns:
        What was taken, for a report.

    Raises:
        ValueError: If the statistics are too short, or lack what a policy normalises with.
    """
    taken: dict[str, str] = {}
    for step in (step for pipeline in processors for step in pipeline.steps):
        if not isinstance(step, NormalizerProcessorStep | UnnormalizerProcessorStep):
            continue
        step.stats = dict(step.stats or {})
        for name, (key, feature_type) in FEATURES.items():
            if key not in step.features:
                continue
            size, mode = step.features[key].shape[0], step.norm_map.get(feature_type, NormalizationMode.IDENTITY)
            step.stats[key] = _sliced(name, stats[name], size, mode)
            taken[name] = f"{name} {size} of {len(stats[name]['mean'])} numbers ({mode.value.lower()})"
        step.eps = OPENPI_EPS
        step.to(device=step.device)  # rebuilds the tensors
    if set(taken) != set(FEATURES):
        raise ValueError("The policy's processors have no normaliser for state and actions; use another --like.")
    return ", ".join(taken.values())


def _sliced(name: str, values: Mapping[str, Sequence[float]], size: int, mode: NormalizationMode) -> dict[str, Tensor]:
    if mode not in (*_NEEDED, NormalizationMode.IDENTITY):
        raise ValueError(f"The policy normalises {name} with {mode.value}, which openpi does not; use another --like.")
    missing = [key for key in _NEEDED.get(mode, ()) if key not in values]
    if missing:
        raise ValueError(
            f"The policy normalises {name} with {mode.value}, and the statistics lack {', '.join(missing)}; compute "
            "them with quantiles."
        )
    if len(values["mean"]) < size:
        raise ValueError(
            f"The statistics have {len(values['mean'])} numbers for {name}, the policy {size}. Use the statistics "
            "that the weights were trained with, and their robot's sizes (--like, or --state_dim and --action_dim)."
        )
    return {key: torch.tensor(numbers[:size], dtype=torch.float32) for key, numbers in values.items()}


def norm_stats_of(preprocessor: PolicyProcessorPipeline) -> Statistics | None:
    """The statistics of a LeRobot preprocessor, in openpi's terms.

    Returns:
        None if it normalises neither state nor actions.

    Raises:
        ValueError: If only some of what openpi needs is there.
    """
    stored: dict[str, Tensor] = {}
    for step in preprocessor.steps:
        if isinstance(step, NormalizerProcessorStep):
            stored |= step.state_dict()
    stats: Statistics = {
        name: {key: stored[f"{feature}.{key}"].tolist() for key in STATISTICS if f"{feature}.{key}" in stored}
        for name, (feature, _) in FEATURES.items()
    }
    if not any(stats.values()):
        return None
    for name, values in stats.items():
        if not {"mean", "std"} <= set(values):
            raise ValueError(
                f"The processors have {', '.join(values) or 'no statistics'} for {name}, and openpi needs mean and "
                "std of both; give its own statistics with --norm_stats."
            )
    return stats


def write_norm_stats(path: Path, stats: Statistics) -> None:
    """Writes a norm_stats.json; statistics that are missing are null."""
    content = {name: {key: values.get(key) for key in STATISTICS} for name, values in stats.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"norm_stats": content}, indent=2) + "\n", "utf-8")
