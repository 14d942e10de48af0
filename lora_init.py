# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""Data-driven starting points for LoRA: three algorithms after published papers, as functions.

LoRA [1] fine-tunes a frozen weight W through two thin factors:    y = W x + b + s·B A x

    W  weight        (out, in)   frozen           x  (…, in)   rows of a layer's input
    A  lora_A        (r, in)     projects down    g  (…, out)  ∂(−Σ log p)/∂y at its output y
    B  lora_B        (out, r)    projects up      Z  input_moment   (in, in)   E[x xᵀ]
    s  scaling       alpha / r                    Y  output_fisher  (out,)     E[g²]
    ΔW delta_weight  (out, in)   s·B A            G  gradient       (out, in)  E[g xᵀ]
    Δ                (out, in)   the change that is needed;  D  our estimate of it
    Ω  omega         (in, in)    LoRA-DA's guidance matrix: variance minus signal
    N, M             n_train, n_fitted: rows that fine-tuning will see, rows averaged here
    R  preheat_rank  HRP's high rank              T  monge_map      (in, in)   CNTLoRA's map

E is the mean over rows, p the model's probability of a row's label, and P ⊗ Q the matrix of the
blocks Pᵢⱼ·Q.

Plain LoRA starts at a random A and B = 0. The three algorithms look at data first:

    lora_da [2]   inputs and gradients          the A of least estimated error, and a step within it
    hrp [3]       a short high-rank training    its main directions as A, and B = 0
    cntlora [4]   inputs, no labels             the change that restores the inputs' moments

The file reads from top to bottom, and you can stop after any part: the layer, the algorithms,
the statistics that they need, whole models.

[1] LoRA, arXiv 2106.09685.
[2] LoRA-DA, arXiv 2510.24561, ICML 2026. The whole paper, checked against its authors' code.
[3] High-Rank Preheating, arXiv 2502.07739 v3. Only the abstract and its theorem's claim.
[4] ConsNoTrainLoRA, arXiv 2507.08044. Only the abstract: the equations here are our own.
[5] K-FAC, arXiv 1503.05671.
"""

import collections
import contextlib
import functools
import inspect
import logging
import math
import operator
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

__all__ = [
    "LoRALinear",
    "Statistics",
    "add_lora",
    "allocate_ranks",
    "cntlora",
    "collect_statistics",
    "hrp",
    "init_cntlora",
    "init_hrp",
    "init_lora_da",
    "lora_da",
    "lora_layers",
    "merge_lora",
    "monge_map",
    "white_basis",
]
LOGGER = logging.getLogger("lora_init")  # at level INFO a start reports its progress
ON_META = "adapter is on the meta device: call its to_empty(device=…, recurse=False) first"

# ---------------------------------------------------------------------------- 1. the layer


class LoRALinear(nn.Module):
    """y = base_layer(x) + s·B A x: a frozen linear layer, called unchanged, plus a low-rank term.

    x (…, in) gives y (…, out). It starts as plain LoRA does: A is Kaiming-uniform and B = 0, so
    that the function is unchanged. A and B are made in float32 at least; the sum is rounded to y's
    dtype once, except under autocast. `alpha=None` means s = 1. `scaling` is s, a plain number: 0
    switches the adapter off. The state_dict does not hold it, so save it yourself. Further
    arguments of a call go on to the base layer, which has to return one tensor. TorchScript and an
    adapter on an adapter are not supported. Raises ValueError for a rank or an alpha out of range,
    TypeError for complex weights and for a layer that has no weight, being packed or lazy.
    """

    lent: tuple[Tensor, Tensor] | None = None  # B and A that a start tries in place of its own

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float | None = None):
        super().__init__()
        _check_base(base_layer, rank)
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"alpha {alpha} is not positive and finite")
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        device = base_layer.weight.device
        dtype = _at_least_float32(base_layer.weight.dtype)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, device=device, dtype=dtype))
        self.reset_parameters()
        self.scaling = 1.0 if alpha is None else float(alpha) / rank
        self.base_layer = base_layer.requires_grad_(False)
        self.train(base_layer.training)

    def reset_parameters(self) -> None:
        """Plain LoRA's start: A uniform in ±1/√in, which is Kaiming's with a = √5, and B = 0."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def _apply(self, fn: Callable, recurse: bool = True) -> "LoRALinear":
        """What `to` and `to_empty` call: factors that leave the meta device are initialized."""
        was_meta = self.lora_A.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.lora_A.is_meta:
            self.reset_parameters()
        return self

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(input, *args, **kwargs)  # (…, out)
        if self.scaling == 0:
            return y
        B, A = self.lent or (self.lora_B, self.lora_A)
        if A.is_meta and not y.is_meta:
            raise ValueError(f"this layer's {ON_META}")
        down = input.to(A) @ A.mT  # (…, r)
        up = self.scaling * down @ B.mT  # (…, out)
        return (y + up).to(y.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def base_weight(self) -> Tensor:
        """W, (out, in): gathered if FSDP has sharded it, dequantized if its class knows how.

        Raises TypeError for other quantized weights and for offloaded ones.
        """
        weight = self.base_layer.weight
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        if type(weight).dequantize is not Tensor.dequantize:  # torchao, quanto
            weight = weight.dequantize()
        coded = not weight.is_floating_point() or weight.element_size() == 1  # integers, or float8
        if coded or weight.is_meta and not self.lora_A.is_meta:
            kind = type(self.base_layer).__name__
            where = f"{weight.dtype} on {weight.device.type}"
            raise TypeError(
                f"{kind}'s weight ({where}) cannot be read: dequantize or load it first"
            )
        return weight

    @property
    def weight(self) -> Tensor:
        """W + ΔW, for code that reads a layer's weight instead of calling the layer.

        It is computed anew each time: to change W, write to `base_layer.weight`.
        """
        W = self.base_weight
        return (W + self.delta_weight()).to(W.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def delta_weight(self) -> Tensor:
        """ΔW = s·B A, (out, in)."""
        return self.scaling * self.lora_B @ self.lora_A

    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """Copy in B (out, r) and A (r, in), of any rank; s and the Parameter objects stay.

        If the rank stays, the numbers are written in place, and whoever shares the memory sees
        them. Raises ValueError for factors that do not fit, that hold NaN or Inf, or whose rank is
        new while FSDP shards the old ones.
        """
        B = B.to(self.lora_B, copy=True).contiguous()  # as fused optimizers and files need it
        A = A.to(self.lora_A, copy=True).contiguous()
        if B.shape != (self.out_features, len(A)) or A.shape != (len(A), self.in_features):
            raise ValueError(
                f"B {tuple(B.shape)} and A {tuple(A.shape)} are not (out, r) and (r, in) "
                f"with out = {self.out_features} and in = {self.in_features}"
            )
        _check_finite("B", B)
        _check_finite("A", A)
        sharded = hasattr(self.lora_A, "full_tensor")
        if sharded and len(A) != self.rank:
            raise ValueError("the rank of factors that FSDP has sharded cannot change")
        for factor, value in ((self.lora_B, B), (self.lora_A, A)):
            factor.grad = None  # it belongs to the old factors
            if sharded:  # each process keeps its part
                place = (factor.device_mesh, factor.placements)
                value = distributed.tensor.distribute_tensor(value, *place)
            if value.shape == factor.shape:
                with torch.no_grad():
                    factor.copy_(value)
            else:
                # If a loss is still held, only a new dtype makes autograd forget the old shape.
                factor.data = value.to(torch.complex64)
                factor.data = value

    def merged(self) -> nn.Linear:
        """A new, frozen `nn.Linear` with weight W + ΔW, rounded to W's dtype.

        What the base layer does beyond W x + b, by hooks or a forward of its own, is lost.
        """
        bias = self.bias
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight)
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone())
        return linear.requires_grad_(False).train(self.training)


