"""Pushing policies with the real Hub client to a Hub on the loopback interface."""

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants, snapshot_download

from pi_rl.hub.push import WAITS_S, check_repo_id, push_and_tell, push_folder
from pi_rl.hub.push_contents import checkpoint_contents, policy_contents, without_machine
from pi_rl.policies.checkpoints import load_policy
from tests.hub.hub_server import File

REPO = "user/policy"
TOKEN = "hf_abcdefghijABCDEFGHIJabcdefghijABCD"


@pytest.fixture
def folder(small_pi0_folder, tmp_path):
    """A copy of a small policy in a run's folder, which tests may change."""
    return Path(shutil.copytree(small_pi0_folder, tmp_path / "run" / "policy"))


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Waits of the client and of ours, in seconds; they pass at once."""
    sleep, waited = time.sleep, []

    def recorded(seconds):
        waited.append(seconds)
        sleep(min(seconds, 0.01))

    monkeypatch.setattr(time, "sleep", recorded)
    return waited


def push(folder, repo=REPO, **options):
    outcome = push_folder(folder, repo, **options)
    assert outcome.error is None, outcome.error
    return outcome


def assert_complete(hub, folder, revision="main"):
    held = hub.repos[REPO].files(revision)
    for path in folder.glob("*.safetensors"):
        assert held[path.name] == path.read_bytes(), path.name
    assert {"config.json", "policy_preprocessor.json", "policy_postprocessor.json", "README.md"} <= set(held)


# ---- uploads -------------------------------------------------------------------------------------------------------


def test_upload_creates_the_repository_and_holds_the_policy(hub_here, folder):
    outcome = push(folder, message="First")
    held = hub_here.repos[REPO].files()
    assert set(outcome.files) == set(held) - {".gitattributes"}
    assert_complete(hub_here, folder)
    assert outcome.url == f"{hub_here.address}/{REPO}"
    assert outcome.commit == hub_here.repos[REPO].branches["main"]
    assert outcome.changed
    assert hub_here.repos[REPO].messages == ["initial commit", "First"]
    card = ModelCard(held["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("lerobot", "robotics")


def test_second_push_sends_nothing(hub_here, folder):
    push(folder)
    hub_here.forget()
    outcome = push(folder)
    assert not outcome.changed
    assert outcome.url is not None
    assert hub_here.count("PUT") == hub_here.count("POST", "/commit/") == 0
    assert len(hub_here.repos[REPO].messages) == 2


def test_only_the_changed_file_is_sent(hub_here, folder):
    push(folder)
    hub_here.forget()
    (folder / "before_after.mp4").write_bytes(b"film")
    assert push(folder).changed
    assert hub_here.count("PUT") == 1
    assert hub_here.repos[REPO].files()["before_after.mp4"] == b"film"


REPLACED = ["adapter_config.json", "adapter_model.safetensors", "results.json", "before_after.mp4", "videos/task.mp4",
            "critic.safetensors", "model-00001-of-00002.safetensors", "adapter/adapter_config.json"]  # fmt: skip
FOREIGN = ["teaser.mp4", "notes.md", "mine/results.json", "videos/deep/task.mp4", "adapter/more/model.safetensors",
           "last-checkpoint/model.safetensors", ".gitattributes"]  # fmt: skip


@pytest.mark.parametrize("revision", [None, "step-40"])
def test_what_an_earlier_push_left_is_removed_in_the_same_commit(hub_here, folder, revision):
    repo = hub_here.create(REPO)
    repo.commit("main", {name: File(b"of another policy", lfs=False) for name in [*REPLACED, *FOREIGN]}, "Earlier")
    outcome = push(folder, revision=revision)
    held = repo.files(revision or "main")
    assert set(outcome.removed) == set(REPLACED)
    assert f"{len(REPLACED)} of an earlier push removed" in outcome.describe()
    assert set(held) == {*outcome.files, *FOREIGN}
    assert repo.messages == ["initial commit", "Earlier", "Upload policy"]
    assert load_policy(REPO, revision=revision).policy.config.type == "pi0_small"
    assert not push(folder, revision=revision).changed


def test_a_removal_whose_answer_was_lost_is_not_made_twice(hub_here, folder):
    repo = hub_here.create(REPO)
    repo.commit("main", {"results.json": File(b"{}", lfs=False)}, "Earlier")
    hub_here.fail("/commit/", 0)
    assert push(folder).changed
    assert repo.messages == ["initial commit", "Earlier", "Upload policy"]
    assert "results.json" not in repo.files()


def test_large_files_go_in_parts(hub_here, folder):
    size = (folder / "model.safetensors").stat().st_size
    hub_here.part_size = size // 3 + 1
    push(folder)
    assert hub_here.count("PUT", r"/\d$") == 3
    assert_complete(hub_here, folder)


def test_branches_are_made_and_main_stays(hub_here, folder):
    outcome = push(folder, revision="step-40")
    assert_complete(hub_here, folder, "step-40")
    assert set(hub_here.repos[REPO].files()) == {".gitattributes"}
    assert outcome.url.endswith("/tree/step-40")
    assert push(folder, revision="step-40").changed is False


def test_private_repositories_are_private(hub_here, folder, monkeypatch):
    push(folder, private=True)
    assert hub_here.repos[REPO].private
    assert push(folder, private=True).changed is False
    monkeypatch.setenv("HF_TOKEN", hub_here.other_token)
    with pytest.raises(Exception, match="404"):
        load_policy(REPO)


def test_private_push_to_a_public_repository_is_refused(hub_here, folder):
    hub_here.create(REPO)
    outcome = push_folder(folder, REPO, private=True)
    assert "public" in outcome.error
    assert outcome.refused
    assert hub_here.count("PUT") == hub_here.count("POST", "/commit/") == 0


# ---- contents ------------------------------------------------------------------------------------------------------


def test_pickles_data_and_hidden_files_stay(folder):
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "model.pkl", "old.ckpt", ".env", "notes.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "demos").mkdir()
    (folder / "demos" / "data.json").write_text("{}")
    contents = policy_contents(folder, REPO)
    assert {Path(name).suffix for name in contents.files} <= {".json", ".safetensors", ".md"}
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "model.pkl", "old.ckpt"):
        assert "pickle" in contents.left_out[name]
    assert contents.left_out["demos/data.json"] == contents.left_out["notes.txt"] == "no part of a policy"
    whole = checkpoint_contents(folder, REPO, "last-checkpoint")
    assert not [
        name for name in whole.files if name.endswith((".pt", ".pth", ".bin", ".pkl", ".ckpt", ".env", ".txt"))
    ]


def test_a_runs_folder_gives_policy_results_curve_and_videos(folder):
    run = folder.parent
    (run / "pi_rl_config.yaml").write_text("num_envs: 4\n")
    (run / "results.json").write_text("{}")
    (run / "learning_curve.png").write_bytes(b"png")
    (run / "videos").mkdir()
    (run / "videos" / "task.mp4").write_bytes(b"film")
    (run / "sft").mkdir()
    (run / "sft" / "model.safetensors").write_bytes(b"other")
    expected = {"pi_rl_config.yaml", "results.json", "learning_curve.png", "videos/task.mp4", "model.safetensors"}
    assert expected <= set(policy_contents(run, REPO).files)
    assert not [name for name in policy_contents(run, REPO).files if name.startswith("sft")]
    (folder / "pi_rl_config.yaml").write_text("num_envs: 4\n")  # as every policy that a trainer saves
    assert expected <= set(policy_contents(folder, REPO).files)
    checkpoint = shutil.copytree(folder, run / "checkpoint-8")
    assert "pi_rl_config.yaml" in policy_contents(checkpoint, REPO).files
    assert "results.json" not in policy_contents(checkpoint, REPO).files


def test_published_texts_hold_no_paths_and_no_tokens(hub_here, folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    run = folder.parent
    (run / "pi_rl_config.yaml").write_text(
        f"output_dir: {run}\nmodel: '{folder}'\nenv: toy\nhub_token: {TOKEN}\n", encoding="utf-8"
    )
    (folder / "README.md").write_text(
        f"---\nlibrary_name: lerobot\n---\nπ0 / π0.5, /second. `--output_dir {run}/x --hub_token {TOKEN}` and "
        "https://huggingface.co/a/b and 0123456789abcdef0123; load path/to/this/folder\n",
        encoding="utf-8",
    )
    push(run)
    held = hub_here.repos[REPO].files()
    for name, content in held.items():
        if not name.endswith(".safetensors") and name != "tokenizer.json":
            assert str(run).encode() not in content, name
            assert TOKEN.encode() not in content, name
            assert b"0123456789abcdef0123" not in content, name
    card = held["README.md"].decode()
    assert "π0 / π0.5, /second." in card
    assert "https://huggingface.co/a/b" in card
    assert f"load {REPO}" in card
    assert "model: 'policy'" in held["pi_rl_config.yaml"].decode()


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("https://huggingface.co/datasets/user/demos", "https://huggingface.co/datasets/user/demos"),
        ("a/datasets/b and ../datasets/c, ~/datasets/d", "a/datasets/b and ../datasets/c, ~/datasets/d"),
        ("output_dir: /datasets/run", "output_dir: run"),
        ("'/datasets/my run' PATH:/datasets/x file:///datasets/y", "'my run' PATH:x file://y"),
    ],
)
def test_only_whole_paths_of_this_machine_are_shortened(text, published):
    assert without_machine(text, ["/datasets"]) == published


def test_an_adapter_is_pushed_when_others_can_load_its_base(hub_here, folder):
    push(folder, "user/base")
    for name in ("model.safetensors", "README.md"):
        (folder / name).unlink()
    adapter = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(ValueError, match=r"without adapter_model\.safetensors"):
        policy_contents(folder, REPO)
    (folder / "adapter_model.safetensors").write_bytes(b"factors")
    for base in (str(folder), None, "", ["user/base"]):
        (folder / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=r"need a Hub id.*--to merged"):
            policy_contents(folder, REPO)
    (folder / "adapter_config.json").write_text(json.dumps({**adapter, "base_model_name_or_path": "user/base"}))
    push(folder)
    held = hub_here.repos[REPO].files()
    assert held["adapter_model.safetensors"] == b"factors"
    assert json.loads(held["adapter_config.json"])["base_model_name_or_path"] == "user/base"
    assert ModelCard(held["README.md"].decode()).data.base_model == "user/base"


def test_the_uploaded_tokenizer_is_named_by_the_repository(hub_here, folder):
    before = (folder / "config.json").read_bytes()
    push(folder)
    held = hub_here.repos[REPO].files()
    steps = json.loads(held["policy_preprocessor.json"])["steps"]
    assert [step["config"]["tokenizer_name"] for step in steps if "tokenizer" in step["registry_name"]] == [REPO]
    assert json.loads(held["config.json"])["tokenizer_name"] == REPO
    assert (folder / "config.json").read_bytes() == before


def test_a_tokenizer_outside_the_folder_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer in .* not uploaded"):
        policy_contents(folder, REPO)


def test_an_odd_folder_never_stops_the_run_that_pushes_it(folder, capsys):
    (folder / "policy_preprocessor.json").write_text('{"stages": []}')
    outcome = push_and_tell(folder, REPO)
    assert outcome.refused
    assert "steps" in outcome.error
    assert f"pi-rl push {folder} --repo {REPO}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["policy", "a/b/c", "user/..", "user/na me", ""])
def test_names_that_cannot_be_a_repository_are_refused(name):
    with pytest.raises(ValueError, match="repository"):
        check_repo_id(name)


def test_folders_without_a_policy_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        policy_contents(tmp_path / "nothing", REPO)
    with pytest.raises(ValueError, match="no policy"):
        policy_contents(tmp_path, REPO)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        policy_contents(folder, REPO)


# ---- a Hub that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_path", "status"),
    [
        ("/api/repos/create", 429),
        ("/commit/", 409),
        ("/commit/", 412),
        ("/commit/", 429),
        ("/commit/", 500),
        ("/api/validate-yaml", 503),
        ("/preupload/", 429),
        ("/objects/batch", 500),
        ("/lfs/", 500),
    ],
)
def test_errors_that_pass_are_repeated(hub_here, folder, request_path, status):
    hub_here.fail(request_path, status, times=2)
    assert push(folder).changed
    assert_complete(hub_here, folder)


def test_the_waiting_time_of_the_hub_counts(hub_here, folder, waits):
    hub_here.fail("/commit/", 429, headers={"Retry-After": "77"})
    push(folder)
    assert 77 in waits


def test_errors_that_stay_end_the_push_with_the_command_to_repeat_it(hub_here, folder, waits):
    hub_here.fail("/commit/", 500, times=100)
    outcome = push_folder(folder, REPO)
    assert "500" in outcome.error
    assert not outcome.refused
    assert outcome.command == f"pi-rl push {folder} --repo {REPO}"
    assert hub_here.count("POST", "/commit/") == len(WAITS_S) + 1
    assert [wait for wait in waits if wait >= 1][-len(WAITS_S) :] == list(WAITS_S)
    hub_here.faults.clear()
    hub_here.forget()
    assert push(folder).changed
    assert hub_here.count("PUT") == 0  # the weights had arrived
    assert_complete(hub_here, folder)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub_here, folder):
    hub_here.fail("/commit/", 0)
    assert push(folder).changed
    assert hub_here.repos[REPO].messages == ["initial commit", "Upload policy"]


def test_a_cut_upload_is_repeated(hub_here, folder):
    hub_here.cut_uploads(5_000, 20_000)
    push(folder)
    assert_complete(hub_here, folder)


def test_an_interrupted_push_is_completed_by_the_next(hub_here, folder):
    weights = "/lfs/" + hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub_here.fail(weights, 500, times=100)
    outcome = push_folder(folder, REPO)
    assert outcome.error is not None
    assert set(hub_here.repos[REPO].files()) == {".gitattributes"}  # no half of a policy
    hub_here.faults.clear()
    hub_here.forget()
    push(folder)
    assert hub_here.count("PUT") == hub_here.count("PUT", weights) == 1
    assert_complete(hub_here, folder)


def test_a_token_without_write_access_is_refused_at_once(hub_here, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_here.read_token)
    outcome = push_folder(folder, REPO)
    assert "may not write to user" in outcome.error
    assert outcome.refused
    assert hub_here.count("POST", "/create") == 1
    hub_here.create(REPO)
    assert "may not write to user" in push_folder(folder, REPO).error


def test_an_unknown_token_is_refused_and_not_shown(hub_here, folder):
    outcome = push_folder(folder, REPO, token=TOKEN)
    assert "hf auth login" in outcome.error
    assert outcome.refused
    hub_here.fail("/create", 403, message=f"the token {TOKEN} is bad, {hub_here.write_token}")
    shown = push_folder(folder, REPO, token=hub_here.write_token).error
    assert "is bad" in shown
    assert TOKEN not in shown
    assert hub_here.write_token not in shown


def test_offline_and_an_unreachable_hub_are_said(hub_here, folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        outcome = push_folder(folder, REPO)
        assert "HF_HUB_OFFLINE" in outcome.error
        assert outcome.refused
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    outcome = push_folder(folder, REPO)
    assert "cannot be reached" in outcome.error
    assert not outcome.refused


def test_a_card_that_cannot_be_read_or_is_refused_stops_before_the_upload(hub_here, folder):
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(ValueError, match="metadata"):
        push_folder(folder, REPO)
    (folder / "README.md").write_text("---\ntags: [[1]]\n---\n")
    outcome = push_folder(folder, REPO)
    assert "tags" in outcome.error
    assert outcome.refused
    assert hub_here.count("PUT") == 0


# ---- downloads -----------------------------------------------------------------------------------------------------


def test_a_cut_download_continues_where_it_was_cut(hub_here, folder, monkeypatch):
    push(folder)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # what the client keeps are whole ones
    hub_here.cut_downloads("model.safetensors", 100_000, 150_000)
    downloaded = Path(snapshot_download(REPO))
    assert (downloaded / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    starts = [range_ for path, range_ in hub_here.ranges if path.endswith("model.safetensors")]
    assert starts == ["bytes=100000-", "bytes=250000-"]


def test_a_policy_from_the_hub_is_the_one_that_was_pushed(hub_here, folder):
    commit = push(folder).commit
    loaded, local = load_policy(REPO, revision=commit), load_policy(folder)
    for (name, value), other in zip(
        loaded.policy.state_dict().items(), local.policy.state_dict().values(), strict=True
    ):
        assert value.equal(other), name
    assert loaded.path is not None
    assert loaded.path.name == commit
