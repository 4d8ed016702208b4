"""README.md is what its template makes of figures/: numbers are read, and verdicts choose the sentences."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from mefem.cli import app
from mefem.files import write_json
from mefem.readme import FILES, readme_text, write_readme


@pytest.fixture
def template(root) -> str:
    return (root / "nbs" / "README.md.jinja").read_text(encoding="utf-8")


def result(verdict="beats", state="present", value=0.5) -> dict:
    """One cell of ours with its comparisons, or one that was not run."""
    if state != "present":
        return {"state": state, "size": "Base"}
    pair = {"verdict": verdict, "difference": 0.123456, "low": -0.05, "high": 0.2}
    return {
        "state": state,
        "size": "9 M",
        "value": value,
        "low": 0.4,
        "high": 0.6,
        "n": 1234,
        "persons": 567,
        "simulated": False,
        "random": pair | {"row": "Random encoder / Patches"},
        "pixels": pair | {"row": "PCA of pixels / Components"},
    }


def results(folder, verdict="beats", state="present", value=0.5, **about):
    """A folder of figures with made-up results; `about` goes into the provenance."""
    ours = {
        column: result(verdict, state, value)
        for column in ("BMI r2", "BMI MAE", "Age (years) r2", "Age (years) MAE")
    }
    others = {
        column: {key: cell[key] for key in cell if key not in ("random", "pixels")}
        | ({"value": 0.321} if state == "present" else {})
        for column, cell in ours.items()
    }
    write_json(
        folder / FILES["learned"],
        {
            "profile": "p",
            "scale": "s",
            "rows": {
                "MeFEm / Patches": ours,
                "MeFEm / Linear probe": ours,
                "Random encoder / Patches": others,
                "PCA of pixels / Components": others,
            },
        },
    )
    pretraining = {"photographs": 4321, "steps": 765, "batch": 8, "parameters": 98_765, "seeds": [0]}
    write_json(
        folder / FILES["provenance"],
        {
            "profile": "demo",
            "scale": "some people",
            "pretraining": pretraining,
            "hardware": {"cpu": "Abacus 3", "cores": 7, "gpu": None},
        }
        | about,
    )
    return folder


def test_the_page_is_what_the_template_makes_of_figures(root, template):
    assert (root / "README.md").read_text(encoding="utf-8") == readme_text(template, root / "figures"), (
        "README.md is not made from nbs/README.md.jinja and figures/ as they are: run `make readme`"
    )


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("beats", "MeFEm predicts {} better than {}, beyond noise"),
        ("loses", "MeFEm predicts {} worse than {}, beyond noise"),
        ("inconclusive", "it is inconclusive whether MeFEm predicts {} better than {}"),
    ],
)
def test_the_verdict_chooses_the_sentence(tmp_path, template, verdict, said):
    text = readme_text(template, results(tmp_path, verdict))
    for target in ("body mass index", "age"):
        for rival in ("the untrained encoder", "a PCA of pixels"):
            assert (
                text.count(
                    f"- In this one run {said.format(target, rival)}: "
                    "r² 0.500 against 0.321, difference 0.12 [-0.05, 0.2]."
                )
                == 2
            )
    assert (
        text.count("In this one run") == 8 and "Over " not in text
    )  # two heads, two targets, two rivals, and no other claim
    for other in {
        "beats": ("worse than", "inconclusive whether"),
        "loses": ("better than", "inconclusive whether"),
        "inconclusive": ("beyond noise",),
    }[verdict]:
        assert other not in text


def test_real_faces_are_marked_and_told_by_their_verdicts(tmp_path, template):
    def cell(value, **verdicts):
        pairs = {rival: {"verdict": verdict} for rival, verdict in verdicts.items()}
        return {"state": "present", "value": value, "majority": 0.51} | pairs

    gender, race = "Gender accuracy", "Race accuracy"
    ours = {
        gender: cell(0.7, random="beats", pixels="loses"),
        race: cell(0.4, random="beats", pixels="beats"),
    }
    rows = {
        "MeFEm / Linear probe": ours,
        "starter / Patches": {gender: cell(0.8, random="inconclusive")},
        "Random encoder / Linear probe": {gender: cell(0.6), race: {"state": "data absent"}},
    }
    write_json(tmp_path / FILES["faces"], {"rows": rows})
    pretraining = {"photographs": 4321, "steps": 765, "batch": 8, "seconds": 61, "seeds": [0]}
    about = {"profile": "faces", "pretraining": pretraining}
    write_json(tmp_path / FILES["faces_provenance"], about)
    write_json(tmp_path / FILES["faces_page"], {"stages": {"probe": 70.0, "table4": 30.0}})
    text = readme_text(template, results(tmp_path))
    assert "| MeFEm, linear probe | 0.700 <sup>a</sup> | 0.400 <sup>ab</sup> | — | — | — |" in text
    assert "| untrained encoder, linear probe | 0.600 | — |" in text
    assert "| always the largest group | 0.510 | 0.510 | — |" in text
    for said in (
        "- MeFEm, by the linear probe, against the untrained encoder: better in gender and race.",
        "- MeFEm, by the linear probe, against a PCA of pixels: better in race; worse in gender.",
        "- mefem-starter, by the paper's head, against the untrained encoder: inconclusive in gender.",
    ):
        assert said in text
    assert "4,321 photographs of FairFace (765 steps of\n8, 1 min 1 s on" in text and "1 min 40 s" in text
    assert "## On real faces" not in readme_text(template, results(tmp_path / "other"))


def test_a_claim_names_its_seeds_and_its_machine(tmp_path, template):
    one = readme_text(template, results(tmp_path))
    assert "1 seed of pretraining, on 7 cores of Abacus 3" in one and "not of the method" in one
    pretraining = {"photographs": 1, "steps": 1, "batch": 1, "parameters": 1, "seeds": [0, 1, 2]}
    gpu = {"cpu": "Abacus 3", "cores": 7, "gpu": "Slide rule 40"}
    three = readme_text(template, results(tmp_path, pretraining=pretraining, hardware=gpu))
    assert (
        "3 seeds of pretraining, on Slide rule 40" in three
        and three.count("Over 3 seeds of pretraining MeFEm") == 8
    )
    assert "this one run" not in three and "not of the method" not in three


def test_numbers_come_from_the_files(tmp_path, template, root):
    text = readme_text(template, results(tmp_path))
    for part in (
        "0.500 [0.400, 0.600]",
        "1,234 photographs of 567 real people",
        "98,765 parameters",
        "765 steps of 8",
        "4,321 unlabelled",
    ):
        assert part in text
    assert "0.777 [0.400, 0.600]" in readme_text(template, results(tmp_path, value=0.777))
    assert " min" not in text.split("**What this run shows.**")[1].split("##")[0]  # no time was measured
    pretraining = {"photographs": 1, "steps": 1, "batch": 1, "parameters": 1, "seeds": [0], "seconds": 61.2}
    write_json(tmp_path / FILES["page"], {"stages": {"probe": 100.0, "table4": 80.0}})
    timed = readme_text(template, results(tmp_path, pretraining=pretraining))
    assert "in 1 min 1 s" in timed and "took 3 min 0 s" in timed


def test_the_template_holds_no_result(template):
    """Neither decimals, nor shares, nor times: only versions, and the paper's own scale."""
    prose = re.sub(r"{%.*?%}|{{.*?}}|<!--.*?-->|\]\([^)]*\)", " ", template, flags=re.DOTALL)
    found = re.findall(r"\d+\.\d+|\d+ ?%|\d+ (?:s|min|minutes?|h|hours?|seconds?)\b|r² \d", prose)
    assert set(found) <= {"2602.14672", "3.11", "6.4", "95 %", "2.0"}, found
    assert not re.search(r"MeFEm'?s? (?:patches )?(?:predicts?|beats?|loses?|tells?) ", prose)


