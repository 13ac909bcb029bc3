"""The recipes hold the paper's settings: every cell of its tables is compared with the parsed recipe."""

import json
import re
import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pi_rl.argument_values import ConfigLoader
from pi_rl.arguments import parse_recipe_arguments
from pi_rl.recipe_arguments import RecipeArguments
from pi_rl.sft_recipe import SftArguments
from pi_rl.trainer.flow_config import FlowConfig
from pi_rl.trainer.flow_grpo_config import FlowGRPOConfig
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "recipes" / "configs"
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
FILES = sorted(CONFIGS.rglob("*.yaml"))
BASES = {"base", "pi0", "pi05", "maniskill"}
SFT = [path for path in FILES if path.parent.name == "sft" and path.stem not in BASES]
OURS = [path for path in FILES if path.stem.startswith(("demo", "quickstart", "small_"))]  # not the paper's
RL = [path for path in FILES if path.parent.name != "sft" and path.stem not in BASES and path not in OURS]
PAPER = yaml.load((ROOT / "tests/data/paper_tables.yaml").read_text(encoding="utf-8"), Loader=ConfigLoader)
REFERENCE = yaml.load((ROOT / "tests/data/reference_settings.yaml").read_text(encoding="utf-8"), Loader=ConfigLoader)
NOISES = ("flow_sde", "flow_noise")
BENCHMARK = {"table_7": "libero", "table_8": "maniskill"}
# MB of activations that one sample keeps in one pass of the full-size expert, counted without weights
ACTIVATIONS = {
    "libero": {"pi0": 298, "pi05": 239},
    "calvin": {"pi0": 181, "pi05": 225},
    "metaworld": {"pi0": 105, "pi05": 149},
    "maniskill": {"pi0": 112, "pi05": 157},
}
LIVE_PREFIX = 3974  # the same of the VLM's pass with LoRA of rank 32: π0, two cameras
MISPRINTS = {("table_8", "SFT train steps", 100040): 1000}


def name(path):
    return str(path.relative_to(CONFIGS))


def read(path):
    return yaml.load(path.read_text(encoding="utf-8"), Loader=ConfigLoader) or {}


def merged(path):
    """A file's keys with its bases'."""
    own = read(path)
    inherited = merged(path.parent / own["base"]) if "base" in own else {}
    left = {key: value for key, value in inherited.items() if key not in own.get("without", ())}
    return left | {key: value for key, value in own.items() if key not in ("base", "without")}


@dataclass
class Parsed:
    recipe: RecipeArguments
    rl: FlowConfig
    sft: SftArguments | None

    @property
    def scheduled(self):
        kind = str(getattr(self.rl.lr_scheduler_type, "value", self.rl.lr_scheduler_type))
        assert kind in ("constant", "cosine")
        return kind == "cosine"


def parse_sft(path):
    return parse_recipe_arguments((SftArguments,), default_config=path, argv=[])[0]


SFT_OUTPUTS = {merged(path)["output_dir"]: path for path in SFT}


def parse(path):
    kind = FlowGRPOConfig if path.stem.endswith("grpo") else FlowPPOConfig
    recipe, rl = parse_recipe_arguments((RecipeArguments, kind), default_config=path, argv=["--use_cpu", "true"])
    start = SFT_OUTPUTS.get(recipe.model)
    return Parsed(recipe, rl, None if start is None else parse_sft(start))


# Row of Table 7 or 8 -> what a parsed recipe says; rows of one kind of noise are compared with its recipes alone.
ROWS = {
    "Train epochs": lambda p: p.rl.num_iterations,
    "RL train steps": lambda p: p.rl.num_iterations,
    "SFT train steps": lambda p: p.sft.steps,
    "Batch size": lambda p: p.rl.minibatch_size,
    "Global Batch size": lambda p: p.rl.minibatch_size,
    "Update epochs": lambda p: p.rl.update_epochs,
    "Actor lr": lambda p: p.rl.learning_rate,
    "Critic lr": lambda p: p.rl.critic_learning_rate,
    "Scheduler": lambda p: p.scheduled,
    "Reward discount rate": lambda p: p.rl.gamma,
    "GAE lambda": lambda p: p.rl.gae_lambda,
    "Clip ratio": lambda p: p.rl.clip_range,
    "Interaction steps": lambda p: p.recipe.env_options["max_episode_steps"],
    "Parallel environments": lambda p: p.rl.num_envs,
    "Rollout epochs": lambda p: p.rl.rollout_epochs,
    "Action chunk H": lambda p: p.rl.n_action_steps,
    "Action prediction horizon H": lambda p: p.sft.chunk_size,
    "Action replan horizon H'": lambda p: p.rl.n_action_steps,
    "Denoise steps": lambda p: p.rl.denoising_steps,
    "Noise level (Flow-SDE)": lambda p: p.rl.noise_level,
    "Max log-var (Flow-Noise)": lambda p: p.rl.noise_std_max,
    "Min log-var (Flow-Noise)": lambda p: p.rl.noise_std_min,
    "Entropy bonus (Flow-Noise)": lambda p: p.rl.entropy_coefficient,
}
COLUMNS = [(table, column, noise) for table in BENCHMARK for column in PAPER[table]["columns"] for noise in NOISES]


