"""Experiments that DVC runs in folders of their own (`dvc queue start`): they start with the checkout's data."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

TOOL = Path(__file__).resolve().parent.parent / "tools" / "experiment_data.py"
GRAPH = {
    "stages": {
        "code": {
            "cmd": [
                f"{sys.executable} tools/experiment_data.py",
                "mkdir -p data/code",
                "echo a > data/code/a",
            ],
            "deps": ["tools"],
            "outs": [{"data/code": {"cache": False}}],
        },
        "photographs": {
            "cmd": "mkdir -p data/raw && echo photographs > data/raw/a",
            "deps": ["data/code/a"],
            "outs": [{"data/raw": {"cache": False, "persist": True}}],
        },
        "run": {
            "cmd": "mkdir -p data/runs figures && echo ${width} > data/runs/width && cp data/runs/width figures",
            "deps": ["data/raw"],
            "params": ["width"],
            "outs": [{"data/runs": {"cache": False, "persist": True}}, {"figures": {"cache": False}}],
        },
    }
}


def dvc(folder, *arguments) -> str:
    done = subprocess.run(["dvc", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A reproduced and committed repository with the graph above."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "a")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")
    folder = tmp_path / "checkout"
    (folder / "tools").mkdir(parents=True)
    shutil.copy(TOOL, folder / "tools")
    (folder / "dvc.yaml").write_text(yaml.safe_dump(GRAPH))
    (folder / "params.yaml").write_text("width: 3\n")
    (folder / ".gitignore").write_text("/data\n")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    dvc(folder, "init", "-q")
    dvc(folder, "config", "core.analytics", "false")
    dvc(folder, "repro", "-q")
    subprocess.run("git add -A && git commit -qm graph", shell=True, cwd=folder, check=True)
    return folder


def test_queued_experiments_run_only_the_stages_that_changed(checkout):
    for width in (5, 6):
        dvc(checkout, "exp", "run", "-q", "--queue", "-S", f"width={width}")
    dvc(checkout, "queue", "start", "-q", "--jobs", "2")
    deadline = time.monotonic() + 120
    while "Running" in (status := dvc(checkout, "queue", "status")) or "Queued" in status:
        assert time.monotonic() < deadline, status
        time.sleep(1)
    assert status.count("Success") == 2, status
    dvc(checkout, "queue", "stop", "-q")
    tasks = [line.split()[0] for line in status.splitlines() if "Success" in line]
    for log in (dvc(checkout, "queue", "logs", task) for task in tasks):
        assert "data taken over from" in log and "raw" in log
        assert "Stage 'photographs' didn't change, skipping" in log
        assert "Running stage 'run'" in log
    assert (checkout / "data/runs/width").read_text() == "3\n"  # the checkout's own results are as they were


def test_only_what_is_replaced_whole_is_shared_with_the_checkout(tmp_path):
    checkout, folder = tmp_path / "c", tmp_path / "c" / ".dvc" / "tmp" / "exps" / "tmp1"
    for name in ("raw/a.jpg", "runs/main/log.csv", "code/x.json"):
        path = checkout / "data" / name
        path.parent.mkdir(parents=True)
        path.write_text("made by the checkout")
    folder.mkdir(parents=True)
    done = subprocess.run([sys.executable, TOOL], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(": raw, runs")
    assert os.path.samefile(checkout / "data/raw/a.jpg", folder / "data/raw/a.jpg")
    assert not os.path.samefile(checkout / "data/runs/main/log.csv", folder / "data/runs/main/log.csv")
    assert not (folder / "data/code").exists()
    (folder / "data/runs/main/log.csv").write_text("made by the experiment")
    subprocess.run([sys.executable, TOOL], cwd=folder, check=True)
    assert (folder / "data/runs/main/log.csv").read_text() == "made by the experiment"


def test_the_checkout_itself_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    done = subprocess.run([sys.executable, TOOL], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "" and not list((tmp_path / "data").iterdir())
