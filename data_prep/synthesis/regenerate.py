"""`mode=regenerate`: the target answers the prompts of a chat source itself, so that a drafter learns from what it will see.

One JSON line a conversation is appended to `regenerate.out` within a second of its end; the same command goes on by id.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import UserError
from common.files import refuse_unwritable
from common.hashing import stable_hash
from common.progress import Progress
from common.ranks import rank, world_size
from common.rules import refuse
from data_prep import rules
from data_prep.capture.build import say
from data_prep.capture.plan import check_spread
from data_prep.decoding.dialogues import Ask, Dialogue
from data_prep.decoding.generate import BatchGenerator
from data_prep.recipe import DataPrepRecipe
from data_prep.sources import records as sources
from data_prep.sources.counts import CAPTURED, Counts
from data_prep.sources.messages import LeftOut, messages_of
from data_prep.synthesis.conversation import Conversation, Write
from data_prep.synthesis.journal import Journal
from data_prep.synthesis.server import Server
from data_prep.synthesis.turns import Turns
from data_prep.target.architecture import target_config
from data_prep.target.families import check_decodable
from data_prep.target.loading import load_target, target_tokenizer

BEGINS = b'{"id": '  # every line of ours


def check_regeneration(recipe: DataPrepRecipe) -> None:
    """What can be refused before the target is loaded or the server asked."""
    if not recipe.regenerate.out:
        raise UserError("mode=regenerate needs regenerate.out=FILE.jsonl, the file to write")
    if recipe.data.format not in ("chat", "auto"):
        raise UserError(f"mode=regenerate answers conversations; data of format '{recipe.data.format}' has none. Try data=chat")
    sources.check_source(recipe.data)
    refuse(rules.MODES, recipe)
    check_spread(recipe)
    if recipe.data.path and Path(recipe.data.path).resolve() == Path(recipe.regenerate.out).resolve():
        raise UserError(f"regenerate.out={recipe.regenerate.out} is the source itself; it must name another file")
    refuse_unwritable("regenerate.out", recipe.regenerate.out, is_file=True)
    if not recipe.regenerate.base_url:
        check_decodable(recipe.target.path, target_config(recipe.target))
    if not recipe.regenerate.base_url and not target_tokenizer(recipe.target).chat_template:
        raise UserError(f"the tokenizer of target {recipe.target.path} has no chat template")


def regenerate(recipe: DataPrepRecipe, barrier: Callable[[], None]) -> None:
    """Answer every conversation that `regenerate.out` does not hold yet; processes share them by id, or with `capture.spread=tp`
    answer all together.

    Raises:
        UserError: the file was written with other settings, or the server does not answer. What is done is kept.
    """
    settings = {
        "model": recipe.regenerate.model or recipe.target.id,
        "revision": recipe.target.revision,
        "template": recipe.data.template,
        **{key: getattr(recipe.regenerate, key) for key in ("temperature", "top_p", "max_tokens", "thinking", "seed")},
    }
    out = Path(recipe.regenerate.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(out)
    try:
        if rank() == 0:
            journal.lock()
            _refuse_foreign(journal, out, settings)
            journal.repair()
        barrier()
        journal.share()
        done = _done(journal, out, settings)
        # All have read the same file before one of them appends to it.
        barrier()
        try:
            counts = _answer(recipe, settings, done, journal)
        finally:
            journal.flush()
        barrier()
        said = counts.said()
        if rank() == 0 or recipe.capture.spread != "tp":
            share = f" of process {rank()}" * (recipe.capture.spread != "tp" and world_size() > 1)
            print(f"{said['records']['read']:,} records{share}: {said['records']['captured']:,} answered", flush=True)
            say(Counter(said["left_out"]) + counts.kept)
        if rank() == 0:
            # Read again: other processes have appended to it.
            if not (done := _done(journal, out, settings)):
                raise UserError(f"not one conversation could be answered: {'; '.join(said['left_out']) or 'the source is empty'}")
            print(f"{out}: {len(done):,} conversations; use them with data=chat data.path={out}", flush=True)
    finally:
        journal.close()


def _answer(recipe: DataPrepRecipe, settings: dict, done: dict[int, str], journal: Journal) -> Counts:
    """Answer what is not `done`; returns how each record ended: captured means answered, now or before."""
    counts = Counts()
    with Progress("conversations", silent=rank() != 0) as progress:
        task = progress.add_task("regenerate", total=None)

        def write(asked: Conversation, messages: list[dict], finish: str) -> None:
            if recipe.capture.spread == "tp" and rank() != 0:
                return
            counts.end([asked.number], CAPTURED)
            answered = {"id": asked.id, "messages": messages, "finish": finish}
            journal.append({**answered, "prompts": asked.hash, "regenerated": settings})
            if finish == "length":
                counts.kept["kept, but its last reply was cut at regenerate.max_tokens"] += 1
            progress.advance(task)

        todo = _conversations(recipe, done, counts)
        if recipe.regenerate.base_url:
            asyncio.run(Server(recipe.regenerate, settings, write, counts).answer(todo))
        else:
            _answer_here(recipe, todo, write, counts)
    return counts


def _conversations(recipe: DataPrepRecipe, done: dict[int, str], counts: Counts) -> Iterator[Conversation]:
    """This process's share of what is to be answered, or all of it where processes share the target. Raises UserError when an
    answer that is there had other prompts."""
    for record in sources.records(recipe.data, heldout=None):
        # By id and not by place, because another number of processes has to find the same conversations done.
        key = stable_hash(record.id)
        if recipe.capture.spread != "tp" and key % world_size() != rank():
            continue
        number = counts.read()
        try:
            messages = messages_of(record.fields)
            if any(m["role"] in ("tool", "function") for m in messages):
                raise LeftOut("it holds results of tools, which the target may not call")
        except LeftOut as reason:
            counts.end([number], str(reason))
            continue
        # The source's replies are dropped: the target's own take their place. Messages between two replies are one prompt.
        prompts: list[list[dict]] = [[]]
        for message in messages:
            if message["role"] != "assistant":
                prompts[-1].append(message)
            elif prompts[-1]:
                prompts.append([])
        prompts = [p for p in prompts if any(m["role"] == "user" for m in p)]
        conversation = Conversation(record.id, prompts, number)
        if not prompts:
            counts.end([number], "no message of a user")
        elif key not in done:
            yield conversation
        elif done[key] != conversation.hash:
            raise UserError(
                f"{recipe.regenerate.out} holds an answer to other prompts of conversation '{record.id}'; choose another file"
            )
        else:
            counts.end([number], CAPTURED)


def _answer_here(recipe: DataPrepRecipe, todo: Iterator[Conversation], write: Write, counts: Counts) -> None:
    """The target in this process, `batch` conversations at a time, each turn by turn."""
    ask = recipe.regenerate
    target = load_target(recipe.target, recipe.capture)
    tokenizer = target_tokenizer(recipe.target)
    thinking = {} if ask.thinking is None else {"enable_thinking": ask.thinking}
    turns = Turns(tokenizer, recipe.target.id, recipe.data.template | thinking)

    def prompt(history: list[dict]) -> list[int]:
        """Raises LeftOut when the template refuses it or there is no room for a reply."""
        ids = turns.before_reply(history)
        if len(ids) + ask.max_tokens > target.architecture.max_positions:
            raise LeftOut("prompt and regenerate.max_tokens exceed the target's positions")
        return ids

    def dialogue(conversation: Conversation) -> Dialogue:
        history: list[dict] = []
        finish = "stop"
        try:
            for turn, messages in enumerate(conversation.prompts):
                history += messages
                # Of the conversation and its turn alone: who else is in the batch, and how many processes there are, changes no
                # answer.
                seed = stable_hash(f"regenerate/{ask.seed}/{turn}/{conversation.id}") % 2**63
                answer = yield Ask(prompt(history), ask.max_tokens, ask.temperature, ask.top_p, seed)
                history.append({"role": "assistant", "content": tokenizer.decode(answer.tokens, skip_special_tokens=True)})
                if not answer.ended:
                    finish = "length"
                    break
        except LeftOut as reason:
            counts.end([conversation.number], str(reason))
            return
        write(conversation, history, finish)

    BatchGenerator(target, target.end_tokens | {turns.reply_end} - {None}, ask.batch).run(map(dialogue, todo))


def _refuse_foreign(journal: Journal, out: Path, settings: dict) -> None:
    """Raises UserError for a file that is not ours, also one that has no whole line."""
    with open(out, "rb") as file:
        begins = file.read(len(BEGINS))
    if not _done(journal, out, settings) and not BEGINS.startswith(begins):
        raise UserError(f"{out} was not written by mode=regenerate; choose another regenerate.out")


def _done(journal: Journal, out: Path, settings: dict) -> dict[int, str]:
    """Hashed ids of the conversations that are there, and the hash of their prompts.

    Raises:
        UserError: a line is not ours, or was made with other settings.
    """
    done = {}
    for number, (_, line) in enumerate(journal.lines(), 1):
        try:
            record = json.loads(line)
            earlier = record["regenerated"]
            done[stable_hash(record["id"])] = record["prompts"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out}, line {number} was not written by mode=regenerate; choose another regenerate.out") from error
        # Answers of two temperatures or targets in one file would be no sample of either.
        if fields := sorted(k for k in settings.keys() | earlier.keys() if settings.get(k) != earlier.get(k)):
            raise UserError(f"{out} was written with other settings; these differ: {', '.join(fields)}. Choose another file")
    return done
