"""The documentation names what exists: metric keys, functions, options, files."""

import dataclasses
import importlib
import math
import re
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from pi_rl import FlowGRPOConfig, FlowGRPOTrainer, FlowPPOConfig, FlowPPOTrainer, RecipeArguments
from pi_rl.envs.metaworld_options import MetaWorldOptions
from pi_rl.rl.losses import clipped_surrogate
from pi_rl.rollout.summary import summarize_episodes

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("method.md", "metrics.md", "notation.md")
}
# code spans that are not formulas, which GitHub writes as $`…`$
SPAN = re.compile(r"(?<!\$)`([^`\n]+)`(?!\$)")
OPTIONS = {
    field.name
    for kind in (FlowPPOConfig, FlowGRPOConfig, RecipeArguments, MetaWorldOptions)
    for field in dataclasses.fields(kind)
}


def without_blocks(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def column(text: str, heading: str) -> list[str]:
    """The cells of every table column with a heading."""
    cells, index = [], None
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if heading in row:
            index = row.index(heading)
        elif not row:
            index = None
        elif index is not None and not set(row[index]) <= set("-: "):
            cells.append(row[index])
    return cells


def documented_keys() -> set[str]:
    return {key for cell in column(PAGES["metrics.md"], "Key") for key in SPAN.findall(cell)}


def keys_in_the_source() -> set[str]:
    """Names with a topic, such as policy/loss; what f-strings put in is spelled out."""
    found: set[str] = set()
    for folder in ("trainer", "rollout"):
        for path in (ROOT / "pi_rl" / folder).glob("*.py"):
            found |= set(re.findall(r'"((?:policy|critic|groups|rollout|time)/[^"]+)"', path.read_text()))
    found = {key.replace("{task}", "<task>") for key in found}
    found -= {"policy/{name}", "rollout/{name}"}
    one = torch.ones(1, 1)
    return found | {f"policy/{name}" for name in clipped_surrogate(one, one, torch.ones(1), 0.2)[1]}


def logged_keys(trainer_class, config_class, mlp_folder, folder, **options) -> set[str]:
    args = config_class(
        output_dir=str(folder),
        use_cpu=True,
        num_iterations=2,
        num_envs=4,
        rollout_chunks=4,
        per_device_train_batch_size=16,
        update_epochs=1,
        noise="flow_sde",
        noise_level_end=0.4,
        eval_episodes=4,
        disable_tqdm=True,
        **options,
    )
    trainer = trainer_class(str(mlp_folder), args, "toy:point-mass", {"max_episode_steps": 8})
    try:
        trainer.train()
        trainer.evaluate()
    finally:
        trainer.close()
    return {key.replace("point-mass", "<task>") for entry in trainer.state.log_history for key in entry}


def test_every_metric_is_documented_and_no_other(mlp_folder, tmp_path):
    logged = logged_keys(
        FlowPPOTrainer, FlowPPOConfig, mlp_folder, tmp_path / "ppo", normalize_rewards=True, critic_hidden_sizes=[8]
    ) | logged_keys(FlowGRPOTrainer, FlowGRPOConfig, mlp_folder, tmp_path / "grpo", group_size=2)
    possible = logged | keys_in_the_source()
    assert {"loss", "eval_return", "policy/noise_level", "rollout/reward_scale", "groups/informative"} <= logged
    groups = {"<group>": ["<task>"], "another": ["<task>"]}
    grouped = summarize_episodes(["<task>"], [True], [1.0], [5.0], groups, subtasks=5)
    assert documented_keys() == possible | {f"eval_{name}" for name in grouped.metrics() if "another" not in name}


def test_the_table_of_kl_clip_and_largest_ratio_follows_from_a_gaussian_log_ratio():
    rows = re.findall(r"^\| (?:KL|clip fraction|largest of 4096 ratios) \|(.*)\|$", PAGES["metrics.md"], re.MULTILINE)
    kls, clipped, largest = ([float(cell) for cell in row.split("|")] for row in rows)
    for k, share, peak in zip(kls, clipped, largest, strict=True):
        log_ratio = NormalDist(-k, math.sqrt(2 * k))
        assert share == pytest.approx(log_ratio.cdf(math.log(0.8)) + 1 - log_ratio.cdf(math.log(1.2)), abs=0.006)
        assert peak == pytest.approx(math.exp(log_ratio.inv_cdf(0.5 ** (1 / 4096))), abs=0.06)


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_can_be_imported(page):
    for name in sorted(set(re.findall(r"\bpi_rl(?:\.\w+)+", PAGES[page]))):
        resolve(name)


def resolve(name: str) -> object:
    """A module, or an attribute of one, by its dotted name."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:size]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[size:]:
            found = getattr(found, attribute)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("page", PAGES)
def test_named_options_exist(page):
    """`--option`, `option: value`, and the code of columns that hold options."""
    text = without_blocks(PAGES[page])
    named = set(re.findall(r"--([a-z]\w+)", text))
    for span in SPAN.findall(text):
        named |= set(re.findall(r"^([a-z_]+): ", span))
    for heading in ("Option", "Its behaviour here"):
        for cell in column(text, heading):
            named |= {re.split(r"[: ]", span)[0] for span in SPAN.findall(cell) if re.match(r"[a-z_]+(: |$)", span)}
    assert named <= OPTIONS, sorted(named - OPTIONS)


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    text = PAGES[page]
    for path in re.findall(r"`((?:tests|docs|scripts|recipes|pi_rl)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (ROOT / "docs" / link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_github_can_render_the_formulas(page):
    """Markdown eats a backslash before punctuation and reads some underscores as emphasis, except within $`…`$."""
    text = without_blocks(PAGES[page])
    for formula in re.findall(r"(?<![$`\\])\$(?![`$ ])([^$\n]+?)\$(?!`)", text):
        assert not re.search(r"\\[^A-Za-z]|\}_|_\{|\}\^|[*|<]", formula), formula
    for line in text.splitlines():
        if line.startswith("|"):
            assert "\\mid" not in line
            assert line.endswith("|"), line
