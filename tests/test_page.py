"""figures/report.html is whole, fetches nothing, is what figures/ make of it, and opens in a browser."""

import json
import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from mefem.files import write_json
from mefem.made_from import MadeFrom
from mefem.page import FIGURES, RECORDS, report_html, run_health, table_parts, write_report

VOID = {"meta", "link", "img", "br", "hr", "col", "input"}


class Page(HTMLParser):
    """Reads a page; `wrong` lists tags that do not close what was opened."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.wrong, self.ids, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def all(self, wanted: str) -> list[dict]:
        return [attrs for tag, attrs in self.tags if tag == wanted]


def words(text: str) -> str:
    """The page without its pictures, whose bytes are the encoder's affair."""
    return re.sub(r"data:image/webp;base64,[\w+/=]+", "PICTURE", text)


@pytest.fixture(scope="module")
def text(root) -> str:
    return (root / "figures" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


@pytest.fixture
def figures(root, tmp_path):
    """A copy of the figures beside the checkout's other files, small: without pictures."""
    ignore = shutil.ignore_patterns("*.png", "report.html")
    shutil.copytree(root / "figures", tmp_path / "figures", ignore=ignore)
    return tmp_path / "figures"


@pytest.mark.parametrize("folder", ["figures", "figures/faces"])
def test_the_page_is_what_figures_make_of_it(root, folder):
    text = (root / folder / "report.html").read_text(encoding="utf-8")
    assert words(report_html(root, root / folder)) == words(text), (
        f"{folder}/report.html is not made from {folder} as it is: run `make readme`"
    )


def test_the_page_of_real_people_shows_none_of_them(root):
    """Nothing made of photographs of people is in git: figure 1 and `pictures` are left out."""
    folder = root / "figures" / "faces"
    assert json.loads((folder / "tables" / "provenance.json").read_text())["profile"] == "faces"
    assert not (folder / "data" / "figure1_examples.png").exists() and not (folder / "pictures").exists()
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert (
        text.index('id="faces"') < text.index('id="learned"')
        and "MeFEm, by the linear probe, against" in text
    )
    assert 'href="../../data/notebooks/' not in text  # those are of the last run, not of this one


def test_the_page_is_well_formed(page):
    assert page.wrong == []
    assert len(page.ids) == len(set(page.ids))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_every_link_leads_somewhere(root, page):
    links = [attrs["href"] for attrs in page.all("a")]
    assert links
    executed = {path.removeprefix("../") for path in links if path.startswith("../data/notebooks/")}
    for link in set(links):
        if link.startswith("#"):
            assert link[1:] in page.ids, link
        elif not link.startswith(("https://arxiv.org/", "https://github.com/mefem/mefem/commit/")):
            target = (root / "figures" / link).resolve()
            assert target.is_relative_to(root), link
            assert target.exists() or target.relative_to(root).as_posix() in executed, link
    outs = re.findall(r"data/notebooks/([\w-]+)", (root / "dvc.yaml").read_text())
    assert all(Path(path).stem.startswith(tuple(outs)) for path in executed)


def test_nothing_is_fetched_and_pictures_are_inside(text, page, root):
    pictures = page.all("img")
    assert len(pictures) == sum((root / "figures" / figure.file).is_file() for figure in FIGURES)
    for picture in pictures:
        assert picture["src"].startswith("data:image/webp;base64,") and len(picture["alt"]) > 20
        assert int(picture["width"]) and int(picture["height"])
    for tag, attrs in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "video", "audio", "base")
        assert attrs.get("src", "data:").startswith("data:")
        assert tag != "link" or attrs["href"].startswith("data:")
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert len(text.encode()) < 1_000_000


def test_phone_paper_and_dark_are_provided_for(text, page):
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    boxes = [attrs for attrs in page.all("div") if attrs.get("class") == "box"]
    assert len(boxes) == len(page.all("table"))  # every table scrolls within its own
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    for part in ("@media print", "prefers-color-scheme: dark", "overflow-x: auto"):
        assert part in text


