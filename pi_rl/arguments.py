"""Options of a recipe: dataclass fields, a YAML file and the command line become dataclass instances.

The conventions are those of ``transformers.HfArgumentParser`` (flat names, ``--flag`` and ``--no_flag``, hyphens
accepted for underscores, lists as several words), with three additions: files inherit from files, help is grouped by
topic, and a value or name that does not fit is refused with the place where it was given and the nearest valid name.

Nothing heavy is imported here; what the dataclasses themselves import decides how fast ``--help`` is.
"""

import argparse
import copy
import dataclasses
import difflib
import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from pi_rl.argument_values import (
    ConfigDumper,
    accepts_text,
    convert_value,
    describe_type,
    is_list_like,
    load_yaml,
    to_plain,
)
from pi_rl.secrets import HIDDEN, redacted, redacted_value, redacted_words, without_hub_tokens

INHERITED_GROUP = "Hugging Face TrainingArguments"
CONFIG_NAME = "pi_rl_config.yaml"
"""File of the effective configuration, in a run's folder and in each checkpoint."""
RESERVED = ("config", "base", "without", "help", "help_all")


class ArgumentsError(ValueError):
    """A name or value given by the user that does not fit; the message is one paragraph for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


@dataclasses.dataclass(frozen=True)
class _Option:
    """One dataclass field as an option."""

    name: str
    owner: type
    hint: Any
    field: "dataclasses.Field[Any]"
    group: str
    inherited: bool

    @property
    def default(self) -> Any:
        """The field's default, or ``dataclasses.MISSING``."""
        if self.field.default_factory is not dataclasses.MISSING:
            return self.field.default_factory()
        return self.field.default


@dataclasses.dataclass(frozen=True)
class Program:
    """How a command that takes a recipe's options is called, for its help and for the command that repeats a run.

    Attributes:
        name: Words before the options, such as ``"pi-rl train"``.
        options: What it takes besides a recipe's options: (option, text) each, for the help only.
        examples: Command lines to show at the end of the help.
        find_config: Turns what ``--config`` names into a file; raises :class:`ArgumentsError`.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()
    examples: tuple[str, ...] = ()
    find_config: Callable[[str], Path] = Path


def option(default: Any, group: str, text: str) -> Any:
    """A dataclass field of a recipe: its default, the topic it stands under in ``--help``, and its help text."""
    metadata = {"group": group, "help": text}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_recipe_arguments(
    dataclass_types: Sequence[type],
    *,
    default_config: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
    description: str = "",
    argv: Sequence[str] | None = None,
    program: Program | None = None,
) -> tuple[Any, ...]:
    """Builds a recipe's dataclasses from the command line and a YAML file.

    Precedence, lowest first: the fields' defaults, ``defaults``, the YAML file, the command line. The file is the one
    of ``--config``, else ``default_config``. A file may name another one with ``base: other.yaml`` (relative to
    itself); its own keys replace the base's, whole values at a time, and those it lists in ``without: [name, …]`` are
    not inherited.

    A field's help and topic come from ``field(metadata={"help": …, "group": …})``. ``--help`` prints the fields by
    topic; fields inherited from ``transformers.TrainingArguments`` come last and only with ``--help_all``.

    Args:
        dataclass_types: Classes to fill; no two may have a field of the same name.
        default_config: YAML file used when ``--config`` is not given.
        defaults: Values that this recipe starts from instead of the fields' defaults.
        description: First paragraphs of ``--help``.
        argv: Arguments without the program's name; those of the process by default.
        program: How the command is called; by default by the name of its script.

    Returns:
        One instance per class, in the order of ``dataclass_types``.

    Raises:
        ArgumentsError: If a name is unknown, a value does not fit its type, a required option is missing, the file
            cannot be read, or a class refuses the values (its ``ValueError`` is passed on).
        TypeError: If the classes themselves do not fit together (a mistake in the recipe, not of the user).
        SystemExit: With status 0 after ``--help`` and ``--help_all``.
    """
    program = program or Program(Path(sys.argv[0]).name)
    options = _collect_options(dataclass_types)
    words = list(sys.argv[1:] if argv is None else argv)
    if not {"-h", "--help", "--help_all", "--help-all"}.isdisjoint(words):
        everything = not {"--help_all", "--help-all"}.isdisjoint(words)
        print(_format_help(options, description, default_config, everything, program))
        raise SystemExit(0)
    given = _parse_words(options, words)
    config = given.pop("config", None)
    file = program.find_config(config) if config is not None else default_config
    values: dict[str, Any] = {}
    for key, value in (defaults or {}).items():
        values[key] = _checked(options, key, value, "in the recipe's defaults")
    for key, (value, place) in (_read_config(file, ()) if file is not None else {}).items():
        if key not in given and redacted_value(value, lambda text: text.replace(HIDDEN, "")) != value:
            raise ArgumentsError(
                f"{key} in {place} has {HIDDEN} in place of an access token, which is never written. Give --{key} "
                "again."
            )
        values[key] = _checked(options, key, value, f"in {place}")
    for key, value in given.items():
        values[key] = _checked(options, key, value, "on the command line")
    return tuple(_instantiate(kind, options, values) for kind in dataclass_types)


def read_config(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file and the files it inherits from, as they are written there.

    Raises:
        ArgumentsError: A file is missing, no YAML, no mapping, or inherits from itself.
    """
    return {key: value for key, (value, _) in _read_config(path, ()).items()}


