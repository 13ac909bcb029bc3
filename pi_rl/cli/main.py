"""Entry point of `pi-rl`: finds the subcommand, and turns errors into messages and exit codes."""

import difflib
import importlib
import sys
import traceback
from collections.abc import Sequence

from pi_rl.__about__ import __version__
from pi_rl.cli.parser import UserError

COMMANDS = {
    "demo": ("pi_rl.cli.demo", "from nothing to a policy that improves, in minutes: the quick start at a reduced size"),
    "train": ("pi_rl.cli.train", "reinforcement learning, from a recipe's YAML file"),
    "sft": ("pi_rl.cli.sft", "few-shot supervised fine-tuning, from a recipe's YAML file"),
    "eval": ("pi_rl.cli.eval", "success of a policy on fixed initial states: table, JSON, videos; resumable"),
    "report": ("pi_rl.cli.report", "a run as one HTML page: curves, success per task, videos, settings, times"),
    "push": ("pi_rl.cli.push", "a policy with its card, curve and videos to the Hugging Face Hub"),
    "convert": ("pi_rl.cli.convert", "checkpoints of openpi and RLinf to LeRobot's layout and back; LoRA adapters"),
    "plan": ("pi_rl.cli.plan", "memory, FLOPs and seconds of a run, before it runs; needs neither weights nor GPU"),
    "assets": ("pi_rl.cli.assets", "what the simulators need beside their packages, and how to get it"),
    "env": ("pi_rl.cli.env", "versions, devices, renderer and disk: what a report of a problem needs"),
}
"""Name to module and summary. A module has `run(argv) -> int`; it is imported when its command is called."""

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 2 something the user can put right (one message, no traceback), 1 a failure of ours or
        of a simulator (with traceback), 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return OK
    if words[0] == "--version":
        print(f"pi_rl {__version__}")
        return OK
    name, *rest = words
    try:
        if name not in COMMANDS:
            raise UserError(_unknown(name))
        return importlib.import_module(COMMANDS[name][0]).run(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:  # argparse, after --help
        return OK if end.code is None else int(end.code)
    except BrokenPipeError:
        return FAILED  # whoever read our output has gone
    except Exception:
        traceback.print_exc()
        print(f"error: pi-rl {name} failed; the last line above says why.", file=sys.stderr)
        return FAILED


def _help() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        "usage: pi-rl COMMAND [options]\n\n"
        "Online RL for flow-matching vision-language-action models (π0, π0.5).\n\n"
        f"commands:\n{listed}\n\n"
        "`pi-rl COMMAND --help` prints a command's options, `pi-rl --version` the version.\n"
        "Exit codes: 0 done, 2 something to put right (the message says what), 1 a failure, 130 interrupted."
    )


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.4) or list(COMMANDS)
    return f"pi-rl has no command {name!r}; nearest: {', '.join(near)}. `pi-rl --help` lists them."
