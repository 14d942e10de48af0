# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""Does a data-driven start help? LoRA on a language model, at equal cost and at every rate.

By default a small transformer with bytes as tokens is pre-trained on the source of Python's
standard library and fine-tuned on Python's language reference: both come with Python. On a GPU it
is larger. `--model` takes a causal language model of Hugging Face instead. What a start costs is
taken off its training. Development text chooses each start's best rate, and test text gives the
losses that are reported.

The file reads from top to bottom: settings, the model, the text, the starts, the training, the
report, the command.
"""

import argparse
import importlib.util
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import statistics
import sys
import sysconfig
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_init import add_lora, init_cntlora, init_hrp, init_lora_da, lora_layers

# ---------------------------------------------------------------------------- settings

STYLES = {  # the starts, and the colour, marker and line of each in the figure
    "lora": "ko-",
    "lora_da": "C3D-",
    "hrp": "C4v-.",
    "cntlora": "C0P:",
}
SMALL = {
    "targets": "q,v",
    "width": 128,
    "layers": 3,
    "heads": 4,
    "context": 128,
    "batch": 4,
    "fit": 5,
    "updates": 50,
}
LARGE = SMALL | {"width": 512, "layers": 8, "heads": 8, "context": 256, "batch": 8}
HUGGING_FACE = {
    "targets": "q_proj,v_proj",
    "context": 96,
    "batch": 2,
    "fit": 60,
    "updates": 400,
}
SETTINGS = {True: "A frozen", False: "A trained"}  # freeze_A in words
SEARCH = 6  # a start costs one update per batch fitted, and these (.evidence/cost.py)
HELD_OUT_TOKENS = 8192  # of test text; half as many of development text choose the rates
TRAINED_RATE = 1 / 4  # with A trained, the rates are those of A frozen times this
T_95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)  # these matrices are small: on a CPU every seed has a process instead


@dataclass
class Task:
    """A model, with adapters after add_lora, and batches of text, (batches, batch, context + 1)."""

    model: nn.Module
    train: list[Tensor]  # of each seed
    dev: Tensor
    test: Tensor
    old: list[Tensor] | None  # of pre-training, for cntlora; with --model there are none


@dataclass
class Run:
    """What came of one training."""

    loss_start: float  # on test text, as loss_test
    loss_dev: float
    loss_test: float
    step: float  # that the start has chosen; NaN if it has none


Runs = dict[tuple[str, bool, float], list[Run]]  # by start, A frozen or not, and rate


# ---------------------------------------------------------------------------- the model


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
        q = self.q(h).view(N, T, self.heads, -1).transpose(1, 2)  # (N, heads, T, C / heads)
        k = self.k(h).view(N, T, self.heads, -1).transpose(1, 2)
        v = self.v(h).view(N, T, self.heads, -1).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).reshape(N, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))  # (N, T, C)


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


def hugging_face(args: argparse.Namespace) -> tuple[nn.Module, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(DEVICE)
    model.config.use_cache = False
    return model, AutoTokenizer.from_pretrained(args.model)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean −log p of the next token, in nats; batch (N, T + 1)."""
    output = model(batch[:, :-1])
    logits = getattr(output, "logits", output)  # (N, T, vocabulary)
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Tensor) -> float:
    loss = statistics.fmean(loss_fn(model, batch).item() for batch in batches)
    return loss if math.isfinite(loss) else math.inf  # a run that has diverged


# ---------------------------------------------------------------------------- the text


def old_documents() -> list[str]:
    """What the transformer is pre-trained on: the source of Python's standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def new_documents(file: str | None) -> list[str]:
    """What it is fine-tuned on: Python's language reference, or pieces of a text file."""
    if file is None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    text = Path(file).read_text(encoding="utf-8")
    return [text[i : i + 2048] for i in range(0, len(text), 2048)]


