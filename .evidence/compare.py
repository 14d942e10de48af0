# SPDX-License-Identifier: MIT
"""The runs behind the page: starts × A frozen and A trained × rates × seeds, one JSON line per run.

    python .evidence/compare.py --methods lora,lora_da,pissa --out .evidence/peers.jsonl

Model, text, training and losses are those of `demo_transformer.py`. Added are controls, LoRA-DA
with other dampings and another metric, and the starts of PEFT 0.21.2. Runs that are already in the
file are skipped, so that a stopped command can be repeated, and two processes with different seeds
share the work. What a start costs is taken off its training; `cost.py` has measured it.

torch.vmap over the rates is left out: on one thread of a CPU it took 37.7 ms per update of the
small transformer, and the plain loop 35.7 ms.
"""

import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # PYTHONPATH comes before, for another lora_init.py

import demo_transformer as demo  # noqa: E402
import lora_init  # noqa: E402

torch.set_num_threads(1)  # a process uses one core; start another one for other seeds
EVA_BATCHES = 400  # no more: EVA goes on until it has converged, however long that takes
Batches = list[Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]  # B and A by an adapter's name


# ---------------------------------------------------------------------------- starts of our own
# A method finds the adapters at plain LoRA's start, sets their factors, and returns
# the step that it has chosen, or NaN. `batches` are those of the training to come, in their order.


def lora(task: demo.Task, batches: Batches, args: argparse.Namespace) -> float:
    return math.nan


def orthonormal(task: demo.Task, batches: Batches, args: argparse.Namespace) -> float:
    """A random A with orthonormal rows, as long as HRP's."""
    for adapter in lora_init.lora_layers(task.model).values():
        nn.init.orthogonal_(adapter.lora_A)
    return math.nan


def white(task: demo.Task, batches: Batches, args: argparse.Namespace) -> float:
    """Plain LoRA's random A in the basis of LoRA-DA: what the basis does by itself."""
    adapters = lora_init.lora_layers(task.model)
    means = lora_init.collect_statistics(
        task.model, adapters, batches[: args.fit], demo.loss_fn, backward=False
    )
    for name, adapter in adapters.items():
        Z = means[name].input_moment
        adapter.set_factors(*lora_init.white_basis(adapter.lora_B, adapter.lora_A, Z))
    return math.nan


def gradient_svd(task: demo.Task, batches: Batches, args: argparse.Namespace) -> float:
    """The best rank-r approximation of −G: LoRA-DA with Z = I, Y = 1 and no variance."""
    adapters = lora_init.lora_layers(task.model)
    means = lora_init.collect_statistics(task.model, adapters, batches[: args.fit], demo.loss_fn)
    unit = 4.0**6  # −G is not divided by a curvature, so that its steps are longer
    factors = {}
    for name in adapters:
        G = means[name].gradient
        Z = torch.eye(G.shape[1]).to(G)
        Y = torch.ones(len(G)).to(G)
        B, A = lora_init.lora_da(G, Z, Y, args.rank, n_train=1, variance=0, damping=0)
        factors[name] = (unit * B, A)
    return unit * set_best_step(task, factors, batches[args.fit])


def set_best_step(task: demo.Task, factors: Factors, held_out: Tensor) -> float:
    return lora_init._start(task.model, factors, None, held_out, demo.loss_fn)


def hrp(task: demo.Task, batches: Batches, args: argparse.Namespace) -> float:
    preheat = batches[: args.fit + demo.SEARCH]  # as many updates as the demo counts
    lora_init.init_hrp(task.model, preheat, demo.loss_fn, seed=args.seed)
    return math.nan


def cntlora(task: demo.Task, batches: Batches, args: argparse.Namespace) -> float:
    look = batches[: args.fit + 1]  # the last one chooses the step
    return lora_init.init_cntlora(task.model, look, demo.loss_fn, pretrain_batches=task.old)


