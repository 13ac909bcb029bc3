"""Robot, scene and cameras: each of five devices follows one axis of the action."""

import numpy as np

TOUCHED = []  # robot and scene that the cameras see


class Robot:
    """A hand that goes where it is told, and drifts a little more with every command it ever got."""

    def __init__(self, base_position, filename, tcp_link_id, cid):
        assert (filename, tcp_link_id) == ("longer_finger.urdf", 15)
        self.base_position, self.cid = base_position, cid
        self.robot_uid = 7
        self.commands = 0
        self.gripper_action = 1

    def load(self):
        TOUCHED[:] = [self]

    def reset(self, robot_state=None):
        self.state = np.zeros(15) if robot_state is None else robot_state.copy()

    def apply_action(self, action):
        assert len(action) == 7
        assert action[6] in (-1, 1), "the gripper is opened or closed"
        action[:3] *= 0.02
        action[3:6] *= 0.05
        self.commands += 1
        self.gripper_action = action[6]
        self.state[:6] += action[:6] + 1e-4 * self.commands
        self.state[6] = 0.08 if action[6] == 1 else 0.0

    def get_observation(self):
        observed = np.append(self.state[:14], self.gripper_action)
        return observed, {"tcp_pos": tuple(self.state[:3]), "uid": self.robot_uid}


class Scene:
    """A sliding door (x), a drawer (y), a button with its LED (z), a lamp (about x) and blocks (about z)."""

    def __init__(self, data_path, objects, robot_base_position, p, cid, np_random):
        assert data_path.endswith("calvin_env/data")
        self.blocks = list(objects.movable_objects)
        self.table = objects.fixed_objects.table.file
        self.loaded = False

    def load(self):
        self.loaded = True
        self.joints = {"base__slide": 0.0, "base__drawer": 0.0}
        self.pressed, self.lamp_level = 0.0, 0.0
        self.led, self.button_is_on = 0, False
        self.poses = {name: np.zeros(6) for name in self.blocks}
        TOUCHED.append(self)

    def get_objects(self):
        return self.blocks

    def reset(self, scene_obs=None):
        assert self.loaded
        assert len(scene_obs) == 24
        self.joints = {"base__slide": scene_obs[0], "base__drawer": scene_obs[1]}
        self.button_is_on = bool(self.led)  # of the light as it was
        self.pressed = 0.0
        self.lamp_level = 0.2 * scene_obs[4]
        self.led = int(scene_obs[5])
        for name, pose in zip(self.blocks, np.split(scene_obs[6:], 3), strict=True):
            self.poses[name] = pose.copy()

    def follow(self, action):
        self.joints["base__slide"] = float(np.clip(self.joints["base__slide"] + action[0], 0, 0.28))
        self.joints["base__drawer"] = float(np.clip(self.joints["base__drawer"] + action[1], 0, 0.22))
        before, self.pressed = self.pressed, float(np.clip(self.pressed + action[2], 0, 0.2))
        if before < 0.1 <= self.pressed:
            self.led, self.button_is_on = int(not self.button_is_on), not self.button_is_on
        self.lamp_level = float(np.clip(self.lamp_level + 0.5 * action[3], 0, 0.2))
        if action[6] == -1:
            self.poses["block_red"][5] += 3 * action[5]

    def get_obs(self):
        return np.array(
            [*self.joints.values(), 0, 0, *self.lights().values(), *np.concatenate([*self.poses.values()])]
        )

    def lights(self):
        return {"lightbulb": int(self.lamp_level > 0.1), "led": self.led}

    def get_info(self):
        return {
            "doors": {name: {"current_state": value} for name, value in self.joints.items()},
            "lights": {name: {"logical_state": value} for name, value in self.lights().items()},
            "movable_objects": {name: {"current_orn": tuple(pose[3:])} for name, pose in self.poses.items()},
        }


class StaticCamera:
    """Its image tells what it sees, how many pictures and simulators the process made, the scene and the blocks."""

    drawn = 0

    def __init__(self, name, width, height, cid, fov=10, robot_id=None, objects=None):
        assert robot_id == 7
        assert objects is not None
        self.name, self.width, self.height = name, width, height

    def render(self):
        from calvin_env.envs.play_table_env import PlayTableSimEnv

        StaticCamera.drawn += 1
        robot, scene = TOUCHED
        image = np.zeros((self.height, self.width, 3), np.uint8)
        image[...] = np.uint8(np.clip(100 + 100 * robot.state[:3], 0, 255))
        image[0, 0] = StaticCamera.drawn % 256
        image[0, 1] = ord(scene.table[0])
        image[0, 5] = PlayTableSimEnv.made
        for column, name in enumerate(("block_red", "block_blue", "block_pink")):
            image[0, 2 + column] = int(10 * scene.poses[name][0])
        return image, None


class GripperCamera(StaticCamera):
    pass