def sequences(documents: list[str], tokenizer: object, context: int) -> Tensor:
    """All sequences of a text, (sequences, context + 1): the last token starts the next one."""
    text = "\n".join(documents)
    tokens = tokenizer(text)["input_ids"] if tokenizer else list(text.encode())
    return torch.tensor(tokens).unfold(0, context + 1, context)


def draw(rows: Tensor, batches: int, batch: int, seed: int) -> Tensor:
    """Random batches of sequences without repetition, (batches, batch, context + 1)."""
    if len(rows) < batches * batch:
        sys.exit(f"{batches} batches take {batches * batch} sequences; the text has {len(rows)}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[: batches * batch]
    return rows[chosen].unflatten(0, (batches, batch)).to(DEVICE)


# ---------------------------------------------------------------------------- the starts


def cost(start: str, args: argparse.Namespace) -> int:
    """What a start costs, in updates: they are taken off its training."""
    return 0 if start == "lora" else args.fit + SEARCH


def find_start(
    start: str, task: Task, batches: Tensor, args: argparse.Namespace, seed: int = 0
) -> float:
    """Give the adapters a start's factors; returns the step that it has chosen, NaN if it has none.

    It looks only at batches that its cost takes off the training: the first ones.
    """
    torch.manual_seed(seed)
    for adapter in lora_layers(task.model).values():
        adapter.reset_parameters()  # plain LoRA
    seen = list(batches[: cost(start, args)])
    look = seen[: args.fit + 1]  # the last one chooses the step
    if start == "lora_da":
        rows = args.updates * args.batch * args.context
        return init_lora_da(task.model, look, loss_fn, n_train=rows, damping=args.damping)
    if start == "cntlora":
        return init_cntlora(task.model, look, loss_fn, pretrain_batches=task.old)
    if start == "hrp":
        init_hrp(task.model, seen, loss_fn, seed=seed)
    return math.nan


# ---------------------------------------------------------------------------- the training


@dataclass
class Progress:
    """Counts the updates of one process, in a number that the first process can read."""

    done: Tensor

    def advance(self, updates: int) -> None:
        self.done += updates


def train(model: nn.Module, batches: Tensor, lr: float, warmup: int, progress: Progress) -> None:
    """Adam on all that requires a gradient; the rate rises for `warmup` updates and falls to 0."""

    def factor(update: int) -> float:
        return min((update + 1) / (warmup + 1), 1 - update / len(batches))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr, fused=True)  # fused: one call for all parameters
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for batch in batches:
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.advance(1)


def pretrained(
    args: argparse.Namespace, seed: int = 0, progress: Progress | None = None
) -> tuple[nn.Module, list[Tensor]]:
    """Our transformer, pre-trained, and further batches of the same text for CNTLoRA."""
    torch.manual_seed(seed)
    model = Transformer(args.width, args.layers, args.heads, args.context).to(DEVICE)
    rows = sequences(old_documents(), None, args.context)
    batches = draw(rows, args.pretrain_updates + args.fit, args.batch, seed)
    progress = progress or Progress(torch.zeros(()))
    train(model, batches[: args.pretrain_updates], 3e-3, 100, progress)
    return model, list(batches[args.pretrain_updates :])


def learning_rate(rate: float, freeze_A: bool) -> float:
    return rate if freeze_A else rate * TRAINED_RATE


