"""Writes model_cards/: one card per recipe, from the recipe's own file, the paper's tables and the README's results.

    python scripts/model_cards.py                 # writes them
    python scripts/model_cards.py --output DIR    # somewhere else

The cards say what a recipe trains, with what settings and licence, and which numbers are the paper's and which were
measured here. `tests/test_recipe_cards.py` compares them with what this script writes.
"""

import argparse
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pi_rl.argument_values import ConfigLoader
from pi_rl.arguments import parse_recipe_arguments
from pi_rl.hub.card import (
    card_metadata,
    is_hub_id,
    license_metadata,
    license_sentence,
    render_card,
    simulator_of,
)
from pi_rl.hub.results import cell, short_name
from pi_rl.recipe_arguments import RecipeArguments
from pi_rl.sft_recipe import SftArguments
from pi_rl.trainer.flow_grpo_config import FlowGRPOConfig
from pi_rl.trainer.flow_ppo_config import FlowPPOConfig

ROOT = Path(__file__).parents[1]
CONFIGS, CARDS = ROOT / "recipes" / "configs", ROOT / "model_cards"
BASES = {"base", "pi0", "pi05", "maniskill"}
"""Files that others inherit from; they are no recipes."""
NOT_RUNNABLE = "gr00t"
KEPT = {"README.md", "template.md"}
NOISES = {"flow_noise": "Flow-Noise", "flow_sde": "Flow-SDE"}
PAPER = "[πRL, version 2](https://arxiv.org/abs/2510.25889v2)"
PUBLISHED = {
    # benchmark of a recipe: (table, words, columns after SFT)
    ("libero", "ppo"): ("table_1", "Table 1", ("flow_sde", "flow_noise")),
    ("libero", "grpo"): ("table_5", "Table 5", ("flow_sde",)),
    ("maniskill", "simpler"): ("table_2", "Table 2", ("flow_noise",)),
    ("maniskill", "generalization"): ("table_3", "Table 3, in distribution", ("flow_sde", "flow_noise")),
    ("metaworld", "ppo"): ("table_4", "Table 4, mean of the four difficulty groups", ("flow_sde", "flow_noise")),
}
_RL_SETTINGS = (
    "num_iterations", "num_envs", "rollout_epochs", "rollout_chunks", "n_action_steps", "denoising_steps",
    "noise_level", "noise_std_min", "noise_std_max", "minibatch_size", "update_epochs", "learning_rate",
    "critic_learning_rate", "clip_range", "gamma", "gae_lambda", "group_size", "eval_episodes",
)  # fmt: skip
_SFT_SETTINGS = (
    "dataset", "num_episodes", "episodes_per_task", "steps", "batch_size", "learning_rate", "final_learning_rate",
    "chunk_size", "n_action_steps", "denoising_steps", "expert_only",
)  # fmt: skip

_UNUSED = {"flow_noise": ("noise_level",), "flow_sde": ("noise_std_min", "noise_std_max")}


@dataclass(frozen=True)
class Recipe:
    """A recipe as parsed: the options of reinforcement learning, or those of supervised fine-tuning."""

    path: Path
    options: RecipeArguments | SftArguments
    rl: FlowPPOConfig | FlowGRPOConfig | None

    @property
    def name(self) -> str:
        return self.path.relative_to(CONFIGS).with_suffix("").as_posix()

    @property
    def benchmark(self) -> str:
        return self.path.parent.name

    @property
    def algorithm(self) -> str:
        return "SFT" if self.rl is None else "GRPO" if isinstance(self.rl, FlowGRPOConfig) else "PPO"

    @property
    def small(self) -> bool:
        """Whether it trains a small policy that is made in the run itself."""
        return isinstance(self.options, RecipeArguments) and self.options.model is None

    @property
    def policy_type(self) -> str:
        if isinstance(self.options, RecipeArguments) and self.small:
            return f"{self.options.small_model}_small"
        return self.path.stem.split("_")[0]


def recipe_files() -> list[Path]:
    """All recipes that can run."""
    files = sorted(CONFIGS.rglob("*.yaml"))
    return [path for path in files if path.stem not in BASES and not path.stem.startswith(NOT_RUNNABLE)]


