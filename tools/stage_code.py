"""What each stage of the graph depends on as code: one small file per notebook of nbs/stages (see
nbs/04_made_from.ipynb)."""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # the code of this checkout, whatever is installed

from mefem.made_from import write_stage_code  # noqa: E402

write_stage_code(*sys.argv[1:])
