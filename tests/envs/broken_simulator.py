"""A simulator in numpy that breaks down, or waits, on request: the second action component says how."""

import os
import time

import numpy as np


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
        self.steps, self.reward, self.total, self.over = 0, 0.0, 0.1 * state_id, False

    def step(self, action):
        how = int(action[1])
        if how == 7:
            raise ZeroDivisionError("the physics exploded")
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
        return np.full((height, width, 3), self.steps, np.uint8)

    def close(self):
        pass


class CounterBackend:
    max_idle = 1

    def __init__(self, tasks, options):
        self.tasks = tasks
        if "missing" in options:
            raise FileNotFoundError(f"{options['missing']} is missing; run this command")

    def make(self, task):
        return CounterSim(task)

    def expert_action(self, sim):
        if sim.total == 1.5:
            raise OSError("the expert lost its way")
        return np.array([1.0 if sim.total < 3 else 0.0, 0.0, 0.0], np.float32)

    def close(self):
        pass
