"""Recipe options on top of transformers.TrainingArguments: same values as HfArgumentParser gives, help, round trip."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, TrainingArguments

from pi_rl.arguments import INHERITED_GROUP, dump_config, parse_recipe_arguments


@dataclass
class Config(TrainingArguments):
    """Redeclares one inherited field and adds one."""

    learning_rate: float = field(default=1e-5, metadata={"group": "PPO", "help": "step size"})
    clip_range: float = field(default=0.2, metadata={"group": "PPO", "help": "ratio clip"})


@dataclass
class Plain(TrainingArguments):
    """For HfArgumentParser, which knows no groups."""

    learning_rate: float = 1e-5
    clip_range: float = 0.2


WORDS = (
    *("--use_cpu", "--eval_strategy", "no", "--save_strategy=epoch", "--lr_scheduler_type", "cosine"),
    *("--lr_scheduler_kwargs", '{"num_cycles": 0.25}', "--optim", "adamw_torch", "--report_to", "none"),
    *("--warmup_steps", "3", "--no_dataloader_pin_memory", "--label_names", "a", "b", "--learning-rate", "1e-4"),
    *("--save_total_limit", "2", "--include_num_input_tokens_seen", "no", "--seed", "7", "--clip_range", "0.1"),
)


def parse(*words: str) -> Any:
    return parse_recipe_arguments((Config,), argv=list(words))[0]


def state(config: Any) -> dict[str, Any]:
    """All fields as plain values."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}


def test_same_values_as_hf_argument_parser(tmp_path: Path) -> None:
    words = ("--output_dir", str(tmp_path), *WORDS)
    (expected,) = HfArgumentParser(Plain).parse_args_into_dataclasses(list(words))
    assert state(parse(*words)) == state(expected)


def test_inherited_options_only_in_the_full_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse("--help_all")
    full = capsys.readouterr().out
    inherited = len(dataclasses.fields(TrainingArguments)) - 1
    assert "--gradient_accumulation_steps" not in short
    assert f"{inherited} options of {INHERITED_GROUP}" in short
    assert "(default: 1e-05)" in short, "a redeclared option is ours"
    assert (
        full.index("--clip_range") < full.index(f"\n{INHERITED_GROUP}\n") < full.index("--gradient_accumulation_steps")
    )


def test_dump_holds_ours_and_what_was_changed(tmp_path: Path) -> None:
    config = parse("--output_dir", str(tmp_path / "run"), "--hub_token", "secret", *WORDS)
    path = tmp_path / "config.yaml"
    dump_config((config,), path)
    text = path.read_text()
    assert "secret" not in text
    again = parse("--config", str(path))
    assert state(again) | {"hub_token": "secret"} == state(config)
    for untouched in ("accelerator_config", "fsdp", "per_device_eval_batch_size", "logging_strategy", "debug"):
        assert f"{untouched}:" not in text


def test_dump_of_defaults_is_short(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    dump_config((parse("--output_dir", "run", "--use_cpu"),), path)
    keys = {line.partition(":")[0] for line in path.read_text().splitlines() if line and not line.startswith("#")}
    assert keys == {"learning_rate", "clip_range", "output_dir", "use_cpu", "dataloader_pin_memory", "disable_tqdm"}
