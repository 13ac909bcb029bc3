"""The WidowX tasks: what their episodes hold (no simulator), and the scenes themselves, built, stepped and drawn."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from pi_rl.envs.maniskill_tasks import files
from pi_rl.envs.maniskill_tasks.benchmark import (
    BENCHMARKS,
    EXECUTION,
    MAIN,
    OBJECTS,
    PHRASINGS,
    PLATES,
    SEMANTIC,
    TABLES,
    UNSEEN,
    VISION,
    one_plate,
    spoken,
)
from pi_rl.envs.maniskill_tasks.overlay import blend_foreground, blend_image, bounds, is_foreground
from pi_rl.envs.maniskill_tasks.table import TASKS
from pi_rl.envs.maniskill_tasks.widowx import controller_action
from pi_rl.envs.registry import check_name_and_options
from pi_rl.envs.vector_env import IMAGE_KEY, TRAIN_STATE_OFFSET

CARROT = "PutCarrotOnPlateInScene-v1"
SIMPLER = (CARROT, "PutSpoonOnTableClothInScene-v1", "StackGreenCubeOnYellowCubeBakedTexInScene-v1")
EGGPLANT = "PutEggplantInBasketScene-v1"
SIZE = (60, 80)
STAND_INS = {("010_toy bear_1", 0), ("017_travel cup_1", 0), ("005_sheet metal_1", 1)}


@pytest.fixture(scope="module")
def make(maniskill_folder):
    """Makes simulators in this process, one of each kind, and keeps them."""
    from pi_rl.envs.maniskill import ManiSkillBackend

    made = {}

    def sim(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = ManiSkillBackend([name], {"image_size": SIZE, "reward": "structured", **options}).make(0)
        return made[key]

    yield sim
    for one in made.values():
        one.close()


def picture(sim):
    image = np.zeros((*SIZE, 3), np.uint8)
    sim.draw({IMAGE_KEY: image})
    return image


def everything(sim):
    return [picture(sim), sim.state, sim.scene.env.get_state().numpy().copy()]


def wander(sim, steps, seed):
    """Downwards at random: the gripper hits the table, the object and the plate."""
    generator = np.random.default_rng(seed)
    for step in range(steps):
        move = generator.uniform(-0.03, 0.03, 3) - [0.0, 0.0, 0.03]
        sim.step(np.array([*move, *generator.uniform(-0.05, 0.05, 3), step < steps / 2], np.float32))


def solve(sim, state, steps=48, watch=lambda solved: None):
    sim.reset(state)
    rewards, solved = [], False
    while not solved and sim.steps < steps:
        solved = sim.step(sim.expert_action())
        rewards.append(sim.reward)
        watch(solved)
    return solved, rewards


def maniskills_own(sim):
    """ManiSkill's judgement of the present state, for its one environment."""
    theirs = next(base for base in type(sim.scene.env).__mro__ if base.__module__.endswith("put_on_in_scene"))
    return bool(theirs.evaluate(sim.scene.env)["success"])


# What episodes hold


def test_sizes_are_the_papers():
    assert MAIN.combinations == 16 * 17 * 16 == 4352
    assert one_plate(MAIN).combinations == 16 * 16
    assert (len(MAIN.placements), MAIN.poses) == (784, 3136)
    assert len({MAIN.episode(state)[:4] for state in range(MAIN.eval_states)}) == 4352
    assert [len(rows) for rows in (VISION, SEMANTIC, EXECUTION, UNSEEN)] == [6, 4, 2, 3]
    assert {row.eval_states for row in BENCHMARKS.values()} == {4352, 960}


def test_rows_differ_from_the_main_one_where_they_say():
    def episodes(name, states=960):
        return [BENCHMARKS[f"PutOnPlateInScene25{name}"].episode(state) for state in range(states)]

    assert {e.table for e in episodes("VisionImage-v1")} == set(range(16, 21))
    assert {e.extra for e in episodes("VisionTexture05-v1")} == set(range(1, 17))
    assert {e.extra for e in episodes("Instruct-v1")} == set(range(16))
    for name in ("Carrot-v1", "MultiCarrot-v1"):
        assert {e.object for e in episodes(name)} == set(range(16, 25))
    for name in ("Plate-v1", "MultiPlate-v1"):
        assert {e.plate for e in episodes(name)} == set(range(1, 17))
    assert {e.plate for e in episodes("MultiPlateTrain-v1")} == {0}
    for row in SEMANTIC:
        chosen = [row.models(state) for state in range(960)]
        assert all(len({*objects}) == len(objects) and len({*plates}) == len(plates) for objects, plates in chosen)
        assert {len(objects) + len(plates) for objects, plates in chosen} == {3}