def read_recipe(path: Path) -> Recipe:
    """Parses a recipe as its script does."""
    if path.parent.name == "sft":
        return Recipe(path, parse_recipe_arguments((SftArguments,), default_config=path, argv=[])[0], None)
    kind = FlowGRPOConfig if path.stem.endswith("grpo") else FlowPPOConfig
    defaults = {"noise": "flow_noise" if "quickstart" in path.stem and kind is FlowPPOConfig else "flow_sde"}
    recipe, rl = parse_recipe_arguments(
        (RecipeArguments, kind), default_config=path, defaults=defaults, argv=["--use_cpu", "true"]
    )
    return Recipe(path, recipe, rl)


def card_text(recipe: Recipe) -> str:
    """The card of a recipe."""
    options = recipe.options
    model = options.model
    start = _sft_recipes().get(model)
    base = start.options.model if start is not None else model
    shown = recipe.path.relative_to(ROOT).as_posix()
    command = f"pi-rl {'sft' if recipe.rl is None else 'train'} --config {shown}"
    return render_card(
        CARDS / "template.md",
        card_metadata(
            policy_type=recipe.policy_type,
            license=options.model_license,
            tags=["imitation-learning" if recipe.rl is None else "reinforcement-learning", *_topics(recipe)],
            base_model=base,
            dataset=_dataset(start or recipe),
        ),
        title=recipe.name,
        summary=_summary(recipe, base),
        settings=list(_settings(recipe)),
        recipe=shown,
        recipe_link=f"../../{shown}",
        help_command=f"python recipes/{_script(recipe)} --help",
        command=command + (" --algorithm grpo" if recipe.algorithm == "GRPO" else ""),
        start_folder=model,
        start_command=f"pi-rl sft --config {start.path.relative_to(ROOT).as_posix()}" if start is not None else "",
        measured=_measured(recipe),
        reference=_reference(recipe),
        limits=_limits(recipe),
        licence=license_sentence(license_metadata(options.model_license, recipe.policy_type)),
    )


def _script(recipe: Recipe) -> str:
    if recipe.rl is None:
        return "sft.py"
    return "grpo_flow_sde.py" if recipe.algorithm == "GRPO" else f"ppo_{recipe.rl.noise}.py"


@functools.cache
def _sft_recipes() -> dict[str | None, Recipe]:
    """Recipes of fine-tuning by their output folder."""
    found = [read_recipe(path) for path in recipe_files() if path.parent.name == "sft"]
    return {recipe.options.output_dir: recipe for recipe in found if isinstance(recipe.options, SftArguments)}


