"""`pi-rl plan` from its command line."""

import json
import re

import pytest

from pi_rl.cli.main import main

CONFIG = "recipes/configs/metaworld/quickstart_ci.yaml"


def planned(capsys, *words):
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_json_and_text_say_the_same(capsys, monkeypatch):
    from pi_rl.planning import plan as module

    plans = []
    make = module.make_plan
    monkeypatch.setattr(module, "make_plan", lambda *args: plans.append(make(*args)) or plans[-1])
    told = json.loads(
        planned(
            capsys,
            "--config",
            CONFIG,
            "--num-gpus",
            "2",
            "--device-memory-gb",
            "0.5",
            "--json",
            "--assume",
            "kernel_us=7",
        )
    )
    assert (told["fits"], told["num_gpus"], told["device_memory"]) == (False, 2, 0.5e9)
    assert told["memory"]["device"]["peak"] == plans[0].memory.device.peak
    assert told["memory"]["automatic"] in ("host", "recompute", "device")
    assert {entry["name"]: entry["value"] for entry in told["assumptions"]}["kernel_us"] == 7
    assert told["flops_per_row"]["encode"] > told["flops_per_row"]["update_forward"] > 0

    from pi_rl.planning.report import plan_text

    text = plan_text(plans[0])
    assert text.startswith("DOES NOT FIT: 2 GPUs, data parallel")
    assert "kernel_us=7 µs" in text
    assert "gradient buckets" in text
    assert "update: forward" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "no.yaml"], "no.yaml is neither a file nor the name"),
        ([], "--config"),
        (["--config", CONFIG, "--num_gpus", "0"], "from 1 up"),
        (["--config", CONFIG, "--device_memory_gb", "much"], "number of gigabytes"),
        (["--config", CONFIG, "--assume", "speed=3"], "'speed' is no assumption|'speed' is not an assumption"),
        (["--config", CONFIG, "--learning_rat", "1"], "learning_rate"),
        (["--config", CONFIG, "--num_gpus", "3"], "num_envs=.* cannot be shared equally by 3 GPUs"),
        (["--config", CONFIG, "--model", "someone/policy"], "--model_type pi0"),
    ],
)
def test_what_the_user_can_put_right_is_said(capsys, words, message):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert re.search(message, error), error


def test_help_lists_the_options(capsys):
    assert main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--num_gpus", "--device_memory_gb", "--assume", "--json", "--shard"))
    assert main(["--help"]) == 0
    assert "  plan " in capsys.readouterr().out
