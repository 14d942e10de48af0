# SPDX-License-Identifier: MIT
"""Four scenes of linear regression: which LoRA start wins where, seen against the exact answer.

The model is y = W x with a frozen W; fine-tuning has to find W* = W + Δ by a change s·B A. Because
everything is linear, the best answer is known and each claim of the papers can be looked at.
"""

import argparse
import importlib
import math
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lora_init import (
    LoRALinear,
    Statistics,
    add_lora,
    allocate_ranks,
    cntlora,
    collect_statistics,
    hrp,
    lora_da,
)

torch.set_default_dtype(torch.float64)


@dataclass
class Scene:
    """What a scene shows: a table, one row a method, and a sentence computed from it."""

    title: str
    setting: str
    columns: list[str]
    rows: dict[str, list[float]]
    sentence: str


def gap(change: Tensor, B: Tensor, A: Tensor) -> float:
    """Share of the change that is missing, ‖Δ − BA‖² / ‖Δ‖²."""
    return ((change - B @ A).square().sum() / change.square().sum()).item()


def reach(change: Tensor, A: Tensor) -> float:
    """The same for the best B at this A: what a fit with A frozen can never learn."""
    return gap(change, change @ torch.linalg.pinv(A), A)


def moment(n: int, condition: float) -> Tensor:
    """A random Z = E[x xᵀ] (n, n), mean(diag Z) = 1."""
    Q = torch.linalg.qr(torch.randn(n, n)).Q
    Z = (Q * torch.logspace(0, -1, n).pow(torch.tensor(condition).log10())) @ Q.mT
    return Z * n / Z.trace()


def descend(change: Tensor, Z: Tensor, B: Tensor, A: Tensor, steps: int, lr: float = 0.02,
            train_A: bool = True) -> tuple[Tensor, Tensor]:
    """Adam on the exact loss ½ E‖(W + BA − W*) x‖² = ½ tr((Δ − BA) Z (Δ − BA)ᵀ)."""
    B, A = B.clone().requires_grad_(), A.clone().requires_grad_(train_A)
    optimizer = torch.optim.Adam([B, A] if train_A else [B], lr)
    for _ in range(steps):
        missing = change - B @ A
        loss = (missing @ Z * missing).sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return B.detach(), A.detach()


def new_task() -> Scene:
    n_out, n_in, r = 24, 32, 4
    W, change = torch.randn(n_out, n_in), torch.randn(n_out, r) @ torch.randn(r, n_in) / 8
    Z = moment(n_in, 300.0)
    G, Y = -change @ Z, torch.ones(n_out)  # gradient and Fisher information, unit noise
    random = torch.empty(r, n_in).uniform_(-1, 1) / n_in**0.5
    high = torch.empty(4 * r, n_in).uniform_(-1, 1) / n_in**0.5
    starts = {
        "plain LoRA": (torch.zeros(n_out, r), random),
        "gradient SVD": lora_da(G, torch.eye(n_in), Y, r, 1, variance=0, damping=0),
        "LoRA-DA": lora_da(G, Z, Y, r, 1, variance=0, damping=0),
        "HRP": hrp(*descend(change, Z, torch.zeros(n_out, 4 * r), high, 100, train_A=False), r),
        "CNTLoRA": cntlora(W, Z, Z, rank=r),
    }
    rows = {}
    for name, (B, A) in starts.items():
        trained = [descend(change, Z, B, A, steps) for steps in (0, 50, 200)]
        rows[name] = [gap(change, *factors) for factors in trained] + [reach(change, A)]
    first = min(rows, key=lambda name: rows[name][2])
    return Scene("A new task: the labels changed, the inputs did not",
                 f"Δ ({n_out}, {n_in}) of rank {r}, cond Z = 300, exact moments; share of Δ "
                 "missing, at last for the best B",
                 ["start", "50 steps", "200 steps", "A frozen"], rows,
                 f"LoRA-DA starts with {rows['LoRA-DA'][0]:.0e} of the change missing. Out of "
                 f"reach for a frozen A are {rows['gradient SVD'][3]:.0%} from the raw gradient's "
                 f"directions, {rows['HRP'][3]:.0%} from HRP's, {rows['plain LoRA'][3]:.0%} from "
                 f"random ones and {rows['CNTLoRA'][3]:.0%} from CNTLoRA's, which saw no shift of "
                 f"inputs. With A trained, lowest after 200 steps: {first}.")


