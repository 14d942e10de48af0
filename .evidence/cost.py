# SPDX-License-Identifier: MIT
"""What each start costs: CPU time in updates of LoRA's training, and the memory that it adds.

    python .evidence/cost.py                    on a Llama-shaped model, in passes over its batches
    python .evidence/cost.py --task small       on the demo's transformer, in updates
    python .evidence/cost.py --task model --model smollm2/model

An update is LoRA's: forward and backward pass of one batch with adapters on and weights frozen, and
Adam's step. A pass is full training's: forward and backward over all batches fitted, with the
gradients of all weights. Every method runs in a fresh process on one thread; times are CPU seconds
of the process, the better of two starts if they are cheap, and updates are timed after them. The
memory is the peak of the resident set less its size before the start (Linux only), measured on the
first start of a process.

Another version of lora_init.py: `PYTHONPATH=its/folder python .evidence/cost.py`.

With --save, a line through the times of two fits, fixed + per batch, goes into costs.json, from
which compare.py takes its costs.
"""

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import compare  # noqa: E402

import demo_transformer as demo  # noqa: E402
import lora_init  # noqa: E402

OURS = ["lora_da", "reduced_rank", "hrp", "cntlora", "gradient_svd", "white"]
UPDATES = 8  # that are timed


# ---------------------------------------------------------------------------- the models


def llama() -> tuple[nn.Module, Tensor]:
    """A model of Llama's shape in float32, with random weights and random text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora_init.add_lora(model, 8, targets=names)
    return model, torch.randint(512, (64, 8, 129))


def make(args: argparse.Namespace) -> tuple[demo.Task, list[Tensor], argparse.Namespace]:
    """A task, batches for the starts, and the arguments that compare.py's methods read."""
    words = ["--seeds", "0", "--fit", str(args.fit), "--updates", str(args.fit + 16)]
    words += ["--pretrain-updates", "20"]  # how well it is trained does not change the cost
    if args.task == "model":
        words += ["--model", args.model]
    settings = compare.parse_args(words)
    if args.task == "llama":
        model, batches = llama()
        settings.rank = 8
        batches = batches[: settings.updates]
    elif args.task == "small":
        task = compare.make_task(settings)
        return task, list(task.train[0]), settings
    else:
        model, _ = demo.hugging_face(settings)
        lora_init.add_lora(model.eval(), settings.rank, targets=settings.targets.split(","))
        shape = (settings.updates, settings.batch, settings.context + 1)
        batches = torch.randint(model.config.vocab_size, shape)
    task = demo.Task(model=model, train={0: batches}, dev=batches, test=batches, old=None)
    return task, list(batches), settings


# ---------------------------------------------------------------------------- one start


