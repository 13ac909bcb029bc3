import json

import pytest
from huggingface_hub import ModelCard

from pi_rl.hub.checkpoint_card import write_checkpoint_card
from pi_rl.hub.push_contents import with_card
from tests.hub.runs import evaluation_entry, full_history, write_run


def checkpoint(folder, step=None, iteration=None, history=None, kind="pi0_small"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"type": kind, "num_inference_steps": 4}))
    if step is not None:
        state = {"global_step": step, "log_history": history or []}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        counters = {"algorithm": "PPO", "env_steps": 1000 * iteration, "episodes": 9, "iteration": iteration}
        (folder / "rl_state.json").write_text(json.dumps(counters))
        (folder / "pi_rl_config.yaml").write_text("num_iterations: 6\nnoise: flow_sde\n")  # as every saved policy
    return folder


def test_an_evaluated_checkpoint_carries_the_evaluation_of_its_weights(tmp_path):
    run = write_run(tmp_path / "run")
    card = ModelCard.load(write_checkpoint_card(checkpoint(run / "checkpoint-12", 12, 3), repo_id="me/policy"))
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("lerobot", "robotics", "apache-2.0")
    assert {"reinforcement-learning", "ppo", "metaworld"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_name) == (0.6, "metaworld:press-v3,pull-v3")
    assert result.metric_args == {
        "episodes": 40,
        "wilson_95": [0.5, 0.7],
        "training_seed": 1,
        "evaluation_seed": 3,
    }
    assert "| 0 | 0 | 0.500 [0.40, 0.60] | 40 | an earlier state |" in card.text
    assert "| 3 | 3,000 | 0.600 [0.50, 0.70] | 40 | these |" in card.text
    assert "a checkpoint after iteration 3 of 6" in card.text
    assert 'load_policy("me/policy"' in card.text
    assert "metaworld 3.0.0" in card.text  # as recorded by the run


def test_an_evaluation_of_other_weights_is_listed_but_not_claimed(tmp_path):
    run = write_run(tmp_path / "run")
    card = ModelCard.load(write_checkpoint_card(checkpoint(run / "checkpoint-16", 16, 4)))
    assert card.data.eval_results is None
    assert card.text.count("an earlier state") == 2
    assert "| these |" not in card.text


def test_later_evaluations_are_not_a_checkpoints(tmp_path):
    run = write_run(tmp_path / "run", history=[*full_history(), evaluation_entry(24, 6000.0, 0.9)])
    text = write_checkpoint_card(checkpoint(run / "checkpoint-8", 8, 2)).read_text()
    assert "0.900" not in text
    assert "0.500" in text


def test_without_evaluation_it_says_so(tmp_path):
    run = write_run(tmp_path / "run", history=[])
    card = ModelCard.load(write_checkpoint_card(checkpoint(run / "checkpoint-4", 4, 1)))
    assert "No evaluation yet" in card.text
    assert card.data.eval_results is None


def test_a_checkpoint_without_its_run_is_described_by_its_own_files(tmp_path):
    history = [evaluation_entry(12, 3000.0, 0.6)]
    card = ModelCard.load(write_checkpoint_card(checkpoint(tmp_path / "downloaded", 12, 3, history, kind="pi05")))
    assert "0.600 [0.50, 0.70]" in card.text
    assert "a checkpoint after iteration 3 of 6** of PPO" in card.text
    assert "which began from a policy that was not recorded" in card.text
    assert "scripted" not in card.text
    assert "Versions: not recorded" in card.text  # those here are not those of the run
    assert "pi-rl train" not in card.text
    assert card.data.license == "gemma"


def test_any_policy_folder_gets_an_honest_card(tmp_path):
    card = ModelCard.load(write_checkpoint_card(checkpoint(tmp_path / "mine", kind="pi0")))
    assert "Nothing more is recorded" in card.text
    assert "No evaluation yet" in card.text
    assert card.data.license == "gemma"


def test_the_policy_of_a_finished_run_gets_the_full_card(results, tmp_path):
    run = write_run(tmp_path / "run", results=results, video=True)
    policy = checkpoint(run / "policy")
    (policy / "pi_rl_config.yaml").write_text("num_iterations: 6\n")
    card = ModelCard.load(write_checkpoint_card(policy))
    assert "Success rose from **0.500** to **0.800**" in card.text
    assert card.data.eval_results[0].metric_value == 0.8
    assert (policy / "before_after.mp4").is_file()


def test_the_start_of_a_finished_run_carries_the_evaluation_before(results, tmp_path):
    run = write_run(tmp_path / "run", results=results)
    card = ModelCard.load(write_checkpoint_card(checkpoint(run / "sft")))
    assert card.data.eval_results[0].metric_value == 0.5
    assert "0.800" not in card.text
    assert "imitation-learning" in card.data.tags


def test_tokens_and_folders_stay_out(tmp_path):
    token = "hf_" + "d4" * 17
    run = write_run(
        tmp_path / "run", config=f"hub_token: {token}\noutput_dir: {tmp_path}/run\nmodel: {tmp_path}/start\n"
    )
    text = write_checkpoint_card(checkpoint(run / "checkpoint-4", 4, 1)).read_text()
    assert token not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.parametrize("name", ["config.json", "rl_state.json", "trainer_state.json"])
def test_a_damaged_checkpoint_is_refused_and_no_card_appears(tmp_path, name, content):
    folder = checkpoint(tmp_path / "checkpoint-4", 4, 1)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        write_checkpoint_card(folder)
    assert not (folder / "README.md").exists()


def test_what_is_no_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        write_checkpoint_card(tmp_path)


def test_a_run_without_records_yet_leaves_the_checkpoints_own(tmp_path):
    folder = checkpoint(tmp_path / "checkpoint-4", 4, 1)
    text = write_checkpoint_card(folder, run_folder=tmp_path / "checkpoint-4" / "..").read_text()
    assert "a checkpoint after iteration 1 of 6** of PPO" in text
    copied = checkpoint(tmp_path / "elsewhere" / "copy", 4, 1)
    (tmp_path / "new").mkdir()
    assert "No evaluation yet" in write_checkpoint_card(copied, run_folder=tmp_path / "new").read_text()


def test_a_pushed_checkpoint_is_described_by_the_log_of_its_run(tmp_path):
    """Its own Trainer's state has forgotten the evaluation before training, and has no versions."""
    run = write_run(tmp_path / "run")
    folder = checkpoint(run / "checkpoint-12", 12, 3)
    (folder / "model.safetensors").write_bytes(b"weights")
    text = with_card(folder, "me/policy").read_text()
    assert "| 0 | 0 | 0.500 [0.40, 0.60] | 40 | an earlier state |" in text
    assert "metaworld 3.0.0" in text
