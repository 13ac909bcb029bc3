"""The program that several processes run in test_sharding.py: ``distributed_runs.py CASES POLICIES OUT [EARLIER]``.

Every process writes what it found into OUT; EARLIER is the folder of another layout's runs, whose checkpoints this
one goes on with.
"""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from pi_rl import FlowPPOConfig, FlowPPOTrainer, make_env
from pi_rl.policies.lora import vlm_lora_config
from pi_rl.trainer.sharding import is_sharded, whole_state

torch.set_num_threads(1)
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
NOISE = {"noise": "flow_noise", "noise_std_min": 0.4, "noise_std_max": 1.0}
# one minibatch of all 16 samples: its gradient does not depend on how processes share and shuffle them
CASES = {
    "frozen": ("pi0", {**NOISE, "critic": "vlm"}),
    "lora": ("pi05", {"noise": "flow_sde", "lora": True}),
    "full": ("pi05", {"noise": "flow_sde", "train_vlm": True, "gradient_checkpointing": True}),
    "half": ("pi0", NOISE),
    "uneven": ("pi0", {**NOISE, "critic": "expert", "bf16": True, "num_envs": 8, "eval_episodes": 3}),
}


class FirstHalf(FlowPPOTrainer):
    """Learns from the first half of the environments alone, all of which belong to the first process."""

    def estimate(self, rollout):
        estimates = super().estimate(rollout)
        half = torch.as_tensor(self.collector.env_index < self.args.num_envs // 2)
        estimates.used = rollout.valid & half
        return estimates


class FirstGradient(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradient = parameter.grad
                    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                    self.gradients[name.removeprefix("module.")] = whole.detach().clone()


def build(case, policies, out, **changes):
    kind, options = CASES[case]
    options = {"num_envs": 4, "eval_episodes": 2, **options, **changes}
    lora = options.pop("lora", False)
    uneven = case == "uneven"
    batch = {"per_device_train_batch_size": 2} if uneven else {"per_device_train_batch_size": 4}
    args = FlowPPOConfig(
        output_dir=str(out),
        use_cpu=True,
        num_iterations=2,
        rollout_chunks=4,
        update_epochs=2,
        global_batch_size=4 if uneven else 16,
        critic_hidden_sizes=[16],
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        save_every_iterations=1,
        disable_tqdm=True,
        **batch,
        **options,
    )
    env = make_env(
        "metaworld:handle-press-v3",
        args.num_envs // WORLD,
        1,
        image_size=32,
        max_episode_steps=10 + 5 * RANK if uneven else 15,
        fast_rendering=True,
        hide_arm=True,
    )
    trainer_class = FirstHalf if case == "half" else FlowPPOTrainer
    trainer = trainer_class(Path(policies) / kind, args, env, peft_config=vlm_lora_config(4) if lora else None)
    return env, trainer


def write(trainer, name, out):
    state = whole_state(trainer.actor_critic, keep=True)
    save_file({key: value.contiguous().clone() for key, value in state.items()}, f"{out}/{name}-{RANK}.safetensors")


def train(case, policies, out, earlier):
    env, trainer = build(case, policies, out / case)
    first, calls = FirstGradient(), []
    trainer.add_callback(first)
    trainer.actor_critic.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    with env:
        trainer.save_model(str(out / case / "untrained"))
        trainer.evaluate()
        trainer.train()
        trainer.save_model(str(out / case / "trained"))
        write(trainer, case, out)
        save_file({key: value.contiguous() for key, value in first.gradients.items()}, f"{out}/{case}-{RANK}.grad")
    parts = {str(value.dtype) for value in trainer.actor_critic.state_dict().values() if isinstance(value, DTensor)}
    record = {
        "sharded": is_sharded(trainer.actor_critic),
        "dtypes": sorted(parts),
        "local": sum(getattr(p, "_local_tensor", p).numel() for p in trainer.actor_critic.parameters()),
        "whole": sum(p.numel() for p in trainer.actor_critic.parameters()),
        "calls": calls,
        "evaluated": trainer.last_evaluation.length.tolist(),
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    Path(f"{out}/{case}-{RANK}.json").write_text(json.dumps(record))
    if case in ("half", "uneven"):
        return
    step = trainer.args.updates_per_iteration
    for name, folder in (("resumed", out), ("continued", earlier)):
        if folder is not None:
            env, trainer = build(case, policies, out / f"{case}-{name}")
            with env:
                trainer.evaluate()  # gathers weights that resuming then replaces
                trainer.train(resume_from_checkpoint=str(folder / case / f"checkpoint-{step}"))
                write(trainer, f"{case}-{name}", out)


def separate(policies, out):
    """Every process in a folder of its own, as on computers without a common disk."""
    own = out / f"computer{RANK}"
    own.mkdir(parents=True)
    os.chdir(own)
    env, trainer = build("frozen", policies, "run", load_best_model_at_end=True, eval_every_iterations=1)
    with env:
        trainer.train()
        write(trainer, "uninterrupted", out)
    for again in (f"run/checkpoint-{trainer.args.updates_per_iteration}", True):
        env, trainer = build("frozen", policies, "again", load_best_model_at_end=True, eval_every_iterations=1)
        if again is True:
            trainer.args.output_dir = "run"
        with env:
            trainer.train(resume_from_checkpoint=again)
            write(trainer, f"resumed-{'last' if again is True else 'first'}", out)


if __name__ == "__main__":
    cases, policies, out, *earlier = sys.argv[1:]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for case in cases.split(","):
        if case == "separate":
            separate(Path(policies), out)
        else:
            train(case, Path(policies), out, Path(earlier[0]) if earlier else None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