def _check_base(layer: nn.Linear, rank: int) -> None:
    """Refuse a linear layer that cannot take an adapter of this rank."""
    weight = getattr(layer, "weight", None)
    if weight is None or nn.parameter.is_lazy(weight):
        kind = type(layer).__name__
        raise TypeError(f"this {kind} has no weight yet: unpack it, or run one batch through it")
    _at_least_float32(weight.dtype)
    _check_rank(rank, layer.out_features, layer.in_features)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        raise TypeError(f"{dtype} is complex; only real numbers are supported")
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_rank(rank: int, *limits: int) -> None:
    if not isinstance(rank, int) or not 1 <= rank <= min(limits):
        raise ValueError(f"rank {rank!r} is not an int in 1..{min(limits)}")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} {tuple(tensor.shape)} holds NaN or Inf")


# ---------------------------------------------------------------------------- 2. the algorithms

Function = TypeVar("Function", bound=Callable)


def _in_float32(function: Function) -> Function:
    """Compute in float32 at least, without a graph or autocast; name what holds NaN or Inf."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(function).bind(*args, **kwargs)
        device = "cpu"
        for name, value in arguments.arguments.items():
            if isinstance(value, Tensor):
                if not value.is_floating_point():
                    raise TypeError(f"{name} holds {value.dtype}, not real floating-point numbers")
                _check_finite(name, value)
                arguments.arguments[name] = value.to(_at_least_float32(value.dtype))
                device = value.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(*arguments.args, **arguments.kwargs)

    return wrapper


@_in_float32
def lora_da(
    gradient: Tensor,
    input_moment: Tensor,
    output_fisher: Tensor,
    rank: int,
    n_train: int,
    n_fitted: float = math.inf,
    *,
    variance: float = 1.0,
    damping: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """LoRA-DA [2, Algorithm 1]: the A of least estimated error, bias² plus variance, and its B.

    Takes the means G (out, in), Z (in, in) and Y (out,) over M rows. Returns B (out, r) and
    A (r, in) with ΔW = BA: for an adapter with s ≠ 1 divide B by s. In short:

        D = −diag(Y)⁻¹ G Z⁻¹                    one natural-gradient step, which estimates Δ
        Ω = (1/N + 1/M)·Σᵢ(1/Yᵢ)·Z⁻¹ − DᵀD     variance minus signal
        A = the eigenvectors of Ω's r lowest eigenvalues, as rows
        B = D Aᵀ                                the part of the step within A

    and then another basis of the same BA (see 5). N is `n_train`, the number of different rows that
    fine-tuning will see, and M is `n_fitted`, infinite if the means are exact. A row is one x with
    its label: in a language model, one token. Z + damping·mean(diag Z)·I and Y + damping·mean(Y)
    take the places of Z and Y throughout. Without damping Z is singular if there are fewer rows
    than input features. On a small language model with A frozen, damping 1, the default, trained
    clearly better than 10 and about as well as 0.1; on SmolLM2 10 trained clearly better than 1
    with 4 rows per input feature, and worse with 20 (in one run). More damping tilts A towards
    directions in which the inputs are largest. The unit mean(diag Z) includes the inputs' mean and
    outliers, so the same damping acts differently from layer to layer: if inputs share a mean of
    100 standard deviations, or a few rows are huge (attention sinks), most of the start's gain is
    lost. Centre such inputs, and let the bias make up for it; mask such rows.

    1. How well can the truth, W* = W + Δ, be found at all? Let Δ̂ be the maximum-
       likelihood estimate of Δ, with all of W free, from N independent rows with given inputs X
       (N, in). In linear regression, y = W*x + ε with Gaussian noise of variance σᵢ² in output i,
       it is least squares: Δ̂ = Δ + εᵀX(XᵀX)⁻¹. So it is unbiased, and its row i has the covariance
       σᵢ²(XᵀX)⁻¹ = Z⁻¹/(N·Yᵢ) with Z = XᵀX/N and Yᵢ = 1/σᵢ². In any regular model no unbiased
       estimate has a covariance below J⁻¹/N (Cramér–Rao), where the Fisher information J is the
       covariance of one row's gradient of log p, averaged over the inputs. If only one W gives the
       truth, √N(Δ̂ − Δ) tends to a normal variable with mean 0 and covariance J⁻¹, if J is
       invertible (a softmax head's is not, but its diagonal part, which we use, is).

    2. What is J? Write W as one long vector, vec W, row after row. A row's gradient, g xᵀ, becomes
       g ⊗ x. At the truth its mean over labels is 0, so that J = E[(g ⊗ x)(g ⊗ x)ᵀ] = E[ggᵀ ⊗ xxᵀ];
       the sign of g does not matter. K-FAC [5] treats g and x as independent, and of E[ggᵀ] we keep
       the diagonal: J = diag(Y) ⊗ Z. Its inverse, diag(1/Y) ⊗ Z⁻¹, has the block Z⁻¹/Yᵢ for row i
       of W. We measure Y at W, since the truth is unknown. In place of 1/Yᵢ the paper has
       (E[ggᵀ]⁻¹)ᵢᵢ, which is at least as large, if it exists; its authors' default code has 1/Yᵢ,
       as we do. Tokens of one sequence are not independent, but we treat them as if they were.

    3. Which A? Fix an A with AAᵀ = I before the N rows are drawn, and keep the part of Δ̂ in A's
       row space: Ŵ = W + Δ̂AᵀA. Its error is
           Ŵ − W* = (Δ̂ − Δ)AᵀA − Δ(I − AᵀA).
       The first term is noise, the second bias. They are orthogonal, as AᵀA(I − AᵀA) = 0. Let
       ‖·‖² be the sum of squares, here and below. Then, as ‖ΔAᵀA‖ = ‖ΔAᵀ‖,
           ‖Ŵ − W*‖² = ‖(Δ̂ − Δ)Aᵀ‖² + ‖Δ‖² − ‖ΔAᵀ‖².
       Row i of the noise has E‖·‖² = tr(A·Z⁻¹·Aᵀ)/(N·Yᵢ), and ‖ΔAᵀ‖² = tr(A·ΔᵀΔ·Aᵀ). So
           E‖Ŵ − W*‖² = ‖Δ‖² + tr(A Ω Aᵀ),    Ω = (1/N)·Σᵢ(1/Yᵢ)·Z⁻¹ − ΔᵀΔ    (in, in),
       if the N rows have this Z, in linear regression; for other models we use it as an
       approximation for large N. The error is least if A's rows are the eigenvectors of Ω's r
       lowest eigenvalues (Ky Fan). A direction with an eigenvalue above 0 adds more noise than
       signal. But Δ is unknown. The Δ̂ of M rows like these, called D, has E[DᵀD] = ΔᵀΔ +
       (1/M)·Σᵢ(1/Yᵢ)·Z⁻¹, so that 1/N + 1/M in place of 1/N keeps Ω unbiased, if Y is known and
       nothing is damped. This holds at a fixed A: the A that looks best does so partly by luck.
       `variance` multiplies the term with Z⁻¹ in Ω.

    4. Which estimate, and which B? Let the loss be quadratic with the Hessian J. Then its gradient
       at W is vec G = −J vec Δ = −(diag(Y) ⊗ Z) vec Δ = −vec(diag(Y)ΔZ), as row after row (P ⊗ Q)
       vec Δ = vec(PΔQᵀ). So one natural-gradient step, D = −diag(Y)⁻¹GZ⁻¹, is Δ. For other losses
       it is an estimate. Its part within A is DAᵀA, so that B = DAᵀ.

    5. Which basis? For any invertible H the factors B H⁻¹ and H A have the same product. But
       gradient descent trains them differently unless H is orthogonal, and Adam even for most
       orthogonal H. We take an H after which A Z Aᵀ = c·I, with c = mean(diag Z)/3. Without damping
       the features A x are white, and on average as large as plain LoRA's, whose A has entries
       uniform in ±1/√in, of variance 1/(3·in), so that E[aᵀZa] = tr Z/(3·in) for a row a. Damping
       makes Z and c larger, and then features along small directions of Z stay small. This part is
       ours.

    A frozen. Parts 1 to 3 project a fit of all of W. The paper then fits only B, by another
    estimate: B̂ = Δ̂ZAᵀ(AZAᵀ)⁻¹ by the normal equations. Its variance is no larger and its bias no
    smaller, so another A may suit it better. Given the inputs, row i of B̂ has the covariance
    (AZAᵀ)⁻¹/(N·Yᵢ), and (AZAᵀ)⁻¹ ⪯ AZ⁻¹Aᵀ: complete A to an orthogonal matrix, and use that the
    inverse of a block is at most the block of the inverse (P ⪯ Q: Q − P has no negative
    eigenvalue). Of all B, ΔAᵀ has the least bias. If inputs are random, the part of Δx outside A
    acts as noise, too, which can exceed all that Ω counts.

    Guarantee: with exact means, `variance=0` and `damping=0`, on a quadratic loss with the Hessian
    diag(Y) ⊗ Z, D = Δ, and BA = Δ if rank Δ ≤ r, up to rounding (in float32 0.2 to 4 % at cond Z =
    1e6; singular values of D below a thousandth of the largest drown in DᵀD). In regression with
    noise ε of variance σ² that is independent of x, this needs Yᵢ = 1/σ². A measured Yᵢ = E[gᵢ²],
    with the data's labels and g = −(Δx + ε)/σ², is (σ² + (ΔZΔᵀ)ᵢᵢ)/σ⁴: it contains the signal, too.
    This divides row i of D by 1 + (ΔZΔᵀ)ᵢᵢ/σ². A still spans Δ's rows if rank Δ = r. Several layers
    that each take the whole step can overshoot: see `init_lora_da`. If the loss is multiplied by c,
    and so Y by c², A's span is the same and BA is divided by c. A rotation of the inputs, or a new
    unit for all of them, leaves BAx as it is; a new unit for one of them can change it, if BA ≠ Δ.

    The authors' code has other scales: it divides D by its largest singular value and, at the end,
    A and B by 32 (its √γ); its weight of the variance is 0.03, with N in sequences and Y from
    losses averaged over each sequence; it damps with 1e-6·I, whatever the units.

    Cost: O(in³ + out·in²), about half for the eigenvectors if out = in. Raises ValueError for
    moments that do not fit, for numbers out of range and for inputs or gradients that are all 0;
    LinAlgError for a singular Z, unless rounding hides it, and for a Yᵢ of 0 without
    damping: give more rows or more damping.
    """
    n_out, n_in = gradient.shape
    _check_rank(rank, n_out, n_in)
    shapes = (tuple(input_moment.shape), tuple(output_fisher.shape))
    if shapes != ((n_in, n_in), (n_out,)):  # a single number would be taken for all rows
        raise ValueError(f"input_moment, output_fisher: {shapes}, not {((n_in, n_in), (n_out,))}")
    if not (min(n_train, n_fitted) >= 1 and 0 <= variance < math.inf):
        raise ValueError(f"{n_train=} or {n_fitted=} is below 1, or {variance=} is not in [0, ∞)")
    if not output_fisher.any():
        raise ValueError(f"output_fisher is 0: {NOT_REACHED}")

    Z = _damped(input_moment, damping)  # (in, in)
    Y = output_fisher + damping * output_fisher.mean()  # (out,)
    Z_inverse = torch.cholesky_inverse(torch.linalg.cholesky(Z))  # (in, in)
    D = -(gradient / Y[:, None]) @ Z_inverse  # (out, in)
    noise = variance * (1 / n_train + 1 / n_fitted) * (1 / Y).sum()
    omega = noise * Z_inverse - D.mT @ D  # (in, in)
    _, vectors = torch.linalg.eigh(omega)  # columns, by rising eigenvalue
    A = vectors[:, :rank].mT  # (r, in)
    B = D @ A.mT  # (out, r)
    return white_basis(B, A, Z)


def _damped(moment: Tensor, damping: float) -> Tensor:
    """C + damping·mean(diag C)·I for a moment C: the added term is in the units of C."""
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping {damping} is not in [0, ∞)")
    if not moment.any():
        raise ValueError(
            "all inputs are 0, or too small to square: leave this layer out of the targets"
        )
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


@_in_float32
def white_basis(B: Tensor, A: Tensor, Z: Tensor) -> tuple[Tensor, Tensor]:
    """The same BA in the basis with A Z Aᵀ = c·I, c = mean(diag Z)/3 (`lora_da`, 5)."""
    L = torch.linalg.cholesky(A @ Z @ A.mT)  # (r, r)
    c = Z.diagonal().mean() / 3
    white_A = c.sqrt() * torch.linalg.solve_triangular(L, A, upper=False)  # (r, in)
    return B @ L / c.sqrt(), white_A


@_in_float32
def hrp(B_high: Tensor, A_high: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """High-Rank Preheating [3]: the main directions of a short training at a higher rank.

    Takes B_high (out, R) and A_high (R, in) after a few updates. Returns B = 0 (out, r) and A
    (r, in) with AAᵀ = I: the function is unchanged, only the directions are new.

    1. Which A would be best? Let Δ be the change that is needed and ‖Δ − BA‖² the loss: least
       squares with Z = I. At a frozen A with AAᵀ = I the best B is ΔAᵀ, which leaves
       ‖Δ‖² − ‖ΔAᵀ‖². That is least if A holds the top r right singular vectors of Δ
       (Eckart–Young). But Δ is unknown.

    2. What does preheating find? Ideally B_high is trained at a random, frozen A_high until it
       converges (a few Adam updates need not come near to that). Then the normal equations
       (Δ − B_high·A_high)·A_highᵀ = 0 hold: B_high = ΔA_highᵀ(A_high·A_highᵀ)⁻¹, and the product is
       B_high·A_high = ΔP, where P = A_highᵀ(A_high·A_highᵀ)⁻¹A_high projects onto the span of
       A_high's rows. If rank ΔP ≥ r, the product's top r right singular vectors lie in this span,
       and for every A in it ‖ΔPAᵀ‖ = ‖ΔAᵀ‖: so they are the best A in this span.

    3. Why at a high rank? A span that contains another one holds an A that is at least as good.
       With R = in it holds the best of all; `init_hrp` stops at R = min(out, in). Below R = in,
       spans that are drawn independently do not contain each other. But the first R rows of a
       larger random A_high are distributed as a smaller one, so that a higher rank helps on
       average, not in every draw.

    4. How, without forming the product? Let A_highᵀ = Q K be its QR decomposition. The product is
       (B_high Kᵀ) Qᵀ. If B_high Kᵀ = U Σ Vᵀ, the product's right singular vectors are the columns
       of Q V.

    B = 0 is our reading of the paper's words that only the direction is modified. U_r Σ_r would
    also keep the rank-r part of what preheating has learned; we have not compared the two. Cost:
    O((out + in)·R²). Raises ValueError for a B_high of 0, which has no directions.
    """
    _check_rank(rank, *B_high.shape, *A_high.shape)
    if not B_high.any():
        raise ValueError(f"B_high is 0: {NOT_REACHED}")
    Q, K = torch.linalg.qr(A_high.mT)
    V_t = torch.linalg.svd(B_high @ K.mT, full_matrices=False).Vh
    B = B_high.new_zeros(len(B_high), rank)
    A = V_t[:rank] @ Q.mT
    return B, A


@_in_float32
def monge_map(Z_f: Tensor, Z_p: Tensor) -> Tensor:
    """T (in, in) with T Z_f Tᵀ = Z_p: of all such maps the one that moves x least.

    Fine-tuning inputs x have the moment Z_f = L Lᵀ; after the map they have pre-training's, Z_p.
    Both are symmetric, positive definite and of shape (in, in). This is optimal transport between
    Gaussians, and classical (Olkin & Pukelsheim; Knott & Smith; Gelbrich).

    1. The map is T = L⁻ᵀ (Lᵀ Z_p L)^½ L⁻¹ with the symmetric, positive definite root. So T
       is symmetric and positive definite, too, and T Z_f T = L⁻ᵀ (Lᵀ Z_p L) L⁻¹ = Z_p.
    2. It moves x least. Let y have the moment Z_p, however it is made from x. Then
       E‖y − x‖² = tr Z_f + tr Z_p − 2E[xᵀy], and 2xᵀy ≤ xᵀTx + yᵀT⁻¹y, as the difference is
       ‖T^½x − T^−½y‖². The mean of the right side is tr(TZ_f) + tr(T⁻¹Z_p) = 2 tr(TZ_f), as
       T⁻¹Z_p = Z_f T: the same for every such y. Only y = Tx makes both sides equal.
    3. No other symmetric, positive definite map has T Z_f T = Z_p: by part 2 each of them would be
       the only one that moves x least.

    It is computed in float64, as an error of ε in Lᵀ Z_p L can become √ε in its root. Raises
    LinAlgError for a Z_f that is not positive definite, unless rounding hides it.
    """
    L = torch.linalg.cholesky(Z_f.double())
    values, V = torch.linalg.eigh(L.mT @ Z_p.double() @ L)
    root = V * values.clamp(min=0).sqrt() @ V.mT  # negative only by rounding
    T = torch.linalg.solve_triangular(L, root, upper=False, left=False)  # root · L⁻¹
    T = torch.linalg.solve_triangular(L.mT, T, upper=True)  # L⁻ᵀ · root · L⁻¹
    return T.to(Z_f.dtype)


@_in_float32
def cntlora(
    weight: Tensor,
    input_moment: Tensor,
    pretrain_moment: Tensor | None = None,
    *,
    rank: int,
    damping: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """CNTLoRA, after ConsNoTrainLoRA [4]: the change that restores the inputs' second moments.

    Takes W (out, in), Z_f = E[x xᵀ] of fine-tuning inputs and, if pre-training data is at hand,
    its Z_p. Returns B (out, r) and A (r, in) with ΔW ≈ BA: for an adapter with s ≠ 1 divide B by s.
    Both moments are damped as in `lora_da`, and not centred.

    The derivation is ours. The abstract of [4] claims this much: initialization is a domain shift;
    several constraints relate pre-training and fine-tuning activations; a closed form follows,
    without training; it splits into factors of variable rank. The paper uses the pre-training
    weights and fine-tuning activations only, so part 3 is nearer to it than a given Z_p.

    1. Outputs: we want (W + ΔW)x to have the second moments on fine-tuning inputs that Wx had on
       pre-training inputs: (W + ΔW) Z_f (W + ΔW)ᵀ = W Z_p Wᵀ.
    2. Inputs: look for W + ΔW in the form W T. Then T Z_f Tᵀ = Z_p is enough. Of all such T take
       the one that moves x least, `monge_map(Z_f, Z_p)`. So ΔW = W(T − I).
    3. Without Z_p: assume that pre-training inputs were white and as large as the new ones,
       Z_p = mean(diag Z_f)·I. Then T ∝ Z_f^−½: this T is symmetric and positive definite and
       has T Z_f T = Z_p (`monge_map` 3). It also whitens what never shifted.
    4. Rank r: let L Lᵀ = Z_f and ΔW L = U Σ Vᵀ. Then E‖(ΔW − BA)x‖² = ‖(ΔW − BA)L‖² is least for
       BA = (ΔW L) V_r V_rᵀL⁻¹, where V_r holds the top r right singular vectors (Eckart–Young).
       They are the top eigenvectors of (ΔW L)ᵀ(ΔW L), which spares an SVD. With B = (ΔW L) V_r and
       A = V_rᵀL⁻¹ the features are white: A Z_f Aᵀ = V_rᵀL⁻¹LLᵀL⁻ᵀV_r = I. The basis of `lora_da`
       (5) is √c times this A. If B and A took Σ^½ each, ΔW = 0 would make both of them 0. Then
       both gradients, GAᵀ and BᵀG, would vanish, and training could not start.

    Guarantee, for the damped moments: the outputs' match (part 1) at r = min(in, out); Z_p = Z_f
    gives ΔW = 0 up to rounding, and A is then arbitrary. With `damping=0` and Z_p given, a shift
    x_f = S x_p with a symmetric, positive definite S and rank(S − I) ≤ r is undone exactly: then
    T = S⁻¹, as S⁻¹Z_fS⁻¹ = Z_p (`monge_map` 3), and W(S⁻¹ − I) = −WS⁻¹(S − I) has rank ≤ r. With
    damping the largest shifts are usually undone only in part. If S changes the mean of diag Z, T
    rescales all other directions, too, shifted or not, and small shifts can be overcorrected. A
    rotation of white inputs leaves no trace in the moments and is not seen. Cost: O(in³ + out·in²),
    two to three times that of `lora_da` if out = in. Raises as `lora_da` does, and what torch
    raises for matrices that do not fit.
    """
    _check_rank(rank, *weight.shape)
    Z_f = _damped(input_moment, damping)
    L = torch.linalg.cholesky(Z_f.double()).to(Z_f)  # (in, in)
    if pretrain_moment is None:
        values, V = torch.linalg.eigh(Z_f.double())
        T = (V * (Z_f.diagonal().mean() / values).sqrt() @ V.mT).to(Z_f)  # Z_p^½ Z_f^−½
    else:
        T = monge_map(Z_f, _damped(pretrain_moment, damping))
    delta = weight @ T - weight  # (out, in)
    weighted = delta @ L  # (out, in)
    _, vectors = torch.linalg.eigh(weighted.mT @ weighted)  # columns, by rising eigenvalue
    V_r = vectors[:, -rank:].flip(1)  # (in, r), the largest first
    B = weighted @ V_r  # (out, r)
    A = torch.linalg.solve_triangular(L, V_r.mT, upper=False, left=False)  # V_rᵀ L⁻¹
    return white_basis(B, A, Z_f)


def allocate_ranks(spectra: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks {name: r ≥ 1} that sum to `budget` and minimise the squared singular values left out.

    `spectra` holds the singular values of each layer, largest first. Each layer gets one rank, and
    the rest go to the largest values left over. Each spectrum is sorted, so a layer always keeps
    its largest values. Raises ValueError for a budget out of range and for NaN or Inf.
    """
    others = []
    for name, spectrum in spectra.items():
        _check_finite(f"the spectrum of layer '{name}'", spectrum)
        others += [(value, name) for value in spectrum[1:].tolist()]
    others.sort(reverse=True)
    extra = budget - len(spectra)
    if not 0 <= extra <= len(others):
        most = len(spectra) + len(others)
        raise ValueError(
            f"rank budget {budget} is not in {len(spectra)}..{most}, at least 1 per layer"
        )
    ranks = dict.fromkeys(spectra, 1)
    for _, name in others[:extra]:
        ranks[name] += 1
    return ranks


# ---------------------------------------------------------------------------- 3. statistics
#
# What a loss has to be. `loss_fn(model, batch)` returns the MEAN of −log p over the rows of a
# batch. A row's g is the gradient at the layer's output times the number of rows that the layer
# sees in all its calls for this batch and that the mask keeps. So for one batch G is ∂loss/∂ΔW, as
# autograd would compute it, less the masked rows' part. It follows that
#
# - `F.mse_loss` is rarely such a mean: for noise of variance v, −log p is half the sum of squares
#   divided by v, plus a constant; take the residuals' variance as v;
# - a loss times c has c·G and c²·Y, so that D is divided by c, and the search of `init_lora_da`
#   makes up for it only roughly. The same holds if the loss sums over the n tokens of a sequence
#   and takes the mean over sequences: the step is n times too short; about n times, too, if a
#   sequence has one label and its tokens' gradients are independent with mean 0;
# - Hugging Face divides by the number of labels other than −100 in each batch, while rows are all
#   tokens that the mask keeps. If prompts have the label −100, G is exact with the attention mask
#   as `mask_fn` and `model(**batch, num_items_in_batch=int(batch["attention_mask"].sum())).loss`,
#   provided that the model heeds that number, as Llama, GPT-2 and ModernBERT do; T5, BART, BERT
#   and Whisper do not (transformers 5.24);
# - a layer that is called k times on the same rows, for example if it is shared across depth,
#   counts them k times: its step is then k times too short if the gradients of its calls are
#   independent, less if they agree, and more if they oppose each other.
#
# Wrong, and not noticed:
#
# - layers that see only a part of the rows (experts): their step comes out too long;
# - a layer whose weight is also read elsewhere: G counts only its calls;
# - a loss that differentiates inside (forces, gradient penalties): G lacks a part of ∂loss/∂W;
#   the search notices it only if loss_fn does not enable gradients itself;
# - a loss_fn that calls backward on a graph of its own or with retain_graph: it leaves gradients in
#   the parameters that you train;
# - a loader that refills one buffer: `init_…` makes a list of the batches, so the loader has to
#   copy;
# - a mask of (sequences, tokens) while layers see (tokens, sequences), if the two numbers are
#   equal;
# - rows of another kind than the rest: mask attention sinks (in many language models the first
#   token), whose huge inputs otherwise dominate Z.

LossFunction = Callable[[nn.Module, Any], Any]  # takes the model and a batch; gives a scalar
MaskFunction = Callable[[Any], Tensor]  # takes a batch
Factors = Mapping[str, tuple[Tensor, Tensor]]  # B and A of each adapter by its name
NOT_REACHED = (
    "no row reached it, or no gradient. Check that there are batches with labels not ignored; that "
    "loss_fn calls the model, which calls this layer as a module, in eval mode, too; that mask_fn "
    "keeps rows, checkpoints are not reentrant, and gradients not too small to square; and that "
    "later layers pass them on (bitsandbytes' 4-bit ones on a CPU: call model.state_dict() first)"
)


class Statistics:
    """Means over `count` rows x of one layer's input and the gradients g at its output.

    `input_moment` is Z = E[x xᵀ]; `gradient` G = E[g xᵀ] and `output_fisher` Y = E[g²] are empty
    if there was no backward pass. While batches come in, all three are sums, not yet means. They
    live on the device of the adapter's A.
    """

    def __init__(self, layer: nn.Module, backward: bool):
        linear: Any = getattr(layer, "base_layer", layer)
        nearby = layer.lora_A if isinstance(layer, LoRALinear) else linear.weight
        device = nearby.device  # the weight itself may be offloaded
        dtype = _at_least_float32(nearby.dtype)
        n_in = linear.in_features
        n_out = linear.out_features if backward else 0
        self.count = 0
        zeros = functools.partial(torch.zeros, device=device, dtype=dtype)
        self.input_moment = zeros(n_in, n_in)
        self.gradient = zeros(n_out, n_in)
        self.output_fisher = zeros(n_out)

    def add(self, x: Tensor, moment: Tensor, loss_gradient: Tensor | None, rows: int) -> None:
        """Add a call: x (n, in), its sum of x xᵀ, and ∂loss/∂y (n, out) of a loss over `rows` rows.

        As the loss is a mean, g is `rows` times ∂loss/∂y. By the chain rule ∂loss/∂W is the sum of
        ∂loss/∂y xᵀ: autograd need not compute it.
        """
        self.count += len(x)
        self.input_moment += moment.to(self.input_moment)
        if loss_gradient is not None:
            h = loss_gradient.to(self.gradient)  # (n, out)
            self.gradient.addmm_(h.mT, x.to(h), alpha=rows)  # += gᵀx; autocast leaves it alone
            self.output_fisher += rows**2 * h.square().sum(dim=0)  # += g²

    def average(self) -> None:
        """Turn the sums, over all processes, into means."""
        count = torch.tensor(self.count, device=self.input_moment.device)
        self.count = int(_sum_over_processes(count))
        if self.count == 0:
            raise ValueError(NOT_REACHED)
        for name in ("input_moment", "gradient", "output_fisher"):
            total = _sum_over_processes(getattr(self, name))
            total /= self.count
            _check_finite(name, total)


@torch.inference_mode(False)  # with gradients, even if the caller has switched them off
def collect_statistics(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable,
    loss_fn: LossFunction,
    *,
    backward: bool = True,
    mask_fn: MaskFunction | None = None,
) -> dict[str, Statistics]:
    """The `Statistics` of linear layers of the model, in eval mode and with our adapters off.

    `layers` are plain linear layers, or adapters (ours, PEFT's) that hold one as `base_layer`;
    PEFT's stay on. Each batch takes one forward and one backward pass, in which no weight needs a
    gradient; with `backward=False` it takes a forward pass only, and `loss_fn` may return anything.
    What `loss_fn` has to return stands at the head of this part of the file. It gets your model
    itself, must leave the batch as it was, and may not change an adapter's `scaling` for good. What
    else it changes in the model, such as a cache that a call updates, is not undone. Afterwards
    modes, adapters and every `.grad` are as before. Eval mode turns Hugging Face's checkpointing
    off: to keep it, let `loss_fn` call `model.train()` first (dropout is then on, too).

    `mask_fn(batch)` is true for the rows that count. It has the leading shape of the layers'
    inputs, (sequences, tokens), even if a model flattens these two. There is one mask for all
    layers: if encoder and decoder pad differently, adapt only one of them, or go without a mask.

    Memory: in² + out·in + out numbers per layer (in² without backward) and, during a batch, the
    inputs and output gradients of all these layers. With torch.distributed every process passes its
    own batches and gets the means over all; if one process fails, the others wait. Nested
    tensors, inputs of a Tensor subclass and `vmap` around the model are not supported. In float16,
    gradients at y below 3e-8 become 0, which can be most of them if a batch has many rows; bfloat16
    keeps them. Raises ValueError for a loss that is no finite scalar with a gradient, a mask that
    does not fit, an in-place change of an input that autograd lets pass, a linear layer that passes
    no gradient on, NaN or Inf, or a layer that no row reached.
    """
    statistics = {name: Statistics(layer, backward) for name, layer in layers.items()}
    recorded = _recorded(layers, backward)
    with recorded as calls, _borrowed(model), torch.set_grad_enabled(backward):
        for batch in _progress("batch", batches):
            calls.clear()
            loss = loss_fn(model, batch)
            seen = list(calls)  # checkpoints call layers again in the backward pass
            if backward and seen:
                _check_loss(loss)
                edges = [call.edge for call in seen]
                gradients = torch.autograd.grad(loss, edges, allow_unused=True)
                for call, gradient in zip(seen, gradients, strict=True):
                    call.gradient = gradient
                seen = [call for call in seen if call.gradient is not None]
                del gradients
            mask = None if mask_fn is None else _checked_mask(mask_fn(batch))
            _add_calls(statistics, seen, mask)
            del loss, seen  # before the next forward pass needs the memory
    for name, sums in statistics.items():
        with _naming(name):
            sums.average()
    return statistics


@dataclass
class _Call:
    """A call of a layer: its input, and where in autograd's graph y's gradient arrives."""

    name: str
    x: Tensor
    version: int  # of x: it counts changes in place
    edge: Any
    gradient: Tensor | None = None


@contextlib.contextmanager
def _recorded(layers: Mapping[str, nn.Module], backward: bool) -> Iterator[list[_Call]]:
    """A list to which every call of these layers is added, before other hooks on them change y."""
    calls = []

    def remember(name: str, layer: nn.Module, args: tuple, kwargs: dict, y: Tensor) -> Tensor:
        x = [*args, *kwargs.values()][0]
        edge = None
        if backward:
            y.requires_grad_()  # if everything before it is frozen, the graph starts here
            edge = torch.autograd.graph.get_gradient_edge(y)
            if y.is_leaf or y._is_view():
                y = y.clone()  # which the model may change in place
        calls.append(_Call(name, x, x._version, edge))
        return y

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hook = functools.partial(remember, name)
            handle = layer.register_forward_hook(hook, with_kwargs=True, prepend=True)
            hooks.enter_context(handle)
        yield calls


def _add_calls(
    statistics: Mapping[str, Statistics], calls: list[_Call], mask: Tensor | None
) -> None:
    """Add the calls of one batch: for each layer, the rows of all its calls count together."""
    rows = collections.Counter()
    for call in calls:
        rows[call.name] += call.x[..., 0].numel() if mask is None else int(mask.sum())
    last = None
    for call in calls:
        with _naming(call.name):
            if call.x._version != call.version:
                raise ValueError(f"its input {tuple(call.x.shape)} was changed in place")
            if call.x is not last:  # else one product serves all: q, k and v have the same input
                last = call.x
                x = _rows(last, mask)
                x = x.to(_at_least_float32(x.dtype))
                moment = x.new_zeros(x.shape[1], x.shape[1]).addmm_(x.mT, x)
            gradient = call.gradient
            if gradient is not None:
                gradient = _rows(gradient, mask)
            statistics[call.name].add(x, moment, gradient, rows[call.name])


def _checked_mask(mask: Tensor) -> Tensor:
    """The mask as booleans. An additive mask, 0 where a row counts, would mean the opposite."""
    if not isinstance(mask, Tensor) or not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask_fn returned something else than a tensor of 0 (False) and 1 (True)")
    return mask.bool()


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (rows, n) of x (…, n) where the mask is true."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None:
        if x.shape[:-1] not in (mask.shape, (mask.numel(),)):
            raise ValueError(f"a mask {tuple(mask.shape)} for {tuple(x.shape)}")
        rows = rows[mask.flatten().to(x.device)]
    return rows


@contextlib.contextmanager
def _borrowed(model: nn.Module, factors: Factors | None = None, s: float = 0.0) -> Iterator[None]:
    """The model in eval mode, its adapters on loan: y = base_layer(x) + s·BA x with lent factors.

    Afterwards, whatever happens, modes and adapters are as they were; no Parameter was replaced or
    written to. Inside, a linear layer that passes no gradient on is refused: what comes before it
    would get a wrong gradient. So is a loss_fn that leaves another s behind.
    """
    modes = [(module, module.training) for module in model.modules()]
    adapters = lora_layers(model)
    found = {name: (adapter.scaling, adapter.lent) for name, adapter in adapters.items()}
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hook = functools.partial(_refuse_a_cut, name)
                handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
                hooks.enter_context(handle)
        try:
            model.eval()
            for name, adapter in adapters.items():
                adapter.scaling = s
                adapter.lent = None if factors is None else factors[name]
            yield
            for name, adapter in adapters.items():
                if adapter.scaling != s:
                    raise ValueError(
                        f"layer '{name}': loss_fn left its scaling at {adapter.scaling}, not as it "
                        f"found it ({s}); put it back, or compute a reference's loss beforehand"
                    )
        finally:
            for name, adapter in adapters.items():
                adapter.scaling, adapter.lent = found[name]
            for module, training in modes:  # outermost first: a module's own train() may do more
                module.train(training)
                if hasattr(module, "reshard"):  # FSDP's outermost module stays whole after a pass
                    module.reshard()
            for module, training in modes:  # again, as either parent of a shared module has set it
                module.training = training


def _refuse_a_cut(name: str, layer: nn.Module, args: tuple, kwargs: dict, y: Any) -> None:
    needed = any(getattr(x, "requires_grad", False) for x in (*args, *kwargs.values()))
    if torch.is_grad_enabled() and needed and not getattr(y, "requires_grad", True):
        raise ValueError(
            f"layer '{name}': this {type(layer).__name__} passes no gradient on to the layers "
            "before it, as inference kernels do: dequantize it, or load it in another format"
        )


def _check_loss(loss: Any) -> None:
    """Refuse a loss that is no finite scalar, or has no gradient while gradients are recorded."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"loss_fn returned {found}, not a scalar tensor (init_cntlora with a step needs none)"
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "loss_fn returned a loss without a gradient: no row reached it from an adapter, or "
            "there is no_grad, detach or argmax on the way"
        )
    if not loss.isfinite():
        raise ValueError(
            f"the loss is {loss.item()}: NaN in a batch, float16, or all labels ignored?"
        )


def _sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum in place over the processes of torch.distributed, if there are any."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def _progress(what: str, items: Iterable) -> Iterator:
    """The items; when one is done, a line of the logger tells how long the others will take."""
    total = operator.length_hint(items)
    began = time.perf_counter()
    for i, item in enumerate(items, start=1):
        yield item
        left = (time.perf_counter() - began) / i * max(total - i, 0)
        LOGGER.info("%s %d of %s done, %.0f s left", what, i, total or "?", left)


# ---------------------------------------------------------------------------- 4. whole models


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapters by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(
    model: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    targets: str | Iterable[str] | None = None,
) -> dict[str, LoRALinear]:
    """Wrap linear layers in `LoRALinear`, in place, and freeze everything but our adapters.

    `targets` are names or dotted suffixes of names ("q_proj"), or None for every linear layer that
    is not yet adapted, by us or by PEFT; that includes a language model's head, which may be tied
    to its embedding. A layer that appears under two names is wrapped once and listed under the
    first. Returns the new adapters by name. Before this call load the pre-trained weights, tie what
    is to be tied, and put the model where it will run; afterwards call FSDP2's `fully_shard`, then
    a start, then make the optimizer. If accelerate has offloaded layers, their adapters are on the
    meta device: call `to_empty(device=…, recurse=False)` on each of them. Raises ValueError for a
    target that matches no linear layer, and what `LoRALinear` raises; then nothing changes.
    """
    inside = set()  # of adapters: ours, and PEFT's, which have this method
    for module in model.modules():
        if isinstance(module, LoRALinear) or hasattr(module, "get_base_layer"):
            inside.update(module.modules())
    linears = {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear) and module not in inside
    }
    if targets is None:
        targets = linears
    elif isinstance(targets, str):
        targets = [targets]
    found = {}
    for target in targets:
        matches = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not matches:
            raise ValueError(
                f"'{target}' matches no linear layer without an adapter; there are {list(linears)}"
            )
        for name in matches:
            found[name] = linears[name]
    if not found:
        raise ValueError(
            f"no linear layer is left to adapt in {type(model).__name__}, or there is no target; a "
            "model that is itself a linear layer goes into LoRALinear"
        )
    for name, linear in found.items():  # all of them, before anything changes
        with _naming(name):
            _check_base(linear, rank)
    adapters = {name: LoRALinear(linear, rank, alpha) for name, linear in found.items()}
    for module in model.modules():
        if not isinstance(module, LoRALinear):  # whose own parameters are A and B
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
    _replace(model, {adapter.base_layer: adapter for adapter in adapters.values()})
    return adapters


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace each adapter in the model by its merged linear layer, in place; returns the model.

    Raises ValueError if there is none or one is off, and TypeError for a base weight that cannot be
    read; then nothing changes.
    """
    merged = {}
    for name, layer in _adapters(model).items():
        with _naming(name):
            merged[layer] = layer.merged()
    _replace(model, merged)
    return model


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])


