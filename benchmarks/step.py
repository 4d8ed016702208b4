"""How fast is a pretraining step? Ours, the same written plainly, and I-JEPA of the package `lightly`, in turn in one run.

    python benchmarks/step.py [--encoder vit_small_patch16_224] [--batch 8] [--pairs 9] [--depth 12] [--no-lightly] [--out FILE.json]

All three have the same encoder, predictor (width 384, `--depth`), batch, precision (bf16 autocast) and optimiser. They take turns, step by
step, so that a machine that is busy slows all of them; what is printed is the median step of each and the median of the ratios
within a turn. On a GPU times are taken after synchronising. `lightly` is installed into an environment of its own, .venv-bench, on
top of this one's packages; the project does not depend on it.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
LIGHTLY = "lightly==1.6.0"


class Ours:
    """The step as mefem.training makes it."""

    def __init__(self, config, device):
        from mefem.training import build, optimiser_of

        self.jepa = build(config).to(device).train()
        self.optimiser = optimiser_of(self.jepa, config)
        self.generator = torch.Generator(device).manual_seed(0)
        self.forward = torch.compile(self.jepa) if config.compile else self.jepa

    def step(self, images):
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = self.forward(images, self.generator)["loss"]
        self.learn(loss)

    def learn(self, loss):
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.jepa.update_teacher(0.996)


class Plain(Ours):
    """The same algorithm, written as one would at first: Python masks, boolean indexing, attention spelled out, a loop for the EMA."""

    def __init__(self, config, device):
        super().__init__(config, device)
        for block in (
            b for m in (self.jepa.student, self.jepa.teacher, self.jepa.predictor) for b in m.blocks
        ):
            block.attn.fused_attn = False
        groups = [
            {key: g[key] for key in ("params", "weight_decay", "decayed")}
            for g in self.optimiser.param_groups
        ]
        self.optimiser = torch.optim.AdamW(
            groups, lr=config.optimiser.lr, betas=(0.9, 0.95), foreach=False, fused=False
        )

    def masks(self, batch):
        """Source and target as bool [B, N], drawn picture by picture."""
        from mefem.masking import stripe_probabilities

        grid, weights = self.jepa.masking.grid, stripe_probabilities(self.jepa.masking.grid).tolist()
        source = torch.zeros(batch, grid * grid + 1, dtype=torch.bool)
        for row in source:
            centre = torch.multinomial(torch.tensor(weights), 1).item()
            start = min(max(centre - 1, 0), grid - 3)
            lines = row[1:].view(grid, grid) if torch.rand(()) < 0.5 else row[1:].view(grid, grid).T
            lines[start : start + 3] = True
            if torch.rand(()) < 0.5:
                row[row.nonzero()[-1]] = False
                row[0] = True
        return source, ~source

    def encode(self, encoder, images, mask=None):
        x = encoder.patch_embed(images)
        x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], 1) + encoder.pos_embed
        x = x if mask is None else x[mask].view(len(x), -1, x.shape[-1])
        return encoder.norm(encoder.blocks(x))

    def step(self, images):
        jepa = self.jepa
        source, target = (m.to(images.device) for m in self.masks(len(images)))
        index = [m.nonzero()[:, 1].view(len(images), -1) for m in (source, target)]
        with torch.autocast(images.device.type, torch.bfloat16):
            with torch.no_grad():
                z = self.encode(jepa.teacher, images)
                z = F.layer_norm(z[target].view(len(z), -1, z.shape[-1]).float(), z.shape[-1:])
            predicted = jepa.predictor(self.encode(jepa.student, images, source), *index)
        weights = jepa.weights.expand(len(images), -1)[target].view(len(images), -1)
        loss = (weights * F.smooth_l1_loss(predicted.float(), z, reduction="none").mean(-1)).mean()
        self.optimiser.zero_grad(set_to_none=False)
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            for teacher, student in zip(jepa.teacher.parameters(), jepa.student.parameters(), strict=True):
                teacher.mul_(0.996).add_(student, alpha=0.004)


class LightlyIJEPA:
    """I-JEPA from lightly's own modules: backbone wrapper, predictor and mask collator; no CLS and the I-JEPA paper's scales."""

    def __init__(self, config, device):
        import timm
        from lightly.data import IJEPAMaskCollator
        from lightly.models import utils
        from lightly.models.modules import IJEPAPredictorTIMM, MaskedVisionTransformerTIMM

        vit = timm.create_model(
            config.encoder.name, num_classes=0, class_token=False, global_pool="avg", **config.encoder.kwargs
        )
        self.utils = utils
        self.encoder = MaskedVisionTransformerTIMM(vit).to(device)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        p = config.predictor
        self.predictor = IJEPAPredictorTIMM(
            vit.patch_embed.num_patches,
            depth=p.depth,
            mlp_dim=vit.embed_dim,
            predictor_embed_dim=p.dim,
            num_heads=p.heads,
        ).to(device)
        self.collate = IJEPAMaskCollator(
            input_size=tuple(vit.patch_embed.img_size),
            patch_size=vit.patch_embed.patch_size[0],
            nenc=1,
            npred=4,
            enc_mask_scale=(0.85, 1.0),
            pred_mask_scale=(0.15, 0.2),
            aspect_ratio=(0.75, 1.5),
            min_keep=10,
        )
        trained = [q for m in (self.encoder, self.predictor) for q in m.parameters() if q.requires_grad]
        self.optimiser = torch.optim.AdamW(
            trained, lr=config.optimiser.lr, betas=(0.9, 0.95), weight_decay=0.04
        )

    def step(self, images):
        # The collator draws masks while it stacks a batch: a batch of empty samples gives the masks alone.
        _, known, asked = self.collate([torch.zeros(1)] * len(images))
        known, asked = ([m.to(images.device) for m in masks] for masks in (known, asked))
        with torch.autocast(images.device.type, torch.bfloat16):
            with torch.no_grad():
                z = self.teacher.encode(images)
                z = self.utils.apply_masks(F.layer_norm(z, z.shape[-1:]), asked)
            predicted = self.predictor(self.encoder.encode(images, idx_keep=known[0]), known, asked)
            loss = F.smooth_l1_loss(predicted.float(), z.float())
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.utils.update_momentum(self.encoder, self.teacher, 0.996)


def with_lightly() -> None:
    """Start again in .venv-bench, which sees this environment's packages and has lightly besides."""
    folder = ROOT / ".venv-bench"
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing {LIGHTLY} into {folder.name} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        site = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(site) / "project.pth").write_text(
            "\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n"
        )
        try:
            subprocess.run([python, "-m", "pip", "install", "-q", LIGHTLY], check=True)
        except subprocess.CalledProcessError:
            python.unlink()
            raise
    os.execve(python, [str(python), *sys.argv], os.environ | {"MEFEM_BENCH": "1", "PYTHONPATH": str(ROOT)})


