"""The package as people install it, and the order of its modules."""

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ORDER = [
    "files",
    "compute",
    "made_from",
    "config",
    "labels",
    "faces",
    "shards",
    "simulate",
    "datasets",
    "crop",
    "provide",
    "masking",
    "weighting",
    "tables",
    "provenance",
    "figures",
    "models",
    "jepa",
    "monitoring",
    "beyond",
    "training",
    "encoders",
    "features",
    "embedding",
    "embedder",
    "probing",
    "metrics",
    "evaluation",
    "own_labels",
    "export",
    "hub",
    "own_pictures",
    "finetune",
    "report",
    "ablations",
    "fairness",
    "fairness_page",
    "pictures",
    "datasheets",
    "readme",
    "page",
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


def test_what_tools_and_benchmarks_import_is_there(root):
    for path in [*(root / "tools").glob("*.py"), *(root / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mefem."):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), (path.name, node.lineno)


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
    loaded = run("import mefem, sys; print(sorted(sys.modules))")
    assert all(f"'{heavy}'" not in loaded for heavy in ("mediapipe", "anny", "warp", "torch", "pandas"))


def test_the_command_embed_starts_without_scikit_learn():
    """Its import takes a second, which `mefem.embedder` needs and `mefem embed` does not."""
    loaded = run("import sys, mefem.cli, mefem.embedding; print(sorted(sys.modules))")
    assert all(f"'{heavy}'" not in loaded for heavy in ("sklearn", "scipy", "matplotlib"))


def test_public_names_need_neither_mediapipe_nor_anny():
    loaded = run(
        "import mefem, sys; mefem.FaceDetector, mefem.crop_face, mefem.load_encoder, mefem.embed;"
        "mefem.FaceEmbedder, mefem.masking.StripeMasking, mefem.training.pretrain;"
        "mefem.probing.AttentivePooler; print(sorted(sys.modules))"
    )
    assert all(f"'{heavy}'" not in loaded for heavy in ("mediapipe", "anny", "warp"))


def test_core_imports_without_mediapipe_anny_and_webdataset():
    modules = "masking, weighting, models, jepa, training, monitoring, probing, metrics"
    run(
        "import sys\n"
        "for name in ('mediapipe', 'anny', 'warp', 'webdataset', 'cv2'): sys.modules[name] = None\n"
        f"from mefem import {modules}"
    )


def test_a_missing_part_is_named_with_its_command():
    """Without the optional packages the core imports, embeds and pretrains; the rest says what to install."""
    packages = ("anny", "warp", "matplotlib", "jinja2", "markdown_it", "mapie", "av", "onnxruntime", "dvc")
    blocked = f"import sys\nfor name in {packages}: sys.modules[name] = None\n"
    run(
        blocked + "from mefem import cli, own_pictures, own_labels, export, hub, embedding, training, probing"
    )
    said = run(
        blocked + "import mefem\nfrom typer.testing import CliRunner\nfrom mefem.cli import app\n"
        "result = CliRunner().invoke(app, ['simulate', 'bmi', '/tmp/no/where', '-n', '1', '--jobs', '1'])\n"
        "print(result.exit_code, result.stderr)\n"
        "try: mefem.readme\nexcept ModuleNotFoundError as error: print(error)"
    )
    assert said.startswith("1 ")
    assert re.search(r"mefem: the package (anny|warp) is missing: pip install 'mefem\[simulate\]'\n", said)
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
    ours |= {"mefem/py.typed", "mefem/__init__.pyi"}  # without the first, type checkers ignore the package
    ours |= {f"mefem/starter/{name}" for name in ("encoder.safetensors", "run.json", "README.md")}
    assert {n for n in names if ".dist-info/" not in n} == ours
    assert "mefem = mefem.cli:app" in entry
    required = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert required and not any(
        word in line for line in required for word in ("nbdev", "dvc", "anny", "matplotlib", "onnx")
    )
    parts = {line.split("extra ==")[1].strip(" \"'") for line in metadata.splitlines() if "extra ==" in line}
    assert parts == {"simulate", "paper", "video", "buffalo", "onnx", "docs", "dev"}
    for package in (
        "anny",
        "matplotlib",
        "av",
        "onnxruntime",
        "mypy",
    ):  # all that the graph and the tests need
        assert re.search(rf'^Requires-Dist: {package}; extra == "dev"$', metadata, re.MULTILINE), package


def test_constraints_pin_every_requirement(root):
    from configparser import ConfigParser

    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini")
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (root / "constraints.txt").read_text().splitlines()
        if line
    }
    # onnx is in no environment of ours, and the site's has a file of its own
    elsewhere = ("onnx_requirements", "docs_requirements")
    keys = [key for key in config["DEFAULT"] if key.endswith("requirements") and key not in elsewhere]
    assert len(keys) == 6
    for key in keys:
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
        most = 12 * 2**20 if name == "mefem/starter/encoder.safetensors" else 5_000_000
        assert path.stat().st_size <= most, name
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


def test_the_stub_names_what_the_package_loads(root):
    import mefem

    names, modules = {}, set()
    for node in ast.parse((root / "mefem" / "__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {alias.name for alias in node.names}
    assert names == mefem._PUBLIC and modules <= mefem._MODULES
    assert {"config", "faces", "jepa", "training"} <= modules


def test_users_code_is_checked_against_the_packages_types(root, tmp_path):
    script = tmp_path / "use.py"
    script.write_text(
        "import mefem\n"
        "face: mefem.Face = mefem.FaceDetector().detect('a.jpg')[0]\n"
        "score: str = face.score\n"
        "mefem.crop_face(size=[3])\n"
        "box: tuple[float, float, float, float] = face.box\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", root / "pyproject.toml", script]
    done = subprocess.run([*command, "--cache-dir", tmp_path], cwd=root, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "4"], done.stdout + done.stderr


def test_hooks_of_a_commit_are_the_environments_own(root):
    """Versions are pinned once, in constraints.txt: no hook is fetched from elsewhere."""
    import yaml

    (repository,) = yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    entries = {hook["id"]: hook["entry"].split()[0] for hook in repository["hooks"]}
    assert entries == {
        "ruff-check": "ruff",
        "ruff-format": "ruff",
        "nbdev-export": "nbdev_export",
        "nbdev-clean": "nbdev_clean",
    }
    assert all(hook["language"] == "system" for hook in repository["hooks"])
