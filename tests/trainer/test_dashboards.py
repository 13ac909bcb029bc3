"""TensorBoard, Weights & Biases and Trackio keep records that can be read back, with films of evaluations."""

import contextlib
import importlib
import io
import json
import os
import shutil
from types import SimpleNamespace

import av
import pytest
import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import WandbCallback

from pi_rl import FlowPPOConfig, FlowPPOTrainer, load_policy, make_env
from pi_rl.run_report import RunLog
from pi_rl.trainer import dashboards

ITERATIONS, EPISODES, FILMS = 2, 4, 2
TOKEN = "hf_" + "f6" * 17
METRICS = {"train/policy/approx_kl", "train/critic/loss", "train/rollout/env_steps", "train/time/update",
           "train/learning_rate", "eval/success_rate", "eval/ci95_low"}  # fmt: skip


def train(policy, folder, **overrides):
    """Trains, evaluates before and after as the recipes do, and closes."""
    torch.set_num_threads(1)
    args = FlowPPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        seed=3,
        num_iterations=ITERATIONS,
        num_envs=4,
        rollout_chunks=3,
        per_device_train_batch_size=12,
        update_epochs=1,
        noise_std_min=0.4,
        noise_std_max=1.0,
        critic_hidden_sizes=[16],
        learning_rate=1e-3,
        eval_episodes=EPISODES,
        eval_on_start=False,
        disable_tqdm=True,
        **overrides,
    )
    options = {"image_size": 32, "fast_rendering": True, "hide_arm": True, "max_episode_steps": 15}
    with contextlib.closing(make_env("metaworld:handle-press-v3", 4, 1, **options)) as env:
        trainer = FlowPPOTrainer(load_policy(policy, device="cpu"), args, env)
        trainer.evaluate()
        trainer.train()
        trainer.evaluate()
        trainer.close()
    return trainer


@pytest.fixture(scope="module")
def run(small_pi0_folder, tmp_path_factory):
    """One run with everything on, from a working folder of its own."""
    folder = tmp_path_factory.mktemp("dashboards")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(folder)), ("WANDB_SILENT", "true")):
            patch.setenv(name, value)
        patch.chdir(folder)
        before = set(os.listdir(folder))
        reports = ["tensorboard", "wandb", "trackio"]
        settings = {"report_to": reports, "project": "dashboards", "eval_videos": FILMS, "hub_token": TOKEN}
        trainer = train(small_pi0_folder, folder / "run", **settings)
        import wandb

        wandb.finish()
        written = set(os.listdir(folder)) - before
    return SimpleNamespace(trainer=trainer, folder=folder, written=written)


