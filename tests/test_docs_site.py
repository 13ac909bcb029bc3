"""The documentation site is built strictly, loads nothing from elsewhere, and has every public name and option."""

import dataclasses
import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

import pi_rl
from pi_rl import FlowGRPOConfig, FlowPPOConfig, RecipeArguments
from pi_rl.sft_recipe import SftArguments

ROOT = Path(__file__).parents[1]
CONFIGS = (FlowPPOConfig, FlowGRPOConfig, RecipeArguments, SftArguments)


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources() -> dict[Path, float]:
    """Files that a build may read, and must not write."""
    folders = [ROOT / name for name in ("docs", "recipes", "notebooks", "scripts", "pi_rl")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix != ".pyc"]
    return {path: path.stat().st_mtime for path in [*files, *ROOT.glob("*")] if path.is_file()}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built without warnings, and without a trace elsewhere."""
    target, before = tmp_path_factory.mktemp("site"), sources()
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert sources() == before
    return target


def targets(page: Path) -> list[str]:
    """What a page links to or loads, without formulas and data of pictures."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r'<(?:a|link|img|script|source|video)\b[^>]*?\b(?:href|src)="([^"]*)"', text)
    return [html.unescape(target) for target in found if not target.startswith("data:")]


@pytest.mark.slow
def test_links_and_pictures_lead_somewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    anchors = {page: set(re.findall(r'\b(?:id|name)="([^"]+)"', page.read_text(encoding="utf-8"))) for page in pages}
    for page in pages:
        if page.name == "404.html":  # its links begin at the server's root
            continue
        for target in targets(page):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / unquote(path)).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            if anchor and file.suffix == ".html":
                assert unquote(anchor) in anchors[file] | {"__skip", "__codelineno-0-1"}, f"{page.name}: {target}"


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:link|img|script|source|video)\b[^>]*?\b(?:href|src)="(https?:[^"]*)"', text)
        assert loaded == [], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?https?:", style.read_text(encoding="utf-8")), style.name


@pytest.mark.slow
def test_the_front_page_shows_what_the_readme_shows(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    for picture in ("images/quickstart.png", "images/before_after.gif"):
        assert f'src="{picture}"' in text
        assert (site / picture).read_bytes() == (ROOT / "docs" / picture).read_bytes()


@pytest.mark.slow
def test_every_public_name_has_an_entry(site):
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    for name in pi_rl.__all__:
        assert f'id="pi_rl.{name}"' in reference, name


@pytest.mark.slow
def test_every_option_is_in_the_tables_with_its_help(site):
    text = (site / "reference" / "options.html").read_text(encoding="utf-8")
    rows = {
        re.sub("<.*?>", "", name): html.unescape(re.sub("<.*?>", "", rest))
        for name, rest in re.findall(r"<tr>\s*<td>(.*?)</td>(.*?)</tr>", text, re.DOTALL)
    }
    for kind in CONFIGS:
        for field in dataclasses.fields(kind):
            if "group" in field.metadata:
                assert field.name in rows, field.name
    for field in dataclasses.fields(FlowPPOConfig):
        if field.name in ("noise_level", "rollout_chunks", "critic_learning_rate", "prefix_storage"):
            assert field.metadata["help"] in rows[field.name]


@pytest.mark.slow
def test_formulas_are_drawn(site):
    text = (site / "method.html").read_text(encoding="utf-8")
    source = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    assert text.count('display="block"') == source.count("```math")
    assert text.count('display="inline"') > 80
    seen = re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", "", text, flags=re.DOTALL)
    assert "$" not in seen  # none is left as it is written
    assert not re.search(r"\\(?:frac|hat|sigma|varepsilon|mathbb)", seen)


def test_links_between_files_become_links_between_pages(hooks):
    relinked = hooks.relink("[a](docs/method.md#grpo) [b](recipes/README.md) ![c](docs/images/x.png)", "index.md")
    assert relinked == "[a](method.md#grpo) [b](recipes/index.md) ![c](images/x.png)"
    relinked = hooks.relink("[a](../README.md) [b](https://x.org/a.md) [c](#below) `[d](../README.md)`", "metrics.md")
    assert relinked == "[a](index.md) [b](https://x.org/a.md) [c](#below) `[d](../README.md)`"
    assert hooks.relink("[a](../docs/calvin.md) [b](configs/x.yaml)", "recipes/index.md") == (
        "[a](../calvin.md) [b](configs/x.yaml)"
    )
    assert hooks.relink("[a](custom_env.ipynb)", "notebooks/quickstart.md") == "[a](custom_env.md)"


@pytest.mark.parametrize(
    ("markdown", "formulas"),
    [
        ("the time $t$ of $`x_t`$", 2),
        ("```math\nx = 1\n```\n", 1),
        ("a shell's `$HOME` and `` `$x$` ``, US$5 and 6$", 0),
        ("```bash\necho $A $B\n```\n", 0),
    ],
)
def test_formulas_are_told_from_code(hooks, markdown, formulas):
    drawn = hooks._TOKEN.sub(hooks.formula, markdown)
    assert drawn.count("<math") == formulas
    if not formulas:
        assert drawn == markdown


def test_a_formula_holds_nothing_that_markdown_reads(hooks):
    drawn = hooks._TOKEN.sub(hooks.formula, r"| $`|x'_i|^2 * \sigma_{\theta}`$ |")
    inner = drawn.removeprefix("| ").removesuffix(" |")
    assert not re.search(r"[|*_`\\]", inner)
    assert "<mtext>′</mtext>" in inner


def test_the_table_of_options_has_types_and_defaults(hooks):
    table = hooks.options_table("pi_rl.FlowGRPOConfig", "pi_rl.trainer.flow_config.FlowConfig")
    assert "| `group_size` | `INT` | `8` | G, episodes from the same initial state that are compared |" in table
    assert "| `auto_reset` | `BOOL` | `false` |" in table
    assert "noise_level" not in table


def test_a_notebook_becomes_a_page(hooks, tmp_path):
    cell = nbformat.v4.new_code_cell("print('<a>')")
    cell.outputs = [
        nbformat.v4.new_output("stream", text="<a>\n"),
        nbformat.v4.new_output("display_data", {"image/png": "AAAA\n", "text/plain": "<Figure>"}),
        nbformat.v4.new_output("execute_result", {"text/plain": "{'a': 1}"}, execution_count=1),
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), cell])
    nbformat.write(notebook, tmp_path / "n.ipynb")
    page = hooks.notebook_page(tmp_path / "n.ipynb")
    assert page.startswith("# Title\n\n```python\nprint('<a>')\n```")
    assert "&lt;a&gt;" in page
    assert 'src="data:image/png;base64,AAAA"' in page
    assert "&lt;Figure" not in page
    assert "{&#x27;a&#x27;: 1}" in page
