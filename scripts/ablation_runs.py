"""Jobs of ``scripts/ablation.py``: what they are, where their results lie, and processes that do several at once.

Every job has a folder whose name ends in a hash of everything that decides its result. A folder with a result is never
computed again, so a script that was stopped goes on, and figures that share a run share its folder.
"""

import hashlib
import json
import os
import resource
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ablation_settings import SETTINGS, Setting, Size, quickstart, resolve

RESULT, LOG, DATASET_ID = "result.json", "log.txt", "local/demonstrations"
PRELOADED = ["pi_rl.trainer.flow_ppo_trainer", "pi_rl.trainer.flow_grpo_trainer"]
_DEMOS = {
    "demos_per_task": "episodes_per_task",
    "demo_noise_std": "noise_std",
    "demo_noise_rho": "noise_rho",
    "demo_noise_window": "noise_window",
    "demo_max_speed": "max_speed",
    "demo_max_steps": "max_steps",
}
_POLICY_OF_BASELINE = ("denoising_steps", "n_action_steps")
_FOLDERS = {"demonstrations": "demonstrations", "sft": "sft", "baseline": "baselines", "run": "runs"}
_SFT_SEED = 0


@dataclass(frozen=True)
class Job:
    """One piece of work with a result of its own.

    Attributes:
        kind: "demonstrations", "sft", "baseline" (the SFT policy, deterministic) or "run" (RL).
        name: Of the folder and in messages.
        seed: Of RL; SFT has one seed for all.
        spec: Everything else that decides the result, JSON-ready.
        inputs: Folders of earlier jobs' results, by purpose.
    """

    kind: str
    name: str
    seed: int
    spec: dict[str, Any]
    inputs: dict[str, str]

    def folder(self, output: Path) -> Path:
        """Where its result lies."""
        text = json.dumps([self.kind, self.seed, self.spec, sorted(self.inputs.items())], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return output / _FOLDERS[self.kind] / f"{self.name}-{digest}"

    def result(self, output: Path) -> dict[str, Any] | None:
        """The result, or None when there is none yet."""
        file = self.folder(output) / RESULT
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


@dataclass(frozen=True)
class Plan:
    """Jobs of some settings and seeds; every stage needs the ones before it.

    Attributes:
        demonstrations: One job.
        sft: One per chunk size.
        baselines: One per (chunk size, denoising steps, executed steps).
        runs: One per setting and seed.
    """

    demonstrations: Job
    sft: dict[int, Job]
    baselines: dict[str, Job]
    runs: dict[tuple[str, int], Job]

    def stages(self) -> list[tuple[str, list[Job]]]:
        """Titles and jobs, in their order."""
        learning = {job.folder(Path()): job for job in (*self.baselines.values(), *self.runs.values())}
        return [
            ("Demonstrations: scripted experts", [self.demonstrations]),
            ("Few-shot SFT: one checkpoint per predicted chunk", list(self.sft.values())),
            ("Baselines and RL", list(learning.values())),
        ]


def make_plan(names: Iterable[str], seeds: Iterable[int], size: Size) -> Plan:
    """The jobs that the given settings and seeds need."""
    recipe = quickstart()
    env = {"env": recipe["env"], "env_options": recipe["env_options"]}
    demos_spec = {name: recipe[name] for name in recipe if name.startswith("demo")} | env
    demos_spec["demos_per_task"] = size.demos or recipe["demos_per_task"]
    demonstrations = Job("demonstrations", "scripted", _SFT_SEED, demos_spec, {})
    seeds = list(seeds)
    plan = Plan(demonstrations, {}, {}, {})
    for name in dict.fromkeys(names):
        setting = SETTINGS[name]
        sft = plan.sft.setdefault(setting.chunk_size, _sft_job(setting.chunk_size, size, recipe, env, demonstrations))
        policy = {"policy": str(sft.folder(Path()))}
        plan.baselines[name] = _baseline_job(setting, size, recipe, env, policy)
        spec = {"algorithm": setting.algorithm, "options": resolve(setting, size, recipe), **env}
        spec["final_episodes"] = size.final_episodes
        for seed in seeds:
            plan.runs[name, seed] = Job("run", f"{name}-seed{seed}", seed, spec, policy)
    return plan


def _sft_job(chunk_size: int, size: Size, recipe: dict[str, Any], env: dict[str, Any], demonstrations: Job) -> Job:
    spec = {name: recipe[name] for name in ("small_model", "image_resolution", "sft_batch_size", "sft_learning_rate")}
    spec |= {"chunk_size": chunk_size, "sft_steps": size.sft_steps or recipe["sft_steps"], **env}
    return Job("sft", f"chunk{chunk_size}", _SFT_SEED, spec, {"demonstrations": str(demonstrations.folder(Path()))})


def _baseline_job(
    setting: Setting, size: Size, recipe: dict[str, Any], env: dict[str, Any], policy: dict[str, str]
) -> Job:
    options = resolve(Setting(chunk_size=setting.chunk_size), size, recipe)
    options |= {name: setting.options[name] for name in _POLICY_OF_BASELINE if name in setting.options}
    options["eval_episodes"] = size.final_episodes
    spec = {"algorithm": "ppo", "options": options, **env}
    name = f"H{setting.chunk_size}-K{options['denoising_steps']}-C{options['n_action_steps']}"
    return Job("baseline", name, _SFT_SEED, spec, policy)


# ---- the work itself, in a process of its own --------------------------------------------------------------------


def work(job: Job, output: Path, workers: int = 1) -> dict[str, Any]:
    """Does a job and writes its result.

    Args:
        job: What to do; its inputs must be there.
        output: Folder of all jobs.
        workers: Simulator processes.

    Returns:
        The result.
    """
    folder = job.folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    inputs = {purpose: output / place for purpose, place in job.inputs.items()}
    result = _WORK[job.kind](job, folder, inputs, workers)
    result |= {"kind": job.kind, "name": job.name, "seed": job.seed, "spec": job.spec}
    result["seconds"] = round(time.perf_counter() - started, 1)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    result["cpu_seconds"] = round(sum(one.ru_utime + one.ru_stime for one in usage), 1)
    partial = folder / f".{RESULT}"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / RESULT)
    return result


