"""A small flow policy, trained from nothing with FlowPPOTrainer, beside published figures of PPO.

    python scripts/gymnasium_benchmark.py                            # 3 seeds of each environment, some minutes a seed
    python scripts/gymnasium_benchmark.py --envs Pendulum-v1 --seeds 5 --output outputs/pendulum

Prints a table, and writes results.json, results.md and curves.png to the output folder. A seed that is already in
results.json with the same settings is not run again. Returns are those of the deterministic (ODE) policy from fixed
initial states that training never sees.

Published PPO uses Gaussian policies, so this compares results, not algorithms: it shows that rollout, advantages,
likelihoods and update of this package reach what a tuned PPO reaches.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

STATISTICS_STEPS, STATISTICS_ENVS = 500, 8
STATISTICS_STATES = 2_000_000
"""State ids of the random episodes that states are normalised by; apart from evaluation's."""


@dataclass(frozen=True)
class Published:
    """A figure that somebody else has published, as printed there."""

    who: str
    result: str
    level: float
    what: str
    url: str


@dataclass(frozen=True)
class Benchmark:
    """An environment, how the flow policy is trained on it, and what PPO is known to reach."""

    options: dict[str, Any]
    published: tuple[Published, ...]


COMMON = {
    "noise": "flow_sde",
    "noise_level": 0.5,
    "denoising_steps": 4,
    "learning_rate": 3e-3,
    "critic_learning_rate": 3e-3,
    "critic_hidden_sizes": [64, 64],
    "lr_scheduler_type": "linear",
    "num_iterations": 30,
    "num_envs": 16,
    "rollout_chunks": 200,
    "per_device_train_batch_size": 200,
    "update_epochs": 10,
    "value_clip_range": None,
    "huber_delta": None,
    "normalize_rewards": True,
    "eval_episodes": 100,
    "eval_every_iterations": 3,
}
POLICY = {"chunk_size": 1, "n_action_steps": 1, "denoising_steps": 4, "hidden": (64, 64)}
BENCHMARKS = {
    "Pendulum-v1": Benchmark(
        options={"gamma": 0.9},
        published=(
            Published(
                "RL Baselines3 Zoo, trained agents",
                "−172.2 ± 104.2",
                -172.225,
                "v1, 100k steps, one run, 750 evaluation episodes",
                "https://github.com/DLR-RM/rl-baselines3-zoo/blob/master/benchmark.md",
            ),
            Published(
                "Stable-Baselines3, sb3/ppo-Pendulum-v1 on the Hub",
                "−230.4 ± 142.5",
                -230.42,
                "v1, one run",
                "https://huggingface.co/sb3/ppo-Pendulum-v1",
            ),
        ),
    ),
    "InvertedPendulum-v5": Benchmark(
        options={"gamma": 0.99},
        published=(
            Published(
                "Tianshou, MuJoCo benchmark",
                "1000.0 ± 0.0",
                1000.0,
                "v2, best within 1M steps, 10 seeds",
                "https://github.com/thu-ml/tianshou/blob/master/examples/mujoco/README.md",
            ),
            Published(
                "PPO paper, as read from its curves by Tianshou",
                "~1000",
                1000.0,
                "1M steps",
                "https://arxiv.org/abs/1707.06347",
            ),
            Published(
                "CleanRL, ppo_continuous_action",
                "963.1 ± 22.2",
                963.09,
                "v4, average return of training episodes",
                "https://docs.cleanrl.dev/rl-algorithms/ppo/",
            ),
            Published(
                "OpenAI Baselines, as read from its curves by Tianshou",
                "~940",
                940.0,
                "1M steps",
                "https://github.com/openai/baselines/blob/master/benchmarks_mujoco1M.htm",
            ),
        ),
    ),
}
PUBLISHED = {env_id: [asdict(figure) for figure in known.published] for env_id, known in BENCHMARKS.items()}


def state_statistics(name: str) -> dict[str, Any]:
    """Mean and standard deviation of states under random actions, to normalise the policy's input."""
    import torch

    from pi_rl import make_env

    generator = np.random.default_rng(0)
    with make_env(name, STATISTICS_ENVS) as env:
        ids = np.stack([np.zeros(STATISTICS_ENVS, np.int64), STATISTICS_STATES + np.arange(STATISTICS_ENVS)], 1)
        states = [env.reset(ids)["observation.state"]]
        for _ in range(STATISTICS_STEPS):
            actions = generator.uniform(env.spec.action_low, env.spec.action_high, (STATISTICS_ENVS, 1, 1))
            result = env.step_chunk(actions.astype(np.float32))
            states.append(result.observation["observation.state"])
            done = np.flatnonzero(result.done)
            ids[:, 1] += STATISTICS_ENVS
            if len(done):
                env.reset(ids[done], done)
    seen = torch.from_numpy(np.concatenate(states))
    return {"observation.state": {"mean": seen.mean(0), "std": seen.std(0)}}


