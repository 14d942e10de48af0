# SPDX-License-Identifier: MIT
"""Data-driven LoRA starts on a small language model: from Python source to English prose.

A decoder-only transformer with bytes as tokens is pre-trained on the source of Python's standard
library, then fine-tuned on the language reference (`pydoc_data.topics`): every Python carries both.
It is LoRA's own setting, where a start matters: adapters on q and v, low rank, few steps. Methods
are compared within a seed, whose batches they share; rates are chosen with the first seed on the
development part of the text, losses told on its test part, a start's cost in training steps.
"""

import copy
import importlib.util
import json
import math
import statistics
import sys
import sysconfig
import textwrap
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_init

METHODS = ("lora", "orthonormal", "gradient_svd", "lora_da", "hrp", "cntlora")
PRESETS = {
    "small": {"width": 128, "layers": 4, "heads": 4, "context": 128, "batch": 8},
    "large": {"width": 512, "layers": 8, "heads": 8, "context": 256, "batch": 32},
}

def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0],
                            formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--preset", choices=PRESETS, help="0.9 M or 26 M parameters; on a GPU large, else small")
    add("--targets", default="q,v", help="layers to adapt in every block: q,k,v,o,up,down")
    add("--rank", type=int, default=2, help="rank of every adapter")
    add("--steps", type=int, default=40, help="of Adam with a linearly falling rate")
    add("--pretrain-steps", type=int, default=1500, help="of the model that is fine-tuned")
    add("--seeds", type=int, default=3, help="how many: of the batches and of the starts")
    add("--rates", default="0.005,0.01,0.02,0.04,0.08,0.16,0.32", help="those of LoRA methods")
    add("--full-rates", default="0.00025,0.0005,0.001,0.002,0.004", help="full fine-tuning's")
    add("--methods", default=",".join(METHODS), help="which starts to compare")
    add("--calibration", type=int, default=4, help="training batches that a start is fitted to; "
        "one more for its line search")
    add("--preheat-steps", type=int, default=10, help="HRP's preheating, out of its steps")
    add("--preheat-lr", type=float, default=0.01, help="HRP's preheating rate")
    add("--finetune-bytes", type=int, default=81920, help="text used, held-out parts included")
    add("--pretrain-text", help="a text file instead of the standard library's source")
    add("--finetune-text", help="a text file instead of the language reference")
    add("--json", help="write the runs to this file")
    add("--plot", help="draw the loss curves to this file (needs matplotlib)")
    add("--fast", action="store_true", help="a minute's smoke test of the same code")
    args = parser.parse_args()
    args.preset = args.preset or ("large" if args.device.startswith("cuda") else "small")
    vars(args).update(PRESETS[args.preset])
    if args.fast:
        args.pretrain_steps, args.steps, args.preheat_steps = 40, 8, 3
        args.seeds, args.rates, args.full_rates = 2, "0.02,0.04", "0.001"
    if not set(args.methods.split(",")) <= set(METHODS) or args.preheat_steps >= args.steps:
        parser.error(f"--methods among {','.join(METHODS)}; --preheat-steps below --steps")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    return args

# ------------------------------------------------------------------------------ model and text
class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, T, C = x.shape  # sequences, positions, width
        h = self.norm_1(x)
        q, k, v = (project(h).view(N, T, self.heads, -1).transpose(1, 2)
                   for project in (self.q, self.k, self.v))  # (N, heads, T, C / heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (N, heads, T, C / heads)
        x = x + self.o(h.transpose(1, 2).reshape(N, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))  # (N, T, C)

