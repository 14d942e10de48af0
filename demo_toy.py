# SPDX-License-Identifier: MIT
"""Four scenes of linear regression that show where each start of LoRA wins and where it loses.

The model is y = W x with a frozen W (out, in), and fine-tuning looks for W* = W + Δ by a change BA.
Here Δ is known, so that every start can be compared with the exact answer. The numbers are means
over random draws, and the sentences under each table are computed from them.
"""

import argparse
import importlib.util
import math
import textwrap
import timeit
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, linalg

from lora_init import cntlora, hrp, lora_da

# The colors of demo_transformer.py.
COLORS = {"plain LoRA": "black", "gradient SVD": "C2", "LoRA-DA": "C3", "HRP": "C4"}


@dataclass
class Scene:
    """What a scene has found: a table, the sentences under it, and how to draw it."""

    title: str
    setting: str
    sentence: str  # computed from the rows
    x_label: str
    y_label: str
    columns: list[str]
    rows: dict[str, Tensor]  # (draws, columns) each
    lines: dict[str, Tensor] | None = None  # (draws, steps + 1) each, drawn in place of the rows
    floor: float = 0.0  # of a logarithmic y axis; 0 makes the axis linear
    no_adapter: float = 1.0  # what BA = 0 gives, in every column


# ---------------------------------------------------------------------------- what scenes share


def random_moments(draws: int, n: int, condition: float) -> Tensor:
    """Random Z = E[x xᵀ] (draws, n, n), mean(diag Z) = 1, eigenvalues falling geometrically."""
    Q = linalg.qr(torch.randn(draws, n, n)).Q  # (draws, n, n)
    spectrum = condition ** -torch.linspace(0, 1, n)  # (n,)
    return (Q * spectrum / spectrum.mean()) @ Q.mT


