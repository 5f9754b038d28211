"""The tables and pictures of launchers/compare.py, from the reports that its `judge` left."""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# What a judgement writes.
REPORTS = {"score": "score.json", "decode": "report.json", "diagnose": "diagnostics.json"}
# Is what the target's K/V add (the first arm over the second) larger for blocks than for steps (the third over the fourth)?
CONTRASTS = {
    "hybrid over hidden: block-wise against ttt": ("blockwise_hybrid", "dflash", "kvshot_hybrid", "eagle3"),
    "hybrid over hidden: block-wise with a Markov head against ttt": ("dspark_hybrid", "dspark_like", "kvshot_hybrid", "eagle3"),
    "K/V over hidden: block-wise against ttt": ("blockwise_kv", "dflash", "kvshot_kv", "eagle3"),
}


def reports(o, what: str) -> dict[str, list[dict]]:
    """Every seed's, of the arms that were judged so. They must be made alike."""
    found = {}
    for arm in o.arms:
        read = [json.loads(path.read_text()) for path in (o.runs / arm / what).rglob(REPORTS[what])]
        by_seed = {Path(report["drafter"]["path"]).parts[-3]: report for report in read}
        if by_seed:
            if absent := [name for name in map("seed{}".format, range(o.seeds)) if name not in by_seed]:
                sys.exit(f"error: {arm} has no {what} of {absent[0]}; say `judge` again")
            found[arm] = [by_seed[f"seed{seed}"] for seed in range(o.seeds)]
    if len({json.dumps(_settings(report), sort_keys=True) for every in found.values() for report in every}) > 1:
        sys.exit(f"error: arms differ in how `{what}` was made; say `judge` again with one set of overrides")
    return found


def _settings(report: dict) -> list:
    """What all arms must share: prompts and temperatures, or context and number of anchors. `prompt_tokens` is what a drafter has
    room for, which depends on its slots; whether prompts were cut to it shows in their lengths."""
    if "prompts" in report:
        return [report["prompts"] | {"prompt_tokens": None}, list(report["temperatures"])]
    return [report["context"], round(sum(kinds["greedy"]["rounds"][0] for kinds in report["copies"].values()))]


def decoded_like(score: dict) -> dict:
    """A score in the form of a decode report: its tau as a prompt of one round, so that intervals are those of the seeds."""
    kinds = {"1": score["sampled"], "0": score["greedy"]}
    return score | {"temperatures": {t: kind | {"per_prompt": [[kind["tau"], 1]]} for t, kind in kinds.items()}}


def counts(found: list[dict], temperature: str) -> np.ndarray:
    """[seeds, prompts, 2]: tokens emitted, rounds."""
    return np.array([report["temperatures"][temperature]["per_prompt"] for report in found], dtype=float)


def tau(counted: np.ndarray) -> float:
    emitted, steps = counted.reshape(-1, 2).sum(0)
    return emitted / steps


STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # by the number of seeds: 97.5% quantiles


