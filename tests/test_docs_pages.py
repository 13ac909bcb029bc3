"""What docs/troubleshooting.md and docs/porting.md quote is in the code: messages, options, commands, files."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from pi_rl import FlowGRPOConfig, FlowPPOConfig, RecipeArguments
from pi_rl.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("troubleshooting", "porting")}
OPTIONS = {
    field.name for kind in (FlowPPOConfig, FlowGRPOConfig, RecipeArguments) for field in dataclasses.fields(kind)
}
OTHERS = {"config", "config_file", "help", "dry_run", "policy", "episodes", "videos", "device_memory_gb"} | {
    "to",  # pi-rl convert's
    "like",
    "pid",  # py-spy's
    "no-install-recommends",  # apt-get's
    "local-dir",  # hf's
}


def strings_of_the_package() -> str:
    """All texts in the source, adjacent literals joined, with a gap where a value is put in."""
    found = []
    for path in (ROOT / "pi_rl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(parts))
    return " ".join("\n".join(found).split())


def quoted() -> list[str]:
    blocks = re.findall(r"^```text\n(.*?)^```", PAGES["troubleshooting"], re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_every_quoted_message_is_in_the_source():
    messages, source = quoted(), strings_of_the_package()
    assert len(messages) > 20
    for message in messages:
        for piece in re.split(r"\s*…\s*", message):
            words = piece.strip(" .:;,()")
            if len(words) > 3:
                assert words in source, f"{words!r} of {message!r}"


def test_every_symptom_of_the_index_has_a_section_that_says_why_and_what_to_do():
    text = PAGES["troubleshooting"]
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"): title for title in sections}
    listed = re.findall(r"\]\(#([\w-]+)\)", text)
    assert len(listed) >= 17
    for anchor in listed:
        body = sections[anchors[anchor]]
        assert anchor == "out-of-memory" or ("Why:" in body and "What to do:" in body), anchor
    assert set(anchors) - set(listed) == {"none-of-these"}


@pytest.mark.parametrize("page", PAGES)
def test_named_options_and_commands_exist(page):
    for option in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", PAGES[page])):
        assert option in OPTIONS | OTHERS, option
    for command in set(re.findall(r"pi-rl ([a-z]+)", PAGES[page])):
        assert command in COMMANDS, command


def test_the_columns_of_porting_name_our_options():
    cells = []
    for block in re.findall(r"^\| RLinf \| here \| remark \|\n\|.*?\n(.*?)(?=\n\n)", PAGES["porting"], re.M | re.S):
        cells += [row.split("|")[2] for row in block.splitlines()]
    assert len(cells) > 45
    for cell in cells:
        for span in re.findall(r"`([a-z_]+)(?:: [^`]*)?`", cell):
            assert span in OPTIONS, span


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    for path in re.findall(r"(?:tests|docs|scripts|recipes|pi_rl)/[\w/.]+\.(?:py|yaml|md)", PAGES[page]):
        assert (ROOT / path).exists(), path
