"""Supervised fine-tuning through lerobot-train, in a process of its own.

The training loop is LeRobot's (``lerobot.scripts.lerobot_train.train``); this module only prepares its configuration,
shows its progress and puts the result in place. A separate process keeps three things apart: accelerate's state, the
global seed and logging that lerobot-train sets, and its memory. It does not die of the signals that end a run: this
process passes them on, and where the checkpoints are kept, it saves the step that it is in.

Under a launcher with several processes there are two ways. By default the fine-tuning process stands outside of the
launcher's group: one process calls :func:`run_sft`, the others wait (the quick start's few-shot stage). With
``join_launcher`` every launched process calls it, and their fine-tuning processes form the group that the launcher
described: lerobot-train's data-parallel training.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from pi_rl.progress import ProgressFn
from pi_rl.trainer.stop_signals import Preempted, SavedInterrupt, StopSignals, holding_back_signals

# What a launcher sets for its own process group; a fine-tuning process outside of it must not see them.
_LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "FORK_LAUNCHED",
)
_LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "PMI_", "OMPI_", "MV2_")
_LOG_TAIL_LINES = 25
_RUN = "run"


@dataclass(frozen=True, kw_only=True)
class SftJob:
    """One fine-tuning run, as sent to the worker process.

    Attributes:
        policy_path: LeRobot policy folder with the start weights and the settings to train with.
        dataset_root: Folder of the LeRobotDataset; None for one on the Hub.
        repo_id: Its name.
        revision: Hub commit, branch or tag of the dataset.
        episodes: Episodes to train on; None for all.
        output_dir: Folder in which lerobot-train writes its checkpoints; must not exist, unless the run is resumed.
        resume_from: Checkpoint folder of lerobot-train that the run continues from; None starts it.
        steps: Optimiser steps.
        batch_size: Samples per step and process.
        learning_rate: Peak of the schedule.
        final_learning_rate: Its end.
        warmup_steps: Steps of linear warm-up; a cosine decay over all ``steps`` follows.
        weight_decay: Of AdamW.
        adam_beta2: β2 of AdamW.
        grad_clip_norm: Largest gradient norm.
        seed: Of data order, flow times and noise.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        bf16: Compute in bfloat16 (autocast); the weights keep their type.
        in_memory: Decode every image once and keep it; otherwise frames are decoded whenever they are drawn.
        num_workers: Data-loading processes, only without ``in_memory``.
        save_every_steps: Steps between checkpoints, of which the last is kept; 0 writes one at the end only.
    """

    policy_path: str
    dataset_root: str | None
    repo_id: str
    revision: str | None
    episodes: list[int] | None
    output_dir: str
    resume_from: str | None
    steps: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    adam_beta2: float
    grad_clip_norm: float
    seed: int
    device: str
    bf16: bool
    in_memory: bool
    num_workers: int
    save_every_steps: int


class SftProcess:
    """A process that imports LeRobot and waits for one :class:`SftJob`.

    Use as a context manager, or call :meth:`close`. Creating it returns at once.

    Args:
        threads: CPU threads of its torch operations.
        join_launcher: Whether it takes this process's place in the launcher's group.
        save_at_signals: Whether a signal that comes in training ends it after a checkpoint of its step. By default the
            signal is left to whoever handles it.
    """

    def __init__(self, *, threads: int = 1, join_launcher: bool = False, save_at_signals: bool = False) -> None:
        self._save_at_signals = save_at_signals
        self._scratch = Path(tempfile.mkdtemp(prefix="pi_rl_sft_"))
        self._log = self._scratch / "log.txt"
        receive, send = os.pipe()
        self._messages = os.fdopen(receive, encoding="utf-8")
        with self._log.open("wb") as log, holding_back_signals():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pi_rl.trainer.sft_worker", str(send)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(send,),
                text=True,
                env=worker_environment(threads, datasets_cache=None if join_launcher else self._scratch / "datasets"),
            )
        os.close(send)

    def run(self, job: SftJob, progress: ProgressFn | None = None) -> Path:
        """Fine-tunes and waits for the end.

        Args:
            job: What to train.
            progress: Called as ``progress(step, steps, text)``.

        Returns:
            The checkpoint folder as lerobot-train wrote it.

        Raises:
            RuntimeError: If the process fails; the end of its log is in the message.
            SavedInterrupt: A KeyboardInterrupt, after Ctrl-C, with ``save_at_signals``.
            Preempted: A SystemExit with code 75, after another signal.
        """
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            raise RuntimeError("This fine-tuning process was used before; start another one.")
        try:
            stdin.write(json.dumps(asdict(job)) + "\n")
            stdin.close()
        except BrokenPipeError as error:
            raise RuntimeError(self._failure()) from error
        announce = "after this step" if launched_rank() == 0 else None
        signals = StopSignals(announce=announce, pass_on=self._process.send_signal)
        with ExitStack() as noting:
            result: dict[str, Any] = {}
            for line in self._messages:
                message: dict[str, Any] = json.loads(line)
                if "loss" in message:
                    _report(message, job.steps, progress)
                elif "begins" in message:  # until then there is nothing to save
                    if self._save_at_signals:
                        noting.enter_context(signals)
                elif "saving" in message:
                    signals.saving = True
                else:
                    result = message
            failed = self._process.wait() != 0
        if "ended_after" in result:
            _end_run(result["ended_after"], result["signum"], job)
        if failed or not result:
            raise RuntimeError(self._failure())
        if signals.received and launched_rank() == 0:  # too late for that process: this one ends before it writes
            _end_run(job.steps, signals.received, job)
        return Path(result["checkpoint"])

    def close(self) -> None:
        """Ends the process if it still runs and removes its temporary files."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what the process did not read is lost anyway
                self._process.stdin.close()
        self._messages.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> "SftProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _failure(self) -> str:
        code = self._process.wait()
        tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return f"lerobot-train ended with exit code {code}. The end of its log:\n" + "\n".join(tail)


