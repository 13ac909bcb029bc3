import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pi_rl.trainer.sft import SftProcess, run_sft, worker_environment

REPO_ID = "local/handle-press"


@pytest.fixture(scope="module")
def dataset_root(tmp_path_factory):
    """Two MetaWorld episodes."""
    from pi_rl.demonstrations import collect_demonstrations
    from pi_rl.envs.registry import make_env

    root = tmp_path_factory.mktemp("data") / "demos"
    with make_env("metaworld:handle-press-v3", 1, 1, image_size=32, fast_rendering=True, hide_arm=True) as env:
        collect_demonstrations(env, episodes_per_task=2, output_dir=root, repo_id=REPO_ID, noise_std=0.3)
    return root


@pytest.fixture(scope="module")
def dataset(dataset_root):
    from lerobot.datasets import LeRobotDataset

    window = {"action": [k / 80 for k in range(5)], "observation.state": [-1 / 80, 0.0]}
    return LeRobotDataset(REPO_ID, root=dataset_root, delta_timestamps=window, video_backend="pyav")


@pytest.fixture(scope="module")
def finetuned(dataset_root, small_pi0_folder, tmp_path_factory):
    """Three steps of the real lerobot-train; the folder and what it reported."""
    output = tmp_path_factory.mktemp("sft") / "policy"
    reports = []
    run_sft(
        small_pi0_folder,
        dataset_root,
        REPO_ID,
        output,
        steps=3,
        batch_size=4,
        progress=lambda *report: reports.append(report),
    )
    return output, reports


@pytest.mark.slow
def test_finetuned_folder_loads_and_acts(finetuned, dataset):
    from pi_rl.policies.checkpoints import load_policy

    loaded = load_policy(finetuned[0], device="cpu")
    item = dataset[0]
    batch = loaded.preprocessor(
        {
            "observation.image": item["observation.image"][None],
            "observation.state": item["observation.state"][-1:],
            "task": [item["task"]],
        }
    )
    action = loaded.postprocessor(loaded.policy.predict_action_chunk(batch))
    assert action.shape == (1, 5, 4)
    assert torch.isfinite(action).all()


@pytest.mark.slow
def test_weights_moved_from_the_start_policy(finetuned, small_pi0_folder):
    before, after = (load_file(folder / "model.safetensors") for folder in (small_pi0_folder, finetuned[0]))
    assert set(before) == set(after)
    change = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert 1e-6 < change < 0.1


@pytest.mark.slow
def test_statistics_of_the_dataset_are_in_the_processors(finetuned, dataset):
    from pi_rl.policies.checkpoints import load_policy

    loaded = load_policy(finetuned[0], device="cpu")
    expected = torch.as_tensor(dataset.meta.stats["action"]["mean"], dtype=torch.float32)
    restored = loaded.postprocessor(torch.zeros(1, 1, 4))
    torch.testing.assert_close(restored[0, 0], expected)


@pytest.mark.slow
def test_folder_carries_its_tokenizer_and_no_foreign_paths(finetuned, dataset_root, small_pi0_folder):
    output = finetuned[0]
    assert (output / "tokenizer.json").read_bytes() == (small_pi0_folder / "tokenizer.json").read_bytes()
    for file in output.glob("*.json"):
        assert str(dataset_root) not in file.read_text()
        assert str(small_pi0_folder) not in file.read_text()
    assert json.loads((output / "train_config.json").read_text())["optimizer"]["type"] == "adamw"
    assert [path.name for path in output.parent.iterdir()] == ["policy"]


@pytest.mark.slow
def test_every_run_reports_its_last_step(finetuned):
    step, steps, text = finetuned[1][-1]
    assert (step, steps) == (3, 3)
    assert text.startswith("loss ")


def test_memory_serves_the_items_of_the_dataset(dataset):
    from pi_rl.trainer.sft_worker import InMemoryDataset

    memory = InMemoryDataset(dataset)
    assert len(memory) == len(dataset)
    batch = memory.__getitems__(range(len(dataset)))
    for i in range(len(dataset)):
        expected = dataset[i]
        assert set(batch) == set(expected)
        for key, value in expected.items():
            if isinstance(value, str):
                assert batch[key][i] == value
            else:
                assert torch.equal(batch[key][i], value), key
                assert batch[key].dtype == value.dtype


