"""`mefem embed` beside what it cannot do without: reading, detection and the forward pass by themselves.

    python benchmarks/embed.py --photographs DIR [--encoder mefem-starter] [--limit 256]

The floor: core-seconds of reading, finding and cutting out faces (one thread) spread over all cores, and
seconds of the forward pass on all cores; nothing is faster than their sum. The plain way: one photograph
after the other.
`start`: seconds from the command to its end with one photograph, in a new process."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def timed(work, *given, **options) -> tuple[float, object]:
    """Seconds, and what `work` returned."""
    begun = time.perf_counter()
    result = work(*given, **options)
    return time.perf_counter() - begun, result


def one_by_one(files: list[Path], how, frozen) -> None:
    """The plain way."""
    from mefem.embedding import embed

    for file in files:
        crop = how.of(file)[0].crop
        if crop is not None:
            embed(crop[None], frozen, "mean")


def measured(photographs: Path, encoder: str, limit: int, batch: int = 32) -> dict:
    """Photographs per second: the floor, `embed_photographs`, the plain way; in turns, the best of each."""
    import numpy as np

    from mefem.compute import usable_cores
    from mefem.crop import Framing, photographs_in
    from mefem.embedding import embed, embed_photographs
    from mefem.encoders import load_encoder

    files, frozen = photographs_in(photographs)[:limit], load_encoder(encoder)
    how = Framing(scale=frozen.face_scale, size=frozen.image_size)
    seconds: dict = {"framing": [], "forward": [], "embed": [], "plain": []}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "photographs"
        folder.mkdir()
        for number, file in enumerate(files):
            (folder / f"{number:06}{file.suffix}").symlink_to(file.resolve())
        for turn in range(3):  # the first warms up
            spent, found = timed(lambda: [how.of(file)[0] for file in files])
            crops = np.stack([one.crop for one in found if not one.problem])
            seconds["framing"].append(spent)
            seconds["forward"].append(timed(embed, crops, frozen, "mean", batch)[0])
            given = (folder, frozen, Path(work) / f"{turn}.parquet")
            seconds["embed"].append(timed(embed_photographs, *given, progress=False)[0])
            seconds["plain"].append(timed(one_by_one, files, how, frozen)[0])
    best = {name: min(times[1:]) for name, times in seconds.items()}
    floor = best["framing"] / usable_cores() + best["forward"]
    rates = {"floor": len(files) / floor} | {name: len(files) / best[name] for name in best}
    return {
        "photographs": len(files),
        "cores": usable_cores(),
        "per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "embed_of_floor": round(floor / best["embed"], 3),
        "embed_is_faster_than_plain_by": round(best["plain"] / best["embed"], 2),
    }


def start(photograph: Path, encoder: str) -> float:
    """Seconds of the command with one photograph, the best of three new processes."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "mefem", "embed", str(photograph), "-e", encoder, "-o"]
        runs = [[*command, str(Path(work) / f"{turn}.parquet")] for turn in range(3)]
        return min(
            timed(lambda run=run: subprocess.run(run, check=True, capture_output=True))[0] for run in runs
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--encoder", default="mefem-starter")
    parser.add_argument("--limit", type=int, default=256)
    arguments = parser.parse_args()
    found = measured(arguments.photographs, arguments.encoder, arguments.limit)
    photograph = next(
        path for path in sorted(arguments.photographs.iterdir()) if path.suffix in (".jpg", ".png")
    )
    print(json.dumps(found | {"start": round(start(photograph, arguments.encoder), 2)}, indent=1))


if __name__ == "__main__":
    main()
