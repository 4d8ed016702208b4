"""Gives an experiment that DVC runs in a folder of its own the data of the checkout that queued it.

`dvc queue start` and `dvc exp run --temp` run in .dvc/tmp/exps, in a copy of what git has: without `data/`, which
is too large for DVC's cache. The graph's first stage calls this. What is taken over is what the checkout made, so
DVC and the keys of mefem.made_from decide as they do there what has to be made again. In the checkout itself, and
where the folder has the data already, nothing happens.
"""

import os
import shutil
from pathlib import Path

# Written whole under another name and renamed, never changed in place: a second name for the same file is enough.
SHARED = {"raw", "faces", "features", "models", "weights"}
# The first stage makes this one.
LEFT_OUT = {"code"}


def checkout_of(folder: Path) -> Path | None:
    """The checkout in whose .dvc/tmp/exps `folder` is, or None."""
    for parent in folder.parents:
        if parent.name == "exps" and parent.parts[-3:-1] == (".dvc", "tmp"):
            return parent.parents[2]
    return None


def _link(source: str, target: str) -> str:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def take_over(checkout: Path, folder: Path) -> list[str]:
    """Fill `folder`/data from `checkout`/data; returns the names of what was taken over."""
    taken = []
    for source in sorted((checkout / "data").iterdir()):
        target = folder / "data" / source.name
        if source.name in LEFT_OUT or (source.is_dir() and any(target.glob("[!.]*"))) or target.is_file():
            continue
        if source.is_dir():
            copy = _link if source.name in SHARED else shutil.copy2
            shutil.copytree(source.resolve(), target, copy_function=copy, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)
        taken.append(source.name)
    return taken


if __name__ == "__main__":
    here = Path.cwd().resolve()
    if checkout := checkout_of(here):
        print(
            f"data taken over from {checkout}: {', '.join(take_over(checkout, here)) or 'nothing, all is here'}"
        )
