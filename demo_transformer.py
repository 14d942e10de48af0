# SPDX-License-Identifier: MIT
"""Does a data-driven start help? LoRA on a language model, at equal cost and at every rate.

By default a small transformer with bytes as tokens is pre-trained on the source of Python's
standard library and fine-tuned on Python's language reference: every Python carries both.
`--model` takes a causal language model of Hugging Face instead. All methods are run at the same
rates (full fine-tuning at 1/64 of them) and, for one seed, on the same batches. What a start costs
is taken off its training steps. Development text chooses the best rate, and test text gives the
losses that are reported.
"""

import argparse
import copy
import importlib.util
import json
import math
import os
import signal
import statistics
import sys
import sysconfig
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, multiprocessing, nn

import lora_init

METHODS = ["lora", "orthonormal", "gradient_svd", "lora_da", "hrp", "cntlora", "full"]
PRESETS = {
    "small": {"width": 128, "layers": 4, "heads": 4, "context": 128, "batch": 4},
    "large": {"width": 512, "layers": 8, "heads": 8, "context": 256, "batch": 32},
}
BYTES_OF_TEXT = 81920  # of the language reference, held-out parts included
HELD_OUT_BATCHES = 8  # at most, of development text and of test text
CHECK_EVERY = 8  # steps between two checkpoints, where data is few
SEARCH_STEPS = 6  # twelve forward passes choose a step; two cost about as much as one training step
FULL_RATE = 1 / 64  # full fine-tuning takes this times LoRA's rates
T_95 = {  # Student's t for a 95 % interval, by the number of seeds
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
    11: 2.228,
    12: 2.201,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--preset", choices=PRESETS, help="0.9 M or 26 M parameters; large on a GPU, else small")
    add("--model", help="name or folder of a Hugging Face model, instead of a preset")
    add("--dtype", default="float32", help="of the weights of --model, as bfloat16")
    add("--targets", help="layers to adapt; q,v or, with --model, q_proj,v_proj")
    add("--rank", type=int, default=2, help="of every adapter")
    add("--steps", type=int, default=40, help="of Adam, with a linearly falling rate")
    add("--context", type=int, help="tokens of a sequence; 96 with --model")
    add("--batch", type=int, help="sequences of a batch; 2 with --model")
    add("--methods", default=",".join(METHODS), help="full trains all weights")
    add("--rates", default="0.005,0.01,0.02,0.04,0.08,0.16,0.32", help="of LoRA; full takes 1/64")
    add("--seeds", type=int, default=4, help="how many: of the batches and of the starts")
    add("--calibration", type=int, default=4, help="batches that a start is fitted to")
    add("--preheat-steps", type=int, default=10, help="of HRP's preheating")
    add("--preheat-lr", type=float, default=0.01, help="rate of HRP's preheating")
    add("--train-batches", type=int, help="few data: so many batches, repeated over and over")
    add("--pretrain-steps", type=int, default=1500, help="of the preset's model")
    add("--pretrain-text", help="text file instead of the standard library's source")
    add("--finetune-text", help="text file instead of the language reference")
    add("--processes", type=int, help="that share the runs; one a core, or one on a GPU")
    add("--json", help="write all runs to this file")
    add("--plot", help="draw loss against rate to this file (needs matplotlib)")
    add("--fast", action="store_true", help="a minute's smoke test of the same code")
    args = parser.parse_args()

    if args.model:
        defaults = {"targets": "q_proj,v_proj", "context": 96, "batch": 2}
    else:
        on_gpu = args.device.startswith("cuda")
        args.preset = args.preset or ("large" if on_gpu else "small")
        defaults = {"targets": "q,v", **PRESETS[args.preset]}
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.processes is None:
        args.processes = os.cpu_count() if args.device == "cpu" else 1
    if args.fast:
        args.pretrain_steps = 40
        args.steps = 16
        args.preheat_steps = 3
        args.seeds = 2
        args.rates = "0.01,0.04"
    args.targets = args.targets.split(",")
    args.methods = args.methods.split(",")
    args.rates = [float(rate) for rate in args.rates.split(",")]
    if args.model and "full" in args.methods:
        args.methods.remove("full")  # it would need a copy of the model

    if not set(args.methods) <= set(METHODS):
        parser.error(f"--methods are some of {','.join(METHODS)}")
    if not 1 <= args.seeds <= max(T_95):
        parser.error(f"--seeds is not in 1..{max(T_95)}")
    if max(cost_steps(method, args) for method in args.methods) >= args.steps:
        parser.error("a start costs more than --steps: give more, or less --calibration")
    if args.train_batches is not None and args.train_batches <= args.calibration:
        parser.error("--train-batches has to be above --calibration: the next one chooses a step")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    if args.model and not importlib.util.find_spec("transformers"):
        parser.error("--model needs transformers: pip install transformers")
    return args


# ---------------------------------------------------------------------------- models


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        N, T, C = x.shape  # sequences, positions, width
        h = self.norm_1(x)
        q = self.split_heads(self.q(h))  # (N, heads, T, C / heads)
        k = self.split_heads(self.k(h))
        v = self.split_heads(self.v(h))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).reshape(N, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))  # (N, T, C)

    def split_heads(self, x: Tensor) -> Tensor:
        N, T, C = x.shape
        return x.view(N, T, self.heads, C // self.heads).transpose(1, 2)


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, context: int):
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for module in [self.token, self.position, *self.blocks.modules()]:
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)  # learns faster than PyTorch's default
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]  # (N, T, C)
        return self.head(self.norm(self.blocks(x)))  # (N, T, 256)


