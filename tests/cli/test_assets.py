"""`pi-rl assets` against a loopback server, with the real Hub client; the real hosts cannot be reached from tests."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pi_rl.assets import download, sources, unpack
from pi_rl.cli import assets as command
from pi_rl.cli.main import main
from pi_rl.envs import libero_options
from tests.cli.servers import COMMIT, Contents, serve

LIBERO = "datasets/lerobot/libero-assets"
RNG_BYTES = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(256)) * 40  # 327,680 bytes


def zipped(files, link=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if link:
            entry = zipfile.ZipInfo(link)
            entry.external_attr = 0o120777 << 16
            archive.writestr(entry, "/etc")
    return buffer.getvalue()


def libero_files(**more):
    names = (*libero_options.ASSET_FOLDERS, "turbosquid_objects")
    return {f"{name}/part.xml": RNG_BYTES + name.encode() for name in names} | {"README.md": b"card"} | more


def online(url):
    """The environment of a user who is online, whose Hub is our server."""
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return {**kept, "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def run(url, *words, code="from pi_rl.cli.main import main"):
    script = f"import sys; {code}; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        env=online(url), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_libero_arrives_although_the_connection_breaks(tmp_path, capsys):
    target = tmp_path / "libero"
    path = f"/{LIBERO}/resolve/{COMMIT}/scenes/part.xml"
    contents = Contents(repos={LIBERO: libero_files()}, cuts={path: [100_000, None]})
    with serve(contents) as url:
        done = run(url, "assets", "libero", "--yes", "--dir", target)
        assert done.returncode == 0, done.stderr
    assert main(["assets", "libero", "--dir", str(target)]) == 0  # nothing to do: nobody needs to be asked
    assert "422 MB" in done.stdout
    assert "NVIDIA HOPE" in done.stdout
    assert f"export {libero_options.ASSETS_VARIABLE}={target}" in done.stdout
    assert "already in" in capsys.readouterr().out
    assert libero_options.find_assets(str(target)) == target
    assert (target / "scenes/part.xml").read_bytes() == libero_files()["scenes/part.xml"]
    assert contents.count("GET")[path] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["libero"]


@pytest.mark.slow
def test_an_interrupted_download_leaves_nothing_that_looks_complete_and_goes_on(tmp_path):
    target = tmp_path / "libero"
    path = f"/{LIBERO}/resolve/{COMMIT}/textures/part.xml"
    contents = Contents(repos={LIBERO: libero_files()}, refuse={path: [403] * 20})
    with serve(contents) as url:
        broken = run(url, "assets", "libero", "--yes", "--dir", target)
        assert broken.returncode == 2
        assert "the same command goes on from there" in broken.stderr
        assert "Traceback" not in broken.stderr
        assert not target.exists()
        contents.refuse.clear()
        contents.seen.clear()
        assert run(url, "assets", "libero", "--yes", "--dir", target).returncode == 0
    assert libero_options.find_assets(str(target)) == target
    fetched = [name for name in contents.count("GET") if name.endswith("part.xml")]
    assert path in fetched
    assert len(fetched) < len(libero_files()) - 1  # the others had arrived


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (Contents(repos={LIBERO: libero_files(**{"../evil.xml": b"x"})}), "would leave the folder"),
        (Contents(repos={LIBERO: libero_files()}, told={"scenes/part.xml": RNG_BYTES}), "scenes/part.xml"),
        (Contents(), "could not be downloaded"),
        (Contents(repos={LIBERO: {"README.md": b"card"}}), "did not hold articulated_objects"),
    ],
    ids=["path outside", "not what was announced", "no such repository", "other content"],
)
def test_what_is_wrong_at_the_source_is_one_message(tmp_path, contents, message):
    with serve(contents) as url:
        done = run(url, "assets", "libero", "--yes", "--dir", tmp_path / "libero")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "evil.xml").exists()


@pytest.mark.slow
def test_an_unreachable_hub_is_one_message(tmp_path):
    done = run("http://127.0.0.1:9", "assets", "libero", "--yes", "--dir", tmp_path / "libero")
    assert done.returncode == 2
    assert "could not be downloaded" in done.stderr
    assert "Traceback" not in done.stderr


BRIDGE = {
    "bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb": b"stage",
    "bridge_v2_real2sim_dataset/custom/models/sink/collision.obj": b"mesh",
    "bridge_v2_real2sim_dataset/real_inpainting/photo.png": b"photo",
    "__MACOSX/._x": b"",
}
CARROT = {
    f"carrot/{name}": b"{}"
    for name in ("more_carrot/model_db.json", "more_plate/model_db.json", "more_table/imgs/a", "more_table/textures/b")
}


def maniskill_server(bridge, url=""):
    robot = zipped({"ManiSkill-WidowX250S-0.2.0/wx250s.urdf": b"robot"})
    return Contents(
        repos={
            "datasets/haosulab/ManiSkill_bridge_v2_real2sim": {"bridge_v2_real2sim_dataset.zip": bridge},
            "datasets/RLinf/maniskill_assets": {**CARROT, "other/thing.bin": b"not asked for"},
        },
        files={"/widowx.zip": robot},
        cuts={"/widowx.zip": [60, None]},
    )


def driver(url, sha256):
    """The command with the addresses of our server in its table; the robot's archive is not on the Hub."""
    return (
        "import dataclasses; from pi_rl.assets import sources; "
        f"sources.SOURCES = tuple(dataclasses.replace(s, url={url + '/widowx.zip'!r} if s.url else None, "
        f"sha256={sha256!r} if s.sha256 else None) for s in sources.SOURCES); from pi_rl.cli.main import main"
    )


