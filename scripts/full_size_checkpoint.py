"""Writes a π0 or π0.5 of full size with random weights, and measures what loading and saving it takes.

    python scripts/full_size_checkpoint.py --model pi0 --output_dir runs/full --layout openpi --shards 4
    python scripts/full_size_checkpoint.py --check runs/full --save

Everything is in bfloat16 on disk (8 GB); one tensor is in memory at a time. The check runs in a fresh process and
prints JSON: memory is in bytes, `peak` is the process's highest resident set (VmHWM), libraries included,
and `file` what of the resident set lies in mapped files, which the system may drop at any time.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.factory import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

import pi_rl.policies.small  # noqa: F401  (registers the policy types)
from pi_rl.policies.checkpoints import load_policy, save_policy, set_tokenizer_name
from pi_rl.policies.small.create import KINDS
from pi_rl.policies.small.tokenizer import train_tokenizer, training_texts
from pi_rl.policies.weight_files import EMBEDDING, INDEX_FILE, WEIGHTS_FILE
from pi_rl.policies.weights import write_tensors

LAYOUTS = ("lerobot", "openpi")
INSTRUCTIONS = ("pick up the black bowl and place it on the plate", "open the middle drawer of the cabinet")
CAMERAS = ("observation.images.image", "observation.images.image2")
STATE_DIM, ACTION_DIM, IMAGE_SIZE = 8, 7, 224
_SIGN_AND_MANTISSA, _EXPONENT = 0x807F, 0x3C80  # bfloat16 of magnitude 2^-6 … 2^-5, about 1 / √2048


def full_size_config(kind: str, type_suffix: str = "", **fields: Any) -> Any:
    """LeRobot's configuration for LIBERO-shaped inputs, weights in bfloat16."""
    features = {key: PolicyFeature(type=FeatureType.VISUAL, shape=(3, IMAGE_SIZE, IMAGE_SIZE)) for key in CAMERAS}
    return make_policy_config(
        f"{kind}{type_suffix}",
        device="cpu",
        dtype="bfloat16",
        input_features={**features, OBS_STATE: PolicyFeature(type=FeatureType.STATE, shape=(STATE_DIM,))},
        output_features={ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(ACTION_DIM,))},
        n_action_steps=10,
        push_to_hub=False,
        **fields,
    )


def stored_names(config: Any, layout: str) -> dict[str, Tensor]:
    """The file's tensors by name, on the meta device, in bfloat16."""
    config = copy.copy(config)
    config.device = None  # LeRobot's constructor then leaves the empty weights where they are
    with init_empty_weights():
        policy = get_policy_class(config.type)(config)
    tensors = {name: tensor.to("meta", torch.bfloat16) for name, tensor in policy.state_dict().items()}
    if layout == "openpi":
        del tensors[EMBEDDING]  # openpi keeps it as lm_head alone
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return tensors


def random_tensor(shape: torch.Size, seed: int) -> Tensor:
    """Bfloat16 numbers of random sign and mantissa, made without a float32 copy."""
    bits = np.random.default_rng(seed).integers(0, 2**16, torch.Size(shape).numel(), dtype=np.uint16)
    bits &= _SIGN_AND_MANTISSA
    bits |= _EXPONENT
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).reshape(shape)


def write_weights(folder: Path, tensors: dict[str, Tensor], shards: int, seed: int) -> None:
    """Writes the weights into one file or `shards` of about equal size with an index."""
    order = {name: position for position, name in enumerate(tensors)}
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    total, written = sum(tensor.nbytes for tensor in tensors.values()), 0
    for name, tensor in tensors.items():
        parts[min(written * shards // total, shards - 1)][name] = tensor
        written += tensor.nbytes
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else [WEIGHTS_FILE]
    for file, part in zip(files, parts, strict=True):
        write_tensors(folder / file, part, lambda name: random_tensor(tensors[name].shape, seed + order[name]))
    if shards > 1:
        index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))


def write_checkpoint(
    folder: Path, kind: str, layout: str = "lerobot", shards: int = 1, seed: int = 0, state_in_prompt: bool = True
) -> Path:
    """Writes a policy folder that `load_policy` reads: weights, configuration, processors and a small tokenizer.

    Args:
        folder: A new folder.
        kind: "pi0" or "pi05".
        layout: Names of the weights, "lerobot" or "openpi".
        shards: Number of weight files.
        seed: Of the weights.
        state_in_prompt: π0.5 alone: whether its prompt holds the state.

    Returns:
        The folder.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True)
    with_state = kind == "pi05" and state_in_prompt
    train_tokenizer(training_texts(INSTRUCTIONS, with_state), 512).save_pretrained(folder)
    config = full_size_config(kind)
    prompt = {"state_in_prompt": state_in_prompt} if kind == "pi05" else {}
    # LeRobot's own factory downloads the tokenizer; the small policies' has the same steps and takes a folder
    small = full_size_config(kind, "_small", image_resolution=(224, 224), tokenizer_name=str(folder),
                             tokenizer_max_length=config.tokenizer_max_length, **prompt)  # fmt: skip
    for pipeline in make_pre_post_processors(small):
        pipeline.save_pretrained(folder)
    config._save_pretrained(folder)
    set_tokenizer_name(folder, str(folder))
    write_weights(folder, stored_names(config, layout), shards, seed)
    return folder


def memory() -> dict[str, int]:
    """This process's resident memory in bytes: the highest so far, and what now is private or lies in files."""
    names = {"VmHWM": "peak", "RssAnon": "private", "RssFile": "file"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {names[words[0][:-1]]: int(words[1]) * 1024 for words in lines if words[0][:-1] in names}


def measure(folder: Path, save: bool) -> dict[str, Any]:
    """Loads a folder in this process; with `save` reads every weight and writes the policy beside the folder, too."""
    size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    result: dict[str, Any] = {"folder": folder.name, "file_bytes": size, "before": memory()}
    started = time.perf_counter()
    loaded = load_policy(folder)
    result["seconds_load"] = round(time.perf_counter() - started, 2)
    result["keys"] = len(loaded.policy.state_dict())
    result["after_load"] = memory()
    result["load_peak_ratio"] = round(result["after_load"]["peak"] / size, 3)
    if save:
        with tempfile.TemporaryDirectory(dir=folder.parent) as target:
            started = time.perf_counter()
            save_policy(Path(target) / "saved", loaded.policy, loaded.preprocessor, loaded.postprocessor)
            result["seconds_save"] = round(time.perf_counter() - started, 2)
        result["after_save"] = memory()
        result["save_peak_ratio"] = round(result["after_save"]["peak"] / size, 3)
    return result


def check(folder: Path, save: bool) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", str(folder), *(["--save"] if save else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=KINDS, default="pi0")
    parser.add_argument("--layout", choices=LAYOUTS, default="lerobot")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_state_in_prompt", action="store_true", help="pi05: the paper's LIBERO prompt")
    parser.add_argument("--output_dir", type=Path, help="new folder to write")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="load a folder in a fresh process, print JSON")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="load a folder in this process, print JSON")
    parser.add_argument("--save", action="store_true", help="with --check: save the policy again, too")
    args = parser.parse_args()
    if args.output_dir is not None:
        write_checkpoint(args.output_dir, args.model, args.layout, args.shards, args.seed, not args.no_state_in_prompt)
    if args.check is not None:
        print(json.dumps(check(args.check, args.save)))
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.save)))


if __name__ == "__main__":
    main()