@pytest.fixture(params=[1, 8])
def processes(request, monkeypatch):
    """The batch arithmetic of one process and of eight, without starting eight."""
    monkeypatch.setattr(FlowConfig, "world_size", request.param)
    monkeypatch.setattr(FlowConfig, "_world_size_hint", staticmethod(lambda: request.param))
    return request.param


@pytest.mark.parametrize(("table", "column", "noise"), COLUMNS)
def test_every_cell_of_the_tables_is_in_its_recipe(table, column, noise, processes):
    parsed = parse(CONFIGS / BENCHMARK[table] / f"{column}_{noise}.yaml")
    index = PAPER[table]["columns"].index(column)
    compared = 0
    for row, cells in PAPER[table]["rows"].items():
        kind = re.search(r"\((Flow-\w+)\)", row)
        if kind and kind.group(1).lower().replace("-", "_") != noise:
            continue
        printed = cells[index]
        assert ROWS[row](parsed) == pytest.approx(MISPRINTS.get((table, row, printed), printed)), row
        compared += 1
    assert compared == len(PAPER[table]["rows"]) - (3 if noise == "flow_sde" else 1)
    assert parsed.rl.noise == noise
    assert parsed.rl.sampler().mdp == {"flow_sde": "hybrid", "flow_noise": "one_layer"}[noise]
    assert parsed.rl.joint_reduction == {"flow_sde": "sum", "flow_noise": "mean"}[noise]


def test_the_tables_are_transcribed_whole():
    for table in BENCHMARK:
        columns = PAPER[table]["columns"]
        assert all(len(cells) == len(columns) for cells in PAPER[table]["rows"].values())
    assert {row for table in BENCHMARK for row in PAPER[table]["rows"]} == set(ROWS)


@pytest.mark.parametrize(
    ("benchmark", "column"),
    [(key, column) for key in REFERENCE if key != "results" for column in REFERENCE[key]["columns"]],
)
def test_what_the_paper_leaves_open_is_as_in_the_reference(benchmark, column):
    index = REFERENCE[benchmark]["columns"].index(column)
    folder, _, algorithm = benchmark.partition("_")
    paths = [CONFIGS / folder / f"{column}_{suffix}.yaml" for suffix in ([algorithm] if algorithm else NOISES)]
    for parsed in [parse(path) for path in paths if path.exists()]:
        options = {**vars(parsed.rl), **parsed.recipe.env_options}
        for row, cells in REFERENCE[benchmark]["rows"].items():
            value = getattr(options[row], "value", options[row])
            assert value == pytest.approx(cells[index]), row


@pytest.mark.parametrize("path", [path for path in RL if not path.stem.startswith("gr00t")], ids=name)
def test_the_activations_of_an_update_fit_a_gpu_of_80_gb(path):
    parsed = parse(path)
    passes = parsed.rl.denoising_steps if parsed.rl.sampler().mdp == "one_layer" else 1
    megabytes = passes * ACTIVATIONS[path.parent.name][path.stem.split("_")[0]]
    megabytes += LIVE_PREFIX if parsed.recipe.lora_rank else 0
    assert parsed.rl.per_device_train_batch_size * megabytes < 40_000


@pytest.mark.parametrize("path", RL, ids=name)
def test_every_recipe_parses_and_its_batches_come_out_even(path, processes):
    parsed = parse(path)
    recipe, rl = parsed.recipe, parsed.rl
    assert recipe.env.split(":")[0] == path.parent.name
    assert rl.minibatch_size == rl.global_batch_size
    assert rl.num_minibatches * rl.minibatch_size == rl.samples_per_iteration
    limit, covered = recipe.env_options["max_episode_steps"], rl.rollout_chunks * rl.n_action_steps
    if rl.auto_reset:  # ManiSkill: at least one episode, and one minibatch per pass
        assert covered >= limit
        assert rl.num_minibatches == 1
    else:  # one episode per environment and rollout epoch
        assert covered == limit
    assert recipe.env_options.get("reward") == ("structured" if path.parent.name == "maniskill" else None)
    critic = getattr(rl, "critic", None)
    assert critic == (None if path.stem.endswith("grpo") else "vlm" if path.stem.startswith("pi05") else "expert")


