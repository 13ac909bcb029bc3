"""`pi-rl eval`: success of a policy on fixed initial states."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pi_rl.__about__ import package_versions
from pi_rl.arguments import shown_words, without_folder
from pi_rl.cli.eval_plan import (
    choose_states,
    choose_tasks,
    describe_policy,
    find_policy,
    plan_episodes,
)
from pi_rl.cli.parser import CommandParser, UserError, not_negative, parse_mapping, positive, user_errors
from pi_rl.envs.registry import check_name_and_options, make_env, parse_name
from pi_rl.envs.vector_env import EnvSpec, VectorEnv
from pi_rl.envs.workers import available_cores
from pi_rl.progress import Progress, say

if TYPE_CHECKING:
    from pi_rl.policies.actor_critic import FlowActorCritic
    from pi_rl.rollout.episode_log import EpisodeLog
    from pi_rl.rollout.policy_io import PolicyIO

RESULTS_NAME, VIDEOS_NAME = "eval.json", "videos"
BATCH_SIZE = 8
FILM_SIZE = (256, 256)
_DESCRIPTION = """\
Runs one deterministic episode (the flow's ODE, no exploration noise) from each of a benchmark's fixed initial states,
and writes eval.json, episodes.jsonl and, if wanted, films. The same command continues an evaluation that was
interrupted. Results depend on the policy, the states, --seed, --batch_size and the machine's arithmetic, not on
--num_envs, --env_workers or interruptions."""
_EXAMPLES = (
    "pi-rl eval --policy outputs/quickstart --env metaworld:handle-press-v3 --episodes 100",
    "pi-rl eval --policy lerobot/pi05_libero_finetuned --env libero_spatial --device cuda --num_envs 16",
    "pi-rl eval --policy my/policy --env libero_spatial --tasks 0,3 --videos 2_success 2_failure",
    "pi-rl eval --policy my/policy --env metaworld_mt50 --env_options image_size=64 --json",
)


def _parser() -> CommandParser:
    parser = CommandParser("eval", _DESCRIPTION, _EXAMPLES)
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--policy", required=True, help="policy folder, folder of a training run or checkpoint, or Hub id"
    )
    what.add_argument("--revision", help="commit, branch or tag of a Hub id")
    what.add_argument("--env", required=True, help="environment, e.g. libero_spatial, metaworld:reach-v3,push-v3")
    what.add_argument(
        "--env_options", nargs="+", default=[], metavar="K=V", help="its options: key=value …, or '{key: value}'"
    )
    what.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="some of its tasks, by name or index (default: all)"
    )
    count = what.add_mutually_exclusive_group()
    count.add_argument(
        "--episodes",
        type=positive,
        metavar="N",
        help="episodes in total, shared by the tasks (default: every state where there are at most 1,000 in all, "
        "otherwise 10 per task)",
    )
    count.add_argument("--states", metavar="IDS", help="state ids of each task instead, e.g. 0-4,7")
    how = parser.add_argument_group("how the policy acts")
    how.add_argument(
        "--n_action_steps", type=positive, metavar="C", help="executed steps of a chunk (default: stored)"
    )
    how.add_argument("--denoising_steps", type=positive, metavar="K", help="ODE steps (default: stored)")
    how.add_argument("--seed", type=not_negative, default=0, help="seed of the flow's initial noise (default: 0)")
    how.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    how.add_argument(
        "--batch_size",
        type=positive,
        default=BATCH_SIZE,
        help=f"observations per pass of the network, padded to exactly so many (default: {BATCH_SIZE})",
    )
    run = parser.add_argument_group("how it is run")
    run.add_argument("--num_envs", type=positive, help="episodes at a time (default: 2 per core, at most 16)")
    run.add_argument("--env_workers", type=positive, help="simulator processes (default: one per core)")
    out = parser.add_argument_group("results")
    out.add_argument("--output_dir", type=Path, help="folder (default: outputs/eval/POLICY_ENV)")
    out.add_argument(
        "--videos", nargs="+", default=[], metavar="N_OUTCOME", help="film the first N, e.g. 2_success 3_failure"
    )
    out.add_argument("--json", action="store_true", help="print eval.json instead of the table")
    return parser


@dataclass
class _Evaluation:
    """What one call is to do, after all options were checked."""

    args: argparse.Namespace
    command: str
    env_options: dict[str, Any]
    spec: EnvSpec
    ids: np.ndarray
    which: str
    policy_folder: Path
    policy: dict[str, Any]
    device: str
    videos: dict[str, int]
    num_envs: int
    folder: Path
    versions: dict[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything the episodes depend on."""
        import torch

        args, stored = self.args, self.policy
        return {
            "policy_sha256": stored["sha256"],
            "env": args.env,
            "env_options": _without_folders(self.env_options),
            "tasks": [self.spec.tasks[task] for task in dict.fromkeys(self.ids[:, 0].tolist())],
            "states": _ranges(self.ids[:, 1].tolist()),
            "max_episode_steps": self.spec.max_episode_steps,
            "n_action_steps": args.n_action_steps or stored["n_action_steps"],
            "denoising_steps": args.denoising_steps or stored["denoising_steps"],
            "seed": args.seed,
            "batch_size": args.batch_size,
            "device": self.device.partition(":")[0],
            "threads": torch.get_num_threads() if self.device == "cpu" else None,
            "versions": self.versions,
        }

    def say(self, text: str) -> None:
        """A line for people; with `--json` it must not be among the output."""
        if self.args.json:
            print(text, file=sys.stderr, flush=True)
        else:
            say(text)


@dataclass
class _Session:
    """Policy and simulators, loaded when the first is needed: a finished evaluation is shown without."""

    evaluation: _Evaluation
    stack: ExitStack
    model: "FlowActorCritic | None" = None
    env: VectorEnv | None = None
    io: "PolicyIO | None" = None
    loaded: Any = None
    timing: dict[str, float] = field(default_factory=dict)

    def open(self) -> "tuple[FlowActorCritic, VectorEnv, PolicyIO]":
        """The policy on its device, the environments, and the processors between them.

        Raises:
            UserError: They do not fit together, or one cannot be loaded.
        """
        if self.model is None or self.env is None or self.io is None:
            with user_errors():
                self._load()
        assert self.model is not None
        assert self.env is not None
        assert self.io is not None
        return self.model, self.env, self.io

    def _load(self) -> None:
        import torch

        from pi_rl.flow.sampler import FlowSampler
        from pi_rl.policies.actor_critic import FlowActorCritic
        from pi_rl.policies.attention import default_attention
        from pi_rl.policies.checkpoints import check_compatibility, load_policy
        from pi_rl.policies.pi import PiFlowPolicy
        from pi_rl.policies.wrap import wrap_policy
        from pi_rl.rollout.policy_io import PolicyIO, fit_prompt

        plan, args = self.evaluation, self.evaluation.args
        self.loaded = load_policy(
            plan.policy_folder,
            device=plan.device,
            n_action_steps=args.n_action_steps,
            denoising_steps=args.denoising_steps,
        )
        policy = wrap_policy(self.loaded.policy)
        check_compatibility(policy, plan.spec)
        if policy.n_action_steps > plan.spec.max_episode_steps:
            raise ValueError(
                f"The policy executes {policy.n_action_steps} steps of a chunk, but episodes of {args.env} end after "
                f"{plan.spec.max_episode_steps}; give --n_action_steps {plan.spec.max_episode_steps} or fewer."
            )
        if isinstance(policy, PiFlowPolicy):
            policy.attention = default_attention(torch.device(plan.device))
            policy.park_language_heads()
        fit_prompt(policy, self.loaded.preprocessor, plan.spec)
        sampler = FlowSampler.ode(self.loaded.policy.config.num_inference_steps)
        self.model = FlowActorCritic(policy, None, None, sampler).eval()
        self.env = self.stack.enter_context(make_env(args.env, plan.num_envs, args.env_workers, **plan.env_options))
        self.io = PolicyIO(self.loaded.preprocessor, self.loaded.postprocessor, plan.spec, policy.n_action_steps)


def run(argv: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit code.

    Raises:
        UserError: Something that the user can put right.
        KeyboardInterrupt: It was interrupted; its text says how to go on.
    """
    from pi_rl.cli.eval_report import choose_videos, evaluation_table, film

    args = _parser().parse(argv)
    plan = _prepare(args, shlex.join(["pi-rl", "eval", *shown_words(argv)]))
    plan.say(f"{plan.spec.name}: {plan.which}, {len(plan.ids)} episodes; results in {plan.folder}")
    with user_errors():
        log = _open_log(plan)
    with log, ExitStack() as stack:
        session = _Session(plan, stack)
        try:
            _run_episodes(plan, session, log)
            report = _write_report(plan, log, session.timing)  # before filming, which may fail
            if not args.json:
                _print_table(evaluation_table(log.results().summary(), int(log.results().failed.sum())), report)
            filmed = choose_videos(log.rows, plan.videos)
            film(filmed, plan.folder / VIDEOS_NAME, plan.spec.fps, lambda episode: _record(plan, session, episode))
            if filmed:
                report = _write_report(plan, log, session.timing)
        except FileNotFoundError as error:  # a simulator's files, found missing by its worker
            raise UserError(str(error)) from error
        except KeyboardInterrupt:
            done = f"{len(log.episodes)} of {len(plan.ids)} episodes are in {plan.folder}"
            raise KeyboardInterrupt(f"{done}; the same command continues.") from None
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    return 0


def _prepare(args: argparse.Namespace, command: str) -> _Evaluation:
    """Checks everything that can be checked without a simulator; what is quick to check first."""
    options = parse_mapping(args.env_options, "--env_options")
    with user_errors():
        spec = check_name_and_options(args.env, options)
        tasks = choose_tasks(spec, args.tasks)
        states = None if args.states is None else choose_states(spec, args.states)
        from pi_rl.cli.eval_report import parse_videos

        videos = parse_videos(args.videos)
        if videos and not spec.cameras:
            raise ValueError(f"{spec.name} has no pictures; leave --videos out.")
        ids, which = plan_episodes(spec, tasks, args.episodes, states)
        device = _choose_device(args.device)
        policy_folder = find_policy(args.policy, args.revision)
        policy = describe_policy(policy_folder, args.policy)
    name = f"{policy['id']}_{args.env if len(args.env) <= 60 else parse_name(args.env)[0]}"
    return _Evaluation(
        args,
        command,
        options,
        spec,
        ids,
        which,
        policy_folder,
        policy,
        device,
        videos,
        args.num_envs or min(2 * available_cores(), 16, len(ids)),
        args.output_dir or Path("outputs/eval") / "".join(c if c.isalnum() or c in "._-" else "-" for c in name),
        package_versions(parse_name(args.env)[0]),
    )


def _without_folders(options: dict[str, Any]) -> dict[str, Any]:
    """Options as they may be shown: paths of this machine by their last part."""
    return {key: without_folder(value) if isinstance(value, str) else value for key, value in options.items()}


def _choose_device(given: str | None) -> str:
    import torch

    device = given or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device is available; use --device cpu.")
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # small models lose more than they gain by threads, and simulators want the cores
    return device


def _open_log(plan: _Evaluation) -> "EpisodeLog":
    from pi_rl.rollout.episode_log import EpisodeLog

    return EpisodeLog(plan.folder, plan.settings, plan.spec, plan.ids, plan.args.seed)


def _run_episodes(plan: _Evaluation, session: _Session, log: "EpisodeLog") -> None:
    """Runs what is missing and notes every episode as it ends."""
    remaining = log.remaining
    if len(remaining) == 0:
        plan.say("All episodes were run before; remove the folder to run them again.")
        return
    already = len(plan.ids) - len(remaining)
    if already:
        plan.say(f"Continuing: {already} episodes were run before.")
    model, env, io = session.open()
    from pi_rl.rollout.evaluator import evaluate_policy
    from pi_rl.rollout.zero_success import warn_about_zero_success

    show = Progress("evaluation", "episodes")
    started = time.perf_counter()
    results = evaluate_policy(
        model,
        env,
        io,
        remaining,
        seed=plan.args.seed,
        batch_size=plan.args.batch_size,
        progress=lambda done, _, text: show(already + done, len(plan.ids), text),
        on_episode=log.add,
    )
    seconds = time.perf_counter() - started
    steps = int(results.length.sum())
    session.timing = {"episodes": len(remaining), "seconds": round(seconds, 2), "env_steps": steps}
    session.timing["env_steps_per_second"] = round(steps / seconds, 2)
    warn_about_zero_success(log.results(), session.loaded, model.policy)


def _record(plan: _Evaluation, session: _Session, episode: Any) -> tuple[np.ndarray, bool]:
    from pi_rl.rollout.evaluator import record_episode

    plan.say(f"Filming {episode['task']}, state {episode['state_id']}")
    reset_id = np.array([episode["task_index"], episode["state_id"]], np.int64)
    settings = {"seed": plan.args.seed, "batch_size": plan.args.batch_size, "size": FILM_SIZE}
    return record_episode(*session.open(), reset_id, **settings)


def _write_report(plan: _Evaluation, log: "EpisodeLog", timing: dict[str, float]) -> dict[str, Any]:
    """Writes and returns `eval.json`; its times are those of the last process that ran episodes."""
    from pi_rl.rollout.episode_log import write_json

    path = plan.folder / RESULTS_NAME
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    report = {
        "policy": plan.policy,
        "env": {
            "name": plan.spec.name,
            "options": _without_folders(plan.env_options),
            "max_episode_steps": plan.spec.max_episode_steps,
        },
        "settings": plan.settings,
        "summary": log.results().summary().to_dict(),
        "episodes": log.rows,
        "videos": sorted(f"{VIDEOS_NAME}/{path.name}" for path in (plan.folder / VIDEOS_NAME).glob("*.mp4")),
        "timing": timing or before.get("timing", {}),
        "command": plan.command,
    }
    write_json(path, report)
    return report


def _print_table(table: str, report: dict[str, Any]) -> None:
    timing = report["timing"]
    say(f"\n{table}")
    if timing:
        say(
            f"\n{timing['env_steps']:,} environment steps in {timing['seconds']:.0f} s, "
            f"{timing['env_steps_per_second']:.0f} per second"
        )


def _ranges(states: Sequence[int]) -> str:
    """State ids as text, runs of them as first-last."""
    found: list[list[int]] = []
    for state in sorted(set(states)):
        if found and found[-1][1] == state - 1:
            found[-1][1] = state
        else:
            found.append([state, state])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
