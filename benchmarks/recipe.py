"""Recipes that might learn early, on real faces: probes against pictures and core-minutes.

python benchmarks/recipe.py run --pack data/gpu --bmi DIR --minutes 10           # every candidate, seed 0
python benchmarks/recipe.py run --pack data/gpu --bmi DIR --minutes 15 --seeds 0,1,2 --only paper,NAME
python benchmarks/recipe.py heads --pack data/gpu --bmi DIR --minutes 15 --seeds 0,1,2 --only NAME
python benchmarks/recipe.py collect --bmi DIR                                  # writes benchmarks/recipe.json

The pack of FairFace is that of tools/gpu_faces.py (benchmarks/README.md); DIR has annotation.csv and images/
of the VIP set. Each run takes one core. A stopped run continues, a finished one is left alone."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import deque
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
OUT = ROOT / "benchmarks" / "recipe.json"
EARLY = "ideas/early.py:EarlyJEPA"
TASKS = ("gender", "race", "age")


def early(**options) -> dict:
    """The changes of a candidate with `EarlyJEPA`."""
    return {"method": EARLY, "method_options": options}


def views(**options) -> dict:
    """The changes of a candidate with the method `views`, which wants more pictures to tell apart."""
    return {"method": "views", "method_options": options, "batch": 128, "optimiser": {"lr": 2e-3}}


# What each changes in the profile `faces`, and what was expected of it before its first run.
CANDIDATES = {
    "paper": ({}, "the recipe of the profile faces: near the untrained encoder after 10 core-minutes"),
    "splits4": (early(splits=4), "the teacher's pass is shared: a little better per core-minute"),
    "ema99": (
        {"optimiser": {"ema": [0.98, 1.0]}},
        "a younger teacher moves on from its first, random features sooner: higher rank, a little better",
    ),
    "lr3": ({"optimiser": {"lr": 3e-3}}, "faster at first, no better at the end"),
    "blocks3": (early(blocks=3), "targets with more of the picture in them: better race and gender"),
    "flip": ({"flip": True}, "no difference in so few epochs"),
    "stray60": (early(area=0.6), "as flip: each photograph is seen once or twice"),
    "predictor1": (
        {"predictor": {"dim": 64, "depth": 1, "heads": 2}},
        "cheaper steps, more work left to the encoder: a little better per core-minute",
    ),
    "sigreg": (
        {"method": "sigreg", "method_options": {"weight": 0.05}, "batch": 64},
        "no teacher: high rank, better than the paper's recipe, dear because of the whole picture's gradient",
    ),
    "penalty05": (
        {**early(penalty=0.05), "batch": 64},
        "the picture's mean token must vary in all directions: the largest gain, on all labels",
    ),
    "penalty05-splits4": (
        {**early(penalty=0.05, splits=4), "batch": 64},
        "as penalty05, and better per core-minute",
    ),
    "penalty05-young": (
        {**early(penalty=0.05), "batch": 64, "optimiser": {"ema": [0.98, 1.0], "lr": 2e-3}},
        "as penalty05, sooner",
    ),
    "views": (
        views(weight=0.5),
        "which picture a view is from asks for the whole face: ahead of the untrained encoder in minutes",
    ),
    "views-alone": (
        views(weight=1.0),
        "more pictures per minute, without what patches teach: as good or a little worse",
    ),
    "views-alone-young": (
        {**views(weight=1.0), "optimiser": {"lr": 2e-3, "ema": [0.98, 1.0]}},
        "after minutes the teacher of views-alone is still half of what it began with: clearly better; after "
        "45 minutes, by the slope of the first ten, gender 0.67, race 0.355, age 0.32, BMI 0.115, and by the "
        "paper's head ahead of the untrained encoder in gender and race, of pixels in race only",
    ),
    "batch128": (
        {"batch": 128, "optimiser": {"lr": 2e-3}},
        "what views has but its method, the control: as the paper's recipe",
    ),
}


def config_of(name: str, seed: int, **more):
    """The settings of a candidate's run: one process, one core."""
    from mefem.config import load_settings, pretrain_settings

    runtime = {"cpu_processes": 1, "keep": 100, "probe": None}
    changes = {"runtime": runtime, "seed": seed, "log_every": 100} | CANDIDATES[name][0] | more
    return pretrain_settings(load_settings(profile="faces"), "main", **changes)


