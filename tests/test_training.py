"""Training: killed and resumed is the same to the bit; nothing is mixed up, nothing destroyed."""

import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mefem.training as training
from mefem.compute import torch_threads
from mefem.config import PretrainSettings, SettingsError
from mefem.files import write_json
from mefem.made_from import settings_hash
from mefem.models import normalise
from mefem.shards import load_images, read_labels, write_absent, write_manifest, write_shard
from mefem.training import (
    CheckpointError,
    EpochOrder,
    MemoryPictures,
    ShardPictures,
    World,
    batches,
    load_pictures,
    start_run,
)

BASE = dict(
    encoder=dict(kwargs=dict(img_size=112, patch_size=8, embed_dim=32, depth=1, num_heads=1)),
    datasets=("facecaption",),
    predictor=dict(dim=32, depth=1, heads=1),
    batch=4,
    steps=12,
    checkpoint_every=4,
    log_every=2,
    device="cpu",
)


def config(**changes):
    return PretrainSettings(**(BASE | changes))


def train(config, pictures, folder, made=None, resume=True, resume_anyway=False, **how):
    store = MemoryPictures(pictures) if isinstance(pictures, np.ndarray) else pictures
    return training.train(
        start_run(config, store, folder, made, resume, resume_anyway), progress=False, **how
    )


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 255, (20, 112, 112, 3), dtype=np.uint8)


LENGTHS, HELD_OUT = (
    (7, 12, 1, 9, 6),
    {3, 20, 34},
)  # pictures of five shards; those of the official validation split


