#!/usr/bin/env bash
# All six cells of objective x reuse: same cache, data, steps and draft length; prints the table of docs/results.md.
#   launchers/cells.sh train RUNS [overrides of train/main.py ...]    JOBS=6: six at a time on one GPU; TOKENS: the cache's
#                                                                      size; CELLS: only these
#   launchers/cells.sh judge RUNS [overrides of eval/main.py ...]
set -euo pipefail
stage=$1 runs=$2; shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
cells=${CELLS:-ttt-hidden ttt-kv ttt-hybrid blockwise-hidden blockwise-kv blockwise-hybrid}

train() { # cell overrides...
  local objective=${1%-*} reuse=${1#*-} block=(); shift
  [ "$objective" = blockwise ] && block=(objective.shifted=true)
  python "$here/train/main.py" experiment=cells objective="$objective" reuse="$reuse" "${block[@]}" "$@" \
    cache.dir="$runs/cache" run.dir="$runs/$objective-$reuse" > "$runs/$objective-$reuse.log" 2>&1
}

judge() { # cell overrides...
  local cell=$1; shift
  python "$here/eval/main.py" drafter="$runs/$cell/checkpoints/best" out="$runs/$cell/report" "$@" > "$runs/$cell.report.log" 2>&1
}

table() {
  python - "$runs" $cells <<'PY'
import json, pathlib, sys
print("| objective | reuse | parameters | tau T=1 | tau T=0 | acceptance by slot, T=1 | untrained | zero memory | another's memory | prompt lookup | draft ms | verify ms |")
print("|" + "---|" * 12)
for cell in sys.argv[2:]:
    report = json.loads((pathlib.Path(sys.argv[1]) / cell / "report/report.json").read_text())
    warm, cold = report["temperatures"]["1"], report["temperatures"]["0"]
    controls = " | ".join(f"{warm['controls'][c]['tau_micro']:.2f}" for c in ("untrained", "zero_memory", "shuffled_memory", "prompt_lookup"))
    slots = " ".join(f"{c:.2f}" for c in warm["conditional"])
    print(f"| {cell.replace('-', ' | ')} | {report['drafter']['parameters'] / 1e6:.1f}M | **{warm['tau_micro']:.2f}** | {cold['tau_micro']:.2f} | {slots} "
          f"| {controls} | {warm['round_ms']['draft']:.1f} | {warm['round_ms']['verify']:.1f} |")
PY
}

export -f train judge
export runs here
case $stage in
  train)
    mkdir -p "$runs"
    python "$here/data_prep/main.py" cache.dir="$runs/cache" data.max_tokens="${TOKENS:-2000000}"
    printf '%s\n' $cells | xargs -P "${JOBS:-1}" -I{} bash -euo pipefail -c 'train "$@"' _ {} "$@" ;;
  judge)
    for cell in $cells; do judge "$cell" "$@"; done
    table ;;
  *) echo "error: the first word is train or judge" >&2; exit 2 ;;
esac
