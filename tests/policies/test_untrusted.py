"""Policy folders and repositories with hostile contents: refused with what to do, and nothing of them is executed."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from lerobot.processor import ObservationProcessorStep, PolicyProcessorPipeline, ProcessorStepRegistry

from pi_rl.cli.main import main
from pi_rl.pipeline import RecipeError, run_recipe
from pi_rl.policies.checkpoints import load_policy, save_policy, set_tokenizer_name
from pi_rl.policies.untrusted import LARGEST, check_policy_folder, load_tokenizer, names_to_download, read_json
from tests.cli.servers import COMMIT, Contents, serve

MB = 10**6
GOOD = {"config.json": 2000, "model.safetensors": 7000 * MB, "policy_preprocessor.json": 900, "README.md": 5000}


class Canary:
    """Pickled, it touches a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def module(tmp_path, canary, monkeypatch):
    """A module that touches the canary when it is imported, and one whose class does so when it is made."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "evil_step.py").write_text(f"import os\nos.mknod({str(canary)!r})\nclass Step: pass\n")
    monkeypatch.syspath_prepend(str(folder))
    return "evil_step"


@pytest.fixture
def copied(small_pi0_folder, tmp_path):
    return shutil.copytree(small_pi0_folder, tmp_path / "policy")


def edit(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def add_step(folder, step, name="policy_preprocessor.json"):
    edit(folder / name, lambda pipeline: pipeline["steps"].append(step))


def refused(folder, canary, message):
    with pytest.raises(ValueError, match=message) as error:
        load_policy(folder)
    assert not canary.exists()
    return str(error.value)


def test_a_good_folder_is_read(copied):
    check_policy_folder(copied)
    load_policy(copied)


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor.json"])
@pytest.mark.parametrize(
    "step",
    [
        {"class": "os.system", "config": {"command": "touch CANARY"}},
        {"class": "subprocess.Popen", "config": {"args": ["touch", "CANARY"]}},
        {"class": "evil_step.Step", "config": {}},
        {"registry_name": "evil_step.Step", "config": {}},
        {"class": "lerobot.processor.tokenizer_processor.ActionTokenizerProcessorStep", "config": {}},
        {"registry_name": "action_tokenizer_processor", "config": {"action_tokenizer_name": "somebody/evil"}},
        {"registry_name": "reward_classifier_processor", "config": {"pretrained_path": "somebody/evil"}},
        {"registry_name": ["os.system"], "config": {}},
        {},
    ],
)
def test_steps_that_name_code_are_refused(copied, canary, module, name, step):
    add_step(copied, json.loads(json.dumps(step).replace("CANARY", str(canary))), name)
    message = refused(copied, canary, rf"{name} has a step .*not registered by code of yours")
    assert "Import the module that registers it" in message
    assert module not in sys.modules


def test_lerobot_alone_would_run_such_a_step(copied, canary, module):
    """Else the test above would show nothing."""
    add_step(copied, {"class": f"{module}.Step", "config": {}})
    with pytest.raises((ValueError, TypeError)):  # the class is no step, which is noticed after it was imported
        PolicyProcessorPipeline.from_pretrained(copied, config_filename="policy_preprocessor.json")(None)
    assert canary.exists()


def test_a_step_that_the_user_has_registered_is_loaded(copied):
    name = "registered_by_a_test"

    @ProcessorStepRegistry.register(name)
    class Mine(ObservationProcessorStep):
        def observation(self, observation):
            return observation

        def transform_features(self, features):
            return features

    try:
        add_step(copied, {"registry_name": name, "config": {}})
        assert any(isinstance(step, Mine) for step in load_policy(copied).preprocessor.steps)
    finally:
        ProcessorStepRegistry.unregister(name)


@pytest.mark.parametrize("state", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "state.bin", 3, ["a"]])
def test_state_files_lie_beside_the_processor(copied, canary, state):
    edit(copied / "policy_preprocessor.json", lambda pipeline: pipeline["steps"][0].update(state_file=state))
    refused(copied, canary, r"names the state file .*; it may name a \.safetensors file beside it only")


@pytest.mark.parametrize("steps", [None, {}, ["rename_observations_processor"], "steps"])
def test_steps_are_a_list_of_objects(copied, canary, steps):
    edit(copied / "policy_preprocessor.json", lambda pipeline: {**pipeline, "steps": steps})
    refused(copied, canary, "must list its steps")


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "evil_step.Step"}}),
        ("config.json", {"nested": [{"deeper": {"auto_map": {"AutoModel": "somebody/evil--evil_step.Step"}}}]}),
        ("config.json", {"custom_pipelines": {"x": {"impl": "evil_step.Step"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil_step.Step", None]}}),
        ("tokenizer_config.json", {"trust_remote_code": True}),
        ("policy_preprocessor.json", {"auto_map": "evil_step.Step"}),
    ],
)
def test_code_of_its_own_is_never_run(copied, canary, module, file, entry):
    (copied / "evil_step.py").write_text(f"import os\nos.mknod({str(canary)!r})\nclass Step: pass\n")
    edit(copied / file, lambda value: {**value, **entry})
    message = refused(copied, canary, rf"{file} asks for code of its own")
    assert "never run" in message


@pytest.mark.parametrize(
    ("name", "count", "allowed"), [("policy_preprocessor.json", 2, 1), ("policy_postprocessor.json", 1, 0)]
)
@pytest.mark.parametrize("evil_first", [True, False])
def test_a_second_tokenizer_cannot_bring_code(copied, canary, module, monkeypatch, name, count, allowed, evil_first):
    """Transformers would ask whether to run it, and take a piped "y" for an answer."""
    evil = copied.parent / "evil"
    evil.mkdir()
    (evil / "evil_step.py").write_text(f"import os\nos.mknod({str(canary)!r})\nclass Step: pass\n")
    (evil / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil_step.Step", null]}}')
    step = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": str(evil)}}
    edit(copied / name, lambda pipeline: pipeline["steps"].insert(0 if evil_first else len(pipeline["steps"]), step))
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    message = refused(copied, canary, rf"{name} has {count} steps tokenizer_processor")
    assert f"at most {allowed} is allowed there" in message


def test_transformers_is_never_let_ask(copied, monkeypatch):
    """The files pass our check here, so that only what Transformers is told stands between."""
    entry = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    edit(copied / "tokenizer_config.json", lambda value: {**value, **entry})
    monkeypatch.setattr("pi_rl.policies.untrusted._check_tokenizer_files", lambda folder: None)
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(f"asked: {prompt}"))
    with pytest.raises(RuntimeError, match="trust_remote_code"):
        load_tokenizer(str(copied), copied / "policy_preprocessor.json")


def test_a_foreign_type_is_refused(copied, canary):
    edit(copied / "config.json", lambda config: {**config, "type": "os.system"})
    refused(copied, canary, r"has type 'os.system'; supported types are")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' * 60 + "1" + "}" * 60, "nested more than 50 levels deep"),
        ("[" * 100_000 + "]" * 100_000, "not readable as JSON"),
        ('{"a": ' + "[" * 60 + "]" * 60 + "}", "nested more than 50 levels deep"),
        ('{"chunk_size": ' + "9" * 5000 + "}", "not readable as JSON .*limit"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ('{"a": 1', "not readable as JSON"),
        ("[1]", "must hold a JSON object, got a list"),
        ("\x00\xff", "not readable as JSON"),
    ],
)
def test_json_that_no_policy_needs_is_refused(copied, canary, text, message):
    (copied / "config.json").write_text(text, encoding="latin-1")
    assert "config.json" in refused(copied, canary, message)


def test_a_json_file_that_is_absurdly_large_is_not_read(copied, canary):
    with (copied / "config.json").open("wb") as file:
        file.truncate(200 * MB)  # sparse
    refused(copied, canary, "config.json has 200 MB; more than 100 MB is not read")
    with (copied / "config.json").open("wb") as file:
        file.truncate(30 * MB)
    refused(copied, canary, "config.json has 30 MB; more than 20 MB is not read")


def test_a_pickle_is_not_read_whatever_its_name(copied, canary):
    """The same bytes do touch the file when they are unpickled."""
    content = pickle.dumps(Canary(canary))
    for name in ("model.safetensors", "critic.safetensors"):
        (copied / name).write_bytes(content)
    refused(copied, canary, "is not a readable safetensors file")
    pickle.loads(content)
    assert canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "weights.pkl"])
def test_weights_as_pickles_are_refused_with_the_way_to_convert_them(copied, canary, name):
    for path in copied.glob("*.safetensors"):
        path.unlink()
    (copied / name).write_bytes(pickle.dumps(Canary(canary)))
    message = refused(copied, canary, rf"holds its weights only as pickles \({name}\)")
    assert "weights_only=True" in message


def test_the_way_to_convert_them_works(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    folder = tmp_path / "pickles"
    folder.mkdir()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="only as pickles") as error:
        check_policy_folder(folder)
    command = str(error.value).partition("`")[2].partition("`")[0].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "model.safetensors").is_file()


def test_pickles_beside_weights_are_left_alone(copied, canary):
    (copied / "optimizer.pt").write_bytes(pickle.dumps(Canary(canary)))
    load_policy(copied)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "config.json"])
def test_links_out_of_the_folder_are_refused(copied, canary, tmp_path, name):
    """Copied into a checkpoint, what they show could be published."""
    private = tmp_path / "private"
    private.write_text("{}")
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to(private)
    message = refused(copied, canary, rf"{name} is a link to .*private, outside the folder")
    assert "put a copy" in message


def test_links_of_the_hubs_cache_are_fine(copied, tmp_path):
    cache = tmp_path / "models--somebody--pi0"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in copied.iterdir() if path.is_file())):
        shutil.move(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    load_policy(snapshot)


@pytest.mark.parametrize("name", ["../../elsewhere", "./tokenizer", "~/tokenizer", "a/b/c", "a\\b", "", None, 3, ".."])
def test_a_tokenizer_is_named_by_hub_id_or_absolute_path(copied, canary, name):
    (copied / "tokenizer.json").unlink()
    edit(
        copied / "policy_preprocessor.json",
        lambda pipeline: (
            [
                step["config"].update(tokenizer_name=name)
                for step in pipeline["steps"]
                if step["registry_name"] == "tokenizer_processor"
            ]
            and None
        ),
    )
    assert "put the tokenizer's files beside it" in refused(copied, canary, "tokenizer_name=")


def test_a_tokenizer_elsewhere_may_need_no_code_either(copied, canary, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil_step.Step", null]}}')
    with pytest.raises(ValueError, match="asks for code of its own"):
        load_tokenizer(str(other), copied / "policy_preprocessor.json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The real client and a server on this computer; gives the server's contents."""
    from huggingface_hub import constants, hf_api

    contents = Contents()
    with serve(contents) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hf_api, "api", hf_api.HfApi(endpoint=url))
        yield contents


