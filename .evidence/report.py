# SPDX-License-Identifier: MIT
"""The tables and the figure of the page's results, made from .evidence/*.jsonl without training.

python .evidence/report.py > .evidence/tables.md    also draws the figure into .github/
python .evidence/report.py a.jsonl                  the same from other files, with --figures FOLDER
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from demo_transformer import T_95 as T_95_OF_TEN  # noqa: E402

T_95 = T_95_OF_TEN | {
    **{11: 2.228, 12: 2.201, 13: 2.179, 14: 2.160, 15: 2.145, 16: 2.131, 17: 2.120, 18: 2.110},
    **{19: 2.101, 20: 2.093, 21: 2.086, 22: 2.080, 23: 2.074, 24: 2.069},
}  # by the number of differences
DEFAULT_FIT = {"small": 5, "fine": 5, "smollm2": 12}  # batches, in short jobs; 60 in others
STYLES = {  # one colour a method in all figures, and a marker and a dash for grey ones
    "lora": ("black", "o", "-"),
    "lora_da": ("C3", "D", "-"),
    "hrp": ("C4", "v", "-."),
    "cntlora": ("C0", "P", ":"),
    "pissa": ("C1", "s", "--"),
    "lora_ga": ("C2", "^", "--"),
    "eva": ("C5", "X", ":"),
    "olora": ("C6", "<", "-."),
    "corda": ("C8", ">", ":"),
}
FIGURES = {  # file: task, updates, methods
    "transformer.svg": ("small", 50, ["lora", "lora_da", "hrp", "cntlora"]),
}
ABOUT = """# All results

`report.py` has made these tables from the runs in this folder. The task `small` is the demo's
transformer, `fine` the same at rates a factor of two apart, and `smollm2` is SmolLM2-135M-Instruct.
± is a 95 % t-interval over the seeds, bold if it excludes 0; * marks the best rate by development
text. "fit" counts batches, and "Y" is the damping of Y if it is not that of Z.
"""
Run = dict  # one line of a file
Cell = dict[tuple, Run]  # runs by (pre-training seed, seed)
Row = dict[tuple[bool, float], Cell]  # by (A is frozen, learning rate)
intervals = 0  # that have been printed


# ---------------------------------------------------------------------------- reading


def read(files: list[Path]) -> dict[tuple, dict[str, Row]]:
    """Rows by label, in groups of one task, one number of updates and one amount of data."""
    groups: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for file in files:
        for line in file.read_text().splitlines():
            run = json.loads(line)
            group = (run["task"], run["updates"], run["train_batches"])
            cell = groups[group][label(run)][run["freeze_A"], run["rate"]]
            cell[run["pretrain_seed"], run["seed"]] = run
    return groups


def label(run: Run) -> str:
    """The method, and what differs from its defaults."""
    words = [run["method"]]
    default = DEFAULT_FIT.get(run["task"], 60) if run["updates"] <= 200 else 60
    if run["fit"] not in (None, default):
        words.append(f"fit {run['fit']}")
    if run["damping"] is not None:
        if run["unit"] != "mean":
            words.append(run["unit"])
        if run["damping"] != 1 or run["unit"] != "mean":
            words.append(f"damping {run['damping']:g}")
        if run["damping_y"] != run["damping"]:
            words.append(f"Y {run['damping_y']:g}")
    return ", ".join(words)


# ---------------------------------------------------------------------------- numbers


def mean(cell: Cell, name: str) -> float:
    return statistics.fmean(run[name] for run in cell.values())


def rates_of(row: Row, freeze_A: bool) -> list[float]:
    """The rates at which the largest number of seeds has run."""
    cells = {rate: cell for (frozen, rate), cell in row.items() if frozen == freeze_A}
    most = max((len(cell) for cell in cells.values()), default=0)
    return sorted(rate for rate, cell in cells.items() if len(cell) == most)


def best_rate(row: Row, freeze_A: bool) -> float | None:
    """The rate with the least mean loss on development text."""
    rates = rates_of(row, freeze_A)
    return min(rates, key=lambda rate: mean(row[freeze_A, rate], "loss_dev"), default=None)


def difference(ours: Cell, plain: Cell) -> str:
    """Mean of the paired differences on test text with its 95 % interval, bold if 0 is outside."""
    global intervals
    pairs = sorted(ours.keys() & plain.keys(), key=str)
    gaps = [ours[pair]["loss_test"] - plain[pair]["loss_test"] for pair in pairs]
    if not gaps:
        return ""
    middle = statistics.fmean(gaps)
    if len(gaps) not in T_95 or not math.isfinite(middle):
        return f"{middle:+.4f}".replace("-", "−")
    intervals += 1
    half = T_95[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    text = f"{middle:+.4f} ± {half:.4f}".replace("-", "−")
    return f"**{text}**" if abs(middle) > half else text


# ---------------------------------------------------------------------------- tables


def table(header: list[str], lines: list[list[str]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("| " + " | ".join("---" for _ in header) + " |")
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def print_differences(rows: dict[str, Row], base: str) -> None:
    """Each start minus the base: each at its best rate, and both at a quarter of the base's."""
    plain = rows[base]
    header = [f"{base}'s test loss; the others minus it", "before training"]
    lines = [
        [name, f"{mean(next(iter(row.values())), 'loss_start'):.4f}"] for name, row in rows.items()
    ]
    for freeze_A in (True, False):
        best = best_rate(plain, freeze_A)
        if best is None:
            continue
        low = best / 4 if best / 4 in rates_of(plain, freeze_A) else rates_of(plain, freeze_A)[0]
        setting = "A frozen" if freeze_A else "A trained"
        header += [f"{setting}, best rates", f"{setting}, all at {low:g}"]
        for line, row in zip(lines, rows.values(), strict=True):
            own = best_rate(row, freeze_A)
            if row is plain:
                line.append(f"{mean(plain[freeze_A, best], 'loss_test'):.4f} at {best:g}")
                line.append(f"{mean(plain[freeze_A, low], 'loss_test'):.4f}")
                continue
            if own is None:
                line += ["", ""]
                continue
            at_best = difference(row[freeze_A, own], plain[freeze_A, best])
            line.append(f"{at_best} at {own:g}")
            at_low = row.get((freeze_A, low), {})
            line.append(difference(at_low, plain[freeze_A, low]))
    table(header, lines)


