# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""Four scenes of linear regression that show where each start of LoRA wins and where it loses.

The model is y = W x with a frozen W (out, in), and fine-tuning looks for W* = W + Δ by a change BA.
Here Δ is known, so that every start can be compared with the exact answer. The numbers are means
over random draws.
"""

import argparse
import importlib.util
import math
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, linalg

from lora_init import cntlora, hrp, lora_da

COLORS = {"gradient SVD": "C2", "LoRA-DA": "C3", "HRP": "C4"}  # the same in all figures
LOOKS = ["o-", "s--", "D-.", "v:"]


@dataclass
class Scene:
    """What a scene has found: a table, what it shows, and what its axes mean."""

    title: str
    setting: str
    lesson: str  # what the table shows
    x_label: str
    y_label: str
    columns: list[int | str]
    rows: dict[str, Tensor]  # (draws, columns) each
    curves: dict[str, Tensor] | None = None  # (draws, updates + 1) each, drawn instead of the rows
    floor: float = 0.0  # of a logarithmic y axis; 0 makes the axis linear
    color: str = "black"  # of the curves, if they are all of one start
    no_adapter: float = 1.0  # what BA = 0 gives, in every column


# ---------------------------------------------------------------------------- what scenes share


def random_moments(draws: int, n: int, condition: float) -> Tensor:
    """Random Z = E[x xᵀ] (draws, n, n), mean(diag Z) = 1, eigenvalues falling geometrically."""
    Q = linalg.qr(torch.randn(draws, n, n)).Q  # (draws, n, n)
    spectrum = condition ** -torch.linspace(0, 1, n)  # (n,)
    return (Q * spectrum / spectrum.mean()) @ Q.mT


def stacked(starts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Many pairs (B, A) as one B (…, out, r) and one A (…, r, in)."""
    all_B = torch.stack([B for B, _ in starts])
    all_A = torch.stack([A for _, A in starts])
    return all_B, all_A


def start_each(algorithm: Callable, *tensors: Tensor, **settings: float) -> tuple[Tensor, Tensor]:
    """B (draws, out, r) and A (draws, r, in): what the algorithm makes of each draw's tensors."""
    return stacked([algorithm(*of_draw, **settings) for of_draw in zip(*tensors, strict=True)])


def share_missing(delta: Tensor, BA: Tensor) -> Tensor:
    """‖Δ − BA‖² / ‖Δ‖² of each draw: the share of the change that is missing."""
    return (linalg.matrix_norm(delta - BA) / linalg.matrix_norm(delta)).square()


def share_out_of_reach(delta: Tensor, A: Tensor) -> Tensor:
    """min_B ‖Δ − BA‖² / ‖Δ‖² of each draw: what the best B leaves missing at a frozen A.

    The best BA is ΔP, where P = A⁺A projects onto A's row space. A's basis does not matter.
    """
    return share_missing(delta, delta @ linalg.pinv(A) @ A)


def train(
    delta: Tensor,
    Z: Tensor,
    start_B: Tensor,
    start_A: Tensor,
    updates: int,
    *,
    lr: float = 0.02,
    train_A: bool = True,
) -> tuple[Tensor, Tensor]:
    """B and A (updates + 1, draws, …) after 0, 1, 2, … updates of Adam.

    The loss is ½ E‖(Δ − BA)x‖² = ½ tr((Δ − BA) Z (Δ − BA)ᵀ), summed over the draws. Adam treats
    each entry by itself, so that no draw sees another.
    """
    B = start_B.clone().requires_grad_()
    A = start_A.clone().requires_grad_(train_A)
    optimizer = torch.optim.Adam([B, A], lr)
    history = [(start_B, start_A)]
    for _ in range(updates):
        missing = delta - B @ A  # (draws, out, in)
        loss = (missing @ Z * missing).sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((B.detach().clone(), A.detach().clone()))
    return stacked(history)


def means(rows: dict[str, Tensor]) -> dict[str, list[float]]:
    """The means over the draws, one row of the table each."""
    return {name: row.mean(dim=0).tolist() for name, row in rows.items()}


# ---------------------------------------------------------------------------- the four scenes


