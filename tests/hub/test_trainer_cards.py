"""Cards of policies that a trainer in somebody's own program trains: what they say, and that they stay true."""

import json
from importlib import metadata

import pytest
from huggingface_hub import ModelCard

from pi_rl import FlowPPOConfig, FlowPPOTrainer
from pi_rl.hub.push import push_folder

REPO = "user/policy"
ENV = "toy:point-mass"


@pytest.fixture
def make(mlp_folder, tmp_path):
    """Trainers on a toy that evaluate and save every iteration; they are closed at the end."""
    made = []

    def trainer(iterations, **options):
        args = FlowPPOConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            num_iterations=iterations,
            num_envs=4,
            rollout_chunks=2,
            per_device_train_batch_size=8,
            update_epochs=1,
            noise="flow_sde",
            critic_hidden_sizes=[8],
            env_workers=1,
            eval_episodes=4,
            eval_on_start=False,
            eval_every_iterations=1,
            save_every_iterations=1,
            disable_tqdm=True,
            hub_model_id=REPO,
            **options,
        )
        made.append(FlowPPOTrainer(str(mlp_folder), args, ENV, {"max_episode_steps": 8}))
        return made[-1]

    yield trainer
    for each in made:
        each.close()


def test_the_card_tells_start_environment_and_evaluation_and_no_recipe(hub_here, make, mlp_folder, tmp_path):
    trainer = make(2)
    trainer.train()
    assert trainer.push_to_hub().error is None
    text = hub_here.repos[REPO].files()["README.md"].decode()
    data = ModelCard(text).data
    rate = trainer.last_evaluation.summary().success_rate
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_value) == (ENV, round(rate, 4))
    assert "a checkpoint after iteration 2 of 2" in text
    assert f"which began from a policy of its maker's own, `{mlp_folder.name}`" in text
    assert f"pi-rl eval --policy {REPO} --env {ENV}" in text
    assert text.count("| these |") == 1
    for false in ("scripted demonstrations", "pi-rl train --config", "No evaluation yet", str(tmp_path)):
        assert false not in text
    state = json.loads((tmp_path / "run" / "policy" / "rl_state.json").read_text())
    assert state["start"] == str(mlp_folder)


def test_a_checkpoint_keeps_the_start_of_its_run_when_it_is_resumed(make, mlp_folder, tmp_path):
    make(1).train()
    args = make(2).args
    resumed = FlowPPOTrainer(str(tmp_path / "run" / "checkpoint-1"), args, ENV, {"max_episode_steps": 8})
    try:
        resumed.train(resume_from_checkpoint=True)
    finally:
        resumed.close()
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "rl_state.json").read_text())
    assert state["start"] == str(mlp_folder)


def test_a_policy_saved_by_hand_is_described_by_the_checkpoints_beside_it(hub_here, make, tmp_path):
    trainer = make(2)
    trainer.train()
    trainer.save_model(str(tmp_path / "run" / "policy"))
    outcome = push_folder(tmp_path / "run" / "policy", REPO)
    assert outcome.error is None, outcome.error
    text = hub_here.repos[REPO].files()["README.md"].decode()
    assert text.count("| these |") == 1
    assert "pi-rl train --config" not in text
    assert f"torch {metadata.version('torch')}" in text


def test_an_evaluation_of_an_older_state_is_not_claimed_for_a_later_policy(make, tmp_path):
    """The log on the disk ends with the last checkpoint; the policy beside it was trained further."""
    from pi_rl.hub.checkpoint_card import write_checkpoint_card

    trainer = make(2, save_total_limit=2)
    trainer.train()
    policy = tmp_path / "run" / "policy"
    trainer.save_model(str(policy))
    counters = json.loads((policy / "rl_state.json").read_text())
    (policy / "rl_state.json").write_text(json.dumps({**counters, "iteration": 7}))
    text = write_checkpoint_card(policy).read_text()
    assert "| these |" not in text
    assert ModelCard(text).data.eval_results is None


@pytest.mark.parametrize("changed", [False, True])
def test_a_second_push_renews_its_own_card_and_keeps_that_of_the_user(hub_here, make, tmp_path, changed):
    first = make(1)
    first.train()
    first.push_to_hub(license="mit")
    card = tmp_path / "run" / "policy" / "README.md"
    assert "a checkpoint after iteration 1" in card.read_text()
    if changed:
        card.write_text(card.read_text().replace("## Use", "Mine.\n\n## Use"))
    later = make(2)
    later.train(resume_from_checkpoint=True)
    later.push_to_hub(license="mit")
    text = hub_here.repos[REPO].files()["README.md"].decode()
    assert ("a checkpoint after iteration 2" in text) is not changed
    assert ("Mine." in text) is changed
    assert "license: mit" in text


def test_metadata_of_a_card_outlives_the_next_push(hub_here, make):
    trainer = make(1)
    trainer.train()
    trainer.push_to_hub(license="mit", tags="mine")
    trainer.push_to_hub()
    text = hub_here.repos[REPO].files()["README.md"].decode()
    data = ModelCard(text).data
    assert data.license == "mit"
    assert data.tags.count("mine") == 1
    assert text.count("written by pi_rl:") == 1
