"""Few-shot supervised fine-tuning through lerobot-train, in a process of its own.

The training loop is LeRobot's (``lerobot.scripts.lerobot_train.train``); this module only prepares its configuration,
shows its progress and puts the result in place. A separate process keeps three things apart: accelerate's state (under
``accelerate launch`` with several processes only one of them fine-tunes), the global seed and logging that
lerobot-train sets, and its memory. Importing LeRobot takes that process about 14 s of CPU; :class:`SftProcess` can be
started ahead of time so that this happens while something else runs.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pi_rl.progress import ProgressFn

# What a launcher sets for its own process group; the fine-tuning process must not join it.
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


@dataclass(frozen=True, kw_only=True)
class SftJob:
    """One fine-tuning run, as sent to the worker process.

    Attributes:
        policy_path: LeRobot policy folder with the start weights, or a Hub id.
        dataset_root: Folder of the LeRobotDataset.
        repo_id: Its name.
        output_dir: Folder in which lerobot-train writes its checkpoints; must not exist.
        steps: Optimiser steps.
        batch_size: Samples per step.
        learning_rate: Peak of the schedule.
        warmup_steps: Steps of linear warm-up; a cosine decay to zero over all ``steps`` follows.
        weight_decay: Of AdamW.
        grad_clip_norm: Largest gradient norm.
        seed: Of data order, flow times, noise and augmentation.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        image_shift: Largest random shift of the images in pixels, in both directions; 0 switches it off.
        in_memory: Decode every image once and keep it; otherwise frames are decoded whenever they are drawn.
        num_workers: Data-loading processes, only without ``in_memory``.
    """

    policy_path: str
    dataset_root: str
    repo_id: str
    output_dir: str
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    grad_clip_norm: float
    seed: int
    device: str
    image_shift: int
    in_memory: bool
    num_workers: int


class SftProcess:
    """A process that has LeRobot imported and waits for one :class:`SftJob`.

    Use as a context manager, or call :meth:`close`. Creating it returns at once.

    Args:
        threads: CPU threads of its torch operations.
    """

    def __init__(self, *, threads: int = 1) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="pi_rl_sft_"))
        self._log = self._scratch / "log.txt"
        receive, send = os.pipe()
        self._messages = os.fdopen(receive, encoding="utf-8")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pi_rl.trainer.sft_worker", str(send)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(send,),
                text=True,
                env=worker_environment(threads, datasets_cache=self._scratch / "datasets"),
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
        """
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            raise RuntimeError("This fine-tuning process was used before; start another one.")
        result = None
        try:
            stdin.write(json.dumps(asdict(job)) + "\n")
            stdin.close()
        except BrokenPipeError as error:
            raise RuntimeError(self._failure()) from error
        for line in self._messages:
            message: dict[str, Any] = json.loads(line)
            if "checkpoint" in message:
                result = Path(message["checkpoint"])
            elif progress is not None:
                text = f"loss {message['loss']:.3f}  {message['steps_per_s']:.1f} steps/s"
                progress(message["step"], job.steps, text)
        if self._process.wait() != 0 or result is None:
            raise RuntimeError(self._failure())
        return result

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
    dataset_root: str | Path,
    repo_id: str,
    output_dir: str | Path,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    warmup_steps: int | None = None,
    weight_decay: float = 1e-2,
    grad_clip_norm: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 1,
    image_shift: int = 0,
    in_memory: bool = True,
    num_workers: int = 0,
    progress: ProgressFn | None = None,
    process: SftProcess | None = None,
) -> Path:
    """Fine-tunes a LeRobot policy on a local LeRobotDataset with lerobot-train.

    AdamW, linear warm-up and cosine decay to zero within ``steps``. Statistics of the dataset go into the processors.
    Under a launcher with several processes, call this in one of them only and let the others wait.

    Args:
        policy_path: LeRobot policy folder with the start weights, or a Hub id.
        dataset_root: Folder of the LeRobotDataset.
        repo_id: Its name, for example ``"local/metaworld"``.
        output_dir: New folder of the result; it appears only when complete.
        steps: Optimiser steps, positive.
        batch_size: Samples per step.
        learning_rate: Peak of the schedule.
        warmup_steps: Steps of warm-up; default 5 % of ``steps``.
        weight_decay: Of AdamW.
        grad_clip_norm: Largest gradient norm.
        seed: Of data order, flow times, noise and augmentation.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        threads: CPU threads of the fine-tuning process when it is started here.
        image_shift: Largest random shift of the training images in pixels; 0 switches it off.
        in_memory: Decode every image once and keep it in memory: for small datasets.
        num_workers: Data-loading processes, only without ``in_memory``.
        progress: Called as ``progress(step, steps, text)``.
        process: A process started ahead of time; it is used up.

    Returns:
        ``output_dir``: a LeRobot policy folder with its processors and, if the start folder has one, its tokenizer.

    Raises:
        ValueError: If a folder or a number does not fit.
        RuntimeError: If lerobot-train fails.
    """
    output = Path(output_dir)
    _check(policy_path, Path(dataset_root), output, steps=steps, batch_size=batch_size, learning_rate=learning_rate)
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    job = SftJob(
        policy_path=_absolute_if_local(policy_path),
        dataset_root=str(Path(dataset_root).resolve()),
        repo_id=repo_id,
        output_dir=str(scratch.resolve() / "run"),
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=max(1, round(0.05 * steps)) if warmup_steps is None else warmup_steps,
        weight_decay=weight_decay,
        grad_clip_norm=grad_clip_norm,
        seed=seed,
        device=device,
        image_shift=image_shift,
        in_memory=in_memory,
        num_workers=num_workers,
    )
    try:
        with process if process is not None else SftProcess(threads=threads) as worker:
            checkpoint = worker.run(job, progress)
        _write_policy(checkpoint, output, Path(policy_path))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return output


def worker_environment(threads: int, *, datasets_cache: Path) -> dict[str, str]:
    """Environment of the fine-tuning process: outside of any launcher, own cache, few threads.

    Args:
        threads: CPU threads.
        datasets_cache: Where the ``datasets`` library may cache; the user's cache stays clean.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    package_root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, env.get("PYTHONPATH", "")]))
    env.update(OMP_NUM_THREADS=str(threads), HF_DATASETS_CACHE=str(datasets_cache), TOKENIZERS_PARALLELISM="false")
    return env


def _check(
    policy_path: str | Path, dataset_root: Path, output: Path, *, steps: int, batch_size: int, learning_rate: float
) -> None:
    """Errors that need no torch to be found."""
    if steps < 1 or batch_size < 1 or learning_rate <= 0:
        raise ValueError(
            f"run_sft got steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}; all must be positive."
        )
    if not (dataset_root / "meta" / "info.json").is_file():
        raise ValueError(
            f"There is no LeRobotDataset at {dataset_root} (meta/info.json is missing); collect demonstrations first "
            "or give the folder that holds meta/ and data/."
        )
    folder = Path(policy_path)
    if folder.is_dir() and not ((folder / "config.json").is_file() and (folder / "model.safetensors").is_file()):
        raise ValueError(f"{folder} is not a LeRobot policy folder: it needs config.json and model.safetensors.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} already exists; give a new folder or remove the old one.")


def _absolute_if_local(policy_path: str | Path) -> str:
    return str(Path(policy_path).resolve()) if Path(policy_path).is_dir() else str(policy_path)


def _write_policy(checkpoint: Path, output: Path, source: Path) -> None:
    """Reads the checkpoint strictly and writes it as a folder that can be moved, with the tokenizer of its source."""
    from pi_rl.policies.checkpoints import has_tokenizer_files, load_policy, save_policy

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
