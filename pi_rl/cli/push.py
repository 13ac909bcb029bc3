"""`pi-rl push`: a policy with its card, curve and videos to the Hugging Face Hub."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pi_rl.cli.parser import CommandParser, UserError, user_errors

if TYPE_CHECKING:
    from pi_rl.hub.push import PushOutcome
    from pi_rl.hub.push_contents import Contents

_DESCRIPTION = """Uploads a policy to the Hugging Face Hub: weights, processors, tokenizer, critic and noise network,
card, results, learning curve and videos, as one commit. Pickles, data sets and paths of this machine stay here.
DIR is the output folder of a run, one of its checkpoint-N folders, or any policy folder.

The token is that of `hf auth login`, or HF_TOKEN. A push that failed is completed by the same command: what the Hub
has already is not sent again. Files of an earlier push that are no part of this one are removed from the repository
in the same commit; your own files there stay. A policy without a card gets one in its folder."""
_EXAMPLES = (
    "pi-rl push outputs/run --repo user/name --dry_run    lists what would be uploaded",
    "pi-rl push outputs/run --repo user/name",
    "pi-rl push outputs/run/checkpoint-40 --repo user/name --revision step-40 --private",
    "pi-rl push outputs/run/checkpoint-40 --repo user/name --whole last-checkpoint",
)


def _parser() -> CommandParser:
    parser = CommandParser("push", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder of a run, of a checkpoint or of a policy")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="repository; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create it private; refuse an existing public one")
    parser.add_argument("--revision", help="branch; created if it does not exist (default: main)")
    parser.add_argument(
        "--whole",
        metavar="NAME",
        help="of a checkpoint-N folder: upload all of it too, with optimiser and generators, to resume from, as "
        "subfolder NAME (last-checkpoint or checkpoint-N)",
    )
    parser.add_argument("--message", default="Upload policy", help="message of the commit (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="list what would be uploaded, and what not, then stop")
    parser.add_argument("--json", action="store_true", help="print the outcome, or the list, as JSON")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit code: 0 uploaded, 2 the Hub refused, 1 it failed.

    Raises:
        UserError: Something that the user can put right before anything is sent.
    """
    args = _parser().parse(argv)
    folder = args.dir.expanduser()
    if not args.message.strip():
        raise UserError("--message is empty; give the commit's message, or leave the option out.")
    from pi_rl.hub.push import check_repo_id, push_folder
    from pi_rl.hub.push_contents import contents_to_push

    with user_errors():
        check_repo_id(args.repo)
        if args.dry_run:
            _print_list(contents_to_push(folder, args.repo, args.whole), args)
            return 0
        outcome = push_folder(
            folder,
            args.repo,
            message=args.message,
            private=args.private or None,
            revision=args.revision,
            whole=args.whole,
        )
    return _print_outcome(outcome, args)


def _print_list(contents: "Contents", args: argparse.Namespace) -> None:
    from pi_rl.hub.push import size_of, size_text
    from pi_rl.hub.push_contents import CARD_NAME

    sizes = {name: size_of(source) for name, source in contents.files.items()}
    if args.json:
        told = {"repo_id": args.repo, "files": sizes, "left_out": contents.left_out, "size": contents.bytes}
        print(json.dumps(told, indent=2))
        return
    width = max(map(len, [*sizes, *contents.left_out]))
    print(f"{args.repo} would get {len(sizes)} files, {size_text(contents.bytes)}:")
    print("\n".join(f"  {name:<{width}}  {size_text(size):>9}" for name, size in sizes.items()))
    if CARD_NAME not in sizes:
        print(f"  {CARD_NAME:<{width}}  written before the upload")
    if contents.left_out:
        print("Left here:")
        print("\n".join(f"  {name:<{width}}  {why}" for name, why in contents.left_out.items()))


def _print_outcome(outcome: "PushOutcome", args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps(asdict(outcome), indent=2))
    elif outcome.error is None:
        print(outcome.describe())
    if outcome.error is None:
        return 0
    print(f"error: {outcome.describe()}", file=sys.stderr)
    return 2 if outcome.refused else 1
