"""The process behind :class:`pi_rl.trainer.sft.SftProcess`: imports LeRobot, reads one job, runs lerobot-train.

Two documented arguments of ``lerobot.scripts.lerobot_train.train`` are used: the configuration, and the accelerator,
whose subclass below serves frames from memory, reports progress, and ends the run when it is told to, after a
checkpoint of the step that it was in. LeRobot itself is not modified.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from lerobot.common.train_utils import load_training_step, update_last_checkpoint
from lerobot.configs import PreTrainedConfig
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.scripts.lerobot_train import train
from lerobot.utils.random_utils import load_rng_state
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pi_rl.policies import small  # noqa: F401  registers the small policy types with LeRobot
from pi_rl.trainer.metrics import all_reduce
from pi_rl.trainer.sft import SftJob
from pi_rl.trainer.stop_signals import StopSignals, ignore_signals, let_signals_in

_PROGRESS_INTERVAL_S = 0.25
_ROOT, _HEAD, _EMBEDDING = "model.", "lm_head.weight", "language_model.embed_tokens.weight"


class InMemoryDataset(Dataset[dict[str, Any]]):
    """All frames of a LeRobotDataset as stacked tensors: the same items, each image decoded once.

    LeRobotDataset decodes the images of all frames whose actions belong to an item, about 2.5 ms per item at 64 px.

    Args:
        dataset: Dataset with camera images stored as images; action windows (``delta_timestamps``) are resolved.
    """

    def __init__(self, dataset: LeRobotDataset) -> None:
        if dataset.meta.video_keys or dataset.episodes is not None:
            raise ValueError("Only whole datasets with image features fit in memory here; use in_memory=False.")
        columns = dataset.hf_dataset[:]
        self._columns: dict[str, Tensor] = {key: torch.stack(list(values)) for key, values in columns.items()}
        self._tasks = [str(name) for name in dataset.meta.tasks.index]
        self._windows = {key: torch.tensor(offsets) for key, offsets in (dataset.reader.delta_indices or {}).items()}
        starts = torch.as_tensor(list(dataset.meta.episodes["dataset_from_index"]))
        ends = torch.as_tensor(list(dataset.meta.episodes["dataset_to_index"]))
        episode = self._columns["episode_index"]
        self._start, self._end = starts[episode], ends[episode]

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A collated batch of B items; windows of w frames have shape (B, w, …), as in LeRobotDataset."""
        rows = torch.as_tensor(indices)
        batch: dict[str, Any] = {key: values[rows] for key, values in self._columns.items()}
        for key, offsets in self._windows.items():
            wanted = rows[:, None] + offsets
            start, end = self._start[rows][:, None], self._end[rows][:, None]
            batch[key] = self._columns[key][torch.maximum(torch.minimum(wanted, end - 1), start)]
            batch[f"{key}_is_pad"] = (wanted < start) | (wanted >= end)
        batch["task"] = [self._tasks[task] for task in batch["task_index"].tolist()]
        return batch


class Stopped(Exception):
    """All processes have agreed to end the run because of a signal, and its checkpoint is written.

    Attributes:
        step: Optimiser steps done.
        signum: The signal.
    """

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"Ended by {signal.Signals(signum).name} after step {step}.")
        self.step, self.signum = step, signum


