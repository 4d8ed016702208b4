"""Packaging: everything that varies is read from settings.ini, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

parts = ("simulate", "paper", "video", "buffalo", "onnx")
extras = {part: settings[f"{part}_requirements"].split() for part in parts}
extras["dev"] = settings["dev_requirements"].split()
for part in parts[:-1]:  # a checkout has all of them but onnx, whose tests say that they are skipped
    extras["dev"] += extras[part]
extras["docs"] = settings["docs_requirements"].split()

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    url=settings["git_url"],
    keywords=settings["keywords"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    # Named, not searched for in the root: nbs, tests and data lie beside the package (flat layout).
    packages=find_packages(include=["mefem", "mefem.*"]),
    package_data={"mefem": ["py.typed", "*.pyi", "starter/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)
