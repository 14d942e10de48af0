# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""Does a data-driven start help? LoRA on a language model, at equal cost and at every rate.

By default a small transformer with bytes as tokens is pre-trained on the source of Python's
standard library and fine-tuned on Python's language reference: every Python carries both. On a GPU
it is larger. `--model` takes a causal language model of Hugging Face instead. What a start costs is
taken off its training. Development text chooses each method's best rate, and test text gives the
losses that are reported. The runs of one method are trained side by side: `torch.vmap` calls one
model with the adapters of all of them.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import math
import os
import statistics
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # or threads wait too busily on a busy machine

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_init

METHODS = ["lora", "lora_da", "hrp", "cntlora", "gradient_svd", "white", "orthonormal"]
PRESETS = {
    "small": {"width": 128, "layers": 4, "heads": 4, "context": 128, "batch": 4, "fit": 5},
    "large": {"width": 512, "layers": 8, "heads": 8, "context": 256, "batch": 8, "fit": 5},
}
PRETRAIN_UPDATES = 1500
HELD_OUT_TOKENS = 8192  # at most, of development text and of test text
CHECK_EVERY = 8  # updates between two checkpoints, where data is few
SEARCH = 7  # fourteen forward passes choose a step; two cost about as much as one update
TRAINED_RATE = 1 / 4  # with A trained, the rates are those of A frozen times this
T_95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="name or folder of a Hugging Face model; else a transformer of our own")
    add("--text", help="text file or folder to fine-tune on; else the language reference")
    add("--targets", help="layers to adapt; q,v or, with --model, q_proj,v_proj")
    add("--rank", type=int, default=2, help="of every adapter")
    add("--updates", type=int, default=50, help="of Adam, with a linearly falling rate")
    add(
        "--methods",
        default=",".join(METHODS[:4]),
        help="lora_da:60 fits it to 60 batches, and so for each method that looks at data",
    )
    add(
        "--rates",
        default="0.02,0.04,0.08,0.16,0.32",
        help="for A frozen; A trained takes a quarter",
    )
    add("--damping", type=float, default=1.0, help="of lora_da")
    add("--seeds", type=int, default=4, help="how many: of the batches and of the starts")
    add("--train-batches", type=int, help="few data: that many batches, repeated over and over")
    add("--json", help="keep finished runs in this file, and go on from those that it holds")
    add(
        "--plot",
        help="draw loss against rate, or against tokens fitted where a method has :N",
    )
    add("--fast", action="store_true", help="smoke test: sets --updates, --seeds and --rates")
    args = parser.parse_args()

    size = "small" if DEVICE.type == "cpu" else "large"
    defaults = {"targets": "q,v", **PRESETS[size]}
    if args.model:
        defaults = {"targets": "q_proj,v_proj", "context": 96, "batch": 2, "fit": 60}
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.name = Path(args.model).name if args.model else f"the {size} transformer"
    args.pretrain_updates = PRETRAIN_UPDATES
    if args.fast:
        args.pretrain_updates = 40
        args.updates = 20
        args.seeds = 2
        args.rates = "0.04,0.16"
    args.targets = args.targets.split(",")
    args.methods = args.methods.split(",")
    args.rates = [float(rate) for rate in args.rates.split(",")]

    if not {method.partition(":")[0] for method in args.methods} <= set(METHODS):
        parser.error(f"--methods are some of {','.join(METHODS)}")
    if not 1 <= args.seeds <= max(T_95):
        parser.error(f"--seeds is not in 1..{max(T_95)}")
    if max(cost(method, args) for method in args.methods) >= args.updates:
        parser.error("a start costs more than --updates: give more, or fit to fewer batches")
    if (
        args.train_batches
        and max(batches_fitted(method, args) for method in args.methods) >= args.train_batches
    ):
        parser.error("--train-batches has to exceed the batches fitted: the next chooses the step")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    return args


def batches_fitted(method: str, args: argparse.Namespace) -> int:
    """The batches that a start is fitted to."""
    _, _, batches = method.partition(":")
    return int(batches or args.fit)


