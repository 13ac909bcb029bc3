"""Everything that needs a GPU, in one call: kernels, update, rollout, memory, a whole PPO iteration, FSDP.

    python scripts/benchmark_gpu.py                              # π0 and π0.5 at full size, bfloat16
    python scripts/benchmark_gpu.py --kind pi05 --stages card prefix update
    python scripts/benchmark_gpu.py --small --device cpu         # the same code with small models, to test it

Random weights of full size are written once and loaded as any checkpoint. Each stage runs in a process of its own, so
that its memory peak is its own and a stage that fails leaves the others; the parent goes on, writes what it has after
every stage (gpu.json) and ends with status 1 if one failed. Observations are LIBERO-shaped: two pictures of 256
pixels, eight numbers of state, seven of action; the environment is synthetic and costs next to nothing, so that
seconds are the policy's.

    card       matrix products in bfloat16 (the rate that others are compared with), copies from pinned host memory
    prefix     VLM on 16 observations: FLOPs, share of the card's rate
    update     cached against recomputed, hybrid and one_layer K=4: ratios; targets 15x and 6x
    denoise    four expert passes, plain, compiled, with CUDA graphs; first ratio of each
    iteration  FlowPPOTrainer: seconds per phase, samples/s, peak memory beside the plan's; target 22 GB
    tiers      the same iteration with prefixes on the device, on the host, on disk and recomputed
    lora       the same with LoRA on the VLM; target 40 GB
    fsdp       `accelerate launch` with fsdp_8gpu.yaml on the GPUs that there are
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size_checkpoint import write_checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pi_rl import FlowPPOConfig, FlowPPOTrainer
from pi_rl.envs.deferred import DeferredVectorEnv
from pi_rl.envs.vector_env import ChunkResult, EnvSpec
from pi_rl.flow.chain import Chain
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.lora import vlm_lora_config
from pi_rl.policies.small.create import create_small_policy
from pi_rl.rollout.policy_io import PolicyIO, fit_prompt
from pi_rl.trainer.build import build_actor_critic

ROOT = Path(__file__).parents[1]
STAGES = ("card", "prefix", "update", "denoise", "iteration", "tiers", "lora", "fsdp")
CAMERAS = ("observation.images.image", "observation.images.image2")
TASK = "pick up the black bowl and place it on the plate"
STEPS, EXECUTED = 4, 5
TARGETS = {"update_hybrid": 15.0, "update_one_layer": 6.0, "prefix_share": 0.4, "iteration_gb": 22.0, "lora_gb": 40.0}


class SyntheticEnv(DeferredVectorEnv):
    """LIBERO-shaped observations of noise; episodes are cut after their time and never solved.

    Args:
        num_envs: B.
        max_episode_steps: Length of an episode.
        size: Pixels of a picture's side.
    """

    def __init__(self, num_envs: int, max_episode_steps: int = 40, size: int = 256):
        super().__init__(libero_shaped(max_episode_steps, size), num_envs)
        generator = np.random.default_rng(0)
        self._images = {
            camera: generator.integers(0, 256, (num_envs, size, size, 3), dtype=np.uint8) for camera in CAMERAS
        }
        self._states = generator.uniform(-1, 1, (num_envs, 8)).astype(np.float32)
        self._steps = np.zeros(num_envs, np.int64)

    def _check_open(self) -> None:
        """It needs nothing, so it is always open."""

    def reset(self, ids: Any, indices: Any = None) -> dict[str, Any]:
        slots = np.arange(self.num_envs) if indices is None else np.asarray(indices)
        self._running[slots], self._steps[slots] = True, 0
        return self._observation()

    def _simulate(self, going: Any, actions: Any) -> ChunkResult:
        steps = np.where(going, np.minimum(actions.shape[1], self.spec.max_episode_steps - self._steps), 0)
        self._steps += steps
        self._states[going] = np.clip(self._states[going] + 0.01, -1, 1)
        truncated = going & (self._steps >= self.spec.max_episode_steps)
        self._running &= ~truncated
        none = np.zeros(self.num_envs, bool)
        rewards = np.zeros(actions.shape[:2], np.float32)
        return ChunkResult(self._observation(), rewards, none, truncated, none.copy(), steps, none.copy())

    def _observation(self) -> dict[str, Any]:
        return {**self._images, "observation.state": self._states.copy(), "task": [TASK] * self.num_envs}

    def render(self, indices: Any, height: int, width: int, *, show_arm: bool = True) -> np.ndarray:
        return np.zeros((len(indices), height, width, 3), np.uint8)

    def close(self) -> None:
        """There is nothing to free."""


def libero_shaped(max_episode_steps: int, size: int) -> EnvSpec:
    bound = (1.0,) * 7
    return EnvSpec(
        name="synthetic:libero", tasks=(TASK,), instructions=(TASK,), cameras=dict.fromkeys(CAMERAS, (size, size)),
        state_dim=8, action_dim=7, max_episode_steps=max_episode_steps, fps=20,
        action_low=tuple(-b for b in bound), action_high=bound,
    )  # fmt: skip


def policy_folder(kind: str, small: bool, root: Path) -> Path:
    """Random weights, written once."""
    folder = root / kind
    if folder.is_dir():
        return folder
    if not small:
        return write_checkpoint(folder, kind)
    return create_small_policy(
        kind, cameras=CAMERAS, state_dim=8, action_dim=7, image_size=64, chunk_size=10, n_action_steps=EXECUTED,
        denoising_steps=STEPS, instructions=[TASK], output_dir=folder, seed=0,
    )  # fmt: skip


def arguments(options: argparse.Namespace, folder: Path, **overrides: Any) -> FlowPPOConfig:
    """Minibatch 32 by accumulation, 16 environments, float32 masters, recomputed layers."""
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": options.device == "cpu", "bf16": True, "gradient_checkpointing": True,
        "num_iterations": 2, "num_envs": 16, "rollout_chunks": 8, "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4, "update_epochs": 2, "denoising_steps": STEPS, "n_action_steps": EXECUTED,
        "noise": "flow_sde", "eval_episodes": 16, "eval_on_start": False, "disable_tqdm": True,
    }  # fmt: skip
    return FlowPPOConfig(**{**settings, **overrides})


class Bench:
    """A loaded model with its inputs, and clocks that wait for the device.

    Args:
        options: Command line.
        folder: Of the policy.
        **overrides: Of the configuration.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, **overrides: Any):
        self.device = torch.device(options.device)
        self.repetitions = options.repetitions
        overrides = {"rollout_chunks": 1, "num_envs": 32, "gradient_accumulation_steps": 1, **overrides}
        args = arguments(options, folder.parent / "run", per_device_train_batch_size=options.rows, **overrides)
        loaded = load_policy(folder, device=self.device, n_action_steps=EXECUTED, denoising_steps=STEPS)
        self.model: FlowActorCritic = build_actor_critic(loaded, args, make_critic=lambda policy: ValueHead(policy))
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.to(self.device).eval()
        self.env = SyntheticEnv(32)
        self.io = PolicyIO(loaded.preprocessor, loaded.postprocessor, self.env.spec, EXECUTED)
        fit_prompt(self.model.policy, loaded.preprocessor, self.env.spec)
        self.observation = self.env.reset(np.zeros((32, 2), np.int64))

    def batch(self, rows: int) -> dict[str, Any]:
        """Preprocessed observations on the device."""
        return self.io.batch(self.observation, np.arange(rows))

    def seconds(self, *works: Callable[[], Any]) -> list[list[float]]:
        """Seconds of each work, measured in turns after two rounds that do not count."""
        taken: list[list[float]] = [[] for _ in works]
        for repetition in range(self.repetitions + 2):
            for work, times in zip(works, taken, strict=True):
                self.wait()
                started = time.perf_counter()
                work()
                self.wait()
                if repetition >= 2:
                    times.append(time.perf_counter() - started)
        return taken

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def draw(self, prefix: Any) -> Any:
        """Acts once with fixed noise."""
        generator = torch.Generator().manual_seed(0)
        policy, sampler, rows = self.model.policy, self.model.sampler, len(prefix)
        shape = (policy.chunk_size, policy.max_action_dim)
        return self.model(
            "sample", prefix=prefix,
            x_init=torch.randn(rows, *shape, generator=generator).to(self.device),
            eps=torch.randn(rows, sampler.denoising_steps, *shape, generator=generator).to(self.device),
            step_index=sampler.draw_step_index(torch.rand(rows, generator=generator).to(self.device)),
        )  # fmt: skip


