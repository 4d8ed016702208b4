"""Table 2 as a whole: every row of the paper, states, marks by the paired bootstrap, stable bytes."""

import csv
import json
import re
import subprocess

import numpy as np
import pandas as pd
import pytest

from mefem.evaluation import evaluate, evaluate_encoder, write_result
from mefem.features import FEATURE_SETS
from mefem.figures import figure_learning, figure_maskings, figure_weights
from mefem.files import write_json
from mefem.metrics import paired_difference
from mefem.probing import ProbeResult
from mefem.provenance import provenance, size_of
from mefem.report import (
    LEARNED,
    LEARNED_ROWS,
    TABLE2,
    TABLE2_ROWS,
    TABLE3,
    TABLE3_ROWS,
    cells_json,
    results_table,
    with_encoders,
    write_table,
)
from mefem.tables import About, scale_of, tex

PAPER = """
Franca	Large	Patches + CLS	0.425	3.744	0.904	0.538	0.529
FaRL	Base	Patches	0.380	3.924	0.891	0.488	0.478
FaRL	Base	CLS	0.445	3.604	0.904	0.563	0.574
Buffalo	Small*	CLS	0.477	3.578	0.888	0.498	0.522
MeFEm	Base	Patches	0.506	3.453	0.910	0.572	0.575
MeFEm	Base	CLS	0.488	3.479	0.907	0.550	0.560
MeFEm	Base	Patches + CLS	0.496	3.495	0.910	0.570	0.576
"""


PAPER3 = """
MeFEm|Base|Patches|0.233|0.948|0.089|0.47|-0.060|0.621|0.136|10.8|-0.060|7.15|0.073|0.8
MeFEm|Base|CLS|0.263|0.952|0.076|0.49|-0.084|0.640|0.058|11.8|-0.090|7.20|-0.557|1.3
MeFEm|Base|Patches + CLS|0.234|0.959|0.055|0.48|-0.015|0.623|0.115|11.2|-0.054|7.14|0.081|0.8
Baseline|—|Video superpixels|—|—|—|0.41|—|0.60|—|12.8|—|8.39|—|0.9
"""


def printed(row):
    return [row.labels[field] for field in ("model", "size", "features")]


def test_the_papers_numbers():
    third = [[*printed(r), *(v or "—" for v in r.paper)] for r in TABLE3_ROWS if r.paper]
    assert third == [line.split("|") for line in PAPER3.strip().splitlines()]
    found = [[*printed(r), *(f"{v:.3f}" for v in r.paper)] for r in TABLE2_ROWS if r.paper]
    assert found == [line.split("\t") for line in PAPER.strip().splitlines()]
    assert {(r.source, r.feature_set) for r in TABLE2_ROWS if not r.paper} == {
        ("random", "cls"),
        ("random", "patches"),
        ("random", "patches+cls"),
        ("pixels", "cls"),
    }


