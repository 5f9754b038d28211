"""`mode=demo`: prompts of several kinds, answered with the drafter and without, side by side; then a table and a picture.

Each side's clock runs during its own rounds alone, and the side whose clock is behind is next: what is seen at any moment is what
both would have written in the same time.
"""

import io
import re
import textwrap
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from common.files import write_text
from data_prep.target.target import Target
from eval.judging import measure
from eval.live.stream import Answer, Decoders
from eval.prompts.asking import DemoPrompt, asked
from eval.recipe import EvalRecipe
from eval.reports.page import KINDS
from train.drafter.base import Drafter

PICTURE = "demo.svg"
WIDTH = 110  # characters, of the picture and where there is no terminal
FOREIGN = re.compile(r"@font-face\s*\{.*?\}|<!--.*?-->", re.DOTALL)  # fonts that a viewer would fetch from a network
HEADS = ("", "tau", "tokens", "plain, tokens/s", "drafter, tokens/s", "speed-up", "same text")


def demo(recipe: EvalRecipe, target: Target, drafter: Drafter) -> dict:
    """Shows the answers as they come and their table, writes the picture into `recipe.out`; the figures.

    Returns:
        {"prompts": [figures of each, "kind" and "text" of the answer], "total": figures}; see `figures`.
    """
    decoders = Decoders(recipe, target, drafter, temperature=0.0, side_by_side=True)
    console = Console(highlight=False, markup=False, emoji=False)
    most = recipe.demo.max_new_tokens
    if not console.is_terminal:
        console.width = WIDTH
    tokens = [asked(decoders.tokenizer, one.messages, recipe.chat.thinking) for one in recipe.demo.prompts]
    answer = lambda prompt, limit: [decoders.answer(prompt, limit, recipe.seed, drafted) for drafted in (False, True)]
    # Asks for the longest prompt's room, and leaves the answer alone.
    answer(max(tokens, key=len), most)  # caches of one size for all
    # What is done once (compiled code, graphs, layouts of weights) is done before a clock runs.
    for one in answer(tokens[0], min(most, recipe.demo.warmup_tokens)):
        while not one.done:
            one.step()
    decoders.forget_lengths()  # what drafts took while the machine was warming up
    pairs = []
    for number, (prompt, ids) in enumerate(zip(recipe.demo.prompts, tokens), start=1):
        plain, drafted = answer(ids, most)
        console.print(heading(prompt, f"{number} of {len(tokens)}"), soft_wrap=not console.is_terminal)
        if console.is_terminal:
            with Live(columns(plain, drafted), console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:
                take_turns(plain, drafted, lambda: live.update(columns(plain, drafted), refresh=True))
        else:
            take_turns(plain, drafted, lambda: None)
            console.print(*lines(plain, drafted), sep="\n", soft_wrap=True)
        pairs.append((plain, drafted))
    result = {
        "prompts": [
            {"kind": prompt.kind, **figures([pair]), "text": pair[1].text.plain}
            for prompt, pair in zip(recipe.demo.prompts, pairs)
        ],
        "total": figures(pairs),
    }
    console.print(table(result))
    draw(Path(recipe.out), recipe, result, pairs)
    return result


def take_turns(plain: Answer, drafted: Answer, show) -> None:
    """Both answers to their ends; `show` is called behind every round."""
    while going := [one for one in (plain, drafted) if not one.done]:
        # The side whose clock is behind is next. So at any moment both texts are what would have been written in the same time.
        min(going, key=lambda one: one.so_far.decode_s).step()
        show()


def figures(pairs: list[tuple[Answer, Answer]]) -> dict:
    """Of (plain, drafted) answers: "tau", "tokens", tokens/s "plain" and "drafted" (decoding alone), "speedup", and whether both
    sides wrote the "same" tokens in every pair."""
    plain, drafted = ([pair[side].so_far for pair in pairs] for side in (0, 1))
    slow, fast = (measure.tokens_per_s(side, prefill=False) for side in (plain, drafted))
    return {
        "tau": measure.tau(drafted)[0],
        "tokens": sum(len(one.tokens) for one in drafted),
        "plain": slow,
        "drafted": fast,
        "speedup": fast / max(slow, 1e-9),
        "same": all(a.tokens == b.tokens for a, b in zip(plain, drafted)),
    }


def heading(prompt: DemoPrompt, place: str = "") -> Text:
    """The kind, and how the prompt begins."""
    said = " ".join(prompt.text.split())
    text = Text(f"\n{place}{', ' * bool(place)}{prompt.kind}: ", style="bold")
    return text.append(textwrap.shorten(said, 160, placeholder=" ..."), style="not bold dim")


def columns(plain: Answer, drafted: Answer) -> Table:
    """Both answers as far as they are."""
    grid = Table(expand=True, pad_edge=False)
    for name, one in (("plain", plain), ("drafter", drafted)):
        tau = f", tau {one.tau:.2f}" * (one is drafted)
        grid.add_column(Text(f"{name}: {one.tokens_per_s:.1f} tokens/s{tau}"), ratio=1)
    grid.add_row(plain.text, drafted.text)
    return grid


def lines(plain: Answer, drafted: Answer) -> list[str]:
    """The same for who reads no columns."""
    text = [f"  plain:   {plain.text.plain}", f"  drafter: {drafted.text.plain}"]
    said = f"  {plain.tokens_per_s:.1f} tokens/s plain, {drafted.tokens_per_s:.1f} with the drafter, tau {drafted.tau:.2f}"
    return [one.replace("\n", "\n           ") for one in text] + [said]


def row(name: str, found: dict) -> list[str]:
    """A table's row under `HEADS`."""
    speeds = [f"{found[side]:.1f}" for side in ("plain", "drafted")]
    same = "yes" if found["same"] else "NO"
    return [name, f"{found['tau']:.2f}", str(found["tokens"]), *speeds, f"{found['speedup']:.2f}x", same]


def table(result: dict, lines: box.Box = box.HEAVY_HEAD) -> Table:
    made = Table(title="tau = tokens per round; greedy, one request at a time", box=lines)
    for head in HEADS:
        made.add_column(head, justify="right" if head else "left", no_wrap=not head)
    for one in result["prompts"]:
        made.add_row(*map(Text, row(one["kind"], one)), end_section=one is result["prompts"][-1])
    made.add_row(*row("total", result["total"]), style="bold")
    return made


def draw(out: Path, recipe: EvalRecipe, result: dict, pairs: list[tuple[Answer, Answer]]) -> None:
    """The answers of the drafter's side and the table as one picture that needs nothing beside it."""
    console = Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    key = Text("Tokens that were drafted and accepted are ").append("green", KINDS["accepted"])
    console.print(key.append("; the others are the target's own."))
    for prompt, (_, drafted) in zip(recipe.demo.prompts, pairs):
        console.print(Group(heading(prompt), drafted.text))
    console.print(Rule(style="dim"), table(result, box.SIMPLE))
    title = f"{Path(recipe.target.id).name} with the drafter {Path(recipe.drafter).name}"
    svg = console.export_svg(title=title, unique_id="demo")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / PICTURE, FOREIGN.sub("", svg))
