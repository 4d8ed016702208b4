"""Fails when `mefem/` is not what `nbs/` exports, or when a notebook is not clean. Works on a copy; changes nothing."""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def differences(ours: Path, theirs: Path) -> list[str]:
    """Files that differ or stand on one side only, relative, caches aside."""
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
            print(
                f"{notebook.relative_to(ROOT)}: {notebook.stat().st_size:,} bytes; outputs must stay small (1 MB)",
                file=sys.stderr,
            )
            bad += 1
    print("notebooks and package agree" if not bad else f"{bad} files to mend")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
