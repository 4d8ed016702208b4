"""The encoder in the package: measured against the untrained one and pixels, and written with its card.

    python benchmarks/starter.py --run data/gpu-out/alone --pack data/gpu --bmi DIR

`--run`: a folder of `tools/gpu_faces.py recipes` (encoder.safetensors, pretrain.json). Writes mefem/starter
(encoder.safetensors, run.json, README.md) and figures/faces/starter.json, which has the card's numbers.
`--regions` measures the package's encoder again on pictures of which one part is seen."""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]
FOLDER = ROOT / "mefem" / "starter"
FOUND = ROOT / "figures" / "faces" / "starter.json"
TITLES = {
    "gender": "gender, accuracy",
    "race": "race (7 groups), accuracy",
    "age": "age (9 groups), accuracy",
    "bmi": "body mass index, r2",
}
NAMES = {
    "starter": "mefem-starter",
    "untrained": "untrained network",
    "pixels": "128 components of pixels",
    "largest": "largest group",
}
# FairFace with padding 0.25: median over the first 200 validation photographs (186 with a face found, middle
# half 1.08 to 1.18) of the photograph's side over the longer side of the box that mefem.faces finds.
FACE_SCALE = 1.13
CARD = """---
license: cc-by-4.0
library_name: mefem
---
# mefem-starter

A small face encoder for first steps without a download: `mefem embed photographs/ -o embeddings.parquet`, or
`mefem.load_encoder("mefem-starter")`. **It is not the paper's encoder**, and no medical device. The paper's
encoders: `mefem info weights --fetch mefem-b`.

| | |
|---|---|
{facts}

## What it predicts

Probes on the frozen encoder's mean patch token: ridge regression, its penalty chosen on training people.
Gender, race and age as FairFace's annotators saw them: {seen:,} training photographs, {unseen:,} validation
ones. Body mass index: the {people:,} photographs of the VIP set, five folds.

| | {columns} |
|---|{lines}|
{scores}

Difference to the others with a 95 % interval over people (one training run):

| | untrained network | pixels |
|---|---|---|
{gaps}

## By group

Gender, accuracy on validation photographs, by the race that annotators saw:

| group | photographs | mefem-starter | untrained network | pixels |
|---|---|---|---|---|
{groups}

All groups and intervals: `figures/faces/who_it_works_for.md` of the repository.

## What it does not

{limits}

Body mass index: {bmi}.
Crops in training were tighter than the paper's: {scale} times the face's box. `mefem embed` takes such crops
for this encoder.
"""


def measured(run: Path, pack: Path, bmi: Path, work: Path) -> dict:
    """Scores of the three, paired differences, and gender by group."""
    import torch
    from recipe import TASKS, look, outcomes, photographs

    from mefem.metrics import paired_difference
    from mefem.models import create_encoder, load_encoder_file

    faces = photographs(pack, bmi, work)
    encoder, about = load_encoder_file(run / "encoder.safetensors")
    torch.manual_seed(0)
    fresh = create_encoder(about["architecture"], **json.loads(about["kwargs"]))
    networks = {"starter": encoder.eval(), "untrained": fresh.eval(), "pixels": None}
    paths = {name: work / f"starter-{name}.npz" for name in networks}
    scores = {name: look(network, faces, paths[name]) for name, network in networks.items()}
    gaps = {}
    for other in ("untrained", "pixels"):
        for task in (*TASKS, "bmi"):
            pair = [outcomes({0: paths[name]}, task, faces["bmi"]) for name in ("starter", other)]
            gap = paired_difference(*pair, "r2" if task == "bmi" else "accuracy")
            gaps.setdefault(task, {})[other] = [round(getattr(gap, x), 4) for x in ("value", "low", "high")]
    unseen = ~faces["train"][faces["panel"]]
    codes = {task: faces[task][faces["panel"]] for task in TASKS}
    scores["largest"] = {"bmi": 0.0}  # r2 of the mean
    for task, code in codes.items():
        largest = np.bincount(code[~unseen]).argmax()
        scores["largest"][task] = round(float((code[unseen] == largest).mean()), 4)
    hits = {name: np.load(path) for name, path in paths.items()}
    people = {axis: faces[f"{axis}_names"][codes[axis][unseen]] for axis in TASKS}
    found = {"scores": scores, "gaps": gaps, "groups": by_group(hits, people)}
    counts = {"seen": int((~unseen).sum()), "unseen": int(unseen.sum()), "people": len(faces["bmi"])}
    return found | {"counts": counts}


