"""PPO with Flow-Noise: a learned noise network makes every denoising step stochastic (πRL, section 4.1).

Without arguments this is the quick start: scripted demonstrations in MetaWorld, few-shot SFT of a small π0 with
lerobot-train, and PPO that improves it from camera pixels, on a CPU.
"""

from pathlib import Path

from pi_rl import recipe_main


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    config = Path(__file__).parent / "configs/metaworld/quickstart.yaml"
    recipe_main(__doc__ or "", config, "flow_noise", argv, output_dir="outputs/quickstart")


if __name__ == "__main__":
    main()