def results(root, noise):
    """Results of made-up predictions: encoder -> noise of its predictions."""
    rng = np.random.default_rng(0)
    n = 120
    bmi, age = 26 + 5 * rng.standard_normal(n), rng.integers(0, 9, n)
    for encoder, amount in noise.items():
        for feature_set in FEATURE_SETS if encoder != "pixels" else ("cls",):
            r = np.random.default_rng(len(encoder))
            base = {
                "key": np.arange(n).astype(str),
                "person": (np.arange(n) // 2).astype(str),
                "fold": "fold 0",
                "seed": 0,
            }
            info = {
                "state": "present",
                "feature_set": feature_set,
                "encoder": encoder,
                "features": {"simulated": True},
            }
            write_result(
                root / encoder,
                ProbeResult(
                    pd.DataFrame(base | {"target": bmi, "prediction": bmi + amount * r.standard_normal(n)}),
                    info | {"task": "bmi"},
                ),
                200,
            )
            write_result(
                root / encoder,
                ProbeResult(
                    pd.DataFrame(
                        base
                        | {
                            "target": age,
                            "prediction": np.where(r.random(n) < 0.2 * amount, 0, age),
                            "group": np.where(np.arange(n) % 3, "non-White", "White"),
                        }
                    ),
                    info | {"task": "fairface-age"},
                ),
                200,
            )
    for feature_set in FEATURE_SETS:
        write_json(root / "mefem" / f"celeba.{feature_set}.json", {"state": "data absent", "values": {}})
    for encoder in ("farl", "franca", "buffalo"):
        for task in ("bmi", "fairface-age"):
            for feature_set in FEATURE_SETS:
                write_json(
                    root / encoder / f"{task}.{feature_set}.json", {"state": "weights absent", "values": {}}
                )
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = results(tmp_path_factory.mktemp("results"), {"mefem": 1.0, "random": 3.0, "pixels": 1.0})
    about = About("demo", "width 128, depth 4", "1,600 simulated photographs", size_of(370_000))
    text = write_table(TABLE2, root, root / "figures", about, 300)
    return root, text


def test_every_cell_has_a_value_or_a_reason(run):
    root, _ = run
    rows = list(csv.DictReader((root / "figures" / "table2.csv").open()))
    assert len(rows) == len(TABLE2_ROWS) * len(TABLE2.columns)
    for row in rows:
        if row["column"] == "CelebA accuracy":
            assert row["state"] == ("data absent" if row["model"] == "MeFEm" else "no result")
        elif row["model"] in ("FaRL", "Franca", "Buffalo"):
            assert row["state"] == "weights absent"
        else:
            assert row["state"] == "present" and float(row["low"]) <= float(row["value"]) <= float(
                row["high"]
            )
        assert (row["state"] == "present") == bool(row["value"])


def test_numbers_can_be_traced(run):
    root, _ = run
    for row in csv.DictReader((root / "figures" / "table2.csv").open()):
        if row["state"] == "present":
            found = json.loads((root / row["file"]).read_text())
            metric = next(c.metric for c in TABLE2.columns if c.name == row["column"])
            assert float(row["value"]) == pytest.approx(found["values"][metric]["value"], rel=1e-5)
            assert (
                int(row["n"]) == found["values"][metric]["n"]
                and (root / row["file"]).with_name(found["predictions"]).is_file()
            )


def test_marks_follow_the_paired_bootstrap(run):
    root, _ = run
    cells, pairs = results_table(root, TABLE2, replicates=300)
    cells = cells.set_index(["row", "column"])
    ours, chance, pixels = (
        pd.read_parquet(root / e / "bmi.cls.parquet") for e in ("mefem", "random", "pixels")
    )
    for column, metric in (("BMI r2", "r2"), ("BMI MAE", "mae")):
        cell = cells.loc[("MeFEm / CLS", column)]
        assert cell.beats_random is True and paired_difference(ours, chance, metric, 300).better
        assert cell.beats_pixels is paired_difference(ours, pixels, metric, 300).better
    assert cells.loc[("MeFEm / CLS", "BMI r2")].beats_pixels is False  # same noise, so no mark
    assert pd.isna(cells.loc[("Random encoder / CLS", "BMI r2")].beats_random)


def test_an_encoder_of_ones_own_has_rows_marks_and_pairs(tmp_path):
    root = results(tmp_path, {"mefem": 1.0, "mine": 0.5, "random": 3.0, "pixels": 1.0})
    table = with_encoders(TABLE2, ["mefem", "random", "pixels", "farl", "mine"])
    assert [r.name for r in table.rows[len(TABLE2_ROWS) :]] == [
        "mine / Patches",
        "mine / CLS",
        "mine / Patches + CLS",
    ]
    write_table(TABLE2, root, root / "figures", About("demo"), 200, ["mefem", "mine"])
    rows = json.loads((root / "figures" / "table2_cells.json").read_text())["rows"]
    mine, ours = (rows[f"{name} / CLS"]["BMI MAE"] for name in ("mine", "MeFEm"))
    assert mine["random"]["verdict"] == mine["pixels"]["verdict"] == "beats" and ours["value"] > mine["value"]
    assert with_encoders(LEARNED, ["mine"]).rows[-1].feature_set == "patches.linear"
    for unchanged in (TABLE2, TABLE3, LEARNED):  # the baselines of Table 2 are no rows of the others
        assert with_encoders(unchanged, ["mefem", "random", "pixels", "farl", "buffalo"]) == unchanged


def test_every_pair_is_compared_and_the_best_is_found(run):
    root, _ = run
    cells, pairs = results_table(root, TABLE2, replicates=300)
    frames = {
        r.name: pd.read_parquet(root / r.source / f"bmi.{r.feature_set}.parquet")
        for r in TABLE2_ROWS
        if r.source in ("mefem", "random", "pixels")
    }
    found = pairs[pairs.column == "BMI MAE"]
    assert len(found) == len(frames) * (len(frames) - 1) // 2
    for pair in found.itertuples():
        gap = paired_difference(frames[pair.first], frames[pair.second], "mae", 300)
        assert (pair.difference, pair.low, pair.high) == (gap.value, gap.low, gap.high)
        assert pair.better == ("" if not gap.beyond_noise else pair.first if gap.better else pair.second)
    column = cells[(cells.column == "BMI MAE") & (cells.state == "present")].set_index("row")
    best = column.value.astype(float).idxmin()  # of an error, the least is the best
    assert column.best[best] is True and column.best.astype(bool).sum() == 1
    for row in column.index.drop(best):
        gap = paired_difference(frames[row], frames[best], "mae", 300)
        assert column.near_best[row] == (not gap.beyond_noise)
    written = pd.read_csv(root / "figures" / "table2_pairs.csv")
    assert len(written) == len(pairs) and list(written.better.fillna("")) == list(pairs.better)


def test_markdown_names_the_scale_and_lines_up(run):
    _, text = run
    head, body = text.split("\n\n")[:2]
    for part in (
        "profile demo",
        "120 photographs of 60 simulated people",
        "width 128",
        "1,600 simulated photographs",
        "not comparable with the paper",
    ):
        assert part in head
    lines = body.splitlines()
    assert (
        len(lines) == 2 + len(TABLE2_ROWS)
        and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    )
    assert lines[0].count("paper") == len(TABLE2.columns)
    farl = next(line for line in lines if "FaRL" in line)
    assert farl.count("not run: weights absent") == 4 and "not run: no result" in farl and "0.380" in farl
    assert next(line for line in lines if "MeFEm" in line).count("not run: data absent") == 1
    assert (
        "not distinguishable from the best" in text
        and "is indistinguishable from always predicting the mean" in text
    )
    assert re.search(r"MeFEm .*\] a", body) and "most frequent answer" in text and body.count("**") == 2 * 4


def test_the_size_is_the_one_that_ran_and_the_papers_stands_at_its_numbers(run):
    root, text = run
    rows = {
        line.split("|")[1].strip() + line.split("|")[3].strip(): line
        for line in text.splitlines()
        if line.startswith("|")
    }
    ours, absent = rows["MeFEmPatches"], rows["FaRLPatches"]
    assert (
        ours.split("|")[2].strip() == "0.37 M"
        and ours.count("(Base)") == len(TABLE2.columns)
        and "0.506 (Base)" in ours
    )
    assert absent.split("|")[2].strip() == "Base" and "(Base)" not in absent
    latex = (root / "figures" / "table2.tex").read_text()
    assert (
        r"MeFEm & 0.37 M & Patches &" in latex
        and "0.506 (Base)" in latex
        and "FaRL & Base & Patches" in latex
    )
    cells = pd.read_csv(root / "figures" / "table2.csv").set_index("row")
    assert set(cells.loc["MeFEm / CLS", "size"]) == {"0.37 M"} and set(
        cells.loc["MeFEm / CLS", "paper_size"]
    ) == {"Base"}
    assert size_of(22_000_000) == "22 M" and size_of(5_700_000) == "5.7 M" and size_of(48_000) == "0.048 M"
    nothing, _ = results_table(
        root / "nowhere", TABLE2, size="0.37 M"
    )  # a row that was not run keeps the paper's
    assert set(nothing[nothing.model == "MeFEm"]["size"]) == {"Base"}


def test_cells_and_verdicts_for_prose(run):
    root, _ = run
    rows = json.loads((root / "figures" / "table2_cells.json").read_text())["rows"]
    _, pairs = results_table(root, TABLE2, replicates=300)
    ours = rows["MeFEm / CLS"]["BMI MAE"]
    assert (
        ours["random"]["verdict"] == "beats"
        and ours["random"]["row"] == "Random encoder / CLS"
        and ours["random"]["difference"] < 0
    )
    assert ours["pixels"]["verdict"] == "inconclusive" and (
        ours["n"],
        ours["persons"],
        ours["simulated"],
    ) == (120, 60, True)
    pair = pairs[
        (pairs.column == "BMI MAE")
        & (pairs["first"] == "MeFEm / CLS")
        & (pairs["second"] == "Random encoder / CLS")
    ].iloc[0]
    assert (
        ours["random"]["low"] == pytest.approx(pair.low, abs=1e-6)
        and ours["low"] <= ours["value"] <= ours["high"]
    )
    assert "random" not in rows["Random encoder / CLS"]["BMI MAE"] and rows["FaRL / CLS"]["BMI MAE"] == {
        "state": "weights absent",
        "size": "Base",
    }
    turned = pairs.rename(
        columns={"first": "second", "second": "first"}
    ).assign(  # the pair stands the other way round: signs turn
        difference=-pairs.difference, low=-pairs.high, high=-pairs.low
    )
    cells, _ = results_table(root, TABLE2, replicates=300)
    assert cells_json(cells, turned) == cells_json(cells, pairs)
    losing = pairs.assign(better=pairs["second"])
    assert cells_json(cells, losing)["MeFEm / CLS"]["BMI MAE"]["random"]["verdict"] == "loses"


def test_real_people_are_called_real():
    cells = pd.DataFrame(
        {"state": ["present"], "column": ["BMI r2"], "n": [10], "persons": [5], "simulated": [False]}
    )
    assert "10 photographs of 5 real people" in scale_of(
        cells, About("paper")
    ) and "Simulated" not in scale_of(cells, About("paper"))
    assert "nothing has been run" in scale_of(cells.assign(state="data absent"), About("paper"))


def test_latex(run):
    root, _ = run
    text = (root / "figures" / "table2.tex").read_text()
    assert text.count(r"\textbf{0.") + text.count(r"\textbf{1.") == 4 and text.count(r"\begin{tabular}") == 1
    for part in (
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"\cmidrule(lr){4-7}",
        r"\multicolumn{4}{c}{BMI dataset}",
    ):
        assert part in text
    rows = [
        line
        for line in text.splitlines()
        if line.endswith(r"\\") and "&" in line and "multicolumn" not in line
    ]
    assert {line.count("&") - line.count(r"\&") for line in rows} == {2 + 2 * len(TABLE2.columns)}
    assert text.count("{") == text.count("}") and text.isascii()
    assert re.search(r"\\midrule\nRandom encoder", text)
    assert tex("a_b 50 % & r²") == r"a\_b 50 \% \& r$^2$"


def test_table3_from_probe_to_paper(tmp_path):
    """Six values by three encoders; two blocks of columns, the baseline quoted, absent data named."""
    rng = np.random.default_rng(0)
    n = 60
    labels = pd.DataFrame({"key": np.arange(n).astype(str), "person": (np.arange(n) // 2).astype(str)})
    for column in ("hemoglobin", "glycated_hemoglobin", "cholesterol", "upper_ap", "lower_ap"):
        labels[column] = 5 + rng.standard_normal(n)
    labels["saturation"] = 98.0  # nothing to regress
    tokens = rng.standard_normal((n, 5, 8)).astype(np.float16)
    tokens[:, :, 0] += (labels.hemoglobin - 5).to_numpy(np.float16)[:, None] * 2
    for name in ("mefem", "random"):
        (tmp_path / name).mkdir()
        np.save(
            tmp_path / name / "mcd-rppg.npy",
            tokens if name == "mefem" else rng.standard_normal(tokens.shape).astype(np.float16),
        )
        labels.to_parquet(tmp_path / name / "mcd-rppg.parquet")
        write_json(
            tmp_path / name / "mcd-rppg.json",
            {
                "state": "present",
                "n": n,
                "has_cls": True,
                "tokens": 5,
                "heads": 2,
                "encoder": name,
                "simulated": True,
            },
        )
    (tmp_path / "pixels").mkdir()
    write_json(
        tmp_path / "pixels" / "mcd-rppg.json", {"state": "data absent", "reason": "not there", "tokens": 1}
    )
    tasks = tuple(dict.fromkeys(column.task for column in TABLE3.columns))
    evaluate(
        {name: (tmp_path / name, tmp_path / "r" / name) for name in ("mefem", "random", "pixels")},
        tasks,
        linear=False,
        jobs=1,
        folds=2,
        epochs=40,
        lrs=(1e-2,),
        weight_decays=(0.1,),
        validation=0.2,
        bootstrap=100,
        progress=False,
    )
    text = write_table(TABLE3, tmp_path / "r", tmp_path / "figures", About("demo"), 100)
    blocks = [block for block in text.split("\n\n") if block.startswith("| Model")]
    assert len(blocks) == 2 and all(len(block.splitlines()) == 2 + len(TABLE3_ROWS) for block in blocks)
    assert "Haemoglobin (mmol/l) r²" in blocks[0] and "Saturation (%) MAE" in blocks[1]
    baseline = next(line for line in blocks[1].splitlines() if "Baseline" in line)
    assert [c.strip() for c in baseline.split("|")[1:-1]] == [
        "Baseline",
        "—",
        "Video superpixels",
        *["", "", "", "12.8", "", "", "", "8.39", "", "", "", "0.9"],
    ]
    cells = pd.read_csv(tmp_path / "figures" / "table3.csv").set_index(["row", "column"])
    cell = cells.loc[("MeFEm / Patches", "Haemoglobin (mmol/l) r2")]
    assert cell.state == "present" and cell.beats_random == True and cell.paper == 0.233  # noqa: E712
    assert cells.loc[("MeFEm / CLS", "Saturation (%) r2")].state == "too few labels"
    assert cells.loc[("PCA of pixels / Components", "Saturation (%) r2")].state == "data absent"
    assert cells.loc[("Baseline / Video superpixels", "Saturation (%) r2")].state == "as published"
    assert "60 photographs of 30 simulated people" in text and "whole video, as reported" in text
    latex = (tmp_path / "figures" / "table3.tex").read_text()
    assert latex.count(r"\begin{tabular}") == 2 and latex.count("{") == latex.count("}")


def test_what_pretraining_adds_by_two_heads(tmp_path):
    """MeFEm's tokens hold the value in their mean, the random encoder's hold nothing; no paper."""
    rng, n = np.random.default_rng(0), 60
    labels = pd.DataFrame(
        {
            "key": np.arange(n).astype(str),
            "person": (np.arange(n) // 2).astype(str),
            "bmi": 26 + 5 * rng.standard_normal(n),
            "age": 40 + 9 * rng.standard_normal(n),
        }
    )
    for name, tokens in (("mefem", 5), ("random", 5), ("pixels", 1)):
        found = rng.standard_normal((n, tokens, 8)).astype(np.float16)
        if name == "mefem":
            found[:, :, 0] += ((labels.bmi - 26) / 2).to_numpy(np.float16)[:, None]
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "bmi.npy", found)
        labels.to_parquet(tmp_path / name / "bmi.parquet")
        write_json(
            tmp_path / name / "bmi.json",
            {
                "state": "present",
                "n": n,
                "has_cls": True,
                "tokens": tokens,
                "heads": 2,
                "encoder": name,
                "simulated": True,
            },
        )
    evaluate(
        {name: (tmp_path / name, tmp_path / "r" / name) for name in ("mefem", "random", "pixels")},
        ("bmi", "bmi-age"),
        jobs=1,
        folds=2,
        epochs=40,
        lrs=(1e-2,),
        weight_decays=(0.1,),
        validation=0.2,
        bootstrap=100,
        progress=False,
    )
    text = write_table(LEARNED, tmp_path / "r", tmp_path / "figures", About("demo"), 100)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [c.strip() for c in lines[0].split("|")[1:-1]] == [
        "Model",
        "Features",
        "BMI r²",
        "BMI MAE",
        "Age (years) r²",
        "Age (years) MAE",
    ]
    assert (
        len(lines) == 2 + len(LEARNED_ROWS)
        and "not run" not in text
        and "no result" not in text
        and "aper' columns" not in text
    )
    cells = pd.read_csv(tmp_path / "figures" / "learned.csv").set_index(["row", "column"])
    cell = cells.loc[("MeFEm / Linear probe", "BMI r2")]
    assert cell.beats_random == True and cell.beats_pixels == True and cell.value > 0.1  # noqa: E712
    assert cells.loc[
        ("MeFEm / Linear probe", "Age (years) r2")
    ].value < 0.1 and cells.file.nunique() == 2 * len(LEARNED_ROWS)
    latex = (tmp_path / "figures" / "learned.tex").read_text()
    rows = [
        line
        for line in latex.splitlines()
        if line.startswith(("MeFEm &", "Random encoder &", "PCA of pixels &"))
    ]
    assert (
        len(rows) == len(LEARNED_ROWS) and {line.count("&") for line in rows} == {5} and r"{llllll}" in latex
    )


def test_equal_results_give_equal_bytes(run, tmp_path):
    root, _ = run
    for folder in ("a", "b"):
        write_table(TABLE2, root, tmp_path / folder, About("demo"), 300)
        figure_maskings(tmp_path / folder / "figure2.png")
        figure_weights(tmp_path / folder / "figure3.png")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert b"matplotlib" not in (tmp_path / "a" / "figure2.png").read_bytes().lower()


def test_evaluate_encoder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "f").mkdir()
    n = 60
    np.save(tmp_path / "f" / "bmi.npy", rng.standard_normal((n, 5, 8)).astype(np.float16))
    pd.DataFrame(
        {
            "key": np.arange(n).astype(str),
            "person": (np.arange(n) // 2).astype(str),
            "bmi": 26 + rng.standard_normal(n),
        }
    ).to_parquet(tmp_path / "f" / "bmi.parquet")
    write_json(
        tmp_path / "f" / "bmi.json",
        {
            "state": "present",
            "n": n,
            "has_cls": True,
            "tokens": 5,
            "heads": 2,
            "encoder": "e",
            "simulated": True,
        },
    )
    write_json(tmp_path / "f" / "fairface.json", {"state": "data absent", "reason": "not there"})
    settings = dict(
        folds=2,
        epochs=2,
        batch=32,
        lrs=(1e-3,),
        weight_decays=(0.1,),
        scalings=("whiten",),
        validation=0.2,
        hidden=4,
        heads=2,
    )
    frame = evaluate_encoder(
        tmp_path / "f", tmp_path / "r", bootstrap=100, seed=3, progress=False, **settings
    )
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        f"{t}.{s}.json" for t in ("bmi", "fairface-age") for s in FEATURE_SETS
    } | {f"bmi.{s}.parquet" for s in FEATURE_SETS}
    found = json.loads((tmp_path / "r" / "bmi.patches.json").read_text())
    assert found["state"] == "present" and found["seeds"] == [3] and found["recipe"]["epochs"] == 2
    assert len(found["splits"]) == 2 and found["splits"][0]["chosen"] == 0 and found["head"] == "attentive"
    assert json.loads((tmp_path / "r" / "fairface-age.cls.json").read_text())["state"] == "data absent"
    assert len(frame[frame.task == "bmi"]) == 6
    write_json(tmp_path / "f" / "bmi.json", {"state": "weights absent", "reason": "gone"})
    evaluate_encoder(tmp_path / "f", tmp_path / "r", bootstrap=100, progress=False, **settings)
    assert not list((tmp_path / "r").glob("*.parquet"))  # no stale predictions beside an absent result


def test_learning_curve(tmp_path):
    (tmp_path / "log.csv").write_text("step,loss,lr\n1,0.5,\n2,0.4,1e-3\n3,0.3,1e-3\n")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    for name in ("log.csv", "log.jsonl"):
        assert figure_learning(tmp_path / name, tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "empty.csv").write_text("step,loss\n")
    with pytest.raises(ValueError, match="empty.csv"):
        figure_learning(tmp_path / "empty.csv", tmp_path / "f.png")
    with pytest.raises(ValueError, match="'step'|none of the columns"):
        figure_learning(tmp_path / "log.csv", tmp_path / "f.png", columns=("accuracy",))


def test_provenance(root):
    stamp = provenance(root, {"a": 1}, seed=4, started=0.0)
    assert stamp["seed"] == 4 and len(stamp["settings"]) == 12 and stamp["hardware"]["cores"] >= 1
    assert stamp["versions"]["torch"].count(".") == 2 and json.dumps(stamp)


def test_provenance_tells_changed_sources_from_what_a_run_writes(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    (tmp_path / "figures").mkdir()
    figure, lock, page, params = files = [
        tmp_path / name for name in ("figures/table2.md", "dvc.lock", "README.md", "params.yaml")
    ]
    for file in files:
        file.write_text("as committed")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    assert provenance(tmp_path)["commit"] and not provenance(tmp_path)["changed"]
    figure.unlink()
    lock.write_text("made anew")
    page.write_text("made anew")
    assert not provenance(tmp_path / "figures")["changed"]
    params.write_text("other settings")
    assert provenance(tmp_path / "figures")["changed"]
