# SPDX-License-Identifier: MIT
"""Three data-driven LoRA starts on a language model: from Python source to English prose.

A small decoder-only transformer with bytes as tokens is pre-trained on the source of Python's
standard library and fine-tuned on the language reference (`pydoc_data.topics`), both of which
every Python carries. Every method gets the same pre-trained weights, batches, steps and sweep of
learning rates; HRP's preheating counts as steps. Finally the *capture* asks, with no learning rate
in it, how much of what full fine-tuning changed each starting A could have expressed.
Under torchrun each process takes its share of every batch.
"""

import argparse
import copy
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import statistics
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

os.environ["KINETO_LOG_LEVEL"] = "6"  # or the profiler, asked for the peak memory, chats
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lora_init import (
    add_lora,
    collect_statistics,
    init_cntlora,
    init_hrp,
    init_lora_da,
    lora_layers,
)

METHODS = ("lora", "orthonormal", "gradient_svd", "lora_da", "hrp", "cntlora", "cntlora_pretrain")
TARGETS = ("q", "k", "v", "o", "up", "down")  # every linear layer of every block
PRESETS = {
    "small": {"width": 128, "layers": 4, "heads": 4, "context": 128, "batch": 8},
    "large": {"width": 512, "layers": 8, "heads": 8, "context": 256, "batch": 32},
}


def option(default: object, text: str) -> object:
    return field(default=default, metadata={"help": text})


@dataclass
class Args:
    preset: str = option("auto", "small (0.9 M parameters), large (26 M), auto: large on a GPU")
    device: str = option("auto", "cpu or cuda; auto takes a GPU where there is one")
    rank: int = option(1, "rank of every adapter")
    steps: int = option(120, "fine-tuning steps, of Adam with a linearly falling rate")
    pretrain_steps: int = option(3000, "pre-training steps")
    finetune_bytes: int = option(65536, "amount of fine-tuning text")
    eval_batches: int = option(8, "held-out text, in batches")
    calibration: int = option(8, "training batches that LoRA-DA, SVD and CNTLoRA look at")
    preheat_steps: int = option(20, "HRP's preheating, out of its steps")
    preheat_rank: int = option(64, "HRP's preheating rank")
    preheat_lr: float = option(0.002, "HRP's preheating rate")
    variance: float = option(1.0, "weight of LoRA-DA's variance term")
    damping: float = option(0.1, "relative damping of the moments")
    scale: float = option(0.01, "length of the first step, as a share of the weight's norm")
    seeds: int = option(1, "number of seeds: of the starts and of the order of batches")
    rates: str = option("0.04,0.16", "learning rates of the sweep, for all LoRA methods")
    full_rates: str = option("0.0005,0.001,0.002", "learning rates of full fine-tuning")
    methods: str = option(",".join(METHODS), "which starts to compare")
    pretrain_text: str = option("", "a text file instead of the standard library's source")
    finetune_text: str = option("", "a text file instead of the language reference")
    tune: bool = option(False, "evaluate on the development part, as was done to choose defaults")
    cache: str = option(".cache", "folder of the pre-trained weights")
    json: str = option("", "write the numbers to this file")
    plot: str = option("", "draw the loss curves to this file (needs matplotlib)")
    fast: bool = option(False, "a minute's smoke test of the same code; its numbers mean nothing")


