"""`mode=synthesize`: training data without a data set. The target writes both sides of conversations (Magpie), or answers tasks
that are built from texts.

Candidates are numbered, and each is a function of its number (candidates.py). Processes share the numbers and append
what comes of them to `OUT.partial`. What repeats an earlier conversation is decided in the order of numbers, and in this order
they are taken until there are enough. So, but for rounding, the file depends on the settings alone, not on processes, batches or
interruptions.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from common.errors import UserError
from common.files import refuse_unwritable
from common.progress import Progress
from common.ranks import rank, world_size
from common.rules import refuse
from data_prep import rules
from data_prep.capture.build import say
from data_prep.capture.plan import check_spread
from data_prep.decoding.dialogues import Dialogue
from data_prep.decoding.generate import BatchGenerator
from data_prep.recipe import DataPrepRecipe, SynthesizeRecipe
from data_prep.synthesis.candidates import Author, Texts
from data_prep.synthesis.filters import repeats
from data_prep.synthesis.journal import Journal
from data_prep.synthesis.place import Account, Place
from data_prep.synthesis.turns import Turns
from data_prep.target.architecture import target_config, target_sizes
from data_prep.target.families import check_decodable
from data_prep.target.loading import load_target, target_tokenizer, tokenizer_hashes

WINDOW = 1000  # candidates: of the last ones
LEAST = 0.01  # must be kept, or the command gives up
REPEATED = {"exact": "a first message that another conversation has", "near": "a first message nearly as another conversation's"}


def check_synthesis(recipe: DataPrepRecipe) -> None:
    """What can be refused before the target is loaded."""
    ask = recipe.synthesize
    if not ask.out:
        raise UserError("mode=synthesize needs synthesize.out=FILE.jsonl, the file to write")
    refuse_unwritable("synthesize.out", ask.out, is_file=True)
    if (ask.count is None) == (ask.tokens is None):
        raise UserError("mode=synthesize needs either synthesize.count=CONVERSATIONS or synthesize.tokens=TOKENS")
    if not sum(ask.turn_shares.values()):
        raise UserError("synthesize.turns: at least one number of turns needs a share above 0")
    if ask.texts and not Path(ask.texts).is_file():
        raise UserError(f"synthesize.texts={ask.texts} is not a file; it must name a file of one JSON object a line")
    if ask.texts and Path(ask.texts).resolve() == Path(ask.out).resolve():
        raise UserError(f"synthesize.out={ask.out} is synthesize.texts itself; it must name another file")
    if not ask.used_kinds:
        needed = "" if ask.texts else "; those that need texts take none without synthesize.texts=FILE.jsonl"
        raise UserError(f"synthesize.kinds: no kind has a share above 0{needed}")
    refuse(rules.MODES, recipe)
    check_spread(recipe)
    check_decodable(recipe.target.path, target_config(recipe.target))
    positions = target_sizes(recipe.target).max_positions
    if ask.most_tokens > positions:
        raise UserError(f"synthesize.most_tokens={ask.most_tokens} exceeds the target's {positions} positions")
    turns = _turns(recipe)
    if any(t.endswith("{user}") for kind in ask.used_kinds.values() for t in kind.templates) or max(ask.turn_shares) > 1:
        turns.refuse_without_user()
    settings = _settings(recipe, turns)
    place = Place(ask.out)
    if not place.begun(settings):
        place.finished(settings)


def synthesize(recipe: DataPrepRecipe, barrier: Callable[[], None]) -> None:
    """Write `synthesize.out` and OUT.json about it; called by all processes.

    Raises:
        UserError: there is another file already, or hardly any candidate is worth keeping. What is done is kept.
    """
    ask = recipe.synthesize
    place = Place(ask.out)
    turns = _turns(recipe)
    settings = _settings(recipe, turns)
    begun = place.begun(settings)
    base = None if begun else place.finished(settings)
    if base and base.reached(ask):
        if rank() == 0:
            print(f"{place.out} holds {base.conversations:,} conversations of {base.tokens:,} tokens already", flush=True)
        return
    author = Author(ask, turns, Texts(ask.texts) if ask.texts else None)
    place.out.parent.mkdir(parents=True, exist_ok=True)
    # All have seen what is there before it changes.
    barrier()
    journal = Journal(place.partial)
    try:
        if rank() == 0:
            journal.lock()
            journal.repair()
            # Once more under the lock: another command may have come in between.
            begun = place.begun(settings)
            base = None if begun else place.finished(settings)
            if not begun:
                journal.append({"settings": settings, "base": vars(base or Account())})
                journal.flush()
        barrier()
        journal.share()
        generator = None
        together = recipe.capture.spread == "tp"
        with Progress("candidates", silent=rank() != 0) as progress:
            task = progress.add_task("synthesize", total=0)
            while (upto := _next_round(ask, place, journal, barrier)) is not None:
                # Loading takes long, and a run that only has to finish its file needs no target.
                if generator is None:
                    target = load_target(recipe.target, recipe.capture)
                    ends = target.end_tokens | ({turns.user_end, turns.reply_end} - {None})
                    generator = BatchGenerator(target, frozenset(ends), ask.batch)
                missing = _missing(journal, upto, share=not together)
                barrier()  # all have read the same lines before one of them appends to them
                progress.update(task, total=progress.tasks[task].total + len(missing))
                written = None if together and rank() != 0 else journal
                generator.run(_dialogues(author, missing, written, lambda: progress.advance(task)))
                journal.flush()
        if rank() == 0:
            _report(place.out, place.finished(settings))
    finally:
        journal.close()


def _turns(recipe: DataPrepRecipe) -> Turns:
    tokenizer = target_tokenizer(recipe.target)
    return Turns(tokenizer, recipe.target.id, recipe.synthesize.template)


def _settings(recipe: DataPrepRecipe, turns: Turns) -> dict:
    """All that the conversations depend on, as JSON has it."""
    ask = recipe.synthesize.model_dump(mode="json", exclude={"out", "count", "tokens", "batch"})
    if ask["texts"]:
        with open(ask["texts"], "rb") as file:
            digest = xxhash.xxh3_128()
            while block := file.read(1 << 20):
                digest.update(block)
        ask["texts"] = digest.hexdigest()
    where = {"id": recipe.target.id, "revision": recipe.target.revision}
    return {"target": where, "tokenizer": list(tokenizer_hashes(turns.tokenizer)), **ask}


def _missing(journal: Journal, upto: int, share: bool) -> list[int]:
    """The candidates below `upto` that are not there yet; `share`: this process's share of them."""
    begin = 0
    there = set()
    for _, record in _records(journal):
        begin = record["base"]["candidates"] if "base" in record else begin
        there.add(record.get("n"))
    return [n for n in range(begin, upto) if (not share or n % world_size() == rank()) and n not in there]


