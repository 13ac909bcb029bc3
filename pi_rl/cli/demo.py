"""`pi-rl demo`: from nothing to a policy that improves, with settings that come with the package."""

from collections.abc import Sequence
from pathlib import Path

from pi_rl.arguments import Program
from pi_rl.cli.parser import CommandParser
from pi_rl.pipeline import recipe_main
from pi_rl.progress import say
from pi_rl.recipe_configs import CONFIGS, NOISE

OUTPUT_DIR = "outputs/demo"
RESULTS = {
    "before_after.mp4": "film, before and after",
    "learning_curve.png": "learning curve",
    "report.html": "report of the run",
    "results.json": "numbers",
    "policy": "policy and its model card",
}
"""Files of a finished run, and what they are."""
_DESCRIPTION = """\
A small π0 learns from camera pixels to press a handle in MetaWorld: scripted demonstrations, few-shot SFT, PPO. On two
CPU cores this takes a few minutes, with --full about ten; no GPU, no download. The same command goes on with a
demo that was interrupted."""
_EXAMPLES = (
    "pi-rl demo",
    "pi-rl demo --full --seed 1 --output_dir outputs/seed1",
    "pi-rl demo --noise flow_sde --no_video      any option of `pi-rl train`",
)


def run(argv: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit code.

    Raises:
        UserError: Something that the user can put right.
    """
    parser = CommandParser("demo", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("--full", action="store_true", help="the whole quick start instead of its reduced size")
    parser.add_argument("--output_dir", type=Path, default=Path(OUTPUT_DIR), help=f"folder (default: {OUTPUT_DIR})")
    values, rest = parser.split(argv)
    config = CONFIGS / "metaworld" / ("quickstart.yaml" if values.full else "demo.yaml")
    name, folder = f"pi-rl demo{' --full' if values.full else ''}", values.output_dir
    recipe_main(_DESCRIPTION, config, NOISE["ppo"], ["--output_dir", str(folder), *rest], program=Program(name))
    _say_where(folder)
    return 0


def _say_where(folder: Path) -> None:
    """Lists what there is to look at; nothing after a dry run, which deletes its folder."""
    found = [(what, folder / name) for name, what in RESULTS.items() if (folder / name).exists()]
    if not found:
        return
    width = max(len(what) for what, _ in found)
    say("\nTo look at:\n" + "\n".join(f"  {what:<{width}}  {path}" for what, path in found))
    say(f"\nNext: `pi-rl report {folder}` for all of it on one page, `pi-rl train --help` for runs of your own.")
