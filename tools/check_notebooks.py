"""Fails when `mefem/` is not what `nbs/` exports, a notebook is not clean, or a cell lacks its output.

Works on a copy; changes nothing, and runs no cell: tools/run_notebooks.py does, and compares outputs."""

import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def differences(ours: Path, theirs: Path) -> list[str]:
    """Files that differ or are on one side only, relative, caches aside."""
    files = {
        p.relative_to(base)
        for base in (ours, theirs)
        for p in base.rglob("*")
        if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)
    }
    return sorted(
        str(f)
        for f in files
        if not (
            (ours / f).is_file()
            and (theirs / f).is_file()
            and filecmp.cmp(ours / f, theirs / f, shallow=False)
        )
    )


SHOWING = {"display", "print", "Image", "Markdown", "plt.show"}


def shows(source: str) -> bool:
    """Whether a cell certainly shows a result: it ends with an expression, or a call of one of `SHOWING`.

    Any other call may return None, which only a run can find out."""
    if re.search(r"^#\|\s*(eval:\s*false|export)", source, re.MULTILINE) or source.rstrip().endswith(";"):
        return False
    try:
        body = ast.parse(source).body
    except SyntaxError:  # magics
        return False
    if not body or not isinstance(body[-1], ast.Expr):
        return False
    value = body[-1].value
    if isinstance(value, ast.Call):
        return ast.unparse(value.func) in SHOWING
    return not (isinstance(value, ast.Constant) and value.value is None)


def without_output(notebook: Path) -> list[str]:
    """Ids of the code cells that show a result and have none stored."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code" and not cell["outputs"]]
    return [cell["id"] for cell in code if shows("".join(cell["source"]))]


def main() -> int:
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        for name in ("nbs", "mefem"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "params.yaml"):
            shutil.copy(ROOT / name, copy / name)
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run([str(Path(sys.executable).parent / command)], cwd=copy, check=True)
        for folder, complaint in (
            ("mefem", "is not what the notebooks export: run nbdev_export (or nbdev_update)"),
            ("nbs", "is not clean: run nbdev_clean"),
        ):
            for name in differences(ROOT / folder, copy / folder):
                print(f"{folder}/{name} {complaint}", file=sys.stderr)
                bad += 1
    for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in notebook.parts and notebook.stat().st_size > 1_000_000:
            size = f"{notebook.stat().st_size:,} bytes; outputs must stay small (1 MB)"
            print(f"{notebook.relative_to(ROOT)}: {size}", file=sys.stderr)
            bad += 1
        # Stages and benchmarks are not run by the tests: their outputs are the executed copies in data/.
        if ".ipynb_checkpoints" not in notebook.parts and not (notebook.parent / ".notest").exists():
            for cell in without_output(notebook):
                print(
                    f"{notebook.relative_to(ROOT)}: cell {cell} shows a result but has no output",
                    file=sys.stderr,
                )
                bad += 1
    print("notebooks and package agree" if not bad else f"{bad} places to mend")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