def cost(method: str, args: argparse.Namespace) -> int:
    """What a start costs, in updates: they are taken off its training."""
    kind = method.partition(":")[0]
    if kind in ("lora", "orthonormal"):
        return 0
    if kind == "white":
        return math.ceil(batches_fitted(method, args) / 2)  # forward passes alone
    return (
        batches_fitted(method, args) + SEARCH
    )  # hrp preheats for as many updates as the others cost


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
        scores = q @ k.mT / math.sqrt(q.shape[-1])  # (N, heads, T, T)
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(diagonal=1)
        h = scores.masked_fill(later, -math.inf).softmax(dim=-1) @ v
        h = h.transpose(1, 2).reshape(N, T, C)
        x = x + self.o(h)
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


def load_hugging_face(name: str) -> tuple[nn.Module, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # "eager": attention by matrix products, which vmap can batch; "auto": the dtype of the file
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", attn_implementation="eager")
    model.config.use_cache = False
    return model.to(DEVICE), AutoTokenizer.from_pretrained(name)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean −log p of the next token, in nats; batch (N, T + 1)."""
    output = model(batch[:, :-1])
    logits = getattr(output, "logits", output)  # (N, T, vocabulary)
    labels = batch[:, 1:].flatten()
    return F.cross_entropy(logits.float().flatten(0, 1), labels)


def pretrain(model: nn.Module, batches: Tensor, progress: "Progress") -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = linear_schedule(optimizer, len(batches), warmup=100)
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        schedule.step()
        progress.advance("pre-training")
    model.zero_grad()


def linear_schedule(
    optimizer: torch.optim.Optimizer, updates: int, warmup: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate rises for `warmup` updates, and falls linearly to 0."""

    def factor(update: int) -> float:
        return min((update + 1) / (warmup + 1), 1 - update / updates)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ---------------------------------------------------------------------------- texts


def read_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The documents of pre-training (none with --model) and of fine-tuning."""
    old = []
    if not args.model:
        library = Path(sysconfig.get_paths()["stdlib"])
        old = read_files(sorted(library.glob("*.py")))
    if not args.text:
        from pydoc_data.topics import topics

        return old, [topics[name] for name in sorted(topics)]
    path = Path(args.text)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return old, read_files(files)
    text = path.read_text(encoding="utf-8")
    begins = range(0, len(text), 2048)
    return old, [text[i : i + 2048] for i in begins]


def read_files(files: list[Path]) -> list[str]:
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def split(documents: list[str], tokenizer: object, args: argparse.Namespace) -> dict[str, Tensor]:
    """Tokens of training, development and test: 8, 1 and 1 of ten documents."""
    parts = {
        "train": [document for i, document in enumerate(documents) if i % 10 < 8],
        "dev": documents[8::10],
        "test": documents[9::10],
    }
    tokens = {}
    for name, part in parts.items():
        text = "\n".join(part)
        if tokenizer:
            tokens[name] = torch.tensor(tokenizer(text)["input_ids"])
        else:
            tokens[name] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        if len(tokens[name]) < (args.batch + 1) * args.context:
            sys.exit(f"the {name} part of a text has {len(tokens[name])} tokens: give more text")
    return tokens


def windows(tokens: Tensor, args: argparse.Namespace) -> Tensor:
    """All sequences of a text, (sequences, context + 1): the last token starts the next one."""
    return tokens.unfold(0, args.context + 1, args.context)


def draw(tokens: Tensor, count: int, seed: int, args: argparse.Namespace) -> Tensor:
    """Random batches without repetition, (count, batch, context + 1)."""
    rows = windows(tokens, args)
    if len(rows) < count * args.batch:
        sys.exit(f"{count} batches need {count * args.batch} sequences; the text has {len(rows)}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[: count * args.batch]
    return rows[chosen].unflatten(0, (count, args.batch)).to(DEVICE)


def held_out(tokens: Tensor, args: argparse.Namespace) -> list[Tensor]:
    """Whole batches of sequences, from all over a held-out text."""
    rows = windows(tokens, args)
    batches = min(HELD_OUT_TOKENS // args.context, len(rows)) // args.batch
    every = len(rows) // (batches * args.batch)
    chosen = rows[::every][: batches * args.batch]
    return list(chosen.to(DEVICE).split(args.batch))


class Progress:
    """A line every 20 seconds: what is done, and the time that is left."""

    def __init__(self, total: float):
        self.total = total
        self.done = 0.0
        self.began = time.perf_counter()
        self.shown = self.began

    def advance(self, what: str, work: float = 1.0) -> None:
        self.done += work
        now = time.perf_counter()
        if now - self.shown > 20:
            self.shown = now
            left = (now - self.began) * (self.total / self.done - 1)
            print(f"[{self.done / self.total:4.0%}] {left:5.0f} s left; {what}", flush=True)


# ---------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Job:
    method: str
    freeze_A: bool
    lr: float
    seed: int
    updates: int  # including what the start costs


@dataclass
class Start:
    """What a start has found."""

    tensors: dict[str, Tensor]  # to be trained, by parameter name
    step: float
    loss: float  # on test text


@dataclass
class Run:
    job: Job
    loss_start: float  # on test text, as loss_test
    loss_dev: float
    loss_test: float
    step: float  # that the start has chosen
    tokens: int  # that it was fitted to
    cost: int  # in updates
    loss_no_adapter: float  # on test text


def losses(model: nn.Module, stacked: dict[str, Tensor], batch: Tensor) -> Tensor:
    """The loss of each run (runs,). `stacked` holds each trained tensor of all runs (runs, …).

    The batch is one for all runs (N, T + 1), or one for each (runs, N, T + 1).
    """

    def loss_of_one(tensors: dict[str, Tensor], batch: Tensor) -> Tensor:
        return loss_fn(functools.partial(torch.func.functional_call, model, tensors), batch)

    shared = batch.dim() == 2
    return torch.vmap(loss_of_one, in_dims=(0, None if shared else 0))(stacked, batch)


@torch.no_grad()
def evaluate(model: nn.Module, stacked: dict[str, Tensor], batches: list[Tensor]) -> Tensor:
    """The mean loss of each run (runs,) on a held-out text."""
    by_batch = [losses(model, stacked, batch) for batch in batches]
    total = torch.stack(by_batch).mean(dim=0)
    return total.nan_to_num(nan=math.inf, posinf=math.inf)  # a run that has diverged


@torch.no_grad()
def adam_step(
    optimizer: torch.optim.Optimizer, stacked: dict[str, Tensor], rates: dict[str, Tensor]
) -> None:
    """A step of Adam with a rate for each run: it is taken at rate 1, and each run gets its share.

    Adam's steps are proportional to the rate, and its moments do not depend on it.
    """
    before = {name: tensor.clone() for name, tensor in stacked.items()}
    optimizer.step()
    for name, tensor in stacked.items():
        tensor.copy_(before[name].lerp(tensor, rates[name]))


class Experiment:
    """A model with adapters, and the batches of a text."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        old: Tensor | None,
        new: dict[str, Tensor],
        progress: Progress,
    ):
        self.args = args
        self.progress = progress
        self.dev = held_out(new["dev"], args)
        self.test = held_out(new["test"], args)
        self.old = None if old is None else list(draw(old, args.fit, 1, args))
        self.batches = []  # of each seed: (updates, batch, context + 1)
        for seed in range(args.seeds):
            different = draw(new["train"], args.train_batches or args.updates, 100 + seed, args)
            rounds = math.ceil(args.updates / len(different))
            self.batches.append(different.repeat(rounds, 1, 1)[: args.updates])
        self.model = model
        self.adapters = lora_init.add_lora(model, args.rank, targets=args.targets)
        self.no_adapter = self.loss(self.test)

    def carry_out(self, jobs: list[Job]) -> list[Run]:
        """The jobs of one method, side by side."""
        method = jobs[0].method
        updates = cost(method, self.args)  # they go to the start
        fitted = batches_fitted(method, self.args) if updates else 0
        seeds = sorted({job.seed for job in jobs})
        starts = {seed: self.find_start(method, seed) for seed in seeds}
        trained_by_job = torch.tensor([not job.freeze_A for job in jobs], device=DEVICE)
        rate_by_job = torch.tensor([job.lr for job in jobs], device=DEVICE)
        stacked = {}
        rates = {}
        for name in starts[jobs[0].seed].tensors:
            tensors = [starts[job.seed].tensors[name] for job in jobs]
            stacked[name] = torch.stack(tensors).requires_grad_()  # (runs, …)
            rate = rate_by_job * trained_by_job if name.endswith("lora_A") else rate_by_job
            rates[name] = rate[:, None, None]
        all_batches = [self.batches[job.seed] for job in jobs]
        batches = torch.stack(all_batches, dim=1)[updates:]

        loss_dev = torch.full((len(jobs),), math.inf, device=DEVICE)
        loss_test = loss_dev
        optimizer = torch.optim.Adam(stacked.values(), lr=1.0)
        schedule = linear_schedule(optimizer, len(batches), warmup=len(batches) // 20)
        for update, batch in enumerate(batches, start=1):
            optimizer.zero_grad()
            losses(self.model, stacked, batch).sum().backward()
            adam_step(optimizer, stacked, rates)
            schedule.step()
            self.progress.advance(f"{method}, seeds {seeds}", work=len(jobs))
            check = self.args.train_batches and update % CHECK_EVERY == 0
            if check or update == len(batches):  # with few data the best checkpoint counts
                loss = evaluate(self.model, stacked, self.dev)
                better = loss < loss_dev
                loss_dev = loss.where(better, loss_dev)
                loss_test = evaluate(self.model, stacked, self.test).where(better, loss_test)
        self.progress.advance(f"{method}, seeds {seeds}", work=updates * len(jobs))

        finished = []
        for i, job in enumerate(jobs):
            start = starts[job.seed]
            run = Run(
                job=job,
                loss_start=start.loss,
                loss_dev=loss_dev[i].item(),
                loss_test=loss_test[i].item(),
                step=start.step,
                tokens=fitted * self.tokens_of_a_batch(),
                cost=updates,
                loss_no_adapter=self.no_adapter,
            )
            finished.append(run)
        return finished

    @torch.no_grad()
    def loss(self, batches: list[Tensor]) -> float:
        """Of the model with the adapters that it has now, on batches of one size."""
        return statistics.fmean(loss_fn(self.model, batch).item() for batch in batches)

    def tokens_of_a_batch(self) -> int:
        return self.args.batch * self.args.context

    def find_start(self, method: str, seed: int) -> Start:
        kind = method.partition(":")[0]
        torch.manual_seed(seed)
        for adapter in self.adapters.values():
            adapter.reset_parameters()  # plain LoRA
        step = self.initialize(kind, batches_fitted(method, self.args), seed)
        tensors = {}
        for name, adapter in self.adapters.items():
            tensors[f"{name}.lora_A"] = adapter.lora_A.detach().clone()
            tensors[f"{name}.lora_B"] = adapter.lora_B.detach().clone()
        return Start(tensors, step, self.loss(self.test))

    def initialize(self, kind: str, fitted: int, seed: int) -> float:
        """Give the adapters the factors of a start; returns the step that it has chosen."""
        batches = list(self.batches[seed])
        look = batches[: fitted + 1]  # the last one chooses the step
        if kind == "orthonormal":
            for adapter in self.adapters.values():
                nn.init.orthogonal_(adapter.lora_A)
        elif kind == "white":
            self.set_white(look[:-1])
        elif kind == "gradient_svd":
            return self.set_gradient_svd(look[:-1], look[-1])
        elif kind == "lora_da":
            n_train = (self.args.train_batches or self.args.updates) * self.tokens_of_a_batch()
            damping = self.args.damping
            return lora_init.init_lora_da(
                self.model, look, loss_fn, n_train=n_train, damping=damping
            )
        elif kind == "hrp":
            preheat = batches[: fitted + SEARCH]  # as many updates as the other starts cost
            lora_init.init_hrp(self.model, preheat, loss_fn, seed=seed)
        elif kind == "cntlora":
            return lora_init.init_cntlora(self.model, look, loss_fn, pretrain_batches=self.old)
        return 1.0

    def set_white(self, batches: list[Tensor]) -> None:
        """Plain LoRA's random A in the basis of `lora_da`: what the basis alone does."""
        means = lora_init.collect_statistics(
            self.model, self.adapters, batches, loss_fn, backward=False
        )
        for name, adapter in self.adapters.items():
            Z = means[name].input_moment
            adapter.set_factors(*lora_init.white_basis(adapter.lora_B, adapter.lora_A, Z))

    def set_gradient_svd(self, batches: list[Tensor], held_out_batch: Tensor) -> float:
        """LoRA-DA with Z = I and Y = 1: the part of rank r of −G, and the best of fourteen steps.

        −G has not been divided by a curvature, so that its steps are longer.
        """
        means = lora_init.collect_statistics(self.model, self.adapters, batches, loss_fn)
        factors = {}
        for name in self.adapters:
            G = means[name].gradient
            Z = torch.eye(G.shape[1], device=DEVICE)
            Y = torch.ones(len(G), device=DEVICE)
            exact = {"variance": 0, "damping": 0}
            factors[name] = lora_init.lora_da(G, Z, Y, self.args.rank, n_train=1, **exact)

        def loss_at(step: float) -> float:
            for name, adapter in self.adapters.items():
                B, A = factors[name]
                adapter.set_factors(step * B, A)
            return self.loss([held_out_batch])

        grid = [0.0] + [4.0**k for k in range(-4, 9)]
        found = {step: loss_at(step) for step in grid}
        best = min(found, key=found.__getitem__)
        loss_at(best)
        return best


def all_jobs(args: argparse.Namespace) -> list[list[Job]]:
    """The jobs in the order of their work: the jobs of an inner list run side by side."""
    groups = []
    seeds = list(range(args.seeds))
    together = [seeds] if DEVICE.type == "cuda" else [[seed] for seed in seeds]
    for chosen in together:
        for method in args.methods:
            jobs = []
            for seed in chosen:
                for lr in args.rates:
                    jobs.append(Job(method, True, lr, seed, args.updates))
                    jobs.append(Job(method, False, lr * TRAINED_RATE, seed, args.updates))
            groups.append(jobs)
    return groups


# ---------------------------------------------------------------------------- the file of runs


def read_runs(args: argparse.Namespace) -> dict[Job, Run]:
    """The runs of earlier calls, if they were made by this code with these settings."""
    if not args.json or not Path(args.json).exists():
        return {}
    header, *lines = Path(args.json).read_text(encoding="utf-8").splitlines()
    if json.loads(header) != settings(args):
        sys.exit(f"{args.json} holds runs of other code or settings: delete it, or name another")
    runs = {}
    for line in lines:
        content = json.loads(line)
        job = Job(**content.pop("job"))
        runs[job] = Run(job, **content)
    return runs


def settings(args: argparse.Namespace) -> dict[str, object]:
    """All that changes a run and is not written in it."""
    code = Path(__file__).read_bytes() + Path(lora_init.__file__).read_bytes()
    texts = repr(read_texts(args)).encode()
    names = ["model", "targets", "rank", "damping", "context", "batch", "train_batches"]
    found = {name: getattr(args, name) for name in [*names, "pretrain_updates"]}
    return {
        **found,
        "code": hashlib.sha256(code).hexdigest(),
        "texts": hashlib.sha256(texts).hexdigest(),
        "torch": torch.__version__,
        "device": DEVICE.type,
    }


def write_line(args: argparse.Namespace, content: dict[str, object]) -> None:
    if args.json:
        with Path(args.json).open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")


# ---------------------------------------------------------------------------- the report

Cell = dict[int, Run]  # the runs of one method at one rate, by seed
Rows = dict[str, dict[float, Cell]]  # by method and rate


def rows_of(runs: list[Run], freeze_A: bool, updates: int) -> Rows:
    rows = {}
    for run in runs:
        job = run.job
        if job.freeze_A == freeze_A and job.updates == updates:
            row = rows.setdefault(job.method, {})
            cell = row.setdefault(job.lr, {})
            cell[job.seed] = run
    return rows


def mean(cell: Cell, name: str) -> float:
    return statistics.fmean(getattr(run, name) for run in cell.values())


def best_rate(row: dict[float, Cell]) -> float:
    """The rate with the least mean loss on development text."""
    return min(row, key=lambda lr: mean(row[lr], "loss_dev"))


def best_cell(row: dict[float, Cell]) -> Cell:
    return row[best_rate(row)]


def difference(ours: Cell, plain: Cell) -> str:
    """Test loss minus plain LoRA's, paired by seed, with its 95 % interval."""
    gaps = [ours[seed].loss_test - plain[seed].loss_test for seed in ours]
    if len(gaps) not in T_95:  # one or two seeds prove nothing
        return f"{statistics.fmean(gaps):+.4f}"
    standard_error = statistics.stdev(gaps) / math.sqrt(len(gaps))
    half = T_95[len(gaps)] * standard_error
    return f"{statistics.fmean(gaps):+.4f} ± {half:.4f}"


def print_losses(rows: Rows) -> None:
    rates = sorted({rate for row in rows.values() for rate in row})
    print(f"{'':<14}" + "".join(f"{rate:>10g}" for rate in rates))
    for method, row in rows.items():
        line = f"{method:<14}"
        for rate in rates:
            best = "*" if rate == best_rate(row) else " "
            line += f"{mean(row[rate], 'loss_test'):9.4f}{best}"
        print(line)
    print("* its best rate by development text")


def print_differences(rows: Rows) -> None:
    """Each method minus plain LoRA, at the best rates and at a quarter of plain LoRA's."""
    lora = rows["lora"]
    quarter = best_rate(lora) / 4
    print("\nminus plain LoRA, paired by seed, with a 95 % interval; the start's loss and cost")
    print(f"{'':<14}{'best rates':>20}{f'all at {quarter:g}':>20}{'start':>9}{'cost':>6}")
    for method, row in rows.items():
        if method == "lora":
            continue
        best = best_cell(row)
        at_best = difference(best, best_cell(lora))
        at_quarter = difference(row[quarter], lora[quarter]) if quarter in row else ""
        start = mean(best, "loss_start")
        print(f"{method:<14}{at_best:>20}{at_quarter:>20}{start:9.4f}{best[0].cost:6}")


def print_steps(rows: Rows) -> None:
    """The steps that the starts have chosen at their best rate."""
    for method, row in rows.items():
        kind = method.partition(":")[0]
        if kind in ("gradient_svd", "lora_da", "cntlora"):
            steps = [run.step for _, run in sorted(best_cell(row).items())]
            print(f"{method} chose the steps {', '.join(f'{step:.3g}' for step in steps)}")
            if 0 in steps:
                print("0 keeps only A, as no step lowered the loss held out")


def report(runs: list[Run], args: argparse.Namespace) -> None:
    for setting, freeze_A in {"A frozen": True, "A trained": False}.items():
        rows = rows_of(runs, freeze_A, args.updates)
        print(f"\n\n{setting}: test loss in nats per token, by learning rate")
        print_losses(rows)
        if "lora" in rows and len(rows) > 1:
            print_differences(rows)
    print()
    print_steps(rows)
    print(f"no adapter: {runs[0].loss_no_adapter:.4f}; cost: updates taken off for the start")
    print("about one in twenty of all these intervals is wrong by chance")


# ---------------------------------------------------------------------------- the figure

Lines = dict[str, dict[float, list[float]]]  # the losses of all seeds, by label and x


def against_rate(runs: list[Run], freeze_A: bool, args: argparse.Namespace) -> Lines:
    """A line a method."""
    lines = {}
    for method, row in rows_of(runs, freeze_A, args.updates).items():
        label = "plain LoRA" if method == "lora" else method
        lines[label] = {}
        for lr, cell in row.items():
            lines[label][lr] = [run.loss_test for run in cell.values()]
    return lines


def against_tokens(runs: list[Run], freeze_A: bool) -> Lines:
    """For each job length plain LoRA, which fits none, and the methods fitted to some tokens."""
    lines = {}
    fitted = [run.tokens for run in runs if run.tokens]
    for updates in sorted({run.job.updates for run in runs}):
        for method, row in rows_of(runs, freeze_A, updates).items():
            cell = best_cell(row)
            found = [run.loss_test for run in cell.values()]
            tokens = next(iter(cell.values())).tokens
            if tokens:
                kind = method.partition(":")[0]
                lines.setdefault(f"{kind}, {updates:,} updates", {})[tokens] = found
            elif fitted:
                ends = (min(fitted), max(fitted))
                lines[f"plain LoRA, {updates:,} updates"] = dict.fromkeys(ends, found)
    return lines


def plot(runs: list[Run], by_tokens: bool, args: argparse.Namespace) -> None:
    """Two panels, A frozen and A trained; bands span all seeds of the first two lines."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "lora"  # the same runs give the same bytes
    colors = ["black", "tab:red", "tab:purple", "tab:blue", "tab:green", "gray", "tab:orange"]
    styles = cycler(color=colors)
    styles += cycler(linestyle=["-", "-", "-.", ":", "--", ":", "--"])
    styles += cycler(marker=["o", "D", "v", "P", "^", "s", "x"])
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    no_adapter = runs[0].loss_no_adapter
    for panel, freeze_A in zip(panels, (True, False), strict=True):
        panel.set_prop_cycle(styles)
        lines = against_tokens(runs, freeze_A) if by_tokens else against_rate(runs, freeze_A, args)
        for number, (label, points) in enumerate(lines.items()):
            x = sorted(points)
            means = [statistics.fmean(points[value]) for value in x]
            (line,) = panel.plot(x, means, markersize=4, label=label)
            if number < 2:  # more bands could not be told apart
                lows = [min(points[value]) for value in x]
                highs = [max(points[value]) for value in x]
                panel.fill_between(x, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.axhline(no_adapter, color="gray", linewidth=0.8, label="no adapter")
        panel.set_xscale("log", base=2)
        ticks = sorted({value for points in lines.values() for value in points})
        panel.set_xticks(ticks, [f"{value:g}" for value in ticks], rotation=45)
        panel.set_xlabel("tokens fitted" if by_tokens else "learning rate")
        panel.set_title(f"A {'frozen' if freeze_A else 'trained'}", fontsize="medium")
    panels[0].set_ylim(top=1.01 * no_adapter)  # runs that diverge end above
    panels[0].set_ylabel("test loss, nats (bands: all seeds of two)")
    lengths = sorted({run.job.updates for run in runs})
    updates = " and ".join(f"{length:,}" for length in lengths)
    figure.suptitle(f"{args.name}, rank {args.rank}, {updates} updates, start's cost included")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(args.plot, metadata={"Date": None})


# ---------------------------------------------------------------------------- the command


def prepare(args: argparse.Namespace, work: float) -> Experiment:
    """The model, pre-trained, and the texts; `work` is what the runs will take, in updates."""
    old_documents, new_documents = read_texts(args)
    tokenizer = None
    if args.model:
        model, tokenizer = load_hugging_face(args.model)
    else:
        torch.manual_seed(0)
        model = Transformer(args.width, args.layers, args.heads, args.context).to(DEVICE)
    new = split(new_documents, tokenizer, args)
    if args.model:
        return Experiment(args, model.eval(), None, new, Progress(work))
    old = split(old_documents, tokenizer, args)["train"]
    progress = Progress(work + args.pretrain_updates)
    pretrain(model, draw(old, args.pretrain_updates, 0, args), progress)
    return Experiment(args, model.eval(), old, new, progress)


def main() -> None:
    args = parse_args()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {device}", flush=True)
    runs = read_runs(args)
    if not runs:
        write_line(args, settings(args))
    groups = [[job for job in jobs if job not in runs] for jobs in all_jobs(args)]
    if any(groups):
        experiment = prepare(args, work=sum(len(jobs) * args.updates for jobs in groups))
        parameters = sum(parameter.numel() for parameter in experiment.model.parameters())
        print(
            f"{parameters:,} parameters, adapters of rank {args.rank} on "
            f"{','.join(args.targets)}; {args.updates} updates of\n{args.batch} x {args.context} "
            f"tokens; starts are fitted to {args.fit} batches; seeds 0..{args.seeds - 1}; "
            f"{torch.get_num_threads()} threads",
            flush=True,
        )
    for jobs in filter(None, groups):
        for run in experiment.carry_out(jobs):
            runs[run.job] = run
            write_line(args, asdict(run))
    asked = [runs[job] for jobs in all_jobs(args) for job in jobs]
    report(asked, args)
    if args.plot:
        by_tokens = any(":" in method for method in args.methods)
        plot(list(runs.values()) if by_tokens else asked, by_tokens, args)


if __name__ == "__main__":
    main()
