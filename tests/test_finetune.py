"""Fine-tuning: the groups of parameters, a label that only a moving network learns, kills, the command."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mefem.cli import app
from mefem.compute import torch_threads
from mefem.embedding import embed_photographs
from mefem.encoders import load_encoder
from mefem.finetune import Recipe, Tuned, finetune_photographs, optimiser_of, tunable
from mefem.models import create_encoder, save_encoder
from mefem.own_labels import LabelModel, predict_labels

KWARGS = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2)
FAST = ("--epochs", "4", "--folds", "3", "--lr", "1e-3", "--framing", "as-is", "--device", "cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """So small a network is faster with one thread; and a killed run and a whole one have as many."""
    with torch_threads(1):
        yield


def mefem(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + result.stderr + repr(result.exception)
    return result


def draw(folder: Path, count: int) -> Path:
    """Photographs of count / 2 people in `folder`; their label is how much brighter the brighter half is."""
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        picture = rng.integers(60, 180, 3) + rng.integers(-20, 20, (32, 32, 3))
        amount = rng.uniform(0, 60)
        half = slice(0, 16) if rng.random() < 0.5 else slice(16, 32)
        picture[half] += int(amount)
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"p{number:03}.png")
        rows.append(
            (
                f"p{number:03}.png",
                f"id{number // 2:03}",
                round(amount, 3),
                "much" if amount > 30 else "little",
            )
        )
    table = pd.DataFrame(rows, columns=["file", "id", "amount", "kind"])
    table.to_csv(folder.with_suffix(".csv"), index=False)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(photographs, labels, encoder)."""
    home = tmp_path_factory.mktemp("drawn")
    torch.manual_seed(0)
    encoder = save_encoder(home / "e.safetensors", create_encoder(**KWARGS), "vit_small_patch16_224", KWARGS)
    photographs = draw(home / "photos", 120)
    return photographs, photographs.with_suffix(".csv"), encoder


# --- the groups of parameters
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.75, 1.0])
def test_groups_are_those_of_an_independent_computation(drawn, decay):
    model = Tuned(tunable(drawn[2]), "mean", outputs=1)
    recipe = Recipe(layer_decay=decay, lr=1e-3)
    optimiser, schedule = optimiser_of(model, recipe, steps=1)
    schedule.step_update(0)
    of = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    depth = len(model.network.blocks)
    assert len(of) == len(list(model.network.parameters()))
    for name, parameter in model.network.named_parameters():
        part, *rest = name.split(".")
        after = {"head": 0, "norm": 1, "blocks": depth - int(rest[0]) if part == "blocks" else 0}
        exponent = after.get(part, depth + 1)  # patch embedding, positions, CLS
        plain = name.endswith("bias") or "norm" in name or part in ("pos_embed", "cls_token")
        group = of[id(parameter)]
        assert group["lr"] == pytest.approx(1e-3 * decay**exponent), name
        assert group["weight_decay"] == (0.0 if plain else recipe.weight_decay), name


def test_the_rate_warms_up_and_ends_at_zero(drawn):
    model = Tuned(tunable(drawn[2]), "mean", outputs=1)
    optimiser, schedule = optimiser_of(model, Recipe(lr=2.0, warmup=0.25, layer_decay=1.0), steps=40)
    rates = []
    for step in range(41):
        schedule.step_update(step)
        rates.append(optimiser.param_groups[0]["lr"])
    assert np.allclose(rates[:11], 0.2 * np.arange(11))
    assert np.allclose(rates[10:], 1 + np.cos(np.pi * np.arange(31) / 30))


# --- what is learned
# -----------------------------------------------------------------------------------------------------


def test_fine_tuning_learns_what_the_frozen_probe_cannot(drawn, tmp_path):
    photographs, labels, encoder = drawn
    out = tmp_path / "tuned"
    recipe = Recipe(epochs=20, lr=3e-3, batch=16, patience=20)
    found = finetune_photographs(
        photographs, labels, "amount", encoder, out, recipe, "as-is", "cpu", False, person="id", folds=3
    )["numbers"]
    frozen = found["against"]["the frozen probe"]
    assert frozen["verdict"] == "better" and frozen["difference"]["low"] > 0.1
    assert found["metrics"]["r2"]["value"] > 0.5 and found["people"] == 60
    predictions = pd.read_csv(out / "predictions.csv")
    assert predictions.groupby("person").fold.nunique().max() == 1

    # the encoder that is kept, read as any other, and its model give predictions for new photographs
    embed_photographs(
        photographs, out, tmp_path / "new.parquet", framing="as-is", device="cpu", progress=False
    )
    table = predict_labels(out, tmp_path / "new.parquet")
    truth = pd.read_csv(labels).set_index("file").amount[table.file]
    assert np.corrcoef(table.prediction.astype(float), truth)[0, 1] > 0.8
    assert LabelModel.load(out).about["encoder_hash"] == load_encoder(out, device="cpu").weights_hash()


def test_a_label_of_noise_ends_where_it_began(drawn, tmp_path):
    photographs, labels, encoder = drawn
    table = pd.read_csv(labels)
    table["noise"] = np.random.default_rng(5).standard_normal(len(table))
    found = finetune_photographs(
        photographs,
        table,
        "noise",
        encoder,
        tmp_path / "o",
        Recipe(epochs=3),
        "as-is",
        "cpu",
        False,
        person="id",
    )["numbers"]
    assert found["against"]["the frozen probe"]["verdict"] != "better"
    assert found["metrics"]["r2"]["low"] < 0