@functools.cache
def _tables() -> dict[str, Any]:
    text = (ROOT / "tests/data/paper_tables.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=ConfigLoader)["results"]


def _dataset(recipe: Recipe) -> str | None:
    options = recipe.options
    named = isinstance(options, SftArguments) and options.dataset_root is None and is_hub_id(options.dataset)
    return options.dataset if named and not options.dataset.startswith("local/") else None


def _topics(recipe: Recipe) -> Iterator[str]:
    if isinstance(recipe.options, RecipeArguments):
        yield simulator_of(recipe.options.env)
        yield recipe.algorithm.lower()


def _summary(recipe: Recipe, base: str | None) -> str:
    options = recipe.options
    kind = recipe.policy_type.replace("pi05", "π0.5").replace("pi0", "π0").replace("_small", "")
    if isinstance(options, SftArguments):
        data = _dataset(recipe)
        of = (
            f"[{data}](https://huggingface.co/datasets/{data})"
            if data
            else "demonstrations of yours (unpublished data)"
        )
        return (
            f"Few-shot supervised fine-tuning of {kind} from [{base}](https://huggingface.co/{base}) on {of}, with "
            "`lerobot-train`: the start of the reinforcement-learning recipes."
        )
    noise = NOISES.get(recipe.rl.noise, recipe.rl.noise) if recipe.rl else ""
    begins = (
        f"a small, randomly initialised {kind} that first imitates scripted demonstrations"
        if recipe.small
        else f"{kind} fine-tuned from [{base}](https://huggingface.co/{base})" if base and is_hub_id(base)
        else f"{kind} in LeRobot's layout, given with `--model`"
    )  # fmt: skip
    return f"{recipe.algorithm} with {noise} in `{short_name(options.env)}`, from {begins}."


def _settings(recipe: Recipe) -> Iterator[tuple[str, str]]:
    options = recipe.options
    if isinstance(options, RecipeArguments):
        yield "environment", f"`{cell(options.env)}`"
        yield "time limit", f"{options.env_options.get('max_episode_steps', 'of the environment')}"
        yield "VLM", f"LoRA of rank {options.lora_rank}" if options.lora_rank else "frozen"
    unused = _UNUSED.get(recipe.rl.noise, ()) if recipe.rl is not None else ()
    for name in _RL_SETTINGS if recipe.rl is not None else _SFT_SETTINGS:
        value = getattr(recipe.rl or options, name, None)
        if name not in unused and value not in (None, False):
            yield f"`{name}`", f"{value:g}" if isinstance(value, float) else cell(str(value))


def _reference(recipe: Recipe) -> str:
    """The paper's numbers, named as such."""
    found = list(_published(recipe))
    if not found:
        return "The paper gives no number for these settings."
    table, values = found
    sft, after = values
    what = f"{sft:g} % before (SFT), {after:g} % after {recipe.algorithm}" if after is not None else f"{sft:g} % (SFT)"
    return f"Of the paper, **not measured by this project**: success {what}. Source: {PAPER}, {table}."


def _published(recipe: Recipe) -> Iterator[Any]:
    if recipe.small or recipe.rl is None or recipe.path.stem.endswith(("lora1", "lora2")):
        return
    key = recipe.path.stem.removesuffix("_grpo").removesuffix("_flow_sde").removesuffix("_flow_noise")
    kind = recipe.algorithm.lower()
    if recipe.benchmark == "maniskill":
        kind = "generalization" if key.endswith("generalization") else "simpler"
    table, words, columns = PUBLISHED.get((recipe.benchmark, kind), ("", "", ()))
    row = _tables().get(table, {}).get(key)
    if row is None:
        return
    yield words
    yield row[0], row[1 + columns.index(recipe.rl.noise)] if recipe.rl.noise in columns else None


def _measured(recipe: Recipe) -> str:
    if recipe.name == "metaworld/quickstart":
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        table = text.partition("<!-- results: begin -->")[2].partition("<!-- results: end -->")[0].strip()
        return f"All runs, last iteration, 200 fixed initial states, Wilson 95 % intervals:\n\n{table}"
    if recipe.path.stem.startswith(("quickstart_grpo", "small_")):
        return "On two CPU cores, one seed: [the recipes' page](../../recipes/README.md) has the numbers."
    if recipe.path.stem == "quickstart_ci":
        return "Runs in every check of the project, at a size where nothing is learned; no number is meant."
    return "**Not measured here**: it needs GPUs, and no run of it has been made by this project."


def _limits(recipe: Recipe) -> Iterator[str]:
    if recipe.small:
        yield "A very small network for a demonstration; it knows no other task, object or scene."
    else:
        yield "Settings are the paper's or its reference implementation's; they were parsed and checked, not run."
    if recipe.rl is not None:
        yield "Reinforcement learning refines what the start policy can do; without any success nothing is learned."


def write_cards(folder: Path) -> list[Path]:
    """Writes all cards, and removes those of recipes that are gone.

    Args:
        folder: Such as `model_cards`.
    """
    written = []
    for path in recipe_files():
        recipe = read_recipe(path)
        card = folder / f"{recipe.name}.md"
        card.parent.mkdir(parents=True, exist_ok=True)
        card.write_text(card_text(recipe), encoding="utf-8")
        written.append(card)
    for stale in set(folder.rglob("*.md")) - set(written) - {folder / name for name in KEPT}:
        stale.unlink()
    return written


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=CARDS, help="folder (default: model_cards)")
    print(f"{len(write_cards(parser.parse_args().output))} cards written.")


if __name__ == "__main__":
    main()
