"""How fast simulators are here: by themselves, with pictures, and through pi_rl's workers; and the memory they take.

    python scripts/benchmark_envs.py                              # MetaWorld, LIBERO and ManiSkill, about six minutes
    python scripts/benchmark_envs.py --env metaworld:reach-v3 --options '{"fast_rendering": true}' --workers 1 2

Every row compares a process that does nothing but step one simulator, and draw where the policy gets a picture (at the
end of each chunk), with `make_env` and one worker that does the same, in turns; then come more workers with an
environment each. Rates are medians of the repetitions, in simulator steps per second over all environments. Without
pictures (the option blind) shows physics alone. Milliseconds are processor time per step, which other programs of the
machine change less than rates. Prints a table, and writes environments.json and environments.md.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

ENVIRONMENTS: dict[str, list[dict[str, Any]]] = {
    "metaworld:pick-place-v3": [{"fast_rendering": True}, {}],
    "libero:spatial-0": [{"fast_rendering": True}, {}],
    "maniskill:PickCube-v1": [{}],
    "maniskill:PutCarrotOnPlateInScene-v1": [{}],
    "maniskill:PutOnPlateInScene25Main-v3": [{}],
}
"""Environment name to the options it is measured with; each of them without pictures too."""
LIMIT = 10_000  # steps of an episode: none ends within a measurement
EXTRA = 2  # environments added to a worker to learn what one more costs


class Seconds(NamedTuple):
    """How long a measurement took, by the clock and in processor time."""

    wall: float
    cpu: float


def random_actions(spec_bounds: Mapping[str, Sequence[float]], chunks: int, chunk: int, envs: int) -> np.ndarray:
    """The same actions for everyone: float32 (chunks, envs, chunk, A), a tenth of the bounds."""
    generator = np.random.default_rng(0)
    low, high = np.array(spec_bounds["low"]), np.array(spec_bounds["high"])
    one = generator.uniform(low, high, (chunks, 1, chunk, len(low))) / 10
    return np.repeat(one, envs, 1).astype(np.float32)


def bare_main() -> None:
    """The process without pi_rl's workers: steps a simulator directly, says how long it took, and again."""
    import importlib

    from pi_rl.envs.worker import BACKENDS

    config = json.loads(sys.stdin.readline())
    module, _, name = BACKENDS[config["simulator"]].partition(":")
    backend = getattr(importlib.import_module(module), name)(config["tasks"], config["options"])
    sim = backend.make(0)
    images = {camera: np.empty((*size, 3), np.uint8) for camera, size in config["cameras"].items()}
    for line in sys.stdin:
        actions = random_actions(config, int(line), config["chunk"], 1)[:, 0]
        sim.reset(0)
        sim.draw(images)
        started, cpu = time.perf_counter(), time.process_time()
        for part in actions:
            for action in part:
                sim.step(action)
            sim.draw(images)
        print("seconds", time.perf_counter() - started, time.process_time() - cpu, flush=True)
    sim.close()
    backend.close()


