"""What a worker process asks of a simulator; each benchmark implements it in a file of its own."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Images = Mapping[str, NDArray[np.uint8]]
"""Camera key to an array (height, width, 3) that is written in place."""


class Sim(Protocol):
    """One simulator of one task.

    A reset depends on nothing but its state id: state, images and everything that follows are the same to the bit,
    whatever was simulated before.

    Attributes:
        steps: Steps since the reset.
        reward: Of the last step; see `pi_rl.envs.rewards.TaskReward`.

    A simulator whose episodes can end without being solved has, besides, an attribute `over: bool`: no step of this
    episode follows. One that truncates episodes itself, time limit aside, says so in an attribute `cut: bool`.
    """

    steps: int
    reward: float

    def reset(self, state_id: int) -> None:
        """Starts the episode `state_id`, at least 0."""

    def step(self, action: NDArray[np.float32]) -> bool:
        """Executes one action (A,), clipped to the bounds; returns whether the task is solved: the episode's end."""
        ...

    @property
    def state(self) -> NDArray[np.float32]:
        """`observation.state`, float32 (state_dim,)."""
        ...

    def draw(self, images: Images) -> None:
        """Writes what every camera of the specification sees."""

    def frame(self, height: int, width: int, *, show_arm: bool) -> NDArray[np.uint8]:
        """Draws a frame for a video in full quality, uint8 (height, width, 3)."""
        ...

    def close(self) -> None:
        """Frees what the simulator alone holds; it is not used again."""


class Backend(Protocol):
    """All tasks of a vector environment inside one worker process.

    It is made from the task names and the options (a mapping). Files that are missing are reported there or in `make`.

    Attributes:
        max_idle: Simulators kept beside those in use; of more, the least recently used is closed.
    """

    max_idle: int

    def make(self, task: int) -> Any:
        """Makes one more `Sim` of the task with that index."""

    def expert_action(self, sim: Any) -> NDArray[np.float32]:
        """The scripted expert's action (A,) for the simulator's present state.

        Raises:
            ValueError: There is no expert for that task; the message names those that have one.
        """
        ...

    def close(self) -> None:
        """Frees everything."""
