"""Who it works for: planted gaps are found, absent ones are not; intervals cover; skin tones, regions."""

import io
import json
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mefem.faces import crop_face, encode_crop, shared_detector
from mefem.fairness import (
    AGE_BANDS,
    HAEMOGLOBIN,
    PAPER_BOX,
    REGIONS,
    TARGETS,
    TONES,
    Audit,
    SeesOnly,
    adjust_gaps,
    all_gaps,
    all_predictions,
    attributes,
    audit,
    audit_encoder,
    by_group,
    calibration,
    cheeks,
    conformal,
    conformal_margins,
    coverage_terms,
    face_box,
    face_regions,
    largest_gap,
    mean_tokens,
    person_terms,
    predictions_of,
    region_predictions,
    remaining,
    show_only,
    skin_tones,
    to_lab,
    tone_classes,
    typology_angle,
)
from mefem.fairness_page import adjust_all, headline, page, write_page
from mefem.features import Features
from mefem.shards import write_manifest, write_shard


def toy_predictions(people: int = 400, biased: dict | None = None, seed: int = 0):
    """(predictions, labels) of made-up people with two photographs each.

    `biased`: {age band: shift of the prediction}."""
    rng = np.random.default_rng(seed)
    columns = {"person": [f"p{i:04d}" for i in range(people)], "age": rng.integers(18, 80, people)}
    columns |= {"bmi": rng.normal(26, 5, people), "fold": rng.integers(5, size=people)}
    labels = pd.DataFrame(columns | {"sex": rng.choice(["female", "male"], people)})
    labels = labels.loc[np.repeat(labels.index, 2)].reset_index(drop=True)
    labels["key"] = [f"k{i:05d}" for i in range(len(labels))]
    bands = np.array(list(AGE_BANDS))[np.searchsorted([*AGE_BANDS.values()], labels.age, side="right") - 1]
    shift = pd.Series(bands).map(biased or {}).fillna(0.0)
    best = 26 + 0.5 * (labels.bmi - 26) + rng.normal(0, 2.5, len(labels))
    few = labels[["key", "person", "fold"]]
    return few.assign(seed=0, target=labels.bmi, prediction=best + shift), labels


# --- regions


@pytest.mark.parametrize("size", [32, 112, 224])
def test_regions_share_out_the_picture(size):
    regions = face_regions(size)
    assert tuple(regions) == REGIONS
    assert (sum(mask.astype(int) for mask in regions.values()) == 1).all()
    middle, corner = size // 2, 0
    assert regions["inner face"][middle, middle] and regions["background and clothes"][corner, corner]
    for mask in regions.values():
        assert (mask == mask[:, ::-1]).all(), "regions are the same on both sides"
    # the box is the central half: face and outline stay inside its width, and touch it
    face = regions["inner face"] | regions["outline of the face"]
    columns = np.flatnonzero(face.any(0))
    assert abs(columns[0] - size / 4) <= 1 and abs(columns[-1] - (3 * size / 4 - 1)) <= 1
    assert regions["inner face"][cheeks(size)].mean() > 0.9, "skin is measured inside the inner face"


def test_what_is_hidden_cannot_change_what_is_seen():
    rng, mask = np.random.default_rng(0), face_regions(32)["inner face"]
    a, b = rng.integers(0, 256, (2, 3, 32, 32, 3), np.uint8)
    b[:, mask] = a[:, mask]
    fill = (10.4, 20.6, 30.0)
    assert (show_only(a, mask, fill) == show_only(b, mask, fill)).all()
    assert (show_only(a, mask, fill)[:, ~mask] == (10, 21, 30)).all()
    with pytest.raises(ValueError, match="does not fit"):
        show_only(a, face_regions(16)["inner face"], fill)


def kept(folder, pictures, framing):
    """A folder of crops as the crop stage leaves it."""
    samples = [(f"k{i}", encode_crop(picture), {}) for i, picture in enumerate(pictures)]
    rows = [{"key": key, "status": "success"} for key, *_ in samples]
    shard = write_shard(folder, 0, samples, rows)
    write_manifest(folder, "bmi", len(samples), [shard], {"size": 112, "framing": framing}, simulated=False)
    return folder


def test_regions_follow_a_tighter_crop():
    """A crop of the box alone shows the middle of the paper's crop, and so its regions."""
    wide = face_regions(224)
    for name, mask in face_regions(112, (0, 0, 1, 1)).items():
        assert (mask == wide[name][56:168, 56:168]).all()
    assert (cheeks(112, (0, 0, 1, 1)) == cheeks(224)[56:168, 56:168]).all()