def dump_config(instances: Iterable[Any], path: Path | str) -> None:
    """Writes the effective configuration as a YAML file that ``--config`` reads again.

    All fields of our own are written, and those inherited from ``transformers.TrainingArguments`` that differ from
    their defaults. Tokens and the rank of a process are left out; a token inside another option is redacted. The file
    replaces an existing one as a whole.

    Args:
        instances: Dataclass instances, as :func:`parse_recipe_arguments` returns them.
        path: File to write; its folder must exist.

    Raises:
        ValueError: If a value cannot be written as YAML.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(_config_text(instances), encoding="utf-8")
    os.replace(partial, target)


def changed_settings(instances: Iterable[Any], path: Path | str) -> list[str]:
    """Lines by which a configuration that :func:`dump_config` wrote and these instances differ.

    Args:
        instances: Dataclass instances.
        path: The file; without one nothing differs.
    """
    if not Path(path).exists():
        return []
    written, wanted = Path(path).read_text(encoding="utf-8"), _config_text(instances)
    lines = list(difflib.unified_diff(written.splitlines(), wanted.splitlines(), n=0, lineterm=""))[2:]
    return [line[1:] for line in lines if line[0] in "+-"]


def launch_command(script: str | Program, words: Sequence[str]) -> str:
    """The command line that repeats a run, to be shown to others.

    Paths of this machine appear by their last part, access tokens as asterisks.

    Args:
        script: Recipe, such as ``"recipes/sft.py"``, or command of ``pi-rl``, which has to be launched only where
            there are several processes.
        words: Its arguments.
    """
    if isinstance(script, str):
        start = ["accelerate", "launch", script]
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        start = ["accelerate", "launch", "-m", "pi_rl", *script.name.split()[1:]]
    else:
        start = script.name.split()
    return shlex.join([*start, *shown_words(words)])


def shown_words(words: Sequence[str]) -> list[str]:
    """Arguments to be shown to others: `without_folder` and without access tokens."""
    return [without_folder(word) for word in redacted_words(words)]


def without_folder(word: str) -> str:
    """A path that begins at the root, the user's or a parent folder, by its last part; other words unchanged."""
    option, equals, value = word.partition("=")
    if not equals:
        option, value = "", word
    path = Path(value)
    outside = path.is_absolute() or path.parts[:1] in (("~",), ("..",))
    return f"{option}{equals}{path.name}" if outside and path.name else word


def _config_text(instances: Iterable[Any]) -> str:
    """All fields of our own and changed ones of TrainingArguments, as YAML by topic."""
    values = {type(instance): instance for instance in instances}
    sections: dict[str, dict[str, Any]] = {}
    for name, option in _collect_options(tuple(values)).items():
        value = getattr(values[option.owner], name)
        if name in getattr(values[option.owner], "derived", ()):
            continue  # it follows from other options
        if option.inherited and not _worth_writing(option, value, values[option.owner]):
            continue
        try:
            redact = without_hub_tokens if _is_place(name) else redacted
            sections.setdefault(option.group, {})[name] = redacted_value(to_plain(value), redact)
        except TypeError as error:
            raise ValueError(f"{name}={value!r} cannot be written as YAML: {error}.") from error
    lines = []
    for group, entries in sections.items():
        text = yaml.dump(entries, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True)
        lines.append(f"# {group}\n{text}")
    return "\n".join(lines)


def _is_place(name: str) -> bool:
    """Whether an option names a folder or repository, which a run needs as it is."""
    return name in ("model", "dataset", "env", "hub_model_id", "resume_from_checkpoint") or name.endswith(
        ("_dir", "_root")
    )


