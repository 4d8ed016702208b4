"""tools/gpu_faces.sh does all its parts on a CPU with small numbers, in time, and leaves readable results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool(script):
    return script("tools/gpu_faces.py")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder as FairFace's: pictures of noise, and the two lists."""
    folder, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 12)):
        (folder / split).mkdir()
        lines = ["file,age,gender,race,service_test"]
        for i in range(1, count + 1):
            noise = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((64, 64)).save(folder / split / f"{i}.jpg")
            race = ("White", "Black", "Indian")[i % 3]
            lines.append(
                f"{split}/{i}.jpg,{('3-9', '20-29')[i % 2]},{('Male', 'Female')[i // 2 % 2]},{race},TRUE"
            )
        (folder / f"fairface_label_{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def packed(tool, photographs, tmp_path_factory):
    """The folder that travels."""
    return tool.pack(photographs, photographs, tmp_path_factory.mktemp("pack"), quality=90).parent


def run(packed, out, *arguments):
    """The script, as the lent machine calls it, on one thread."""
    environment = os.environ | {"OUT": str(out), "GPU_FACES_PACK": str(packed), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "tools" / "gpu_faces.sh"), *arguments]
    return subprocess.run(
        command, env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )


def test_the_pack_gives_back_pictures_and_labels(tool, photographs, packed):
    faces = tool.read_pack(packed / "faces.npz")
    assert faces["images"].shape == (36, 112, 112, 3) and faces["train"].sum() == 24
    assert list(faces["age_names"][faces["age"][:2]]) == ["20-29", "3-9"]
    assert list(faces["race_names"][faces["race"][:3]]) == ["Black", "Indian", "White"]
    with Image.open(photographs / "train" / "2.jpg") as picture:
        original = np.asarray(picture.resize((112, 112), Image.Resampling.LANCZOS), float)
    assert np.abs(faces["images"][1] - original).mean() < 8 < np.abs(faces["images"][2] - original).mean()


def test_a_pack_that_is_too_large_is_refused(tool, photographs, tmp_path):
    with pytest.raises(SystemExit, match="lower --quality"):
        tool.pack(photographs, photographs, tmp_path, most=0.001)
    assert not (tmp_path / "faces.npz").exists()


def test_steps_that_make_the_host_wait_are_found(tool):
    from step import Ours, Plain

    images = torch.randn(2, 3, 224, 224)
    config = tool.step_settings("vit_small_patch16_224", 2, small=True)
    waits = [tool.host_waits(kind(config, images.device).step, images, 1)["waits"] for kind in (Ours, Plain)]
    assert not waits[0] and waits[1]["aten::nonzero"] > 0 and waits[1]["aten::_local_scalar_dense"] > 0


def test_all_parts_on_a_cpu(packed, tmp_path):
    done = run(packed, tmp_path, "200", "pretrain", "rows", "--", "--small", "--set", "flip=true")
    assert done.returncode == 0, done.stdout + done.stderr
    found, rows = (json.loads((tmp_path / f"{part}.json").read_text()) for part in ("pretrain", "rows"))
    assert found["finished"] and found["pictures_seen"] == 64 and found["settings"]["flip"]
    assert set(rows["rows"]) == {"stripes2", "stripes3"}
    for result in (found["untrained"], found["pixels"], found["ours"], *rows["rows"].values()):
        assert all(0 <= result[name]["accuracy"] <= 1 for name in ("age", "gender", "race"))
    assert found["ours"]["token_rank"] != found["untrained"]["token_rank"]
    assert (tmp_path / "curve.csv").read_text().count("\n") > 2

    from mefem import embed, load_encoder

    encoder = load_encoder(tmp_path / "encoder.safetensors")
    assert np.isfinite(embed(np.zeros((1, 112, 112, 3), np.uint8), encoder)).all()
    assert (
        sum(file.stat().st_size for file in tmp_path.iterdir()) < 2**20 and len(list(tmp_path.iterdir())) <= 8
    )


def test_recipes_run_next_to_each_other(packed, tmp_path):
    runs = ("paper", "views:method=views;method_options.weight=1.0")
    command = [sys.executable, ROOT / "tools" / "gpu_faces.py", "recipes", "--pack", packed, "--small"]
    command += ["--seconds", "200", "--out", tmp_path, *(part for run in runs for part in ("--run", run))]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    paper, views = (
        json.loads((tmp_path / name / "pretrain.json").read_text()) for name in ("paper", "views")
    )
    assert "pixels" in paper and "pixels" not in views
    assert views["settings"]["method_options"] == {"weight": 1.0} and views["finished"]
    assert paper["ours"] != views["ours"]
    assert not (packed / "decoded.npy").exists()


def test_too_little_time_is_said(packed, tmp_path):
    done = run(packed, tmp_path, "9", "steps", "rows")
    assert done.returncode == 0
    assert "skipped: steps needs 60 s" in done.stdout and "skipped: rows needs 130 s" in done.stdout
    assert not list(tmp_path.glob("*.json"))
