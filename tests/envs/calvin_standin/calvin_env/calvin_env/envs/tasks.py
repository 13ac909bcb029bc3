"""The judge of subtasks."""

from functools import partial


class Tasks:
    def __init__(self, tasks):
        self.tasks = {name: partial(getattr(self, kind), *arguments) for name, (kind, *arguments) in tasks.items()}

    def get_task_info_for_set(self, start_info, end_info, task_filter):
        start, end = start_info["scene_info"], end_info["scene_info"]
        return {name for name in task_filter if self.tasks[name](start, end)}

    @staticmethod
    def move_door_rel(joint, threshold, start, end):
        moved = end["doors"][joint]["current_state"] - start["doors"][joint]["current_state"]
        return moved * threshold > threshold**2

    @staticmethod
    def toggle_light(light, before, after, start, end):
        return (start["lights"][light]["logical_state"], end["lights"][light]["logical_state"]) == (before, after)

    @staticmethod
    def rotate_object(name, angle, start, end):
        turned = end["movable_objects"][name]["current_orn"][2] - start["movable_objects"][name]["current_orn"][2]
        return turned * angle > angle**2