def measure(steps: dict, images, pairs: int, device) -> dict:
    """Seconds of each step in `pairs` turns, every other turn in reverse order; the first two turns warm up."""
    taken = {name: [] for name in steps}
    for turn in range(pairs + 2):
        for name in steps if turn % 2 else reversed(steps):
            begun = time.perf_counter()
            steps[name].step(images)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn > 1:
                taken[name].append(time.perf_counter() - begun)
    return taken


def report(taken: dict, batch: int) -> dict:
    """Pictures per second of each, and ours as a multiple of it: the median over turns of the ratio of the two times."""
    rows = {}
    for name, seconds in taken.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds, taken["ours"], strict=True)]
        rows[name] = {
            "pictures_per_second": round(batch / statistics.median(seconds), 2),
            "ours_is_faster_by": round(statistics.median(ratios), 3),
            "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=12, help="of the predictor")
    parser.add_argument("--pairs", type=int, default=9, help="turns that are counted")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own)")
    parser.add_argument("--compile", action="store_true", help="our step through torch.compile")
    parser.add_argument("--no-lightly", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not arguments.no_lightly and not os.environ.get("MEFEM_BENCH"):
        with_lightly()
    from mefem.config import PretrainSettings
    from mefem.provenance import hardware

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = PretrainSettings.model_validate(
        {
            "encoder": {"name": arguments.encoder},
            "predictor": {"dim": 384, "depth": arguments.depth, "heads": 6},
            "batch": arguments.batch,
            "compile": arguments.compile,
        }
    )
    kinds = {"ours": Ours, "plain": Plain} | (
        {} if arguments.no_lightly else {"lightly I-JEPA": LightlyIJEPA}
    )
    steps = {name: kind(config, device) for name, kind in kinds.items()}
    images = torch.randn(arguments.batch, 3, 224, 224, device=device)
    rows = report(measure(steps, images, arguments.pairs, device), arguments.batch)
    found = {
        "rows": rows,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
        "torch": torch.__version__,
        "lightly": None if arguments.no_lightly else importlib.metadata.version("lightly"),
        "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
    }
    for name, row in rows.items():
        low, high = row["ratios"]
        print(
            f"{name:15} {row['pictures_per_second']:8.2f} pictures/s   ours is {row['ours_is_faster_by']:.2f} times as fast ({low:.2f} to {high:.2f})"
        )
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
