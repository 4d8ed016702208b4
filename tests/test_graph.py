"""The graph and its notebooks: described, parameterised, free of definitions, the same in every profile."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
STAGES = sorted((ROOT / "nbs" / "stages").glob("*.ipynb"))
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))


def stages() -> dict:
    loaded = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in loaded.items()}


def test_every_stage_is_described_and_runs_papermill_plainly():
    for name, stage in stages().items():
        assert stage["desc"], name
        if name == "code":  # the one stage that has to work before any notebook can
            assert [command.split()[1] for command in stage["cmd"]] == [
                "tools/experiment_data.py",
                "tools/stage_code.py",
            ]
        else:
            assert stage["cmd"].startswith(("papermill nbs/stages/", "mefem info weights")), name


def test_stages_depend_on_code_not_on_notebooks():
    for name, stage in stages().items():
        if name != "code":
            assert not [
                d
                for d in stage.get("deps", [])
                if str(d).startswith("nbs") and str(d).endswith(("stages", ".ipynb"))
            ], name
        if str(stage["cmd"]).startswith("papermill"):
            notebook = Path(stage["cmd"].split()[1]).stem
            assert f"data/code/{notebook}.json" in stage["deps"], name
            assert not [d for d in stage["deps"] if d.startswith("mefem")], (
                "code counts by its syntax tree: tests/test_made_from.py"
            )


def test_a_directory_is_an_output_where_it_can_be():
    """No list of files by hand: every output is a folder but notebooks, leaks.json and the two pages."""
    for name, stage in stages().items():
        outs = [
            next(iter(out)).replace("${item.run}-${item.seed}", "x").replace("${item}", "x")
            for out in stage["outs"]
        ]
        files = [out for out in outs if Path(out).suffix]
        named = ("data/faces/leaks.json", "README.md", "figures/report.html")
        assert all(f.startswith("data/notebooks/") or f in named for f in files), (name, files)


def test_a_row_of_table_4_is_a_stage_of_its_own():
    matrix = stages()["ablation"]["matrix"]
    assert matrix == {"run": "${ablation_runs}", "seed": "${seeds}"}
    assert "ablations.${item.run}" in stages()["ablation"]["params"]


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_stage_notebooks_are_papermills(path):
    notebook = nbformat.read(path, 4)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, "exactly one cell is tagged parameters"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert "nbdev" not in cell.source and "#| export" not in cell.source
            defined = [
                n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))
            ]
            assert not defined, "a stage shows, it does not define"
            assert not cell.outputs, (
                "stage notebooks are committed without outputs: their executed copies are the outputs"
            )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_read_like_chapters(path):
    notebook = nbformat.read(path, 4)
    first = notebook.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "\n> " in first.source
    ids = [c.id for c in notebook.cells]
    assert len(ids) == len(set(ids))


def test_dvc_reads_the_graph():
    if not shutil.which("dvc"):
        pytest.skip("dvc is not on PATH: the graph was not checked by dvc itself")
    listed = subprocess.run(
        ["dvc", "stage", "list"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in (
        "simulate@bmi",
        "crop@fairface",
        "pretrain@main",
        "ablation@stripes2-0",
        "features",
        "probe",
        "tables",
        "readme",
        "page",
    ):
        assert name in listed


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_link_in_a_notebook_leads_to_a_file(path):
    cells = nbformat.read(path, 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for target in LINK.findall(text):
        if target.startswith(("http:", "https:")):
            continue
        file, _, heading = target.partition("#")
        assert not file or (path.parent / file).exists(), target
        if heading and not file:
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            assert heading in {line.replace(" ", "-") for line in headings}, target


def test_chapters_link_to_each_other_and_to_the_paper():
    """`python tools/chapter_links.py` writes these lines; run it after adding or renaming a chapter."""
    sys.path.insert(0, str(ROOT / "tools"))
    from chapter_links import PAPER, chapters, line_of

    order = chapters(ROOT / "nbs")
    assert set(PAPER) <= {path.stem for path in order}
    for path in order:
        cells = nbformat.read(path, 4).cells
        assert cells[1].source == line_of(path, order), f"{path.name}: run python tools/chapter_links.py"


def test_the_index_is_short_and_leads_everywhere():
    text = (ROOT / "nbs" / "index.ipynb").read_text()
    for chapter in (
        "40_masking",
        "41_weighting",
        "42_models",
        "43_jepa",
        "45_training",
        "52_probing",
        "10_faces",
    ):
        assert f"({chapter}.ipynb)" in text
    assert "index.ipynb" in (ROOT / "Makefile").read_text()
