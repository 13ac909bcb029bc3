"""Supervised fine-tuning of π0 or π0.5 on demonstrations with lerobot-train: what reinforcement learning starts from.

Without arguments this is the paper's π0.5 on LIBERO with 40 trajectories. Several processes share the batch:
``accelerate launch --config_file recipes/accelerate/ddp_8gpu.yaml recipes/sft.py --config …``.
"""

from pathlib import Path

from pi_rl.sft_recipe import sft_main


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    sft_main(__doc__ or "", Path(__file__).parent / "configs/sft/pi05_libero_40.yaml", argv)


if __name__ == "__main__":
    main()
