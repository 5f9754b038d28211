"""What `conf/eval.yaml` may say."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from data_prep.cache.reader import CacheReader
from data_prep.cli import refuse_file
from data_prep.errors import UserError
from data_prep.recipe import DataRecipe, FinishedCache, Section, TargetRecipe
from data_prep.target import load_tokenizer, pick_device, tokenizer_hashes
from train.attention import executor
from train.drafter.config import DrafterConfig
from train.drafter.exchange import check_eagle3


class PromptsRecipe(Section):
    """Prompts are the first tokens of held-out documents."""

    count: int = Field(ge=2)  # two at least: the shuffled-memory control shows one the other's states
    tokens: int = Field(ge=2)
    max_new_tokens: int = Field(ge=2)


class ScoreRecipe(Section):
    """`mode=score` and `mode=diagnose`: teacher-forced, from the cache alone."""

    documents: int = Field(ge=1)
    anchors: int = Field(ge=1)  # a document
    pack_tokens: int = Field(ge=2)


class EvalRecipe(Section):
    """`python eval/main.py`: a drafter -> acceptance, speed, memory, a report."""

    mode: Literal["decode", "score", "diagnose", "export"]
    drafter: str
    out: str
    target: TargetRecipe
    data: DataRecipe
    prompts: PromptsRecipe
    cache: FinishedCache
    score: ScoreRecipe
    temperatures: list[float] = Field(min_length=1)
    controls: bool
    attention: Literal["auto", "reference", "flex"]
    seed: int


def check(recipe: EvalRecipe) -> None:
    """Raises UserError for everything that can be known before the target is loaded."""
    if min(recipe.temperatures) < 0:
        raise UserError(f"temperatures={recipe.temperatures}: a temperature is 0 (greedy) or more")
    refuse_file("out", recipe.out)
    config = DrafterConfig.load(recipe.drafter)
    if not (Path(recipe.drafter) / "model.safetensors").is_file():
        raise UserError(f"{recipe.drafter} holds no weights (model.safetensors)")
    room = config.architecture.max_positions
    if recipe.prompts.tokens + recipe.prompts.max_new_tokens + config.slots > room:
        raise UserError(f"prompts.tokens + prompts.max_new_tokens exceed the target's {room} positions")
    tokenizer = load_tokenizer(recipe.target.location, recipe.target.revision)
    if tokenizer_hashes(tokenizer)[0] != config.target["tokenizer_hash"]:
        raise UserError(
            f"{recipe.drafter} was trained for target {config.target['id']}, whose tokenizer is not that of {recipe.target.path}"
        )
    executor(recipe.attention, pick_device(recipe.target.device), training=recipe.mode == "diagnose")
    if recipe.mode == "export":
        check_eagle3(config)
    if recipe.mode in ("score", "diagnose"):
        reader = CacheReader(recipe.cache.dir)
        manifest = reader.manifest
        if manifest.target["weights_hash"] != config.target["weights_hash"]:
            raise UserError(f"{recipe.cache.dir} is a cache of another target than the drafter's")
        for kind, needed, held in (
            ("hidden", config.hidden_layers, manifest.hidden_layers),
            ("kv", config.kv_layers, manifest.kv_layers),
        ):
            if missing := sorted(set(needed) - set(held)):
                raise UserError(f"the drafter reads {kind} states of layer(s) {missing}, which {recipe.cache.dir} lacks")
        if recipe.mode == "diagnose" and not set(config.query_layers) <= set(manifest.query_layers):
            if recipe.score.pack_tokens < (longest := int(reader.lengths.max())):  # the target reads them again, from the start
                raise UserError(f"mode=diagnose needs whole documents: score.pack_tokens={longest} for {recipe.cache.dir}")
