"""What a conversion did with every tensor of its source."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pi_rl.policies.weight_files import StoredWeights

CONVERTED, TIED, SET_ASIDE, ADDED, UNCHANGED = "converted", "tied", "set aside", "added", "unchanged"
_LISTED_APART = (TIED, SET_ASIDE, ADDED)
_DIGITS = 3


@dataclass(frozen=True)
class Key:
    """A tensor of the source, or one that was added.

    Attributes:
        source: Its name in the source's files; empty for an added one.
        targets: Its names in the destination's files; two for a tensor that the source holds once.
        what: One of the words above.
        note: Why, where that is not plain.
    """

    source: str
    targets: tuple[str, ...]
    what: str
    note: str = ""


@dataclass
class Report:
    """A conversion.

    Attributes:
        source: Folder, file or Hub id that was read.
        destination: Folder that was written.
        to: Its kind.
        keys: Every tensor of the source, and what was added.
        facts: Further lines, such as where the normalisation statistics came from.
    """

    source: str
    destination: str
    to: str
    keys: list[Key]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by what happened to them."""
        return dict(Counter(key.what for key in self.keys))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "counts": self.counts}

    def as_text(self) -> str:
        """A table: how many tensors were converted, and by name what happened otherwise."""
        lines = [f"{self.source} → {self.destination}", f"{'tensors':<12}{'':>6}  names"]
        for what, count in self.counts.items():
            keys = [key for key in self.keys if key.what == what]
            if what in _LISTED_APART:
                lines += [f"{what:<12}{1:>6}  {_line(key)}" for key in keys]
            else:
                lines.append(f"{what:<12}{count:>6}  {_line(keys[0])}{' …' if count > 1 else ''}")
        lines += [f"{name:<18}  {text}" for name, text in self.facts.items()]
        return "\n".join(lines)


def keys_of(weights: StoredWeights, targets: Mapping[str, str], what: str = CONVERTED) -> list[Key]:
    """Rows for weights that go into a file under other names.

    Args:
        weights: Where they come from.
        targets: Model's names to names in the destination.
        what: What happens to those that keep to themselves; a tensor with two targets is tied.
    """
    found: dict[str, list[str]] = {}
    for name, target in targets.items():
        found.setdefault(weights.tensors[name].name, []).append(target)
    return [Key(name, tuple(names), TIED if len(names) > 1 else what) for name, names in found.items()]


def _line(key: Key) -> str:
    arrow = " → ".join(part for part in (key.source, " and ".join(key.targets)) if part)
    return f"{arrow}: {key.note}" if key.note else arrow


def sizes(widths: Sequence[int]) -> str:
    """Widths of a network's layers, for messages."""
    return "-".join(map(str, widths))


def shown(number: float) -> str:
    """A number of a note, with three digits."""
    return f"{number:.{_DIGITS}g}"
