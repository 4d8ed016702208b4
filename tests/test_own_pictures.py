"""Pretraining on a folder of photographs, outside any checkout, killed and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mefem
from mefem.cli import app
from mefem.models import create_encoder, encode_tokens, normalise, save_encoder
from mefem.own_pictures import Asked, init_changes, own_settings, pretrain_photographs

KWARGS = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=1)
SMALL = [
    *("--set", f"encoder.kwargs={json.dumps(KWARGS)}", "--set", "predictor={dim: 32, depth: 1, heads: 1}"),
    *("--set", "masking.width=1", "--set", "batch=4", "--set", "precision=fp32"),
]
PREDICTOR = {"dim": 32, "depth": 1, "heads": 1}
CHANGES = {"predictor": PREDICTOR, "masking": {"width": 1}, "batch": 4, "precision": "fp32"}


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
    return tmp_path / "photos"


def steps(count, every):
    return ["--set", f"steps={count}", "--set", f"checkpoint_every={every}", "--set", f"log_every={every}"]


def command(photos, out, *more):
    return ["pretrain", str(photos), "-o", str(out), "--framing", "as-is", *SMALL, *more]


def test_the_command_and_the_line_it_prints(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no params.yaml above it
    result = CliRunner().invoke(app, command(photos, "run", *steps(4, 2)))
    assert result.exit_code == 0, result.stderr
    assert "8  usable" in result.stdout
    assert eval(result.stdout.splitlines()[-1], {"mefem": mefem}).dim == 32
    about = json.loads(Path("run/run.json").read_text())
    assert about["photographs"] == "8 usable of 8 photographs of the user" and about["framing"] == "as-is 8"
    assert about["settings"]["masking"]["kind"] == "stripes" and about["settings"]["steps"] == 4
    again = CliRunner().invoke(app, command(photos, "run", *steps(4, 2)))
    assert "nothing to do: finished at step 4" in again.stdout
    crops = {path: path.stat().st_mtime_ns for path in Path("run/crops").iterdir()}
    for options in (steps(6, 2), [*steps(4, 2), "--framing", "pad"]):  # refused before anything is touched
        other = CliRunner().invoke(app, command(photos, "run", *options))
        assert other.exit_code == 1 and "give the same options to go on" in other.stderr
    assert crops == {path: path.stat().st_mtime_ns for path in Path("run/crops").iterdir()}


def test_killed_it_goes_on_to_the_same_encoder(photos, tmp_path):
    home = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "mefem", *command(photos, tmp_path / "killed", *steps(60, 10))]
    with subprocess.Popen(
        run, cwd=tmp_path, env=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not list((tmp_path / "killed").glob("checkpoints/*/step_*.pt")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed/encoder.safetensors").exists()
    for out in ("killed", "whole"):
        run[run.index("-o") + 1] = str(tmp_path / out)
        said = subprocess.run(run, cwd=tmp_path, env=home, check=True, capture_output=True, text=True).stdout
        assert said.splitlines()[-1] == f'mefem.load_encoder("{tmp_path / out}")'
    whole, killed = (tmp_path / out / "encoder.safetensors" for out in ("whole", "killed"))
    weights = [mefem.load_encoder(path).weights_hash() for path in (whole, killed)]
    assert weights[0] == weights[1]


def test_changed_photographs_start_again_unless_told(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (photos / "9.png").write_bytes(b"no picture")
    for _ in range(2):  # counted by the first, remembered by the second
        said = CliRunner().invoke(app, command(photos, "run", *steps(4, 2)))
        assert said.stdout.splitlines()[:2] == ["       8  usable", "       1  not an image"], said.stdout
    Image.new("RGB", (40, 40), "grey").save(photos / "0.png")
    again = CliRunner().invoke(app, command(photos, "run", *steps(4, 2)))
    assert "run starts at step 0" in again.stdout and "--resume-anyway goes on from it" in again.stdout
    Image.new("RGB", (40, 40), "white").save(photos / "0.png")
    anyway = CliRunner().invoke(app, command(photos, "run", *steps(4, 2), "--resume-anyway"))
    assert "goes on anyway from" in anyway.stdout and "finished at step 4" in anyway.stdout, anyway.stderr
    assert json.loads(Path("run/run.json").read_text())["made_from"]["adopted"]["step"] == 4


def test_the_hours_decide_the_steps_once(photos, tmp_path, monkeypatch):
    import mefem.own_pictures as own

    monkeypatch.setattr(own, "pictures_per_second", lambda *_: 2.0)
    asked = Asked("tiny", hours=0.02, framing="as-is", changes=CHANGES | {"encoder": {"kwargs": KWARGS}})
    pretrain_photographs(photos, tmp_path / "run", asked, progress=False)
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["settings"]["steps"] == 36 and plan["rate"] == 2.0  # 72 seconds, half a step a second
    given = Asked("tiny", framing="as-is", changes=asked.changes | {"steps": 200})
    config = own.write_plan(tmp_path, given, given.settings(), None)
    assert config.steps == 200 and config.checkpoint_every == 90  # three minutes
    monkeypatch.setattr(own, "pictures_per_second", lambda *_: pytest.fail("measured again"))
    pretrain_photographs(photos, tmp_path / "run", asked, progress=False)


def test_the_rate_is_measured():
    from mefem.own_pictures import pictures_per_second
    from mefem.training import MemoryPictures

    pictures = MemoryPictures(np.zeros((8, 32, 32, 3), np.uint8))
    config = own_settings("tiny", **CHANGES | {"encoder": {"kwargs": KWARGS}})
    assert 1 < pictures_per_second(config, pictures, seconds=0.1) < 1e6


def test_init_starts_from_the_weights_and_learns(photos, tmp_path):
    torch.manual_seed(3)
    file, name = tmp_path / "old/encoder.safetensors", "vit_small_patch16_224"
    save_encoder(file, create_encoder(**KWARGS), name, KWARGS, face_scale=1.3)
    no_step = {"steps": 1, "checkpoint_every": 1, "optimiser": {"lr": 1e-9, "start_lr": 0, "final_lr": 0}}
    learns = {
        "steps": 8,
        "checkpoint_every": 4,
        "optimiser": {"lr": 1e-2, "start_lr": 1e-2, "ema": [0.0, 0.0]},
    }
    pixels = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    old = mefem.load_encoder(tmp_path / "old").tokens_of(pixels)
    differences = []
    for name, changes in (("same", no_step), ("other", learns)):
        asked = Asked(framing="as-is", init=str(tmp_path / "old"), changes=CHANGES | changes)
        pretrain_photographs(photos, tmp_path / name, asked, progress=False)
        differences.append((mefem.load_encoder(tmp_path / name).tokens_of(pixels) - old).abs().max())
    assert differences[0] < 1e-4 and differences[1] > 0.01
    assert json.loads((tmp_path / "same/run.json").read_text())["started_from"] == str(tmp_path / "old")
    assert mefem.load_encoder(tmp_path / "same").face_scale == 1.3, "cropped as for the weights it began with"


def test_init_from_a_network_of_timm_keeps_its_arithmetic():
    import timm

    from mefem.export import PlainViT
    from mefem.own_pictures import init_state

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).eval().requires_grad_(False)
    vit = PlainViT("vit_tiny_patch16_224", {"depth": 1, "num_classes": 0}, model, (0.5,) * 3, (0.5,) * 3)
    config = own_settings("small", init_changes(vit))
    ours = create_encoder(config.encoder.name, **config.encoder.kwargs).eval()
    ours.load_state_dict(init_state(vit), strict=True)
    pixels = torch.randint(
        0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = encode_tokens(ours, normalise(pixels))
    expected = model.forward_features(normalise(pixels, vit.mean, vit.std))
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(encode_tokens(model, normalise(pixels)), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{photos}"], "--out is missing"),
        (["--size", "tiny"], "a folder of photographs is missing, which goes with --size"),
        (["{photos}", "-o", "{tmp}/run", "--profile", "smoke"], "a checkout's crops go with --profile"),
        (["{photos}", "-o", "{tmp}/run", "--size", "huge"], "expected one of tiny, small, base"),
        (["{photos}", "-o", "{photos}"], "is the folder of the photographs"),
        (["{photos}", "-o", "{tmp}"], "holds other things, such as photos"),
        (["{photos}/0.png", "-o", "{tmp}/run"], "expected a folder of photographs"),
        (["{photos}", "-o", "{tmp}/run", "--no-resume"], "a checkout's crops go with --no-resume"),
        (["{photos}", "-o", "{tmp}/run", "--init", "x", "--size", "tiny"], "leave out --size"),
        (["{photos}", "-o", "{tmp}/run", "--hours", "1", "--set", "steps=3"], "leave out --hours"),
        (["{photos}", "-o", "{tmp}/run", "--set", "masking.widht=3"], "did you mean 'masking.width'"),
        (["{photos}", "-o", "{tmp}/run", "--framing", "paper"], "the others would use"),
        (["{photos}", "-o", "{tmp}/run", "--init", "pixels"], "expected a plain VisionTransformer"),
    ],
)
def test_mistakes_are_one_line(photos, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    arguments = [text.replace("{photos}", str(photos)).replace("{tmp}", str(tmp_path)) for text in arguments]
    result = CliRunner().invoke(app, ["pretrain", *arguments])
    assert result.exit_code == 1 and words in result.stderr, result.output + result.stderr
    assert not (tmp_path / "run/encoder.safetensors").exists()


def test_sizes_are_those_of_the_paper_or_smaller():
    assert own_settings("base").encoder.name == "vit_base_patch16_224"
    assert own_settings("small").encoder.name == "vit_small_patch16_224"
    assert own_settings("tiny").encoder.image_size == 112
    assert own_settings("tiny").masking.width == 3
