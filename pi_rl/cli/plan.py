"""`pi-rl plan`: what a run will need, before it runs."""

import argparse
import json
from collections.abc import Sequence

from pi_rl.cli.parser import CommandParser, parse_mapping, positive, user_errors
from pi_rl.recipe_configs import algorithm_of, find_config

DEVICE_GB, HOST_GB, DISK_GB = 80.0, 128.0, 0.0
_DESCRIPTION = """\
Predicts memory of each device, host memory, disk, FLOPs and seconds of a run, without weights and without a GPU: the
run's own model code is executed at its real size on tensors that have no content, and what it would allocate and
compute is counted. Options of the run (see `pi-rl train --help`) are accepted too and override the
file. Seconds come from assumed rates, which are printed. Takes up to a minute."""
_EXAMPLES = (
    "pi-rl plan --config libero/pi0_long_flow_sde --bf16 --device_memory_gb 24 --num_envs 16",
    "pi-rl plan --config libero/pi05_long_flow_sde --bf16 --num_gpus 8 --json",
    "pi-rl plan --config libero/pi0_long_flow_sde --num_gpus 64 --assume network_gb_s=20",
)


def _parser() -> CommandParser:
    parser = CommandParser("plan", _DESCRIPTION, _EXAMPLES)
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--config",
        required=True,
        metavar="FILE|NAME",
        help="recipe: YAML file, or name (`pi-rl train --list`)",
    )
    run.add_argument(
        "--algorithm",
        choices=("ppo", "grpo"),
        help="default: grpo if the file sets group_size, else ppo",
    )
    run.add_argument("--model_type", choices=("pi0", "pi05"), help="where the checkpoint is not at hand")
    run.add_argument(
        "--horizon",
        type=positive,
        metavar="H",
        help="actions it predicts (default: pi0 50, pi05 10)",
    )
    run.add_argument(
        "--language_tokens", type=positive, metavar="N", help="tokens of the longest prompt (default: estimated)"
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument("--num_gpus", type=positive, default=1, help="processes, one per GPU (default: 1)")
    machine.add_argument(
        "--shard",
        action=argparse.BooleanOptionalAction,
        help="share weights, gradients and optimiser (FSDP; default: with train_vlm on several GPUs)",
    )
    machine.add_argument("--cpu", action="store_true", help="a run without GPU")
    for name, default, what in (
        ("device", DEVICE_GB, "memory of each GPU"),
        ("host", HOST_GB, "host memory for each process"),
        ("disk", DISK_GB, "disk for each process's prefixes"),
    ):
        machine.add_argument(
            f"--{name}_memory_gb" if name != "disk" else "--disk_gb",
            type=_size,
            default=default,
            metavar="GB",
            help=f"{what} (default: {default:g})",
        )
    out = parser.add_argument_group("results")
    out.add_argument("--assume", nargs="+", default=[], metavar="K=V", help="replace assumed rates and overheads")
    out.add_argument("--json", action="store_true", help="print JSON (bytes, FLOPs, seconds) instead of tables")
    return parser


def run(argv: Sequence[str]) -> int:
    """Prints the plan of a run.

    Args:
        argv: Arguments after `pi-rl plan`.

    Returns:
        0, also for a plan that does not fit: its first line says so.
    """
    values, rest = _parser().split(argv)
    assumed = parse_mapping(values.assume, "--assume")
    with user_errors():
        config = find_config(values.config)
    # heavy; after everything that can be refused at once
    from pi_rl.planning.assumptions import Assumptions
    from pi_rl.planning.memory import GB, Machine
    from pi_rl.planning.plan import Question, make_plan
    from pi_rl.planning.report import plan_text

    with user_errors():
        machine = Machine(
            device_memory=(values.host_memory_gb if values.cpu else values.device_memory_gb) * GB,
            host_memory=values.host_memory_gb * GB,
            disk=values.disk_gb * GB,
            processes=values.num_gpus,
            sharded=values.shard,
            gpu=not values.cpu,
        )
        question = Question(
            algorithm=values.algorithm or algorithm_of(config),
            machine=machine,
            assumptions=Assumptions().changed(assumed),
            model_type=values.model_type,
            horizon=values.horizon,
            language_tokens=values.language_tokens,
        )
        plan = make_plan(["--config", str(config), *rest], question)
    print(json.dumps(plan.as_dict(), indent=2) if values.json else plan_text(plan))
    return 0


def _size(text: str) -> float:
    """A number of gigabytes above 0, or 0."""
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of gigabytes")
    return size
