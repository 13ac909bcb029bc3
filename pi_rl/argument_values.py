"""Values of options: from text or YAML to a field's type, and back to plain YAML."""

import dataclasses
import enum
import re
import types
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

_TRUE, _FALSE = ("true", "yes", "on", "1", "t", "y"), ("false", "no", "of", "0", "f", "n")
_NONE = ("none", "null", "~")
MUST = "it must be "
DEEPEST_YAML = 50
MOST_YAML_VALUES = 20_000


class ConfigLoader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's numbers and booleans; duplicate keys and absurd sizes are refused.

    PyYAML follows YAML 1.1, where ``1e-4`` is text and ``no`` is false; both are traps in training configurations.
    Aliases count as what they stand for: a few lines of them can stand for billions of values.
    """

    def __init__(self, stream: Any) -> None:
        """Begins at the outermost level."""
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuses values nested too deeply."""
        self._depth += 1
        if self._depth > DEEPEST_YAML:
            problem = f"nested more than {DEEPEST_YAML} levels deep"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """Refuses a document that stands for too many values."""
        node = super().get_single_node()
        if node is not None and _values_of(node, {}) > MOST_YAML_VALUES:
            problem = f"more than {MOST_YAML_VALUES:,} values, counting those that aliases repeat"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is there twice; PyYAML would silently keep the last."""
        seen = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, Hashable):
                continue  # PyYAML refuses it
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _values_of(node: yaml.Node, counted: dict[int, int]) -> int:
    """Values that a node stands for, itself included; `counted` holds those of nodes that were seen, by identity."""
    if id(node) not in counted:
        counted[id(node)] = MOST_YAML_VALUES + 1  # until it is known: what contains itself has no end
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        children = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
        counted[id(node)] = 1 + sum(_values_of(child, counted) for child in children)
    return counted[id(node)]


def load_yaml(text: str) -> Any:
    """Plain values of YAML text; tags that make objects are refused.

    Args:
        text: One YAML document.

    Returns:
        Mappings, lists, text, numbers, booleans, dates and None.

    Raises:
        ValueError: In one line, why it is not valid.
    """
    try:
        return yaml.load(text, Loader=ConfigLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: numbers or dates that cannot be
        raise ValueError(" ".join(str(error).split())) from error


class ConfigDumper(yaml.SafeDumper):
    """PyYAML's safe dumper that quotes whatever :class:`ConfigLoader` or a YAML 1.1 reader would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes shared values out in full."""
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = True) -> yaml.SequenceNode:
        """Writes lists on one line."""
        return super().represent_sequence(tag, sequence, flow_style=True)


_FLOAT_TAG, _BOOL_TAG = "tag:yaml.org,2002:float", "tag:yaml.org,2002:bool"
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
# Resolvers are kept per first character and tried in order; ours for floats come last, after integers.
ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
ConfigLoader.add_implicit_resolver(_BOOL_TAG, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
ConfigLoader.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))
ConfigDumper.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))


def convert_value(value: Any, hint: Any) -> Any:
    """Converts a value of a command line (text) or of a YAML file to a field's type.

    Args:
        value: Text, a list of texts, or what YAML gave.
        hint: The field's type: bool, int, float, str, Path, an Enum, a Literal, a list, tuple or dict of these, a
            union of these, or Any.

    Returns:
        The value in that type.

    Raises:
        ValueError: If it does not fit; the message says what is allowed.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, get_args(hint))
    if origin is Literal:
        return _choose(value, {str(choice): choice for choice in get_args(hint)})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value if isinstance(value, hint) else _choose(value, {str(one.value): one for one in hint})
    if origin in (list, tuple) or hint in (list, tuple):
        return _convert_sequence(value, origin or hint, get_args(hint))
    if origin is dict or hint is dict:
        return _convert_mapping(value, get_args(hint))
    if hint in _SCALARS:
        return _SCALARS[hint](value)
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"a {describe_type(hint)} can only be given in Python")


def _to_bool(value: Any) -> bool:
    text = str(value).lower() if isinstance(value, str | bool) else ""
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise ValueError(f"{MUST}true or false")


def _to_int(value: Any) -> int:
    number = _number(value, "an integer")
    if number != int(number):
        raise ValueError(f"{MUST}an integer")
    return int(value) if isinstance(value, int) else int(number)


def _to_float(value: Any) -> float:
    return float(_number(value, "a number"))


def _number(value: Any, wanted: str) -> int | float:
    """An int where the text is one, so that large integers stay exact."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        number: int | float = value
    elif isinstance(value, str):
        try:
            number = int(value) if re.fullmatch(r"\s*[-+]?[0-9]+\s*", value) else float(value)
        except ValueError:
            raise ValueError(f"{MUST}{wanted}") from None
    else:
        raise ValueError(f"{MUST}{wanted}")
    if wanted == "an integer" and number in (float("inf"), float("-inf")) or number != number:
        raise ValueError(f"{MUST}{wanted}")
    return number