def load_hugging_face(args: argparse.Namespace) -> tuple[nn.Module, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    return model.to(args.device), AutoTokenizer.from_pretrained(args.model)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean −log p of the next token, in nats; batch (N, T + 1). On a GPU in bf16 autocast."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        output = model(batch[:, :-1])
    logits = getattr(output, "logits", output)  # (N, T, vocabulary)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Tensor]) -> float:
    return statistics.fmean(loss_fn(model, batch).item() for batch in batches)


def training_steps(
    model: nn.Module, batches: list[Tensor], lr: float, warmup: int = 0
) -> Iterator[float]:
    """Train by Adam, with a rate that falls linearly to 0, and yield the seconds of each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained)
    for step, batch in enumerate(batches):
        began = clock()
        rising = (step + 1) / (warmup + 1)
        falling = 1 - step / len(batches)
        optimizer.param_groups[0]["lr"] = lr * min(rising, falling)
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        yield clock() - began


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # let the GPU finish first
    return time.perf_counter()


# ---------------------------------------------------------------------------- texts


def read_texts(args: argparse.Namespace) -> tuple[str | None, str]:
    """The texts of pre-training (None with --model, unless it is given) and of fine-tuning."""
    try:
        if args.pretrain_text:
            old = Path(args.pretrain_text).read_text(encoding="utf-8")
        elif args.model:
            old = None
        else:
            files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
            old = "\n".join(file.read_text(encoding="utf-8") for file in files)
        if args.finetune_text:
            new = Path(args.finetune_text).read_text(encoding="utf-8")
        else:
            from pydoc_data.topics import topics

            new = "\n".join(topics[name] for name in sorted(topics))[:BYTES_OF_TEXT]
    except (OSError, ImportError) as error:
        sys.exit(f"{error}: pass --pretrain-text FILE, --finetune-text FILE")
    return old, new


def split(text: str, tokenizer: object, args: argparse.Namespace) -> dict[str, Tensor]:
    """Tokens of training, development and test: 8, 1 and 1 of ten blocks of 2,048 characters."""
    blocks = [text[i : i + 2048] for i in range(0, len(text), 2048)]
    parts = {
        "train": "".join(block for i, block in enumerate(blocks) if i % 10 < 8),
        "dev": "".join(blocks[8::10]),
        "test": "".join(blocks[9::10]),
    }
    tokens = {}
    for name, part in parts.items():
        if tokenizer:
            tokens[name] = torch.tensor(tokenizer(part)["input_ids"])
        else:
            tokens[name] = torch.frombuffer(bytearray(part.encode()), dtype=torch.uint8).long()
        if len(tokens[name]) < 2 * args.context:
            sys.exit(f"the {name} part of a text has {len(tokens[name])} tokens: give more text")
    return tokens


def draw(tokens: Tensor, count: int, seed: int, args: argparse.Namespace) -> list[Tensor]:
    """`count` batches of random windows, (batch, context + 1) each."""
    size = args.context + 1
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - size, (count, args.batch, 1), generator=generator)
    return list(tokens[starts + torch.arange(size)].to(args.device))


def draw_training(tokens: Tensor, seed: int, args: argparse.Namespace) -> list[Tensor]:
    """A batch for every step; where data is few, the same ones over and over."""
    distinct = args.train_batches or args.steps
    rounds = math.ceil(args.steps / distinct)
    return (draw(tokens, distinct, 100 + seed, args) * rounds)[: args.steps]


def windows(tokens: Tensor, args: argparse.Namespace) -> list[Tensor]:
    """A held-out text as batches of adjoining windows."""
    rows = tokens.unfold(0, args.context + 1, args.context)  # (windows, context + 1)
    return list(rows.to(args.device).split(args.batch)[:HELD_OUT_BATCHES])


def pretrained(args: argparse.Namespace, tokens: Tensor) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(args.width, args.layers, args.heads, args.context).to(args.device)
    batches = draw(tokens, args.pretrain_steps, 0, args)
    progress = Progress(len(batches))
    for _ in training_steps(model, batches, 3e-3, warmup=100):
        progress.advance("pre-training, the comparison comes after it")
    return model.eval()


class Progress:
    """One line, rewritten in a terminal; elsewhere a new one every 20 seconds."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.began = time.perf_counter()
        self.shown = self.began

    def advance(self, what: str) -> None:
        self.done += 1
        now = time.perf_counter()
        left = (now - self.began) * (self.total / self.done - 1)
        line = f"[{self.done}/{self.total}] {left:4.0f} s left; {what}"
        if sys.stdout.isatty():
            print(f"\r{line:<98.98}", end="", flush=True)
        elif now - self.shown > 20:
            self.shown = now
            print(line, flush=True)


# ---------------------------------------------------------------------------- one run


@dataclass
class Job:
    method: str
    freeze_A: bool
    lr: float
    seed: int


@dataclass
class Run(Job):
    loss_start: float  # on test text, as loss_test
    loss_dev: float
    loss_test: float
    cost_steps: int  # what the start costs by rule
    clock_steps: float  # and by the clock, in training steps


@dataclass
class Start:
    factors: dict[str, tuple[Tensor, Tensor]]  # B and A of every adapter
    seconds: float
    loss_dev: float
    loss_test: float


def cost_steps(method: str, args: argparse.Namespace) -> int:
    """What a start costs, in training steps: they are taken off its training."""
    if method == "hrp":
        return args.preheat_steps
    if method in ("gradient_svd", "lora_da", "cntlora"):
        return args.calibration + SEARCH_STEPS
    return 0


class Experiment:
    """What a process needs to carry out runs: one adapted model, whose factors are set anew."""

    def __init__(
        self, args: argparse.Namespace, model: nn.Module, old: Tensor | None, new: dict[str, Tensor]
    ):
        self.args = args
        self.dev = windows(new["dev"], args)
        self.test = windows(new["test"], args)
        self.old = None if old is None else draw(old, args.calibration, 1, args)
        self.batches = [draw_training(new["train"], seed, args) for seed in range(args.seeds)]
        self.base = None if args.model else copy.deepcopy(model)  # for full fine-tuning
        self.model = model
        self.adapters = lora_init.add_lora(model, args.rank, targets=args.targets)
        self.start = None
        self.start_of = None  # its method and seed

    def run(self, job: Job) -> Run:
        cost = cost_steps(job.method, self.args)
        batches = self.batches[job.seed][cost:]
        if job.method == "none":
            batches = []
        if job.method == "full":
            model = copy.deepcopy(self.base).requires_grad_(True)
            start = Start({}, 0.0, evaluate(model, self.dev), evaluate(model, self.test))
        else:
            model = self.model
            start = self.set_start(job.method, job.seed)
            for adapter in self.adapters.values():
                adapter.lora_A.requires_grad_(not job.freeze_A)

        few_data = self.args.train_batches is not None
        loss_dev = start.loss_dev
        loss_test = start.loss_test
        times = []
        for seconds in training_steps(model, batches, job.lr):
            times.append(seconds)
            at_end = len(times) == len(batches)
            if at_end or (few_data and len(times) % CHECK_EVERY == 0):
                loss = evaluate(model, self.dev)
                if loss < loss_dev or not few_data:  # where data is few, keep the best checkpoint
                    loss_dev = loss
                    loss_test = evaluate(model, self.test)
        clock_steps = start.seconds / statistics.median(times) if times else 0.0
        return Run(
            **asdict(job),
            loss_start=start.loss_test,
            loss_dev=loss_dev,
            loss_test=loss_test,
            cost_steps=cost,
            clock_steps=clock_steps,
        )

    def set_start(self, method: str, seed: int) -> Start:
        """Give the adapters the start's factors; the runs of one start come one after another."""
        if self.start_of != (method, seed):
            began = clock()
            self.find_start(method, seed)
            seconds = clock() - began
            factors = {}
            for name, adapter in self.adapters.items():
                factors[name] = (adapter.lora_B.detach().clone(), adapter.lora_A.detach().clone())
            losses = (evaluate(self.model, self.dev), evaluate(self.model, self.test))
            self.start = Start(factors, seconds, *losses)
            self.start_of = (method, seed)
        self.set_factors(self.start.factors)
        return self.start

    def set_factors(self, factors: dict[str, tuple[Tensor, Tensor]], step: float = 1.0) -> None:
        for name, adapter in self.adapters.items():
            B, A = factors[name]
            adapter.set_factors(step * B, A)

    def find_start(self, method: str, seed: int) -> None:
        args = self.args
        batches = self.batches[seed]
        look = batches[: args.calibration + 1]  # the last one chooses the step
        torch.manual_seed(seed)
        for adapter in self.adapters.values():  # plain LoRA
            nn.init.kaiming_uniform_(adapter.lora_A, a=math.sqrt(5))
            nn.init.zeros_(adapter.lora_B)
        if method == "orthonormal":
            for adapter in self.adapters.values():
                nn.init.orthogonal_(adapter.lora_A)
        elif method == "gradient_svd":
            self.find_gradient_svd(look[:-1], look[-1])
        elif method == "lora_da":
            different = batches[: args.train_batches]
            n_train = len(different) * batches[0][:, 1:].numel()
            lora_init.init_lora_da(self.model, look, loss_fn, n_train=n_train)
        elif method == "hrp":
            preheat = batches[: args.preheat_steps]
            lora_init.init_hrp(self.model, preheat, loss_fn, lr=args.preheat_lr, seed=seed)
        elif method == "cntlora":
            lora_init.init_cntlora(self.model, look, loss_fn, pretrain_batches=self.old)

    def find_gradient_svd(self, batches: list[Tensor], held_out: Tensor) -> None:
        """The rank-r part of −G, times the best of twelve steps, as many as LoRA-DA tries.

        −G has not been divided by a curvature, so that its steps are longer.
        """
        means = lora_init.collect_statistics(self.model, self.adapters, batches, loss_fn)
        r = self.args.rank
        factors = {}
        for name in self.adapters:
            U, S, V_t = torch.linalg.svd(means[name].gradient, full_matrices=False)
            factors[name] = (-U[:, :r] * S[:r], V_t[:r])
        losses = {}
        for step in [0.0] + [4.0**k for k in range(-2, 9)]:
            self.set_factors(factors, step)
            losses[step] = evaluate(self.model, [held_out])
        self.set_factors(factors, min(losses, key=losses.get))


# ---------------------------------------------------------------------------- all runs

EXPERIMENT = None  # of this process


def set_up(args: argparse.Namespace, *given: object) -> None:
    global EXPERIMENT
    if args.processes > 1:
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process answers Ctrl-C
    EXPERIMENT = Experiment(args, *given)


def carry_out(job: Job) -> Run:
    return EXPERIMENT.run(job)


def all_jobs(args: argparse.Namespace) -> list[Job]:
    jobs = [Job("none", True, 0.0, 0)]
    for seed in range(args.seeds):
        for method in args.methods:
            for freeze_A in [False] if method == "full" else [True, False]:
                for lr in args.rates:
                    rate = lr * FULL_RATE if method == "full" else lr
                    jobs.append(Job(method, freeze_A, rate, seed))
    return jobs


def compare(args: argparse.Namespace, *given: object) -> list[Run]:
    """All runs, shared by processes; after Ctrl-C those that are finished."""
    jobs = all_jobs(args)
    progress = Progress(len(jobs))
    runs = []
    pool = None
    try:
        if args.processes > 1:
            context = multiprocessing.get_context("spawn")
            pool = context.Pool(args.processes, set_up, (args, *given))
            finished = pool.imap_unordered(carry_out, jobs)
        else:
            set_up(args, *given)
            finished = map(carry_out, jobs)
        for run in finished:
            runs.append(run)
            frozen = "frozen" if run.freeze_A else "trained"
            what = f"{run.method}, A {frozen}, rate {run.lr:g}, seed {run.seed}"
            progress.advance(f"{what}: {run.loss_test:.4f}")
    except KeyboardInterrupt:
        print(f"\ninterrupted: {len(runs)} of {len(jobs)} runs are finished, and count")
    finally:
        if pool:
            pool.terminate()
    order = ["none", *METHODS]
    return sorted(runs, key=lambda run: (order.index(run.method), run.lr, run.seed))


# ---------------------------------------------------------------------------- the report


class Results:
    """The runs of one setting, by method, rate and seed."""

    def __init__(self, runs: list[Run], freeze_A: bool):
        self.setting = "frozen" if freeze_A else "trained"
        self.none = next(run.loss_test for run in runs if run.method == "none")
        self.full = {}  # {rate: {seed: run}}
        self.cells = {}  # {method: {rate: {seed: run}}}
        for run in runs:
            if run.method == "full":
                self.full.setdefault(run.lr, {})[run.seed] = run
            elif run.method != "none" and run.freeze_A == freeze_A:
                row = self.cells.setdefault(run.method, {})
                row.setdefault(run.lr, {})[run.seed] = run

    def best_loss(self, method: str) -> float:
        row = self.cells[method]
        return mean(row[best_rate(row)], "loss_test")


def mean(runs: dict[int, Run], name: str) -> float:
    return statistics.fmean(getattr(run, name) for run in runs.values())


def best_rate(row: dict[float, dict[int, Run]]) -> float:
    """The rate with the least mean loss on development text."""
    return min(row, key=lambda lr: mean(row[lr], "loss_dev"))


@dataclass
class Difference:
    """Test loss minus plain LoRA's, paired by seed, with half of a 95 % interval."""

    method: str
    mean: float
    half: float
    cost_steps: int

    def __str__(self) -> str:
        return (
            f"{self.mean:+.4f} ± {self.half:.4f}" if self.half < math.inf else f"{self.mean:+.4f}"
        )


def differences(results: Results, lr: float | None = None) -> dict[str, Difference]:
    """The differences of all methods at the rate `lr`, or of each at its best rate."""
    found = {}
    for method, row in results.cells.items():
        lora = results.cells["lora"]
        ours = row.get(lr or best_rate(row), {})
        theirs = lora.get(lr or best_rate(lora), {})
        gaps = [ours[seed].loss_test - theirs[seed].loss_test for seed in ours if seed in theirs]
        if method == "lora" or not gaps:
            continue
        half = math.inf  # one or two seeds prove nothing
        if len(gaps) in T_95:
            half = T_95[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
        cost = next(iter(ours.values())).cost_steps
        found[method] = Difference(method, statistics.fmean(gaps), half, cost)
    return found


def verdict(found: dict[str, Difference]) -> str:
    """What the intervals say, in words."""
    groups = {"Clearly below plain LoRA": [], "Clearly above it": [], "Not clearly different": []}
    for difference in found.values():
        if abs(difference.mean) <= difference.half:
            group = "Not clearly different"
        elif difference.mean < 0:
            group = "Clearly below plain LoRA"
        else:
            group = "Clearly above it"
        groups[group].append(f"{difference.method} ({difference.cost_steps} steps)")
    return " ".join(f"{group}: {', '.join(names) or 'none'}." for group, names in groups.items())


def print_losses(results: Results, rates: list[float]) -> None:
    print(f"{'':<13}" + "".join(f"{rate:>9g}" for rate in rates))
    for method, row in results.cells.items():
        line = f"{method:<13}"
        for rate in rates:
            cell = ""
            if rate in row:
                mark = "*" if rate == best_rate(row) else " "
                cell = f"{mean(row[rate], 'loss_test'):.4f}{mark}"
            line += f"{cell:>9}"
        print(line)
    print("* its best rate by development text")
    line = f"no adapter: {results.none:.4f}"
    if results.full:
        rate = best_rate(results.full)
        loss = mean(results.full[rate], "loss_test")
        line += f"; full fine-tuning: {loss:.4f} at its best rate {rate:g}"
    print(line)


def print_differences(results: Results, quarter: float, gap: float | None) -> None:
    at_best = differences(results)
    at_quarter = differences(results, quarter)
    print("\nminus plain LoRA, paired by seed, with a 95 % interval; the start's loss and its cost")
    header = f"{'':<13}{'best rates':>18}{f'all at {quarter:g}':>18}{'start':>9}"
    header += f"{'cost':>6}{'clock':>7}"
    print(header + (f"{'gap closed':>12}" if gap else ""))
    for method, difference in at_best.items():
        row = results.cells[method]
        best = row[best_rate(row)]
        clock_steps = statistics.median(run.clock_steps for run in best.values())
        line = f"{method:<13}{str(difference):>18}{str(at_quarter.get(method, '')):>18}"
        line += f"{mean(best, 'loss_start'):9.4f}{difference.cost_steps:6}{clock_steps:7.1f}"
        if gap:
            won = results.best_loss("lora") - results.best_loss(method)
            line += f"{won / gap:12.0%}"
        print(line)
    best = f"A {results.setting}, each method at its best rate (plain LoRA's is {4 * quarter:g})."
    print("\n" + textwrap.fill(f"{best} {verdict(at_best)}", 98))
    if at_quarter:
        same = f"A {results.setting}, all at {quarter:g}, a quarter of plain LoRA's best rate."
        print("\n" + textwrap.fill(f"{same} {verdict(at_quarter)}", 98))


def report(runs: list[Run], args: argparse.Namespace) -> None:
    frozen = Results(runs, freeze_A=True)
    trained = Results(runs, freeze_A=False)
    gap = None  # what freezing A costs plain LoRA
    if "lora" in frozen.cells and "lora" in trained.cells:
        gap = frozen.best_loss("lora") - trained.best_loss("lora")
    for results in (frozen, trained):
        unit = "token" if args.model else "byte"
        print(f"\n\nA {results.setting}: test loss in nats per {unit}, by learning rate")
        print_losses(results, args.rates)
        if "lora" in results.cells:
            quarter = best_rate(results.cells["lora"]) / 4
            print_differences(results, quarter, gap if results is frozen else None)
    print(
        "\ncost, also in brackets: steps taken off for the start; clock: what the start took here"
    )
    if gap:
        print(f"gap closed: of the {gap:.4f} between plain LoRA with A frozen and with A trained")


def plot(runs: list[Run], file: str) -> None:
    import matplotlib.figure

    matplotlib.rcParams["svg.hashsalt"] = "lora"  # the same runs give the same bytes
    figure = matplotlib.figure.Figure(figsize=(9, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lowest = min(run.loss_test for run in runs if run.method != "full")
    for panel, freeze_A in zip(panels, (True, False), strict=True):
        results = Results(runs, freeze_A)
        for method, row in results.cells.items():
            rates = sorted(row)
            losses = [[run.loss_test for run in row[rate].values()] for rate in rates]
            color = "black" if method == "lora" else f"C{METHODS.index(method)}"
            means = [statistics.fmean(of_seeds) for of_seeds in losses]
            lows = [min(of_seeds) for of_seeds in losses]
            highs = [max(of_seeds) for of_seeds in losses]
            panel.plot(rates, means, marker="o", markersize=3, color=color, label=method)
            panel.fill_between(rates, lows, highs, color=color, alpha=0.12, linewidth=0)
            panel.set_xscale("log", base=2)
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
        panel.axhline(results.none, color="gray", linestyle="--", label="no adapter")
        room = results.none - lowest
        panel.set_ylim(lowest - 0.1 * room, results.none + 0.2 * room)
        panel.set_xlabel("learning rate")
        panel.set_title(f"A {results.setting}")
    panels[0].set_ylabel("test loss, nats (band: all seeds)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(file, metadata={"Date": None} if file.endswith(".svg") else None)


def prepare(args: argparse.Namespace) -> tuple[nn.Module, Tensor | None, dict[str, Tensor]]:
    """The model, the old text's tokens, and the new text's."""
    tokenizer = None
    old_text, new_text = read_texts(args)
    if args.model:
        model, tokenizer = load_hugging_face(args)
    old = None if old_text is None else split(old_text, tokenizer, args)["train"]
    new = split(new_text, tokenizer, args)
    if not args.model:
        model = pretrained(args, old)
    return model, old, new


def main() -> None:
    args = parse_args()
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, {args.device}, "
        f"{args.processes} processes, seeds 0..{args.seeds - 1}",
        flush=True,
    )
    try:
        model, old, new = prepare(args)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted before the first run: there is nothing to compare yet")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"\n{parameters:,} parameters, adapters of rank {args.rank} on {','.join(args.targets)}; "
        f"{args.steps} steps of\n{args.batch} x {args.context} tokens; starts are fitted to "
        f"{args.calibration} batches; HRP preheats {args.preheat_steps} steps at "
        f"{args.preheat_lr:g}",
        flush=True,
    )
    runs = compare(args, model, old, new)
    if args.json:
        text = json.dumps({"runs": [asdict(run) for run in runs]}, indent=1)
        Path(args.json).write_text(text, encoding="utf-8")
    if any(run.method == "none" for run in runs):
        report(runs, args)
        if args.plot:
            plot(runs, args.plot)


if __name__ == "__main__":
    main()
