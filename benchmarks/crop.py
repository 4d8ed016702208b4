"""Photographs a second from JPEG in a shard to cropped JPEG in a shard, beside the plain way, in one run.

    python benchmarks/crop.py    # everything, about a quarter of an hour on two cores
    python benchmarks/crop.py --photographs 40 --memory 200 --steps 2    # the same parts, short
    python benchmarks/crop.py --only box detection              # some parts: PARTS below
    python benchmarks/crop.py --write benchmarks/rates.json    # all parts, for the tutorial plan_15_million

Rates are given by the clock (`_per_s`) and by the processor's time (`_per_core_s`: what one core does that
does nothing else; on a busy machine only these can be compared). Ours and the plain way take turns; the
median of the turns counts. Targets: 70 a second and core with the publisher's box, 45 with detection; two
processes 1.8 times one; under 1.5 GiB resident over 50,000 photographs; reading for training twice what the
training step eats."""

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from joblib import Parallel, delayed
from PIL import Image, ImageDraw, ImageFilter

from mefem.crop import Cropping, crop_one
from mefem.datasets.core import Photograph
from mefem.faces import FaceDetector
from mefem.files import write_json
from mefem.shards import SUCCESS, ShardWriter, iter_samples, write_manifest, write_shard

CROP = Cropping(framing="paper")
BOX = (176, 166, 336, 346)  # of the drawn face, pixels
SHARD = 200  # photographs, at most
PARTS = ("box", "detection", "other", "parallel", "memory", "training")


