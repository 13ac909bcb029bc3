"""`pi-rl assets`: what the simulators need beside their packages, and getting it from its public sources."""

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pi_rl.assets import sources
from pi_rl.assets.download import digest, download_file, download_from_repo, download_repo
from pi_rl.assets.sources import Source
from pi_rl.assets.unpack import move_files, unpack_zip
from pi_rl.cli.parser import WIDTH, CommandParser, UserError, user_errors
from pi_rl.envs import libero_options

LIST = "list"
ROOM = 2.5
"""Free disk space that is asked for, in sizes of the download: an archive and its contents are there at once."""
_DESCRIPTION = """\
Shows which meshes, textures and scenes the simulators need beside their packages, where they are looked for, and
their size, licence and source; downloads them from there. An interrupted download goes on with the same command."""
_EXAMPLES = (
    "pi-rl assets                    what there is, and what is missing here",
    "pi-rl assets libero             asks, then downloads",
    "pi-rl assets maniskill --yes    downloads without asking",
)


def _parser() -> CommandParser:
    parser = CommandParser("assets", _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "what", nargs="?", default=LIST, choices=[LIST, *sources.SIMULATORS], help="what to download (default: list)"
    )
    parser.add_argument(
        "--dir",
        type=Path,
        help="folder: for libero that of the assets themselves, for maniskill the one that MS_ASSET_DIR names "
        "(default: where the simulator looks first)",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the subcommand; returns the exit code.

    Raises:
        UserError: Something that the user can put right.
    """
    args = _parser().parse(argv)
    folder = None if args.dir is None else args.dir.expanduser().absolute()
    if args.what == LIST:
        print(json.dumps(_as_json(folder), indent=2) if args.json else _as_text(folder))
        return 0
    if args.json:
        raise UserError("--json belongs to the list; leave it out to download.")
    wanted = [source for source in sources.SOURCES if source.simulator == args.what]
    missing = [source for source in wanted if _place(source, folder)[1]]
    for source in wanted:
        if source not in missing:
            print(f"{source.name}: already in {_place(source, folder)[0]}")
    if missing:
        _confirm(missing, folder, args.yes)
        for source in missing:
            with user_errors():
                _get(source, source.target(folder))
        _say_where(args.what, folder)
    return 0


def _place(source: Source, folder: Path | None) -> tuple[Path, list[str]]:
    """Where a source's files are or belong, and what is missing there."""
    found = sources.libero_found() if source.simulator == "libero" and folder is None else None
    place = found or source.target(folder)
    return place, source.missing(place)


def _confirm(missing: Sequence[Source], folder: Path | None, yes: bool) -> None:
    """Shows what is going to happen and asks, where somebody can answer.

    Raises:
        UserError: There is too little room, nobody can be asked, or the answer is no.
    """
    print("\n\n".join(_describe(source, folder) for source in missing))
    size = sum(source.size for source in missing)
    place = missing[0].target(folder)
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < ROOM * size:
        raise UserError(
            f"{place} has {_size(free)} free, and {_size(ROOM * size)} are needed (to download and unpack); make room "
            "or give another --dir."
        )
    print(f"\n{_size(size)} in all.", flush=True)
    if yes:
        return
    if not sys.stdin.isatty():
        raise UserError("Nobody can be asked here (standard input is no terminal); add --yes to download.")
    if input("Download? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was downloaded.")


def _get(source: Source, target: Path) -> None:
    """Downloads and unpacks one source, and checks that it is complete then.

    Raises:
        OSError: The download failed.
        ValueError: What arrived is not what is expected.
    """
    print(f"\n{source.name} → {target}", flush=True)
    staging = target.parent / f".{target.name}.download"  # simulators never see half a download
    if source.repo and not source.archive:
        commit = download_repo(source.repo, staging, source.prefix)
        print(f"  {source.repo} at {commit}")
        shutil.rmtree(staging / ".cache", ignore_errors=True)  # the Hub client's notes
        move_files(staging / source.prefix, target)
    else:
        archive = _archive(source, staging)
        if source.sha256 and (found := digest(archive)) != source.sha256:
            shutil.rmtree(staging)
            raise ValueError(
                f"{archive.name} has the SHA-256 {found}, not {source.sha256}: it is damaged or was changed by its "
                "publisher. It was removed."
            )
        print(f"  {unpack_zip(archive, target)} files unpacked")
    shutil.rmtree(staging, ignore_errors=True)
    if absent := source.missing(target):
        raise ValueError(f"{source.origin} did not hold {', '.join(absent)}; {target} is incomplete.")


def _archive(source: Source, staging: Path) -> Path:
    if source.repo and source.archive:
        return download_from_repo(source.repo, source.archive, staging)
    assert source.url is not None
    return download_file(source.url, staging / "archive.zip")


def _say_where(simulator: str, folder: Path | None) -> None:
    """What must be set so that a folder of the user's own is found."""
    if folder is not None:
        variable = {"libero": libero_options.ASSETS_VARIABLE, "maniskill": "MS_ASSET_DIR"}[simulator]
        print(f"\nTo use it: export {variable}={folder}   (or the environment's option assets)")


def _as_text(folder: Path | None) -> str:
    parts = [_describe(source, folder) for source in sources.SOURCES]
    others = [_wrapped(f"{name}: {text}") for name, text in sources.WITHOUT_DOWNLOAD.items()]
    ending = "To download: pi-rl assets libero, pi-rl assets maniskill"
    return "\n\n".join([*parts, "\n".join(others), ending])


def _describe(source: Source, folder: Path | None) -> str:
    place, missing = _place(source, folder)
    state = f"missing: {', '.join(missing)}" if missing else "present"
    lines = [
        f"{source.simulator}: {source.name} ({source.content}), {_size(source.size)}",
        f"  for      {source.needed_for}",
        f"  looked   {source.looked_for}",
        f"  here     {place}",
        f"  state    {state}",
        f"  source   {source.origin}",
        f"  licence  {source.licence}",
    ]
    return "\n".join(_wrapped(line, "           ") for line in lines)


def _wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _as_json(folder: Path | None) -> list[dict[str, Any]]:
    return [
        {
            "simulator": source.simulator,
            "name": source.name,
            "content": source.content,
            "looked_for": source.looked_for,
            "path": str(place),
            "present": not missing,
            "missing": missing,
            "bytes": source.size,
            "licence": source.licence,
            "source": source.origin,
        }
        for source in sources.SOURCES
        for place, missing in [_place(source, folder)]
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