def parse_args() -> Args:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(Args):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default,
                            help=f.metadata["help"], **kind)
    args = Args(**vars(parser.parse_args()))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.preset == "auto":
        args.preset = "large" if args.device.startswith("cuda") else "small"
    if args.fast:
        args.pretrain_steps, args.steps, args.preheat_steps, args.calibration = 40, 8, 3, 2
        args.seeds, args.rates, args.full_rates, args.eval_batches = 2, "0.06", "0.001", 2
    if args.preset not in PRESETS or not set(args.methods.split(",")) <= set(METHODS):
        parser.error(f"preset is one of {list(PRESETS)}; methods are among {','.join(METHODS)}")
    if args.preheat_steps >= args.steps:
        parser.error(f"{args.preheat_steps} preheating steps leave none of {args.steps}")
    if args.plot:
        try:
            importlib.import_module("matplotlib")
        except ImportError:
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
        n, t, c = x.shape  # sequences, positions, width
        h = self.norm_1(x)
        q, k, v = (project(h).view(n, t, self.heads, -1).transpose(1, 2)
                   for project in (self.q, self.k, self.v))  # (n, heads, t, c / heads)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (n, heads, t, c / heads)
        x = x + self.o(h.transpose(1, 2).reshape(n, t, c))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(places))))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean −log p of the next byte, in nats; bf16 autocast on a GPU."""
    device = batch.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def read_texts(args: Args) -> tuple[bytes, bytes]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    try:
        files = [Path(args.pretrain_text)] if args.pretrain_text else files
        source = b"\n".join(file.read_bytes() for file in files)
        if args.finetune_text:
            return source, Path(args.finetune_text).read_bytes()
    except OSError as error:
        sys.exit(f"cannot read {error.filename}: {error.strerror}")
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        sys.exit("this Python lacks pydoc_data.topics: pass --finetune-text FILE")
    return source, "\n".join(topics[name] for name in sorted(topics)).encode()


def split(text: bytes, need: int, name: str) -> dict[str, Tensor]:
    """Blocks of 2 KiB, dealt out ten at a time: 8 for training, 1 for development, 1 for test."""
    blocks = [text[i:i + 2048] for i in range(0, len(text), 2048)]
    parts = {"train": [b for i, b in enumerate(blocks) if i % 10 < 8],
             "dev": blocks[8::10], "test": blocks[9::10]}
    tokens = {k: torch.frombuffer(bytearray(b"".join(v)), dtype=torch.uint8).long() if v
              else torch.empty(0) for k, v in parts.items()}
    if min(len(part) for part in tokens.values()) < need:
        sys.exit(f"the {name} text has {len(text):,} bytes; each tenth of it must have {need:,}")
    return tokens


def place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def join(args: Args) -> None:
    """Under torchrun: join the group, take a GPU of one's own, let the first process print."""
    if "RANK" not in os.environ:
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    rank, processes = place()
    if rank > 0:
        sys.stdout = io.StringIO()  # the others keep silent
    if PRESETS[args.preset]["batch"] % processes:
        sys.exit(f"a batch of {PRESETS[args.preset]['batch']} cannot be shared by {processes}")


def draw(tokens: Tensor, count: int, shape: dict, seed: int, device: str) -> list[Tensor]:
    """`count` batches of random windows, this process's share of them, (batch, context + 1)."""
    generator = torch.Generator().manual_seed(seed)
    size = shape["context"] + 1
    starts = torch.randint(len(tokens) - size, (count, shape["batch"], 1), generator=generator)
    rank, processes = place()
    return list(tokens[starts[:, rank::processes] + torch.arange(size)].to(device))


def windows(tokens: Tensor, shape: dict, device: str, most: int) -> list[Tensor]:
    """Up to `most` batches of adjoining windows from the start: the fixed held-out text."""
    rows = tokens.unfold(0, shape["context"] + 1, shape["context"])
    return list(rows[: most * shape["batch"]].to(device).split(shape["batch"]))


@torch.no_grad()
def evaluate(model: nn.Module, held_out: list[Tensor]) -> float:
    return statistics.fmean(loss_fn(model, batch).item() for batch in held_out)


def pretrained(args: Args, tokens: dict[str, Tensor], shape: dict) -> Transformer:
    """The pre-trained model, from the cache if what made it is the same."""
    torch.manual_seed(0)
    model = Transformer(*(shape[k] for k in ("width", "layers", "heads", "context")))
    model.to(args.device)
    kind = torch.device(args.device).type
    made_by = json.dumps([shape, args.pretrain_steps, kind, torch.__version__]).encode()
    key = hashlib.sha256(made_by + tokens["train"].numpy().tobytes()).hexdigest()[:16]
    file = Path(args.cache) / f"pretrained-{key}.pt"
    state = [None]
    if file.exists() and place()[0] == 0:
        try:
            state = [torch.load(file, map_location="cpu", weights_only=True)]
            model.load_state_dict(state[0])
        except Exception as error:  # noqa: BLE001  damaged files raise many kinds, one remedy
            print(f"{file} is damaged ({type(error).__name__}): pre-training anew")
            state = [None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(state)
    if state[0] is not None:
        model.load_state_dict(state[0])
        print(f"pre-trained weights from {file}")
        return model

    batches = draw(tokens["train"], args.pretrain_steps, shape, 0, args.device)
    for _ in train(model, batches, 2e-3, "pre-training"):
        pass
    if place()[0] == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)
    return model