def test_the_place_of_the_face_is_measured_where_the_publisher_framed(tmp_path, shared):
    people = pd.read_csv(shared / "frll" / "labels.csv").file
    whole = [np.asarray(Image.open(shared / "frll" / name).convert("RGB")) for name in people]
    detected = [shared_detector().detect(picture)[0].box for picture in whole]
    tight = [crop_face(p, box, scale=1.25, size=112) for p, box in zip(whole, detected, strict=True)]
    found = face_box(kept(tmp_path / "tight", tight + tight, "dataset"))  # 20 faces are needed
    np.testing.assert_allclose(found, (0.1, 0.1, 0.9, 0.9), atol=0.05)
    assert face_box(kept(tmp_path / "paper", tight, "paper")) == PAPER_BOX
    noise = np.random.default_rng(0).integers(0, 256, (30, 112, 112, 3), np.uint8)
    assert face_box(kept(tmp_path / "noise", noise, "dataset")) == PAPER_BOX


# --- skin tone


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)),
    ],
)
def test_lab_of_known_colours(rgb, lab):
    np.testing.assert_allclose(to_lab(rgb), lab, atol=0.02)


def picture(rgb, size=64):
    return np.full((1, size, size, 3), rgb, np.uint8)


def test_typology_angle_by_hand():
    # sRGB (224, 172, 105) by hand: linear 0.745404, 0.412543, 0.141263; XYZ 0.480396, 0.463731, 0.198042;
    # f = 0.796527, 0.774026, 0.566619; L* = 73.787, b* = 41.48; atan(23.787 / 41.48) = 29.83 degrees
    assert typology_angle(picture((224, 172, 105)))[0] == pytest.approx(29.83, abs=0.05)


def test_typology_angle_orders_and_refuses():
    light, brown, grey, blue = (
        typology_angle(picture(c))[0]
        for c in ((240, 215, 195), (95, 60, 40), (128, 128, 128), (90, 100, 160))
    )
    assert light > 41 > -30 > brown and np.isnan(grey) and np.isnan(blue)


def test_only_the_cheeks_count():
    changed = picture((224, 172, 105))
    changed[:, ~cheeks(64)] = 0
    assert typology_angle(changed) == typology_angle(picture((224, 172, 105)))


@pytest.mark.parametrize(
    ("angle", "name"),
    [
        (-90, "dark"),
        (-30.1, "dark"),
        (-29, "brown"),
        (10.1, "tan"),
        (28.1, "intermediate"),
        (41.1, "light"),
        (55.1, "very light"),
        (90, "very light"),
    ],
)
def test_tone_classes(angle, name):
    assert tone_classes([angle])[0] == name


def test_real_skin_is_ordered(shared):
    listed = pd.read_csv(shared / "frll" / "labels.csv")
    listed["angle"] = [
        typology_angle(
            crop_face(
                np.asarray(Image.open(shared / "frll" / f).convert("RGB").resize((675, 675))),
                min_side=1,
                size=112,
            )[None]
        )[0]
        for f in listed.file
    ]
    median = listed.groupby(listed.ethnicity.str.lower()).angle.median()
    assert listed.angle.notna().mean() > 0.9
    assert median["black"] < median["white"] - 20


# --- groups


def test_attributes_are_of_people():
    labels = pd.DataFrame(
        {
            "key": list("abcd"),
            "person": ["p", "p", "p", "q"],
            "sex": ["male", "male", "male", None],
            "age": [29.0, 29, 30, 60],
            "race_name": ["White", "White", "White", "Black"],
        }
    )
    tones = pd.Series({"a": 60.0, "b": 45.0, "c": 44.0, "d": np.nan})
    people = attributes(labels, tones)
    assert list(people.columns) == ["sex", "age band", "ancestry", "skin tone"]
    assert list(people.loc["p"]) == ["male", "18 to 29", "White", "light"]
    assert (
        people["age band"]["q"] == "60 and over"
        and pd.isna(people["skin tone"]["q"])
        and pd.isna(people["sex"]["q"])
    )


