"""The pick-and-place generalisation benchmark (paper section 5.2.2, after RL4VLA): what each episode holds.

No simulator here: which object, receptacle, table and placement an episode has, and what the policy is told, follow
from the task and the state id alone. `put_on_plate` builds them.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

from pi_rl.envs.vector_env import TRAIN_STATE_OFFSET

OBJECTS = (
    "001_carrot_simpler",
    "002_kitchen shovel_1",
    "003_bread_1",
    "004_plastic bottle_1",
    "005_7up can_1",
    "006_zuchinni_1",
    "007_ketchup bottle_1",
    "008_watering can_1",
    "009_pipe_1",
    "010_toy bear_1",
    "011_fast food cup_1",
    "012_plant_1",
    "013_banana_1",
    "014_hamburger_1",
    "015_golf ball_1",
    "016_BBQ sauce_1",
    "017_travel cup_1",
    "018_pepper_1",
    "019_nonstop can_1",
    "020_potato_1",
    "021_baguette_1",
    "022_champagne glass_1",
    "023_kitchen spoon_1",
    "024_onion_1",
    "025_cup_1",
)
"""Folders of `carrot/more_carrot`: 16 for training, then nine that are never trained on."""
PLATES = (
    "001_plate_simpler",
    "002_cloth_1",
    "003_carpet_1",
    "004_newspaper_1",
    "005_sheet metal_1",
    "006_drawing tablet_1",
    "007_tomato slice_1",
    "008_pizza_1",
    "009_flat bowl_1",
    "010_gramophone disk_1",
    "011_frying pan_1",
    "012_mouse pad_1",
    "013_cutting board_1",
    "014_chess board_1",
    "015_manhole cover_1",
    "016_envelope_1",
    "017_notepad_1",
)
"""Folders of `carrot/more_plate`."""
TABLES = (
    "001_table_simpler",
    "002_blue plastic table_1",
    "003_TV cabinet_1",
    "004_picnic table_1",
    "005_dest_1",
    "006_table_1",
    "007_yellow desk_1",
    "008_table_2",
    "009_table_3",
    "010_table_4",
    "011_table_5",
    "012_pink table_1",
    "013_table_6",
    "014_grass table_1",
    "015_table_7",
    "016_coloful desk_1",
    "017_glass table_1",
    "018_green table_1",
    "019_pink desk_1",
    "020_stone table_1",
    "021_dining table_2",
)
"""Photographs in `carrot/more_table/imgs`, without ".png": 16 for training, then five that are never trained on."""
TRAIN_OBJECTS, UNSEEN_OBJECTS = range(16), range(16, 25)
TRAIN_TABLES, UNSEEN_TABLES = range(16), range(16, 21)
TEXTURES = range(1, 17)
"""Of `carrot/more_table/textures/NNN.png`, counted from 0: those that disturb the picture. The first is plain."""

INSTRUCTION = "put {object} on {plate}"
PHRASINGS = (
    "the {object} goes on the {plate}",
    "bring the {object} over to the {plate}",
    "lift the {object} and leave it on the {plate}",
    "drop the {object} off on the {plate}",
    "grab the {object} and rest it on the {plate}",
    "I want the {object} on top of the {plate}",
    "would you get the {object} onto the {plate}?",
    "use the {plate} to hold the {object}",
    "the {plate} is where the {object} belongs",
    "transfer the {object} onto the {plate}",
    "carry the {object} to the {plate} and let go",
    "find the {object}, then set it on the {plate}",
    "top the {plate} with the {object}",
    "have the {object} sit on the {plate}",
    "clear the {object} off the table, it goes on the {plate}",
    "let the {object} end up on the {plate}",
)
"""Instructions that training does not contain; our own words, RL4VLA's differ."""

CELL = 0.03
CENTRE = (-0.16, 0.0)
"""Middle of the 15 cm square that objects are placed in, as a grid of 6 x 6 points; metres."""
_NEAR_CELLS2 = 6
"""Placements are more than 7 cm apart: at least 6 in squared cells of 3 cm."""
_FAR_CELLS2 = 26
"""More than 15 cm apart."""
TRAIN_YAWS = tuple(math.pi / 4 * k for k in range(4))
UNSEEN_YAWS = tuple(-math.pi / 8 * k for k in (1, 3, 5, 7))

