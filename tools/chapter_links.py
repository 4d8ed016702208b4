"""Write the line of links below each chapter's title: index, chapter before, next, the paper's section."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELL = "chapter-links"  # id of the cell that has the line
# What a chapter implements of arXiv 2602.14672; other chapters have no section of their own.
PAPER = {
    "10_faces": "section 3.1",
    "31_facecaption": "section 3.1.1",
    "32_avspeech": "section 3.1.1",
    "33_sfhq": "section 3.1.1",
    "34_celeba": "section 3.1.2",
    "35_fairface": "section 3.1.2",
    "36_mcd_rppg": "section 3.1.2",
    "37_bmi": "section 3.1.2",
    "40_masking": "sections 3.2.2 and 3.2.3, equations 2 to 4",
    "41_weighting": "section 3.2.4, equations 5 and 6",
    "42_models": "section 3.2.1",
    "43_jepa": "sections 3.2.1 and 3.2.4, equations 1 and 5",
    "45_training": "section 3.2",
    "50_encoders": "section 4",
    "52_probing": "section 3.3",
    "53_metrics": "section 3.3",
    "60_report": "section 4, Tables 2 and 3",
    "61_datasheets": "section 3.1, Table 1 and figure 1",
    "62_ablations": "appendix A, Table 4",
}


def chapters(folder: Path) -> list[Path]:
    """The chapters in the order of reading."""
    return sorted(folder.glob("[0-9]*.ipynb"))


def line_of(path: Path, order: list[Path]) -> str:
    """The line of one chapter."""
    at = order.index(path)
    parts = ["[index](index.ipynb)"]
    if at:
        parts.append(f"before: [{order[at - 1].stem}]({order[at - 1].name})")
    if at + 1 < len(order):
        parts.append(f"next: [{order[at + 1].stem}]({order[at + 1].name})")
    if path.stem in PAPER:
        parts.append(f"[paper](https://arxiv.org/abs/2602.14672): {PAPER[path.stem]}")
    return " · ".join(parts)


def write_links(folder: Path) -> list[Path]:
    """Bring the line of each chapter in `folder` up to date; the chapters that changed."""
    order = chapters(folder)
    changed = []
    for path in order:
        before = path.read_text(encoding="utf-8")
        notebook = json.loads(before)
        cells = [cell for cell in notebook["cells"] if cell.get("id") != CELL]
        cell = {"cell_type": "markdown", "id": CELL, "metadata": {}, "source": [line_of(path, order)]}
        notebook["cells"] = [cells[0], cell, *cells[1:]]
        text = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
        if text != before:
            path.write_text(text, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in write_links(ROOT / "nbs"):
        print(path.relative_to(ROOT))