def _demonstrate(job: Job, folder: Path, inputs: Mapping[str, Path], workers: int) -> dict[str, Any]:
    from pi_rl import make_env
    from pi_rl.demonstrations import collect_demonstrations

    shutil.rmtree(folder / "dataset", ignore_errors=True)
    options = {name: job.spec[key] for key, name in _DEMOS.items() if key in job.spec}
    with make_env(job.spec["env"], workers, workers, **job.spec["env_options"]) as env:
        summary = collect_demonstrations(
            env, output_dir=folder / "dataset", repo_id=DATASET_ID, seed=job.seed, **options
        )
    return {"text": str(summary)}


def _fine_tune(job: Job, folder: Path, inputs: Mapping[str, Path], workers: int) -> dict[str, Any]:
    from pi_rl.envs.registry import check_name_and_options
    from pi_rl.policies.small.create import create_small_policy
    from pi_rl.trainer.sft import run_sft

    for part in ("init", "policy"):
        shutil.rmtree(folder / part, ignore_errors=True)
    spec = job.spec
    env = check_name_and_options(spec["env"], spec["env_options"])
    create_small_policy(
        spec["small_model"],
        cameras=env.cameras,
        state_dim=env.state_dim,
        action_dim=env.action_dim,
        image_size=spec["image_resolution"],
        chunk_size=spec["chunk_size"],
        n_action_steps=5,
        denoising_steps=4,
        instructions=env.instructions,
        output_dir=folder / "init",
        seed=job.seed,
    )
    run_sft(
        folder / "init",
        inputs["demonstrations"] / "dataset",
        DATASET_ID,
        folder / "policy",
        steps=spec["sft_steps"],
        batch_size=spec["sft_batch_size"],
        learning_rate=spec["sft_learning_rate"],
        seed=job.seed,
        device="cpu",
    )
    shutil.rmtree(folder / "init")
    return {"text": f"{spec['sft_steps']} steps"}


def make_trainer(job: Job, policy: Path, scratch: Path, workers: int) -> Any:
    """The trainer of a baseline or RL run."""
    from pi_rl import FlowGRPOConfig, FlowGRPOTrainer, FlowPPOConfig, FlowPPOTrainer

    config, trainer = {"ppo": (FlowPPOConfig, FlowPPOTrainer), "grpo": (FlowGRPOConfig, FlowGRPOTrainer)}[
        job.spec["algorithm"]
    ]
    args = config(
        **job.spec["options"],
        seed=job.seed,
        output_dir=str(scratch),
        use_cpu=True,
        env_workers=workers,
        eval_on_start=False,
        disable_tqdm=True,
    )
    return trainer(policy, args, job.spec["env"], job.spec["env_options"])


