"""What becomes of the records of a source: each that is read ends in exactly one count."""

from array import array
from collections import Counter
from collections.abc import Iterable

BEYOND = "beyond data.max_tokens"
CAPTURED = "captured"
HELD_OUT = "held out"
MOST_REASONS = 200  # templates quote what they refuse; a manifest stays readable


class Counts:
    """`kept`: what is missing of records that are captured all the same, by reason ("kept, but ..."), once a record or piece."""

    def __init__(self):
        self.kept: Counter[str] = Counter()
        # Four bytes a record, because joined records end long after they are read, and not in their order.
        self._codes = {BEYOND: 0, CAPTURED: 1, HELD_OUT: 2}
        self._ends = array("I")

    def read(self) -> int:
        """The number of a record that was just read. Until more is known, data.max_tokens ends before it."""
        self._ends.append(self._codes[BEYOND])
        return len(self._ends) - 1

    def end(self, numbers: Iterable[int], how: str) -> None:
        """How these records end; one of which a part is captured stays captured."""
        if how not in self._codes and len(self._codes) >= MOST_REASONS:
            how = "one of many other reasons"
        code = self._codes.setdefault(how, len(self._codes))
        for number in numbers:
            if self._ends[number] != self._codes[CAPTURED]:
                self._ends[number] = code

    def said(self) -> dict:
        """What a manifest says: `records` (read = captured + held_out + all of left_out), `left_out` and `kept` by reason."""
        names = list(self._codes)
        ends = Counter({names[code]: count for code, count in Counter(self._ends).items()})
        records = {"read": len(self._ends), "captured": ends.pop(CAPTURED, 0), "held_out": ends.pop(HELD_OUT, 0)}
        return {"records": records, "left_out": dict(ends), "kept": dict(self.kept)}