def test_schedule_optimizer_and_data_are_what_was_asked_for(dataset_root, small_pi0_folder, tmp_path):
    from pi_rl.trainer.sft import SftJob
    from pi_rl.trainer.sft_worker import train_config

    config = train_config(
        SftJob(
            policy_path=str(small_pi0_folder),
            dataset_root=str(dataset_root),
            repo_id=REPO_ID,
            output_dir=str(tmp_path / "run"),
            steps=100,
            batch_size=8,
            learning_rate=2e-3,
            final_learning_rate=1e-4,
            warmup_steps=10,
            weight_decay=0.0,
            adam_beta2=0.95,
            grad_clip_norm=1.0,
            seed=3,
            device="cpu",
            bf16=False,
            in_memory=True,
            num_workers=4,
            revision=None,
            episodes=[0],
            resume_from=None,
            save_every_steps=0,
        )
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = config.optimizer.build([parameter])
    scheduler = config.scheduler.build(optimizer, config.steps)
    rates = []
    for _ in range(config.steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert int(np.argmax(rates)) == 10
    assert max(rates) == pytest.approx(2e-3, rel=0.03)
    assert rates[-1] == pytest.approx(1e-4, rel=0.05)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert (config.num_workers, config.seed, config.policy.push_to_hub, config.wandb.enable) == (0, 3, False, False)
    assert config.dataset.episodes == [0]


def test_start_weights_that_lerobot_did_not_load_are_refused(small_policy, small_pi0_folder, tmp_path):
    from safetensors.torch import save_file

    from pi_rl.trainer.sft_worker import check_start_weights

    policy = small_policy().policy
    check_start_weights(policy, small_pi0_folder)
    stored = load_file(small_pi0_folder / "model.safetensors")
    for prefix in ("model.", ""):  # openpi's files lack the prefix and keep the tied embedding under the head's name
        tied = {name.removeprefix("model.") if not prefix else name: tensor for name, tensor in stored.items()}
        save_file({name: tensor for name, tensor in tied.items() if "expert.lm_head" not in name},
                  tmp_path / "model.safetensors")  # fmt: skip
        check_start_weights(policy, tmp_path)
    lost = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
    save_file({name: tensor for name, tensor in stored.items() if name != lost and "lm_head" not in name},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(RuntimeError, match=r"embed_tokens.*start at random"):
        check_start_weights(policy, tmp_path)
    with torch.no_grad():
        policy.model.action_out_proj.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="action_out_proj"):
        check_start_weights(policy, small_pi0_folder)


@pytest.fixture
def pretend_dataset(tmp_path):
    (tmp_path / "data" / "meta").mkdir(parents=True)
    (tmp_path / "data" / "meta" / "info.json").write_text("{}")
    return tmp_path / "data"


def test_bad_arguments_are_refused_before_a_process_starts(small_pi0_folder, pretend_dataset, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"meta/info\.json"):
        run_sft(small_pi0_folder, tmp_path, REPO_ID, output, steps=1)
    with pytest.raises(ValueError, match="steps=0"):
        run_sft(small_pi0_folder, pretend_dataset, REPO_ID, output, steps=0)
    with pytest.raises(ValueError, match="not a LeRobot policy folder"):
        run_sft(pretend_dataset, pretend_dataset, REPO_ID, output, steps=1)
    with pytest.raises(ValueError, match="already exists"):
        run_sft(small_pi0_folder, pretend_dataset, REPO_ID, pretend_dataset, steps=1)
    assert not output.exists()


@pytest.fixture
def failing_worker(monkeypatch, tmp_path):
    """A worker process that ends at once with a message."""
    script = tmp_path / "worker.py"
    script.write_text("import sys; sys.stdin.readline(); sys.exit('the dataset is on fire')")
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: start([sys.executable, str(script)], **options)
    )


def test_a_failure_shows_the_end_of_the_log_and_leaves_nothing(
    failing_worker, small_pi0_folder, pretend_dataset, tmp_path
):
    with pytest.raises(RuntimeError, match="exit code 1[^$]*the dataset is on fire"):
        run_sft(small_pi0_folder, pretend_dataset, REPO_ID, tmp_path / "new" / "out", steps=1)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_process_is_used_once(failing_worker, small_pi0_folder):
    from pi_rl.trainer.sft import SftJob

    job = SftJob(**dict.fromkeys(SftJob.__dataclass_fields__))
    with SftProcess() as process:
        for message in ("on fire", "used before"):
            with pytest.raises(RuntimeError, match=message):
                process.run(job)


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    from pi_rl.trainer.sft import last_checkpoint
    from pi_rl.trainer.sft_worker import keep_last_checkpoint

    folder = tmp_path / "run" / "checkpoints"
    assert last_checkpoint(tmp_path) is None
    (folder / "000002").mkdir(parents=True)
    assert last_checkpoint(tmp_path) is None  # killed while the first was written
    (folder / "last").symlink_to("000002")
    (folder / "000004").mkdir()
    assert last_checkpoint(tmp_path) == folder / "000002"  # killed while the second was written
    (folder / "last").unlink()
    assert last_checkpoint(tmp_path) == folder / "000004"  # killed while the link was moved
    (folder / "last").symlink_to("000004")
    keep_last_checkpoint(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["000004", "last"]


@pytest.mark.parametrize("link", ["000003", None])
def test_a_resumed_run_begins_with_its_checkpoint_alone(tmp_path, link):
    """One that was half written when the run was killed is never taken for the newest, wherever it is killed again."""
    from types import SimpleNamespace

    from pi_rl.trainer.sft import last_checkpoint
    from pi_rl.trainer.sft_worker import remove_unfinished_checkpoints

    folder = tmp_path / "run" / "checkpoints"
    for name in ("000003", "000007") if link else ("000001", "000003"):
        (folder / name).mkdir(parents=True)
    if link:
        (folder / "last").symlink_to(link)
    remove_unfinished_checkpoints(SimpleNamespace(resume_from=str(last_checkpoint(tmp_path))))
    assert sorted(path.name for path in folder.iterdir()) == ["000003", "last"]
    (folder / "000005").mkdir()  # this one is complete, and the run is killed while the link is moved
    (folder / "last").unlink()
    assert last_checkpoint(tmp_path) == folder / "000005"


def test_worker_stands_outside_of_any_launcher(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", "kept")
    env = worker_environment(2, datasets_cache=tmp_path)
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU", "TORCHELASTIC_RUN_ID"} & set(env)
    assert (env["HF_HOME"], env["OMP_NUM_THREADS"], env["HF_DATASETS_CACHE"]) == ("kept", "2", str(tmp_path))
    joined = worker_environment(2, datasets_cache=None)
    assert {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} <= set(joined)


def test_importing_the_stages_loads_no_torch():
    code = (
        "import sys, pi_rl.demonstrations, pi_rl.trainer.sft, pi_rl.sft_recipe\n"
        "import pi_rl.hub.results, pi_rl.hub.plots, pi_rl.hub.videos, pi_rl.hub.model_card\n"
        "print({'torch', 'lerobot', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