def pretrainings(rows: dict[str, Row]) -> list[int]:
    """The seeds of pre-training; a model that was not pre-trained here counts as 0."""
    cells = [cell for row in rows.values() for cell in row.values()]
    return sorted({pair[0] or 0 for cell in cells for pair in cell})


def of_one_pretraining(rows: dict[str, Row], seed: int = 0) -> dict[str, Row]:
    """The runs of one pre-training, so that intervals and bars show the seeds of the starts."""
    chosen: dict[str, Row] = {}
    for name, row in rows.items():
        chosen[name] = {}
        for key, cell in row.items():
            own = {pair: run for pair, run in cell.items() if (pair[0] or 0) == seed}
            if own:
                chosen[name][key] = own
    return {name: row for name, row in chosen.items() if row}


def print_losses(rows: dict[str, Row]) -> None:
    """Test loss at every rate; * marks the best rate by development text."""
    for freeze_A in (True, False):
        rates = sorted(
            {rate for row in rows.values() for frozen, rate in row if frozen == freeze_A}
        )
        lines = []
        for name, row in rows.items():
            best = best_rate(row, freeze_A)
            line = [name]
            for rate in rates:
                cell = row.get((freeze_A, rate))
                star = "*" if rate == best else ""
                line.append(f"{mean(cell, 'loss_test'):.4f}{star}" if cell else "")
            lines.append(line)
        setting = "A frozen" if freeze_A else "A trained"
        table([f"{setting}: test loss at rate"] + [f"{rate:g}" for rate in rates], lines)