def draw(seed: int) -> bytes:
    """A face of ellipses on noise, JPEG 512 x 512 of about 90 kB, as photographs have."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (512, 512), tuple(rng.integers(120, 200, 3)))
    pen = ImageDraw.Draw(image)
    for x0, y0, x1, y1, colour in [
        (-95, -130, 95, 130, (70, 50, 35)),
        (-80, -105, 80, 120, (224, 178, 150)),
        (-52, -28, -16, -8, (245, 240, 235)),
        (16, -28, 52, -8, (245, 240, 235)),
        (-43, -27, -25, -9, (50, 35, 25)),
        (25, -27, 43, -9, (50, 35, 25)),
        (-13, -15, 13, 40, (205, 155, 130)),
        (-32, 58, 32, 80, (180, 90, 85)),
    ]:
        pen.ellipse((256 + x0, 256 + y0, 256 + x1, 256 + y1), fill=colour)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(3))) + rng.normal(0, 7, (512, 512, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def through_shards(raw: Path, out: Path, index: int, box) -> int:
    """One shard to one shard, as `crop_unit` does it; returns how many photographs were usable."""
    with ShardWriter(out, index) as shard:
        for key, data, _ in iter_samples(raw):
            jpeg, status, detail = crop_one(Photograph(key, data, box), CROP)
            if jpeg is not None:
                shard.add_sample(key, jpeg, {"key": key})
            shard.add_row({"key": key, "status": status, "error_message": detail})
    return shard.samples


def plainly(files: list[Path], out: Path, box) -> int:
    """Folders of files, Pillow, MediaPipe picture by picture: decode all, crop, resize, save."""
    detector = None if box else FaceDetector()
    for path in files:
        image = Image.open(path).convert("RGB")
        x0, y0, x1, y1 = box or detector.detect(np.array(image))[0].box
        side = 2 * max(x1 - x0, y1 - y0)
        left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
        face = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.LANCZOS)
        face.save(out / path.name, quality=95, subsampling=0)
    return len(files)


def rates(works: dict, count: int, turns: int) -> dict:
    """For each name of `works` (what returns how many photographs it used): photographs a second, and a
    second of processor time."""
    taken = {name: [] for name in works}
    for turn in range(turns):
        for name in works if turn % 2 == 0 else reversed(works):
            clock, used = time.perf_counter(), time.process_time()
            usable = works[name]()
            taken[name].append((time.perf_counter() - clock, time.process_time() - used))
            if usable != count:
                raise SystemExit(f"{name}: {usable} of {count} photographs were usable")
    middle = {
        name: [count / statistics.median(each) for each in zip(*times, strict=True)]
        for name, times in taken.items()
    }
    return {
        f"{name}_per_{unit}": value
        for name, pair in middle.items()
        for unit, value in zip(("s", "core_s"), pair, strict=True)
    }


class Place:
    """A scratch folder with one shard of drawn photographs and the same as files."""

    def __init__(self, folder: Path, count: int):
        self.count = count
        self.raw, self.out, self.files, self.plain = (
            folder / name for name in ("raw", "out", "files", "plain")
        )
        pictures = [draw(seed) for seed in range(count)]
        self.bytes = round(statistics.mean(map(len, pictures)))
        stats = write_shard(
            self.raw,
            0,
            [(f"{n:06d}", data, {}) for n, data in enumerate(pictures)],
            [{"key": f"{n:06d}", "status": SUCCESS} for n in range(count)],
        )
        write_manifest(self.raw, "drawn", count, [stats], {"size": 512})
        self.files.mkdir()
        self.plain.mkdir()
        for n, data in enumerate(pictures):
            (self.files / f"{n:06d}.jpg").write_bytes(data)


def measure_crop(place: Place, name: str, box, turns: int) -> dict:
    """Ours and the plain way in turn."""
    through_shards(place.raw, place.out, 0, box)  # warm: imports, the detector
    found = rates(
        {
            name: lambda: through_shards(place.raw, place.out, 0, box),
            f"{name}_plain": lambda: plainly(sorted(place.files.iterdir()), place.plain, box),
        },
        place.count,
        turns,
    )
    return found | {"crop_bytes": round((place.out / "00000.tar").stat().st_size / place.count)}


def measure_other(place: Place, turns: int) -> dict:
    """Portraits of 1024 pixels made smaller (SFHQ), a frame of a clip with its detection (AVSpeech), hashes
    of crops (datasheets)."""
    from mefem.datasets.core import video_frame
    from mefem.datasheets import set_coefficients
    from mefem.simulate.publishers import encode_clip, moved

    big = io.BytesIO()
    face = Image.open(place.files / "000000.jpg")
    face.resize((1024, 1024), Image.Resampling.BICUBIC).save(big, "JPEG", quality=90)
    clip = place.raw.parent / "clip.mp4"
    clip.write_bytes(encode_clip(moved(np.asarray(face))))
    portrait, framed = Photograph("p", big.getvalue()), Cropping(framing="dataset")
    through_shards(place.raw, place.out, 0, BOX)
    stats = json.loads((place.out / "00000_stats.json").read_text())
    write_manifest(place.out, "drawn", place.count, [stats], {"size": CROP.size})

    def portraits():
        return sum(crop_one(portrait, framed)[1] == SUCCESS for _ in range(place.count))

    def clips():
        return sum(
            crop_one(Photograph("c", video_frame(clip, 0.5)), CROP)[1] == SUCCESS for _ in range(place.count)
        )

    return rates(
        {"portrait": portraits, "clip": clips, "hash": lambda: len(set_coefficients(place.out)[0])},
        place.count,
        turns,
    ) | {"portrait_bytes": len(big.getvalue())}


def measure_parallel(place: Place, shards: int, turns: int) -> dict:
    """One process and two, by the clock."""
    found = {}
    for jobs in (1, 2):
        pool = Parallel(n_jobs=jobs)

        def work(pool=pool):
            return sum(
                pool(delayed(through_shards)(place.raw, place.out, index, BOX) for index in range(shards))
            )

        work()  # the processes start here
        found[f"jobs_{jobs}_per_s"] = rates({"jobs": work}, shards * place.count, turns)["jobs_per_s"]
    return found | {"two_over_one": found["jobs_2_per_s"] / found["jobs_1_per_s"]}


def measure_memory(place: Place, photographs: int) -> dict:
    """Resident MiB of this one process over a long run: the shard again and again, with the box and with
    detection in turn."""
    process, seen = psutil.Process(), []
    for number in range(max(photographs // place.count, 2)):
        through_shards(place.raw, place.out, 0, None if number % 2 else BOX)
        seen.append(process.memory_info().rss / 2**20)
    return {
        "memory_photographs": len(seen) * place.count,
        "rss_first_mib": seen[1],
        "rss_last_mib": seen[-1],
        "rss_most_mib": max(seen),
    }


def measure_training(place: Place, steps: int) -> dict:
    """Pictures a second read by one process from shards in random order, and eaten by the training step, for
    two models."""
    import torch
    from step import Ours

    from mefem.config import PretrainSettings, load_settings
    from mefem.training import EpochOrder, ShardPictures, batches

    small = load_settings(profile="demo").active.pretrain
    models = {"vit_s": PretrainSettings.model_validate({"batch": 8}), "demo": small}
    stats = []
    for index in range(4):
        through_shards(place.raw, place.out, index, BOX)
        stats.append(json.loads((place.out / f"{index:05d}_stats.json").read_text()))
    write_manifest(place.out, "drawn", 4 * place.count, stats, {"size": CROP.size})
    found = {}
    for name, config in models.items():
        size, batch, device = config.encoder.image_size, config.batch, torch.device("cpu")
        pictures = ShardPictures([place.out], size)
        order, count = EpochOrder(pictures.lengths, 0, window=2), 4 * place.count // batch
        trainer, images = Ours(config, device), torch.randn(batch, 3, size, size)
        cast = config.precision == "bf16"

        def read(pictures=pictures, order=order, batch=batch, count=count):
            return sum(map(len, batches(pictures, order, batch, range(count))))

        def step(trainer=trainer, images=images, cast=cast):
            for _ in range(steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                    loss = trainer.forward(images, trainer.generator)["loss"]
                trainer.learn(loss)
            return steps * len(images)

        step()
        speed = {**rates({"read": read}, count * batch, 3), **rates({"step": step}, steps * batch, 3)}
        found |= {
            f"read_{name}_per_s": speed["read_per_s"],
            f"step_{name}_per_s": speed["step_per_s"],
            f"read_over_step_{name}": speed["read_per_s"] / speed["step_per_s"],
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure (default: all)"
    )
    parser.add_argument(
        "--photographs", type=int, default=1200, help="for each rate (shards of 200, again and again)"
    )
    parser.add_argument(
        "--memory", type=int, default=50_000, help="photographs over which the resident set is watched"
    )
    parser.add_argument("--steps", type=int, default=10, help="training steps in each of three turns")
    parser.add_argument("--write", type=Path, help="a JSON file for the measured rates; needs all parts")
    options = parser.parse_args()
    if options.write and set(options.only) != set(PARTS):
        parser.error(f"--write needs all parts ({', '.join(PARTS)}): the page that plans reads them all")
    count = max(min(options.photographs, SHARD), 8)
    shards = max(options.photographs // count, 1)
    report = {
        "command": " ".join(["python", "benchmarks/crop.py", *sys.argv[1:]]),
        "processor": processor(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), count)
        report["photograph_bytes"] = place.bytes
        parts = {
            "box": lambda: measure_crop(place, "box", BOX, shards),
            "detection": lambda: measure_crop(place, "detection", None, shards),
            "other": lambda: measure_other(place, min(shards, 3)),
            "parallel": lambda: measure_parallel(place, max(shards, 2), 3),
            "memory": lambda: measure_memory(place, options.memory),
            "training": lambda: measure_training(place, options.steps),
        }
        for name in (name for name in PARTS if name in options.only):
            print(f"{name} ...", file=sys.stderr, flush=True)
            report |= parts[name]()
    report["load_after"] = round(os.getloadavg()[0], 2)
    report = {key: round(value, 2) if isinstance(value, float) else value for key, value in report.items()}
    print(json.dumps(report, indent=1))
    print("\n".join(verdicts(report)))
    if options.write:
        write_json(options.write, report)
    return 0


TARGETS = {  # key -> (what it is, target, whether more is better)
    "box_per_core_s": ("photographs a second and core, publisher's box", 70, True),
    "detection_per_core_s": ("photographs a second and core, with detection", 45, True),
    "two_over_one": ("times one process, two processes", 1.8, True),
    "rss_most_mib": ("MiB resident at most", 1536, False),
    "read_over_step_vit_s": ("times what the step of ViT-S/16 eats, reading", 2, True),
    "read_over_step_demo": ("times what the step of the demo's ViT eats, reading", 2, True),
}


def verdicts(report: dict) -> list[str]:
    """Each measured target in words, and ours beside the plain way."""
    lines = []
    for key, (what, target, more) in TARGETS.items():
        if key in report:
            good = report[key] >= target if more else report[key] <= target
            lines.append(
                f"{report[key]:9.2f} {what} (target {'at least' if more else 'at most'} {target}): "
                f"{'met' if good else 'NOT met'}"
            )
    return lines + [
        f"{report[f'{name}_per_core_s'] / report[f'{name}_plain_per_core_s']:9.2f} times the plain way, "
        f"{name}"
        for name in ("box", "detection")
        if f"{name}_per_core_s" in report
    ]


def processor() -> str:
    """The processor's name, where the system says it, and how many cores there are."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