def few_noisy_rows() -> Scene:
    n_out, n_in, r, draws = 8, 24, 4, 60
    cases, weights = [(32, 0.5), (100, 0.5), (400, 0.5), (400, 0.1)], [0.0, 1.0, 2.0, 10.0]
    rows: dict[str, list[float]] = {f"variance × {w:g}": [] for w in weights}
    for n, sigma in cases:
        errors: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(draws):
            Z, change = moment(n_in, 100.0), torch.randn(n_out, r) @ torch.randn(r, n_in) / 40
            x = torch.randn(n, n_in) @ torch.linalg.cholesky(Z).mT  # (n, in)
            y = x @ change.mT + sigma * torch.randn(n, n_out)  # (n, out); W = 0
            G, Y = -(y.mT @ x) / n / sigma**2, torch.full((n_out,), sigma**-2)
            for name, w in zip(rows, weights):
                _, A = lora_da(G, x.mT @ x / n, Y, r, n, variance=w, damping=1e-3)
                B = torch.linalg.lstsq(x @ A.mT, y).solution.mT  # the fit, A frozen
                errors[name].append(gap(change, B, A))
        for name, error in errors.items():
            rows[name].append(statistics.fmean(error))
    off, on = rows["variance × 0"], rows["variance × 1"]
    return Scene("Few, noisy rows: bias against variance",
                 f"Δ ({n_out}, {n_in}) of rank {r}; LoRA-DA's A, then B fitted by least squares; "
                 f"‖BA − Δ‖²/‖Δ‖², mean of {draws} draws",
                 [f"N={n} σ={s}" for n, s in cases], rows,
                 f"With {cases[0][0]} noisy rows the variance term at its theoretical weight "
                 f"divides the error by {off[0] / on[0]:.1f}, with {cases[-1][0]} clean ones by "
                 f"{off[-1] / on[-1]:.2f}. Best weights, case by case: "
                 + ", ".join(f"{weights[column.index(min(column))]:g}"
                             for column in map(list, zip(*rows.values()))) + ".")


def how_hot_to_preheat() -> Scene:
    n_out, n_in, r, draws = 20, 16, 2, 10
    highs, lengths = [r, 2 * r, 4 * r, n_in], [5, 20, 80, 320]
    rows: dict[str, list[float]] = {}
    changes = [torch.randn(n_out, r) @ torch.randn(r, n_in) + 0.5 * torch.randn(n_out, n_in)
               for _ in range(draws)]
    for high in highs:
        ratios: dict[int, list[float]] = {steps: [] for steps in lengths}
        for change in changes:
            best = torch.linalg.svdvals(change)[r:].square().sum() / change.square().sum()
            A = torch.randn(high, n_in) / n_in**0.5
            for steps in lengths:
                B, _ = descend(change, torch.eye(n_in), torch.zeros(n_out, high), A, steps, lr=0.1,
                               train_A=False)
                ratios[steps].append(reach(change, hrp(B, A, r)[1]) / best.item())
        rows[f"R = {high}"] = [statistics.fmean(ratio) for ratio in ratios.values()]
    last = [row[-1] for row in rows.values()]
    falls = "falls" if last == sorted(last, reverse=True) else "does not always fall"
    return Scene("How hot to preheat: HRP's rank and steps",
                 f"Δ ({n_out}, {n_in}), rank {r} plus noise, Z = I; what A cannot reach, in units "
                 f"of the best rank {r} (Eckart–Young); mean of {draws} draws",
                 [f"{steps} steps" for steps in lengths], rows,
                 f"After {lengths[-1]} steps the residual is {', '.join(f'{v:.1f}' for v in last)} "
                 f"times the optimum for R = {', '.join(map(str, highs))}: it {falls} as R grows. "
                 f"At R = r, where preheating cannot leave A's random row space, steps change it "
                 f"from {rows[f'R = {r}'][0]:.1f} to {last[0]:.1f}.")