class Bare:
    """That process as the benchmark sees it."""

    def __init__(self, config: dict[str, Any]):
        from pi_rl.envs.renderer import child_environment, choose_renderer

        command = [sys.executable, "-P", __file__, "--bare"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(choose_renderer()),
            text=True,
        )
        self.send(json.dumps(config))

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def __call__(self, chunks: int) -> Seconds:
        """One measurement of so many chunks."""
        self.send(str(chunks))
        assert self.process.stdout is not None
        for line in self.process.stdout:  # simulators print things of their own
            if line.startswith("seconds "):
                return Seconds(*map(float, line.split()[1:]))
        raise RuntimeError(f"the process that steps the simulator ended with exit code {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def through_workers(env: Any, actions: np.ndarray) -> Seconds:
    """One measurement through `VectorEnv`; the processor time is that of this process and of the workers."""
    env.reset(np.zeros((env.num_envs, 2), np.int64))
    started, cpu = time.perf_counter(), cpu_seconds(env)
    for part in actions:
        result = env.step_chunk(part)
    seconds = Seconds(time.perf_counter() - started, cpu_seconds(env) - cpu)
    if result.failed.any() or result.steps.min() < actions.shape[2]:
        raise RuntimeError(f"an episode of {env.spec.name} ended within the measurement; lower --seconds")
    return seconds


def cpu_seconds(env: Any) -> float:
    """Processor seconds that this process and the workers have used so far."""
    return time.process_time() + sum(report["cpu_seconds"] for report in env.worker_reports())


def in_turns(measures: Mapping[str, Callable[[], Seconds]], repetitions: int) -> dict[str, list[Seconds]]:
    """Takes measurements one after the other, again and again; the first round does not count."""
    taken: dict[str, list[Seconds]] = {name: [] for name in measures}
    for repetition in range(repetitions + 1):
        for name, measure in measures.items():
            seconds = measure()
            if repetition:
                taken[name].append(seconds)
    return taken


def memory_mb(env: Any) -> float:
    """Resident memory of the workers, in MB."""
    return sum(psutil.Process(pid).memory_info().rss for pid in env.worker_pids) / 1e6


def measure(name: str, options: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    from pi_rl.envs.registry import SIMULATORS, check_name_and_options, make_env, parse_name

    given = {**options, "max_episode_steps": LIMIT}
    spec = check_name_and_options(name, given)
    simulator, tasks = parse_name(name)
    bounds = {"low": spec.action_low, "high": spec.action_high}
    config = {"simulator": simulator, "tasks": tasks, "options": vars(SIMULATORS[simulator].options(**given))}
    bare = Bare({**config, **bounds, "cameras": spec.cameras, "chunk": arguments.chunk})
    bare(1)  # the first pictures take longer
    chunks = max(2, min(LIMIT // arguments.chunk, round(2 * arguments.seconds / bare(2).cpu)))
    steps = arguments.chunk * chunks
    row: dict[str, Any] = {"env": name, "options": options, "cameras": spec.cameras, "steps": steps, "workers": {}}
    try:
        for workers in arguments.workers:
            with make_env(name, workers, workers, **given) as env:
                actions = random_actions(bounds, chunks, arguments.chunk, workers)
                measures = {"workers": functools.partial(through_workers, env, actions)}
                if workers == 1:
                    measures["bare"] = functools.partial(bare, chunks)
                taken = in_turns(measures, arguments.repetitions)
                row["workers"][workers] = workers * steps / statistics.median(one.wall for one in taken["workers"])
                if workers == 1:
                    row["bare"] = steps / statistics.median(one.wall for one in taken["bare"])
                    row["bare_cpu_ms"] = 1000 * statistics.median(one.cpu for one in taken["bare"]) / steps
                    for key, kind in (("overhead", "wall"), ("cpu_overhead", "cpu")):
                        ours, alone = (np.array([getattr(one, kind) for one in taken[who]]) for who in measures)
                        row[key] = float(np.median(ours / alone)) - 1
                    row["memory_mb"] = memory_mb(env)
        row["more_memory_mb"] = memory_of_more(name, given, row.get("memory_mb"))
    finally:
        bare.close()
    return row


def memory_of_more(name: str, options: dict[str, Any], one: float | None) -> float | None:
    """MB that one more environment of the same task takes in a worker."""
    from pi_rl.envs.registry import make_env

    if one is None:
        return None
    with make_env(name, 1 + EXTRA, 1, **options) as env:
        env.reset(np.zeros((1 + EXTRA, 2), np.int64))
        env.step_chunk(np.zeros((1 + EXTRA, 1, env.spec.action_dim), np.float32))
        return (memory_mb(env) - one) / EXTRA


def table(rows: Sequence[Mapping[str, Any]], workers: Sequence[int]) -> str:
    """The rows as markdown."""
    heads = [f"{count} worker{'s' * (count > 1)}" for count in workers]
    titles = [
        "environment",
        "pictures",
        "simulator alone: ms",
        "steps/s",
        *heads,
        "our layer: time",
        "processor time",
        "MB, first",
        "MB, each more",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        options = dict(row["options"])
        sizes = " + ".join(f"{height} x {width}" for height, width in row["cameras"].values())
        pictures = (
            "none"
            if options.pop("blind", False)
            else ", ".join([sizes, *(key for key in options if key != "image_size")])
        )
        alone, first, more = (row.get(key) for key in ("bare", "memory_mb", "more_memory_mb"))
        cells = [
            row["env"],
            pictures,
            "" if alone is None else f"{row['bare_cpu_ms']:.2f}",
            "" if alone is None else f"{alone:.0f}" if alone >= 100 else f"{alone:.1f}",
            *(f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" for rate in row["workers"].values()),
            *(f"{row[key]:+.1%}" if key in row else "" for key in ("overhead", "cpu_overhead")),
            "" if first is None else f"{first:.0f}",
            "" if more is None else f"{max(more, 0):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=list(ENVIRONMENTS), metavar="NAME", help="environments to measure")
    parser.add_argument("--options", type=json.loads, help="their options, in place of those of the list here")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4], metavar="N")
    parser.add_argument("--chunk", type=int, default=5, help="actions per chunk")
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long one measurement takes")
    parser.add_argument("--repetitions", type=int, default=7, help="measurements, of which the median counts")
    parser.add_argument("--output", type=Path, default=Path("outputs/environments"))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.env:
        chosen = ENVIRONMENTS.get(name, [{}]) if arguments.options is None else [arguments.options]
        for options in [{"blind": True}, *chosen]:
            rows.append(measure(name, options, arguments))
            text = table(rows, arguments.workers)
            print(text.splitlines()[-1] if len(rows) > 1 else text, flush=True)
            (arguments.output / "environments.json").write_text(json.dumps(rows, indent=1) + "\n")
            (arguments.output / "environments.md").write_text(text + "\n")


if __name__ == "__main__":
    bare_main() if sys.argv[1:] == ["--bare"] else main()
