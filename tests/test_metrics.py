"""The metrics against scikit-learn, the bootstrap against scipy and against plain loops."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score, mean_absolute_error, r2_score

from mefem.evaluation import evaluate, remove_unplanned
from mefem.files import write_json
from mefem.metrics import (
    bootstrap_interval,
    draws,
    paired_difference,
    paired_differences,
    person_sums,
    resampled,
    score,
    summarise,
)
from mefem.probing import Task


def predictions(people=120, photos=1, noise=3.0, seed=0, seeds=1):
    rng = np.random.default_rng(seed)
    person = np.repeat(np.arange(people), photos)
    target = (26 + 5 * rng.standard_normal(people))[person]
    common = 2 * rng.standard_normal(people)[person]
    frames = [
        pd.DataFrame(
            {
                "key": np.arange(len(person)).astype(str),
                "person": person.astype(str),
                "seed": s,
                "target": target,
                "prediction": 26
                + 0.7 * (target - 26)
                + common
                + noise * np.random.default_rng([seed, s]).standard_normal(len(person)),
            }
        )
        for s in range(seeds)
    ]
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_definitions_are_scikit_learns(shift):
    p = predictions()
    target, guess = p.target + shift, p.prediction + shift
    assert np.isclose(score("r2", target, guess), r2_score(target, guess), rtol=1e-9)
    assert np.isclose(score("mae", target, guess), mean_absolute_error(target, guess))
    classes = np.random.default_rng(0).integers(0, 4, (2, 50))
    assert score("accuracy", *classes) == accuracy_score(*classes)


@pytest.mark.parametrize(
    "metric, reference", [("r2", r2_score), ("mae", mean_absolute_error), ("accuracy", accuracy_score)]
)
def test_bootstrap_agrees_with_scipy(metric, reference):
    p = predictions()
    if metric == "accuracy":
        rng = np.random.default_rng(3)
        p["target"] = rng.integers(0, 3, len(p))
        p["prediction"] = np.where(rng.random(len(p)) < 0.6, p.target, (p.target + 1) % 3)
    ours = bootstrap_interval(p, metric, replicates=8000)
    theirs = stats.bootstrap(
        (p.target, p.prediction),
        reference,
        paired=True,
        vectorized=False,
        n_resamples=2500,
        method="percentile",
        rng=np.random.default_rng(5),
    )
    low, high = theirs.confidence_interval
    tolerance = 0.12 * (high - low)
    assert abs(ours.low - low) < tolerance and abs(ours.high - high) < tolerance
    assert np.isclose(
        np.std(resampled(person_sums(p, metric), metric, 8000)), theirs.standard_error, rtol=0.06
    )


def test_every_replicate_is_the_metric_of_the_drawn_photographs():
    p = predictions(people=15, photos=2)
    fast = resampled(person_sums(p, "r2"), "r2", 40, seed=7)
    order = sorted(p.person.unique())
    for value, counts in zip(fast, np.concatenate(list(draws(15, 40, seed=7))), strict=True):
        drawn = pd.concat(
            [p[p.person == who] for who, times in zip(order, counts, strict=True) for _ in range(int(times))]
        )
        assert np.isclose(value, r2_score(drawn.target, drawn.prediction))


def test_draws_are_resamples_whatever_the_chunk():
    whole, parts = (np.concatenate(list(draws(30, 50, seed=1, chunk=c))) for c in (10**6, 100))
    assert (whole.sum(1) == 30).all() and np.array_equal(whole, parts)


def test_people_are_the_unit():
    once, thrice = predictions(), pd.concat([predictions()] * 3, ignore_index=True)
    thrice["key"] = np.arange(len(thrice)).astype(str)
    a, b = bootstrap_interval(once, "mae"), bootstrap_interval(thrice, "mae")
    assert (
        np.allclose([a.value, a.low, a.high], [b.value, b.low, b.high])
        and b.n == 3 * a.n
        and b.persons == a.persons
    )


def test_paired_difference_against_a_plain_loop():
    first, second = predictions(people=20, photos=2), predictions(people=20, photos=2, noise=3.5)
    second["target"] = first.target
    found = paired_difference(first, second, "mae", replicates=60, seed=2)
    gaps, order = [], sorted(first.person.unique())
    for counts in np.concatenate(list(draws(20, 60, seed=2))):
        pick = np.concatenate(
            [
                np.flatnonzero(first.person == who)
                for who, t in zip(order, counts, strict=True)
                for _ in range(int(t))
            ]
        )
        gaps.append(
            score("mae", first.target.iloc[pick], first.prediction.iloc[pick])
            - score("mae", second.target.iloc[pick], second.prediction.iloc[pick])
        )
    assert np.allclose([found.low, found.high], np.quantile(gaps, [0.025, 0.975]))
    assert np.isclose(
        found.value,
        score("mae", first.target, first.prediction) - score("mae", second.target, second.prediction),
    )


def test_better_knows_which_way_is_up():
    good, bad = predictions(noise=0.5), predictions(noise=6)
    assert paired_difference(good, bad, "r2").better and paired_difference(good, bad, "mae").better
    assert not paired_difference(bad, good, "mae").better and paired_difference(bad, good, "mae").beyond_noise
    assert not paired_difference(good, good, "r2").beyond_noise


def test_seeds_are_drawn_as_well():
    p = predictions(seeds=4)
    p.loc[p.seed == 3, "prediction"] = 26.0  # one seed that failed makes the result less certain
    interval = bootstrap_interval(p, "r2")
    per_seed = [score("r2", part.target, part.prediction) for _, part in p.groupby("seed")]
    assert np.isclose(interval.value, np.mean(per_seed)) and interval.n == 120
    assert interval.high - interval.low > 1.3 * np.ptp(
        [bootstrap_interval(predictions(), "r2").low, bootstrap_interval(predictions(), "r2").high]
    )


def test_bad_input_is_refused():
    p = predictions()
    with pytest.raises(ValueError, match="rmse.*accuracy"):
        score("rmse", [1], [1])
    with pytest.raises(ValueError, match="equal"):
        score("r2", [1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        score("mae", [1, np.nan], [1, 2])
    with pytest.raises(ValueError, match="person"):
        bootstrap_interval(p.drop(columns="person"), "r2")
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_interval(p.assign(person="ada"), "r2")
    with pytest.raises(ValueError, match="missing values"):
        bootstrap_interval(p.assign(prediction=np.nan), "r2")
    with pytest.raises(ValueError, match="same photographs"):
        paired_difference(p, p.iloc[1:], "r2")
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval(p, "r2", confidence=95)


def test_summarise_scores_groups_apart():
    rng = np.random.default_rng(0)
    p = pd.DataFrame(
        {
            "key": np.arange(300).astype(str),
            "person": np.arange(300).astype(str),
            "fold": "test",
            "seed": 0,
            "target": rng.integers(0, 9, 300),
            "group": np.where(np.arange(300) < 90, "White", "non-White"),
        }
    )
    p["prediction"] = np.where(p.group == "White", p.target, 0)
    found = summarise(p, "fairface-age", replicates=200)["values"]
    assert found["accuracy/White"]["value"] == 1 and found["accuracy/White"]["n"] == 90
    assert found["accuracy/non-White"]["value"] == (p.target[90:] == 0).mean()
    assert found["accuracy/White"]["majority"] == p.target[:90].value_counts().max() / 90
    assert summarise(p, "fairface-age", replicates=200) == summarise(p, "fairface-age", replicates=200)


def test_a_fold_of_people_who_are_all_alike_has_no_r2():
    p = pd.DataFrame({"key": list("abcdef"), "person": list("abcdef"), "fold": list("001122"), "seed": 0})
    p = p.assign(target=[98.0, 98, 97, 99, 96, 98], prediction=[97.0, 98, 97, 98, 97, 98])
    found = summarise(p, "saturation", replicates=50)
    assert found["folds"]["0"]["r2"] is None and found["folds"]["1"]["r2"] == 0.5
    assert json.dumps(found, allow_nan=False)


def attributes(people=40, photos=2, seed=0):
    """Predictions of three attributes, of which nobody has the third in this test part."""
    rng = np.random.default_rng(seed)
    n = people * photos
    parts = [
        pd.DataFrame(
            {
                "key": np.arange(n).astype(str),
                "person": (np.arange(n) // photos).astype(str),
                "label": name,
                "target": (rng.random(n) < share).astype(float),
            }
        )
        for name, share in (("A", 0.3), ("B", 0.5), ("C", 0))
    ]
    p = pd.concat(parts, ignore_index=True)
    p["prediction"] = np.where(rng.random(len(p)) < 0.8, p.target, 1 - p.target)
    return p.assign(fold="test", balanced=p.prediction)


@pytest.mark.parametrize(
    "metric, reference", [("accuracy", accuracy_score), ("balanced_accuracy", balanced_accuracy_score)]
)
def test_mean_over_attributes_and_its_bootstrap(metric, reference):
    """Point and interval against a plain loop: the same drawn people for every attribute, then the mean."""
    import warnings

    p = attributes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn remarks on predictions of a class that nobody has
        whole = np.mean([reference(part.target, part.prediction) for _, part in p.groupby("label")])
        order, values = sorted(p.person.unique()), []
        for counts in np.concatenate(list(draws(40, 60, seed=3))):
            drawn = pd.concat(
                [
                    p[p.person == who]
                    for who, times in zip(order, counts, strict=True)
                    for _ in range(int(times))
                ]
            )
            values.append(
                np.mean([reference(part.target, part.prediction) for _, part in drawn.groupby("label")])
            )
    found = bootstrap_interval(p, metric, replicates=60, seed=3)
    assert np.allclose([found.value, found.low, found.high], [whole, *np.quantile(values, [0.025, 0.975])])
    assert (found.n, found.persons) == (80, 40)


def test_attributes_are_kept_each():
    p, task = attributes(), Task("t", "d", "", "multilabel", classes=("A", "B", "C"))
    values = summarise(p, task, replicates=200)["values"]
    assert set(values) == {m + s for m in ("accuracy", "balanced_accuracy") for s in ("", "/A", "/B", "/C")}
    for name in "ABC":
        part = p[p.label == name]
        assert np.isclose(values[f"accuracy/{name}"]["value"], accuracy_score(part.target, part.prediction))
        assert np.isclose(
            values[f"accuracy/{name}"]["majority"], max(part.target.mean(), 1 - part.target.mean())
        )
    assert np.isclose(
        values["accuracy"]["majority"], np.mean([values[f"accuracy/{name}"]["majority"] for name in "ABC"])
    )


def test_all_pairs_at_once_are_the_pairs_one_by_one():
    frames = {str(noise): predictions(people=30, photos=2, noise=noise) for noise in (1.0, 2.0, 4.0)}
    found = {(a, b): gap for a, b, gap in paired_differences(frames, "r2", 300, seed=1)}
    assert set(found) == {("1.0", "2.0"), ("1.0", "4.0"), ("2.0", "4.0")}
    for (a, b), gap in found.items():
        assert gap == paired_difference(frames[a], frames[b], "r2", 300, seed=1)
    with pytest.raises(ValueError, match="same photographs.*'3'"):
        paired_difference(
            frames["1.0"], frames["2.0"].assign(person=lambda f: f.person.where(f.key != "3", "else")), "r2"
        )


@pytest.fixture
def folders(tmp_path):
    """Features of two made-up encoders of one set with few people."""
    rng = np.random.default_rng(0)
    n = 48
    labels = pd.DataFrame(
        {
            "key": np.arange(n).astype(str),
            "person": (np.arange(n) // 2).astype(str),
            "bmi": rng.standard_normal(n),
        }
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "bmi.npy", rng.standard_normal((n, 5, 8)).astype(np.float16))
        labels.to_parquet(tmp_path / name / "bmi.parquet")
        write_json(
            tmp_path / name / "bmi.json",
            {
                "state": "present",
                "n": n,
                "has_cls": True,
                "tokens": 5,
                "heads": 2,
                "encoder": name,
                "encoder_hash": name * 12,
                "faces_hash": "f" * 12,
            },
        )
    return {name: (tmp_path / name, tmp_path / "r" / name) for name in ("a", "b")}


SHORT = dict(
    folds=2,
    epochs=2,
    lrs=(1e-2,),
    weight_decays=(0.1,),
    validation=0.2,
    bootstrap=100,
    hidden=4,
    progress=False,
)


def test_a_number_can_be_followed_to_encoder_crops_split_and_seed(folders):
    import json

    numbers = evaluate(folders, ("bmi",), jobs=1, seed=3, seeds=2, **SHORT)
    assert set(numbers.feature_set) == {"cls", "patches", "patches+cls"} and set(numbers["head"]) == {
        "mlp",
        "attentive",
        "linear",
    }
    out = folders["a"][1]
    assert {p.stem for p in out.glob("*.json")} == {
        "bmi.cls",
        "bmi.patches",
        "bmi.patches+cls",
        "bmi.cls.linear",
        "bmi.patches.linear",
    }
    for path in out.glob("*.json"):
        found = json.loads(path.read_text())
        assert found["features"]["encoder_hash"] == "a" * 12 and found["features"]["faces_hash"] == "f" * 12
        assert (
            found["seeds"] == found["recipe"]["seeds"] == [3, 4]
            and len(found["splits"]) == 4
            and len(found["key"]) == 12
        )
        kept = pd.read_parquet(out / found["predictions"])
        assert (kept.groupby(["seed", "key"]).size() == 1).all() and len(kept) == 2 * 48
        again = np.mean([score("r2", part.target, part.prediction) for _, part in kept.groupby("seed")])
        assert np.isclose(again, found["values"]["r2"]["value"])


def test_results_are_kept_until_something_changes(folders, monkeypatch):
    import mefem.evaluation as module

    def files():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folders["a"][1].iterdir()}

    evaluate(folders, ("bmi",), ("cls",), jobs=1, **SHORT)
    before = files()
    monkeypatch.setattr(module, "probe", lambda *_, **__: pytest.fail("probed again"))
    again = evaluate(folders, ("bmi",), ("cls",), jobs=1, **SHORT)
    assert files() == before and len(again) == 2 * 2 * 2
    monkeypatch.undo()
    evaluate(folders, ("bmi",), ("cls",), jobs=1, **(SHORT | {"epochs": 3}))
    assert all(files()[p] != before[p] for p in before)  # another setting, other numbers
    labels = folders["a"][0] / "bmi.parquet"
    pd.read_parquet(labels).assign(bmi=lambda f: f.bmi + 1).to_parquet(labels)
    evaluate(folders, ("bmi",), ("cls",), jobs=1, **(SHORT | {"epochs": 3}))
    assert pd.read_parquet(folders["a"][1] / "bmi.cls.parquet").target.mean() > 0.5


def test_processes_side_by_side_give_the_same_numbers(folders, tmp_path):
    one = evaluate(folders, ("bmi",), jobs=1, **SHORT)
    elsewhere = {name: (features, tmp_path / "two" / name) for name, (features, _) in folders.items()}
    assert evaluate(elsewhere, ("bmi",), jobs=2, **SHORT).equals(one)


def test_pairs_of_task_and_feature_set_can_be_left_out(folders):
    found = evaluate(folders, ("bmi",), jobs=1, skip=[["bmi", "patches+cls"]], **SHORT)
    assert (
        set(found.feature_set) == {"cls", "patches"}
        and not (folders["a"][1] / "bmi.patches+cls.json").exists()
    )
    with pytest.raises(
        ValueError, match="'patches-cls' is unknown, expected one of cls, patches, patches.cls"
    ):
        evaluate(folders, ("bmi",), jobs=1, skip=[["bmi", "patches-cls"]], **SHORT)
    with pytest.raises(ValueError, match="'bmj'"):
        evaluate(folders, ("bmi",), jobs=1, skip=[["bmj", "cls"]], **SHORT)


def test_results_of_an_encoder_that_lost_its_cls_go(folders, tmp_path):
    evaluate(folders, ("bmi",), jobs=1, **SHORT)
    other = tmp_path / "r" / "a" / "celeba.cls.json"  # of a task that is not asked about now
    other.write_text("{}")
    before = sorted(path.name for path in (tmp_path / "r" / "b").iterdir())
    about = json.loads((folders["a"][0] / "bmi.json").read_text())
    write_json(folders["a"][0] / "bmi.json", about | {"has_cls": False})
    removed = remove_unplanned(tmp_path / "r", folders, ("bmi",))
    stems = {path.stem for path in removed}
    assert stems == {"bmi.cls", "bmi.patches+cls", "bmi.cls.linear"} and len(removed) == 6
    assert {path.parent.name for path in removed} == {"a"} and other.exists()
    assert remove_unplanned(tmp_path / "r", folders, ("bmi",)) == []
    assert sorted(path.name for path in (tmp_path / "r" / "b").iterdir()) == before
    assert len(remove_unplanned(tmp_path / "r", {"a": folders["a"]}, ("bmi",))) == len(before)


def test_too_few_people_are_a_state_not_an_error(folders):
    labels = folders["a"][0] / "bmi.parquet"
    pd.read_parquet(labels).assign(bmi=21.0).to_parquet(labels)
    found = evaluate(folders, ("bmi",), ("cls",), linear=False, jobs=1, **SHORT).set_index("encoder")
    assert found.state["a"] == "too few labels" and found.metric["b"].tolist() == ["r2", "mae"]


def test_errors_by_source_stand_in_the_results(folders):
    import json

    features, out = folders["a"]
    labels = pd.read_parquet(features / "bmi.parquet").assign(source="own")
    labels.loc[labels.index[:20], "source"] = "fiw-bmi"
    labels.to_parquet(features / "bmi.parquet")
    tokens, meta = np.load(features / "bmi.npy"), json.loads((features / "bmi.json").read_text())
    np.save(features / "mcd-rppg.npy", tokens[:24])
    clinic = labels[:24].assign(source="mcd-rppg", key=lambda f: "m" + f.key, person=lambda f: "m" + f.person)
    clinic.to_parquet(features / "mcd-rppg.parquet")
    write_json(features / "mcd-rppg.json", meta | {"n": 24})
    evaluate({"a": folders["a"]}, ("bmi",), ("patches",), linear=False, jobs=1, **SHORT)
    found, kept = (
        json.loads((out / "bmi.patches.json").read_text()),
        pd.read_parquet(out / "bmi.patches.parquet"),
    )
    assert (
        found["n"] == 72
        and found["dataset"] == "bmi+mcd-rppg"
        and found["features"]["parts"]["mcd-rppg"]["n"] == 24
    )
    for source, photographs in {"fiw-bmi": 20, "own": 28, "mcd-rppg": 24}.items():
        part = kept[kept.source == source]
        assert len(part) == photographs == found["values"][f"mae/{source}"]["n"]
        assert np.isclose(
            found["values"][f"mae/{source}"]["value"], (part.target - part.prediction).abs().mean()
        )
    assert found["values"]["r2"]["n"] == 72
    before = (out / "bmi.patches.json").read_bytes()
    clinic.assign(bmi=20.0).to_parquet(
        features / "mcd-rppg.parquet"
    )  # another label in any of the sets: another result
    evaluate({"a": folders["a"]}, ("bmi",), ("patches",), linear=False, jobs=1, **SHORT)
    assert (out / "bmi.patches.json").read_bytes() != before
    assert not any(
        "mcd-rppg" in metric for metric in json.loads((out / "bmi.patches.json").read_text())["values"]
    )  # no spread, no r2


def test_one_source_is_not_counted_twice(folders):
    import json

    evaluate({"a": folders["a"]}, ("bmi",), ("cls",), linear=False, jobs=1, **SHORT)
    assert set(json.loads((folders["a"][1] / "bmi.cls.json").read_text())["values"]) == {"r2", "mae"}
