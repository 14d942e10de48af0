# SPDX-License-Identifier: MIT
"""Data-driven starting points for LoRA: three algorithms, as plain functions on tensors.

LoRA fine-tunes a frozen weight W through two thin factors:   y = W x + b + s·B A x   [1].

    W  weight       (out, in)  frozen          x  (…, in)   a layer's input row
    A  lora_A       (r, in)    projects down   g  (…, out)  ∂(−log p)/∂y at the layer's output
    B  lora_B       (out, r)   projects up     Z  input_moment   (in, in)   E[x xᵀ]
    s  scaling      scalar     alpha / r       Y  output_fisher  (out,)     E[g²]
    ΔW delta_weight (out, in)  s·B A           G  gradient       (out, in)  E[g xᵀ] = ∂E(−log p)/∂W

    plain LoRA  looks at nothing;           starts at A random, B = 0
    lora_da     at inputs and gradients;    at a Newton step, within the A of least bias + variance
    hrp         at a short training;        at its main directions as A, and B = 0
    cntlora     at inputs, not at labels;   where output moments match, cut to rank r

Read in order and stop after any part; the mathematics ends with part 3.

[1] LoRA, arXiv 2106.09685.                     [2] LoRA-DA, arXiv 2510.24561 v3.
[3] High-Rank Preheating, arXiv 2502.07739 v3.  [4] ConsNoTrainLoRA, arXiv 2507.08044.
[5] K-FAC, arXiv 1503.05671.                    [6] Block Krylov methods, arXiv 1504.05477.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

_wide = functools.partial(torch.promote_types, torch.float32)  # a dtype, float32 at least

# ---------------------------------------------------------------------------- 1. the layer

class LoRALinear(nn.Linear):
    """y = W x + b + s·B A x: an `nn.Linear` whose weight is frozen, plus a trainable thin term.

    x (…, in) → y (…, out). The given layer's `weight` and `bias` are shared and frozen, never
    copied or written. It starts as plain LoRA: A Kaiming-uniform, B = 0, the function unchanged.
    Factors are float32 at least. `alpha=None` means s = 1; `scaling = 0` is off. Raises TypeError
    unless `linear` is exactly an `nn.Linear`, ValueError for rank or alpha out of range.
    """
    rank = property(lambda self: len(self.lora_A))

    def __init__(self, linear: nn.Linear, rank: int, alpha: float | None = None):
        _check_adaptable(linear, rank, alpha)
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False).train(linear.training)
        like = {"device": self.weight.device, "dtype": _wide(self.weight.dtype)}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = 1.0 if alpha is None else alpha / rank

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)  # (…, out)
        if self.scaling == 0:
            return y
        down = input.to(self.lora_A.dtype) @ self.lora_A.mT  # (…, r)
        return y + (self.scaling * down @ self.lora_B.mT).to(y.dtype)

    def delta_weight(self) -> Tensor:
        """s·B A, (out, in), in the factors' dtype."""
        return self.scaling * self.lora_B @ self.lora_A

    @torch.no_grad()
    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """Copy in B (out, r) and A (r, in); at the same r the Parameters stay the same objects."""
        n_out, n_in = self.weight.shape
        _checked(len(A), min(n_out, n_in), A=(A, (len(A), n_in)), B=(B, (n_out, len(A))))
        if len(A) != self.rank:
            self.lora_A = nn.Parameter(self.lora_A.new_empty(A.shape), self.lora_A.requires_grad)
            self.lora_B = nn.Parameter(self.lora_B.new_empty(B.shape), self.lora_B.requires_grad)
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)

    def merged(self) -> nn.Linear:
        """A new, frozen `nn.Linear` with weight W + s·B A; this layer is left as it is."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter((self.weight + self.delta_weight()).to(self.weight.dtype))
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return linear.requires_grad_(False).train(self.training)


def _checked(rank: int = 1, limit: int = 1, **tensors: tuple[Tensor, tuple]) -> list[Tensor]:
    """The tensors, each given with its due shape, in float32 at least; the rank is checked too."""
    if not (isinstance(rank, int) and 1 <= rank <= limit):
        raise ValueError(f"rank {rank} is not in 1..{limit}, the most that fits here")
    for name, (tensor, shape) in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} {tuple(shape)} holds NaN or Inf: check the data and the loss")
    return [tensor.to(_wide(tensor.dtype)) for tensor, _ in tensors.values()]


def _check_adaptable(module: nn.Module, rank: int, alpha: float | None) -> None:
    if type(module) is not nn.Linear:
        raise TypeError(f"{type(module).__name__} is not exactly nn.Linear: replace or leave it")
    _checked(rank, min(module.weight.shape))
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha {alpha} is not positive and finite")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the layer's name before the message of an error raised inside."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer '{name}': {error}") from error


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapters by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model: nn.Module, rank: int, alpha: float | None = None,
             targets: str | Iterable[str] | Callable | None = None) -> dict[str, LoRALinear]:
    """Swap linear layers for `LoRALinear`, in place, and freeze everything but the adapters.

    `targets`: None takes every exact `nn.Linear`; names or dotted suffixes ("q_proj") take the
    modules so called; a predicate chooses among the names of exact `nn.Linear` layers. A layer
    that the model holds twice goes by its first name and becomes one adapter. Returns {name:
    adapter}. Where a target matches nothing (ValueError) or no `nn.Linear` (TypeError), nothing
    changes.
    """
    modules = dict(model.named_modules())
    if targets is None or callable(targets):
        linears = [n for n, m in modules.items() if n and type(m) is nn.Linear]
        hits = {targets: [n for n in linears if targets is None or targets(n)]}
    else:
        targets = [targets] if isinstance(targets, str) else targets
        hits = {t: [n for n in modules if n and f".{n}".endswith(f".{t}")] for t in targets}
    if not hits or not all(hits.values()):
        raise ValueError(f"a target matches no layer of {type(model).__name__}; found: {hits}")
    names = dict.fromkeys(name for found in hits.values() for name in found)
    for name in names:
        with _naming(name):
            _check_adaptable(modules[name], rank, alpha)
            encoder = isinstance(modules[name.rpartition(".")[0]], nn.TransformerEncoderLayer)
            if encoder and torch.backends.mha.get_fastpath_enabled():  # reads weights, not layers
                raise TypeError("bypassed: call torch.backends.mha.set_fastpath_enabled(False)")
    for name, parameter in model.named_parameters():  # adapters made before stay as they are
        parameter.requires_grad_(parameter.requires_grad and "lora_" in name)
    adapters = {name: LoRALinear(modules[name], rank, alpha) for name in names}
    _swap(model, {modules[name]: adapter for name, adapter in adapters.items()})
    return adapters


def merge_lora(model: nn.Module) -> nn.Module:
    """Swap every adapter for its merged `nn.Linear`, in place; returns the model."""
    if isinstance(model, LoRALinear):
        raise TypeError("the model is itself a LoRALinear: call its merged()")
    _swap(model, {layer: layer.merged() for layer in lora_layers(model).values()})
    return model


def _swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacements[module])


# ---------------------------------------------------------------------------- 2. linear algebra

def _full_precision(function: Callable) -> Callable:
    """No gradient is recorded inside, and a surrounding autocast does not reach in."""
    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*args, **kwargs)
    return wrapper


def _cholesky(moment: Tensor, damping: float) -> Tensor:
    """Lower L with L Lᵀ = C + damping·mean(diag C)·I: relative to C, so units do not matter."""
    shift = damping * moment.diagonal().mean()
    L, failed = torch.linalg.cholesky_ex(moment + shift * torch.eye(len(moment)).to(moment))
    if failed or not 0 <= damping < math.inf:
        raise ValueError(f"damping {damping} leaves Z {tuple(moment.shape)} not positive definite")
    return L


def _lowest_eigenvectors(omega: Callable[[Tensor], Tensor], Z: Tensor, rank: int) -> Tensor:
    """Orthonormal V (n, rank) with the least tr(VᵀΩV); `omega` multiplies (n, k) by symmetric Ω.

    For n ≤ 1024 or 42·(r + 8) > n exact, by `eigh`. Else the best V within a block Krylov space:
    random columns X, then ZX … Z¹⁰X (what is large in Z is low in Z⁻¹), then ΩZ¹⁰X … Ω¹⁰Z¹⁰X.
    The trace comes near its least without any gap between eigenvalues [6], but ten steps can miss
    a signal that is hardly above the noise, by a per cent or so. O(n·(n + out)·r), whatever Z is.
    """
    n, width, seeded = len(Z), rank + 8, torch.Generator().manual_seed(0)  # the same bits again
    basis = torch.eye(n).to(Z)
    if n > 1024 and 42 * width <= n:
        blocks = [torch.randn(n, width, generator=seeded).to(Z)]
        for depth in range(20):
            blocks.append(torch.linalg.qr(Z @ blocks[-1] if depth < 10 else omega(blocks[-1])).Q)
        basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q  # (n, 21·width)
    return basis @ torch.linalg.eigh(basis.mT @ omega(basis)).eigenvectors[:, :rank]


# ---------------------------------------------------------------------------- 3. the algorithms

@_full_precision
def lora_da(gradient: Tensor, input_moment: Tensor, output_fisher: Tensor, rank: int,
            n_train: int, *, variance: float = 1.0, damping: float = 0.1) -> tuple[Tensor, Tensor]:
    """LoRA-DA [2, Algorithm 1]: the A within which a fit on `n_train` rows errs least, and its B.

    Takes G (out, in), Z (in, in), Y (out,); returns B (out, r) and A (r, in), AAᵀ = I.
    1. Let W* = W + Δ be the truth, and Δ̂ the maximum-likelihood fit of all of W on N samples:
       unbiased, with the least covariance of all such (Cramér–Rao), J⁻¹/N, J the Fisher
       information of one. Exact in Gaussian regression on given inputs, else a limit for large N.
    2. With W's rows laid end to end, the gradient gxᵀ of one sample is g ⊗ x: J = E[ggᵀ ⊗ xxᵀ].
       K-FAC [5] takes x and g as independent; of E[ggᵀ] keep the diagonal: J = diag(Y) ⊗ Z, so
       that row i of Δ̂ has the covariance Z⁻¹/(N·Yᵢ).
    3. Keep the part of the fit within A, AAᵀ = I: Ŵ = W + Δ̂AᵀA. By Pythagoras
       ‖Ŵ − W*‖² = ‖(Δ̂ − Δ)Aᵀ‖² + ‖Δ‖² − ‖ΔAᵀ‖², noise within A and bias outside; in the mean
       E‖Ŵ − W*‖² = ‖Δ‖² + tr(A Ω Aᵀ),   Ω = (1/N)·Σᵢ1/Yᵢ·Z⁻¹ − ΔᵀΔ   (in, in),
       by Ky Fan least if A's rows are the eigenvectors of Ω's r lowest eigenvalues.
    4. For the unknown Δ, and for Δ̂, take one natural-gradient step, J vec Δ = −vec G. As J vec Δ =
       vec(diag(Y) Δ Z), it is Δ = −diag(Y)⁻¹ G Z⁻¹. And B = ΔAᵀ, by step 3, for s = 1.
    The paper fits B alone, A frozen: no more variance than Ω counts, as (AZAᵀ)⁻¹ ⪯ AZ⁻¹Aᵀ (matrix
    Cauchy–Schwarz), and no less bias, as that fit weighs it by Z.

    Guarantee: on a quadratic loss with Hessian diag(Y) ⊗ Z, undamped, `variance=0`: BA = Δ if
    rank Δ ≤ r. In regression that Y is 1/σ². A measured E[g²], from the data's labels, not the
    model's (“empirical Fisher”), holds the signal too: it divides row i of Δ by 1 + (ΔZΔᵀ)ᵢᵢ/σ².
    Δ's row space stays, and A's too where rank Δ = r. Several layers that each take the whole step
    can overshoot.
    `variance` weighs Ω's first term. The theory's 1 takes Δ for known; from N′ rows ΔᵀΔ has noise
    of mean (1/N′)·Σᵢ1/Yᵢ·Z⁻¹. At N′ = N weight 1 only cancels it and 2 is unbiased for a fixed A,
    as in Mallows' C_p; more can pay, as A was chosen on that noise (the winner's curse).
    Raises ValueError for NaN or Inf, and what does not fit."""
    n_out, n_in = gradient.shape
    if not n_train >= 1 or not 0 <= variance < math.inf:
        raise ValueError(f"n_train {n_train} must be at least 1, variance {variance} in [0, ∞)")
    G, Z, Y = _checked(rank, min(n_out, n_in), gradient=(gradient, (n_out, n_in)),
                       input_moment=(input_moment, (n_in, n_in)),
                       output_fisher=(output_fisher, (n_out,)))
    L = _cholesky(Z, damping)  # (in, in); the authors' code adds 1e-6 to Z in any units
    Y = Y + damping * Y.mean() if Y.any() else torch.ones_like(Y)  # (out,); no gradient: B = 0
    if not Y.min() > 0:
        raise ValueError(f"damping {damping} leaves output_fisher ({n_out},) not positive")
    scaled, weight = G / Y[:, None], variance * (1 / Y).sum() / n_train  # their variance is 0.03

    def omega(V: Tensor) -> Tensor:  # ΩV = Z⁻¹(weight·I − GᵀY⁻²G Z⁻¹)V, by thin products
        V = weight * V - scaled.mT @ (scaled @ torch.cholesky_solve(V, L))
        return torch.cholesky_solve(V, L)

    A = _lowest_eigenvectors(omega, Z, rank).mT  # (r, in)
    return -scaled @ torch.cholesky_solve(A.mT, L), A  # B = ΔAᵀ; they shrink Δ, then both factors


@_full_precision
def hrp(B_high: Tensor, A_high: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """High-Rank Preheating [3]: the main directions of a short training at a higher rank.

    Takes B_high (out, R) and A_high (R, in), trained for a few steps; returns B = 0 (out, r) and
    A (r, in), AAᵀ = I: the function is unchanged, only the directions are new.
    1. Let the loss be ‖D − BA‖² (least squares, Z = I; D the change that is needed). At a frozen
       A, AAᵀ = I, the best B = DAᵀ leaves ‖D‖² − ‖DAᵀ‖², the least, by Eckart–Young, if A holds
       the top r right singular vectors of D. But D is unknown.
    2. Train B_high at a random A_high: converged, B_high·A_high = DP, P the projector on A_high's
       rows. For A within their span ‖DPAᵀ‖ = ‖DAᵀ‖: the product's top r right singular vectors
       are the best A within it. A span that contains it holds one as good or better; R = in
       (`init_hrp`: where out ≥ in) the best of all.
    3. The product, (out, in), is never formed: with A_highᵀ = Q T, T triangular, it is
       (B_high Tᵀ) Qᵀ, and if B_high Tᵀ = U Σ Vᵀ, its right singular vectors are the columns of QV.

    B = 0 is our reading of the paper's "only the direction"; it writes W + B Aᵀ: its A is our Aᵀ.
    Cost: O((out + in)·R²). Raises ValueError for factors that do not fit, or a B_high of 0.
    """
    (n_out, high), n_in = B_high.shape, A_high.shape[1]
    B_high, A_high = _checked(rank, min(n_out, n_in, high), B_high=(B_high, (n_out, high)),
                              A_high=(A_high, (high, n_in)))
    if not B_high.any():
        raise ValueError(f"B_high ({n_out}, {high}) is 0: no gradient reached the layer")
    Q, T = torch.linalg.qr(A_high.mT)  # (in, ≤R), (≤R, R)
    V_t = torch.linalg.svd(B_high @ T.mT, full_matrices=False).Vh  # (≤R, ≤R)
    return B_high.new_zeros(n_out, rank), V_t[:rank] @ Q.mT


@_full_precision
def monge_map(Z_f: Tensor, Z_p: Tensor) -> Tensor:
    """T (in, in) with T Z_f Tᵀ = Z_p: of all such it moves x least; the only one symmetric ≻ 0.

    It carries x of moment Z_f = L_f L_fᵀ (fine-tuning) to Z_p = L_p L_pᵀ (pre-training), at least
    E‖Tx − x‖² = tr Z_f + tr Z_p − 2 tr(T Z_f): optimal transport of Gaussians, classical
    (Olkin & Pukelsheim; Knott & Smith; Gelbrich). Proof: all T with T Z_f Tᵀ = Z_p are
    L_p Q L_f⁻¹, Q orthogonal. Let L_pᵀL_f = U Σ Vᵀ. Then tr(T Z_f) = tr(Q L_fᵀL_p) is largest at
    Q = U Vᵀ (Procrustes), where T = L_f⁻ᵀ V Σ Vᵀ L_f⁻¹. A symmetric T ≻ 0 has no other Q, as
    L_fᵀL_p = (L_fᵀT L_f) Qᵀ is a polar decomposition. Raises ValueError unless Z_f, Z_p ≻ 0."""
    Z_f, Z_p = _checked(Z_f=(Z_f, 2 * Z_f.shape[:1]), Z_p=(Z_p, Z_f.shape))
    L_f, L_p = _cholesky(Z_f, damping=0), _cholesky(Z_p, damping=0)
    U, _, V_t = torch.linalg.svd(L_p.mT @ L_f)
    return torch.linalg.solve_triangular(L_f, L_p @ U @ V_t, upper=False, left=False)


@_full_precision
def cntlora(weight: Tensor, input_moment: Tensor, pretrain_moment: Tensor | None = None, *,
            rank: int, damping: float = 0.1) -> tuple[Tensor, Tensor]:
    """CNTLoRA, after ConsNoTrainLoRA [4]: the change that undoes a shift of the input domain.

    The derivation is OURS. Of [4] only the abstract was read; it claims: initialization as domain
    shift, several constraints between pre-training and fine-tuning activations, a closed form
    without training, decomposed into factors of variable rank. What follows keeps to that.

    Takes W (out, in), Z_f = E[x xᵀ] of fine-tuning inputs and, if pre-training data is at hand,
    its Z_p; returns B (out, r) and A (r, in). Both moments are damped first, and not centred.
    1. Output constraint: (W+ΔW)x has the second moments on fine-tuning inputs that Wx had on
       pre-training ones: (W+ΔW) Z_f (W+ΔW)ᵀ = W Z_p Wᵀ.
    2. Input constraint: write W + ΔW = W T; then T Z_f Tᵀ = Z_p suffices. Of all such T take the
       one that moves x least, `monge_map(Z_f, Z_p)`. So ΔW = W (T − I).
    3. Knowledge constraint: where Z_p is not given, take pre-training inputs for white and as
       large, Z_p = mean(diag Z_f)·I, so that T ∝ Z_f^−½. (This whitens what did not shift, too.)
    4. Cut ΔW to rank r: min E‖(ΔW − BA)x‖² = ‖(ΔW − BA) L‖², L Lᵀ = Z_f. By Eckart–Young, from
       ΔW L = U Σ Vᵀ: B = U_r Σ_r, A = V_rᵀ L⁻¹. (Σ^½ in each starts at a saddle where ΔW = 0.)

    Guarantees, for the damped moments: A Z_f Aᵀ = I; Z_p = Z_f gives ΔW = 0; Wx's moments match
    at r = min(in, out). Undamped, a shift x_f = S x_p is undone exactly, T = S⁻¹, if S is symmetric
    positive definite and rank(S − I) ≤ r. It is blind to labels. Raises ValueError as `lora_da`.
    """
    n_out, n_in = weight.shape
    if pretrain_moment is None:  # constraint 3
        pretrain_moment = input_moment.diagonal().mean() * torch.eye(n_in).to(input_moment)
    W, Z_f, Z_p = _checked(rank, min(n_out, n_in), weight=(weight, (n_out, n_in)),
                           input_moment=(input_moment, (n_in, n_in)),
                           pretrain_moment=(pretrain_moment, (n_in, n_in)))
    L, L_p = _cholesky(Z_f, damping), _cholesky(Z_p, damping)  # (in, in)
    delta = W @ monge_map(L @ L.mT, L_p @ L_p.mT) - W  # (out, in)
    U, S, V_t = torch.linalg.svd(delta @ L, full_matrices=False)
    A = torch.linalg.solve_triangular(L, V_t[:rank], upper=False, left=False)  # (r, in)
    return U[:, :rank] * S[:rank], A


def allocate_ranks(spectra: dict[str, Tensor], budget: int) -> dict[str, int]:
    """{name: rank ≥ 1}, summing to `budget`, so that the squares left out of all spectra sum least.

    `spectra` holds each layer's singular values, largest first: for CNTLoRA the norms of B's
    columns. Each layer gets one rank, the rest go to the largest values there are: as spectra
    fall, these are the next of each. Raises ValueError for NaN or Inf, and a budget out of range.
    """
    _checked(**{f"spectrum of '{name}'": (s, s.shape) for name, s in spectra.items()})
    extra = [(-s, name) for name, spectrum in spectra.items() for s in spectrum.tolist()[1:]]
    if not 0 <= budget - len(spectra) <= len(extra):
        raise ValueError(f"budget {budget}: 1 a layer, {len(spectra)}, and up to {len(extra)} more")
    taken = [name for _, name in sorted(extra)[: budget - len(spectra)]]
    return {name: 1 + taken.count(name) for name in spectra}


# ---------------------------------------------------------------------------- 4. statistics

class Statistics(NamedTuple):
    """Means over `count` rows of a layer; the last two are None after a forward-only pass."""
    count: int
    input_moment: Tensor  # Z = E[x xᵀ]   (in, in)
    gradient: Tensor | None = None  # G = E[g xᵀ]   (out, in)
    output_fisher: Tensor | None = None  # Y = E[g²]     (out,), with the data's labels


def collect_statistics(model: nn.Module, layers: dict[str, nn.Linear], batches: Iterable,
                       loss_fn: Callable, *, backward: bool = True,
                       mask_fn: Callable | None = None) -> dict[str, Statistics]:
    """{name: Statistics} of the given `nn.Linear` layers, taken in eval mode, our adapters off.

    `loss_fn(model, batch)` has to use the model that it gets, a twin of yours, and return the MEAN
    −log p over rows: then a row's g is the gradient at the layer's output times the number of
    rows in that call, which has to be all that the loss averages (no expert's share, no chunk).
    Where the loss averages fewer terms (sequences of T tokens), the Newton step can be T times too
    short. A layer called twice has twice the rows, and half ∂/∂W as G. `mask_fn(batch)`, bool, of
    the inputs' leading shape, is True where a row counts. With `backward=False` only Z is taken,
    and `loss_fn` may return anything. In several processes each passes its own batches and gets
    the means over all.

    A forward hook keeps x for a hook on the gradient of y, where both are in hand: no weight needs
    a gradient, and under activation checkpointing a gradient arrives once. Cost: a forward and a
    backward pass of activations; 2·rows·in·(in + out) flops, less where layers share an input (q,
    k, v); in² + out·in + out floats a layer. Raises ValueError for a loss that is no finite scalar
    with a gradient, a mask that does not fit, an input changed in place, an unreached layer."""
    (twin, inside), mask, sums = _twin(model, layers), None, {}
    for adapter in lora_layers(twin).values():
        adapter.scaling = 0.0

    @functools.lru_cache(maxsize=1)  # q, k and v have the same input: its xᵀx is found once
    def rows_and_gram(x: Tensor, version: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = _rows(x, mask)
        return rows, rows.mT @ rows

    @_full_precision
    def add(name: str, x: Tensor, version: int, g: Tensor | None = None) -> None:
        with _naming(name):
            if x._version != version:
                raise ValueError(f"its input {tuple(x.shape)} was changed in place after the call")
            rows, gram = rows_and_gram(x, version, mask)  # (rows, in), (in, in)
        terms = [len(rows), gram]
        if g is not None:
            g = len(rows) * _rows(g, mask)  # (rows, out), as the loss is their mean
            terms += [g.mT @ rows, g.square().sum(dim=0)]
        for total, term in zip(sums[name], terms):
            total += term

    def watch(name: str, _: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if not backward:
            add(name, x, x._version)
        elif torch.is_grad_enabled():  # not so in the first pass of a reentrant checkpoint
            y = y if y.requires_grad else y.requires_grad_().clone()  # the graph starts here
            y.register_hook(functools.partial(add, name, x, x._version))
        return y

    for name, layer in inside.items():
        layer.register_forward_hook(functools.partial(watch, name), with_kwargs=True)
        n_out, n_in = layer.weight.shape
        shapes = [(n_in, n_in), (n_out, n_in), (n_out,)][: 3 if backward else 1]
        like = {"device": layer.weight.device, "dtype": _wide(layer.weight.dtype)}
        sums[name] = [torch.zeros((), **like).long(), *(torch.zeros(s, **like) for s in shapes)]
    for batch in list(batches):
        mask = mask_fn(batch) if mask_fn else None
        with torch.set_grad_enabled(backward):
            loss = loss_fn(twin, batch)
            if backward:
                _check_loss(loss).backward()
    for name, (count, *moments) in sums.items():
        if _summed(count) == 0:
            raise ValueError(f"layer '{name}': no row reached it: no batch, mask, another model?")
        sums[name] = Statistics(int(count), *(_summed(moment).div_(count) for moment in moments))
    return sums


def _twin(model: nn.Module, layers: dict[str, nn.Linear]) -> tuple[nn.Module, dict]:
    """A copy of the model, in eval mode, that shares all parameters with it but A and B.
    Hooks, modes, gradients and new factors live and die on it: nothing has to be undone."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False)
              for name, p in model.named_parameters() if "lora_" not in name}
    twin, inside = copy.deepcopy((model, layers), shared)  # takes what is in `shared` as copied
    return twin.eval(), inside


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """(…, n) → (rows, n), where the mask is True; float32 at least."""
    if mask is not None:
        if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
            raise ValueError(f"mask {mask.shape}, {mask.dtype}, expected bool {x.shape[:-1]}")
        x = x[mask]
    return x.reshape(-1, x.shape[-1]).to(_wide(x.dtype))