def seen_alone(faces: dict, work: Path) -> dict:
    """part of the picture -> its share of FairFace's crops, and task -> score with its 95 % interval.

    The rest is one colour, in training and test; "whole picture" is for comparison."""
    from recipe import TASKS, look, outcomes

    from mefem.fairness import REGIONS, box_of, face_regions, show_only
    from mefem.metrics import bootstrap_interval
    from mefem.models import load_encoder_file

    encoder = load_encoder_file(FOLDER / "encoder.safetensors")[0].float().eval()
    panel = faces["panel"]
    one = faces | {name: faces[name][panel] for name in ("images", "train", *TASKS)}
    one["panel"] = np.arange(len(panel))
    side, found = one["images"].shape[1], {}
    regions = {name: face_regions(side, box_of(one[name])) for name in ("images", "bmi_images")}
    fills = {name: one[name].mean((0, 1, 2)) for name in regions}
    for part in ("whole picture", *REGIONS):
        masks = {name: regions[name].get(part, np.ones((side, side), bool)) for name in regions}
        hidden = {name: show_only(one[name], mask, fills[name]) for name, mask in masks.items()}
        path = work / f"starter-{part.replace(' ', '-')}.npz"
        look(encoder, one | hidden, path)
        found[part] = {"share": round(float(masks["images"].mean()), 4)}
        for task in (*TASKS, "bmi"):
            frame = outcomes({0: path}, task, faces["bmi"])
            score = bootstrap_interval(frame, "r2" if task == "bmi" else "accuracy")
            found[part][task] = [round(x, 4) for x in (score.value, score.low, score.high)]
        print(part, found[part], flush=True)
    return found


def axes_of(people: dict) -> dict:
    """Group of each person by race, by gender, by both, and by age."""
    both = np.char.add(
        np.char.add(people["race"].astype(str), ", "), np.char.lower(people["gender"].astype(str))
    )
    return {"race": people["race"], "gender": people["gender"], "race and gender": both, "age": people["age"]}


def oldest_last(group: str) -> tuple:
    """A key by which age groups are in their order, and others by name."""
    number = re.match(r"(?:more than )?(\d+)", group)
    return (int(number[1]) if number else -1, group)


def by_group(hits: dict, people: dict) -> dict:
    """task -> axis -> group -> photographs and accuracies; low and high: 95 % interval (Wilson)."""
    from scipy.stats import binomtest

    found: dict = {}
    for task in hits["starter"].files:
        for axis, groups in axes_of(people).items() if task != "bmi" else ():
            rows = found.setdefault(task, {}).setdefault(axis, {})
            for group in sorted(np.unique(groups), key=oldest_last):
                mine = groups == group
                right, count = int(hits["starter"][task][mine].sum()), int(mine.sum())
                interval = binomtest(right, count).proportion_ci(method="wilson")
                rows[str(group)] = {"photographs": count, "right": right}
                rows[str(group)] |= {
                    name: round(float(hit[task][mine].mean()), 4) for name, hit in hits.items()
                }
                rows[str(group)] |= {"low": round(interval.low, 4), "high": round(interval.high, 4)}
    return found


def coverage(photographs: Path, lists: Path, count: int) -> dict:
    """axis -> group -> the first `count` photographs of val, and in how many `mefem embed` finds a face."""
    import csv

    from mefem.crop import Framing

    with (lists / "fairface_label_val.csv").open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if (photographs / row["file"]).is_file()][:count]
    how = Framing(scale=FACE_SCALE, size=112)
    seen = np.array([not how.of(photographs / row["file"])[0].problem for row in rows])
    people = {axis: np.array([row[axis] for row in rows]) for axis in ("race", "gender", "age")}
    return {
        axis: {
            str(group): {
                "photographs": int((groups == group).sum()),
                "found": int(seen[groups == group].sum()),
            }
            for group in sorted(np.unique(groups), key=oldest_last)
        }
        for axis, groups in axes_of(people).items()
    }


def described(gap: list[float]) -> str:
    """A difference and its interval."""
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*gap)


def card(found: dict, facts: dict) -> str:
    """README.md of the folder."""
    names = list(NAMES)
    rows = {task: [found["scores"][name][task] for name in names] for task in TITLES}
    gap = found["gaps"]["bmi"]["untrained"]
    above = "better than the untrained network" if gap[1] > 0 else "no better than the untrained network"
    return CARD.format(
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        columns=" | ".join(NAMES.values()),
        lines="|".join(["---"] * len(names)),
        scores="\n".join(
            f"| {TITLES[task]} | {' | '.join(f'{x:.3f}' for x in row)} |" for task, row in rows.items()
        ),
        gaps="\n".join(
            f"| {TITLES[task]} | {described(gaps['untrained'])} | {described(gaps['pixels'])} |"
            for task, gaps in found["gaps"].items()
        ),
        groups="\n".join(
            f"| {race} | {row['photographs']} | {' | '.join(f'{row[name]:.3f}' for name in names[:3])} |"
            for race, row in found["groups"]["gender"]["race"].items()
        ),
        limits=facts_limits(),
        bmi=f"{above} (r2 {rows['bmi'][0]:.3f})",
        scale=FACE_SCALE,
        **found["counts"],
    )


