import dataclasses
import sys

import numpy as np
import pytest

from pi_rl.envs import maniskill, vulkan
from pi_rl.envs.maniskill_gpu import ManiSkillBatchedVectorEnv
from pi_rl.envs.maniskill_options import TASKS, ManiSkillOptions, check_assets, groups, make_spec
from pi_rl.envs.registry import check_name_and_options, make_env
from pi_rl.envs.vector_env import IMAGE_KEY, STATE_KEY

SMALL = {"image_size": 32, "hide_arm": True}
PICK, PUSH = "PickCube-v1", "PushCube-v1"


@pytest.fixture(scope="module", autouse=True)
def one_folder_of_assets(maniskill_folder):
    """The tasks here need no files, but others that run in this process do, and ManiSkill reads the folder once."""


@pytest.fixture(scope="module")
def simulators():
    """Simulators by task and options, made once: the first in a process costs as much as a hundred episodes."""
    made = {}

    def get(task, **options):
        key = (task, *sorted(options.items()))
        if key not in made:
            made[key] = maniskill.ManiSkillBackend([task], {**SMALL, **options}).make(0)
        return made[key]

    yield get
    for sim in made.values():
        sim.close()


def picture(sim, size=(32, 32)):
    image = np.zeros((*size, 3), np.uint8)
    sim.draw({IMAGE_KEY: image})
    return image


def everything(sim):
    return [sim.scene.env.get_state().numpy().copy(), sim.state, picture(sim)]


