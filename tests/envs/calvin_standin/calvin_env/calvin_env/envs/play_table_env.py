"""The simulator's interface."""

from pathlib import Path

import hydra
import numpy as np

import calvin_env

WORLDS = []


def get_git_commit_hash(path):
    raise RuntimeError(f"{path} is not in a git repository")


class PlayTableSimEnv:
    made = 0

    def __init__(
        self,
        robot_cfg,
        seed,
        use_vr,
        bullet_time_step,
        cameras,
        show_gui,
        scene_cfg,
        use_scene_info,
        use_egl,
        control_freq=30,
    ):
        assert not use_vr
        assert not show_gui
        assert use_scene_info
        assert bullet_time_step == 240.0
        assert not WORLDS, "a second simulator in one process"
        WORLDS.append(self)
        PlayTableSimEnv.made += 1
        self.p, self.cid, self.ownsPhysicsClient = self, 0, True
        self.seed(seed)
        self.robot = hydra.utils.instantiate(robot_cfg, cid=self.cid)
        self.scene = hydra.utils.instantiate(scene_cfg, p=self.p, cid=self.cid, np_random=self.np_random)
        self.load()
        self.cameras = [
            hydra.utils.instantiate(
                cameras[name], cid=self.cid, robot_id=self.robot.robot_uid, objects=self.scene.get_objects()
            )
            for name in cameras
        ]
        assert max(cameras[name].width for name in cameras) > 0
        get_git_commit_hash(Path(calvin_env.__file__))

    def seed(self, seed=None):
        self.np_random = np.random.default_rng(seed)

    def load(self):
        self.robot.load()
        self.scene.load()

    def reset(self, robot_obs=None, scene_obs=None):
        self.scene.reset(scene_obs)
        self.robot.reset(robot_obs)
        return self.get_obs()

    def get_obs(self):
        images = {f"rgb_{camera.name}": camera.render()[0] for camera in self.cameras}
        return {"rgb_obs": images, "robot_obs": self.robot.get_observation()[0], "scene_obs": self.scene.get_obs()}

    def get_info(self):
        return {"robot_info": self.robot.get_observation()[1], "scene_info": self.scene.get_info()}

    def step(self, action):
        self.robot.apply_action(action)
        self.scene.follow(action)
        return self.get_obs(), 0, False, self.get_info()

    def close(self):
        if self.ownsPhysicsClient:
            WORLDS.remove(self)
