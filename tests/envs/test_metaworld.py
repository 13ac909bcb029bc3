import dataclasses

import numpy as np
import pytest

from pi_rl.envs.metaworld_options import CAMERAS, MetaWorldOptions, make_spec, task_instructions

FAST = {"image_size": 32, "fast_rendering": True, "hide_arm": True}


def make(metaworld, task, **options):
    return metaworld.MetaWorldBackend([task], {**FAST, **options})


def everything(sim):
    image = np.zeros((32, 32, 3), np.uint8)
    sim.draw({"observation.image": image})
    data = sim.data
    return [
        image,
        sim.raw_obs.copy(),
        sim.state,
        *(
            np.array(getattr(data, name))
            for name in ("qpos", "qvel", "qacc_warmstart", "mocap_pos", "xpos", "site_xpos")
        ),
    ]


def assert_same_bits(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def wander(sim, steps, seed):
    for action in np.random.default_rng(seed).uniform(-1, 1, (steps, 4)).astype(np.float32):
        sim.step(action)


# A fixture moved in the model; one moved after the last forward pass; a free object with a goal; a goal read from the
# physics; a hinge that settles.
@pytest.mark.parametrize(
    "task", ["handle-press-v3", "drawer-open-v3", "pick-place-v3", "basketball-v3", "door-unlock-v3"]
)
def test_reset_does_not_depend_on_history(metaworld, task):
    lone = make(metaworld, task)
    sim = lone.make(0)
    sim.reset(7)
    fresh = everything(sim)
    wander(sim, 12, seed=1)
    fresh_later = everything(sim)
    lone.close()

    shared = make(metaworld, task)
    first, second = shared.make(0), shared.make(0)
    first.reset(8)
    assert not np.array_equal(everything(first)[0], fresh[0])
    wander(first, 20, seed=2)
    second.reset(9)
    first.reset(7)
    second.step(np.ones(4, np.float32))  # simulators of a task share a model; using one must not move the other
    assert_same_bits(everything(first), fresh)
    actions = np.random.default_rng(1).uniform(-1, 1, (12, 4)).astype(np.float32)
    for action in actions:
        first.step(action)
        second.step(-action)
    assert_same_bits(everything(first), fresh_later)
    shared.close()


def test_the_first_observation_shows_objects_where_they_are(metaworld):
    sim = make(metaworld, "drawer-open-v3").make(0)
    sim.reset(3)
    before = sim.raw_obs[4:7].copy()
    sim.step(np.zeros(4, np.float32))
    np.testing.assert_allclose(sim.raw_obs[4:7], before, atol=2e-3)


@pytest.mark.parametrize("task", ["handle-press-v3", "reach-v3", "coffee-button-v3"])
def test_experts_solve_their_tasks(metaworld, task):
    sim = make(metaworld, task).make(0)
    for state_id in range(3):
        sim.reset(state_id)
        assert any(sim.step(metaworld.expert_action(sim)) for _ in range(150))


def test_object_range_replaces_the_random_placement(metaworld):
    bounds = {"low": [0.2, 0.7, 0.0], "high": [0.25, 0.75, 0.0]}
    sim = make(metaworld, "handle-press-v3", object_range={"handle-press-v3": bounds}).make(0)
    for state_id in range(5):
        sim.reset(state_id)
        box = sim.data.body("box").xpos
        assert (box >= np.array(bounds["low"]) - 1e-9).all()
        assert (box <= np.array(bounds["high"]) + 1e-9).all()
    wrong = {"low": [0, 0, 0, 0, 0, 0], "high": [1, 1, 1, 1, 1, 1]}
    with pytest.raises(ValueError, match="must have 3 numbers .*got 6"):
        make(metaworld, "handle-press-v3", object_range={"handle-press-v3": wrong}).make(0)


def test_object_spread_scales_x_and_y_within_reach(metaworld):
    def bounds(spread):
        space = make(metaworld, "pick-place-v3", object_spread=spread).make(0).env._random_reset_space
        return space.low, space.high

    low, high = bounds(1.0)
    np.testing.assert_allclose(low, [-0.1, 0.6, 0.02, -0.1, 0.8, 0.05])
    wide_low, wide_high = bounds(2.0)
    np.testing.assert_allclose(wide_low, [-0.2, 0.55, 0.02, -0.2, 0.75, 0.05])
    np.testing.assert_allclose(wide_high, [0.2, 0.75, 0.02, 0.2, 0.95, 0.3])
    far_low, far_high = bounds(100.0)  # the hand reaches x -0.5 to 0.5 and y 0.4 to 1.0
    np.testing.assert_allclose(far_low, [-0.5, 0.4, 0.02, -0.5, 0.4, 0.05])
    np.testing.assert_allclose(far_high, [0.5, 1.0, 0.02, 0.5, 1.0, 0.3])
    point_low, point_high = bounds(0.0)
    np.testing.assert_allclose(point_low[:2], point_high[:2])


def test_a_widened_goal_stays_visible_to_the_expert(metaworld):
    sim = make(metaworld, "reach-v3", object_spread=3.0).make(0)
    for state_id in range(3):
        sim.reset(state_id)
        solved = any(sim.step(metaworld.expert_action(sim)) for _ in range(150))
        np.testing.assert_array_equal(sim.raw_obs[-3:], sim.env._target_pos)
        assert solved


def test_pictures_follow_the_options(metaworld):
    def picture(**options):
        backend = make(metaworld, "handle-press-v3", **options)
        sim = backend.make(0)
        sim.reset(0)
        image = np.zeros((*backend.options.size, 3), np.uint8)
        sim.draw({"observation.image": image})
        backend.close()
        return image

    plain = picture()
    assert plain.std() > 10
    different = [
        picture(hide_arm=False),
        picture(fast_rendering=False),
        picture(camera_pos=(0.6, 0.0, 0.8)),
        picture(camera_fovy=40),
        picture(camera_pos=(0, 0.1, 0.8), camera_lookat=(0, 0.75, 0.05)),
    ]
    assert all(not np.array_equal(plain, image) for image in different)
    assert picture(image_size=(24, 40)).shape == (24, 40, 3)
    assert (picture(blind=True) == 127).all()


@pytest.mark.parametrize("camera", [camera for camera in CAMERAS if camera != "corner2"])
def test_every_camera_exists(metaworld, camera):
    backend = make(metaworld, "reach-v3", camera=camera)
    backend.make(0)
    assert backend._scenes[0].model.camera(backend._scenes[0]._camera).name == camera


def test_a_camera_looks_at_its_point(metaworld):
    """The target projects to the image centre: a point on the camera's -z axis."""
    for position, target in [((0.0, 0.1, 0.8), (0.0, 0.75, 0.05)), ((0.0, 0.6, 1.5), (0.0, 0.6, 0.0))]:
        sim = make(metaworld, "reach-v3", camera_pos=position, camera_lookat=target).make(0)
        sim.reset(0)
        camera = sim.env.model.camera("corner2").id
        ahead = -sim.data.cam_xmat[camera].reshape(3, 3)[:, 2]
        towards = np.array(target) - np.array(position)
        np.testing.assert_allclose(ahead, towards / np.linalg.norm(towards), atol=1e-9)
    with pytest.raises(ValueError, match="where the camera stands"):
        make(metaworld, "reach-v3", camera_pos=(0, 0, 1), camera_lookat=(0, 0, 1)).make(0)


def test_the_specification_describes_lerobots_features():
    options = MetaWorldOptions(image_size=[48, 64], max_episode_steps=99)
    spec = make_spec("metaworld:reach-v3", ["reach-v3"], options)
    assert spec.cameras == {"observation.image": (48, 64)}
    assert (spec.state_dim, spec.action_dim, spec.max_episode_steps, spec.fps) == (4, 4, 99, 80)
    assert spec.instructions == (task_instructions()["reach-v3"],)
    assert dataclasses.asdict(options)["camera"] == "corner2"


@pytest.mark.slow
def test_the_default_picture_is_lerobots(metaworld):
    from lerobot.envs.metaworld import MetaworldEnv

    theirs = MetaworldEnv("handle-press-v3", obs_type="pixels_agent_pos")
    observation, _ = theirs.reset(seed=5)
    for _ in range(3):
        observation, *_ = theirs.step(np.array([0.5, 0.3, -0.2, 0.0], np.float32))
    backend = metaworld.MetaWorldBackend(["handle-press-v3"], {"image_size": 480})
    sim = backend.make(0)
    sim.reset(0)
    for field in metaworld.PLACEMENT:
        getattr(sim.env.model, field)[:] = getattr(theirs._env.model, field)
    for field in ("qpos", "qvel", "mocap_pos", "mocap_quat"):
        getattr(sim.data, field)[:] = getattr(theirs._env.data, field)
    sim._mujoco.mj_forward(sim.env.model, sim.data)
    image = np.zeros((480, 480, 3), np.uint8)
    sim.draw({"observation.image": image})
    np.testing.assert_array_equal(image, observation["pixels"])
    backend.close()
    theirs.close()
