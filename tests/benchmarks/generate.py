"""Answers a second: our generator beside transformers' `generate`, on the same prompts, sampling and batch, in one run.

    python -m tests.benchmarks.generate batch=16 requests=64 max_tokens=64
    python -m tests.benchmarks.generate target=TARGET batch=512 requests=2048 max_tokens=320 temperature=0.8

Prompts are questions about pieces of the standard library, of many lengths, behind the target's chat template. `generate` gets
them sorted by length, so that it pads as little as it can. Tokens that are drawn behind an answer's end do not count.
"""

import time
from functools import partial

import torch
from omegaconf import OmegaConf
from transformers import GenerationConfig

from common.hashing import stable_hash
from common.recipe import ROOT
from data_prep.decoding.dialogues import Ask
from data_prep.decoding.generate import BatchGenerator
from data_prep.recipe import DataRecipe, TargetRecipe
from data_prep.sources.records import records
from data_prep.synthesis.turns import Turns
from data_prep.target.loading import load_target, load_tokenizer
from data_prep.target.target import Target
from tests.benchmarks import line, options

QUESTIONS = ("What does this code do?", "Explain this code to a beginner.", "Which mistakes are in this code?")


def prompts_of(tokenizer, count: int, characters: int) -> list[list[int]]:
    """A question about the first 100 to `characters` characters of each module."""
    data = DataRecipe(**OmegaConf.to_container(OmegaConf.load(ROOT / "conf/data/stdlib.yaml")))
    texts = [(r.id, r.fields["text"]) for r in records(data, heldout=None)]
    found = []
    for number in range(count):
        id, text = texts[number % len(texts)]
        size = 100 + stable_hash(f"{number}/{id}") % (characters - 100)
        message = {"role": "user", "content": f"{QUESTIONS[number % 3]}\n\n{text[:size]}"}
        found.append(tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=True)["input_ids"])
    return found


def ours(generator: BatchGenerator, asks: list[Ask]) -> dict[int, list[int]]:
    """Each request's answer, by its seed."""
    found = {}

    def dialogue(ask: Ask):
        answer = yield ask
        found[ask.seed] = answer.tokens

    generator.run(map(dialogue, asks))
    return found


def theirs(target: Target, asks: list[Ask], ends: frozenset[int], batch: int) -> dict[int, list[int]]:
    first = asks[0]
    sampling = {"do_sample": True, "temperature": first.temperature, "top_p": first.top_p} if first.temperature else {}
    config = GenerationConfig(
        max_new_tokens=first.max_tokens, eos_token_id=sorted(ends), pad_token_id=0, top_k=0 if sampling else None, **sampling
    )
    asks = sorted(asks, key=lambda ask: len(ask.tokens))
    found = {}
    for start in range(0, len(asks), batch):
        some = [ask.tokens for ask in asks[start : start + batch]]
        longest = max(map(len, some))
        ids_BT = torch.tensor([[0] * (longest - len(one)) + one for one in some], device=target.device)
        real_BT = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in some], device=target.device)
        rows = target.model.generate(ids_BT, attention_mask=real_BT, generation_config=config)[:, longest:].tolist()
        for ask, row in zip(asks[start : start + batch], rows):
            found[ask.seed] = row[: next((n for n, token in enumerate(row) if token in ends), len(row))]
    return found


def main() -> None:
    o = options(
        target=str(ROOT / "data_prep/targets/tiny"), batch=16, requests=64, max_tokens=64, temperature=0.8, top_p=1.0,
        characters=1500, who=["transformers", "ours"], dtype="auto",
    )  # fmt: skip
    recipe = TargetRecipe(path=o.target, dtype=o.dtype)
    target = load_target(recipe)
    tokenizer = load_tokenizer(recipe.location)
    ends = target.end_tokens | {Turns(tokenizer, o.target, {}).reply_end} - {None}
    asks = [
        Ask(tokens, o.max_tokens, o.temperature, o.top_p, seed)
        for seed, tokens in enumerate(prompts_of(tokenizer, o.requests, o.characters))
    ]
    rates, answers = {}, {}
    for who in o.who:
        if who == "ours":
            run = partial(ours, BatchGenerator(target, ends, o.batch))
        else:
            run = partial(theirs, target, ends=ends, batch=o.batch)
        run([ask._replace(max_tokens=min(16, o.max_tokens)) for ask in asks[: o.batch]])  # warms up
        began = time.perf_counter()
        answers[who] = run(asks)
        if target.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        tokens = sum(map(len, answers[who].values()))
        rates[who] = tokens / seconds
        reference = rates.get("transformers")
        line(
            "generate", who=who, batch=o.batch, requests=o.requests, max_tokens=o.max_tokens, temperature=o.temperature,
            top_p=o.top_p, prompt_tokens=sum(len(ask.tokens) for ask in asks), answer_tokens=tokens, seconds=round(seconds, 2),
            tokens_per_s=round(rates[who], 1), of_transformers=round(rates[who] / reference, 3) if reference else None,
            dtype=str(target.dtype),
        )  # fmt: skip
    if o.temperature == 0 and len(answers) == 2:
        same = sum(answers["ours"][seed] == answer for seed, answer in answers["transformers"].items())
        line("generate", who="both", greedy_answers=len(asks), the_same=same, dtype=str(target.dtype))


if __name__ == "__main__":
    main()