class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        for name, parameter in self.blocks.named_parameters():  # learns faster than PyTorch's own
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.02 * (parameter.dim() > 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[:tokens.shape[1]]  # (N, T, C)
        return self.head(self.norm(self.blocks(x)))  # (N, T, 256)

def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean −log p of the next byte, in nats; batch (N, T + 1). On a GPU in bf16 autocast."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        logits = model(batch[:, :-1])  # (N, T, 256)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

def read_texts(args: Namespace) -> tuple[bytes, bytes]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    try:
        files = [Path(args.pretrain_text)] if args.pretrain_text else files
        source = b"\n".join(file.read_bytes() for file in files)
        if args.finetune_text:
            return source, Path(args.finetune_text).read_bytes()
        topics = importlib.import_module("pydoc_data.topics").topics
    except (OSError, ImportError) as error:
        sys.exit(f"{error}: pass --pretrain-text FILE, --finetune-text FILE")
    return source, "\n".join(topics[name] for name in sorted(topics)).encode()

def split(text: bytes, need: int, name: str) -> dict[str, Tensor]:
    """Blocks of 2 KiB, dealt out ten at a time: 8 for training, 1 for development, 1 for test."""
    blocks = [text[i:i + 2048] for i in range(0, len(text), 2048)]
    parts = {"train": b"".join(b for i, b in enumerate(blocks) if i % 10 < 8),
             "dev": b"".join(blocks[8::10]), "test": b"".join(blocks[9::10])}
    if min(map(len, parts.values())) < need:
        sys.exit(f"the {name} text has {len(text):,} bytes; each tenth of it must have {need:,}")
    return {k: torch.frombuffer(bytearray(v), dtype=torch.uint8).long() for k, v in parts.items()}

def draw(tokens: Tensor, count: int, seed: int, args: Namespace) -> list[Tensor]:
    """`count` batches of random windows, (batch, context + 1) each."""
    size, generator = args.context + 1, torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - size, (count, args.batch, 1), generator=generator)
    return list(tokens[starts + torch.arange(size)].to(args.device))

def windows(tokens: Tensor, args: Namespace) -> list[Tensor]:
    """All of a held-out text, up to 8 batches of adjoining windows."""
    rows = tokens.unfold(0, args.context + 1, args.context)
    return list(rows.to(args.device).split(args.batch)[:8])

@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Tensor]) -> float:
    return torch.stack([loss_fn(model, batch) for batch in batches]).mean().item()

