"""GRPO with Flow-SDE: no critic, episodes from one initial state are compared with each other (πRL, appendix A).

Without arguments this is the quick start of ``ppo_flow_noise.py`` with Flow-SDE and groups of eight episodes.
"""

from pathlib import Path

from pi_rl import recipe_main


def main(argv: list[str] | None = None) -> None:
    """Runs the recipe."""
    config = Path(__file__).parent / "configs/metaworld/quickstart_grpo.yaml"
    recipe_main(__doc__ or "", config, "flow_sde", argv, output_dir="outputs/quickstart_grpo", algorithm="grpo")


if __name__ == "__main__":
    main()
