"""What tools/gpu_faces.sh runs: measurements on a GPU lent for minutes, and the pack that travels.

    python tools/gpu_faces.py pack --photographs DIR --lists DIR   # once, where pip and the photographs are
    python tools/gpu_faces.py steps|pretrain|rows --seconds N --out DIR [--small]
    python tools/gpu_faces.py recipes --seconds N --run paper --run wide:masking.width=4 --out DIR

`--photographs`: the folder with train/1.jpg ... and val/1.jpg ... of FairFace; `--lists`: the folder with the
authors' two lists. `--small` takes tiny networks and few steps, so that a CPU tries everything in a minute.
benchmarks/README.md has the commands for a lent machine and says how to read the results.
"""

import argparse
import csv
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
PACK = ROOT / "data" / "gpu"  # ignored by git; `carry` names it
CLASSES = ("age", "gender", "race")
# What mefem's method modules and the I-JEPA of `lightly` need, and the lent machine's Python lacks.
WHEELS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions")
LIGHTLY = "lightly==1.6.0"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
ROWS = ("stripes2", "stripes3", "stripes4", "quadrant", "multiblock", "uniform", "cls0", "cls05", "cls1")


def say(*words) -> None:
    """A line that is seen at once, whatever ends the process next."""
    print(*words, flush=True)


# The pack: pictures as WebP in one file, small enough for the 64 MiB that travel.


def read_lists(lists: Path, limit: int | None) -> list[dict]:
    """Rows of the authors' two lists: the first `limit` of each, or all."""
    rows = []
    for split in ("train", "val"):
        with (lists / f"fairface_label_{split}.csv").open(newline="") as f:
            rows += [row | {"split": split} for row in itertools.islice(csv.DictReader(f), limit)]
    return rows


def encode_pictures(paths: list[Path], side: int, quality: int) -> list[bytes]:
    """Each photograph as WebP of `side` x `side` pixels."""
    from PIL import Image

    def encode(path: Path) -> bytes:
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        small.save(buffer := io.BytesIO(), "webp", quality=quality, method=4)
        return buffer.getvalue()

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(encode, paths))


def pack(photographs: Path, lists: Path, out: Path, side=112, quality=55, most=46.0, limit=None) -> Path:
    """Write `out`/faces.npz: the pictures' bytes one after another, where each ends, split and class numbers.

    Raises `SystemExit` where it would take more than `most` MiB: the whole working tree may have 64."""
    rows = read_lists(lists, limit)
    found = [row for row in rows if (photographs / row["file"]).is_file()]
    if not found:
        raise SystemExit(
            f"{photographs} has none of the {len(rows)} files of {lists}, e.g. {rows[0]['file']}"
        )
    pictures = encode_pictures([photographs / row["file"] for row in found], side, quality)
    content = {"bytes": np.frombuffer(b"".join(pictures), np.uint8)}
    content["ends"] = np.cumsum([len(picture) for picture in pictures])
    content["train"] = np.array([row["split"] == "train" for row in found])
    for name in CLASSES:
        names, codes = np.unique([row[name] for row in found], return_inverse=True)
        content |= {name: codes.astype(np.int64), f"{name}_names": names}
    size = len(content["bytes"]) / 2**20
    if size > most:
        raise SystemExit(f"the pack would take {size:.1f} MiB of at most {most}: lower --quality or --side")
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "faces.npz", side=side, **content)
    say(f"{out / 'faces.npz'}: {len(found):,} of {len(rows):,} photographs at {side} px, {size:.1f} MiB")
    return out / "faces.npz"


def fetch_wheels(out: Path, python: str = "3.12") -> None:
    """The wheels of `WHEELS`, in this environment's versions, and lightly's, for that machine's Python."""
    from importlib.metadata import version

    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "-d", str(out)]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run([*command, LIGHTLY, *(f"{name}=={version(name)}" for name in WHEELS)], check=True)
    say(f"{out}: {', '.join(sorted(path.name for path in out.glob('*.whl')))}")