@pytest.mark.parametrize("path", SFT, ids=name)
def test_every_sft_recipe_parses_and_names_its_own_output(path):
    args = parse_sft(path)
    assert args.output_dir == f"outputs/sft/{path.stem}"
    assert args.batch_size % 8 == 0
    assert (args.state_in_prompt is False) == (args.model == "lerobot/pi05_base")


def test_the_few_shot_subsets_have_the_papers_sizes():
    sizes = PAPER["section_5_2"]
    assert f"{sizes['metaworld_mt50']:,} trajectories" in README
    assert f"{sizes['metaworld_mt50']:,} trajectories" in (CONFIGS / "sft/pi0_metaworld_mt50.yaml").read_text()
    assert parse_sft(CONFIGS / "sft/pi0_libero_58.yaml").num_episodes == sizes["pi0_libero_58"]
    assert parse_sft(CONFIGS / "sft/pi0_libero_long_208.yaml").num_episodes == sizes["pi0_libero_long_208"]
    published = parse_sft(CONFIGS / "sft/pi05_libero_40.yaml")
    assert len(set(published.episodes)) == published.covers_tasks == sizes["pi05_libero_40"]
    for task in ("eggplant", "carrot", "spoon", "cube"):
        for model in ("pi0", "pi05"):
            args = parse_sft(CONFIGS / f"sft/{model}_maniskill_{task}.yaml")
            assert (args.episodes_per_task, args.num_episodes) == (sizes["maniskill_per_task"], None)
    for model in ("pi0", "pi05"):
        args = parse_sft(CONFIGS / f"sft/{model}_maniskill_generalization.yaml")
        assert (args.episodes_per_task, args.num_episodes) == (None, sizes["maniskill_generalization"])
        whole = parse_sft(CONFIGS / f"sft/{model}_metaworld_mt50.yaml")
        assert (whole.episodes, whole.num_episodes, whole.episodes_per_task, whole.only_tasks) == (
            None,
            None,
            None,
            [],
        )


@pytest.mark.parametrize("path", RL, ids=name)
def test_rl_starts_from_what_an_sft_recipe_writes(path):
    parsed = parse(path)
    assert parsed.recipe.model.startswith("outputs/sft/")
    if path.parent.name == "calvin" or path.stem.startswith("gr00t"):
        assert parsed.sft is None  # said in the files
        return
    assert parsed.rl.n_action_steps <= parsed.sft.chunk_size
    assert parsed.sft.model == f"lerobot/{path.stem.split('_')[0]}_base"


def test_lora_and_gr00t_differ_from_pi0_in_what_the_paper_says():
    frozen = parse(CONFIGS / "libero/pi0_long_flow_sde.yaml")
    section = PAPER["section_5_5"]
    for index, column in enumerate(section["columns"]):
        parsed = parse(CONFIGS / f"libero/{column}.yaml")
        cells = {row: values[index] for row, values in section["rows"].items()}
        assert (parsed.recipe.lora_rank, parsed.recipe.lora_alpha) == (cells["rank"], cells["alpha"])
        assert parsed.rl.learning_rate == pytest.approx(cells["Actor lr"])
        assert parsed.rl.update_epochs == cells["Update epochs"]
        assert parsed.rl.rollout_chunks == frozen.rl.rollout_chunks
    for task in ("spatial", "object", "goal", "long"):
        ours, theirs = (merged(CONFIGS / f"libero/{model}_{task}_flow_sde.yaml") for model in ("gr00t", "pi0"))
        different = {key for key in ours | theirs if ours.get(key) != theirs.get(key)}
        assert different == {"model", "model_license", "output_dir"}