def _dialogues(author: Author, numbers: list[int], journal: Journal | None, advance: Callable[[], None]) -> Iterator[Dialogue]:
    def write(candidate: dict) -> None:
        if journal:
            journal.append(candidate)
        advance()

    return (author.dialogue(n, write) for n in numbers)


def _records(journal: Journal) -> Iterator[tuple[int, dict]]:
    for place, line in journal.lines():
        yield place, json.loads(line)


def _next_round(ask: SynthesizeRecipe, place: Place, journal: Journal, barrier: Callable[[], None]) -> int | None:
    """Up to which candidate all go on; None once the file is written. Rank 0 decides, the work file tells the others."""
    barrier()
    if rank() == 0:
        _decide(ask, place, journal)
    barrier()
    if not place.partial.exists():
        return None
    return max(record.get("upto", 0) for _, record in _records(journal))


def _decide(ask: SynthesizeRecipe, place: Place, journal: Journal) -> None:
    """Take candidates in order, as far as they are there without a gap. Write the file if there are enough of them, else how far
    the next round goes. Raises UserError when hardly one is worth keeping."""
    # 1. What the work file holds. Of messages only the first is kept: it is what repetitions are told by.
    found: dict[int, tuple[int, dict]] = {}
    upto = 0
    for where, record in _records(journal):
        if "base" in record:
            base = record["base"]
        elif "upto" in record:
            upto = max(upto, record["upto"])
        else:
            messages = record.pop("messages", None)
            first = messages[0]["content"] if messages else None
            found[record["n"]] = where, {**record, "first": first}
    account = Account(**{**base, "kinds": Counter(base["kinds"]), "left_out": Counter(base["left_out"])})
    begin = account.candidates
    earlier = _earlier(place, begin, account.conversations)
    # 2. Candidates in order, up to the first that is not there.
    ordered = []
    while (n := begin + len(ordered)) in found:
        ordered.append(found[n])
    # 3. Which of them repeat an earlier conversation, of the finished file or of this one.
    alone = [candidate["first"] for _, candidate in ordered if not candidate.get("left_out")]
    before = [json.loads(line)["messages"][0]["content"] for line in earlier]
    repeated = iter(repeats(before + alone, ask.filters.near)[len(before) :])
    # 4. Take them until there are enough.
    kept = []
    outcomes = []
    for where, candidate in ordered:
        if account.reached(ask):
            break
        reason = candidate.get("left_out") or REPEATED.get(next(repeated))
        account.add(candidate, reason)
        outcomes.append(reason)
        if not reason:
            kept.append(where)
    # 5. Write the file, or say how far the next round goes.
    if account.reached(ask):
        _finish(place, account, earlier, kept, json.loads(next(journal.lines())[1])["settings"])
        return
    if len(ordered) < upto - begin:
        return  # a round that was interrupted is completed first
    _refuse_waste(ask, place, account, outcomes[-WINDOW:])
    journal.append({"upto": account.candidates + _more(ask, account)})
    journal.flush()