Point = tuple[float, float]
Cell = tuple[int, int]


class Episode(NamedTuple):
    """What an episode is made of; indices into the lists of this module and of its `Benchmark`."""

    object: int
    plate: int
    extra: int
    table: int
    placement: int
    yaw: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row of the paper's Table 9: the sets that its episodes are drawn from.

    With sizes O, E, P, T, X, R of objects, extras, plates, tables, placements and yaws, an episode has the number
    ((((object E + extra) P + plate) T + table) X + placement) R + yaw, as in RL4VLA.

    Attributes:
        name: Task name.
        objects: Indices of the objects to be put, in `OBJECTS`.
        plates: Indices of the receptacles, in `PLATES`.
        tables: Indices of the photographs, in `TABLES`.
        extra: What else varies: "" (nothing), "texture" (laid over the picture), "phrasing" (of the instruction),
            "object" (a second one beside), "plate" (a second one beside) or "pose" (of the robot).
        distractor_plates: Of the second receptacle.
        outside: Objects and plates stand on the points around the square, turned by angles of their own.
        third: A third place: "" (none), "object" (more than 15 cm from the object's, for a second object or for the
            object to be moved to) or "plate" (more than 15 cm from the plate's).
        blend: Where a texture is laid: "" (nowhere), "foreground" (robot and objects) or "image" (everywhere).
        strength: Share of the texture in [0, 1].
        moves: The object is taken to the third place after `MOVE_STEP` steps.
        eval_states: Evaluation states.
    """

    name: str
    objects: range = TRAIN_OBJECTS
    plates: range = range(17)
    tables: range = TRAIN_TABLES
    extra: str = ""
    distractor_plates: range = range(0)
    outside: bool = False
    third: str = ""
    blend: str = ""
    strength: float = 0.0
    moves: bool = False
    eval_states: int = 960

    @property
    def extras(self) -> int:
        """E."""
        return {
            "": 1,
            "texture": len(TEXTURES),
            "phrasing": len(PHRASINGS),
            "object": len(self.objects) - 1,
            "plate": len(self.distractor_plates) - (self.plates[0] in self.distractor_plates),
            "pose": len(robot_offsets()),
        }[self.extra]

    @property
    def yaws(self) -> tuple[float, ...]:
        """Angles of the object about the vertical, radians."""
        return UNSEEN_YAWS if self.outside else TRAIN_YAWS

    @property
    def placements(self) -> tuple[tuple[Point, ...], ...]:
        """Places of object, plate and, where there is one, the third: x and y in metres."""
        return _placements(self.outside, self.third)

    @property
    def combinations(self) -> int:
        """O E P T: what differs by more than a pose."""
        return len(self.objects) * self.extras * len(self.plates) * len(self.tables)

    @property
    def poses(self) -> int:
        """X R."""
        return len(self.placements) * len(self.yaws)

    def number(self, state_id: int) -> int:
        """The number of an episode in [0, `combinations` x `poses`).

        Evaluation states walk through the combinations in steps of the golden section, through the poses in steps of
        the square root of two, both made coprime: no combination comes twice before all have come once, and any first
        n states are spread evenly. Training states are scattered by a hash, and never meet an evaluation state.

        Args:
            state_id: At least 0.
        """
        if state_id < TRAIN_STATE_OFFSET:
            return self._evaluation(state_id)
        attempt = 0
        while True:
            number = _scatter(state_id, attempt) % (self.combinations * self.poses)
            if not self._is_evaluation(number):
                return number
            attempt += 1

    def _evaluation(self, state_id: int) -> int:
        combination = state_id * _stride(self.combinations, (math.sqrt(5) - 1) / 2) % self.combinations
        pose = state_id * _stride(self.poses, math.sqrt(2) - 1) % self.poses
        return combination * self.poses + pose

    def _is_evaluation(self, number: int) -> bool:
        inverse = pow(_stride(self.combinations, (math.sqrt(5) - 1) / 2), -1, self.combinations)
        first = number // self.poses * inverse % self.combinations  # the first state with this combination
        return any(self._evaluation(state) == number for state in range(first, self.eval_states, self.combinations))

    def episode(self, state_id: int) -> Episode:
        """What the episode of a state holds.

        Args:
            state_id: At least 0.
        """
        rest, yaw = divmod(self.number(state_id), len(self.yaws))
        rest, placement = divmod(rest, len(self.placements))
        rest, table = divmod(rest, len(self.tables))
        rest, plate = divmod(rest, len(self.plates))
        item, extra = divmod(rest, self.extras)
        return Episode(
            object=self.objects[item],
            plate=self.plates[plate],
            extra=self._extra(item, plate, extra),
            table=self.tables[table],
            placement=placement,
            yaw=yaw,
        )

    def _extra(self, item: int, plate: int, extra: int) -> int:
        """The index of the texture, phrasing, second object, second plate or pose; 0 if there is none."""
        if self.extra == "texture":
            return TEXTURES[extra]
        if self.extra == "object":
            return self.objects[(item + 1 + extra) % len(self.objects)]
        if self.extra == "plate":
            others = [index for index in self.distractor_plates if index != self.plates[plate]]
            return others[extra]
        return extra

    def models(self, state_id: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Objects and plates that stand on the table, the one in question first: all that a scene is built from."""
        episode = self.episode(state_id)
        objects = (episode.object, episode.extra) if self.extra == "object" else (episode.object,)
        plates = (episode.plate, episode.extra) if self.extra == "plate" else (episode.plate,)
        return objects, plates

    def instruction(self, state_id: int) -> str:
        """What the policy is told in the episode of a state."""
        return self.phrase(self.episode(state_id))

    def phrase(self, episode: Episode) -> str:
        """What the policy is told in an episode."""
        phrase = PHRASINGS[episode.extra] if self.extra == "phrasing" else INSTRUCTION
        return phrase.format(object=spoken(OBJECTS[episode.object]), plate=spoken(PLATES[episode.plate]))


MOVE_STEP = 5
"""Control steps after which `Benchmark.moves` moves the object."""


def spoken(folder: str) -> str:
    """The name in a folder's name: "010_toy bear_1" is a "toy bear"."""
    match = re.fullmatch(r"\d+_(.+)_\w+", folder)
    if match is None:
        raise ValueError(f"a model's folder must look like '010_toy bear_1', got {folder!r}")
    return match[1]


@functools.cache
def _placements(outside: bool, third: str) -> tuple[tuple[Point, ...], ...]:
    """All placements, in cells of the grid first: whether two are far enough apart is then no matter of rounding."""
    low, high = (-1, 7) if outside else (0, 6)
    points = [(x, y) for x in range(low, high) for y in range(low, high)]
    if outside:
        points = [(x, y) for x, y in points if x in (low, high - 1) or y in (low, high - 1)]
    pairs = [(a, b) for a in points for b in points if _apart(a, b) >= _NEAR_CELLS2]
    found: list[tuple[Cell, ...]] = [*pairs]
    if third:
        from_object = _FAR_CELLS2 if third == "object" else _NEAR_CELLS2
        from_plate = _FAR_CELLS2 if third == "plate" else _NEAR_CELLS2
        found = [
            (a, b, c) for a, b in pairs for c in points if _apart(a, c) >= from_object and _apart(b, c) >= from_plate
        ]
    return tuple(tuple(_metres(cell) for cell in cells) for cells in found)


def _apart(a: Cell, b: Cell) -> int:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def _metres(cell: Cell) -> Point:
    return CENTRE[0] + (cell[0] - 2.5) * CELL, CENTRE[1] + (cell[1] - 2.5) * CELL


@functools.cache
def robot_offsets() -> tuple[tuple[float, ...], ...]:
    """What "pose" adds to the robot's six joints at the start, radians; the pose of training is not among them."""
    steps = (-0.15, -0.08, 0.0, 0.08, 0.15)
    turns = (-0.6, -0.3, 0.0, 0.3, 0.6)
    arms = [(a, b, c, d, e) for a in steps for b in steps for c in steps for d in steps for e in steps]
    return tuple((*arm, turn) for arm in arms if abs(arm[1] + arm[2]) <= 0.25 for turn in turns)


@functools.cache
def _stride(size: int, fraction: float) -> int:
    """The first number from `fraction` of `size` up that is coprime with it."""
    stride = max(1, round(fraction * size))
    while math.gcd(stride, size) != 1:
        stride += 1
    return stride


def _scatter(state_id: int, attempt: int) -> int:
    """64 evenly mixed bits of a state id (the finaliser of SplitMix64)."""
    mask = 2**64 - 1
    mixed = (state_id * 0x9E3779B97F4A7C15 + attempt * 0xD1B54A32D192ED03) & mask
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
    return mixed ^ (mixed >> 31)


def _vision(kind: str, blend: str = "", strength: float = 0.0) -> Benchmark:
    name = f"PutOnPlateInScene25Vision{kind}-v1"
    if not blend:
        return Benchmark(name=name, tables=UNSEEN_TABLES)
    return Benchmark(name=name, extra="texture", blend=blend, strength=strength)


_UNSEEN_PLATES = range(1, 17)
MAIN = Benchmark(name="PutOnPlateInScene25Main-v3", eval_states=16 * 17 * 16)
"""Where training happens: 16 objects x 17 receptacles x 16 tables, each of the 4,352 once in an evaluation."""
VISION = (
    _vision("Image"),
    _vision("Texture03", "foreground", 0.3),
    _vision("Texture05", "foreground", 0.5),
    _vision("Whole03", "image", 0.3),
    _vision("Whole05", "image", 0.5),
    Benchmark(name="PutOnPlateInScene25Instruct-v1", extra="phrasing"),
)
"""Table 9's "Visual-language Variations", Table 3's "Vision": the latter's averages include the phrasings."""
SEMANTIC = (
    Benchmark(name="PutOnPlateInScene25MultiCarrot-v1", objects=UNSEEN_OBJECTS, extra="object", third="object"),
    Benchmark(name="PutOnPlateInScene25MultiCarrotTrain-v1", extra="object", third="object"),
    Benchmark(
        name="PutOnPlateInScene25MultiPlate-v1",
        plates=_UNSEEN_PLATES,
        extra="plate",
        distractor_plates=_UNSEEN_PLATES,
        third="plate",
    ),
    Benchmark(
        name="PutOnPlateInScene25MultiPlateTrain-v1",
        plates=range(1),
        extra="plate",
        distractor_plates=range(17),
        third="plate",
    ),
)
EXECUTION = (
    Benchmark(name="PutOnPlateInScene25Position-v1", outside=True),
    Benchmark(name="PutOnPlateInScene25PositionChangeTo-v1", third="object", moves=True),
)
UNSEEN = (
    Benchmark(name="PutOnPlateInScene25Carrot-v1", objects=UNSEEN_OBJECTS),
    Benchmark(name="PutOnPlateInScene25Plate-v1", plates=_UNSEEN_PLATES),
    Benchmark(name="PutOnPlateInScene25EEPose-v1", extra="pose"),
)
"""RL4VLA's other three, which Table 9 leaves out. The receptacles are unseen only after training with one plate."""


def one_plate(benchmark: Benchmark) -> Benchmark:
    """The benchmark with `use_multiple_plates` off: only the plate, where it does not itself name receptacles.

    RLinf's files for π0 have it off, which leaves 16 x 16 = 256 combinations to train on; the paper has 4,352.
    """
    if benchmark.plates != MAIN.plates:
        return benchmark
    return dataclasses.replace(benchmark, plates=range(1))


BENCHMARKS = {benchmark.name: benchmark for benchmark in (MAIN, *VISION, *SEMANTIC, *EXECUTION, *UNSEEN)}
"""By task name."""
