"""Files around the package: pinned versions, accelerate configurations, versions for reports."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pi_rl import __version__
from pi_rl.__about__ import package_versions

ROOT = Path(__file__).parent.parent
PINS = {
    canonicalize_name(name): version
    for name, _, version in (
        line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"
    )
}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def test_constraints_are_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+", line), line


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_is_pinned_to_a_version_it_allows(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    assert name in PINS
    assert requirement.specifier.contains(PINS[name], prereleases=True)


@pytest.mark.parametrize(
    ("name", "processes", "cpu"),
    [
        ("cpu", 1, True),
        ("cpu_ddp", 2, True),
        ("one_gpu", 1, False),
        ("ddp_8gpu", 8, False),
        ("fsdp_8gpu", 8, False),
    ],
)
def test_accelerate_reads_our_configurations(name: str, processes: int, cpu: bool) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"recipes/accelerate/{name}.yaml"))
    assert (config.num_processes, config.use_cpu, config.mixed_precision) == (processes, cpu, "no")


def test_versions_for_reports() -> None:
    versions = package_versions()
    assert versions["pi_rl"] == __version__
    assert versions["torch"].startswith("2.11")
    assert "not installed" not in versions.values()
