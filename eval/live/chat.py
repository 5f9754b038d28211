"""`mode=chat`: a person types, the target answers, and the drafter's accepted tokens are coloured."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from data_prep.sources.tokens import LeftOut
from data_prep.target.target import Target
from eval.live.stream import Answer, Decoders
from eval.prompts.asking import asked
from eval.recipe import EvalRecipe, room_of
from train.drafter.base import Drafter

COMMANDS = "/plain switches the drafter off and on, /new forgets the conversation, /quit ends"


class Chat:
    """A conversation, and who answers in it."""

    def __init__(self, recipe: EvalRecipe, target: Target, drafter: Drafter):
        self._recipe = recipe
        self._positions = room_of(recipe, drafter.config)
        self._decoders = Decoders(recipe, target, drafter, recipe.chat.temperature, side_by_side=False)
        # Texts of a model are printed as they are: rich would read square brackets as markup and :words: as emoji.
        self._console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._drafted = True
        self._seed = recipe.seed
        self._forget()

    def _forget(self) -> None:
        self._messages = self._recipe.chat.begun

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim")

    def run(self) -> None:
        """Until /quit or the end of what is typed."""
        self._say(f"accepted tokens of {self._recipe.drafter} are coloured; {COMMANDS}")
        for line in typed():
            match line.strip():
                case "":
                    continue
                case "/quit":
                    return
                case "/new":
                    self._forget()
                    self._say("a new conversation")
                case "/plain":
                    self._drafted = not self._drafted
                    self._say("with the drafter" if self._drafted else "without the drafter")
                case word if word.startswith("/") and word[1:].isalpha():
                    self._say(f"there is no {word}: {COMMANDS}")
                case message:
                    with interruptions() as interrupted:
                        self._answer(message, interrupted)

    def _answer(self, message: str, interrupted: Callable[[], bool]) -> None:
        limit = self._recipe.chat.max_new_tokens
        messages = [*self._messages, {"role": "user", "content": message}]
        try:
            message.encode()
            prompt = asked(self._decoders.tokenizer, messages, self._recipe.chat.thinking)
        except UnicodeEncodeError:
            self._say("that is not valid Unicode")
            return
        except LeftOut as error:
            self._say(str(error))
            return
        if len(prompt) + limit > self._positions:
            self._say(
                f"{len(prompt)} tokens so far and chat.max_new_tokens={limit} exceed the {self._positions} positions "
                "that the target and the drafter have: /new begins another conversation"
            )
            return
        answer = self._decoders.answer(prompt, limit, self._seed, self._drafted)
        self._seed += 1
        while not answer.done and not interrupted():
            self._console.print(answer.step(), end="")
        self._end(answer)
        if not answer.so_far.tokens:
            return
        said = self._decoders.tokenizer.decode(answer.so_far.tokens, skip_special_tokens=True)
        # An interrupted answer stays in the conversation as far as it came: it is what the person has read.
        self._messages = [*messages, {"role": "assistant", "content": said}]

    def _end(self, answer: Answer) -> None:
        if not answer.text.plain.endswith("\n"):
            self._console.print()
        who = "" if self._drafted else ", without the drafter"
        cut = "" if answer.done else ", interrupted"
        self._say(f"[tau {answer.tau:.2f}, {answer.tokens_per_s:.1f} tokens/s{who}{cut}]")


def typed() -> Iterator[str]:
    """What is typed, a line a message, until it ends. Ctrl-C gives up a line that is being typed."""
    person = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is told so, and is not the end
    if person:
        import readline  # noqa: F401  (input() then knows arrows and earlier lines)
    while True:
        try:
            yield input("> " if person else "")
        except EOFError:
            if person:
                print()
            return
        except KeyboardInterrupt:
            if not person:
                return
            print("\n(/quit ends)")


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: it ends an answer between two rounds, and not the program, unless it is pressed twice."""
    pressed = []

    def press(*_) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)

    # A round is not interrupted: caches and the request's state would no longer belong together.
    usual = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, usual)


def chat(recipe: EvalRecipe, target: Target, drafter: Drafter) -> None:
    Chat(recipe, target, drafter).run()