def test_places_keep_their_distances():
    def least(row, first, second):
        return min(np.hypot(*np.subtract(place[first], place[second])) for place in row.placements)

    outside = BENCHMARKS["PutOnPlateInScene25Position-v1"]
    moved = BENCHMARKS["PutOnPlateInScene25PositionChangeTo-v1"]
    for row in BENCHMARKS.values():
        assert least(row, 0, 1) > 0.07
        points = np.array(row.placements)
        reach = 0.105 if row is outside else 0.075
        assert np.abs(points - [-0.16, 0.0]).max() == pytest.approx(reach)
    assert least(moved, 0, 2) > 0.15 - 1e-9
    assert not {point for place in outside.placements for point in place} & {p for x in MAIN.placements for p in x}
    assert not set(outside.yaws) & set(MAIN.yaws)


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_evaluation_states_are_spread_and_never_trained_on(name):
    row = BENCHMARKS[name]
    numbers = [row.number(state) for state in range(row.eval_states)]
    assert len({*numbers}) == row.eval_states
    assert min(numbers) >= 0
    assert max(numbers) < row.combinations * row.poses
    counts = collections.Counter(row.episode(state).object for state in range(320))
    assert max(counts.values()) - min(counts.values()) <= 4
    trained = [row.number(TRAIN_STATE_OFFSET + state) for state in range(3000)]
    assert not {*trained} & {*numbers}
    assert len({row.episode(TRAIN_STATE_OFFSET + state).object for state in range(300)}) == len(row.objects)


def test_a_training_state_that_would_be_an_evaluation_state_is_moved(monkeypatch):
    from pi_rl.envs.maniskill_tasks import benchmark

    taken = MAIN.number(17)
    monkeypatch.setattr(benchmark, "_scatter", lambda state, attempt: taken + (attempt >= 2))
    assert MAIN.number(TRAIN_STATE_OFFSET) == taken + 1


def test_instructions():
    assert spoken("010_toy bear_1") == "toy bear"
    episode = MAIN.episode(1)
    assert MAIN.instruction(1) == f"put {spoken(OBJECTS[episode.object])} on {spoken(PLATES[episode.plate])}"
    phrased = BENCHMARKS["PutOnPlateInScene25Instruct-v1"]
    texts = {phrased.instruction(state) for state in range(960)}
    assert len(texts) > 900
    assert not any(text.startswith("put ") for text in texts)
    assert len({*PHRASINGS}) == 16
    spec = check_name_and_options("maniskill:PutOnPlateInScene25Main-v3,PutOnPlateInScene25Instruct-v1", {})
    assert spec.instruction(0, 1) == MAIN.instruction(1)
    assert spec.instruction(1, 7) == phrased.instruction(7)
    single = check_name_and_options("maniskill:PutOnPlateInScene25Main-v3", {"use_multiple_plates": False})
    assert {single.instruction(0, state).rpartition(" on ")[2] for state in range(256)} == {"plate"}


def test_entries_of_the_table():
    assert sorted(name for name, task in TASKS.items() if "simpler" in task.groups) == sorted((*SIMPLER, EGGPLANT))
    for group, rows in (("ood_vision", VISION), ("ood_semantic", SEMANTIC), ("ood_execution", EXECUTION)):
        spec = check_name_and_options(f"maniskill:{group}", {})
        assert spec.tasks == tuple(row.name for row in rows)
        assert (spec.eval_states, spec.max_episode_steps, spec.action_dim, spec.state_dim) == (960, 48, 7, 8)
    everything_else = check_name_and_options("maniskill:ood", {})
    assert len(everything_else.tasks) == 12
    assert {name: len(tasks) for name, tasks in everything_else.task_groups.items()} == {
        "ood_vision": 6,
        "ood_semantic": 4,
        "ood_execution": 2,
    }
    spec = check_name_and_options(f"maniskill:{CARROT}", {})
    assert (spec.eval_states, spec.cameras) == (24, {IMAGE_KEY: (480, 640)})


# Pictures put together


def test_foreground_is_what_is_kept_also_where_numbers_are_missing():
    segmentation = torch.tensor([[[0, 3], [7, 3]], [[7, 0], [2, 2]]], dtype=torch.int16)
    kept = torch.tensor([[3, 9], [7, 2]])
    mask = is_foreground(segmentation, kept)
    assert mask.tolist() == [[[False, True], [False, True]], [[True, False], [True, True]]]


def test_boxes():
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[0, 1:4, 2:6] = True
    assert bounds(mask).tolist() == [[2, 1, 5, 3], [0, 0, 0, 0]]


