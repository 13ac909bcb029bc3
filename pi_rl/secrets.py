"""Access tokens stay out of what is shown or written: messages, configurations, commands, model cards."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HIDDEN = "***"
_HF_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_(?:(?:oauth|jwt)_[A-Za-z0-9._-]+|[A-Za-z0-9]{34,})")
_SECRET_OPTION = re.compile(r"--[\w-]*(?:token|api[_-]key|password|secret)", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|API_KEY|PASSWORD|SECRET)$")
_SHORTEST_VALUE = 8  # of a variable: shorter text occurs by chance


def redacted(text: str) -> str:
    """Replaces access tokens.

    Args:
        text: Any text.

    Returns:
        The text with Hugging Face tokens ("hf_" and 34 letters and digits) as "hf_***" and the values of environment
        variables whose names end in TOKEN, API_KEY, PASSWORD or SECRET as "***".
    """
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE and value in text:
            text = text.replace(value, "hf_" + HIDDEN if value.startswith("hf_") else HIDDEN)
    return without_hub_tokens(text)


def without_hub_tokens(text: str) -> str:
    """Replaces Hugging Face tokens only: for names and folders, of which a variable's value may be a part by chance.

    Args:
        text: Any text.
    """
    return _HF_TOKEN.sub("hf_" + HIDDEN, text)


def redacted_value(value: Any, redact: Callable[[str], str] = redacted) -> Any:
    """Replaces access tokens in the texts of a plain value.

    Args:
        value: Text, number, or lists and mappings of them.
        redact: What replaces them in one text.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, list):
        return [redacted_value(entry, redact) for entry in value]
    if isinstance(value, dict):
        return {redacted_value(key, redact): redacted_value(entry, redact) for key, entry in value.items()}
    return value


def redacted_words(words: Sequence[str]) -> list[str]:
    """Replaces access tokens in a command line, and whatever is given to an option such as `--hub_token`.

    Args:
        words: The command's arguments.
    """
    return list(_redacted_words(words))


def _redacted_words(words: Sequence[str]) -> Iterator[str]:
    secret = False
    for word in words:
        option, equals, _ = word.partition("=")
        if secret and not word.startswith("--"):
            yield _hidden(word)
            secret = False
            continue
        secret = _SECRET_OPTION.fullmatch(option) is not None
        yield f"{option}={_hidden(word)}" if secret and equals else redacted(word)
        secret &= not equals


def _hidden(word: str) -> str:
    return "hf_" + HIDDEN if "hf_" in word else HIDDEN
