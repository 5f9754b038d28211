"""What a target is asked by its chat template: by a person (`mode=chat`), by the demo (`mode=demo`), by a suite."""

from collections.abc import Sequence

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.recipe import Section
from data_prep.sources.tokens import LeftOut, dateless, rendered


class ChatRecipe(Section):
    """`mode=chat`: a person types."""

    system: str | None = None
    """System message; null: the chat template's own."""
    max_new_tokens: int = Field(ge=1)
    """Most new tokens per reply."""
    temperature: float = Field(ge=0)
    """Sampling temperature; 0: greedy."""
    thinking: bool | None = None
    """`enable_thinking` of the chat template, in mode=demo too; null: the template's own default."""

    @property
    def begun(self) -> list[dict]:
        """What each conversation begins with."""
        return [{"role": "system", "content": self.system}] if self.system else []


class DemoPrompt(Section):
    kind: str
    """Heading of the prompt."""
    text: str
    """What is asked."""

    @property
    def messages(self) -> list[dict]:
        return [{"role": "user", "content": self.text.strip()}]


class DemoRecipe(Section):
    """`mode=demo`: prompts that are answered greedily with the drafter and without, side by side."""

    max_new_tokens: int = Field(ge=2)
    """Most new tokens per answer."""
    warmup_tokens: int = Field(ge=2)
    """New tokens of an untimed answer before the first."""
    prompts: list[DemoPrompt] = Field(min_length=1)
    """What is asked, one after the other."""


def asked(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict], thinking: bool | None) -> list[int]:
    """Token ids of a conversation that the assistant is to answer, by the chat template, which may know a thinking flag. Raises
    LeftOut when it refuses the messages."""
    options = {} if thinking is None else {"enable_thinking": thinking}
    template = dateless(tokenizer.get_chat_template())
    return rendered(tokenizer, list(messages), chat_template=template, add_generation_prompt=True, **options)["input_ids"]


def check_asking(
    target: str, chat: ChatRecipe, demo: DemoRecipe | None, room: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises UserError when the target, `target` by name, cannot be asked, or when an answer might not fit into the `room`
    positions of a request: to a prompt of the demo, or in a chat to a word."""
    if not tokenizer.chat_template:
        raise UserError(f"mode=chat and mode=demo ask by the chat template, and the tokenizer of {target} has none")
    if demo:
        mode = "demo"
        limit = demo.max_new_tokens
        prompts = [one.messages for one in demo.prompts]
    else:
        mode = "chat"
        limit = chat.max_new_tokens
        prompts = [[*chat.begun, {"role": "user", "content": "a"}]]
    try:
        longest = max(len(asked(tokenizer, messages, chat.thinking)) for messages in prompts)
    except LeftOut as error:
        raise UserError(f"mode={mode}: {error}") from error
    if longest + limit > room:
        raise UserError(
            f"mode={mode}: a prompt of {longest} tokens and {mode}.max_new_tokens={limit} exceed the {room} "
            "positions that the target and the drafter have"
        )