def test_a_texture_is_stretched_over_the_foreground_and_moves_with_it():
    images = torch.full((2, 6, 8, 3), 100.0)
    ramp = torch.linspace(0, 255, 8).expand(6, 8)[..., None].expand(6, 8, 3)
    textures = torch.stack([ramp, ramp])
    mask = torch.zeros(2, 6, 8, dtype=torch.bool)
    mask[0], mask[1, :, 4:] = True, True
    blended = blend_foreground(images, mask, textures, 0.5)
    torch.testing.assert_close(blended[0], (100 + ramp) / 2)
    assert bool((blended[1, :, :4] == 100).all())
    pairs = ramp[0, :, 0].reshape(4, 2).mean(1)  # two of the texture's pixels in each of the picture's
    torch.testing.assert_close(blended[1, 0, 4:, 0], (100 + pairs) / 2)
    alone = blend_foreground(images[1:], mask[1:], textures[1:], 0.5)
    torch.testing.assert_close(alone[0], blended[1])


def test_a_texture_over_the_picture_is_shifted_by_the_middle_of_the_foreground():
    images = torch.zeros(1, 4, 6, 3)
    texture = torch.arange(8.0)[:, None] * 100 + torch.arange(12.0)[None]
    textures = texture[None, ..., None].expand(1, 8, 12, 3)
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 1:4, 3:6] = True  # middle: row 2, column 4
    torch.testing.assert_close(blend_image(images, mask, textures, 0.5)[0, ..., 0], texture[2:6, 4:10] / 2)


def test_gripper_action():
    given = torch.tensor([[0.01, 0.02, 0.03, 0.1, 0.2, 0.3, grip] for grip in (0.0, 0.5, 0.51, 1.0)])
    made = controller_action(given)
    assert made[:, 6].tolist() == [-1, -1, 1, 1]
    torch.testing.assert_close(made[:, :6], given[:, :6])


# Missing files


def test_missing_files_are_named_with_their_source(tmp_path):
    present = tmp_path / "a" / "collision.obj"
    present.parent.mkdir()
    present.touch()
    with pytest.raises(
        FileNotFoundError, match=r"the task needs b/textured.dae in .*no such file; source: over there"
    ):
        files.check("the task", tmp_path, [present, tmp_path / "b" / "textured.dae"], "over there")
    files.check("the task", tmp_path, [present], "over there")


def test_the_eggplant_lacks_its_mesh_here(maniskill_folder):
    from pi_rl.envs.maniskill import ManiSkillBackend

    with pytest.raises(FileNotFoundError, match="eggplant/textured.dae in .*haosulab/ManiSkill_bridge_v2_real2sim"):
        ManiSkillBackend([EGGPLANT], {})