@torch.inference_mode(False)
def init_lora_da(
    model: nn.Module,
    batches: Iterable,
    loss_fn: LossFunction,
    *,
    damping: float = 1.0,
    n_train: int | None = None,
    variance: float = 1.0,
    step: float | None = None,
    mask_fn: MaskFunction | None = None,
    layers_per_pass: int | None = None,
) -> float:
    """Start every adapter of the model at LoRA-DA's A and B, and return the step.

    `loss_fn` and `mask_fn` are those of `collect_statistics`. `n_train` is the number of different
    rows that fine-tuning will see, which are tokens in a language model; left out, it is the number
    of rows fitted here. From a long DataLoader, take the first few batches (`itertools.islice`):
    about 20 rows per input feature of a layer are enough. `logging.getLogger("lora_init")` reports
    each batch and the time left at level INFO.

    Make the optimizer afterwards. ΔW is `step`·BA of `lora_da`, one step for all layers. The
    theory's step is 1, for a single layer without damping. With several layers that can be too
    long, as each layer by itself would remove the whole error. Damping makes it too short: by a
    factor of four if inputs are white, Y is constant and damping is 1. A step of 0 keeps only A's
    directions. With `step=None` the LAST batch is held out: D contains the fitted batches' noise,
    so on those batches too long a step looks good. The search walks downhill from 1/16 along 0, 4⁻⁸
    … 4², tries half and twice the step at which it ends, and keeps the one with the least loss,
    among equals the shortest. On a loss that falls and then rises this is the best of all these
    steps; it takes six to eight forward passes as a rule, in eval mode and with the same random
    numbers of torch for each step. A loss that draws its own (NumPy's, another generator's) or that
    depends on earlier calls is compared unfairly, and a small last batch chooses badly. If the
    search returns 16 or more, there is a warning: the loss may not be a mean of −log p over rows,
    or damping has made D short.

    `layers_per_pass` bounds the memory for statistics: that many layers at a time, with a pass over
    the batches for each group. With torch.distributed every process makes this call, before DDP and
    after FSDP2 wraps the model, on equally many batches that differ between processes (else N and M
    are too large), and all end with the same factors. Factors that FSDP2 shards are saved as
    `factor.full_tensor()`. Tensor parallelism is not supported: each row would count once per
    process. Adapters may not share factors. Raises ValueError as `collect_statistics` and `lora_da`
    do, for a step below 0, for a single batch without a step, and for a held-out loss of fewer than
    32 bits; then no layer has changed.
    """
    adapters = _adapters(model)
    batches, held_out = _hold_out(batches, step)
    factors = {}
    for group in _progress("group", _groups(adapters, layers_per_pass)):
        statistics = collect_statistics(model, group, batches, loss_fn, mask_fn=mask_fn)
        for name, layer in group.items():
            means = statistics.pop(name)  # one at a time, so that the next group finds room
            N = means.count if n_train is None else n_train
            moments = (means.gradient, means.input_moment, means.output_fisher)
            options = {"variance": variance, "damping": damping}
            with _naming(name):
                factors[name] = lora_da(*moments, layer.rank, N, means.count, **options)
            del means, moments
    return _start(model, factors, step, held_out, loss_fn)


