# SPDX-License-Identifier: MIT
"""Data-driven starting points for LoRA: three algorithms after published papers, as functions.

LoRA [1] fine-tunes a frozen weight W through two thin factors:    y = W x + b + s·B A x

    W  weight        (out, in)   frozen           x  (…, in)    rows of a layer's input
    A  lora_A        (r, in)     projects down    g  (…, out)   their gradients, ∂(−Σ log p)/∂y
    B  lora_B        (out, r)    projects up      Z  input_moment   (in, in)   E[x xᵀ]
    s  scaling       alpha / r                    Y  output_fisher  (out,)     E[g²]
    ΔW delta_weight  (out, in)   s·B A            G  gradient       (out, in)  E[g xᵀ]

Plain LoRA starts at a random A and B = 0. The three algorithms look at data first:

    lora_da [2]   inputs and gradients          the A of least bias and variance, a step within it
    hrp [3]       a short high-rank training    its main directions as A, and B = 0
    cntlora [4]   inputs, no labels             the change that restores the inputs' moments

The file reads from top to bottom, and you can stop after any part: the layer, the algorithms,
the statistics that they need, whole models.

[1] LoRA, arXiv 2106.09685.
[2] LoRA-DA, arXiv 2510.24561, ICML 2026. The whole paper, checked against its authors' code.
[3] High-Rank Preheating, arXiv 2502.07739 v3. Only the abstract and its theorem's claim.
[4] ConsNoTrainLoRA, arXiv 2507.08044. Only the abstract: the equations here are our own.
[5] K-FAC, arXiv 1503.05671.    [6] Davidson's method, J. Comput. Phys. 17 (1975), 87.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor, distributed, nn

# ---------------------------------------------------------------------------- 1. the layer


class LoRALinear(nn.Module):
    """y = base_layer(x) + s·B A x: a linear layer, frozen and called as it is, plus a thin term.

    x (…, in) gives y (…, out). It starts as plain LoRA does: A is Kaiming-uniform and B = 0, so
    that the function is unchanged. A and B are made in float32 at least. `alpha=None` means s = 1,
    and `scaling = 0` switches the adapter off. Raises ValueError for a rank or an alpha out of
    range, TypeError for a base layer that is not an `nn.Linear`.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float | None = None):
        super().__init__()
        _check_linear(base_layer)
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        _check_rank(rank, self.in_features, self.out_features)
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"alpha {alpha} is not positive and finite")
        device = base_layer.weight.device
        dtype = _at_least_float32(base_layer.weight.dtype)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.base_layer = base_layer.requires_grad_(False)
        self.train(base_layer.training)

    def forward(self, input: Tensor) -> Tensor:
        y = self.base_layer(input)  # (…, out)
        if self.scaling == 0:
            return y
        down = input.to(self.lora_A.dtype) @ self.lora_A.mT  # (…, r)
        up = self.scaling * down @ self.lora_B.mT  # (…, out)
        return y + up.to(y.dtype)

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def base_weight(self) -> Tensor:
        """W, (out, in). Raises TypeError where it is stored quantized and cannot be read."""
        weight = self.base_layer.weight
        if not weight.is_floating_point():
            kind = type(self.base_layer).__name__
            raise TypeError(f"{kind} holds a quantized {weight.dtype} weight: dequantize it first")
        return weight

    @property
    def weight(self) -> Tensor:
        """W + ΔW, for code that reads a layer's weight instead of calling the layer."""
        return (self.base_weight + self.delta_weight()).to(self.base_weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def delta_weight(self) -> Tensor:
        """ΔW = s·B A, (out, in)."""
        return self.scaling * self.lora_B @ self.lora_A

    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """Copy in B (out, r) and A (r, in), of any rank; s and the Parameter objects stay.

        Raises ValueError for factors that do not fit or that hold NaN or Inf.
        """
        B, A = self._checked_copies(B, A)
        self.lora_A.data = A
        self.lora_B.data = B

    def _checked_copies(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of B and A in the adapter's dtype and on its device, if they fit."""
        _check_shape("A", A, (len(A), self.in_features))
        _check_shape("B", B, (self.out_features, len(A)))
        _check_rank(len(A), self.in_features, self.out_features)
        A = A.to(self.lora_A, copy=True)
        B = B.to(self.lora_B, copy=True)
        _check_finite("A", A)
        _check_finite("B", B)
        return B, A

    def merged(self) -> nn.Linear:
        """A new, frozen `nn.Linear` with weight W + ΔW, rounded to W's dtype.

        What the base layer does beyond W x + b, by hooks or a forward of its own, is not carried
        over.
        """
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(self.weight)
        linear.bias = None if self.bias is None else nn.Parameter(self.bias.clone())
        return linear.requires_grad_(False).train(self.training)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapters by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: str | Iterable[str] | None = None,
) -> dict[str, LoRALinear]:
    """Wrap linear layers in `LoRALinear`, in place, and freeze everything but the adapters.

    `targets` are names or dotted suffixes of names ("q_proj"), or None for every linear layer that
    is not yet adapted, by us or by PEFT. A layer with two names in the model goes by the first.
    Returns the new adapters by name. Raises ValueError for a target that matches nothing and for a
    rank or alpha out of range, TypeError for a target that is not an `nn.Linear`; then nothing
    changes.
    """
    linears = _find_linears(model, targets)
    for name, linear in linears.items():
        with _naming(name):
            _check_rank(rank, linear.in_features, linear.out_features)
    earlier = _factors(model)
    adapters = {name: LoRALinear(linear, rank, alpha) for name, linear in linears.items()}
    for parameter in model.parameters():
        if parameter not in earlier:
            parameter.requires_grad_(False)
    _replace(model, {adapter.base_layer: adapter for adapter in adapters.values()})
    return adapters


def merge_lora(model: nn.Module) -> nn.Module:
    """Replace every adapter by its merged linear layer, in place; returns the model.

    Raises TypeError, and changes nothing, where a base weight is stored quantized or the model is
    itself an adapter.
    """
    if isinstance(model, LoRALinear):
        raise TypeError("the model is itself a LoRALinear: call its merged()")
    merged = {}
    for name, layer in lora_layers(model).items():
        with _naming(name):
            merged[layer] = layer.merged()
    _replace(model, merged)
    return model


def _find_linears(model: nn.Module, targets: str | Iterable[str] | None) -> dict[str, nn.Linear]:
    """The linear layers that `targets` name and that are not yet adapted."""
    # What lies inside a linear layer (a parametrization) or inside an adapter is no target.
    whole = [m for m in model.modules() if isinstance(m, nn.Linear) or hasattr(m, "base_layer")]
    parts = {part for m in whole for part in m.modules() if part is not m}
    modules = {name: m for name, m in model.named_modules() if name and m not in parts}
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    if targets is None:
        found = linears
    else:
        found = {}
        if isinstance(targets, str):
            targets = [targets]
        for target in targets:
            matches = [name for name in modules if f".{name}".endswith(f".{target}")]
            if not matches:
                raise ValueError(f"'{target}' matches no layer; there are {list(linears)}")
            for name in matches:
                with _naming(name):
                    _check_linear(modules[name])
                found[name] = linears[name]
    if not found:
        kind = type(model).__name__
        adapted = list(lora_layers(model))
        raise ValueError(f"found no linear layer to adapt in {kind}; already adapted: {adapted}")
    return found


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])