def test_every_part_names_its_source(page, figures):
    links = [attrs["href"] for attrs in page.all("a")]
    for stage in ("tables", "table4", "datasheets", "figures", "fairness", "pictures", "page"):
        assert f"#stage-{stage}" in links and f"../nbs/stages/{stage}.ipynb" in links
        assert f"../data/notebooks/{stage}.ipynb" in links
    shown = [table for table in table_parts(figures) if table["blocks"]]
    assert links.count("#stage-tables") >= sum(table["stage"] == "tables" for table in shown)
    assert "#settings-probing" in links and "settings-probing" in page.ids
    assert {f"record-{name}" for name in RECORDS} <= set(page.ids)


def test_the_paper_stands_beside_our_numbers(text):
    for value in ("0.506 (Base)", "0.425", "0.233 (Base)", "10.8 (Base)", "0.447", "15,078,935", "+0.076"):
        assert f">{value}</td>" in text, value


def edited(path: Path, old: str, new: str) -> None:
    before = path.read_text(encoding="utf-8")
    assert old in before, (path, old)
    path.write_text(before.replace(old, new, 1), encoding="utf-8")


def test_a_changed_number_changes_the_page(root, figures):
    first = report_html(root, figures)
    learned = json.loads((figures / "tables" / "learned_cells.json").read_text())
    learned["rows"]["MeFEm / Patches"]["BMI r2"]["value"] = 0.98765
    write_json(figures / "tables" / "learned_cells.json", learned)
    provenance = json.loads((figures / "tables" / "provenance.json").read_text())
    provenance["commit"] = "f" * 40
    write_json(figures / "tables" / "provenance.json", provenance)
    table4 = json.loads((figures / "ablations" / "table4.json").read_text())
    write_json(figures / "ablations" / "table4.json", table4 | {"summary": "All 13 are a test."})
    health = json.loads((figures / "run" / "health.json").read_text())
    write_json(
        figures / "run" / "health.json", health | {"pictures": 123_456_789, "found": ["a planted fault"]}
    )
    cells = (figures / "tables" / "table2.csv").read_text().splitlines()
    row = next(line for line in cells if ",present," in line)
    value = row.split(",present,")[1].split(",")[0]
    edited(figures / "tables" / "table2.csv", f",present,{value},", ",present,12.3456,")
    second = report_html(root, figures)
    for part in (
        "r² 0.988 against",
        "f" * 40,
        "All 13 are a test.",
        "123,456,789",
        "a planted fault",
        "12.346",
    ):
        assert part in second and part not in first, part
    assert "Nothing is wrong" not in second


def test_what_was_not_run_is_said(root, tmp_path, figures):
    nothing = report_html(root, tmp_path / "nowhere")
    assert Page(nothing).wrong == [] and nothing.count("Not run in this profile") >= 8 + len(FIGURES) + 3
    assert "<table" not in nothing
    (figures / "ablations" / "provenance.json").unlink()
    assert re.search(r'#stage-table4">table4</a>,\s[^.]*commit\s+not recorded', report_html(root, figures))
    shutil.rmtree(figures / "fairness")
    (figures / "run" / "health.json").unlink()
    part = report_html(root, figures)
    assert "no errors by group were measured" in part and "no run left a log" in part
    assert 'id="table2"' in part and Page(part).wrong == []
    (figures / "run" / "provenance.json").write_text('{"commit": ')
    with pytest.raises(ValueError, match="provenance.json: not JSON.*make reproduce"):
        report_html(root, figures)


def test_text_of_results_is_no_markup(root, figures):
    table4 = json.loads((figures / "ablations" / "table4.json").read_text())
    write_json(figures / "ablations" / "table4.json", table4 | {"summary": "<b>a & b"})
    edited(figures / "fairness" / "who_it_works_for.md", "# Who it works for", "# Who\n\n<script>x</script>")
    text = report_html(root, figures)
    assert "&lt;b&gt;a &amp; b" in text and "<script>" not in text and Page(text).wrong == []


