"""Photographs a second from JPEG in a shard to cropped JPEG in a shard, beside the plain way, in one run.

    python benchmarks/crop.py                      # 400 photographs of 512 x 512, one process and two
    python benchmarks/crop.py --photographs 50000  # memory over a long run: one shard, read again and again
    python benchmarks/crop.py --write rates.json   # what nbs/tutorials/plan_15_million.ipynb reads

Expected before the first run: decoding 512 x 512 takes 2 ms, one Lanczos resampling 2 ms, encoding 0.5 ms, detection 2 ms;
so 200 photographs a second and core with the publisher's box and 130 with detection. The targets are 70 and 45.
"""
import argparse
import io
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from joblib import Parallel, delayed
from PIL import Image, ImageDraw, ImageFilter

from mefem.config import write_json
from mefem.datasets.core import Photograph, _crop_one
from mefem.faces import FaceDetector
from mefem.shards import SUCCESS, ShardWriter, iter_samples, write_manifest, write_shard

CROP = {"size": 224, "min_side": 224, "scale": 2.0, "framing": "paper", "min_score": 0.5}
BOX = (176, 166, 336, 346)  # of the drawn face, pixels
SHARD = 200  # photographs


def draw(seed: int) -> bytes:
    "A face of ellipses on noise, JPEG 512 x 512 of about 90 kB, as photographs have."
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (512, 512), tuple(rng.integers(120, 200, 3)))
    pen = ImageDraw.Draw(image)
    for x0, y0, x1, y1, colour in [
            (-95, -130, 95, 130, (70, 50, 35)), (-80, -105, 80, 120, (224, 178, 150)), (-52, -28, -16, -8, (245, 240, 235)),
            (16, -28, 52, -8, (245, 240, 235)), (-43, -27, -25, -9, (50, 35, 25)), (25, -27, 43, -9, (50, 35, 25)),
            (-13, -15, 13, 40, (205, 155, 130)), (-32, 58, 32, 80, (180, 90, 85))]:
        pen.ellipse((256 + x0, 256 + y0, 256 + x1, 256 + y1), fill=colour)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(3))) + rng.normal(0, 7, (512, 512, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def through_shards(raw: Path, out: Path, index: int, box) -> int:
    "One shard to one shard, as `crop_unit` does it; returns how many photographs were usable."
    with ShardWriter(out, index) as shard:
        for key, data, _ in iter_samples(raw):
            jpeg, status, detail = _crop_one(Photograph(key, data, box), CROP)
            if jpeg is not None:
                shard.add_sample(key, jpeg, {"key": key})
            shard.add_row({"key": key, "status": status, "error_message": detail})
    return shard.samples


def plainly(files: list[Path], out: Path, box) -> int:
    "Folders of files, Pillow, MediaPipe picture by picture: decode all, crop, resize, save."
    detector = None if box else FaceDetector()
    for path in files:
        image = Image.open(path).convert("RGB")
        x0, y0, x1, y1 = box or detector.detect(np.array(image))[0].box
        side = 2 * max(x1 - x0, y1 - y0)
        left, top = (x0 + x1 - side) / 2, (y0 + y1 - side) / 2
        face = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.LANCZOS)
        face.save(out / path.name, quality=95, subsampling=0)
    return len(files)


def rate(work, count: int) -> float:
    "Photographs a second of wall-clock time."
    start = time.perf_counter()
    usable = work()
    assert usable == count, f"{usable} of {count} photographs were usable"
    return count / (time.perf_counter() - start)


def memory_of(raw: Path, out: Path, repeats: int, box) -> tuple[int, float, float]:
    "(photographs, resident MiB after the first shard, and at the end) of one process that crops the shard `repeats` times."
    process, first = psutil.Process(), 0.0
    for number in range(repeats):
        through_shards(raw, out, 0, box)
        if number == 0:
            first = process.memory_info().rss / 2**20
    return repeats * SHARD, first, process.memory_info().rss / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=400, help="how many to crop (one shard of 200, repeated)")
    parser.add_argument("--write", type=Path, help="a JSON file for the measured rates")
    options = parser.parse_args()
    repeats = max(options.photographs // SHARD, 2)
    report = {"command": " ".join(["python", "benchmarks/crop.py", *sys.argv[1:]]), "processor": processor(),
              "load_before": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory() as folder:
        raw, out, files = (Path(folder) / name for name in ("raw", "out", "files"))
        pictures = [draw(seed) for seed in range(SHARD)]
        report["photograph_bytes"] = round(np.mean([len(data) for data in pictures]))
        stats = write_shard(raw, 0, [(f"{n:06d}", data, {}) for n, data in enumerate(pictures)],
                            [{"key": f"{n:06d}", "status": SUCCESS} for n in range(SHARD)])
        write_manifest(raw, "drawn", SHARD, [stats], {"size": 512})
        files.mkdir()
        (Path(folder) / "plain").mkdir()
        for n, data in enumerate(pictures):
            (files / f"{n:06d}.jpg").write_bytes(data)
        for name, box in (("box", BOX), ("detection", None)):
            through_shards(raw, out, 0, box)  # warm: imports, the detector
            report[f"{name}_per_s"] = rate(lambda box=box: through_shards(raw, out, 0, box), SHARD)
            report[f"{name}_plain_per_s"] = rate(
                lambda box=box: plainly(sorted(files.iterdir()), Path(folder) / "plain", box), SHARD)
        report["crop_bytes"] = round((out / "00000.tar").stat().st_size / SHARD)
        for jobs in (1, 2):
            pool = Parallel(n_jobs=jobs)
            pool(delayed(through_shards)(raw, out, index, BOX) for index in range(jobs))  # the processes start here
            report[f"jobs_{jobs}_per_s"] = rate(
                lambda pool=pool: sum(pool(delayed(through_shards)(raw, out, i, BOX) for i in range(repeats))), repeats * SHARD)
        report["memory_photographs"], report["rss_first_mib"], report["rss_last_mib"] = memory_of(raw, out, repeats, BOX)
    report["two_over_one"] = report["jobs_2_per_s"] / report["jobs_1_per_s"]
    report = {key: round(value, 2) if isinstance(value, float) else value for key, value in report.items()}
    print(json.dumps(report, indent=1))
    print(f"box: {report['box_per_s'] / report['box_plain_per_s']:.2f} x the plain way (target 70/s); detection: "
          f"{report['detection_per_s'] / report['detection_plain_per_s']:.2f} x (target 45/s); two processes "
          f"{report['two_over_one']:.2f} x one (target 1.8); {report['rss_last_mib']:.0f} MiB (target below 1536)")
    if options.write:
        write_json(options.write, report)
    return 0


def processor() -> str:
    "The processor's name, where the system says it, and how many cores there are."
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    sys.exit(main())
