"""The process behind :class:`pi_rl.trainer.sft.SftProcess`: imports LeRobot, reads one job, runs lerobot-train.

Two documented arguments of ``lerobot.scripts.lerobot_train.train`` are used: the configuration, and the accelerator,
whose subclass below serves frames from memory and reports progress. LeRobot itself is not modified.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from lerobot.configs import PreTrainedConfig
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig
from lerobot.datasets import LeRobotDataset
from lerobot.optim.optimizers import AdamWConfig
from lerobot.optim.schedulers import CosineDecayWithWarmupSchedulerConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.scripts.lerobot_train import train
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from pi_rl.policies import small  # noqa: F401  registers the small policy types with LeRobot
from pi_rl.trainer.sft import SftJob

_PROGRESS_INTERVAL_S = 0.25


class InMemoryDataset(Dataset[dict[str, Any]]):
    """All frames of a LeRobotDataset as stacked tensors: the same items, each image decoded once.

    LeRobotDataset decodes the images of all frames whose actions belong to an item, about 2.5 ms per item at 64 px.

    Args:
        dataset: Dataset with camera images stored as images; action windows (``delta_timestamps``) are resolved.
        image_shift: Largest random shift of camera images in pixels, drawn per item from torch's generator. The
            border is repeated.
    """

    def __init__(self, dataset: LeRobotDataset, *, image_shift: int = 0) -> None:
        if dataset.meta.video_keys or dataset.episodes is not None:
            raise ValueError("Only whole datasets with image features fit in memory here; use in_memory=False.")
        columns = dataset.hf_dataset[:]
        self._columns: dict[str, Tensor] = {key: torch.stack(list(values)) for key, values in columns.items()}
        self._cameras = tuple(dataset.meta.camera_keys)
        self._tasks = [str(name) for name in dataset.meta.tasks.index]
        self._windows = {key: torch.tensor(offsets) for key, offsets in (dataset.reader.delta_indices or {}).items()}
        starts = torch.as_tensor(list(dataset.meta.episodes["dataset_from_index"]))
        ends = torch.as_tensor(list(dataset.meta.episodes["dataset_to_index"]))
        episode = self._columns["episode_index"]
        self._start, self._end = starts[episode], ends[episode]
        self._shift = image_shift

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
        if self._shift:
            for camera in self._cameras:
                batch[camera] = _shifted(batch[camera], self._shift)
        batch["task"] = [self._tasks[task] for task in batch["task_index"].tolist()]
        return batch


class SftAccelerator(Accelerator):
    """Accelerator for one process that reports each step and checks what lerobot-train prepared.

    Args:
        job: The run.
        channel: Where progress goes, one JSON object per line.
        mixed_precision: As in ``Accelerator``.
    """

    def __init__(self, job: SftJob, channel: TextIO, *, mixed_precision: str | None) -> None:
        super().__init__(step_scheduler_with_optimizer=False, mixed_precision=mixed_precision, cpu=job.device == "cpu")
        self._job = job
        self._channel = channel
        self._step = 0
        self._begin = self._last_report = time.perf_counter()

    def prepare(self, *objects: Any, **options: Any) -> Any:
        """Checks the start weights and exchanges the data loader for one that serves from memory."""
        for item in objects:
            if isinstance(item, PreTrainedPolicy):
                check_start_weights(item, self._job.policy_path)
        if self._job.in_memory:
            objects = tuple(self._from_memory(item) if isinstance(item, DataLoader) else item for item in objects)
        prepared = super().prepare(*objects, **options)
        self._begin = time.perf_counter()
        return prepared

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Back-propagates and reports the step."""
        super().backward(loss, **options)
        self._step += 1
        now = time.perf_counter()
        if self._step == self._job.steps or now - self._last_report >= _PROGRESS_INTERVAL_S:
            self._last_report = now
            rate = self._step / max(now - self._begin, 1e-9)
            send(self._channel, step=self._step, loss=loss.item(), steps_per_s=rate)

    def _from_memory(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        if not isinstance(loader.dataset, LeRobotDataset):
            raise RuntimeError(f"lerobot-train passed a {type(loader.dataset).__name__}; use in_memory=False.")
        return DataLoader(
            InMemoryDataset(loader.dataset, image_shift=self._job.image_shift),
            batch_size=loader.batch_size,
            sampler=loader.sampler,
            collate_fn=_already_collated,
            pin_memory=loader.pin_memory,
        )


def check_start_weights(policy: PreTrainedPolicy, policy_path: str) -> None:
    """Refuses a policy that does not hold the weights of its folder.

    LeRobot's loader for π0 continues with random weights when a file is missing or does not match.

    Args:
        policy: The policy as lerobot-train made it.
        policy_path: Folder it was made from; Hub ids are not checked here.

    Raises:
        RuntimeError: If a tensor of the file is missing in the policy or differs.
    """
    file = Path(policy_path) / "model.safetensors"
    if not file.is_file():
        return
    state = policy.state_dict()
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118  a safetensors file is no mapping
            if name not in state or not torch.equal(stored.get_tensor(name).to(state[name]), state[name]):
                raise RuntimeError(f"LeRobot did not load '{name}' from {file}; the folder does not fit its config.")


def train_config(job: SftJob) -> TrainPipelineConfig:
    """lerobot-train's configuration of a job; nothing is logged online, pushed or evaluated."""
    policy = PreTrainedConfig.from_pretrained(job.policy_path)
    policy.pretrained_path = job.policy_path
    policy.device = job.device
    policy.push_to_hub = False
    workers = 0 if job.in_memory else job.num_workers
    return TrainPipelineConfig(
        dataset=DatasetConfig(
            repo_id=job.repo_id, root=job.dataset_root, use_imagenet_stats=False, video_backend="pyav"
        ),
        policy=policy,
        output_dir=Path(job.output_dir),
        job_name="sft",
        seed=job.seed,
        num_workers=workers,
        dataloader_multiprocessing_context="fork" if sys.platform == "linux" else "spawn",
        batch_size=job.batch_size,
        steps=job.steps,
        env_eval_freq=0,
        log_freq=max(1, job.steps // 10),
        save_freq=0,
        use_policy_training_preset=False,
        optimizer=AdamWConfig(lr=job.learning_rate, weight_decay=job.weight_decay, grad_clip_norm=job.grad_clip_norm),
        scheduler=CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=job.warmup_steps, num_decay_steps=job.steps, peak_lr=job.learning_rate, decay_lr=0.0
        ),
    )


def send(channel: TextIO, **message: Any) -> None:
    """Writes one message to the parent process."""
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def run(job: SftJob, channel: TextIO) -> Path:
    """Trains and returns lerobot-train's checkpoint folder."""
    config = train_config(job)
    dtype = getattr(config.policy, "dtype", "float32")
    precision = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "no")
    train(config, SftAccelerator(job, channel, mixed_precision=precision))
    return (Path(job.output_dir) / "checkpoints" / "last").resolve() / "pretrained_model"


def main() -> None:
    """Waits for one job on standard input (an empty input: none will come); messages go to the given descriptor."""
    channel = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    # lerobot-train looks for options on the command line; there are none.
    sys.argv = ["lerobot-train"]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    line = sys.stdin.readline()
    if line.strip():
        send(channel, checkpoint=str(run(SftJob(**json.loads(line)), channel)))


def _shifted(images: Tensor, largest: int) -> Tensor:
    """Each image (3, h, w) of a batch moved by up to ``largest`` pixels; the border is repeated."""
    height, width = images.shape[-2:]
    padded = pad(images, (largest,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * largest + 1, (len(images), 2)).tolist()
    return torch.stack(
        [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)]
    )


def _already_collated(batch: Any) -> Any:
    return batch


if __name__ == "__main__":
    main()