def new_task(draws: int) -> Scene:
    """The labels changed: y = (W + Δ)x with rank Δ = r. Z = E[x xᵀ] is known exactly.

    The loss ½ E‖(W + BA)x − y‖² is −log p of a model whose noise has the variance σ² = 1. So
    G = −ΔZ at BA = 0, and Y = 1 is this model's Fisher information 1/σ². Measuring Y = E[g²] would
    not do here: these labels have no noise, so that g² holds nothing but signal (`lora_da`,
    Guarantee). Gradient SVD assumes Z = I, and therefore takes −G = ΔZ for Δ.

    Adam moves all entries of A and B by about as much. So the curves depend not only on BA and on
    A's row space, but also on the basis in which a start returns them.
    """
    n_out = 24
    n_in = 32
    r = 4
    high = 16
    preheating = 100
    stops = [0, 50, 200]

    delta = torch.randn(draws, n_out, r) @ torch.randn(draws, r, n_in) / 8  # (draws, out, in)
    Z = random_moments(draws, n_in, condition=300.0)  # (draws, in, in)
    G = -delta @ Z  # (draws, out, in)
    Y = torch.ones(draws, n_out)
    A_high = (2 * torch.rand(draws, high, n_in) - 1) / math.sqrt(n_in)  # as plain LoRA's A
    B_high = torch.zeros(draws, n_out, high)
    heated_B, _ = train(delta, Z, B_high, A_high, preheating, train_A=False)

    white = torch.eye(n_in).expand(draws, n_in, n_in)
    exact = {"rank": r, "n_train": 1, "variance": 0, "damping": 0}  # nothing is estimated
    starts = {
        "plain LoRA": (B_high[:, :, :r], A_high[:, :r]),
        "gradient SVD": start_each(lora_da, G, white, Y, **exact),
        "LoRA-DA": start_each(lora_da, G, Z, Y, **exact),
        "HRP": start_each(hrp, heated_B[-1], A_high, rank=r),
    }
    curves = {}
    rows = {}
    for name, (B, A) in starts.items():
        trained_B, trained_A = train(delta, Z, B, A, stops[-1])
        curves[name] = share_missing(delta, trained_B @ trained_A).mT  # (draws, updates + 1)
        frozen = share_out_of_reach(delta, A)  # (draws,)
        rows[name] = torch.cat([curves[name][:, stops], frozen[:, None]], dim=1)

    return Scene(
        title="A new task",
        setting=(
            f"The labels changed and the inputs did not. The table shows the share of Δ (rank {r}) "
            "that is missing while Adam trains B and A, and the share that the best B leaves "
            f"missing if the first A is frozen. cond Z = 300, exact moments, means of {draws} "
            f"draws. HRP's {preheating} updates of preheating are not counted."
        ),
        lesson=(
            "LoRA-DA starts at the exact answer. Rounding leaves a tiny gradient, and Adam, which "
            "divides a gradient by its own size, magnifies it. Gradient SVD's full step is worse "
            "than no adapter, but its directions are better than random ones."
        ),
        x_label="Adam's updates",
        y_label="share of Δ missing",
        columns=[*stops, "A frozen"],
        rows=rows,
        curves=curves,
        floor=1e-6,
    )


def few_noisy_rows(draws: int) -> Scene:
    """Bias against variance: y = Δx + ε, with noise ε of variance σ² and W = 0, in N rows.

    The rows give G = −Σ y xᵀ / (Nσ²) and Z = Σ x xᵀ / N, and Y = 1/σ² is known; Z and Y are damped
    by 1e-3. A spans the lowest eigenvectors of Ω = variance·(1/N)·Σᵢ(1/Yᵢ)·Z⁻¹ − DᵀD. B is then
    fitted by least squares at this A: the estimate under "A frozen" in `lora_da`, not the one of
    its parts 1 to 3.
    """
    n_out = 8
    n_in = 24
    r = 4
    sigma = 0.5
    draws = 3 * draws  # as these vary more
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
        Y = torch.full((draws, n_out), sigma**-2)
        for weight in weights:
            settings = {"rank": r, "n_train": n, "variance": weight, "damping": 1e-3}
            _, A = start_each(lora_da, G, Z, Y, **settings)  # (draws, r, in)
            B = linalg.lstsq(x @ A.mT, y).solution.mT  # (draws, out, r)
            errors[weight].append(share_missing(delta, B @ A))
    rows = {f"variance × {weight}": torch.stack(errors[weight], dim=1) for weight in weights}

    return Scene(
        title="Few, noisy rows",
        setting=(
            "Bias against variance: the error of LoRA-DA's A by the weight of its variance term, "
            "with B fitted to the N rows by least squares, as in the paper. "
            f"Rank Δ = {r}, noise σ = {sigma}, means of {draws} draws."
        ),
        lesson=(
            "Weight 1 assumes that Δ is known. Here it is estimated from the same N rows, so "
            "theory says 2: `init_lora_da` does this by 1/N + 1/M with M = N. More can help, "
            "because A is chosen where the estimate scatters most."
        ),
        x_label="rows N",
        y_label="error ‖BA − Δ‖² / ‖Δ‖²",
        columns=counts,
        rows=rows,
        floor=0.1,
        color="C3",
    )


