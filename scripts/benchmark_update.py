"""How much faster an update is when it reads stored prefixes than when it encodes observations again.

    python scripts/benchmark_update.py                 # every case and the scaling, about 10 minutes
    python scripts/benchmark_update.py --kind pi0 --horizon 10 --language trimmed --no_scaling

Models are LeRobot's classes at 1/8 of the width and 1/3 of the depth of π0 and π0.5, with the real numbers of tokens:
two pictures of 256 tokens, and 48 (π0) or 200 (π0.5) language slots, or only those that a prompt fills ("trimmed").
An update is what the trainer does with a micro-batch: fetch the inputs, score the chain, clipped surrogate and value
loss, backward, one AdamW step of action expert and heads. "cached" reads a PrefixStore, "recomputed" an
ObservationStore, and both run in turns on the same samples; times and ratios are medians of the repetitions, ratios
also in processor time, which other programs of the machine change less. The scaling measures cached updates over
samples and over scored steps K. Writes update.json and, with --plot, a picture.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GemmaConfig

from pi_rl.flow.chain import Chain
from pi_rl.flow.noise_network import NoiseNetwork
from pi_rl.flow.sampler import FlowSampler
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.policies.checkpoints import load_policy
from pi_rl.policies.critic import ValueHead
from pi_rl.policies.observation_store import ObservationStore
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.prefix_cache import PrefixStore
from pi_rl.policies.small.create import create_small_policy
from pi_rl.rl.losses import clipped_surrogate

CAMERAS = ("observation.images.image", "observation.images.image2")
STATE_DIM, ACTION_DIM = 32, 32  # padded, as published
# an eighth of the widths and a third of the depths of PaliGemma 3B and the 300M action expert
SIZES = {
    "vlm_width": 256, "expert_width": 128, "depth": 6, "head_dim": 32, "mlp_dim": 2048, "vision_width": 144,
    "vision_depth": 9, "vision_heads": 4, "vision_mlp": 538, "patch_size": 14,
}  # fmt: skip
EXPERT_MLP = 512
SLOTS = {"pi0": 48, "pi05": 200}
FILLED = {"pi0": 20, "pi05": 64}  # tokens of a LIBERO instruction; π0.5 adds eight numbers of the state
HIDDEN = (128, 64, 32)
TARGETS = {"hybrid": 20.0, "one_layer": 8.0}


def make_model(kind: str, horizon: int, method: str, steps: int, trimmed: bool, attention: str) -> FlowActorCritic:
    """Random weights; a critic on the VLM; the sampler of a method with K steps."""
    with tempfile.TemporaryDirectory() as folder:
        create_small_policy(
            kind, cameras=CAMERAS, state_dim=STATE_DIM, action_dim=ACTION_DIM, image_size=224, chunk_size=horizon,
            n_action_steps=horizon, denoising_steps=steps, instructions=["pick up the bowl"], output_dir=folder,
            seed=0, tokenizer_max_length=SLOTS[kind], **SIZES,
        )  # fmt: skip
        original = load_policy(folder, device="cpu").policy
    layers = original.model.paligemma_with_expert.gemma_expert.model.layers
    slim = GemmaConfig(hidden_size=SIZES["expert_width"], intermediate_size=EXPERT_MLP,
                       hidden_activation="gelu_pytorch_tanh")  # fmt: skip
    torch.manual_seed(0)
    for layer in layers:  # the small configurations give both networks one hidden width
        layer.mlp = type(layer.mlp)(slim)
    policy = PiFlowPolicy(original, language_tokens=FILLED[kind] if trimmed else None, attention=attention)
    policy.freeze_vlm()
    policy.park_language_heads()
    if method == "hybrid":
        sampler, network = FlowSampler("flow_sde", "hybrid", steps, 0.5), None
    else:
        sampler = FlowSampler("flow_noise", "one_layer", steps, None)
        network = NoiseNetwork(policy.feature_dim, policy.max_action_dim, 0.08, 0.16)
    return FlowActorCritic(policy, ValueHead(policy, HIDDEN), network, sampler)


def observations(kind: str, samples: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a preprocessor would give: two pictures of 224 pixels, a state, a prompt that fills some slots."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        camera: torch.randint(0, 256, (samples, 3, 224, 224), generator=generator).float() / 255.0
        for camera in CAMERAS
    }
    batch["observation.state"] = torch.rand(samples, STATE_DIM, generator=generator) * 2 - 1
    batch["observation.language.tokens"] = torch.randint(4, 260, (samples, SLOTS[kind]), generator=generator)
    filled = torch.arange(SLOTS[kind]) < FILLED[kind]
    batch["observation.language.attention_mask"] = filled.expand(samples, -1).clone()
    return batch


class Update:
    """Cached and recomputed updates of one model on the same samples.

    Args:
        model: Policy, critic and noise network.
        kind: "pi0" or "pi05".
        samples: Micro-batch.
        stored: Stored observations, of which every update takes others.
    """

    def __init__(self, model: FlowActorCritic, kind: str, samples: int, stored: int):
        self.model, self.samples = model, samples
        self.prefixes, self.observations = PrefixStore(capacity=stored), ObservationStore(stored)
        policy, sampler = model.policy, model.sampler
        noise = torch.Generator().manual_seed(1)
        chunk = (policy.chunk_size, policy.max_action_dim)
        self.acted = []
        with torch.no_grad():
            for start in range(0, stored, 4):
                count = min(4, stored - start)
                batch = observations(kind, count, seed=start)
                prefix = model("encode", batch=batch)
                self.prefixes.append(prefix)
                self.observations.append(batch)
                index = sampler.draw_step_index(torch.rand(count, generator=noise, dtype=torch.float64))
                self.acted.append(model(
                    "sample", prefix=prefix, x_init=torch.randn(count, *chunk, generator=noise),
                    eps=torch.randn(count, sampler.denoising_steps, *chunk, generator=noise), step_index=index,
                ))  # fmt: skip
        self.tokens = prefix.pad_mask.shape[1]
        self.x = torch.cat([sample.chain.x for sample in self.acted])
        self.log_prob = torch.cat([sample.log_prob for sample in self.acted])[:, 0]
        self.critic_input = torch.cat([sample.critic_input for sample in self.acted])
        indices = [sample.chain.step_index for sample in self.acted]
        self.step_index = None if indices[0] is None else torch.cat(indices)
        self.optimizer = torch.optim.AdamW(model.parameter_groups(1e-6, 1e-6, 0.01))
        self._order = torch.Generator().manual_seed(2)

    def rows(self) -> torch.Tensor:
        return torch.randperm(len(self.x), generator=self._order)[: self.samples]

    def step(self, store: PrefixStore | ObservationStore, rows: torch.Tensor) -> torch.Tensor:
        """One update; returns the log-probs it scored."""
        chain = Chain(self.x[rows], None if self.step_index is None else self.step_index[rows])
        score, values = self.model("score", inputs=store[rows], chain=chain, critic_input=self.critic_input[rows])
        loss, _ = clipped_surrogate(score.log_prob, self.log_prob[rows], torch.ones(len(rows)), 0.2, None)
        (loss + values.square().mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return score.log_prob.detach()


def measure(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(update: Update, repetitions: int) -> dict[str, float]:
    """Milliseconds per sample of cached and recomputed updates in turns, and how far their log-probs are apart."""
    times: dict[str, list[tuple[float, float]]] = {"cached": [], "recomputed": [], "gather": []}
    for repetition in range(repetitions + 1):  # the first is not counted
        rows = update.rows()
        taken = {
            "gather": measure(update.prefixes.__getitem__, rows),
            "cached": measure(update.step, update.prefixes, rows),
            "recomputed": measure(update.step, update.observations, rows),
        }
        if repetition:
            for name, value in taken.items():
                times[name].append(value)
    medians = {
        f"{name}_ms": 1e3 * statistics.median(wall for wall, _ in values) / len(rows) for name, values in times.items()
    }
    pairs = list(zip(times["recomputed"], times["cached"], strict=True))
    ratio, cpu_ratio = (statistics.median(slow[i] / fast[i] for slow, fast in pairs) for i in range(2))
    with torch.no_grad():
        chain = Chain(update.x[rows], None if update.step_index is None else update.step_index[rows])
        scored = [
            update.model("score", inputs=store[rows], chain=chain)[0].log_prob
            for store in (update.prefixes, update.observations)
        ]
    difference = float((scored[0] - scored[1]).abs().max())
    return {**medians, "ratio": ratio, "processor_ratio": cpu_ratio, "log_prob_difference": difference}


def measure_cases(options: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for kind in options.kind:
        for horizon in options.horizon:
            for language in options.language:
                for method in TARGETS:
                    model = make_model(kind, horizon, method, options.steps, language == "trimmed", options.attention)
                    update = Update(model, kind, options.samples, 2 * options.samples)
                    case = {"kind": kind, "horizon": horizon, "language": language, "method": method,
                            "steps": options.steps, "tokens": update.tokens, "samples": options.samples,
                            "target": TARGETS[method], **compare(update, options.repetitions)}  # fmt: skip
                    results.append(case)
                    print(
                        f"{kind:5s} H={horizon:<3d} {language:8s} {update.tokens:4d} tokens {method:9s} "
                        f"recomputed {case['recomputed_ms']:7.1f} ms/sample, cached {case['cached_ms']:6.1f} "
                        f"(gather {case['gather_ms']:.2f}): {case['ratio']:5.1f}x, in processor time "
                        f"{case['processor_ratio']:5.1f}x, target {case['target']:.0f}x",
                        flush=True,
                    )
    return results


def line(x: list[int], y: list[float]) -> dict[str, float]:
    """Least squares: y = slope x + intercept, and the share of the variance it explains."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(1 - residual.var() / np.var(y))}


