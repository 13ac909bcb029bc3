"""What the README names exists, and its Python example fits the API."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

from pi_rl import FlowPPOConfig, FlowPPOTrainer, RecipeArguments

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
OPTIONS = {field.name for kind in (FlowPPOConfig, RecipeArguments) for field in dataclasses.fields(kind)} | {"config"}


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:recipes|docs|scripts)/[\w/.]+\.(?:py|yaml|md|png|gif)", TEXT)))
)
def test_named_files_exist(path):
    assert (ROOT / path).is_file()


def test_named_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_named_options_exist():
    launchers = {"config_file", "num_processes", "help"}
    # of other commands: pi-rl eval, plan, push, report and train, hf download
    commands = {"device_memory_gb", "episodes", "local", "open", "policy", "private", "repo", "resume"}
    for option in set(re.findall(r"--(\w+)", TEXT)) - launchers - commands:
        assert option in OPTIONS, option


def test_the_python_example_fits_the_api():
    calls = {
        node.func.id: node
        for block in PYTHON
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    config = {keyword.arg: ast.literal_eval(keyword.value) for keyword in calls["FlowPPOConfig"].keywords}
    assert FlowPPOConfig(**config, use_cpu=True).num_minibatches == 4
    names = {keyword.arg for keyword in calls["FlowPPOTrainer"].keywords}
    assert names <= set(inspect.signature(FlowPPOTrainer).parameters)
