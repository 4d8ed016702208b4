"""What mkdocs is told of this repository: notebooks, figures, the API's pages and the FAQ's numbers.

The site has the repository's own folders (nbs/, figures/), so links between files stay as they are. A file
that is linked to and is no page is copied; a link to one that is not here becomes plain text."""

import csv
import json
import re
import shutil
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import yaml
from jinja2 import Environment, StrictUndefined
from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mefem.readme import about  # noqa: E402

SHOWN = ("nbs/*.ipynb", "nbs/tutorials/*.ipynb", "nbs/stages/*.ipynb", "nbs/benchmarks/*.ipynb")
NOT_API = ("__init__", "__main__", "_modidx")


def modules() -> list[str]:
    """The modules of the package, dotted, packages before what is in them."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "mefem").rglob("*.py")]
    inside = {path.parent.parts for path in paths if len(path.parts) > 2}
    names = [path.parts for path in paths if path.name not in NOT_API]
    return [".".join(parts) for parts in sorted({*names, *inside})]


def on_config(config):
    """The API's part of the menu."""
    config.nav.append({"API": [{name: f"nbs/{name}.md"} for name in modules()]})
    return config


@event_priority(100)  # before the plugin that turns notebooks into pages looks for them
def on_files(files, config):
    """Notebooks, figures and the API's pages beside what is in docs/."""
    files.remove(files.get_file_from_path("hooks.py"))
    paths = [path for pattern in SHOWN for path in ROOT.glob(pattern)]
    paths += [path for path in (ROOT / "figures").rglob("*") if path.is_file()]
    for path in sorted(paths):
        source = path.relative_to(ROOT).as_posix()
        files.append(File(source, str(ROOT), config.site_dir, use_directory_urls=False))
    for name in modules():
        text = f"# {name}\n\n::: {name}\n"  # beside the chapters, which docstrings link to
        files.append(File.generated(config, f"nbs/{name}.md", content=text))
    return files


def read_json(path) -> dict:
    """A JSON file below the root; empty where there is none."""
    path = ROOT / path
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def numbers() -> dict:
    """What the pages in docs/ may show, all of it from files."""
    found = about(ROOT / "figures")
    made = found["pretraining"]
    with (ROOT / "nbs" / "logs" / "faces.csv").open(newline="") as log:
        start, *_, last = csv.DictReader(log)
    with (ROOT / "figures" / "data" / "table1.csv").open(newline="") as table:
        total = next(row for row in csv.reader(table) if row[0] == "Total")
    settings = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    base = settings["base"]["pretrain"]
    runs = {name: base | profile.get("pretrain", {}) for name, profile in settings["profiles"].items()}
    return found | {
        "paper_usable": int(total[-1].replace(",", "")),
        "seen_each": round(made["steps"] * made["batch"] / made["photographs"]) if made else None,
        "rank_start": float(start["token_rank"]),
        "rank_last": float(last["token_rank"]),
        "probe_start": float(start["probe"]),
        "probe_last": float(last["probe"]),
        "rank_pictures": int(last["pictures"]),
        "batches": [(name, run["batch"], run["steps"]) for name, run in runs.items()],
        "rates": read_json("benchmarks/rates.json"),
        "health": read_json("figures/run/health.json"),
    }


def on_page_markdown(markdown, page, config, files):
    """The numbers of the pages in docs/."""
    if Path(page.file.abs_src_path or "").parent != Path(config.docs_dir):
        return markdown
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    return Environment(**options).from_string(markdown).render(numbers())


FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)
AS_IT_IS = re.compile(r"(<(pre|code|style|script)\b.*?</\2>|<[^>]*>)", re.DOTALL)


def with_formulas(html: str) -> str:
    """TeX between dollars as MathML, which browsers draw by themselves; code stays as it is."""

    def formula(found) -> str:
        display = "block" if found[1] else "inline"
        return convert(unescape(found[1] or found[2]), display=display)

    parts = AS_IT_IS.split(html)  # text, what is kept, its name, text, ...
    parts[::3] = [FORMULA.sub(formula, text) for text in parts[::3]]
    return "".join(part for i, part in enumerate(parts) if i % 3 != 2)


DIAGRAMS = re.compile(r"<script\b[^>]*>(?:(?!</script>).)*?mermaid.*?</script>", re.DOTALL)


def on_page_content(html, page, config, files):
    """Formulas of the notebooks, and links to their headings, whose anchors are in small letters here.

    nbconvert's script for diagrams, of which there are none, would be fetched: it is left out."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    html = DIAGRAMS.sub("", html)
    html = re.sub(r'href="#([^"]+)"', lambda found: found[0].lower(), html)
    return with_formulas(html)


LINK = re.compile(r'<a\b[^>]*?\bhref="(?![a-z]+:|#|//)([^"#]+)(#[^"]*)?"[^>]*>(.*?)</a>', re.DOTALL)


def mended(found, page: Path, site: Path) -> str:
    """A link of a page: to the page that a notebook became, to a copy of the file, or only its text."""
    target = (page.parent / unquote(found[1])).resolve()
    if target.suffix == ".ipynb" and target.with_suffix(".html").is_file():
        return found[0].replace(found[1], found[1].removesuffix(".ipynb") + ".html")
    source = ROOT / target.relative_to(site) if target.is_relative_to(site) else target
    if not target.exists() and source.is_file() and target.is_relative_to(site):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return found[0] if target.exists() else found[3]


def on_post_build(config):
    """Every link of the site leads somewhere."""
    site = Path(config.site_dir).resolve()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        new = LINK.sub(lambda found, page=page: mended(found, page, site), text)
        if new != text:
            page.write_text(new, encoding="utf-8")
