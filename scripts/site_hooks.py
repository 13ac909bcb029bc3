"""What mkdocs does for this site beside Markdown: pages made from files outside docs/, formulas, tables of options.

mkdocs calls the functions named on_… while it builds (`hooks` in mkdocs.yml). Nothing is written outside the site.

- README.md, CHANGELOG.md, CONTRIBUTING.md, recipes/ and the notebooks become pages; links between files of the
  repository are turned into links between pages.
- Formulas in GitHub's notation ($…$, $`…`$ and blocks named math) become MathML, which browsers draw by themselves.
- A comment such as `<!-- options: pi_rl.FlowPPOConfig -->` is replaced by a table of that dataclass's fields.
"""

import dataclasses
import html
import pkgutil
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from pi_rl.argument_values import describe_type, to_plain

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "recipes/README.md": "recipes/index.md",
    "notebooks/quickstart.ipynb": "notebooks/quickstart.md",
    "notebooks/custom_env.ipynb": "notebooks/custom_env.md",
}
"""Files of the repository outside docs/ that are pages, and where they stand in the site."""


_TOKEN = re.compile(
    r"""^```math\n(?P<block>.*?)^```$
    | \$`(?P<quoted>[^`\n]+)`\$
    | (?<![\\$\w]) \$ (?P<plain>[^\s$`](?:[^$`\n]*[^\s$`])?) \$ (?![$\w])
    | (?P<code> ^(?P<fence>```+)[^\n]*\n.*?^(?P=fence)$
              | (?<!`) (?P<ticks>`+) (?!`) (?:(?!\n\n).)*? (?<!`) (?P=ticks) (?!`)
      )""",
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
"""Formulas, and code, in which a dollar is a dollar."""

_LINK = re.compile(r"(?P<before>\]\(|(?:src|href)=\")(?P<target>[^)\s\"#]+)(?P<anchor>#[^)\s\"]*)?(?P<after>[)\"])")
_BETTER = (
    # the glyph of a prime is raised already; as an exponent it would stand above the line
    (r"<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>", r"<mrow>\1<mtext>′</mtext></mrow>"),
    (
        r"<msubsup>(<mi>[^<]*</mi>)(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msubsup>",
        r"<msub><mrow>\1<mtext>′</mtext></mrow>\2</msub>",
    ),
    (r"<mi>&#x0007E;</mi>", "<mo>∼</mo>"),
)
_TABLE = re.compile(r"<!-- options: (?P<name>[\w.]+)(?: without (?P<without>[\w.]+))? -->")
_ROLE = re.compile(r":(?:class|meth|func|attr|mod|data):<code>~?(?P<name>[\w.]+)</code>")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages and files that lie outside docs/."""
    for source, target in PAGES.items():
        path = ROOT / source
        text = notebook_page(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=text))
    for path in sorted((ROOT / "recipes/configs").rglob("*.yaml")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links, formulas and comments of tables into what the site needs."""
    markdown = _TABLE.sub(lambda match: options_table(match["name"], match["without"]), markdown)
    return _TOKEN.sub(formula, relink(markdown, page.file.src_uri))


def on_page_content(text: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Shows the roles that docstrings use (:class:`~pi_rl.Name`) as the name alone."""
    return _ROLE.sub(lambda match: f"<code>{match['name'].rpartition('.')[2]}</code>", text)


def relink(markdown: str, page: str) -> str:
    """Links between files of the repository as links between pages of the site.

    Args:
        markdown: Text of a page.
        page: Where it stands in the site, such as "recipes/index.md".
    """
    sources = {target: source for source, target in PAGES.items()}
    here = sources.get(page, f"docs/{page}")

    def moved(match: re.Match[str]) -> str:
        target = match["target"]
        if re.match(r"[a-z]+:|/", target):
            return match[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        place = PAGES.get(wanted, wanted.removeprefix("docs/"))
        relative = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{match['before']}{relative}{match['anchor'] or ''}{match['after']}"

    return _outside_code(markdown, lambda text: _LINK.sub(moved, text))


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Applies a change to everything that is not code."""
    parts, end = [], 0
    for match in _TOKEN.finditer(markdown):
        if match["code"] is None:
            continue
        parts += [change(markdown[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(markdown[end:])])


def formula(match: re.Match[str]) -> str:
    """A formula as MathML; code as it is.

    What Markdown would read as its own (emphasis, cells of tables) is written as character references.
    """
    if match["code"] is not None:
        return match[0]
    block = match["block"]
    latex = block if block is not None else match["quoted"] or match["plain"]
    mathml = convert(" ".join(latex.split()), display="block" if block is not None else "inline")
    for pattern, better in _BETTER:
        mathml = re.sub(pattern, better, mathml)
    safe = re.sub(r"[|*_`\\]", lambda special: f"&#{ord(special[0])};", mathml)
    return f"\n<div>{safe}</div>\n" if block is not None else safe


def options_table(name: str, without: str | None = None) -> str:
    """The fields of a dataclass of options by topic, with type, default and help, as Markdown tables.

    Fields inherited from `transformers.TrainingArguments` unchanged are left out.

    Args:
        name: Full name of the dataclass.
        without: Full name of a base of it, whose fields are left out where they are taken over unchanged.
    """
    kind = pkgutil.resolve_name(name)
    known = pkgutil.resolve_name(without).__dataclass_fields__ if without else {}
    hints = get_type_hints(kind)
    own = (base for base in reversed(kind.__mro__) if base.__module__.startswith("pi_rl"))
    names = dict.fromkeys(field for base in own for field in base.__annotations__)  # in the order of the source
    groups: dict[str, list[str]] = {}
    for field in (kind.__dataclass_fields__[field] for field in names):
        if "group" not in field.metadata or known.get(field.name) is field:
            continue
        shown = (f"`{field.name}`", f"`{describe_type(hints[field.name])}`", _default(field), field.metadata["help"])
        row = " | ".join(cell.replace("|", " or ") for cell in shown)
        groups.setdefault(field.metadata["group"], []).append(f"| {row} |")
    head = "| option | type | default | meaning |\n|---|---|---|---|\n"
    return "\n\n".join(f"### {group}\n\n{head}" + "\n".join(rows) for group, rows in groups.items())


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    plain = to_plain(value, strict=False)
    if plain is None:
        return "–"
    return f"`{str(plain).lower() if isinstance(plain, bool) else plain}`"


def notebook_page(path: Path) -> str:
    """A notebook with its outputs as Markdown.

    Args:
        path: The notebook, executed.
    """
    notebook = nbformat.read(path, as_version=4)
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.source.strip():
            parts.append(f"```python\n{cell.source}\n```")
            parts += [shown for output in cell.outputs if (shown := _output(output))]
    return "\n\n".join(parts) + "\n"


def _output(output: Any) -> str:
    """One output of a cell: a picture, a film, or text."""
    if output.output_type == "stream":
        return f'<pre class="output">{html.escape(output.text.rstrip())}</pre>' if output.text.strip() else ""
    data = output.get("data", {})
    for kind in ("image/gif", "image/png"):
        if kind in data:
            return (
                f'<p><img alt="what the cell above draws" src="data:{kind};base64,{"".join(data[kind].split())}"></p>'
            )
    if "text/markdown" in data:
        return data["text/markdown"]
    return f'<pre class="output">{html.escape(data["text/plain"])}</pre>' if "text/plain" in data else ""
