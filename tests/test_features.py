"""Embeddings in memory, in scikit-learn and on disk."""
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from mefem import features as module
from mefem.encoders import PixelEncoder, freeze
from mefem.features import (
    FaceEmbedder,
    decode_ahead,
    embed,
    extract_features,
    features_of,
    load_features,
    select_tokens,
    to_half,
)
from mefem.files import write_json
from mefem.models import IMAGENET_MEAN, IMAGENET_STD, create_encoder
from mefem.shards import ShardError, load_images, write_manifest, write_shard


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    model = create_encoder("vit_small_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    return freeze("small", model, IMAGENET_MEAN, IMAGENET_STD, device="cpu")


CROPS = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)


def jpeg(rgb):
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "JPEG", quality=95)
    return out.getvalue()


def make_faces(folder, count=7, dataset="bmi"):
    keys = [f"{i:09d}" for i in range(count)]
    half = count // 2
    stats = [
        write_shard(
            folder,
            i,
            [(k, jpeg(CROPS[int(k)]), {}) for k in part],
            [{"key": k, "person": k, "bmi": 20.0 + int(k), "status": "success", "error_message": None} for k in part],
        )
        for i, part in enumerate((keys[:half], keys[half:]))
    ]
    write_manifest(folder, dataset, count, stats, {"size": 32}, simulated=True)
    return folder


def test_select_tokens():
    tokens = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    assert np.shares_memory(select_tokens(tokens, "patches", True), tokens)
    assert (select_tokens(tokens, "patches", True) == tokens[:, 1:]).all()
    for feature_set, has_cls, data, words in (("mean", True, tokens, "patches"), ("cls", False, tokens, "no CLS"),
                                              ("patches+cls", False, tokens, "no CLS"),
                                              ("patches", True, tokens[:, :1], "one vector")):
        with pytest.raises(ValueError, match=words):
            select_tokens(data, feature_set, has_cls)