# ---------------------------------------------------------------------------- LoRA-DA, and variants


def lora_da(
    task: demo.Task, batches: Batches, args: argparse.Namespace, reduced_rank: bool = False
) -> float:
    """LoRA-DA with damping in a unit of its own for Z, and another damping for Y.

    With `--unit mean` and no `--damping-y` this is `init_lora_da`, bit for bit.
    """
    adapters = lora_init.lora_layers(task.model)
    fitted = batches[: args.fit]
    input_sums = dict.fromkeys(adapters, 0)

    def add_input(name: str, layer: nn.Module, inputs: tuple) -> None:
        input_sums[name] = input_sums[name] + inputs[0].detach().double().flatten(0, -2).sum(dim=0)

    hooks = [
        layer.register_forward_pre_hook(functools.partial(add_input, name))
        for name, layer in adapters.items()
    ]
    means = lora_init.collect_statistics(task.model, adapters, fitted, demo.loss_fn)
    for hook in hooks:
        hook.remove()

    rows = min(args.updates, args.train_batches or args.updates) * args.batch * args.context
    damping_y = args.damping if args.damping_y is None else args.damping_y
    factors = {}
    for name in adapters:
        G = means[name].gradient
        Z = means[name].input_moment
        Y = means[name].output_fisher
        count = means[name].count
        unit = damping_unit(args.unit, Z, input_sums[name] / count)
        Z = Z + args.damping * unit * torch.eye(len(Z)).to(Z)
        Y = Y + damping_y * Y.mean()
        if reduced_rank:
            factors[name] = reduced_rank_factors(G, Z, Y, args.rank)
        else:
            factors[name] = lora_init.lora_da(G, Z, Y, args.rank, rows, count, damping=0)
    return set_best_step(task, factors, batches[args.fit])


def damping_unit(unit: str, Z: Tensor, mean: Tensor) -> Tensor:
    """What damping 1 adds to Z's diagonal."""
    if unit == "centred":  # E‖x − x̄‖²/in
        return Z.diagonal().mean() - mean.square().mean().to(Z)
    if unit == "bulk":  # the mean of the diagonal without a dominant direction; exact for Z = I
        return (Z.trace() - Z.norm()) / (len(Z) - math.sqrt(len(Z)))
    if unit == "median":
        return torch.linalg.eigvalsh(Z).median()
    return Z.diagonal().mean()


