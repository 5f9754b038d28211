"""Candidate conversations 0, 1, 2, ... of a seed: what each is about, and the dialogue in which the target writes it.

All that is drawn for candidate n is a hash of (seed, n, what it is drawn for), so that n alone says how it comes out, whichever
process writes it and in whichever company.
"""

import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np

from common.errors import UserError
from common.hashing import stable_hash
from data_prep.decoding.dialogues import Ask, Dialogue
from data_prep.recipe import PLACEHOLDER, FiltersRecipe, KindRecipe, SynthesizeRecipe, TurnRecipe
from data_prep.sources.records import Lines, Record
from data_prep.sources.sides import HELDOUT_IN, is_heldout
from data_prep.sources.tokens import HALF, LeftOut
from data_prep.synthesis.filters import looping
from data_prep.synthesis.turns import Turns, assistant, user

SENTENCE = re.compile(r"[.!?][\"')\]]*(?=\s|$)|[。！？]")  # its end
ATTEMPTS = 8  # at a passage; they cost next to nothing, and shares of kinds do not depend on how much of the texts is prose
BREAK = re.compile(r"\n\s*\n|[.!?][\"')\]]*\s+|[。！？]")  # behind it a passage can begin


class Draws:
    """What chance decides about candidate `n`."""

    def __init__(self, seed: int, n: int):
        self._prefix = f"synthesize/{seed}/{n}/"

    def seed(self, what: str) -> int:
        return stable_hash(self._prefix + what) % 2**63

    def uniform(self, what: str) -> float:
        # A float holds 53 bits exactly, so that the result stays below 1.
        return (stable_hash(self._prefix + what) >> 11) / 2**53

    def one(self, what: str, among: list) -> Any:
        return among[int(self.uniform(what) * len(among))]

    def by_share(self, what: str, shares: dict) -> Any:
        """A key, as often as its share says."""
        sums = list(accumulate(shares.values()))
        place = self.uniform(what) * sums[-1]
        return next(key for key, upto in zip(shares, sums) if place < upto)


class Texts:
    """What passages are taken from, a held-out text only for held-out conversations: no passage stands on both sides."""

    def __init__(self, path: str):
        """Raises UserError for a line that is no record with a text, and for an id that stands twice."""
        self._lines = Lines(path, "id", "")
        if not len(self._lines):
            raise UserError(f"synthesize.texts={path} has no text")
        # The rule of `is_heldout`, on the hashes that are there already.
        heldout = self._lines.keys % HELDOUT_IN == 0
        self._sides = {True: np.flatnonzero(heldout), False: np.flatnonzero(~heldout)}
        _text_of(self._lines[0], path)
        self._path = path

    def passage(self, id: str, kind: KindRecipe, filters: FiltersRecipe, draws: Draws) -> tuple[str, str]:
        """(id of the text, a piece of it) for the conversation `id`: the first of some that is prose and no loop. Raises LeftOut
        when there is none."""
        side = self._sides[is_heldout(id)]
        if not len(side):
            raise LeftOut("no text on its side of the held-out split")
        for attempt in range(ATTEMPTS):
            record = self._lines[int(draws.one(f"text/{attempt}", side))]
            length = draws.uniform(f"length/{attempt}")
            start = draws.uniform(f"start/{attempt}")
            piece = passage(_text_of(record, self._path), *kind.passage, length, start)
            marks = "".join(piece.split())  # indented tables have many blanks
            prose = sum(map(str.isalpha, marks)) >= filters.passage_letters * len(marks) and looping(piece) <= filters.loop
            if len(piece) >= kind.passage[0] and prose:
                return record.id, piece
        raise LeftOut(f"none of {ATTEMPTS} passages is long enough, of letters and no loop")


def _text_of(record: Record, path: str) -> str:
    text = record.fields.get("text")
    try:
        text.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise UserError(f"synthesize.texts={path}: record '{record.id}' has no 'text' in valid Unicode") from error
    return text


def passage(text: str, fewest: int, most: int, length: float, start: float) -> str:
    """A piece of `text` of `fewest` to `most` characters, from behind a paragraph or sentence up to the end of one, or of a word
    where there is none. `length` and `start` in [0, 1) say which: a length is as likely as its double. Shorter than `fewest` when
    the text has no such piece."""
    wanted = int(fewest * (most / fewest) ** length)
    place = int(start * max(0, len(text) - wanted + 1))
    behind = BREAK.search(text, max(0, place - 1), place + most) if place else None
    begin = behind.end() if behind and len(text) - behind.end() >= fewest else 0
    piece = text[begin : begin + most]
    if len(text) - begin > wanted:
        ends = [match.end() for match in SENTENCE.finditer(piece, fewest - 1) if match.end() >= fewest]
        before = [end for end in ends if end <= wanted]
        blank = max(piece.rfind(" ", 0, wanted), piece.rfind("\n", 0, wanted))
        piece = piece[: before[-1] if before else ends[0] if ends else blank if blank >= fewest else wanted]
    return piece.strip()