def print_starts(rows: dict[str, Row]) -> None:
    """What a start costs, as counted and as measured in these runs, and the steps it chose."""
    lines = []
    for name, row in rows.items():
        runs = [run for cell in row.values() for run in cell.values()]
        counted = sorted({run["cost"] for run in runs})
        measured = [
            run["start_seconds"] * (run["updates"] - run["cost"]) / run["train_seconds"]
            for run in runs
        ]
        steps = sorted({f"{run['step']:g}" for run in runs if run["step"] is not None}, key=float)
        seeds = {pair for cell in row.values() for pair in cell}
        line = [name, ", ".join(map(str, counted)), f"{statistics.median(measured):.1f}"]
        lines.append([*line, ", ".join(steps), str(len(seeds))])
    table(["start", "updates counted", "updates measured", "steps", "seeds"], lines)


def print_group(group: tuple, rows: dict[str, Row]) -> None:
    task, updates, train_batches = group
    few = f", {train_batches} batches repeated" if train_batches else ""
    print(f"## {task}, {updates} updates{few}\n")
    methods = [*STYLES, "reduced_rank", "gradient_svd", "white", "orthonormal"]
    names = sorted(rows, key=lambda name: (methods.index(name.split(",")[0]), name))
    rows = {name: rows[name] for name in names}
    for seed in pretrainings(rows):
        one = of_one_pretraining(rows, seed)
        if seed:
            print(f"Pre-training {seed}\n")
        for base in ("lora", "lora_da"):
            if base in one:
                print_differences(one, base)
        print_losses(one)
    print_starts(rows)


# ---------------------------------------------------------------------------- figures


def new_figure() -> tuple:
    """Two panels, one above the other, so that letters can be read at 360 pixels."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "lora", "font.size": 13})  # the same bytes again
    figure = Figure(figsize=(5, 6.5), layout="constrained")
    panels = figure.subplots(2, 1)
    for panel, setting in zip(panels, ("A frozen", "A trained"), strict=True):
        panel.set_title(setting, fontsize=13)
        panel.set_ylabel("test loss, nats")
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw(panel: object, x: list, cells: list[Cell], method: str, label: str, dash: str) -> None:
    """Means over the seeds, and bars from the least to the largest loss."""
    color, marker, _ = STYLES[method]
    middle = [mean(cell, "loss_test") for cell in cells]
    values = [[run["loss_test"] for run in cell.values()] for cell in cells]
    below = [m - min(v) for m, v in zip(middle, values, strict=True)]
    above = [max(v) - m for m, v in zip(middle, values, strict=True)]
    style = {"color": color, "marker": marker, "linestyle": dash, "markersize": 6}
    panel.errorbar(x, middle, (below, above), elinewidth=0.8, label=label, **style)


def against_rate(rows: dict[str, Row], methods: list[str], file: Path) -> None:
    figure, panels = new_figure()
    no_adapter = mean(next(iter(rows["lora"].values())), "loss_start")
    for panel, freeze_A in zip(panels, (True, False), strict=True):
        for method in methods:
            row = rows.get(method, {})
            rates = rates_of(row, freeze_A)
            cells = [row[freeze_A, rate] for rate in rates]
            draw(panel, rates, cells, method, method, STYLES[method][2])
        rates = rates_of(rows["lora"], freeze_A)
        panel.axhline(no_adapter, color="gray", linewidth=1, linestyle=(0, (1, 3)))
        panel.text(rates[0], no_adapter, "no adapter", va="bottom", color="gray")
        panel.set_xscale("log", base=2)
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
        panel.set_ylim(top=1.01 * no_adapter)  # runs that diverge end above
    panels[1].set_xlabel("learning rate")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    figure.savefig(file, metadata={"Date": None})


# ---------------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=sorted(HERE.glob("*.jsonl")))
    parser.add_argument("--figures", type=Path, default=HERE.parent / ".github")
    args = parser.parse_args()
    args.figures.mkdir(exist_ok=True)
    groups = read(args.files)
    print(ABOUT)
    for group in sorted(groups, key=str):
        print_group(group, groups[group])
    print(f"{intervals} intervals of 95 %: expect one in twenty to miss the true value")
    for name, (task, updates, methods) in FIGURES.items():
        rows = of_one_pretraining(groups.get((task, updates, None), {}))
        if "lora" in rows:
            against_rate(rows, methods, args.figures / name)


if __name__ == "__main__":
    main()
