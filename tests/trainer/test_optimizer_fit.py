"""A checkpoint whose optimiser or schedule is not this run's is refused before anything of it is loaded."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from pi_rl.trainer.checkpoint_folders import CheckpointError, DamagedCheckpointError

SGD_GROUP = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0.0, "nesterov": False, "maximize": False}


def tensors(change):
    """Changes the optimiser's tensors in place."""

    def act(folder):
        stored = load_file(folder / "optimizer.safetensors")
        change(stored)
        save_file(stored, folder / "optimizer.safetensors")

    return act


def values(name, change):
    """Changes what a JSON file holds in place."""

    def act(folder):
        stored = json.loads((folder / name).read_text())
        change(stored)
        (folder / name).write_text(json.dumps(stored))

    return act


def without_last_parameter(folder):
    """As of a run that trains one parameter less."""
    count = len([key for key in load_file(folder / "optimizer.safetensors") if key.endswith(".exp_avg")])

    def forget(stored):
        stored["state"].pop(str(count - 1), None)
        for group in stored["group"].values():
            group["params"] = [index for index in group["params"] if index != count - 1]

    tensors(lambda stored: [stored.pop(key) for key in list(stored) if key.startswith(f"state.{count - 1}.")])(folder)
    values("optimizer.json", forget)(folder)


def as_sgd_writes(stored):
    for group in stored["group"].values():
        kept = {name: group[name] for name in ("params", "name", "initial_lr")}
        group.clear()
        group.update(**SGD_GROUP, **kept)


CHANGES = {
    "another shape": (
        tensors(lambda stored: stored.update({"state.1.exp_avg": torch.zeros(3, 5)})),
        r"optimizer\.safetensors has exp_avg of \S+ \(parameter 1\) with shape \(3, 5\); this run needs \(",
    ),
    "a step for each element": (
        tensors(lambda stored: stored.update({"state.0.step": torch.ones(4)})),
        r"has step of \S+ \(parameter 0\) with shape \(4,\); this run needs \(\)",
    ),
    "an entry lacks": (
        tensors(lambda stored: stored.pop("state.2.exp_avg_sq")),
        r"has exp_avg, step of \S+ \(parameter 2\); this run's AdamW needs exp_avg_sq",
    ),
    "entries of SGD": (
        tensors(lambda stored: [stored.update({f"{key}_buffer": stored.pop(key)}) for key in list(stored)]),
        r"has exp_avg_buffer, exp_avg_sq_buffer, step_buffer of \S+ \(parameter 0\); this run's AdamW needs exp_avg",
    ),
    "a number for a tensor": (
        lambda folder: (
            tensors(lambda stored: stored.pop("state.0.exp_avg"))(folder),
            values("optimizer.json", lambda stored: stored["state"]["0"].update(exp_avg=3))(folder),
        ),
        r"has exp_avg=3 of \S+ \(parameter 0\); this run's AdamW needs a tensor",
    ),
    "a parameter less": (without_last_parameter, "optimizer.json is of other trained parameters than this run's: "),
    "groups of SGD": (
        values("optimizer.json", as_sgd_writes),
        r"optimizer\.json holds settings with which this run's AdamW cannot make a step \(KeyError: 'betas'\)",
    ),
    "no lambdas": (
        values("scheduler.json", lambda stored: stored.pop("lr_lambdas")),
        r"scheduler\.json cannot be loaded into this run's LambdaLR \(KeyError: 'lr_lambdas'\)",
    ),
    "a learning rate more": (
        values("scheduler.json", lambda stored: stored["_last_lr"].append(0.1)),
        r"scheduler\.json has _last_lr=\[.*this run's optimiser has 4 groups",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_optimiser_or_schedule_is_refused_with_nothing_loaded(finished, toy_trainer, name):
    """Also by automatic resume: the checkpoint is not damaged, and an older one would not fit any better."""
    change, message = CHANGES[name]
    change(finished / "checkpoint-8")
    trainer = toy_trainer(num_iterations=3)
    before = {key: value.clone() for key, value in trainer.actor_critic.state_dict().items()}
    generators = random.getstate(), torch.get_rng_state()
    for asked in (str(finished / "checkpoint-8"), True):
        with pytest.raises(CheckpointError, match=message) as error:
            trainer.train(resume_from_checkpoint=asked)
        assert not isinstance(error.value, DamagedCheckpointError)
        assert "Resume with the settings of that run" in str(error.value)
        assert all(value.equal(before[key]) for key, value in trainer.actor_critic.state_dict().items())
        assert trainer.optimizer is None
        assert trainer.lr_scheduler is None
        assert (trainer.env_steps, trainer.episodes, trainer.state.global_step) == (0, 0, 0)
        assert random.getstate() == generators[0]
        assert torch.get_rng_state().equal(generators[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critic_hidden_sizes": [8]}, r"of value_head\.\S+ .* with shape \(16, \d+\); this run needs \(8, \d+\)"),
        (
            {"critic_hidden_sizes": [16, 16]},
            "2 in critic, 2 in critic_no_decay there, .* 3 in critic, 3 in critic_no_decay here",
        ),
        ({"noise": "flow_sde"}, r"8 in actor, .* there, \d in actor, .* here"),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9"},
            r"this run's SGD cannot make a step \(KeyError: 'momentum'\)",
        ),
    ],
    ids=["wider critic", "deeper critic", "another noise", "another optimiser"],
)
def test_other_settings_than_the_checkpoints_are_named(finished, toy_trainer, options, message):
    trainer = toy_trainer(num_iterations=3, **options)
    before = {key: value.clone() for key, value in trainer.actor_critic.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        trainer.train(resume_from_checkpoint=str(finished / "checkpoint-8"))
    assert all(value.equal(before[key]) for key, value in trainer.actor_critic.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"critic_warmup_iterations": 1},  # the policy has no state yet
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adagrad"},
        {"optim": "adafactor"},
        {"optim": "adamw_torch", "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_optimisers_and_schedules_of_every_kind_go_on(toy_trainer, assert_same_end, tmp_path, options):
    toy_trainer(tmp_path / "straight", num_iterations=2, **options).train()
    trainer = toy_trainer(tmp_path / "again", num_iterations=2, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert_same_end(tmp_path / "straight", tmp_path / "again", "checkpoint-8")
