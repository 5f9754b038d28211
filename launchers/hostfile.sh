#!/usr/bin/env bash
# One job over the hosts of a DeepSpeed hostfile (a line each: `host slots=GPUS`), started from the first of them:
#   launchers/hostfile.sh HOSTFILE [deepspeed's options] train/main.py cache.dir=/shared/cache run.dir=/shared/run ...
# Needs pdsh here, ssh without a password to every host, and the repository, its environment, the cache and the run folder under
# the same paths everywhere. Log in on every host (`hf auth login`, `wandb login`): tokens in the environment are not sent. Where
# hosts have several networks, NCCL_SOCKET_IFNAME (GPUs) or GLOO_SOCKET_IFNAME (CPUs) names one.
set -euo pipefail
hostfile=${1:?a hostfile comes first}
shift
# pdsh waits for all hosts, and ssh for ever for one that is gone, unless it asks whether that one still lives.
export PDSH_SSH_ARGS_APPEND="-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3 ${PDSH_SSH_ARGS_APPEND:-}"
# DeepSpeed sends PYTHON* (on GPUs also NCCL*, PATH and LD_LIBRARY_PATH) to the hosts; this file names what else they need.
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
env | grep -E '^(DS_ACCELERATOR|OMP_NUM_THREADS|GLOO_|TORCH_|HF_HOME|HF_HUB_OFFLINE|WANDB_MODE)' > "$DS_ENV_FILE" || true
words=()
for word in "$@"; do # a shell on every host reads the words once more; those with spaces DeepSpeed quotes itself
    [[ $word == *" "* ]] && words+=("$word") || words+=("$(printf %q "$word")")
done
deepspeed --hostfile "$hostfile" "${words[@]}"
