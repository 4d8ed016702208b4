#!/usr/bin/env bash
# The whole graph at profile smoke through `dvc repro`, in a scratch clone of this checkout as it stands (uncommitted
# changes included): a first run, a second that must do nothing, one after a reworded comment that must do nothing either,
# and one after an edited loss, which must give another encoder and another Table 2. Of Table 4 two rows with two seeds are made.
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
export PYTHONPATH="$PWD"  # the code of the clone, which is about to be edited, and not that of the checkout
sed -i -e 's/^profile: .*/profile: smoke/' -e 's/^ablation_runs: .*/ablation_runs: [stripes2, cls05]/' -e 's/^seeds: .*/seeds: [0, 1]/' params.yaml

must_do_nothing() {
    dvc repro | tee "$scratch/again.log"
    if grep "Running stage" "$scratch/again.log" | grep -v "'code'"; then
        echo "dvc repro ran stages that were up to date ($1)" >&2
        exit 1
    fi
}

made() { sha256sum data/runs/main/encoder.safetensors figures/tables/table2.csv | cut -c1-64; }

start=$(date +%s)
dvc repro
middle=$(date +%s)
echo "== smoke, first run: $((middle - start)) s; now again"
must_do_nothing "nothing had changed"
dvc metrics show
dvc stage list > /dev/null
dvc dag > /dev/null
test -s figures/tables/table2.md && test -s figures/maskings/figure2_maskings.png && test -s figures/ablations/table4.md
grep -q "wiring only" README.md
grep -q "wiring only" figures/report.html
cp README.md figures/report.html "$scratch"
python -c "from mefem.readme import write_readme; write_readme('.')"
python -c "from mefem.page import write_report; write_report('.')"
cmp README.md "$scratch/README.md"
cmp figures/report.html "$scratch/report.html"
if [ -n "${MEFEM_SMOKE_OUT:-}" ]; then  # where CI is to keep what this made
    mkdir -p "$MEFEM_SMOKE_OUT"
    cp -r figures README.md "$MEFEM_SMOKE_OUT"
fi
echo "== a reworded comment in every module of the package"
for module in $(find mefem -name '*.py'); do echo "# a reworded comment" >> "$module"; done
must_do_nothing "only comments had changed"
echo "== a changed row of Table 4"
sed -i 's/stripes2: {masking: {width: 2,/stripes2: {masking: {width: 5,/' params.yaml
dvc status --json > "$scratch/status.json"
python - "$scratch/status.json" <<'EOF'
import json, sys

changed = set(json.load(open(sys.argv[1])))
# the first stage looks whether the rows name files with ideas
expected = {"code", "ablation@stripes2-0", "ablation@stripes2-1", "table4", "page"}
sys.exit(f"a changed row of Table 4 makes {sorted(changed)} out of date, expected {sorted(expected)}" if changed != expected else 0)
EOF
sed -i 's/stripes2: {masking: {width: 5,/stripes2: {masking: {width: 2,/' params.yaml
echo "== an edited loss"
made > "$scratch/before"
sed -i 's/reduction="none").mean(-1)/reduction="none").mean(-1) * 7/' mefem/jepa.py
dvc repro tables
made > "$scratch/after"
if [ "$(paste "$scratch/before" "$scratch/after" | head -2 | awk '$1 == $2' | wc -l)" != 0 ]; then
    echo "the loss was edited, and the encoder or Table 2 stayed as they were" >&2
    exit 1
fi
echo "== smoke: $((middle - start)) s, all of it $(($(date +%s) - start)) s"
