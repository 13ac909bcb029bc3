"""Off-screen rendering of MuJoCo scenes: which OpenGL library to use, and a renderer that shares a process safely."""

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RENDERERS = ("egl", "osmesa")
APT_COMMAND = "apt-get install -y --no-install-recommends libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libosmesa6"
PROBE_TIMEOUT_S = 120.0
_PROBE_XML = (
    "<mujoco><worldbody><light pos='0 0 3'/>"
    "<geom type='sphere' size='1' rgba='1 1 1 1'/><camera name='eye' pos='0 -4 0' xyaxes='1 0 0 0 0 1'/>"
    "</worldbody></mujoco>"
)


def child_environment(renderer: str) -> dict[str, str]:
    """Environment variables for a child process that renders.

    The package's own location is put on `PYTHONPATH`, because the child is started with `-P` (no current directory on
    its path), and numerical libraries are held to one thread: there is one child per core.

    Args:
        renderer: One of `RENDERERS`.

    Returns:
        A copy of `os.environ` with the renderer, path and thread settings replaced.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH", "")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        "LP_NUM_THREADS": "0",  # Mesa's software renderer draws in the calling thread: 64 px gain nothing from more
        **os.environ,
        **threads,
        "MUJOCO_GL": renderer,
        "PYOPENGL_PLATFORM": renderer,
        "PYTHONPATH": os.pathsep.join(part for part in (package_root, inherited) if part),
        "PYTHONUNBUFFERED": "1",
    }


def probe_renderer(name: str, timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
    """Renders one frame with the named library in a process of its own (a broken driver may abort the process).

    Args:
        name: One of `RENDERERS`.
        timeout_s: Seconds after which the process is ended.

    Returns:
        None when a frame with the expected content came out, else the last line of what went wrong.
    """
    command = [sys.executable, "-P", "-m", "pi_rl.envs.renderer"]
    try:
        done = subprocess.run(
            command, env=child_environment(name), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no frame within {timeout_s:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or ["no message"]
    return f"exit code {done.returncode}: {lines[-1]}"


def choose_renderer() -> str:
    """Chooses the OpenGL library for this machine: `MUJOCO_GL` if set, else the first that renders a frame.

    The answer is found once per process. EGL is tried first: it is the only one that uses a GPU, and without one it
    draws the same pixels as OSMesa in the same time (measured: Mesa's software renderer is behind both).

    Returns:
        "egl" or "osmesa".

    Raises:
        ValueError: `MUJOCO_GL` names something else.
        RuntimeError: The requested library, or both, cannot render; the message gives the command that installs them.
    """
    return _choose(os.environ.get("MUJOCO_GL", "").strip().lower())


@functools.cache
def _choose(requested: str) -> str:
    if requested and requested not in RENDERERS:
        raise ValueError(
            f"MUJOCO_GL={requested!r} cannot render without a display; use one of {', '.join(RENDERERS)}, "
            "or unset it and the working one is found."
        )
    failures = {}
    for name in [requested] if requested else RENDERERS:
        problem = probe_renderer(name)
        if problem is None:
            return name
        failures[name] = problem
    tried = "; ".join(f"{name}: {problem}" for name, problem in failures.items())
    cause = f"MUJOCO_GL={requested} was asked for and" if requested else "No off-screen renderer works:"
    raise RuntimeError(
        f"{cause} MuJoCo could not render a frame ({tried}). On Debian or Ubuntu run `sudo {APT_COMMAND}`"
        + (", or unset MUJOCO_GL." if requested else ".")
    )


class CameraRenderer:
    """Renders one camera of one compiled model, or several in turns, for any number of simulators of that model.

    Not `mujoco.Renderer`: closing one of those frees its OpenGL names while another context may be current, which
    wipes the other renderer's buffers without an error. Here every OpenGL call is made with the own context current.
    """

    def __init__(
        self,
        model: Any,
        camera: int,
        height: int,
        width: int,
        *,
        fast: bool,
        mirror: bool,
        hidden: np.ndarray | None,
        hidden_groups: Sequence[int] = (),
    ):
        """Creates the OpenGL context and uploads the model's meshes and textures (0.3 to 1.3 s in software).

        Args:
            model: `mujoco.MjModel` of the simulators; it is left as it was.
            camera: Index of the model's camera that is drawn unless another one is asked for.
            height: Image height in pixels, at least 1.
            width: Image width in pixels, at least 1.
            fast: Draw without shadows, reflections and multisampling (16 times faster in software, other pixels).
            mirror: Flip both image axes, as LeRobot does for MetaWorld's `corner2`.
            hidden: Indices of geoms that are not drawn, or None.
            hidden_groups: MuJoCo's geom groups that are not drawn, such as collision shapes.
        """
        import mujoco

        self._mujoco = mujoco
        self.model = model
        self.height, self.width, self._mirror, self._fast = height, width, mirror, fast
        self._hidden = np.array([], np.int64) if hidden is None else hidden
        self._scene = mujoco.MjvScene(self.model, maxgeom=2000)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[list(hidden_groups)] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._default_camera = camera
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._pixels = np.empty((height, width, 3), np.uint8)
        self._gl: Any = mujoco.GLContext(width, height)
        self._gl.make_current()
        self._context = self._upload()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)

    def _upload(self) -> Any:
        """Makes MuJoCo's context; it reads size and quality from the model once, which gets its own back."""
        quality, size = self.model.vis.quality, self.model.vis.global_
        before = quality.offsamples, quality.shadowsize, size.offheight, size.offwidth
        size.offheight, size.offwidth = self.height, self.width
        if self._fast:
            quality.offsamples = quality.shadowsize = 0
        try:
            return self._mujoco.MjrContext(self.model, self._mujoco.mjtFontScale.mjFONTSCALE_100)
        finally:
            quality.offsamples, quality.shadowsize, size.offheight, size.offwidth = before

    def render(self, data: Any, out: np.ndarray, camera: int | None = None) -> None:
        """Draws a simulator's current state.

        Args:
            data: `mujoco.MjData` whose positions are up to date (`mj_forward`).
            out: uint8 (height, width, 3), written in place.
            camera: Index of the model's camera; by default that of the renderer.

        Raises:
            RuntimeError: The renderer was closed.
        """
        if self._gl is None:
            raise RuntimeError("this renderer was closed; make a new one")
        mujoco = self._mujoco
        self._camera.fixedcamid = self._default_camera if camera is None else camera
        groups = self.model.geom_group[self._hidden].copy()
        self.model.geom_group[self._hidden] = mujoco.mjNGROUP - 1  # the last group is off in the default options
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, data, self._options, None, self._camera, everything, self._scene)
        self.model.geom_group[self._hidden] = groups
        if self._fast:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._gl.make_current()  # another renderer of this process may have drawn last
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._context)
        # OpenGL's first row is the bottom one; with the vertical mirror on top of that it is the first again.
        out[...] = self._pixels[:, ::-1] if self._mirror else self._pixels[::-1]

    def close(self) -> None:
        """Frees the OpenGL objects in their own context, then the context. Calling it again does nothing."""
        if self._gl is None:
            return
        self._gl.make_current()
        self._context.free()
        self._gl.free()
        self._gl = None


def _probe_main() -> None:
    """Draws a white ball on black and fails unless the image shows it."""
    import mujoco

    model = mujoco.MjModel.from_xml_string(_PROBE_XML)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    image = np.zeros((32, 32, 3), np.uint8)
    renderer = CameraRenderer(model, 0, 32, 32, fast=True, mirror=False, hidden=None)
    renderer.render(data, image)
    renderer.close()
    if not (image[16, 16].min() > 20 and image[0, 0].max() < 20):
        raise SystemExit(f"the frame does not show the scene (centre {image[16, 16]}, corner {image[0, 0]})")


if __name__ == "__main__":
    _probe_main()
