"""What ``scripts/ablation.py`` compares: settings, figures, the paper's numbers and its claims. Data, no work.

A *setting* is the quick start with Flow-SDE except for the options it names. A *figure* is a list of settings, the
panels in which the paper shows them, and the paper's statements about them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pi_rl.argument_values import ConfigLoader

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes/configs/metaworld/quickstart.yaml"

GROUP_SIZE = 8
MINIBATCHES = 4
ROLLOUT_STEPS = 80
MATCHED_LEVEL = 0.29

_SHARED = ("denoising_steps", "noise_level", "update_epochs", "learning_rate")
_CRITIC = ("critic_learning_rate",)


@dataclass(frozen=True)
class Size:
    """How much is simulated; part of a run's identity.

    Attributes:
        iterations: RL iterations of a run.
        num_envs: Environments of a rollout.
        eval_every: Iterations between the evaluations of a curve.
        curve_episodes: Fixed initial states of those evaluations.
        final_episodes: Fixed initial states of the first and the last evaluation; begins with the curve's.
        demos: Demonstrations; None takes the quick start's number.
        sft_steps: SFT steps; None takes the quick start's number.
    """

    iterations: int = 10
    num_envs: int = 64
    eval_every: int = 2
    curve_episodes: int = 64
    final_episodes: int = 200
    demos: int | None = None
    sft_steps: int | None = None


FULL = Size()
SMOKE = Size(iterations=1, num_envs=8, eval_every=1, curve_episodes=4, final_episodes=8, demos=4, sft_steps=4)


@dataclass(frozen=True)
class Setting:
    """One column or curve: what differs from the base.

    Attributes:
        options: Options of the configuration that differ.
        chunk_size: H of the policy that RL starts from; each has its own SFT checkpoint.
        algorithm: "ppo" or "grpo".
    """

    options: dict[str, Any] = field(default_factory=dict)
    chunk_size: int = 5
    algorithm: str = "ppo"


BASE = "base"
SETTINGS: dict[str, Setting] = {
    BASE: Setting(),
    "noise-0.2": Setting({"noise_level": 0.2}),
    "noise-0.5": Setting({"noise_level": 0.5}),
    "noise-0.8": Setting({"noise_level": 0.8}),
    "steps-1": Setting({"denoising_steps": 1}),
    "steps-1-matched": Setting({"denoising_steps": 1, "noise_level": MATCHED_LEVEL}),
    "steps-2": Setting({"denoising_steps": 2}),
    "steps-8": Setting({"denoising_steps": 8}),
    "chunk-5": Setting({"n_action_steps": 5}, chunk_size=20),
    "chunk-10": Setting({"n_action_steps": 10}, chunk_size=20),
    "chunk-20": Setting({"n_action_steps": 20}, chunk_size=20),
    "grpo": Setting(algorithm="grpo"),
    "critic-expert": Setting({"critic": "expert"}),
    "critic-expert-linear": Setting({"critic": "expert", "critic_hidden_sizes": []}),
    "noise-learned": Setting({"noise": "flow_noise", "entropy_coefficient": 0.0}),
    "mdp-one-layer": Setting({"mdp": "one_layer"}),
    "mdp-two-layer": Setting({"mdp": "two_layer"}),
    "lr-cosine": Setting({"lr_scheduler_type": "cosine"}),
}


def quickstart() -> dict[str, Any]:
    """The quick start's recipe as a mapping."""
    return yaml.load(QUICKSTART.read_text(encoding="utf-8"), Loader=ConfigLoader)  # a SafeLoader