def _factors(model: nn.Module) -> set[nn.Parameter]:
    """The A and B of every adapter."""
    layers = lora_layers(model).values()
    return {factor for layer in layers for factor in (layer.lora_A, layer.lora_B)}


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(torch.float32, dtype)


def _check_linear(layer: nn.Module) -> None:
    if not isinstance(layer, nn.Linear):
        kind = type(layer)
        raise TypeError(f"{kind.__module__}.{kind.__name__} is not an nn.Linear")


def _check_rank(rank: int, *limits: int) -> None:
    if not isinstance(rank, Integral) or not 1 <= rank <= min(limits):
        raise ValueError(f"rank {rank} is not a whole number in 1..{min(limits)}")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} {tuple(tensor.shape)} holds NaN or Inf")


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Put the layer's name in front of an error that is raised inside."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer '{layer}': {error}") from error


# ---------------------------------------------------------------------------- 2. the algorithms


def _in_float32(function: Callable) -> Callable:
    """Compute in float32 at least, without a graph or autocast, and refuse NaN and Inf by name."""

    @functools.wraps(function)
    def wrapper(*args: object, **kwargs: object) -> object:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
        for name, value in arguments.items():
            if function.__annotations__[name] is Tensor and not isinstance(value, Tensor):
                raise TypeError(f"{name} is a {type(value).__name__}, not a tensor")
        tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
        dtype = torch.float32
        for name, tensor in tensors.items():
            _check_finite(name, tensor)
            dtype = torch.promote_types(dtype, tensor.dtype)
            device = tensor.device.type
        for name, tensor in tensors.items():
            arguments[name] = tensor.to(dtype)
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return function(**arguments)

    return wrapper