class Author:
    """Has the target write candidates, as `recipe` says."""

    def __init__(self, recipe: SynthesizeRecipe, turns: Turns, texts: Texts | None):
        self._recipe = recipe
        self._turns = turns
        self._texts = texts
        self._kinds = recipe.used_kinds
        self._shares = {name: kind.share for name, kind in self._kinds.items()}

    def dialogue(self, n: int, write: Callable[[dict], None]) -> Dialogue:
        """Calls `write` once with the candidate, or with why it is left out: {"n", "kind", "left_out"}."""
        draws = Draws(self._recipe.seed, n)
        kind = draws.by_share("kind", self._shares)
        try:
            record = yield from self._conversation(n, kind, draws)
        except LeftOut as reason:
            record = {"left_out": str(reason)}
        # A candidate that is left out is written too: the numbers of those that are done leave no gap.
        write({"n": n, "kind": kind, **record})

    def _conversation(self, n: int, name: str, draws: Draws):
        recipe = self._recipe
        kind = self._kinds[name]
        id = f"{recipe.seed}-{n}"
        source = None
        begun = draws.one("template", kind.templates)
        filled = {word: draws.one(word, values) for word, values in kind.words.items()}
        if "{passage}" in begun:
            source, filled["passage"] = self._texts.passage(id, kind, recipe.filters, draws)
        filled["user"] = ""
        writes = begun.endswith("{user}")
        begun = PLACEHOLDER.sub(lambda match: filled[match[1]], begun)
        heat = {who: _temperature(getattr(recipe, who), draws, who) for who in ("user", "reply")}
        history: list[dict] = []
        for turn in range(draws.by_share("turns", recipe.turn_shares)):
            message = begun if turn == 0 else ""
            if turn or writes:
                before = self._turns.before_user(history, message)
                until = kind.until if turn == 0 else None
                written, _ = yield from self._written("user", before, heat["user"], draws.seed(f"user/{turn}"), until)
                message += written
            history.append(user(self._worthwhile("user", message)))
            before = self._turns.before_reply(history)
            reply, ended = yield from self._written("reply", before, heat["reply"], draws.seed(f"reply/{turn}"))
            history.append(assistant(self._worthwhile("reply", reply)))
            if not ended:  # a user answers no half sentence
                break
        tokens = len(self._turns.whole(history))
        if tokens > recipe.most_tokens:
            raise LeftOut("longer than synthesize.most_tokens")
        return {"id": id, "source": source, "temperature": heat, "tokens": tokens, "messages": history}

    def _written(self, who: str, before: list[int], temperature: float, seed: int, until: str | None = None):
        """(What the target writes behind `before`, at most up to the first `until`; whether it came to an end). Raises LeftOut
        when it did not and must."""
        turn: TurnRecipe = getattr(self._recipe, who)
        room = self._recipe.most_tokens - len(before)
        if room < 1:
            raise LeftOut("no room left in synthesize.most_tokens")
        answer = yield Ask(before, min(turn.max_tokens, room), temperature, turn.top_p, seed)
        text = self._turns.text(answer.tokens)
        ended = answer.ended
        if until and until in text:
            text = text[: text.index(until) + len(until)]
            ended = True
        if not ended and turn.must_end:
            limit = f"synthesize.{who}.max_tokens" if room > turn.max_tokens else "synthesize.most_tokens"
            raise LeftOut(f"{NAMES[who]} was cut off at {limit}")
        if not text.strip():
            raise LeftOut(f"{NAMES[who]} is empty")
        text = HALF.sub("", text)  # a turn that was cut off may end within a character
        return (text.strip() if who == "user" else text), ended

    def _worthwhile(self, who: str, text: str) -> str:
        filters = self._recipe.filters
        if len(text.strip()) < getattr(filters, f"{who}_characters"):
            raise LeftOut(f"{NAMES[who]} is too short")
        if looping(text) > filters.loop:
            raise LeftOut(f"{NAMES[who]} runs in circles")
        return text


NAMES = {"user": "a user's message", "reply": "a reply"}


def _temperature(turn: TurnRecipe, draws: Draws, who: str) -> float:
    return draws.one(f"temperature/{who}", turn.temperature) if isinstance(turn.temperature, list) else turn.temperature
