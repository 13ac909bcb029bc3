"""From finished runs to CSV files, and from these to tables and verdicts. Plots are in ``ablation_plots.py``."""

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ablation_runs import Plan
from ablation_settings import FIGURES, SETTINGS, TABLE5, TABLE6, Claim, Figure, PaperColumn

from pi_rl.rollout.summary import wilson_interval

CURVES, RUNS = "curves.csv", "runs.csv"
_RL_COLUMNS = {
    "train_success": "rollout/success_rate",
    "train_length": "rollout/episode_length",
    "clip_fraction": "policy/clip_fraction",
    "approx_kl": "policy/approx_kl",
    "noise_std": "policy/noise_std",
    "grad_norm": "grad_norm",
    "value_loss": "critic/loss",
    "explained_variance": "critic/explained_variance",
    "rollout_seconds": "time/rollout",
    "update_seconds": "time/update",
}
CURVE_COLUMNS = ("setting", "seed", "iteration", "env_steps", "eval_success", "eval_episodes", *_RL_COLUMNS)
RUN_COLUMNS = (
    "setting", "seed", "iterations", "env_steps", "rollout_episodes", "sft_train", "rl_train",
    "sft_eval_successes", "rl_eval_successes", "eval_episodes", "minutes",
)  # fmt: skip

# 97.5 % quantiles of Student's t by degrees of freedom
_T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_NORMAL = 1.96


# ---- CSV files ---------------------------------------------------------------------------------------------------


@dataclass
class Records:
    """Every finished run: one row each, and its curve.

    Attributes:
        runs: (setting, seed) to the row of ``runs.csv``.
        curves: (setting, seed) to the rows of ``curves.csv``, by iteration.
    """

    runs: dict[tuple[str, int], dict[str, float]]
    curves: dict[tuple[str, int], list[dict[str, float]]]

    def seeds(self, *settings: str) -> list[int]:
        """Seeds that all of the settings have."""
        found = [{seed for name, seed in self.runs if name == setting} for setting in settings]
        return sorted(set.intersection(*found)) if found else []


def collect(plan: Plan, output: Path) -> Records:
    """Rows of the plan's finished runs."""
    records = Records({}, {})
    for (name, seed), job in plan.runs.items():
        run, baseline = job.result(output), plan.baselines[name].result(output)
        if run is not None and baseline is not None:
            curve = _curve(run, baseline["final"])
            records.curves[name, seed] = curve
            records.runs[name, seed] = _summary(run, baseline["final"], curve)
    return records


def _curve(run: Mapping[str, Any], baseline: str) -> list[dict[str, float]]:
    """One row per iteration; row 0 is the SFT policy."""
    states = run["spec"]["options"]["eval_episodes"]
    first = {"iteration": 0, "env_steps": 0, "eval_episodes": states}
    rows: dict[int, dict[str, float]] = {0: first | {"eval_success": baseline[:states].count("1") / states}}
    for entry in run["history"]:
        iteration = round(entry["step"] / run["updates_per_iteration"])
        row = rows.setdefault(iteration, {"iteration": iteration})
        if "loss" in entry:
            row["env_steps"] = entry["env_steps"]
            row |= {column: entry[name] for column, name in _RL_COLUMNS.items() if name in entry}
        elif "eval_success_rate" in entry:
            row |= {"eval_success": entry["eval_success_rate"], "eval_episodes": entry["eval_n_episodes"]}
    return [rows[iteration] for iteration in sorted(rows)]


def _summary(run: Mapping[str, Any], baseline: str, curve: Sequence[Mapping[str, float]]) -> dict[str, float]:
    options = run["spec"]["options"]
    explored = [row["train_success"] for row in curve if "train_success" in row]
    return {
        "iterations": options["num_iterations"],
        "env_steps": curve[-1]["env_steps"],
        "rollout_episodes": options["num_envs"],
        "sft_train": explored[0],
        "rl_train": explored[-1],
        "sft_eval_successes": baseline.count("1"),
        "rl_eval_successes": run["final"].count("1"),
        "eval_episodes": len(run["final"]),
        "minutes": round(run["seconds"] / 60, 2),
    }


