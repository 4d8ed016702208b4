#!/usr/bin/env bash
# The whole graph at profile smoke through `dvc repro`, in a scratch clone of this checkout as it stands (uncommitted
# changes included), twice: the second run must do nothing.
set -euo pipefail
root=$(git rev-parse --show-toplevel)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git clone --quiet "$root" "$scratch/mefem"
(cd "$root" && git diff --binary HEAD) | (cd "$scratch/mefem" && git apply --allow-empty --whitespace=nowarn)
(cd "$root" && git ls-files --others --exclude-standard -z | xargs -0 -r cp --parents -t "$scratch/mefem")
# The detector's model is fetched once for the checkout, not once for each clone.
export MEFEM_CACHE="${MEFEM_CACHE:-$root/data/models}"
cd "$scratch/mefem"
sed -i 's/^profile: .*/profile: smoke/' params.yaml
start=$(date +%s)
dvc repro
middle=$(date +%s)
echo "== smoke, first run: $((middle - start)) s; now again"
dvc repro | tee "$scratch/second.log"
if grep -q "Running stage" "$scratch/second.log"; then
    echo "the second dvc repro ran stages that were up to date" >&2
    exit 1
fi
dvc metrics show
dvc stage list > /dev/null
dvc dag > /dev/null
test -s figures/tables/table2.md && test -s figures/maskings/figure2_maskings.png && test -s figures/maskings/figure3_weights.png
grep -q "wiring only" README.md
cp README.md "$scratch/README.md"
python -c "from mefem.readme import write_readme; write_readme('.')"
cmp README.md "$scratch/README.md"
echo "== smoke: $((middle - start)) s, second run $(( $(date +%s) - middle )) s and nothing done"