def reduced_rank_factors(G: Tensor, Z: Tensor, Y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The BA of rank r with the least quadratic loss, ‖Y^½(D − BA)L‖² with Z = L Lᵀ.

    With D = −Y⁻¹GZ⁻¹ the matrix to approximate is Y^½DL = −Y^−½ G L⁻ᵀ = U S Vᵀ. Its best
    approximation of rank r is U_r S_r V_rᵀ (Eckart–Young), so that A = V_rᵀL⁻¹ and
    B = Y^−½ U_r S_r. This is reduced-rank regression.
    """
    L = torch.linalg.cholesky(Z)  # (in, in)
    root = Y.sqrt()[:, None]  # (out, 1)
    M = -torch.linalg.solve_triangular(L, (G / root).mT, upper=False).mT  # (out, in)
    U, S, V_t = torch.linalg.svd(M, full_matrices=False)
    B = U[:, :rank] * S[:rank] / root  # (out, r)
    A = torch.linalg.solve_triangular(L, V_t[:rank], upper=False, left=False)  # (r, in)
    return lora_init.white_basis(B, A, Z)


# ---------------------------------------------------------------------------- PEFT's starts


def peer(method: str, task: demo.Task, batches: Batches, args: argparse.Namespace) -> float:
    """A start as PEFT makes it on a copy of the base model, brought over with the changed W."""
    adapters = lora_init.lora_layers(task.model)
    model = peft_model(method, base_model(task.model), list(adapters), batches, args)
    for name, adapter in adapters.items():
        layer = model.base_model.model.get_submodule(name)
        if not hasattr(layer, "lora_A"):  # EVA has taken this layer's rank away
            A = torch.zeros_like(adapter.lora_A)  # with A = 0 and B = 0 both gradients stay 0
            adapter.set_factors(adapter.lora_B, A)
            continue
        if layer.scaling["default"] != 1:
            raise ValueError(f"layer '{name}': PEFT scales by {layer.scaling['default']}, not by 1")
        adapter.base_layer.weight.data.copy_(layer.base_layer.weight)  # W − BA in most of them
        B = layer.lora_B["default"].weight.detach()
        A = layer.lora_A["default"].weight.detach()
        adapter.set_factors(B, A)
    return math.nan


def base_model(model: nn.Module) -> nn.Module:
    """A copy of the model without our adapters."""
    base = copy.deepcopy(model)
    for name, adapter in lora_init.lora_layers(base).items():
        base.set_submodule(name, adapter.base_layer)
    return base


def peft_model(
    method: str, base: nn.Module, targets: list[str], batches: Batches, args: argparse.Namespace
) -> nn.Module:
    """PEFT's model with its start in it, with PEFT's own defaults. It changes `base`.

    What the comments that say TRAP describe was seen in PEFT 0.21.2.
    """
    from peft import (
        EvaConfig,
        LoraConfig,
        LoraGAConfig,
        get_peft_model,
        initialize_lora_eva_weights,
    )

    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank,  # s = 1, as in our adapters
        target_modules=targets,
        init_lora_weights=method,
        eva_config=EvaConfig() if method == "eva" else None,
        lora_ga_config=LoraGAConfig() if method == "lora_ga" else None,
        corda_config=corda_config() if method == "corda" else None,
    )
    if method == "corda":
        # TRAP: this import needs the package attrs, which neither PEFT, transformers nor torch
        # installs.
        from peft.tuners.lora.corda import preprocess_corda

        def run_model() -> None:
            # TRAP: one sequence a forward pass. A batch of several is a RuntimeError of `t()`. What
            # it sums is not divided by the tokens of a sequence, and every sequence is divided by
            # its largest entry: BA does not depend on this, but how it is split into B and A does.
            for sequence in torch.cat(batches[: args.fit]):
                base(sequence[None, :-1])

        preprocess_corda(base, config, run_model=run_model)
    if method == "lora_ga":
        # TRAP: without this call, or with other targets in it, the start is plain LoRA's, in
        # silence.
        from peft.tuners.lora.loraga import preprocess_loraga

        def train_step() -> None:
            # TRAP: B is in the gradient's units. The gradient of a mean loss makes it close to 0.
            for batch in batches[: args.fit]:
                demo.loss_fn(base, batch).backward()

        preprocess_loraga(base, config, train_step)
    model = get_peft_model(base, config)
    if method == "eva":
        initialize_lora_eva_weights(
            model,
            EvaLoader(batches[: args.fit]),
            forward_fn=lambda model, batch: model(batch[:, :-1]),
            prepare_model_inputs_fn=None,  # no padding: every token counts
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    return model


def corda_config() -> object:
    from peft.tuners.lora.config import CordaConfig

    return CordaConfig()


class NotConverged(RuntimeError):
    pass


class EvaLoader:
    """Batches over and over for EVA, and an error after EVA_BATCHES.

    TRAP: EVA has no limit of its own. It repeats the loader until two updates in a row have moved
    no component by more than 1 − 0.99 in cosine similarity, and with components of nearly equal
    variance that may take very long. TRAP: it moves ranks between layers (ρ = 2), down to rank 0.
    """

    def __init__(self, batches: Batches):
        self.batches = batches
        self.read = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in itertools.cycle(self.batches):
            if self.read == EVA_BATCHES:
                raise NotConverged(f"EVA has not converged after {EVA_BATCHES} batches")
            self.read += 1
            yield batch


Method = Callable[[demo.Task, Batches, argparse.Namespace], float]
PEERS = ["pissa", "olora", "corda", "lora_ga", "eva"]
METHODS: dict[str, Method] = {
    "lora": lora,
    "lora_da": lora_da,
    "reduced_rank": functools.partial(lora_da, reduced_rank=True),
    "hrp": hrp,
    "cntlora": cntlora,
    "gradient_svd": gradient_svd,
    "white": white,
    "orthonormal": orthonormal,
}
for name in PEERS:
    METHODS[name] = functools.partial(peer, name)
WITHOUT_DATA = ("lora", "orthonormal", "pissa", "olora")
DAMPED = ("lora_da", "reduced_rank")


# ---------------------------------------------------------------------------- the task


def make_task(args: argparse.Namespace) -> demo.Task:
    tokenizer = None
    old = None
    if args.model:
        model, tokenizer = demo.hugging_face(args)
    else:
        model, old = pretrained(args)
    lora_init.add_lora(model.eval(), args.rank, targets=args.targets.split(","))
    documents = read_documents(args.text)
    parts = [[d for i, d in enumerate(documents) if i % 10 < 8], documents[8::10], documents[9::10]]
    train_rows, dev_rows, test_rows = [
        demo.sequences(part, tokenizer, args.context) for part in parts
    ]
    count = args.train_batches or args.updates
    held_out = args.held_out // (args.batch * args.context)
    return demo.Task(
        model=model,
        train={seed: demo.draw(train_rows, count, args.batch, 100 + seed) for seed in args.seeds},
        dev=demo.draw(dev_rows, held_out // 2, args.batch, seed=0),
        test=demo.draw(test_rows, held_out, args.batch, seed=0),
        old=old,
    )


def read_documents(text: str | None) -> list[str]:
    """The demo's documents, or the files of a folder."""
    if text is None or not Path(text).is_dir():
        return demo.new_documents(text)
    files = sorted(file for file in Path(text).rglob("*") if file.is_file())
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def pretrained(args: argparse.Namespace) -> tuple[nn.Module, Batches]:
    """The demo's transformer, from a file after the first time."""
    trained = f"{args.pretrain_seed}-{args.pretrain_updates}"
    by = f"torch-{torch.__version__}-demo-{digest(demo)}"  # another version has other weights
    file = HERE.parent / ".cache" / f"pretrained-{trained}-{by}.pt"
    if not file.exists():
        settings = argparse.Namespace(**vars(args))
        settings.fit = demo.SMALL["fit"]  # batches of old text that are kept for CNTLoRA
        model, old = demo.pretrained(settings, args.pretrain_seed)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save((model, [batch.clone() for batch in old]), partial)
        partial.rename(file)  # at once, as another process may be reading it
    return torch.load(file, weights_only=False)


# ---------------------------------------------------------------------------- the runs


def cost(method: str, args: argparse.Namespace) -> int:
    """What a start costs in updates, as measured by cost.py on this kind of model."""
    if method in ("lora", "orthonormal"):
        return 0
    if args.cost is not None:
        return args.cost
    costs = json.loads((HERE / "costs.json").read_text())[args.costs]
    fixed, per_batch = costs[method]
    return math.ceil(fixed + per_batch * args.fit)


def settings(method: str, args: argparse.Namespace) -> dict[str, object]:
    """What distinguishes the runs of one method, A's setting, rate and seed aside."""
    damped = method in DAMPED
    damping_y = args.damping if args.damping_y is None else args.damping_y
    return {
        "task": args.task,
        "pretrain_seed": None if args.model else args.pretrain_seed,
        "rank": args.rank,
        "updates": args.updates,
        "train_batches": args.train_batches,
        "method": method,
        "fit": None if method in WITHOUT_DATA else args.fit,
        "damping": args.damping if damped else None,
        "damping_y": damping_y if damped else None,
        "unit": args.unit if damped else None,
    }


class Checkpoints:
    """Called after every update; if data are few, it looks for the best development loss."""

    def __init__(self, task: demo.Task, every: int | None):
        self.task = task
        self.every = every
        self.updates = 0
        self.best = (math.inf, math.inf)

    def advance(self, updates: int) -> None:
        self.updates += updates
        if self.every and self.updates % self.every == 0:
            self.look()

    def look(self) -> None:
        loss_dev = demo.mean_loss(self.task.model, self.task.dev)
        if loss_dev <= self.best[0]:
            self.best = (loss_dev, demo.mean_loss(self.task.model, self.task.test))


@torch.no_grad()
def start_error(model: nn.Module, before: Tensor, batch: Tensor) -> float:
    return ((logits(model, batch) - before).norm() / before.norm()).item()


@torch.no_grad()
def logits(model: nn.Module, batch: Tensor) -> Tensor:
    output = model(batch[:, :-1])
    return getattr(output, "logits", output).float()


def run_start(
    method: str, task: demo.Task, seed: int, args: argparse.Namespace, done: set[str]
) -> None:
    """All runs of one start at one seed that are not done yet."""
    fields = settings(method, args) | {"seed": seed}
    missing = []
    for freeze_A in args.settings:
        for rate in args.rates if freeze_A else args.trained_rates:
            run = fields | {"freeze_A": freeze_A, "rate": rate}
            if json.dumps(run) not in done:
                missing.append(run)
    if not missing:
        return
    adapters = lora_init.lora_layers(task.model).values()
    weights = [adapter.base_layer.weight.clone() for adapter in adapters]
    batches = list(itertools.islice(itertools.cycle(task.train[seed]), args.updates))
    torch.manual_seed(seed)
    for adapter in adapters:  # plain LoRA
        B = adapter.lora_B.new_zeros(adapter.out_features, args.rank)
        A = adapter.lora_A.new_zeros(args.rank, adapter.in_features)
        adapter.set_factors(B, A)
        adapter.reset_parameters()
    before = logits(task.model, task.dev[0])
    args.seed = seed
    began = time.process_time()
    step = METHODS[method](task, batches, args)
    start_seconds = time.process_time() - began
    error = start_error(task.model, before, task.dev[0])
    exact = weights[0].dtype == torch.float32  # in bfloat16 W − BA is rounded, by PEFT, too
    if method in PEERS and exact and error > 1e-4:
        raise RuntimeError(f"{method} changes the function by {error:.1e}")
    factors = [(adapter.lora_B.clone(), adapter.lora_A.clone()) for adapter in adapters]
    loss_start = demo.mean_loss(task.model, task.test)
    paid = cost(method, args)
    for run in missing:
        for adapter, (B, A) in zip(adapters, factors, strict=True):
            adapter.set_factors(B, A)
            adapter.lora_A.requires_grad_(not run["freeze_A"])
        checkpoints = Checkpoints(task, 8 if args.train_batches else None)
        rest = torch.stack(batches[paid:])
        began = time.process_time()
        demo.train(task.model, rest, run["rate"], args.updates // 20, checkpoints)
        train_seconds = time.process_time() - began
        checkpoints.look()
        loss_dev, loss_test = checkpoints.best
        result = {
            "cost": paid,
            "loss_start": loss_start,
            "loss_dev": loss_dev,
            "loss_test": loss_test,
            "step": None if math.isnan(step) else step,
            "rows_per_batch": args.batch * args.context,
            "start_error": error,
            "start_seconds": round(start_seconds, 3),
            "train_seconds": round(train_seconds, 3),
            "versions": versions(),
        }
        with open(args.out, "a") as file:
            file.write(json.dumps(run | result) + "\n")
        setting = "frozen" if run["freeze_A"] else "trained"
        print(
            f"seed {seed} {method:<12} A {setting:<7} {run['rate']:<8g} {loss_test:.4f} "
            f"(start {loss_start:.4f}, {start_seconds:.1f} s, costs {paid})",
            flush=True,
        )
    for adapter, weight in zip(adapters, weights, strict=True):
        adapter.base_layer.weight.data.copy_(weight)


@functools.cache
def versions() -> str:
    import peft
    import transformers

    return (
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}, lora_init.py {digest(lora_init)}, "
        f"demo_transformer.py {digest(demo)}"
    )


def digest(module: object) -> str:
    return hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:8]