def write_csv(records: Records, folder: Path) -> None:
    """Writes ``runs.csv`` and ``curves.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    order = {name: place for place, name in enumerate(SETTINGS)}
    keys = sorted(records.runs, key=lambda key: (order[key[0]], key[1]))
    runs = [{"setting": name, "seed": seed} | records.runs[name, seed] for name, seed in keys]
    curves = [{"setting": name, "seed": seed} | row for name, seed in keys for row in records.curves[name, seed]]
    for file, columns, rows in ((RUNS, RUN_COLUMNS, runs), (CURVES, CURVE_COLUMNS, curves)):
        with (folder / file).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)


def read_csv(folder: Path) -> Records:
    """Inverse of :func:`write_csv`.

    Raises:
        FileNotFoundError: If a file is missing.
    """
    records = Records({}, {})
    for row in _rows(folder / RUNS):
        records.runs[str(row.pop("setting")), int(row.pop("seed"))] = row
    for row in _rows(folder / CURVES):
        records.curves.setdefault((str(row.pop("setting")), int(row.pop("seed"))), []).append(row)
    return records


def _rows(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return [
            {name: value if name == "setting" else float(value) for name, value in row.items() if value != ""}
            for row in csv.DictReader(stream)
        ]


def _plain(value: Any) -> Any:
    """Six significant digits; whole numbers without a point."""
    return value if isinstance(value, str | int) else f"{value:.6g}"


# ---- quantities --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """A number of a run.

    Attributes:
        title: In tables.
        of: From a run's row and curve to the number; None where the run has none.
        percent: A rate, shown in percent.
        form: Format of other numbers.
        episodes: Column with the number of episodes when all seeds have the same policy, so that their episodes can be
            pooled; None when the seeds' policies differ.
        shared: The number is one measurement for all seeds.
    """

    title: str
    of: Callable[[Mapping[str, float], Sequence[Mapping[str, float]]], float | None]
    percent: bool = False
    form: str = ".2f"
    episodes: str | None = None
    shared: bool = False


def _column(name: str, first: float = 0.0, last: float = 1.0) -> Callable[..., float | None]:
    """Mean of a column over the iterations between two shares of the run."""

    def mean(_: Mapping[str, float], curve: Sequence[Mapping[str, float]]) -> float | None:
        end = max(row["iteration"] for row in curve)
        rows = [row for row in curve if first * end < row["iteration"] <= last * end and name in row]
        values = [row[name] for row in rows if math.isfinite(row[name])]
        return fmean(values) if values else None

    return mean


def _kl_rise(run: Mapping[str, float], curve: Sequence[Mapping[str, float]]) -> float | None:
    early, late = _column("approx_kl", 0.2, 0.5)(run, curve), _column("approx_kl", 0.7)(run, curve)
    return None if early is None or late is None else late - early


QUANTITIES: dict[str, Quantity] = {
    "sft_train": Quantity("SFT, exploring", lambda run, _: run["sft_train"], True, episodes="rollout_episodes"),
    "sft_eval": Quantity(
        "SFT, deterministic",
        lambda run, _: run["sft_eval_successes"] / run["eval_episodes"],
        True,
        episodes="eval_episodes",
        shared=True,
    ),
    "rl_train": Quantity("RL, exploring", lambda run, _: run["rl_train"], True),
    "rl_eval": Quantity("RL, deterministic", lambda run, _: run["rl_eval_successes"] / run["eval_episodes"], True),
    "eval_mean": Quantity("evaluations of the run, mean", _column("eval_success"), True),
    "env_steps": Quantity("environment steps", lambda run, _: run["env_steps"], form=",.0f"),
    "clip_fraction": Quantity("clip fraction, mean", _column("clip_fraction")),
    "grad_norm": Quantity("gradient norm, mean", _column("grad_norm")),
    "noise_std": Quantity("noise std, mean", _column("noise_std")),
    "value_loss": Quantity("value loss, second half", _column("value_loss", 0.5), form=".4f"),
    "explained_variance_early": Quantity("explained variance, first half", _column("explained_variance", last=0.5)),
    "explained_variance": Quantity("explained variance, second half", _column("explained_variance", 0.5)),
    "update_seconds": Quantity("update, s per iteration", _column("update_seconds")),
    "kl_end": Quantity("KL, last third", _column("approx_kl", 0.7), form=".3f"),
    "kl_rise": Quantity("KL, last third minus second fifth to half", _kl_rise, form="+.3f"),
}


def values(records: Records, quantity: str, setting: str, seeds: Iterable[int]) -> list[float]:
    """A quantity's values by seed; seeds without one are left out."""
    found = (QUANTITIES[quantity].of(records.runs[setting, s], records.curves[setting, s]) for s in seeds)
    return [value for value in found if value is not None]


