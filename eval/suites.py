"""Prompts: the first tokens of documents that no drafter has trained on and the embedded target has never seen."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from data_prep.errors import UserError
from data_prep.recipe import DataRecipe
from data_prep.sources import records
from data_prep.tokens import LeftOut, encode, joined
from eval.recipe import PromptsRecipe


class Prompt(NamedTuple):
    id: str
    tokens: list[int]


def heldout_prompts(data: DataRecipe, prompts: PromptsRecipe, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """One prompt a held-out document, in hashed order; with data.long=join the documents are joined first. Raises UserError when
    there are too few long enough."""

    def encoded():
        for record in records(data, heldout=True):
            try:
                yield record, encode(record, tokenizer, data)
            except LeftOut:
                continue

    every, found = encoded(), []
    if data.long == "join":
        every = joined(every, prompts.tokens, tokenizer.eos_token_id)
    for record, (ids, _) in every:
        if len(ids) >= prompts.tokens:
            found.append(Prompt(record.id, ids[: prompts.tokens]))
        if len(found) == prompts.count:
            return found
    raise UserError(
        f"data={data.source} has {len(found)} held-out documents of {prompts.tokens} tokens, fewer than "
        f"prompts.count={prompts.count}; data.long=join joins shorter ones"
    )
