"""Steps per second of rollouts beside the simulators alone, with one stage and with two.

    python scripts/benchmark_rollout.py                       # the quick start's environments and model
    python scripts/benchmark_rollout.py --standard            # MetaWorld as LeRobot draws it, 480 x 480 pixels
    python scripts/benchmark_rollout.py --inference_ms 100    # as with a network that leaves the processor alone
    python scripts/benchmark_rollout.py --scaling 8 16 32 64  # and the plot docs/images/rollout_scaling.png

A rollout is recorded; "simulators" then repeats its resets and actions, with the same observations drawn, without a
policy. All kinds are measured in turns in one run; figures are medians, ratios are medians of the ratios of a turn.
Seconds are given by the clock and in processor time, of this process and of the workers. Prints and writes JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pi_rl import FlowPPOConfig
from pi_rl.envs.registry import check_name_and_options, make_env
from pi_rl.envs.workers import available_cores
from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.execution import Execution
from pi_rl.policies.small.create import create_small_policy
from pi_rl.rollout.collector import RolloutCollector
from pi_rl.rollout.policy_io import PolicyIO
from pi_rl.trainer.build import build_actor_critic

CONFIG = Path(__file__).parents[1] / "recipes" / "configs" / "metaworld" / "quickstart.yaml"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "rollout_scaling.png"


class Setting:
    """Policy, environment options and sizes of one measurement.

    Args:
        config: The recipe's options.
        env_options: In place of the recipe's.
        chunks: T.
        inference_ms: Sleep in each pass of the denoising loop, which stands for a network on another device.
        folder: For the untrained policy.
        **execution: How the network is run: attn_implementation, torch_compile.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        env_options: dict[str, Any],
        chunks: int,
        inference_ms: float,
        folder: Path,
        **execution: Any,
    ):
        self.config, self.env_options, self.chunks, self.inference_ms = config, env_options, chunks, inference_ms
        spec = check_name_and_options(config["env"], env_options)
        torch.manual_seed(0)
        create_small_policy(
            config["small_model"],
            cameras=spec.cameras,
            state_dim=spec.state_dim,
            action_dim=spec.action_dim,
            image_size=config["image_resolution"],
            chunk_size=config["chunk_size"],
            n_action_steps=config["chunk_size"],
            denoising_steps=config["denoising_steps"],
            instructions=spec.sentences(),
            output_dir=folder / "policy",
            seed=0,
        )
        loaded = load_policy(folder / "policy", device="cpu")
        names = ("noise_level", "noise_std_min", "noise_std_max", "denoising_steps")
        args = FlowPPOConfig(
            output_dir=str(folder), use_cpu=True, num_envs=1, rollout_chunks=1, per_device_train_batch_size=1,
            **{name: config[name] for name in names}, **execution,
        )  # fmt: skip
        sizes = config["critic_hidden_sizes"]
        self.model = build_actor_critic(loaded, args, make_critic=lambda policy: ValueHead(policy, sizes))
        self.model.execution = Execution()  # as many rows as there are
        self.io = PolicyIO(loaded.preprocessor, loaded.postprocessor, spec, config["chunk_size"])
        self.seconds: dict[str, float] = {}
        self._forward = self.model.forward
        self.model.forward = self._timed  # type: ignore[method-assign]

    def _timed(self, mode: str, **inputs: Any) -> Any:
        started = time.thread_time()
        result = self._forward(mode, **inputs)
        self.seconds[mode] = self.seconds.get(mode, 0.0) + time.thread_time() - started
        if mode == "sample":
            time.sleep(self.inference_ms / 1000)
        return result

    def environment(self, num_envs: int, workers: int) -> Any:
        """The simulators."""
        return make_env(self.config["env"], num_envs, min(workers, num_envs), **self.env_options)

    def collector(self, env: Any, stages: int) -> RolloutCollector:
        """A collector as the trainer makes it."""
        return RolloutCollector(env, self.model, self.io, chunks=self.chunks, seed=0, pipeline_stages=stages)


def measured(env: Any, work: Any) -> dict[str, float]:
    """What `work()` takes; it returns the simulator steps that it made."""
    ours, theirs, started = time.process_time(), workers_cpu(env), time.perf_counter()
    steps = work()
    wall = time.perf_counter() - started
    ours, theirs = time.process_time() - ours, workers_cpu(env) - theirs
    return {"steps_per_s": steps / wall, "wall_s": wall, "policy_cpu_s": ours, "simulator_cpu_s": theirs}


def workers_cpu(env: Any) -> float:
    """Processor seconds of the workers so far."""
    return sum(report["cpu_seconds"] for report in env.worker_reports())


