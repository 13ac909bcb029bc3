"""LoRA: adapters and trained modules alone, as LeRobot loads them onto the base, and merged again."""

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_policy, make_pre_post_processors
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from pi_rl import FlowPPOConfig
from pi_rl.cli.main import main
from pi_rl.policies.checkpoints import ADAPTER_FOLDER, load_policy, save_policy
from pi_rl.policies.lora import add_lora, vlm_lora_config
from pi_rl.policies.pi import PiFlowPolicy
from pi_rl.policies.weight_files import INDEX_FILE, UNUSED_HEADS, WEIGHTS_FILE
from pi_rl.trainer.build import build_actor_critic


def convert(capsys, *words):
    """Runs the command and reads its JSON."""
    code = main(["convert", *map(str, words), "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out[told.out.index("{") :])


def refused(capsys, *words):
    """Runs the command and reads the message that it ends with."""
    assert main(["convert", *map(str, words)]) == 2
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    return told.err


def train(base, config=None, record=True):
    """A policy with adapters, everything that RL trains moved a little."""
    loaded = load_policy(base)
    policy = PiFlowPolicy(loaded.policy)
    add_lora(policy, config or vlm_lora_config(4, 6), loaded.origin if record else None)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable_parameters():
        parameter.data = parameter.data.float() + 0.02 * torch.randn(parameter.shape, generator=generator)
    policy.eval()
    return loaded


def save(loaded, folder):
    return save_policy(folder, loaded.policy, loaded.preprocessor, loaded.postprocessor)


def lerobots_own(folder):
    """Policy and processors as `lerobot-eval --policy.path` makes them."""
    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = Path(folder)
    cameras = {key: ft for key, ft in config.input_features.items() if "image" in key}
    features = {key: {"dtype": "image", "shape": ft.shape, "names": ["c", "h", "w"]} for key, ft in cameras.items()}
    sizes = {
        "observation.state": config.input_features["observation.state"],
        "action": config.output_features["action"],
    }
    features |= {key: {"dtype": "float32", "shape": ft.shape, "names": None} for key, ft in sizes.items()}
    dataset = types.SimpleNamespace(features=features, stats={})
    policy = make_policy(config, ds_meta=dataset).eval()
    overrides = {"tokenizer_processor": {"tokenizer_name": str(folder)}}
    return policy, *make_pre_post_processors(config, str(folder), preprocessor_overrides=overrides)


@pytest.fixture(scope="module")
def runs(policy_folders, tmp_path_factory):
    """Trained policies in memory, and their folders."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for kind, base in policy_folders.items():
        trained = train(base)
        found[kind] = (trained, save(trained, root / kind))
    return found


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_adapter_and_merged_act_as_the_trained_policy(capsys, runs, policy_folders, tools, tmp_path, kind):
    trained, run = runs[kind]
    live = tools.actions(trained.policy, trained.preprocessor, trained.postprocessor)
    assert (live - tools.actions_of(policy_folders[kind])).abs().max() > 0.05
    report = convert(capsys, run, tmp_path / "adapter", "--to", "adapter")
    assert sorted(key["source"] for key in report["keys"]) == sorted(load_file(run / WEIGHTS_FILE))
    assert not (tmp_path / "adapter" / WEIGHTS_FILE).exists()
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(policy_folders[kind])
    assert json.loads((tmp_path / "adapter" / "config.json").read_text())["use_peft"] is True
    theirs = lerobots_own(tmp_path / "adapter")
    assert isinstance(theirs[0], PeftModel)
    assert torch.equal(tools.actions(*theirs), live)  # unmerged on both sides
    merged = tools.actions_of(run)
    torch.testing.assert_close(merged, live, rtol=1e-4, atol=1e-4)
    assert torch.equal(tools.actions_of(tmp_path / "adapter"), merged)
    convert(capsys, tmp_path / "adapter", tmp_path / "merged", "--to", "merged")
    assert (tmp_path / "merged" / WEIGHTS_FILE).read_bytes() == (run / WEIGHTS_FILE).read_bytes()
    assert torch.equal(tools.actions(*lerobots_own(tmp_path / "merged")), merged)
    assert not (tmp_path / "merged" / ADAPTER_FOLDER).exists()


def test_adapters_over_a_bfloat16_base(capsys, tools, tmp_path):
    base = tools.write_policy("pi0", tmp_path / "base", dtype="bfloat16")
    run = save(train(base, LoraConfig(r=4, lora_alpha=8, use_rslora=True, rank_pattern={"fc1": 2})), tmp_path / "run")
    convert(capsys, run, tmp_path / "adapter", "--to", "adapter")
    convert(capsys, tmp_path / "adapter", tmp_path / "merged", "--to", "merged")
    assert (tmp_path / "merged" / WEIGHTS_FILE).read_bytes() == (run / WEIGHTS_FILE).read_bytes()
    merged = tools.actions_of(run)
    assert torch.equal(tools.actions_of(tmp_path / "adapter"), merged)
    torch.testing.assert_close(tools.actions(*lerobots_own(tmp_path / "adapter")), merged, rtol=1e-4, atol=1e-4)
    small = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert small < 0.6 * (run / WEIGHTS_FILE).stat().st_size


def test_a_run_records_its_base(policy_folders):
    args = FlowPPOConfig(output_dir="unused", use_cpu=True, noise="flow_sde")
    model = build_actor_critic(load_policy(policy_folders["pi0"]), args, vlm_lora_config(2, 2))
    assert model.policy.policy.peft_config["default"].base_model_name_or_path == str(policy_folders["pi0"])


def test_training_goes_on_from_an_adapter(capsys, runs, tools, tmp_path):
    _, run = runs["pi0"]
    convert(capsys, run, tmp_path / "adapter", "--to", "adapter")
    loaded = load_policy(tmp_path / "adapter")
    again = save(loaded, tmp_path / "saved")
    assert json.loads((again / "config.json").read_text())["use_peft"] is False
    assert torch.equal(tools.actions_of(again), tools.actions_of(run))


def test_adapters_of_lerobots_own_training(capsys, policy_folders, tools, tmp_path):
    base = policy_folders["pi0"]
    loaded = load_policy(base)
    loaded.policy.config.pretrained_path = base
    targets = r".*gemma_expert\.model\.layers.*\.(q_proj|v_proj)"
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, modules_to_save=["state_proj", "action_out_proj"])
    theirs = loaded.policy.wrap_with_peft(peft_config=config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    loaded.policy.config._save_pretrained(tmp_path / "adapter")
    for pipeline in (loaded.preprocessor, loaded.postprocessor):
        pipeline.save_pretrained(tmp_path / "adapter")
    live = tools.actions(theirs.eval(), loaded.preprocessor, loaded.postprocessor)
    assert (live - tools.actions_of(base)).abs().max() > 0.05
    report = convert(capsys, tmp_path / "adapter", tmp_path / "merged", "--to", "merged")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    told = [key["source"] for key in report["keys"]]
    assert set(stored) <= set(told)
    torch.testing.assert_close(tools.actions_of(tmp_path / "merged"), live, rtol=1e-4, atol=1e-4)
    merged = theirs.merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / WEIGHTS_FILE).items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_another_base_is_refused(capsys, runs, policy_folders, tools, tmp_path):
    _, run = runs["pi0"]
    copied = shutil.copytree(policy_folders["pi0"], tmp_path / "base")
    for name, word in (("norm.weight", "VLM"), ("layers.0.self_attn.q_proj.weight", "VLM")):
        tensors = load_file(policy_folders["pi0"] / WEIGHTS_FILE)
        tensors[f"model.paligemma_with_expert.paligemma.model.language_model.{name}"].view(-1)[0] += 1e-4
        save_file(tensors, copied / WEIGHTS_FILE)
        message = refused(capsys, run, tmp_path / "new", "--to", "adapter", "--base", copied)
        assert f"was not trained on this base: 1 tensors of the {word}" in message
    message = refused(capsys, run, tmp_path / "new", "--to", "adapter", "--base", policy_folders["pi05"])
    assert "does not fit" in message
    assert not (tmp_path / "new").exists()


def test_a_base_that_is_not_recorded_must_be_given(capsys, policy_folders, tmp_path):
    run = save(train(policy_folders["pi0"], record=False), tmp_path / "run")
    assert "give it with --base" in refused(capsys, run, tmp_path / "new", "--to", "adapter")
    convert(capsys, run, tmp_path / "new", "--to", "adapter", "--base", policy_folders["pi0"])


def test_folders_of_runs_stand_for_their_policies(capsys, runs, policy_folders, tools, tmp_path):
    """The run with LoRA, and its base, which another run made."""
    trained, policy = runs["pi0"]
    for run, source in (("run", policy), ("earlier", policy_folders["pi0"])):
        shutil.copytree(source, tmp_path / run / "policy")
        (tmp_path / run / "pi_rl_config.yaml").write_text("num_envs: 4\n")
    report = convert(capsys, tmp_path / "run", tmp_path / "adapter", "--to", "adapter", "--base", tmp_path / "earlier")
    assert report["facts"]["base"] == str(tmp_path / "earlier" / "policy")
    convert(capsys, tmp_path / "adapter", tmp_path / "merged", "--to", "merged", "--base", tmp_path / "earlier")
    expected = tools.actions(trained.policy, trained.preprocessor, trained.postprocessor)
    torch.testing.assert_close(tools.actions_of(tmp_path / "merged"), expected, rtol=0, atol=1e-5)


def test_a_base_that_lerobot_would_not_load_is_refused(capsys, runs, policy_folders, tmp_path):
    _, run = runs["pi0"]
    base = shutil.copytree(policy_folders["pi0"], tmp_path / "base")
    tensors = load_file(base / WEIGHTS_FILE)
    (base / WEIGHTS_FILE).rename(base / "model-00001-of-00001.safetensors")
    place = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (base / INDEX_FILE).write_text(json.dumps({"weight_map": place}))
    message = refused(capsys, run, tmp_path / "new", "--to", "adapter", "--base", base)
    assert f"`pi-rl convert {base} NEW_FOLDER --to lerobot`" in message
    convert(capsys, base, tmp_path / "single", "--to", "lerobot")
    convert(capsys, run, tmp_path / "new", "--to", "adapter", "--base", tmp_path / "single")


def test_a_base_that_is_gone_is_named(capsys, runs, policy_folders, tools, tmp_path):
    _, run = runs["pi0"]
    base = shutil.copytree(policy_folders["pi0"], tmp_path / "base")
    convert(capsys, run, tmp_path / "adapter", "--to", "adapter", "--base", base)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"{base}.*`pi-rl convert .* --to merged --base"):
        load_policy(tmp_path / "adapter")
    words = (tmp_path / "adapter", tmp_path / "merged", "--to", "merged")
    assert str(base) in refused(capsys, *words)
    convert(capsys, *words, "--base", moved)
    assert torch.equal(tools.actions_of(tmp_path / "merged"), tools.actions_of(run))


def damage_config(change):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    return damage


def damage_weights(edit):
    def damage(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return damage


def drop_one(ending):
    return damage_weights(lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(ending))))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config({"use_dora": True}), "only plain LoRA"),
        (damage_config({"init_lora_weights": "pissa"}), "only plain LoRA"),
        (damage_config({"peft_type": "IA3"}), "only plain LoRA"),
        (damage_config({"base_model_name_or_path": None}), "names no base policy"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not PEFT's configuration"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "without adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"{}"), "not a readable safetensors"),
        (drop_one("lora_B.weight"), "does not fit the base"),
        (
            damage_weights(lambda t: t.update({"base_model.model.other.weight": torch.zeros(2)})),
            "does not fit the base",
        ),
    ],
)
def test_damaged_adapters_are_refused(capsys, runs, tmp_path, damage, message):
    _, run = runs["pi0"]
    convert(capsys, run, tmp_path / "adapter", "--to", "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path / "adapter")


def test_unused_heads_are_no_adapter(capsys, runs, tmp_path):
    _, run = runs["pi05"]
    convert(capsys, run, tmp_path / "adapter", "--to", "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any(name.removeprefix("base_model.model.") in UNUSED_HEADS for name in stored)