def _check_loss(loss: Tensor, finite: bool = True) -> Tensor:
    """The loss, float32 at least: a scalar, with a gradient where gradients are recorded."""
    scalar = isinstance(loss, Tensor) and loss.numel() == 1 and (loss.isfinite() or not finite)
    if not scalar or torch.is_grad_enabled() > loss.requires_grad:
        raise ValueError(f"the loss is {loss!r}, not a finite scalar tensor with a gradient")
    return loss.to(_wide(loss.dtype))


def _summed(tensor: Tensor) -> Tensor:
    """Its sum over the processes of torch.distributed's group, in place, where there is one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------------------- 5. whole models

def init_lora_da(model: nn.Module, batches: Iterable, loss_fn: Callable, *, damping: float = 0.1,
                 n_train: int | None = None, variance: float = 1.0, step: float | None = None,
                 mask_fn: Callable | None = None, layers_per_pass: int | None = None) -> float:
    """Start every adapter of the model at LoRA-DA's (B, A); returns the step taken.

    `loss_fn`, `mask_fn`: as in `collect_statistics`. `n_train`: the number of rows (tokens, for a
    language model) that fine-tuning will see; left out, the rows seen here. Every B is multiplied
    by `step` / s: 1 is the theory's, too long where many layers step together, too short where the
    signal is strong; 0 keeps the directions alone; None takes `line_search`'s over these batches,
    after which the mean of their losses is never above the pre-trained model's.
    `layers_per_pass` bounds the statistics' memory: so many layers at a time, a pass over the
    batches for each. In several processes (torchrun) each calls it on the same model, unwrapped,
    with its own batches; all end with the same factors. All layers change or, on an error, none."""
    def fit(layer: LoRALinear, total: Statistics) -> tuple[Tensor, Tensor]:
        return lora_da(total.gradient, total.input_moment, total.output_fisher, layer.rank,
                       total.count if n_train is None else n_train, variance=variance,
                       damping=damping)

    return _start(model, [batches], loss_fn, fit, step, layers_per_pass, None, mask_fn=mask_fn)


def init_cntlora(model: nn.Module, batches: Iterable, loss_fn: Callable, *,
                 pretrain_batches: Iterable | None = None, rank_budget: int | None = None,
                 damping: float = 0.1, step: float | None = None, mask_fn: Callable | None = None,
                 layers_per_pass: int | None = None) -> float:
    """Start every adapter at CNTLoRA's (B, A), from forward passes alone; returns the step taken.

    Labels serve the line search, never the fit: without them pass `step=0` or `step=1`, and let
    `loss_fn` call the model. `pretrain_batches` give Z_p. `rank_budget` spends that many ranks in
    all by `allocate_ranks`, s unchanged; left out, ranks stay. For the rest see `init_lora_da`."""
    def fit(layer: LoRALinear, *totals: Statistics) -> tuple[Tensor, Tensor]:
        rank = layer.rank if rank_budget is None else min(layer.weight.shape)
        return cntlora(layer.weight, *(t.input_moment for t in totals), rank=rank, damping=damping)

    return _start(model, [batches, pretrain_batches], loss_fn, fit, step, layers_per_pass,
                  rank_budget, mask_fn=mask_fn, backward=False)


@torch.enable_grad()
def init_hrp(model: nn.Module, batches: Iterable, loss_fn: Callable, *, preheat_rank: int = 64,
             lr: float = 0.002, train_A: bool = False, seed: int = 0) -> None:
    """Preheat at a high rank, one Adam step a batch, and start every adapter at HRP's A, B = 0.

    `preheat_rank` is capped at a layer's min(in, out); A_high, drawn by `seed`, stays frozen unless
    `train_A`. In several processes a step takes the mean gradient of a batch from each, so each
    has to pass equally many. For the rest see `init_lora_da`."""
    twin, inside = _twin(model, layers := lora_layers(model))
    rng = torch.Generator().manual_seed(seed)
    for m in inside.values():
        A_high = torch.empty(min(preheat_rank, *m.weight.shape), m.in_features)
        nn.init.kaiming_uniform_(A_high, a=math.sqrt(5), generator=rng)  # as in plain LoRA
        m.set_factors(torch.zeros(m.out_features, len(A_high)), A_high)
        m.scaling, m.lora_A.requires_grad, m.lora_B.requires_grad = 1.0, train_A, True
    trained = [p for m in inside.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr)
    for batch in list(batches):
        for p in trained:  # what a batch does not reach has a gradient, too: 0
            p.grad = torch.zeros_like(p)
        loss = _check_loss(loss_fn(twin, batch))
        loss.backward()
        for p in trained:
            p.grad = _summed(p.grad) / _summed(torch.ones_like(loss))
        optimizer.step()
    for name, layer in inside.items():
        with _naming(name):
            layer.set_factors(*hrp(layer.lora_B, layer.lora_A, layers[name].rank))
    for name, layer in layers.items():
        layer.set_factors(inside[name].lora_B, inside[name].lora_A)


def _start(model: nn.Module, sources: list[Iterable], loss_fn: Callable, fit: Callable,
           step: float | None, size: int | None, budget: int | None, **options: object) -> float:
    """Give every adapter fit(layer, its statistics from each source), B times step / s."""
    layers = lora_layers(model)
    if (off := [n for n, layer in layers.items() if layer.scaling == 0]) or not layers:
        raise ValueError(f"no LoRALinear that is on (scaling 0: {off}): call add_lora, or set it")
    twin, inside = _twin(model, layers)
    sources = [list(batches) for batches in sources if batches is not None]
    names, size = list(layers), max(size or len(layers), 1)
    for i in range(0, len(names), size):
        group = {name: layers[name] for name in names[i:i + size]}
        passes = [collect_statistics(model, group, s, loss_fn, **options) for s in sources]
        for name, layer in group.items():
            with _naming(name):
                inside[name].set_factors(*fit(layer, *(totals.pop(name) for totals in passes)))
    spectra = {name: layer.lora_B.norm(dim=0) for name, layer in inside.items()}
    ranks = {} if budget is None else allocate_ranks(spectra, budget)
    for name, layer in inside.items():
        B, r = (1.0 if step is None else step) / layer.scaling * layer.lora_B, ranks.get(name)
        layer.set_factors(B[:, :r], layer.lora_A[:r])
    step = line_search(twin, sources[0], loss_fn) if step is None else step
    for name, layer in layers.items():  # nothing can fail any more
        layer.set_factors(inside[name].lora_B, inside[name].lora_A)
    return step


@torch.no_grad()
def line_search(model: nn.Module, batches: Iterable, loss_fn: Callable) -> float:
    """Multiply every B by a t that lowers the mean loss over `batches`, or by 0; returns t.

    A full step made safe (ours), in up to eight passes: from t = 1 go to ¼ … 4⁻⁵ while the loss
    falls or is not below its value at 0; if t = 1 is below it and ¼ no better, to 4 … 4⁵ while it
    falls. Batches that the fit has seen flatter it: after `step=1`, others give a safer t. Raises
    ValueError for no batches or a loss that is no scalar, and changes nothing then."""
    layers, batches = lora_layers(model), list(batches)
    twin, inside = _twin(model, layers)
    if not batches:
        raise ValueError("batches is empty")

    def total_loss(t: float) -> float:
        for name, layer in inside.items():
            layer.scaling = t * layers[name].scaling
        losses = [_check_loss(loss_fn(twin, batch), finite=t == 0) for batch in batches]
        return float(_summed(sum(losses)))

    pretrained, least, t = total_loss(0.0), total_loss(1.0), 1.0
    factor = 4.0 if least < pretrained and not total_loss(0.25) < least else 0.25
    for _ in range(5):
        loss = total_loss(factor * t)
        if least < pretrained and not loss < least:
            break
        least, t = loss, factor * t
    t = t if least < pretrained else 0.0
    for layer in layers.values():
        layer.set_factors(t * layer.lora_B, layer.lora_A)
    return t