def measure(method: str, args: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of a start, of an update and of a batch in full training; and MB added."""
    task, batches, settings = make(args)
    settings.seed = 0
    adapters = lora_init.lora_layers(task.model)
    copies = []
    if method in compare.PEERS:
        compare.versions()  # imports PEFT, so that this is in neither measurement
        copies = [compare.base_model(task.model) for _ in range(2)]
    compare.EVA_BATCHES = args.eva_rounds * args.fit

    def start() -> None:
        torch.manual_seed(0)
        if method == "pass":  # one of LoRA's, for the memory
            update_seconds(task.model, batches[: args.fit])
        elif method in compare.PEERS:
            compare.peft_model(method, copies.pop(), list(adapters), batches, settings)
        elif method == "lora_da":  # the public function, with the batch that it holds out
            lora_init.init_lora_da(task.model, batches[: args.fit + 1], demo.loss_fn)
        else:
            compare.METHODS[method](task, batches, settings)

    seconds = []
    finished = True

    def timed() -> None:
        nonlocal finished
        began = time.process_time()
        try:
            start()
        except compare.NotConverged:
            finished = False
        seconds.append(time.process_time() - began)

    memory = peak_memory(timed)
    if seconds[0] < args.again:
        timed()
    return {
        "memory": memory,
        "start": min(seconds),
        "update": update_seconds(task.model, batches[:UPDATES]),
        "full": full_seconds(task.model, batches[:UPDATES]),
        "finished": finished,
    }


def update_seconds(model: nn.Module, batches: list[Tensor]) -> float:
    """CPU seconds of one ordinary update, the median over several, as the first one is slower."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    seconds = []
    for batch in batches:
        began = time.process_time()
        optimizer.zero_grad()
        demo.loss_fn(model, batch).backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
    optimizer.zero_grad()
    return statistics.median(seconds)


def full_seconds(model: nn.Module, batches: list[Tensor]) -> float:
    """CPU seconds of one batch in full training, the gradients of all weights included."""
    base = compare.base_model(model).requires_grad_()
    seconds = []
    for batch in batches:
        began = time.process_time()
        base.zero_grad()
        demo.loss_fn(base, batch).backward()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def peak_memory(function: object) -> float:
    """Call the function; returns by how many MB the resident set grew at its peak."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = resident_peak()
    function()
    return (resident_peak() - before) / 1024


def resident_peak() -> int:
    """In KB. Not ru_maxrss: a process inherits that from the one that has started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


# ---------------------------------------------------------------------------- dense functions


def print_dense(size: int) -> None:
    """cntlora without Z_p beside lora_da, both as functions of matrices."""
    torch.manual_seed(0)
    x = torch.randn(2 * size, size)
    Z = x.mT @ x / len(x)
    G = torch.randn(size, size)
    Y = torch.rand(size) + 0.5
    W = torch.randn(size, size) / math.sqrt(size)
    functions = {
        "lora_da": lambda: lora_init.lora_da(G, Z, Y, 8, n_train=10_000, n_fitted=10_000),
        "cntlora": lambda: lora_init.cntlora(W, Z, rank=8),
    }
    seconds = {}
    for name, function in functions.items():
        times = []
        for _ in range(2):
            began = time.process_time()
            function()
            times.append(time.process_time() - began)
        seconds[name] = min(times)
    ratio = seconds["cntlora"] / seconds["lora_da"]
    print(
        f"\nat {size:,} x {size:,}: lora_da {seconds['lora_da']:.2f} s, cntlora without Z_p "
        f"{seconds['cntlora']:.2f} s, {ratio:.2f} times as long"
    )


# ---------------------------------------------------------------------------- all of them


def in_fresh_process(method: str, fit: int, args: argparse.Namespace) -> dict[str, float] | None:
    command = [sys.executable, __file__, "--one", method, "--fits", str(fit), "--task", args.task]
    command += ["--again", str(args.again), "--eva-rounds", str(args.eva_rounds)]
    if args.model:
        command += ["--model", args.model]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = result.stderr.strip().splitlines()[-1]
        print(f"| {method} | {fit} | failed: {reason} |", flush=True)
        return None
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--task", default="llama", choices=["llama", "small", "model"], help="what to measure on")
    add("--model", help="folder of a Hugging Face model, for --task model")
    add("--methods", default="pass," + ",".join(OURS + compare.PEERS), help="to measure")
    add("--fits", default="8,16", help="batches that a start is fitted to")
    add("--again", type=float, default=20, help="a start of fewer seconds is timed twice")
    add("--eva-rounds", type=int, default=8, help="through the batches fitted, at most")
    add("--dense", type=int, default=0, help="size of the matrices for cntlora beside lora_da")
    add("--save", help="name of the model in costs.json: write the times of two fits there")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.fit = int(args.fits)
        print(json.dumps(measure(args.one, args)))
        return
    fits = [int(fit) for fit in args.fits.split(",")]
    print(f"{compare.versions()}; {args.task}\n")
    header = ["start", "batches fitted", "CPU seconds", "seconds of an update", "updates", "passes"]
    print("| " + " | ".join([*header, "memory added, MB"]) + " |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    costs = {}
    for method in args.methods.split(","):
        updates = []
        for fit in fits:
            one = in_fresh_process(method, fit, args)
            if one is None:
                continue
            updates.append(one["start"] / one["update"])
            passes = one["start"] / (fit * one["full"])
            more = "" if one["finished"] else "> "  # EVA at its cap
            print(
                f"| {method} | {fit} | {one['start']:.2f} | {one['update']:.3f} | "
                f"{more}{updates[-1]:.1f} | {more}{passes:.2f} | {one['memory']:.0f} |",
                flush=True,
            )
        if len(updates) == len(fits) == 2 and method != "pass":
            slope = (updates[1] - updates[0]) / (fits[1] - fits[0])
            costs[method] = [round(updates[0] - slope * fits[0], 2), round(slope, 3)]
    if args.save:
        file = HERE / "costs.json"
        content = json.loads(file.read_text()) if file.exists() else {}
        content[args.save] = content.get(args.save, {}) | costs
        file.write_text(json.dumps(content, indent=1) + "\n")
    if args.dense:
        print_dense(args.dense)


if __name__ == "__main__":
    main()