def _collect_options(dataclass_types: Sequence[type]) -> dict[str, _Option]:
    """All fields by name, topics in the order of their first field, inherited ones last."""
    found: dict[str, _Option] = {}
    for kind in dataclass_types:
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if not field.init:
                continue
            if field.name in found:
                raise TypeError(
                    f"{found[field.name].owner.__name__} and {kind.__name__} both have a field {field.name!r}; "
                    "options are flat, so rename one of them."
                )
            if field.name in RESERVED:
                raise TypeError(f"{kind.__name__}.{field.name} has a reserved name; {', '.join(RESERVED)} are taken.")
            inherited = _is_inherited(kind, field)
            group = field.metadata.get("group", f"Options of {kind.__name__}")
            found[field.name] = _Option(
                field.name, kind, hints[field.name], field, INHERITED_GROUP if inherited else group, inherited
            )
    groups = list(dict.fromkeys(option.group for option in found.values() if not option.inherited))
    ordered = sorted(
        found.values(), key=lambda option: (option.inherited, [*groups, INHERITED_GROUP].index(option.group))
    )
    return {option.name: option for option in ordered}


def _is_inherited(kind: type, field: "dataclasses.Field[Any]") -> bool:
    """Whether the field is TrainingArguments' own: a redeclared field is another object."""
    return any(
        parent.__module__.partition(".")[0] == "transformers"
        and getattr(parent, "__dataclass_fields__", {}).get(field.name) is field
        for parent in kind.__mro__[1:]
    )


class _Parser(argparse.ArgumentParser):
    """Splits words into options; values stay text and are converted later, like those of a file."""

    def error(self, message: str) -> Any:
        raise ArgumentsError(f"{message[:1].upper()}{message[1:]} (on the command line). --help lists the options.")


def _parse_words(options: dict[str, _Option], words: list[str]) -> dict[str, Any]:
    """Option names to their text, or list of texts; only those given."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config")
    for option in options.values():
        settings: dict[str, Any] = {}
        if _is_flag(option):
            settings = {"nargs": "?", "const": "true"}
        elif is_list_like(option.hint):
            settings = {"nargs": "*"}
        parser.add_argument(f"--{option.name}", **settings)
    namespace, rest = parser.parse_known_args([_normalise(word, options) for word in words])
    for word in rest:
        if word.startswith("--"):
            raise ArgumentsError(_unknown(word.partition("=")[0].lstrip("-"), options, "on the command line", "--"))
    if rest:
        raise ArgumentsError(
            f"{rest[0]!r} on the command line belongs to no option. Write --name value; --help lists the names."
        )
    # One word for 'text or list of texts' is the text.
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 and accepts_text(options[name].hint) else value
        for name, value in vars(namespace).items()
    }


def _normalise(word: str, options: dict[str, _Option]) -> str:
    """``--some-name`` to ``--some_name`` and ``--no_flag`` to ``--flag=false``; other words as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    positive = name.removeprefix("no_")
    if name not in options and positive in options and _is_flag(options[positive]) and not equals:
        return f"--{positive}=false"
    return f"--{name}{equals}{value}"


def _is_flag(option: _Option) -> bool:
    return option.hint is bool or option.hint == bool | None


def _read_config(path: Path, chain: tuple[Path, ...]) -> dict[str, tuple[Any, str]]:
    """Keys to (value, file), the bases' first so that later files replace them."""
    path = path.expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.yaml")], n=3)
        hint = f" Near it: {', '.join(str(path.parent / name) for name in near)}." if near else ""
        came = f", named as base by {chain[-1]}," if chain else ""
        raise ArgumentsError(f"The configuration file {path}{came} does not exist.{hint}")
    if path.resolve() in [file.resolve() for file in chain]:
        raise ArgumentsError(f"Configuration files inherit in a circle: {' -> '.join(map(str, [*chain, path]))}.")
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArgumentsError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ArgumentsError(f"{path} must be a mapping of option names to values, such as 'learning_rate: 1e-4'.")
    base = content.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ArgumentsError(f"base={base!r} in {path} must be one file name, relative to {path.parent}.")
    inherited = _read_config(path.parent / base, (*chain, path)) if base is not None else {}
    without = content.pop("without", [])
    if not isinstance(without, list) or not all(key in [*inherited] for key in without):
        keys = ", ".join(inherited) or "none, as there is no base"
        raise ArgumentsError(f"without={without!r} in {path} must list keys that its base has: {keys}.")
    inherited = {key: value for key, value in inherited.items() if key not in without}
    return inherited | {key.replace("-", "_"): (value, str(path)) for key, value in content.items()}


