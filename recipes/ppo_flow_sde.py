"""PPO with Flow-SDE: one denoising step per sample is stochastic, the others follow the ODE (πRL, section 4.2).

Without arguments this is the quick start of ``ppo_flow_noise.py`` with Flow-SDE as exploration noise.
"""

from pathlib import Path

from pi_rl import recipe_main


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    config = Path(__file__).parent / "configs/metaworld/quickstart.yaml"
    recipe_main(__doc__ or "", config, "flow_sde", argv, output_dir="outputs/quickstart_flow_sde")


if __name__ == "__main__":
    main()