def test_maniskill_arrives_from_three_sources(tmp_path, monkeypatch):
    bridge = zipped(BRIDGE)
    contents = maniskill_server(bridge)
    with serve(contents) as url:
        code = driver(url, hashlib.sha256(bridge).hexdigest())
        done = run(url, "assets", "maniskill", "--yes", "--dir", tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    data = tmp_path / "data"
    assert (data / "tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb").read_bytes() == b"stage"
    assert (data / "robots/widowx/wx250s.urdf").read_bytes() == b"robot"
    assert (data / "carrot/more_table/imgs/a").is_file()
    assert not (data / "other").exists()
    assert not list(tmp_path.rglob("*.download"))
    assert any(path == "/widowx.zip" and wanted == "bytes=60-" for _, path, wanted in contents.seen)
    # where the simulator looks
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    monkeypatch.delenv("MANISKILL_ASSET_DIR", raising=False)
    assert not any(command._place(source, None)[1] for source in sources.SOURCES if source.simulator == "maniskill")


@pytest.mark.slow
def test_an_archive_with_another_checksum_is_not_unpacked(tmp_path):
    with serve(maniskill_server(zipped(BRIDGE))) as url:
        done = run(url, "assets", "maniskill", "--yes", "--dir", tmp_path, code=driver(url, "0" * 64))
    assert done.returncode == 2
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "data/tasks/bridge_v2_real2sim_dataset").exists()
    assert not list(tmp_path.rglob("*.zip"))


# ---- single files over HTTP -----------------------------------------------------------------------------------------


