"""What each stage of the graph depends on as code: one small file per notebook of nbs/stages (see nbs/04_made_from.ipynb)."""

import sys

from mefem.made_from import write_stage_code

write_stage_code(*sys.argv[1:])
