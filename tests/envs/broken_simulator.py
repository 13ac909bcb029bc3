"""A simulator in numpy that breaks down, waits, or takes its process with it on request.

The second action component says how, and so do state ids from 83 up: those below 90 the first time only.
"""

import os
import pathlib
import signal
import time

import numpy as np


def leave(how):
    """Ends or blocks the worker process: 3 kills it, 4 leaves it, 5 hangs."""
    if how == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == 4:
        print("the simulator's library gave up", flush=True)
        os._exit(4)
    while how == 5:
        time.sleep(0.05)


def first_time():
    """Whether this is asked for the first time, by whatever process."""
    try:
        pathlib.Path(os.environ["COUNTER_ONCE"]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class CounterSim:
    """Adds up the first action component; solved at 3, over at -3."""

    made = 0

    def __init__(self, task):
        CounterSim.made += 1
        self.number, self.task = CounterSim.made, task
        self.steps, self.reward, self.total, self.over = 0, 0.0, 0.0, False

    def reset(self, state_id):
        if state_id == 99 or (state_id == 13 and self.number == 1):
            raise RuntimeError("this simulator cannot start here")
        if state_id in (93, 94, 95):
            leave(state_id - 90)
        if state_id in (83, 84, 85) and first_time():
            leave(state_id - 80)
        self.steps, self.reward, self.total, self.over = 0, 0.0, 0.1 * state_id, False

    def step(self, action):
        how = int(action[1])
        if how == 7:
            raise ZeroDivisionError("the physics exploded")
        leave(how)
        time.sleep(0.9 * (how == 2))
        while how == 6 and not os.path.exists(os.environ["COUNTER_GATE"]):
            time.sleep(0.001)
        self.steps += 1
        self.total += np.nan if how == 8 else float(action[0])
        self.reward = np.inf if how == 9 else float(action[0])
        self.over = self.total <= -3
        return self.total >= 3

    @property
    def state(self):
        return np.array([self.total, self.number], np.float32)

    def draw(self, images):
        for i, image in enumerate(images.values()):
            image[...] = 10 * self.steps + i

    def frame(self, height, width, *, show_arm):
        leave(3 if height == 3 else 0)
        return np.full((height, width, 3), self.steps, np.uint8)

    def close(self):
        pass


class CounterBackend:
    max_idle = 1

    def __init__(self, tasks, options):
        self.tasks = tasks
        if "missing" in options:
            raise FileNotFoundError(f"{options['missing']} is missing; run this command")
        if "start" in options:
            leave(options["start"])
        if "restart" in options and not first_time():
            leave(options["restart"])

    def make(self, task):
        return CounterSim(task)

    def expert_action(self, sim):
        if sim.total == 1.5:
            raise OSError("the expert lost its way")
        return np.array([1.0 if sim.total < 3 else 0.0, 0.0, 0.0], np.float32)

    def close(self):
        pass