@pytest.fixture
def with_hub_tokenizer(copied, hub):
    """A policy whose tokenizer is on the Hub; gives the tokenizer's files there."""
    files = {path.name: path.read_bytes() for path in copied.glob("*token*") if path.suffix == ".json"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    for name in files:
        (copied / name).unlink()
    set_tokenizer_name(copied, "somebody/tokenizer")
    hub.repos["models/somebody/tokenizer"] = files
    return files


def test_a_tokenizer_on_the_hub_is_read_and_stays_named_by_its_id(copied, with_hub_tokenizer, hub, tmp_path):
    with_hub_tokenizer["model.safetensors"] = with_hub_tokenizer["code.py"] = b"1"
    loaded = load_policy(copied)
    saved = save_policy(tmp_path / "saved", loaded.policy, loaded.preprocessor, loaded.postprocessor)
    assert '"somebody/tokenizer"' in (saved / "policy_preprocessor.json").read_text()
    asked = [path for _, path, _ in hub.seen if "/resolve/" in path]
    assert not any(path.endswith((".safetensors", ".py")) for path in asked)
    assert {path.split("/")[4] for path in asked} == {COMMIT}  # what was listed, not what a branch is by now


def test_a_tokenizer_on_the_hub_may_need_no_code(copied, with_hub_tokenizer, canary):
    with_hub_tokenizer["tokenizer_config.json"] = b'{"auto_map": {"AutoTokenizer": ["evil_step.Step", null]}}'
    refused(copied, canary, "tokenizer_config.json asks for code of its own")


def test_a_huge_tokenizer_on_the_hub_is_not_asked_for(copied, with_hub_tokenizer, hub, canary, monkeypatch):
    monkeypatch.setitem(LARGEST, ".json", len(with_hub_tokenizer["tokenizer.json"]) - 1)
    (copied / "tokenizer_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"tokenizer.json of somebody/tokenizer has .* is not read"):
        load_tokenizer("somebody/tokenizer", copied / "policy_preprocessor.json")
    assert not [path for _, path, _ in hub.seen if "/resolve/" in path]


def test_the_use_of_a_cached_copy_is_said(copied, with_hub_tokenizer, hub, caplog):
    load_policy(copied)
    assert "from its cache is used" not in caplog.text
    hub.refuse["/api/models/somebody/tokenizer/revision/main"] = [401, 401]
    hub.refuse["/api/models/somebody/tokenizer"] = [401, 401]
    load_policy(copied)
    assert "The Hub did not give somebody/tokenizer (" in caplog.text
    assert f"commit {COMMIT[:8]} from its cache is used" in caplog.text


def test_a_listing_of_good_names_is_downloaded():
    more = {"model-00001-of-00002.safetensors": MB, "adapter/adapter_config.json": 10, "tokenizer.model": 4 * MB}
    more |= {"assets/task/norm_stats.json": 10, "checkpoints-of-mine/config.json": 10}
    left = {"last-checkpoint/model.safetensors": MB, "checkpoint-40/optimizer.safetensors": 2 * MB}
    left |= {
        "last-checkpoint/adapter/adapter_config.json": 10,
        "optimizer.pt": 50 * MB,
        "code.py": 10,
        "notes.md": 5,
        ".gitattributes": 5,
        "film.mp4": MB,
    }
    assert names_to_download({**GOOD, **more, **left}.items(), "somebody/pi0") == [*GOOD, *more]
    assert names_to_download([("config.json", None)], "somebody/pi0") == ["config.json"]


@pytest.mark.parametrize(
    "name",
    ["../config.json", "a/../../b.json", "/etc/passwd", "a\\b.json", "a\x00.json", "a\n.json", "*.json", "~/a", ""],
)
def test_names_that_leave_the_folder_are_refused(name):
    with pytest.raises(ValueError, match=r"somebody/pi0 holds a file named .*Nothing was downloaded"):
        names_to_download([*GOOD.items(), (name, 5)], "somebody/pi0")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("tokenizer.json", 10_000 * MB, r"tokenizer.json of somebody/pi0 has 10,000 MB; more than 100 MB is not read"),
        ("model.safetensors", 10**6 * MB, "has 1,000,000 MB; more than 100,000 MB"),
        ("chat_template.jinja", 2 * MB, "has 2 MB; more than 1 MB"),
        ("tokenizer.model", 101 * MB, "has 101 MB; more than 100 MB"),
    ],
)
def test_absurd_sizes_are_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        names_to_download({**GOOD, name: size}.items(), "somebody/pi0")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pi0.pt", "weights/pi0.pth", "params.npz"])
def test_a_repository_of_pickles_is_refused(name):
    with pytest.raises(ValueError, match="only as pickles.*Convert them to safetensors"):
        names_to_download([("config.json", 5), (name, 5)], "somebody/pi0")


