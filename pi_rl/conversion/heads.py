"""RLinf's value and noise heads, and this package's critic and noise network: the same layers by other names.

RLinf                                                   here
value_head.mlp.{2i}.weight, .bias                       layers.{2i}.weight, .bias in critic.safetensors
noise_head.mlp_logvar.moduleList.{i}.linear_1.weight    layers.{2i}.weight in noise_network.safetensors
noise_head.logvar_min, logvar_max                       the options noise_std_min, noise_std_max
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pi_rl.conversion.report import CONVERTED, SET_ASIDE, Key, shown, sizes
from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.policies.checkpoints import CRITIC_FILE, NOISE_NETWORK_FILE
from pi_rl.policies.weight_files import EMBEDDING, StoredTensor, StoredWeights, read_header

_RLINF = {
    CRITIC_FILE: (re.compile(r"value_head\.mlp\.(\d+)\.(weight|bias)"), 2, "value_head.mlp.{}.{}"),
    NOISE_NETWORK_FILE: (
        re.compile(r"noise_head\.mlp_logvar\.moduleList\.(\d+)\.linear_1\.(weight|bias)"),
        1,
        "noise_head.mlp_logvar.moduleList.{}.linear_1.{}",
    ),
}
"""File here → pattern of RLinf's names, its step between layers, and how to write a name."""
_OURS = re.compile(r"layers\.(\d+)\.(weight|bias)")
_BOUNDS = {"noise_head.logvar_min": "noise_std_min", "noise_head.logvar_max": "noise_std_max"}
_RLINF_NOISE_HIDDEN = (128, 64)

Layers = dict[tuple[int, str], StoredTensor]
"""Tensors by number of the linear layer and "weight" or "bias"."""


@dataclass(frozen=True)
class PolicySizes:
    """What heads read and predict.

    Attributes:
        expert: Width of the action expert's output, F.
        critic_vlm: Width of what the critic `vlm` reads: the VLM's output, and for π0 the padded state.
        vlm: Width of the VLM's output alone, which RLinf's reads.
        actions: Padded action dimensions, D.
    """

    expert: int
    critic_vlm: int
    vlm: int
    actions: int

    @classmethod
    def of(cls, weights: StoredWeights) -> "PolicySizes":
        """The sizes of a π0 or π0.5 by its weights."""
        actions, expert = weights.tensors["model.action_out_proj.weight"].shape
        vlm = weights.tensors[EMBEDDING].shape[1]
        state = weights.tensors.get("model.state_proj.weight")
        return cls(expert, vlm + (0 if state is None else state.shape[1]), vlm, actions)


