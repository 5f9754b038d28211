"""Reports for people: what the page says by hand-made figures, what a browser makes of it, and runs side by side."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from common import cli
from common.errors import UserError
from common.recipe import ROOT
from data_prep.target.loading import load_tokenizer
from eval.check import check_evaluation
from eval.judging import measure
from eval.main import gather, run
from eval.oracle.decode import Generation, Round
from eval.recipe import EvalRecipe
from eval.reports import charts, compare, page, report, sweep
from tests.support.reports import ATTACK, made


class Read(HTMLParser):
    """The page as a browser reads it: its elements with attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def refuse_outside(html: str) -> Read:
    """Asserts that nothing in the page asks for another file, and that no data became a tag."""
    read = Read(html)
    for tag, attributes in read.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed"), tag
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith(("#", "data:image/")), (tag, name, value)
            assert "//" not in (value or "") or tag == "img" and value.startswith("data:"), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import", re.sub(r"&[a-z]+;", "", html))
    return read


# What a report says, from generations made by hand.


def test_acceptance_by_position_is_binned_over_the_text():
    """Positions 10 to 25 in bins of 2, shared by all; a bin without a round is left out."""
    far = [Round(10, 4, 0), Round(11, 4, 2), Round(14, 4, 1), Round(25, 4, 4)]
    found = measure.by_context({"trained": [Generation([], far)], "untrained": [Generation([], [Round(12, 4, 0)])]})
    assert found["trained"] == {"from": [10, 14, 24], "to": [11, 15, 25], "tau": [2, 2, 5], "rounds": [2, 1, 1]}
    assert found["untrained"] == {"from": [12], "to": [13], "tau": [1], "rounds": [1]}
    for last in range(40):
        bins = measure.by_context({"a": [Generation([], [Round(i, 1, 0) for i in range(last + 1)])]})["a"]
        assert len(bins["from"]) <= 8 and sum(bins["rounds"]) == last + 1
    assert measure.by_context({"a": [Generation([7])]}) == {"a": {"from": [], "to": [], "tau": [], "rounds": []}}


def test_examples_mark_emitted_accepted_and_rejected_tokens():
    """One token of the prefill; a round that keeps one of two; a bonus; then the output's end, after which nothing is shown."""
    tokenizer = load_tokenizer(str(ROOT / "data_prep/targets/tiny"))
    ids = lambda text: [tokenizer.encode(one, add_special_tokens=False)[0] for one in text]
    prompt, output = ids("#" * 250), ids("abcdef")
    rounds = [Round(250, 2, 1, None, ids("bX")), Round(252, 1, 1, None, ids("d")), Round(254, 2, 1, None, ids("fY"))]
    (shown,) = measure.examples([prompt, prompt], [Generation(output, rounds)], tokenizer, count=1)
    assert shown["prompt"] == "#" * 200
    said = ["emitted a", "accepted b", "rejected X", "emitted c", "accepted d", "emitted e", "accepted f"]
    assert [f"{kind} {text}" for text, kind in shown["pieces"]] == said
    for round in rounds:  # nobody knows what was drafted: what was refused cannot be shown
        round.drafted_tokens = None
    (shown,) = measure.examples([prompt], [Generation(output, rounds)], tokenizer)
    assert [f"{kind} {text}" for text, kind in shown["pieces"]] == [one for one in said if not one.startswith("rejected")]


def test_a_character_of_several_tokens_is_shown_with_its_last_token():
    tokenizer = load_tokenizer(str(ROOT / "data_prep/targets/tiny"))
    text = "def \u00fc\u6f22\U0001f600():\n\treturn 'na\u00efve'  # \ufffd\u20ac"
    output = tokenizer.encode(text, add_special_tokens=False)
    assert len(output) < len(text.encode())
    (shown,) = measure.examples([output[:1] * 2], [Generation(output, [Round(2, 0, 0)] * (len(output) - 1))], tokenizer)
    assert "".join(piece for piece, _ in shown["pieces"]) == text


