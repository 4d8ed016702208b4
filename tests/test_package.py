"""The package as people install it, and the order of its modules."""

import ast
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ORDER = [
    "files",
    "compute",
    "made_from",
    "config",
    "faces",
    "shards",
    "simulate",
    "datasets",
    "provide",
    "masking",
    "weighting",
    "models",
    "jepa",
    "monitoring",
    "training",
    "encoders",
    "features",
    "probing",
    "metrics",
    "own_labels",
    "export",
    "hub",
    "own_pictures",
    "report",
    "ablations",
    "fairness",
    "pictures",
    "datasheets",
    "readme",
    "cli",
    "__main__",
]


def imported(path: Path, root: Path) -> set[str]:
    """Top-level mefem modules that a file imports, anywhere in it."""
    names = set()
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            names.add(".".join(part for part in (base, node.module) if part))
    return {name.split(".")[1] for name in names if name.startswith("mefem.")}


def test_no_import_runs_upwards(root):
    for path in (root / "mefem").rglob("*.py"):
        module = path.relative_to(root / "mefem").parts[0].removesuffix(".py")
        if module in ("__init__", "_modidx"):
            continue
        allowed = set(ORDER[: ORDER.index(module)]) | ({module} if path.parent != root / "mefem" else set())
        assert imported(path, root) <= allowed, f"{path.name} imports {imported(path, root) - allowed}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_import_is_light():
    started = time.perf_counter()
    loaded = run("import mefem, sys; print(sorted(sys.modules))")
    assert time.perf_counter() - started < 3
    assert all(f"'{heavy}'" not in loaded for heavy in ("mediapipe", "anny", "warp", "torch"))


def test_public_names_need_neither_mediapipe_nor_anny():
    loaded = run(
        "import mefem, sys; mefem.FaceDetector, mefem.crop_face, mefem.load_encoder, mefem.embed, mefem.FaceEmbedder;"
        "mefem.masking.StripeMasking, mefem.training.pretrain, mefem.probing.AttentivePooler; print(sorted(sys.modules))"
    )
    assert all(f"'{heavy}'" not in loaded for heavy in ("mediapipe", "anny", "warp"))


def test_core_imports_without_mediapipe_anny_and_webdataset():
    modules = "masking, weighting, models, jepa, training, monitoring, probing, metrics"
    run(
        "import sys\nfor name in ('mediapipe', 'anny', 'warp', 'webdataset', 'cv2'): sys.modules[name] = None\n"
        f"from mefem import {modules}"
    )


def test_a_missing_part_is_named_with_its_command():
    """Without the optional packages the core imports, embeds and pretrains; the rest says what to install."""
    blocked = "import sys\nfor name in ('anny', 'warp', 'seaborn', 'tabulate', 'jinja2', 'av', 'dvc', 'papermill'): "
    blocked += "sys.modules[name] = None\n"
    run(
        blocked
        + "from mefem import cli, own_pictures, own_labels, export, hub, features, training, probing, faces"
    )
    said = run(
        blocked + "import mefem\nfrom typer.testing import CliRunner\nfrom mefem.cli import app\n"
        "result = CliRunner().invoke(app, ['simulate', 'bmi', '/tmp/no/where', '-n', '1', '--jobs', '1'])\n"
        "print(result.exit_code, result.stderr)\n"
        "try: mefem.readme\nexcept ModuleNotFoundError as error: print(error)"
    )
    assert said.startswith("1 mefem: the package warp is missing: pip install 'mefem[simulate]'") or (
        "the package anny is missing: pip install 'mefem[simulate]'" in said
    )
    assert "mefem.readme: the package jinja2 is missing: pip install 'mefem[paper]'" in said


def test_names_are_listed_and_the_example_runs():
    import doctest

    import mefem

    for name in mefem._PUBLIC:
        assert f"`{name}" in mefem.__doc__, name
        assert getattr(mefem, name)
    found = doctest.testmod(mefem)
    assert found.attempted >= 4 and not found.failed


def test_wheel_holds_the_package_and_nothing_else(root, tmp_path):
    # Built from a copy, so that no build folder is left in the checkout.
    import shutil

    source = tmp_path / "source"
    shutil.copytree(
        root,
        source,
        ignore=shutil.ignore_patterns(".git", ".venv", ".dvc", "data", "nbs", ".work", "build", "*.egg-info"),
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            source,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entry = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    ours = {str(p.relative_to(root)) for p in (root / "mefem").rglob("*.py")}
    assert {n for n in names if ".dist-info/" not in n} == ours
    assert "mefem = mefem.cli:app" in entry
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert required and not any(
        word in line for line in required for word in ("nbdev", "jupyter", "dvc", "papermill")
    )


def test_constraints_pin_every_requirement(root):
    from configparser import ConfigParser

    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini")
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (root / "constraints.txt").read_text().splitlines()
        if line
    }
    for key in (
        "requirements",
        "dev_requirements",
        "simulate_requirements",
        "paper_requirements",
        "video_requirements",
    ):
        for requirement in config["DEFAULT"][key].split():
            assert requirement.split("<")[0].lower().replace("_", "-") in pinned, requirement


def test_no_path_of_a_machine_and_no_big_file_is_committed(root):
    listed = (
        subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
        .stdout.decode()
        .split("\0")
    )
    for name in filter(None, listed):
        path = root / name
        if not path.exists():
            continue
        assert path.stat().st_size <= 5_000_000, name
        if path.suffix in (
            ".ipynb",
            ".py",
            ".md",
            ".yaml",
            ".json",
            ".csv",
            ".tex",
            ".lock",
            ".ini",
            ".toml",
        ):
            text = path.read_text(encoding="utf-8", errors="replace")
            assert str(root) + "/" not in text, f"{name} names this machine's folder"
