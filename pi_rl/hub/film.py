"""The film of a run: one initial state before and after reinforcement learning."""

from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils.memory import clear_device_cache

from pi_rl.hub.videos import side_by_side, write_video
from pi_rl.policies.actor_critic import FlowActorCritic
from pi_rl.rollout.evaluator import record_episode
from pi_rl.rollout.policy_io import fit_prompt
from pi_rl.trainer.build import build_actor_critic, load_model
from pi_rl.trainer.sharding import is_sharded

DRAWN_PER_SECOND, SHOWN_PER_SECOND = 40, 10


def film_timing(fps: int) -> tuple[int, float]:
    """Which steps are drawn and how much slower than real time they are shown.

    Args:
        fps: Control steps per second of simulated time.

    Returns:
        Steps between frames, and the slowdown, at least 1.
    """
    every = max(1, fps // DRAWN_PER_SECOND)
    return every, max(1.0, fps / every / SHOWN_PER_SECOND)


def film_before_after(
    trainer: Any, sft_path: str | Path, trained_path: str | Path, before: Any, after: Any, path: Path
) -> Path:
    """Films one initial state with the policy that RL started from and the trained one, side by side.

    It is the first of the evaluation's states that the one fails and the other solves; if there is none, the first.

    Args:
        trainer: A trained trainer.
        sft_path: Checkpoint that RL started from.
        trained_path: The trained policy as it was saved; read where the trainer's model is spread over processes.
        before: Its evaluation.
        after: The trained policy's evaluation on the same states.
        path: MP4 file to write.

    Returns:
        ``path``.
    """
    turned = np.flatnonzero(~before.success & after.success)
    reset_id = before.reset_ids[turned[0] if len(turned) else 0]
    spec = trainer.env.spec
    every, slower = film_timing(spec.fps)
    sources = (sft_path, trained_path if is_sharded(trainer.actor_critic) else None)
    clips = [_clip(trainer, source, reset_id, every) for source in sources]
    (first, first_success), (second, second_success) = clips
    frames = side_by_side(
        first,
        second,
        success_before=first_success,
        success_after=second_success,
        steps_per_frame=every,
        caption=spec.instruction(*reset_id.tolist()) + (f" ({slower:g}x slower)" if slower > 1 else ""),
    )
    return write_video(frames, path, fps=spec.fps / every / slower)


def _clip(trainer: Any, source: str | Path | None, reset_id: np.ndarray, every: int) -> tuple[np.ndarray, bool]:
    """One episode of a policy folder, or of the trainer's own model; what was loaded for it is freed."""
    model = trainer.actor_critic if source is None else _load(trainer, source)
    try:
        return record_episode(model, trainer.env, trainer.io, reset_id, seed=trainer.args.eval_seed, every=every)
    finally:
        del model
        clear_device_cache(garbage_collection=True)


def _load(trainer: Any, path: str | Path) -> FlowActorCritic:
    loaded = load_model(path, trainer.args, None)
    model = build_actor_critic(loaded, trainer.args)
    fit_prompt(model.policy, loaded.preprocessor, trainer.env.spec)
    return model.to(trainer.args.device)