# --- the command
# -----------------------------------------------------------------------------------------------------


def command(drawn, out, *more):
    photographs, labels, encoder = drawn
    return ["finetune", photographs, labels, "-e", encoder, "--person", "id", "-o", out, *FAST, *more]


def test_classes_json_and_a_second_call(drawn, tmp_path, monkeypatch):
    out = tmp_path / "tuned"
    result = mefem(*command(drawn, out, "--target", "kind", "--json"))
    numbers = json.loads(result.stdout)
    assert numbers["classes"] == ["little", "much"] and set(numbers["metrics"]) == {
        "accuracy",
        "balanced_accuracy",
    }
    assert {path.name for path in out.iterdir()} == {
        "encoder.safetensors",
        "finetune.json",
        "model.safetensors",
        "predictions.csv",
        "report.md",
    }
    before = (out / "predictions.csv").read_bytes()
    again = mefem(*command(drawn, out, "--target", "kind"))
    assert "nothing to do" in again.output and "against the frozen probe" in again.output
    assert (out / "predictions.csv").read_bytes() == before
    assert "Fine-tuned from" in (out / "report.md").read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mefem.finetune.write_tuned", killed)
    CliRunner().invoke(app, [str(one) for one in command(drawn, out, "--target", "kind", "--seed", 1)])
    assert not (out / "finetune.json").exists(), "a file beside it may be of the other call by now"


def test_the_encoder_to_start_from_is_not_overwritten(drawn, tmp_path):
    photographs, labels, encoder = drawn
    folder = tmp_path / "enc"
    folder.mkdir()
    shutil.copy(encoder, folder / "encoder.safetensors")
    before = (folder / "encoder.safetensors").read_bytes()
    for start in (encoder, folder):
        result = CliRunner().invoke(
            app,
            [
                str(one)
                for one in ["finetune", photographs, labels, "-e", start, "--target", "kind", "-o", folder]
            ],
        )
        assert result.exit_code == 1 and "would be overwritten" in " ".join(result.stderr.split())
    assert (folder / "encoder.safetensors").read_bytes() == before


def test_killed_it_goes_on_to_the_same_result(drawn, tmp_path):
    arguments = list(map(str, command(drawn, tmp_path / "whole", "--target", "amount")))
    mefem(*arguments)
    arguments[arguments.index(str(tmp_path / "whole"))] = str(tmp_path / "killed")
    process = subprocess.Popen(
        [sys.executable, "-m", "mefem", *arguments],
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob(".work-*/fold-1.pt")):  # in the middle of the second fold
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (work,) = (tmp_path / "killed").glob(".work-*")
    assert (work / "fold-0.json").is_file() and not (tmp_path / "killed" / "model.safetensors").exists()
    result = mefem(*arguments)
    assert "going on" in result.output and "fold 1 of 3" not in result.output
    for name in ("predictions.csv", "encoder.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_settings_do_not_go_on(drawn, tmp_path):
    out = tmp_path / "o"
    (out / ".work-0").mkdir(parents=True)
    assert "left alone" in mefem(*command(drawn, out, "--target", "amount", "--epochs", "1")).output
    assert (out / ".work-0").is_dir()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "weight"], "no column 'weight'"),
        (["--target", "amount", "-e", "pixels"], "pixels cannot be fine-tuned"),
        (["--target", "amount", "-e", "random:resnet18"], "random:resnet18 cannot be fine-tuned"),
        (["--target", "amount", "-e", "nosuch.safetensors"], "nosuch.safetensors"),
        (["--target", "amount", "--layer-decay", "1.5"], "--layer-decay is 1.5"),
        (["--target", "amount", "--lr", "0"], "--lr is 0.0"),
        (["--target", "amount", "--features", "patches"], "--features is patches"),
        (["--target", "amount", "--framing", "wide"], "wide"),
        (["--target", "amount", "--device", "tpu0"], "tpu0"),
        (["--target", "amount", "-o", "{tmp}/taken"], "holds other things"),
        (["--target", "amount", "--lr", "1e30"], "lower --lr"),
    ],
)
def test_mistakes_are_one_line(drawn, tmp_path, arguments, words):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    arguments = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    result = mefem(*command(drawn, tmp_path / "o", *arguments), code=1)
    lines = [line for line in result.stderr.splitlines() if line.startswith("mefem:")]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in result.stderr


def test_too_few_people_are_refused_before_training(drawn, tmp_path):
    table = pd.read_csv(drawn[1])[:24]
    with pytest.raises(ValueError, match="12 people with amount are too few"):
        finetune_photographs(
            drawn[0], table, "amount", drawn[2], tmp_path / "o", framing="as-is", progress=False, person="id"
        )


def test_an_encoder_without_cls_and_one_of_timm(tmp_path, drawn):
    without = KWARGS | {"class_token": False}
    file = save_encoder(
        tmp_path / "e.safetensors", create_encoder(**without), "vit_small_patch16_224", without
    )
    assert not tunable(file).cls
    with pytest.raises(ValueError, match="has no CLS token"):
        tunable(file, "cls")
    vit = tunable("random:vit_tiny_patch16_224")
    assert vit.size == 224 and vit.mean == (0.5, 0.5, 0.5)