def card(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Matrix products of 8192 (256 on the CPU) and copies of 1 GB (16 MB) from pinned memory."""
    gpu = options.device != "cpu"
    size, copied = (8192, 2**30) if gpu else (256, 2**24)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=options.device) for _ in range(2))
    host = torch.empty(copied, dtype=torch.uint8, pin_memory=gpu)
    bench = Bench.__new__(Bench)
    bench.device, bench.repetitions = torch.device(options.device), options.repetitions
    products, copies = bench.seconds(
        lambda: [a @ b for _ in range(10)], lambda: host.to(options.device, non_blocking=True, copy=True)
    )
    return {
        "matmul_tflops": 10 * 2 * size**3 / statistics.median(products) / 1e12,
        "host_to_device_gb_s": copied / statistics.median(copies) / 1e9,
    }


def prefix(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The VLM on 16 observations."""
    bench = Bench(options, folder)
    batch = bench.batch(16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tokens = bench.model("encode", batch=batch).pad_mask.shape[1]
    with torch.no_grad():
        (times,) = bench.seconds(lambda: bench.model("encode", batch=batch))
    flops, seconds = counter.get_total_flops(), statistics.median(times)
    rate = flops / seconds / 1e12
    return {"tokens": tokens, "tflop_per_observation": flops / 16e12, "ms_per_observation": 1e3 * seconds / 16,
            "tflops": rate, "share_of_matmul": rate / card(options, folder)["matmul_tflops"]}  # fmt: skip


def update(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Score and backward of a micro-batch, from stored prefixes and from observations, in turns."""
    result = {}
    for name, overrides in (("hybrid", {}), ("one_layer", {"noise": "flow_noise", "mdp": "one_layer"})):
        bench = Bench(options, folder, **overrides)
        batch = bench.batch(options.rows)
        stored = bench.model("encode", batch=batch)
        sample = bench.draw(stored)
        chain = Chain(sample.chain.x, sample.chain.step_index)

        def step(inputs: Any, bench: Bench = bench, chain: Chain = chain) -> None:
            score, _ = bench.model("score", inputs=inputs, chain=chain)
            score.log_prob.sum().backward()
            bench.model.zero_grad()

        cached, recomputed = bench.seconds(lambda s=stored: step(s), lambda b=batch: step(b))
        ratios = [slow / fast for slow, fast in zip(recomputed, cached, strict=True)]
        result[f"{name}_ratio"] = statistics.median(ratios)
        result[f"{name}_cached_ms_per_sample"] = 1e3 * statistics.median(cached) / options.rows
        result[f"{name}_recomputed_ms_per_sample"] = 1e3 * statistics.median(recomputed) / options.rows
        del bench
    return result


def denoise(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Acting on stored prefixes, and the first ratio of a shuffled micro-batch."""
    result = {}
    modes: dict[str, dict[str, Any]] = {
        "plain": {},
        "compiled": {"torch_compile": True},
        "cuda_graphs": {"torch_compile": True, "torch_compile_mode": "reduce-overhead"},
    }
    for name, overrides in modes.items():
        bench = Bench(options, folder, **overrides)
        stored = bench.model("encode", batch=bench.batch(2 * options.rows))
        (times,) = bench.seconds(lambda bench=bench, stored=stored: bench.draw(stored))
        sample = bench.draw(stored)
        rows = torch.randperm(len(stored))[: options.rows]
        on_device = rows.to(bench.device)
        chain = Chain(sample.chain.x[on_device], sample.chain.step_index[on_device])
        score, _ = bench.model("score", inputs=stored.index(rows), chain=chain)
        ratio = (score.log_prob - sample.log_prob[on_device, 0]).exp().sub(1).abs().max()
        result[f"{name}_ms"] = 1e3 * statistics.median(times)
        result[f"{name}_first_ratio_error"] = float(ratio.detach())
        del bench
    return result


def run_trainer(options: argparse.Namespace, folder: Path, **overrides: Any) -> dict[str, Any]:
    """Two PPO iterations and an evaluation through the Trainer; the second iteration is reported."""
    peft = overrides.pop("peft_config", None)
    with tempfile.TemporaryDirectory() as output:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        args = arguments(options, Path(output), num_envs=16 * processes, **overrides)
        env = SyntheticEnv(args.num_envs // args.world_size)
        started = time.perf_counter()
        trainer = FlowPPOTrainer(str(folder), args, env, peft_config=peft)
        loaded = time.perf_counter() - started
        trainer.train()
        trainer.evaluate()
        log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    samples = args.samples_per_iteration
    seconds = log["time/rollout"] + log["time/update"]
    result = {
        "seconds_to_build": loaded, "rollout_s": log["time/rollout"], "update_s": log["time/update"],
        "evaluation_s": trainer.state.log_history[-1].get("eval_runtime"), "samples": samples,
        "samples_per_s": samples / seconds, "first_ratio_error": log["policy/ratio_error_first"],
    }  # fmt: skip
    if options.device != "cpu":
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return result


def iteration(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Expert-only PPO."""
    return run_trainer(options, folder, prefix_storage=options.storage)


def tiers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Expert-only PPO with each place for the prefixes, each in a process of its own."""
    results = {}
    for tier in ("device", "host", "disk", "recompute"):
        result = folder.parent / f"{tier}.json"
        words = [*child_arguments(options, "iteration", folder, result), "--storage", tier]
        subprocess.run([sys.executable, __file__, *words], check=True)
        results[tier] = json.loads(result.read_text())
    return results


def lora(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """LoRA on the VLM beside the whole expert, two samples per pass."""
    return run_trainer(
        options, folder, peft_config=vlm_lora_config(), per_device_train_batch_size=2, gradient_accumulation_steps=16
    )


def fsdp(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The iteration stage under `accelerate launch` with the FSDP file, on all GPUs of the machine."""
    layout = "fsdp_8gpu.yaml" if options.device != "cpu" else "cpu.yaml"
    count = max(1, torch.cuda.device_count()) if options.device != "cpu" else 1
    result = folder.parent / "fsdp.json"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
              str(ROOT / "recipes" / "accelerate" / layout), "--num_processes", str(count)]  # fmt: skip
    subprocess.run([*launch, __file__, *child_arguments(options, "iteration", folder, result)], check=True)
    return {"processes": count, **json.loads(result.read_text())}


def child_arguments(options: argparse.Namespace, stage: str, folder: Path, result: Path) -> list[str]:
    words = ["--run", stage, "--folder", str(folder), "--result", str(result), "--device", options.device]
    words += ["--rows", str(options.rows), "--repetitions", str(options.repetitions)]
    return [*words, *(["--small"] if options.small else [])]


def run_stages(options: argparse.Namespace) -> int:
    """Every stage of every model in its own process; returns how many failed."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"device": device_name(options.device), "torch": torch.__version__, "targets": TARGETS}
    failed = 0
    with tempfile.TemporaryDirectory(dir=options.output_dir) as scratch:
        for kind in options.kind:
            folder = policy_folder(kind, options.small, Path(scratch))
            for stage in options.stages:
                result = Path(scratch) / f"{kind}-{stage}.json"
                started = time.perf_counter()
                command = [sys.executable, __file__, *child_arguments(options, stage, folder, result)]
                status = run_bounded(command, options.stage_timeout)
                found = json.loads(result.read_text()) if status == 0 else {"failed": status}
                failed += status != 0
                report.setdefault(kind, {})[stage] = {**found, "stage_s": time.perf_counter() - started}
                (options.output_dir / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
                print(f"{kind} {stage}: {json.dumps(report[kind][stage])}", flush=True)
    return failed


def run_bounded(command: list[str], seconds: float) -> int | str:
    """Exit status of a command; "timeout" after it was ended with everything that it started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "timeout"


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(0) if device != "cpu" else "cpu"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=("pi0", "pi05"), default=["pi0", "pi05"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else None, help="cuda, or cpu")
    parser.add_argument("--small", action="store_true", help="small models, to test this script")
    parser.add_argument("--rows", type=int, default=16, help="samples of a micro-batch in `update` and `denoise`")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--stage_timeout", type=float, default=600, help="seconds after which a stage is given up")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark_gpu"))
    parser.add_argument("--storage", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device is None:
        parser.error("no CUDA device here; --small --device cpu tests the script with small models")
    return options


def main() -> int:
    options = parse()
    if options.run is None:
        return int(run_stages(options) > 0)
    try:
        found = globals()[options.run](options, options.folder)
    except Exception:
        traceback.print_exc()
        return 1
    if int(os.environ.get("RANK", "0")) == 0:
        options.result.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