def train(model: nn.Module, batches: list[Tensor], lr: float, title: str = "") -> Iterator[int]:
    """Adam, the rate falling linearly to 0; yields the number of steps done."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr)
    if distributed.is_initialized():
        model = DistributedDataParallel(model)
    start = time.perf_counter()
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / len(batches))
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if title:
            left = (time.perf_counter() - start) / (step + 1) * (len(batches) - step - 1)
            progress(f"{title} {step + 1:4d}/{len(batches)}  loss {loss.item():.3f}  "
                     f"{left:4.0f} s left")
        yield step + 1
    if title:
        print()


def progress(line: str, last: list[float] = [0.0]) -> None:  # noqa: B006  remembers its last call
    """One line, rewritten in a terminal; in a file, a new one every 20 seconds."""
    if sys.stdout.isatty():
        print(f"\r{line:<78}", end="", flush=True)
    elif time.perf_counter() - last[0] > 20:
        last[0] = time.perf_counter()
        print(line, flush=True)


# ------------------------------------------------------------------------------ the comparison


def start(method: str, model: nn.Module, batches: list[Tensor], pretrain: list[Tensor],
          args: Args, seed: int) -> None:
    """Give the model's adapters the method's A and B."""
    look = batches[: args.calibration]
    rows = args.steps * batches[0][:, 1:].numel() * place()[1]  # what fine-tuning will see
    same = {"damping": args.damping, "scale": args.scale, "seed": seed}
    if method == "orthonormal":
        for layer in lora_layers(model).values():
            A = torch.linalg.qr(torch.randn_like(layer.lora_A).mT).Q.mT
            layer.set_factors(layer.lora_B, A)
    elif method == "gradient_svd":
        init_lora_da(model, look, loss_fn, variance=0.0, identity_fisher=True, **same)
    elif method == "lora_da":
        init_lora_da(model, look, loss_fn, n_train=rows, variance=args.variance, **same)
    elif method == "hrp":
        init_hrp(model, batches[: args.preheat_steps], loss_fn, lr=args.preheat_lr,
                 preheat_rank=args.preheat_rank, seed=seed)
    elif method == "cntlora":
        init_cntlora(model, look, loss_fn, **same)
    elif method == "cntlora_pretrain":
        init_cntlora(model, look, loss_fn, pretrain_batches=pretrain, **same)


@dataclass
class Run:
    method: str
    freeze_A: bool
    lr: float
    seed: int
    loss_start: float
    loss_final: float
    steps: int
    init_seconds: float
    init_steps: float
    init_peak: float
    trainable: int


def peak_megabytes(call: Callable[[], None], device: str) -> float:
    """The most that the call held in tensors at a time."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes), default=0) / 2**20