def test_without_a_connection_a_policy_that_is_not_cached_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"somebody/nothing is not in the Hub's cache .* unset HF_HUB_OFFLINE"):
        load_policy("somebody/nothing")


def test_read_json_names_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"No configuration in .*: config.json is missing\. Give a folder"):
        read_json(tmp_path / "config.json", "configuration")


def test_commands_and_recipes_end_with_the_message(mlp_folder, tmp_path, canary, module, capsys):
    folder = shutil.copytree(mlp_folder, tmp_path / "policy")
    add_step(folder, {"class": f"{module}.Step", "config": {}})
    words = ["--env", "toy:point-mass", "--output_dir"]
    assert main(["eval", "--policy", str(folder), *words, str(tmp_path / "eval")]) == 2
    printed = capsys.readouterr().err
    assert "is not registered by code of yours" in printed
    assert "Traceback" not in printed
    size = [
        "--num_envs",
        "2",
        "--rollout_chunks",
        "4",
        "--per_device_train_batch_size",
        "8",
        "--use_cpu",
        "--no_video",
    ]
    with pytest.raises(RecipeError, match="is not registered by code of yours"):  # exit code 2
        run_recipe("", None, "flow_sde", ["--model", str(folder), *words, str(tmp_path / "run"), *size])
    assert not canary.exists()


