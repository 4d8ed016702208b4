"""Training: killed and resumed is the same to the bit; nothing is mixed up, nothing destroyed."""

import csv
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from mefem.config import Pretrain, settings_hash
from mefem.monitoring import health, rankme
from mefem.training import CheckpointError, batch_indices, embedding_rank, normalise, pretrain, train

BASE = dict(
    encoder=dict(kwargs=dict(img_size=112, patch_size=8, embed_dim=32, depth=1, num_heads=1)),
    predictor=dict(dim=32, depth=1, heads=1), batch=4, steps=12, checkpoint_every=4, log_every=2, device="cpu",
)


def config(**changes):
    return Pretrain(**(BASE | changes))


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 255, (20, 112, 112, 3), dtype=np.uint8)


def weights(jepa):
    return {key: value.clone() for key, value in jepa.state_dict().items()}


def test_no_picture_twice_in_an_epoch_and_all_in_each():
    count, batch = 23, 5
    seen = np.concatenate([batch_indices(step, batch, count, seed=7) for step in range(23)])
    for epoch in range(5):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert list(seen[:count]) != list(seen[count : 2 * count])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kill_minus_nine_and_resume_is_bit_identical(tmp_path, pictures, precision):
    straight = weights(train(config(precision=precision), pictures, tmp_path / "straight", progress=False))
    np.save(tmp_path / "pictures.npy", pictures)
    script = textwrap.dedent(f"""
        import numpy as np, time, mefem.training as t
        from mefem.config import Pretrain
        update = t.JEPA.update_teacher
        def slow(self, m):
            time.sleep(0.1); update(self, m)
        t.JEPA.update_teacher = slow
        t.train(Pretrain(**{BASE | dict(precision=precision)!r}), np.load({str(tmp_path / "pictures.npy")!r}), t.Path({str(tmp_path / "killed")!r}), progress=False)
    """)
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.time() + 120
    while not list((tmp_path / "killed").glob("step_*.pt")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = sorted(p.name for p in (tmp_path / "killed").glob("step_*.pt"))
    assert found and found[-1] != "step_00000012.pt", "the kill came too late to test anything"
    resumed = weights(train(config(precision=precision), pictures, tmp_path / "killed", progress=False))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    steps = [int(row["step"]) for row in csv.DictReader((tmp_path / "killed" / "log.csv").open())]
    assert steps == sorted(set(steps)) and steps[-1] == 12


def test_checkpoint_of_other_settings_is_refused_and_kept(tmp_path, pictures):
    train(config(), pictures, tmp_path, progress=False)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("step_*.pt")}
    with pytest.raises(CheckpointError, match=settings_hash(config())):
        train(config(seed=1), pictures, tmp_path, progress=False)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("step_*.pt")} == before
    with pytest.raises(CheckpointError, match="resume=True"):
        train(config(), pictures, tmp_path, resume=False, progress=False)


def test_truncated_newest_checkpoint_falls_back(tmp_path, pictures, capsys):
    straight = weights(train(config(), pictures, tmp_path, progress=False))
    newest = sorted(tmp_path.glob("step_*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    again = weights(train(config(), pictures, tmp_path, progress=False))
    assert "step_00000012.pt cannot be read" in capsys.readouterr().out
    assert all(torch.equal(straight[key], again[key]) for key in straight)
    for path in tmp_path.glob("step_*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        train(config(), pictures, tmp_path, progress=False)


def test_loss_falls_and_representation_keeps_its_rank(tmp_path, pictures):
    smooth = np.linspace(0, 255, 112)[None, :, None, None] * np.random.default_rng(1).random((20, 1, 112, 3))
    out = train(config(steps=60, checkpoint_every=60, precision="fp32", optimiser=dict(lr=2e-3)), smooth.astype(np.uint8), tmp_path, progress=False)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])
    assert embedding_rank(out, torch.from_numpy(smooth.astype(np.uint8)), torch.device("cpu")) > 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, pictures):
    wild = config(steps=60, checkpoint_every=50, log_every=1, precision="fp32", optimiser=dict(lr=1e8, start_lr=1e8, warmup=0))
    with pytest.raises(FloatingPointError, match="not finite at three checks in a row"):
        train(wild, pictures, tmp_path, progress=False)
    assert not list(tmp_path.glob("step_*.pt"))  # a broken state is never saved over a good one


def test_pretrain_writes_encoder_log_and_settings(tmp_path, pictures):
    path = pretrain(config(), root=tmp_path, run="x", pictures=pictures, progress=False)
    assert path == tmp_path / "data" / "runs" / "x" / "encoder.safetensors"
    assert {p.name for p in path.parent.iterdir()} == {"encoder.safetensors", "log.csv", "run.json", settings_hash(config())}
    assert pretrain(config(seed=3), root=tmp_path, run="x", pictures=pictures, progress=False).exists()  # its own folder


def test_absent_data_is_named(tmp_path):
    from mefem.shards import write_manifest

    folder = tmp_path / "data" / "faces" / "facecaption"
    folder.mkdir(parents=True)
    write_manifest(folder, "facecaption", 0, [], {}, state="absent", reason="no file there")
    with pytest.raises(FileNotFoundError, match="facecaption"):
        pretrain(config(datasets=("facecaption",)), root=tmp_path, progress=False)


def test_normalise_matches_torchvision():
    from torchvision.transforms.v2 import functional as tv

    images = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    expected = tv.normalize(tv.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalise(images), expected, rtol=1e-5, atol=1e-5)


def test_rankme_against_numpy_and_health_flags():
    x = torch.randn(200, 30)
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = s / s.sum()
    assert rankme(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert rankme(torch.ones(50, 8)) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError):
        rankme(torch.full((3, 3), float("nan")))
    assert health(0.2, 0.3, 20) == [] and len(health(float("nan"), 0.0, 1.0)) == 3
