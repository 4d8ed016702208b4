"""A notebook's outputs: missing ones and those of older code are found; what a clock changes is not."""

import json
import multiprocessing
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def check(script):
    return script("tools/check_notebooks.py")


@pytest.fixture
def runner(root, script, tmp_path, monkeypatch):
    """The tool, whose working folder, variables and way of starting processes end with the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.syspath_prepend(root)
    method = multiprocessing.get_start_method(allow_none=True)
    yield script("tools/run_notebooks.py")
    multiprocessing.set_start_method(method, force=True)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("x = 3\nx", True),
        ("x, y", True),
        ("plt.show()", True),
        ("print(x)", True),
        ("f'{x}'", True),
        ("x;", False),
        ("x = 3", False),
        ("assert x", False),
        ("folder.cleanup()", False),  # may return None: a run says
        ("#| export\nx", False),
        ("#| eval: false\nx", False),
        ("def f():\n    return 3", False),
        ("%pip list", False),
    ],
)
def test_a_cell_that_shows_a_result_is_recognised(check, source, shown):
    assert check.shows(source) is shown


def code(cell, source, outputs=()):
    about = {"cell_type": "code", "execution_count": None, "id": cell, "metadata": {}}
    return about | {"outputs": list(outputs), "source": source}


def text(value):
    return {
        "output_type": "execute_result",
        "data": {"text/plain": [value]},
        "metadata": {},
        "execution_count": None,
    }


def write(path, *cells):
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(
        json.dumps({"cells": list(cells), "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )
    return path


def test_a_missing_output_is_found_without_a_run(check, tmp_path):
    notebook = write(
        tmp_path / "a.ipynb", code("bare", "1 + 2"), code("kept", "3", [text("3")]), code("none", "x = 3")
    )
    assert check.without_output(notebook) == ["bare"]


def test_a_run_finds_missing_stale_and_left_over_outputs(runner, tmp_path):
    png = {
        "output_type": "display_data",
        "data": {"image/png": "x", "text/plain": "<Figure>"},
        "metadata": {},
    }
    notebook = write(
        tmp_path / "a.ipynb",
        code("same", "sorted({'a': 1, 'b': 2})", [text("['a', 'b']")]),
        code("seconds", "'took 3 s'", [text("'took 17.5 s'")]),
        code("stale", "['facecaption', 'bmi', 'sfhq']", [text("['facecaption', 'bmi']")]),
        code("missing", "dict(a=1)"),
        code("left", "x = 3", [png]),
        code("skipped", "#| eval: false\n1 / 0", [text("inf")]),
    )
    complaints, _ = runner.run(notebook)
    assert [complaint.split(":")[0] for complaint in complaints] == [
        "cell stale",
        "cell missing",
        "cell left",
    ]
    assert "'sfhq'" in complaints[0] and "is not stored" in complaints[1] and "shows nothing" in complaints[2]


def test_an_error_in_a_cell_is_reported_with_its_place(runner, tmp_path):
    notebook = write(tmp_path / "broken.ipynb", code("a", "x = 1"), code("b", "assert x == 2, 'x is not 2'"))
    (complaint,), _ = runner.run(notebook)
    assert "AssertionError" in complaint and "broken.ipynb" in complaint and "x is not 2" in complaint


def test_what_a_processor_or_a_clock_changes_is_the_same(runner):
    assert runner.plain("r² 0.381 [0.341, 0.419] in 3 min") == runner.plain(
        "r² -1.2e-05 [0.3, 0.4] in 12 min"
    )
    assert runner.plain("<A at 0x7f3a>") == runner.plain("<A at 0x10ff>")
    late = "step 2: 40% of the time is spent waiting for pictures: raise runtime.workers"
    assert runner.plain(f"{late}\ntoy: 2 steps") == runner.plain("toy: 3 steps") and not runner.plain(late)
    assert runner.plain("code 4fc3e61b0a1c") == runner.plain("code b0bde0afd0e1")
    assert runner.plain("code 4fc3e61b0a1c") != runner.plain("code facade")
    assert runner.plain("/tmp/tmpab12/x.png") == runner.plain("/tmp/tmpzz_9/x.png")
    assert runner.plain("bmi present") != runner.plain("bmi absent")


def test_notebooks_that_are_not_tests_are_left_out(runner, root):
    names = {path.relative_to(root / "nbs").as_posix() for path in runner.notebooks()}
    assert "59_tables.ipynb" in names and not any(
        name.startswith(("stages/", "benchmarks/")) for name in names
    )


def test_a_notebook_whose_process_dies_is_reported_and_workers_of_joblib_end(runner, root, tmp_path):
    dies = write(tmp_path / "dies.ipynb", code("a", "import os; os._exit(3)"))
    parallel = "from joblib import Parallel, delayed\nlen(Parallel(2)(delayed(abs)(i) for i in range(4)))"
    waits = write(tmp_path / "waits.ipynb", code("a", parallel, [text("4")]))
    command = [sys.executable, root / "tools" / "run_notebooks.py", "--workers", "2", dies, waits]
    with pytest.raises(subprocess.CalledProcessError) as error:
        # joblib's workers end by themselves after five minutes
        subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, timeout=240)
    assert "dies.ipynb: its process ended with exit code 3" in error.value.stderr
    assert "waits.ipynb" in error.value.stdout and "waits.ipynb" not in error.value.stderr