def train(model: nn.Module, batches: list, lr: float, warmup: int = 0) -> Iterator[tuple]:
    """Adam, the rate falling linearly to 0; yields the steps done and the last one's seconds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr, betas=(0.9, 0.95 if warmup else 0.999))
    for step, batch in enumerate(batches):
        began = clock()
        share = min((step + 1) / (warmup + 1), 1 - step / len(batches))
        optimizer.param_groups[0]["lr"] = lr * share
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        yield step + 1, clock() - began

def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # let the GPU finish first
    return time.perf_counter()

def pretrained(args: Namespace, tokens: Tensor) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(args.width, args.layers, args.heads, args.context)
    batches = draw(tokens, args.pretrain_steps, 0, args)
    for step, seconds in train(model.to(args.device), batches, 3e-3, warmup=100):
        progress(f"pre-training, step {step} of {len(batches)}: "
                 f"{seconds * (len(batches) - step):.0f} s left, then the comparison")
    return model

def progress(line: str, last: list[float] = [0.0]) -> None:  # noqa: B006  remembers its last call
    """One line, rewritten in a terminal; in a file, a new one every 20 seconds."""
    if sys.stdout.isatty():
        print(f"\r{line:<90}", end="", flush=True)
    elif time.perf_counter() - last[0] > 20:
        last[0] = time.perf_counter()
        print(line, flush=True)

# ------------------------------------------------------------------------------ the comparison
@dataclass
class Run:
    method: str
    freeze_A: bool
    lr: float
    seed: int
    loss_start: float  # on the test part, as the curve
    loss_dev: float
    loss_test: float
    init_steps: float  # seconds of the start / seconds of a training step
    curve, trainable, step = (), 0, 0  # [(step, loss), …]; without a type, so not in --json

def start(method: str, model: nn.Module, batches: list[Tensor], old: list[Tensor], args: Namespace,
          seed: int) -> float:
    """Give the model's adapters the method's A and B; returns the step of the line search."""
    layers, look = lora_init.lora_layers(model), batches[: args.calibration]
    if method == "orthonormal":
        for layer in layers.values():
            A = torch.linalg.qr(torch.randn_like(layer.lora_A).mT).Q.mT  # (r, in)
            layer.set_factors(layer.lora_B, A)
    elif method == "gradient_svd":  # A: the gradient's top right singular vectors; B stays 0
        for name, total in lora_init.collect_statistics(model, layers, look, loss_fn).items():
            Z, Y = torch.eye(total.gradient.shape[1]), torch.ones_like(total.output_fisher)
            _, A = lora_init.lora_da(total.gradient, Z.to(Y), Y, args.rank, 1, variance=0.0)
            layers[name].set_factors(layers[name].lora_B, A)
    elif method == "lora_da":
        lora_init.init_lora_da(model, look, loss_fn, n_train=args.steps * look[0][:, 1:].numel(),
                               step=1.0)
    elif method == "hrp":
        lora_init.init_hrp(model, batches[: args.preheat_steps], loss_fn, lr=args.preheat_lr,
                           seed=seed)
    elif method == "cntlora":
        lora_init.init_cntlora(model, look, loss_fn, pretrain_batches=old, step=1.0)
    if method not in ("lora_da", "cntlora"):
        return 1.0
    unseen = batches[args.calibration:args.calibration + 1]  # how far, say rows not fitted
    return lora_init.line_search(model, unseen, loss_fn)

def mean(row: list[Run], name: str) -> float:
    return statistics.fmean(getattr(run, name) for run in row)

def next_rate(rates: list[float], losses: dict[float, float]) -> float | None:
    """Downhill from the middle of the sweep; None when both neighbours of the best are tried."""
    best = min(losses, key=losses.get, default=rates[len(rates) // 2])
    near = rates[max(rates.index(best) - 1, 0):rates.index(best) + 2]
    return next((rate for rate in near if rate not in losses), None)

class Comparison:
    """All `runs` as they finish, and `rows`: rows[freeze_A][method], at the method's best rate."""
    def __init__(self, args: Namespace, base: Transformer, pretrain: dict, finetune: dict):
        self.args, self.base, self.runs, self.rows = args, base, [], {True: {}, False: {}}
        self.old = draw(pretrain["train"], args.calibration, 1, args)
        self.dev, self.test = windows(finetune["dev"], args), windows(finetune["test"], args)
        self.batches = [draw(finetune["train"], 2 * args.steps, 100 + seed, args)
                        for seed in range(args.seeds)]  # twice the steps, for "lora+9"
        self.began = time.perf_counter()

    def run(self) -> None:
        args, rows, methods = self.args, self.rows, self.args.methods.split(",")
        dev, test = evaluate(self.base, self.dev), evaluate(self.base, self.test)
        self.runs = [Run("none", True, 0.0, seed, test, dev, test, 0.0)
                     for seed in range(args.seeds)]
        rows[True]["none"] = rows[False]["none"] = list(self.runs)
        self.sweep("full", [False], args.full_rates)
        rows[True]["full"] = rows[False]["full"]
        for method in methods:
            self.sweep(method, [True, False], args.rates)
        if {"lora", "lora_da"} <= set(methods):  # what if plain LoRA gets the start's time, too?
            cost = statistics.median(r.init_steps for r in self.runs if r.method == "lora_da")
            for freeze in (True, False):
                self.sweep(f"lora+{min(math.ceil(cost), args.steps)}", [freeze],
                           str(rows[freeze]["lora"][0].lr))

    def sweep(self, method: str, freezes: list[bool], rates: str) -> None:
        """A start for each seed serves all rates; the first seed's development loss chooses one."""
        begun = []
        for seed, batches in enumerate(self.batches):
            torch.manual_seed(seed)
            model = copy.deepcopy(self.base)
            if method != "full":
                lora_init.add_lora(model, self.args.rank, targets=self.args.targets.split(","))
            began = clock()
            step = start(method, model, batches, self.old, self.args, seed)
            begun.append((seed, model, step, clock() - began))
        for freeze in freezes:
            tried, losses = {}, {}
            while (lr := next_rate([float(rate) for rate in rates.split(",")], losses)) is not None:
                tried[lr] = self.fine_tune(method, freeze, lr, *begun[0])
                losses[lr] = tried[lr].loss_dev
            lr = min(losses, key=losses.get)
            self.rows[freeze][method] = [tried[lr]] + [
                self.fine_tune(method, freeze, lr, *one) for one in begun[1:]]

    def fine_tune(self, method: str, freeze: bool, lr: float, seed: int, model: nn.Module,
                  step: float, init_seconds: float) -> Run:
        """Train a copy of a started model: HRP for fewer steps, "lora+9" for nine more."""
        done = self.args.preheat_steps if method == "hrp" else 0
        last = self.args.steps + int(method.partition("+")[2] or 0)
        model, times = copy.deepcopy(model), []
        for layer in lora_init.lora_layers(model).values():
            layer.lora_A.requires_grad_(not freeze)
        curve = [(done, evaluate(model, self.test))]
        for i, (_, seconds) in enumerate(train(model, self.batches[seed][done:last], lr), done + 1):
            times.append(seconds)
            if i % 5 == 0 or i == last:
                curve.append((i, evaluate(model, self.test)))
        run = Run(method, freeze, lr, seed, curve[0][1], evaluate(model, self.dev), curve[-1][1],
                  init_seconds / statistics.median(times))
        run.curve, run.step = curve, step
        run.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.runs.append(run)
        share = (len(self.rows[True]) + len(self.rows[False]) - 1) / (
            2 * len(self.args.methods.split(",")) + 5)  # of all rows, two of which took no time
        left = (time.perf_counter() - self.began) * (1 / share - 1)
        progress(f"{method}, A {'frozen' if freeze else 'trained'}, rate {lr:g}, seed {seed}: "
                 f"{run.loss_test:.4f}; about {left:.0f} s left")
        return run

