"""Prompts: the first tokens of documents that no drafter has trained on and the embedded target has never seen."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from data_prep.errors import UserError
from data_prep.recipe import DataRecipe
from data_prep.sources import documents
from eval.recipe import PromptsRecipe


class Prompt(NamedTuple):
    id: str
    tokens: list[int]


def heldout_prompts(data: DataRecipe, prompts: PromptsRecipe, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """One prompt a held-out document, in hashed order. Raises UserError when there are too few long enough."""
    found = []
    for document in documents(data, heldout=True):
        ids = tokenizer(document.text, verbose=False, add_special_tokens=False)["input_ids"]
        if len(ids) >= prompts.tokens:
            found.append(Prompt(document.id, ids[: prompts.tokens]))
        if len(found) == prompts.count:
            return found
    raise UserError(
        f"data={data.source} has {len(found)} held-out documents of prompts.tokens={prompts.tokens} tokens, "
        f"fewer than prompts.count={prompts.count}"
    )