def new_domain() -> Scene:
    n_out, n_in, ranks = 24, 32, [1, 2, 4, 8, 16]
    W, Q = torch.randn(n_out, n_in), torch.linalg.qr(torch.randn(n_in, 4)).Q
    S = torch.eye(n_in) + (Q * torch.tensor([4.0, 3.0, 2.0, 1.0])) @ Q.mT  # x_f = S x_p
    rows: dict[str, list[float]] = {}
    for name, Z_p, known in (("moments known", moment(n_in, 30.0), True),
                             ("assumed, false", moment(n_in, 30.0), False),
                             ("assumed, true", torch.eye(n_in), False)):
        Z_f = S @ Z_p @ S
        target = W @ torch.linalg.inv(S)  # the same function, of the distorted inputs
        before = ((W - target) @ Z_f * (W - target)).sum()
        rows[name] = []
        for r in ranks:
            B, A = cntlora(W, Z_f, Z_p if known else None, rank=r, damping=0)
            missing = W + B @ A - target
            rows[name].append(((missing @ Z_f * missing).sum() / before).item())
    spectra = {}
    for name, strength in (("a", 8.0), ("b", 1.0), ("c", 0.1)):  # three layers, unequal shifts
        D = torch.eye(n_in) + strength * Q @ torch.diag(torch.rand(4) + 0.5) @ Q.mT
        B, _ = cntlora(torch.randn(n_out, n_in), D @ D, torch.eye(n_in), rank=n_out, damping=0)
        spectra[name] = B.norm(dim=0)  # singular values on the data
    spent = allocate_ranks(spectra, 9)
    left = {k: sum(s[r[n]:].square().sum().item() for n, s in spectra.items())
            for k, r in (("equal", dict.fromkeys(spectra, 3)), ("allocated", spent))}
    B, A = cntlora(W, moment(n_in, 30.0), rank=4)  # scene 1's shift: the labels moved, Z did not
    change = torch.randn(n_out, 4) @ torch.randn(4, n_in)
    return Scene("A new domain: the inputs changed, the function did not; no labels",
                 "x_f = S x_p, S − I of rank 4; E‖(W + BA) x_f − W x_p‖²; no adapter: 1",
                 [f"r = {r}" for r in ranks], rows,
                 "With pre-training moments rank 4 undoes the shift "
                 f"({rows['moments known'][2]:.0e} left). Assuming Z_p ∝ I instead leaves "
                 f"{rows['assumed, true'][2]:.0%} where that is so, as the size of x_p stays "
                 f"unknown, and {rows['assumed, false'][2]:.0%} where not. On three layers, ranks "
                 f"{tuple(spent.values())} leave {left['allocated'] / left['equal']:.1%} of what "
                 "(3, 3, 3) leave. On a shift of task it has nothing to say: "
                 f"{reach(change, A):.0%} of the change are out of its A's reach, and "
                 f"{1 - 4 / n_in:.0%} out of a random one's.")


SCENES: list[Callable[[], Scene]] = [new_task, few_noisy_rows, how_hot_to_preheat, new_domain]


def show(number: int, scene: Scene) -> None:
    """The table; before each row its picture, one block a column, full height = the largest."""
    top = max(max(row) for row in scene.rows.values())
    indent = {"width": 96, "initial_indent": "   ", "subsequent_indent": "   "}
    print(f"\n{number}. {scene.title}\n{textwrap.fill(scene.setting, **indent)}\n")
    print(" " * 24 + "".join(f"{column:>13}" for column in scene.columns))
    for name, row in scene.rows.items():
        picture = "".join("▁▂▃▄▅▆▇█"[round(7 * value / top)] for value in row)
        print(f"   {name:<14} {picture:<6}" + "".join(f"{value:13.3g}" for value in row))
    print("\n" + textwrap.fill(scene.sentence, **indent))


def plot(scenes: list[Scene], file: str) -> None:
    importlib.import_module("matplotlib").use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, len(scenes), figsize=(6 * len(scenes), 4),
                                     squeeze=False, layout="constrained")
    for panel, scene in zip(panels[0], scenes):
        for name, row in scene.rows.items():
            panel.plot(scene.columns, [max(value, 1e-6) for value in row], marker="o", label=name)
        panel.set(title=scene.title, yscale="log")
        panel.legend()
    figure.savefig(file, dpi=120)


