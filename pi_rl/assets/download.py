"""Downloads that resume and check what they got: from the Hugging Face Hub, and single files over HTTP."""

import fnmatch
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pi_rl.progress import Progress, ProgressFn

CHUNK = 1 << 20
ATTEMPTS = 4
TIMEOUT_S = 30.0


class DownloadError(OSError):
    """A download that failed; what was received is kept, so that the same command goes on from there."""


def download_repo(repo: str, folder: Path, prefix: str = "") -> str:
    """Downloads a dataset of the Hub, or one folder of it; files that are there and complete are not fetched again.

    Args:
        repo: "user/name".
        folder: Gets the dataset's files at their names, or those below `prefix`.
        prefix: Folder of the dataset; empty for all of it.

    Returns:
        The commit that was downloaded.

    Raises:
        DownloadError: The Hub cannot be reached or answers with an error, a name leaves the folder, or a file is
            not what the Hub says it is.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().dataset_info(repo, files_metadata=True)
        files = [file for file in info.siblings or () if not prefix or file.rfilename.startswith(f"{prefix}/")]
        _check_names(repo, [file.rfilename for file in files])
        patterns = [f"{prefix}/*"] if prefix else None
        snapshot_download(repo, repo_type="dataset", revision=info.sha, local_dir=folder, allow_patterns=patterns)
    except DownloadError:
        raise
    except (HfHubHTTPError, OSError, *_httpx_errors()) as error:
        raise _failed(repo, error) from error
    wrong = [file.rfilename for file in files if not _is_complete(folder / file.rfilename, file)]
    if wrong:
        for name in wrong:
            (folder / name).unlink(missing_ok=True)
        raise DownloadError(
            f"{len(wrong)} of {len(files)} files of {repo}, such as {wrong[0]}, did not arrive as the Hub describes "
            "them; they were removed, run the command again."
        )
    return info.sha or "unknown"


def _check_names(repo: str, names: Sequence[str]) -> None:
    """Refuses a repository without files, or one whose names would leave the folder."""
    if not names:
        raise DownloadError(f"{repo} holds none of the files that are expected there.")
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise DownloadError(f"{repo} holds a file named {name!r}, which would leave the folder; nothing is done.")


def _is_complete(path: Path, file: Any) -> bool:
    if fnmatch.fnmatch(file.rfilename, ".git*"):
        return True
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return False
    return file.lfs is None or digest(path) == file.lfs.sha256


def download_from_repo(repo: str, name: str, folder: Path) -> Path:
    """Downloads one file of a dataset of the Hub; an interrupted download goes on.

    Args:
        repo: "user/name".
        name: The file's.
        folder: Gets the file.

    Raises:
        DownloadError: The Hub cannot be reached or answers with an error.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset", local_dir=folder))
    except (HfHubHTTPError, OSError, *_httpx_errors()) as error:
        raise _failed(repo, error) from error


def _httpx_errors() -> tuple[type[Exception], ...]:
    import httpx  # huggingface_hub's client

    return (httpx.HTTPError,)


def _failed(what: str, error: Exception) -> DownloadError:
    text = " ".join(str(error).split()) or type(error).__name__
    return DownloadError(
        f"{what} could not be downloaded: {text}. What arrived is kept: the same command goes on from there."
    )


def download_file(url: str, path: Path, progress: ProgressFn | None = None) -> Path:
    """Downloads a file over HTTP; what an earlier attempt got is kept, and only the rest is asked for.

    Args:
        url: Address.
        path: File to write; it appears only when complete. Parts lie beside it.
        progress: Called with bytes received and in total, where the server says how many there are.

    Raises:
        DownloadError: The server cannot be reached, refuses, or ends every attempt too early.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    problem: Exception = OSError("no attempt")
    for attempt in range(ATTEMPTS):
        try:
            _receive(url, part, progress or Progress(path.name, "bytes"))
            os.replace(part, path)
            _tag_file(part).unlink(missing_ok=True)
            return path
        except urllib.error.HTTPError as error:
            problem = error
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)  # longer than the file: begin anew
            elif error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in (408, 429):
                break
        except (OSError, http.client.HTTPException) as error:
            problem = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(min(2.0**attempt, 8.0) / 4)
    raise _failed(url, problem) from problem


def _receive(url: str, part: Path, progress: ProgressFn) -> None:
    """One attempt: asks for what is missing, takes everything where the server sends everything."""
    have = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "pi_rl"}
    tag = _tag_file(part).read_text() if have and _tag_file(part).is_file() else ""
    if have and tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        continued = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        have = have if continued else 0
        tag = answer.headers.get("ETag") or ""
        _tag_file(part).write_text("" if tag.startswith("W/") else tag)  # a weak one cannot tell bytes apart
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with part.open("ab" if continued else "wb") as file:
            while block := answer.read(CHUNK):
                file.write(block)
                have += len(block)
                if total:
                    progress(have, total, "")
        if total and have != total:
            raise http.client.IncompleteRead(b"", total - have)


def _tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