@torch.inference_mode(False)
def init_cntlora(
    model: nn.Module,
    batches: Iterable,
    loss_fn: LossFunction,
    *,
    pretrain_batches: Iterable | None = None,
    rank_budget: int | None = None,
    damping: float = 0.1,
    step: float | None = None,
    mask_fn: MaskFunction | None = None,
    layers_per_pass: int | None = None,
) -> float:
    """Start every adapter of the model at CNTLoRA's A and B, and return the step.

    Labels choose the step and are not used by the fit, which takes forward passes only; passes
    under no_grad are counted, too. Without labels pass `step=1`, and let `loss_fn` call the model.
    `pretrain_batches` give Z_p. With a `rank_budget`, `allocate_ranks` spends that many ranks in
    all, and s stays as it is. The factors then change their shapes, so make the optimizer
    afterwards; FSDP2 must not have sharded them yet, and all full-rank factors are held at once,
    whatever `layers_per_pass`. The rest is as in `init_lora_da`; a base weight that cannot be read
    is a TypeError. If a layer's own forward scales its stored weight, ΔW is in the stored weight's
    units.
    """
    adapters = _adapters(model)
    if rank_budget is not None and any(hasattr(a.lora_A, "full_tensor") for a in adapters.values()):
        raise ValueError("rank_budget changes ranks, but FSDP has sharded the factors: start first")
    batches, held_out = _hold_out(batches, step)
    sources = [batches] if pretrain_batches is None else [batches, _listed(pretrain_batches)]
    factors = {}
    spectra = {}
    for group in _progress("group", _groups(adapters, layers_per_pass)):
        passes = [
            collect_statistics(model, group, source, loss_fn, backward=False, mask_fn=mask_fn)
            for source in sources
        ]
        for name, layer in group.items():
            rank = layer.rank
            if rank_budget is not None:
                rank = min(layer.in_features, layer.out_features)
            moments = [statistics.pop(name).input_moment for statistics in passes]
            with _naming(name):
                B, A = cntlora(layer.base_weight, *moments, rank=rank, damping=damping)
            factors[name] = (B, A)
            size = moments[0].diagonal().mean().sqrt()
            spectra[name] = size * B.norm(dim=0)  # ∝ the singular values of ΔW L, as A is white
    if rank_budget is not None:
        for name, rank in allocate_ranks(spectra, rank_budget).items():
            B, A = factors[name]
            factors[name] = (B[:, :rank], A[:rank])
    return _start(model, factors, step, held_out, loss_fn)