def how_hot_to_preheat(draws: int) -> Scene:
    """HRP by its rank R and its updates, if Δ is of rank r plus noise and Z = I.

    At a frozen A the best B leaves min_B ‖Δ − BA‖². No A leaves less than the top r right singular
    vectors of Δ (Eckart–Young). What they leave is the unit here. Preheating at R = in until it
    converges would reach it (`hrp`, part 3), which a limited number of updates does not.
    """
    n_out = 20
    n_in = 16
    r = 2
    highs = [2, 4, 8, 16]
    stops = [5, 20, 80, 320]

    signal = torch.randn(draws, n_out, r) @ torch.randn(draws, r, n_in)  # (draws, out, in)
    delta = signal + 0.5 * torch.randn(draws, n_out, n_in)  # (draws, out, in)
    best_A = linalg.svd(delta).Vh[:, :r]  # (draws, r, in)
    optimum = share_out_of_reach(delta, best_A).mean().item()
    random_A = torch.randn(draws, n_in, n_in) / math.sqrt(n_in)  # (draws, in, in)
    Z = torch.eye(n_in)  # (in, in)

    residuals = {updates: [] for updates in stops}
    for high in highs:
        A_high = random_A[:, :high]  # (draws, R, in)
        B_high = torch.zeros(draws, n_out, high)
        heated_B, _ = train(delta, Z, B_high, A_high, stops[-1], lr=0.1, train_A=False)
        for updates in stops:
            _, A = start_each(hrp, heated_B[updates], A_high, rank=r)  # (draws, r, in)
            residuals[updates].append(share_out_of_reach(delta, A) / optimum)
    rows = {f"{updates} updates": torch.stack(residuals[updates], dim=1) for updates in stops}

    return Scene(
        title="How hot to preheat",
        setting=(
            "HRP by the rank R and Adam's updates of its preheating: what the best B leaves "
            f"missing at HRP's A, where 1 is what the best rank {r} leaves. Δ is of rank {r} plus "
            f"noise, Z = I, means of {draws} draws."
        ),
        lesson=(
            f"A higher rank comes closer to the best A. At R = {highs[0]} more updates change "
            "nothing, as A cannot leave the row space of its random start."
        ),
        x_label="preheating rank R",
        y_label=f"residual (best rank {r}: 1)",
        columns=highs,
        rows=rows,
        color="C4",
        no_adapter=1 / optimum,
    )


def new_domain(draws: int) -> Scene:
    """The inputs changed, x_f = S x_p with S = Sᵀ ≻ 0, but the function did not: no label needed.

    S − I has rank 4, and ΔW = W(S⁻¹ − I) undoes the shift. With Z_f = S Z_p S = L Lᵀ, the error
    that BA leaves is E‖(W + BA)x_f − W x_p‖² = ‖(ΔW − BA)L‖².
    """
    n_out = 24
    n_in = 32
    shift_rank = 4
    ranks = [1, 2, 3, 4, 8, 16]

    W = torch.randn(draws, n_out, n_in)
    Q = linalg.qr(torch.randn(draws, n_in, shift_rank)).Q  # (draws, in, 4)
    identity = torch.eye(n_in).expand(draws, n_in, n_in)
    S = identity + (Q * torch.tensor([4.0, 3.0, 2.0, 1.0])) @ Q.mT  # (draws, in, in)
    Z = random_moments(draws, n_in, condition=30.0)  # (draws, in, in)
    delta = W @ linalg.inv(S) - W  # (draws, out, in)

    def errors(Z_p: Tensor, known: bool) -> Tensor:
        """The error of each draw (draws, ranks), with or without Z_p given to CNTLoRA."""
        Z_f = S @ Z_p @ S  # (draws, in, in)
        L = linalg.cholesky(Z_f)  # (draws, in, in)
        moments = [Z_f, Z_p] if known else [Z_f]
        by_rank = []
        for r in ranks:
            B, A = start_each(cntlora, W, *moments, rank=r, damping=0)
            by_rank.append(share_missing(delta @ L, B @ A @ L))
        return torch.stack(by_rank, dim=1)

    rows = {
        "Z_p known": errors(Z, known=True),
        "Z_p wrongly assumed white": errors(Z, known=False),
        "Z_p rightly assumed white": errors(identity, known=False),
    }

    return Scene(
        title="A new domain",
        setting=(
            "The inputs changed and the function did not. E‖(W + BA)x_f − W x_p‖² of CNTLoRA, "
            f"where 1 is no adapter, x_f = S x_p and S − I has rank {shift_rank}. No labels, exact "
            f"moments, means of {draws} draws."
        ),
        lesson=(
            f"With Z_p known, rank {shift_rank}, which is that of S − I, undoes the shift. If Z_p "
            "is assumed white, a high rank also changes inputs that never shifted."
        ),
        x_label="rank r",
        y_label="error (no adapter: 1)",
        columns=ranks,
        rows=rows,
        color="C0",
    )


