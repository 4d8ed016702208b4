"""Table 4: the paper's rows and claims, verdicts over people and seeds, one run at a time."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from mefem.ablations import (
    ORDERINGS,
    TABLE4,
    TABLE4_ROWS,
    VERDICTS,
    absent_data,
    beyond_the_paper,
    collect,
    comparisons,
    costs,
    feature_sets_of_run,
    orderings,
    probe_run,
    rows_of,
    run_folder,
    summary_of,
    verdict,
    write_table4,
)
from mefem.config import Settings, SettingsError, ablation_probing, ablation_settings, load_settings
from mefem.evaluation import write_result
from mefem.metrics import paired_difference
from mefem.monitoring import step_operations
from mefem.probing import ProbeResult
from mefem.shards import write_absent, write_manifest, write_shard
from mefem.tables import cells_of
from mefem.training import build, pretrain

PAPER = """
Patches	Stripes 2/14	—	Circular	0.291	4.206
Patches	Stripes 3/14	—	Circular	0.447	3.666
Patches	Stripes 4/14	—	Circular	0.368	4.001
Patches	Quadrants	—	Circular	0.305	3.698
Patches	Multiblock	—	Circular	0.371	3.961
Patches	Stripes 3/14	0.5	Uniform	0.321	4.070
CLS	Stripes 3/14	0.5	Uniform	0.169	4.693
Patches + CLS	Stripes 3/14	0.5	Uniform	0.330	4.066
Patches	Stripes 3/14	0.0	Circular	0.388	3.752
CLS	Stripes 3/14	0.0	Circular	0.353	4.084
Patches + CLS	Stripes 3/14	0.0	Circular	0.378	3.697
Patches	Stripes 3/14	0.5	Circular	0.398	3.631
CLS	Stripes 3/14	0.5	Circular	0.430	3.781
Patches + CLS	Stripes 3/14	0.5	Circular	0.437	3.625
Patches	Stripes 3/14	1.0	Circular	0.444	3.631
CLS	Stripes 3/14	1.0	Circular	0.389	3.939
Patches + CLS	Stripes 3/14	1.0	Circular	0.446	3.627
"""


def test_rows_are_the_papers():
    found = [
        [*(r.labels[field] for field in TABLE4.headings), *(f"{v:.3f}" for v in r.paper)] for r in TABLE4_ROWS
    ]
    assert found == [line.split("\t") for line in PAPER.strip().splitlines()]


@pytest.mark.parametrize("profile", ["smoke", "demo", "study", "faces", "paper"])
def test_runs_differ_only_in_what_their_row_says(root, profile):
    settings = load_settings(root / "params.yaml", profile)
    base = ablation_settings(settings, "cls05").model_dump()
    names = {"stripes": "Stripes", "quadrant": "Quadrants", "multiblock": "Multiblock"}
    for row in TABLE4_ROWS:
        config = ablation_settings(settings, row.source)
        masking = names[config.masking.kind] + (
            f" {config.masking.width}/14" if config.masking.kind == "stripes" else ""
        )
        p = config.masking.cls_in_source
        assert tuple(row.labels[field] for field in ("masking", "p", "weights")) == (
            masking,
            "—" if p is None else f"{p:.1f}",
            config.weights.kind.capitalize(),
        )
        same = config.model_dump()
        assert same | {"masking": 0, "weights": 0} == base | {
            "masking": 0,
            "weights": 0,
        }  # pictures and all else are equal
        assert (same["masking"]["k"], same["weights"]["r0"]) == (base["masking"]["k"], base["weights"]["r0"])
    for run in settings.ablations:
        ablation_settings(settings, run)
    with pytest.raises(SettingsError, match="'nobody' is not one of"):
        ablation_settings(settings, "nobody")


def test_probes_differ_from_the_profiles_where_ablation_probing_says(root):
    settings = load_settings(root / "params.yaml", "demo")
    changed = settings.model_copy(
        update={
            "profiles": {
                "demo": settings.active.model_copy(
                    update={"ablation": settings.active.ablation.model_copy(update={"probing": {"folds": 7}})}
                )
            }
        }
    )
    assert ablation_probing(changed).model_dump() == settings.active.probing.model_dump() | {"folds": 7}
    raw = {
        "profile": "p",
        "datasets": [],
        "encoders": {},
        "runs": [],
        "profiles": {"p": {"ablation": {"probing": {"foldz": 7}}}},
    }
    with pytest.raises(ValueError, match="profiles.p.ablation.probing: unknown key 'foldz'"):
        Settings.model_validate(raw)


def made_up(folder, settings, quality, people=150, seeds=(0,)):
    """Results of made-up predictions: (run, feature set) -> spread of its error."""
    truth = 26 + 5 * np.random.default_rng(0).standard_normal(people)
    names = np.arange(people).astype(str)
    for i, row in enumerate(rows_of(settings)):
        if (amount := quality(row)) is None:
            continue
        frames = [
            pd.DataFrame(
                {
                    "key": names,
                    "person": names,
                    "fold": "fold 0",
                    "seed": s,
                    "target": truth,
                    "prediction": truth + amount * np.random.default_rng([i, s]).standard_normal(people),
                }
            )
            for s in seeds
        ]
        info = {
            "task": "bmi",
            "feature_set": row.feature_set,
            "state": "present",
            "features": {"simulated": True},
            "run": {
                "pictures": 99,
                "parameters": 10**5,
                "settings": ablation_settings(settings, row.source).model_dump(mode="json"),
            },
        }
        write_result(folder / row.source, ProbeResult(pd.concat(frames), info), 200)
    return folder


@pytest.fixture()
def settings(root):
    found = load_settings(root / "params.yaml", "smoke")
    beyond = ("teacher-targets", "share25", "sigreg")
    return found.model_copy(update={"ablation_runs": (*found.ablation_runs, *beyond), "seeds": (0, 1, 2)})


def test_verdicts_follow_the_paired_bootstrap(tmp_path, settings):
    quality = {"stripes3": 1.0, "multiblock": 3.0, "quadrant": 0.2, "stripes2": 1.0, "stripes4": 1.02}
    made_up(tmp_path, settings, lambda row: quality.get(row.source), seeds=(0, 1, 2))
    found = orderings(tmp_path, replicates=400).set_index("claim")
    assert found.verdict["Stripes beat multiblock"] == "supported"
    assert found.verdict["Stripes beat quadrants"] == "contradicted"
    assert found.verdict["Width 3 beats width 4"] == "inconclusive"
    assert found.verdict["P = 1 sacrifices CLS"] == "not run"
    frames = [pd.read_parquet(tmp_path / run / "bmi.patches.parquet") for run in ("stripes3", "multiblock")]
    gap = paired_difference(*frames, "r2", 400)
    assert tuple(found.loc["Stripes beat multiblock", ["gap", "low", "high"]]) == (
        gap.value,
        gap.low,
        gap.high,
    )
    assert found.paper["Stripes beat multiblock"] == pytest.approx(0.447 - 0.371)
    words = summary_of(found.reset_index())
    assert (
        "13 orderings these runs, 3 seeds per row, support 1 and contradict 1; 2 are inconclusive. "
        "9 could not be tested." in words
    )


def test_one_seed_decides_nothing_however_wide_the_gap(tmp_path, settings):
    made_up(tmp_path, settings, lambda row: 9.0 if row.source == "multiblock" else 0.1)
    found = orderings(tmp_path, replicates=400)
    assert (
        found.low[found.claim == "Stripes beat multiblock"].item() > 1
        and (found.verdict == "inconclusive").all()
    )
    assert (
        summary_of(found)
        == "One seed of pretraining per row cannot decide an ordering: all 13 tested are inconclusive."
    )


def test_seeds_that_disagree_leave_it_inconclusive(tmp_path, settings):
    """Many people, three seeds: the seeds differ by more than the gap, which people alone would decide."""
    truth = 26 + 5 * np.random.default_rng(0).standard_normal(400)
    for run, errors in (("stripes3", (1.0, 2.4, 3.6)), ("multiblock", (2.0, 3.0, 4.0))):
        frames = [
            pd.DataFrame(
                {
                    "key": np.arange(400).astype(str),
                    "person": np.arange(400).astype(str),
                    "seed": s,
                    "target": truth,
                    "prediction": truth + e * np.random.default_rng(s).standard_normal(400),
                }
            )
            for s, e in enumerate(errors)
        ]
        info = {"task": "bmi", "feature_set": "patches", "state": "present", "features": {}}
        write_result(tmp_path / run, ProbeResult(pd.concat(frames), info), 200)
    line = orderings(tmp_path).set_index("claim").loc["Stripes beat multiblock"]
    assert line.gap > 0.1 and line.low < 0 < line.high and line.verdict == "inconclusive"


def test_an_interval_that_holds_zero_tells_nothing():
    assert [
        verdict(*pair, 2) for pair in ((0.01, 0.2), (-0.2, -0.01), (-0.1, 0.1), (0.0, 0.2), (-0.2, 0.0))
    ] == [VERDICTS[0], VERDICTS[1], VERDICTS[2], VERDICTS[2], VERDICTS[2]]


def test_claims_are_pairs_of_rows_in_the_papers_order(settings):
    paper = {(row.source, row.feature_set): row.paper[0] for row in TABLE4_ROWS}
    assert all(paper[better] > paper[worse] for _, better, worse in ORDERINGS)
    assert len({claim for claim, *_ in comparisons(settings)}) == len(comparisons(settings)) > len(ORDERINGS)


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_table_is_written_in_all_forms_with_stable_bytes(tmp_path, settings, seeds):
    results = made_up(tmp_path / "results", settings, lambda row: 2.0 + len(row.source) / 20, seeds=seeds)
    text = write_table4(results, tmp_path / "a", settings, 200)
    assert text == write_table4(results, tmp_path / "b", settings, 200)
    names = {
        "table4.md",
        "table4.csv",
        "table4_orderings.csv",
        "table4.tex",
        "table4.json",
        "table4.png",
        "table4_cost.csv",
        "table4_cost.png",
    }
    assert {p.name for p in (tmp_path / "a").iterdir()} == names
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    rows = rows_of(settings)
    cells = pd.read_csv(tmp_path / "a" / "table4.csv")
    assert len(cells) == 2 * len(rows) and (cells.state == "present").all()
    for row in TABLE4_ROWS:
        labels = [row.labels[field] for field in TABLE4.headings]
        (line,) = [x for x in text.splitlines() if [part.strip() for part in x.split("|")[1:5]] == labels]
        assert f" {row.paper[0]:.3f} " in line and f" {row.paper[1]:.3f} " in line
        stored = json.loads((results / row.source / f"bmi.{row.feature_set}.json").read_text())["values"][
            "r2"
        ]
        assert f"{stored['value']:.3f} [{stored['low']:.3f}, {stored['high']:.3f}]" in line
    assert (
        "Simulated people" in text
        and "equal for all rows" in text
        and summary_of(orderings(results, replicates=200)) in text
    )
    assert ("One pretraining per row" in text) == (len(seeds) == 1)
    assert (cells.seeds == len(seeds)).all() and set(cells.pictures) == {4 * 16}
    tex = (tmp_path / "a" / "table4.tex").read_text()
    assert tex.count("{") == tex.count("}") and "²" not in tex and "—" not in tex


def test_a_changed_run_is_not_the_papers_row(tmp_path, settings):
    wider = {"stripes2": {"masking": {"width": 5, "cls_in_source": None}}}
    changed = settings.model_copy(update={"ablations": settings.ablations | wider})
    (row,) = [row for row in rows_of(changed) if row.source == "stripes2"]
    assert row.labels["masking"] == "masking.width 5, masking.cls_in_source None" and not row.paper
    results = made_up(tmp_path, changed, lambda row: 2.0)
    claims = orderings(results, comparisons(changed), rows_of(changed), 200).set_index("claim")
    # what the paper says of width 2 cannot be tested by width 5; the changed run has the baseline without CLS
    assert claims.verdict["Width 3 beats width 2"] == "not run" and claims.paper["Width 3 beats width 2"] > 0
    own = claims.loc["Beyond the paper: stripes2 beats stripes 3/14 without CLS, patches"]
    assert own.verdict == "inconclusive" and own.worse == "stripes3 patches"
    assert "Stripes 2/14" not in write_table4(tmp_path / "out", tmp_path / "x", changed, 200)


def test_another_method_is_not_the_papers_row(settings):
    for changes in ({"method": "sigreg"}, {"teacher_input": "targets"}):
        row = settings.ablations["cls05"] | changes
        changed = settings.model_copy(update={"ablations": settings.ablations | {"cls05": row}})
        assert set(beyond_the_paper(changed)) == {*beyond_the_paper(settings), "cls05"}


def test_costs_are_the_steps_operations_beside_the_tables_r2(tmp_path, settings):
    results = made_up(tmp_path, settings, lambda row: None if row.source == "quadrant" else 2.0)
    found = costs(results, rows_of(settings)).set_index("run")
    assert set(found.index) == {row.source for row in rows_of(settings)} - {"quadrant"}
    assert found.of_the_paper.sum() == 8 and not found.of_the_paper["share25"]
    config = ablation_settings(settings, "cls05")
    assert found.operations_per_picture["cls05"] == sum(step_operations(build(config)).values())
    assert (found.pictures == config.steps * config.batch).all()
    # A quarter of the targets is cheaper, SIGReg's second look at the picture dearer.
    assert (
        found.operations_per_picture["share25"]
        < found.operations_per_picture["cls05"]
        < found.operations_per_picture["sigreg"]
    )
    stored = json.loads((results / "sigreg" / "bmi.patches.json").read_text())["values"]["r2"]
    assert tuple(found.loc["sigreg", ["value", "low", "high"]]) == tuple(
        stored[k] for k in ("value", "low", "high")
    )


def test_rows_that_were_not_run_say_so(tmp_path, settings):
    text = write_table4(tmp_path / "nothing", tmp_path, settings, 200)
    assert (
        text.count("not run: no result") == 2 * len(rows_of(settings)) and "none has both of its rows" in text
    )
    assert cells_of(tmp_path / "nothing", TABLE4).value.isna().all()


# ---- the runs themselves, tiny


def make_faces(folder, dataset, count, state="present"):
    rng, keys = np.random.default_rng(len(dataset)), [f"{i:09d}" for i in range(count)]

    def jpeg():
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(out, "JPEG")
        return out.getvalue()

    if state == "absent":
        return write_absent(folder, dataset, "not downloaded", {"size": 112})
    table = [
        {"key": k, "person": k, "bmi": 20.0 + i % 9, "status": "success", "error_message": None}
        for i, k in enumerate(keys)
    ]
    stats = [write_shard(folder, 0, [(k, jpeg(), {}) for k in keys], table)]
    return write_manifest(folder, dataset, count, stats, {"size": 112}, simulated=True)


@pytest.fixture()
def home(root, tmp_path):
    params = yaml.safe_load((root / "params.yaml").read_text())
    smoke = params["profiles"]["smoke"]
    smoke["pretrain"] |= {
        "batch": 4,
        "encoder": {
            "name": "vit_small_patch16_224",
            "kwargs": {"img_size": 112, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
        },
        "predictor": {"dim": 8, "depth": 1, "heads": 2},
    }
    smoke["ablation"] = {"pretrain": {"steps": 2, "checkpoint_every": 2, "log_every": 2}}
    smoke["probing"] |= {"epochs": 1, "bootstrap": 100, "lrs": [1e-3], "weight_decays": [0.1]}
    changed = {"profile": "smoke", "seeds": [0, 1], "ablation_runs": ["stripes3", "cls1", "share25"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | changed))
    make_faces(tmp_path / "data" / "faces" / "facecaption", "facecaption", 8)
    make_faces(tmp_path / "data" / "faces" / "bmi", "bmi", 16)
    return tmp_path


def make_run(settings, home, run, seed):
    """What the stage's notebook does."""
    config = ablation_settings(settings, run, seed)
    if not absent_data(home, config):
        pretrain(config, run=f"ablations/{run}-{seed}", root=home, progress=False)
    return probe_run(settings, home, run, seed, progress=False)