def test_a_gr00t_policy_is_refused_with_what_is_supported(tmp_path):
    from pi_rl import load_policy

    (tmp_path / "config.json").write_text(json.dumps({"type": "groot"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'groot'.*pi0"):
        load_policy(tmp_path)


@pytest.mark.parametrize("path", [path for path in RL if path.parent.name == "metaworld"], ids=name)
def test_metaworld_recipes_name_tasks_and_options_that_exist(path):
    from pi_rl.envs.registry import check_name_and_options

    recipe = parse(path).recipe
    spec = check_name_and_options(recipe.env, recipe.env_options)
    assert len(spec.tasks) == (45 if "ml45" in path.stem else 50)


@pytest.mark.parametrize("path", [path for path in RL if path.parent.name == "libero"], ids=name)
def test_libero_recipes_name_suites_and_options_that_exist(path):
    from pi_rl.envs.registry import check_name_and_options

    recipe = parse(path).recipe
    spec = check_name_and_options(recipe.env, recipe.env_options)
    assert {task.partition("-")[0] for task in spec.tasks} == {path.stem.split("_")[1]}
    assert parse(path).rl.eval_episodes == len(spec.tasks) * spec.eval_states


@pytest.mark.parametrize("path", [path for path in RL if path.parent.name == "calvin"], ids=name)
def test_calvin_recipes_name_options_that_exist_and_all_evaluation_states(path):
    from pi_rl.envs.registry import check_name_and_options

    parsed = parse(path)
    spec = check_name_and_options(parsed.recipe.env, parsed.recipe.env_options)
    assert spec.max_episode_steps == parsed.rl.rollout_chunks * parsed.rl.n_action_steps
    assert parsed.rl.eval_episodes == spec.eval_states == 1000


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_holds_only_what_differs_from_its_base(path):
    own = read(path)
    if "base" not in own:
        return
    inherited = merged(path.parent / own["base"])
    repeated = [key for key, value in own.items() if key in inherited and inherited[key] == value]
    assert not repeated, f"{name(path)} repeats {repeated} of {own['base']}"


def test_no_two_runs_write_to_the_same_folder():
    outputs = [merged(path)["output_dir"] for path in (*RL, *SFT)]
    assert len(outputs) == len(set(outputs))
    assert all(merged(path)["output_dir"] == f"outputs/{path.parent.name}/{path.stem}" for path in RL)


def test_the_grpo_quick_start_is_the_quick_start_without_a_critic():
    parsed = parse(CONFIGS / "metaworld/quickstart_grpo.yaml")
    whole, ours = merged(CONFIGS / "metaworld/quickstart.yaml"), merged(CONFIGS / "metaworld/quickstart_grpo.yaml")
    assert {key for key in whole if key not in ours} == {"critic_learning_rate", "critic_hidden_sizes"}
    assert parsed.rl.rollout_chunks * parsed.recipe.chunk_size == parsed.recipe.env_options["max_episode_steps"]
    assert parsed.rl.num_minibatches == 4


@pytest.mark.parametrize(
    ("script", "topics"),
    [("grpo_flow_sde.py", ("GRPO", "Rollout")), ("sft.py", ("Demonstrations", "Training"))],
)
def test_the_scripts_show_their_options_and_refuse_unknown_ones(script, topics, capsys):
    main = runpy.run_path(str(ROOT / "recipes" / script))["main"]
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert all(topic in text for topic in topics)
    with pytest.raises(SystemExit) as stop:
        main(["--learning_rat", "1"])
    assert stop.value.code == 2
    assert "--learning_rate" in capsys.readouterr().err


def test_readme_lists_every_file_with_the_published_number():
    linked = {path: text for text, path in re.findall(r"\[([^\]]*)\]\((configs/[\w/.]+)\)", README)}
    for path in FILES:
        assert f"configs/{name(path)}" in linked, name(path)
    for path in linked:
        assert (ROOT / "recipes" / path).is_file(), path
    results = PAPER["results"] | REFERENCE["results"]
    start = sft_column()
    for table, position, suffix, folder in (
        ("table_1", 1, "flow_sde", "libero"), ("table_1", 2, "flow_noise", "libero"), ("table_5", 1, "grpo", "libero"),
        ("table_2", 1, "flow_noise", "maniskill"), ("table_3", 1, "flow_sde", "maniskill"),
        ("table_3", 2, "flow_noise", "maniskill"), ("table_4", 1, "flow_sde", "metaworld"),
        ("table_4", 2, "flow_noise", "metaworld"), ("table_10", 1, "flow_sde", "libero"),
        ("calvin", 1, "flow_sde", "calvin"), ("calvin", 2, "flow_noise", "calvin"),
    ):  # fmt: skip
        for column, numbers in results[table].items():
            path = f"configs/{folder}/{column}_{suffix}.yaml"
            assert (float(start[path]), float(linked[path])) == (numbers[0], numbers[position]), (table, column)


def sft_column():
    """What stands under SFT in the row that links a file."""
    found, index = {}, None
    for line in README.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            index = None
        elif "SFT" in cells:
            index = cells.index("SFT")
        elif index is not None:
            found |= dict.fromkeys(re.findall(r"\((configs/[\w/.]+)\)", line), cells[index])
    return found
