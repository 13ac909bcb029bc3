"""Scripted experts for LIBERO's pick-and-place tasks: they know where everything is, and make demonstrations."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pi_rl.envs.libero import LiberoSim

REACH_M = 0.05
"""Displacement of an action of 1."""
GAIN = 1.6
OPEN, CLOSED = -1.0, 1.0
CLOSE_STEPS, LOWER_STEPS, OPEN_STEPS = 9, 45, 5
NEAR_M = 0.012
LOST_M = 0.12


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one thing is brought to another.

    Attributes:
        thing: Body that is picked up.
        target: Body that it is put on or in.
        grip: Hand minus thing when the fingers close, metres; the fingers close along y.
        drop: Height of the hand over the target when they open, metres.
        clearance: Height of the hand above the higher of the two on the way, metres.
    """

    thing: str
    target: str
    grip: tuple[float, float, float]
    drop: float
    clearance: float = 0.15


def _bowl(side: float = -1.0, **changes: float) -> Plan:
    """A bowl held by the rim nearer to (side -1) or farther from the middle of the table, put on the plate."""
    return Plan("akita_black_bowl_1_main", "plate_1_main", (0.0, 0.045 * side, 0.025), drop=0.05, **changes)


PLANS = {
    "spatial-0": _bowl(),
    "spatial-1": _bowl(side=1.0),
    "spatial-2": _bowl(),
    "spatial-3": _bowl(),
    "spatial-5": _bowl(),
    "spatial-6": _bowl(side=1.0),
    "spatial-7": _bowl(),
    "spatial-8": _bowl(),
    "spatial-9": _bowl(clearance=0.35),
}
"""Tasks that have an expert."""


@dataclasses.dataclass
class Phase:
    """What the expert is doing.

    Attributes:
        name: One of above, down, close, lift, carry, lower, open.
        steps: Steps in it.
        grip: Last gripper command.
    """

    name: str = "above"
    steps: int = 0
    grip: float = OPEN

    def enter(self, name: str) -> None:
        """Begins a phase."""
        self.name, self.steps = name, 0


def expert_action(sim: "LiberoSim") -> NDArray[np.float32]:
    """The expert's action; once the task is solved it holds still.

    Args:
        sim: An active simulator after `reset`.

    Returns:
        float32 (7,) in [-1, 1].

    Raises:
        ValueError: The task has no expert.
    """
    name, phase = sim.scene.task.name, sim.expert
    if name not in PLANS:
        raise ValueError(f"LIBERO's task {name} has no scripted expert; there are experts of {', '.join(PLANS)}")
    action = np.zeros(7, np.float32)
    if not sim.solved:
        plan = PLANS[name]
        positions = {body: sim.data.body(body).xpos for body in (plan.thing, plan.target)}
        goal = _advance(phase, plan, sim.hand, positions[plan.thing], positions[plan.target])
        action[:3] = np.clip(GAIN * (goal - sim.hand) / REACH_M, -1.0, 1.0)
    action[6] = phase.grip
    return action


def _advance(
    phase: Phase, plan: Plan, hand: NDArray[np.float64], thing: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Moves on to the next phase where due and returns where the hand should go, (3,)."""
    grip = thing + plan.grip
    travel = max(thing[2], target[2]) + plan.clearance
    if phase.name in ("lift", "carry", "lower") and np.linalg.norm(hand - thing) > LOST_M:
        phase.enter("above")
    flat = np.linalg.norm((hand - grip)[:2])
    if phase.name == "above" and flat < NEAR_M:
        phase.enter("down")
    elif phase.name == "down" and np.linalg.norm(hand - grip) < NEAR_M:
        phase.enter("close")
    elif phase.name == "close" and phase.steps >= CLOSE_STEPS:
        phase.enter("lift")
    elif phase.name == "lift" and hand[2] > target[2] + plan.clearance - NEAR_M:
        phase.enter("carry")
    elif phase.name == "carry" and np.linalg.norm((thing - target)[:2]) < NEAR_M:
        phase.enter("lower")
    elif phase.name == "lower" and (hand[2] < target[2] + plan.drop + NEAR_M / 2 or phase.steps >= LOWER_STEPS):
        phase.enter("open")
    elif phase.name == "open" and phase.steps >= OPEN_STEPS:
        phase.enter("above")
    phase.steps += 1
    phase.grip = OPEN if phase.name in ("above", "down", "open") else CLOSED
    over = target + hand - thing  # where the hand is when the thing is over the target
    if phase.name == "above":
        return np.array([grip[0], grip[1], max(grip[2] + 0.08, hand[2] if flat > 0.1 else 0.0)])
    if phase.name in ("down", "close"):
        return grip
    if phase.name == "lift":
        return np.array([hand[0], hand[1], travel + 0.02])
    if phase.name == "carry":
        return np.array([over[0], over[1], target[2] + plan.clearance])
    return np.array([over[0], over[1], target[2] + plan.drop])
