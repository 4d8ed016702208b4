#!/usr/bin/env bash
# Parts of the GPU measurements within a number of seconds: tools/gpu_faces.sh SECONDS PART... [-- OPTION...]
# PART: steps, pretrain, rows (tools/gpu_faces.py says what each does; OPTION is handed to it, e.g. --small).
# A part for which too little time is left is skipped with a line; one that fails does not keep the next from running.
# What is measured is written to $OUT as it comes: steps.json, pretrain.json, curve.csv, encoder.safetensors, rows.json.
set -u
cd "$(dirname "$0")/.."
begun=$SECONDS total=${1:?seconds that all parts may take} parts=() failed=0
shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do parts+=("$1"); shift; done
[ $# -gt 0 ] && shift
export OUT=${OUT:-data/gpu-out} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
pack=${GPU_FACES_PACK:-data/gpu}

# Packages that the lent machine lacks came along as wheels for it; here the environment has them.
if ! python3 -c "import pydantic" 2>/dev/null && ls "$pack"/wheels/*.whl >/dev/null 2>&1; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$pack"/wheels/*.whl || exit
    export PYTHONPATH=$PWD:$site
fi

for part in "${parts[@]}"; do
    left=$((total - (SECONDS - begun)))
    case $part in
        steps) least=60 most=200 ;;
        pretrain) least=100 most=420 ;;
        rows) least=130 most=400 ;;
        *) echo "no part $part: expected steps, pretrain or rows"; exit 2 ;;
    esac
    case " $* " in *" --small "*) least=5 ;; esac
    if [ "$left" -lt "$least" ]; then
        echo "skipped: $part needs $least s, $left s are left"
        continue
    fi
    given=$((left < most ? left : most))
    echo "== $part, $given s"
    # SIGTERM lets training write its checkpoint; what hangs all the same is ended ten seconds later.
    timeout -k 10 "$given" python3 tools/gpu_faces.py "$part" --pack "$pack" --seconds $((given - 3)) "$@" || {
        echo "$part ended with exit code $?"
        failed=1
    }
done
ls -l "$OUT"
exit $failed
