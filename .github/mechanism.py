# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""Pictures for the page and for a lecture, drawn with the functions of lora_init.py themselves.

.venv/bin/python .github/mechanism.py .github/mechanism.svg         how each start works
.venv/bin/python .github/mechanism.py .github/shapes.svg shapes     W, A, B and x as boxes
.venv/bin/python .github/mechanism.py .github/heldout.svg step      why a batch is held out
"""

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, linalg, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo_toy import share_out_of_reach, train
from lora_init import add_lora, hrp, init_lora_da, lora_da, monge_map

# ---------------------------------------------------------------------------- how each start works


def mechanism() -> Figure:
    """How each start works, in two dimensions."""
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    panels = figure.subplots(1, 3)
    draw_lora_da(panels[0])
    draw_hrp(panels[1])
    draw_cntlora(panels[2])
    for panel in panels:
        panel.set(xticks=[], yticks=[], aspect="equal")
        panel.spines[:].set_color("lightgray")
    return figure


def ellipse(C: Tensor) -> Tensor:
    """The points x with xᵀ C⁻¹ x = 1 (2, 97): a root of C times the unit circle."""
    angles = torch.linspace(0, 2 * math.pi, 97)
    return linalg.cholesky(C) @ torch.stack([angles.cos(), angles.sin()])


def draw_arrows(panel: Any, start: Tensor, move: Tensor, color: str) -> None:
    """Arrows from the points `start` (2, n) to `start + move`."""
    units = {"angles": "xy", "scale_units": "xy", "scale": 1}  # those of the axes
    panel.quiver(*start, *move, color=color, width=0.012, zorder=3, **units)


def draw_lora_da(panel: Any) -> None:
    """The plane of ΔW (1, 2): the full step ends at Δ, and A leans away from the noise."""
    delta = torch.tensor([[2.0, 1.6]])  # (1, 2)
    Z = torch.tensor([[0.12, -0.02], [-0.02, 0.03]])
    Y = torch.ones(1)
    n_train = 20
    G = -Y * delta @ Z  # (1, 2)
    full_step = -G / Y @ linalg.inv(Z)  # (1, 2)
    steepest = -G * G.square().sum() / (G @ Z @ G.mT)  # (1, 2), to the least loss on its line
    B, A = lora_da(G, Z, Y, 1, n_train, damping=0)
    noise = ellipse(linalg.inv(Z) / (n_train * Y))  # (2, 97), one standard deviation
    origin = torch.zeros(2, 1)

    for size in torch.arange(0.5, 5, 0.5):  # the noise has the shape of the loss's contours
        panel.plot(*(delta.mT + size * noise), color="lightgray", linewidth=0.8)
    panel.fill(*(delta.mT + noise), color="gold", alpha=0.4, linewidth=0)
    panel.axline((0, 0), tuple(A[0]), color="C3", linestyle="--")
    panel.plot(*torch.cat([delta, B @ A]).mT, color="C3", linestyle=":", marker="D", markevery=[1])
    draw_arrows(panel, origin, steepest.mT, "gray")
    draw_arrows(panel, origin, full_step.mT, "black")
    panel.text(-0.1, 0.1, "0", ha="right")
    panel.text(0.9, -0.1, "−G", va="top")
    panel.text(-0.15, 0.75, "−Y⁻¹GZ⁻¹", rotation=39)
    panel.text(1.85, 1.75, "Δ", ha="center")
    panel.text(2.3, 1.1, "BA", va="top", color="C3")
    panel.text(2.1, 2.5, "noise", ha="center")
    panel.text(3.0, 1.95, "A's row", rotation=31, ha="center", color="C3")
    panel.axis((-0.6, 3.7, -0.9, 3.4))
    panel.set_title("LoRA-DA:\naim, and avoid noise")
    panel.set_xlabel("plane of ΔW (1 × 2),\ncontours of the loss")


def draw_hrp(panel: Any) -> None:
    """How much of Δ each direction catches, and where preheating turns a random one."""
    delta = torch.tensor([[0.1, 1.0], [0.6, 0.9], [-0.4, 0.3]])  # (out, 2)
    random_A = torch.tensor([[0.9, -0.2], [0.3, 0.6]])  # (2, 2), as if drawn
    circle = ellipse(torch.eye(2))  # (2, 97)
    B_high = torch.zeros(1, 3, 2)
    stops = [8, 10, 15]
    heated_B, _ = train(delta, torch.eye(2), B_high, random_A, stops[-1], lr=0.1, train_A=False)

    def caught(directions: Tensor) -> Tensor:
        """The directions (2, n), each as long as the share of Δ that it catches."""
        return directions * (1 - share_out_of_reach(delta, directions.mT[:, None]))

    panel.plot(*circle, color="gray", linestyle=":")
    panel.fill(*caught(circle), color="C4", alpha=0.25, linewidth=0)
    any_B = torch.ones(3, 1)
    _, A = hrp(any_B, random_A[:1], 1)  # at R = 1 A keeps its direction, whatever B_high learns
    panel.axline((0, 0), tuple(A[0]), color="black", linestyle="--", linewidth=1)
    panel.plot(*caught(A.mT * A[0, 0].sign()), color="black", marker="o")  # in the right half
    for updates in stops:
        _, A = hrp(heated_B[updates, 0], random_A, 1)
        place = caught(A.mT * A[0, 0].sign())  # (2, 1)
        panel.plot(*place, color="C4", marker="v")
        panel.text(*place[:, 0], f"  {updates}", va="center", color="C4")
    panel.text(0, 1.12, "▼ R = 2, after 8,\n10, 15 updates", ha="center", color="C4")
    panel.text(0.68, -0.95, "all of Δ", color="gray")
    panel.text(-0.1, -0.45, "share\nof Δ", ha="center", va="center")
    panel.text(0, -1.15, "● R = 1:\nthe random A", ha="center", va="top")
    panel.axis((-1.75, 1.75, -1.75, 1.75))
    panel.set_title("HRP:\npreheating turns A")
    panel.set_xlabel("radius: the share of Δ\nthat a direction catches")


def draw_cntlora(panel: Any) -> None:
    """The map that gives the new inputs the old ones' moment, and that moves them least."""
    Z_p = torch.tensor([[1.0, 0.0], [0.0, 0.3]])
    S = torch.tensor([[1.5, 0.7], [0.7, 1.98]])  # S − I has rank 1
    Z_f = S @ Z_p @ S
    T = monge_map(Z_f, Z_p)
    new = ellipse(Z_f)  # (2, 97)
    some = new[:, ::8]  # (2, 13)

    panel.plot(*ellipse(Z_p), color="black", linestyle="--")
    panel.plot(*new, color="C0")
    draw_arrows(panel, some, T @ some - some, "gray")
    panel.text(0, 0, "old: Z_p", ha="center", va="center")
    panel.text(-1.65, 1.3, "new: Z_f", color="C0")
    panel.text(1.3, 0.9, "T")
    panel.axis((-1.75, 1.75, -1.75, 1.75))
    panel.set_title("CNTLoRA:\ninputs moved back")
    panel.set_xlabel("inputs x (2 numbers),\nmoved to Tx")


