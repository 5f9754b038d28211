"""What a training left in its run folder."""

import json

import torch
from safetensors.torch import load_file


def losses(run, figure="loss"):
    """A figure of every logged step, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[figure] for line in lines if figure in line]


def assert_same_run(one, two):
    """Bit for bit: weights, losses and rates of every step."""
    mine, theirs = (load_file(run / "checkpoints/last/model.safetensors") for run in (one, two))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for figure in ("loss", "lr"):
        assert losses(one, figure) == losses(two, figure)
