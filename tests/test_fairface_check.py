"""The FairFace check of benchmarks/fairface.py on a few of the real photographs.

Every number against its own predictions.
"""

import json

import numpy as np
import pandas as pd
import pytest

from mefem.models import create_encoder, save_encoder

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)


@pytest.fixture(scope="module")
def check(script):
    return script("benchmarks/fairface.py")


def test_fairface_probes_of_three_encoders_on_real_photographs(check, shared, tmp_path):
    encoder = save_encoder(
        tmp_path / "encoder.safetensors",
        create_encoder("vit_small_patch16_224", **TINY),
        "vit_small_patch16_224",
        TINY,
    )
    numbers = check.main(
        [
            "--raw",
            str(shared / "fairface"),
            "--encoder",
            str(encoder),
            "--out",
            str(tmp_path / "out"),
            "--limit",
            "150",
            "--epochs",
            "2",
            "--jobs",
            "1",
            "--write",
            str(tmp_path / "fairface"),
        ]
    )
    assert set(numbers.encoder) == {"mefem", "random", "pixels"}
    assert set(numbers.metric) == {"accuracy/White", "accuracy/non-White"}
    kept = pd.read_parquet(tmp_path / "out" / "results" / "mefem" / "fairface-age.cls.parquet")
    labels = pd.read_parquet(tmp_path / "out" / "features" / "mefem" / "fairface.parquet").set_index("key")
    assert len(kept) == 150 and set(labels.split[kept.key]) == {"validation"}, (
        "tested on the official validation part, on nobody else"
    )
    white = (labels.race_name[kept.key] == "White").to_numpy()
    for group, rows in (("White", white), ("non-White", ~white)):
        row = numbers[
            (numbers.encoder == "mefem")
            & (numbers["feature_set"] == "cls")
            & (numbers["head"] == "mlp")
            & (numbers.metric == f"accuracy/{group}")
        ].iloc[0]
        age = labels.age[kept.key].to_numpy()[rows]
        assert row.n == rows.sum() and np.isclose(row.value, (kept.prediction.to_numpy()[rows] == age).mean())
        assert (
            np.isclose(row.majority, np.bincount(age).max() / len(age)) and row.low <= row.value <= row.high
        )
        assert f"always the most frequent class {row.majority:.3f}" in (tmp_path / "fairface.md").read_text()
    written = json.loads((tmp_path / "fairface.json").read_text())
    assert (written["train"], written["validation"]) == (150, 150) and len(written["rows"]) == len(numbers)


def test_the_sentence_tells_noise_from_a_gain(check):
    row = dict(features="cls", head="mlp", metric="accuracy/White", majority=0.3, n=100)
    numbers = pd.DataFrame(
        [
            row | dict(encoder="mefem", value=0.4, low=0.31, high=0.5),
            row | dict(encoder="mefem", value=0.2, low=0.1, high=0.3),
            row | dict(encoder="random", value=0.35, low=0.25, high=0.45),
        ]
    )
    said = check.sentence(numbers, "White")
    assert (
        "mefem 0.400 [0.310, 0.500]," in said
        and "random 0.350 [0.250, 0.450] (not above" in said
        and "0.200" not in said
    )