class SftAccelerator(Accelerator):
    """Accelerator that reports each step, checks what lerobot-train prepared and keeps one checkpoint.

    It also ends the run at a signal: lerobot-train saves after the steps that its configuration says.

    Args:
        job: The run.
        channel: Where progress goes, one JSON object per line.
        config: The configuration that lerobot-train runs with.
        signals: Notes the signals to end.
    """

    def __init__(self, job: SftJob, channel: TextIO, config: TrainPipelineConfig, signals: StopSignals) -> None:
        super().__init__(
            step_scheduler_with_optimizer=False,
            mixed_precision="bf16" if job.bf16 else "no",
            cpu=job.device == "cpu",
            # π0's unused language heads get no gradient; gradients live in the buckets they are reduced in
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)],
        )
        self._job = job
        self._channel = channel
        self._config = config
        self._signals = signals
        self.told = 0
        self._redrawn_every: int | None = None
        self._step = self._first = 0 if job.resume_from is None else load_training_step(_training_state(job))
        self._begin = self._last_report = time.perf_counter()

    def prepare(self, *objects: Any, **options: Any) -> Any:
        """Checks the start weights and exchanges the data loader for one that serves from memory."""
        for item in objects:
            if isinstance(item, PreTrainedPolicy):
                check_start_weights(item, _weights_folder(self._job))
            elif isinstance(item, DataLoader):
                item.worker_init_fn = ignore_signals
        if self._job.in_memory:
            objects = tuple(self._from_memory(item) if isinstance(item, DataLoader) else item for item in objects)
        prepared = super().prepare(*objects, **options)
        for item in prepared:
            if isinstance(item, DataLoader):
                # from it accelerate sets the sampler's epoch, over the one that lerobot-train has set to resume from
                item.iteration = self._first // len(item)
                # workers that stay need no new iterator, which would draw their seed
                self._redrawn_every = None if item.persistent_workers else len(item)
        self._begin = time.perf_counter()
        return prepared

    def autocast(self, *args: Any, **options: Any) -> Any:
        """Precision of a forward pass, with which a step begins.

        Raises:
            Stopped: If the processes agreed to end in the step before, which lerobot-train has saved meanwhile.
        """
        if self.told:
            raise Stopped(self._step, self.told)
        if self._step == self._first:
            self._restore_generators()
            self.wait_for_everyone()  # from here on all processes agree on the step that a signal ends
            send(self._channel, begins=self._step)
        separate_generators(self._job.seed, self.process_index, self._step)
        return super().autocast(*args, **options)

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Back-propagates and reports the step; the optimiser's part, and a checkpoint if one is due, follow."""
        super().backward(loss, **options)
        every = self._job.save_every_steps
        saved = every > 0 and self._step > self._first and self._step % every == 0
        if saved and self.is_main_process:
            keep_last_checkpoint(Path(self._job.output_dir) / "checkpoints")
        self._step += 1
        now = time.perf_counter()
        if saved or self._step == self._job.steps or now - self._last_report >= _PROGRESS_INTERVAL_S:
            self._last_report = now
            rate = (self._step - self._first) / max(now - self._begin, 1e-9)
            send(self._channel, step=self._step, loss=loss.item(), steps_per_s=rate)
        self._save_if_told()

    def _save_if_told(self) -> None:
        """Has this step saved if any process was told to end; the last step is saved anyway. A collective call."""
        self.told = int(all_reduce(self, torch.tensor(self._signals.received), "max"))
        if self.told and self._step < self._job.steps:
            self._config.save_freq = self._step  # lerobot-train saves after the steps that are multiples of it
            self._signals.saving = True
            send(self._channel, saving=self._step)

    def _restore_generators(self) -> None:
        """Sets a resumed run's generators to what an uninterrupted run's were: those of the checkpoint.

        lerobot-train restores them too, but making the data loader's iterator then draws from them once more. So does
        an uninterrupted run's new iterator where an epoch begins.
        """
        if self._job.resume_from is None:
            return
        load_rng_state(_training_state(self._job))
        if self._redrawn_every is not None and self._step % self._redrawn_every == 0:
            torch.empty((), dtype=torch.int64).random_()  # as the iterator draws its seed

    def _from_memory(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        if not isinstance(loader.dataset, LeRobotDataset):
            raise RuntimeError(f"lerobot-train passed a {type(loader.dataset).__name__}; use in_memory=False.")
        return DataLoader(
            InMemoryDataset(loader.dataset),
            batch_size=loader.batch_size,
            sampler=loader.sampler,
            collate_fn=_already_collated,
            pin_memory=loader.pin_memory,
        )


def check_start_weights(policy: PreTrainedPolicy, folder: str | Path) -> None:
    """Refuses a policy that does not hold the weights of its folder.

    LeRobot's loader for π0 continues with random weights when a file is missing or does not match.

    Args:
        policy: The policy as lerobot-train made it.
        folder: Folder it was made from.

    Raises:
        RuntimeError: If a tensor of the file differs, or one that the policy uses is not in the file.
    """
    file = Path(folder) / "model.safetensors"
    state, seen = policy.state_dict(), set()
    with safe_open(file, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118  a safetensors file is no mapping
            name = key if key.startswith(_ROOT) else _ROOT + key  # openpi's files lack the prefix
            if name not in state or not torch.equal(stored.get_tensor(key).to(state[name]), state[name]):
                raise RuntimeError(f"LeRobot did not load '{key}' from {file}; the folder does not fit its config.")
            seen.add(name)
    if any(name.endswith(f"paligemma.{_HEAD}") for name in seen):
        seen |= {name for name in state if name.endswith(_EMBEDDING)}  # tied: LeRobot fills it from the head
    missing = [name for name in state if name not in seen and not name.endswith(_HEAD)]  # the heads are unused
    if missing:
        raise RuntimeError(f"{file} has no '{missing[0]}' ({len(missing)} missing): that part would start at random.")


def separate_generators(seed: int, rank: int, step: int) -> None:
    """Gives every process but the first random numbers of its own.

    lerobot-train seeds all processes alike: they would draw the same flow times and noise for their different samples.
    Its checkpoints hold the first process's generators only; those of the others follow from the step, so that a
    resumed run has them too.

    Args:
        seed: The run's seed.
        rank: The process's number; 0 keeps its generators.
        step: Optimiser steps so far, the same in all processes.
    """
    if rank > 0:
        torch.manual_seed(int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0]))


