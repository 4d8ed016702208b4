"""What is kept follows from what made it: a changed constant makes it anew, a changed comment does not."""

import json
import shutil
import subprocess
import sys
from modulefinder import ModuleFinder
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mefem.made_from import (
    PACKAGE,
    MadeFrom,
    closure,
    code_hash,
    files_hash,
    notebook_code,
    settings_hash,
    stage_code,
    syntax,
)

ROOT = Path(__file__).resolve().parent.parent
STAGES = sorted((ROOT / "nbs" / "stages").glob("*.ipynb"))
# What is kept between runs, and the modules whose code is part of its key.
KEPT = {
    "photographs": ("simulate.run",),
    "crops": ("datasets.core", "datasets.bmi"),
    "checkpoints": ("training",),
    "features": ("features",),
    "probes": ("metrics",),
}


def found_by_the_interpreter(script: Path) -> set[str]:
    """Modules of mefem that a script imports, by the standard library's own finder, which reads bytecode."""
    finder = ModuleFinder(path=[str(ROOT)])
    finder.run_script(str(script))
    return {name.removeprefix("mefem.") for name in finder.modules if name.startswith("mefem.")} - {"_modidx"}


@pytest.mark.parametrize(
    "module",
    [
        "training",
        "features",
        "metrics",
        "simulate.publishers",
        "datasets.core",
        "ablations",
        "fairness",
        "cli",
    ],
)
def test_closure_is_what_the_interpreter_finds(module, tmp_path):
    (script := tmp_path / "script.py").write_text(f"import mefem.{module}")
    found = found_by_the_interpreter(script)
    assert set(closure(module)) == found


