"""`answers.jsonl`: what `mode=decode` and `mode=served` hear, written as it comes, so that a late end (a kill, a full disk) loses
nothing.

The first line says what is judged, as the report does. Each other line is one request at one temperature:

    {"temperature": 0.0, "id": "81", "prompt_tokens": 64, "answers": {"trained": {"tokens": [...], "kept": [2, 0, ...],
     "prefill_s": 0.1, "draft_s": 0.2, "verify_s": 0.3, "decode_s": 0.6}, "baseline": {...}, ...}}

`kept` has a number for each round: the drafted tokens that were accepted (-1: a later round took back even the token behind
them). A round emits one token more than that, so that tau is the sum of `kept` + 1 over all rounds by their number. Of a server a
line is one answer:

    {"temperature": 0.0, "run": "4", "id": "81", "turn": 0, "tokens": [...], "first_s": 0.1, "seconds": 0.9, "count": [9, 5, 1]}

`run` is a row of served.json: ours, or how many requests at a time, with the drafter or without. `count` is rounds and
how many of them accepted at least 1, 2, ... drafted tokens; null where it is known of all requests together alone.
"""

import json
from pathlib import Path

from eval.oracle.decode import Generation
from eval.prompts.suites import Prompt
from eval.serving.servers import Answer

NAME = "answers.jsonl"
SECONDS = ("prefill_s", "draft_s", "verify_s", "decode_s")


class Answers:
    """The file in the folder `out`, begun anew. A line is in the system's hands before `write` returns."""

    def __init__(self, out: Path, judged: dict):
        out.mkdir(parents=True, exist_ok=True)
        self._file = open(out / NAME, "w")
        self._line(judged)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def write(self, temperature: float, requests: list[Prompt], runs: dict[str, list[Generation]]) -> None:
        """`runs`: each contender's answers to `requests`."""
        for at, request in enumerate(requests):
            answers = {name: _answer(generations[at]) for name, generations in runs.items()}
            about = {"temperature": temperature, "id": request.id, "prompt_tokens": len(request.tokens)}
            self._line(about | {"answers": answers})

    def write_served(self, temperature: float, run: str, id: str, turn: int, answer: Answer) -> None:
        count = None if answer.count_C is None else answer.count_C.tolist()
        said = {"tokens": answer.tokens, "first_s": answer.first_s, "seconds": answer.seconds, "count": count}
        self._line({"temperature": temperature, "run": run, "id": id, "turn": turn} | said)

    def _line(self, content: dict) -> None:
        self._file.write(json.dumps(content) + "\n")
        self._file.flush()


def _answer(generation: Generation) -> dict:
    seconds = {name: getattr(generation, name) for name in SECONDS}
    return {"tokens": generation.tokens, "kept": [r.kept for r in generation.rounds]} | seconds