def train(env_id: str, seed: int, benchmark: Benchmark, folder: Path) -> dict[str, Any]:
    """Trains one seed; returns its final returns and its learning curve."""
    import torch

    from pi_rl import FlowPPOConfig, FlowPPOTrainer
    from pi_rl.envs.registry import check_name_and_options
    from pi_rl.policies.mlp.create import action_bounds, create_mlp_policy

    torch.set_num_threads(1)
    name = f"gymnasium:{env_id}"
    spec = check_name_and_options(name, {})
    policy = create_mlp_policy(
        state_dim=spec.state_dim,
        action_dim=spec.action_dim,
        dataset_stats={**state_statistics(name), **action_bounds(spec.action_low, spec.action_high)},
        output_dir=folder / "policy",
        seed=seed,
        **POLICY,
    )
    args = FlowPPOConfig(
        output_dir=str(folder / "run"),
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        **{**COMMON, **benchmark.options},
    )
    started = time.monotonic()
    trainer = FlowPPOTrainer(policy, args, name)
    try:
        trainer.train()
        minutes = (time.monotonic() - started) / 60
        returns = trainer.last_evaluation.returns  # after the last iteration
    finally:
        trainer.close()
    curve = [[log["env_steps"], log["eval_return"]] for log in trainer.state.log_history if "eval_return" in log]
    return {
        "mean": float(np.mean(returns)),
        "std": float(np.std(returns)),
        "episodes": len(returns),
        "env_steps": trainer.env_steps,
        "minutes": minutes,
        "curve": curve,
    }


def settings(benchmark: Benchmark) -> dict[str, Any]:
    """What decides a run, in JSON's types."""
    return json.loads(json.dumps({"policy": POLICY, **COMMON, **benchmark.options}))


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Our returns beside the published ones, as markdown."""
    lines = ["| environment | who | return | details |", "|---|---|---|---|"]
    for env_id, runs in results.items():
        means = [run["mean"] for run in runs]
        spread = f" ± {np.std(means):.1f}" if len(means) > 1 else ""
        seeds = ", ".join(f"{mean:.1f}" for mean in means)
        steps, minutes = (np.mean([run[key] for run in runs]) for key in ("env_steps", "minutes"))
        details = (
            f"{steps / 1000:.0f}k steps, {len(runs)} seed(s): {seeds}; {runs[0]['episodes']} evaluation episodes "
            f"each, std among them {np.mean([run['std'] for run in runs]):.1f}; {minutes:.1f} min per seed"
        )
        mean = f"**{np.mean(means):.1f}{spread}**"
        lines.append(f"| {env_id} | **this package**, flow policy, ODE | {mean} | {details} |")
        for figure in BENCHMARKS[env_id].published:
            lines.append(f"| | [{figure.who}]({figure.url}) | {figure.result} | {figure.what} |")
    return "\n".join(lines).replace("| -", "| −").replace("**-", "**−")


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Returns of the deterministic policy during training, with the published levels as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from pi_rl.hub.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION

    colours = (BLUE, ORANGE, GREEN, PURPLE, VERMILION)
    figure, row = plt.subplots(1, len(results), figsize=(5.2 * len(results), 3.8), squeeze=False, layout="constrained")
    for axes, (env_id, runs) in zip(row[0], results.items(), strict=True):
        for number, run in enumerate(runs):
            colour = colours[number % len(colours)]
            steps, returns = np.array(run["curve"]).T
            axes.plot(steps / 1000, returns, ".-", color=colour, label=f"seed {run['seed']}")
        for figure_ in BENCHMARKS[env_id].published:
            axes.axhline(figure_.level, color=GREY, linestyle=(0, (5, 3)), linewidth=1)
        axes.set_title(f"{env_id}: deterministic policy; dashed: published PPO", fontsize=10)
        axes.set_xlabel("thousand environment steps")
        axes.set_ylabel("return")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", nargs="+", default=list(BENCHMARKS), choices=list(BENCHMARKS), metavar="ID")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … of each environment")
    parser.add_argument("--output", type=Path, default=Path("outputs/gymnasium"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = arguments.output / "results.json"
    runs = json.loads(record.read_text())["runs"] if record.is_file() else []
    results: dict[str, list[dict[str, Any]]] = {}
    for env_id in arguments.envs:
        for seed in range(arguments.seeds):
            same = {"env": env_id, "seed": seed, "settings": settings(BENCHMARKS[env_id])}
            run = next((run for run in runs if same.items() <= run.items()), None)
            if run is None:
                run = same | train(env_id, seed, BENCHMARKS[env_id], arguments.output / env_id / f"seed{seed}")
                runs.append(run)
                record.write_text(json.dumps({"runs": runs, "published": PUBLISHED}, indent=1))
            results.setdefault(env_id, []).append(run)
    text = table(results)
    (arguments.output / "results.md").write_text(text + "\n", encoding="utf-8")
    plot(results, arguments.output / "curves.png")
    print(f"\n{text}\n\nWritten to {arguments.output}.")


if __name__ == "__main__":
    main()