# ------------------------------------------------------------------------------ costs


def seconds(*calls: Callable[[], object], repeat: int = 1) -> list[float]:
    """The shortest time of each call; they take turns, so that all meet the same noise."""
    best = [math.inf] * len(calls)
    for _ in range(repeat):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best


def plain_lora_da(G: Tensor, Z: Tensor, Y: Tensor, n_train: int) -> Tensor:
    """Steps 2 to 5 of `lora_da` as they are written: everything formed, all eigenvectors found."""
    inverse = torch.linalg.inv(Z + 0.1 * Z.diagonal().mean() * torch.eye(len(Z)))
    Y = Y + 0.1 * Y.mean()
    delta = -G / Y[:, None] @ inverse
    return torch.linalg.eigh((1 / Y).sum() / n_train * inverse - delta.mT @ delta).eigenvectors


def growth(n: int) -> None:
    """Seconds of each pure function at width n, and how many times longer the plain way takes."""
    x = torch.randn(2 * n, n) * torch.arange(1.0, n + 1).rsqrt()
    W, Z, Y = torch.randn(n, n), x.mT @ x / len(x), torch.ones(n)
    G = torch.randn(n, 64) @ torch.randn(64, n) @ Z  # a change of rank 64
    B, A = torch.randn(n, 128), torch.randn(128, n)
    product, *ours = seconds(
        partial(torch.mm, W, Z), partial(lora_da, G, Z, Y, 8, 10**6), partial(hrp, B, A, 8),
        partial(cntlora, W, Z, rank=8), repeat=3 if n < 4096 else 1)
    plain = seconds(partial(plain_lora_da, G, Z, Y, 10**6), lambda: torch.linalg.svd(B @ A))
    print(f"{n:5}{product:9.4f} s" + "".join(
        f"{mine:10.3f} s{theirs / mine:6.1f}×" for mine, theirs in zip(ours, plain))
        + f"{ours[2]:9.2f} s")


def spectrum(name: str, values: Tensor) -> None:
    """lora_da on Z with these eigenvalues and G = 0, so that Ω ∝ Z⁻¹ is the variance alone."""
    n = len(values)
    Q, G, Y = torch.linalg.qr(torch.randn(n, n)).Q, torch.zeros(n, n), torch.ones(n)
    Z = (Q * values) @ Q.mT
    mine, theirs = seconds(partial(lora_da, G, Z, Y, 8, 1), partial(plain_lora_da, G, Z, Y, 1),
                           repeat=3)
    _, A = lora_da(G, Z, Y, 8, 1)
    sine = torch.linalg.matrix_norm(A.mT - Q[:, :8] @ (Q[:, :8].mT @ A.mT), 2)
    inverse = 1 / (values + 0.1 * values.mean())  # the eigenvalues of Ω, but for a factor
    gap = (inverse[8] - inverse[7]) / inverse.max()
    print(f"{name:<22}{gap:8.0e}{theirs / mine:8.1f}×{sine:10.0e}")


class LlamaBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        q, k, v = (project(h).unflatten(2, (-1, 64)).transpose(1, 2)
                   for project in (self.q, self.k, self.v))  # (n, heads, t, 64)
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        h = self.norm_2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def breakdown(layers: int, vocabulary: int, repeat: int) -> None:
    """Where the time of `init_lora_da` goes on a model of Llama's shape."""
    width, sequences = 512, torch.randint(vocabulary, (64, 129))
    model = nn.Sequential(
        nn.Embedding(vocabulary, width), *(LlamaBlock(width) for _ in range(layers)),
        nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)).requires_grad_(False)
    batches, head = sequences.split(8), str(len(model) - 1)
    adapters = add_lora(model, 8, targets=lambda name: name != head)

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    @torch.no_grad()
    def forward() -> None:
        for tokens in batches:
            loss_fn(model, tokens)

    def backward() -> None:  # of activations: from the loss down to the first block's input
        for tokens in batches:
            loss_fn(lambda t: model[1:](model[0](t).requires_grad_()), tokens).backward()

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in adapters.values():
        layer.scaling = 0.0  # off, as while the statistics are taken
    total: dict[str, Statistics] = {}
    times = dict(zip(("forward", "both", "moments", "all"), seconds(
        forward, backward, lambda: collect_statistics(model, adapters, batches, loss_fn,
                                                      backward=False),
        lambda: total.update(collect_statistics(model, adapters, batches, loss_fn)),
        repeat=repeat)))
    factors, = seconds(lambda: [lora_da(t.gradient, t.input_moment, t.output_fisher, 8, t.count)
                                for t in total.values()])
    print(f"\nLlama's shape: {layers} blocks of width {width}, {vocabulary:,} tokens, 64 sequences "
          f"of 128;\n× is in forward and backward passes of activations, shortest of {repeat}")
    for name, value in (
            ("forward", times["forward"]), ("backward", times["both"] - times["forward"]),
            ("Z", times["moments"] - times["forward"]),
            ("G and Y", times["all"] - times["both"] - times["moments"] + times["forward"]),
            ("collect_statistics", times["all"]), (f"{len(adapters)} × lora_da", factors),
            ("guard, 2 passes", 2 * times["forward"])):
        print(f"{name:<20}{value:8.2f} s{value / times['both']:8.2f}×")


def layer(rows: int, n_in: int, n_out: int, rank: int, repeat: int) -> None:
    """LoRALinear, forward and backward, × its three products, and × PEFT's layer if installed."""
    x, g = torch.randn(rows, n_in, requires_grad=True), torch.randn(rows, n_out)
    A, B = (torch.randn(*shape, requires_grad=True) for shape in ((rank, n_in), (n_out, rank)))
    frozen = nn.Linear(n_in, n_out).requires_grad_(False)
    ours = LoRALinear(nn.Linear(n_in, n_out), rank)
    calls = [lambda: ours(x).backward(g), lambda: (
        frozen(x).backward(g), nn.functional.linear(x @ A.mT, B).backward(g))]
    if importlib.util.find_spec("peft"):
        peft = importlib.import_module("peft")
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
        theirs = peft.get_peft_model(nn.Sequential(nn.Linear(n_in, n_out)), config)
        calls.append(lambda: theirs(x).backward(g))
    mine, *others = seconds(*calls, repeat=repeat)
    print(f"{rows} rows, {n_in} → {n_out}, r = {rank}".ljust(32) + f"{1e3 * mine:7.1f} ms"
          + "".join(f"{mine / other:9.2f}×" for other in others))


def costs(fast: bool) -> None:
    torch.set_default_dtype(torch.float32)
    print("width   product           lora_da   plain      hrp, R = 128     SVD    cntlora")
    for n in [256, 512, 1024] if fast else [256, 512, 1024, 2048, 4096]:
        growth(n)
    n = 512 if fast else 2048
    print(f"\nΩ ∝ Z⁻¹ at width {n}, r = 8\neigenvalues of Z            gap   plain      sine")
    spectrum("8 strong, the rest 1", torch.cat([torch.linspace(1e3, 1e2, 8), torch.ones(n - 8)]))
    spectrum("1 / k", 1 / torch.arange(1.0, n + 1))
    spectrum("1 to 0.01, evenly", torch.linspace(1, 0.01, n))
    print("\nLoRALinear, forward, backward                 / 3 products   / PEFT's")
    for shape in ((512, 1024, 1024, 8), (4096, 512, 512, 16), (512, 1024, 4096, 64)):
        layer(*shape, repeat=3 if fast else 40)
    for vocabulary in [500] if fast else [32000, 500]:
        breakdown(1 if fast else 4, vocabulary, 1 if fast else 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scene", type=int, choices=(1, 2, 3, 4), help="only this one")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--plot", default="", help="draw to this file (needs matplotlib)")
    parser.add_argument("--scale", action="store_true", help="what all of it costs")
    parser.add_argument("--fast", action="store_true", help="a small --scale")
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    if args.scale:
        return costs(args.fast)
    scenes = []
    for number, scene in enumerate(SCENES, 1):
        if args.scene in (None, number):
            torch.manual_seed(args.seed)
            scenes.append(scene())
            show(number, scenes[-1])
    if args.plot:
        plot(scenes, args.plot)
    return None


if __name__ == "__main__":
    main()
