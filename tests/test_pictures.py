"""Pictures of what it sees: colours, attention, neighbours and map against what was planted."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mefem.features import Features
from mefem.pictures import (
    POOLER,
    attention_maps,
    embedding_map,
    figure_map,
    figure_sees,
    fit_pooler,
    mean_embedding,
    neighbour_ratio,
    neighbours,
    token_colours,
    write_pictures,
)
from mefem.probing import AttentivePooler, bare_norm


def test_colours_follow_the_tokens():
    rng = np.random.default_rng(0)
    tokens = rng.normal(0, 0.01, (3, 16, 6))
    grid = tokens.reshape(3, 4, 4, 6)
    grid[:, :, :2, 0] += 1
    colours = token_colours(tokens)
    assert colours.shape == (3, 4, 4, 3) and colours.min() >= 0 and colours.max() <= 1
    left, right = colours[:, :, :2, 0], colours[:, :, 2:, 0]
    assert abs(left.mean() - right.mean()) > 0.8 and left.std() < 0.1
    with pytest.raises(ValueError, match="not a square grid"):
        token_colours(tokens[:, :15])


def test_attention_is_the_poolers_softmax():
    torch.manual_seed(0)
    pooler, tokens = (
        AttentivePooler(8, 2, 1),
        np.random.default_rng(0).normal(size=(5, 9, 8)).astype(np.float32),
    )
    for p in pooler.parameters():
        torch.nn.init.normal_(p)
    x = bare_norm(torch.from_numpy(tokens)).double().numpy()
    scale, shift = (getattr(pooler.norm_tokens, n)[0].detach().double().numpy() for n in ("scale", "shift"))
    query = (pooler.query @ pooler.to_query.weight + pooler.to_query.bias)[0, 0].detach().double().numpy()
    keys = (x * scale + shift) @ pooler.to_key.weight[0].detach().double().numpy() + pooler.to_key.bias[
        0
    ].detach().double().numpy()
    expected = []
    for h in range(2):
        logits = keys[..., 4 * h : 4 * h + 4] @ query[4 * h : 4 * h + 4] / 2
        weights = np.exp(logits - logits.max(1, keepdims=True))
        expected.append(weights / weights.sum(1, keepdims=True))
    np.testing.assert_allclose(
        attention_maps(pooler, tokens, batch=2).reshape(5, 9), np.mean(expected, 0), atol=1e-5
    )


def planted(n=400, patch=7, seed=0):
    rng = np.random.default_rng(seed)
    tokens, bmi = rng.normal(0, 1, (n, 16, 16)).astype(np.float32), rng.normal(26, 5, n)
    tokens[:, patch, :8] += 3
    tokens[:, patch, 8:] += 3 * (bmi[:, None] - 26) / 5
    labels = pd.DataFrame(
        {"key": [f"{i}" for i in range(n)], "person": [f"p{i}" for i in range(n)], "bmi": bmi}
    )
    return Features("present", tokens, labels, {"has_cls": False, "tokens": 16, "heads": 2})


@pytest.mark.parametrize("patch", [2, 7])
def test_attention_finds_the_patch_that_matters(patch):
    features = planted(patch=patch)
    pooler, rows = fit_pooler(features, "bmi", replace(POOLER, lrs=(1e-2,), epochs=40, batch=32))
    assert len(rows) == 80
    assert attention_maps(pooler, features.tokens[rows]).mean(0).ravel().argmax() == patch


def test_neighbours_are_other_people_nearest_first():
    rng = np.random.default_rng(0)
    vectors, persons = rng.normal(size=(30, 5)), np.repeat([f"p{i}" for i in range(10)], 3)
    near = neighbours(vectors, persons, 4)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for i in range(30):
        best = {}
        for j in np.argsort(-(unit @ unit[i])):
            if persons[j] != persons[i]:
                best.setdefault(persons[j], j)
        assert list(near[i]) == list(best.values())[:4]
    with pytest.raises(ValueError, match="more than 10 people"):
        neighbours(vectors, persons, 10)


def test_neighbour_ratio_knows_order_from_noise():
    rng = np.random.default_rng(0)
    line = np.sort(rng.normal(size=200))
    vectors = np.stack([np.cos(line), np.sin(line)], 1)
    near = neighbours(vectors, np.arange(200), 1)
    assert neighbour_ratio(near, line) < 0.1
    assert 0.8 < neighbour_ratio(near, rng.permutation(line)) < 1.2


def test_the_map_keeps_clusters_together():
    rng = np.random.default_rng(0)
    which = np.repeat([0, 1], 30)
    points = embedding_map(rng.normal(0, 0.1, (60, 8)) + 5 * which[:, None])
    centre = np.stack([points[which == k].mean(0) for k in (0, 1)])
    nearest = np.linalg.norm(points[:, None] - centre, axis=-1).argmin(1)
    assert (nearest == which).all()
    with pytest.raises(ValueError, match="at least four"):
        embedding_map(points[:3])


def test_mean_embedding_is_centred():
    patches = np.random.default_rng(0).normal(3, 1, (6, 4, 5)).astype(np.float16)
    found = mean_embedding(patches)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    mean = patches.astype(float).mean(1)
    np.testing.assert_allclose(found, mean - mean.mean(0), atol=2e-3)


def test_a_map_needs_a_label(tmp_path):
    with pytest.raises(ValueError, match="none of bmi, age, sex"):
        figure_map(tmp_path / "x.png", np.zeros((4, 2)), pd.DataFrame({"key": list("abcd")}))


def write_folder(tmp_path, simulated, people=24):
    """Crops and features of random pictures, on disk."""
    from mefem.faces import encode_crop
    from mefem.features import extract_features
    from mefem.shards import write_manifest, write_shard

    rng, faces = np.random.default_rng(0), tmp_path / "faces" / "bmi"
    meta = [
        {
            "key": f"{i:03d}",
            "person": f"p{i // 2}",
            "bmi": float(rng.normal(26, 4)),
            "age": 20.0 + i,
            "sex": "female" if i % 4 < 2 else "male",
        }
        for i in range(2 * people)
    ]
    pictures = rng.integers(0, 256, (len(meta), 32, 32, 3), np.uint8)
    stats = write_shard(
        faces,
        0,
        [(m["key"], encode_crop(x), m) for m, x in zip(meta, pictures, strict=True)],
        [{**m, "status": "success"} for m in meta],
    )
    write_manifest(faces, "bmi", len(meta), [stats], {"size": 32}, simulated=simulated)
    extract_features(
        "random:vit_tiny_patch16_224", faces, tmp_path / "features", device="cpu", progress=False
    )
    return tmp_path / "features", faces


@pytest.mark.parametrize("simulated", [True, False])
def test_both_figures_from_folders(tmp_path, simulated, monkeypatch):
    import mefem.pictures as module

    drawn = {}
    monkeypatch.setattr(
        module,
        "figure_sees",
        lambda path, crops, few, maps, near, **k: (
            drawn.update(near=near, maps=maps),
            figure_sees(path, crops, few, maps, near, **k),
        )[1],
    )
    features, faces = write_folder(tmp_path, simulated)
    how = replace(POOLER, epochs=1, folds=2, batch=16)
    about = write_pictures(features, faces, tmp_path / "figures", how=how)
    assert about["state"] == "present" and about["people"] == 24 and about["simulated"] is simulated
    assert set(drawn["maps"]) == {"body mass index", "age", "sex"} and 0 < about["neighbour_ratio"]["age"] < 3
    assert (drawn["near"] is None) == (not simulated), "no face of a real person is drawn"
    for name in ("what_it_sees.png", "embedding_map.png"):
        assert (
            0 < (tmp_path / "figures" / name).stat().st_size < 1_000_000
        )  # crops of noise, which no PNG makes small


@pytest.mark.parametrize("meta", [{"state": "data absent"}, {"state": "weights absent"}])
def test_what_is_absent_is_written_on_the_figures(tmp_path, meta):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "bmi.json").write_text(json.dumps({**meta, "dataset": "bmi", "reason": "why"}))
    assert write_pictures(tmp_path / "features", tmp_path / "faces", tmp_path)["state"] == meta["state"]
    assert all((tmp_path / n).stat().st_size > 0 for n in ("what_it_sees.png", "embedding_map.png"))
