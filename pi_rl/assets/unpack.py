"""Unpacks zip files of others: nothing leaves the folder, links are refused, and the folder is never half filled."""

import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

MAX_BYTES = 4 << 30


def unpack_zip(archive: Path, target: Path, max_bytes: int = MAX_BYTES) -> int:
    """Unpacks an archive into a folder, without the single folder that such archives usually begin with.

    Files are unpacked beside the target first and moved when all are there; other files of the target stay.

    Args:
        archive: Zip file.
        target: Folder; created if missing.
        max_bytes: Refused if the contents are larger.

    Returns:
        The number of files.

    Raises:
        ValueError: It is no zip file, is damaged or too large, or holds a link or a name that leaves the folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            _check(archive, members, max_bytes)
            for member in members:
                opened.extract(member, aside)  # verifies the checksum
        move_files(_content(aside, target.name), target)
        return len(members)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive.name} is no usable zip file: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(archive: Path, members: list[zipfile.ZipInfo], max_bytes: int) -> None:
    for member in members:
        path = PurePosixPath(member.filename)
        mode = member.external_attr >> 16
        if path.is_absolute() or ".." in path.parts or "\\" in member.orig_filename or ":" in "".join(path.parts[:1]):
            raise ValueError(f"{archive.name} holds {member.filename!r}, which would leave the folder; not unpacked.")
        if stat.S_ISLNK(mode):
            raise ValueError(f"{archive.name} holds the link {member.filename!r}; not unpacked.")
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        raise ValueError(f"{archive.name} would unpack to {total / 1e9:.1f} GB, more than is expected; not unpacked.")
    if not members:
        raise ValueError(f"{archive.name} is empty.")


def _content(aside: Path, name: str) -> Path:
    """The folder that is meant: the one of the target's name, the only one, or everything."""
    entries = [entry for entry in aside.iterdir() if entry.name != "__MACOSX"]
    if (aside / name).is_dir():
        return aside / name
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else aside


def move_files(source: Path, target: Path) -> None:
    """Moves a folder's files to their places in another; the whole folder at once where there is none yet.

    Args:
        source: Folder on the same disk.
        target: Folder; files of the same names are replaced, others stay.
    """
    if not target.exists():
        source.chmod(0o755)  # mkdtemp makes private folders
        os.replace(source, target)
        return
    for path in sorted(source.rglob("*")):
        if path.is_file():
            goal = target / path.relative_to(source)
            goal.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, goal)