def run_name(name: str, seed: int, minutes: float) -> str:
    """The folder of a run."""
    return f"{name}-seed{seed}-{minutes:g}min"


def untrained_name(seed: int) -> str:
    """The files of the network that runs of this seed begin with."""
    return f"untrained-seed{seed}"


def photographs(pack: Path, bmi: Path, work: Path) -> dict:
    """FairFace's pack with `images`, and the VIP set's `bmi_images` and `bmi`; decoded once into `work`."""
    import pandas as pd
    from gpu_faces import probed, read_decoded, read_pack
    from PIL import Image

    decoded = work / "faces.npy"
    if not decoded.is_file():
        work.mkdir(parents=True, exist_ok=True)
        part = work / f"part-{time.time_ns()}.npy"
        np.save(part, read_pack(pack / "faces.npz")["images"])
        part.replace(decoded)
    found = read_decoded(pack / "faces.npz", decoded)
    side = found["images"].shape[1]
    table = pd.read_csv(bmi / "annotation.csv")
    files = {path.stem: path for path in (bmi / "images").iterdir()}
    pictures = [
        Image.open(files[name]).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        for name in table.image
    ]
    found |= {"bmi_images": np.stack(pictures), "bmi": table.BMI.to_numpy(float)}
    return found | {"panel": probed(found["train"])}


def scores(features, bmi_features, faces: dict) -> tuple[dict, dict]:
    """Scores of ridge probes, and each person's result: hit or not, for BMI the squared error."""
    from gpu_faces import predicted_classes
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    panel, found, people = faces["panel"], {}, {}
    train = faces["train"][panel]
    for name in TASKS:
        codes = faces[name][panel]
        hits = predicted_classes(features[train], features[~train], codes[train]) == codes[~train]
        found[name], people[name] = round(float(hits.mean()), 4), hits
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=10.0 ** np.arange(-1, 6)))
    folds = KFold(5, shuffle=True, random_state=0)
    predicted = cross_val_predict(model, bmi_features, faces["bmi"], cv=folds)
    found["bmi"] = round(r2_score(faces["bmi"], predicted), 4)
    people["bmi"] = np.square(predicted - faces["bmi"]).astype(np.float32)
    return found, people


def look(encoder, faces: dict, path: Path) -> dict:
    """The row of an encoder (None: pixels), and each person's result in `path`."""
    import torch
    from gpu_faces import mean_patches, pixel_components

    from mefem.compute import choose_precision

    pictures, health = (faces["images"][faces["panel"]], faces["bmi_images"]), {}
    if encoder is None:
        features, bmi_features = (pixel_components(x, min(128, len(x))) for x in pictures)
    else:
        device = torch.device("cpu")
        how = {"device": device, "batch": 128, "precision": choose_precision("auto", device)}
        (features, health), (bmi_features, _) = (mean_patches(encoder, x, **how) for x in pictures)
    found, people = scores(features, bmi_features, faces)
    np.savez_compressed(path, **people)
    return found | {name: round(value, 4) for name, value in health.items()}


def untrained(config, faces: dict, work: Path) -> dict:
    """The row of the network that a run begins with, looked at once for each seed."""
    from mefem.training import build

    path = work / f"{untrained_name(config.seed)}.json"
    if not path.is_file():
        row = look(build(config).teacher.eval(), faces, path.with_suffix(".npz"))
        path.write_text(json.dumps(row))
    return json.loads(path.read_text())


def rate_of(config, pictures, folder: Path, steps: int = 30) -> float:
    """Seconds of processor for a step."""
    from mefem.training import start_run, train

    config = config.model_copy(update={"steps": 2 * steps, "checkpoint_every": 10**6, "log_every": 10**6})
    shutil.rmtree(folder, ignore_errors=True)  # of a stopped call: what is timed is all steps
    run = start_run(config, pictures, folder)
    begun = time.process_time()
    train(run, progress=False)
    return (time.process_time() - begun) / (2 * steps)