def _counts(records: Records, quantity: str, setting: str, seeds: Sequence[int]) -> tuple[int, int]:
    """Successes and episodes of a policy that all seeds share."""
    what = QUANTITIES[quantity]
    used = seeds[:1] if what.shared else seeds
    episodes = [round(records.runs[setting, seed][str(what.episodes)]) for seed in used]
    rates = values(records, quantity, setting, used)
    return sum(round(rate * n) for rate, n in zip(rates, episodes, strict=True)), sum(episodes)


# ---- differences and verdicts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim.

    Attributes:
        word: "reproduced": the interval holds nothing that the claim excludes; "not certain": it holds both, with
            "same sign" where the estimate is on the claim's side; "not reproduced": the estimate is not; "opposite":
            nor is anything in the interval; "no data".
        estimate: Difference, or ratio for the claims about time; None without data.
        interval: Its 95 % interval; None where one seed gives none.
        seeds: Number of seeds behind it.
    """

    word: str
    estimate: float | None = None
    interval: tuple[float, float] | None = None
    seeds: int = 0


REPRODUCED, LEANS, UNCERTAIN = "reproduced", "not certain, same sign", "not certain"
NOT, OPPOSITE, NO_DATA = "not reproduced", "opposite", "no data"


def judge(claim: Claim, records: Records) -> Verdict:
    """Compares two settings as a claim asks.

    The seeds' policies are compared in pairs of equal seeds: mean difference with Student's t interval. Where all
    seeds have the same policy, their episodes are pooled and proportions compared (Newcombe's interval).
    """
    settings = [name for name in (claim.more, claim.less) if name is not None]
    seeds = records.seeds(*settings)
    ratio = claim.kind in ("faster", "as fast")
    if not seeds:
        return Verdict(NO_DATA)
    if claim.less is not None and QUANTITIES[claim.quantity].episodes is not None:
        estimate, interval = newcombe(*(_counts(records, claim.quantity, name, seeds) for name in settings))
        return Verdict(_word(claim, estimate, interval), estimate, interval, len(seeds))
    columns = [values(records, claim.quantity, name, seeds) for name in settings]
    if any(len(column) < len(seeds) for column in columns):
        return Verdict(NO_DATA)
    if ratio:
        columns = [[math.log(value) for value in column] for column in columns]
    less = columns[1] if len(columns) > 1 else [0.0] * len(seeds)
    estimate, interval = t_interval([a - b for a, b in zip(columns[0], less, strict=True)])
    word = _word(claim, estimate, interval)
    if ratio:
        estimate, interval = math.exp(estimate), interval and (math.exp(interval[0]), math.exp(interval[1]))
    return Verdict(word, estimate, interval, len(seeds))


def _word(claim: Claim, estimate: float, interval: tuple[float, float] | None) -> str:
    low, high = interval or (-math.inf, math.inf)
    if claim.kind in ("similar", "as fast"):
        margin = math.log1p(claim.margin) if claim.kind == "as fast" else claim.margin
        if -margin <= low and high <= margin:
            return REPRODUCED
        return NOT if abs(estimate) > margin and (low > 0 or high < 0) else UNCERTAIN
    border = -claim.margin if claim.kind == "at least" else 0.0
    if low > border:
        return REPRODUCED
    if high < border:
        return OPPOSITE
    return LEANS if estimate > border else NOT


def t_interval(differences: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and its 95 % interval; no interval from a single value."""
    mean, n = fmean(differences), len(differences)
    if n < 2:
        return mean, None
    half = _T975.get(n - 1, _NORMAL) * stdev(differences) / math.sqrt(n)
    return mean, (mean - half, mean + half)


def newcombe(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, tuple[float, float]]:
    """Difference of two proportions with Newcombe's 95 % interval from (successes, episodes) of each.

    With Wilson's ends l and u of each proportion p: p1 − p2 − √((p1 − l1)² + (u2 − p2)²) to
    p1 − p2 + √((u1 − p1)² + (p2 − l2)²).
    """
    (p1, (l1, u1)), (p2, (l2, u2)) = ((k / n, wilson_interval(k, n)) for k, n in (first, second))
    difference = p1 - p2
    return difference, (difference - math.hypot(p1 - l1, u2 - p2), difference + math.hypot(u1 - p1, p2 - l2))


# ---- markdown ----------------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def cell(records: Records, quantity: str, setting: str) -> str:
    """Mean over seeds [smallest, largest]; a single measurement with its 95 % interval."""
    what, seeds = QUANTITIES[quantity], records.seeds(setting)
    found = values(records, quantity, setting, seeds)
    if not found:
        return "–"
    scale, form = (100.0, ".1f") if what.percent else (1.0, what.form)
    if what.shared:
        successes, episodes = _counts(records, quantity, setting, seeds)
        low, high = wilson_interval(successes, episodes)
    else:
        low, high = min(found), max(found)
    if len(found) == 1 and not what.shared:
        return format(scale * found[0], form)
    ends = ".0f" if what.percent else what.form
    return f"{scale * fmean(found):{form}} [{scale * low:{ends}}, {scale * high:{ends}}]"


def figure_markdown(name: str, records: Records, image: str | None) -> str:
    """A figure's section: picture, numbers, verdicts."""
    figure = FIGURES[name]
    parts = []
    if image is not None:
        parts.append(f"![{figure.title}]({image})")
    if name == "table6":
        parts += [_paper_column(column, records) for column in TABLE6]
    else:
        head = ["setting", "seeds", *(QUANTITIES[quantity].title for quantity in figure.shown)]
        rows = [
            [label, str(len(records.seeds(setting))), *(cell(records, q, setting) for q in figure.shown)]
            for setting, label in figure.settings.items()
        ]
        parts.append(markdown_table(head, rows))
    if name == "fig5":
        parts.append(_table5())
    parts.append(claims_table(figure, records))
    return "\n\n".join(parts)


def _paper_column(column: PaperColumn, records: Records) -> str:
    """One hyper-parameter of Table 6: our row above the paper's."""
    rows = []
    for quantity in ("sft_train", "sft_eval", "rl_train", "rl_eval"):
        title, paper = QUANTITIES[quantity].title, column.values[quantity]
        rows.append([title, *(cell(records, quantity, setting) for setting in column.settings)])
        shown = (f"{paper[s]:.1f}" if s in paper else "–" for s in column.settings)
        rows.append([f"*{title}, paper*", *(f"*{number}*" for number in shown)])
    return f"**{column.title}**\n\n" + markdown_table(["success, %", *column.settings.values()], rows)


def _table5() -> str:
    head = ["paper's Table 5, π0, success in %", "Spatial", "Object", "Goal", "Long", "mean"]
    return markdown_table(head, ([name, *(f"{v:.1f}" for v in row)] for name, row in TABLE5.items()))


def claims_table(figure: Figure, records: Records) -> str:
    """Every claim of a figure with the difference that was measured."""
    head = ["statement", "paper", "here: difference [95 %]", "verdict"]
    return markdown_table(
        head,
        ([claim.text, claim.paper, difference_text(claim, verdict := judge(claim, records)), verdict.word]
         for claim in figure.claims),
    )  # fmt: skip


def difference_text(claim: Claim, verdict: Verdict) -> str:
    """The measured difference as text; rates in percentage points."""
    if verdict.estimate is None:
        return "–"
    what = QUANTITIES[claim.quantity]
    if claim.kind in ("faster", "as fast"):
        scale, form, unit = 1.0, ".2f", " times"
    elif what.percent:
        scale, form, unit = 100.0, "+.1f", " points"
    else:
        scale, form, unit = 1.0, f"+{what.form.lstrip('+')}", ""
    if verdict.interval is None:
        return f"{scale * verdict.estimate:{form}}{unit}, one seed"
    low, high = (f"{scale * end:{form}}" for end in verdict.interval)
    return f"{scale * verdict.estimate:{form}}{unit} [{low}, {high}]"


def summary_markdown(names: Iterable[str], records: Records) -> str:
    """How many statements of each figure reproduce."""
    rows = []
    for name in names:
        words = [judge(claim, records).word for claim in FIGURES[name].claims]
        counts = (REPRODUCED,), (LEANS, UNCERTAIN), (NOT,), (OPPOSITE,), (NO_DATA,)
        rows.append([paper_name(name), FIGURES[name].title, *(str(sum(map(words.count, group))) for group in counts)])
    head = ["", "subject", REPRODUCED, UNCERTAIN, NOT, OPPOSITE, NO_DATA]
    return markdown_table(head, rows)


def paper_name(name: str) -> str:
    """ "table6" as "Table 6"."""
    kind, number = name.rstrip("0123456789"), name.lstrip("abcdefghijklmnopqrstuvwxyz")
    return f"{'Table' if kind == 'table' else 'Fig.'} {number}"


def replace_section(text: str, name: str, content: str) -> str:
    """Writes between a document's markers ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Raises:
        ValueError: If they are not there once each, in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the document needs '{begin}' and '{end}' once each, in this order.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
