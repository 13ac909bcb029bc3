import json

import pytest
from huggingface_hub import ModelCard

from pi_rl.hub.model_card import write_model_card
from pi_rl.hub.plots import plot_learning_curve

COMMAND = "accelerate launch recipes/ppo_flow_noise.py --seed 0"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"type": "pi0_small", "num_inference_steps": 4}))
    return folder


def write(folder, results, **options):
    return write_model_card(
        folder, results, env_name="metaworld:handle-press-v3", reproduce_command=COMMAND, **options
    )


def test_metadata_is_read_back_by_the_hub_library(folder, results):
    data = ModelCard.load(write(folder, results)).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("lerobot", "robotics", "apache-2.0")
    assert {"pi_rl", "flow-matching", "reinforcement-learning"} <= set(data.tags)
    overall, *tasks = data.eval_results
    assert overall.metric_value == pytest.approx(results.rl.success_rate)
    assert overall.dataset_name == "metaworld:handle-press-v3"
    assert [task.dataset_name for task in tasks] == list(results.rl.per_task)


def test_metadata_holds_groups_and_their_mean(folder, grouped_results):
    _, *parts = ModelCard.load(write(folder, grouped_results)).data.eval_results
    assert [part.dataset_name for part in parts] == ["mean of groups", "easy", "hard", "press", "pull", "lift"]
    assert [part.metric_value for part in parts[:3]] == [0.75, 1.0, 0.5]


def test_card_tells_numbers_command_and_limits(folder, results):
    text = write(folder, results).read_text()
    for part in (
        "0.500 [",
        "0.800 [",
        COMMAND,
        "4 denoising steps",
        "40 fixed initial states",
        "lerobot 0.6.1",
        "Simulation only",
    ):
        assert part in text
    assert "{{" not in text
    assert "{%" not in text


def test_picture_and_video_are_copied_beside_the_card(folder, results, history, tmp_path):
    curve = plot_learning_curve(history, tmp_path / "learning_curve.png")
    video = tmp_path / "before_after.mp4"
    video.write_bytes(b"video")
    text = write(folder, results, learning_curve=curve, video=video).read_text()
    assert "(learning_curve.png)" in text
    assert "(before_after.mp4)" in text
    assert (folder / "learning_curve.png").read_bytes() == curve.read_bytes()
    assert (folder / "before_after.mp4").read_bytes() == b"video"


def test_missing_picture_is_an_error_and_leaves_no_card(folder, results, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        write(folder, results, learning_curve=tmp_path / "none.png")
    assert not (folder / "README.md").exists()


def test_blind_run_and_lost_gain_are_named(folder, make_results):
    text = write(folder, make_results(before=0.8, after=0.5, blind=True)).read_text()
    assert "Blind control" in text
    assert "did not help" in text


def test_base_model_needs_its_licence_and_is_recorded(folder, results):
    with pytest.raises(ValueError, match="licence"):
        write(folder, results, base_model="lerobot/pi0_base")
    card = ModelCard.load(write(folder, results, base_model="lerobot/pi0_base", license="gemma", dataset="me/demos"))
    assert (card.data.base_model, card.data.license, card.data.datasets) == ("lerobot/pi0_base", "gemma", "me/demos")
    assert "very small network" not in card.text


def test_a_folder_without_policy_is_refused(tmp_path, results):
    with pytest.raises(ValueError, match=r"config\.json"):
        write(tmp_path, results)


def test_other_seeds_are_listed(folder, results, make_results):
    text = write(folder, results, other_runs=[make_results(seed) for seed in range(3)]).read_text()
    assert "| flow_noise | camera | 2 |" in text


def test_a_card_names_the_algorithm_lora_and_reward(folder, results):
    results.config.update(algorithm="GRPO", lora_rank=32, env_options={"reward": "structured"})
    options = {"env_name": "metaworld:reach-v3", "reproduce_command": "accelerate launch recipes/grpo_flow_sde.py"}
    card = write_model_card(folder, results, **options)
    assert "grpo" in ModelCard.load(card).data.tags
    text = card.read_text()
    assert "learned by GRPO" in text
    assert "PPO" not in text
    assert "LoRA of rank 32" in text
    assert "the environment's structured reward" in text
    assert "and a critic" not in text