# ---------------------------------------------------------------------------- shapes


def shapes() -> Figure:
    """y = W x + s·B A x as boxes, with out = 6, in = 8 and r = 2."""
    n_out = 6
    n_in = 8
    r = 2
    boxes = [  # name, height, width, colour, what stands in front of it
        ("y", n_out, 1, "white", ""),
        ("W", n_out, n_in, "lightgray", "="),
        ("x", n_in, 1, "white", ""),
        ("B", n_out, r, "wheat", "+  s ·"),
        ("A", r, n_in, "wheat", ""),
        ("x", n_in, 1, "white", ""),
    ]
    sizes = {n_out: "out", n_in: "in", r: "r", 1: "1"}
    figure = Figure(figsize=(7.2, 3), layout="constrained")
    panel = figure.subplots()
    left = 0.0
    for name, height, width, color, before in boxes:
        left += 0.8 + 0.55 * len(before)
        panel.text(left - 0.6, 0, before, ha="right", va="center")
        corner = (left, -height / 2)
        panel.add_patch(
            matplotlib.patches.Rectangle(corner, width, height, facecolor=color, edgecolor="black")
        )
        panel.text(left + width / 2, 0, name, ha="center", va="center")
        size = f"{sizes[height]} × {sizes[width]}"
        panel.text(left + width / 2, height / 2 + 0.3, size, ha="center", va="bottom")
        left += width
    panel.text(left / 2, -5.6, "gray: frozen; colour: trained (B, and often A)", ha="center")
    panel.axis((0, left + 0.8, -6, 6))
    panel.set_aspect("equal")
    panel.set_axis_off()
    return figure


# ---------------------------------------------------------------------------- the step


def step() -> Figure:
    """LoRA-DA's loss by its step, on the rows that it was fitted to and on others."""
    torch.manual_seed(0)
    pretrained = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8)).requires_grad_(False)
    pretrained[2].weight *= 8  # larger logits, so that it prefers some labels
    truth = copy.deepcopy(pretrained)
    for layer in (truth[0], truth[2]):
        layer.weight += (
            0.05 * torch.randn_like(layer.weight[:, :2]) @ torch.randn(2, layer.in_features)
        )

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, 32)
        return x, truth(x).softmax(dim=1).multinomial(1).flatten()

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    fitted = draw(100)
    held_out = draw(4000)
    add_lora(pretrained, rank=4)
    steps = [2**k for k in torch.arange(-6, 0.1, 0.5).tolist()]
    losses = {"100 rows fitted": [], "rows held out": []}
    for length in steps:
        init_lora_da(pretrained, [fitted], loss_fn, step=length)
        for name, batch in zip(losses, (fitted, held_out), strict=True):
            losses[name].append(loss_fn(pretrained, batch).item())

    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for (name, curve), look in zip(losses.items(), ("s--", "D-"), strict=True):
        (line,) = panel.plot(steps, curve, look, color="C3", markevery=2, label=name)
        best = min(range(len(steps)), key=curve.__getitem__)
        panel.axvline(steps[best], color="gray", linestyle=line.get_linestyle(), linewidth=1)
    panel.set_xscale("log", base=2)
    panel.set(xlabel="step t, where ΔW = t·BA", ylabel="loss, nats")
    panel.set_title("On the rows fitted, too long a step looks good")
    panel.legend(frameon=False)
    return figure


PICTURES = {"mechanism": mechanism, "shapes": shapes, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="a .png or .svg to write")
    parser.add_argument("picture", nargs="?", default="mechanism", choices=PICTURES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    matplotlib.rcParams["font.size"] = 13  # readable at half the size
    matplotlib.rcParams["axes.titlesize"] = 13
    matplotlib.rcParams["svg.hashsalt"] = "mechanism"  # in place of random names in the svg
    figure = PICTURES[args.picture]()
    figure.savefig(args.file, metadata={"Date": None}, dpi=200)  # equal numbers give equal files


if __name__ == "__main__":
    main()
