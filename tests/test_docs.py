"""The site of `make docs`: every chapter is on it, nothing is fetched, numbers are read from files."""

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from importlib.util import find_spec
from urllib.parse import unquote

import pytest
import yaml


@pytest.fixture(scope="module")
def config(root) -> dict:
    return yaml.safe_load((root / "mkdocs.yml").read_text(encoding="utf-8"))


def listed(nav) -> list[str]:
    """The files of a menu."""
    if isinstance(nav, str):
        return [nav]
    return [file for entry in (nav.values() if isinstance(nav, dict) else nav) for file in listed(entry)]


def test_the_menu_lists_every_notebook_and_page_once(root, config):
    files = listed(config["nav"])
    notebooks = {path.relative_to(root).as_posix() for path in (root / "nbs").rglob("*.ipynb")}
    pages = {path.name for path in (root / "docs").glob("*.md")}
    assert sorted(files) == sorted(notebooks | pages)


def test_the_site_is_told_to_fetch_nothing(config):
    assert config["theme"]["font"] is False
    assert not {"repo_url", "extra_javascript", "extra_css", "extra"} & set(
        config
    )  # a repository is asked for its stars
    assert config["plugins"][1]["mkdocs-jupyter"]["execute"] is False


def test_pages_hold_no_result(root):
    for path in (root / "docs").glob("*.md"):
        prose = re.sub(r"{%.*?%}|{{.*?}}|\]\([^)]*\)", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        found = re.findall(r"\d+\.\d+|\d[\d,]{3,}|\d+ ?%|\d+ (?:s|min|minutes?|h|hours?)\b", prose)
        assert set(found) <= {"2602.14672", "95 %", "0.2"}, (path.name, found)


def test_the_tools_have_versions(root):
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    wanted = {re.sub(r"\[.*\]", "", name) for name in settings["DEFAULT"]["docs_requirements"].split()}
    pinned = re.findall(r"^([\w.-]+)==", (root / "constraints-docs.txt").read_text(), re.MULTILINE)
    assert wanted <= {name.lower().replace("_", "-") for name in pinned}


class Links(HTMLParser):
    """Links of a page, its anchors, and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loads, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found["id"]} if found.get("id") else set()
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("script", "img", "iframe", "source", "video") and found.get("src"):
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev", "alternate"):
            self.loads.append(found.get("href", ""))


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    if not all(map(find_spec, ("mkdocs", "material", "mkdocs_jupyter", "mkdocstrings", "latex2mathml"))):
        pytest.skip("mkdocs and its plugins are not installed (`make docs` has them): the site was not built")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ | {"CI": "true"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-4000:]
    return folder


def test_the_site_is_whole(root, site):
    for path in (root / "nbs").rglob("*.ipynb"):
        assert (site / path.relative_to(root)).with_suffix(".html").is_file(), path.name
    api = (site / "nbs" / "mefem.masking.html").read_text(encoding="utf-8")
    assert "StripeMasking" in api and "source" in api
    assert "<math" in (site / "nbs" / "40_masking.html").read_text(encoding="utf-8")
    assert (site / "figures" / "report.html").read_bytes()
    assert "{{" not in (site / "faq.html").read_text(encoding="utf-8")


def test_nothing_of_the_site_is_fetched_and_links_lead_somewhere(site):
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    for path, page in pages.items():
        assert not [load for load in page.loads if re.match(r"(https?:)?//", load)], path
        assert "import(" not in path.read_text(encoding="utf-8"), path
        if path.name == "404.html":
            continue
        for link in page.links:
            file, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (path.name, link)
            if anchor and target in pages and not anchor.startswith("__"):
                assert anchor in pages[target].ids, (path.name, link)
