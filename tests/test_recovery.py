"""SIGKILL at any moment: what DVC leaves half written is put right, and the next run ends where an
uninterrupted one does. And the Makefile's targets that have to work for whoever runs them."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest
import yaml

TOOL = Path(__file__).resolve().parent.parent / "tools" / "whole_lock.py"
# Stages that say when they run, with an output in DVC's cache and one beside it; enough of them for a lock
# that takes time to write.
PARTS = 5
GRAPH = {
    "stages": {
        "part": {
            "foreach": list(range(PARTS)),
            "do": {
                "cmd": "echo ${item} | tee part-${item}.txt > beside-${item}.txt",
                "deps": ["seed.txt"],
                "outs": ["part-${item}.txt", {"beside-${item}.txt": {"cache": False, "persist": True}}],
            },
        },
        "all": {
            "cmd": "cat part-*.txt > all.txt",
            "deps": [f"part-{i}.txt" for i in range(PARTS)],
            "outs": ["all.txt"],
        },
    }
}


@pytest.fixture
def graph(tmp_path, monkeypatch):
    """A function that makes a repository with the graph in it."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "dvc.yaml").write_text(yaml.safe_dump(GRAPH))
        (folder / "seed.txt").write_text("seed")
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        subprocess.run(["dvc", "init", "-q"], cwd=folder, check=True)
        subprocess.run(["dvc", "config", "core.analytics", "false"], cwd=folder, check=True)
        return folder

    return make


def tool(folder, *command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *command], cwd=folder, capture_output=True, text=True)


