"""Extraction of features against the bare forward pass of the same encoder, in one run: pictures per second
and their ratio.

python benchmarks/features.py                                        # the demo's encoder and a ViT-S/16
python benchmarks/features.py --pictures 2000 --encoder random:vit_base_patch16_224
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from mefem.encoders import freeze, load_encoder
from mefem.faces import encode_crop
from mefem.features import extract_features
from mefem.models import IMAGENET_MEAN, IMAGENET_STD, create_encoder
from mefem.shards import write_manifest, write_shard

DEMO = {"img_size": 112, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}


def make_faces(folder: Path, count: int) -> Path:
    """Crops of 224 pixels with the smooth gradients and fine noise of photographs, as a folder of shards."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 224)
    pictures = [
        (
            ramp[:, None, None] * rng.random(3)
            + ramp[None, :, None] * rng.random(3) * 0.2
            + rng.normal(20, 6, (224, 224, 3))
        )
        .clip(0, 255)
        .astype(np.uint8)
        for _ in range(16)
    ]
    jpegs, keys = [encode_crop(picture) for picture in pictures], [f"{i:09d}" for i in range(count)]
    stats = write_shard(
        folder,
        0,
        [(key, jpegs[i % 16], {}) for i, key in enumerate(keys)],
        [{"key": key, "person": key, "status": "success", "error_message": None} for key in keys],
    )
    write_manifest(folder, "bmi", count, [stats], {"size": 224}, simulated=True)
    return folder


def rate(work, count: int) -> float:
    begun = time.perf_counter()
    work()
    return count / (time.perf_counter() - begun)


def bare(encoder, count: int, batch: int) -> None:
    """The network alone, on a batch that is decoded, resized and normalised already."""
    import torch

    x = encoder.prepare(np.zeros((batch, encoder.image_size, encoder.image_size, 3), np.uint8))
    with torch.inference_mode():
        for start in range(0, count, batch):
            encoder.model(x[: min(batch, count - start)]).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--encoder", help="what mefem.load_encoder takes; default: the demo's shape and a ViT-S/16"
    )
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved pairs; the median counts")
    args = parser.parse_args()
    if args.encoder:
        encoders = [load_encoder(args.encoder)]
    else:
        demo = create_encoder("vit_small_patch16_224", **DEMO)
        encoders = [
            freeze("the demo's shape", demo, IMAGENET_MEAN, IMAGENET_STD),
            load_encoder("random:vit_small_patch16_224"),
        ]
    with tempfile.TemporaryDirectory() as folder:
        faces = make_faces(Path(folder) / "faces", args.pictures)
        for encoder in encoders:
            pairs = []
            for number in range(args.rounds):
                forward = rate(partial(bare, encoder, args.pictures, args.batch), args.pictures)
                out = Path(folder) / f"{number}"
                extract = partial(
                    extract_features, encoder, faces, out, args.batch, progress=False, run=number
                )
                whole = rate(extract, args.pictures)
                pairs.append((forward, whole, whole / forward))
            forward, whole, ratio = (median(column) for column in zip(*pairs, strict=True))
            print(
                f"{encoder.name}: bare forward {forward:.0f}/s, extraction {whole:.0f}/s, ratio {ratio:.2f} "
                f"(median of {args.rounds})",
                flush=True,
            )


if __name__ == "__main__":
    main()