def resolve(setting: Setting, size: Size, recipe: dict[str, Any]) -> dict[str, Any]:
    """All options of a setting's configuration, without seed and folders.

    A rollout covers the same environment steps whatever the executed chunk, and an epoch has the same number of
    optimiser steps whatever the number of samples.

    Args:
        setting: What differs from the base.
        size: How much is simulated.
        recipe: The quick start's options.

    Returns:
        Keyword arguments of ``FlowPPOConfig`` or ``FlowGRPOConfig``.
    """
    options = {name: recipe[name] for name in _SHARED}
    options |= {"noise": "flow_sde", "mdp": "hybrid", "lr_scheduler_type": "constant", "n_action_steps": 5}
    num_envs, steps = size.num_envs, ROLLOUT_STEPS
    if setting.algorithm == "ppo":
        options |= {name: recipe[name] for name in _CRITIC}
        options |= {"critic": "vlm", "critic_hidden_sizes": [128, 128, 128]}
    else:
        # one whole episode per environment; as many environments as give the base's number of samples
        steps = recipe["env_options"]["max_episode_steps"]
        num_envs = max(1, round(num_envs * ROLLOUT_STEPS / steps / GROUP_SIZE)) * GROUP_SIZE
        options["group_size"] = GROUP_SIZE
    options |= setting.options
    if options["noise"] == "flow_noise":
        options |= {name: recipe[name] for name in ("noise_std_min", "noise_std_max")}
    chunks = -(-steps // options["n_action_steps"])
    transitions = options["denoising_steps"] if options["mdp"] == "two_layer" else 1
    return options | {
        "num_envs": num_envs,
        "rollout_chunks": chunks,
        "per_device_train_batch_size": num_envs * chunks * transitions // MINIBATCHES,
        "num_iterations": size.iterations,
        "eval_every_iterations": size.eval_every,
        "eval_episodes": size.curve_episodes,
    }


# ---- figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A statement of the paper that a run can contradict.

    Attributes:
        text: The statement.
        paper: What the paper shows for it.
        quantity: Name in ``ablation_report.QUANTITIES``.
        more: Setting with the larger value, as the paper has it.
        less: Setting with the smaller value; None compares the quantity itself with 0.
        kind: "greater" (difference above 0), "at least" (above ``-margin``), "similar" (within ``margin``), "faster"
            (ratio above 1) or "as fast" (ratio within 1 + ``margin`` and its inverse).
        margin: What still counts as similar.
    """

    text: str
    paper: str
    quantity: str
    more: str
    less: str | None = None
    kind: str = "greater"
    margin: float = 0.1


@dataclass(frozen=True)
class Figure:
    """A figure or table of the paper.

    Attributes:
        title: Its subject.
        settings: Setting to label, in the order of the legend.
        panels: (column of the curves, title) of each panel; empty for a table.
        claims: The paper's statements about it.
        shown: Quantities in the figure's own table.
    """

    title: str
    settings: dict[str, str]
    panels: tuple[tuple[str, str], ...] = ()
    claims: tuple[Claim, ...] = ()
    shown: tuple[str, ...] = ("sft_train", "rl_train", "rl_eval")


NOISE = {"noise-0.2": "a = 0.2", "noise-0.5": "a = 0.5", "noise-0.8": "a = 0.8", BASE: "a = 1.0"}
STEPS = {"steps-1": "K = 1", "steps-2": "K = 2", BASE: "K = 4", "steps-8": "K = 8"}
STEPS_CONTROL = {**STEPS, "steps-1-matched": f"K = 1, a = {MATCHED_LEVEL}"}
CHUNKS = {"chunk-5": "C = 5", "chunk-10": "C = 10", "chunk-20": "C = 20"}
TRAIN, EVAL = ("train_success", "Train"), ("eval_success", "Eval")
EV, VALUE_LOSS = ("explained_variance", "Explained Variance"), ("value_loss", "Value Loss")
KL, CLIP, UPDATE = (
    ("approx_kl", "KL Divergence"),
    ("clip_fraction", "Clipped Fraction"),
    ("update_seconds", "Update Time"),
)

_TABLE_CLAIMS = (
    Claim("SFT, exploring: noise costs success", "46.6 at a=0.8, 62.3 at 0.2", "sft_train", "noise-0.2", "noise-0.8"),
    Claim("RL: a=0.5 ends above a=0.2", "94.5, 73.1", "rl_eval", "noise-0.5", "noise-0.2"),
    Claim("RL: a=0.8 ends above a=0.2", "98.1, 73.1", "rl_eval", "noise-0.8", "noise-0.2"),
    Claim("SFT, exploring: collapse at K=1", "9.4, 56.1 at K=4", "sft_train", BASE, "steps-1"),
    Claim("SFT, exploring: K=8 above K=2", "62.6, 28.3", "sft_train", "steps-8", "steps-2"),
    Claim("SFT, deterministic: K does not matter", "63.2 to 65.2", "sft_eval", BASE, "steps-1", "similar"),
    Claim("RL: K=2 ends above K=8", "97.0, 86.7", "rl_eval", "steps-2", "steps-8"),
    Claim("RL: K=4 ends above K=1", "94.5, 88.5", "rl_eval", BASE, "steps-1"),
    Claim("SFT, deterministic: chunks of 20 above 5", "72.6, 65.2", "sft_eval", "chunk-20", "chunk-5"),
    Claim("SFT, exploring: chunks of 20 above 5", "70.3, 56.0", "sft_train", "chunk-20", "chunk-5"),
    Claim("RL: chunks of 5 end above 20", "94.5, 89.2", "rl_eval", "chunk-5", "chunk-20"),
)  # fmt: skip

FIGURES: dict[str, Figure] = {
    "table6": Figure(
        "Hyper-parameters of Flow-SDE: noise level, denoising steps, action chunk",
        {**NOISE, **STEPS_CONTROL, **CHUNKS, BASE: "base"},
        claims=_TABLE_CLAIMS,
    ),
    "fig5": Figure(
        "PPO and GRPO with Flow-SDE",
        {BASE: "PPO", "grpo": "GRPO"},
        (TRAIN, EVAL),
        (
            Claim("PPO ends above GRPO", "Table 5, mean of four suites: 96.0, 90.0", "rl_eval", BASE, "grpo"),
            Claim("PPO learns faster (mean over the run's evaluations)", "Fig. 5", "eval_mean", BASE, "grpo"),
        ),
        ("rl_train", "rl_eval", "eval_mean", "env_steps"),
    ),
    "fig6": Figure(
        "Placement and depth of the critic",
        {BASE: "V_vlm, 4 layers", "critic-expert": "V_expert, 4 layers", "critic-expert-linear": "V_expert, 1 layer"},
        (EVAL, VALUE_LOSS, EV),
        (
            Claim("V_vlm and V_expert end alike", "Fig. 6a", "rl_eval", BASE, "critic-expert", "similar"),
            Claim("V_vlm explains more variance", "Fig. 6c", "explained_variance", BASE, "critic-expert"),
            Claim("V_vlm has the lower value loss", "Fig. 6b", "value_loss", "critic-expert", BASE),
            Claim("Four layers explain more than one", "Fig. 6c", "explained_variance", "critic-expert",
                  "critic-expert-linear"),
            Claim("Four layers end above one", "Fig. 6a", "rl_eval", "critic-expert", "critic-expert-linear"),
        ),
        ("rl_eval", "value_loss", "explained_variance_early", "explained_variance"),
    ),
    "fig7": Figure(
        "Fixed and learned noise in the same hybrid MDP, no entropy bonus",
        {BASE: "fixed noise", "noise-learned": "learned noise"},
        (TRAIN, EVAL),
        (
            Claim("Exploring, both start alike", "Fig. 7a, step 0", "sft_train", BASE, "noise-learned", "similar"),
            Claim("Both end alike", "Fig. 7b", "rl_eval", BASE, "noise-learned", "similar"),
        ),
        ("sft_train", "rl_train", "rl_eval", "noise_std"),
    ),
    "fig8": Figure(
        "Formulation of the MDP, the same noise level",
        {"mdp-one-layer": "one-layer", "mdp-two-layer": "two-layer", BASE: "hybrid two-layer"},
        (EVAL, UPDATE, EV),
        (
            Claim("One-layer and hybrid end alike", "Fig. 8a", "rl_eval", BASE, "mdp-one-layer", "similar"),
            Claim("Two-layer and hybrid end alike", "Fig. 8a", "rl_eval", BASE, "mdp-two-layer", "similar"),
            Claim("One-layer learns fastest (mean over the run's evaluations)", "Fig. 8a", "eval_mean",
                  "mdp-one-layer", BASE),
            Claim("Hybrid updates faster than two-layer", "twice as fast", "update_seconds", "mdp-two-layer", BASE,
                  "faster"),
            Claim("One-layer updates about as fast as two-layer", "Fig. 8b", "update_seconds", "mdp-one-layer",
                  "mdp-two-layer", "as fast", 0.25),
        ),
        ("sft_train", "rl_eval", "eval_mean", "update_seconds", "explained_variance"),
    ),
    "fig9": Figure(
        "Noise level of Flow-SDE",
        NOISE,
        (TRAIN, EVAL, CLIP),
        (
            Claim("a=0.2 is clipped more than a=0.5", "Fig. 9c", "clip_fraction", "noise-0.2", "noise-0.5"),
            Claim("a=0.5 is clipped more than a=0.8", "Fig. 9c", "clip_fraction", "noise-0.5", "noise-0.8"),
            Claim("Low noise means larger gradients", "5.3.5, in words", "grad_norm", "noise-0.2", "noise-0.8"),
        ),
        ("sft_train", "rl_train", "rl_eval", "clip_fraction", "grad_norm"),
    ),
    "fig10": Figure(
        "Denoising steps of Flow-SDE",
        STEPS_CONTROL,
        (TRAIN, EVAL),
        (
            Claim("Control of ours: K=1 explores better with less noise", "not in the paper", "sft_train",
                  "steps-1-matched", "steps-1"),
            Claim("Control of ours: K=1 with less noise ends lower", "not in the paper", "rl_eval", "steps-1",
                  "steps-1-matched"),
        ),
        ("sft_train", "rl_train", "rl_eval", "noise_std"),
    ),
    "fig11": Figure(
        "Executed action chunk",
        CHUNKS,
        (EVAL, EV),
        (
            Claim("Values of chunks of 5 are better explained than of 20", "Fig. 11b", "explained_variance", "chunk-5",
                  "chunk-20"),
            Claim("Values of chunks of 10 are better explained than of 20", "Fig. 11b", "explained_variance",
                  "chunk-10", "chunk-20"),
        ),
        ("sft_eval", "rl_eval", "explained_variance_early", "explained_variance"),
    ),
    "fig12": Figure(
        "Constant and cosine learning rate",
        {BASE: "constant", "lr-cosine": "cosine"},
        (EVAL, KL),
        (
            Claim("KL grows over the run at a constant rate", "Fig. 12b", "kl_rise", BASE),
            Claim("KL ends lower with the cosine schedule", "Fig. 12b", "kl_end", BASE, "lr-cosine"),
            Claim("Cosine ends at least as high", "Fig. 12a", "rl_eval", "lr-cosine", BASE, "at least"),
        ),
        ("rl_eval", "kl_end", "kl_rise"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PaperColumn:
    """Table 6 of the paper for one hyper-parameter, success in percent (π0, LIBERO-Spatial)."""

    title: str
    settings: dict[str, str]
    values: dict[str, dict[str, float]]


TABLE6 = (
    PaperColumn(
        "Noise level a",
        NOISE,
        {
            "sft_train": {"noise-0.2": 62.3, "noise-0.5": 56.0, "noise-0.8": 46.6},
            "sft_eval": {"noise-0.2": 65.2, "noise-0.5": 65.2, "noise-0.8": 65.2},
            "rl_train": {"noise-0.2": 59.5, "noise-0.5": 93.5, "noise-0.8": 95.3},
            "rl_eval": {"noise-0.2": 73.1, "noise-0.5": 94.5, "noise-0.8": 98.1},
        },
    ),
    PaperColumn(
        "Denoising steps K",
        STEPS_CONTROL,
        {
            "sft_train": {"steps-1": 9.4, "steps-2": 28.3, BASE: 56.1, "steps-8": 62.6},
            "sft_eval": {"steps-1": 63.8, "steps-2": 64.9, BASE: 65.2, "steps-8": 63.2},
            "rl_train": {"steps-1": 73.8, "steps-2": 90.8, BASE: 93.5, "steps-8": 84.3},
            "rl_eval": {"steps-1": 88.5, "steps-2": 97.0, BASE: 94.5, "steps-8": 86.7},
        },
    ),
    PaperColumn(
        "Executed action chunk C (policy that predicts 20)",
        CHUNKS,
        {
            "sft_train": {"chunk-5": 56.0, "chunk-10": 60.7, "chunk-20": 70.3},
            "sft_eval": {"chunk-5": 65.2, "chunk-10": 70.5, "chunk-20": 72.6},
            "rl_train": {"chunk-5": 93.5, "chunk-10": 93.3, "chunk-20": 87.5},
            "rl_eval": {"chunk-5": 94.5, "chunk-10": 95.5, "chunk-20": 89.2},
        },
    ),
)

# Table 5 of the paper, Flow-SDE π0 on LIBERO: Spatial, Object, Goal, Long, mean.
TABLE5 = {
    "SFT": (65.3, 64.4, 49.8, 51.2, 57.6),
    "GRPO": (97.8, 97.8, 83.2, 81.4, 90.0),
    "PPO": (98.4, 99.4, 96.2, 90.2, 96.0),
}
