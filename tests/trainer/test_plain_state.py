"""A checkpoint's state in safetensors and JSON: bit for bit what it was, and no pickle."""

import json
import random
import zipfile

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from pi_rl.trainer.plain_state import (
    generator_states,
    read_optimizer,
    read_scheduler,
    restore_generators,
    write_optimizer,
    write_scheduler,
)


def draws():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()]


def test_generators_go_on_where_they_were():
    draws()  # leaves half of a pair of normal numbers in Python's and NumPy's generators
    states = json.loads(json.dumps(generator_states()))
    expected = [draws() for _ in range(700)]  # more words than a state of the Mersenne twister has
    draws()
    restore_generators(states)
    assert [draws() for _ in range(700)] == expected


def optimizer_after_steps(steps):
    torch.manual_seed(1)
    layers = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)]
    groups = [{"params": layer.parameters(), "lr": 0.1 / (n + 3), "name": f"g{n}"} for n, layer in enumerate(layers)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), amsgrad=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 7))
    for _ in range(steps):
        layers[1](layers[0](torch.randn(5, 3))).square().sum().backward()
        optimizer.step()
        scheduler.step()
    return optimizer, scheduler


def test_an_optimiser_and_its_schedule_are_read_as_they_were(tmp_path):
    optimizer, scheduler = optimizer_after_steps(3)
    write_optimizer(tmp_path, optimizer.state_dict())
    write_scheduler(tmp_path, scheduler.state_dict())
    written, read = optimizer.state_dict(), read_optimizer(tmp_path)
    assert read["param_groups"] == written["param_groups"]
    assert isinstance(read["param_groups"][0]["betas"], tuple)
    assert read["state"].keys() == written["state"].keys()
    for index, entries in written["state"].items():
        assert read["state"][index].keys() == entries.keys()
        for name, value in entries.items():
            assert read["state"][index][name].dtype == value.dtype
            assert torch.equal(read["state"][index][name], value)
    assert read_scheduler(tmp_path) == scheduler.state_dict()
    other, _ = optimizer_after_steps(1)
    other.load_state_dict(read)
    assert other.state_dict()["param_groups"] == written["param_groups"]


def test_state_that_only_pickle_could_hold_is_refused(tmp_path):
    optimizer, _ = optimizer_after_steps(1)
    optimizer.param_groups[0]["hook"] = object()
    with pytest.raises(ValueError, match="cannot hold the optimiser's hook, a object"):
        write_optimizer(tmp_path, optimizer.state_dict())


def test_a_damaged_optimiser_is_refused(tmp_path):
    optimizer, _ = optimizer_after_steps(1)
    write_optimizer(tmp_path, optimizer.state_dict())
    (tmp_path / "optimizer.json").write_text('{"state": {}, "group": {}}')
    with pytest.raises(ValueError, match="do not fit together"):
        read_optimizer(tmp_path)


class Draws(TrainerCallback):
    """Uses the global generators, as a user's code may, and keeps what it drew."""

    def __init__(self):
        self.drawn = []

    def on_step_end(self, args, state, control, **kwargs):
        self.drawn.append((state.global_step, draws()))


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_a_run_resumes_from_any_iteration_to_the_bit(toy_trainer, assert_same_end, tmp_path, iteration, monkeypatch):
    straight, again = Draws(), Draws()
    options = {"eval_every_iterations": 2, "normalize_rewards": True}
    toy_trainer(tmp_path / "straight", [straight], **options).train()
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load reads pickles"))
    trainer = toy_trainer(tmp_path / "again", [again], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{4 * iteration}"))
    assert again.drawn == straight.drawn[4 * iteration :]
    assert_same_end(tmp_path / "straight", tmp_path / "again")


def test_a_checkpoint_holds_what_it_takes_to_go_on_and_no_pickle(toy_trainer, tmp_path):
    toy_trainer(num_iterations=1).train()
    folder = tmp_path / "run" / "checkpoint-4"
    files = {path.name for path in folder.iterdir()}
    assert {
        "config.json", "model.safetensors", "critic.safetensors", "noise_network.safetensors", "rl_state.json",
        "pi_rl_config.yaml", "trainer_state.json", "optimizer.safetensors", "optimizer.json", "scheduler.json",
        "rng_state_0.json",
    } <= files  # fmt: skip
    assert {name.rpartition(".")[2] for name in files} == {"json", "safetensors", "yaml"}
    assert not any(zipfile.is_zipfile(path) for path in folder.iterdir())  # as torch.save writes
    state = json.loads((folder / "rl_state.json").read_text())
    assert state["env"] == {"name": "toy:point-mass", "options": {"max_episode_steps": 8}}
    assert set(state["files"]) == files
    assert yaml.safe_load((folder / "pi_rl_config.yaml").read_text())["rollout_chunks"] == 4
    assert load_file(folder / "optimizer.safetensors")


def test_a_resumed_run_takes_its_own_learning_rate(toy_trainer, tmp_path):
    toy_trainer(num_iterations=2, save_every_iterations=1).train()
    rates = {}
    for rate in (1e-3, 1e-4):
        trainer = toy_trainer(tmp_path / f"again{rate}", num_iterations=2, learning_rate=rate)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        state = json.loads((tmp_path / f"again{rate}" / "checkpoint-8" / "trainer_state.json").read_text())
        rates[rate] = [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry][-1]
    assert rates[1e-4] == pytest.approx(rates[1e-3] / 10)