def test_the_page_says_what_the_report_says_and_escapes_it(tmp_path):
    found = made(name=f"RUNS/{ATTACK}")
    page.write_page(tmp_path, found)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    html = (tmp_path / "report.html").read_text()
    read = refuse_outside(html)
    cells = re.findall("<td[^>]*>([^<]*)</td>", html.split("Acceptance and speed")[1].split("</table>")[0])
    assert cells == [cell for row in page.rows(found) for cell in row] and len(cells) == 6 * len(page.HEADS)
    for words in (
        "1.90",
        "0.60 0.50",
        "9.2",
        "1.23x",
        "h2o, 256 positions",
        "c0ffee",
        "torch 2.0",
        "0.47 GiB",
        "draft",
        "overhead",
    ):
        assert words in read.text, words
    assert read.text.count(ATTACK) == 5  # the drafter's name three times, a prompt, a token
    kinds = [attributes.get("class") for tag, attributes in read.elements if tag == "span"]
    assert kinds == ["accepted", "rejected", "emitted", "prompt", "accepted", "rejected", "emitted"]
    assert "no\u21b5\u24234" in read.text and "yes\u21b5\n" in read.text
    assert sum(tag == "svg" for tag, _ in read.elements) == 3 and "metadata" not in html and charts.INK not in html
    page.write_page(tmp_path, found)
    assert (tmp_path / "report.html").read_text() == html  # the same figures, the same file
    report.print_table(found)


def test_the_page_of_a_sweep_contains_its_picture(tmp_path):
    report.write_json(tmp_path / "a", made(context=64))
    sweep.gather([tmp_path], tmp_path)
    read = refuse_outside((tmp_path / "sweep.html").read_text())
    assert "1.90" in read.text and any(tag == "img" for tag, _ in read.elements)


# Runs side by side


def test_comparing_finds_a_difference_and_gives_exactly_zero_for_equal_runs():
    reports = {"a": made(1.9), "same": made(1.9), "better": made(2.4)}
    found = compare.compare(reports, seed=0)["temperatures"]["1"]
    assert found["same"]["tau_difference_ci"] == [0, 0] == found["same"]["speedup_difference_ci"] and found["same"]["paired"]
    assert found["better"]["tau_difference"] == pytest.approx(0.5) and found["better"]["tau_difference_ci"][0] > 0.4
    assert found["a"]["tau_ci"][0] < found["a"]["tau"] < found["a"]["tau_ci"][1] and "tau_difference" not in found["a"]
    assert found["a"]["speedup"] == pytest.approx((20 / 0.52) / (20 / 1.0))
    again = compare.compare(reports, seed=0)["temperatures"]["1"]
    assert again == found and compare.compare(reports, seed=1)["temperatures"]["1"] != found


def test_turns_of_a_conversation_are_drawn_together():
    figures = {"per_prompt": [[4, 2], [6, 2], [1, 1]], "per_prompt_s": [[3, 1.0], [5, 2.0], [1, 0.5]]}
    figures["baseline_per_prompt_s"] = [[3, 2.0], [5, 4.0], [1, 0.5]]
    assert compare.counted(figures, ["a", "b", "a"]).tolist() == [[5, 3, 4, 1.5, 4, 2.5], [6, 2, 5, 2.0, 5, 4.0]]


def test_runs_over_other_prompts_are_compared_unpaired():
    """Prompts that differ much between themselves and little between runs: pairing sees the small difference."""
    easy = [[10 + 2 * i, 10] for i in range(30)]

    def judged(more: int, ids: str) -> dict:
        one = made()
        one["prompts"]["ids"] = [f"{ids}{i}" for i in range(30)]
        one["temperatures"] = {"1": one["temperatures"]["1"] | {"per_prompt": [[e + more, s] for e, s in easy]}}
        return one

    found = compare.compare({"a": judged(0, "x"), "same": judged(1, "x"), "other": judged(1, "y")}, seed=0)
    same, other = (found["temperatures"]["1"][name] for name in ("same", "other"))
    assert same["paired"] and same["tau_difference_ci"] == pytest.approx([0.1, 0.1])
    low, high = other["tau_difference_ci"]
    assert not other["paired"] and low < 0 < high
    assert compare.rows(found)[2][2] == "30, unpaired" and found["differ"] == {
        "prompts.ids": [[f"{ids}{i}" for i in range(30)] for ids in ("x", "x", "y")]
    }