def copied(tmp_path) -> Path:
    return Path(shutil.copytree(PACKAGE, tmp_path / "mefem", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.mark.parametrize("thing", KEPT)
def test_a_constant_in_any_module_of_the_closure_changes_the_key_and_prose_in_none(thing, tmp_path):
    package, modules = copied(tmp_path), KEPT[thing]
    before = code_hash(*modules)
    assert code_hash(*modules, package=package) == before
    for path in package.rglob("*.py"):
        path.write_text("# a reworded comment\n" + path.read_text().replace('"""', '"""Reworded: ', 1))
    assert code_hash(*modules, package=package) == before
    for module in closure(*modules):
        path = next(
            p
            for p in (
                package.joinpath(*module.split(".")).with_suffix(".py"),
                package.joinpath(*module.split("."), "__init__.py"),
            )
            if p.is_file()
        )
        text = path.read_text()
        path.write_text(text + "\nPLANTED = 1\n")
        assert (changed := code_hash(*modules, package=package)) != before, module
        path.write_text(text + "\nPLANTED = 2\n")
        assert code_hash(*modules, package=package) not in (before, changed), module
        path.write_text(text)
    assert code_hash(*modules, package=package) == before


def test_syntax_leaves_prose_out_and_nothing_else():
    text = (
        'class A:\n    "Prose."\n    x = 1\n\n    def f(self, s="text"):\n'
        '        """More."""\n        return s  # less\n'
    )
    assert syntax(text) == syntax(
        text.replace("Prose.", "Verse.")
        .replace("More.", "Less.")
        .replace("  # less", "")
        .replace("x = 1", "x = (1)")
    )
    for old, new in (("x = 1", "x = 2"), ('"text"', '"other"'), ("return s", "return s, s"), ("f(", "g(")):
        assert syntax(text) != syntax(text.replace(old, new))
    assert syntax("__all__ = ['a']\nx = 1") == syntax("x = 1")


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_stage_depends_on_the_closure_of_what_it_runs(path, tmp_path):
    script = tmp_path / "stage.py"
    script.write_text(notebook_code(path))
    modules = set(stage_code(path)["modules"])
    assert found_by_the_interpreter(script) <= modules
    if "datasets.core" in modules:  # readers are imported by name
        assert {f"datasets.{p.stem}" for p in (PACKAGE / "datasets").glob("[!_]*.py")} <= modules


def test_files_hash_sees_name_place_and_content(tmp_path):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "1.jpg"
    file.write_bytes(b"x" * 5_000_000)
    seen = {files_hash([file], tmp_path)}
    for change in (
        lambda: file.write_bytes(b"x" * 4_999_999 + b"y"),
        lambda: file.write_bytes(b"x" * 4_999_999),
        lambda: file.write_bytes(b"y" + b"x" * 4_999_998),
        file.unlink,
    ):
        change()
        seen.add(files_hash([file], tmp_path))
    seen.add(files_hash([tmp_path / "b" / "1.jpg"], tmp_path))
    assert len(seen) == 6


def test_differences_are_named():
    mine = MadeFrom("s", "d", "c")
    assert mine.differs({"settings": "s", "data": "d", "code": "c"}) == [] and mine.differs({}) == [
        "settings",
        "data",
        "code",
    ]
    assert mine.differs({"settings": "s", "data": "e", "code": "f"}) == ["data", "code"]
    assert (
        mine.key == settings_hash({"code": "c", "data": "d", "settings": "s"}) != MadeFrom("s", "d", "e").key
    )


# --- the whole chain, in a copy of the package that is edited

CHAIN = """
import json, sys
from pathlib import Path
import mefem
assert Path(mefem.__file__).parent == Path({package!r})
from mefem.config import PretrainSettings
from mefem.crop import crop_dataset
from mefem.features import features_of
from mefem.evaluation import evaluate
from mefem.training import pretrain
root = Path({root!r})
faces = root / "data" / "faces" / "bmi"
crop_dataset("bmi", root / "raw", faces, size=32, min_side=1, framing="dataset", jobs=1, progress=True)
config = PretrainSettings(datasets=("bmi",), batch=4, steps=2, checkpoint_every=2, log_every=1, device="cpu",
                  precision="fp32", predictor=dict(dim=8, depth=1, heads=2), masking=dict(width=1),
                  encoder=dict(kwargs=dict(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)))
encoder = pretrain(config, root=root, progress=False)
features_of(str(encoder), [faces], root / "features" / "mefem")
evaluate({{"mefem": (root / "features" / "mefem", root / "results")}}, ["bmi"], ["patches"], linear=False,
         jobs=1, device="cpu", folds=2, epochs=1, batch=8, lrs=(1e-2,), weight_decays=(0.1,), bootstrap=100)
"""


def run_chain(package: Path, root: Path) -> tuple[dict, str]:
    """(kept thing -> what tells this making of it from another, what was printed)."""
    script = CHAIN.format(package=str(package), root=str(root))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=root,
        env={"PYTHONPATH": str(package.parent), "PATH": "", "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    times = {
        "crops": root / "data/faces/bmi/00000.tar",
        "features": root / "features/mefem/bmi.npy",
        "probes": root / "results/bmi.patches.parquet",
    }
    about = json.loads((root / "data/runs/main/run.json").read_text())["made_from"]
    found = {name: path.stat().st_mtime_ns for name, path in times.items()}
    found["checkpoints"] = (
        next((root / "data/runs/main/checkpoints" / MadeFrom(**about).key).glob("*.pt")).stat().st_mtime_ns
    )
    return found, done.stdout


def test_edited_code_makes_anew_what_it_made_and_keeps_the_rest(tmp_path):
    package, raw = copied(tmp_path), tmp_path / "raw" / "own"
    (raw / "images").mkdir(parents=True)
    rows = ["image,height,weight,bmi,sex,person"]
    for i in range(24):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
            raw / "images" / f"{i}.jpg"
        )
        rows.append(f"{i}.jpg,170,{60 + i},{(60 + i) / 1.7**2:.2f},{'male' if i % 2 else 'female'},p{i}")
    (raw / "labels.csv").write_text("\n".join(rows) + "\n")
    made, _ = run_chain(package, tmp_path)

    def edit(module: str, old: str, new: str) -> None:
        path = package / f"{module}.py"
        assert old in (text := path.read_text()), (module, old)
        path.write_text(text.replace(old, new))

    for path in package.rglob("*.py"):
        path.write_text(path.read_text() + "\n# a reworded comment\n")
    kept, said = run_chain(package, tmp_path)
    assert kept == made, "a comment made something anew"
    for line in (
        "1 of 1 shards are there",
        "nothing to do: finished at step 2 of 2",
        "nothing to do, the features",
        "1 of 1 probes were there",
    ):
        assert line in said
    edit("metrics", "1e-300", "1e-299")  # a floor in r2
    now, _ = run_chain(package, tmp_path)
    assert {name for name in now if now[name] != kept[name]} == {"probes"}
    edit(
        "jepa", 'reduction="none").mean(-1)', 'reduction="none").mean(-1) * 7'
    )  # the loss: the encoder and all that is made of it
    kept, (now, said) = now, run_chain(package, tmp_path)
    assert {name for name in now if now[name] != kept[name]} == {"checkpoints", "features", "probes"}
    assert (
        "starts at step 0" in said
        and "was made from other code and is left as it is; --resume-anyway" in said
    )
    edit("models", "0.485", "0.486")  # the pixels' mean: training and features
    kept, (now, _) = now, run_chain(package, tmp_path)
    assert {name for name in now if now[name] != kept[name]} == {"checkpoints", "features", "probes"}
    edit("faces", '"quality": 95', '"quality": 94')  # how a crop is written: everything
    kept, (now, _) = now, run_chain(package, tmp_path)
    assert {name for name in now if now[name] != kept[name]} == set(now)