def measure_scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a cached update over samples (hybrid) and over scored steps (one_layer), measured in turns."""
    counts, steps = options.scaling_samples, options.scaling_steps
    model = make_model("pi0", 10, "hybrid", options.steps, True, options.attention)
    updates = {("samples", count): Update(model, "pi0", count, max(counts)) for count in counts}
    for count in steps:
        model = make_model("pi0", 10, "one_layer", count, True, options.attention)
        updates["steps", count] = Update(model, "pi0", options.samples, 2 * options.samples)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in updates}
    for repetition in range(options.repetitions + 1):
        for key, update in updates.items():
            wall, _ = measure(update.step, update.prefixes, update.rows())
            if repetition:
                times[key].append(wall)
    scaling = {}
    for axis, values in (("samples", counts), ("steps", steps)):
        medians = [statistics.median(times[axis, value]) for value in values]
        scaling[axis] = {"x": values, "seconds": medians, **line(values, medians)}
        print(f"over {axis}: {', '.join(f'{v}: {s * 1e3:.1f} ms' for v, s in zip(values, medians, strict=True))}; "
              f"R² of a line {scaling[axis]['r2']:.4f}", flush=True)  # fmt: skip
    return scaling


def plot(scaling: dict[str, Any], path: Path, samples: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    titles = {"samples": "samples (one scored step)", "steps": f"scored steps K ({samples} samples)"}
    for axis, (name, fit) in zip(axes, scaling.items(), strict=True):
        x = np.asarray(fit["x"])
        axis.plot(x, 1e3 * (fit["slope"] * x + fit["intercept"]), color="0.7", label=f"line, R² = {fit['r2']:.4f}")
        axis.plot(x, 1e3 * np.asarray(fit["seconds"]), "o", label="median")
        axis.set(xlabel=titles[name], ylabel="ms per cached update", ylim=(0, None), xlim=(0, None))
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=sorted(SLOTS), default=["pi0", "pi05"])
    parser.add_argument("--horizon", nargs="+", type=int, default=[10, 50], help="H, predicted actions")
    parser.add_argument("--language", nargs="+", choices=("padded", "trimmed"), default=["padded", "trimmed"])
    parser.add_argument("--steps", type=int, default=4, help="K; hybrid scores one of them, one_layer all")
    parser.add_argument("--samples", type=int, default=8, help="samples of an update")
    parser.add_argument("--repetitions", type=int, default=5, help="measurements of each, after one that is dropped")
    parser.add_argument("--attention", choices=("eager", "sdpa"), default="eager", help="eager is the default on CPU")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--no_scaling", action="store_true", help="leave the scaling out")
    parser.add_argument("--scaling_samples", nargs="+", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--scaling_steps", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark_update"))
    parser.add_argument("--plot", type=Path, help="where to draw the scaling, for instance docs/images/…png")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                    "torch": torch.__version__, "threads": options.threads},
        "attention": options.attention,
        "cases": measure_cases(options),
    }  # fmt: skip
    if not options.no_scaling:
        results["scaling"] = measure_scaling(options)
        if options.plot:
            plot(results["scaling"], options.plot, options.samples)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "update.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(path)


if __name__ == "__main__":
    main()