def test_embed_takes_what_is_at_hand(encoder, tmp_path):
    Image.fromarray(CROPS[0]).save(tmp_path / "a.png")
    whole = embed(CROPS, encoder, "patches+cls", batch=3)
    assert whole.shape == (7, 17, 24) and whole.dtype == np.float32
    assert np.allclose(whole, encoder.tokens_of(CROPS), atol=1e-5)
    for one in (CROPS[0], Image.fromarray(CROPS[0]), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.allclose(embed([one], encoder)[0], whole[0, 0], atol=1e-5)
    mixed = embed([CROPS[0], CROPS[1].repeat(2, 0).repeat(2, 1)], encoder)
    assert np.allclose(mixed[0], whole[0, 0], atol=1e-5) and mixed.shape == (2, 24)
    with pytest.raises(ValueError, match="no pictures"):
        embed([], encoder)
    with pytest.raises(ValueError, match="square"):
        embed([CROPS[0], CROPS[1][:20]], encoder)


def test_scikit_learn_conventions(encoder):
    embedder = FaceEmbedder(encoder=encoder, features="patches", detect=False, batch=4)
    params = embedder.get_params()
    assert {"encoder", "features", "detect", "batch", "device", "on_error"} == set(params)
    copy = clone(FaceEmbedder("mefem-s", features="patches"))
    assert copy.get_params() == FaceEmbedder("mefem-s", features="patches").get_params() and not hasattr(
        copy, "encoder_"
    )
    assert embedder.set_params(features="cls").features == "cls"
    with pytest.raises(Exception, match="not fitted"):
        FaceEmbedder(encoder).transform(list(CROPS))
    assert np.allclose(embedder.fit_transform(list(CROPS)), embed(CROPS, encoder), atol=1e-5)
    pipeline = make_pipeline(FaceEmbedder(encoder, detect=False), Ridge(alpha=1e-3)).fit(list(CROPS), np.arange(7.0))
    assert pipeline.score(list(CROPS), np.arange(7.0)) > 0.9
    with pytest.raises(ValueError, match="features='mean'"):
        FaceEmbedder(encoder, features="mean").fit(None)


def test_pictures_without_a_face(encoder, tmp_path):
    Image.fromarray(CROPS[0]).save(tmp_path / "noise.png")
    with pytest.raises(ValueError, match="noise.png.*no face"):
        FaceEmbedder(encoder).fit(None).transform([tmp_path / "noise.png"])
    with pytest.raises(ValueError, match="gone.png.*missing"):
        FaceEmbedder(encoder).fit(None).transform([tmp_path / "gone.png"])
    rows = (
        FaceEmbedder(encoder, on_error="nan", features="patches")
        .fit(None)
        .transform([tmp_path / "noise.png", tmp_path / "x"])
    )
    assert rows.shape == (2, 16, 24) and np.isnan(rows).all()


def test_pixels_are_fitted_by_the_transformer():
    rows = FaceEmbedder(PixelEncoder(components=3, image_size=16, device="cpu"), detect=False).fit_transform(
        list(CROPS)
    )
    assert rows.shape == (7, 3) and np.abs(rows.mean(0)).max() < 1e-3


def test_real_photographs(encoder, shared):
    paths = sorted((shared / "frll").glob("*.jpg"))
    rows = FaceEmbedder(encoder).fit(None).transform(paths)
    assert rows.shape == (24, 24) and np.isfinite(rows).all() and np.unique(rows.round(3), axis=0).shape[0] == 24


def test_decoding_ahead_keeps_order_and_bounds():
    drawn = []

    def samples():
        for i in range(40):
            drawn.append(i)
            yield f"{i}", jpeg(np.full((8, 8, 3), 6 * i, np.uint8))

    batches = decode_ahead(samples(), 8, batch=4, threads=3, ahead=2)
    first = next(batches)
    assert len(drawn) <= 12                                   # no more than the batches in flight have been read
    found = np.concatenate([first, *batches])[:, 0, 0, 0]
    assert np.abs(found.astype(int) - 6 * np.arange(40)).max() <= 2
    with pytest.raises(ShardError, match="broken"):
        list(decode_ahead([("broken", b"no jpeg")], 8, 4))


def test_extraction_and_back(encoder, tmp_path):
    faces = make_faces(tmp_path / "faces")
    meta = extract_features(encoder, faces, tmp_path / "out", batch=3, progress=False, source="here")
    loaded = load_features(tmp_path / "out", "bmi")
    assert loaded.state == "present" and loaded.tokens.dtype == np.float16 and isinstance(loaded.tokens, np.memmap)
    assert meta == loaded.meta and meta["n"] == 7 and meta["simulated"] and meta["source"] == "here"
    assert list(loaded.labels.bmi) == [20.0 + i for i in range(7)]
    assert np.allclose(loaded.tokens, encoder.tokens_of(load_images(faces)), atol=5e-3)
    assert np.array_equal(loaded.select("cls"), loaded.tokens[:, 0])
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    extract_features(encoder, faces, tmp_path / "out", batch=3, progress=False, source="here")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


def test_features_are_kept_until_encoder_crops_or_code_change(encoder, tmp_path, monkeypatch):
    faces, out = make_faces(tmp_path / "faces"), tmp_path / "out"
    meta = extract_features(encoder, faces, out, progress=False)
    assert {"encoder_hash", "faces_hash", "made_from", "key"} <= set(meta)
    monkeypatch.setattr(module, "_write_tokens", lambda *_: pytest.fail("extracted again"))
    assert extract_features(encoder, faces, out, progress=False) == meta
    other = freeze("small", create_encoder("vit_small_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3),
                   IMAGENET_MEAN, IMAGENET_STD, device="cpu")
    for change in (lambda: extract_features(other, faces, out, progress=False),
                   lambda: extract_features(encoder, make_faces(tmp_path / "fewer", 6), out, progress=False)):
        with pytest.raises(pytest.fail.Exception, match="again"):
            change()
        write_json(out / "bmi.json", meta)                              # a failure took the account away
    monkeypatch.setattr(module, "code_hash", lambda *_: "another")
    with pytest.raises(pytest.fail.Exception, match="again"):
        extract_features(encoder, faces, out, progress=False)


def test_a_failure_leaves_nothing_that_calls_itself_finished(encoder, tmp_path, monkeypatch):
    faces, out = make_faces(tmp_path / "faces"), tmp_path / "out"
    extract_features(encoder, faces, out, progress=False)
    (out / "bmi.parquet").unlink()                     # no longer whole, so it has to be made again
    calls = iter(range(10))
    monkeypatch.setattr(module, "to_half", lambda t: to_half(t) if next(calls) == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extract_features(encoder, faces, out, batch=3, progress=False)
    assert not (out / "bmi.json").exists() and not [p for p in out.iterdir() if p.name.startswith(".")]
    with pytest.raises(FileNotFoundError, match="bmi.json"):
        load_features(out, "bmi")


def test_values_beyond_half_precision_are_refused():
    assert to_half(torch.ones(2)).dtype == np.float16
    for value in (1e5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="half precision"):
            to_half(torch.tensor([1.0, value]))


def test_absence_travels(encoder, tmp_path):
    write_manifest(tmp_path / "faces", "bmi", 0, [], {"size": 32}, state="absent", reason="not downloaded")
    extract_features(encoder, make_faces(tmp_path / "here"), tmp_path / "out", progress=False)
    meta = extract_features(encoder, tmp_path / "faces", tmp_path / "out", progress=False)
    assert meta["state"] == "data absent" and meta["reason"] == "not downloaded"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["bmi.json"]
    assert load_features(tmp_path / "out", "bmi").state == "data absent"
    never = features_of("pixels", [tmp_path / "celeba"], tmp_path / "n", progress=False)
    assert never["celeba"]["state"] == "data absent" and "never cropped" in never["celeba"]["reason"]
    found = features_of("buffalo:gone.onnx", [make_faces(tmp_path / "faces2")], tmp_path / "b", progress=False)
    assert (
        found["bmi"]["state"] == "weights absent" and "licence" in load_features(tmp_path / "b", "bmi").meta["reason"]
    )
    assert (
        features_of("pixels", [tmp_path / "here"], tmp_path / "p", [tmp_path / "faces"])["bmi"]["state"]
        == "data absent"
    )


def test_pixels_in_the_graph(tmp_path):
    faces, train = make_faces(tmp_path / "faces"), make_faces(tmp_path / "train", 5, "facecaption")
    meta = features_of("pixels", [faces], tmp_path / "out", fit_on=[train], device="cpu", progress=False)["bmi"]
    assert meta["tokens"] == 1 and meta["dim"] == 4 and (tmp_path / "out" / "pixels.safetensors").is_file()
    assert load_features(tmp_path / "out", "bmi").select("cls").shape == (7, 4)


def test_damaged_files_are_named(encoder, tmp_path):
    extract_features(encoder, make_faces(tmp_path / "faces"), tmp_path, progress=False)
    meta = json.loads((tmp_path / "bmi.json").read_text())
    (tmp_path / "bmi.json").write_text(json.dumps(meta | {"n": 9}))
    with pytest.raises(ValueError, match="bmi.json: 9 pictures"):
        load_features(tmp_path, "bmi")
    (tmp_path / "bmi.json").write_text(json.dumps(meta))
    whole = (tmp_path / "bmi.npy").read_bytes()
    (tmp_path / "bmi.npy").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="bmi.npy"):
        load_features(tmp_path, "bmi")
