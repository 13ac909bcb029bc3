"""`pi-rl train`: reinforcement learning from a recipe's YAML file, and going on with a run that was killed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pi_rl.arguments import Program
from pi_rl.cli.parser import CommandParser, UserError, user_errors
from pi_rl.pipeline import CONFIG_NAME, recipe_main
from pi_rl.recipe_configs import NOISE, algorithm_of, config_names, find_config

_DESCRIPTION = """\
Reinforcement learning of a flow-matching policy. Without --model a small policy is demonstrated and fine-tuned first.
The same command, or --resume, goes on with a run that was killed. Several processes:
  accelerate launch --num_processes 8 -m pi_rl train --config libero/pi05_long_flow_sde"""
PROGRAM = Program(
    "pi-rl train",
    options=(
        ("--config NAME", "one of the recipes that come with pi_rl, such as libero/pi0_long_flow_sde"),
        ("--list", "print their names"),
        ("--algorithm ppo|grpo", "default: grpo if the file sets group_size, else ppo"),
        ("--resume DIR", "go on with the run in this folder, with its own settings"),
    ),
    examples=(
        "pi-rl train --config quickstart",
        "pi-rl train --config quickstart --noise flow_sde --seed 1 --output_dir outputs/sde1",
        "pi-rl train --config libero/pi05_long_flow_sde --dry_run",
        "pi-rl train --resume outputs/sde1",
    ),
    find_config=find_config,
)


def recipe_parser(command: str) -> CommandParser:
    """Options of a subcommand that runs a recipe, beside the recipe's own.

    Args:
        command: "train" or "sft".
    """
    parser = CommandParser(command, add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--list", action="store_true")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit code.

    Raises:
        UserError: Something that the user can put right.
    """
    parser = recipe_parser("train")
    parser.add_argument("--algorithm", choices=tuple(NOISE))
    values, rest = parser.split(argv)
    if values.list:
        print("\n".join(config_names()))
        return 0
    if not argv:
        raise UserError("Give --config FILE|NAME or --resume DIR; `pi-rl train --list` prints the recipes' names.")
    with user_errors():
        words = config_words(values.config, values.resume, values.resume and values.resume / CONFIG_NAME)
        config = find_config(words[1]) if words else None
        algorithm = values.algorithm or ("ppo" if config is None else algorithm_of(config))
    chosen = f" --algorithm {algorithm}" if values.algorithm else ""
    recipe_main(
        _DESCRIPTION,
        None,
        NOISE[algorithm],
        [*words, *rest],
        output_dir=f"outputs/{'run' if config is None else config.stem}",
        algorithm=algorithm,
        program=replace(PROGRAM, name=f"{PROGRAM.name}{chosen}"),
    )
    return 0


def config_words(config: str | None, resume: Path | None, written: Path | None) -> list[str]:
    """The words that name a run's settings, ``--config FILE …``, or none.

    Args:
        config: What ``--config`` names.
        resume: Folder of the run to go on with.
        written: The settings that this run has written.

    Raises:
        UserError: Both were named, or there is no run to go on with.
    """
    if resume is None:
        return [] if config is None else ["--config", config]
    if config is not None:
        raise UserError("--resume takes the settings of its run; leave --config out.")
    if written is None or not written.is_file():
        raise UserError(f"--resume {resume}: there is no run to go on with ({written} is missing).")
    return ["--config", str(written), "--output_dir", str(resume)]
