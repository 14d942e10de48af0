# SPDX-License-Identifier: MIT
"""Four scenes of linear regression: which LoRA start wins where, seen against the exact answer.

The model is y = W x with a frozen W; fine-tuning has to find W* = W + Δ by a change B A. Numbers
are means over random draws, and the sentence under each table is computed from them.
"""

import argparse
import textwrap
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, linalg

from lora_init import cntlora, hrp, lora_da


def each(algorithm: Callable, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """B (draws, out, r) and A (draws, r, in): the algorithm on each draw's own tensors."""
    B, A = zip(*map(algorithm, *tensors))
    return torch.stack(B), torch.stack(A)


def gap(change: Tensor, B: Tensor, A: Tensor) -> float:
    """‖Δ − BA‖² / ‖Δ‖², the share of the change that is missing; mean over draws."""
    return (linalg.matrix_norm(change - B @ A) / linalg.matrix_norm(change)).square().mean().item()


def reach(change: Tensor, A: Tensor) -> float:
    """The same for the best B at this A: what is out of reach while A is frozen."""
    return gap(change, change @ linalg.pinv(A), A)


def moments(draws: int, n: int, condition: float) -> Tensor:
    """Random Z = E[x xᵀ] (draws, n, n), mean(diag Z) = 1, eigenvalues falling geometrically."""
    Q, values = linalg.qr(torch.randn(draws, n, n)).Q, condition ** -torch.linspace(0, 1, n)
    return (Q * values / values.mean()) @ Q.mT


def descend(change: Tensor, Z: Tensor, B: Tensor, A: Tensor, steps: int, *, lr: float = 0.02,
            train_A: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, A) at first and after each Adam step on ½ E‖(W + BA − W*) x‖², all draws at once."""
    B, A = B.clone().requires_grad_(), A.clone().requires_grad_(train_A)
    optimizer = torch.optim.Adam([B, A], lr)
    for _ in range(steps + 1):
        yield B.detach().clone(), A.detach().clone()
        missing = change - B @ A  # (draws, out, in)
        optimizer.zero_grad()
        ((missing @ Z * missing).sum() / 2).backward()  # E‖M x‖² = tr(M Z Mᵀ)
        optimizer.step()


def new_task(fast: bool) -> tuple:
    """A new task: the labels changed, the inputs did not."""
    n_out, n_in, r, high = 24, 32, 4, 16
    draws, preheat, stops = (2, 20, [0, 10, 30]) if fast else (20, 100, [0, 50, 200])
    change = torch.randn(draws, n_out, r) @ torch.randn(draws, r, n_in) / 8  # Δ (draws, out, in)
    Z, B_high = moments(draws, n_in, 300.0), torch.zeros(draws, n_out, high)
    A_high = (2 * torch.rand(draws, high, n_in) - 1) / n_in**0.5  # as plain LoRA's A
    *_, heated = descend(change, Z, B_high, A_high, preheat, train_A=False)
    exact = partial(lora_da, output_fisher=torch.ones(n_out), rank=r, n_train=1, variance=0,
                    damping=0)  # Y = 1/σ² = 1; the gradient is −ΔZ
    starts = {"plain LoRA": (B_high[..., :r], A_high[:, :r]),
              "gradient SVD": each(exact, -change @ Z, torch.eye(n_in).expand_as(Z)),
              "LoRA-DA": each(exact, -change @ Z, Z), "HRP": each(partial(hrp, rank=r), *heated)}
    lines = {name: [gap(change, *factors) for factors in descend(change, Z, *start, stops[-1])]
             for name, start in starts.items()}
    rows = {name: [*(lines[name][stop] for stop in stops), reach(change, A)]
            for name, (_, A) in starts.items()}
    last, frozen = (", ".join(sorted(rows, key=lambda name: rows[name][i])) for i in (-2, -1))
    return (
        (f"Share of Δ (rank {r}) missing as Adam trains B and A, and for the best B at the first "
         f"A; cond Z = 300, exact moments; HRP preheats for {preheat} steps before."),
        (f"LoRA-DA misses {rows['LoRA-DA'][0]:.0e} at first and up to {max(lines['LoRA-DA']):.0e} "
         "later, as Adam's steps do not shrink with the gradient; from least to most missing: "
         f"after {stops[-1]} steps {last}; with A frozen {frozen}."),
        ("Adam steps", "share of Δ missing (≥ 1e-6)", 1e-6), [*stops, "A frozen"], rows, lines)


def few_noisy_rows(fast: bool) -> tuple:
    """Few, noisy rows: bias against variance."""
    n_out, n_in, r, sigma, draws = 8, 24, 4, 0.5, 4 if fast else 60
    counts, rows = [32, 100, 400, 1600], {weight: [] for weight in (0, 1, 2, 10)}
    for n in counts:
        change = torch.randn(draws, n_out, r) @ torch.randn(draws, r, n_in) / 40  # W = 0
        x = torch.randn(draws, n, n_in) @ linalg.cholesky(moments(draws, n_in, 100.0)).mT
        y = x @ change.mT + sigma * torch.randn(draws, n, n_out)  # x (draws, n, in), y (…, out)
        G, Z, Y = -y.mT @ x / n / sigma**2, x.mT @ x / n, torch.full((n_out,), sigma**-2)
        start = partial(lora_da, output_fisher=Y, rank=r, n_train=n, damping=1e-3)
        for weight, errors in rows.items():
            _, A = each(partial(start, variance=weight), G, Z)
            B = linalg.lstsq(x @ A.mT, y).solution.mT  # the fit with A frozen
            errors.append(gap(change, B, A))
    ratios = ", ".join(f"{on / off:.0%}" for off, on in zip(rows[0], rows[1]))
    helps = next((n for n, error in zip(counts, rows[1]) if error < 1), "∞")
    best = ", ".join(str(min(rows, key=lambda w: rows[w][i])) for i in range(len(counts)))
    return (
        ("Error of LoRA-DA's A, by the weight of its variance term, with B fitted to N rows by "
         f"least squares; rank Δ = {r}, noise σ = {sigma}; no adapter: 1."),
        (f"From left to right the theory's weight 1 makes {ratios} of the error that 0 makes; this "
         f"beats no adapter from N = {helps} on. The best weight is {best} (more than 1 can pay: "
         "`lora_da`'s docstring)."),
        ("rows N", "error ‖BA − Δ‖² / ‖Δ‖²", 0.1), counts,
        {f"variance × {weight}": errors for weight, errors in rows.items()})


def how_hot_to_preheat(fast: bool) -> tuple:
    """How hot to preheat: HRP's rank and steps."""
    n_out, n_in, r, highs = 20, 16, 2, [2, 4, 8, 16]
    draws, stops = (2, [5, 20]) if fast else (20, [5, 20, 80, 320])
    change = torch.randn(draws, n_out, r) @ torch.randn(draws, r, n_in)
    change += 0.5 * torch.randn(draws, n_out, n_in)  # Δ (draws, out, in)
    optimum = reach(change, linalg.svd(change).Vh[:, :r])  # Eckart–Young
    A_high, rows = torch.randn(draws, n_in, n_in) / n_in**0.5, {steps: [] for steps in stops}
    for high in highs:
        heated = list(descend(change, torch.eye(n_in), torch.zeros(draws, n_out, high),
                              A_high[:, :high], stops[-1], lr=0.1, train_A=False))
        for steps, residuals in rows.items():
            residuals.append(reach(change, each(partial(hrp, rank=r), *heated[steps])[1]) / optimum)
    first, last = rows[stops[0]], rows[stops[-1]]
    falls = "falls" if last == sorted(last, reverse=True) else "does not always fall"
    return (
        f"Residual of the best B at HRP's A, over the best rank {r}'s; Δ: rank {r} + noise; Z = I.",
        (f"After {stops[-1]} steps the residual {falls} as R grows, from {last[0]:.1f} to "
         f"{last[-1]:.1f} times the optimum; steps after the first {stops[0]} divide it by "
         f"{first[-1] / last[-1]:.1f} at R = {n_in} and by {first[0] / last[0]:.1f} at R = {r}, "
         "where A cannot leave its random row space."),
        ("preheating rank R", "residual / optimum", 0), highs,
        {f"{steps} steps": residuals for steps, residuals in rows.items()})


def new_domain(fast: bool) -> tuple:
    """A new domain: the inputs changed, the function did not; no labels."""
    n_out, n_in, ranks, draws = 24, 32, [1, 2, 4, 8, 16], 2 if fast else 20
    W, Q = torch.randn(draws, n_out, n_in), linalg.qr(torch.randn(draws, n_in, 4)).Q
    Z, white, rows = moments(draws, n_in, 30.0), torch.eye(n_in), {}
    S = white + (Q * torch.tensor([4.0, 3.0, 2.0, 1.0])) @ Q.mT  # x_f = S x_p
    for name, Z_p, given in (("Z_p known", Z, [Z]), ("Z_p ∝ I, wrong", Z, []),
                             ("Z_p ∝ I, right", white, [])):
        Z_f, rows[name] = S @ Z_p @ S, []
        L = linalg.cholesky(Z_f)  # E‖M x_f‖² = ‖M L‖²
        for r in ranks:
            B, A = each(partial(cntlora, rank=r, damping=0), W, Z_f, *given)
            rows[name].append(gap((W @ linalg.inv(S) - W) @ L, B, A @ L))
    known, wrong, right = rows.values()
    return (
        "E‖(W + BA) x_f − W x_p‖² of CNTLoRA where x_f = S x_p, S − I of rank 4; no adapter: 1.",
        (f"With Z_p known rank 4, that of S − I, leaves {known[2]:.0e}; with Z_p ∝ I assumed the "
         f"best rank leaves {min(right):.0%} where x_p is white (its size stays unknown), "
         f"{min(wrong):.0%} where not."),
        ("rank r", "error, no adapter: 1", 0), ranks, rows)


def show(title: str, panel: Any, setting: str, sentence: str, axes: tuple[str, str, float],
         columns: list, rows: dict[str, list], lines: dict[str, list] | None = None) -> None:
    """Print the table; draw its rows, or `lines` over 0, 1, 2, …, on the panel, if there is one."""
    fill = partial(textwrap.fill, width=96, initial_indent="   ", subsequent_indent="   ")
    print(f"\n{title}\n{fill(setting)}\n")
    x_label, y_label, bottom = axes  # a y axis from 0 is linear, others are logarithmic
    for name, row in {x_label: columns, **rows}.items():
        cells = (f"{cell:12.3g}" if isinstance(cell, float) else f"{cell:>12}" for cell in row)
        print(f"   {name:<18}" + "".join(cells))
    print("\n" + fill(sentence))
    if panel:
        for name, line in (lines or rows).items():
            x, style = (range(len(line)), "-") if lines else (columns, "o-")
            panel.plot(x, [max(value, bottom) for value in line], style, label=name)
        panel.set(title=title.split(":")[0], xlabel=x_label, ylabel=y_label,
                  yscale="log" if bottom else "linear", ylim=(bottom, None))
        if not lines:
            panel.set(xscale="log", xticks=columns, xticklabels=columns)
            panel.set_xticks([], minor=True)
        panel.legend()


def plain_lora_da(G: Tensor, Z: Tensor, Y: Tensor, r: int, n_train: int) -> Tensor:
    """Z⁻¹, Δ and Ω formed as `lora_da` writes them, and all eigenvectors found."""
    inverse = linalg.inv(Z + 0.1 * Z.diagonal().mean() * torch.eye(len(Z)))
    delta = -G / Y[:, None] @ inverse  # (out, in)
    omega = (1 / Y).sum() / n_train * inverse - delta.mT @ delta  # (in, in)
    return delta @ linalg.eigh(omega).eigenvectors[:, :r]


def plain_cntlora(W: Tensor, Z_f: Tensor, Z_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook's map, T = Z_f^−½ (Z_f^½ Z_p Z_f^½)^½ Z_f^−½, and the SVD of ΔW Z_f^½."""
    def root(C: Tensor) -> Tensor:
        values, V = linalg.eigh(C)
        return (V * values.sqrt()) @ V.mT
    F = root(Z_f)  # (in, in)
    T = linalg.solve(F, linalg.solve(F, root(F @ Z_p @ F)).mT)
    return linalg.svd((W @ T - W) @ F)


def scale(fast: bool) -> None:
    torch.set_num_threads(1)  # two that share their cores with others wait for each other
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, float32, r = 8, R = 128; "
          f"seconds; ×: plain way / ours\n\nwidth{'lora_da':>18}{'hrp':>18}{'cntlora':>18}")
    for n in (128, 256) if fast else (256, 512, 1024, 2048):
        (Z_f, Z_p), W = moments(2, n, 100.0), torch.randn(n, n)
        B, A = torch.randn(n, 128), torch.randn(128, n) / n
        task = B @ A, Z_f, torch.ones(n), 8, 10**6  # G, Z, Y, r, N
        calls = [partial(lora_da, *task), partial(plain_lora_da, *task),
                 partial(hrp, B, A, 8), partial(lambda B, A: linalg.svd(B @ A), B, A),
                 partial(cntlora, W, Z_f, Z_p, rank=8), partial(plain_cntlora, W, Z_f, Z_p)]
        rounds = [[timeit.timeit(call, number=1) for call in calls]  # in turn: the same noise
                  for _ in range(3 if n < 2048 else 1)]
        best = list(map(min, zip(*rounds)))
        print(f"{n:5}" + "".join(f"{ours:10.3f}{plain / ours:7.1f}×"
                                 for ours, plain in zip(best[::2], best[1::2])), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--scene", type=int, choices=(1, 2, 3, 4), help="only this scene")
    add("--seed", type=int, default=0, help="of everything random")
    add("--plot", help="draw the scenes to this file, .png or .svg (needs matplotlib)")
    add("--scale", action="store_true", help="instead: seconds by width, against the plain way")
    add("--fast", action="store_true", help="a smoke test: fewer draws, steps and widths")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float32 if args.scale else torch.float64)
    torch.manual_seed(args.seed)
    if args.scale:
        return scale(args.fast)
    panels = iter([None] * 4)
    if args.plot:
        import matplotlib.figure
        side = 1 if args.scene else 2
        matplotlib.rcParams["svg.hashsalt"] = "demo_toy"  # equal numbers, equal files
        figure = matplotlib.figure.Figure(figsize=(5.5 * side, 4 * side), layout="constrained")
        panels = figure.subplots(side, side, squeeze=False).flat
    scenes = dict(enumerate((new_task, few_noisy_rows, how_hot_to_preheat, new_domain), 1))
    for number in [args.scene] if args.scene else scenes:
        torch.manual_seed(args.seed)
        show(f"{number}. {scenes[number].__doc__}", next(panels), *scenes[number](args.fast))
    if args.plot:
        figure.savefig(args.plot, metadata={"Date": None} if args.plot.endswith(".svg") else None)


if __name__ == "__main__":
    main()
