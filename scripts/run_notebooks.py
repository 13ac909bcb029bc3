"""Runs the notebooks in fresh kernels of this interpreter, and saves them with what they print and draw.

    python scripts/run_notebooks.py                        # all of notebooks/, in place
    python scripts/run_notebooks.py custom_env --output_dir outputs/notebooks

A notebook whose code raises, or that may not lie in the repository, is not saved: exit code 1, with the reason.
"""

import argparse
import sys
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets import default

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
LIMIT = 300_000
"""Bytes that a saved notebook may have: it lies in the repository."""


class OwnKernel(AsyncKernelManager):
    """Starts a kernel of this interpreter, whichever kernels are installed."""

    @default("kernel_spec_manager")
    def _without_installed_kernels(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def execute(notebook: nbformat.NotebookNode, timeout_s: int | None = None) -> nbformat.NotebookNode:
    """Runs all cells in order.

    Args:
        notebook: Cells; their outputs are replaced.
        timeout_s: Seconds a cell may take; None for any time.

    Returns:
        The same notebook. What libraries write to standard error is left out: warnings of one machine.

    Raises:
        CellExecutionError: If a cell raises.
    """
    NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name=NATIVE_KERNEL_NAME,
        kernel_manager_class=OwnKernel,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec",) if key in notebook.metadata}
    return notebook


def check(text: str, name: str) -> None:
    """Refuses what must not be in the repository.

    Raises:
        ValueError: If the notebook is too large, or shows a path of this machine.
    """
    if len(text.encode()) > LIMIT:
        raise ValueError(f"{name} has {len(text.encode()):,} bytes with its outputs; at most {LIMIT:,} are allowed.")
    for path in {str(ROOT), str(Path.home()), "/tmp/"} - {"/"}:
        if path in text:
            raise ValueError(f"{name} shows the path {path} of this machine; do not print it.")


def main(argv: list[str] | None = None) -> int:
    """Runs and saves the notebooks that the command line names."""
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="where to save; default: in place")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.names) - set(known)):
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or known:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        try:
            text = nbformat.writes(execute(notebook)) + "\n"
            check(text, name)
        except (CellExecutionError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        (arguments.output_dir / f"{name}.ipynb").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.encode()) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