def compare(task: Task, seed: int, args: argparse.Namespace, progress: Progress) -> dict:
    """A run of every start, with A frozen and with A trained, at every rate, for one seed."""
    adapters = lora_layers(task.model).values()
    batches = task.train[seed]
    runs = {}
    for start in args.starts:
        step = find_start(start, task, batches, args, seed)
        factors = [(adapter.lora_B.clone(), adapter.lora_A.clone()) for adapter in adapters]
        loss_start = mean_loss(task.model, task.test)
        paid = cost(start, args)
        for freeze_A, rate in itertools.product(SETTINGS, args.rates):
            for adapter, (B, A) in zip(adapters, factors, strict=True):
                adapter.set_factors(B, A)
                adapter.lora_A.requires_grad_(not freeze_A)
            progress.advance(paid)
            lr = learning_rate(rate, freeze_A)
            train(task.model, batches[paid:], lr, args.updates // 20, progress)
            losses = (loss_start, mean_loss(task.model, task.dev), mean_loss(task.model, task.test))
            runs[start, freeze_A, rate] = Run(*losses, step)
    return runs


def compare_in_process(content: bytes, seed: int, args: argparse.Namespace, done: Tensor) -> dict:
    return compare(pickle.loads(content), seed, args, Progress(done))


def compare_all(task: Task, args: argparse.Namespace, done: Tensor) -> Runs:
    """All runs of all seeds. On a CPU each seed has a process, on a GPU they take turns."""
    if DEVICE.type == "cuda":
        by_seed = [compare(task, seed, args, Progress(done[seed])) for seed in range(args.seeds)]
    else:
        # Tensors that are sent to processes share their memory there, as `done` has to. Bytes do
        # not: each process has to train adapters of its own.
        content = pickle.dumps(task)
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # no child hears Ctrl-C
            futures = [
                pool.submit(compare_in_process, content, seed, args, done[seed])
                for seed in range(args.seeds)
            ]
            signal.signal(signal.SIGINT, handler)
            try:
                by_seed = [future.result() for future in futures]
            except BaseException:  # an error of a child, or Ctrl-C
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    return {cell: [runs[cell] for runs in by_seed] for cell in by_seed[0]}


def show_time_left(done: Tensor, args: argparse.Namespace) -> None:
    """Print the time left, over all processes, every 20 seconds.

    `done` counts updates: of pre-training first, then of each seed.
    """
    turns = math.ceil(args.seeds / args.processes)
    total = args.pretrain_updates + turns * args.trainings * args.updates
    while done.sum() == 0:
        time.sleep(0.1)  # model and text are being loaded
    began = time.perf_counter()
    pause = 2  # the first line comes early
    position = 0
    while position < total:
        time.sleep(pause)
        pause = 20
        pretraining, *seeds = done.tolist()
        position = pretraining + turns * statistics.fmean(seeds)
        left = (time.perf_counter() - began) * (total / position - 1)
        print(f"[{position / total:4.0%}] about {left:.0f} s left", flush=True)


# ---------------------------------------------------------------------------- the report


def mean(runs: list[Run], name: str) -> float:
    return statistics.fmean(getattr(run, name) for run in runs)


def best_rate(runs: Runs, start: str, freeze_A: bool, rates: list[float]) -> float:
    """The rate with the least mean loss on development text."""
    return min(rates, key=lambda rate: mean(runs[start, freeze_A, rate], "loss_dev"))


def difference(ours: list[Run], plain: list[Run]) -> tuple[float, float]:
    """Test loss minus plain LoRA's, paired by seed, and half the width of its 95 % interval."""
    gaps = [a.loss_test - b.loss_test for a, b in zip(ours, plain, strict=True)]
    gap = statistics.fmean(gaps)
    if len(gaps) not in T_95 or not math.isfinite(gap):
        return gap, math.inf  # one or two seeds prove nothing, nor do runs that diverge
    return gap, T_95[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))


def verdict(gap: float, half: float) -> str:
    """The difference in words. It is clear if the interval excludes 0."""
    if gap < -half:
        return "clearly lower"
    if gap > half:
        return "clearly higher"
    return "not clearly apart"


