# SPDX-License-Identifier: MIT
"""Data-driven starting points for LoRA: three algorithms, as plain functions on tensors.

LoRA fine-tunes a frozen weight W through two thin factors:   y = W x + b + s·B A x   [1].

    W  weight       (out, in)  frozen          x  (…, in)   a layer's input row
    A  lora_A       (r, in)    projects down   g  (…, out)  ∂(−log p)/∂y at the layer's output
    B  lora_B       (out, r)   projects up     Z  input_moment   (in, in)   E[x xᵀ]
    s  scaling      scalar     alpha / r       Y  output_fisher  (out,)     E[g²]
    ΔW delta_weight (out, in)  s·B A           G  gradient       (out, in)  E[g xᵀ]

    plain LoRA  looks at nothing;     costs nothing;              starts at A random, B = 0
    lora_da     gradients, inputs;    one backward pass;          at one Newton step, cut to rank r
    hrp         a short training;     that training;              at A = main directions, B = 0
    cntlora     inputs, no labels;    one forward pass;           where the output moments match

Read in order and stop after any part: layer, linear algebra, the three algorithms (here ends the
mathematics), statistics, whole models, saving. One orientation holds throughout, PyTorch's: rows
of A live in input space.

[1] LoRA, arXiv 2106.09685.                     [2] LoRA-DA, arXiv 2510.24561 v3.
[3] High-Rank Preheating, arXiv 2502.07739 v3.  [4] ConsNoTrainLoRA, arXiv 2507.08044.
[5] K-FAC, arXiv 1503.05671.
"""

import difflib
import functools
import importlib
import json
import math
import operator
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

# ---------------------------------------------------------------------------- 1. the layer


class LoRALinear(nn.Linear):
    """y = W x + b + s·B A x: an `nn.Linear` whose weight is frozen, with a trainable low-rank term.

    x (…, in) → y (…, out). The given layer's `weight` and `bias` are shared, not copied, and
    frozen; they keep their state-dict keys and are never written. The start is plain LoRA: A
    Kaiming-uniform, B = 0, so the function is unchanged. Factors are float32 under a half-precision
    weight. `alpha=None` means alpha = rank, so s = 1. With `scaling = 0` the adapter is off.

    Raises TypeError unless `linear` is exactly an `nn.Linear` with a dense floating-point weight
    on a real device; ValueError unless 1 ≤ rank ≤ min(in, out) and alpha > 0.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float | None = None):
        _check_adaptable("linear", linear, rank, alpha)
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False).train(linear.training)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = 1.0 if alpha is None else alpha / rank

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        y = F.linear(input, self.weight, self.bias)  # (…, out)
        if self.scaling == 0:
            return y
        down = F.linear(input.to(self.lora_A.dtype), self.lora_A)  # (…, r)
        return y + F.linear(self.scaling * down, self.lora_B).to(y.dtype)

    def delta_weight(self) -> Tensor:
        """s·B A, (out, in), in the factors' dtype."""
        return self.scaling * self.lora_B @ self.lora_A

    @torch.no_grad()
    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """Install copies of B (out, r) and A (r, in), of any rank r up to min(in, out); s stays.

        At the same rank the Parameters remain the same objects, so an optimizer made before keeps
        its hold on them; at another rank they are new ones: make the optimizer afterwards.
        Raises ValueError, both shapes named, where the factors do not fit the layer.
        """
        _check_factors(self, B, A)
        if len(A) != self.rank:
            self.lora_A = nn.Parameter(self.lora_A.new_empty(A.shape), self.lora_A.requires_grad)
            self.lora_B = nn.Parameter(self.lora_B.new_empty(B.shape), self.lora_B.requires_grad)
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A new, frozen `nn.Linear` with weight W + s·B A; this layer is left as it is."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        weight = (self.weight + self.delta_weight()).to(self.weight.dtype)
        linear.weight = nn.Parameter(weight)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return linear.requires_grad_(False).train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


def _check_rank(rank: int, n_out: int, n_in: int) -> None:
    if not 1 <= operator.index(rank) <= min(n_out, n_in):
        raise ValueError(f"rank {rank} is not in 1..{min(n_out, n_in)}, the limit of a weight "
                         f"({n_out}, {n_in})")


def _check_factors(layer: nn.Linear, B: Tensor, A: Tensor) -> None:
    n_out, n_in = layer.weight.shape
    if A.shape != (len(A), n_in) or B.shape != (n_out, len(A)):
        raise ValueError(f"factors B {tuple(B.shape)}, A {tuple(A.shape)} do not fit a weight "
                         f"({n_out}, {n_in}): pass B (out, r) and A (r, in)")
    _check_rank(len(A), n_out, n_in)


def _check_adaptable(name: str, module: nn.Module, rank: int, alpha: float | None) -> None:
    weight = getattr(module, "weight", None)
    if type(module) is not nn.Linear or not isinstance(weight, nn.Parameter):
        raise TypeError(f"'{name}' is {type(module).__name__}, not exactly nn.Linear: target other "
                        "layers, or replace it by an nn.Linear (a Conv1D's weight is transposed)")
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if weight.is_meta or weight.layout != torch.strided or weight.dtype not in dtypes:
        raise TypeError(f"'{name}' ({type(module).__name__}) has a {weight.dtype} weight on "
                        f"{weight.device}, layout {weight.layout}: load it dense, in 16 to 64 bits")
    with _naming(name):
        _check_rank(rank, *weight.shape)
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"alpha {alpha} is not positive and finite")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the layer's name before the message of a ValueError raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer '{name}': {error}") from error


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapters by name, in the order of `named_modules`."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model: nn.Module, rank: int, alpha: float | None = None,
             targets: str | Iterable[str] | Callable[[str], bool] | None = None,
             ) -> dict[str, LoRALinear]:
    """Swap linear layers for `LoRALinear`, in place, and freeze everything but the adapters.

    `targets`: None takes every exact `nn.Linear`; names or dotted suffixes ("q_proj") take the
    modules so called; a predicate chooses among the names of exact `nn.Linear` layers. A layer
    that the model holds twice becomes one adapter. Returns {name: adapter}, what it matched.

    Raises ValueError where a target matches nothing or a rank does not fit, TypeError where it
    matches something other than a dense `nn.Linear`; the model is then unchanged.
    """
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    linear_names = [name for name, module in modules.items() if type(module) is nn.Linear]
    if targets is None:
        hits = {"every nn.Linear": linear_names}
    elif callable(targets):
        hits = {"the predicate": [name for name in linear_names if targets(name)]}
    else:
        targets = [targets] if isinstance(targets, str) else targets
        hits = {t: [n for n in modules if f".{n}".endswith(f".{t}")] for t in targets}
    for target, hit in (hits or {"an empty list": []}).items():
        if not hit:
            near = difflib.get_close_matches(target, linear_names, cutoff=0.3) or linear_names[:3]
            raise ValueError(f"target '{target}' matches no module below {type(model).__name__}; "
                             f"near names: {', '.join(near) or 'none, it holds no nn.Linear'}")
    names = list(dict.fromkeys(name for hit in hits.values() for name in hit))
    # Of the names of one module the first stays: the later a key is set, the more it counts.
    names = list({modules[name]: name for name in reversed(names)}.values())[::-1]
    for name in names:
        _check_adaptable(name, modules[name], rank, alpha)
        parent = model.get_submodule(name.rpartition(".")[0])
        fast_path = torch.backends.mha.get_fastpath_enabled()  # in eval mode reads weights alone
        if isinstance(parent, nn.TransformerEncoderLayer) and fast_path:
            raise TypeError(f"'{name}': {type(parent).__name__} would bypass the adapter: call "
                            "torch.backends.mha.set_fastpath_enabled(False) first")
    trained = {id(p) for layer in lora_layers(model).values() for p in layer.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in trained)
    adapters = {name: LoRALinear(modules[name], rank, alpha) for name in names}
    _swap(model, {modules[name]: adapter for name, adapter in adapters.items()})
    return adapters


