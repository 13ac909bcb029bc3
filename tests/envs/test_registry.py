import pytest

from pi_rl.envs.registry import SIMULATORS, check_name_and_options, list_tasks, make_env, parse_name


def test_names_are_split_into_tasks():
    assert parse_name("metaworld:reach-v3, push-v3") == ("metaworld", ("reach-v3", "push-v3"))
    assert len(parse_name("metaworld:mt50")[1]) == 50


def test_all_tasks_of_the_simulator_have_an_instruction(metaworld):
    from metaworld.env_dict import ENV_CLS_MAP
    from metaworld.policies import ENV_POLICY_MAP

    assert set(list_tasks("metaworld")) == set(ENV_CLS_MAP) == set(ENV_POLICY_MAP)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reach-v3", "did you mean 'metaworld:reach-v3'"),
        ("nothing", "must look like 'metaworld:reach-v3'"),
        ("Pendulum-v1", "did you mean 'gymnasium:Pendulum-v1'"),
        ("mt50", "did you mean 'metaworld:mt50'"),
        ("isaac:spatial", "unknown simulator 'isaac'; there are calvin, gymnasium, libero, maniskill, metaworld, toy"),
        ("metawrld:reach-v3", "unknown simulator 'metawrld'; nearest: metaworld"),
        ("metaworld:reech-v3", "unknown task 'reech-v3' .*nearest: reach-v3"),
        ("metaworld:mt10", "nearest: mt50"),
        ("metaworld:", "names no task"),
        ("metaworld:reach-v3,reach-v3", "named twice"),
    ],
)
def test_unknown_names_list_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        make_env(name, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fast_renderin": True}, "unknown option 'fast_renderin' .*nearest: fast_rendering"),
        ({"image_size": 4}, "image_size .*8 to 2048, got 4"),
        ({"image_size": (64, 64, 3)}, "image_size"),
        ({"image_size": 64.0}, "image_size"),
        ({"camera_pos": 3}, "camera_pos must be three"),
        ({"camera": "corner9"}, "camera must be one of corner2, .*got 'corner9'"),
        ({"camera_pos": (1, 2)}, "camera_pos must be three"),
        ({"camera": "gripperPOV", "camera_lookat": (0, 0, 0)}, "rides on the hand"),
        ({"camera_fovy": 180}, "camera_fovy"),
        ({"object_spread": -1}, "object_spread"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
        ({"object_range": {"push-v3": {"low": [0] * 3, "high": [1] * 3}}}, "object_range names push-v3, but"),
        ({"object_range": {"reach-v3": {"low": [0] * 3}}}, r"keys low and high, got \['low'\]"),
        ({"object_range": {"reach-v3": {"low": [1] * 6, "high": [0] * 6}}}, "at most its high"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_env("metaworld:reach-v3", 1, **options)


@pytest.mark.parametrize(("counts", "message"), [((0, None), "num_envs .*got 0"), ((1, 0), "num_workers .*got 0")])
def test_counts_are_checked(counts, message):
    with pytest.raises(ValueError, match=message):
        make_env("metaworld:reach-v3", *counts)
    with pytest.raises(ValueError, match=message):
        make_env("toy:identity", *counts)


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_every_simulator_describes_its_example(simulator):
    entry = SIMULATORS[simulator]
    spec = check_name_and_options(f"{simulator}:{entry.example}", {})
    assert spec.tasks == (entry.example,)
    assert entry.example in list_tasks(simulator)
    with pytest.raises(ValueError, match=f"write for example '{simulator}:{entry.example}'"):
        parse_name(f"{simulator}: ")
