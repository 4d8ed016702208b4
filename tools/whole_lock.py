"""Runs DVC so that a power cut or SIGKILL while DVC writes one of its own files does not stop the next run.

    python tools/whole_lock.py              put right what an interrupted DVC left, and say so
    python tools/whole_lock.py dvc repro    the same, then the command, keeping copies of dvc.lock meanwhile

DVC 3 writes two files in place, so both can be left cut: `dvc.lock`, after which every command fails with
"validation failed", and `.dvc/tmp/rwlock`, with "JSON structure is corrupted". The last whole dvc.lock is put
back: the copy in `.dvc/tmp`, else git's, else none; DVC then runs again only the stages that the older file
does not know. A cut rwlock is removed, as is one that names no living DVC. Nothing else needs care: cache and
run cache are written beside and renamed, databases are SQLite's, and a process's file locks end with it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import yaml

LOCK, COPY, GUARD = Path("dvc.lock"), Path(".dvc/tmp/dvc.lock.whole"), Path(".dvc/tmp/rwlock.lock")
RWLOCK = GUARD.with_suffix("")
EVERY = 0.5  # seconds between looks at dvc.lock


def stages_of(text: str) -> dict | None:
    """The stages of a dvc.lock; None where the text is not a whole one."""
    if not text.endswith("\n"):
        return None
    try:
        found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return None
    stages = found.get("stages") if isinstance(found, dict) and found.get("schema") == "2.0" else None
    whole = isinstance(stages, dict) and all(
        isinstance(s, dict) and "cmd" in s and _files(s) for s in stages.values()
    )
    return stages if whole else None


def _files(stage: dict) -> bool:
    """Whether every dependency and output has a path and a hash."""
    listed = [stage.get(kind, []) for kind in ("deps", "outs")]
    return all(
        isinstance(files, list)
        and all(isinstance(f, dict) and {"path", f.get("hash", "path")} <= set(f) for f in files)
        for files in listed
    )


def cut_short(text: str) -> bool:
    """Whether dvc.lock was cut. A cut between two lines may still read well: then stages at the end are
    missing that the copy has, and git has no such file."""
    stages = stages_of(text)
    if stages is None:
        return True
    known = list(stages_of(_read(COPY)) or ())
    return len(stages) < len(known) and list(stages) == known[: len(stages)] and text != _committed()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _committed() -> str:
    with contextlib.suppress(OSError):
        shown = subprocess.run(
            ["git", "show", f"HEAD:./{LOCK}"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        return shown.stdout if shown.returncode == 0 else ""
    return ""


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(beside, path)


def mend_lock() -> None:
    """Put the last whole dvc.lock in the place of a cut one.

    Who removed it wants all anew: then the copy goes too."""
    if not LOCK.exists():
        COPY.unlink(missing_ok=True)
        return
    if not cut_short(_read(LOCK)):
        return
    for text, whence in ((_read(COPY), f"the copy in {COPY}"), (_committed(), "the one that git has")):
        if stages_of(text) is not None:
            _write(LOCK, text)
            print(f"{LOCK} was left half written by an interrupted run: put back {whence}", flush=True)
            return
    LOCK.unlink()
    print(
        f"{LOCK} was left half written by an interrupted run and there is no whole one: "
        "removed, all stages run again",
        flush=True,
    )


def _runs_dvc(info: dict) -> bool:
    """Whether the process of this number is DVC: numbers are given again, in containers soon.

    True where one cannot see."""
    return not Path("/proc/self").exists() or "dvc" in _read(Path(f"/proc/{info['pid']}/cmdline"))


def _what_is_wrong(text: str) -> str:
    """Why DVC would stumble over this rwlock; empty where it would not."""
    try:
        held = json.loads(text)
        infos = [
            *held.get("write", {}).values(),
            *(info for infos in held.get("read", {}).values() for info in infos),
        ]
        return "names processes that are gone" if infos and not any(map(_runs_dvc, infos)) else ""
    except (ValueError, AttributeError, KeyError, TypeError):
        return "was left half written"


def mend_rwlock() -> None:
    """Remove a cut or outdated rwlock. Where somebody holds its guard, a DVC is at work on it: left alone."""
    import fcntl

    if not RWLOCK.exists():
        return
    with open(GUARD, "a") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        if wrong := _what_is_wrong(_read(RWLOCK)):
            RWLOCK.unlink()
            print(f"{RWLOCK} {wrong}, after an interrupted run: removed", flush=True)


def keep() -> None:
    """Copy dvc.lock while it is whole."""
    text = _read(LOCK)
    if text != _read(COPY) and not cut_short(text):
        _write(COPY, text)


def _watch(ended: threading.Event) -> None:
    """Keep dvc.lock's states. One that changed since the last look may be in the middle of being written."""
    before = None
    while not ended.wait(EVERY):
        with contextlib.suppress(OSError):
            now = LOCK.stat().st_mtime_ns
            if now == before:
                keep()
            before = now


def run(command: list[str]) -> int:
    """Run a command, keep copies of dvc.lock beside it, and pass on SIGTERM to it and to all that it has
    started: DVC would leave its stage running. A terminal sends Ctrl-C to all of them."""
    child = subprocess.Popen(command)

    def end(*_) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(child.pid).children(recursive=True), child]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.terminate()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(ended,))
    watcher.start()
    code = child.wait()
    ended.set()
    watcher.join()
    keep()
    return code if code >= 0 else 128 - code


def main() -> int:
    if not Path(".dvc").is_dir():
        print("no .dvc here: run this in the folder of dvc.yaml", file=sys.stderr)
        return 1
    mend_lock()
    mend_rwlock()
    keep()
    return run(sys.argv[1:]) if sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
