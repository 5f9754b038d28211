"""A drafter trains over the states of each family of targets, by the real command: captured, read and learned from."""

import json
import random

import pytest

from data_prep.target.families import FAMILIES
from tests.support.commands import SMALL, TRAIN, command
from tests.support.families import MINIATURES, add_tokenizer, configuration, miniature
from tests.support.runs import losses

NAMES = [
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_text",
    "gpt_oss",
    "gemma3_text",
    "gemma4_text",
    "glm4",
    "glm4_moe",
    "deepseek_v3",
    "phi",
    "olmo2",
    "mistral",
    "cohere2",
]


def texts(path, count=24, length=60):
    """Random documents, each of which says one half twice, so that there is something to learn."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            half = [draw.randrange(2, 25) for _ in range(length // 2)]
            file.write(json.dumps({"input_ids": half + half}) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_drafter_trains(name, tmp_path):
    assert name in MINIATURES
    target = add_tokenizer(miniature(name, tmp_path))
    texts(tmp_path / "texts.jsonl")
    kv = FAMILIES[configuration(name).model_type].kv is None
    done = command(
        TRAIN,
        "data=tokens",
        "data.max_length=64",
        f"data.path={tmp_path / 'texts.jsonl'}",
        f"target.path={target}",
        f"cache.dir={tmp_path / 'cache'}",
        "cache=fp32",
        f"cache.kinds=[{'hidden,kv' if kv else 'hidden'}]",
        f"reuse={'hybrid' if kv else 'hidden'}",
        "drafter.start=random",
        "drafter.layers=2",
        "drafter.vocabulary=null",
        *SMALL,
        "train.max_steps=8",
        "train.lr=1e-2",
        "target.mask_token_id=null",
        f"run.dir={tmp_path / 'run'}",
        "tracking=none",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = losses(tmp_path / "run")
    assert len(found) >= 8 and found[-1] < found[0]