def print_table(runs: Runs, freeze_A: bool, args: argparse.Namespace) -> None:
    best = best_rate(runs, "lora", freeze_A, args.rates)
    low = best / 4 if best / 4 in args.rates else min(args.rates)
    *rates, shown_low = [learning_rate(rate, freeze_A) for rate in (*args.rates, low)]
    print(f"\n{SETTINGS[freeze_A]}: test loss in nats by learning rate (* is best on development")
    print("text), before training, and minus lora, paired by seed, with a 95 % interval")
    header = "".join(f"{rate:<9g}" for rate in rates)
    print(f"{'':<9}{header}{'before':<9}{'at best rates':<19}all at {shown_low:g}")
    for start in args.starts:
        chosen = best_rate(runs, start, freeze_A, args.rates)
        line = f"{start:<9}"
        for rate in args.rates:
            loss = mean(runs[start, freeze_A, rate], "loss_test")
            line += f"{loss:.4f}" + ("*  " if rate == chosen else "   ")
        line += f"{mean(runs[start, freeze_A, chosen], 'loss_start'):.4f}   "
        if start != "lora":
            for ours, plain in ((chosen, best), (low, low)):
                gap, half = difference(runs[start, freeze_A, ours], runs["lora", freeze_A, plain])
                interval = f"{gap:+.4f} ± {half:.4f}"
                line += f"{interval:<19}"
        print(line.rstrip())


def report(runs: Runs, no_adapter: float, args: argparse.Namespace) -> None:
    for freeze_A in SETTINGS:
        print_table(runs, freeze_A, args)
    print(f"\nWithout adapters the loss is {no_adapter:.4f}. Each at its best rate, against lora:")
    for start in args.starts:
        if start == "lora":
            continue
        parts = []
        for freeze_A, setting in SETTINGS.items():
            ours = runs[start, freeze_A, best_rate(runs, start, freeze_A, args.rates)]
            plain = runs["lora", freeze_A, best_rate(runs, "lora", freeze_A, args.rates)]
            words = verdict(*difference(ours, plain))
            losses = f"{mean(ours, 'loss_test'):.4f} against {mean(plain, 'loss_test'):.4f}"
            parts.append(f"{words} with {setting} ({losses})")
        print(f"{start} ends {' and '.join(parts)}.")
        if not math.isnan(ours[0].step):
            print(f"It chose the steps {', '.join(f'{run.step:.3g}' for run in ours)}.")