def test_by_group_is_a_plain_mean_with_scipys_interval():
    from scipy.stats import bootstrap

    predictions, labels = toy_predictions(60)
    table = by_group(person_terms(predictions), attributes(labels), replicates=4000).set_index(
        ["attribute", "group"]
    )
    errors = (predictions.prediction - predictions.target).abs()
    men = (labels.sex == "male").to_numpy()
    row = table.loc[("sex", "male")]
    assert row.error == pytest.approx(errors[men].mean()) and row.persons == labels.person[men].nunique()
    assert row.photographs == men.sum()
    of_person = (
        errors[men].groupby(labels.person[men]).mean().to_numpy()
    )  # two photographs each: means of means agree
    low, high = bootstrap(
        (of_person,), np.mean, method="percentile", n_resamples=4000, rng=0
    ).confidence_interval
    assert row.error_low == pytest.approx(low, abs=0.12) and row.error_high == pytest.approx(high, abs=0.12)


@pytest.mark.parametrize(
    ("band", "shift", "side"), [("60 and over", -3.0, "least"), ("18 to 29", 3.0, "most")]
)
def test_a_planted_bias_is_found_and_named(band, shift, side):
    predictions, labels = toy_predictions(300, biased={band: shift})
    gaps = adjust_gaps(all_gaps(person_terms(predictions), attributes(labels), replicates=1000))
    found = gaps[gaps.beyond_noise]
    assert set(found.attribute) == {"age band"}
    bias = found[found.measure == "bias"].iloc[0]
    assert bias[side] == band and bias.low > 0 and abs(shift) - 1.2 < bias.gap < abs(shift) + 2
    assert bias.low <= bias.gap <= bias.high


def test_a_group_with_larger_errors_is_found():
    predictions, labels = toy_predictions(400)
    women = (labels.sex == "female").to_numpy()
    predictions.loc[women, "prediction"] += np.random.default_rng(1).normal(0, 6, women.sum())
    gap = largest_gap(person_terms(predictions), attributes(labels), "sex", "error", 1000)
    assert gap["most"] == "female" and gap["p"] < 0.01


def test_without_a_bias_nothing_is_flagged_more_often_than_chance():
    flagged, smallest = 0, []
    for seed in range(40):
        predictions, labels = toy_predictions(120, seed=seed)
        gaps = adjust_gaps(
            all_gaps(person_terms(predictions), attributes(labels), replicates=200, seed=seed, min_persons=15)
        )
        flagged += gaps.beyond_noise.any()
        smallest += list(gaps.p)
    assert flagged <= 6, "5 % of 40 reports are 2; 7 and more would happen once in 300 series"
    assert 0.35 < np.mean(smallest) < 0.65, "p values of nothing are uniform"


def test_small_groups_do_not_compete():
    predictions, labels = toy_predictions(60)
    labels["sex"] = np.where(labels.person < "p0005", "female", "male")
    predictions.loc[labels.sex == "female", "prediction"] += 50
    assert largest_gap(person_terms(predictions), attributes(labels), "sex", "bias", 100) is None


# --- calibration


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.5, 13.0), (2.0, -20.0)])
def test_calibration_recovers_the_line(slope, offset):
    rng = np.random.default_rng(0)
    p = rng.normal(26, 4, 600)
    predictions = pd.DataFrame(
        {
            "person": [f"{i // 2}" for i in range(600)],
            "prediction": p,
            "target": offset + slope * p + rng.normal(0, 1, 600),
        }
    )
    line = calibration(predictions, 500)
    assert (
        line["slope_low"] < slope < line["slope_high"]
        and line["intercept_low"] < offset < line["intercept_high"]
    )
    np.testing.assert_allclose(
        [line["slope"], line["intercept"]], np.polyfit(p, predictions.target, 1), rtol=1e-9
    )


# --- conformal


def test_margin_is_the_finite_sample_quantile():
    rng = np.random.default_rng(0)
    calibration = pd.DataFrame({"prediction": rng.normal(size=37)})
    calibration["target"] = calibration.prediction + rng.normal(size=37)
    found = conformal_margins(calibration, [0.0, 5.0], 0.9)
    margin = np.sort((calibration.target - calibration.prediction).abs())[math.ceil(38 * 0.9) - 1]
    np.testing.assert_allclose(found, [[-margin, margin], [5 - margin, 5 + margin]])


@pytest.mark.parametrize(("people", "enough"), [(8, False), (9, True)])
def test_too_few_people_give_no_interval(people, enough):
    frame = pd.DataFrame({"prediction": np.zeros(people), "target": np.arange(people, dtype=float)})
    assert np.isfinite(conformal_margins(frame, [0.0], 0.9)).all() == enough


