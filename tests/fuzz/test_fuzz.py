"""A hundred of the mutations that `python -m tests.fuzz` makes by the thousand."""

import pytest

from tests.fuzz.kinds import KINDS, tried


@pytest.mark.parametrize("name", KINDS)
def test_what_is_mutated_is_refused_in_one_line_or_harmless(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = KINDS[name](tmp_path)
    seen = set()
    for number in range(25):
        said, found = tried(kind, 0, number)
        assert not [outcome for outcome in found.values() if outcome.startswith("fault")], (number, said, found)
        seen.update(found.values())
    assert len(seen) > 1  # not everything is refused: the whole one, at least, can be read