def _evaluate(job: Job, folder: Path, inputs: Mapping[str, Path], workers: int) -> dict[str, Any]:
    trainer = make_trainer(job, inputs["policy"] / "policy", folder / "scratch", workers)
    try:
        trainer.evaluate()
    finally:
        trainer.close()
        shutil.rmtree(folder / "scratch", ignore_errors=True)
    outcome = _outcome(trainer.last_evaluation)
    return {"final": outcome, "text": f"deterministic success {_rate(outcome):.3f}"}


def _train(job: Job, folder: Path, inputs: Mapping[str, Path], workers: int) -> dict[str, Any]:
    from pi_rl.__about__ import package_versions

    trainer = make_trainer(job, inputs["policy"] / "policy", folder / "scratch", workers)
    trainer.add_callback(_whole_last_evaluation(job.spec["final_episodes"]))
    try:
        trainer.train()
    finally:
        trainer.close()
        shutil.rmtree(folder / "scratch", ignore_errors=True)
    outcome = _outcome(trainer.last_evaluation)
    curve = job.spec["options"]["eval_episodes"]
    history = trainer.state.log_history
    last = [entry for entry in history if "eval_success_rate" in entry][-1]
    last["eval_success_rate"], last["eval_n_episodes"] = outcome[:curve].count("1") / curve, float(curve)
    return {
        "history": history,
        "updates_per_iteration": trainer.args.updates_per_iteration,
        "final": outcome,
        "versions": package_versions(),
        "text": f"deterministic success {_rate(outcome):.3f} after {job.spec['options']['num_iterations']} iterations",
    }


def _whole_last_evaluation(episodes: int) -> Any:
    """A callback: the last evaluation runs more states than those of the curve."""
    from transformers import TrainerCallback

    class WholeLastEvaluation(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= state.max_steps:
                args.eval_episodes = episodes

    return WholeLastEvaluation()


def _outcome(evaluation: Any) -> str:
    """One character per initial state, in their order: 1 for success."""
    return "".join("1" if success else "0" for success in evaluation.success)


def _rate(outcome: str) -> float:
    return outcome.count("1") / len(outcome)


_WORK: dict[str, Callable[[Job, Path, Mapping[str, Path], int], dict[str, Any]]] = {
    "demonstrations": _demonstrate,
    "sft": _fine_tune,
    "baseline": _evaluate,
    "run": _train,
}


# ---- several processes -------------------------------------------------------------------------------------------


def run_jobs(jobs: Iterable[Job], output: Path, *, parallel: int, report: Callable[[str], None]) -> list[Job]:
    """Does the jobs that have no result yet, ``parallel`` at a time, each in a process of its own.

    A job that fails is reported and the others go on. The processes are forked from one that has imported the
    libraries, which takes longer than many a job.

    Args:
        jobs: What to do, in this order.
        output: Folder of all jobs.
        parallel: Processes at a time; a job that is alone gets as many simulator processes instead.
        report: Prints a line.

    Returns:
        The jobs that failed.
    """
    waiting = [job for job in jobs if job.result(output) is None]
    if not waiting:
        return []
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    workers = max(1, parallel // len(waiting))
    total, failed, clock = len(waiting), [], _Clock(len(waiting), min(parallel, len(waiting)))
    running: dict[int, tuple[Job, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                process = context.Process(target=_in_process, args=(job, output, workers), name=job.name)
                process.start()
                running[process.sentinel] = (job, process, time.perf_counter())
            for sentinel in wait(list(running)):
                job, process, started = running.pop(int(sentinel))  # type: ignore[call-overload]
                process.join()
                result = job.result(output)
                if result is None:
                    failed.append(job)
                    report(f"  FAILED {job.name}: {_last_line(job.folder(output) / LOG)}")
                text = result["text"] if result else f"log: {job.folder(output) / LOG}"
                left = clock.tick(time.perf_counter() - started)
                report(f"  [{clock.done}/{total}] {job.name}: {text}, {time.perf_counter() - started:.0f} s{left}")
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()
    return failed


class _Clock:
    """Estimates the time that is left from the jobs that are done."""

    def __init__(self, total: int, lanes: int) -> None:
        self.total, self.lanes, self.done, self._seconds = total, lanes, 0, 0.0

    def tick(self, seconds: float) -> str:
        """Counts a job; returns the estimate as text."""
        self.done += 1
        self._seconds += seconds
        left = self._seconds / self.done * (self.total - self.done) / self.lanes
        return f", about {left / 60:.0f} min left" if self.done < self.total else ""


def _in_process(job: Job, output: Path, workers: int) -> None:
    """A job's process: its output goes to a log; it ends with the process that started it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = job.folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    try:
        import torch

        torch.set_num_threads(1)
        work(job, output, workers)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "its process ended without a message")