# ------------------------------------------------------------------------------ the report
def paired(row: list[Run], other: list[Run] | None) -> tuple[float, float, int]:
    """Mean and sd of row − other within a seed; −1, 0, 1 for clearly below, neither, above."""
    gaps = [one.loss_test - two.loss_test for one, two in zip(row, other or [])] or [math.nan]
    gap, sd = statistics.fmean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else math.nan
    return gap, sd, (gap > 2 * sd) - (gap < -2 * sd)

def mean_curve(row: list[Run]) -> list[tuple[int, float]]:
    return [(points[0][0], statistics.fmean(loss for _, loss in points))
            for points in zip(*(run.curve for run in row))]

def report(rows: dict[str, list[Run]], freeze: bool, args: Namespace) -> None:
    sweeps = [args.rates.split(","), args.full_rates.split(",")]
    ends = {float(end) for sweep in sweeps if len(sweep) > 2 for end in (sweep[0], sweep[-1])}
    print(f"\nA {'frozen' if freeze else 'trained'}; test loss in nats per byte\n"
          f"{'':<13}{'start':>7}{'end':>8}{'rate':>9}{'minus plain LoRA':>19}"
          f"{'minus orthonormal':>19}{'= steps':>9}{'trainable':>11}")
    for method, row in rows.items():
        gaps = [paired(row, rows.get(control)) for control in ("lora", "orthonormal")]
        gaps = [f"{gap:+.4f} ± {sd:.4f}" if gap else "" for gap, sd, _ in gaps]
        print(f"{method:<13}{mean(row, 'loss_start'):7.4f}{mean(row, 'loss_test'):8.4f}"
              f"{row[0].lr:8g}{'!' if row[0].lr in ends else ' '}{gaps[0]:>19}{gaps[1]:>19}"
              f"{statistics.median(r.init_steps for r in row):9.1f}{row[0].trainable:11,}")
    if any(row[0].lr in ends for row in rows.values()):
        print("! the best rate lies at an end of the sweep: widen --rates or --full-rates")
    if "lora" in rows:
        print(textwrap.fill(verdict(rows, args.methods.split(",")), 98))