def runs_done(file: Path) -> set[str]:
    """The settings of the runs in a file, each as one string."""
    if not file.exists():
        return set()
    names = [*settings("lora", parse_args([])), "seed", "freeze_A", "rate"]
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    return {json.dumps({name: run[name] for name in names}) for run in runs}


# ---------------------------------------------------------------------------- the command


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", default="lora,lora_da", help=f"some of {','.join(METHODS)}")
    add("--out", default=str(HERE / "runs.jsonl"), help="runs are added to this file")
    add("--model", help="folder of a Hugging Face model; else the demo's small transformer")
    add("--text", help="text file or folder; else Python's language reference")
    add("--task", help="name of the task in the file; small or, with --model, smollm2")
    add("--targets", help="layers to adapt; q,v or, with --model, q_proj,v_proj")
    add("--rank", type=int, help="of every adapter; 2 or, with --model, 4")
    add("--updates", type=int, help="the start's cost included; 50 or, with --model, 400")
    add("--train-batches", type=int, help="few data: so many batches, over and over")
    add("--fit", type=int, help="batches that a start is fitted to; 5 or, with --model, 60")
    add("--rates", default="0.005,0.02,0.08,0.32", help="with A frozen")
    add("--trained-rates", help="with A trained; else a quarter of --rates")
    add("--settings", default="frozen,trained", help="of A")
    add("--seeds", default="0,1,2,3", help="of the batches and of the starts")
    add("--pretrain-seed", type=int, default=0, help="of the small transformer")
    add("--pretrain-updates", type=int, default=1000, help="of the small transformer")
    add("--damping", type=float, default=1.0, help="of lora_da and reduced_rank")
    add("--damping-y", type=float, help="of Y; else --damping")
    add(
        "--unit",
        default="mean",
        choices=["mean", "bulk", "centred", "median"],
        help="of Z's damping",
    )
    add("--cost", type=int, help="updates that a start costs; else from costs.json")
    add("--costs", help="the model in costs.json; else the task")
    add("--held-out", type=int, default=demo.HELD_OUT_TOKENS, help="tokens to develop and to test")
    args = parser.parse_args(words)
    defaults = demo.SMALL | {"rank": 2, "task": "small", "updates": 50}
    if args.model:
        defaults = demo.HUGGING_FACE | {"rank": 4, "task": "smollm2", "updates": 400}
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.costs = args.costs or args.task
    args.methods = args.methods.split(",")
    args.rates = [float(rate) for rate in args.rates.split(",")]
    if args.trained_rates:
        args.trained_rates = [float(rate) for rate in args.trained_rates.split(",")]
    else:
        args.trained_rates = [demo.learning_rate(rate, freeze_A=False) for rate in args.rates]
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    args.settings = [setting == "frozen" for setting in args.settings.split(",")]
    unknown = set(args.methods) - set(METHODS)
    if unknown:
        parser.error(f"unknown methods {unknown}")
    return args


def main() -> None:
    args = parse_args()
    task = make_task(args)
    print(f"{versions()}\nno adapter: {demo.mean_loss(task.model, task.test):.4f}", flush=True)
    for seed, method in itertools.product(args.seeds, args.methods):
        run_start(method, task, seed, args, runs_done(Path(args.out)))


if __name__ == "__main__":
    main()