def plot(runs: Runs, no_adapter: float, args: argparse.Namespace) -> None:
    """Test loss against rate in two panels, A frozen and A trained; bars span all seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "lora"  # the same runs give the same bytes
    matplotlib.rcParams["font.size"] = 12  # readable at half the size
    figure = Figure(figsize=(6, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, freeze_A in zip(panels, SETTINGS, strict=True):
        rates = [learning_rate(rate, freeze_A) for rate in args.rates]
        for start in args.starts:
            cells = [runs[start, freeze_A, rate] for rate in args.rates]
            losses = torch.tensor([[run.loss_test for run in cell] for cell in cells])
            middle = losses.mean(dim=1)
            reach = (middle - losses.amin(dim=1), losses.amax(dim=1) - middle)
            panel.errorbar(rates, middle, reach, fmt=STYLES[start], label=start)
        panel.axhline(no_adapter, color="gray", label="no adapter")
        panel.set_xscale("log", base=2)
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=30)
        panel.set(xlabel="learning rate", title=SETTINGS[freeze_A])
    panels[0].set_ylim(top=1.01 * no_adapter)  # runs that diverge end above
    panels[0].set_ylabel("test loss, nats")
    panels[0].locator_params(axis="y", nbins=4)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(args.plot, metadata={"Date": None})


# ---------------------------------------------------------------------------- the command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="name or folder of a Hugging Face model; else a transformer of our own")
    add("--text", help="text file to fine-tune on; else Python's language reference")
    add("--targets", help="layers to adapt; q,v or, with --model, q_proj,v_proj")
    add("--rank", type=int, default=2, help="of every adapter, %(default)s")
    add("--updates", type=int, help="of Adam, a start's cost included; 50 or, with --model, 400")
    add("--fit", type=int, help="batches that a start is fitted to; 5 or, with --model, 60")
    add("--starts", default=",".join(STYLES), help="to compare, %(default)s")
    add(
        "--rates",
        default="0.02,0.08,0.32",
        help="if A is frozen, %(default)s; a quarter of them if A is trained",
    )
    add("--seeds", type=int, default=4, help="how many, of batches and of starts, %(default)s")
    add("--damping", type=float, default=1.0, help="of lora_da, %(default)s")
    add("--plot", metavar="FILE", help="draw loss against rate to a .png or .svg")
    add("--fast", action="store_true", help="a smoke test: few updates, seeds and rates")
    args = parser.parse_args()
    defaults = LARGE if DEVICE.type == "cuda" else SMALL
    if args.model:
        defaults = HUGGING_FACE
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.pretrain_updates = 10 if args.fast else 1000
    args.held_out = 1024 if args.fast else HELD_OUT_TOKENS
    if args.fast:
        vars(args).update(updates=10, fit=1, seeds=2, rates="0.08,0.32")
    if args.model:
        args.pretrain_updates = 0
    args.starts = args.starts.split(",")
    args.rates = [float(rate) for rate in args.rates.split(",")]
    args.trainings = len(args.starts) * len(SETTINGS) * len(args.rates)  # of each seed
    args.processes = 1 if DEVICE.type == "cuda" else min(args.seeds, os.cpu_count())
    if not {"lora"} <= set(args.starts) <= set(STYLES):
        parser.error(f"--starts must be some of {','.join(STYLES)}, lora among them")
    if not 1 <= args.seeds <= max(T_95):
        parser.error(f"--seeds is not in 1..{max(T_95)}")
    if args.fit + SEARCH >= args.updates:
        parser.error("a start costs all --updates or more: give more, or fit to fewer batches")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install matplotlib, or leave --plot out")
    return args


def make_task(args: argparse.Namespace, progress: Progress) -> Task:
    """The pre-trained model, without adapters, and the batches."""
    tokenizer = None
    old = None
    if args.model:
        model, tokenizer = hugging_face(args)
    else:
        model, old = pretrained(args, progress=progress)
    documents = new_documents(args.text)  # of ten, 8 train, 1 chooses and 1 tests
    parts = [[d for i, d in enumerate(documents) if i % 10 < 8], documents[8::10], documents[9::10]]
    train_rows, dev_rows, test_rows = [sequences(p, tokenizer, args.context) for p in parts]
    held_out = args.held_out // (args.batch * args.context)
    return Task(
        model=model.eval(),  # no dropout
        train=[draw(train_rows, args.updates, args.batch, 100 + i) for i in range(args.seeds)],
        dev=draw(dev_rows, held_out // 2, args.batch, seed=0),
        test=draw(test_rows, held_out, args.batch, seed=0),
        old=old,
    )


def main() -> None:
    args = parse_args()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {device}")
    print(
        f"{args.pretrain_updates} updates of pre-training; then {args.seeds} seeds in "
        f"{args.processes} processes, each with {args.trainings} trainings\nof {args.updates} "
        f"updates: {len(args.starts)} starts, A frozen and trained, {len(args.rates)} rates",
        flush=True,
    )
    done = torch.zeros(1 + args.seeds).share_memory_()
    threading.Thread(target=show_time_left, args=(done, args), daemon=True).start()

    task = make_task(args, Progress(done[0]))
    no_adapter = mean_loss(task.model, task.test)
    adapters = add_lora(task.model, args.rank, targets=args.targets.split(","))
    names = textwrap.shorten(", ".join(adapters), 300, placeholder=" …")
    parameters = list(task.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print(
        f"{len(adapters)} adapters of rank {args.rank} on\n{textwrap.fill(names, 96)}:\n"
        f"{trained:,} of {sum(p.numel() for p in parameters):,} parameters are trained\n"
        f"test loss before adding them {no_adapter:.6f}, and at plain LoRA's start "
        f"{mean_loss(task.model, task.test):.6f}\n"
        f"batches of {args.batch} x {args.context} tokens; a start is fitted to {args.fit} of them "
        f"and costs {args.fit + SEARCH} updates",
        flush=True,
    )
    runs = compare_all(task, args, done[1:])
    report(runs, no_adapter, args)
    if args.plot:
        plot(runs, no_adapter, args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