def test_intervals_cover_the_truth():
    """Verify steps that emit 1 + Binomial(4, 0.3) tokens: 95% intervals hold tau = 2.2 nearly that often."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        counts = np.ones((40, 6))
        counts[:, 1] = rng.integers(10, 30, 40)
        counts[:, 0] = counts[:, 1] + rng.binomial((4 * counts[:, 1]).astype(int), 0.3)
        low, high = np.percentile(compare.statistics(compare.resampled(counts, trial, 0))[:, 0], [2.5, 97.5])
        covered += low <= 2.2 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_statistics_of_nothing_decoded_do_not_divide_by_zero():
    assert compare.statistics(np.zeros(6)).tolist() == [1, 0]


def test_compare_refuses_runs_that_cannot_be_compared(tmp_path):
    def check(*runs):
        check_evaluation(cli.compose("eval", EvalRecipe, ["mode=compare", f"runs=[{','.join(runs)}]", f"out={tmp_path / 'out'}"]))

    folders = {name: str(tmp_path / name) for name in ("a", "b", "other", "old", "cut", "none")}
    other, old, cut = made(), made(), made()
    other["target"]["weights_hash"] = "def"
    del old["temperatures"]["1"]["per_prompt_s"]
    cut["temperatures"]["1"]["baseline_per_prompt_s"].pop()
    for name, one in (("a", made()), ("b", made(2.0)), ("other", other), ("old", old), ("cut", cut)):
        report.write_json(tmp_path / name, one)
    check(folders["a"], folders["b"])
    for runs, message in (
        (["a"], "name two different ones or more"),
        (["a", "a"], "name two different ones or more"),
        (["a", "none"], "none holds no report.json; make one"),
        (["a", "other"], r"different targets \(abc, def\)"),
        (["a", "old"], "old/report.json is damaged or was made by an earlier release"),
        (["a", "cut"], "cut/report.json is damaged or was made by an earlier release"),
    ):
        with pytest.raises(UserError, match=message):
            check(*(folders[one] for one in runs))
    (tmp_path / "a/report.json").write_text("[")
    with pytest.raises(UserError, match="a/report.json is not readable JSON"):
        check(folders["a"], folders["b"])
    for words, message in ((["out=o"], "say which, drafter=RUN/checkpoints/best"), (["runs=[a,b]"], "runs= is for mode=compare")):
        with pytest.raises(UserError, match=message):
            check_evaluation(cli.compose("eval", EvalRecipe, words))


def test_runs_are_compared_without_target_or_drafter(tmp_path, capsys):
    for name, tau in (("a", 1.9), ("b", 2.4)):
        report.write_json(tmp_path / name, made(tau))
    words = ["mode=compare", f"runs=[{tmp_path / 'a'},{tmp_path / 'b'}]", f"out={tmp_path / 'out'}", "target.path=nowhere"]
    run(cli.compose("eval", EvalRecipe, words))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.json", "compare.html"}
    assert "+0.50 [+0." in capsys.readouterr().out
    gather(tmp_path / "out")  # nothing that a sweep's table could hold, and no mistake


def test_the_page_says_when_seconds_are_shared_by_a_batch(tmp_path):
    found = made(engine={"batch": 4})
    found["temperatures"]["1"] |= {"by_category": {"qa": {"requests": 2, "tokens": 9, "tau": 1.5, "speedup": 1.25}}}
    page.write_page(tmp_path, found)
    html = (tmp_path / "report.html").read_text()
    assert "(4 at a time), so that speedups are those of mixed batches" in html and "<td>1.25x</td>" in html
    assert page.shared_seconds(made()) == page.shared_seconds(made(engine={"batch": 1})) == ""


def test_comparing_shows_categories_side_by_side(tmp_path, capsys):
    """Of every run that has them; a run of another suite has none."""
    part = lambda tau: {"requests": 1234, "tokens": 56, "tau": tau, "speedup": tau / 2}
    runs = {name: made(tau) for name, tau in (("A", 1.9), ("B", 2.4), ("C", 2.0))}
    runs["A"]["temperatures"]["1"] |= {"by_category": {"qa": part(1.5), "rag": part(2.0)}}
    runs["B"]["temperatures"]["1"] |= {"by_category": {"rag": part(3.0), "math": part(1.0)}}
    for name in runs:  # made() says the same of both temperatures
        runs[name]["temperatures"] = {"1": runs[name]["temperatures"]["1"]}
    found = compare.compare(runs, seed=0)
    rows = compare.rows_of_categories(found)
    counts = ["1,234", "56"]
    assert rows == [
        ["1", "qa", "A", *counts, "1.50", "0.75x"],
        ["1", "rag", "A", *counts, "2.00", "1.00x"],
        ["1", "rag", "B", *counts, "3.00", "1.50x"],
        ["1", "math", "B", *counts, "1.00", "0.50x"],
    ]
    compare.write_page(tmp_path, found)
    compare.print_table(found)
    assert "By category" in (tmp_path / "compare.html").read_text() and re.search("rag +│ B", capsys.readouterr().out)
    assert compare.rows_of_categories(compare.compare({"A": made(), "B": made()}, seed=0)) == []


def test_the_comparison_page_escapes_names_and_draws_two_pictures(tmp_path):
    runs = {"A": made(), "B <b>[red]$x_1$": made(2.4, seed=1)}
    found = compare.compare(runs, seed=0)
    assert json.loads(json.dumps(found))["differ"] == {"seed": [None, 1]}
    compare.write_page(tmp_path, found)
    read = refuse_outside((tmp_path / "compare.html").read_text())
    assert "B <b>[red]$x_1$" in read.text and "+0.50 [+0." in read.text
    assert sum(tag == "svg" for tag, _ in read.elements) == 2
    compare.print_table(found)


# A browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(path, tmp_path, *flags) -> tuple[str, list[str]]:
    """(the document as the browser ended up with it, what its console said), without a network."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3600", *flags, f"file://{path}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