def read_pack(path: Path, limit: int | None = None) -> dict:
    """The pack with `images`, uint8 [N, side, side, 3], in place of the bytes."""
    from PIL import Image

    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    data, ends = found.pop("bytes").tobytes(), found.pop("ends")
    starts = np.concatenate([[0], ends[:-1]])

    def decode(span) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data[span[0] : span[1]])).convert("RGB"))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found["images"] = np.stack(list(pool.map(decode, list(zip(starts, ends, strict=True))[:limit])))
    return found


def read_decoded(path: Path, decoded: Path) -> dict:
    """As `read_pack`, with the pictures that the file `decoded` keeps."""
    with np.load(path) as file:
        found = {name: file[name] for name in file.files if name not in ("bytes", "ends")}
    return found | {"images": np.load(decoded, mmap_mode="c")}  # torch wants memory that it may write to


def probed(train, small: bool = False) -> np.ndarray:
    """Numbers of the photographs that probes see: 6,000 of the training list, 3,000 of the other."""
    ours, other = np.flatnonzero(train), np.flatnonzero(~train)
    return np.concatenate([ours[: 32 if small else 6000], other[: 16 if small else 3000]])


# What comes back: one JSON file a part, written again after each measurement.


class Results:
    """`OUT/<part>.json`, whole after every `add`."""

    def __init__(self, out: Path, part: str):
        import torch

        from mefem.provenance import hardware

        out.mkdir(parents=True, exist_ok=True)
        command = " ".join(["tools/gpu_faces.py", *sys.argv[1:]]).replace(f"{ROOT}/", "")
        self.path, self.begun = out / f"{part}.json", time.time()
        self.found = {"hardware": hardware(), "torch": torch.__version__, "command": command}

    def add(self, **found) -> None:
        """Put in what was measured, and write all."""
        self.found |= found | {"seconds": round(time.time() - self.begun, 1)}
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n")
        temporary.replace(self.path)


def in_time(deadline: float, seconds: float, what: str) -> bool:
    """Whether `seconds` are left before `deadline` (a plain line says so where they are not)."""
    left = deadline - time.time()
    if left < seconds:
        say(f"skipped: {what} needs {seconds:.0f} s, {max(left, 0):.0f} s are left")
    return left >= seconds


# (a) How fast a step is, and whether the host waits in it.

WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    "cpu": ("aten::_local_scalar_dense", "aten::nonzero"),  # what would wait if the tensors were on a GPU
}


def asked_by_python(event) -> bool:
    """Whether a step's own code made this call, not a kernel of PyTorch for its own numbers."""
    parent = event.cpu_parent
    while parent is not None and parent.name in ("aten::item", "aten::is_nonzero", "aten::index"):
        parent = parent.cpu_parent
    return parent is None or not parent.name.startswith("aten::")