def one(name: str, seed: int, minutes: float, faces: dict, work: Path, points: int = 4) -> dict:
    """Train a candidate for `minutes` of one core; probe it untrained and at `points` checkpoints."""
    import torch
    from gpu_faces import teacher_of

    from mefem.training import MemoryPictures, start_run, train

    folder = work / run_name(name, seed, minutes)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pictures, plan = MemoryPictures(faces["images"][: faces["train"].sum()]), folder / "plan.json"
    if not plan.is_file():
        seconds = rate_of(config_of(name, seed), pictures, folder / "pace")
        every = max(1, int(minutes * 60 / seconds / points))
        plan.write_text(json.dumps({"seconds": seconds, "every": every}))
    every = json.loads(plan.read_text())["every"]
    config = config_of(name, seed, steps=points * every, checkpoint_every=every)
    rows = [{"step": 0} | untrained(config, faces, work)]
    begun = time.process_time()
    run = start_run(config, pictures, folder / "run")
    first = run.start
    train(run, progress=False)
    done = config.steps - first
    seconds = (time.process_time() - begun) / done if done else json.loads(plan.read_text())["seconds"]
    for path in sorted((folder / "run").glob("step_*.pt")):
        encoder, step = teacher_of(path, config)
        rows.append({"step": step} | look(encoder, faces, folder / f"people-{step}.npz"))
        print(name, seed, json.dumps(rows[-1]), flush=True)
    for row in rows:
        row |= {"pictures": row["step"] * config.batch, "core_minutes": round(row["step"] * seconds / 60, 2)}
    result = {"candidate": name, "seed": seed, "minutes": minutes, "rows": rows}
    (folder / "result.json").write_text(json.dumps(result | {"settings": config.model_dump(mode="json")}))
    return result


def features_of(encoder, images, labels):
    """`mefem.features.Features` of pictures: patch tokens of an encoder, components for `PixelEncoder`."""
    import torch
    from gpu_faces import patch_tokens

    from mefem.compute import choose_precision
    from mefem.encoders import PixelEncoder
    from mefem.features import Features

    if pixels := isinstance(encoder, PixelEncoder):
        parts = (encoder.tokens_of(images[i : i + 256]) for i in range(0, len(images), 256))
        heads = None
    else:
        device = torch.device("cpu")
        parts = patch_tokens(encoder, images, device, 128, choose_precision("auto", device))
        heads = encoder.blocks[0].attn.num_heads
    tokens = np.concatenate([part.half().numpy() for part in parts])  # [N, K, D], as the graph keeps them
    return Features("present", tokens, labels, {"has_cls": pixels, "heads": heads})


def labels_of(faces: dict) -> dict:
    """Labels as probes want them, of FairFace's photographs and of the VIP set."""
    import pandas as pd

    count = len(faces["train"])
    ours = {"key": np.arange(count), "person": np.arange(count)}
    split = {"split": np.where(faces["train"], "train", "validation")}
    people = np.arange(len(faces["bmi"]))
    return {
        "faces": pd.DataFrame(ours | split | {task: faces[task] for task in TASKS}),
        "bmi": pd.DataFrame({"key": people, "person": people, "bmi": faces["bmi"]}),
    }


def head_file(work: Path, name: str, task: str) -> Path:
    """Where the predictions of the paper's head are: for `name` an encoder and its seed."""
    return work / "heads" / f"{name}-{task}.parquet"


def head_predictions(encoder, faces: dict, tasks):
    """Yield (task, predictions of the paper's head) for each of `tasks`, trained as in the profile `faces`.

    All photographs of FairFace's training list train it, all of the other test it. BMI: five folds."""
    from dataclasses import fields, replace

    from mefem.config import load_settings
    from mefem.probing import ProbeOptions, get_task, probe

    given = load_settings(profile="faces").active.probing.model_dump()
    names = {field.name for field in fields(ProbeOptions)} - {"seeds"}
    options = {key: value for key, value in given.items() if key in names}
    labels, pictures = labels_of(faces), {"faces": faces["images"], "bmi": faces["bmi_images"]}
    # the larger rate alone is half the work, and right for so many photographs
    rates = {"faces": {"lrs": (max(options["lrs"]),)}, "bmi": {}}
    for source, offered in {"bmi": ("bmi",), "faces": TASKS}.items():
        if not (wanted := [task for task in offered if task in tasks]):
            continue
        features = features_of(encoder, pictures[source], labels[source])
        kind = "cls" if features.meta["has_cls"] else "patches"  # components are one vector
        for name in wanted:
            task = replace(get_task("bmi" if name == "bmi" else f"fairface-{name}"), group=None)
            found = probe(features, task, kind, progress=False, **(options | rates[source])).predictions
            yield name, found[["key", "person", "target", "prediction"]]


