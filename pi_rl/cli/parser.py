"""What the subcommands of `pi-rl` share: options in the project's style, and errors that the user can put right."""

import argparse
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import yaml

from pi_rl.argument_values import ConfigLoader
from pi_rl.secrets import redacted

WIDTH = 110


class UserError(ValueError):
    """Something that the user can put right; the message says how, and is printed without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


@contextmanager
def user_errors() -> Iterator[None]:
    """Marks what fails in it as the user's to put right: options, files, parts that do not fit together."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, OSError) as error:
        raise UserError(str(error)) from error


class CommandParser(argparse.ArgumentParser):
    """Options of one subcommand: `--some-name` is `--some_name`, and an unknown one is refused with the nearest.

    Args:
        name: Of the subcommand.
        description: First paragraphs of the help.
        examples: Commands to show below the options.
    """

    def __init__(self, name: str, description: str, examples: Sequence[str] = ()) -> None:
        shown = "\n".join(["examples:", *(f"  {example}" for example in examples)]) if examples else None
        super().__init__(
            prog=f"pi-rl {name}",
            description=description,
            epilog=shown,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=WIDTH),
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises instead of leaving the interpreter."""
        raise UserError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` lists the options.")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options of a command line.

        Raises:
            UserError: One is unknown, missing or does not fit.
            SystemExit: With status 0 after `--help`.
        """
        values, rest = self.parse_known_args([underscored(word) for word in argv])
        if not rest:
            return values
        known = [text for action in self._actions for text in action.option_strings if text.startswith("--")]
        word = rest[0].partition("=")[0]
        if word.startswith("--"):
            near = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or known
            raise UserError(f"{word} is not an option of {self.prog}; nearest: {', '.join(near)}.")
        raise UserError(f"{word!r} belongs to no option of {self.prog}; `{self.prog} --help` lists them.")


def underscored(word: str) -> str:
    """`--some-name` as `--some_name`; other words as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def positive(text: str) -> int:
    """A whole number from 1 up, for `type=`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 up")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number from 0 up, for `type=`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 up")
    return int(text)


def parse_mapping(words: Sequence[str], option: str) -> dict[str, Any]:
    """Reads `{…}` (JSON or YAML), or any number of `key=value`, whose values are YAML.

    Args:
        words: As given on the command line.
        option: Its name, for messages.

    Raises:
        UserError: They are neither.
    """
    text = " ".join(words)
    if text.lstrip().startswith("{"):
        return _checked_mapping(_yaml(text, option), option)
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} does not fit {option}: write key=value, or {{key: value}} in quotes.")
        if key in found:
            raise UserError(f"{option} gives {key} twice.")
        found[key.strip().replace("-", "_")] = _yaml(value, option)
    return found


def _yaml(text: str, option: str) -> Any:
    try:
        return yaml.load(text, Loader=ConfigLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{option} {text!r} is not valid JSON or YAML: {' '.join(str(error).split())}") from error


def _checked_mapping(value: Any, option: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{option} must map names to values, such as {{image_size: 64}}, got {value!r}.")
    return value
