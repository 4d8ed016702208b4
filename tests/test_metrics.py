"""The metrics against scikit-learn, the bootstrap against scipy and against plain loops."""
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, mean_absolute_error, r2_score

from mefem.metrics import (
    accuracy,
    bootstrap_interval,
    draws,
    mae,
    paired_difference,
    person_sums,
    r2,
    resampled,
    score,
    summarise,
)


def predictions(people=120, photos=1, noise=3.0, seed=0, seeds=1):
    rng = np.random.default_rng(seed)
    person = np.repeat(np.arange(people), photos)
    target = (26 + 5 * rng.standard_normal(people))[person]
    common = 2 * rng.standard_normal(people)[person]
    frames = [pd.DataFrame({"key": np.arange(len(person)).astype(str), "person": person.astype(str), "seed": s,
                            "target": target, "prediction": 26 + 0.7 * (target - 26) + common
                            + noise * np.random.default_rng([seed, s]).standard_normal(len(person))})
              for s in range(seeds)]
    return pd.concat(frames, ignore_index=True)


@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_definitions_are_scikit_learns(shift):
    p = predictions()
    target, guess = p.target + shift, p.prediction + shift
    assert np.isclose(r2(target, guess), r2_score(target, guess), rtol=1e-9)
    assert np.isclose(mae(target, guess), mean_absolute_error(target, guess))
    classes = np.random.default_rng(0).integers(0, 4, (2, 50))
    assert accuracy(*classes) == accuracy_score(*classes)


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
    theirs = stats.bootstrap((p.target, p.prediction), reference, paired=True, vectorized=False, n_resamples=2500,
                             method="percentile", rng=np.random.default_rng(5))
    low, high = theirs.confidence_interval
    tolerance = 0.12 * (high - low)
    assert abs(ours.low - low) < tolerance and abs(ours.high - high) < tolerance
    assert np.isclose(np.std(resampled(person_sums(p, metric), metric, 8000)), theirs.standard_error, rtol=0.06)


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
    assert np.allclose([a.value, a.low, a.high], [b.value, b.low, b.high]) and b.n == 3 * a.n and b.persons == a.persons


def test_paired_difference_against_a_plain_loop():
    first, second = predictions(people=20, photos=2), predictions(people=20, photos=2, noise=3.5)
    second["target"] = first.target
    found = paired_difference(first, second, "mae", replicates=60, seed=2)
    gaps, order = [], sorted(first.person.unique())
    for counts in np.concatenate(list(draws(20, 60, seed=2))):
        pick = np.concatenate(
            [np.flatnonzero(first.person == who) for who, t in zip(order, counts, strict=True) for _ in range(int(t))]
        )
        gaps.append(mae(first.target.iloc[pick], first.prediction.iloc[pick])
                    - mae(second.target.iloc[pick], second.prediction.iloc[pick]))
    assert np.allclose([found.low, found.high], np.quantile(gaps, [0.025, 0.975]))
    assert np.isclose(found.value, mae(first.target, first.prediction) - mae(second.target, second.prediction))


def test_better_knows_which_way_is_up():
    good, bad = predictions(noise=0.5), predictions(noise=6)
    assert paired_difference(good, bad, "r2").better and paired_difference(good, bad, "mae").better
    assert not paired_difference(bad, good, "mae").better and paired_difference(bad, good, "mae").beyond_noise
    assert not paired_difference(good, good, "r2").beyond_noise


def test_seeds_are_drawn_as_well():
    p = predictions(seeds=4)
    p.loc[p.seed == 3, "prediction"] = 26.0           # one seed that failed makes the result less certain
    interval = bootstrap_interval(p, "r2")
    per_seed = [r2(part.target, part.prediction) for _, part in p.groupby("seed")]
    assert np.isclose(interval.value, np.mean(per_seed)) and interval.n == 120
    assert interval.high - interval.low > 1.3 * np.ptp(
        [bootstrap_interval(predictions(), "r2").low, bootstrap_interval(predictions(), "r2").high])


def test_bad_input_is_refused():
    p = predictions()
    with pytest.raises(ValueError, match="rmse.*accuracy"):
        score("rmse", [1], [1])
    with pytest.raises(ValueError, match="equal"):
        r2([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        mae([1, np.nan], [1, 2])
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