@pytest.mark.slow
def test_the_real_client_downloads_nothing_hostile(copied, tmp_path, canary):
    """huggingface_hub against a loopback server; the listing is refused before any file is asked for."""
    good = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    step = b'{"steps": [{"class": "evil_step.Step", "config": {}}]}'
    unsafe = {name: content for name, content in good.items() if not name.endswith(".safetensors")}
    repos = {
        "models/somebody/good": {**good, "evil.py": b"1", "optimizer.pt": b"1"},
        "models/somebody/steps": {**good, "policy_preprocessor.json": step},
        "models/somebody/pickles": {**unsafe, "pytorch_model.bin": b"\x80\x04."},
        "models/somebody/names": {**good, "../../escaped.json": b"{}"},
        "models/somebody/huge": {**good, "chat_template.jinja": b"x" * (2 * MB)},
    }
    code = """
import sys
from pi_rl.policies.checkpoints import policy_folder
for name in sys.argv[1:]:
    try:
        print(name, sorted(path.name for path in policy_folder(name).iterdir()))
    except ValueError as error:
        print(name, "refused", error)
"""
    with serve(Contents(repos=repos)) as url:
        environment = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

        def run(*names):
            return subprocess.run(
                [sys.executable, "-c", code, *names], env=environment, capture_output=True, text=True, timeout=300
            )

        done = run("somebody/good", "somebody/steps", "somebody/pickles", "somebody/names", "somebody/huge")
    assert done.returncode == 0, done.stderr
    again = run("somebody/good")  # the server is gone: from the cache
    assert again.stdout.splitlines() == done.stdout.splitlines()[:1], again.stderr
    assert "from its cache is used" in again.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"somebody/good {sorted(good)}"
    assert "refused" in lines[1]
    assert "has a step 'evil_step.Step'" in lines[1]
    assert "only as pickles (pytorch_model.bin)" in lines[2]
    assert "holds a file named '../../escaped.json'" in lines[3]
    assert "chat_template.jinja of somebody/huge has 2 MB; more than 1 MB" in lines[4]
    assert not canary.exists()
    assert not list(tmp_path.rglob("escaped.json"))
    assert not list(tmp_path.rglob("chat_template.jinja"))
    assert not list(tmp_path.rglob("evil.py"))
    assert not list(tmp_path.rglob("pytorch_model.bin"))
