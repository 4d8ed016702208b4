"""Age on the real FairFace, White and non-White people apart, beside the majority class: random encoder, PCA of pixels, MeFEm.

    python benchmarks/fairface.py --raw ../shared/data/fairface --encoder data/runs/main/encoder.safetensors
    python benchmarks/fairface.py --raw ../shared/data/fairface --encoder FILE --limit 300 --epochs 3     # a quick look
"""

import argparse
import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq

from mefem.datasets.core import crop_dataset
from mefem.features import features_of
from mefem.metrics import evaluate


def first_rows(raw: Path, out: Path, limit: int) -> Path:
    "The publisher's files with the first `limit` rows of each split, in their own schema."
    for path in raw.glob("*/*.parquet"):
        target = out / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(path).slice(0, limit), target)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder with the publisher's files (0.25/ or 1.25/)")
    parser.add_argument("--encoder", required=True, help="an encoder file of ours; the random encoder takes its shape")
    parser.add_argument("--out", type=Path, default=Path("data/fairface-check"), help="crops, features, results; resumable")
    parser.add_argument("--limit", type=int, help="only the first photographs of each split")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    raw = first_rows(args.raw, args.out / "raw", args.limit) if args.limit else args.raw
    faces = args.out / "faces" / "fairface"
    # padding 0.25 leaves no room for the paper's square: the publisher's own framing is what can be had
    manifest = crop_dataset("fairface", raw, faces, framing="dataset")
    if manifest["state"] != "present":
        raise SystemExit(manifest["reason"])
    sources = {"mefem": args.encoder, "random": f"random:{args.encoder}", "pixels": "pixels"}
    for name, source in sources.items():
        features_of(source, [faces], args.out / "features" / name, fit_on=[faces], fit_limit=min(4096, args.limit or 4096))  # train comes first
    folders = {name: (args.out / "features" / name, args.out / "results" / name) for name in sources}
    numbers = evaluate(folders, ("fairface-age",), epochs=args.epochs, lrs=(1e-3, 3e-3), weight_decays=(0.01, 0.3), batch=64)
    shown = numbers[numbers.metric.isin(["accuracy/White", "accuracy/non-White"])]
    columns = ["encoder", "features", "head", "metric", "value", "low", "high", "majority", "n"]
    print(shown[columns].round(3).to_markdown(index=False))
    best = shown.groupby("metric")[["value", "majority"]].max()
    print(json.dumps({"photographs": manifest["usable"], "best": best.round(3).to_dict("index")}))
    pd.DataFrame(shown).to_csv(args.out / "fairface.csv", index=False)


if __name__ == "__main__":
    main()