def host_waits(step, images, steps: int = 5) -> dict:
    """What the profiler saw in `steps` steps: calls that make the host wait, and the device's busy share.

    `host_ms` and `step_ms`: until the host has asked for a step, and until the device has done it. A host
    that is ahead never keeps the device waiting."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    cuda = images.device.type == "cuda"
    synchronise = torch.cuda.synchronize if cuda else lambda: None
    synchronise()
    begun = time.perf_counter()
    for _ in range(steps):
        step(images)
    asked = time.perf_counter() - begun
    synchronise()
    done = time.perf_counter() - begun
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        for _ in range(steps):
            with record_function("one step"):
                step(images)
        synchronise()
    events = list(profiler.events())
    spans = [e.time_range for e in events if e.name == "one step" and str(e.device_type).endswith("CPU")]
    counts = {}
    for event in events:
        inside = any(span.start <= event.time_range.start < span.end for span in spans)
        if inside and event.name in WAITS[images.device.type] and (cuda or asked_by_python(event)):
            counts[event.name] = counts.get(event.name, 0) + 1
    found = {"steps": steps, "waits": counts, "host_ms": 1e3 * asked / steps, "step_ms": 1e3 * done / steps}
    if cuda:
        found["device_busy"] = busy_share(events)
        found["refused"] = refused_to_wait(step, images)
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in found.items()}


def busy_share(events) -> float:
    """Share of the time from first to last kernel in which one ran; labels of regions are no kernels."""
    labels = {e.name for e in events if getattr(e, "is_user_annotation", False)} | {"one step"}
    device = [e for e in events if str(e.device_type).endswith("CUDA")]
    spans = sorted(
        (e.time_range.start, e.time_range.end)
        for e in device
        if e.name not in labels and not e.name.startswith(("Optimizer.", "Torch-Compiled", "## Call"))
    )
    if not spans:
        return 0.0
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - spans[0][0])


def refused_to_wait(step, images) -> str | None:
    """PyTorch's message where it refuses a call that waits for the GPU; None where there is none."""
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        step(images)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def timed_steps(kinds: dict, images, batch: int, turns: int, floor: dict) -> dict:
    """Rows of benchmarks/step.py for `kinds`, the share of the peak, and what the profiler says of each."""
    from step import measure, report

    rows = report(measure(kinds, images, turns, images.device), batch)
    for name, kind in kinds.items():
        if not name.startswith("lightly"):  # other operations than the ones that are counted
            rate = rows[name]["pictures_per_second"]
            rows[name]["peak_share"] = round(rate * floor["operations"] / floor["peak"], 4)
        rows[name] |= host_waits(kind.step, images, 2 if turns < 3 else 5)
    return rows


def step_settings(encoder: str, batch: int, small: bool):
    """Settings of the three steps: the predictor is 12 deep in all of them, as in benchmarks/step.py."""
    from mefem.config import PretrainSettings

    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 1} if small else {}
    predictor = {"dim": 32, "depth": 1, "heads": 1} if small else {"dim": 384, "depth": 12, "heads": 6}
    return PretrainSettings.model_validate(
        {"encoder": {"name": encoder, "kwargs": kwargs}, "predictor": predictor, "batch": batch}
    )


def steps(results: Results, deadline: float, small: bool, encoders: list[str]) -> None:
    """Ours, the plain one and lightly's I-JEPA in turns, then ours compiled; for each of `encoders`."""
    import torch
    from step import LightlyIJEPA, Ours, Plain

    from mefem.monitoring import peak_operations, step_operations

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, turns = (2, 1) if small else (256, 6)
    peak = peak_operations(device, torch.bfloat16, size=256 if small else None)
    results.add(batch=batch, precision="bf16", peak_multiply_adds_per_second=peak, encoders={})
    for encoder in encoders[:1] if small else encoders:
        if not in_time(deadline, 0 if small else 40, f"timing {encoder}"):
            return
        config = step_settings(encoder, batch, small)
        side = config.encoder.image_size
        images = torch.randn(batch, 3, side, side, device=device)
        kinds = {"ours": Ours(config, device), "plain": Plain(config, device)}
        try:
            kinds["lightly I-JEPA"] = LightlyIJEPA(config, device)
        except ModuleNotFoundError as error:
            say(f"without I-JEPA: {error}")
        floor = {"operations": sum(step_operations(kinds["ours"].jepa).values()), "peak": peak}
        rows = timed_steps(kinds, images, batch, turns, floor)
        results.add(encoders=results.found["encoders"] | {encoder: {**floor, "eager": rows}})
        show_rows(encoder, rows)
        if not small and in_time(deadline, 180, f"compiling {encoder}"):
            compiled = Ours(config.model_copy(update={"compile": True}), device)
            pair = {"ours": kinds["ours"], "ours compiled": compiled}
            rows = timed_steps(pair, images, batch, turns, floor)
            results.found["encoders"][encoder]["compiled"] = rows
            results.add()
            show_rows(encoder, rows)