PAGE = """# Who mefem-starter works for

Real photographs: {unseen:,} validation photographs of FairFace. Race, gender and age are what annotators saw.
Ridge regression on the frozen encoder's mean patch token, trained on {seen:,} others
([card](../../mefem/starter/README.md)). In brackets 95 % intervals over people. Whether groups differ beyond
noise: a chi-squared test for each block, adjusted for all {tests} (false discovery rate).

**In short.** {short}

{blocks}
"""
READS = """## What it reads the answer from

The probe is trained and tested again on pictures of which one part is seen; the rest is one colour. Both sets
are framed tightly, so there is little hair, neck and background in them. A part's score says that the answer
can be read there; it does not say that the whole picture's answer comes from there.

| seen | of the picture | gender | race | age | BMI r2 |
|---|---|---|---|---|---|
{table}

{said}
"""
BLOCKS = {"gender": "Gender", "race": "Race (7 groups)", "age": "Age (9 groups)"}


def gap_of(rows: dict, count: str, right: str) -> float:
    """p of a chi-squared test that the share `right` of `count` is the same in all groups."""
    from scipy.stats import chi2_contingency

    table = np.array([(row[right], row[count] - row[right]) for row in rows.values()])
    return float(chi2_contingency(table).pvalue) if table.sum(0).all() else 1.0


def noise(p: float) -> str:
    """The verdict of a test."""
    return "beyond noise" if p < 0.05 else "within noise"


def shown(p: float) -> str:
    """The p of a test, in brackets."""
    return f"(p = {p:.2g})" if p >= 0.001 else "(p < 0.001)"


def regions_block(found: dict) -> list[str]:
    """What remains when one part of the picture is seen, as lines of Markdown."""
    rows, largest = found["regions"], found["scores"]["largest"]
    table = [
        f"| {part} | {row['share']:.0%} | "
        + " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*row[task]) for task in TITLES)
        + " |"
        for part, row in rows.items()
    ]
    above = {
        part: [task for task in TITLES if row[task][1] > largest[task]]
        for part, row in rows.items()
        if part != "whole picture"
    }
    said = [
        f"{part[0].upper()}{part[1:]} alone: above the largest group (BMI: the mean) beyond noise in "
        f"{', '.join(name if name != 'bmi' else 'BMI' for name in tasks) or 'nothing'}."
        for part, tasks in above.items()
    ]
    text = READS.format(table="\n".join(table), said="\n".join(f"- {line}" for line in said))
    return text.splitlines()


def page(found: dict) -> str:
    """figures/faces/who_it_works_for.md."""
    from scipy.stats import false_discovery_control

    blocks = {(task, axis): rows for task, axes in found["groups"].items() for axis, rows in axes.items()}
    tests = [gap_of(rows, "photographs", "right") for rows in blocks.values()]
    tests += [gap_of(rows, "photographs", "found") for rows in found.get("coverage", {}).values()]
    adjusted, lines, short = false_discovery_control(tests), [], []
    for ((task, axis), rows), p in zip(blocks.items(), adjusted[: len(blocks)], strict=True):
        best = max(rows, key=lambda group: rows[group]["starter"])
        worst = min(rows, key=lambda group: rows[group]["starter"])
        word = noise(p)
        lines += [f"## {BLOCKS[task]}, by {axis}", ""]
        lines += [
            "| group | photographs | mefem-starter | untrained network | pixels |",
            "|---|---|---|---|---|",
        ]
        for group, row in rows.items():
            mine = f"{row['starter']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(
                f"| {group} | {row['photographs']} | {mine} | {row['untrained']:.3f} | {row['pixels']:.3f} |"
            )
        gap = f"best for *{best}*, worst for *{worst}*: {word} {shown(p)}"
        lines += ["", gap[0].upper() + gap[1:] + ".", ""]
        if axis == "race and gender":
            low, high = rows[worst]["starter"], rows[best]["starter"]
            short.append(
                f"{BLOCKS[task]} is right for {high:.0%} of *{best}* and {low:.0%} of *{worst}*: {word}."
            )
    for (axis, rows), p in zip(found.get("coverage", {}).items(), adjusted[len(blocks) :], strict=True):
        lines += [f"## A face is found, by {axis}", "", "| group | photographs | found |", "|---|---|---|"]
        lines += [
            f"| {g} | {r['photographs']} | {r['found'] / r['photographs']:.3f} |" for g, r in rows.items()
        ]
        lines += ["", f"Groups differ {noise(p)} {shown(p)}.", ""]
    lines += regions_block(found) if "regions" in found else []
    text = PAGE.format(tests=len(tests), short=" ".join(short), blocks="\n".join(lines), **found["counts"])
    return text.rstrip("\n") + "\n"