def test_runs_and_seeds_come_together_in_one_result(home):
    settings = load_settings(home / "params.yaml")
    for run in settings.ablation_runs:
        for seed in settings.seeds:
            results = make_run(settings, home, run, seed)
            assert {p.stem for p in results.iterdir()} == {
                f"bmi.{s}" for s in feature_sets_of_run(settings, run)
            }
            assert {p.name for p in results.parent.iterdir()} == {
                "encoder.safetensors",
                "log.csv",
                "run.json",
                "results",
                "checkpoints",
            }
    out = collect(settings, home, home / "data" / "ablations")
    both = pd.read_parquet(out / "cls1" / "bmi.cls.parquet")
    assert both.groupby("seed").size().to_dict() == {0: 16, 1: 16}
    one = pd.read_parquet(run_folder(home, "cls1", 1) / "results" / "bmi.cls.parquet")
    pd.testing.assert_frame_equal(
        both[both.seed == 1].drop(columns="seed").reset_index(drop=True), one.drop(columns="seed")
    )
    about = json.loads((out / "cls1" / "bmi.cls.json").read_text())
    assert about["seeds"] == [0, 1] and about["run"]["settings"]["masking"]["cls_in_source"] == 1.0
    text = write_table4(out, home / "figures", settings, 100)
    assert "not run: no result" in text  # the rows that ablation_runs leaves out
    found = json.loads((home / "figures" / "table4.json").read_text())
    assert (
        found["seeds"] == 2
        and found["summary"] in text
        and set(found["orderings"].values()) <= {*VERDICTS, "not run"}
    )