SCENES = {1: new_task, 2: few_noisy_rows, 3: how_hot_to_preheat, 4: new_domain}


def print_scene(number: int, scene: Scene) -> None:
    """The setting, the table of means, and what it shows."""
    table = means(scene.rows)
    table["no adapter"] = [scene.no_adapter] * len(scene.columns)
    print(f"\n{number}. {scene.title}")
    print(textwrap.fill(scene.setting, width=96))
    print(f"\n{scene.x_label:<27}" + "".join(f"{column:>11}" for column in scene.columns))
    for name, row in table.items():
        print(f"{name:<27}" + "".join(f"{mean:11.3g}" for mean in row))
    print("\n" + textwrap.fill(scene.lesson, width=96), flush=True)


# ---------------------------------------------------------------------------- the figure


def plot_scenes(scenes: dict[int, Scene], file: str) -> None:
    """One panel per scene, with its legend below it."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["font.size"] = 12  # readable at half the size
    matplotlib.rcParams["svg.hashsalt"] = "demo_toy"  # in place of random names in the svg
    side = 1 if len(scenes) == 1 else 2
    figure = Figure(figsize=(3.4 * side, 5 * side), layout="constrained")
    panels = figure.subplots(side, side, squeeze=False).flat
    for panel, (number, scene) in zip(panels, scenes.items(), strict=True):
        plot_scene(panel, scene)
        panel.set_title(f"{number}. {scene.title}", fontsize=13)
    figure.supxlabel("bars: ± 2 standard errors of the mean over the draws", fontsize=12)
    figure.savefig(file, metadata={"Date": None}, dpi=200)  # equal numbers give equal files


def plot_scene(panel: Any, scene: Scene) -> None:
    """The curves of a scene, with about five markers each, and a line for no adapter."""
    curves = scene.curves or scene.rows
    for number, (name, values) in enumerate(curves.items()):
        draws, points = values.shape
        every = max(1, points // 4)
        marked = (number * every // 4, every)  # the first one, and the distance to the next
        panel.errorbar(
            range(points),
            values.mean(dim=0).clamp(min=scene.floor),
            yerr=2 * values.std(dim=0) / math.sqrt(draws),
            fmt=LOOKS[number],
            color=COLORS.get(name, scene.color),
            errorevery=marked,
            markevery=marked,
            label=name,
        )
    panel.axhline(scene.no_adapter, color="gray", label="no adapter")
    if scene.curves is None:
        panel.set_xticks(range(len(scene.columns)), scene.columns)
    panel.set_yscale("log" if scene.floor else "linear")
    panel.set_ylim(bottom=scene.floor)
    panel.set(xlabel=scene.x_label, ylabel=scene.y_label)
    panel.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), frameon=False, handlelength=3)


# ---------------------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scene", type=int, choices=SCENES, help="only this scene")
    parser.add_argument("--seed", type=int, default=0, help="the seed of everything random")
    parser.add_argument("--plot", metavar="FILE", help="draw the scenes to a .png or .svg")
    parser.add_argument("--fast", action="store_true", help="a smoke test with few draws")
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")

    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no such method
        sys.stdout.reconfigure(errors="replace")  # a file on Windows may not encode Δ
    torch.set_num_threads(1)  # two threads that share their cores with others wait for each other
    torch.set_default_dtype(torch.float64)
    print(f"torch {torch.__version__}, one thread, seed {args.seed}")
    draws = 2 if args.fast else 20
    scenes = {}
    for number in [args.scene] if args.scene else SCENES:
        torch.manual_seed(args.seed)  # so a scene run alone gives the same numbers
        scenes[number] = SCENES[number](draws)
        print_scene(number, scenes[number])
    if args.plot:
        plot_scenes(scenes, args.plot)


if __name__ == "__main__":
    main()
