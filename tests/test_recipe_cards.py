"""model_cards/ holds what scripts/model_cards.py makes of the recipes."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
SOME = (
    "libero/pi0_goal_flow_noise",
    "libero/pi05_long_grpo",
    "maniskill/pi0_spoon_flow_sde",
    "metaworld/quickstart",
    "calvin/pi05_abc_d_flow_sde",
    "sft/pi0_libero_58",
)


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import model_cards

        yield model_cards
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def names(folder):
    cards = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.md")}
    return cards - {"README", "template"}


def test_every_recipe_that_can_run_has_a_card_and_no_other_has(script):
    assert names(CARDS) == {
        path.relative_to(script.CONFIGS).with_suffix("").as_posix() for path in script.recipe_files()
    }


@pytest.mark.parametrize("name", SOME)
def test_a_card_is_what_its_recipe_gives(script, name):
    recipe = script.read_recipe(script.CONFIGS / f"{name}.yaml")
    assert script.card_text(recipe) == (CARDS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_all_cards_are_what_the_recipes_give(script, tmp_path):
    (tmp_path / "stale.md").write_text("x")
    written = script.write_cards(tmp_path)
    assert names(tmp_path) == names(CARDS)
    for card in written:
        assert card.read_text() == (CARDS / card.relative_to(tmp_path)).read_text(encoding="utf-8"), card


def test_the_papers_numbers_are_named_as_the_papers():
    text = (CARDS / "libero/pi0_goal_flow_noise.md").read_text(encoding="utf-8")
    _, measured, reference = text.split("### ")
    assert "**Not measured here**" in measured
    assert "98.2 % after PPO" in reference
    assert "not measured by this project" in reference
    assert "Table 1" in reference


@pytest.mark.parametrize("path", sorted(CARDS.glob("*/*.md")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_metadata_links_and_licence(path):
    card = ModelCard.load(path)
    assert (card.data.library_name, card.data.pipeline_tag) == ("lerobot", "robotics")
    assert card.data.eval_results is None  # no weights, so no result of them
    small = path.stem.startswith(("small_", "quickstart", "demo"))
    assert card.data.license == ("apache-2.0" if small else "gemma")
    for link in [part.split(")")[0] for part in card.text.split("](")[1:]]:
        assert link.startswith("https://") or (path.parent / link).exists(), link