@torch.inference_mode(False)
def init_hrp(
    model: nn.Module,
    batches: Iterable,
    loss_fn: LossFunction,
    *,
    preheat_rank: int = 64,
    lr: float = 0.01,
    seed: int = 0,
) -> None:
    """Preheat at a high rank, one Adam update per batch, and start each adapter at HRP's A, B = 0.

    Only B_high is trained, in eval mode: it starts at 0, and A_high is drawn by `seed` and stays
    frozen. `preheat_rank` is capped at min(in, out) of each layer. Rank, number of updates and rate
    of the preheating are our choices, not the paper's. With torch.distributed an update takes the
    mean gradient of one batch from every process, so that all have to pass equally many batches.
    Raises ValueError for a `preheat_rank` below an adapter's rank and for a layer that no gradient
    reached, for example without batches; then no layer has changed.
    """
    adapters = _adapters(model)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    high = {}
    for name, layer in adapters.items():
        if preheat_rank < layer.rank:
            raise ValueError(f"layer '{name}': {preheat_rank=} is below rank {layer.rank}")
        R = min(preheat_rank, layer.in_features, layer.out_features)
        A_high = torch.empty(R, layer.in_features, device="cpu")
        nn.init.kaiming_uniform_(A_high, a=math.sqrt(5), generator=generator)
        place = (layer.lora_B.device, _at_least_float32(layer.lora_B.dtype))
        B_high = torch.zeros(layer.out_features, R).to(*place).requires_grad_()
        high[name] = (B_high, A_high.to(*place))
    trained = [B_high for B_high, _ in high.values()]
    optimizer = torch.optim.Adam(trained, lr)
    with _borrowed(model, high, s=1.0):
        for batch in _progress("batch", _listed(batches)):
            loss = loss_fn(model, batch)
            _check_loss(loss)
            gradients = torch.autograd.grad(loss, trained, materialize_grads=True)
            processes = _sum_over_processes(torch.ones((), device=loss.device)).item()
            for B_high, gradient in zip(trained, gradients, strict=True):
                B_high.grad = _sum_over_processes(gradient) / processes
            optimizer.step()
    factors = {}
    for name, layer in adapters.items():
        with _naming(name):
            factors[name] = hrp(*high[name], layer.rank)
    for name, layer in adapters.items():
        layer.set_factors(*factors[name])


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Put the layer's name in front of an error that is raised inside."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"layer '{layer}': {error}") from error


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapters; there has to be one, and each has to be on."""
    adapters = lora_layers(model)
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no LoRALinear: call add_lora first")
    for name, layer in adapters.items():
        if layer.scaling == 0:
            raise ValueError(f"layer '{name}': its adapter is off, as its scaling is 0")
        if layer.lora_A.is_meta:
            raise ValueError(f"layer '{name}': its {ON_META}")
    return adapters


def _hold_out(batches: Iterable, step: float | None) -> tuple[list, Any]:
    """The batches to fit and, if the step is not given, the one that chooses it."""
    batches = _listed(batches)
    if step is not None:
        if not 0 <= step < math.inf:
            raise ValueError(f"step {step} is not in [0, ∞)")
        return batches, None
    if len(batches) < 2:
        raise ValueError(
            f"step=None holds the last batch out, and the number of batches is {len(batches)}: "
            "give two or more, or a step"
        )
    return batches[:-1], batches[-1]


def _listed(batches: Iterable) -> list:
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError(f"batches is a {type(batches).__name__}: put a single batch into a list")
    return list(batches)


def _groups(adapters: dict[str, LoRALinear], size: int | None) -> list[dict[str, LoRALinear]]:
    """The adapters, `size` of them in each group."""
    items = list(adapters.items())
    if size is None:
        size = len(items)
    if size < 1:
        raise ValueError(f"layers_per_pass {size} is below 1")
    return [dict(items[i : i + size]) for i in range(0, len(items), size)]


def _start(
    model: nn.Module, factors: Factors, step: float | None, held_out: Any, loss_fn: LossFunction
) -> float:
    """Set every adapter's factors so that ΔW = step·BA, and return the step."""
    if step is None:
        step = _best_step(model, factors, held_out, loss_fn)
    ready = []
    for name, layer in lora_layers(model).items():
        B, A = factors[name]
        B = (step / layer.scaling * B).to(layer.lora_B)
        with _naming(name):
            _check_finite("B", B)
        ready.append((layer, B, A))
    for layer, B, A in ready:  # all of them are finite
        layer.set_factors(B, A)
    return step