def frames_of(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.slow
def test_tensorboard_has_metrics_settings_and_films(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logdir,) = (run.folder / "run" / "runs").iterdir()
    events = EventAccumulator(str(logdir), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    logged = [entry["policy/approx_kl"] for entry in run.trainer.state.log_history if "policy/approx_kl" in entry]
    assert [event.value for event in events.Scalars("train/policy/approx_kl")] == pytest.approx(logged)
    assert [event.step for event in events.Scalars("eval/success_rate")] == [0, ITERATIONS]  # before and after
    (settings,) = (event.tensor_proto.string_val[0] for event in events.Tensors("args/text_summary"))
    assert json.loads(settings)["clip_range"] == run.trainer.args.clip_range
    assert TOKEN.encode() not in settings
    films = events.Images("eval/video/1")
    assert [film.step for film in films] == [0, ITERATIONS]
    with Image.open(io.BytesIO(films[-1].encoded_image_string)) as gif:
        assert (gif.format, gif.size) == ("GIF", (256, 256))
        assert gif.n_frames > 5
    assert run.written == {"run", "wandb"}  # nothing in the working folder, where Transformers would begin


@pytest.mark.slow
def test_films_show_the_evaluated_episodes(run):
    trainer, folder = run.trainer, run.folder / "run" / "videos"
    files = {path.name for path in folder.iterdir()}
    assert files == {
        f"step-{step}-episode-{episode}.mp4" for step in (0, trainer.env_steps) for episode in range(FILMS)
    }
    every = max(1, trainer.env.spec.fps // 40)
    for episode in range(FILMS):
        frames = frames_of(folder / f"step-{trainer.env_steps}-episode-{episode}.mp4")
        whole, rest = divmod(int(trainer.last_evaluation.length[episode]), every)
        assert len(frames) == 1 + whole + (rest > 0)
        assert frames[0].shape == (256, 256, 3)
        assert (frames[0].astype(int) - frames[-1]).std() > 1  # the arm moves


@pytest.mark.slow
def test_filming_and_reporting_leave_training_as_it_is(run, small_pi0_folder, tmp_path):
    plain = train(small_pi0_folder, tmp_path / "plain")
    for name, value in plain.actor_critic.named_parameters():
        assert torch.equal(value, dict(run.trainer.actor_critic.named_parameters())[name]), name
    assert not (tmp_path / "plain" / "videos").exists()


@pytest.mark.slow
def test_wandb_keeps_an_offline_record(run):
    (file,) = (run.folder / "wandb").glob("offline-run-*/run-*.wandb")
    history, config = read_wandb(file)
    assert set().union(*history) >= METRICS
    assert config["clip_range"] == run.trainer.args.clip_range
    assert sum("eval/success_rate" in row for row in history) == 2
    films = [row["eval/video/0"] for row in history if "eval/video/0" in row]
    assert [film["_type"] for film in films] == ["video-file"] * 2
    assert len(frames_of(file.parent / "files" / films[-1]["path"])) > 5
    assert TOKEN.encode() not in file.read_bytes()


def read_wandb(file):
    """History rows and settings of an offline record."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store = DataStore()
    store.open_for_scan(str(file))
    history, config = [], {}
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        for items in (record.run.config.update, record.config.update):
            config.update(unnested(items))
        if record.HasField("history"):
            history.append(unnested(record.history.item))
    store.close()
    return history, config


def unnested(items):
    """Entries by name; those of several parts become mappings."""
    found = {}
    for item in items:
        name, *rest = [item.key] if item.key else item.nested_key
        if rest:
            found.setdefault(name, {})[".".join(rest)] = json.loads(item.value_json)
        else:
            found[name] = json.loads(item.value_json)
    return found


@pytest.mark.slow
def test_trackio_keeps_one_local_record(run):
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import MEDIA_DIR

    assert run.trainer.args.trackio_space_id is None
    (record,) = Api().runs("dashboards")
    assert record.config["clip_range"] == run.trainer.args.clip_range
    assert TOKEN not in json.dumps(record.config)
    rows = SQLiteStorage.get_logs("dashboards", record.name, run_id=record.id)
    assert set().union(*rows) >= METRICS
    assert sum("eval/success_rate" in row for row in rows) == 2
    films = [row["eval/video/0"] for row in rows if "eval/video/0" in row]
    assert [film["_type"] for film in films] == ["trackio.video"] * 2
    assert len(frames_of(MEDIA_DIR / films[-1]["file_path"])) > 5


def fails_the_first_time(act, error):
    """The function, whose first call raises."""
    left = [error]

    def wrapped(*args, **kwargs):
        if left:
            raise left.pop()
        return act(*args, **kwargs)

    return wrapped


def test_a_film_that_fails_is_left_out_and_training_goes_on(filmed_trainer, capsys, tmp_path, monkeypatch):
    """First the renderer fails, then what a dashboard does; the other films and the training are as they would be."""
    trainer = filmed_trainer(report_to=["tensorboard"])
    monkeypatch.setattr(
        trainer.env, "render", fails_the_first_time(trainer.env.render, RuntimeError("no EGL display"))
    )
    refusal = ConnectionError(f"401 for {TOKEN}")
    monkeypatch.setattr(dashboards, "_add_gif", fails_the_first_time(dashboards._add_gif, refusal))
    trainer.train()
    texts = [
        "The film of evaluation episode 0 failed: no EGL display. Training goes on.",
        "The film of evaluation episode 1 failed: 401 for hf_***. Training goes on.",
    ]
    printed = capsys.readouterr().out
    assert all(text in printed for text in texts)
    assert TOKEN not in printed
    notes = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [note["warning"] for note in notes if "warning" in note] == texts
    files = {path.name.rpartition("-")[2] for path in (tmp_path / "run" / "videos").iterdir()}
    assert (files, len(list((tmp_path / "run" / "videos").iterdir()))) == ({"0.mp4", "1.mp4"}, 3)
    plain = filmed_trainer(tmp_path / "plain", eval_videos=0)
    plain.train()
    for name, value in plain.actor_critic.named_parameters():
        assert torch.equal(value, dict(trainer.actor_critic.named_parameters())[name]), name


@pytest.fixture
def offline_wandb(tmp_path, monkeypatch):
    """wandb keeps its records in the test's folder; what an earlier test has set it up with does not count."""
    import wandb

    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    wandb.teardown()
    yield
    wandb.teardown()


class EndsRecords(TrainerCallback):
    """Ends the records of dashboards after the first iteration: their clients refuse every entry from then on."""

    def __init__(self, *clients):
        self.clients = clients

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            for client in self.clients:
                importlib.import_module(client).finish()


def test_dashboards_that_fail_within_a_run_are_left_out_once_each(toy_trainer, tmp_path, capsys, offline_wandb):
    """wandb and Trackio fail; TensorBoard has the whole run, and the trained weights are as they would be."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callbacks = [RunLog(tmp_path / "run", "toy:point-mass"), EndsRecords("trackio", "wandb")]
    trainer = toy_trainer(callbacks=callbacks, report_to=["wandb", "trackio", "tensorboard"], project="failing")
    trainer.train()
    trainer.evaluate()
    trainer.close()
    printed = [line.strip() for line in capsys.readouterr().out.splitlines() if "The dashboard" in line]
    assert [line.split(" failed: ")[0] for line in printed] == ["The dashboard wandb", "The dashboard trackio"]
    assert all(line.endswith("The run goes on without it.") for line in printed)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["warning"] for line in lines if "warning" in line] == printed
    (logdir,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(logdir))
    events.Reload()
    assert [event.step for event in events.Scalars("train/policy/loss")] == [4, 8, 12, 16]
    assert [event.step for event in events.Scalars("eval/success_rate")] == [16]
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    history, _ = read_wandb(file)
    assert [row["train/global_step"] for row in history] == [4]  # what it had until then is kept
    plain = toy_trainer(tmp_path / "plain")
    plain.train()
    for name, value in plain.actor_critic.named_parameters():
        assert torch.equal(value, dict(trainer.actor_critic.named_parameters())[name]), name


def test_a_callback_of_the_users_serves_one_trainer_after_the_other(toy_trainer, tmp_path, capsys, offline_wandb):
    """As in a sweep over seeds; what fails is noted in the run in which it fails."""
    shared = WandbCallback()
    for name in ("one", "two"):
        folder = tmp_path / name
        trainer = toy_trainer(folder, callbacks=[RunLog(folder, "toy:point-mass"), EndsRecords("wandb"), shared])
        trainer.train()
        trainer.close()
        said = [line for line in capsys.readouterr().out.splitlines() if "The dashboard wandb failed" in line]
        noted = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "The dashboard wandb" in line]
        assert len(said) == len(noted) == 1
        assert not [event for event in vars(shared) if event.startswith("on_")]


def test_a_dashboard_that_cannot_start_is_an_error_before_anything_is_trained(
    toy_trainer, tmp_path, monkeypatch, offline_wandb
):
    monkeypatch.setenv("WANDB_PROJECT", "a/name/of/another/kind")
    trainer = toy_trainer(report_to=["wandb"])
    with pytest.raises(Exception, match="a/name/of/another/kind"):
        trainer.train()
    assert trainer.state.global_step == 0
    (tmp_path / "run" / "runs").write_text("a file where TensorBoard's folder should be")
    trainer = toy_trainer(report_to=["tensorboard"])
    with pytest.raises(OSError, match="runs"):
        trainer.evaluate()
    with pytest.raises(OSError, match="runs"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_records_that_cannot_be_ended_do_not_keep_a_trainer_open(toy_trainer, fork, tmp_path):
    def act():
        import trackio

        trainer = toy_trainer(report_to=["trackio", "tensorboard"], project="unended")
        trainer.evaluate()
        writers = [getattr(callback, "tb_writer", None) for callback in trainer.callback_handler.callbacks]
        trackio.finish()
        shutil.rmtree(tmp_path / "run" / "runs")
        next(writer for writer in writers if writer is not None).add_scalar("late", 1.0)
        trainer.close()
        trainer.close()

    run = fork(act)
    assert run.wait() == 0, run.output
    assert run.output.count("Trackio's record failed: Call trackio.init() before trackio.finish().") == 1
    assert run.output.count("TensorBoard's record failed: [Errno 2] No such file or directory") == 1


def test_films_need_pictures_and_episodes(mlp_folder, tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "num_envs": 4, "rollout_chunks": 4,
               "per_device_train_batch_size": 16}  # fmt: skip
    with pytest.raises(ValueError, match=r"eval_videos=3 .* at most eval_episodes=2"):
        FlowPPOConfig(**options, eval_episodes=2, eval_videos=3)
    with pytest.raises(ValueError, match="eval_videos=1: toy:point-mass has no pictures"):
        FlowPPOTrainer(str(mlp_folder), FlowPPOConfig(**options, eval_episodes=4, eval_videos=1), "toy:point-mass")