def test_smoke_claims_nothing(tmp_path, template):
    text = readme_text(template, results(tmp_path, profile="smoke"))
    assert "wiring only" in text.split("## What it learns from simulated people")[1].split("|")[0]
    for claim in ("beyond noise", "In this one run", "inconclusive", "What this run shows"):
        assert claim not in text


def test_what_was_not_run_is_said(tmp_path, template):
    text = readme_text(template, results(tmp_path, state="data absent"))
    assert (
        text.count("not run: data absent") == 3 * 4
        and "Nothing has been run yet" in text
        and "beyond noise" not in text
    )
    nothing = readme_text(template, tmp_path / "nowhere")
    assert nothing.count("not run: no result") == 3 * 4 and "Table 4 were not run" in nothing
    (tmp_path / FILES["learned"]).write_text('{"rows": ')
    with pytest.raises(ValueError, match="learned_cells.json: not JSON.*make reproduce"):
        readme_text(template, tmp_path)


def test_one_part_that_was_not_run_leaves_the_others(tmp_path, template):
    path = results(tmp_path) / FILES["learned"]
    found = json.loads(path.read_text())
    found["rows"]["MeFEm / Linear probe"]["Age (years) r2"] = {"state": "too few labels", "size": "Base"}
    write_json(path, found)
    text = readme_text(template, tmp_path)
    assert "- age: not run: too few labels." in text and text.count("In this one run") == 6


def test_table4_speaks_through_its_summary(tmp_path, template):
    write_json(
        results(tmp_path) / FILES["table4"],
        {"rows": {}, "orderings": {}, "seeds": 1, "summary": "All 13 orderings are inconclusive."},
    )
    text = readme_text(template, tmp_path)
    assert (
        "**Appendix A, Table 4.** All 13 orderings are inconclusive." in text
        and "Table 4 were not run" not in text
    )


def test_equal_files_give_equal_bytes_and_the_stage_writes_them(tmp_path, root):
    (tmp_path / "nbs").mkdir()
    shutil.copy(root / "nbs" / "README.md.jinja", tmp_path / "nbs")
    results(tmp_path / "figures")
    first = write_readme(tmp_path)
    for file in ("learned", "provenance"):  # the same content in another order
        path = tmp_path / "figures" / FILES[file]
        path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert write_readme(tmp_path) == first == (tmp_path / "README.md").read_text(encoding="utf-8")


def test_every_link_of_the_page_leads_somewhere(root):
    for target in re.findall(r"\]\(([^)#]+)\)", (root / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("https://") or (root / target).exists(), target


def test_info_reproduction_shows_table_2_of_the_tables_folder(tmp_path, root, monkeypatch):
    shutil.copy(root / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    missing = CliRunner().invoke(app, ["info", "reproduction"])
    assert (
        missing.exit_code == 1
        and "figures/tables/table2.md is missing: run `make reproduce`" in missing.stderr
    )
    (tmp_path / "figures" / "tables").mkdir(parents=True)
    (tmp_path / "figures" / "tables" / "table2.md").write_text("the table")
    shown = CliRunner().invoke(app, ["info", "reproduction"])
    assert shown.exit_code == 0 and "the table" in shown.output and "figures/tables/" in shown.output
