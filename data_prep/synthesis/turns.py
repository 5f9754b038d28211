"""What a chat template writes around messages, in tokens: where a user's message begins and ends, and where a reply does."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from data_prep.sources.tokens import LeftOut, dateless, rendered

# Messages that have nothing in common: what stands in front of each of them is the template's, and so is what follows them.
PROBES = ("What", "7 of")


class Turns:
    """The chat template of `tokenizer`, given `options` besides the messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, target: str, options: dict[str, Any]):
        """`target`: its name in messages. Raises UserError when it has no chat template, or a plain conversation is refused."""
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer of target {target} has no chat template")
        self._template = f"the chat template of target {target}"
        self.tokenizer = tokenizer
        self._options = {"chat_template": dateless(tokenizer.get_chat_template()), **options}
        # Not every special token is in `all_special_ids`: tokenizers mark others, such as those around a turn, as special when
        # they are added.
        added = tokenizer.added_tokens_decoder
        self.special = frozenset(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}
        try:
            self.user_end = self._end([[user(probe)] for probe in PROBES])
            self.reply_end = self._end([[user("x"), assistant(probe)] for probe in PROBES])
        except LeftOut as reason:
            raise UserError(f"{self._template} cannot be used: {reason}") from reason

    def whole(self, messages: list[dict], **options) -> list[int]:
        """The tokens of a whole conversation. Raises LeftOut when the template refuses it."""
        return rendered(self.tokenizer, messages, **options, **self._options)["input_ids"]

    def before_reply(self, history: list[dict]) -> list[int]:
        """What the target continues with its reply."""
        return self.whole(history, add_generation_prompt=True)

    def before_user(self, history: list[dict], begun: str = "") -> list[int]:
        """What the target continues as the user, whose message begins with `begun`: the tokens that do not depend on what
        comes next. (A blank at the end of `begun` belongs to the token of the next word, which the target has yet to write.)"""
        return _common([self.whole([*history, user(begun + probe)]) for probe in PROBES])

    def refuse_without_user(self) -> None:
        """Raises UserError for a template behind which the target cannot be a user: nothing marks a user's message, or nothing
        tells its end."""
        instead = "take kinds without {user} and synthesize.turns=1, or another target"
        try:
            whole = self.whole([user("x"), assistant("x")])
            before = self.before_user([user("x"), assistant("x")])
        except LeftOut as reason:
            raise UserError(f"{self._template} does not write a user's second message: {reason}") from reason
        header = self.tokenizer.decode(before[len(_common([whole, before])) :])
        for mark in (self.tokenizer.bos_token, self.tokenizer.eos_token):
            header = header.replace(mark or "", "")
        if not header.strip():
            raise UserError(f"{self._template} puts no header before a user's message, so the target cannot write one; {instead}")
        if self.user_end is None:
            raise UserError(f"{self._template} ends a user's message with no special token, so the target cannot; {instead}")

    def text(self, tokens: list[int]) -> str:
        """Raises LeftOut for a special token, of which the text would know nothing."""
        if self.special.intersection(tokens):
            raise LeftOut("a special token inside a message")
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _end(self, conversations: list[list[dict]]) -> int | None:
        """The special token that ends the last message of each."""
        # What all conversations end with is the template's. Read backwards, it is what they begin with.
        behind = _common([self.whole(messages)[::-1] for messages in conversations])[::-1]
        return next((token for token in behind if token in self.special), None)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def _common(sequences: list[list[int]]) -> list[int]:
    """The longest beginning that all of them have."""
    for place, tokens in enumerate(zip(*sequences)):
        if len(set(tokens)) > 1:
            return sequences[0][:place]
    return min(sequences, key=len)