def test_a_missing_object_is_refused_before_anything_is_built(maniskill_folder, monkeypatch, tmp_path):
    from pi_rl.envs.maniskill import ManiSkillBackend

    monkeypatch.setenv("MANISKILL_ASSET_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"more_carrot/model_db.json.*RLinf/maniskill_assets"):
        ManiSkillBackend([MAIN.name], {}).make(0)


def test_the_lists_are_those_of_the_files(maniskill_folder):
    root = files.carrot_folder()
    for kind, names in (("more_carrot", OBJECTS), ("more_plate", PLATES)):
        models = json.loads((root / kind / "model_db.json").read_text())
        assert tuple(models) == names
        assert [models[name]["name"] for name in names] == [spoken(name) for name in names]
    tables = json.loads((root / "more_table" / "model_db.json").read_text())
    assert tuple(tables) == tuple(f"{name}.png" for name in TABLES)
    assert [table["texture"] for table in tables.values()] == [f"{index + 1:03}.png" for index in range(len(TABLES))]


# Scenes


def test_carrot_onto_plate_from_reset_to_reward(make):
    sim = make(CARROT)
    agreed = []
    solved, rewards = solve(sim, 0, watch=lambda solved: agreed.append(solved == maniskills_own(sim)))
    assert solved
    assert all(agreed)
    paid = [round(reward, 6) for reward in rewards if reward]
    assert paid[0] == 0.1  # taken up, once
    assert sum(rewards) == pytest.approx(1.0 + 0.1 * sim.scene.env.evaluate()["is_grasped"].item())
    assert sim.scene.env.get_language_instruction() == [TASKS[CARROT].instruction]
    assert sim.state.shape == (8,)


def test_resets_of_simpler_tasks_depend_on_their_state_alone(make):
    sim = make(CARROT)
    sim.reset(5)
    first = everything(sim)
    wander(sim, 12, seed=0)
    later = everything(sim)
    sim.reset(TRAIN_STATE_OFFSET + 1)
    assert not np.array_equal(everything(sim)[2], first[2])
    wander(sim, 9, seed=1)
    sim.reset(5)
    for one, other in zip(first, everything(sim), strict=True):
        np.testing.assert_array_equal(one, other)
    wander(sim, 12, seed=0)
    for one, other in zip(later, everything(sim), strict=True):
        np.testing.assert_array_equal(one, other)


def test_training_states_lie_around_evaluation_states(make):
    sim = make(CARROT)
    grid, _ = sim.scene.env._grid
    for state in range(20):
        places, turns = sim.scene.env._layout(TRAIN_STATE_OFFSET + state)
        shift = (grid[:, :, :2] - places[:, :2]).abs().amax((1, 2)).min()
        assert 0 < shift <= 0.02
        torch.testing.assert_close(turns.norm(dim=1), torch.ones(2))
    for state in range(24):
        places, _ = sim.scene.env._layout(state)
        assert bool((places == grid[state // 2]).all())


def test_combinations_are_built_and_drawn(make):
    sim = make(MAIN.name)
    replaced = next(state for state in range(4352) if any((OBJECTS[o], 0) in STAND_INS for o in MAIN.models(state)[0]))
    pictures = []
    for state in (0, 4351, replaced):
        sim.reset(state)
        env = sim.scene.env
        assert env.get_language_instruction() == [MAIN.instruction(state)]
        assert not bool(env.evaluate()["success"])
        assert 0.86 < env.source.pose.p[0, 2] < 0.95  # on the table
        wander(sim, 2, seed=0)
        pictures.append(picture(sim))
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one.astype(int) - other).mean() > 10  # other tables


def test_resets_of_combinations_depend_on_their_state_alone(make):
    sim = make(MAIN.name)
    sim.reset(0)
    first = everything(sim)
    wander(sim, 8, seed=0)
    later = everything(sim)
    for before, seed in ((0, 3), (900, 4), (0, 0)):  # the same models, others, the same again
        sim.reset(before)
        wander(sim, 10, seed)
        sim.reset(0)
        for one, other in zip(first, everything(sim), strict=True):
            np.testing.assert_array_equal(one, other)
        wander(sim, 8, seed=0)
        for one, other in zip(later, everything(sim), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIMPLER)
def test_the_expert_solves_simpler_tasks(make, name):
    sim = make(name)
    agreed = []
    watch = lambda solved: agreed.append(solved == maniskills_own(sim))  # noqa: E731
    assert sum(solve(sim, state, watch=watch)[0] for state in range(0, 24, 4)) >= 5
    assert all(agreed)
    assert sim.scene.env.get_language_instruction() == [TASKS[name].instruction]


@pytest.mark.slow
def test_the_expert_solves_most_combinations(make):
    assert sum(solve(make(MAIN.name), state)[0] for state in range(12)) >= 7


@pytest.mark.slow
def test_one_plate(make):
    sim = make(MAIN.name, use_multiple_plates=False)
    row = one_plate(MAIN)
    for state in (0, 255):
        sim.reset(state)
        assert sim.scene.env.get_language_instruction() == [row.instruction(state)]
        assert list(sim.scene.env.plates) == [0]
    assert solve(sim, 0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != MAIN.name])
def test_variants_are_built_stepped_and_drawn(make, name):
    sim, row = make(name), BENCHMARKS[name]
    sim.reset(77)
    env, episode = sim.scene.env, row.episode(77)
    assert env.get_language_instruction() == [row.instruction(77)]
    models = (len(env.objects), len(env.plates))
    assert models == (1 + (row.extra == "object"), 1 + (row.extra == "plate"))
    plain = picture(sim)
    assert plain.std() > 20
    if row.blend:
        env.benchmark = dataclasses.replace(row, blend="")
        undisturbed = picture(sim).astype(int)
        env.benchmark = row
        changed = np.abs(plain - undisturbed).max(2) > 3
        assert changed.mean() > 0.5 if row.blend == "image" else 0.02 < changed.mean() < 0.4
    if row.extra == "pose":
        from pi_rl.envs.maniskill_tasks.benchmark import robot_offsets
        from pi_rl.envs.maniskill_tasks.widowx import START_QPOS

        moved = np.array(START_QPOS[:6]) + robot_offsets()[episode.extra]
        np.testing.assert_allclose(sim.state[:6], moved, atol=1e-5)
    before = env.source.pose.p[0, :2].clone()
    for _ in range(7):
        sim.step(np.array([0, 0, 0.02, 0, 0, 0, 1], np.float32))
    distance = float((env.source.pose.p[0, :2] - before).norm())
    assert distance > 0.1 if row.moves else distance < 0.01