def show_rows(encoder: str, rows: dict) -> None:
    """One line for each."""
    for name, row in rows.items():
        share = f"{row['peak_share']:.1%} of the peak" if "peak_share" in row else ""
        waits = sum(row["waits"].values()) / row["steps"]
        say(
            f"{encoder} {name:15} {row['pictures_per_second']:9.1f} pictures/s, ours "
            f"{row['ours_is_faster_by']:.2f} times as fast; {share} waits per step: {waits:.1f}, "
            f"host {row['host_ms']:.1f} of {row['step_ms']:.1f} ms"
        )


# (b) and (c) Pretraining on real faces.


def pretrain_settings(small: bool, changes: list[str], **more):
    """ViT-Ti at 112 px, patch 8: in half precision its weights fit the 16 MiB of a file that comes back."""
    from mefem.config import PretrainSettings, changes_of

    kwargs = {"img_size": 112, "patch_size": 8}
    kwargs |= {"embed_dim": 16, "depth": 1, "num_heads": 1} if small else {}
    base = {
        "datasets": ["fairface"],
        "encoder": {"name": "vit_tiny_patch16_224", "kwargs": kwargs},
        "predictor": {"dim": 16, "depth": 1, "heads": 1} if small else {"dim": 192, "depth": 6, "heads": 3},
        "batch": 8 if small else 256,
        "precision": "auto",
        "compile": False,
    }
    for part in (changes_of(changes), more):
        for key, value in part.items():
            base[key] = {**base[key], **value} if isinstance(base.get(key), dict) else value
    return PretrainSettings.model_validate(base)


def steps_in(seconds: float, config, pictures, folder: Path, small: bool) -> int:
    """How many steps fit into `seconds`: by the rate of a short run, its first interval left out."""
    from mefem.training import start_run, train

    count = 2 if small else 50
    probe = config.model_copy(update={"steps": 2 * count, "log_every": count, "checkpoint_every": 2 * count})
    begun = time.time()
    train(start_run(probe, pictures, folder), progress=False)
    with (folder / "log.csv").open() as f:
        rate = float(list(csv.DictReader(f))[-1]["pictures_per_second"])
    left = seconds - (time.time() - begun)
    found = 8 if small else max(200, int(0.92 * left * rate / config.batch) // 100 * 100)
    say(f"{rate:.0f} pictures/s: {found:,} steps of {config.batch} in {left:.0f} s")
    return found


class Mirror:
    """Keeps the newest checkpoint's teacher, in half precision, and the log in `out` while it is open."""

    def __init__(self, folder: Path, out: Path, config):
        self.folder, self.out, self.config = folder, out, config
        self.seen, self.over = None, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
        self.copy()

    def watch(self) -> None:
        """Every five seconds."""
        while not self.over.wait(5):
            self.copy()

    def copy(self) -> None:
        """What has changed since the last time."""
        if (log := self.folder / "log.csv").is_file():
            shutil.copyfile(log, self.out / "curve.csv")
        newest = max(self.folder.glob("step_*.pt"), default=None)
        if newest is not None and newest != self.seen:
            self.seen = newest
            save_teacher(newest, self.config, self.out / "encoder.safetensors")


def teacher_of(checkpoint: Path, config):
    """(the teacher in a checkpoint, in evaluation mode; its step)."""
    import torch

    from mefem.models import create_encoder
    from mefem.training import encoder_kwargs

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    encoder = create_encoder(config.encoder.name, **encoder_kwargs(config))
    own = {key.removeprefix("teacher."): x for key, x in state["jepa"].items() if key.startswith("teacher.")}
    encoder.load_state_dict(own, strict=True)
    return encoder.eval(), state["step"]


def save_teacher(checkpoint: Path, config, out: Path) -> None:
    """The checkpoint's teacher as `mefem.load_encoder` takes it, in half precision."""
    from mefem.models import save_encoder
    from mefem.training import encoder_kwargs

    encoder, step = teacher_of(checkpoint, config)
    save_encoder(out, encoder.half(), config.encoder.name, encoder_kwargs(config), run="gpu-faces", step=step)


def train_until(deadline: float, config, pictures, folder: Path, labelled=None) -> bool:
    """`train`; SIGTERM, at which it writes a checkpoint, ends it at `deadline`. Whether it finished."""
    from mefem.training import start_run, train

    timer = threading.Timer(max(1.0, deadline - time.time()), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        train(start_run(config, pictures, folder), progress=False, labelled=labelled)
    except SystemExit:
        return False
    finally:
        timer.cancel()
    return True


def quality(encoder, faces: dict, small: bool, device) -> dict:
    """What a ridge probe on training photographs scores on validation ones, and the tokens' health.

    `encoder` None: principal components of the pixels."""
    features, health = panel_features(encoder, faces, small, device)
    train = faces["train"][faces["panel"]]
    return health | {
        name: classified(features[train], features[~train], *codes_of(faces, name, train)) for name in CLASSES
    }


def codes_of(faces: dict, name: str, train) -> tuple:
    """Class numbers of the panel's training and validation photographs."""
    codes = faces[name][faces["panel"]]
    return codes[train], codes[~train]


def predicted_classes(seen, unseen, classes) -> np.ndarray:
    """What a ridge probe predicts for `unseen`, its penalty chosen on the training photographs `seen`."""
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=10.0 ** np.arange(-1, 6)))
    return model.fit(seen, classes).predict(unseen)


