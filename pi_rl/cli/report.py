"""`pi-rl report`: a run, or several, as one HTML page."""

import json
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from pi_rl.cli.parser import CommandParser, user_errors

_DESCRIPTION = """\
Writes one HTML page of a run that has ended, is going on or was killed: success before and after with intervals,
curves, tasks, films, settings, times. It needs no network and no other file but the films, which it links (or holds:
--embed). Several folders are compared. Recipes write report.html themselves and keep it up to date while they run."""
_EXAMPLES = (
    "pi-rl report outputs/quickstart --open",
    "pi-rl report outputs/quickstart --embed --output quickstart.html",
    "pi-rl report outputs/seed0 outputs/seed1 outputs/seed2 --output seeds.html",
)


def _parser() -> CommandParser:
    parser = CommandParser("report", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="output folder of a run")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="page to write (default: DIR/report.html; comparison.html here, of several)",
    )
    parser.add_argument("--embed", action="store_true", help="put the films into the page, up to 40 MB")
    parser.add_argument("--open", action="store_true", help="show it in the browser")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def run(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: Its options.

    Returns:
        The exit code, 0.

    Raises:
        UserError: A folder holds no run, the page cannot be written, or the films are too large to be embedded.
    """
    args = _parser().parse(argv)
    from pi_rl.hub.report import summary_of_run, write_report
    from pi_rl.hub.run_record import read_run

    with user_errors():
        output = args.output
        if output is not None and output.is_dir():
            raise ValueError(f"--output {output} is a folder; give a file, such as {output / 'report.html'}.")
        if output is None and len(args.folders) > 1:
            output = Path("comparison.html")
        records = [read_run(folder) for folder in args.folders]
        page = write_report(records, output, embed=args.embed)
    summaries = [summary_of_run(record) for record in records]
    if args.json:
        print(json.dumps({"report": str(page), "bytes": page.stat().st_size, "runs": summaries}, indent=2))
    else:
        print(f"{page} ({page.stat().st_size / 1000:.0f} kB)")
        for summary in summaries:
            for note in summary["notes"]:
                if note["level"] == "warning":
                    print(f"warning: {summary['folder']}: {note['text']}", file=sys.stderr)
    if args.open and not webbrowser.open(page.resolve().as_uri()):
        print(f"no browser was found; open {page.resolve()} yourself.", file=sys.stderr)
    return 0
