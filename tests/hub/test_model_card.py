import json

import pytest
from huggingface_hub import ModelCard

from pi_rl.hub.card import for_repository
from pi_rl.hub.model_card import write_model_card
from pi_rl.hub.plots import plot_learning_curve
from pi_rl.rollout.summary import summarize_episodes

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


def with_type(folder, policy_type):
    (folder / "config.json").write_text(json.dumps({"type": policy_type, "num_inference_steps": 4}))
    return folder


def test_base_model_and_dataset_are_recorded(folder, results):
    options = {"base_model": "lerobot/pi0_base", "license": "mit", "dataset": "me/demos"}
    card = ModelCard.load(write(with_type(folder, "pi0"), results, **options))
    assert (card.data.base_model, card.data.license, card.data.datasets) == ("lerobot/pi0_base", "mit", "me/demos")
    assert "very small network" not in card.text


@pytest.mark.parametrize("given", [None, "other"])
@pytest.mark.parametrize(
    ("policy_type", "expected"),
    [("pi0", "gemma"), ("pi05", "gemma"), ("pi05_small", "apache-2.0"), ("strange", "other")],
)
def test_without_a_stated_licence_the_policy_type_decides(folder, results, policy_type, expected, given):
    card = ModelCard.load(write(with_type(folder, policy_type), results, base_model="me/base", license=given))
    assert card.data.license == expected
    assert (card.data.license_link == "https://ai.google.dev/gemma/terms") == (expected == "gemma")
    assert (card.data.license_name is not None) == (expected == "other")
    assert ("Gemma terms of use" in card.text) == (expected == "gemma")


def test_a_local_start_is_named_without_its_folder_and_its_card_tells_base_and_licence(folder, results, tmp_path):
    start = tmp_path / "my start"
    start.mkdir()
    (start / "README.md").write_text("---\nlicense: gemma\nbase_model: lerobot/pi0_base\n---\n# Start\n")
    card = ModelCard.load(write(with_type(folder, "strange"), results, base_model=str(start)))
    assert (card.data.license, card.data.base_model) == ("gemma", "lerobot/pi0_base")
    assert "`my start`" in card.text
    assert str(tmp_path) not in card.content
    (start / "README.md").write_text("---\n{: broken\n---\n")
    card = ModelCard.load(write(folder, results, base_model=str(start)))
    assert (card.data.license, card.data.base_model) == ("other", None)


def test_the_index_names_suite_episodes_interval_seeds_and_denoising_steps(folder, results):
    results.config.update(eval_seed=7)
    overall, *_ = ModelCard.load(write(folder, results)).data.eval_results
    assert (overall.dataset_type, overall.metric_type) == ("metaworld", "success_rate")
    assert overall.metric_args == {
        "episodes": 40,
        "wilson_95": [round(end, 4) for end in results.rl.ci95],
        "training_seed": 0,
        "evaluation_seed": 7,
        "denoising_steps": 4,
        "success_before_rl": 0.5,
    }


def test_average_length_of_sequences_is_in_the_index(folder, make_results):
    solved = summarize_episodes(["chain"] * 4, [False] * 3 + [True], [9.0] * 4, [0.0, 1.0, 3.0, 5.0], subtasks=5)
    success, length = ModelCard.load(write(folder, make_results(rl=solved))).data.eval_results
    assert (success.metric_type, success.metric_value) == ("success_rate", 0.25)
    assert (length.metric_type, length.metric_value) == ("average_length", 2.25)


def test_simulator_versions_stand_apart(folder, make_results):
    versions = {"lerobot": "0.6.1", "mujoco": "3.3.7", "metaworld": "3.0.0", "sapien": "not installed"}
    text = write(folder, make_results(versions=versions)).read_text()
    assert "| simulator | mujoco 3.3.7, metaworld 3.0.0 |" in text
    assert "Versions: lerobot 0.6.1." in text
    assert "sapien" not in text


def test_tokens_and_folders_of_this_machine_never_reach_a_card(folder, results):
    token = "hf_" + "a1" * 17
    configuration = f"hub_token: {token}\noutput_dir: /home/me/secret/outputs\nnote: '```'\n"
    options = {"configuration": configuration, "title": f"run {token}", "base_model": "/home/me/secret/start"}
    text = write(folder, results, **options).read_text()
    assert token not in text
    assert "hf_***" in text
    assert "/home" not in text
    assert "output_dir: outputs" in text
    assert "\n````yaml\n" in text


def test_names_cannot_break_a_table_or_add_tags(folder, make_results):
    rl = summarize_episodes(["a|b", "<b>c"], [True, False], [1.0, 1.0], [1.0, 0.0])
    text = write(folder, make_results(sft=rl, rl=rl)).read_text()
    assert "a\\|b" in text
    assert "| &lt;b>c |" in text


def test_a_card_finds_its_film_on_the_hub(folder, results, tmp_path):
    video = tmp_path / "before_after.mp4"
    video.write_bytes(b"video")
    address = "https://huggingface.co/me/policy/resolve/main/before_after.mp4"
    here = write(folder, results, video=video).read_text()
    assert 'src="before_after.mp4"' in here
    there = write(folder, results, video=video, repo_id="me/policy").read_text()
    assert f'src="{address}"' in there
    assert 'load_policy("me/policy"' in there
    assert for_repository(here, "me/policy") == there


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