def verdict(rows: dict[str, list[Run]], methods: list[str]) -> str:
    """What the paired differences say, in words."""
    sides: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for method in methods:
        if method in rows and method != "lora":
            sides[paired(rows[method], rows["lora"])[2]].append(method)
    won, tied, lost = (", ".join(names) or "none" for names in sides.values())
    both = [m for m in sides[-1] if paired(rows[m], rows.get("orthonormal"))[2] < 0]
    text = (f"Clearly below plain LoRA: {won}. Clearly below orthonormal too: "
            f"{', '.join(both) or 'none'}. Ties with plain LoRA: {tied}. Clearly above it: {lost}.")
    longer = next((method for method in rows if "+" in method), None)
    if longer:
        goal = mean(rows["lora_da"], "loss_start")
        step = next((step for step, loss in mean_curve(rows["lora"]) if loss <= goal), None)
        gap, sd, side = paired(rows["lora_da"], rows[longer])
        reached = "never" if step is None else f"by step {step}"
        steps = ", ".join(str(Fraction(run.step)) for run in rows["lora_da"])
        text += (f" LoRA-DA, with {steps} of Newton's step, starts at {goal:.4f}, which plain LoRA "
                 f"reaches {reached}. Given its start's time as {longer[5:]} steps more, plain "
                 f"LoRA ends at {mean(rows[longer], 'loss_test'):.4f}; LoRA-DA minus that is "
                 f"{gap:+.4f} ± {sd:.4f}: "
                 f"{('still clearly below', 'a tie', 'clearly above')[side + 1]}.")
    return text

def plot(rows: dict[bool, dict[str, list[Run]]], file: str) -> None:
    import matplotlib.figure
    matplotlib.rcParams["svg.hashsalt"] = "lora"  # the same runs give the same bytes
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, freeze in zip(panels, (True, False)):
        for method, row in rows[freeze].items():
            if method != "none" and "+" not in method:
                panel.plot(*zip(*mean_curve(row)), label=method, marker=".")
        panel.set(title=f"A {'frozen' if freeze else 'trained'}", xlabel="step")
    panels[0].set_ylabel("test loss, nats per byte")
    panels[1].legend()
    figure.savefig(file, metadata={"Date": None} if file.endswith(".svg") else None)

def main() -> None:
    args = parse_args()
    (source, prose), size = read_texts(args), 2 * args.context + 2
    pretrain = split(source, size, "pre-training")
    finetune = split(prose[: args.finetune_bytes], size, "fine-tuning")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {args.device}, "
          f"{torch.get_num_threads()} threads, seeds 0..{args.seeds - 1}", flush=True)
    base = pretrained(args, pretrain["train"])
    print(f"\n{sum(p.numel() for p in base.parameters()):,} parameters, loss on held-out source "
          f"{evaluate(base, windows(pretrain['test'], args)):.3f}; adapters on {args.targets}: "
          f"{len(args.targets.split(',')) * args.layers} layers\n{args.steps} steps of "
          f"{args.batch} x {args.context} bytes; calibration: {args.calibration} batches; "
          f"preheating: {args.preheat_steps} steps at {args.preheat_lr:g}\n"
          f"rates, from the middle: {args.rates}; full: {args.full_rates}", flush=True)
    comparison = Comparison(args, base, pretrain, finetune)
    try:
        comparison.run()
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished counts", end="")
    for freeze, rows in comparison.rows.items():
        report(rows, freeze, args)
    print(f"\n= steps: what the start took, in training steps (HRP's are of its {args.steps}). "
          f"Clearly: by more than\n2 sd of the {args.seeds} differences within a seed.")
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(run) for run in comparison.runs], indent=1))
    if args.plot:
        plot(comparison.rows, args.plot)

if __name__ == "__main__":
    main()