def start(folder):
    return subprocess.Popen(
        [sys.executable, TOOL, "dvc", "repro", "-q"],
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill(process) -> None:
    """As a power cut: all its processes at once."""
    with contextlib.suppress(ProcessLookupError):  # it was done before
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outputs(folder) -> dict:
    files = {path.name: path.read_text() for path in folder.glob("*.txt")}
    return files | {"dvc.lock": yaml.safe_load((folder / "dvc.lock").read_text())["stages"]}


def cut(path, chance) -> None:
    """Cut within a line: between two lines, what is left may read well."""
    text = path.read_bytes()
    path.write_bytes(text[: chance.randrange(len(text) // 2)].rstrip(b"\n"))


def test_killed_at_random_moments_the_graph_ends_as_if_never_killed(graph):
    quiet, folder, chance = graph("quiet"), graph("killed"), random.Random(11)
    began = time.monotonic()
    assert tool(quiet, "dvc", "repro", "-q").returncode == 0
    whole = time.monotonic() - began
    assert tool(folder, "dvc", "repro", "-q", "part@0").returncode == 0
    for kills in range(8):
        (folder / "seed.txt").write_text(f"seed {kills}")  # so that each time all stages have to run
        process, lock, before = start(folder), folder / "dvc.lock", 0
        until = time.monotonic() + chance.uniform(0.4, 0.9) * whole
        while time.monotonic() < until and process.poll() is None:
            size = lock.stat().st_size if lock.exists() else 0
            if kills % 4 == 3 and size < before:  # DVC has just emptied it, to write it
                break
            before = size
            time.sleep(0.001)
        kill(process)
        if kills == 5:
            tool(folder)  # so that there is something to cut
            cut(lock, chance)
            assert "put back" in tool(folder).stdout
        if kills == 6:
            (folder / ".dvc" / "tmp" / "rwlock").write_text('{"write": {"/a')
    (folder / "seed.txt").write_text("seed")
    last = tool(folder, "dvc", "repro", "-q")
    assert last.returncode == 0, last.stdout + last.stderr
    assert outputs(folder) == outputs(quiet)
    assert len(outputs(folder)["all.txt"].split()) == PARTS


def ran(folder) -> Path:
    """A repository after a run of two stages, quicker than the whole graph."""
    assert tool(folder, "dvc", "repro", "-q", "part@0", "part@1").returncode == 0
    return folder


def test_a_cut_lock_is_replaced_by_the_last_whole_one_and_it_is_said(graph):
    folder = ran(graph("cut"))
    lock = folder / "dvc.lock"
    whole = lock.read_bytes()
    for length in (
        0,
        1,
        30,
        len(whole) // 2,
        len(whole) - 1,
        whole.index(b"  part@1"),
    ):  # the last reads well, and lacks a stage
        lock.write_bytes(whole[:length])
        said = tool(folder).stdout
        assert lock.read_bytes() == whole and "half written" in said and said.count("\n") == 1, length
    assert "didn't change" in tool(folder, "dvc", "repro", "part@0", "part@1").stdout
    assert tool(folder).stdout == ""  # a whole one is left alone, without a word


def lock_of(stages: int) -> str:
    """A dvc.lock as DVC writes it."""
    part = (
        "  part@{0}:\n    cmd: echo {0}\n    outs:\n    - path: part-{0}.txt\n      hash: md5\n      md5: "
        "0123\n"
        "      size: 2\n"
    )
    return "schema: '2.0'\nstages:\n" + "".join(part.format(number) for number in range(stages))


@pytest.fixture
def committed(tmp_path):
    """A folder with a lock of two stages, which git has and of which there is a copy."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.lock").write_text(lock_of(2))
    for command in ("init -q", "add dvc.lock", "-c user.name=t -c user.email=t@example.org commit -qm lock"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    assert tool(tmp_path).stdout == "" and (
        tmp_path / ".dvc" / "tmp" / "dvc.lock.whole"
    ).read_text() == lock_of(2)
    return tmp_path


def test_without_the_copy_gits_lock_is_taken_and_without_both_none(committed):
    lock, copy = committed / "dvc.lock", committed / ".dvc" / "tmp" / "dvc.lock.whole"
    copy.unlink()
    lock.write_text(lock_of(2)[:-9])
    assert "git has" in tool(committed).stdout and lock.read_text() == lock_of(2)
    subprocess.run(["git", "update-ref", "-d", "HEAD"], cwd=committed, check=True)
    copy.write_text(lock_of(2)[:-9])  # a copy that is cut itself is no copy
    lock.write_text(lock_of(2)[:-9])
    assert "removed" in tool(committed).stdout and not lock.exists()


def test_an_older_lock_of_git_is_no_cut_one_and_a_removed_lock_stays_removed(committed):
    lock, copy = committed / "dvc.lock", committed / ".dvc" / "tmp" / "dvc.lock.whole"
    lock.write_text(lock_of(4))
    assert tool(committed).stdout == "" and copy.read_text() == lock_of(4)
    lock.write_text(lock_of(3))  # the end of it is missing
    assert "put back" in tool(committed).stdout and lock.read_text() == lock_of(4)
    lock.write_text(lock_of(2))  # as `git checkout dvc.lock` does
    assert tool(committed).stdout == "" and lock.read_text() == lock_of(2)
    lock.unlink()
    assert tool(committed).stdout == "" and not lock.exists() and not copy.exists()


def test_rwlock_is_removed_where_dvc_would_stumble_over_it(tmp_path):
    rwlock = tmp_path / ".dvc" / "tmp" / "rwlock"
    rwlock.parent.mkdir(parents=True)
    ours = {"pid": os.getpid(), "cmd": "dvc repro"}  # a living process, which is not DVC
    for text in (
        "",
        '{"write": {"/a": {"pid',
        "[]",
        json.dumps({"write": {"/a": ours}}),
        json.dumps({"read": {"/a": [ours]}}),
    ):
        rwlock.write_text(text)
        assert "rwlock" in tool(tmp_path).stdout and not rwlock.exists(), text
    rwlock.write_text("{}")
    assert tool(tmp_path).stdout == "" and rwlock.exists()
    living = subprocess.Popen([sys.executable, "-c", "input()", "dvc", "repro"], stdin=subprocess.PIPE)
    try:
        rwlock.write_text(json.dumps({"write": {"/a": {"pid": living.pid, "cmd": "dvc repro"}}}))
        assert tool(tmp_path).stdout == "" and rwlock.exists()
    finally:
        living.kill()
        living.wait()


def test_the_commands_exit_code_and_sigterm_are_passed_on(tmp_path):
    (tmp_path / ".dvc").mkdir()
    assert tool(tmp_path, sys.executable, "-c", "raise SystemExit(3)").returncode == 3
    process = subprocess.Popen(
        [sys.executable, TOOL, sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM
    # DVC leaves its stage running: a second `make reproduce` would start it once more
    stage = "import sys, time; print(flush=True); time.sleep(60)"
    dvc = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stage!r}])"
    process = subprocess.Popen([sys.executable, TOOL, sys.executable, "-c", dvc], cwd=tmp_path, stdout=PIPE)
    process.stdout.readline()
    left = psutil.Process(process.pid).children(recursive=True)
    assert len(left) == 2
    process.terminate()
    assert process.wait(10) == 128 + signal.SIGTERM and not psutil.wait_procs(left, timeout=10)[1]
    assert subprocess.run([sys.executable, TOOL], cwd=tmp_path.parent, capture_output=True).returncode == 1


def targets(name: str, **environment) -> str:
    """The commands of a target, not run."""
    return subprocess.run(
        ["make", "-n", name],
        cwd=TOOL.parent.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_reproduce_starts_dvc_through_the_script():
    assert "python tools/whole_lock.py dvc repro\n" in targets("reproduce")


@pytest.mark.parametrize("user", [0, 1000])
def test_jupyter_is_allowed_to_run_as_root_only_as_root(tmp_path, user):
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {user}\n")
    (tmp_path / "id").chmod(0o755)
    line = next(
        line
        for line in targets("lab", PATH=f"{tmp_path}:{os.environ['PATH']}").splitlines()
        if line.startswith("jupyter lab")
    )
    assert ("--allow-root" in line) == (user == 0)
