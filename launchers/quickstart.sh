#!/usr/bin/env bash
# The three real commands on the embedded target: capture, train, judge. Usage: launchers/quickstart.sh RUNS
# Another size by environment: RANKS processes, TOKENS of text, STEPS of training, PROMPTS to judge on.
set -euo pipefail
runs=${1:-runs/quickstart}
here=$(cd "$(dirname "$0")/.." && pwd)
bin=$here/.venv/bin
[ -x "$bin/python" ] && export PATH="$bin:$PATH"
ranks=${RANKS:-2}

step() { printf '\n$ %s\n' "$*"; "$@"; }
started=$SECONDS
# What reuse=kv of two draft layers reads, and no more: the K/V of the target's first and last layer.
step python "$here/data_prep/main.py" target=tiny data=stdlib data.max_tokens="${TOKENS:-400000}" 'cache.kinds=[kv]' 'cache.layers=[0,5]' cache.dir="$runs/cache"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
step deepspeed --num_accelerators "$ranks" --master_port "$port" "$here/train/main.py" experiment=quickstart cache.dir="$runs/cache" run.dir="$runs/run" ${STEPS:+train.max_steps=$STEPS train.save_every=$STEPS}
# A step of so small a target is too short to share among cores: one thread is as fast as two, and no slower beside other work.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
step python "$here/eval/main.py" drafter="$runs/run/checkpoints/best" out="$runs/report" suite.count="${PROMPTS:-12}"
printf '\nquickstart: %d s; see %s/report/report.png\n' $((SECONDS - started)) "$runs"