def _to_str(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        raise ValueError(f"{MUST}text; put it in quotes if you mean '{value}'")
    raise ValueError(f"{MUST}text")


def _to_none(value: Any) -> None:
    if value is not None and not (isinstance(value, str) and value.lower() in _NONE):
        raise ValueError(f"{MUST}none")


_SCALARS: dict[Any, Any] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_str,
    Path: lambda value: Path(_to_str(value)),
    type(None): _to_none,
}


def _choose(value: Any, choices: dict[str, Any]) -> Any:
    if str(value) not in choices:
        raise ValueError(f"{MUST}one of {', '.join(choices)}")
    return choices[str(value)]


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    """None, then a member that the value already is, then the first that takes it; text last."""
    if value is None and type(None) in members:
        return None
    if type(value) in (bool, int, float) and type(value) in members:
        return value
    wanted = []
    for member in sorted(members, key=lambda one: one is str):
        # Where text is allowed, the word none is text.
        if member is type(None) and str in members:
            continue
        try:
            return convert_value(value, member)
        except ValueError as error:
            wanted.append(str(error).removeprefix(MUST))
    raise ValueError(MUST + " or ".join(dict.fromkeys(wanted)))


def _convert_sequence(value: Any, kind: type, items: tuple[Any, ...]) -> Any:
    """A list or tuple; ``[1, 2]`` as one text is read as YAML."""
    text = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(text, str) and text.lstrip().startswith("["):
        value = _from_text(text)
    if not isinstance(value, list | tuple):
        raise ValueError(f"{MUST}a list, such as [a, b]")
    if kind is tuple and items and items[-1] is not Ellipsis and len(items) != len(value):
        raise ValueError(f"{MUST}a list of {len(items)} values")
    if not items:
        return kind(value)
    hints = items if kind is tuple and items[-1] is not Ellipsis else (items[0],) * len(value)
    return kind(
        _convert_part(one, hint, f"item {i}") for i, (one, hint) in enumerate(zip(value, hints, strict=True), 1)
    )


def _convert_mapping(value: Any, items: tuple[Any, ...]) -> dict[Any, Any]:
    """A dict; ``{a: 1}`` as text is read as YAML."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = _from_text(value)
    if not isinstance(value, dict):
        raise ValueError(f"{MUST}a mapping, such as {{name: value}}")
    key_hint, value_hint = items or (Any, Any)
    return {
        _convert_part(key, key_hint, f"key {key!r}"): _convert_part(one, value_hint, f"value of {key!r}")
        for key, one in value.items()
    }


def _convert_part(value: Any, hint: Any, name: str) -> Any:
    try:
        return convert_value(value, hint)
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}, and {error}") from error


def _from_text(text: str) -> Any:
    try:
        return load_yaml(text)
    except ValueError as error:
        raise ValueError(f"{MUST}valid YAML ({error})") from error


def is_list_like(hint: Any) -> bool:
    """Whether an option takes several words: a list or tuple, alone or in a union."""
    return any(member in (list, tuple) or get_origin(member) in (list, tuple) for member in _members(hint))


def accepts_text(hint: Any) -> bool:
    """Whether plain text is a value of the type."""
    return str in _members(hint)


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def describe_type(hint: Any) -> str:
    """A short name of a type for help and messages, such as ``INT``, ``{a,b}`` or ``FLOAT ...``."""
    members = [member for member in _members(hint) if member is not type(None)]
    if len(members) > 1:
        return "|".join(describe_type(member) for member in members)
    only, origin = members[0], get_origin(members[0])
    if origin is Literal:
        return f"{{{','.join(map(str, get_args(only)))}}}"
    if isinstance(only, type) and issubclass(only, enum.Enum):
        return f"{{{','.join(str(one.value) for one in only)}}}"
    if only in (list, tuple) or origin in (list, tuple):
        items = [item for item in get_args(only) if item is not Ellipsis]
        return f"{describe_type(items[0]) if items else 'VALUE'} ..."
    if only is dict or origin is dict:
        return "{KEY: VALUE}"
    return {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}.get(
        only, getattr(only, "__name__", "VALUE")
    )


def to_plain(value: Any, *, strict: bool = True) -> Any:
    """What YAML can hold: enums become their values, paths text, tuples lists, dataclasses mappings.

    Args:
        value: Any option's value.
        strict: Refuse other objects; otherwise their ``str`` is used.

    Returns:
        None, bool, int, float, str, list or dict.

    Raises:
        TypeError: If ``strict`` and the value holds another kind of object.
    """
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [to_plain(one, strict=strict) for one in value]
    if isinstance(value, dict):
        return {to_plain(key, strict=strict): to_plain(one, strict=strict) for key, one in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return to_plain(fields, strict=strict)
    if strict:
        raise TypeError(f"{type(value).__name__} has no YAML form")
    return str(value)
