"""Fixtures for all tests."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# One detector model for all tests and working folders; fetched at most once.
os.environ.setdefault("MEFEM_CACHE", str(ROOT / "data" / "models"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs beside the checkout, which CI has and a user does not."""
    folder = Path(os.environ.get("MEFEM_SHARED", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            "the real photographs (shared/data beside the checkout, or $MEFEM_SHARED) are not here: "
            "not checked on them"
        )
    return folder


@pytest.fixture(scope="session")
def script(root):
    """A function: the Python file at a path in the checkout, as a module."""

    def load(path: str):
        spec = importlib.util.spec_from_file_location(Path(path).stem, root / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