def test_coverage_on_exchangeable_people():
    shares = []
    for seed in range(25):
        predictions, _ = toy_predictions(200, seed=seed)
        shares.append(coverage_terms(conformal(predictions, 0.8, seed)).coverage.mean())
    # with n = 20 calibration people a half fold: expected between 0.8 and 0.8 + 1 / 21
    assert 0.79 < np.mean(shares) < 0.86


def test_everybody_gets_an_interval_and_never_from_their_own_photographs():
    predictions, _ = toy_predictions(200, seed=1)
    calm = conformal(predictions)
    assert calm[["low", "high"]].notna().all(axis=None) and len(calm) == len(predictions)
    # one wild person moves only other people's margins
    wild = predictions.assign(target=np.where(predictions.person == "p0000", 1e6, predictions.target))
    moved = conformal(wild)
    mine = predictions.person == "p0000"
    np.testing.assert_allclose(moved[mine][["low", "high"]], calm[mine][["low", "high"]])


# --- shortcut


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Crops in which the background alone holds the label, and an encoder fitted on others."""
    from mefem.encoders import PixelEncoder

    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("planted") / "bmi"

    def pictures(labels):
        x = rng.normal(127, 6, (len(labels), 48, 48, 3))
        x[:, face_regions(48)["background and clothes"]] += (labels - 127)[:, None, None]
        return x.clip(0, 255).astype(np.uint8)

    label = rng.integers(60, 200, 120)
    meta = [
        {
            "key": f"{i:04d}",
            "person": f"p{i}",
            "bmi": float(v),
            "sex": "male" if i % 2 else "female",
            "age": 20.0 + i % 60,
        }
        for i, v in enumerate(label)
    ]
    stats = write_shard(
        folder,
        0,
        [(m["key"], encode_crop(x), m) for m, x in zip(meta, pictures(label), strict=True)],
        [{**m, "status": "success"} for m in meta],
    )
    write_manifest(folder, "bmi", 120, [stats], {"size": 48}, simulated=True)
    return folder, PixelEncoder(components=8, image_size=48, device="cpu").fit(
        pictures(rng.integers(60, 200, 150))
    )


QUICK = {"folds": 3, "epochs": 40, "batch": 16, "lrs": (0.03,), "weight_decays": (0.01,), "progress": False}


def test_a_planted_shortcut_is_found(planted):
    folder, encoder = planted
    left = remaining(region_predictions(encoder, folder, **QUICK), 300).set_index("seen")
    assert list(left.index) == ["whole picture", *REGIONS]
    assert left.share["background and clothes"] > 0.8 and not left.less["background and clothes"]
    assert left.r2["inner face"] < 0.2 and left.less["inner face"]
    assert "A shortcut" in page([], left.reset_index())
    alone = remaining(region_predictions(encoder, folder, jobs=1, **QUICK), 300).set_index("seen")
    pd.testing.assert_frame_equal(alone, left)  # one after the other is the same as side by side


def test_no_share_of_nothing():
    predictions, _ = toy_predictions(80)
    useless = predictions.assign(prediction=26.0)
    left = remaining({"whole picture": useless, "background and clothes": useless}, 200)
    assert left.share.isna().all()
    assert "predicts too little" in page([], left)
    predictions, _ = toy_predictions(800)
    little = predictions.assign(
        prediction=predictions.target.mean() + 0.015 * (predictions.target - predictions.target.mean())
    )
    left = remaining({"whole picture": little, "background and clothes": little}, 200)
    assert (
        0 < left.r2_low[0] and left.r2[0] < 0.05 and left.share.isna().all()
    )  # told from 0, and still next to nothing


def test_sees_only_leaves_the_encoder_alone(planted):
    _, encoder = planted
    pictures = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    whole, mask = SeesOnly(encoder), face_regions(48)["inner face"]
    np.testing.assert_array_equal(whole.tokens_of(pictures), encoder.tokens_of(pictures))
    hidden = SeesOnly(encoder, mask, (1, 2, 3)).tokens_of(pictures)
    np.testing.assert_array_equal(hidden, encoder.tokens_of(show_only(pictures, mask, (1, 2, 3))))
    assert whole.about() == encoder.about()


def test_mean_tokens_leaves_cls_out():
    tokens = np.random.default_rng(0).normal(size=(5, 10, 4)).astype(np.float16)
    mean = mean_tokens(Features("present", tokens, None, {"tokens": 10, "has_cls": True}))
    np.testing.assert_allclose(mean.tokens[:, 0], tokens[:, 1:].astype(np.float32).mean(1), atol=1e-6)
    assert mean.select("cls").shape == (5, 4)


def test_skin_tones_come_by_key(planted):
    folder, _ = planted
    tones = skin_tones(folder, 48, batch=50)
    assert len(tones) == 120 and tones.index.is_unique and tones.index[0] == "0000"


# --- the whole


def extract(planted, out):
    from mefem.features import extract_features

    folder, encoder = planted
    return extract_features(encoder, folder, out, progress=False)


def test_audit_of_an_encoder_end_to_end(planted, tmp_path):
    folder, _ = planted
    extract(planted, tmp_path / "features")
    features = tmp_path / "features"
    probed = all_predictions(features, tmp_path / "results", feature_set="cls", **QUICK)
    audits = audit_encoder(probed, features, folder.parent, tmp_path / "out", replicates=200)
    assert [one.state for one in audits] == ["present", "present", "label absent"]
    kept = pd.read_parquet(tmp_path / "out" / "bmi.parquet")
    assert len(kept) == 120 and {"key", "person", "fold", "target", "prediction", "low", "high"} <= set(kept)
    text = write_page(tmp_path / "figures", audits, None, "toy", "no encoder")
    assert "simulated people only" in text and "Not run: label absent" in text and "must not be used" in text
    assert "Not run: no encoder" in text
    for name in ("who_it_works_for.md", "who_it_works_for.png"):
        assert 0 < (tmp_path / "figures" / name).stat().st_size < 500_000
    everybody = audits[0].errors.iloc[0]
    assert f"{everybody.error:.2f}" in text and f"{audits[0].score}" in text, (
        "the page's numbers are the tables'"
    )


def test_the_audit_is_of_all_sources_of_the_body_mass_index(planted, tmp_path, monkeypatch):
    import shutil

    import mefem.fairness as fairness

    folder, _ = planted
    features, faces = tmp_path / "features", tmp_path / "faces"
    extract(planted, features)
    for suffix in ("npy", "json", "parquet"):
        shutil.copy(features / f"bmi.{suffix}", features / f"mcd-rppg.{suffix}")
    labels = pd.read_parquet(features / "mcd-rppg.parquet")
    labels.assign(key="m" + labels.key, person="m" + labels.person).to_parquet(features / "mcd-rppg.parquet")
    for name in ("bmi", "mcd-rppg"):
        shutil.copytree(folder, faces / name)
    measured = []
    tones = {
        "bmi": pd.Series(20.0, labels.key, name="angle"),
        "mcd-rppg": pd.Series(60.0, "m" + labels.key, name="angle"),
    }
    monkeypatch.setattr(fairness, "skin_tones", lambda path: measured.append(path.name) or tones[path.name])
    probed = all_predictions(features, tmp_path / "results", feature_set="cls", **QUICK)
    audits = audit_encoder(probed, features, faces, tmp_path / "out", replicates=200)
    assert (
        audits[0].errors.iloc[0].photographs == 240
        and audits[0].errors.iloc[0].persons == 2 * labels.person.nunique()
    )
    assert measured == ["bmi", "mcd-rppg"]  # once each, though two targets are read from them
    toned = audits[0].errors[audits[0].errors.attribute == "skin tone"]
    assert dict(zip(toned.group, toned.photographs, strict=True)) == {"tan": 120, "very light": 120}
    assert {p.name for p in (tmp_path / "out").glob("tones.*")} == {
        "tones.bmi.parquet",
        "tones.mcd-rppg.parquet",
    }


def test_too_few_people_are_a_state_of_the_audit(planted, tmp_path):
    folder, _ = planted
    extract(planted, tmp_path / "features")
    path = tmp_path / "features" / "bmi.parquet"
    labels = pd.read_parquet(path)
    few = labels.person.isin(labels.person.unique()[:3])
    labels.assign(bmi=labels.bmi.where(few)).to_parquet(path)
    probed = all_predictions(tmp_path / "features", tmp_path / "results", feature_set="cls", **QUICK)
    audits = audit_encoder(probed, tmp_path / "features", folder.parent, tmp_path / "out", replicates=200)
    assert audits[0].state == "too few labels" and audits[1].state == "present"
    assert "Not run: too few labels" in write_page(tmp_path / "figures", audits, None, "toy", "few people")


def test_kept_predictions_are_taken_and_strangers_refused(planted, tmp_path):
    extract(planted, tmp_path / "features")
    (tmp_path / "results").mkdir()
    labels = pd.read_parquet(tmp_path / "features" / "bmi.parquet")
    kept = pd.DataFrame(
        {
            "key": labels.key,
            "person": labels.person,
            "fold": "fold 0",
            "seed": 0,
            "target": labels.bmi,
            "prediction": 1.0,
        }
    )
    kept.to_parquet(tmp_path / "results" / "bmi.cls.parquet")
    assert (
        predictions_of(tmp_path / "features", tmp_path / "results", TARGETS[0], "cls").predictions.prediction
        == 1.0
    ).all()
    kept.assign(key="stranger").to_parquet(tmp_path / "results" / "bmi.cls.parquet")
    with pytest.raises(ValueError, match="stranger"):
        predictions_of(tmp_path / "features", tmp_path / "results", TARGETS[0], "cls")


@pytest.mark.parametrize("state", ["data absent", "weights absent"])
def test_what_is_absent_travels_into_the_page(tmp_path, state):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "bmi.json").write_text(
        json.dumps({"state": state, "dataset": "bmi", "reason": "why"})
    )
    features = tmp_path / "features"
    probed = all_predictions(features, tmp_path / "results")
    audits = audit_encoder(probed, features, tmp_path / "faces", tmp_path / "out")
    assert {one.state for one in audits} == {state}
    text = write_page(tmp_path, audits, None, reason=state)
    assert text.count(f"Not run: {state}") == 4 and "Nothing has been run" in text
    assert (tmp_path / "who_it_works_for.png").stat().st_size > 0


def test_the_headline_names_the_gap_and_its_absence():
    biased, labels = toy_predictions(300, biased={"60 and over": -4.0})
    fair, _ = toy_predictions(300)
    people = attributes(labels)
    assert "*60 and over*" in headline(adjust_all([audit("bmi", biased, people, replicates=300)]))
    assert "No gap" in headline(
        adjust_all([audit("bmi", fair, attributes(toy_predictions(300)[1]), replicates=300)])
    )
    assert headline([Audit(HAEMOGLOBIN, "data absent")]) == "Nothing has been run."


def test_regression_to_the_mean_is_not_the_headline():
    """A fair but poor probe of age: its gaps by age band are named; another gap leads the page."""
    predictions, labels = toy_predictions(300, biased={"60 and over": -4.0})
    ages = predictions.assign(target=labels.age, prediction=49 + 0.2 * (labels.age - 49))
    people = attributes(labels)
    weight = audit("bmi", predictions, people, replicates=300)
    age = audit("bmi-age", ages, people, replicates=300)
    audits = adjust_all([weight, age])
    surest = age.gaps[age.gaps.attribute == "age band"]
    assert surest.beyond_noise.all() and surest.gap.max() > 20  # larger than any other gap, in any unit
    assert "in body mass index" in headline(audits)
    assert headline([age]).startswith("**No gap between groups is beyond noise.**")
    text = page(audits)
    assert text.count("This is regression to the mean.") == len(surest)
    assert "age is overestimated more for *18 to 29* than for *60 and over*" in text


def test_gaps_of_a_large_set_are_adjusted_beside_a_set_that_has_none():
    predictions, labels = toy_predictions(300)
    few, few_labels = toy_predictions(15)
    audits = adjust_all(
        [
            audit("bmi", predictions, attributes(labels), replicates=100),
            audit("bmi", few, attributes(few_labels), replicates=100),
        ]
    )
    assert len(audits[0].gaps) and not len(audits[1].gaps) and audits[0].gaps.p_adjusted.between(0, 1).all()


def test_a_classification_is_refused():
    predictions, labels = toy_predictions(40)
    with pytest.raises(ValueError, match="classification"):
        audit("bmi-sex", predictions, attributes(labels))


def test_a_useless_probe_is_called_so():
    predictions, labels = toy_predictions(100)
    useless = predictions.assign(prediction=np.random.default_rng(0).normal(26, 0.1, len(predictions)))
    assert "It does not predict body mass index" in page(
        adjust_all([audit("bmi", useless, attributes(labels), replicates=200)])
    )


def test_the_figure_is_the_same_each_time():
    from mefem.fairness_page import figure_who

    predictions, labels = toy_predictions(60)
    one = adjust_all([audit("bmi", predictions, attributes(labels), replicates=100)])

    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        a, b = (figure_who(Path(folder) / f"{n}.png", one).read_bytes() for n in "ab")
    assert a == b and io.BytesIO(a).read(4) == b"\x89PNG"


def test_tones_are_del_binos():
    assert list(TONES.values()) == [-90, -30, 10, 28, 41, 55]
