"""What all model cards share: metadata, licence, template, and writing one as a whole and checked."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pi_rl.__about__ import SIMULATOR_PACKAGES, simulator_of
from pi_rl.rollout.summary import EvalSummary, TaskSummary
from pi_rl.secrets import redacted

TEMPLATES = Path(__file__).parent / "templates"
CARD_NAME = "README.md"
TAGS = ("pi_rl", "flow-matching", "vision-language-action", "lerobot", "robotics")
PAPER = "https://arxiv.org/abs/2510.25889"
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
PALIGEMMA_TYPES = ("pi0", "pi05")
"""Policy types whose published weights derive from PaliGemma."""
OWN_TYPES = ("pi0_small", "pi05_small", "flow_mlp")
"""Policy types of this package, which start from random weights."""
_MARK = re.compile(r"<!-- written by pi_rl: ([0-9a-f]{16}) -->\n\Z")
_PATH = re.compile(r"(?<![\w./:~-])~?/(?:[\w.@+-]+/)+([\w.@+-]+)")


def card_metadata(
    *,
    policy_type: str,
    license: str | None,
    tags: Sequence[str],
    base_model: str | None = None,
    dataset: str | None = None,
    name: str | None = None,
    eval_results: Sequence[Any] = (),
) -> Any:
    """The metadata of a card.

    Args:
        policy_type: LeRobot's name of the policy class.
        license: Licence of the weights; None or "other" leaves it to the policy type.
        tags: Further tags.
        base_model: Hub id of the policy that this one was made from; other names are left out.
        dataset: Hub id of the demonstrations.
        name: Name of the model beside its evaluation; needed with `eval_results`.
        eval_results: `huggingface_hub.EvalResult` objects.

    Returns:
        `huggingface_hub.ModelCardData`.
    """
    from huggingface_hub import ModelCardData

    return ModelCardData(
        model_name=name if eval_results else None,
        library_name="lerobot",
        pipeline_tag="robotics",
        tags=[*TAGS, *tags],
        base_model=base_model if base_model and is_hub_id(base_model) else None,
        datasets=dataset,
        eval_results=list(eval_results) or None,
        **license_metadata(license, policy_type),
    )


def license_metadata(given: str | None, policy_type: str) -> dict[str, str]:
    """Licence fields of the metadata.

    π0 and π0.5 derive from PaliGemma, whose weights stand under the Gemma terms; this package's small policies start
    from random weights and stand under Apache-2.0.

    Args:
        given: What the user says; None or "other" leaves it to the policy type.
        policy_type: LeRobot's name of the policy class.
    """
    name = given if given not in (None, "other") else None
    if name is None and policy_type in PALIGEMMA_TYPES:
        name = "gemma"
    if name is None and policy_type in OWN_TYPES:
        name = "apache-2.0"
    if name is None:
        return {"license": "other", "license_name": "not-stated"}
    return {"license": name, "license_link": GEMMA_TERMS} if name == "gemma" else {"license": name}


def license_sentence(fields: Mapping[str, str]) -> str:
    """The licence in words, from :func:`license_metadata`."""
    if fields["license"] == "gemma":
        return f"The weights derive from PaliGemma and stand under the [Gemma terms of use]({GEMMA_TERMS})."
    if fields["license"] == "other":
        return "The licence of the weights was not stated; ask whoever published the base policy."
    return f"Weights: {fields['license']}."


def evaluation_results(
    parts: Mapping[str, TaskSummary], *, suite: str, settings: Mapping[str, Any] | None = None
) -> list[Any]:
    """Success rates for the metadata's `model-index`, one per task, group or suite.

    Args:
        parts: Name to evaluation.
        suite: Simulator, as the datasets' type.
        settings: What else the result depends on: seeds, denoising steps.

    Returns:
        `huggingface_hub.EvalResult` objects in the order of `parts`.
    """
    from huggingface_hub import EvalResult

    results = []
    for name, summary in parts.items():
        common = {
            "task_type": "robotics",
            "task_name": "Robotic manipulation",
            "dataset_type": suite,
            "dataset_name": name,
            "dataset_config": name,
        }
        interval = {"wilson_95": [round(end, 4) for end in summary.ci95]}
        args = {"episodes": summary.n_episodes, **interval, **(settings or {})}
        results.append(
            EvalResult(
                **common,
                metric_type="success_rate",
                metric_name="Success rate",
                metric_value=round(summary.success_rate, 4),
                metric_args=args,
            )
        )
        sequences = summary.sequences if isinstance(summary, EvalSummary) else None
        if sequences is not None:
            results.append(
                EvalResult(
                    **common,
                    metric_type="average_length",
                    metric_name=f"Subtasks solved in a row, of {len(sequences.in_a_row)}",
                    metric_value=round(sequences.average_length, 4),
                    metric_args={"episodes": summary.n_episodes, **(settings or {})},
                )
            )
    return results


def save_card(folder: str | Path, template: str, metadata: Any, **values: Any) -> Path:
    """Renders a card, reads it back and puts it into a folder as ``README.md``.

    Access tokens and folders of this machine do not reach it.

    Args:
        folder: Policy folder.
        template: Name of a file in ``templates``.
        metadata: From :func:`card_metadata`.
        **values: What the template shows.

    Returns:
        The card.

    Raises:
        ValueError: If the metadata does not survive reloading.
    """
    path = Path(folder) / CARD_NAME
    partial = path.with_name(f".{CARD_NAME}.partial")
    partial.write_text(render_card(TEMPLATES / template, metadata, **values), encoding="utf-8")
    try:
        check_card(partial, metadata)
    except BaseException:
        partial.unlink()
        raise
    os.replace(partial, path)
    return path


def render_card(template: Path, metadata: Any, **values: Any) -> str:
    """A card's text; arguments as for :func:`save_card`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # Markdown, not HTML: what comes from a run is escaped where it could end a cell or a fence (cell, fenced)
    environment = Environment(
        loader=FileSystemLoader([template.parent, TEMPLATES]),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template.name).render(card_data=metadata.to_yaml(), **values)
    return public(text)