def keep_last_checkpoint(checkpoints: Path) -> None:
    """Removes all checkpoints of lerobot-train but the last complete one: each holds weights and optimiser."""
    last = (checkpoints / "last").resolve()
    for folder in checkpoints.glob("[0-9]*"):
        if folder.resolve() != last:
            shutil.rmtree(folder)


def remove_unfinished_checkpoints(job: SftJob) -> None:
    """Leaves the checkpoint that a run continues from alone, linked as ``last``.

    A later one that was half written when the run was killed would be taken for complete if the run, which may save
    at other steps now, were killed again while the link is moved.
    """
    checkpoint = Path(str(job.resume_from))
    if not (checkpoint.parent / "last").exists():
        update_last_checkpoint(checkpoint)
    keep_last_checkpoint(checkpoint.parent)


def train_config(job: SftJob) -> TrainPipelineConfig:
    """lerobot-train's configuration of a job; nothing is logged online, pushed or evaluated."""
    policy = PreTrainedConfig.from_pretrained(job.policy_path)
    policy.pretrained_path = job.policy_path
    policy.device = job.device
    policy.push_to_hub = False
    workers = 0 if job.in_memory else job.num_workers
    return TrainPipelineConfig(
        dataset=DatasetConfig(
            repo_id=job.repo_id,
            root=job.dataset_root,
            revision=job.revision,
            episodes=job.episodes,
            use_imagenet_stats=False,
            video_backend="pyav",
        ),
        policy=policy,
        output_dir=Path(job.output_dir),
        resume=job.resume_from is not None,
        job_name="sft",
        seed=job.seed,
        num_workers=workers,
        dataloader_multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
        batch_size=job.batch_size,
        steps=job.steps,
        env_eval_freq=0,
        log_freq=max(1, job.steps // 10),
        save_freq=job.save_every_steps,
        use_policy_training_preset=False,
        optimizer=AdamWConfig(
            lr=job.learning_rate,
            betas=(0.9, job.adam_beta2),
            weight_decay=job.weight_decay,
            grad_clip_norm=job.grad_clip_norm,
        ),
        scheduler=CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=job.warmup_steps,
            num_decay_steps=job.steps,
            peak_lr=job.learning_rate,
            decay_lr=job.final_learning_rate,
        ),
    )


def send(channel: TextIO, **message: Any) -> None:
    """Writes one message to the parent process."""
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def run(job: SftJob, channel: TextIO, signals: StopSignals) -> Path:
    """Trains and returns lerobot-train's checkpoint folder.

    Args:
        job: The run.
        channel: Where progress goes, one JSON object per line.
        signals: Notes the signals to end.

    Raises:
        Stopped: If a signal ended the run; the checkpoint of its last step is ``last``.
    """
    config = train_config(job)
    accelerator = SftAccelerator(job, channel, config, signals)  # under a launcher: waits for the other processes
    if job.resume_from is not None and accelerator.is_main_process:
        remove_unfinished_checkpoints(job)
    # lerobot-train takes the checkpoint to resume from only from the command line, where it looks for options
    sys.argv = ["lerobot-train"]
    if job.resume_from is not None:
        sys.argv.append(f"--config_path={_weights_folder(job) / 'train_config.json'}")
    checkpoints = Path(job.output_dir) / "checkpoints"
    try:
        train(config, accelerator)
        if accelerator.told:  # in the last step, which is saved
            raise Stopped(job.steps, accelerator.told)
    except Stopped:
        if accelerator.is_main_process:
            keep_last_checkpoint(checkpoints)
        accelerator.end_training()
        raise
    return (checkpoints / "last").resolve() / "pretrained_model"


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone: nobody would read its result."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Waits for one job on standard input (an empty input: none will come); messages go to the given descriptor."""
    channel = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    end_with_parent()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    line = sys.stdin.readline()
    if not line.strip():
        return
    job = SftJob(**json.loads(line))
    with StopSignals(announce=None) as signals:
        let_signals_in()
        try:
            send(channel, checkpoint=str(run(job, channel, signals)))
        except Stopped as stop:
            send(channel, ended_after=stop.step, signum=stop.signum)
        for worker in multiprocessing.active_children():  # which ignore the signal that Python ends them with
            worker.kill()


def _weights_folder(job: SftJob) -> Path:
    """Where the run's first weights come from."""
    return Path(job.policy_path) if job.resume_from is None else Path(job.resume_from) / "pretrained_model"


def _training_state(job: SftJob) -> Path:
    return Path(str(job.resume_from)) / "training_state"


def _already_collated(batch: Any) -> Any:
    return batch


if __name__ == "__main__":
    main()
