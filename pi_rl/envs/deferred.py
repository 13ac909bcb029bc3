"""Chunks of simulations that run in the calling process: started ones wait until they are finished."""

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pi_rl.envs.vector_env import NO_CHUNK, ChunkResult, EnvSpec, VectorEnv, check_actions, check_active


class DeferredVectorEnv(VectorEnv):
    """Keeps started chunks and simulates each when it is finished: nothing overlaps, the results are the same.

    A subclass marks environments with a running episode in `_running`, resets with a look at `_busy`, and defines
    `_simulate` in place of `start_chunk` and `finish_chunk`.

    Args:
        spec: Description of the environment.
        num_envs: B, at least 1.

    Raises:
        ValueError: A count below 1.
    """

    def __init__(self, spec: EnvSpec, num_envs: int):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.spec = spec
        self.num_envs = num_envs
        self._running = np.zeros(num_envs, bool)
        self._busy = np.zeros(num_envs, bool)
        self._chunks: deque[tuple[NDArray[np.bool_], NDArray[np.float32]]] = deque()

    @abstractmethod
    def _check_open(self) -> None:
        """Raises RuntimeError once the environment was closed."""

    @abstractmethod
    def _simulate(self, going: NDArray[np.bool_], actions: NDArray[np.float32]) -> ChunkResult:
        """Executes checked actions (B, C, A) in the environments `going`, bool (B,), an array of its own."""

    @property
    def pending_chunks(self) -> int:
        """Chunks that were started and not finished."""
        return len(self._chunks)

    def start_chunk(
        self, actions: NDArray[np.float32], active: NDArray[np.bool_] | Sequence[bool] | None = None
    ) -> None:
        """Keeps a chunk for `finish_chunk`; see `VectorEnv.start_chunk`."""
        self._check_open()
        going = check_active(active, self._running, self._busy)
        checked = check_actions(actions, going, self.spec.action_dim, self.spec.max_episode_steps)
        self._busy |= going
        self._chunks.append((going, checked.copy()))

    def finish_chunk(self) -> ChunkResult:
        """Executes the chunk that was started first; see `VectorEnv.finish_chunk`."""
        self._check_open()
        if not self._chunks:
            raise RuntimeError(NO_CHUNK)
        going, actions = self._chunks.popleft()
        self._busy &= ~going
        return self._simulate(going, actions)