def stacked(factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Many pairs (B, A) as one B (…, out, r) and one A (…, r, in)."""
    all_B = torch.stack([B for B, _ in factors])
    all_A = torch.stack([A for _, A in factors])
    return all_B, all_A


def share_missing(delta: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """‖Δ − BA‖² / ‖Δ‖² of each draw: the share of the change that is missing."""
    return (linalg.matrix_norm(delta - B @ A) / linalg.matrix_norm(delta)).square()


def share_out_of_reach(delta: Tensor, A: Tensor) -> Tensor:
    """min_B ‖Δ − BA‖² / ‖Δ‖² of each draw: what the best B leaves missing at a frozen A."""
    best_B = delta @ linalg.pinv(A)  # (draws, out, r)
    return share_missing(delta, best_B, A)


def train(
    delta: Tensor,
    Z: Tensor,
    start_B: Tensor,
    start_A: Tensor,
    steps: int,
    *,
    lr: float = 0.02,
    train_A: bool = True,
) -> tuple[Tensor, Tensor]:
    """B and A (steps + 1, draws, …) after 0, 1, 2, … Adam steps.

    The loss is ½ E‖(Δ − BA)x‖² = ½ tr((Δ − BA) Z (Δ − BA)ᵀ), summed over the draws. Adam treats
    every number by itself, so that no draw sees another.
    """
    B = start_B.clone().requires_grad_()
    A = start_A.clone().requires_grad_(train_A)
    optimizer = torch.optim.Adam([B, A], lr)
    history = [(start_B, start_A)]
    for _ in range(steps):
        missing = delta - B @ A  # (draws, out, in)
        loss = (missing @ Z * missing).sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((B.detach().clone(), A.detach().clone()))
    return stacked(history)


def means(rows: dict[str, Tensor]) -> dict[str, list[float]]:
    """The means over the draws, a row of the table each."""
    return {name: row.mean(dim=0).tolist() for name, row in rows.items()}


def listed(items: list) -> str:
    """The items as in a sentence: "1, 2 and 3"."""
    words = [str(item) for item in items]
    return ", ".join(words[:-1]) + " and " + words[-1]


# ---------------------------------------------------------------------------- the four scenes


def new_task(fast: bool) -> Scene:
    """The labels changed: y = (W + Δ)x with rank Δ = r. Z = E[x xᵀ] is known exactly.

    The loss ½ E‖(W + BA)x − y‖² is −log p for noise of variance 1, so that G = −ΔZ at BA = 0, and
    Y = 1. Gradient SVD assumes that Z = I, and therefore takes −G = ΔZ for Δ.
    """
    n_out = 24
    n_in = 32
    r = 4
    high = 16
    draws = 2 if fast else 20
    preheat_steps = 20 if fast else 100
    stops = [0, 10, 30] if fast else [0, 50, 200]

    delta = torch.randn(draws, n_out, r) @ torch.randn(draws, r, n_in) / 8  # (draws, out, in)
    Z = random_moments(draws, n_in, condition=300.0)  # (draws, in, in)
    G = -delta @ Z  # (draws, out, in)
    Y = torch.ones(n_out)  # (out,)
    A_high = (2 * torch.rand(draws, high, n_in) - 1) / math.sqrt(n_in)  # as plain LoRA's A
    B_high = torch.zeros(draws, n_out, high)
    heated_B, _ = train(delta, Z, B_high, A_high, preheat_steps, train_A=False)

    def exact_lora_da(draw: int, moment: Tensor) -> tuple[Tensor, Tensor]:
        return lora_da(G[draw], moment, Y, r, n_train=1, variance=0, damping=0)

    starts = {
        "plain LoRA": (B_high[:, :, :r], A_high[:, :r]),
        "gradient SVD": stacked([exact_lora_da(d, torch.eye(n_in)) for d in range(draws)]),
        "LoRA-DA": stacked([exact_lora_da(d, Z[d]) for d in range(draws)]),
        "HRP": stacked([hrp(heated_B[-1, d], A_high[d], r) for d in range(draws)]),
    }
    lines = {}
    rows = {}
    for name, (B, A) in starts.items():
        trained_B, trained_A = train(delta, Z, B, A, stops[-1])
        lines[name] = share_missing(delta, trained_B, trained_A).mT  # (draws, steps + 1)
        frozen = share_out_of_reach(delta, A)  # (draws,)
        rows[name] = torch.cat([lines[name][:, stops], frozen[:, None]], dim=1)

    table = means(rows)
    drift = lines["LoRA-DA"].mean(dim=0).max()
    gradient = table["gradient SVD"]
    plain = table["plain LoRA"]
    more = "more" if gradient[0] > 1 else "less"
    better = "better" if gradient[-1] < plain[-1] else "worse"
    trained_order = listed(sorted(table, key=lambda name: table[name][-2]))
    frozen_order = listed(sorted(table, key=lambda name: table[name][-1]))
    return Scene(
        title="A new task",
        setting=(
            f"The labels changed and the inputs did not. The share of Δ (rank {r}) that is missing "
            "while Adam trains B and A, and the share that the best B leaves missing if the first "
            f"A is frozen. cond Z = 300, exact moments, means of {draws} draws. The "
            f"{preheat_steps} steps for which HRP has preheated are not counted."
        ),
        sentence=(
            f"LoRA-DA starts at the exact answer (it misses {table['LoRA-DA'][0]:.0e}), but Adam "
            f"drives it off until it misses {drift:.0e}, as Adam's steps do not shrink with the "
            f"gradient. Gradient SVD's full step misses {gradient[0]:.1f}, which is {more} than no "
            f"adapter misses, while its directions are {better} than random ones: with A frozen "
            f"they leave {gradient[-1]:.3g} out of reach, and plain LoRA's leave {plain[-1]:.3g}. "
            f"From the least missing to the most, the order after {stops[-1]} steps is "
            f"{trained_order}, and with A frozen it is {frozen_order}."
        ),
        x_label="Adam steps",
        y_label="share of Δ missing (clipped at 1e-6)",
        columns=[str(stop) for stop in stops] + ["A frozen"],
        rows=rows,
        lines=lines,
        floor=1e-6,
    )


def few_noisy_rows(fast: bool) -> Scene:
    """Bias against variance: y = Δx + ε, with noise ε of variance σ² and W = 0, in N rows.

    The rows give G = −Σ y xᵀ / (Nσ²) and Z = Σ x xᵀ / N, and Y = 1/σ² is known. A holds the lowest
    eigenvectors of Ω = variance·(1/N)·Σᵢ(1/Yᵢ)·Z⁻¹ − ΔᵀΔ. B is then fitted by least squares.
    """
    n_out = 8
    n_in = 24
    r = 4
    sigma = 0.5
    draws = 4 if fast else 60
    counts = [32, 100, 400, 1600]
    weights = [0, 1, 2, 10]

    errors = {weight: [] for weight in weights}
    for n in counts:
        delta = torch.randn(draws, n_out, r) @ torch.randn(draws, r, n_in) / 40  # (draws, out, in)
        white = torch.randn(draws, n, n_in)
        root = linalg.cholesky(random_moments(draws, n_in, condition=100.0))  # (draws, in, in)
        x = white @ root.mT  # (draws, n, in)
        y = x @ delta.mT + sigma * torch.randn(draws, n, n_out)  # (draws, n, out)
        G = -y.mT @ x / n / sigma**2  # (draws, out, in)
        Z = x.mT @ x / n  # (draws, in, in)
        Y = torch.full((n_out,), sigma**-2)  # (out,)
        for weight in weights:
            starts = [
                lora_da(G[d], Z[d], Y, r, n, variance=weight, damping=1e-3) for d in range(draws)
            ]
            _, A = stacked(starts)  # (draws, r, in)
            B = linalg.lstsq(x @ A.mT, y).solution.mT  # (draws, out, r)
            errors[weight].append(share_missing(delta, B, A))
    rows = {f"variance × {weight}": torch.stack(errors[weight], dim=1) for weight in weights}

    table = torch.tensor(list(means(rows).values()))  # (weights, counts)
    ratios = [f"{ratio:.0%}" for ratio in table[1] / table[0]]
    losses = int((table[1] > 1).sum())
    best = [weights[i] for i in table.argmin(dim=0)]
    return Scene(
        title="Few, noisy rows",
        setting=(
            "Bias against variance: the error of LoRA-DA's A by the weight of its variance term, "
            "where B is fitted to the N rows by least squares, as the paper fits it. "
            f"Rank Δ = {r}, noise σ = {sigma}, means of {draws} draws."
        ),
        sentence=(
            f"With N = {listed(counts)} rows, the theory's weight 1 makes {listed(ratios)} of the "
            f"error that weight 0 makes. In {losses} of these {len(counts)} cases it still errs "
            f"more than no adapter. The best weights are {listed(best)}. More than 1 can pay "
            "because weight 1 assumes that Δ is known exactly."
        ),
        x_label="rows N",
        y_label="error ‖BA − Δ‖² / ‖Δ‖²",
        columns=[str(n) for n in counts],
        rows=rows,
        floor=0.1,
    )


def how_hot_to_preheat(fast: bool) -> Scene:
    """HRP by its rank R and its steps, where Δ is of rank r plus noise and Z = I.

    At a frozen A the best B leaves min_B ‖Δ − BA‖². No A leaves less than the top r right singular
    vectors of Δ (Eckart–Young). What they leave is the unit here.
    """
    n_out = 20
    n_in = 16
    r = 2
    highs = [2, 4, 8, 16]
    draws = 2 if fast else 20
    stops = [5, 20] if fast else [5, 20, 80, 320]

    signal = torch.randn(draws, n_out, r) @ torch.randn(draws, r, n_in)  # (draws, out, in)
    delta = signal + 0.5 * torch.randn(draws, n_out, n_in)  # (draws, out, in)
    best_A = linalg.svd(delta).Vh[:, :r]  # (draws, r, in)
    optimum = share_out_of_reach(delta, best_A).mean().item()
    random_A = torch.randn(draws, n_in, n_in) / math.sqrt(n_in)  # (draws, in, in)
    Z = torch.eye(n_in)  # (in, in)

    residuals = {steps: [] for steps in stops}
    for high in highs:
        A_high = random_A[:, :high]  # (draws, R, in)
        B_high = torch.zeros(draws, n_out, high)
        heated_B, _ = train(delta, Z, B_high, A_high, stops[-1], lr=0.1, train_A=False)
        for steps in stops:
            starts = [hrp(heated_B[steps, d], A_high[d], r) for d in range(draws)]
            _, A = stacked(starts)  # (draws, r, in)
            residuals[steps].append(share_out_of_reach(delta, A) / optimum)
    rows = {f"{steps} steps": torch.stack(residuals[steps], dim=1) for steps in stops}

    table = means(rows)
    first = table[f"{stops[0]} steps"]
    last = table[f"{stops[-1]} steps"]
    falls = "falls" if last == sorted(last, reverse=True) else "does not always fall"
    return Scene(
        title="How hot to preheat",
        setting=(
            "HRP by the rank R and the steps of its preheating: what the best B leaves missing at "
            f"HRP's A, where 1 is what the best rank {r} leaves. Δ is of rank {r} plus noise, "
            f"Z = I, means of {draws} draws."
        ),
        sentence=(
            f"After {stops[-1]} steps the residual {falls} as R grows, and goes from "
            f"{last[0]:.1f} to {last[-1]:.1f} times the optimum. The steps after the first "
            f"{stops[0]} divide it by {first[-1] / last[-1]:.1f} at R = {highs[-1]}, but by "
            f"{first[0] / last[0]:.1f} at R = {highs[0]}, where A cannot leave the row space of "
            "its random start."
        ),
        x_label="preheating rank R",
        y_label=f"residual, where 1 is the best rank {r}",
        columns=[str(high) for high in highs],
        rows=rows,
        no_adapter=1 / optimum,
    )


def new_domain(fast: bool) -> Scene:
    """The inputs changed: x_f = S x_p with S = Sᵀ ≻ 0. The function did not; no label is needed.

    ΔW = W(S⁻¹ − I) undoes the shift. With Z_f = S Z_p S = L Lᵀ, the error that BA leaves is
    E‖(W + BA)x_f − W x_p‖² = ‖(ΔW − BA)L‖².
    """
    n_out = 24
    n_in = 32
    shift_rank = 4
    ranks = [1, 2, 3, 4, 8, 16]
    draws = 2 if fast else 20

    W = torch.randn(draws, n_out, n_in)
    Q = linalg.qr(torch.randn(draws, n_in, shift_rank)).Q  # (draws, in, 4)
    identity = torch.eye(n_in).expand(draws, n_in, n_in)
    S = identity + (Q * torch.tensor([4.0, 3.0, 2.0, 1.0])) @ Q.mT  # (draws, in, in)
    Z = random_moments(draws, n_in, condition=30.0)  # (draws, in, in)
    delta = W @ linalg.inv(S) - W  # (draws, out, in)

    def errors(Z_p: Tensor, given: Tensor | list[None]) -> Tensor:
        """The error of every draw (draws, ranks), where CNTLoRA is given its Z_p or None."""
        Z_f = S @ Z_p @ S  # (draws, in, in)
        L = linalg.cholesky(Z_f)  # (draws, in, in)
        by_rank = []
        for r in ranks:
            starts = [cntlora(W[d], Z_f[d], given[d], rank=r, damping=0) for d in range(draws)]
            B, A = stacked(starts)
            by_rank.append(share_missing(delta @ L, B, A @ L))
        return torch.stack(by_rank, dim=1)

    unknown = [None] * draws
    rows = {
        "Z_p known": errors(Z, given=Z),
        "Z_p wrongly assumed white": errors(Z, given=unknown),
        "Z_p rightly assumed white": errors(identity, given=unknown),
    }

    table = means(rows)
    known = table["Z_p known"][ranks.index(shift_rank)]

    def best(line: list[float]) -> str:
        rank = ranks[line.index(min(line))]
        return f"{rank}, which leaves {min(line):.0%} (rank {ranks[-1]} leaves {line[-1]:.0%})"

    return Scene(
        title="A new domain",
        setting=(
            "The inputs changed and the function did not. E‖(W + BA)x_f − W x_p‖² of CNTLoRA, "
            f"where 1 is no adapter, x_f = S x_p and S − I has rank {shift_rank}. No labels, exact "
            f"moments, means of {draws} draws."
        ),
        sentence=(
            f"With Z_p known, rank {shift_rank}, which is that of S − I, undoes the shift: it "
            f"leaves {known:.0e}. With Z_p assumed white, rank hurts beyond the best one. Where "
            f"x_p is not white, the best rank is {best(table['Z_p wrongly assumed white'])}; "
            "where it is white and only its size is unknown, the best rank is "
            f"{best(table['Z_p rightly assumed white'])}."
        ),
        x_label="rank r",
        y_label="error, relative to no adapter",
        columns=[str(r) for r in ranks],
        rows=rows,
    )


SCENES = {1: new_task, 2: few_noisy_rows, 3: how_hot_to_preheat, 4: new_domain}

# ---------------------------------------------------------------------------- printing, plotting


def print_scene(number: int, scene: Scene) -> None:
    """The setting, the table of means, and the sentences."""
    table = means(scene.rows)
    table["no adapter"] = [scene.no_adapter] * len(scene.columns)
    print(f"\n{number}. {scene.title}")
    print(textwrap.fill(scene.setting, width=96))
    print(f"\n{scene.x_label:<27}" + "".join(f"{column:>11}" for column in scene.columns))
    for name, row in table.items():
        print(f"{name:<27}" + "".join(f"{mean:11.3g}" for mean in row))
    print("\n" + textwrap.fill(scene.sentence, width=96), flush=True)


def plot_scenes(scenes: dict[int, Scene], file: str) -> None:
    """One panel a scene, with the legends below the panels."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "demo_toy"  # equal numbers give equal files
    side = 1 if len(scenes) == 1 else 2
    figure = Figure(figsize=(4.2 * side, 4 * side), layout="constrained")
    panels = figure.subplots(side, side, squeeze=False).flat
    for panel, (number, scene) in zip(panels, scenes.items(), strict=True):
        plot_scene(panel, scene)
        panel.set_title(f"{number}. {scene.title}")
    figure.supxlabel("bars: ± 2 standard errors of the mean over the draws", fontsize="small")
    metadata = {"Date": None} if file.endswith(".svg") else None
    figure.savefig(file, metadata=metadata)


def plot_scene(panel: Any, scene: Scene) -> None:
    """The curves of a scene, with five bars each at most, and the line of no adapter."""
    for name, values in (scene.lines or scene.rows).items():
        draws, points = values.shape
        panel.errorbar(
            range(points),
            values.mean(dim=0).clamp(min=scene.floor),
            yerr=2 * values.std(dim=0) / math.sqrt(draws),
            errorevery=max(1, points // 4),
            marker=None if scene.lines else ".",
            color=COLORS.get(name),
            label=name,
        )
    panel.axhline(scene.no_adapter, color="gray", linestyle="--", label="no adapter")
    if not scene.lines:
        panel.set_xticks(range(len(scene.columns)), scene.columns)
    panel.set_yscale("log" if scene.floor else "linear")
    panel.set_ylim(bottom=scene.floor)
    panel.set_xlabel(scene.x_label)
    panel.set_ylabel(scene.y_label)
    panel.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=2, frameon=False)


# ---------------------------------------------------------------------------- time by width


def plain_lora_da(G: Tensor, Z: Tensor, Y: Tensor, r: int, n_train: int) -> Tensor:
    """B from Z⁻¹, Δ and Ω, formed as the formulas say, and all eigenvectors of Ω."""
    damping = 0.1 * Z.diagonal().mean()
    Z_inverse = linalg.inv(Z + damping * torch.eye(len(Z)))  # (in, in)
    delta = -G / Y[:, None] @ Z_inverse  # (out, in)
    omega = (1 / Y).sum() / n_train * Z_inverse - delta.mT @ delta  # (in, in)
    return delta @ linalg.eigh(omega).eigenvectors[:, :r]  # (out, r)


def plain_cntlora(W: Tensor, Z_f: Tensor, Z_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of ΔW Z_f^½ by the textbook's map T = Z_f^−½ (Z_f^½ Z_p Z_f^½)^½ Z_f^−½."""
    F = square_root(Z_f)  # (in, in)
    middle = square_root(F @ Z_p @ F)  # (in, in)
    T = linalg.solve(F, linalg.solve(F, middle).mT)  # (in, in)
    return linalg.svd((W @ T - W) @ F)


def square_root(C: Tensor) -> Tensor:
    values, V = linalg.eigh(C)
    return (V * values.sqrt()) @ V.mT


def print_time(width: int, r: int = 8, high: int = 128, n_train: int = 10**6) -> None:
    """The seconds of each function, and how many times as long the plain way takes."""
    moments = random_moments(2, width, condition=100.0)
    Z_f = moments[0]  # (width, width)
    Z_p = moments[1]  # (width, width)
    W = torch.randn(width, width)
    B_high = torch.randn(width, high)
    A_high = torch.randn(high, width) / width
    G = B_high @ A_high  # (width, width)
    Y = torch.ones(width)
    calls = {
        "lora_da": lambda: lora_da(G, Z_f, Y, r, n_train),
        "plain lora_da": lambda: plain_lora_da(G, Z_f, Y, r, n_train),
        "hrp": lambda: hrp(B_high, A_high, r),
        "plain hrp": lambda: linalg.svd(B_high @ A_high),
        "cntlora": lambda: cntlora(W, Z_f, Z_p, rank=r),
        "plain cntlora": lambda: plain_cntlora(W, Z_f, Z_p),
    }
    best = dict.fromkeys(calls, math.inf)
    for _ in range(3 if width < 2048 else 1):  # in turn, so that all meet the same noise
        for name, call in calls.items():
            best[name] = min(best[name], timeit.timeit(call, number=1))
    print(f"{width:5}", end="")
    for name in ("lora_da", "hrp", "cntlora"):
        print(f"{best[name]:10.3f}{best['plain ' + name] / best[name]:8.1f} ×", end="")
    print(flush=True)


def print_scale(fast: bool) -> None:
    print(
        "Seconds in float32 with r = 8 and R = 128, and how many times as long the plain way\n"
        "takes, which forms every matrix and finds all eigenvectors or singular vectors. Up to\n"
        "width 1024 both do the same work in lora_da; beyond, ours is Davidson's method.\n\n"
        "width             lora_da                 hrp             cntlora"
    )
    for width in [128, 256] if fast else [256, 512, 1024, 2048]:
        print_time(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scene", type=int, choices=SCENES, help="only this scene")
    parser.add_argument("--seed", type=int, default=0, help="the seed of everything random")
    parser.add_argument("--plot", metavar="FILE", help="draw to a .png or .svg (needs matplotlib)")
    parser.add_argument("--scale", action="store_true", help="instead: seconds by width")
    parser.add_argument("--fast", action="store_true", help="a smoke test: less of everything")
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")

    torch.set_num_threads(1)  # two threads that share their cores with others wait for each other
    print(f"torch {torch.__version__}, one thread, seed {args.seed}")
    if args.scale:
        torch.manual_seed(args.seed)
        print_scale(args.fast)
        return
    torch.set_default_dtype(torch.float64)
    scenes = {}
    for number in [args.scene] if args.scene else SCENES:
        torch.manual_seed(args.seed)  # a scene gives the same numbers alone
        scenes[number] = SCENES[number](args.fast)
        print_scene(number, scenes[number])
    if args.plot:
        plot_scenes(scenes, args.plot)


if __name__ == "__main__":
    main()