def test_a_probed_run_is_kept_and_another_encoder_is_probed_anew(home):
    settings = load_settings(home / "params.yaml")
    (path,) = make_run(settings, home, "stripes3", 0).glob("*.parquet")
    before = path.stat().st_mtime_ns
    make_run(settings, home, "stripes3", 0)
    assert path.stat().st_mtime_ns == before
    make_faces(
        home / "data" / "faces" / "facecaption", "facecaption", 9
    )  # other pictures: trained and probed anew
    make_run(settings, home, "stripes3", 0)
    assert path.stat().st_mtime_ns != before


def test_absent_data_are_a_state_and_train_nothing(home, capsys):
    settings = load_settings(home / "params.yaml")
    make_faces(home / "data" / "faces" / "bmi", "bmi", 0, "absent")
    for run in settings.ablation_runs:
        for seed in settings.seeds:
            make_run(settings, home, run, seed)
    assert not list((home / "data" / "runs").rglob("encoder.safetensors"))
    assert "stripes3-0 not run: bmi: data absent" in capsys.readouterr().out
    text = write_table4(collect(settings, home, home / "data" / "ablations"), home / "figures", settings, 100)
    assert text.count("not run: bmi: data absent") == 2 * sum(
        row.source in settings.ablation_runs for row in rows_of(settings)
    )


def test_a_run_that_table4_does_not_have_is_named(home):
    with pytest.raises(
        ValueError,
        match="run 'sigreg' is not in Table 4: it has stripes2, .* share25; name another in ablation_runs",
    ):
        feature_sets_of_run(load_settings(home / "params.yaml"), "sigreg")
