"""What a recipe needs beside the trainer's configuration."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pi_rl.arguments import option

if TYPE_CHECKING:
    from peft import LoraConfig

MODEL, ENVIRONMENT, DEMOS, SFT = "Policy", "Environment", "Demonstrations", "Supervised fine-tuning"
LORA = "LoRA on the VLM"


@dataclass
class RecipeArguments:
    """What a recipe needs beside the trainer's configuration; ``--help`` prints every field's text."""

    model: str | None = option(
        None,
        MODEL,
        "Hub id or folder of the policy RL starts from; default: a small one, demonstrated and fine-tuned here",
    )
    model_license: str = option("other", MODEL, "licence of that policy's weights, for the model card, e.g. gemma")
    small_model: str = option("pi0", MODEL, "class of the small policy: pi0 or pi05")
    small_model_sizes: dict[str, Any] = option({}, MODEL, "sizes of the small policy, e.g. {vlm_width: 64, depth: 2}")
    image_resolution: int = option(64, MODEL, "side of the small policy's image input in pixels")
    chunk_size: int = option(5, MODEL, "H, actions that the small policy predicts at once")

    env: str = option("metaworld:handle-press-v3", ENVIRONMENT, "environment, e.g. metaworld:task[,task…]")
    env_options: dict[str, Any] = option({}, ENVIRONMENT, "options of the environment, e.g. {image_size: 64}")
    blind: bool = option(False, ENVIRONMENT, "control run: the policy sees a constant image throughout")

    demos_per_task: int = option(40, DEMOS, "successful scripted episodes per task")
    demo_noise_std: float = option(0.5, DEMOS, "noise on the experts' actions, which lie in [-1, 1]")
    demo_noise_rho: float = option(0.8, DEMOS, "correlation of that noise from step to step")
    demo_noise_window: int = option(20, DEMOS, "noise is on or off in windows of so many steps; 0: always on")
    demo_max_speed: float = option(1.0, DEMOS, "largest component of the experts' own actions; below 1 they are slow")
    demo_max_steps: int = option(150, DEMOS, "steps after which an attempt is given up")
    demo_trailing_steps: int = option(0, DEMOS, "steps recorded after success, in which the expert holds still")

    sft_steps: int = option(800, SFT, "optimiser steps")
    sft_batch_size: int = option(64, SFT, "samples per step")
    sft_learning_rate: float = option(1e-3, SFT, "peak learning rate")

    lora_rank: int = option(0, LORA, "rank of LoRA on the VLM, e.g. 32; 0: the VLM stays frozen")
    lora_alpha: int = option(32, LORA, "scaling of LoRA")
    lora_target_modules: list[str] = option(
        [], LORA, "names of the VLM's layers to adapt; default: see docs/method.md"
    )

    video: bool = option(True, "Result", "film the same initial state before and after RL")

    def __post_init__(self) -> None:
        if self.small_model not in ("pi0", "pi05"):
            raise ValueError(f"small_model={self.small_model!r} is unknown; choose pi0 or pi05.")
        if "blind" in self.env_options:
            raise ValueError("env_options must not set blind; use the option of that name, --blind.")
        ranges = {
            "demo_noise_std": (self.demo_noise_std >= 0, "0 or more"),
            "demo_noise_rho": (0 <= self.demo_noise_rho < 1, "at least 0 and below 1"),
            "demo_noise_window": (self.demo_noise_window >= 0, "0 or more"),
            "demo_max_speed": (0 < self.demo_max_speed <= 1, "above 0 and at most 1"),
            "demo_max_steps": (self.demo_max_steps >= 1, "at least 1"),
            "demo_trailing_steps": (self.demo_trailing_steps >= 0, "0 or more"),
            "sft_learning_rate": (self.sft_learning_rate > 0, "above 0"),
            "lora_rank": (self.lora_rank >= 0, "0 or more"),
            "lora_alpha": (self.lora_alpha > 0, "above 0"),
        }
        for name, (fine, allowed) in ranges.items():
            if not fine:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: it must be {allowed}.")
        if self.lora_rank == 0 and (self.lora_target_modules or self.lora_alpha != 32):
            raise ValueError(
                "lora_alpha and lora_target_modules have no effect with lora_rank=0; give a rank, e.g. 32."
            )
        for name in ("demos_per_task", "sft_steps", "sft_batch_size", "chunk_size", "image_resolution"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: it must be at least 1.")

    def peft_config(self) -> "LoraConfig | None":
        """LoRA of the VLM as the options describe it, or None."""
        if self.lora_rank == 0:
            return None
        from pi_rl.policies.lora import vlm_lora_config

        return vlm_lora_config(self.lora_rank, self.lora_alpha, self.lora_target_modules or None)