def record(env: Any, collector: RolloutCollector) -> list[tuple[str, tuple[Any, ...]]]:
    """The resets and chunks of a rollout of one stage, as calls to make again."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    kept = {name: getattr(env, name) for name in ("reset", "start_chunk")}

    def noting(name: str) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append((name, tuple(np.copy(argument) for argument in arguments)))
            return kept[name](*arguments)

        return call

    for name in kept:
        setattr(env, name, noting(name))
    collector.collect(0)
    for name in kept:
        delattr(env, name)
    return calls


def replay(env: Any, calls: list[tuple[str, tuple[Any, ...]]]) -> int:
    """Makes the calls again; returns the simulator steps."""
    steps = 0
    for name, arguments in calls:
        if name == "reset":
            env.reset(*arguments)
        else:
            steps += int(env.step_chunk(*arguments).steps.sum())
    return steps


def compare(setting: Setting, num_envs: int, cores: int, repetitions: int) -> dict[str, Any]:
    """Simulators alone, one stage and two stages, in turns."""
    with setting.environment(num_envs, cores) as one, setting.environment(num_envs, 2 * cores) as two:
        single, double = setting.collector(one, 1), setting.collector(two, 2)
        calls = record(one, single)
        works = {
            "simulators": (one, lambda: replay(one, calls)),
            "one_stage": (one, lambda: single.collect(0).statistics.env_steps),
            "two_stages": (two, lambda: double.collect(0).statistics.env_steps),
        }
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in works}
        network: dict[str, dict[str, float]] = {}
        for repetition in range(repetitions + 1):  # the first builds simulators and does not count
            for name, (env, work) in works.items():
                setting.seconds = {}
                figures = measured(env, work)
                network[name] = dict(setting.seconds)
                if repetition:
                    taken[name].append(figures)
    result: dict[str, Any] = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in taken.items()
    }
    rates = {name: [one["steps_per_s"] for one in runs] for name, runs in taken.items()}
    result["ratios"] = {
        f"{name} / {base}": statistics.median(a / b for a, b in zip(rates[name], rates[base], strict=True))
        for name, base in (("one_stage", "simulators"), ("two_stages", "simulators"), ("two_stages", "one_stage"))
    }
    result["network_cpu_s_of_the_last_turn"] = {name: parts for name, parts in network.items() if parts}
    return {"num_envs": num_envs, **result}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Processor seconds of a rollout by the number of environments, which other programs change least."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    counts = np.asarray([row["num_envs"] for row in rows])
    for name in ("simulators", "one_stage", "two_stages"):
        seconds = np.asarray([row[name]["policy_cpu_s"] + row[name]["simulator_cpu_s"] for row in rows])
        line = np.poly1d(np.polyfit(counts, seconds, 1))
        determination = 1 - np.square(seconds - line(counts)).sum() / np.square(seconds - seconds.mean()).sum()
        (points,) = axes.plot(counts, seconds, "o", label=f"{name}, R² = {determination:.4f}")
        axes.plot(counts, line(counts), color=points.get_color(), alpha=0.4)
    axes.set(xlabel="environments", ylabel="processor seconds per rollout", xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe whose environment and sizes are taken")
    parser.add_argument("--standard", action="store_true", help="no options for the environment: LeRobot's picture")
    parser.add_argument("--num_envs", type=int, help="environments; default: the recipe's")
    parser.add_argument("--chunks", type=int, help="chunks per environment; default: the recipe's rollout_chunks")
    parser.add_argument("--cores", type=int, default=available_cores(), help="workers of each stage")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the network; simulators use the cores, too")
    parser.add_argument("--attention", choices=("eager", "sdpa"), help="attn_implementation; default: as in a run")
    parser.add_argument("--torch_compile", action="store_true", help="compile the action expert's pass")
    parser.add_argument("--inference_ms", type=float, default=0.0, help="sleep in each pass of the denoising loop")
    parser.add_argument("--scaling", type=int, nargs="+", default=[], metavar="N", help="numbers of environments")
    parser.add_argument("--plot", type=Path, default=PLOT, help="where the plot of --scaling goes")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_rollout.json"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    config = yaml.safe_load(arguments.config.read_text())
    options = {} if arguments.standard else config["env_options"]
    chunks = arguments.chunks or config["rollout_chunks"]
    with tempfile.TemporaryDirectory() as folder:
        execution = {"attn_implementation": arguments.attention, "torch_compile": arguments.torch_compile}
        setting = Setting(config, options, chunks, arguments.inference_ms, Path(folder), **execution)
        counts = arguments.scaling or [arguments.num_envs or config["num_envs"]]
        rows = [compare(setting, count, arguments.cores, arguments.repetitions) for count in counts]
    report = {
        "env": config["env"],
        "env_options": options,
        "chunks": chunks,
        "cores": arguments.cores,
        "threads": arguments.threads,
        "inference_ms": arguments.inference_ms,
        **execution,
        "repetitions": arguments.repetitions,
        "rollouts": rows,
    }
    if arguments.scaling:
        plot(rows, arguments.plot)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
