"""`pi-rl convert`: policies between LeRobot's, openpi's and RLinf's folders, and LoRA adapters."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pi_rl.cli.parser import CommandParser, UserError, positive, user_errors

if TYPE_CHECKING:
    from pi_rl.conversion.report import Report

LEROBOT, OPENPI, ADAPTER, MERGED = "lerobot", "openpi", "adapter", "merged"
_DESCRIPTION = """\
Writes a checkpoint anew in another layout. Every tensor is accounted for: converted, tied to another one, or set
aside by name; one that has no place is an error, and nothing is written. One tensor is in memory at a time.

--to lerobot   from openpi's or RLinf's PyTorch weights (safetensors in one file or shards, or RLinf's full_weights.pt,
               read without running code from it) and norm_stats.json
--to openpi    from a LeRobot folder
--to adapter   from a run with LoRA: adapters and trained modules alone, which LeRobot loads onto the base policy
--to merged    from such an adapter-only folder: a whole policy"""
_EXAMPLES = (
    "pi-rl convert pi0_libero_pytorch runs/pi0_libero --to lerobot --like lerobot/pi0_libero_finetuned",
    "pi-rl convert RLinf/RLinf-Pi05-LIBERO-SFT runs/pi05 --to lerobot --camera observation.images.image \\",
    "    --camera observation.images.image2 --state_dim 8 --action_dim 7 --chunk_size 10 --no-state_in_prompt",
    "pi-rl convert outputs/run exported --to openpi --rlinf",
    "pi-rl convert outputs/run adapter --to adapter",
)
_NEW = (
    "camera",
    "state_dim",
    "action_dim",
    "chunk_size",
    "n_action_steps",
    "action_names",
    "tokenizer",
    "state_in_prompt",
)
_BELONGS = {
    **dict.fromkeys(("like", *_NEW), (LEROBOT,)),
    "norm_stats": (LEROBOT, OPENPI),
    "dtype": (LEROBOT, OPENPI, MERGED),
    "asset_id": (OPENPI,),
    "shard_gb": (OPENPI,),
    "rlinf": (OPENPI,),
    "base": (ADAPTER, MERGED),
}
"""Options and the directions that they belong to."""
_ASSET_ID = "physical-intelligence/libero"


def _parser() -> CommandParser:
    parser = CommandParser("convert", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("source", metavar="SRC", help="policy, checkpoint or run folder, weight file, or Hub id")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--to", required=True, choices=(LEROBOT, OPENPI, ADAPTER, MERGED), help="what to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of all weights (default: as stored)")
    parser.add_argument("--norm_stats", type=Path, metavar="FILE", help="norm_stats.json to use (default: SRC's)")
    parser.add_argument("--json", action="store_true", help="print what became of every tensor as JSON")
    like = parser.add_argument_group("--to lerobot: what the weights lack, from a policy of the same robot")
    like.add_argument(
        "--like",
        metavar="POLICY",
        help="LeRobot folder or Hub id: configuration, processors, tokenizer (default: SRC)",
    )
    new = parser.add_argument_group("--to lerobot: or from these, for π0 and π0.5 of the published size")
    new.add_argument("--camera", action="append", metavar="KEY", help="image feature, openpi's order; repeat it")
    new.add_argument("--state_dim", type=positive, metavar="N", help="numbers of the robot's state")
    new.add_argument("--action_dim", type=positive, metavar="N", help="numbers of an action")
    new.add_argument("--chunk_size", type=positive, metavar="H", help="predicted actions, openpi's action_horizon")
    new.add_argument("--n_action_steps", type=positive, metavar="C", help="executed actions (default: all of H)")
    new.add_argument(
        "--action_names",
        nargs="+",
        metavar="NAME",
        help="with relative actions (openpi's extra_delta_transform): their names; `gripper` stays absolute",
    )
    new.add_argument("--tokenizer", metavar="FOLDER|ID", help="default: google/paligemma-3b-pt-224")
    new.add_argument(
        "--state_in_prompt",
        action=argparse.BooleanOptionalAction,
        help="π0.5: write the state into the prompt (default: yes; no for openpi's pi05_libero and RLinf's π0.5)",
    )
    openpi = parser.add_argument_group("--to openpi")
    openpi.add_argument("--asset_id", metavar="NAME", help=f"folder of norm_stats.json (default: {_ASSET_ID})")
    openpi.add_argument("--shard_gb", type=_size, metavar="GB", help="largest weight file (default: one file)")
    openpi.add_argument(
        "--rlinf", action="store_true", default=None, help="RLinf's variant: its place of norm_stats.json, its heads"
    )
    lora = parser.add_argument_group("--to adapter, --to merged")
    lora.add_argument("--base", metavar="POLICY", help="folder or Hub id of the base (default: the recorded one)")
    return parser


def run(argv: Sequence[str]) -> int:
    """Converts a checkpoint and prints what became of its tensors.

    Args:
        argv: Arguments after `pi-rl convert`.

    Returns:
        0.

    Raises:
        UserError: Something that the user can put right; nothing has been written.
    """
    args = _parser().parse(argv)
    for option, directions in _BELONGS.items():
        if getattr(args, option) is not None and args.to not in directions:
            raise UserError(f"--{option} belongs to --to {' or '.join(directions)}; leave it out for --to {args.to}.")
    args.destination = args.destination.expanduser().absolute()
    if args.destination.exists():
        raise UserError(f"{args.destination} exists; give a folder that does not, or remove it.")
    if args.norm_stats is not None and not args.norm_stats.is_file():
        raise UserError(f"--norm_stats {args.norm_stats} is no file; give openpi's norm_stats.json.")
    with user_errors():
        report = _convert(args)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report.as_text())
    return 0


def _convert(args: argparse.Namespace) -> "Report":
    # heavy; after everything that can be refused at once
    from pi_rl.conversion.adapters import convert_to_adapter, convert_to_merged
    from pi_rl.conversion.to_openpi import convert_to_openpi

    source = _source(args)
    args.like, args.base = (name and _policy_of_run(name) for name in (args.like, args.base))
    if args.to == LEROBOT:
        return _to_lerobot(args, source)
    if args.to == ADAPTER:
        return convert_to_adapter(source, args.destination, base=args.base)
    if args.to == MERGED:
        return convert_to_merged(source, args.destination, base=args.base, dtype=args.dtype)
    return convert_to_openpi(
        source,
        args.destination,
        asset_id=args.asset_id or _ASSET_ID,
        rlinf=bool(args.rlinf),
        norm_stats=args.norm_stats,
        shard_gb=args.shard_gb,
        dtype=args.dtype,
    )


def _source(args: argparse.Namespace) -> Path:
    from pi_rl.cli.eval_plan import find_policy
    from pi_rl.policies.checkpoints import policy_folder

    path = Path(args.source).expanduser()
    if args.to == LEROBOT:  # openpi's and RLinf's folders hold no LeRobot policy
        return path.absolute() if path.is_file() else policy_folder(_policy_of_run(args.source))
    if path.is_file():
        raise UserError(f"{path} is a file; --to {args.to} needs a policy folder.")
    return policy_folder(find_policy(args.source, None))


def _policy_of_run(given: str) -> str:
    """The policy in a run's folder; anything else, such as a Hub id or openpi's folder, as it was given."""
    from pi_rl.cli.eval_plan import policy_within

    folder = Path(given).expanduser()
    return str(policy_within(folder) or given) if folder.is_dir() else given


def _to_lerobot(args: argparse.Namespace, source: Path) -> "Report":
    from pi_rl.conversion.new_template import NewPolicy, new_template
    from pi_rl.conversion.sources import kind_of, open_weights
    from pi_rl.conversion.to_lerobot import convert_to_lerobot, is_lerobot_folder, template_like

    new = {name: getattr(args, name) for name in _NEW if getattr(args, name) is not None}
    weights = open_weights(source)
    if args.like is not None and new:
        raise UserError(f"--like brings its own configuration; leave out {', '.join(f'--{name}' for name in new)}.")
    if args.like is not None:
        template = template_like(args.like)
    elif new:
        template = new_template(kind_of(weights), weights, NewPolicy.of(new))
    elif is_lerobot_folder(source):
        template = template_like(source)
    else:
        raise UserError(
            f"{source} has no LeRobot configuration. Give a policy of the same robot with --like, or say "
            f"--camera, --state_dim, --action_dim and --chunk_size."
        )
    return convert_to_lerobot(
        weights, source, args.destination, template, norm_stats=args.norm_stats, dtype=args.dtype
    )


def _size(text: str) -> float:
    """A number of gigabytes above 0."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of gigabytes above 0")
    return size
