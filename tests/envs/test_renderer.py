import subprocess
import sys

import numpy as np
import pytest

from pi_rl.envs import renderer


@pytest.fixture
def no_choice_yet(monkeypatch):
    renderer._choose.cache_clear()
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    yield monkeypatch
    renderer._choose.cache_clear()


def test_the_first_that_renders_is_taken_and_probed_once(no_choice_yet):
    asked = []

    def probe(name):
        asked.append(name)
        return None if name == "osmesa" else "no device"

    no_choice_yet.setattr(renderer, "probe_renderer", probe)
    assert [renderer.choose_renderer() for _ in range(3)] == ["osmesa"] * 3
    assert asked == ["egl", "osmesa"]


def test_without_any_renderer_the_message_says_what_to_install(no_choice_yet):
    no_choice_yet.setattr(renderer, "probe_renderer", lambda name: f"{name} is broken")
    with pytest.raises(
        RuntimeError, match="egl: egl is broken; osmesa: osmesa is broken.*sudo apt-get install.*libegl1"
    ):
        renderer.choose_renderer()


def test_the_users_choice_is_kept_or_refused(no_choice_yet):
    no_choice_yet.setattr(renderer, "probe_renderer", lambda name: None if name == "osmesa" else "no device")
    no_choice_yet.setenv("MUJOCO_GL", "OSMesa")
    assert renderer.choose_renderer() == "osmesa"
    no_choice_yet.setenv("MUJOCO_GL", "egl")
    with pytest.raises(RuntimeError, match="MUJOCO_GL=egl was asked for.*no device.*or unset MUJOCO_GL"):
        renderer.choose_renderer()
    no_choice_yet.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(ValueError, match="'glfw' cannot render without a display; use one of egl, osmesa"):
        renderer.choose_renderer()


def test_a_failing_probe_reports_its_last_line(monkeypatch):
    monkeypatch.setattr(renderer, "child_environment", lambda name: {"PYTHONPATH": "", "PATH": ""})
    assert renderer.probe_renderer("egl").startswith("exit code 1: ")


WORKING = [name for name in renderer.RENDERERS if renderer.probe_renderer(name) is None]


def test_a_renderer_works_here():
    assert WORKING, renderer.APT_COMMAND


@pytest.mark.parametrize("name", WORKING)
def test_two_renderers_in_a_process_leave_each_other_alone(name):
    """Drawing in turns, and closing the older one, changes no pixel of the other; the process ends without noise."""
    code = """
import mujoco, numpy as np
from pi_rl.envs.renderer import CameraRenderer
def scene(shape):
    model = mujoco.MjModel.from_xml_string(
        "<mujoco><asset><texture name='t' type='2d' builtin='checker' rgb1='1 0 0' width='64' height='64'/>"
        f"<material name='m' texture='t'/></asset><worldbody><light pos='0 0 3'/><geom {shape} material='m'/>"
        "<camera name='eye' pos='0 -4 0' xyaxes='1 0 0 0 0 1'/></worldbody></mujoco>")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data
def draw(renderer, data):
    out = np.empty((48, 64, 3), np.uint8)
    renderer.render(data, out)
    return out
make = lambda model: CameraRenderer(model, 0, 48, 64, fast=False, mirror=False, hidden=None)
scenes = [scene("type='sphere' size='1'"), scene("type='box' size='1 .4 .7'")]
lone = []
for model, data in scenes:
    renderer = make(model)
    lone.append(draw(renderer, data))
    renderer.close()
assert not np.array_equal(*lone)
first, second = (make(model) for model, _ in scenes)
for _ in range(2):
    assert np.array_equal(draw(first, scenes[0][1]), lone[0])
    assert np.array_equal(draw(second, scenes[1][1]), lone[1])
first.close()
first.close()
assert np.array_equal(draw(second, scenes[1][1]), lone[1])
second.close()
try:
    draw(second, scenes[1][1])
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=renderer.child_environment(name), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "this renderer was closed; make a new one\n"
    assert done.stderr == ""


def test_hidden_geoms_and_mirroring(metaworld):
    import mujoco

    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><light pos='0 0 3'/><geom type='sphere' size='.3' pos='-.8 0 .5' rgba='1 1 1 1'/>"
        "<geom type='sphere' size='.3' pos='.8 0 -.5' rgba='1 1 1 1'/>"
        "<camera name='eye' pos='0 -4 0' xyaxes='1 0 0 0 0 1'/></worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)

    def draw(**kind):
        made = renderer.CameraRenderer(model, 0, 40, 40, fast=True, **kind)
        out = np.empty((40, 40, 3), np.uint8)
        made.render(data, out)
        made.close()
        return out

    both = draw(mirror=False, hidden=None)
    one = draw(mirror=False, hidden=np.array([1]))
    assert both[:20, :20].any()  # the first ball is up on the left
    assert both[20:, 20:].any()
    assert one[:20, :20].any()
    assert not one[20:, 20:].any()
    assert np.array_equal(draw(mirror=True, hidden=np.array([1])), np.flip(one, (0, 1)))
    assert model.geom_group.tolist() == [0, 0]  # the simulators' model is untouched