def merge_lora(model: nn.Module) -> nn.Module:
    """Swap every adapter for its merged `nn.Linear`, in place; returns the model.

    Raises TypeError if the model itself is an adapter: use its `merged()`.
    """
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


def _plain_arithmetic(function: Callable) -> Callable:
    """No gradient is recorded inside, and a surrounding autocast does not reach in."""
    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        values = (*args, *kwargs.values())
        device = next(value.device.type for value in values if isinstance(value, Tensor))
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*args, **kwargs)
    return wrapper


def _check_tensors(damping: float, **named: tuple[Tensor, tuple[int, ...]]) -> list[Tensor]:
    """The tensors in one dtype, float32 at least, if each is finite and has the shape given."""
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping {damping} is not in [0, ∞)")
    dtype = torch.float32
    for name, (tensor, shape) in named.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} {shape} holds NaN or Inf: check the data, or lower its scale")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor, _ in named.values()]


def _damped(moment: Tensor, damping: float) -> Tensor:
    """C + damping·mean(diag C)·I: damping in C's own units, so no result depends on them."""
    mean = moment.diagonal().mean()
    return moment + damping * mean * torch.eye(len(moment)).to(moment)


def _cholesky(moment: Tensor, damping: float) -> Tensor:
    """Lower L with L Lᵀ = the damped moment, (in, in)."""
    L, failed = torch.linalg.cholesky_ex(_damped(moment, damping))
    if failed:
        raise ValueError(f"the input moment {tuple(moment.shape)} is not positive definite at "
                         f"damping {damping}: raise damping, or drop a layer that sees only zeros")
    return L