def interval(statistic, *arms: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high) of a statistic of several arms' counts: 95%, for other seeds and other prompts.

    Two errors, added in quadrature: that of the seeds, Student's interval over the statistic of each seed (4.30 standard errors
    for three seeds), and that of the prompts, a bootstrap over prompts with all seeds kept. The seeds' error has some of the
    prompts' in it, so that the interval is rather too wide than too narrow. One seed: the prompts' alone; of one prompt: nan.
    """
    value = statistic(*arms)
    (seeds, prompts) = arms[0].shape[:2]
    rng = np.random.default_rng(0)
    draws = (rng.integers(prompts, size=prompts) for _ in range(1000))
    error = 1.96 * np.std([statistic(*(arm[:, draw] for arm in arms)) for draw in draws])
    if seeds == prompts == 1:
        error = np.nan
    if seeds > 1:
        each_seed = [statistic(*(arm[[seed]] for arm in arms)) for seed in range(seeds)]
        error = np.hypot(error, STUDENT.get(seeds, 2.3) * np.std(each_seed, ddof=1) / np.sqrt(seeds))
    return value, value - error, value + error


def gain(arm: np.ndarray, control: np.ndarray) -> float:
    return tau(arm) - tau(control)


def difference(block: np.ndarray, block_control: np.ndarray, step: np.ndarray, step_control: np.ndarray) -> float:
    return gain(block, block_control) - gain(step, step_control)


Counts = dict[tuple[str, str], np.ndarray]  # {(arm, temperature): [seeds, prompts, 2]}
ACCEPTANCE = {"held-out tau": "trained", "zero memory": "zero_memory", "another's memory": "other_memory"}  # of the diagnosis
ACCEPTANCE |= {"oracle queries": "oracle_queries"}


def table(o) -> None:
    """Tables and pictures of what is judged. An arm and its control are compared on the same seeds and prompts."""
    # 1. What there is.
    scores = {arm: [decoded_like(report) for report in every] for arm, every in reports(o, "score").items()}
    decoded = reports(o, "decode")
    if not scores and not decoded:
        sys.exit(f"error: nothing in {o.runs} is judged; say `judge` first")

    # 2. The tables.
    lines = []
    if scores:
        lines += [["Held-out documents, teacher-forced; intervals over seeds"], *_taus(scores, o.controls), *_copies(scores)]
    if decoded:
        lines += [["Decoded; intervals over seeds and prompts"], *_taus(decoded, o.controls), *_kinds(decoded)]
    lines += _diagnoses(o)
    if absent := [arm for arm in o.arms if arm not in scores and arm not in decoded]:
        lines.append([f"not judged: {', '.join(absent)}"])
    text = "\n".join("| " + " | ".join(cells) + " |" if len(cells) > 1 else f"\n{''.join(cells)}\n" for cells in lines).strip()
    (o.runs / "compare.md").write_text(text + "\n")
    print(text)

    # 3. The pictures.
    every = decoded or scores
    t = _temperatures(every)[0]
    draw({arm: interval(tau, counts(found, t)) for arm, found in every.items()}, t, o.runs / "compare.png")
    draw_decay(scores or decoded, o.runs / "decay.png")


def _temperatures(every: dict[str, list[dict]]) -> list[str]:
    """The highest first, of which gains are shown."""
    return sorted(next(iter(every.values()))[0]["temperatures"], key=float, reverse=True)


def _interval(statistic, *arms: np.ndarray, sign: str = "") -> str:
    value, low, high = interval(statistic, *arms)
    said = f"{value:{sign}.2f}" if sign else f"**{value:.2f}**"
    return said if np.isnan(low) else f"{said} [{low:{sign}.2f}, {high:{sign}.2f}]"


def _taus(every: dict[str, list[dict]], controls: dict[str, str | None]) -> list[list[str]]:
    """A row for each arm, then the differences between gains."""
    temperatures = _temperatures(every)
    t = temperatures[0]
    found = {(arm, t): counts(each_seed, t) for arm, each_seed in every.items() for t in temperatures}
    heads = ["arm", "parameters", *(f"tau T={t}" for t in temperatures), f"acceptance by slot, T={t}"]
    heads += ["control", f"gain at T={t}", "verdict"]
    lines = [heads, ["---"] * len(heads)]
    for arm, each_seed in every.items():
        cells = [arm, f"{each_seed[0]['drafter']['parameters'] / 1e6:.2f}M"]
        cells += [_interval(tau, found[arm, t]) for t in temperatures]
        cells.append(" ".join(f"{accepted:.2f}" for accepted in by_slot(each_seed, t)))
        control = controls[arm]
        if (control, t) in found:
            _, low, high = interval(gain, found[arm, t], found[control, t])
            verdict = "beats it" if low > 0 else "WORSE" if high < 0 else "one seed" if np.isnan(low) else "no difference shown"
            cells += [control, _interval(gain, found[arm, t], found[control, t], sign="+"), verdict]
        else:
            cells += ["", "", ""]
        lines.append(cells)
    return lines + _contrasts(list(every), t, found)


def by_slot(every: list[dict], temperature: str) -> np.ndarray:
    """Acceptance of each slot given those before it, the mean over seeds."""
    seeds = (report["temperatures"][temperature]["conditional"] for report in every)
    return np.array([np.mean(slot) for slot in zip(*seeds)])


def _copies(scores: dict[str, list[dict]]) -> list[list[str]]:
    """Acceptance at T = 1 by copy distance, all seeds together."""
    from train.measure.copying import BUCKETS, grouped

    lines = []
    for arm, every in scores.items():
        cells = []
        for bucket in BUCKETS:
            found = [report["copies"][bucket]["sampled"] for report in every]
            conditional, rounds = (np.array([one[name] for one in found]) for name in ("conditional", "rounds"))
            pooled = (conditional * rounds).sum(0) / rounds.sum(0).clip(1e-9)
            groups = grouped(pooled.tolist(), rounds.sum(0).tolist())
            accepted = " ".join(f"{a:.2f}" if reached >= 1 else "-" for a, reached in groups.values())
            cells.append(f"{accepted} ({' '.join(f'{reached:.0f}' for _, reached in groups.values())})")
        lines.append([arm, *cells])
    title = f"Acceptance (rounds) of slots {', '.join(groups)} at T = 1, by copy distance"
    return [[title], ["arm", *BUCKETS], ["---"] * (1 + len(BUCKETS)), *lines]


def _kinds(decoded: dict[str, list[dict]]) -> list[list[str]]:
    """tau of each kind of prompts, and milliseconds of drafting."""
    lines = []
    for t in _temperatures(decoded):
        found = {arm: [report["temperatures"][t] for report in every] for arm, every in decoded.items()}
        kinds = list(next(iter(found.values()))[0].get("by_category", {}))
        heads = ["arm", *kinds, "draft ms"]
        lines += [[f"tau by kind of prompt, T = {t}; intervals over seeds"], heads, ["---"] * len(heads)]
        for arm, every in found.items():
            taus = [np.array([[[one["by_category"][kind]["tau"], 1]] for one in every]) for kind in kinds]
            draft_ms = np.mean([one["round_ms"]["draft"] for one in every])
            lines.append([arm, *(_interval(tau, counted) for counted in taus), f"{draft_ms:.1f}"])
    return lines


def _diagnoses(o) -> list[list[str]]:
    """Of the first seed."""
    lines = []
    for arm in o.arms:
        path = o.runs / arm / "diagnose" / REPORTS["diagnose"]
        if path.exists():
            found = json.loads(path.read_text())
            taus = {name: kinds["sampled"]["tau"] for name, kinds in found["acceptance"].items()}
            cells = [f"{taus[name]:.2f}" if name in taus else "" for name in ACCEPTANCE.values()]
            lines.append([arm, f"{found['compute']['gflop_per_anchor']:.2f}", *cells])
    heads = ["arm", "GFLOP an anchor", *ACCEPTANCE]
    return [["Diagnosis of seed 0, T = 1"], heads, ["---"] * len(heads), *lines] if lines else []


def _contrasts(arms: list[str], t: str, found: Counts) -> list[list[str]]:
    """A table of those contrasts whose arms are all there."""
    held = {name: four for name, four in CONTRASTS.items() if set(four) <= set(arms)}
    if not held:
        return []
    lines = [[], [f"difference of gains at T={t}", "block-wise", "ttt", "difference"], ["---"] * 4]
    for name, four in held.items():
        counted = [found[arm, t] for arm in four]
        gains = [f"{gain(*counted[:2]):+.2f}", f"{gain(*counted[2:]):+.2f}"]
        lines.append([name, *gains, _interval(difference, *counted, sign="+")])
    return lines


def draw(found: dict[str, tuple[float, float, float]], temperature: str, path: Path) -> None:
    """tau of each arm with its interval."""
    figure, (axis,) = panels(1, (8, 0.35 * len(found) + 1.2))
    middle, low, high = np.array(list(found.values())).T
    axis.errorbar(middle, range(len(found)), xerr=[middle - low, high - middle], fmt="o", capsize=3)
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set(xlabel=f"tau at T = {temperature}, with 95% intervals")
    figure.savefig(path, dpi=110)


def draw_decay(every: dict[str, list[dict]], path: Path) -> None:
    """Acceptance of slot j given the slots before: a panel for each temperature, a line for each arm, the mean over seeds."""
    temperatures = _temperatures(every)
    figure, axes = panels(len(temperatures), (5 * len(temperatures) + 3, max(4, 0.22 * len(every) + 1)))
    for axis, t in zip(axes, temperatures):
        for number, (arm, each_seed) in enumerate(every.items()):
            accepted = by_slot(each_seed, t)
            style = "-" if number < 10 else "--" if number < 20 else ":"  # there are ten colours
            axis.plot(range(1, 1 + len(accepted)), accepted, style, marker=".", label=arm)
        axis.grid(alpha=0.3)
        axis.set(xlabel="slot j", ylabel="acceptance given slots before", title=f"T = {t}", ylim=(0, None))
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=110)


def panels(count: int, size: tuple[float, float], **options):
    """(a figure, its `count` panels side by side)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False, **options)
    return figure, axes[0]
