"""Access tokens appear in nothing that is shown or written."""

from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from pi_rl.arguments import ArgumentsError, changed_settings, dump_config, launch_command, parse_recipe_arguments
from pi_rl.cli.main import main
from pi_rl.cli.parser import UserError, parse_mapping
from pi_rl.secrets import redacted

TOKEN = "hf_" + "aB3" * 11 + "z"


@dataclass
class Recipe(TrainingArguments):
    """A recipe with a mapping, in which a user may put anything."""

    env_options: dict[str, str] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token={TOKEN}, {TOKEN}.", "token=hf_***, hf_***."),
        (f"https://user:{TOKEN}@huggingface.co/a/b", "https://user:hf_***@huggingface.co/a/b"),
        ("hf_oauth_eyJhbGci.eyJzdWIi.c2ln-x", "hf_***"),
        ("outputs/hf_pi0liberospatialsft/policy", "outputs/hf_pi0liberospatialsft/policy"),
        ("hf_transfer, hf_model_of_a_long_name, my_hf_folder", "hf_transfer, hf_model_of_a_long_name, my_hf_folder"),
        ("", ""),
    ],
)
def test_tokens_become_asterisks_and_other_words_stay(text, shown):
    assert redacted(text) == shown


def test_values_of_secret_variables_are_hidden_whatever_they_look_like(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_short1")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SOME_PASSWORD", "abc")
    assert redacted("hf_short1 0123456789abcdef abc") == "hf_*** *** abc"


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", TOKEN],
        [f"--hub_token={TOKEN}"],
        ["--hub-token", TOKEN],
        ["--hub_token", "secret-of-another-hub"],
        ["--env_options", f"{{token: {TOKEN}}}"],
        ["--push_to_hub_token=secret-of-another-hub", "--use_cpu"],
        ["--wandb_api_key", "secret-of-another-hub"],
    ],
)
def test_a_shown_command_has_no_token(words):
    shown = launch_command("recipes/ppo.py", ["--seed", "3", *words, "--output_dir", "run"])
    assert TOKEN not in shown
    assert "secret" not in shown
    assert "***" in shown
    assert "--seed 3" in shown
    assert "--output_dir run" in shown


def test_a_token_option_without_a_value_hides_no_other_option():
    assert launch_command("r.py", ["--hub_token", "--seed", "3"]).endswith("r.py --hub_token --seed 3")


def test_a_written_configuration_has_no_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "y")
    words = ["--output_dir", str(tmp_path), "--hub_token", TOKEN, "--use_cpu", "--run_name", f"mine {TOKEN[:-1]}y"]
    instances = parse_recipe_arguments((Recipe,), argv=[*words, "--env_options", f"{{key: {TOKEN}}}"])
    assert (instances[0].hub_token, instances[0].env_options) == (TOKEN, {"key": TOKEN})
    path = tmp_path / "config.yaml"
    dump_config(instances, path)
    text = path.read_text()
    assert "hf_" + TOKEN[3:8] not in text
    assert "key: hf_***" in text
    assert "mine hf_***" in text
    assert changed_settings(instances, path) == []


def test_folders_are_written_as_they_are(tmp_path, monkeypatch):
    """A run is resumed from what is written; a variable's value may be a part of a folder's name by chance."""
    monkeypatch.setenv("SOME_PASSWORD", "liberospatial")
    output_dir = str(tmp_path / "hf_pi0liberospatialsft" / "run")
    path = tmp_path / "config.yaml"
    dump_config(parse_recipe_arguments((Recipe,), argv=["--output_dir", output_dir, "--use_cpu"]), path)
    (again,) = parse_recipe_arguments((Recipe,), argv=["--config", str(path)])
    assert again.output_dir == output_dir


def test_a_value_that_was_not_written_has_to_be_given_again(tmp_path):
    path = tmp_path / "config.yaml"
    words = ["--env_options", f"{{key: {TOKEN}, size: big}}"]
    dump_config(parse_recipe_arguments((Recipe,), argv=["--output_dir", "run", "--use_cpu", *words]), path)
    with pytest.raises(ArgumentsError, match=r"env_options in .*config.yaml has \*\*\* .* Give --env_options again"):
        parse_recipe_arguments((Recipe,), argv=["--config", str(path)])
    (again,) = parse_recipe_arguments((Recipe,), argv=["--config", str(path), *words])
    assert again.env_options == {"key": TOKEN, "size": "big"}
    assert changed_settings([again], path) == []


@pytest.mark.parametrize(
    "words",
    [
        [f"--{TOKEN}", "1"],
        [TOKEN],
        ["--num_train_epochs", TOKEN],
        ["--env_options", f"[{TOKEN}"],
        ["--hub_tokn", TOKEN],
    ],
)
def test_messages_about_options_have_no_token(words, tmp_path):
    with pytest.raises(ArgumentsError) as error:
        parse_recipe_arguments((Recipe,), argv=["--output_dir", str(tmp_path), *words])
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize("words", [[TOKEN], [f"{{a: [{TOKEN}}}"]])
def test_messages_of_commands_have_no_token(words):
    with pytest.raises(UserError, match=r"hf_\*\*\*") as error:
        parse_mapping(words, "--env_options")
    assert TOKEN not in str(error.value)


def test_what_a_command_prints_about_its_options_has_no_token(capsys):
    assert main(["eval", "--policy", TOKEN, "--hub_token", TOKEN]) == 2
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