def _lowest_eigenvectors(apply: Callable[[Tensor], Tensor], rank: int, like: Tensor) -> Tensor:
    """Eigenvectors (n, rank) of the `rank` smallest eigenvalues of a symmetric operator.

    `apply` multiplies (n, k) by the operator Ω; `like` has n rows. Up to n = 1024: `eigh`, exact,
    O(n³). Above: a block Krylov space, spanned by random columns X, ΩX, Ω²X, …, grows until the
    eigenvectors within it satisfy ‖ΩV − Vλ‖ ≤ 1e-5·‖Ω‖: O(n² m) for m basis vectors. If that has
    not happened at m = n/4 (no gap in the spectrum), or if so many vectors are wanted that there is
    no room to grow, the exact way is taken after all. (A small residual proves eigenvectors; that
    they are the lowest rests on the random start.)
    """
    n, width = len(like), min(rank + 8, len(like))
    generator = torch.Generator().manual_seed(0)  # a fixed start: same input, same bits
    start = torch.randn(n, width, generator=generator, dtype=like.dtype).to(like.device)
    block, basis = torch.linalg.qr(start).Q, start[:, :0]
    image = basis  # Ω·basis
    while n > 1024 and width <= n // 16 and basis.shape[1] <= n // 4:
        for _ in range(2 + basis.shape[1] // (8 * width)):  # grow by an eighth between two looks
            basis = torch.cat([basis, block], dim=1)  # (n, m)
            image = torch.cat([image, apply(block)], dim=1)  # (n, m)
            block = image[:, -width:]
            for _ in range(2):  # twice: Gram–Schmidt loses orthogonality where much cancels
                block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        values, rotation = torch.linalg.eigh(basis.mT @ image)
        vectors = basis @ rotation[:, :rank]  # (n, r)
        residual = image @ rotation[:, :rank] - vectors * values[:rank]
        if residual.norm(dim=0).max() <= 1e-5 * values.abs().max():
            return vectors
    dense = apply(torch.eye(n).to(like))
    return torch.linalg.eigh((dense + dense.mT) / 2).eigenvectors[:, :rank].clone()


def _top_right_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Right singular vectors (in, rank) of the largest singular values, the largest first."""
    n = matrix.shape[1]
    if n <= 1024 or rank > n // 32:
        return torch.linalg.svd(matrix, full_matrices=False).Vh[:rank].mT
    return _lowest_eigenvectors(lambda V: -matrix.mT @ (matrix @ V), rank, matrix.mT)


# ---------------------------------------------------------------------------- 3. the algorithms


@_plain_arithmetic
def lora_da(gradient: Tensor, input_moment: Tensor, output_fisher: Tensor, rank: int,
            n_train: int, *, variance: float = 1.0, damping: float = 0.1) -> tuple[Tensor, Tensor]:
    """LoRA-DA [2, Algorithm 1]: the A that makes a fit on `n_train` rows err least, and its B.

    Takes G (out, in), Z (in, in), Y (out,); returns B (out, r) and A (r, in) with AAᵀ = I.

    Objective. Let W* = W + Δ be the truth. Freeze A, fit B by maximum likelihood on N rows (this
    is LoRA-FA) and choose A to minimize E‖Ŵ − W*‖²_F, a sum of bias and variance:

    1. Bias. Let AAᵀ = I. The nearest BA is ΔAᵀA, at the squared distance ‖Δ‖² − tr(A ΔᵀΔ Aᵀ).
    2. Variance. K-FAC [5] takes x, g and g's entries as independent. Then W, its rows laid end to
       end, has the Fisher information J = diag(Y) ⊗ Z, and B has diag(Y) ⊗ AZAᵀ. For large N the
       fit's variance is the trace of the inverse over N: (1/N)·Σᵢ1/Yᵢ·tr (AZAᵀ)⁻¹. With
       U = Z^−½Aᵀ and P the projector on the span of Z^½Aᵀ, A Z⁻¹ Aᵀ − (AZAᵀ)⁻¹ = Uᵀ(I − P)U ⪰ 0,
       so the variance is at most (1/N)·Σᵢ1/Yᵢ·tr(A Z⁻¹ Aᵀ).
    3. Together E‖Ŵ − W*‖² ≈ tr(A Ω Aᵀ) + ‖Δ‖², with Ω = (1/N)·Σᵢ1/Yᵢ·Z⁻¹ − ΔᵀΔ   (in, in).
       (The paper writes ≲; but the fit weighs the bias by Z, and so exceeds step 1's.)
    4. Least, by Ky Fan, if A's rows are the eigenvectors of Ω's r smallest eigenvalues.
    5. Δ is unknown; one natural-gradient step estimates it. The loss near W is
       ⟨G, Δ⟩ + ½ vec(Δ)ᵀ J vec(Δ), least where diag(Y) Δ Z = −G, so Δ = −diag(Y)⁻¹ G Z⁻¹.
       (The raw gradient, Y = Z = I, would assume the same curvature in every direction.)
    6. B = Δ Aᵀ, the projection of the target.

    Guarantees. On a quadratic loss with exact moments, no damping and no variance term, BA = Δ
    if rank Δ ≤ r, for any Z (test_lora_da_reaches_the_target_in_one_step); A is the minimizer
    (test_no_other_orthonormal_A_has_a_smaller_objective) and turns with the basis of x
    (test_lora_da_turns_with_the_input_basis); units of x and of the loss change no subspace
    (test_units_change_no_subspace). With Y = Z = I and `variance=0` A spans the gradient's top
    right singular vectors, where LoRA-GA and LoRA-One start [2, Remark 4.3]
    (test_identity_fisher_gives_the_gradients_singular_vectors).

    `variance` weighs step 2. The theory's 1 takes Δ as exact; but if N′ rows gave G, ΔᵀΔ contains
    noise of expectation (1/N′)·Σᵢ1/Yᵢ·Z⁻¹, so that with N′ = N 1 only cancels it and 2 is unbiased
    (our remark). `damping` adds damping·mean(diag) to Z and Y; the authors' code adds 1e-6 whatever
    the units, divides Δ by its top singular value, weighs the variance by 0.03 and shrinks both
    factors. The paper writes y = xW, so its A is our Aᵀ.
    If Y = 0 (no gradient arrived) A comes from the variance term alone, and B = 0.

    Cost: in³/3 for the Cholesky factor, then the eigenvectors of Ω: exact up to in = 1024, about
    10·in³ with 4·out·in² to form Ω; above, 4·in·(in + out) for each of some hundred basis vectors
    (see `_lowest_eigenvectors`). Neither Δ nor Ω is formed there.
    Raises ValueError for shapes that do not fit, NaN or Inf, and numbers out of range.
    """
    n_out, n_in = gradient.shape
    _check_rank(rank, n_out, n_in)
    if not n_train >= 1 or not 0 <= variance < math.inf:
        raise ValueError(f"n_train {n_train} must be at least 1, variance {variance} in [0, ∞)")
    G, Z, Y = _check_tensors(damping, gradient=(gradient, (n_out, n_in)),
                             input_moment=(input_moment, (n_in, n_in)),
                             output_fisher=(output_fisher, (n_out,)))
    Y = Y + damping * Y.mean() if Y.any() else torch.ones_like(Y)  # (out,)
    scaled, weight = G / Y[:, None], variance * (1 / Y).sum() / n_train
    if not (Y > 0).all() or not weight.isfinite():
        raise ValueError(f"output_fisher ({n_out},) is not positive at damping {damping}, or too "
                         "small to be inverted: raise the damping, or scale the loss")
    L = _cholesky(Z, damping)  # (in, in)

    def solve(V: Tensor) -> Tensor:  # Z⁻¹V; cholesky_solve would copy L first, for each V
        V = torch.linalg.solve_triangular(L, V, upper=False)
        return torch.linalg.solve_triangular(L.mT, V, upper=True)

    def omega(V: Tensor) -> Tensor:  # Ω V = Z⁻¹(weight·I − GᵀY⁻²G Z⁻¹)V; nothing wide is formed
        return solve(weight * V - scaled.mT @ (scaled @ solve(V)))

    A = _lowest_eigenvectors(omega, rank, Z).mT  # (r, in)
    return -scaled @ solve(A.mT), A  # Δ = −Y⁻¹ G Z⁻¹


@_plain_arithmetic
def hrp(B_high: Tensor, A_high: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """High-Rank Preheating [3]: the main directions of a short training at a higher rank.

    Takes factors B_high (out, R) and A_high (R, in) that were trained for a few steps; returns
    B = 0 (out, r) and A (r, in), AAᵀ = I. The function is unchanged; only the direction is new.

    Objective. A rank-r fit with A frozen can learn no more than D AᵀA of the change D it needs;
    that is best, by Eckart–Young, if A spans the top r right singular vectors of D.
    1. A random A of rank r misses them. A random A_high of rank R comes nearer to each: the first
       step from B_high = 0 changes W by ∝ −G A_highᵀA_high, and at large R A_highᵀA_high ≈ I. The
       paper proves for gradient flow that the directions improve with R, A frozen or trained.
    2. So A = the top r right singular vectors of the preheated change B_high·A_high.
    3. It is never formed: with B_high = Q₁R₁ and A_highᵀ = Q₂R₂, B_high·A_high = Q₁ (R₁R₂ᵀ) Q₂ᵀ;
       if the small core is R₁R₂ᵀ = U Σ Vᵀ, the right singular vectors are the columns of Q₂V.

    Guarantees. Equal to the SVD of the product (test_hrp_equals_the_svd_of_the_product); after a
    converged preheat at R = in the frozen-A fit is the Eckart–Young optimum
    (test_preheated_to_convergence_at_full_rank_hrp_is_optimal); the mean residual falls as R grows
    (test_the_residual_falls_as_the_preheating_rank_grows).
    B = 0 is our reading of "only the direction"; the paper writes W + B Aᵀ, so its A is our Aᵀ.

    Cost: O((out + in)·R²). Raises ValueError for factors that do not fit, or a rank over R.
    """
    n_out, high, n_in = B_high.shape[0], A_high.shape[0], A_high.shape[1]
    _check_rank(rank, n_out, n_in)
    B_high, A_high = _check_tensors(0.0, B_high=(B_high, (n_out, high)),
                                    A_high=(A_high, (high, n_in)))
    if rank > high:
        raise ValueError(f"rank {rank} exceeds the preheating rank {high}: preheat higher")
    R_1 = torch.linalg.qr(B_high, mode="r").R  # (≤R, R)
    Q_2, R_2 = torch.linalg.qr(A_high.mT)  # (in, ≤R), (≤R, R)
    V_t = torch.linalg.svd(R_1 @ R_2.mT).Vh  # (≤R, ≤R)
    return B_high.new_zeros(n_out, rank), V_t[:rank] @ Q_2.mT


@_plain_arithmetic
def monge_map(Z_f: Tensor, Z_p: Tensor) -> Tensor:
    """T (in, in), symmetric positive definite, with T Z_f Tᵀ = Z_p: of all maps the nearest to I.

    Among the maps that carry the moment Z_f to Z_p, T Z_f Tᵀ = Z_p, it minimizes
    E‖Tx − x‖² = tr Z_f + tr Z_p − 2 tr(T Z_f), optimal transport from N(0, Z_f) to N(0, Z_p).
    Let Z_f = L Lᵀ and M = LᵀTL: then M Mᵀ = LᵀZ_pL is given, and tr(T Z_f) = tr M is at most
    tr (M Mᵀ)^½, reached by M = (M Mᵀ)^½ alone. So T = L⁻ᵀ (Lᵀ Z_p L)^½ L⁻¹, for any such L.
    test_the_monge_map_carries_one_moment_to_the_other, test_no_other_map_moves_less.
    Raises ValueError where Z_f is not positive definite. Cost: one `eigh` of (in, in).
    """
    n = len(Z_f)
    Z_f, Z_p = _check_tensors(0.0, Z_f=(Z_f, (n, n)), Z_p=(Z_p, (n, n)))
    size_f, size_p = (Z.diagonal().mean() + torch.finfo(Z.dtype).tiny for Z in (Z_f, Z_p))
    L = _cholesky(Z_f / size_f, 0.0)  # of size 1, as the product below could overflow
    values, vectors = torch.linalg.eigh(L.mT @ (Z_p / size_p) @ L)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT  # (Lᵀ Z_p L)^½
    T = torch.linalg.solve_triangular(L.mT, root, upper=True)
    T = torch.linalg.solve_triangular(L, T, upper=False, left=False)
    return size_p.sqrt() / size_f.sqrt() * T


@_plain_arithmetic
def cntlora(weight: Tensor, input_moment: Tensor, pretrain_moment: Tensor | None = None, *,
            rank: int, damping: float = 0.1) -> tuple[Tensor, Tensor]:
    """CNTLoRA, after ConsNoTrainLoRA [4]: the change that undoes a shift of the input domain.

    The derivation is OURS. Of [4] only the abstract was read; it claims: initialization as domain
    shift, several constraints between pre-training and fine-tuning activations, a closed form
    without training, decomposed into factors of variable rank. What follows keeps to that.

    Takes W (out, in), Z_f = E[x xᵀ] of fine-tuning inputs and, if pre-training data is at hand,
    its Z_p; returns B (out, r) and A (r, in), with A Z_f Aᵀ = I.

    1. Output constraint: on fine-tuning inputs the adapted layer has the second moments that the
       pre-trained one had on its own: (W+ΔW) Z_f (W+ΔW)ᵀ = W Z_p Wᵀ.
    2. Input constraint: write W + ΔW = W T; then T Z_f Tᵀ = Z_p suffices. Of all such T take the
       one that moves activations least, `monge_map(Z_f, Z_p)`.
    3. Knowledge constraint: pre-training data is usually gone. Then assume it had normalized,
       uncorrelated activations of the same size: Z_p = mean(diag Z_f)·I, so T ∝ Z_f^−½.
    4. Result: ΔW = W (T − I), a closed form.
    5. Factors: the best of rank r on the data, min ‖(ΔW − BA) L‖_F with L Lᵀ = Z_f, which is
       E‖(ΔW − BA)x‖². By Eckart–Young, from the SVD ΔW L = U Σ Vᵀ:
       B = U_r Σ_r = ΔW L V_r and A = V_rᵀ L⁻¹. This split whitens what B sees, E[Ax (Ax)ᵀ] = I,
       and leaves A alive where ΔW = 0; Σ^½ in each would start there at the saddle A = B = 0.

    Guarantees. With Z_p given, no shift gives ΔW = 0 (test_no_shift_needs_no_change) and, without
    damping, x_f = S x_p with S symmetric positive definite is undone exactly, T = S⁻¹, if
    rank(S − I) ≤ r (test_a_symmetric_distortion_is_undone_exactly). Undamped output moments match
    at full rank (test_output_moments_match); no rank-r rival is nearer
    (test_no_rival_factors_are_nearer).
    It is blind to labels, and without Z_p it whitens even inputs that did not shift.

    `damping` adds damping·mean(diag) to both moments. Moments are not centred: a mean counts too.
    Cost: two Cholesky factors and an `eigh` of (in, in), about 10·in³, and an SVD of (out, in),
    above in = 1024 its r vectors alone, as in `_lowest_eigenvectors`.
    Raises ValueError for shapes that do not fit, NaN or Inf, and numbers out of range.
    """
    n_out, n_in = weight.shape
    _check_rank(rank, n_out, n_in)
    pretrain = input_moment if pretrain_moment is None else pretrain_moment
    W, Z_f, Z_p = _check_tensors(damping, weight=(weight, (n_out, n_in)),
                                 input_moment=(input_moment, (n_in, n_in)),
                                 pretrain_moment=(pretrain, (n_in, n_in)))
    L = _cholesky(Z_f, damping)  # (in, in)
    Z_f, Z_p = _damped(Z_f, damping), _damped(Z_p, damping)
    if pretrain_moment is None:
        Z_p = Z_f.diagonal().mean() * torch.eye(n_in).to(Z_f)  # constraint 3
    delta = W @ monge_map(Z_f, Z_p) - W  # (out, in)
    weighted = delta @ L
    V = _top_right_vectors(weighted, rank)  # (in, r)
    return weighted @ V, torch.linalg.solve_triangular(L, V.mT, upper=False, left=False)


def allocate_ranks(spectra: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Spend `budget` ranks over layers so that the singular values left out are smallest.

    `spectra` holds each layer's singular values, largest first, weighted by the data
    (`cntlora`, step 5). Each layer gets at least 1; the rest go one by one to the largest σ² not
    yet taken, which is optimal because the sum of what is left separates over layers
    (test_no_swap_of_a_rank_does_better). Returns {name: rank}, summing to `budget`.

    Raises ValueError for NaN or Inf, and for a budget below the number of layers or above the
    number of values.
    """
    for name, spectrum in spectra.items():
        if not spectrum.isfinite().all():
            raise ValueError(f"layer '{name}': its spectrum holds NaN or Inf")
    most = sum(len(spectrum) for spectrum in spectra.values())
    if not len(spectra) <= budget <= most:
        raise ValueError(f"budget {budget} is not in {len(spectra)}..{most}: 1 a layer at least, "
                         "and no more than there are singular values")
    extra = [(-s, name) for name, spectrum in spectra.items() for s in spectrum.tolist()[1:]]
    ranks = dict.fromkeys(spectra, 1)
    for _, name in sorted(extra)[: budget - len(spectra)]:
        ranks[name] += 1
    return ranks


# ---------------------------------------------------------------------------- 4. statistics


@dataclass
class Statistics:
    """Means over `count` rows of a layer; the last two are None after a forward-only pass."""

    count: int
    input_moment: Tensor  # Z = E[x xᵀ]   (in, in)
    gradient: Tensor | None = None  # G = E[g xᵀ]   (out, in)
    output_fisher: Tensor | None = None  # Y = E[g²]     (out,), diagonal empirical Fisher


def collect_statistics(model: nn.Module, layers: dict[str, nn.Linear], batches: Iterable,
                       loss_fn: Callable[[nn.Module, object], Tensor], *, backward: bool = True,
                       mask_fn: Callable[[object], Tensor] | None = None,
                       ) -> dict[str, Statistics]:
    """Z, G and Y of each layer, in one pass over `batches`, at the pre-trained weights.

    `loss_fn(model, batch)` returns the MEAN −log p over rows, so a row's g is the gradient at the
    layer's output times the number of rows in that call: as long as a layer sees the rows that the
    loss averages, results do not depend on how they are batched. A layer called twice sees twice
    the rows. `mask_fn(batch)`, bool, of the input's leading shape, is True where a row counts; or
    it returns a dict of such masks by layer name, None where every row counts. `batches` has to
    end. With `backward=False` only Z is taken, without gradients, and any return value will do.

    How: a forward hook keeps x for a hook on the gradient of y; there both are in hand, and no
    weight needs a gradient. Activation checkpointing counts no row twice, as a gradient arrives
    once. Layers that share an input tensor (q, k, v) share its xᵀx. In several processes each
    passes its own batches, and all get the means over the rows of all.

    Cost: one forward and one backward pass of activations, plus 2·rows·in·out flops for G and
    about 1.2·rows·in² for Z; memory in² + out·in + out floats a layer, and one batch of inputs.
    The model is left as it was, hooks and the random state too, also after an error.

    Raises ValueError for empty batches, a loss that is not a finite scalar with a gradient, a mask
    of another shape, a layer that no gradient reached, and NaN or Inf in a layer's statistics.
    """
    masks = gram = None
    last = none = None, None, None  # the last input, its version and its mask; gram is its xᵀx

    @_plain_arithmetic
    def accumulate(name: str, x: Tensor, version: int, g: Tensor | None) -> None:
        nonlocal last, gram
        mask = _mask(masks, name, x)
        if _version(x) != version:
            raise ValueError(f"layer '{name}': its input {tuple(x.shape)} was changed in place "
                             "after the call: write x = x + …, not x += …")
        total, rows = sums[name], _rows(x, mask)  # (rows, in)
        if x.is_inference() or not (x is last[0] and version == last[1] and mask is last[2]):
            last, gram = (x, version, mask), _lower_gram(rows)
        total.count += len(rows)
        total.input_moment += gram
        if g is not None:
            g, unit = _rows(g, mask), len(rows) / 1024  # (rows, out)
            total.gradient.addmm_(g.mT, rows, alpha=unit)
            total.output_fisher.add_(g.square().sum(dim=0), alpha=unit**2)

    def watch(name: str, x: Tensor, y: Tensor) -> Tensor:
        version = _version(x)
        if not backward:
            accumulate(name, x, version, None)
        elif torch.is_grad_enabled():
            if not y.requires_grad:  # the graph starts here; a clone may be changed in place
                y = y.requires_grad_().clone()
            y.register_hook(lambda g: accumulate(name, x, version, g))
        return y

    with _pretrained(model), torch.set_grad_enabled(backward):
        sums = {name: _zeros(layer, backward) for name, layer in layers.items()}
        with _as_one(), _watching(layers, watch):
            for number, batch in _numbered(batches):
                masks, last = mask_fn(batch) if mask_fn else None, none
                loss = loss_fn(model, batch)
                if backward:  # times 1024, which is exact: in half precision small g's survive
                    _checked(loss, number).backward(torch.full_like(loss, 1024))
        _average(sums)
    return sums


def _zeros(layer: nn.Linear, backward: bool) -> Statistics:
    n_out, n_in = layer.weight.shape
    shapes = [(n_in, n_in), (n_out, n_in), (n_out,)] if backward else [(n_in, n_in)]
    dtype, device = torch.promote_types(layer.weight.dtype, torch.float32), layer.weight.device
    return Statistics(0, *(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes))


def _average(sums: dict[str, Statistics]) -> None:
    """From sums of each process, Z's upper triangle missing, to means over all rows; in place."""
    counts = _gathered({name: total.count for name, total in sums.items()})
    for name, total in sums.items():
        total.count = sum(count[name] for count in counts)
        if total.count == 0:
            raise ValueError(f"layer '{name}' was reached by no row: unused, detached, under "
                             "no_grad, all masked, or in a reentrant checkpoint")
        lower = total.input_moment.tril_()
        lower += lower.tril(-1).mT
        for field, moment in vars(total).items():
            if isinstance(moment, Tensor):  # not the count
                _sum_up(moment).div_(total.count)
                if not moment.isfinite().all():
                    raise ValueError(f"layer '{name}': {field} holds NaN or Inf: check data, loss")


@contextmanager
def _watching(layers: dict[str, nn.Linear], watch: Callable) -> Iterator[None]:
    """Inside, each layer calls watch(name, x, y) after its forward pass; the result replaces y."""
    handles = [layer.register_forward_hook(
        lambda _, args, kwargs, y, name=name: watch(name, args[0] if args else kwargs["input"], y),
        with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask(masks: Tensor | dict | None, name: str, x: Tensor) -> Tensor | None:
    """The layer's mask out of what mask_fn returned, if it fits the input."""
    if isinstance(masks, dict) and name not in masks:
        raise ValueError(f"layer '{name}': mask_fn returned a dict without it: None there counts "
                         "every row")
    mask = masks[name] if isinstance(masks, dict) else masks
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(f"layer '{name}': the mask {tuple(mask.shape)}, {mask.dtype}, does not "
                         f"fit the input {tuple(x.shape)}: make it bool, of its leading shape")
    return mask


def _rows(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """(…, n) → (rows, n), where the mask is True; float32 at least."""
    tensor = tensor if mask is None else tensor[mask.to(tensor.device)]
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _lower_gram(rows: Tensor) -> Tensor:
    """The lower triangle of xᵀx, (in, in), in column panels: of 4 panels ⅝ of the flops."""
    gram = rows.new_zeros(rows.shape[1], rows.shape[1])
    for i in range(0, len(gram), 256):
        gram[i:, i:i + 256].addmm_(rows[:, i:].mT, rows[:, i:i + 256])
    return gram


def _version(x: Tensor) -> int:
    """Counts the changes in place; inference tensors have no counter."""
    return 0 if x.is_inference() else x._version


_ONE_AT_A_TIME = threading.RLock()  # the random state that _pretrained restores is the process's


@contextmanager
def _pretrained(model: nn.Module, seed: int | None = None) -> Iterator[dict[str, LoRALinear]]:
    """Inside: the pre-trained function (s = 0), in eval mode, frozen, with stand-ins for A and B
    that may be overwritten. Afterwards, also after an error, everything is as it was. A call with
    a seed is one that starts adapters."""
    devices = range(torch.cuda.device_count())
    with _ONE_AT_A_TIME, torch.inference_mode(False), torch.random.fork_rng(devices):
        layers = lora_layers(model)
        if seed is not None:
            _check_startable(model, layers)
            torch.manual_seed(seed)
        before = [(module, "training", module.training) for module in model.modules()]
        before += [(p, "requires_grad", p.requires_grad) for p in model.parameters()]
        before += [(layer, name, getattr(layer, name)) for layer in layers.values()
                   for name in ("scaling", "lora_A", "lora_B")]
        try:
            model.requires_grad_(False).eval()
            for layer in layers.values():
                layer.scaling = 0.0
                layer.lora_A = nn.Parameter(layer.lora_A.detach().clone(), False)
                layer.lora_B = nn.Parameter(layer.lora_B.detach().clone(), False)
            yield layers
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)


def _check_startable(model: nn.Module, layers: dict[str, LoRALinear]) -> None:
    """There are adapters, switched on; and all processes hold the same weights beside A and B."""
    with _as_one():
        if not layers:
            raise ValueError("the model has no LoRALinear: call add_lora first")
        for name, layer in layers.items():
            if not 0 < abs(layer.scaling) < math.inf:
                raise ValueError(f"layer '{name}' has scaling {layer.scaling}: set it to a finite "
                                 "number other than 0, which is off")
    if _several():
        norms = {name: "" if "lora_" in name else f"{parameter.float().norm():.4g}"
                 for name, parameter in model.named_parameters()}
        if any(others != norms for others in _gathered(norms)):
            raise ValueError("the processes hold different models: make, load and adapt them "
                             "alike, with the same seed")


def _numbered(batches: Iterable) -> Iterator[tuple[int, object]]:
    """(number, batch) for each; a generator of the DataLoader's own ends where it began."""
    number, generator = -1, getattr(batches, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        for number, batch in enumerate(batches):
            yield number, batch
    finally:
        if state is not None:
            generator.set_state(state)
    if number < 0:
        raise ValueError("batches is empty: pass a list or a DataLoader, as a generator can be "
                         "read only once")


def _checked(loss: Tensor, number: int, differentiable: bool = True) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.isfinite():
        raise ValueError(f"the loss of batch {number} is {loss!r}, not a finite scalar tensor")
    if differentiable and not loss.requires_grad:
        raise ValueError(f"the loss of batch {number} has no gradient: return it undetached, and "
                         "adapt a layer that it depends on")
    return loss


# Several processes (torchrun): each reads its own batches; what is summed, is summed over all.


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _gathered(value: object) -> list:
    """The value on each process of the default group, in order; without a group, the one value."""
    if not _several():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _sum_up(tensor: Tensor) -> Tensor:
    """The sum over the processes, in place: every process holds the same bits afterwards."""
    if _several():
        distributed.all_reduce(tensor)
    return tensor


@contextmanager
def _as_one() -> Iterator[None]:
    """An error inside, on one process, is an error on all: none waits for it in vain."""
    try:
        yield
    except Exception as error:
        _gathered(repr(error))
        raise
    for rank, message in enumerate(_gathered(None)):
        if message is not None:
            raise RuntimeError(f"process {rank} failed: {message}")


# ---------------------------------------------------------------------------- 5. whole models


def init_lora_da(model: nn.Module, batches: Iterable, loss_fn: Callable, *,
                 n_train: int | None = None, variance: float = 1.0, damping: float = 0.1,
                 scale: float | None = 0.01, identity_fisher: bool = False, guard: bool = True,
                 mask_fn: Callable | None = None, layers_per_pass: int | None = None,
                 seed: int = 0) -> float:
    """Start every adapter of the model at LoRA-DA's (B, A); returns the guard's factor (≤ 1).

    `loss_fn(model, batch)` → mean −log p, as in `collect_statistics`. `n_train`: the number of
    rows (tokens, for a language model) that fine-tuning will see; left out, the rows seen here.
    Each B is shortened where ‖ΔW‖₂ exceeds scale·‖W‖₂: the full Newton step, `scale=None`, is
    right on a quadratic and far too long in a deep network. `identity_fisher` with `variance=0`
    starts at the gradient's singular vectors, the baseline.

    The guard, ours: while the mean loss over the rows is above the pre-trained model's, halve
    every B; after 10 halvings set B = 0. So no start is worse than the pre-trained model there.
    It costs 2 to 12 more forward passes over `batches`.

    `layers_per_pass` bounds the memory: so many layers at a time, a pass over `batches` each, to
    the same bits. Peak, in floats: the sum of in² + out·in + out over the layers of a pass, plus
    the larger of a batch's activations and the work on one layer, 5·in² + out·in + in·max(in, out),
    less above in = 1024 (test_the_peak_memory_is_what_is_documented).

    In several processes (torchrun) each makes the call on the same unwrapped model, with its own
    batches; all end with the same bits, those of one process up to rounding. The same seed gives
    the same bits. All layers succeed or none changes. Raises ValueError, the layer named.
    """
    def fit(layer: LoRALinear, total: Statistics) -> tuple[Tensor, Tensor]:
        if identity_fisher:
            total.input_moment = torch.eye(layer.in_features).to(total.input_moment)
            total.output_fisher = torch.ones_like(total.output_fisher)
        B, A = lora_da(total.gradient, total.input_moment, total.output_fisher, layer.rank,
                       total.count if n_train is None else n_train, variance=variance,
                       damping=damping)
        return _shortened(B, A, layer.weight, scale), A

    with _pretrained(model, seed) as layers:
        factors, groups = {}, _groups(layers, layers_per_pass)
        _check_rereadable(batches, len(groups) + guard)
        for group in groups:
            statistics = collect_statistics(model, group, batches, loss_fn, mask_fn=mask_fn)
            for name, layer in group.items():
                with _naming(name):
                    factors[name] = fit(layer, statistics.pop(name))
        factor = _guard(model, factors, batches, loss_fn, mask_fn, seed) if guard else 1.0
    return _install(layers, factors, factor)


def init_hrp(model: nn.Module, batches: Iterable, loss_fn: Callable, *, preheat_rank: int = 64,
             lr: float = 0.002, train_A: bool = False, mask_fn: Callable | None = None,
             seed: int = 0) -> float:
    """Preheat at a high rank, one Adam step a batch, and start at HRP's A with B = 0.

    `preheat_rank` is capped at each layer's min(in, out); A_high is Kaiming-uniform and stays
    frozen unless `train_A`. The preheated factors are discarded. Returns 1.0: with B = 0 there is
    nothing to guard. In several processes a step takes one batch from each, weighed by its rows,
    which `mask_fn` counts, until the last has run dry. For errors, seed and all-or-none see
    `init_lora_da`.
    """
    with _pretrained(model, seed) as layers, torch.enable_grad():
        ranks = {name: layer.rank for name, layer in layers.items()}
        if preheat_rank < max(ranks.values()) or not 0 < lr < math.inf:
            raise ValueError(f"preheat_rank {preheat_rank} is below rank {max(ranks.values())}, or "
                             f"lr {lr} not positive and finite")
        for name, layer in layers.items():
            high = min(preheat_rank, layer.in_features, layer.out_features)
            A_high = layer.lora_A.new_empty(high, layer.in_features)
            nn.init.kaiming_uniform_(A_high, a=math.sqrt(5))
            layer.lora_A = nn.Parameter(A_high, requires_grad=train_A)
            layer.lora_B = nn.Parameter(layer.lora_B.new_zeros(layer.out_features, high))
            layer.scaling = 1.0
        _train(model, batches, loss_fn, mask_fn, lr)
        factors = {}
        for name, layer in layers.items():
            if not layer.lora_B.any():
                raise ValueError(f"layer '{name}' got no gradient in preheating, or one that "
                                 "overflowed: target others, or scale the loss")
            with _naming(name):
                factors[name] = hrp(layer.lora_B, layer.lora_A, ranks[name])
    return _install(layers, factors, 1.0)


def _train(model: nn.Module, batches: Iterable, loss_fn: Callable, mask_fn: Callable | None,
           lr: float) -> None:
    """One Adam step a batch; a step takes one from each process that has not run dry."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, steps = torch.optim.Adam(trained, lr), _numbered(batches)
    while True:
        optimizer.zero_grad()
        rows = None  # stays None where this process has run dry
        with _as_one():
            if (step := next(steps, None)) is not None:
                number, batch = step
                loss, rows = _loss_and_rows(model, batch, loss_fn, mask_fn)
                _checked(loss, number).backward()
        counts = [count for count in _gathered(rows) if count is not None]
        if not counts:
            return
        share = (rows or 0) / max(sum(counts), 1)
        for parameter in trained:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = _sum_up(share * grad)
        optimizer.step()


def init_cntlora(model: nn.Module, batches: Iterable, loss_fn: Callable, *,
                 pretrain_batches: Iterable | None = None, rank_budget: int | None = None,
                 damping: float = 0.1, scale: float | None = 0.01, guard: bool = True,
                 mask_fn: Callable | None = None, layers_per_pass: int | None = None,
                 seed: int = 0) -> float:
    """Start every adapter at CNTLoRA's (B, A), from forward passes alone; returns the factor.

    `loss_fn(model, batch)` has to call the model; labels serve the guard, never the fit: without
    labels pass `guard=False`, and it may return anything. `pretrain_batches` give Z_p.
    `rank_budget` spends that many ranks in all by `allocate_ranks`; left out, ranks stay. Peak
    memory as in `init_lora_da`, with a sum of in², twice with `pretrain_batches`, and work of
    4·in² + 4·in·max(in, out); a budget keeps factors of up to its rank for all layers. For the rest
    see `init_lora_da`.
    """
    with _pretrained(model, seed) as layers:
        ranks = {name: layer.rank for name, layer in layers.items()}
        if rank_budget is not None:  # enough of each spectrum to choose from
            most = max(rank_budget - len(layers) + 1, 1)
            ranks = {name: min(most, *layer.weight.shape) for name, layer in layers.items()}
        factors, groups = {}, _groups(layers, layers_per_pass)
        _check_rereadable(batches, len(groups) + guard)
        _check_rereadable(pretrain_batches, len(groups))
        for group in groups:
            passes = [collect_statistics(model, group, data, loss_fn, backward=False,
                                         mask_fn=mask_fn)
                      for data in (batches, pretrain_batches) if data is not None]
            for name, layer in group.items():
                Z = (statistics.pop(name).input_moment for statistics in passes)  # freed after use
                with _naming(name):
                    factors[name] = cntlora(layer.weight, *Z, rank=ranks[name], damping=damping)
        if rank_budget is not None:
            spectra = {name: B.norm(dim=0) for name, (B, _) in factors.items()}
            ranks = allocate_ranks(spectra, rank_budget)
        for name, (B, A) in factors.items():
            B, A = B[:, : ranks[name]], A[: ranks[name]]
            factors[name] = _shortened(B, A, layers[name].weight, scale), A
        factor = _guard(model, factors, batches, loss_fn, mask_fn, seed) if guard else 1.0
    return _install(layers, factors, factor)


@_plain_arithmetic
def _shortened(B: Tensor, A: Tensor, weight: Tensor, scale: float | None) -> Tensor:
    """B, shortened if need be so that ‖B A‖₂ ≤ scale·‖W‖₂."""
    if scale is None:
        return B
    if not 0 < scale < math.inf:
        raise ValueError(f"scale {scale} is not positive and finite")
    length = torch.linalg.matrix_norm(B @ torch.linalg.qr(A.mT).R.mT, 2)  # ‖B A‖₂, from (out, r)
    W = weight.to(B.dtype)
    if min(W.shape) > 1024:  # 16 steps find 99 % of the norm, never more; an SVD costs minutes
        generator = torch.Generator().manual_seed(0)
        V = torch.randn(W.shape[1], 16, generator=generator, dtype=W.dtype).to(W.device)
        for _ in range(16):
            V = torch.linalg.qr(W.mT @ (W @ V)).Q
        W = W @ V
    norm = torch.linalg.matrix_norm(W, 2)
    return B * (scale * norm / length).clamp_max(1) if length > 0 else B


def _groups(layers: dict[str, LoRALinear], size: int | None) -> list[dict[str, LoRALinear]]:
    """`size` layers at a time; all at once for None."""
    size, items = len(layers) if size is None else size, list(layers.items())
    if size < 1:
        raise ValueError(f"layers_per_pass {size} is not at least 1")
    return [dict(items[i:i + size]) for i in range(0, len(items), size)]


def _check_rereadable(batches: Iterable | None, passes: int) -> None:
    with _as_one():
        if passes > 1 and isinstance(batches, Iterator):
            raise ValueError(f"{type(batches).__name__} can be read only once, not {passes} "
                             "times: pass a list or a DataLoader")


def _loss_and_rows(model: nn.Module, batch: object, loss_fn: Callable, mask_fn: Callable | None,
                   ) -> tuple[Tensor, int]:
    """The batch's loss, and its number of rows that count, over all adapters together."""
    masks, rows = mask_fn(batch) if mask_fn else None, 0

    def count(name: str, x: Tensor, _: Tensor) -> None:
        nonlocal rows
        mask = _mask(masks, name, x)
        rows += math.prod(x.shape[:-1]) if mask is None else int(mask.sum())

    with _watching(lora_layers(model), count):
        loss = loss_fn(model, batch)
    return loss, rows


@torch.no_grad()
def _guard(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], batches: Iterable,
           loss_fn: Callable, mask_fn: Callable | None, seed: int) -> float:
    """The largest of 1, ½, …, 2⁻¹⁰ at which the mean loss is no worse than at 0; else 0."""
    layers = lora_layers(model)

    def mean_loss(factor: float) -> float:
        torch.manual_seed(seed)  # a DataLoader that shuffles deals the same batches each time
        for layer in layers.values():
            layer.scaling = factor
        total = count = 0
        with _as_one():
            for number, batch in _numbered(batches):
                loss, rows = _loss_and_rows(model, batch, loss_fn, mask_fn)
                if factor == 0.0:
                    _checked(loss, number, differentiable=False)
                total += rows * float(loss)
                count += rows
        totals, counts = zip(*_gathered((total, count)))
        return sum(totals) / sum(counts)

    pretrained = mean_loss(0.0)
    for name, (B, A) in factors.items():
        layers[name].set_factors(B, A)
    for halvings in range(11):
        if mean_loss(0.5**halvings) <= pretrained:
            return 0.5**halvings
    return 0.0


def _install(layers: dict[str, LoRALinear], factors: dict, factor: float) -> float:
    with _ONE_AT_A_TIME:
        scaled = {name: factor / layer.scaling * factors[name][0] for name, layer in layers.items()}
        for name, B in scaled.items():
            if not B.isfinite().all():
                raise ValueError(f"layer '{name}': B overflows at scaling {layers[name].scaling}")
        for name, layer in layers.items():
            layer.set_factors(scaled[name], factors[name][1])
    return factor


# ---------------------------------------------------------------------------- 6. saving


def save_peft(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapters to `folder` as PEFT does: adapter_config.json and adapter_model.bin.

    Each file replaces an older one in one step. In several processes call it in one of them.
    Raises ValueError if the model has no adapter below its root, FileExistsError if the folder
    has an adapter_model.safetensors, which PEFT would read instead.
    """
    layers, folder = lora_layers(model), Path(folder)
    if not layers or "" in layers:
        raise ValueError(f"{type(model).__name__} has no LoRALinear below it: call add_lora first")
    if (folder / "adapter_model.safetensors").exists():
        raise FileExistsError(f"adapter_model.safetensors in {folder} would be read in place of "
                              "the new file: save to another folder")
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {n: float(f"{layer.scaling * ranks[n]:.15g}") for n, layer in layers.items()}
    r, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    # In a list PEFT takes a name for a suffix; a string is a regular expression, and exact.
    suffixes = tuple(f".{name}" for name in layers)
    mixed = any(n.endswith(suffixes) and n not in layers for n, _ in model.named_modules())
    config = {
        "peft_type": "LORA", "base_model_name_or_path": None, "task_type": None,
        "target_modules": "|".join(map(re.escape, layers)) if mixed else list(layers),
        "r": r, "rank_pattern": {f"^{re.escape(n)}": v for n, v in ranks.items() if v != r},
        "lora_alpha": alpha,
        "alpha_pattern": {f"^{re.escape(n)}": v for n, v in alphas.items() if v != alpha},
        "fan_in_fan_out": False, "bias": "none", "use_rslora": False, "lora_dropout": 0.0,
        "init_lora_weights": True, "inference_mode": False,
    }
    tensors = {f"base_model.model.{name}.lora_{key}.weight": factor.detach().cpu().clone()
               for name, layer in layers.items()
               for key, factor in (("A", layer.lora_A), ("B", layer.lora_B))}
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = (folder / f".{kind}.{os.getpid()}" for kind in ("weights", "settings"))
    try:
        torch.save(tensors, weights)
        settings.write_text(json.dumps(config, indent=2), encoding="utf-8")
        weights.replace(folder / "adapter_model.bin")
        settings.replace(folder / "adapter_config.json")
    finally:
        for part in (weights, settings):
            part.unlink(missing_ok=True)


def load_peft(model: nn.Module, folder: str | os.PathLike) -> dict[str, LoRALinear]:
    """Give the model the adapters that `save_peft` or PEFT wrote to `folder`; returns them by name.

    Adapters that the model has take the saved factors and scale; other layers are adapted first,
    as by `add_lora`. adapter_model.safetensors (needs the package) goes before adapter_model.bin.
    Raises, and changes nothing: ValueError where layers or shapes differ, the model has an adapter
    that the file lacks, a number is NaN or Inf, or the file holds more than LoRA (or rsLoRA) on
    linear layers, such as a changed W (PiSSA); TypeError as in `add_lora`.
    """
    config, saved = _read_peft(Path(folder))

    def alpha(name: str) -> float:  # PEFT's rule: the first pattern that matches
        return next((value for key, value in (config.get("alpha_pattern") or {}).items()
                     if re.match(rf"(.*\.)?({key})$", name)), config.get("lora_alpha", 8))

    modules, scalings, fresh = dict(model.named_modules(remove_duplicate=False)), {}, set()
    for name, factors in saved.items():
        if name not in modules:
            near = ", ".join(difflib.get_close_matches(name, modules)) or "none"
            raise ValueError(f"{folder}: the model has no layer '{name}'; near names: {near}")
        if set(factors) != {"A", "B"}:
            raise ValueError(f"{folder}: '{name}' has lora_{''.join(factors)} alone")
        if not isinstance(modules[name], LoRALinear):
            _check_adaptable(name, modules[name], 1, None)
            fresh.add(name)
        with _naming(name):
            _check_factors(modules[name], factors["B"], factors["A"])
        rank = len(factors["A"])
        scalings[name] = alpha(name) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        numbers = (*factors.values(), torch.tensor(scalings[name]))
        if not all(number.isfinite().all() for number in numbers):
            raise ValueError(f"{folder}: '{name}' holds NaN or Inf")
    if len({modules[name] for name in saved}) < len(saved):
        raise ValueError(f"{folder} has two adapters for one layer, which the model holds twice")
    if lacking := set(lora_layers(model)) - set(saved):
        raise ValueError(f"{folder} lacks the model's adapters {sorted(lacking)}: merge them first")
    if fresh:
        add_lora(model, 1, targets=fresh.__contains__)
    adapters = {name: model.get_submodule(name) for name in saved}
    for name, layer in adapters.items():
        layer.set_factors(saved[name]["B"], saved[name]["A"])
        layer.scaling = scalings[name]
    return adapters


def _read_peft(folder: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """The configuration, and the factors as {layer: {"A": …, "B": …}}."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    beyond = [key for key in ("use_dora", "lora_bias", "alora_invocation_tokens", "use_qalora",
                              "use_bdlora", "layer_replication") if config.get(key)]
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        beyond.append(f"init_lora_weights {config['init_lora_weights']}")  # these change W too
    if config.get("peft_type") != "LORA" or beyond:
        raise ValueError(f"{folder}: not plain LoRA but {config.get('peft_type')} {beyond}")
    file = folder / "adapter_model.safetensors"
    if file.exists():
        tensors = importlib.import_module("safetensors.torch").load_file(file)
    else:
        tensors = torch.load(file.with_suffix(".bin"), map_location="cpu", weights_only=True)
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"{folder}: '{key}' is no factor of a linear layer")
        saved.setdefault(match[1], {})[match[2]] = tensor
    return config, saved