def _earlier(place: Place, begin: int, conversations: int) -> list[bytes]:
    """Lines of the finished file from which this one goes on: those of candidates below `begin`."""
    if not begin:
        return []
    with open(place.out, "rb") as file:
        lines = [line for line in file if int(json.loads(line)["id"].rsplit("-", 1)[1]) < begin]
    if len(lines) != conversations:
        raise UserError(f"{place.out} was changed since mode=synthesize wrote it; choose another synthesize.out")
    return lines


def _more(ask: SynthesizeRecipe, account: Account) -> int:
    """How many candidates are still needed, by what has become of those before; what is too many is left unused."""
    if not account.candidates:
        return min(WINDOW, math.ceil(1.3 * ask.count) if ask.count else math.ceil(4 * ask.tokens / ask.most_tokens))
    conversations = max(account.conversations, 1)
    if ask.count:
        missing = ask.count - account.conversations
    else:
        missing = (ask.tokens - account.tokens) / (account.tokens or ask.most_tokens) * conversations
    return math.ceil(min(1.05 * missing * account.candidates / conversations + 2, max(WINDOW, 3 * account.candidates)))


def _refuse_waste(ask: SynthesizeRecipe, place: Place, account: Account, last: list[str | None]) -> None:
    """Raises UserError once almost nothing is kept any more."""
    kept = last.count(None)
    if len(last) < WINDOW or kept >= LEAST * WINDOW:
        return
    reasons = "; ".join(f"{count} x {reason}" for reason, count in Counter(filter(None, last)).most_common(3))
    if account.conversations:
        there = f"synthesize.count={account.conversations} writes the {account.conversations:,} conversations that there are"
    else:
        there = "nothing was written"
        place.partial.unlink()
    raise UserError(f"of the last {WINDOW:,} candidates {kept} could be kept ({reasons}); {there}")


def _finish(place: Place, account: Account, earlier: list[bytes], kept: list[int], settings: dict) -> None:
    """Both files, each whole or not at all; then the work file goes."""
    temporary = Path(f"{place.out}.tmp")
    try:
        with open(temporary, "wb") as file, open(place.partial, "rb") as partial:
            file.writelines(earlier)
            for where in kept:
                partial.seek(where)
                record = json.loads(partial.readline())
                del record["n"]  # the id says it
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        # A kill between the two leaves OUT without what is said about it. OUT.partial is still there, and the same command writes
        # both again.
        os.replace(temporary, place.out)
        temporary.write_text(json.dumps({**vars(account), "bytes": size, "settings": settings}, indent=1) + "\n")
        os.replace(temporary, place.about)
    finally:
        temporary.unlink(missing_ok=True)
    place.partial.unlink()


def _report(out: Path, account: Account) -> None:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in account.kinds.most_common())
    print(f"{account.conversations:,} conversations of {account.candidates:,} candidates: {kinds}", flush=True)
    say(account.left_out)
    print(f"{out}: {account.tokens:,} tokens; use them with data=chat data.path={out}", flush=True)