def facts_limits() -> str:
    """The sentences that every card of this package has."""
    from mefem.export import _LIMITS

    return _LIMITS


def record_of(run: Path, commit: str) -> dict:
    """run.json of the package's encoder, from what the run says of itself."""
    from mefem.encoders import STARTER

    about = json.loads((run / "pretrain.json").read_text())
    kept = ("hardware", "torch", "finished", "training_seconds")
    return {
        "run": STARTER,
        "commit": commit,
        "settings": about["settings"] | {"steps": about["steps"]},
        "planned_steps": about["settings"]["steps"],
        "pictures": about["pictures_seen"],
        "photographs": "the first 40,000 training photographs of FairFace with padding 0.25 (CC BY 4.0)",
        "framing": f"FairFace's own, about {FACE_SCALE} times the face's box",
        **{key: about[key] for key in kept},
    }


def write_encoder(run: Path, commit: str, out: Path) -> None:
    """encoder.safetensors in half precision, and run.json."""
    from mefem.files import write_json
    from mefem.models import load_encoder_file, save_encoder

    record = record_of(run, commit)
    encoder, header = load_encoder_file(run / "encoder.safetensors")
    about = {"run": record["run"], "step": header["step"], "face_scale": FACE_SCALE, "licence": "CC BY 4.0"}
    kwargs = json.loads(header["kwargs"])
    save_encoder(out / "encoder.safetensors", encoder.half(), header["architecture"], kwargs, **about)
    write_json(out / "run.json", record)


def facts_of(folder: Path) -> dict:
    """The card's first table, from the folder's encoder and run.json."""
    from mefem.export import card_facts, plain_vit, run_record

    record = run_record(folder)
    settings = record["settings"]
    facts = card_facts(plain_vit(str(folder)), folder, record)
    del facts["written by"]  # the card is the same in every version
    end = "as planned" if record["finished"] else f"cut off; {record['planned_steps']:,} steps were planned"
    return facts | {
        "made from": f"commit {record['commit']}",
        "method": f"`{settings['method']}` (now `views`), beyond the paper",
        "its options": json.dumps(settings["method_options"]),
        "trained on": f"{record['hardware']['gpu']}, {record['training_seconds']:.0f} s",
        "PyTorch": record["torch"],
        "schedule": end,
        "licence": "CC BY 4.0, as FairFace",
        "made by": "`tools/gpu_faces.py recipes`, then `benchmarks/starter.py` (see benchmarks/README.md)",
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="without it only the card is written again")
    parser.add_argument("--regions", action="store_true", help="measure what each part of the picture says")
    parser.add_argument("--photographs", type=Path, help="FairFace's folder, for the share of faces found")
    parser.add_argument("--lists", type=Path, help="the folder with the authors' two lists")
    parser.add_argument("--commit", default="not recorded", help="of the code that made the run")
    parser.add_argument("--pack", type=Path, default=ROOT / "data" / "gpu")
    parser.add_argument("--bmi", type=Path, default=ROOT / "data" / "raw" / "bmi" / "vip")
    parser.add_argument("--work", type=Path, default=ROOT / "data" / "recipe")
    arguments = parser.parse_args()
    if arguments.run:
        found = measured(arguments.run, arguments.pack, arguments.bmi, arguments.work)
        if arguments.photographs:
            where = (arguments.photographs, arguments.lists, found["counts"]["unseen"])
            found["coverage"] = coverage(*where)
        FOUND.write_text(json.dumps(found, indent=1) + "\n")
        write_encoder(arguments.run, arguments.commit, FOLDER)
    if arguments.regions:
        from recipe import photographs

        faces = photographs(arguments.pack, arguments.bmi, arguments.work)
        found = json.loads(FOUND.read_text()) | {"regions": seen_alone(faces, arguments.work)}
        FOUND.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(FOUND.read_text())
    (FOLDER / "README.md").write_text(card(found, facts_of(FOLDER)), encoding="utf-8")
    (FOUND.parent / "who_it_works_for.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