def test_smoke_claims_nothing(root, figures):
    provenance = json.loads((figures / "tables" / "provenance.json").read_text())
    write_json(figures / "tables" / "provenance.json", provenance | {"profile": "smoke"})
    text = report_html(root, figures)
    assert "wiring only" in text and "beyond noise" not in text.split('id="tables"')[0]
    assert "params.yaml has changed since this run" in text  # the demo's settings are not those of smoke


def test_health_of_a_log(tmp_path):
    assert run_health(tmp_path) == {}
    log = "step,pictures,loss,target_spread,teacher_spread,token_rank,rankme,waiting\n"
    (tmp_path / "log.csv").write_text(log + "100,3200,0.09,0.2,0.4,30,,0\n200,6400,0.08,0.2,0.4,29,40,0\n")
    made = MadeFrom("settings", "data", "code")
    write_json(tmp_path / "run.json", {"made_from": vars(made) | {"adopted": {"step": 3}}})
    write_json(tmp_path / "checkpoints" / made.key / "start.json", {"token_rank": 31.0})
    well = run_health(tmp_path)
    assert well["found"] == [] and well["steps"] == 200 and well["pictures"] == 6400
    assert (
        well["start"] == {"token_rank": 31.0} and well["last"]["rankme"] == 40 and "probe" not in well["last"]
    )
    (tmp_path / "log.csv").write_text(log + "100,3200,0.09,0.2,0.4,30,,0\n200,6400,0.01,0.2,0.4,9,,0.5\n")
    ill = run_health(tmp_path)["found"]
    assert len(ill) == 2 and "waiting for pictures" in ill[0] and "9.0 directions" in ill[1]


def test_the_stage_writes_what_is_committed(root):
    stage = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]["page"]
    outs = {next(iter(out)) for out in stage["outs"]}
    assert {"figures/report.html", "figures/run"} <= outs
    folders = {figure.file.split("/")[0] for figure in FIGURES}
    folders |= {table["file"].split("/")[0] for table in table_parts(root / "figures")}
    folders |= set(RECORDS.values()) - {"run"}
    assert {f"figures/{folder}" for folder in folders} <= set(stage["deps"])


def test_written_beside_its_figures(root, figures):
    path = write_report(root, figures)
    assert path == figures / "report.html"
    up = os.path.relpath(root, figures)
    assert f'href="{Path(up).as_posix()}/dvc.yaml"' in path.read_text(encoding="utf-8")


def browser() -> str:
    """A Chromium on PATH, or one that Playwright installed; the test is skipped where there is none."""
    names = (
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
        "chrome",
        "chrome-headless-shell",
    )
    found = next(filter(None, map(shutil.which, names)), None)
    store = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache" / "ms-playwright")
    patterns = ("chromium-*/chrome-linux*/chrome", "chromium_headless_shell-*/*/*headless*shell")
    found = found or next((str(path) for pattern in patterns for path in store.glob(pattern)), None)
    if not found:
        pytest.skip("no Chromium on PATH nor from Playwright: the page was not opened in a browser")
    return found


MEASURE = """<!doctype html>
<iframe id="frame" width="{width}" height="800" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
onload = () => {{
  const inner = document.getElementById("frame").contentWindow, page = inner.document;
  const pictures = [...page.images];
  document.getElementById("found").textContent = JSON.stringify({{
    title: page.title, width: page.documentElement.scrollWidth, shown: page.documentElement.clientWidth,
    pictures: pictures.filter(one => one.complete && one.naturalWidth > 0).length, of: pictures.length,
    fetched: inner.performance.getEntriesByType("resource").map(one => one.name)
      .filter(name => !name.startsWith("data:")),
  }});
}};
</script>"""


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_within_its_width(text, tmp_path, width):
    chromium = browser()
    (tmp_path / "outer.html").write_text(MEASURE.format(width=width, page=escape(text)), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run(
        [chromium, *options, (tmp_path / "outer.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr[-2000:]
    seen = json.loads(found[1])
    assert seen["title"].startswith("MeFEm: report")
    assert seen["pictures"] == seen["of"] > 0 and seen["fetched"] == []
    assert seen["width"] <= seen["shown"], "the page itself scrolls sideways; only tables may, in their boxes"