def fetch(contents, path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    with serve(contents) as url:
        return download.download_file(f"{url}/file", path, lambda *_: None)


def test_a_file_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    contents = Contents(files={"/file": RNG_BYTES}, cuts={"/file": [1000, 5000, None]})
    assert fetch(contents, tmp_path / "x", monkeypatch).read_bytes() == RNG_BYTES
    assert [wanted for *_, wanted in contents.seen] == [None, "bytes=1000-", "bytes=6000-"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path, monkeypatch):
    first = Contents(files={"/file": RNG_BYTES}, cuts={"/file": [1000] * 9})
    with pytest.raises(download.DownloadError, match="the same command goes on"):
        fetch(first, tmp_path / "x", monkeypatch)
    assert not (tmp_path / "x").exists()
    other = RNG_BYTES[::-1]
    assert fetch(Contents(files={"/file": other}), tmp_path / "x", monkeypatch).read_bytes() == other


def test_a_server_without_ranges_sends_everything_again(tmp_path, monkeypatch):
    contents = Contents(files={"/file": RNG_BYTES}, cuts={"/file": [1000, None]}, ranges=False)
    assert fetch(contents, tmp_path / "x", monkeypatch).read_bytes() == RNG_BYTES


def test_a_busy_server_is_asked_again_a_missing_file_is_not(tmp_path, monkeypatch):
    contents = Contents(files={"/file": RNG_BYTES}, refuse={"/file": [503, 429]})
    assert fetch(contents, tmp_path / "x", monkeypatch).read_bytes() == RNG_BYTES
    missing = Contents()
    with pytest.raises(download.DownloadError, match="404"):
        fetch(missing, tmp_path / "y", monkeypatch)
    assert len(missing.seen) == 1


# ---- unpacking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "a\\..\\evil", "C:/evil"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    (tmp_path / "x.zip").write_bytes(zipped({"a/fine": b"1", name: b"2"}))
    with pytest.raises(ValueError, match="would leave the folder"):
        unpack.unpack_zip(tmp_path / "x.zip", tmp_path / "in" / "here")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".zip"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped({"a": b"1"}, link="b"), "link"),
        (zipped({"a": bytes(2_000_000)}), "more than is expected"),
        (zipped({"a": RNG_BYTES})[:5000], "no usable zip"),
        (zipped({}), "empty"),
        (zipped({"a": RNG_BYTES}).replace(b"PK\x01\x02", b"PK\x01\x09"), "zip"),
    ],
    ids=["link", "too large", "cut off", "empty", "damaged"],
)
def test_archives_that_are_refused(tmp_path, content, message):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        unpack.unpack_zip(tmp_path / "x.zip", tmp_path / "here", max_bytes=1_000_000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.zip"]


def test_unpacking_replaces_files_and_leaves_others(tmp_path):
    (tmp_path / "x.zip").write_bytes(zipped({"top/a/b": b"new", "top/c": b"c"}))
    (tmp_path / "here/a").mkdir(parents=True)
    (tmp_path / "here/a/b").write_bytes(b"old")
    (tmp_path / "here/mine").write_bytes(b"mine")
    assert unpack.unpack_zip(tmp_path / "x.zip", tmp_path / "here") == 2
    files = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    found = {str(path.relative_to(tmp_path / "here")): path.read_bytes() for path in files}
    assert found == {"a/b": b"new", "c": b"c", "mine": b"mine"}


# ---- the list, the question -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user without any assets."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("MS_ASSET_DIR", "MANISKILL_ASSET_DIR", libero_options.ASSETS_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def test_the_list_says_where_how_large_under_which_licence_and_from_where(capsys):
    assert main(["assets"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for source in sources.SOURCES:
        for part in (source.name, source.origin, source.licence, source.looked_for):
            assert part in text
    assert "calvin" in text
    assert main(["assets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["present"] for entry in listed] == [False] * len(sources.SOURCES)


@pytest.mark.parametrize("variable", [None, libero_options.ASSETS_VARIABLE])
def test_downloads_go_where_the_simulator_looks(home, monkeypatch, variable):
    if variable:
        monkeypatch.setenv(variable, str(home / "mine"))
    libero = sources.SOURCES[0]
    for name in libero.required:
        (libero.target(None) / name).mkdir(parents=True)
    assert libero_options.find_assets() == libero.target(None)
    assert command._place(libero, None) == (libero.target(None), [])


def test_nobody_to_ask_is_an_error_that_names_the_option(capsys, tmp_path):
    assert main(["assets", "libero", "--dir", str(tmp_path / "x")]) == 2
    assert "--yes" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("", 2)])
def test_the_question(monkeypatch, capsys, tmp_path, answer, code):
    fetched = []
    monkeypatch.setattr(command, "_get", lambda source, target: fetched.append(source.name))
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda _: answer)
    assert main(["assets", "maniskill", "--dir", str(tmp_path)]) == code
    assert len(fetched) == (3 if code == 0 else 0)


def test_too_little_room_is_said_before_anything_is_downloaded(monkeypatch, capsys, tmp_path):
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert main(["assets", "libero", "--yes", "--dir", str(tmp_path)]) == 2
    assert "10 MB free" in capsys.readouterr().err


def test_every_source_is_complete():
    for source in sources.SOURCES:
        assert source.required
        assert bool(source.repo) != bool(source.url)
        assert source.origin.startswith("https://")
        assert dataclasses.replace(source).target(Path("/x")).is_relative_to("/x")
