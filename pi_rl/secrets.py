"""Access tokens stay out of what is shown or written: messages, configurations, commands, model cards."""

import os
import re
from collections.abc import Iterator, Sequence

HIDDEN = "***"
_HF_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_(?:(?:oauth|jwt)_[A-Za-z0-9._-]+|[A-Za-z0-9]{16,})")
_SECRET_OPTION = re.compile(r"--[\w-]*(?:token|api[_-]key|password|secret)", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(r"(?:TOKEN|API_KEY|PASSWORD|SECRET)$")
_SHORTEST_VALUE = 8  # of a variable: shorter text occurs by chance


def redacted(text: str) -> str:
    """Replaces access tokens.

    Args:
        text: Any text.

    Returns:
        The text with Hugging Face tokens ("hf_" and at least 16 letters and digits; the Hub's have 34) as "hf_***" and
        the values of environment variables whose names end in TOKEN, API_KEY, PASSWORD or SECRET as "***".
    """
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE and value in text:
            text = text.replace(value, "hf_" + HIDDEN if value.startswith("hf_") else HIDDEN)
    return _HF_TOKEN.sub("hf_" + HIDDEN, text)


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