def paper_head(name: str, encoder, faces: dict, work: Path) -> None:
    """Predictions of the paper's head for each task; those that are there stay."""
    from mefem.files import replacing

    missing = [task for task in (*TASKS, "bmi") if not head_file(work, name, task).is_file()]
    for task, found in head_predictions(encoder, faces, missing):
        with replacing(head_file(work, name, task)) as part:
            found.to_parquet(part)
    if missing:
        print(name, json.dumps(head_scores(name, work)), flush=True)


def head_scores(name: str, work: Path) -> dict:
    """Accuracy, for BMI r2, of the predictions of `paper_head`."""
    import pandas as pd
    from sklearn.metrics import accuracy_score, r2_score

    found = {}
    for task in (*TASKS, "bmi"):
        rows = pd.read_parquet(head_file(work, name, task))
        score = (r2_score if task == "bmi" else accuracy_score)(rows.target, rows.prediction)
        found[task] = round(float(score), 4)
    return found


def heads(arguments) -> None:
    """`paper_head` of pixels, and of the last checkpoints of finished runs and their untrained encoders."""
    from gpu_faces import teacher_of

    from mefem.encoders import PixelEncoder
    from mefem.training import build

    work = arguments.work
    faces = photographs(arguments.pack, arguments.bmi, work)
    seen = faces["images"][: faces["train"].sum()][:4096]  # as many as the graph takes
    paper_head("pixels", PixelEncoder().fit(seen), faces, work)
    for name, seed in product(arguments.only.split(","), map(int, arguments.seeds.split(","))):
        config, own = config_of(name, seed), run_name(name, seed, arguments.minutes)
        if not (work / own / "result.json").is_file():
            sys.exit(f"{work / own}: no finished run; make it with `recipe.py run` and the same arguments")
        last = max((work / own / "run").glob("step_*.pt"))
        encoders = {own: teacher_of(last, config)[0], untrained_name(seed): build(config).teacher.eval()}
        for each, encoder in encoders.items():
            paper_head(each, encoder, faces, work)


def run_all(arguments) -> None:
    """Each candidate and seed in a process of its own, `--jobs` at a time."""
    names = arguments.only.split(",") if arguments.only else list(CANDIDATES)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    photographs(arguments.pack, arguments.bmi, arguments.work)
    common = ["--pack", arguments.pack, "--bmi", arguments.bmi, "--work", arguments.work]
    common = [str(part) for part in [*common, "--minutes", arguments.minutes]]
    queue = deque(
        (name, seed)
        for seed in seeds
        for name in names
        if not (arguments.work / run_name(name, seed, arguments.minutes) / "result.json").is_file()
    )
    running = []
    while queue or running:
        while queue and len(running) < arguments.jobs:
            name, seed = queue.popleft()
            command = [sys.executable, __file__, "one", "--only", name, "--seeds", str(seed), *common]
            running.append((name, seed, subprocess.Popen(command)))
        time.sleep(1)
        for item in [item for item in running if item[2].poll() is not None]:
            running.remove(item)
            if item[2].returncode:
                print(f"{item[0]}, seed {item[1]}: exit code {item[2].returncode}", flush=True)


def outcomes(paths: dict[int, Path], task: str, bmi):
    """Each person's result of each seed, as `mefem.metrics` takes predictions; `paths`: seed -> file.

    A .parquet file has predictions, an .npz file hits (BMI: squared errors) in the order of people."""
    import pandas as pd

    frames = []
    for seed, path in paths.items():
        if path.suffix == ".parquet":
            frames.append(pd.read_parquet(path).assign(seed=seed))
            continue
        with np.load(path) as file:
            values = file[task].astype(float)
        # a hit is a prediction of 1 where 1 was wanted; a squared error is that of a prediction so far off
        target = bmi if task == "bmi" else np.ones(len(values))
        predicted = bmi - np.sqrt(values) if task == "bmi" else values
        people = np.arange(len(values))
        columns = {"key": people, "person": people, "target": target, "prediction": predicted}
        frames.append(pd.DataFrame(columns).assign(seed=seed))
    return pd.concat(frames, ignore_index=True)


def result_files(head: str, task: str, runs: dict[int, tuple], work: Path) -> dict:
    """Files of people's results, {who: {seed: path}}; `runs`: seed -> name and last step of a run."""
    found: dict = {"ours": {}, "untrained": {}, "pixels": {}}
    for seed, (name, step) in runs.items():
        ridge = f"{name}/people-{step}", untrained_name(seed), "people-pixels"
        paper = name, untrained_name(seed), "pixels"
        for who, of_ridge, of_paper in zip(found, ridge, paper, strict=True):
            path = work / f"{of_ridge}.npz" if head == "ridge" else head_file(work, of_paper, task)
            found[who][seed] = path
    return found


