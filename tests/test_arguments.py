"""Options of recipes: precedence, inheritance, conversion, help, errors, and writing a configuration out."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pi_rl.argument_values import ConfigLoader, convert_value
from pi_rl.arguments import (
    ArgumentsError,
    Program,
    changed_settings,
    dump_config,
    launch_command,
    parse_recipe_arguments,
)


class Storage(StrEnum):
    DEVICE = "device"
    HOST = "host"


@dataclass
class Policy:
    model: str | None = field(default=None, metadata={"group": "Model", "help": "folder of the policy"})
    sizes: dict[str, Any] = field(default_factory=dict, metadata={"group": "Model", "help": "sizes, 100 % free"})
    blind: bool = field(default=False, metadata={"group": "Environment", "help": "constant image"})
    video: bool = field(default=True, metadata={"group": "Result", "help": "film it"})


@dataclass
class Training:
    learning_rate: float = field(default=1e-3, metadata={"group": "PPO", "help": "step size"})
    hidden_sizes: list[int] = field(default_factory=lambda: [8, 4], metadata={"group": "PPO", "help": "layers"})
    target_kl: float | None = field(default=None, metadata={"group": "PPO", "help": "limit"})
    steps: int = field(default=10, metadata={"group": "PPO", "help": "steps"})
    storage: Storage = field(default=Storage.DEVICE, metadata={"group": "Rollout", "help": "where"})
    noise: Literal["flow_sde", "flow_noise"] = field(default="flow_sde", metadata={"group": "Flow", "help": "kind"})
    box: tuple[float, float] = field(default=(0.0, 1.0), metadata={"group": "Flow", "help": "bounds"})
    folder: Path = field(default=Path("outputs"), metadata={"group": "Result", "help": "folder"})
    report_to: str | list[str] | None = field(default=None, metadata={"group": "Result", "help": "loggers"})

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")


def parse(*words: str, **options: Any) -> tuple[Policy, Training]:
    return parse_recipe_arguments((Policy, Training), argv=list(words), **options)


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_defaults_without_anything() -> None:
    assert parse() == (Policy(), Training())


def test_command_line_over_config_over_recipe_defaults(write) -> None:
    config = write("run.yaml", "learning_rate: 2e-4\nsteps: 7\n")
    recipe_defaults = {"learning_rate": 5.0, "steps": 5, "target_kl": 0.5}
    _, training = parse("--config", str(config), "--steps", "3", defaults=recipe_defaults)
    assert (training.learning_rate, training.steps, training.target_kl) == (2e-4, 3, 0.5)


def test_default_config_is_replaced_by_config(write) -> None:
    default, other = write("default.yaml", "steps: 7\nblind: true\n"), write("other.yaml", "steps: 8\n")
    policy, training = parse(default_config=default)
    assert (policy.blind, training.steps) == (True, 7)
    policy, training = parse("--config", str(other), default_config=default)
    assert (policy.blind, training.steps) == (False, 8)


def test_base_files_are_relative_and_overridden(write) -> None:
    write("base.yaml", "steps: 2\nlearning_rate: 1e-2\nsizes: {a: 1, b: 2}\n")
    write("family/middle.yaml", "base: ../base.yaml\nsteps: 3\n")
    config = write("family/leaf.yaml", "base: middle.yaml\nsizes: {c: 3}\n")
    policy, training = parse("--config", str(config))
    assert (training.steps, training.learning_rate) == (3, 1e-2)
    assert policy.sizes == {"c": 3}, "a mapping replaces the base's as a whole"


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "1.0e-4", "0.0001", "1E-4", "+1e-4"])
def test_numbers_in_exponent_form(write, text: str) -> None:
    _, training = parse("--config", str(write("run.yaml", f"learning_rate: {text}\n")))
    assert training.learning_rate == 1e-4


def test_exponent_form_inside_untyped_mappings(write) -> None:
    policy, _ = parse("--config", str(write("run.yaml", "sizes: {rate: 1e-4, name: no, on: true}\n")))
    assert policy.sizes == {"rate": 1e-4, "name": "no", "on": True}
    policy, _ = parse("--sizes", "{rate: 1e-4, depth: 2}")
    assert policy.sizes == {"rate": 1e-4, "depth": 2}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--blind",), True),
        (("--blind", "true"), True),
        (("--blind=yes",), True),
        (("--blind", "false"), False),
        (("--no_blind",), False),
        (("--no-blind",), False),
    ],
)
def test_flags_on_the_command_line_override_the_file(write, words: tuple[str, ...], expected: bool) -> None:
    config = write("run.yaml", f"blind: {str(not expected).lower()}\n")
    policy, _ = parse("--config", str(config), *words)
    assert policy.blind is expected


def test_lists_tuples_choices_and_paths() -> None:
    _, training = parse("--hidden_sizes", "64", "32", "--box", "-1", "2.5", "--storage", "host", "--folder", "a/b")
    assert training.hidden_sizes == [64, 32]
    assert training.box == (-1.0, 2.5)
    assert training.storage is Storage.HOST
    assert training.folder == Path("a/b")
    assert parse("--hidden-sizes", "[64, 32]")[1].hidden_sizes == [64, 32]


def test_text_or_list_of_texts(write) -> None:
    assert parse("--report_to", "none")[1].report_to == "none"
    assert parse("--report_to", "wandb", "trackio")[1].report_to == ["wandb", "trackio"]
    assert parse("--config", str(write("run.yaml", "report_to: [wandb]\n")))[1].report_to == ["wandb"]


@pytest.mark.parametrize("text", ["none", "null", "None"])
def test_none_switches_an_optional_number_off(write, text: str) -> None:
    config = write("run.yaml", f"target_kl: {text}\n")
    assert parse("--config", str(config), defaults={"target_kl": 1.0})[1].target_kl is None
    assert parse("--target_kl", text, defaults={"target_kl": 1.0})[1].target_kl is None


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("1e6", int, 1_000_000),
        (3.0, int, 3),
        (2**60 + 1, int, 2**60 + 1),
        (str(2**60 + 1), int, 2**60 + 1),
        (1, float, 1.0),
        ("7", int | float, 7),
        (True, str | bool, True),
        (["1", "2"], tuple[int, ...], (1, 2)),
        ({"a": "1"}, dict[str, int], {"a": 1}),
        ("{a: 1}", dict | str | None, {"a": 1}),
        ("plain", dict | str | None, "plain"),
    ],
)
def test_conversions(value: object, hint: Any, expected: object) -> None:
    converted = convert_value(value, hint)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("x", float, "a number"),
        (True, float, "a number"),
        ("nan", float, "a number"),
        (1.5, int, "an integer"),
        ("inf", int, "an integer"),
        (1, bool, "true or false"),
        (3, str, "quotes"),
        (None, int, "an integer"),
        ("x", float | None, "a number or none"),
        ("maybe", Literal["a", "b"], "one of a, b"),
        ("maybe", Storage, "one of device, host"),
        (["1", "x"], list[int], "item 2 is 'x', and it must be an integer"),
        (["1"], tuple[int, int], "a list of 2 values"),
        ("1", list[int], "a list"),
        ("a", dict[str, int], "a mapping"),
        ({"a": "x"}, dict[str, int], "value of 'a' is 'x'"),
        ("x", ConfigLoader, "can only be given in Python"),
    ],
)
def test_conversion_errors(value: object, hint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_value(value, hint)


def test_bad_value_names_option_place_and_rule(write) -> None:
    with pytest.raises(ArgumentsError, match=r"learning_rate='fast' on the command line .* must be a number"):
        parse("--learning_rate", "fast")
    config = write("run.yaml", "steps: many\n")
    with pytest.raises(ArgumentsError, match=r"steps='many' in .*run\.yaml does not fit: it must be an integer"):
        parse("--config", str(config))


def test_unknown_names_get_the_nearest(write) -> None:
    with pytest.raises(ArgumentsError, match=r"--lerning_rate on the command line .*nearest: --learning_rate"):
        parse("--lerning_rate", "1")
    with pytest.raises(ArgumentsError, match=r"--lerning_rate on the command line .*nearest: --learning_rate"):
        parse("--lerning-rate=1")
    config = write("run.yaml", "hiden_sizes: [1]\n")
    with pytest.raises(ArgumentsError, match=r"hiden_sizes in .*run\.yaml .*nearest: hidden_sizes"):
        parse("--config", str(config))
    with pytest.raises(ArgumentsError, match=r"stepz in the recipe's defaults .*nearest: steps"):
        parse(defaults={"stepz": 1})


def test_abbreviations_stray_words_and_missing_values_are_refused() -> None:
    with pytest.raises(ArgumentsError, match="--learning on the command line is not an option"):
        parse("--learning", "1")
    with pytest.raises(ArgumentsError, match="'stray' on the command line belongs to no option"):
        parse("stray")
    with pytest.raises(ArgumentsError, match="expected one argument"):
        parse("--steps")


def test_errors_of_the_class_are_passed_on() -> None:
    with pytest.raises(ArgumentsError, match="steps=0 must be at least 1"):
        parse("--steps", "0")


def test_missing_required_option() -> None:
    @dataclass
    class Required:
        output: str

    with pytest.raises(ArgumentsError, match="output is required: give --output TEXT"):
        parse_recipe_arguments((Required,), argv=[])


def test_classes_that_do_not_fit_together() -> None:
    @dataclass
    class Second:
        steps: int = 1

    @dataclass
    class Reserved:
        config: str = ""

    with pytest.raises(TypeError, match="Training and Second both have a field 'steps'"):
        parse_recipe_arguments((Training, Second), argv=[])
    with pytest.raises(TypeError, match="reserved"):
        parse_recipe_arguments((Reserved,), argv=[])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1", "not valid YAML"),
        ("- steps", "must be a mapping"),
        ("3: 4", "must be a mapping"),
        ("steps: 1\nsteps: 2\n", "key 'steps' is there twice"),
        ("base: missing.yaml", r"missing\.yaml, named as base by .*run\.yaml, does not exist"),
        ("base: [a, b]", "one file name"),
        ("base: run.yaml", r"circle: .*run\.yaml -> .*run\.yaml"),
        ("without: [steps]", "must list keys that its base has: none"),
    ],
)
def test_bad_files(write, text: str, message: str) -> None:
    with pytest.raises(ArgumentsError, match=message):
        parse("--config", str(write("run.yaml", text)))


def test_a_file_leaves_out_what_it_does_not_inherit(write) -> None:
    write("base.yaml", "steps: 7\nlearning_rate: 0.5\n")
    path = write("run.yaml", "base: base.yaml\nwithout: [steps]\n")
    _, training = parse("--config", str(path))
    assert (training.steps, training.learning_rate) == (Training().steps, 0.5)
    path.write_text("base: base.yaml\nwithout: [step]\n")
    with pytest.raises(ArgumentsError, match=r"without=\['step'\] .* keys that its base has: steps, learning_rate"):
        parse("--config", str(path))


def test_missing_file_names_the_nearest(write) -> None:
    there = write("quickstart.yaml", "")
    with pytest.raises(ArgumentsError, match=r"does not exist\. Near it: .*quickstart\.yaml"):
        parse("--config", str(there.with_name("quickstrat.yaml")))
    assert parse("--config", str(there)) == (Policy(), Training()), "an empty file changes nothing"


def test_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help", description="What it does.", default_config=Path("recipes/x.yaml"))
    text = capsys.readouterr().out
    assert stop.value.code == 0
    titles = [
        line for line in text.splitlines() if line in ("Model", "Environment", "Result", "PPO", "Rollout", "Flow")
    ]
    assert titles == ["Model", "Environment", "Result", "PPO", "Rollout", "Flow"], "one title per topic, none repeated"
    for expected in ("What it does.", "recipes/x.yaml", "--learning_rate FLOAT", "100 % free", "(default: [8, 4])"):
        assert expected in text
    assert "--noise {flow_sde,flow_noise}" in text
    assert max(map(len, text.splitlines())) <= 119


def test_dump_and_read_back(tmp_path: Path) -> None:
    before = parse(
        *("--model", "1e-4", "--sizes", "{rate: 1e-05, name: 'no', none: null}", "--learning_rate", "1e-5"),
        *("--hidden_sizes", "3", "--storage", "host", "--box", "-1", "1", "--no_video", "--report_to", "a", "b"),
    )
    path = tmp_path / "config.yaml"
    dump_config(before, path)
    assert parse("--config", str(path)) == before
    plain = yaml.safe_load(path.read_text())
    assert set(plain) == {f.name for kind in (Policy, Training) for f in dataclasses.fields(kind)}
    assert plain["model"] == "1e-4"
    assert plain["sizes"]["name"] == "no"
    assert "# PPO\n" in path.read_text()
    assert list(tmp_path.iterdir()) == [path], "no partial file is left"


def test_dump_refuses_objects(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sizes=.* cannot be written .*object has no YAML form"):
        dump_config((Policy(sizes={"a": object()}),), tmp_path / "config.yaml")
    assert not list(tmp_path.iterdir())


def test_a_written_configuration_is_compared_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    assert changed_settings(parse("--hidden_sizes", "8", "4"), path) == []
    dump_config(parse("--hidden_sizes", "8", "4"), path)
    assert changed_settings(parse("--hidden_sizes", "8", "4"), path) == []
    assert changed_settings(parse("--hidden_sizes", "4", "8"), path)  # the order counts
    assert changed_settings(parse("--hidden_sizes", "8", "4", "--learning_rate", "1"), path) == [
        "learning_rate: 0.001",
        "learning_rate: 1.0",
    ]


def test_a_command_of_pi_rl_is_launched_only_where_there_are_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = ["--config", "/home/me/quickstart.yaml", "--seed", "1"]
    assert launch_command(Program("pi-rl train"), words) == "pi-rl train --config quickstart.yaml --seed 1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = launch_command(Program("pi-rl train"), words)
    assert command == "accelerate launch -m pi_rl train --config quickstart.yaml --seed 1"


def test_a_shown_command_names_no_folder_of_this_machine() -> None:
    words = (
        *("--config", "/home/me/pi_rl/quickstart.yaml", "--model=~/policies/mine", "--dataset_root", "../data"),
        *("--model", "lerobot/pi0_base", "--output_dir", "outputs/a b", "--env_options", "{image_size: 64}"),
        "root=/home/me/calvin",
    )
    assert launch_command("recipes/sft.py", words) == (
        "accelerate launch recipes/sft.py --config quickstart.yaml --model=mine --dataset_root data "
        "--model lerobot/pi0_base --output_dir 'outputs/a b' --env_options '{image_size: 64}' "
        "root=calvin"
    )


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, pi_rl.arguments; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