def run_sft(
    policy_path: str | Path,
    dataset_root: str | Path | None,
    repo_id: str,
    output_dir: str | Path,
    *,
    steps: int,
    revision: str | None = None,
    episodes: Sequence[int] | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    final_learning_rate: float = 0.0,
    warmup_steps: int | None = None,
    weight_decay: float = 1e-2,
    adam_beta2: float = 0.999,
    grad_clip_norm: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    bf16: bool = False,
    threads: int = 1,
    in_memory: bool = True,
    num_workers: int = 0,
    work_dir: str | Path | None = None,
    save_every_steps: int = 0,
    join_launcher: bool = False,
    output_dtype: str | None = None,
    progress: ProgressFn | None = None,
) -> Path:
    """Fine-tunes a LeRobot policy on a LeRobotDataset with lerobot-train.

    AdamW, linear warm-up and cosine decay within ``steps``. What is trained and how it is fed (expert only, horizon,
    features, prompt) is what the start folder's configuration says. Statistics of the whole dataset go into the
    processors.

    Args:
        policy_path: LeRobot policy folder with the start weights.
        dataset_root: Folder of the LeRobotDataset; None downloads ``repo_id`` from the Hub.
        repo_id: Its name, for example ``"local/metaworld"``.
        output_dir: New folder of the result; it appears only when complete.
        steps: Optimiser steps, positive.
        revision: Hub commit, branch or tag of the dataset.
        episodes: Episodes to train on; default all.
        batch_size: Samples per step and process.
        learning_rate: Peak of the schedule.
        final_learning_rate: Its end.
        warmup_steps: Steps of warm-up; default 5 % of ``steps``.
        weight_decay: Of AdamW.
        adam_beta2: β2 of AdamW.
        grad_clip_norm: Largest gradient norm.
        seed: Of data order, flow times and noise.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        bf16: Compute in bfloat16 under autocast; a policy whose weights are bfloat16 always does.
        threads: CPU threads of the fine-tuning process.
        in_memory: Decode every image once and keep it in memory: for whole datasets that are small.
        num_workers: Data-loading processes, only without ``in_memory``.
        work_dir: Folder for the checkpoints of ``save_every_steps``; if it holds one, the run continues from it. It is
            left in place. A signal (SIGTERM, SIGUSR1, Ctrl-C) then ends the run with a checkpoint after the step that
            it is in. Default: a temporary folder beside ``output_dir``.
        save_every_steps: Steps between checkpoints; 0 writes one at the end only.
        join_launcher: Every process of the launcher calls this, and together they fine-tune; the first writes the
            result.
        output_dtype: Type of the result's weights, ``"float32"`` or ``"bfloat16"``; default: the start policy's.
        progress: Called as ``progress(step, steps, text)``.

    Returns:
        ``output_dir``: a LeRobot policy folder with its processors and, if the start folder has one, its tokenizer.

    Raises:
        ValueError: If a folder or a number does not fit.
        RuntimeError: If lerobot-train fails.
        SavedInterrupt: A KeyboardInterrupt, after Ctrl-C, if ``work_dir`` is given.
        Preempted: A SystemExit with code 75, after another signal.
    """
    output, source = Path(output_dir), Path(policy_path)
    root = None if dataset_root is None else Path(dataset_root).resolve()
    _check(source, root, output, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    keeps = work_dir is not None
    with (
        _work_folder(output, work_dir) as work,
        SftProcess(threads=threads, join_launcher=join_launcher, save_at_signals=keeps) as worker,
    ):
        run, last = work / _RUN, last_checkpoint(work)
        if last is None:
            shutil.rmtree(run, ignore_errors=True)  # a run that was killed before its first checkpoint
        job = SftJob(
            policy_path=str(source.resolve()),
            dataset_root=None if root is None else str(root),
            repo_id=repo_id,
            revision=revision,
            episodes=None if episodes is None else [int(episode) for episode in episodes],
            output_dir=str(run),
            resume_from=None if last is None else str(last),
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            final_learning_rate=final_learning_rate,
            warmup_steps=max(1, round(0.05 * steps)) if warmup_steps is None else warmup_steps,
            weight_decay=weight_decay,
            adam_beta2=adam_beta2,
            grad_clip_norm=grad_clip_norm,
            seed=seed,
            device=device,
            bf16=bf16 or json.loads((source / "config.json").read_text()).get("dtype") == "bfloat16",
            in_memory=in_memory,
            num_workers=num_workers,
            save_every_steps=save_every_steps,
        )
        checkpoint = worker.run(job, progress)
        if not join_launcher or launched_rank() == 0:
            _write_policy(checkpoint, output, source, output_dtype)
    return output


def _report(message: dict[str, Any], steps: int, progress: ProgressFn | None) -> None:
    if progress is not None:
        progress(message["step"], steps, f"loss {message['loss']:.3f}  {message['steps_per_s']:.1f} steps/s")


def _end_run(step: int, signum: int, job: SftJob) -> NoReturn:
    """Raises what a run ends with that a signal ended after a checkpoint of its last step."""
    text = f"Ended by {signal.Signals(signum).name} after step {step}."
    checkpoint = last_checkpoint(Path(job.output_dir).parent)
    if signum == signal.SIGINT:
        raise SavedInterrupt(text, checkpoint)
    raise Preempted(text, checkpoint)


def last_checkpoint(work_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of lerobot-train in a work folder of :func:`run_sft`, or None."""
    checkpoints = Path(work_dir) / _RUN / "checkpoints"
    last = checkpoints / "last"
    if last.exists():
        return last.resolve()
    numbered = sorted(path for path in checkpoints.glob("[0-9]*") if path.is_dir())
    # `last` is moved after each checkpoint is complete: killed in between, the newest of several is complete.
    return numbered[-1].resolve() if len(numbered) > 1 else None


def launched_rank() -> int:
    """This process's number in the launcher's group; 0 outside of any."""
    return int(os.environ.get("RANK", "0"))


def worker_environment(threads: int, *, datasets_cache: Path | None) -> dict[str, str]:
    """Environment of the fine-tuning process.

    Args:
        threads: CPU threads.
        datasets_cache: Where the ``datasets`` library may cache: the process is then outside of any launcher and the
            user's cache stays clean. None keeps the user's cache and the launcher's group.
    """
    env = dict(os.environ)
    if datasets_cache is not None:
        env = {
            name: value
            for name, value in env.items()
            if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
        }
        env["HF_DATASETS_CACHE"] = str(datasets_cache)
    package_root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH", "")]))
    env.update(OMP_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    return env


@contextmanager
def _work_folder(output: Path, given: str | Path | None) -> Iterator[Path]:
    """The folder given, or a temporary one beside the output that is removed in the end."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if given is not None:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given).resolve()
        return
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    try:
        yield scratch.resolve()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check(
    source: Path, dataset_root: Path | None, output: Path, *, steps: int, batch_size: int, learning_rate: float
) -> None:
    """Errors that need no torch to be found."""
    if steps < 1 or batch_size < 1 or learning_rate <= 0:
        raise ValueError(
            f"run_sft got steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}; all must be positive."
        )
    if dataset_root is not None and not (dataset_root / "meta" / "info.json").is_file():
        raise ValueError(
            f"There is no LeRobotDataset at {dataset_root} (meta/info.json is missing); collect demonstrations first "
            "or give the folder that holds meta/ and data/."
        )
    if not ((source / "config.json").is_file() and (source / "model.safetensors").is_file()):
        raise ValueError(f"{source} is not a LeRobot policy folder: it needs config.json and model.safetensors.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} already exists; give a new folder or remove the old one.")


def _write_policy(checkpoint: Path, output: Path, source: Path, dtype: str | None) -> None:
    """Reads the checkpoint strictly and writes it as a folder that can be moved, with the tokenizer of its source."""
    from pi_rl.policies.checkpoints import has_tokenizer_files, load_policy, save_policy

    policy = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    # switches of this training; whoever trains the policy next decides anew
    policy.update(train_expert_only=False, gradient_checkpointing=False, dtype=dtype or policy["dtype"])
    (checkpoint / "config.json").write_text(json.dumps(policy, indent=4), encoding="utf-8")
    loaded = load_policy(checkpoint, device="cpu")
    config = json.loads((checkpoint / "train_config.json").read_text(encoding="utf-8"))
    _forget_paths(config)
    save_policy(
        output,
        loaded.policy,
        loaded.preprocessor,
        loaded.postprocessor,
        tokenizer_source=source if has_tokenizer_files(source) else None,
        extra_files={"train_config.json": json.dumps(config, indent=4)},
    )


def _forget_paths(config: dict[str, Any]) -> None:
    """Removes this machine's folders from lerobot-train's configuration."""
    config["output_dir"] = None
    config["dataset"]["root"] = None
    config["policy"]["pretrained_path"] = None
    config["policy"].pop("tokenizer_name", None)
    if "checkpoint_path" in config:
        config["checkpoint_path"] = None