def classified(seen, unseen, classes, wanted) -> dict:
    """Of `predicted_classes`, and of the majority class."""
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    predicted = predicted_classes(seen, unseen, classes)
    return {
        "accuracy": round(accuracy_score(wanted, predicted), 4),
        "balanced_accuracy": round(balanced_accuracy_score(wanted, predicted), 4),
        "majority": round(float((wanted == np.bincount(classes).argmax()).mean()), 4),
    }


def panel_features(encoder, faces: dict, small: bool, device) -> tuple:
    """(features [N, D] of the panel's photographs, what the first 256 say of the tokens)."""
    images = faces["images"][faces["panel"]]
    if encoder is None:
        return pixel_components(images, 4 if small else 128), {}
    means, health = mean_patches(encoder.float().to(device).eval(), images, device)
    return means, {name: round(value, 4) for name, value in health.items()}


def pixel_components(images, parts: int) -> np.ndarray:
    """Principal components [N, parts] of every fourth pixel."""
    from sklearn.decomposition import PCA

    pixels = np.ascontiguousarray(images[:, ::4, ::4]).reshape(len(images), -1) / 255.0
    return PCA(parts, random_state=0).fit_transform(pixels)


def patch_tokens(encoder, images, device, batch: int = 256, precision: str = "fp32"):
    """Yield the patch tokens [B, L * L, D], float32, of one batch of pictures after the other."""
    import torch

    from mefem.models import encode_tokens, normalise

    patches = int(encoder.has_class_token)
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    for start in range(0, len(images), batch):
        part = np.ascontiguousarray(images[start : start + batch])
        with torch.inference_mode(), half:
            tokens = encode_tokens(encoder, normalise(torch.from_numpy(part).to(device)))
        yield tokens[:, patches:].float()


def mean_patches(encoder, images, device, batch: int = 256, precision: str = "fp32") -> tuple:
    """(mean patch tokens [N, D]; rank and position share of the first batch's tokens)."""
    import torch

    from mefem.monitoring import position_share, token_rank

    means = []
    for tokens in patch_tokens(encoder, images, device, batch, precision):
        if not means:
            health = {"token_rank": token_rank(tokens), "position_share": position_share(tokens)}
        means.append(tokens.mean(1).cpu())
    return torch.cat(means).numpy(), health


