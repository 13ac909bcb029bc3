"""Rules of the subtasks. Its imports cannot be had, as in the real file."""

from calvin_agent.evaluation.utils import temp_seed  # noqa: F401

task_categories = {
    "move_slider_left": 1,
    "move_slider_right": 1,
    "open_drawer": 2,
    "close_drawer": 2,
    "turn_on_lightbulb": 3,
    "turn_off_lightbulb": 3,
    "turn_on_led": 4,
    "turn_off_led": 4,
    "rotate_red_block_right": 5,
    "rotate_red_block_left": 5,
}

tasks = {
    "move_slider_left": [{"condition": {"slider": "right", "grasped": 0}, "effect": {"slider": "left"}}],
    "move_slider_right": [{"condition": {"slider": "left", "grasped": 0}, "effect": {"slider": "right"}}],
    "open_drawer": [{"condition": {"drawer": "closed"}, "effect": {"drawer": "open"}}],
    "close_drawer": [{"condition": {"drawer": "open"}, "effect": {"drawer": "closed"}}],
    "turn_on_lightbulb": [{"condition": {"lightbulb": 0}, "effect": {"lightbulb": 1}}],
    "turn_off_lightbulb": [{"condition": {"lightbulb": 1}, "effect": {"lightbulb": 0}}],
    "turn_on_led": [{"condition": {"led": 0}, "effect": {"led": 1}}],
    "turn_off_led": [{"condition": {"led": 1}, "effect": {"led": 0}}],
    "rotate_red_block_right": [{"condition": {"red_block": ["table", "slider_left"]}, "effect": {"grasped": 0}}],
    "rotate_red_block_left": [
        {"condition": {"red_block": "table"}, "effect": {"red_block": "table"}},
        {"condition": {"red_block": "slider_right"}, "effect": {"red_block": "slider_right"}},
    ],
}


def get_sequences(num_sequences=1000, num_workers=None):
    possible_conditions = {
        "led": [0, 1],
        "lightbulb": [0, 1],
        "slider": ["right", "left"],
        "drawer": ["closed", "open"],
        "red_block": ["table", "slider_right", "slider_left"],
        "blue_block": ["table", "slider_right", "slider_left"],
        "pink_block": ["table", "slider_right", "slider_left"],
        "grasped": [0],
    }
    raise RuntimeError(f"takes minutes: {possible_conditions}")
