"""Vulkan, with which SAPIEN (the simulator under ManiSkill) draws and without which it does not even start.

`python -m pi_rl.envs.vulkan [cpu|cuda]` draws one image with SAPIEN. It ends with 0 and says which, or with 1 and says
what to install.
"""

import os
import subprocess
import sys

from pi_rl.envs.renderer import child_environment

DEVICES = ("cpu", "cuda")
PROBE_TIMEOUT_S = 180.0
ADVICE = {
    "cpu": (
        "On the CPU, SAPIEN draws with Mesa's software Vulkan (lavapipe), version 24.3 or newer. Ubuntu 24.04 and "
        "Debian 13 have it: `sudo apt-get install -y --no-install-recommends libvulkan1 mesa-vulkan-drivers`. Debian "
        "12 has 22.3 and needs its backports: `sudo sed -i 's/bookworm-updates/bookworm-updates bookworm-backports/' "
        "/etc/apt/sources.list.d/debian.sources && sudo apt-get update && sudo apt-get install -y "
        "--no-install-recommends -t bookworm-backports libvulkan1 mesa-vulkan-drivers`. If it is installed, look "
        "whether VK_DRIVER_FILES or VK_ICD_FILENAMES point elsewhere."
    ),
    "cuda": (
        "On the GPU, SAPIEN draws with the Vulkan of NVIDIA's driver: install the driver in full (with its "
        "OpenGL and Vulkan libraries, not only CUDA) and `libvulkan1`; in a container set "
        "NVIDIA_DRIVER_CAPABILITIES=all. `vulkaninfo --summary` must list the GPU. Without a GPU leave the option "
        "backend at 'cpu'."
    ),
}


def explain(problem: str, device: str = "cpu") -> str:
    """Says what to do about a Vulkan that does not work.

    Args:
        problem: What went wrong.
        device: One of `DEVICES`.

    Returns:
        A message for the user.
    """
    return f"ManiSkill could not draw on the {device.upper().replace('CUDA', 'GPU')} ({problem}). {ADVICE[device]}"


def probe(device: str = "cpu", timeout_s: float = PROBE_TIMEOUT_S) -> str | None:
    """Draws an image with SAPIEN in a process of its own (a broken driver may abort the process); takes 5 to 15 s.

    Args:
        device: One of `DEVICES`.
        timeout_s: Seconds after which the process is ended.

    Returns:
        None when an image with the expected content came out, else the last line of what went wrong.

    Raises:
        ValueError: Unknown device.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    code = f"from pi_rl.envs.vulkan import draw_ball; draw_ball({device!r})"
    environment = child_environment(os.environ.get("MUJOCO_GL", ""))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no image within {timeout_s:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or ["no message"]
    return lines[-1] if done.returncode > 0 else f"{lines[-1]}, killed by signal {-done.returncode}"


def draw_ball(device: str) -> None:
    """Draws a white ball and fails unless the image shows it.

    Args:
        device: One of `DEVICES`.

    Raises:
        RuntimeError: SAPIEN cannot draw there, or draws something else.
    """
    import sapien

    systems = [sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(sapien.Device(device))]
    scene = sapien.Scene(systems)
    scene.set_ambient_light([1.0, 1.0, 1.0])
    ball = scene.create_actor_builder()
    ball.add_sphere_visual(radius=1.0, material=sapien.render.RenderMaterial(base_color=[1.0, 1.0, 1.0, 1.0]))
    ball.build_static()
    camera = scene.add_camera("eye", 32, 32, 1.0, 0.1, 100.0)
    camera.set_local_pose(sapien.Pose([-4.0, 0.0, 0.0]))
    scene.update_render()
    camera.take_picture()
    picture = camera.get_picture("Color")  # RGBA; alpha is 0 where nothing was drawn
    if not (picture[16, 16, 3] > 0 and picture[16, 16, :3].min() > 0.1 and picture[0, 0, 3] == 0):
        raise RuntimeError(f"the image does not show the scene (centre {picture[16, 16]}, corner {picture[0, 0]})")


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's description.

    Args:
        argv: Arguments, by default the process's own.
    """
    arguments = sys.argv[1:] if argv is None else argv
    device = arguments[0] if arguments else "cpu"
    problem = probe(device)
    if problem is None:
        print(f"SAPIEN draws on the {device.upper().replace('CUDA', 'GPU')}.")
        return 0
    print(explain(problem, device), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
