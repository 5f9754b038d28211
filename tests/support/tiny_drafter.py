"""A drafter of the embedded target, on disk."""

from dataclasses import replace
from pathlib import Path

from data_prep.recipe import TargetRecipe
from data_prep.target.loading import load_target, load_tokenizer, tokenizer_hashes
from train.drafter.build import new_drafter
from train.drafter.config import DrafterConfig


def save_tiny_drafter(folder: Path, **changes) -> Path:
    """An untrained drafter of the embedded target, `changes` made to its configuration."""
    target = load_target(TargetRecipe(path="data_prep/targets/tiny", device="cpu"))
    tokenizer = tokenizer_hashes(load_tokenizer(target.path))[0]
    about = {"id": "tiny", "weights_hash": target.weights_hash(), "tokenizer_hash": tokenizer}
    config = DrafterConfig("ttt", "kv", [0, 5], [], 4, False, False, 0, "target", 2, target.architecture, about)
    drafter = new_drafter(config).start(target, target.frozen_head)
    drafter.config = replace(config, **changes)
    drafter.save_pretrained(folder)
    return folder