@torch.no_grad()
def _best_step(model: nn.Module, factors: Factors, batch: Any, loss_fn: LossFunction) -> float:
    """The t for which ΔW = t·BA has the least loss on the batch."""
    losses = {}

    def loss_at(t: float) -> float:
        if t not in losses:
            devices = range(torch.cuda.device_count())
            with _borrowed(model, factors, t), torch.random.fork_rng(devices=devices):
                loss = loss_fn(model, batch)  # each step meets the same random numbers
            if t == 0:
                _check_loss(loss)
                if loss.element_size() < 4:
                    raise ValueError(
                        f"losses in {loss.dtype} are too coarse to compare: make "
                        "loss_fn return float32 (logits.float()), or give a step"
                    )
            loss = _sum_over_processes(loss.clone()).item()
            losses[t] = loss if math.isfinite(loss) else math.inf
            LOGGER.info("step %g: loss %g on the batch held out", t, losses[t])
        return losses[t]

    steps = [0.0] + [4.0**k for k in range(-8, 3)]
    i = steps.index(4.0**-2)
    while loss_at(0.0) < loss_at(steps[i]):  # at 0 first, where the loss is checked
        i -= 1
    while i + 1 < len(steps) and loss_at(steps[i + 1]) <= loss_at(steps[i]):
        i += 1
    while i > 0 and loss_at(steps[i - 1]) <= loss_at(steps[i]):
        i -= 1
    for t in (steps[i] / 2, steps[i] * 2):
        loss_at(t)
    if len(set(losses.values())) == 1:
        raise ValueError(
            "every step has the same loss on the last batch: are all its labels ignored?"
        )
    best = min(sorted(losses), key=losses.__getitem__)  # among equals the shortest
    if best >= 16:
        warnings.warn(
            f"step {best:g} is long: is loss_fn a mean of −log p over rows?", stacklevel=1
        )
    return best
