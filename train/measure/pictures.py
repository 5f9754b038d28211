"""Pictures of what `diagnostics.py` measures: one panel for each question."""

from pathlib import Path

from train.measure.diagnostics import QUANTILES

Values = dict[str, list[float]]  # a line for each name, with a value for each slot
Bars = dict[str, float]


def draw(found: dict, path: Path) -> None:
    """One picture; panels without figures are left out. `found`: of `diagnose`, with "gradients" where there are any."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    lines = {title: values for title, values in _by_slot(found).items() if values}
    bars = _bars(found)
    columns = -(-(len(lines) + len(bars)) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(5 * columns, 8), layout="constrained", squeeze=False)
    panels = iter(axes.flat)
    for title, values in lines.items():
        _draw_lines(next(panels), title, values)
    for title, values in bars.items():
        _draw_bars(next(panels), title, values)
    for panel in panels:
        panel.axis("off")
    # Whoever looks at the picture while it is written sees the one before.
    temporary = path.with_name(path.stem + ".tmp.png")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(path)


def _by_slot(found: dict) -> dict[str, Values]:
    """Title -> what is drawn over the slots of a round."""
    queries = found["queries"]

    def of(ending: str) -> Values:
        return {name.removesuffix(f".{ending}"): values for name, values in queries.items() if name.endswith(ending)}

    masses = {name.removesuffix(".draft_mass"): values for name, values in found["attention"].items()}
    for name, values in queries.items():
        if name.endswith("since_anchor"):
            masses[f"target, {name.split('.')[0]}"] = values
    return {
        "Acceptance by slot, given the slots before (T = 1)": {
            name.replace("_", " "): kinds["sampled"]["conditional"] for name, kinds in found["acceptance"].items()
        },
        "Cosine of draft and target queries": of("cosine"),
        "KL of the attention maps over the memory, nats": of("map_kl"),
        "Relative error of the attention's output": of("output_error"),
        "Attention on the drafter's own keys": masses,
    }


def _bars(found: dict) -> dict[str, Bars]:
    """Title -> bars."""
    bars: dict[str, Bars] = {}
    gradients = found.get("gradients", {})
    branches = {name: values for name, values in gradients.items() if isinstance(values, dict) and "rank_q" in values}
    # Draft rows that have queries alone have one projection of the three.
    over = {f"{name} {k.upper()}": (values, f"{k}_over_q") for name, values in branches.items() for k in "kv"}
    ranks = {f"{name} {k.upper()}": (values, f"rank_{k}") for name, values in branches.items() for k in "qkv"}
    titles = {"Gradients of K and V over Q's (kv: draft keys alone)": over, "Effective rank of the gradients": ranks}
    for title, parts in titles.items():
        if there := {name: values[key] for name, (values, key) in parts.items() if key in values}:
            bars[title] = there
    if found["gate"]:
        gates: Bars = {}
        for name, gate in found["gate"].items():
            for q, value in zip(QUANTILES, gate["quantiles"]):
                gates[f"{name} q{100 * q:.0f}"] = value
            gates[f"{name} mean"] = gate["mean"]
            gates[f"{name} share"] = gate["share"]
        bars["Gate: quantiles, and share of the output"] = gates
    return bars


def _draw_lines(panel, title: str, lines: Values) -> None:
    for name, values in lines.items():
        panel.plot(range(1, len(values) + 1), values, "o-", label=name, markersize=4)
    panel.set_title(title, fontsize=10)
    panel.set(xlabel="drafted token of a round", ylim=(0, None))
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(fontsize=7)


def _draw_bars(panel, title: str, bars: Bars) -> None:
    panel.bar_label(panel.barh(list(bars), list(bars.values())), fmt="%.3g", fontsize=7)
    panel.invert_yaxis()  # the first on top
    panel.margins(x=0.15)
    panel.tick_params(labelsize=7)
    panel.set_title(title, fontsize=10)