def fine_tune(model: nn.Module, batches: list[Tensor], lr: float, held_out: list[Tensor],
              done: int) -> tuple[list[tuple[int, float]], float]:
    """[(step, held-out loss), …], the first `done` steps spent before, and seconds per step."""
    every, curve, seconds = max(len(batches) // 5, 1), [(0, evaluate(model, held_out))], 0.0
    clock = time.perf_counter()
    for step in train(model, batches[done:], lr):
        if step % every == 0 or step == len(batches) - done:
            seconds += time.perf_counter() - clock
            curve.append((step + done, evaluate(model, held_out)))
            clock = time.perf_counter()
    return curve, seconds / (len(batches) - done)


def compare(args: Args, base: Transformer, finetune: dict[str, Tensor], pretrain: dict[str, Tensor],
            shape: dict) -> tuple[list[Run], dict, dict]:
    """All runs, their loss curves, and the captures; Ctrl-C ends it with what is finished."""
    part = finetune["dev" if args.tune else "test"]
    held_out = windows(part, shape, args.device, args.eval_batches)
    old = draw(pretrain["train"], args.calibration, shape, 1, args.device)
    new = finetune["train"][: args.finetune_bytes]
    data = [draw(new, args.steps, shape, 100 + seed, args.device) for seed in range(args.seeds)]
    none = evaluate(base, held_out)
    runs = [Run("none", False, 0.0, 0, none, none, 0, 0.0, 0.0, 0.0, 0)]
    curves: dict[tuple, list] = {("none", False, 0.0, 0): [(0, none)]}
    changes, starts, peaks = {}, {}, {}
    methods, rates = args.methods.split(","), [float(rate) for rate in args.rates.split(",")]
    full_rates = [float(rate) for rate in args.full_rates.split(",")]
    total = args.seeds * (len(full_rates) + 2 * len(rates) * len(methods))
    clock = time.perf_counter()
    try:
        for seed, method in ((s, m) for s in range(args.seeds) for m in ("full", *methods)):
            torch.manual_seed(seed)
            model, began = copy.deepcopy(base), time.perf_counter()
            if method != "full":
                add_lora(model, args.rank, targets=TARGETS)
                start(method, model, data[seed], old, args, seed)
                starts[method, seed] = {n: m.lora_A.detach() for n, m in lora_layers(model).items()}
            init_seconds = time.perf_counter() - began
            if method not in peaks:  # on a copy, as measuring takes time
                peaks[method] = 0.0 if method == "full" else peak_megabytes(partial(
                    start, method, copy.deepcopy(model), data[seed], old, args, seed), args.device)
            done = args.preheat_steps if method == "hrp" else 0
            jobs = ([(False, lr) for lr in full_rates] if method == "full" else
                    [(freeze, lr) for freeze in (True, False) for lr in rates])
            for freeze, lr in jobs:
                tuned = copy.deepcopy(model)
                for layer in lora_layers(tuned).values():
                    layer.lora_A.requires_grad_(not freeze)
                curve, seconds = fine_tune(tuned, data[seed], lr, held_out, done)
                trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
                runs.append(Run(method, freeze, lr, seed, curve[0][1], curve[-1][1], args.steps,
                                init_seconds, init_seconds / seconds, peaks[method], trainable))
                curves[method, freeze, lr, seed] = curve
                if method == "full":
                    changes[lr, seed] = {
                        n: m.weight.detach() - base.get_submodule(n).weight.detach()
                        for n, m in tuned.named_modules() if n.rpartition(".")[2] in TARGETS}
                left = (time.perf_counter() - clock) / (len(runs) - 1) * (total + 1 - len(runs))
                progress(f"run {len(runs) - 1}/{total}  {method} seed {seed} lr {lr:g}  "
                         f"loss {curve[-1][1]:.4f}  {left:4.0f} s left")
    except KeyboardInterrupt:
        print(f"\ninterrupted: {len(runs) - 1} of {total} runs are finished and count")
    print()
    captures = {}
    if changes:
        best = min(changes, key=lambda k: next(r.loss_final for r in runs if r.method == "full"
                                               and (r.lr, r.seed) == k))
        captures = capture(base, changes[best], starts, data[0][: args.calibration], args.rank)
    return runs, curves, captures


@torch.no_grad()
def capture(base: Transformer, change: dict[str, Tensor], starts: dict, batches: list[Tensor],
            rank: int) -> dict[str, dict[str, float]]:
    """Share of ‖ΔW‖² (plain) and of ‖ΔW R‖², R Rᵀ = Z (weighted), that lies in A's row space."""
    layers = {name: base.get_submodule(name) for name in change}
    moments = collect_statistics(base, layers, batches, loss_fn, backward=False)
    shares: dict[str, dict[str, list[float]]] = {}
    for kind in ("plain", "weighted"):
        roots = {}
        for name, total in moments.items():
            values, vectors = torch.linalg.eigh(total.input_moment)
            values = torch.ones_like(values) if kind == "plain" else values.clamp_min(0)
            roots[name] = vectors * values.sqrt()  # R with R Rᵀ = I or Z, (in, in)
        whole = sum((change[n] @ roots[n]).square().sum() for n in change)
        best = sum(torch.linalg.svdvals(change[n] @ roots[n])[:rank].square().sum() for n in change)
        shares.setdefault("best", {})[kind] = [(best / whole).item()]
        for (method, _), A in starts.items():
            Q = {n: torch.linalg.qr((A[n] @ roots[n]).mT).Q for n in change}
            part = sum((change[n] @ roots[n] @ Q[n]).square().sum() for n in change)
            shares.setdefault(method, {}).setdefault(kind, []).append((part / whole).item())
    return {method: {kind: statistics.fmean(values) for kind, values in share.items()}
            for method, share in shares.items()}


# ------------------------------------------------------------------------------ the report


@dataclass
class Row:
    """A method at its best learning rate, over seeds."""

    method: str
    lr: float
    at_end: bool  # of the sweep
    mean: float
    sd: float
    runs: list[Run]


def best_rows(runs: list[Run], freeze: bool) -> dict[str, Row]:
    rows = {}
    for method in dict.fromkeys(r.method for r in runs):
        mine = [r for r in runs if r.method == method
                and r.freeze_A == (freeze and method not in ("none", "full"))]
        by_rate = {lr: [r for r in mine if r.lr == lr] for lr in sorted({r.lr for r in mine})}
        if not by_rate:
            continue
        seeds = max(len(group) for group in by_rate.values())  # a rate cut short does not count
        means = {lr: statistics.fmean(r.loss_final for r in group)
                 for lr, group in by_rate.items() if len(group) == seeds}
        lr = min(means, key=lambda rate: means[rate] if math.isfinite(means[rate]) else math.inf)
        finals = [r.loss_final for r in by_rate[lr]]
        rows[method] = Row(method, lr, len(means) > 2 and lr in (min(means), max(means)),
                           means[lr], statistics.stdev(finals) if seeds > 1 else math.nan,
                           by_rate[lr])
    return rows


def mean_curve(row: Row, curves: dict) -> list[tuple[int, float]]:
    group = [curves[r.method, r.freeze_A, r.lr, r.seed] for r in row.runs]
    return [(points[0][0], statistics.fmean(p[1] for p in points)) for points in zip(*group)]


def spark(curve: list[tuple[int, float]], low: float, high: float, steps: int) -> str:
    """The curve, 40 columns wide, between `low` and `high`."""
    text = ""
    for column in range(40):
        loss = [value for step, value in curve if step <= column / 39 * steps][-1]
        share = (min(max(loss, low), high) - low) / (high - low or 1)
        text += "▁▂▃▄▅▆▇█"[round(7 * share)]
    return text


def report(runs: list[Run], curves: dict, captures: dict, args: Args) -> None:
    for freeze in (True, False):
        rows = best_rows(runs, freeze)
        lora = rows.get("lora")
        print(f"\nA {'frozen' if freeze else 'trained'}, rank {args.rank}, {args.steps} steps, "
              f"seeds: {args.seeds}; held-out loss in nats per byte")
        print(f"{'method':<17}{'start':>7}{'end':>8} ± {'sd':<7}{'rate':>7} {'to LoRA':>8}"
              f"{'init':>9}{'= steps':>9}{'peak':>8}{'trainable':>11}")
        for row in rows.values():
            reached = [step for step, loss in mean_curve(row, curves) if lora and loss <= lora.mean]
            mean = {k: statistics.fmean(getattr(r, k) for r in row.runs)
                    for k in ("loss_start", "init_seconds", "init_steps")}
            sd = "–" if math.isnan(row.sd) else f"{row.sd:.4f}"
            print(f"{row.method:<17}{mean['loss_start']:7.3f}{row.mean:8.4f} ± {sd:<7}"
                  f"{row.lr:7g}{'!' if row.at_end else ' '}{reached[0] if reached else '–':>8}"
                  f"{mean['init_seconds']:7.2f} s{mean['init_steps']:9.1f}"
                  f"{row.runs[0].init_peak:5.0f} MB"
                  f"{row.runs[0].trainable:11,}")
        if any(row.at_end for row in rows.values()):
            print("! the best rate lies at an end of the sweep: widen --rates")
    rows = best_rows(runs, True)
    low, high = min(r.mean for r in rows.values()), rows["none"].mean
    print(f"\nA frozen, mean loss against steps, from {high:.3f} (█) to {low:.3f} (▁)")
    for row in rows.values():
        print(f"{row.method:<17}{spark(mean_curve(row, curves), low, high, args.steps)}")
    if captures:
        print("\ncapture: share of full fine-tuning's change within reach of the starting A")
        print(f"{'method':<17}{'plain':>8}{'weighted':>10}")
        for method, share in captures.items():
            print(f"{method:<17}{share['plain']:8.4f}{share['weighted']:10.4f}")
    print("\n" + textwrap.fill(verdict(rows), 96))


def verdict(rows: dict[str, Row]) -> str:
    """The closing sentence: with A frozen, who ended clearly below both controls, and who not."""
    if not {"lora", "orthonormal"} <= set(rows):
        return "No verdict: it takes lora and orthonormal, the two controls."
    if math.isnan(rows["lora"].sd):
        order = sorted((r for r in rows.values() if r.method not in ("none", "full")),
                       key=lambda row: row.mean)
        return ("With A frozen, from the lowest loss to the highest: "
                + ", ".join(f"{row.method} ({row.mean:.4f})" for row in order)
                + ". One seed shows no spread: --seeds 3 tells what is more than chance.")
    groups: dict[str, list[str]] = {"below both": [], "not below both": []}
    for row in rows.values():
        if row.method in ("none", "full", "lora", "orthonormal"):
            continue
        gaps = [(rows[c].mean - row.mean) / (math.hypot(rows[c].sd, row.sd) or math.inf)
                for c in ("lora", "orthonormal")]
        clear = all(gap > 2 for gap in gaps)
        text = f"{row.method} ({row.mean:.4f}; {gaps[0]:+.1f} and {gaps[1]:+.1f} sd)"
        groups["below both" if clear else "not below both"].append(text)
    return (f"With A frozen, plain LoRA ended at {rows['lora'].mean:.4f} and a random orthonormal "
            f"A at {rows['orthonormal'].mean:.4f}. Below both by over 2 sd of the difference: "
            f"{', '.join(groups['below both']) or 'none'}. Not so: "
            f"{', '.join(groups['not below both']) or 'none'}.")


def plot(runs: list[Run], curves: dict, file: str) -> None:
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for panel, freeze in zip(panels, (True, False)):
        for row in best_rows(runs, freeze).values():
            panel.plot(*zip(*mean_curve(row, curves)), label=row.method, marker=".")
        panel.set(title=f"A {'frozen' if freeze else 'trained'}", xlabel="step")
    panels[0].set_ylabel("held-out loss, nats per byte")
    panels[1].legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    args = parse_args()
    join(args)
    shape = PRESETS[args.preset]
    size = shape["context"] + 1
    source, prose = read_texts(args)
    pretrain = split(source, 2 * size, "pre-training")
    finetune = split(prose, 2 * size, "fine-tuning")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {args.device}, "
          f"processes: {place()[1]} of {torch.get_num_threads()} threads, "
          f"seeds 0..{args.seeds - 1}")
    base = pretrained(args, pretrain, shape)
    held_out = windows(pretrain["test"], shape, args.device, args.eval_batches)
    print(f"{sum(p.numel() for p in base.parameters()):,} parameters, "
          f"loss {evaluate(base, held_out):.3f} on held-out source; "
          f"adapters on {', '.join(TARGETS)} of {shape['layers']} blocks; "
          f"fine-tuning on {min(args.finetune_bytes, len(finetune['train'])):,} bytes of prose")
    runs, curves, captures = compare(args, base, finetune, pretrain, shape)
    report(runs, curves, captures, args)
    if args.json and place()[0] == 0:
        numbers = {"runs": [asdict(run) for run in runs], "capture": captures}
        Path(args.json).write_text(json.dumps(numbers, indent=1))
    if args.plot and place()[0] == 0:
        plot(runs, curves, args.plot)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
