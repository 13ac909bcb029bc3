"""`pi-rl sft`: supervised fine-tuning from a recipe's YAML file."""

from collections.abc import Sequence
from functools import partial

from pi_rl.arguments import Program
from pi_rl.cli.parser import UserError, user_errors
from pi_rl.cli.train import config_words, recipe_parser
from pi_rl.recipe_configs import config_names, find_config
from pi_rl.sft_recipe import CONFIG_NAME, sft_main, work_folder

_DESCRIPTION = """\
Supervised fine-tuning of π0 or π0.5 on demonstrations with lerobot-train: what reinforcement learning starts from.
A signal (SIGTERM, SIGUSR1, Ctrl-C) saves the step that the run is in. The same command, or --resume, goes on with a
run that was stopped or killed. Several processes share the batch:
  accelerate launch --num_processes 8 -m pi_rl sft --config pi05_libero_40"""
PROGRAM = Program(
    "pi-rl sft",
    options=(
        ("--config NAME", "one of the recipes that come with pi_rl, such as pi05_libero_40"),
        ("--list", "print their names"),
        ("--resume DIR", "go on with the unfinished run whose --output_dir is DIR, with its own settings"),
    ),
    examples=(
        "pi-rl sft --config pi05_libero_40 --dry_run",
        "pi-rl sft --config pi05_libero_40 --batch_size 16 --output_dir outputs/sft/mine",
        "pi-rl sft --model my/policy --dataset local/demos --dataset_root demos --steps 2000",
        "pi-rl sft --resume outputs/sft/mine",
    ),
    find_config=partial(find_config, sft=True),
)


def run(argv: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit code.

    Raises:
        UserError: Something that the user can put right.
    """
    values, rest = recipe_parser("sft").split(argv)
    if values.list:
        print("\n".join(config_names(sft=True)))
        return 0
    if not argv:
        raise UserError("Give --config FILE|NAME or --resume DIR; `pi-rl sft --list` prints the recipes' names.")
    with user_errors():
        words = config_words(values.config, values.resume, values.resume and work_folder(values.resume) / CONFIG_NAME)
    sft_main(_DESCRIPTION, None, [*words, *rest], program=PROGRAM)
    return 0