def colour(number: int) -> tuple:
    return (number % 6 * 48 + 8, number // 6 * 40 + 8, 128)


def number_of(picture: torch.Tensor) -> int:
    red, green, _ = picture.float().mean((0, 1)).tolist()
    return round((green - 8) / 40) * 6 + round((red - 8) / 48)


def write_shards(folder: Path, size: int = 112, lengths=LENGTHS) -> Path:
    """Shards of flat pictures, each the colour of its number; some belong to a validation split."""
    stats, ends = [], np.cumsum(lengths)
    for shard, end in enumerate(ends):
        samples, rows = [], []
        for number in range(end - lengths[shard], end):
            Image.new("RGB", (size, size), colour(number)).save(buffer := io.BytesIO(), "JPEG", quality=95)
            samples.append((f"{number:05d}", buffer.getvalue(), {}))
            rows.append(
                {
                    "key": f"{number:05d}",
                    "status": "success",
                    "split": "validation" if number in HELD_OUT else "train",
                    "person": f"p{number // 2}",
                    "tone": float(number),
                    "sex": "mf"[number % 2],
                }
            )
        stats.append(write_shard(folder, shard, samples, rows))
    write_manifest(folder, "facecaption", sum(lengths), stats, {"size": size})
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with crops of one data set, as `pretrain` wants it."""
    root = tmp_path_factory.mktemp("project")
    write_shards(root / "data" / "faces" / "facecaption")
    (root / "params.yaml").write_text("profile: none\n")
    return root


@pytest.fixture(scope="module")
def faces(project):
    return project / "data" / "faces" / "facecaption"


def weights(jepa):
    return {key: value.clone() for key, value in jepa.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def log_of(folder):
    return list(csv.DictReader((folder / "log.csv").open()))


# Order


@pytest.mark.parametrize("window", [None, 1, 2, 5, 99])
def test_no_picture_twice_in_an_epoch_and_all_in_each(window):
    order, batch, count = EpochOrder(LENGTHS, seed=7, window=window), 6, sum(LENGTHS)
    seen = np.concatenate([order.batch(step, batch) for step in range(count)])  # six epochs
    for epoch in range(6):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert list(seen[:count]) != list(seen[count : 2 * count])
    again = EpochOrder(LENGTHS, seed=7, window=window)  # a step's pictures follow from its number alone
    assert again.batch(19, batch).tolist() == seen[19 * batch : 20 * batch].tolist()


def test_order_in_memory_is_one_permutation_an_epoch():
    order = np.concatenate([np.random.default_rng([3, epoch]).permutation(23) for epoch in range(5)])
    assert [i for step in range(23) for i in EpochOrder([23], 3).batch(step, 5)] == order.tolist()
    assert [i for step in range(23) for i in EpochOrder([20, 3], 3).batch(step, 5)] == order.tolist()


def test_a_window_touches_few_shards_at_a_time():
    lengths = [50] * 20
    order = EpochOrder(lengths, seed=0, window=4)
    for step in range(5):  # a group of four shards has 200 pictures
        shards = set(order.batch(step, 200) // 50)
        assert len(shards) == 4
    first = order.batch(0, 200)
    assert (np.diff(first // 50) != 0).mean() > 0.6  # mixed, not one shard after the other


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="no picture"):
        EpochOrder([0, 0], 0)


# Reading from shards


def test_shards_give_the_pictures_that_memory_gives(faces):
    rows = (read_labels(faces)["split"] == "train").to_numpy()
    store, memory = ShardPictures([faces], 112), load_pictures([faces], 112)
    assert len(store) == len(memory) == rows.sum() == sum(LENGTHS) - len(HELD_OUT)
    assert list(store.lengths) == memory.lengths
    assert torch.equal(store.read(np.arange(len(store))), torch.from_numpy(load_images(faces, 112)[rows]))
    assert {number_of(p) for p in store.read(np.arange(len(store)))} == set(range(sum(LENGTHS))) - HELD_OUT


@pytest.mark.parametrize("size, workers", [(1, 0), (1, 3), (2, 0), (2, 2)])
def test_every_picture_once_an_epoch_on_one_rank_only(faces, size, workers):
    store, batch = ShardPictures([faces], 112), 4
    order = EpochOrder(store.lengths, seed=1, window=2)
    steps = range(3 * len(store) // batch)  # 32 pictures: three whole epochs
    seen = [
        [
            [number_of(p) for p in images]
            for images in batches(store, order, batch, steps, World(rank, size), workers)
        ]
        for rank in range(size)
    ]
    assert all(len(part) == batch // size for rank in seen for part in rank)
    for epoch in range(3):
        steps_of = slice(epoch * len(store) // batch, (epoch + 1) * len(store) // batch)
        numbers = [n for rank in seen for step in rank[steps_of] for n in step]
        assert len(numbers) == len(set(numbers)) == len(store) and not HELD_OUT & set(numbers)
    late = [
        [number_of(p) for p in images]
        for images in batches(store, order, batch, range(10, 14), World(0, size), workers)
    ]
    assert late == seen[0][10:14]  # a resumed run sees what an uninterrupted one would have


def test_index_is_kept_and_a_damaged_shard_is_named(faces, tmp_path):
    import shutil

    from mefem.shards import ShardError

    index = tmp_path / "index.npz"
    first, again = (ShardPictures([faces], 112, index) for _ in range(2))
    assert index.exists() and torch.equal(
        first.places if torch.is_tensor(first.places) else torch.from_numpy(first.places),
        torch.from_numpy(again.places),
    )
    copy = Path(shutil.copytree(faces, tmp_path / "copy"))
    (copy / "00001.tar").write_bytes((copy / "00001.tar").read_bytes()[:2000])
    with pytest.raises(ShardError, match="00001.tar"):
        ShardPictures([copy], 112)
    store = ShardPictures([faces], 112)
    store.places[5] = (0, 100)  # a tar header is no JPEG
    with pytest.raises(ShardError, match="00000.tar: the picture at byte 0"):
        store.read([5])


def test_large_sets_stay_on_disk(faces, tmp_path, capsys):
    assert isinstance(
        training.open_pictures([faces], config(), World(), tmp_path / "i.npz"), training.MemoryPictures
    )
    assert isinstance(
        training.open_pictures([faces], config(), World(), tmp_path / "i.npz", memory_share=1e-9),
        ShardPictures,
    )
    assert "read from their shards" in capsys.readouterr().out
    forced = config(runtime=dict(pictures="memory"))
    assert isinstance(
        training.open_pictures([faces], forced, World(), tmp_path / "i.npz", memory_share=1e-9),
        training.MemoryPictures,
    )


def test_streamed_run_stopped_and_resumed_is_bit_identical(faces, tmp_path):
    streamed = config(runtime=dict(window=2, workers=1))
    made = training.made_from(streamed, "same")  # `runtime` is no part of it
    straight = weights(train(streamed, ShardPictures([faces], 112), tmp_path / "straight", made))
    train(streamed, ShardPictures([faces], 112), tmp_path / "stopped", made)
    (tmp_path / "stopped" / "step_00000012.pt").unlink()
    in_memory = config(
        runtime=dict(pictures="memory")
    )  # the set moved into memory meanwhile: its order goes on as it began
    resumed = weights(train(in_memory, load_pictures([faces], 112), tmp_path / "stopped", made))
    assert same(straight, resumed)


# The loop


def old_loop(config, pictures):
    """The loop as it was before it was taken to pieces.

    Single process, masks drawn inside of `JEPA.forward`."""
    torch.set_num_threads(torch.get_num_threads())  # as `start_run`
    jepa = training.build(config).train()
    optimiser, generator, losses = training.optimiser_of(jepa, config), torch.Generator(), []
    for step in range(config.steps):
        now = training.schedule(step, config.steps, config.optimiser)
        for group in optimiser.param_groups:
            group["lr"] = now["lr"]
            group["weight_decay"] = now["weight_decay"] if group["decayed"] else 0.0
        generator.manual_seed(config.seed * 1_000_000_007 + step)
        epoch, place = np.divmod(np.arange(step * config.batch, (step + 1) * config.batch), len(pictures))
        index = [
            np.random.default_rng([config.seed, int(e)]).permutation(len(pictures))[p]
            for e, p in zip(epoch, place, strict=True)
        ]
        x = normalise(torch.from_numpy(pictures[index]))
        if config.flip:
            flipped = torch.rand(len(x), generator=generator) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            out = jepa(x, generator)
        optimiser.zero_grad(set_to_none=True)
        out["loss"].backward()
        if config.optimiser.clip:
            torch.nn.utils.clip_grad_norm_(
                [p for group in optimiser.param_groups for p in group["params"]], config.optimiser.clip
            )
        optimiser.step()
        jepa.update_teacher(now["ema"])
        losses.append(out["loss"].item())
    return jepa, losses


def test_adamw_has_the_betas_of_the_settings():
    for changes, expected in ((dict(), (0.9, 0.999)), (dict(optimiser=dict(betas=(0.8, 0.95))), (0.8, 0.95))):
        jepa = training.build(config(**changes))
        assert {group["betas"] for group in training.optimiser_of(jepa, config(**changes)).param_groups} == {
            expected
        }


@pytest.mark.parametrize(
    "changes",
    [dict(precision="fp32"), dict(), dict(flip=True, optimiser=dict(clip=0.1))],
)
def test_loop_gives_what_it_gave_before(tmp_path, pictures, changes):
    jepa, losses = old_loop(config(**changes), pictures)
    assert same(weights(jepa), weights(train(config(log_every=1, **changes), pictures, tmp_path)))
    assert [row["loss"] for row in log_of(tmp_path)] == [f"{loss:.6g}" for loss in losses]


KILLED = """
    import numpy as np, time, torch, mefem.training as t
    torch.set_num_threads({threads})
    from mefem.config import PretrainSettings
    update = t.JEPA.update_teacher
    def slow(self, m):
        time.sleep({pause}); update(self, m)
    t.JEPA.update_teacher = slow
    store = t.MemoryPictures(np.load({pictures!r}))
    t.train(t.start_run(PretrainSettings(**{settings!r}), store, {folder!r}), progress=False)
"""


def start(tmp_path, pictures, pause=0.1, **changes):
    """A run in a process of its own, slow enough to be met in the middle.

    Returns when it has a checkpoint."""
    np.save(tmp_path / "pictures.npy", pictures)
    folder = tmp_path / "run"
    # As many threads as here: a last bit may depend on them, and PyTorch's own choice differs.
    script = KILLED.format(
        pause=pause,
        threads=torch.get_num_threads(),
        settings=BASE | changes,
        pictures=str(tmp_path / "pictures.npy"),
        folder=str(folder),
    )
    (tmp_path / "run.py").write_text(textwrap.dedent(script))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 300
    while not list(folder.glob("step_*.pt")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert list(folder.glob("step_*.pt")) and process.poll() is None, process.communicate()
    return process, folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kill_minus_nine_and_resume_is_bit_identical(tmp_path, pictures, precision):
    straight = weights(train(config(precision=precision), pictures, tmp_path / "straight"))
    process, folder = start(tmp_path, pictures, precision=precision)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    found = sorted(p.name for p in folder.glob("step_*.pt"))
    assert found and found[-1] != "step_00000012.pt", "the kill came too late to test anything"
    assert same(straight, weights(train(config(precision=precision), pictures, folder)))
    steps = [int(row["step"]) for row in log_of(folder)]
    assert steps == sorted(set(steps)) and steps[-1] == 12


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop_it_saves_first(tmp_path, pictures, number, code):
    straight = weights(train(config(checkpoint_every=3), pictures, tmp_path / "straight"))
    process, folder = start(tmp_path, pictures, pause=0.6, checkpoint_every=3)
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said
    newest = sorted(folder.glob("step_*.pt"))[-1].name
    assert f"stopped after step {int(newest[5:13])}" in said and newest not in (
        "step_00000003.pt",
        "step_00000012.pt",
    )
    assert same(straight, weights(train(config(checkpoint_every=3), pictures, folder)))
    assert [row["step"] for row in log_of(folder)] == [row["step"] for row in log_of(tmp_path / "straight")]


def test_random_states_are_part_of_a_checkpoint(tmp_path, pictures):
    dropping = config(encoder=dict(kwargs=BASE["encoder"]["kwargs"] | dict(depth=3, drop_path_rate=0.5)))
    straight = weights(train(dropping, pictures, tmp_path))
    (tmp_path / "step_00000012.pt").unlink()
    torch.rand(5)
    assert same(straight, weights(train(dropping, pictures, tmp_path)))


def test_threads_told_or_untold_are_the_same_arithmetic(tmp_path, pictures):
    # On Intel processors MKL sums in another order where the number of threads was never set.
    np.save(tmp_path / "pictures.npy", pictures)
    script = f"""
        import numpy as np, torch, mefem.training as t
        from mefem.config import PretrainSettings
        store = t.MemoryPictures(np.load({str(tmp_path / "pictures.npy")!r}))
        config = PretrainSettings(**{BASE | dict(precision="fp32")!r})
        def run(folder):
            jepa = t.train(t.start_run(config, store, folder), progress=False)
            return torch.cat([p.flatten() for p in jepa.parameters()])
        untold = run({str(tmp_path / "untold")!r})
        torch.set_num_threads(torch.get_num_threads())
        assert torch.equal(untold, run({str(tmp_path / "told")!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_another_number_of_threads_is_told(tmp_path, pictures, capsys):
    with torch_threads(1):
        train(config(), pictures, tmp_path)
    (tmp_path / "step_00000012.pt").unlink()
    with torch_threads(2):
        train(config(), pictures, tmp_path)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "last bit" in line]
    assert "threads: 2; until step 8 it had" in line and "threads: 1." in line
    (tmp_path / "step_00000012.pt").unlink()
    with torch_threads(1):  # the newest checkpoint is from before the change again
        train(config(), pictures, tmp_path)
    assert "last bit" not in capsys.readouterr().out


def test_checkpoint_of_other_settings_pictures_or_code_is_refused_and_kept(
    tmp_path, pictures, monkeypatch, capsys
):
    straight = weights(train(config(), pictures, tmp_path))
    before = {p.name: p.read_bytes() for p in tmp_path.glob("step_*.pt")}
    capsys.readouterr()
    assert same(straight, weights(train(config(), pictures, tmp_path)))
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(
        "nothing to do: finished at step 12 of 12, made from settings " + settings_hash(config())
    )
    with pytest.raises(CheckpointError, match="made from other settings .*" + settings_hash(config())):
        train(config(seed=1), pictures, tmp_path)
    with pytest.raises(CheckpointError, match="other data"):
        train(config(), pictures[::-1].copy(), tmp_path)
    with pytest.raises(CheckpointError, match="has seen 20 pictures in 1 shards; now there are 19"):
        train(config(), pictures[1:], tmp_path, resume_anyway=True)
    monkeypatch.setattr(training, "run_code", lambda *_: "another")
    with pytest.raises(CheckpointError, match="other code .* --resume-anyway"):
        train(config(), pictures, tmp_path)
    with pytest.raises(CheckpointError, match="not even anyway"):
        train(config(seed=1), pictures, tmp_path, resume_anyway=True)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("step_*.pt")} == before
    with pytest.raises(CheckpointError, match="resume=True"):
        train(config(), pictures, tmp_path, resume=False)


def test_resume_anyway_goes_on_and_says_so(tmp_path, pictures, monkeypatch, capsys):
    runs = tmp_path / "data" / "runs" / "x"
    straight = training.pretrain(
        config(), root=tmp_path, run="x", pictures=pictures, progress=False
    ).read_bytes()
    (old,) = (runs / "checkpoints").iterdir()
    (old / "step_00000012.pt").unlink()
    shutil.copy(old / "step_00000008.pt", old / "best.pt")
    (old / "best.json").write_text('{"step": 8, "probe": 0.5}')
    (runs / "encoder_best.safetensors").write_bytes(b"of a run before, which had a probe")
    kept = {p.name: p.read_bytes() for p in old.iterdir()}
    monkeypatch.setattr(training, "run_code", lambda *_: "another")
    capsys.readouterr()
    training.pretrain(config(), root=tmp_path, run="x", pictures=pictures, progress=False)
    assert (
        "x starts at step 0" in (said := capsys.readouterr().out)
        and "other code and is left as it is; --resume-anyway" in said
    )
    assert json.loads((runs / "run.json").read_text())["made_from"]["code"] == "another"
    assert not (runs / "encoder_best.safetensors").exists()
    (new,) = set((runs / "checkpoints").iterdir()) - {old}
    for path in new.iterdir():
        path.unlink()
    new.rmdir()
    again = training.pretrain(
        config(), root=tmp_path, run="x", pictures=pictures, progress=False, resume_anyway=True
    )
    assert again.read_bytes() == straight and {p.name: p.read_bytes() for p in old.iterdir()} == kept
    adopted = json.loads((runs / "run.json").read_text())["made_from"]["adopted"]
    assert adopted["step"] == 8 and adopted["code"] != "another"
    (new,) = set((runs / "checkpoints").iterdir()) - {old}
    for name in ("start.json", "best.json", "best.pt"):  # what it began with, and what it had
        assert not (old / name).exists() or (new / name).read_bytes() == (old / name).read_bytes(), name
    assert (runs / "encoder_best.safetensors").exists()
    with pytest.raises(CheckpointError, match="no checkpoint of settings"):
        training.pretrain(
            config(seed=5), root=tmp_path, run="x", pictures=pictures, progress=False, resume_anyway=True
        )


def test_other_pictures_give_another_encoder(tmp_path, pictures):
    def made(given):
        return training.pretrain(
            config(), root=tmp_path, run="x", pictures=given, progress=False
        ).read_bytes()

    first, other = made(pictures), made(255 - pictures)
    assert first != other and made(pictures) == first


def test_truncated_newest_checkpoint_falls_back(tmp_path, pictures, capsys):
    straight = weights(train(config(), pictures, tmp_path))
    newest = sorted(tmp_path.glob("step_*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    again = weights(train(config(), pictures, tmp_path))
    assert "step_00000012.pt cannot be read" in capsys.readouterr().out
    assert same(straight, again)
    for path in tmp_path.glob("step_*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        train(config(), pictures, tmp_path)


def test_full_disk_leaves_the_old_checkpoints(tmp_path):
    """The kernel's own limit on a file's size stands in for the disk.

    The write itself fails, in the middle."""
    (tmp_path / ".step_00000002.pt.1").write_bytes(b"what a killed process was writing")
    training.save_checkpoint(tmp_path, {"step": 4, "x": torch.zeros(10)})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000004.pt"]
    before = (tmp_path / "step_00000004.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match="step_00000008.pt cannot be written .* untouched"):
            training.save_checkpoint(tmp_path, {"step": 8, "x": torch.zeros(100_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000004.pt"] and (
        tmp_path / "step_00000004.pt"
    ).read_bytes() == before


def test_the_last_k_are_kept(tmp_path, pictures):
    train(config(runtime=dict(keep=3), checkpoint_every=2), pictures, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [
        "step_00000008.pt",
        "step_00000010.pt",
        "step_00000012.pt",
    ]


def test_loss_falls_and_the_log_is_whole(tmp_path):
    smooth = (
        np.linspace(0, 255, 112)[None, :, None, None] * np.random.default_rng(1).random((20, 1, 112, 3))
    ).astype(np.uint8)
    train(
        config(steps=60, checkpoint_every=60, precision="fp32", optimiser=dict(lr=2e-3)),
        smooth,
        tmp_path,
    )
    rows = log_of(tmp_path)
    assert float(rows[-1]["loss"]) < 0.8 * float(rows[0]["loss"])
    assert float(rows[-1]["rankme"]) > 1 and float(rows[-1]["alpha"]) > 0
    for row in rows:
        assert (
            float(row["teacher_spread"]) > 0.02
            and 0 < float(row["peak_share"]) < 1
            and 0 <= float(row["waiting"]) < 1
        )


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, pictures):
    wild = dict(steps=60, log_every=1, precision="fp32", optimiser=dict(lr=1e8, start_lr=1e8, warmup=0))
    with pytest.raises(FloatingPointError, match="not finite at three checks in a row"):
        train(config(checkpoint_every=50, **wild), pictures, tmp_path)
    assert not list(tmp_path.glob("step_*.pt"))  # a broken state is never saved over a good one


def test_a_loss_that_is_not_finite_at_the_end_makes_no_encoder(tmp_path, pictures):
    """One bad check is no three in a row, but what it leaves must not become the encoder."""
    wild = config(
        steps=12,
        log_every=12,
        checkpoint_every=12,
        precision="fp32",
        optimiser=dict(lr=1e8, start_lr=1e8, warmup=0),
    )
    with pytest.raises(FloatingPointError, match="not finite at the last step, 12"):
        training.pretrain(wild, root=tmp_path, pictures=pictures, progress=False)
    assert not list(tmp_path.rglob("encoder.safetensors")) and not list(tmp_path.rglob("step_*.pt"))


def test_weights_that_are_not_finite_are_never_saved(tmp_path, pictures, monkeypatch):
    original = training.train_step

    def spoiled(run, step, images):
        out = original(run, step, images)
        if step == 7:  # the loss of this step is still finite
            with torch.no_grad():
                run.jepa.predictor.project.weight[0, 0] = float("inf")
        return out

    monkeypatch.setattr(training, "train_step", spoiled)
    with pytest.raises(FloatingPointError, match="weights are not finite after step 8"):
        train(config(), pictures, tmp_path)
    assert [p.name for p in tmp_path.glob("step_*.pt")] == ["step_00000004.pt"]


# A whole run


def test_pretrain_writes_encoder_log_and_settings(tmp_path, pictures):
    path = training.pretrain(config(), root=tmp_path, run="x", pictures=pictures, progress=False)
    assert path == tmp_path / "data" / "runs" / "x" / "encoder.safetensors"
    assert {p.name for p in path.parent.iterdir()} == {
        "encoder.safetensors",
        "log.csv",
        "run.json",
        "checkpoints",
    }
    assert "commit" not in json.loads((path.parent / "run.json").read_text())  # this is no checkout
    assert training.pretrain(
        config(seed=3), root=tmp_path, run="x", pictures=pictures, progress=False
    ).exists()  # its own folder


def test_run_json_names_the_commit_that_trained(tmp_path, pictures):
    def commit(text):
        (tmp_path / "params.yaml").write_text(text)
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
        for arguments in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", text]):
            subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True)
        return head.stdout.strip()

    def about():
        path = training.pretrain(config(), root=tmp_path, run="x", pictures=pictures, progress=False)
        return json.loads((path.parent / "run.json").read_text())

    first = commit("one")
    trained = about()
    assert trained["commit"] == first and trained["changed"] is False
    assert set(trained["made_from"]) == {"settings", "data", "code"}  # a commit alone retrains nothing
    assert commit("two") != first and about() == trained  # nothing was trained now


def test_other_crops_start_a_new_run(tmp_path):
    def names():
        return sorted(
            p.name for p in (tmp_path / "data" / "runs" / "main" / "checkpoints").iterdir() if p.is_dir()
        )

    faces = write_shards(tmp_path / "data" / "faces" / "facecaption")
    training.pretrain(config(), root=tmp_path, progress=False)
    training.pretrain(
        config(runtime=dict(pictures="shards", workers=0)), root=tmp_path
    )  # how, not what: the same run
    assert len(names()) == 1
    write_shards(faces, size=113)
    training.pretrain(config(), root=tmp_path, progress=False)
    assert len(names()) == 2


def test_absent_data_is_named(tmp_path):
    folder = tmp_path / "data" / "faces" / "facecaption"
    folder.mkdir(parents=True)
    write_absent(folder, "facecaption", "no file there", {})
    with pytest.raises(FileNotFoundError, match="facecaption"):
        training.pretrain(config(), root=tmp_path, progress=False)


def test_online_probe_takes_training_pictures_with_a_label(project, tmp_path):
    images, labels, people = training.probe_pictures(project / "data" / "faces", "facecaption:tone", 112)
    assert (
        [number_of(torch.from_numpy(p)) for p in images]
        == labels.tolist()
        == sorted(set(range(35)) - HELD_OUT)
    )
    assert people[0] == people[1] == "p0"
    with pytest.raises(SettingsError, match="no label 'weight', only key, split"):
        training.probe_pictures(project / "data" / "faces", "facecaption:weight", 112)
    train(
        config(),
        load_pictures([project / "data" / "faces" / "facecaption"], 112),
        tmp_path,
        labelled=(images, labels, people),
    )
    probes = [row["probe"] for row in log_of(tmp_path)]
    assert probes[0] == "" and float(probes[-1]) < 1.0001


def test_dvclive_shows_what_the_log_holds(tmp_path, pictures):
    pytest.importorskip("dvclive")
    train(config(), pictures, tmp_path / "run")
    (tmp_path / "run" / "step_00000012.pt").unlink()
    train(
        config(), pictures, tmp_path / "run", dvclive=tmp_path / "live"
    )  # resumed: the first rows are filled in
    shown = (tmp_path / "live" / "plots" / "metrics" / "loss.tsv").read_text().split("\n")[1:]
    assert [line.split("\t")[0] for line in shown if line] == [
        row["step"] for row in log_of(tmp_path / "run")
    ]


# Several processes


def test_two_processes_give_the_losses_of_one(tmp_path, monkeypatch):
    """Through `launch`, hence torchrun and the command line, with gloo on this machine's cores."""
    monkeypatch.delenv("RANK", raising=False)
    write_shards(tmp_path / "data" / "faces" / "facecaption")
    (tmp_path / "params.yaml").write_text("profile: none\n")
    runs = {}
    for kind, store, changes in (
        ("jepa", "shards", {}),
        ("share", "memory", dict(method="target-share", method_options=dict(share=0.25))),
        ("sigreg", "memory", dict(method="sigreg")),
    ):
        for processes in (1, 2):
            settings = config(
                precision="fp32",
                log_every=1,
                flip=True,
                steps=8,
                runtime=dict(processes=processes, pictures=store, window=2, workers=1),
                **changes,
            )
            name = f"{kind}{processes}"
            path = training.launch(settings, run=name, root=tmp_path)
            assert path.exists() and json.loads((path.parent / "run.json").read_text())["pictures"] == 32
            runs[name] = [float(row["loss"]) for row in csv.DictReader((path.parent / "log.csv").open())]
        assert len(runs[f"{kind}1"]) == 8
        assert runs[f"{kind}2"] == pytest.approx(runs[f"{kind}1"], rel=1e-5)
    assert runs["jepa1"] != pytest.approx(runs["share1"], rel=1e-3)
    assert runs["jepa1"] != pytest.approx(runs["sigreg1"], rel=1e-3)


def test_sigterm_to_torchrun_saves_first(tmp_path):
    write_shards(tmp_path / "data" / "faces" / "facecaption")
    (tmp_path / "params.yaml").write_text("profile: none\n")
    settings = write_json(
        tmp_path / "settings.json",
        config(
            steps=100_000, checkpoint_every=100_000, runtime=dict(workers=1, pictures="shards")
        ).model_dump(mode="json"),
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mefem",
        "pretrain",
        "--settings",
        str(settings),
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    runs, deadline = tmp_path / "data" / "runs" / "main", time.time() + 300
    while (
        not any(len(log.read_text().splitlines()) > 3 for log in runs.glob("checkpoints/*/log.csv"))
        and time.time() < deadline
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    found = list(runs.glob("checkpoints/*/step_*.pt"))
    assert len(found) == 1 and f"stopped after step {int(found[0].name[5:13])}" in said, said
    assert process.returncode != 0


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, pictures, monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="3", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="batch 4 cannot be shared by 3 processes"):
        train(config(), pictures, tmp_path)


def test_failed_processes_are_told(tmp_path):
    (tmp_path / "params.yaml").write_text("profile: none\n")
    with pytest.raises(ChildProcessError, match="exit code 1"):
        training.launch(config(runtime=dict(processes=2)), root=tmp_path)


def test_normalise_matches_torchvision():
    from torchvision.transforms.v2 import functional as tv

    images = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    expected = tv.normalize(
        tv.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True),
        [0.485, 0.456, 0.406],
        [0.229, 0.224, 0.225],
    )
    torch.testing.assert_close(normalise(images), expected, rtol=1e-5, atol=1e-5)


def test_processes_without_a_gpu(monkeypatch):
    monkeypatch.setattr(training, "usable_cores", lambda: 2)
    assert training.processes_of(config()) == 1
    assert training.processes_of(config(runtime=dict(cpu_processes=2))) == 2
    assert training.processes_of(config(runtime=dict(cpu_processes=8))) == 2  # no more than cores
    assert training.processes_of(config(runtime=dict(cpu_processes=8, processes=3))) == 3  # asked for by name
