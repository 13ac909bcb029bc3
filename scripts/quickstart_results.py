"""Puts the results of finished quick starts into the README: table, picture and film.

    python scripts/quickstart_results.py outputs/quickstart outputs/seed1 outputs/seed2 outputs/blind0 …

Every folder becomes a row, in the order given; numbers are those of the runs' results.json, nothing is selected.
"""

import argparse
import json
import subprocess
from pathlib import Path

from pi_rl.hub.plots import RunCurve, plot_before_after
from pi_rl.hub.results import RunResults, read_results, runs_table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def run_curve(folder: Path, results: RunResults) -> RunCurve:
    """One run as the picture shows it."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    name = {"flow_noise": "Flow-Noise", "flow_sde": "Flow-SDE"}.get(results.noise, results.noise)
    label = f"{'blind' if results.blind else name}, seed {results.seed}"
    return RunCurve(label=label, history=history, sft=results.sft, rl=results.rl, blind=results.blind)


def replace_table(readme: Path, table: str) -> None:
    """Writes the table between the README's markers."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def make_gif(video: Path, gif: Path) -> None:
    """The before/after film as a GIF that a README shows."""
    import imageio.v3 as iio

    from pi_rl.hub.videos import write_gif

    write_gif(iio.imread(video, plugin="pyav"), gif, fps=10, width=460)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of finished runs")
    parser.add_argument("--picture", type=Path, nargs="*", help="folders drawn in the picture; default: all")
    parser.add_argument("--film", type=Path, help="folder whose film becomes the README's GIF; default: the first")
    arguments = parser.parse_args()
    runs = {folder: read_results(folder) for folder in arguments.folders}
    table = runs_table(list(runs.values()), markdown=True)
    replace_table(ROOT / "README.md", table)
    images = ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    drawn = arguments.picture or arguments.folders
    first = next(iter(runs.values()))
    plot_before_after(
        [run_curve(folder, read_results(folder)) for folder in drawn],
        images / "quickstart.png",
        title="The quick start: success before and after reinforcement learning",
        subtitle=f"small π0, camera images, {first.config['env']}, {first.sft.n_episodes} fixed initial states",
    )
    make_gif((arguments.film or arguments.folders[0]) / "before_after.mp4", images / "before_after.gif")
    print(table)
    subprocess.run(["git", "-C", str(ROOT), "status", "--short", "README.md", "docs/images"], check=True)


if __name__ == "__main__":
    main()
