"""Checkpoints: the ranks write their files in turn, and a file that changed since is not resumed from."""

import json
import shutil

import torch
from safetensors.torch import load_file

from common.hashing import file_hash
from tests.support.commands import SMALL, TRAIN, command
from tests.support.runs import assert_same_run
from train.run.state import KINDS

# The command with files of 100 kB, and each rank says what it wrote.
IN_MANY_FILES = f"""
import os
from train.run import checkpoint

checkpoint.FILE_BYTES = 100_000
write = checkpoint.write_safetensors

def said(path, tensors):
    with open(path.parents[2] / ("wrote" + os.environ["RANK"]), "a") as log:
        log.write(path.name + " ")
    return write(path, tensors)

checkpoint.write_safetensors = said
exec(compile(open({str(TRAIN)!r}).read(), {str(TRAIN)!r}, "exec"))
"""
WORDS = ["deepspeed=zero3", "train.batch=2", "train.max_steps=3", "train.save_every=2", "train.workers=0", *SMALL]


def test_ranks_share_the_writing_and_nothing_of_it_shows(cache, tmp_path):
    """Two ranks write many files. One that changed is refused; whole again, they are resumed from to the same bits, which the
    ordinary command writes as one file a kind."""
    words = [*WORDS, f"cache.dir={cache}", "run.dir=run", "train.diagnose=false"]
    (tmp_path / "main.py").write_text(IN_MANY_FILES)
    done = command(tmp_path / "main.py", *words, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(tmp_path / "run", tmp_path / "before", symlinks=True)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000003")
    kept = tmp_path / "run/checkpoints/step-000002/engine"

    wrote = [set((tmp_path / f"run/checkpoints/wrote{rank}").read_text().split()) for rank in (0, 1)]
    assert all(len(names) >= 3 * 3 for names in wrote) and not wrote[0] & wrote[1]
    sums = json.loads((kept / "files.json").read_text())
    assert sums.keys() == {"state.json", *wrote[0], *wrote[1]} == {path.name for path in kept.iterdir()} - {"files.json"}
    assert all(file_hash(kept / name) == value for name, value in sums.items())

    path = kept / "exp_avg-2.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    done = command(TRAIN, *words, ranks=2, cwd=tmp_path)
    assert done.returncode == 2 and "exp_avg-2.safetensors is not as it was written); remove it" in done.stderr
    path.write_bytes(good)
    done = command(TRAIN, *words, ranks=2, cwd=tmp_path)
    assert done.returncode == 0 and "after step 2" in done.stdout, done.stdout + done.stderr
    assert_same_run(tmp_path / "before", tmp_path / "run")

    many, one = (tmp_path / name / "checkpoints/step-000003/engine" for name in ("before", "run"))
    assert {path.name for path in one.iterdir()} == {"state.json", "files.json", *(f"{kind}.safetensors" for kind in KINDS)}
    for kind in KINDS:
        whole = load_file(one / f"{kind}.safetensors")
        files = [load_file(path) for path in (many / f"{kind}.safetensors", *many.glob(f"{kind}-*.safetensors"))]
        assert sum(map(len, files)) == len(whole)
        assert all(torch.equal(tensor, whole[name]) for file in files for name, tensor in file.items())