def heads_from_rlinf(aside: StoredWeights, policy: PolicySizes) -> tuple[dict[str, dict[str, str]], list[Key]]:
    """Which of RLinf's heads become files here.

    Args:
        aside: The tensors that were set aside, by their names without wrappers.
        policy: Sizes of the policy they belong to.

    Returns:
        File → name there → name in `aside`; and a row for every tensor.
    """
    files: dict[str, dict[str, str]] = {}
    keys = []
    rest = dict(aside.tensors)
    for file, (pattern, step, _) in _RLINF.items():
        found = {name: match for name in aside.tensors if (match := pattern.fullmatch(name))}
        layers: Layers = {(int(m[1]) // step, m[2]): aside.tensors[name] for name, m in found.items()}
        if not layers or any(int(match[1]) % step for match in found.values()):
            continue
        problem, note = _judge(file, layers, policy)
        if not problem:
            files[file] = {f"layers.{2 * (int(m[1]) // step)}.{m[2]}": name for name, m in found.items()}
        for name, match in found.items():
            target = () if problem else (f"{file}: layers.{2 * (int(match[1]) // step)}.{match[2]}",)
            keys.append(Key(rest.pop(name).name, target, SET_ASIDE if problem else CONVERTED, problem or note))
    for name, tensor in rest.items():
        keys.append(Key(tensor.name, (), SET_ASIDE, _bound(aside, name) or "no part of this package's heads"))
    return files, keys


def heads_to_rlinf(folder: Path, policy: PolicySizes) -> tuple[dict[str, StoredTensor], list[Key]]:
    """The heads of a checkpoint folder by RLinf's names.

    Args:
        folder: LeRobot folder, with critic.safetensors and noise_network.safetensors or without.
        policy: Sizes of its policy.

    Returns:
        RLinf's names → where the tensors are; and a row for every tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    keys = []
    for file, (_, step, template) in _RLINF.items():
        stored = read_header(folder / file) if (folder / file).is_file() else {}
        names = {name: match for name in stored if (match := _OURS.fullmatch(name))}
        layers: Layers = {(int(m[1]) // 2, m[2]): stored[name] for name, m in names.items()}
        problem = "no head of this package" if len(names) != len(stored) else _judge_for_rlinf(file, layers, policy)
        for name, tensor in stored.items():
            if problem:
                keys.append(Key(f"{file}: {name}", (), SET_ASIDE, problem))
            else:
                target = template.format(int(names[name][1]) // 2 * step, names[name][2])
                tensors[target] = tensor
                keys.append(Key(f"{file}: {name}", (target,), CONVERTED))
    return tensors, keys


def _widths(layers: Mapping[tuple[int, str], StoredTensor]) -> list[int]:
    """Widths from input to output; empty if the tensors are no chain of linear layers with biases."""
    count = 1 + max(number for number, _ in layers)
    if len(layers) != 2 * count or any((i, part) not in layers for i in range(count) for part in ("weight", "bias")):
        return []
    shapes = [layers[i, "weight"].shape for i in range(count)]
    biases = [layers[i, "bias"].shape for i in range(count)]
    if any(len(shape) != 2 for shape in shapes) or biases != [shape[:1] for shape in shapes]:
        return []
    widths = [shapes[0][1], *(shape[0] for shape in shapes)]
    return widths if [shape[1] for shape in shapes] == widths[:-1] else []


def _judge(file: str, layers: Layers, policy: PolicySizes) -> tuple[str, str]:
    """Why a head of RLinf's does not fit (empty if it does), and what to say of it."""
    widths = _widths(layers)
    if not widths:
        return "not a chain of linear layers with biases", ""
    if file == CRITIC_FILE:
        critics = [name for name, size in _critic_inputs(policy).items() if widths[0] == size]
        if not critics or widths[-1] != 1:
            wanted = " or ".join(f"{size} ({name})" for name, size in _critic_inputs(policy).items())
            return f"it reads {widths[0]} numbers, this package's critics {wanted}", ""
        return "", f"critic={' or '.join(critics)}, critic_hidden_sizes={widths[1:-1]}"
    return _unlike_our_noise_network(widths, policy), ""


def _judge_for_rlinf(file: str, layers: Layers, policy: PolicySizes) -> str:
    widths = _widths(layers) if layers else []
    if not layers:
        return ""
    if file == CRITIC_FILE:
        if not widths or widths[0] not in (policy.expert, policy.vlm) or widths[-1] != 1:
            return f"RLinf's value head reads {policy.expert} or {policy.vlm} numbers"
        return ""
    wanted = [policy.expert, *_RLINF_NOISE_HIDDEN, policy.actions]
    return "" if widths == wanted else f"its layers are {sizes(widths)}, RLinf's noise head's {sizes(wanted)}"


def _critic_inputs(policy: PolicySizes) -> dict[str, int]:
    return {"expert": policy.expert, "vlm": policy.critic_vlm}


def _unlike_our_noise_network(widths: list[int], policy: PolicySizes) -> str:
    ours = NoiseNetwork(policy.expert, policy.actions, 0.1, 0.1).state_dict()
    wanted = [policy.expert, *(len(tensor) for name, tensor in ours.items() if name.endswith("bias"))]
    return "" if widths == wanted else f"its layers are {sizes(widths)}, this package's {sizes(wanted)}"


def _bound(aside: StoredWeights, name: str) -> str:
    """The option that a bound of the noise stands for."""
    if name not in _BOUNDS or aside.tensors[name].shape not in ((), (1,)):
        return ""
    ((_, log_variance),) = aside.read([name])
    return f"set {_BOUNDS[name]}={shown(math.exp(0.5 * log_variance.float().item()))}"