def test_pages_open_from_disk_in_a_browser(tmp_path):
    """Figures, pictures that are really painted, a silent console; and a script or a picture from elsewhere would be noticed."""
    import matplotlib.image

    page.write_page(tmp_path, made())
    compare.write_page(tmp_path, compare.compare({"A": made(), "B": made(2.4)}, seed=0))
    report.write_json(tmp_path / "a", made(context=64))
    sweep.gather([tmp_path], tmp_path)
    for name, pictures, words in (
        ("report", 3, ("1.23x", "30 of 30 outputs equal", "8.1 ms a token")),
        ("compare", 2, ("+0.50 [+0.", "acceptance")),
        ("sweep", 1, ("1.90",)),
    ):
        path = tmp_path / f"{name}.html"
        document, said = browse(path, tmp_path, "--dump-dom")
        assert said == []
        read = refuse_outside(document)
        assert all(word in read.text for word in words)
        # Where the pictures are, by a script in a copy that allows one; whether they are painted there, by the page itself.
        measuring = "<script>document.title = JSON.stringify([...document.querySelectorAll('svg, img')].map(one => { const b = "
        measuring += (
            "one.getBoundingClientRect(); return [b.x, b.y, b.width, b.height, one.naturalWidth ?? 1] }))</script></body>"
        )
        copy = tmp_path / "copy.html"
        copy.write_text(path.read_text().replace(page.POLICY, "").replace("</body>", measuring))
        (title,) = re.findall("<title>(.*)</title>", browse(copy, tmp_path, "--dump-dom")[0])
        boxes = json.loads(title)
        assert len(boxes) == pictures
        browse(path, tmp_path, f"--screenshot={tmp_path / name}.png")
        image = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]
        for x, y, width, height, loaded in boxes:
            assert width > 300 and height > 80 and loaded
            painted = image[int(y) : int(y + height), int(x) : int(x + width)].reshape(-1, 3)
            coloured = np.ptp(painted, axis=1) > 0.2  # a line or a bar, not the ink of axes
            assert coloured.sum() > 100 and (painted.min(1) < 0.3).sum() > 100, (name, x, y)
    copy.write_text(path.read_text().replace("</body>", "<script>1</script><img src='https://example.org/x.png'></body>"))
    assert len(browse(copy, tmp_path, "--dump-dom")[1]) == 2