def assert_same_bits(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def clumsy_expert(sim, seed, steps=40):
    """An expert with noise: fingers, cube and table touch in ever other ways."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        action = sim.expert_action()
        action[:3] = np.clip(action[:3] + rng.normal(0, 0.4, 3), -1, 1)
        yield action.astype(np.float32)


def rollout(sim, state_id, actions):
    sim.reset(state_id)
    seen = [everything(sim)]
    for action in actions:
        sim.step(action)
        seen.append([sim.scene.env.get_state().numpy().copy(), sim.state])
    return [*seen, [picture(sim)]]


@pytest.mark.parametrize("task", [PICK, PUSH])
@pytest.mark.slow
def test_reset_does_not_depend_on_history(simulators, task):
    sim = simulators(task)
    recorded = {}
    for state_id in (0, 9, 10, 23):
        sim.reset(state_id)
        actions = []
        for action in clumsy_expert(sim, state_id):
            actions.append(action)
            if sim.step(action):
                break
        recorded[state_id] = actions
    first = {state_id: rollout(sim, state_id, actions) for state_id, actions in recorded.items()}
    for state_id in reversed(recorded):
        again = rollout(sim, state_id, recorded[state_id])
        for one, other in zip(first[state_id], again, strict=True):
            assert_same_bits(one, other)
    assert not np.array_equal(first[0][0][2], first[9][0][2])


def test_another_simulator_takes_the_same_course(simulators):
    sim = simulators(PUSH)
    sim.reset(23)
    actions = list(clumsy_expert(sim, 5, steps=1))
    actions += list(np.random.default_rng(0).uniform(-1, 1, (20, 4)).astype(np.float32))
    expected = rollout(sim, 23, actions)
    fresh = maniskill.ManiSkillBackend([PUSH], SMALL).make(0)
    for one, other in zip(expected, rollout(fresh, 23, actions), strict=True):
        assert_same_bits(one, other)
    fresh.close()


def test_two_scenes_in_a_process_draw_what_each_draws_alone(simulators):
    first = simulators(PICK)
    first.reset(3)
    alone = picture(first)
    second = maniskill.ManiSkillBackend([PUSH], {"image_size": 48, "camera_fovy": 60}).make(0)
    second.reset(4)
    beside = picture(second, (48, 48))
    np.testing.assert_array_equal(picture(first), alone)
    second.step(np.ones(4, np.float32))
    picture(second, (48, 48))
    np.testing.assert_array_equal(picture(first), alone)
    second.reset(4)
    np.testing.assert_array_equal(picture(second, (48, 48)), beside)
    second.close()
    np.testing.assert_array_equal(picture(first), alone)


def test_pictures_are_drawn_only_on_demand(simulators, monkeypatch):
    sim = simulators(PICK)
    sim.reset(0)
    camera = sim.scene.env._sensors["base_camera"]
    shots = []
    monkeypatch.setattr(camera, "capture", lambda shoot=camera.capture: shots.append(1) or shoot())
    sim.reset(1)
    for _ in range(5):
        sim.step(np.zeros(4, np.float32))
    assert len(sim.state) == 7
    assert not shots
    picture(sim)
    assert len(shots) == 1


def test_pictures_follow_the_options(simulators):
    sim = simulators(PICK)
    sim.reset(0)
    plain = picture(sim)
    frame = sim.frame(60, 80, show_arm=True)
    assert frame.shape == (60, 80, 3)
    assert frame.std() > 10
    assert not np.array_equal(frame, sim.frame(60, 80, show_arm=False))
    np.testing.assert_array_equal(picture(sim), plain)  # the frame shows the goal and the arm; the policy sees neither

    near = simulators(PICK, camera_pos=(0.45, 0.0, 0.4), camera_lookat=(0.0, 0.0, 0.05), camera_fovy=40)
    near.reset(0)
    reddish = [int(((image[..., 0] > 120) & (image[..., 1] < 60)).sum()) for image in (picture(near), plain)]
    assert reddish[0] > 3 * max(reddish[1], 1)  # the cube is larger

    blind = simulators(PICK, blind=True)
    blind.reset(0)
    assert (picture(blind) == maniskill.MID_GREY).all()


def test_the_default_is_maniskills_own_picture(simulators):
    """At the task's size and with the arm: what ManiSkill's observation holds."""
    sim = simulators(PICK, image_size=None, hide_arm=False)
    sim.reset(5)
    env = sim.scene.env
    theirs = type(env).get_obs(env)["sensor_data"]["base_camera"]["rgb"][0].numpy()
    np.testing.assert_array_equal(picture(sim, (128, 128)), theirs)


@pytest.mark.parametrize("task", [PICK, PUSH])
def test_experts_solve_their_tasks_and_hold_still(simulators, task):
    sim = simulators(task)
    solved = 0
    for state_id in range(10):
        sim.reset(state_id)
        for _ in range(50):
            if sim.step(sim.expert_action()):
                solved += all(sim.step(sim.expert_action()) for _ in range(15))
                break
    assert solved >= 9


def test_a_task_without_an_expert_says_who_has_one(simulators, monkeypatch):
    sim = simulators(PUSH)
    monkeypatch.setattr(sim.scene, "task", dataclasses.replace(sim.scene.task, expert=None))
    sim.reset(0)
    with pytest.raises(ValueError, match=f"PushCube-v1 has no scripted expert.*{PICK}"):
        sim.expert_action()


def test_the_structured_reward_pays_the_grasp_once(simulators):
    sim = simulators(PICK, reward="structured")
    sim.reset(2)
    rewards = []
    while not rewards or not sim.scene.env.evaluate()["success"]:
        sim.step(sim.expert_action())
        rewards.append(sim.reward)
    np.testing.assert_allclose(sorted(rewards)[-2:], [0.1, 1.0])
    assert sum(rewards) == pytest.approx(1.1)
    for _ in range(5):
        sim.step(np.array([0, 0, 0, 1], np.float32))  # the gripper opens
        rewards.append(sim.reward)
    assert sum(rewards) == pytest.approx(1.0)  # letting go costs what taking up paid; the success stays


def test_a_failure_that_the_task_reports_ends_the_episode(simulators, monkeypatch):
    sim = simulators(PUSH)
    sim.reset(0)
    evaluate = sim.scene.env.evaluate
    monkeypatch.setattr(sim.scene.env, "evaluate", lambda: {**evaluate(), "fail": ~evaluate()["success"]})
    assert not sim.step(np.zeros(4, np.float32))
    assert sim.over
    sim.reset(0)
    assert not sim.over


def test_the_batched_environment_agrees_with_single_simulators(simulators):
    """The same class that runs on the GPU, with one environment on the CPU."""
    options = ManiSkillOptions(**SMALL, max_episode_steps=12, reward="structured")
    spec = make_spec(f"maniskill:{PICK}", [PICK], options)
    sim = simulators(PICK, reward="structured")
    with ManiSkillBatchedVectorEnv(spec, options, 1, "physx_cpu", "sapien_cpu") as env:
        for state_id in (4, 1_000_004):
            observation = env.reset(np.array([[0, state_id]]))
            sim.reset(state_id)
            np.testing.assert_array_equal(observation[STATE_KEY][0], sim.state)
            np.testing.assert_array_equal(observation[IMAGE_KEY][0], picture(sim))
            steps = 0
            while steps < 12:
                chunk = np.stack([[sim.expert_action() for _ in range(5)]])
                result = env.step_chunk(chunk)
                for action, reward in zip(chunk[0][: min(5, 12 - steps)], result.rewards[0], strict=False):
                    sim.step(action)
                    assert reward == np.float32(sim.reward)
                steps += int(result.steps[0])
                np.testing.assert_array_equal(result.observation[STATE_KEY][0], sim.state)
                np.testing.assert_array_equal(result.observation[IMAGE_KEY][0], picture(sim))
                assert result.truncated[0] == (steps == 12)
            with pytest.raises(ValueError, match="no running episode"):
                env.step_chunk(chunk)
        np.testing.assert_array_equal(env.render([0], 32, 32)[0], sim.frame(32, 32, show_arm=True))
    with pytest.raises(RuntimeError, match="was closed"):
        env.reset(np.array([[0, 0]]))


def test_environments_left_out_of_a_step_are_put_back(simulators):
    sim = simulators(PICK)
    sim.reset(0)
    before = sim.scene.env.get_state().numpy().copy()
    with sim.scene.kept([0]):
        for _ in range(10):
            sim.scene.step(np.float32([[0.5, 0, -0.5, 1]]))
        assert np.abs(sim.scene.env.get_state().numpy() - before).max() > 0.01
    np.testing.assert_allclose(sim.scene.env.get_state().numpy(), before, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 4}, "image_size must be .*8 to 2048.*got 4"),
        ({"camera_pos": (0, 0, 1)}, "belong together"),
        ({"camera_fovy": 180}, "camera_fovy must be between"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        ({"backend": "tpu"}, "backend must be one of cpu, gpu, got 'tpu'"),
        ({"reward": "dense"}, "reward must be one of"),
        ({"blindness": True}, "unknown option 'blindness' of maniskill; nearest: blind"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_name_and_options(f"maniskill:{PICK}", options)


def test_tasks_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="unknown task 'PickCub-v1' of maniskill; nearest: PickCube-v1"):
        check_name_and_options("maniskill:PickCub-v1", {})
    with pytest.raises(ValueError, match="cannot share an environment: their state differs"):
        check_name_and_options(f"maniskill:{PICK},{PUSH}", {})
    with pytest.raises(ValueError, match="PushCube-v1 takes up none; use 'success', or one of .*PickCube-v1"):
        check_name_and_options(f"maniskill:{PUSH}", {"reward": "structured"})


def test_the_specification():
    spec = check_name_and_options(f"maniskill:{PICK}", {"image_size": [48, 64]})
    assert spec.cameras == {IMAGE_KEY: (48, 64)}
    assert (spec.state_dim, spec.action_dim, spec.max_episode_steps, spec.fps) == (7, 4, 50, 20)
    assert check_name_and_options(f"maniskill:{PICK}", {}).cameras == {IMAGE_KEY: (128, 128)}
    assert check_name_and_options(f"maniskill:{PICK}", {"max_episode_steps": 30}).max_episode_steps == 30
    assert set(groups()["simpler"]) <= set(TASKS)


def test_missing_files_are_named_with_their_source(tmp_path):
    task = dataclasses.replace(TASKS[PICK], assets=("data/cube.glb", "data/table.glb"), assets_source="From afar.")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/table.glb").touch()
    with pytest.raises(FileNotFoundError, match=f"PickCube-v1 needs data/cube.glb in {tmp_path}.*From afar."):
        check_assets([task], tmp_path)


def test_the_batched_simulation_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        make_env(f"maniskill:{PICK}", 8, backend="gpu")


def test_without_vulkan_one_is_told_what_to_install(monkeypatch, capsys):
    monkeypatch.setenv("VK_DRIVER_FILES", "/nonexistent")
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nonexistent")
    assert vulkan.main([]) == 1
    message = capsys.readouterr().err
    assert "24.3" in message
    assert "bookworm-backports" in message
    with pytest.raises(ValueError, match="device must be one of cpu, cuda"):
        vulkan.probe("tpu")


def test_the_modules_do_not_import_simulators():
    """The registry imports them for every user."""
    code = "import pi_rl.envs.registry, sys; print([m for m in ('torch', 'sapien', 'mani_skill') if m in sys.modules])"
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_vulkan_works_here(capsys):
    assert vulkan.main([]) == 0
    assert "draws on the CPU" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_without_vulkan_say_what_to_install(monkeypatch):
    monkeypatch.setenv("VK_DRIVER_FILES", "/nonexistent")
    monkeypatch.setenv("VK_ICD_FILENAMES", "/nonexistent")
    with make_env(f"maniskill:{PICK}", 1, 1, **SMALL) as env, pytest.raises(RuntimeError, match="bookworm-backports"):
        env.reset(np.array([[0, 0]]))


@pytest.mark.slow
def test_two_workers_give_the_results_of_one_simulator():
    """Which is the batched environment with one row, in this process."""
    options = {**SMALL, "max_episode_steps": 23, "reward": "structured"}
    ids = np.array([[0, 3], [0, 1_000_007], [0, 12]])
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (5, 3, 5, 4)).astype(np.float32)

    def results(env, rows):
        seen = [env.reset(ids[rows])]
        running = np.ones(len(rows), bool)
        for chunk in actions:
            if running.any():
                result = env.step_chunk(chunk[rows], running)
                seen += [result.observation, result.rewards, result.steps, result.terminated, result.truncated]
                running &= ~result.done
        seen.append(env.render(range(len(rows)), 40, 40))
        return [value for one in seen for value in (one.values() if isinstance(one, dict) else [one])]

    with make_env(f"maniskill:{PICK}", 3, 2, **options) as env:
        together = results(env, [0, 1, 2])
        assert all("lerobot" not in report["modules"] for report in env.worker_reports())
    checked = ManiSkillOptions(**options)
    spec = make_spec(f"maniskill:{PICK}", [PICK], checked)
    with ManiSkillBatchedVectorEnv(spec, checked, 1, "physx_cpu", "sapien_cpu") as env:
        for row in range(3):
            for first, second in zip(together, results(env, [row]), strict=True):
                if isinstance(first, np.ndarray) and len(first) == 3:
                    np.testing.assert_array_equal(first[row], second[0])


@pytest.mark.gpu
def test_a_batch_on_the_gpu():
    """Eight environments: resets by id, partial resets that leave the others alone, and the ends of episodes."""
    options = {"image_size": 64, "backend": "gpu", "max_episode_steps": 12}
    with make_env(f"maniskill:{PICK}", 8, **options) as env:
        ids = np.stack([np.zeros(8, int), np.arange(8)], 1)
        start = env.reset(ids)
        assert start[IMAGE_KEY].shape == (8, 64, 64, 3)
        assert start[IMAGE_KEY].std() > 10
        actions = np.random.default_rng(0).uniform(-1, 1, (8, 5, 4)).astype(np.float32)
        first = env.step_chunk(actions)
        again = env.reset(ids[[2, 5]], [2, 5])
        np.testing.assert_allclose(again[STATE_KEY][[2, 5]], start[STATE_KEY][[2, 5]], atol=1e-4)
        others = [0, 1, 3, 4, 6, 7]
        np.testing.assert_array_equal(again[STATE_KEY][others], first.observation[STATE_KEY][others])
        active = np.zeros(8, bool)
        active[[2, 5]] = True
        later = env.step_chunk(actions, active)
        np.testing.assert_allclose(
            later.observation[STATE_KEY][[2, 5]], first.observation[STATE_KEY][[2, 5]], atol=1e-3
        )
        assert (later.steps == 5 * active).all()
        env.step_chunk(actions)
        last = env.step_chunk(actions)
        np.testing.assert_array_equal(last.done, np.ones(8, bool))
        assert last.steps.tolist() == [2, 2, 2, 2, 2, 2, 2, 2]
