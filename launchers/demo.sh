#!/usr/bin/env bash
# A released drafter and SmolLM2 on six prompts, with it and without, side by side. Usage: launchers/demo.sh DRAFTER OUT [key=value ...]
# DRAFTER: the name of a released drafter (eval/drafters), or a folder. Needs a CPU; fetches the target, 93 MB, once.
set -euo pipefail
drafter=${1:-smollm2-block}
out=${2:-runs/demo}
shift $(($# < 2 ? $# : 2))
here=$(cd "$(dirname "$0")/.." && pwd)
bin=$here/.venv/bin
[ -x "$bin/python" ] && export PATH="$bin:$PATH"

started=$SECONDS
PYTHON=${PYTHON:-python} bash "$here/launchers/smollm2.sh"
# float32, in which both sides write the same tokens.
python "$here/eval/main.py" mode=demo target=smollm2 target.dtype=float32 drafter="$drafter" draft.length=adaptive out="$out" "$@"
printf 'demo: %d s\n' $((SECONDS - started))