def _checked(options: dict[str, _Option], name: str, value: Any, place: str) -> Any:
    """The value converted to the option's type."""
    if name not in options:
        raise ArgumentsError(_unknown(name, options, place, ""))
    hint = options[name].hint
    try:
        return convert_value(value, hint)
    except ValueError as error:
        detail = str(error) or describe_type(hint)
        raise ArgumentsError(f"{name}={value!r} {place} does not fit: {detail}.") from error


def _unknown(name: str, options: dict[str, _Option], place: str, prefix: str) -> str:
    valid = [*options, *(["config"] if prefix else ["base", "without"])]
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5) or difflib.get_close_matches(name, valid, 1, 0.0)
    return (
        f"{prefix}{name} {place} is not an option of this recipe; the nearest: "
        f"{', '.join(prefix + word for word in near)}. --help lists the options, --help_all those of Transformers too."
    )


def _instantiate(kind: type, options: dict[str, _Option], values: dict[str, Any]) -> Any:
    own = {name: option for name, option in options.items() if option.owner is kind}
    for name, option in own.items():
        if name not in values and option.default is dataclasses.MISSING:
            raise ArgumentsError(
                f"{name} is required: give --{name} {describe_type(option.hint)}, or set it in --config."
            )
    try:
        return kind(**{name: values[name] for name in own if name in values})
    except ArgumentsError:
        raise
    except ValueError as error:
        raise ArgumentsError(str(error)) from error


def _worth_writing(option: _Option, value: Any, owner: Any) -> bool:
    """Whether an inherited value was changed, rather than rewritten by TrainingArguments itself."""
    if option.name == "local_rank" or option.name.endswith("_token"):
        return False
    if option.name == "fsdp_config" and not getattr(owner, "fsdp", None):
        return False
    default = option.default
    if value == default or (value == [] and default in (None, "", "none")):
        return False
    # A nested configuration without changes, such as accelerator_config, stands for its default None.
    return not (default is None and dataclasses.is_dataclass(value) and value == _unchanged(value))


def _unchanged(value: Any) -> Any:
    """What the value's class gives without arguments."""
    return type(value)()


def _format_help(
    options: dict[str, _Option], description: str, config: Path | None, everything: bool, program: Program
) -> str:
    """Text of ``--help``: options by topic."""
    lines = [f"usage: {program.name} [--config FILE] [--option VALUE ...]", "", description.strip(), ""]
    without = f"; without it, {_shown(config)} is read" if config is not None else ""
    lines += ["Configuration"]
    for head, text in (("--config FILE", f"YAML file with option names as keys{without}"), *program.options):
        lines += _entry(head, text)
    lines += _entry("--help, --help_all", "this text; the same with the options of Transformers")
    group = ""
    for option in options.values():
        if option.inherited and not everything:
            continue
        if option.group != group:
            group = option.group
            lines += ["", group]
        text = " ".join(str(option.field.metadata.get("help", "")).split())
        head = f"--{option.name} {describe_type(option.hint)}"
        lines += _entry(head, " ".join(filter(None, [text, _shown_default(option.default)])))
    lines += ["", "The command line overrides the file. --flag is --flag true, --no_flag is --flag false. A file may"]
    lines += ["inherit from another one with base: other.yaml. Lists are several words, mappings {key: value}."]
    hidden = sum(option.inherited for option in options.values())
    if hidden and not everything:
        lines += [f"{hidden} options of Hugging Face TrainingArguments are accepted too: --help_all prints them."]
    if program.examples:
        lines += ["", "examples:", *(f"  {example}" for example in program.examples)]
    return "\n".join(lines)


def _shown(path: Path) -> str:
    """A path relative to the working folder where that is shorter."""
    return min(os.path.relpath(path), str(path), key=len)


def _shown_default(default: Any) -> str:
    """In the form that a YAML file would have; nothing for none, which the help text explains."""
    if default is dataclasses.MISSING:
        return "(required)"
    if default is None:
        return ""
    plain = to_plain(default, strict=False)
    return f"(default: {str(plain).lower() if isinstance(plain, bool) else plain})"


def _entry(head: str, text: str) -> list[str]:
    body = textwrap.wrap(text, width=119, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return [f"  {head}", *body]
