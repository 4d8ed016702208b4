"""The code that each stage of the graph depends on (nbs/04_made_from.ipynb), one file per stage notebook.

And one file per run, `ideas/pretrain-RUN.json` or `ideas/ablation-RUN.json`: the syntax of the files that the
run names as its masking, weights or method (nbs/46_beyond.ipynb). An edited idea reruns its own stages."""

import sys
from pathlib import Path

# The code of this checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mefem.config import ablation_settings, idea_path, load_settings, pretrain_settings  # noqa: E402
from mefem.files import write_json  # noqa: E402
from mefem.made_from import file_code, write_stage_code  # noqa: E402


def write_ideas(out: Path) -> None:
    """The hashes of each run's ideas; empty for a run without."""
    settings = load_settings()
    runs = {f"pretrain-{run}": pretrain_settings(settings, run) for run in settings.runs}
    runs |= {f"ablation-{run}": ablation_settings(settings, run) for run in settings.ablations}
    for name, config in runs.items():
        write_json(out / f"{name}.json", {kind: file_code(idea_path(kind)) for kind in config.ideas})


notebooks, out = sys.argv[1:]
write_stage_code(notebooks, out)
write_ideas(Path(out) / "ideas")