def load_faces(small: bool, path: Path) -> dict:
    """The pack, and in `panel` which photographs probes see.

    Where `decoded` lies beside it (`recipes`), its pictures are taken."""
    decoded = path.with_name("decoded.npy")
    faces = read_decoded(path, decoded) if decoded.is_file() else read_pack(path)
    train, side = faces["train"], faces["images"].shape[1]
    faces["panel"] = probed(train, small)
    say(f"{train.sum():,} training and {(~train).sum():,} validation photographs of {side} px")
    return faces


def pretrain(
    results: Results, deadline: float, small: bool, changes: list[str], path: Path, alone: bool = True
) -> None:
    """Pretraining in the time that is left, but 20 s; then ours, and where `alone` untrained and pixels."""
    import torch

    from mefem.models import create_encoder
    from mefem.training import MemoryPictures, encoder_kwargs

    faces = load_faces(small, path)
    pictures = MemoryPictures(faces["images"][faces["train"]])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = pretrain_settings(small, changes)  # not compiled: that took the lent processor over a minute
    few = faces["panel"][: 48 if small else 2000]
    labelled = (faces["images"][few], faces["race"][few], None)
    torch.manual_seed(0)
    if alone:
        encoder = create_encoder(config.encoder.name, **encoder_kwargs(config))
        results.add(
            untrained=quality(encoder, faces, small, device), pixels=quality(None, faces, small, device)
        )
    with tempfile.TemporaryDirectory() as work:
        end = deadline - (1 if small else 20)
        count = steps_in(end - time.time(), config, pictures, Path(work) / "pace", small)
        every = max(1, count // 12)
        cadence = {"steps": count, "checkpoint_every": every, "log_every": max(1, min(100, every // 4))}
        config = config.model_copy(update=cadence)
        folder, begun = Path(work) / "run", time.time()
        with Mirror(folder, results.path.parent, config):
            whole = train_until(end, config, pictures, folder, labelled)
        checkpoint = max(folder.glob("step_*.pt"), default=None)
        if checkpoint is None:
            raise SystemExit("no checkpoint was written before the time was over")
        encoder, step = teacher_of(checkpoint, config)
        results.add(
            settings=config.model_dump(mode="json"),
            finished=whole,
            steps=step,
            pictures_seen=step * config.batch,
            training_seconds=round(time.time() - begun, 1),
            ours=quality(encoder, faces, small, device),
        )
    for name in ("untrained", "pixels", "ours"):
        if name in results.found:
            say(results.path.parent.name, name, json.dumps(results.found[name]))


def recipes(out: Path, deadline: float, small: bool, runs: list[str], path: Path) -> None:
    """Pretraining runs side by side on one GPU, each a process: one alone leaves it waiting for the host.

    `runs`: NAME or NAME:KEY=VALUE;KEY=VALUE, what it changes in the settings. Each has a folder in `out`."""
    decoded = path.with_name("decoded.npy")
    np.save(decoded, read_pack(path)["images"])
    running = {}
    try:
        for number, run in enumerate(runs):
            name, _, changes = run.partition(":")
            command = [
                sys.executable,
                __file__,
                "pretrain",
                "--pack",
                str(path.parent),
                "--out",
                str(out / name),
            ]
            command += ["--seconds", str(round(deadline - time.time() - 1)), *["--small"] * small]
            command += ["--no-baselines"] * (number > 0)
            command += [part for change in changes.split(";") if change for part in ("--set", change)]
            threads = max(1, len(os.sched_getaffinity(0)) // len(runs))
            running[name] = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        for name, process in running.items():
            if process.wait(timeout=max(1, deadline - time.time() + 5)):
                say(f"{name}: exit code {process.returncode}")
    finally:
        for process in running.values():
            process.kill()
        decoded.unlink()


def rows(results: Results, deadline: float, small: bool, changes: list[str], path: Path, each: float) -> None:
    """The nine runs of Table 4, each with the pictures that the first sees in 80 % of `each` seconds."""
    import torch

    from mefem.config import read_yaml
    from mefem.training import MemoryPictures

    faces = load_faces(small, path)
    pictures = MemoryPictures(faces["images"][faces["train"]])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs, count = read_yaml(ROOT / "params.yaml")["ablations"], None
    each = min(each, (deadline - time.time() - (1 if small else 15)) / len(ROWS))
    if not small and each < 12:
        say(f"skipped: the rows of Table 4 would have {max(each, 0):.0f} s each, 12 at least are worth it")
        return
    for name in ROWS[:2] if small else ROWS:
        if not in_time(deadline, 0 if small else 0.8 * each, f"row {name}"):
            return
        config = pretrain_settings(small, changes, **runs[name])
        with tempfile.TemporaryDirectory() as work:
            if count is None:
                count = steps_in(0.8 * each, config, pictures, Path(work) / "pace", small)
            cadence = {"steps": count, "checkpoint_every": count, "log_every": max(1, count // 4)}
            config = config.model_copy(update=cadence)
            whole = train_until(deadline, config, pictures, Path(work) / "run")
            encoder, step = teacher_of(max((Path(work) / "run").glob("step_*.pt")), config)
        row = {"finished": whole, "pictures_seen": step * config.batch}
        row |= quality(encoder, faces, small, device)
        results.add(rows=results.found.get("rows", {}) | {name: row})
        say(f"{name:10}", json.dumps(row))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("pack", "steps", "pretrain", "recipes", "rows"))
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--lists", type=Path)
    parser.add_argument("--side", type=int, default=112, help="pixels of a packed picture")
    parser.add_argument("--quality", type=int, default=55, help="of WebP")
    parser.add_argument("--limit", type=int, help="photographs of each list (default: all)")
    parser.add_argument("--pack", type=Path, default=PACK, help="the folder that travels")
    parser.add_argument("--no-wheels", action="store_true", help="pack the photographs alone")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "data/gpu-out")))
    parser.add_argument("--seconds", type=float, default=420, help="this part may take")
    parser.add_argument("--row-seconds", type=float, default=40, help="of each row of Table 4")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the pretrain section"
    )
    parser.add_argument(
        "--run", action="append", default=[], metavar="NAME:KEY=VALUE;...", help="of recipes, again for each"
    )
    parser.add_argument(
        "--encoders", default="vit_small_patch16_224,vit_base_patch16_224", help="of steps, with commas"
    )
    parser.add_argument("--no-baselines", action="store_true", help="leave untrained and pixels out")
    parser.add_argument(
        "--small", action="store_true", help="tiny networks and few steps, to try it on a CPU"
    )
    arguments = parser.parse_args()
    deadline = time.time() + arguments.seconds
    if arguments.part == "pack":
        if not arguments.photographs or not arguments.lists:
            parser.error("pack needs --photographs and --lists")
        sizes = {"side": arguments.side, "quality": arguments.quality, "limit": arguments.limit}
        pack(arguments.photographs, arguments.lists, arguments.pack, **sizes)
        if not arguments.no_wheels:
            fetch_wheels(arguments.pack / "wheels")
        return
    file = arguments.pack / "faces.npz"
    if arguments.part == "recipes":
        recipes(arguments.out, deadline, arguments.small, arguments.run, file)
        return
    results = Results(arguments.out, arguments.part)
    if arguments.part == "steps":
        steps(results, deadline, arguments.small, arguments.encoders.split(","))
    elif arguments.part == "pretrain":
        pretrain(results, deadline, arguments.small, arguments.set, file, not arguments.no_baselines)
    else:
        rows(results, deadline, arguments.small, arguments.set, file, arguments.row_seconds)


if __name__ == "__main__":
    main()
