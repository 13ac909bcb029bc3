"""The paper's ablations (πRL, sections 5.3 and 5.4) at the size of two CPU cores, on the quick start's task.

    python scripts/ablation.py --table fig9                # one figure
    python scripts/ablation.py --table 6 fig5 --jobs 2     # several; runs that they share are made once
    python scripts/ablation.py --table all --docs          # all of them, into docs/ablations.md

A small π0 presses a handle in MetaWorld, seen in pixels. Every setting is trained with every seed from ONE shared SFT
checkpoint (one per predicted chunk size): seeds differ in RL alone. For each figure come a plot in the paper's layout,
tables beside the paper's numbers and a verdict on each of its statements; curves.csv and runs.csv hold every number.
Results are kept in the output folder: a script that was stopped goes on when it is started again.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from ablation_plots import plot_figure  # noqa: E402
from ablation_report import (  # noqa: E402
    Records,
    collect,
    figure_markdown,
    paper_name,
    read_csv,
    replace_section,
    summary_markdown,
    write_csv,
)
from ablation_runs import Plan, make_plan, run_jobs  # noqa: E402
from ablation_settings import FIGURES, FULL, ROOT, SETTINGS, SMOKE  # noqa: E402

DOCUMENT = ROOT / "docs" / "ablations.md"
DOCUMENT_DATA = ROOT / "docs" / "ablations"
SECONDS_PER_RUN = 95


def figure_names(given: Sequence[str]) -> list[str]:
    """Names in ``FIGURES`` from the command line's: ``6``, ``table6``, ``fig5``, ``all``.

    Raises:
        ValueError: If one is unknown.
    """
    if "all" in given:
        return list(FIGURES)
    names = ["table6" if name == "6" else name for name in given]
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise ValueError(f"--table {unknown[0]} is unknown; choose 6, {', '.join(list(FIGURES)[1:])} or all.")
    return list(dict.fromkeys(names))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", default=["all"], metavar="NAME", help="6, fig5 … fig12, or all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="seeds of RL; 0 1 2")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"), help="folder of runs and results")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, help=f"runs at a time, one core each; here {cores}")
    parser.add_argument("--docs", action="store_true", help="write docs/ablations.md and docs/ablations/ as well")
    parser.add_argument("--render", action="store_true", help="no runs: plots and tables from what is there")
    parser.add_argument("--plan", action="store_true", help="print the runs that are missing, and stop")
    parser.add_argument("--smoke", action="store_true", help="everything at the smallest size: does it run?")
    arguments = parser.parse_args(argv)
    try:
        arguments.figures = figure_names(arguments.table)
    except ValueError as error:
        parser.error(str(error))
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs} is not allowed: it must be at least 1.")
    if any(seed < 0 for seed in arguments.seeds) or len(set(arguments.seeds)) < len(arguments.seeds):
        parser.error(f"--seeds {arguments.seeds} must be different numbers, 0 or more.")
    if arguments.smoke and arguments.docs:
        parser.error("--smoke gives no results; leave --docs out.")
    return arguments


def print_plan(plan: Plan, output: Path, jobs: int) -> None:
    """What is missing and how long it may take."""
    for title, stage in plan.stages():
        missing = [job.name for job in stage if job.result(output) is None]
        print(f"{title}: {len(missing)} of {len(stage)} missing {' '.join(missing)}".rstrip())
    runs = sum(job.result(output) is None for job in plan.runs.values())
    minutes = runs * SECONDS_PER_RUN / jobs / 60
    print(f"about {minutes:.0f} min for the runs, if one takes {SECONDS_PER_RUN} s on a core of its own")


def do_runs(plan: Plan, output: Path, jobs: int) -> bool:
    """All stages; True when nothing failed."""
    started = time.perf_counter()
    for title, stage in plan.stages():
        missing = sum(job.result(output) is None for job in stage)
        print(f"{title}: {missing} to do, {len(stage) - missing} there", flush=True)
        failed = run_jobs(stage, output, parallel=jobs, report=lambda line: print(line, flush=True))
        if failed and title != plan.stages()[-1][0]:
            print("error: without this nothing else can run; see the log above, then start again.", file=sys.stderr)
            return False
        if failed:
            print(f"{len(failed)} failed; start again to repeat them alone.", file=sys.stderr)
            return False
    print(f"All runs are there, after {(time.perf_counter() - started) / 60:.1f} min.")
    return True


def render(names: Sequence[str], records: Records, folder: Path) -> dict[str, str]:
    """Plots and tables of some figures; returns the markdown of each."""
    sections = {}
    for name in names:
        if not any(records.seeds(setting) for setting in FIGURES[name].settings):
            print(f"{name}: no finished run yet")
            continue
        image = plot_figure(name, records, folder / f"{name}.png") if FIGURES[name].panels else None
        sections[name] = figure_markdown(name, records, image and image.name)
        heading = f"## {paper_name(name)}: {FIGURES[name].title}"
        (folder / f"{name}.md").write_text(f"{heading}\n\n{sections[name]}\n", encoding="utf-8")
        print(f"\n{heading}\n\n{sections[name]}")
    return sections


def write_document(names: Sequence[str], records: Records) -> None:
    """Plots, CSV files and the sections of ``docs/ablations.md``; its prose stays as it is."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in names:
        image = None
        if FIGURES[name].panels:
            image = f"{DOCUMENT_DATA.name}/{plot_figure(name, records, DOCUMENT_DATA / f'{name}.png').name}"
        text = replace_section(text, name, figure_markdown(name, records, image))
    text = replace_section(text, "summary", summary_markdown(FIGURES, records))
    DOCUMENT.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code."""
    arguments = parse_arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    size = SMOKE if arguments.smoke else FULL
    needed = [setting for name in arguments.figures for setting in FIGURES[name].settings]
    plan = make_plan(needed, arguments.seeds, size)
    if arguments.plan:
        print_plan(plan, arguments.output, arguments.jobs)
        return 0
    complete = True
    if not arguments.render:
        try:
            complete = do_runs(plan, arguments.output, arguments.jobs)
        except KeyboardInterrupt:
            print("\nStopped. The same command goes on with the runs that are missing.", file=sys.stderr)
            return 130
    records = collect(make_plan(SETTINGS, arguments.seeds, size), arguments.output)
    if not records.runs and arguments.render and (DOCUMENT_DATA / "runs.csv").is_file():
        print(f"{arguments.output} holds no run; reading {DOCUMENT_DATA}.")
        records = read_csv(DOCUMENT_DATA)
    if not records.runs:
        print("error: there is no finished run to show.", file=sys.stderr)
        return 1
    write_csv(records, arguments.output)
    render(arguments.figures, records, arguments.output)
    if arguments.docs:
        write_csv(records, DOCUMENT_DATA)
        write_document(arguments.figures, records)
    print(f"\nPlots, tables and CSV files: {arguments.output}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