def check_card(path: Path, metadata: Any) -> None:
    """Reads a card as the Hub's library does; needs no network.

    Raises:
        ValueError: What is read is not what was meant.
    """
    from huggingface_hub import ModelCard

    written = ModelCard.load(path).data.to_dict()
    meant = json.loads(public(json.dumps(metadata.to_dict(), ensure_ascii=False)))
    if written != meant:
        wrong = [key for key in {**written, **meant} if written.get(key) != meant.get(key)]
        raise ValueError(f"The card's metadata does not survive reloading ({', '.join(wrong)}); a name breaks it.")


def mark_written(card: Path) -> None:
    """Notes in a card, where readers do not see it, what was written, so that a change by somebody else shows."""
    text = _MARK.sub("", card.read_text(encoding="utf-8"))
    card.write_text(f"{text}<!-- written by pi_rl: {_digest(text)} -->\n", encoding="utf-8")


def is_unchanged(card: Path) -> bool:
    """Whether a card is as `mark_written` left it."""
    text = card.read_text(encoding="utf-8")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def public(text: str) -> str:
    """A text for others: without access tokens, and folders of this machine by their last part."""
    return _PATH.sub(lambda found: found[1], redacted(text))


def for_repository(text: str, repo_id: str) -> str:
    """A card's text for its place on the Hub: films by full address, and the repository's name in the examples.

    Args:
        text: Card that was written without `repo_id`.
        repo_id: Such as "user/name".
    """
    from huggingface_hub import hf_hub_url

    named = text.replace("path/to/this/folder", repo_id)
    return re.sub(
        r'(<video [^>]*src=")(?!https?:)([^"]+)"', lambda found: f'{found[1]}{hf_hub_url(repo_id, found[2])}"', named
    )


def fenced(text: str, language: str) -> str:
    """A code block that its content cannot end."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository on the Hub, "user/name"."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith((".", "/"))


def policy_config(folder: Path) -> dict[str, Any]:
    """The policy's ``config.json``.

    Raises:
        ValueError: It is missing or no policy's.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a saved LeRobot policy.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("type"), str):
        raise ValueError(f"{file} names no policy type; give the folder of a saved LeRobot policy.")
    return config


def version_lines(versions: Mapping[str, str], env: str) -> dict[str, str]:
    """Versions in words: "simulator" what the environment depends on, "packages" the rest."""
    simulator = SIMULATOR_PACKAGES.get(simulator_of(env), ())
    installed = {name: version for name, version in versions.items() if version != "not installed"}
    shown = {
        "simulator": {name: version for name, version in installed.items() if name in simulator},
        "packages": {name: version for name, version in installed.items() if name not in simulator},
    }
    return {
        kind: ", ".join(f"{name} {version}" for name, version in found.items()) or "not recorded"
        for kind, found in shown.items()
    }


def copy_beside(source: str | Path | None, folder: Path) -> str:
    """Copies a picture or film next to a card, unless it is there.

    Returns:
        Its name; empty without a source.

    Raises:
        ValueError: It does not exist.
    """
    if source is None:
        return ""
    file = Path(source)
    if not file.is_file():
        raise ValueError(f"{file} does not exist; make it before the card or leave it out.")
    if file.resolve().parent != folder.resolve():
        shutil.copyfile(file, folder / file.name)
    return file.name


def start_of(model: str | None) -> tuple[str | None, str | None, str]:
    """The policy that training started from.

    Args:
        model: Hub id or local folder; None for a small one made in the run itself.

    Returns:
        Hub id for the metadata, licence that its own card states, and words for the text. A local folder is known by
        its name, and by the base policy and licence in its card.
    """
    if model is None:
        return None, None, "a small policy that first imitated scripted demonstrations"
    path = Path(model)
    if not path.is_dir():
        return (
            (model, None, f"[{model}](https://huggingface.co/{model})")
            if is_hub_id(model)
            else (None, None, path.name)
        )
    stated = _stated(path / CARD_NAME)
    base = stated.get("base_model")
    base = base if isinstance(base, str) and is_hub_id(base) else None
    license = stated.get("license")
    words = f"a policy of its maker's own, `{path.name}`"
    words += f", made from [{base}](https://huggingface.co/{base})" if base else ""
    return base, license if isinstance(license, str) else None, words


def _stated(card: Path) -> dict[str, Any]:
    """Metadata of an existing card; nothing where there is none, or none that can be read."""
    from huggingface_hub import ModelCard

    if not card.is_file():
        return {}
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}
