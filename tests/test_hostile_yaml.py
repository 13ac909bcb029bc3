"""YAML from others: no tag runs code, and a few lines cannot stand for more than a computer holds."""

import time

import pytest
import yaml

from pi_rl.argument_values import load_yaml
from pi_rl.arguments import ArgumentsError, parse_recipe_arguments
from pi_rl.cli.parser import UserError, parse_mapping
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def tags(canary):
    return [
        f"!!python/object/apply:os.system ['touch {canary}']",
        f"!!python/object/apply:subprocess.check_output [['touch', '{canary}']]",
        f"!!python/object/new:os.system ['touch {canary}']",
        "!!python/name:os.system",
        "!!python/module:os",
        f"!!python/object/apply:eval [\"open('{canary}', 'w')\"]",
    ]


@pytest.mark.parametrize("number", range(6))
def test_tags_that_run_code_are_refused(tmp_path, number):
    canary = tmp_path / "canary"
    text = tags(canary)[number]
    path = tmp_path / "pi_rl_config.yaml"
    path.write_text(f"output_dir: run\nseed: {text}\n")
    with pytest.raises(
        ArgumentsError, match=r"pi_rl_config.yaml is not valid YAML: could not determine a constructor"
    ):
        parse_recipe_arguments((FlowPPOConfig,), argv=["--config", str(path)])
    with pytest.raises(UserError, match="--env_options .* is not valid JSON or YAML: could not determine"):
        parse_mapping([f"image_size={text}"], "--env_options")
    assert not canary.exists()


def test_the_tags_do_run_code_without_the_safe_loader(tmp_path):
    """Else the test above would show nothing."""
    canary = tmp_path / "canary"
    yaml.load(tags(canary)[0], Loader=yaml.UnsafeLoader)
    assert canary.exists()


def test_aliases_count_as_what_they_stand_for():
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"more than 20,000 values, counting those that aliases repeat"):
        load_yaml(LAUGHS)
    assert time.monotonic() - began < 30
    assert load_yaml("a: &a {x: 1}\nb: [*a, *a]\n") == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a [*a]", "more than 20,000 values"),
        ("&a {b: *a}", "more than 20,000 values"),
        ("[" * 51 + "]" * 51, "nested more than 50 levels deep"),
        ("[" * 5000, "nested more than 50 levels deep"),
        ("{a: " * 5000, "nested more than 50 levels deep"),
        ("- " * 5000 + "a", "nested more than 50 levels deep"),
        ("9" * 5000, "Exceeds the limit"),
        ("2020-99-99", "month must be in"),
        ("a: 1\na: 2", "key 'a' is there twice"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: \x07", "special characters are not allowed"),
    ],
)
def test_what_no_configuration_needs_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_yaml(text)
    assert "\n" not in str(error.value)


def test_long_lists_and_many_keys_are_read():
    assert load_yaml(f"[{', '.join(map(str, range(5000)))}]") == list(range(5000))
    keys = {f"key{i}": i for i in range(3000)}
    assert load_yaml("\n".join(f"{key}: {value}" for key, value in keys.items())) == keys