def compared(runs: list[dict], work: Path, bmi) -> list[dict]:
    """Each candidate's last checkpoint against the untrained encoder and pixels, over people and seeds."""
    from mefem.metrics import paired_difference

    found = []
    for name, minutes in dict.fromkeys((run["candidate"], run["minutes"]) for run in runs):
        mine = [run for run in runs if (run["candidate"], run["minutes"]) == (name, minutes)]
        last = {run["seed"]: run["rows"][-1]["step"] for run in sorted(mine, key=lambda run: run["seed"])}
        for head, task in product(("ridge", "paper"), (*TASKS, "bmi")):
            files = result_files(
                head, task, {seed: (run_name(name, seed, minutes), last[seed]) for seed in last}, work
            )
            if not all(path.is_file() for paths in files.values() for path in paths.values()):
                continue  # the paper's head has not seen this run
            frames = {who: outcomes(paths, task, bmi) for who, paths in files.items()}
            for other in ("untrained", "pixels"):
                gap = paired_difference(frames["ours"], frames[other], "r2" if task == "bmi" else "accuracy")
                row = {"candidate": name, "minutes": minutes, "seeds": list(last), "head": head}
                row |= {"task": task, "against": other}
                found.append(row | {key: round(getattr(gap, key), 4) for key in ("value", "low", "high")})
    return found


def collect(bmi: Path, work: Path, out: Path) -> None:
    """All results, the pixels' row, the comparisons, and hardware and versions, in one file."""
    import pandas as pd
    import torch

    from mefem.provenance import hardware

    runs = [json.loads(path.read_text()) for path in sorted(work.glob("*/result.json"))]
    expected = {name: text for name, (_, text) in CANDIDATES.items()}
    found = {"hardware": hardware(), "torch": torch.__version__, "expected": expected}
    found["pixels"] = json.loads((work / "pixels.json").read_text())
    found["majority"] = json.loads((work / "majority.json").read_text())
    values = pd.read_csv(bmi / "annotation.csv").BMI.to_numpy(float)
    found |= {"compared": compared(runs, work, values), "runs": runs}
    for run in found["runs"]:
        run.pop("settings")
    names = sorted(path.name.removesuffix("-bmi.parquet") for path in work.glob("heads/*-bmi.parquet"))
    whole = [name for name in names if all(head_file(work, name, task).is_file() for task in TASKS)]
    found["paper_head"] = {name: head_scores(name, work) for name in whole}
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{out}: {len(runs)} runs")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("run", "one", "heads", "collect"))
    parser.add_argument("--pack", type=Path, default=ROOT / "data" / "gpu")
    parser.add_argument("--bmi", type=Path, default=ROOT / "data" / "raw" / "bmi" / "vip")
    parser.add_argument("--work", type=Path, default=ROOT / "data" / "recipe")
    parser.add_argument("--out", type=Path, default=OUT, help="of collect")
    parser.add_argument("--only", help="candidates, with commas between them")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--minutes", type=float, default=10, help="of one core, for each run")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.part == "run":
        run_all(arguments)
        faces = photographs(arguments.pack, arguments.bmi, arguments.work)
        row = look(None, faces, arguments.work / "people-pixels.npz")
        (arguments.work / "pixels.json").write_text(json.dumps(row))
        train, panel = faces["train"][faces["panel"]], faces["panel"]
        codes = {task: (faces[task][panel][train], faces[task][panel][~train]) for task in TASKS}
        majority = {task: float((b == np.bincount(a).argmax()).mean()) for task, (a, b) in codes.items()}
        (arguments.work / "majority.json").write_text(json.dumps(majority))
    elif arguments.part == "one":
        faces = photographs(arguments.pack, arguments.bmi, arguments.work)
        one(arguments.only, int(arguments.seeds), arguments.minutes, faces, arguments.work)
    elif arguments.part == "heads":
        if not arguments.only:
            parser.error("heads: name the candidates with --only")
        heads(arguments)
    else:
        collect(arguments.bmi, arguments.work, arguments.out)


if __name__ == "__main__":
    main()
