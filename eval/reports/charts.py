"""Pictures as inline SVG, for pages: what any page draws with (`svg`), and the three pictures of a run's report."""

import io
import re
from html import escape

INK = "#010203"  # in a picture: the colour of the page's text, light or dark
PARTS = {"draft": "#2a9d6f", "verify": "#4c78c8", "overhead": "#9a9a9a"}

Everyone = dict[str, dict[str, dict]]  # {temperature: who drafted there, by name (`page.contenders`)}


def svg(label: str, columns: int, height: float, draw, width: float = 10.5) -> str:
    """What `draw`(axes in a row) draws with matplotlib, as inline SVG in the page's own text colour."""
    import matplotlib

    # Draws into files, and needs no screen.
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = dict.fromkeys(inks, INK) | {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    style |= {"font.sans-serif": ["DejaVu Sans"], "legend.framealpha": 0, "axes.axisbelow": True, "text.parse_math": False}
    # Text stays text. Ids are the same every time, so that a page is, and each picture's own, so that no two on a page clash.
    style |= {"svg.fonttype": "none", "svg.hashsalt": label}
    text = io.StringIO()
    with matplotlib.rc_context(style):
        drawn, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        draw(axes[0])
        drawn.savefig(text, format="svg", transparent=True)
        plt.close(drawn)
    # matplotlib knows no "currentColor": a colour that nothing else has stands for it until here.
    picture = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text.getvalue(), flags=re.DOTALL).replace(INK, "currentColor")
    picture = re.sub(r' xmlns(:xlink)?="[^"]*"', "", picture[picture.index("<svg") :])  # HTML knows both
    return picture.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


# The pictures of one run.


def _look(name: str) -> dict:
    """How a contender's line looks: the trained drafter's stands out."""
    order = ("untrained", "prompt_lookup", "zero_memory", "shuffled_memory")
    if name == "trained":
        return {"color": "#2a9d6f", "linewidth": 2.4, "marker": "o", "zorder": 3}
    colours = ("#c77d2e", "#8e62c4", "#8a8a8a", "#4c9bc8", "#c85a9a", "#9a8a3a")
    at = order.index(name) if name in order else 4 + len(name) % 2
    return {"color": colours[at], "linewidth": 1.2, "marker": ".", "alpha": 0.9}


def by_slot(everyone: Everyone) -> str:
    """Acceptance at each slot: conditional, and the trained drafter's joint one."""

    def draw(axes) -> None:
        for axis, (temperature, found) in zip(axes, everyone.items()):
            for name, row in found.items():
                slots = range(1, len(row["conditional"]) + 1)
                if slots:
                    axis.plot(slots, row["conditional"], label=name.replace("_", " "), **_look(name))
            joint = found["trained"]["joint"]
            slots = range(1, len(joint) + 1)
            axis.plot(slots, joint, **_look("trained") | {"linestyle": "--", "linewidth": 1.2, "marker": ""})
            axis.set(xlabel="drafted token of a round", ylabel="acceptance", title=f"T = {temperature}", ylim=(0, 1.02))
            axis.set_xticks(slots)
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return svg("acceptance by slot", len(everyone), 3.4, draw)


def along_the_text(everyone: Everyone) -> str:
    """tau by the position of the anchor."""

    def draw(axes) -> None:
        for axis, (temperature, found) in zip(axes, everyone.items()):
            for name, row in found.items():
                if bins := row.get("by_context"):
                    middle = [(low + high) / 2 for low, high in zip(bins["from"], bins["to"])]
                    axis.plot(middle, bins["tau"], label=name.replace("_", " "), **_look(name))
            axis.axhline(1, color=INK, linewidth=0.8, linestyle=":")
            axis.set(xlabel="position of the anchor in the text", ylabel="tau", title=f"T = {temperature}")
            axis.set_ylim(bottom=min(0.9, axis.get_ylim()[0]))  # below 1 where audits took tokens back
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return svg("tau by position in the text", len(everyone), 3.2, draw)


def of_a_round(everyone: Everyone) -> str:
    """Milliseconds of a round, by what they are spent on."""

    def draw(axes) -> None:
        for axis, (temperature, found) in zip(axes, everyone.items()):
            named = {name.replace("_", " "): row for name, row in found.items() if row["round_ms"]}
            left = [0.0] * len(named)
            for part, colour in PARTS.items():
                widths = [row["round_ms"][part] for row in named.values()]
                bars = axis.barh(list(named), widths, left=left, color=colour, label=part)
                left = [one + width for one, width in zip(left, widths)]
            speeds = (row["tokens_per_s"] for row in named.values())
            axis.bar_label(bars, [f"{1e3 / speed:.1f} ms a token" if speed else "" for speed in speeds], padding=3, fontsize=8)
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
            axis.set(xlabel="ms a round", xlim=(0, 1.5 * max(left)), title=f"T = {temperature}")
        axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))

    return svg("milliseconds of a round", len(everyone), 0.8 + 0.38 * max(map(len, everyone.values())), draw)
