"""SIGTERM, SIGINT and SIGUSR1: the last completed iteration is saved, nothing of it is lost."""

import json
import signal
import threading
import time

import pytest
from transformers import TrainerCallback

from pi_rl.trainer import preemption, stop_signals
from pi_rl.trainer.checkpoint_folders import checkpoints

OPTIONS = {"save_every_iterations": None, "eval_every_iterations": 2}


def wait_at(trainer, phase, marker, iteration):
    """Makes the process tell that it is in a phase of an iteration, and wait there for a signal."""

    def wait():
        if trainer.iteration == iteration and not marker.exists():
            marker.touch()
            until = time.monotonic() + 60
            while trainer._signals is None or not trainer._signals.received:
                assert time.monotonic() < until
                time.sleep(0.01)

    class AtStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % args.updates_per_iteration:
                wait()

    if phase == "update":
        trainer.add_callback(AtStep())
        return
    report = "rollout_progress" if phase == "rollout" else "evaluation_progress"
    real = getattr(trainer.report, report)

    def reporting(done, total, text):
        real(done, total, text)
        wait()

    setattr(trainer.report, report, reporting)


@pytest.mark.parametrize(
    ("signum", "phase", "saved", "code"),
    [
        (signal.SIGTERM, "rollout", 4, 75),
        (signal.SIGTERM, "update", 8, 75),
        (signal.SIGINT, "update", 8, 130),
        (signal.SIGUSR1, "evaluation", 8, 75),
    ],
)
def test_a_signal_saves_the_last_complete_iteration(
    toy_trainer, fork, tmp_path, assert_same_end, signum, phase, saved, code
):
    """In a rollout or evaluation at once, in an update at its end; the resumed run ends as an uninterrupted one."""
    marker, root = tmp_path / phase, tmp_path / "run"

    def run():
        trainer = toy_trainer(root, **OPTIONS)
        wait_at(trainer, phase, marker, iteration=2 if phase == "evaluation" else 1)
        trainer.train()

    told = fork(run)
    told.wait_for(marker)
    told.kill(signum)
    assert told.wait() == code, told.output
    assert f"Ended by {signum.name}" in told.output
    assert "Once more ends it at once" in told.output
    assert [path.name for path in checkpoints(root)] == [f"checkpoint-{saved}"]
    state = json.loads((root / f"checkpoint-{saved}" / "rl_state.json").read_text())
    assert state["evaluation_due"] == (saved == 8)  # every other iteration has one, and the signal cuts it short
    resumed = toy_trainer(root, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    resumed.write_checkpoint()
    straight = toy_trainer(tmp_path / "straight", **OPTIONS)
    straight.train()
    straight.write_checkpoint()
    assert_same_end(tmp_path / "straight", root)


def test_before_the_first_iteration_there_is_nothing_to_save(toy_trainer, fork, tmp_path):
    marker = tmp_path / "rollout"

    def run():
        trainer = toy_trainer(**OPTIONS)
        wait_at(trainer, "rollout", marker, iteration=0)
        trainer.train()

    told = fork(run)
    told.wait_for(marker)
    told.kill(signal.SIGTERM)
    assert told.wait() == 75
    assert "there is nothing to resume" in told.output
    assert checkpoints(tmp_path / "run") == []


def test_a_second_signal_ends_the_run_at_once(toy_trainer, fork, tmp_path, monkeypatch):
    monkeypatch.setattr(stop_signals, "SAME_REQUEST_S", 0.2)
    marker = tmp_path / "update"

    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                marker.touch()
                while True:
                    time.sleep(0.01)

    def run():
        toy_trainer(callbacks=[Slow()]).train()

    stubborn = fork(run)
    stubborn.wait_for(marker)
    stubborn.kill(signal.SIGTERM)
    time.sleep(0.5)
    stubborn.kill(signal.SIGTERM)
    assert stubborn.wait() == -signal.SIGTERM
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_ctrl_c_in_a_notebook_is_a_keyboard_interrupt_and_the_trainer_can_go_on(toy_trainer, tmp_path):
    class Press(TrainerCallback):
        pressed = False

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6 and not self.pressed:
                self.pressed = True
                signal.raise_signal(signal.SIGINT)

    before = [signal.getsignal(signum) for signum in stop_signals.SIGNALS]
    trainer = toy_trainer(callbacks=[Press()], **OPTIONS)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-8 is complete") as caught:
        trainer.train()
    assert caught.value.checkpoint == tmp_path / "run" / "checkpoint-8"
    assert [signal.getsignal(signum) for signum in stop_signals.SIGNALS] == before
    assert trainer.evaluate()["eval_n_episodes"] == 4
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 16
    assert [signal.getsignal(signum) for signum in stop_signals.SIGNALS] == before


def test_an_ignored_signal_stays_ignored(toy_trainer):
    class Press(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        trainer = toy_trainer(callbacks=[Press()], num_iterations=1)
        trainer.train()
        assert trainer.state.global_step == 4
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_training_in_another_thread_leaves_signals_alone(toy_trainer):
    trainer, errors = toy_trainer(num_iterations=1), []

    def act():
        try:
            trainer.train()
        except BaseException as error:
            errors.append(error)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert errors == []
    assert trainer.state.global_step == 4
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_state_is_saved_before_simulators_are_waited_for(toy_trainer, tmp_path, caplog):
    """One that breaks down then costs nothing: the checkpoint is there."""

    trainer = toy_trainer(**OPTIONS)

    class Broken(type(trainer.env)):
        def finish_chunk(self):
            if trainer._signals.received:
                raise RuntimeError("the simulator is broken")
            return super().finish_chunk()

    def told_while_a_chunk_is_under_way(done, total, text):
        if trainer.iteration == 1:
            signal.raise_signal(signal.SIGTERM)
            assert trainer.env.pending_chunks

    trainer.env.__class__ = Broken
    trainer.report.rollout_progress = told_while_a_chunk_is_under_way
    with pytest.raises(preemption.Preempted):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    assert "did not end the chunk that they were in: the simulator is broken" in caplog.text


def test_under_a_launcher_an_update_does_not_go_on_to_its_end(toy_trainer, fork, tmp_path):
    """It would be killed after 30 s; what is saved has the last iteration's counters, and the run goes on from it."""
    marker, root = tmp_path / "update", tmp_path / "run"

    def run():
        trainer = toy_trainer(root, **OPTIONS)
        wait_at(trainer, "update", marker, iteration=2)
        trainer.train()
        raise AssertionError("not ended")

    told = fork(run, {"TORCHELASTIC_RUN_ID": "a test"})
    told.wait_for(marker)
    told.kill(signal.SIGTERM)
    assert told.wait() == 75, told.output
    assert "the run ends as soon as it can" in told.output
    assert "It repeats the iteration whose updates were cut short" in told.output
    assert [path.name for path in checkpoints(root)] == ["checkpoint-8"]
    resumed = toy_trainer(root, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 16


@pytest.mark.parametrize(
    "stage",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("demonstrations", "sft")), "baseline", "evaluation"],
)
def test_a_signal_in_another_stage_ends_a_recipe_with_75_too(mlp_folder, fork, tmp_path, monkeypatch, stage):
    """What was complete is kept, and the run goes on from there; nothing temporary is left."""
    from pi_rl import recipe_main
    from pi_rl.trainer import sft
    from pi_rl.trainer.flow_ppo_trainer import FlowPPOTrainer

    marker, root = tmp_path / "stage", tmp_path / "run"
    small = stage in ("demonstrations", "sft")
    words = ["--no_video", "--output_dir", str(root), "--use_cpu", "--num_envs", "2", "--rollout_chunks", "2",
             "--update_epochs", "1", "--per_device_train_batch_size", "4", "--num_iterations", "1", "--eval_episodes",
             "2", "--critic_hidden_sizes", "16", "--save_every_iterations", "1"]  # fmt: skip
    if small:
        words += ["--env", "metaworld:handle-press-v3", "--env_options", "{image_size: 32, fast_rendering: true}",
                  "--image_resolution", "32", "--demos_per_task", "2", "--sft_steps", "2"]  # fmt: skip
    else:
        words += ["--env", "toy:point-mass", "--env_options", "{max_episode_steps: 8}", "--model", str(mlp_folder)]
    real = FlowPPOTrainer.evaluate

    def pause(*args, **kwargs):
        marker.touch()
        time.sleep(600)

    def evaluate(self, *args, **kwargs):
        after = self.state.global_step > 0
        return pause() if after == (stage == "evaluation") else real(self, *args, **kwargs)

    def run():
        if stage == "demonstrations":
            monkeypatch.setattr("pi_rl.demonstrations._Tally.keep", pause)
        elif stage == "sft":
            monkeypatch.setattr(sft.SftProcess, "run", pause)
        else:
            monkeypatch.setattr(FlowPPOTrainer, "evaluate", evaluate)
        recipe_main("A test.", None, "flow_noise", words)

    told = fork(run)
    told.wait_for(marker)
    told.kill(signal.SIGTERM)
    assert told.wait() == 75, told.output
    assert "SIGTERM: the run ends; what is complete is kept." in told.output
    assert f"Go on with the run: pi-rl train --resume {root}" in told.output
    assert "Traceback" not in told.output
    left = {path.name for path in root.iterdir()}
    assert "pi_rl_config.yaml" in left
    assert ("demos" in left) == (stage == "sft")
    assert not [name for name in left if "partial" in name]
    if small:
        return
    again = fork(lambda: recipe_main("A test.", None, "flow_noise", words))
    assert again.wait() == 0, again.output
    assert (root / "results.json").exists()
    assert ("iteration 1/1" in again.output) == (stage == "baseline")


def test_a_recipe_ends_with_75_and_the_same_command_goes_on(mlp_folder, fork, tmp_path, monkeypatch):
    from pi_rl import recipe_main
    from pi_rl.trainer.flow_ppo_trainer import FlowPPOTrainer

    marker, root = tmp_path / "rollout", tmp_path / "run"
    words = [
        "--model", str(mlp_folder), "--env", "toy:point-mass", "--env_options", "{max_episode_steps: 8}", "--no_video",
        "--output_dir", str(root), "--use_cpu", "--num_envs", "4", "--rollout_chunks", "4", "--update_epochs", "1",
        "--per_device_train_batch_size", "16", "--num_iterations", "3", "--eval_episodes", "2",
        "--critic_hidden_sizes", "16",
    ]  # fmt: skip
    real = FlowPPOTrainer.train

    def train(self, *args, **kwargs):
        wait_at(self, "rollout", marker, iteration=2)
        return real(self, *args, **kwargs)

    def run():
        monkeypatch.setattr(FlowPPOTrainer, "train", train)
        recipe_main("A test.", None, "flow_noise", words)

    told = fork(run)
    told.wait_for(marker)
    told.kill(signal.SIGTERM)
    assert told.wait() == 75, told.output
    assert "Go on with the run: pi-rl train --resume " in told.output
    assert "Traceback" not in told.output
    again = fork(lambda: recipe_main("A test.", None, "flow_noise", words))
    assert again.wait() == 0, again.output
    assert "iteration 3/3" in again.output
    assert "iteration 2/3" not in again.output
    assert json.loads((root / "results.json").read_text())["rl"]["n_episodes"] == 2
    config = (root / "checkpoint-2" / "pi_rl_config.yaml").read_text()
    assert "env: toy:point-mass" in config
    assert "max_episode_steps: 8" in config
