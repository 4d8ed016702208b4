"""Runs every notebook once, and fails where it raises or shows something else than what it has stored.

    python tools/run_notebooks.py [--workers N] [NOTEBOOK ...]

It replaces nbdev_test: the same notebooks and the same skipped cells (`#| eval: false`, the test flags of
settings.ini, folders with a file `.notest`), each in a process of its own. Results are compared without
numbers, which another processor rounds differently and a clock changes. Words, file names, columns and kinds
of pictures have to be the same, so that no output of older code stays."""

import argparse
import html
import os
import re
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context, set_start_method
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


def plain(text: str) -> str:
    """Text without what differs between runs: numbers, hashes, addresses, temporary folders, line breaks.

    Nor with the warning that pictures came late, which another program on the machine brings about."""
    text = re.sub(r"^.*time is spent waiting for pictures.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"/tmp/[\w.]+", "/tmp", text)
    text = re.sub(r"0x[0-9a-f]+", "0", text)
    text = re.sub(r"(?<![A-Za-z0-9])(?=[a-f]*\d)[0-9a-f]{8,}\b", "0", text)  # hashes of code and data
    text = text.replace("PosixPath(", "Path(")
    text = re.sub(NUMBER, "0", text)
    text = re.sub(r"[-:=|_]{3,}", "-", text)  # rules are as long as their columns are wide
    return " ".join(text.split())


def shown(outputs: list[dict]) -> list[str]:
    """What a cell shows: its printed text in one piece, then of each display the kinds and the text."""
    printed = plain("".join("".join(o["text"]) for o in outputs if o.get("name") == "stdout"))
    parts = [printed] if printed else []
    for output in outputs:
        data = output.get("data", {})
        pictures = [kind for kind in sorted(data) if kind.startswith("image/")]
        if pictures:
            parts += pictures
        elif "text/html" in data:
            body = re.sub(r"<style.*?</style>|<[^>]+>", " ", "".join(data["text/html"]), flags=re.DOTALL)
            parts.append(plain(html.unescape(body)))
        elif data:
            kind = "text/markdown" if "text/markdown" in data else "text/plain"
            parts.append(plain("".join(data.get(kind, ""))))
    return parts


def differences(stored: dict, ran: dict) -> list[str]:
    """Complaints about cells (id -> outputs) whose stored outputs are not what the run shows."""
    complaints = []
    for cell, outputs in ran.items():
        before, after = shown(stored[cell]), shown(outputs)
        if before == after:
            continue
        if not before:
            complaints.append(f"cell {cell}: shows a result that is not stored: {after[0][:80]!r}")
        elif not after:
            complaints.append(f"cell {cell}: has an output, but shows nothing: {before[0][:80]!r}")
        else:
            old, new = next(p for p in zip(before + [""], after + [""], strict=False) if p[0] != p[1])
            at = len(os.path.commonprefix([old, new]))
            start = max(0, at - 20)
            complaints.append(
                f"cell {cell}: stored {old[start : at + 60]!r}, but shows {new[start : at + 60]!r}"
            )
    return complaints


def run(path: Path) -> tuple[list[str], float]:
    """Complaints about one notebook, and the seconds that it took."""
    from execnb.shell import CaptureShell
    from fastcore.basics import str2bool
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    sys.path.insert(0, str(ROOT))
    os.environ["IN_TEST"] = "1"
    os.chdir(path.parent)
    notebook = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if str2bool(getattr(notebook, "frontmatter_", {}).get("skip_exec", False)):
        return [], 0.0
    flags = set(get_config().tst_flags.split())
    stored, ran = {}, {}

    def skipped(cell) -> bool:
        directives = getattr(cell, "directives_", None) or {}
        if cell.cell_type != "code" or directives.get("eval:", [""])[0].lower() == "false":
            return True
        if flags & directives.keys():
            return True
        stored[cell.id] = list(cell.outputs)
        cell.outputs = []
        return False

    set_start_method("fork", force=True)  # as in a kernel: what a cell defines is known in its processes
    started, shell = time.time(), CaptureShell(path)
    try:
        shell.run_all(
            notebook, exc_stop=True, preproc=skipped, postproc=lambda c: ran.update({c.id: c.outputs})
        )
    except BaseException:
        return [shell.prettytb(fname=path) if shell.exc else traceback.format_exc()], time.time() - started
    return differences(stored, ran), time.time() - started


def _answer(path: Path, pipe) -> None:
    """Send the result of `run`; joblib's workers, which would be waited for, end with it."""
    pipe.send(run(path))
    if "joblib.externals.loky" in sys.modules:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(kill_workers=True)


def run_apart(path: Path) -> tuple[list[str], float]:
    """`run` in a process of its own."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(path, sender))
    process.start()
    sender.close()  # this side's: the process's end is then seen as the pipe's end
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        found = [f"its process ended with exit code {process.exitcode}"], 0.0
    process.join(30)
    process.kill()
    return found


def notebooks() -> list[Path]:
    """The notebooks of nbs/ that are run, those of folders with a file `.notest` left out."""
    every = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [p for p in every if "checkpoint" not in str(p) and not (p.parent / ".notest").exists()]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    paths = [p.resolve() for p in given.notebooks] or notebooks()
    bad = 0
    with ThreadPoolExecutor(given.workers) as pool:
        for path, (complaints, seconds) in zip(paths, pool.map(run_apart, paths), strict=True):
            name = os.path.relpath(path, ROOT)
            print(f"{name}: {seconds:.0f} s", flush=True)
            for complaint in complaints:
                print(f"{name}: {complaint}", file=sys.stderr, flush=True)
            bad += bool(complaints)
    if bad:
        print(
            f"{bad} notebooks to mend. If the code is right, execute them again:\n"
            "  jupyter nbconvert --to notebook --execute --inplace NOTEBOOK && nbdev_clean",
            file=sys.stderr,
        )
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