@_in_float32
def lora_da(
    gradient: Tensor,
    input_moment: Tensor,
    output_fisher: Tensor,
    rank: int,
    n_train: int,
    *,
    variance: float = 1.0,
    damping: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """LoRA-DA [2, Algorithm 1]: the directions A of least bias and variance, a step B within them.

    Takes the means G (out, in), Z (in, in) and Y (out,). Returns B (out, r) and A (r, in) with
    AAᵀ = I and ΔW = BA: for an adapter with s ≠ 1 divide B by s. `n_train` is the number N of
    different samples that fine-tuning will see; a sample is one row x with its label, in a
    language model a token. `damping` adds so many times its mean to Y and to the diagonal of Z,
    since few samples leave Z nearly singular; below, Y and Z are the damped ones.

    1. How well can the truth be found at all? Let it be W* = W + Δ, and let Δ̂ be the maximum-
       likelihood estimate of Δ, with all of W free, from N independent samples with given inputs.
       It is unbiased with the covariance J⁻¹/N, the least of any unbiased estimate (Cramér–Rao).
       The Fisher information J is the covariance of one sample's gradient of log p, averaged over
       the inputs. All this is exact in linear regression with Gaussian noise; for other models
       that hold the truth it is the limit of Δ̂'s distribution for large N.

    2. What is J? Write W as one long vector, vec W, row after row. A sample's gradient, g xᵀ,
       becomes g ⊗ x. At the truth its mean over labels is 0, so that J = E[ggᵀ ⊗ xxᵀ]. K-FAC [5]
       treats g and x as independent, and of E[ggᵀ] we keep the diagonal: J = diag(Y) ⊗ Z. Then row
       i of Δ̂ has the covariance Z⁻¹/(N·Yᵢ). In place of 1/Yᵢ the paper has (E[ggᵀ]⁻¹)ᵢᵢ, which is
       never less where it exists; its authors' default code has 1/Yᵢ, as we do. Tokens of one
       sequence are not independent, and we treat them as if they were.

    3. Which A? Let AAᵀ = I, and keep the part of Δ̂ in A's row space: Ŵ = W + Δ̂AᵀA. Its error is
           Ŵ − W* = (Δ̂ − Δ)AᵀA − Δ(I − AᵀA).
       The first term is noise, the second bias. They are orthogonal, as AᵀA(I − AᵀA) = 0. So in
       sums of squares, which ‖·‖² is throughout,
           ‖Ŵ − W*‖² = ‖(Δ̂ − Δ)Aᵀ‖² + ‖Δ‖² − ‖ΔAᵀ‖².
       Row i of the noise has the mean square tr(A·Z⁻¹·Aᵀ)/(N·Yᵢ). The rows together give
           E‖Ŵ − W*‖² = ‖Δ‖² + tr(A Ω Aᵀ),    Ω = (1/N)·Σᵢ(1/Yᵢ)·Z⁻¹ − ΔᵀΔ    (in, in),
       which is least where A's rows are the eigenvectors of Ω's r lowest eigenvalues (Ky Fan).
       Where tr(A Ω Aᵀ) > 0, no adapter would be better. `variance` multiplies the first term of Ω.
       The theory's weight 1 takes Δ as known. Where it is measured, from M samples as in step 4,
       its noise adds (1/M)·Σᵢ(1/Yᵢ)·Z⁻¹ to the mean of ΔᵀΔ, and weight 1 + N/M makes Ω unbiased,
       if Y is known and nothing is damped.

    4. Which Δ, and which B? Take one natural-gradient step, J vec Δ = −vec G. On a quadratic loss
       with the Hessian J it ends at the minimum, so that it estimates the unknown Δ. As
       J vec Δ = vec(diag(Y)ΔZ), the step is Δ = −diag(Y)⁻¹ G Z⁻¹. Its part within A is ΔAᵀA, so
       that B = ΔAᵀ.

    A frozen. Steps 1 to 3 project a fit of all W. The paper then fits B alone, which is another
    estimate: its variance is no more and its bias no less, so that another A can be better for it.
    Given the inputs, row i of that fit has the covariance (AZAᵀ)⁻¹/(N·Yᵢ), and
    (AZAᵀ)⁻¹ ⪯ AZ⁻¹Aᵀ, as the inverse of a block is at most the block of the inverse (P ⪯ Q: Q − P
    has no negative eigenvalue). No B has less bias than ΔAᵀ. Where inputs are random, the part of
    Δx outside A varies like noise, and can exceed all that Ω counts.

    Guarantee: with `variance=0` and `damping=0`, on a quadratic loss with the Hessian diag(Y) ⊗ Z,
    Δ is the true one, and BA = Δ if rank Δ ≤ r (in wide layers as nearly as `_lowest_eigenvectors`
    finds A). In regression with noise ε of variance σ² this needs Yᵢ = 1/σ². A measured
    Yᵢ = E[gᵢ²], with the data's labels and g = −(Δx + ε)/σ², also contains the signal: this divides
    row i of Δ by 1 + (ΔZΔᵀ)ᵢᵢ/σ². A still spans Δ's rows where rank Δ = r. Several layers that each
    take the whole step can overshoot: see `init_lora_da`.

    The authors' code has other scales: it divides Δ by its largest singular value and, at the end,
    A and B by √γ = 32; its weight of the variance is 0.03, with N in sequences and Y from losses
    averaged over each sequence; it damps with 1e-6·I in any units.

    A zero gradient gives B = 0 and, if variance > 0, the A of least variance. Raises ValueError for
    tensors that do not fit or are not finite, for numbers out of range, and for moments on which
    Cholesky's factorization fails.
    """
    n_out, n_in = gradient.shape
    _check_rank(rank, n_out, n_in)
    _check_shape("input_moment", input_moment, (n_in, n_in))
    _check_shape("output_fisher", output_fisher, (n_out,))
    if not n_train >= 1:
        raise ValueError(f"n_train {n_train} is below 1")
    if not 0 <= variance < math.inf:
        raise ValueError(f"variance {variance} is not in [0, ∞)")
    if not output_fisher.any():  # no gradient: Δ is 0 with any Y
        output_fisher = torch.ones_like(output_fisher)

    Z = _damped(input_moment, damping)  # (in, in)
    Y = output_fisher + damping * output_fisher.mean()  # (out,)
    if not Y.min() > 0:
        raise ValueError(f"damping {damping} leaves output_fisher ({n_out},) not positive")
    Z_inverse = torch.cholesky_inverse(_cholesky("input_moment", Z))  # (in, in)
    delta = -(gradient / Y[:, None]) @ Z_inverse  # (out, in)
    noise = variance * (1 / Y).sum() / n_train
    A = _lowest_eigenvectors(Z, Z_inverse, noise, delta, rank).mT  # (r, in)
    B = delta @ A.mT  # (out, r)
    return B, A


def _damped(moment: Tensor, damping: float) -> Tensor:
    """The moment C + damping·mean(diag C)·I: the term grows with C, whatever unit all of x has."""
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping {damping} is not in [0, ∞)")
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def _cholesky(name: str, moment: Tensor) -> Tensor:
    """The lower triangular L with L Lᵀ = C."""
    L, failed = torch.linalg.cholesky_ex(moment)
    if failed:
        shape = tuple(moment.shape)
        raise ValueError(f"{name} {shape} is not positive definite: give more rows or more damping")
    return L


def _lowest_eigenvectors(
    Z: Tensor, Z_inverse: Tensor, noise: Tensor, delta: Tensor, rank: int
) -> Tensor:
    """Orthonormal V (n, rank), the eigenvectors of Ω = noise·Z⁻¹ − ΔᵀΔ with the least eigenvalues.

    A full `eigh` finds them up to n = 1024, or 34·(rank + 8) if that is more. In wider layers
    Davidson's method [6] does. Keep a basis, find the lowest vectors V of Ω and their eigenvalues Θ
    within it (Rayleigh–Ritz), and add to it what they still lack: the residual ΩV − VΘ, which leads
    to much signal, and Z times the residual, which leads to little noise, as it undoes Z⁻¹. Eight
    rounds are enough in the tests: tr(VᵀΩV) exceeds its least value by at most 1 % of
    ‖Δ‖² + |least|. This is not proved, and rounding in float32 can make it worse where Z is nearly
    singular and not damped.
    """
    n = len(Z)
    width = rank + 8  # columns of a block: more than wanted, which helps the last ones
    rounds = 8
    columns = (1 + 2 * rounds) * width  # of the basis in the end
    if n <= max(1024, 2 * columns):
        _, V = _lowest(noise * Z_inverse - delta.mT @ delta, rank)
        return V

    def times_omega(V: Tensor) -> Tensor:
        return noise * (Z_inverse @ V) - delta.mT @ (delta @ V)

    generator = torch.Generator(device="cpu").manual_seed(0)  # the same directions each time
    start = torch.randn(n, width, generator=generator, device="cpu").to(Z)
    basis = torch.linalg.qr(start).Q  # (n, columns)
    product = times_omega(basis)  # (n, columns)
    for _ in range(rounds):
        theta, inner = _lowest(basis.mT @ product, width)
        residual = product @ inner - basis @ inner * theta  # (n, width)
        larger = torch.linalg.qr(torch.cat([basis, residual, Z @ residual], dim=1)).Q
        block = larger[:, -2 * width :]  # orthogonal to the basis
        basis = torch.cat([basis, block], dim=1)
        product = torch.cat([product, times_omega(block)], dim=1)
    _, inner = _lowest(basis.mT @ product, rank)
    return basis @ inner


def _lowest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The least eigenvalues (count,) of a symmetric matrix and their eigenvectors (n, count)."""
    values, vectors = torch.linalg.eigh(matrix)
    return values[:count], vectors[:, :count]


@_in_float32
def hrp(B_high: Tensor, A_high: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """High-Rank Preheating [3]: the main directions of a short training at a higher rank.

    Takes B_high (out, R) and A_high (R, in), trained for a few steps. Returns B = 0 (out, r) and
    A (r, in) with AAᵀ = I: the function is unchanged, only the directions are new.

    1. Which A would be best? Let Δ be the change that is needed and ‖Δ − BA‖² the loss: least
       squares with Z = I. At a frozen A with AAᵀ = I the best B is ΔAᵀ, which leaves
       ‖Δ‖² − ‖ΔAᵀ‖². That is least if A holds the top r right singular vectors of Δ
       (Eckart–Young). But Δ is unknown.

    2. What does preheating find? In the ideal case, B_high is trained at a random, frozen A_high
       until it converges; a few Adam steps only come nearer to it. Then the normal equations
       (Δ − B_high·A_high)·A_highᵀ = 0 hold, and B_high·A_high = ΔP, where P projects on the rows of
       A_high. The product's top r right singular vectors lie within their span, and for every A
       within it ‖ΔPAᵀ‖ = ‖ΔAᵀ‖: so they are the best A within that span.

    3. Why at a high rank? A span that contains another one holds an A that is as good or better.
       With R = in it holds the best of all. Spans that are drawn independently do not contain each
       other, so that a higher rank helps on average, not in every draw.

    4. How, without forming the product? Let A_highᵀ = Q K, with K triangular. The product is
       (B_high Kᵀ) Qᵀ. If B_high Kᵀ = U Σ Vᵀ, the product's right singular vectors are the columns
       of Q V.

    B = 0 is our reading of the paper's words that only the direction is modified. U Σ would keep
    the preheated function, too; we have not compared the two. Cost: O((out + in)·R²). Raises
    ValueError for factors that do not fit or are not finite, and for a B_high of 0, which no
    gradient has reached.
    """
    n_out, high = B_high.shape
    n_in = A_high.shape[1]
    _check_shape("A_high", A_high, (high, n_in))
    _check_rank(rank, n_out, n_in, high)
    if not B_high.any():
        shape = tuple(B_high.shape)
        raise ValueError(
            f"B_high {shape} is 0, so no gradient reached the layer. Are there batches, and does "
            "loss_fn call the model that it is given?"
        )
    Q, K = torch.linalg.qr(A_high.mT)
    V_t = torch.linalg.svd(B_high @ K.mT, full_matrices=False).Vh
    B = B_high.new_zeros(n_out, rank)
    A = V_t[:rank] @ Q.mT
    return B, A


@_in_float32
def monge_map(Z_f: Tensor, Z_p: Tensor) -> Tensor:
    """T (in, in) with T Z_f Tᵀ = Z_p: of all such linear maps the one that moves x least.

    Fine-tuning inputs x have the moment Z_f = L_f L_fᵀ; after the map they have pre-training's,
    Z_p = L_p L_pᵀ. Both are symmetric and of shape (in, in). This is optimal transport between
    Gaussians, and classical (Olkin & Pukelsheim; Knott & Smith; Gelbrich).

    1. Which maps are there? T L_f and L_p are two roots of Z_p, as RRᵀ = Z_p for both. Two such
       roots differ by an orthogonal Q, so that T L_f = L_p Q and T = L_p Q L_f⁻¹.
    2. Which moves x least? E‖Tx − x‖² = tr Z_f + tr Z_p − 2 tr(T Z_f), so make tr(T Z_f) large.
       With L_pᵀL_f = U Σ Vᵀ, tr(T Z_f) = tr(L_p Q L_fᵀ) = tr(Q V Σ Uᵀ) = tr(Σ·UᵀQV). As the
       diagonal of an orthogonal matrix is at most 1, no Q gives more than Q = U Vᵀ (Procrustes).
    3. What is that map? L_p = L_f⁻ᵀ V Σ Uᵀ, so T = L_f⁻ᵀ V Σ Vᵀ L_f⁻¹ is symmetric and positive
       definite. No other map with T Z_f Tᵀ = Z_p is both: for a symmetric, positive definite T,
       L_fᵀL_p = (L_fᵀ T L_f) Qᵀ is a polar decomposition, and an invertible matrix has only one.

    Raises ValueError unless both moments are positive definite to Cholesky's factorization.
    """
    n = len(Z_f)
    _check_shape("Z_f", Z_f, (n, n))
    _check_shape("Z_p", Z_p, (n, n))
    L_f = _cholesky("Z_f", Z_f)
    L_p = _cholesky("Z_p", Z_p)
    U, _, V_t = torch.linalg.svd(L_p.mT @ L_f)
    return torch.linalg.solve_triangular(L_f, L_p @ U @ V_t, upper=False, left=False)  # · L_f⁻¹


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

    Takes W (out, in), Z_f = E[x xᵀ] of fine-tuning inputs and, where pre-training data is at hand,
    its Z_p. Returns B (out, r) and A (r, in) with ΔW ≈ BA: for an adapter with s ≠ 1 divide B by s.
    Both moments are damped first, and not centred.

    The derivation is ours. The abstract of [4] claims this much: initialization is a domain shift;
    several constraints relate pre-training and fine-tuning activations; a closed form follows,
    without training; it splits into factors of variable rank. The paper uses the pre-training
    weights and fine-tuning activations only, so step 3 is nearer to it than a given Z_p.

    1. Outputs: (W + ΔW)x shall have the second moments on fine-tuning inputs that Wx had on
       pre-training inputs: (W + ΔW) Z_f (W + ΔW)ᵀ = W Z_p Wᵀ.
    2. Inputs: look for W + ΔW in the form W T. Then T Z_f Tᵀ = Z_p is enough. Of all such T take
       the one that moves x least, `monge_map(Z_f, Z_p)`. So ΔW = W(T − I).
    3. Without Z_p: assume that pre-training inputs were white and as large as the new ones,
       Z_p = mean(diag Z_f)·I. Then T ∝ Z_f^−½, as this is symmetric, positive definite and right
       (`monge_map` 3); it also whitens what never shifted.
    4. Rank r: let L Lᵀ = Z_f and ΔW L = U Σ Vᵀ. Then E‖(ΔW − BA)x‖² = ‖(ΔW − BA)L‖² is least for
       B = U_r Σ_r and A = V_rᵀ L⁻¹ (Eckart–Young). With Σ^½ in both factors, ΔW = 0 would make both
       of them 0. There both gradients, GAᵀ and BᵀG, vanish, and training could not start.

    Guarantee, for the damped moments: A Z_f Aᵀ = I; the moments of Wx match at r = min(in, out);
    Z_p = Z_f gives ΔW = 0 up to rounding, and an A without a meaning. With `damping=0` and Z_p
    given, a shift x_f = S x_p is undone exactly, T = S⁻¹, if S is symmetric positive definite and
    rank(S − I) ≤ r. With damping it is undone in part, and where S changes the mean of diag Z,
    directions that did not shift are rescaled. A rotation of white inputs leaves no trace
    in the moments and is not seen. Raises ValueError as `lora_da` does.
    """
    n_out, n_in = weight.shape
    _check_rank(rank, n_out, n_in)
    _check_shape("input_moment", input_moment, (n_in, n_in))
    Z_f = _damped(input_moment, damping)
    if pretrain_moment is None:
        Z_p = Z_f.diagonal().mean() * torch.eye(n_in).to(Z_f)
    else:
        _check_shape("pretrain_moment", pretrain_moment, (n_in, n_in))
        Z_p = _damped(pretrain_moment, damping)
    L = _cholesky("input_moment", Z_f)  # (in, in)
    delta = weight @ monge_map(Z_f, Z_p) - weight  # (out, in)
    U, sigma, V_t = torch.linalg.svd(delta @ L, full_matrices=False)
    B = U[:, :rank] * sigma[:rank]
    A = torch.linalg.solve_triangular(L, V_t[:rank], upper=False, left=False)
    return B, A


def allocate_ranks(spectra: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks {name: r ≥ 1} of sum `budget`: the squares of the values left out have the least sum.

    `spectra` holds the singular values of each layer, largest first; for CNTLoRA these are the
    norms of B's columns. Each layer gets one rank, and the rest go to the largest values left over.
    As each spectrum falls, these are always the next ones of their layers. Raises ValueError for
    NaN or Inf and for a budget out of range.
    """
    for name, spectrum in spectra.items():
        _check_finite(f"the spectrum of layer '{name}'", spectrum)
    others = []
    for name, spectrum in spectra.items():
        others += [(value, name) for value in spectrum[1:].tolist()]
    others.sort(reverse=True)
    least = len(spectra)
    most = least + len(others)
    if not isinstance(budget, Integral) or not least <= budget <= most:
        raise ValueError(f"the rank budget {budget} is not a whole number in {least}..{most}")
    ranks = dict.fromkeys(spectra, 1)
    for _, name in others[: budget - least]:
        ranks[name] += 1
    return ranks


# ---------------------------------------------------------------------------- 3. statistics


class Statistics:
    """Means over `count` rows x of one layer's input and the gradients g at its output.

    `input_moment` is Z = E[x xᵀ]; `gradient` G = E[g xᵀ] and `output_fisher` Y = E[g²] are None
    after forward passes alone. While rows pass through the layer they are sums, not yet means.
    """

    def __init__(self, name: str, linear: nn.Linear, backward: bool):
        n_out = linear.out_features
        n_in = linear.in_features
        dtype = _at_least_float32(linear.weight.dtype)
        device = linear.weight.device
        self.name = name
        self.mask = None
        self.count = 0
        self.input_moment = torch.zeros(n_in, n_in, dtype=dtype, device=device)
        self.gradient = None
        self.output_fisher = None
        if backward:
            self.gradient = torch.zeros(n_out, n_in, dtype=dtype, device=device)
            self.output_fisher = torch.zeros(n_out, dtype=dtype, device=device)
            linear.register_forward_hook(self._await_gradient)
        else:
            linear.register_forward_hook(self._see_input)

    def _see_input(self, linear: nn.Linear, args: tuple, y: Tensor) -> None:
        self._add(args[0])

    def _await_gradient(self, linear: nn.Linear, args: tuple, y: Tensor) -> Tensor:
        """Keep x until the gradient of y arrives, where both are in hand."""
        if not torch.is_grad_enabled():  # a reentrant checkpoint comes by twice, the first time so
            return y
        if not y.requires_grad:  # all before it is frozen: the graph starts here
            y = y.requires_grad_().clone()  # the model may change a clone in place, but not a leaf
        x = args[0]
        version = x._version

        def see_gradient(g: Tensor) -> None:
            if x._version != version:
                shape = tuple(x.shape)
                raise ValueError(f"layer '{self.name}': its input {shape} was changed in place")
            self._add(x, g)

        y.register_hook(see_gradient)
        return y

    @torch.no_grad()
    def _add(self, x: Tensor, g: Tensor | None = None) -> None:
        rows = self._rows(x)  # (rows, in)
        self.count += len(rows)
        self.input_moment.addmm_(rows.mT, rows)  # += xᵀx; autocast leaves in-place products alone
        if g is not None:
            g = self._rows(g) * len(rows)  # (rows, out); the loss is the rows' mean
            self.gradient.addmm_(g.mT, rows)  # += gᵀx
            self.output_fisher += g.square().sum(dim=0)

    def _rows(self, x: Tensor) -> Tensor:
        """The rows (rows, n) of x (…, n) where the mask is True, in float32 at least."""
        rows = x.reshape(-1, x.shape[-1])
        if self.mask is not None:
            leading = tuple(x.shape[:-1])
            shape = tuple(self.mask.shape)
            if leading not in (shape, (self.mask.numel(),)):
                raise ValueError(f"layer '{self.name}': a mask of {shape} for inputs of {leading}")
            rows = rows[self.mask.flatten()]
        return rows.to(_at_least_float32(x.dtype))

    def _average(self) -> None:
        """Turn the sums, over all processes, into means."""
        count = torch.tensor(self.count, device=self.input_moment.device)
        self.count = int(_sum_over_processes(count))
        if self.count == 0:
            raise ValueError(
                f"layer '{self.name}': no row reached it, or no gradient. Are there batches, does "
                "loss_fn call the model that it is given, does that call this layer as a module, "
                "and does the mask leave rows?"
            )
        for name in ("input_moment", "gradient", "output_fisher"):
            total = getattr(self, name)
            if total is not None:
                _sum_over_processes(total)
                total /= self.count
                _check_finite(f"layer '{self.name}': {name}", total)


def collect_statistics(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Iterable,
    loss_fn: Callable,
    *,
    backward: bool = True,
    mask_fn: Callable | None = None,
) -> dict[str, Statistics]:
    """The `Statistics` of linear layers of the model, in eval mode and with our adapters off.

    `layers` are plain linear layers, called with a positional input, or adapters (ours, PEFT's)
    that hold one as `base_layer`; PEFT's stay on. A batch takes one forward and one backward pass,
    in which no weight needs a gradient; with `backward=False` it takes a forward pass alone, and
    `loss_fn` may return anything. Memory: in² + out·in + out numbers a layer and, during a batch,
    the inputs of all these layers. With torch.distributed every process passes batches of its own
    and gets the means over all; an error in one of them leaves the others waiting.

    `loss_fn(model, batch)` has to call the model that it is given, a twin of yours that shares its
    weights, and must leave the batch as it was. The twin is a deep copy, which the model has to
    allow. The loss is the MEAN of −log p over the rows: a row's g is then the gradient at the
    layer's output times the number of rows in that call. It follows that

    - `F.mse_loss` is no such mean: −log p of noise with variance 1 is half the sum of squares;
    - a layer that is called twice has twice the rows, and half of ∂loss/∂W as its G;
    - layers that see a part of the rows (experts, chunks) are not supported, and this is not
      noticed: their step comes out too long;
    - where the loss is a mean over sequences of T tokens, not over tokens, the step is too short:
      by T if each token has a label, by about T if a sequence has one and its tokens are
      independent;
    - Hugging Face divides by the labels that count (not −100) in each batch, while rows are all
      tokens that the mask leaves. Where prompts are −100, G is exact with the attention mask as
      `mask_fn` and `model(**batch, num_items_in_batch=int(batch["attention_mask"].sum())).loss`,
      if the model heeds that number, as causal models do; T5 and BERT do not.

    `mask_fn(batch)` is true for the rows that count. It has the leading shape of the layers'
    inputs, (B, T), also where a model flattens them to (B·T, in). With tens of thousands of rows in
    a batch float16 turns small gradients into 0, and G is off by percents; bfloat16 does not.
    Reentrant checkpoints need a layer of `layers` before them. Raises ValueError for a loss that is
    no finite scalar with a gradient, a mask that does not fit, an input changed in place before its
    gradient arrived, NaN or Inf, or a layer that no row reached; TypeError for a layer that is not
    linear.
    """
    linears = {name: getattr(layer, "base_layer", layer) for name, layer in layers.items()}
    for name, linear in linears.items():
        with _naming(name):
            _check_linear(linear)
    twin, twin_linears = _twin(model, linears)
    for adapter in lora_layers(twin).values():
        adapter.scaling = 0.0
    statistics = {n: Statistics(n, linear, backward) for n, linear in twin_linears.items()}
    with torch.set_grad_enabled(backward):
        for batch in batches:
            if mask_fn is not None:
                mask = mask_fn(batch).bool()
                for layer_statistics in statistics.values():
                    layer_statistics.mask = mask
            loss = loss_fn(twin, batch)
            if backward:
                _check_loss(loss)
                _check_finite("loss_fn's value", loss)
                loss.backward()
    for layer_statistics in statistics.values():
        layer_statistics._average()
    return statistics


def _twin(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[nn.Module, dict]:
    """A copy of the model in eval mode, and the copies of some of its layers.

    It shares the storage of every parameter with the model but of the adapters' A and B; buffers
    are copied. Modes, gradients, new hooks and new factors are the copy's alone, so that the model
    has nothing to undo.
    """
    factors = _factors(model)
    shared = {}  # deepcopy takes everything in here as already copied
    for parameter in model.parameters():
        if parameter not in factors:
            if parameter.requires_grad:
                shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
            else:
                shared[id(parameter)] = parameter
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                shared[id(value)] = value  # computed from parameters, as by weight_norm
    twin, twin_layers = copy.deepcopy((model, layers), shared)
    return twin.eval(), twin_layers


def _check_loss(loss: Tensor) -> None:
    """Refuse what is no scalar, or has no gradient where gradients are recorded."""
    if not isinstance(loss, Tensor):
        raise ValueError(f"loss_fn returned a {type(loss).__name__}, not a scalar tensor")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not a scalar")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError(
            "loss_fn returned a loss without a gradient: does it call the model that it is given, "
            "without no_grad, detach or argmax?"
        )


def _sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum in place over the processes of torch.distributed, if there are any."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------------------- 4. whole models


def init_lora_da(
    model: nn.Module,
    batches: Iterable,
    loss_fn: Callable,
    *,
    damping: float = 0.1,
    n_train: int | None = None,
    variance: float = 1.0,
    step: float | None = None,
    mask_fn: Callable | None = None,
    layers_per_pass: int | None = None,
) -> float:
    """Start every adapter of the model at LoRA-DA's A and B, and return the step.

    `loss_fn` and `mask_fn` are those of `collect_statistics`. `n_train` is the number of
    different rows that fine-tuning will see, which are tokens in a language model; left out, it is
    the number of rows fitted here. An endless stream of batches needs `itertools.islice`.

    ΔW is `step`·BA of `lora_da`, one step for all layers. 1 is the theory's for a single layer, but
    two layers that each remove the whole error remove it twice; 0 keeps only A's directions. With
    `step=None` the LAST batch is held out from the fit, since on the batches fitted, whose noise is
    in Δ, too long a step looks good. Of 0, 4⁻⁸ … 4² it chooses the step with the least loss, in
    eval mode and with the same random numbers for each step. A small last batch chooses badly, and
    with only two batches half of the data goes to the choice.

    `layers_per_pass` bounds the memory for statistics: so many layers at a time, with a pass over
    the batches for each group. With torch.distributed every process makes this call on the same,
    unwrapped model with batches of its own, and all end with the same factors. Raises ValueError as
    `collect_statistics` and `lora_da` do, and for a single batch without a step; then no layer
    has changed.
    """
    adapters = _adapters(model)
    batches, held_out = _hold_out(batches, step)
    factors = {}
    for linears in _groups(adapters, layers_per_pass):
        statistics = collect_statistics(model, linears, batches, loss_fn, mask_fn=mask_fn)
        for name, means in statistics.items():
            with _naming(name):
                factors[name] = lora_da(
                    means.gradient,
                    means.input_moment,
                    means.output_fisher,
                    adapters[name].rank,
                    means.count if n_train is None else n_train,
                    variance=variance,
                    damping=damping,
                )
    return _start(model, factors, step, held_out, loss_fn)


def init_cntlora(
    model: nn.Module,
    batches: Iterable,
    loss_fn: Callable,
    *,
    pretrain_batches: Iterable | None = None,
    rank_budget: int | None = None,
    damping: float = 0.1,
    step: float | None = None,
    mask_fn: Callable | None = None,
    layers_per_pass: int | None = None,
) -> float:
    """Start every adapter of the model at CNTLoRA's A and B, and return the step.

    Labels choose the step and are not used by the fit, which takes forward passes alone. Without
    labels pass `step=1`, and let `loss_fn` call the model. `pretrain_batches` give Z_p. With a
    `rank_budget`, `allocate_ranks` spends that many ranks in all; s stays as it is. Make the
    optimizer afterwards, as the factors change their shapes. All full-rank factors are then held at
    once, whatever `layers_per_pass`. The rest is as in `init_lora_da`; a base weight that is stored
    quantized is a TypeError.
    """
    adapters = _adapters(model)
    weights = {}
    for name, layer in adapters.items():
        with _naming(name):
            weights[name] = layer.base_weight  # a quantized one is refused before any work
    batches, held_out = _hold_out(batches, step)
    sources = [batches]
    if pretrain_batches is not None:
        sources.append(list(pretrain_batches))
    factors = {}
    for linears in _groups(adapters, layers_per_pass):
        passes = [
            collect_statistics(model, linears, source, loss_fn, backward=False, mask_fn=mask_fn)
            for source in sources
        ]
        for name in linears:
            layer = adapters[name]
            rank = layer.rank
            if rank_budget is not None:
                rank = min(layer.in_features, layer.out_features)
            moments = [statistics[name].input_moment for statistics in passes]
            with _naming(name):
                factors[name] = cntlora(weights[name], *moments, rank=rank, damping=damping)
    if rank_budget is not None:
        spectra = {name: B.norm(dim=0) for name, (B, _) in factors.items()}
        for name, rank in allocate_ranks(spectra, rank_budget).items():
            B, A = factors[name]
            factors[name] = (B[:, :rank], A[:rank])
    return _start(model, factors, step, held_out, loss_fn)


@torch.enable_grad()
def init_hrp(
    model: nn.Module,
    batches: Iterable,
    loss_fn: Callable,
    *,
    preheat_rank: int = 64,
    lr: float = 0.01,
    train_A: bool = False,
    seed: int = 0,
) -> None:
    """Preheat at a high rank, one Adam step a batch, and start every adapter at HRP's A and B = 0.

    The preheating happens on a twin of the model in eval mode: B_high starts at 0, and A_high is
    drawn by `seed` and stays frozen unless `train_A`. `preheat_rank` is capped at min(in, out) of
    each layer. Rank, steps and rate of the preheating are our choices, not the paper's. With
    torch.distributed a step takes the mean gradient of one batch from every process, so that all
    have to pass equally many. Raises ValueError for a `preheat_rank` below an adapter's rank, for a
    loss that is no finite scalar with a gradient, and for a layer that no gradient reached, as
    without batches; then no layer has changed.
    """
    adapters = _adapters(model)
    twin, preheated = _twin(model, adapters)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    for name, layer in preheated.items():
        if preheat_rank < layer.rank:
            raise ValueError(
                f"layer '{name}': preheat_rank {preheat_rank} is below its rank {layer.rank}"
            )
        high = min(preheat_rank, layer.in_features, layer.out_features)
        A_high = torch.empty(high, layer.in_features, device="cpu")
        nn.init.kaiming_uniform_(A_high, a=math.sqrt(5), generator=generator)
        layer.set_factors(torch.zeros(layer.out_features, high), A_high)
        layer.scaling = 1.0
        layer.lora_A.requires_grad_(train_A)
        layer.lora_B.requires_grad_(True)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr)
    for batch in batches:
        for parameter in trained:  # where a batch does not reach, the gradient is 0, not None
            parameter.grad = torch.zeros_like(parameter)
        loss = loss_fn(twin, batch)
        _check_loss(loss)
        _check_finite("loss_fn's value", loss)
        loss.backward()
        processes = _sum_over_processes(torch.ones((), device=loss.device))
        for parameter in trained:
            parameter.grad = _sum_over_processes(parameter.grad) / processes
        optimizer.step()
    factors = {}
    for name, layer in preheated.items():
        with _naming(name):
            factors[name] = hrp(layer.lora_B, layer.lora_A, adapters[name].rank)
    _set_all_factors(model, factors)


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's adapters; there has to be one, and each has to be on."""
    adapters = lora_layers(model)
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no adapter: call add_lora first")
    for name, layer in adapters.items():
        if layer.scaling == 0:
            raise ValueError(f"layer '{name}': its adapter is off, as its scaling is 0")
    return adapters


def _hold_out(batches: Iterable, step: float | None) -> tuple[list, object]:
    """The batches to fit and, where the step is not given, the one that chooses it."""
    batches = list(batches)
    if step is not None:
        if not 0 <= step < math.inf:
            raise ValueError(f"step {step} is not in [0, ∞)")
        return batches, None
    if len(batches) < 2:
        raise ValueError(
            f"step=None holds the last batch out, and there are {len(batches)} batches: "
            "give two or more, or a step"
        )
    return batches[:-1], batches[-1]


def _groups(adapters: dict[str, LoRALinear], size: int | None) -> list[dict[str, nn.Linear]]:
    """The base layers by name, `size` of them a group."""
    linears = [(name, layer.base_layer) for name, layer in adapters.items()]
    if size is None:
        size = len(linears)
    if size < 1:
        raise ValueError(f"layers_per_pass {size} is below 1")
    return [dict(linears[i : i + size]) for i in range(0, len(linears), size)]


def _start(
    model: nn.Module,
    factors: dict[str, tuple[Tensor, Tensor]],
    step: float | None,
    held_out: object,
    loss_fn: Callable,
) -> float:
    """Set every adapter's factors so that ΔW = step·BA, and return the step."""
    if step is None:
        step = _best_step(model, factors, held_out, loss_fn)
    scaled = {}
    for name, layer in lora_layers(model).items():
        B, A = factors[name]
        scaled[name] = (step / layer.scaling * B, A)
    _set_all_factors(model, scaled)
    return step


@torch.no_grad()
def _best_step(
    model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], batch: object, loss_fn: Callable
) -> float:
    """The t among 0, 4⁻⁸ … 4² with the least loss on the batch, where ΔW = t·BA."""
    twin, layers = _twin(model, lora_layers(model))
    _set_all_factors(twin, factors)
    losses = {}
    for t in [0.0] + [4.0**k for k in range(-8, 3)]:
        for layer in layers.values():
            layer.scaling = t
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(0)  # the same random numbers for each step
            loss = loss_fn(twin, batch)
        _check_loss(loss)
        if t == 0:
            _check_finite("loss_fn's value", loss)
        loss = _sum_over_processes(loss).item()
        losses[t] = math.inf if math.isnan(loss) else loss
    return min(losses, key=losses.get)


def _set_all_factors(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Set every adapter's factors, or none if some do not fit."""
    adapters = lora_layers(model)
    checked = {}
    for name, layer in adapters.items():
        with _naming(name):
            checked[name] = layer._checked_copies(*factors[name])
    for name, layer in adapters.items():
        layer.set_factors(*checked[name])
