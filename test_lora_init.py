# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of this repository
"""What `lora_init.py` claims, checked: the theorems first, the engineering after them.

A theorem's test has the claim as its name and the equation as its docstring. Its oracle is NumPy in
float64, independent of the module: an SVD, an eigenvalue problem, a dense Kronecker system, brute
force. Tolerances are relative to norms. Eigenvectors have no sign, and only BA and the span of A
are determined: so products and projectors are compared. What is claimed to be an optimum has to be
as good as random rivals and as rivals nearby.
"""

import copy
import inspect
import itertools
import math
import os
import re
import warnings
import weakref
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the matrices are small: threads wait for each other

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import lora_init
from lora_init import (
    LoRALinear,
    add_lora,
    allocate_ranks,
    cntlora,
    collect_statistics,
    hrp,
    init_cntlora,
    init_hrp,
    init_lora_da,
    lora_da,
    lora_layers,
    merge_lora,
    monge_map,
    white_basis,
)

torch.set_num_threads(1)
settings.register_profile("here", deadline=None, max_examples=100)
settings.load_profile("here")


# ============================================================================ THEOREMS


SPECTRA = {
    "falling": lambda rank: np.geomspace(1, 0.1, rank),
    "equal": np.ones,
    "deficient": lambda rank: np.append(np.ones(rank - 1), 0.0),
    "zero": np.zeros,
}
DAMPINGS = st.sampled_from([0.0, 0.3])


@dataclass
class Problem:
    """Sizes, and the random matrices that the theorems start from."""

    n_out: int
    n_in: int
    rank: int
    condition: float  # of moment()
    spectrum: str  # of change()
    random: np.random.Generator

    def normal(self, *shape):
        return self.random.standard_normal(shape)

    def positive(self, n):
        return np.exp(self.normal(n))

    def orthogonal(self, n):
        return np.linalg.qr(self.normal(n, n)).Q

    def matrix(self):
        return self.normal(self.n_out, self.n_in)

    def moment(self):
        """A symmetric positive definite matrix (in, in)."""
        Q = self.orthogonal(self.n_in)
        return Q * np.geomspace(1, 1 / self.condition, self.n_in) @ Q.T

    def change(self):
        """A matrix (out, in) of rank `rank` at most."""
        U = self.orthogonal(self.n_out)[:, : self.rank]
        V = self.orthogonal(self.n_in)[:, : self.rank]
        return U * SPECTRA[self.spectrum](self.rank) @ V.T


@st.composite
def problems(draw):
    n_out = draw(st.integers(1, 9))
    n_in = draw(st.integers(1, 9))
    limit = min(n_out, n_in)
    rank = draw(st.one_of(st.just(1), st.just(limit), st.integers(1, limit)))
    condition = draw(st.sampled_from([1.0, 10.0, 1e3]))
    spectrum = draw(st.sampled_from(sorted(SPECTRA)))
    seed = draw(st.integers(0, 2**32))
    return Problem(n_out, n_in, rank, condition, spectrum, np.random.default_rng(seed))


def compute(function, *arguments, **options):
    """The function's results, with NumPy arrays in and out."""
    tensors = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
    results = function(*tensors, **options)
    if isinstance(results, Tensor):
        return results.numpy()
    return [result.numpy() for result in results]


def array(values):
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy()
    return np.asarray(values)


def near(actual, expected, tolerance=1e-8, scale=None):
    """‖actual − expected‖ ≤ tolerance·scale; the scale is ‖expected‖ unless given."""
    actual = array(actual)
    expected = array(expected)
    if scale is None:
        scale = np.linalg.norm(expected)
    return actual.shape == expected.shape and np.linalg.norm(actual - expected) <= tolerance * scale


def squared(matrix):
    return np.sum(matrix**2)


def singular_values(matrix):
    return np.linalg.svd(matrix, compute_uv=False)


def damped(moment, damping):
    """C + damping·mean(diag C)·I."""
    return moment + damping * np.mean(np.diag(moment)) * np.eye(len(moment))


def root(matrix):
    """The symmetric, positive definite root."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(eigenvalues) @ vectors.T


def row_projector(A):
    """The orthogonal projector on the span of A's rows."""
    Q = np.linalg.qr(array(A).T).Q
    return Q @ Q.T


def lowest_projector(matrix, rank):
    """The projector on the eigenvectors of the lowest eigenvalues, where a gap makes it unique."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    if rank < len(matrix):
        gap = eigenvalues[rank] - eigenvalues[rank - 1]
        assume(gap > 1e-4 * np.abs(eigenvalues).max())
    return vectors[:, :rank] @ vectors[:, :rank].T


def guidance(Y, Z, delta, weight):
    """Ω = weight·Σ(1/Yᵢ)·Z⁻¹ − ΔᵀΔ."""
    return weight * np.sum(1 / Y) * np.linalg.inv(Z) - delta.T @ delta


def trace_within(A, omega):
    """tr(AΩAᵀ) for the orthonormal basis of A's span."""
    return np.trace(row_projector(A) @ omega)


def least_trace(omega, rank):
    """Ky Fan: the sum of the lowest eigenvalues."""
    return np.linalg.eigvalsh(omega)[:rank].sum()


# ---------------------------------------------------------------------------- the layer


@given(problems(), st.lists(st.integers(1, 3), max_size=3))
def test_a_fresh_adapter_changes_no_output_and_draws_A_uniformly(p, leading):
    """B = 0: bit for bit the layer's outputs for x (…, in). A ~ U(−1/√in, 1/√in), and s = 1."""
    linear = nn.Linear(p.n_in, p.n_out, dtype=torch.float64)
    x = torch.tensor(p.normal(*leading, p.n_in))
    torch.manual_seed(0)
    layer = LoRALinear(linear, p.rank)
    torch.manual_seed(0)
    uniform = torch.rand(p.rank, p.n_in, dtype=torch.float64)
    assert torch.equal(layer(x), linear(x))
    assert near(layer.lora_A, (2 * uniform - 1) / math.sqrt(p.n_in))
    assert layer.scaling == 1


@given(problems(), st.floats(0.1, 30), st.booleans())
def test_an_adapter_has_the_outputs_and_gradients_of_the_dense_weight(p, alpha, bias):
    """y = (W + s·BA)x + b, s = alpha/r; ∂L/∂B = s·G Aᵀ, ∂L/∂A = s·Bᵀ G, G = ∂L/∂(W + s·BA).

    Here L = Σ sin y. Factors of another rank keep the s of the first.
    """
    linear = nn.Linear(p.n_in, p.n_out, bias, dtype=torch.float64)
    layer = LoRALinear(linear, p.rank, alpha)
    s = alpha / p.rank
    x = p.normal(5, p.n_in)
    for rank in (p.rank, min(p.n_out, p.n_in)):
        B = p.normal(p.n_out, rank)
        A = p.normal(rank, p.n_in)
        layer.set_factors(torch.tensor(B), torch.tensor(A))
        dense = array(linear.weight) + s * B @ A
        y = x @ dense.T + (array(linear.bias) if bias else 0)
        G = np.cos(y).T @ x
        actual = layer(torch.tensor(x))
        actual.sin().sum().backward()
        assert near(actual, y)
        assert near(layer.delta_weight(), s * B @ A)
        assert near(layer.weight, dense)
        assert near(layer.merged()(torch.tensor(x)), y)
        assert repr(layer.merged()) == repr(linear)
        assert near(layer.lora_B.grad, s * G @ A.T)
        assert near(layer.lora_A.grad, s * B.T @ G)
        assert layer.rank == rank
    assert not linear.weight.requires_grad


# ---------------------------------------------------------------------------- LoRA-DA


@given(problems(), st.booleans())
def test_lora_da_reaches_its_target_in_one_step_and_a_measured_fisher_shortens_rows(p, measured):
    """G = −ΔZ/σ²: BA = Δ with Y = 1/σ², for any Z, if rank Δ ≤ r. A spans Δ's rows in any case.

    Measured, g = −(Δx + ε)/σ² has E[g²] = (σ² + ΔZΔᵀ)/σ⁴, which divides a row by 1 + ΔZΔᵀ/σ².
    """
    change = p.change()
    Z = p.moment()
    sigma = p.positive(p.n_out)
    excess = np.zeros(p.n_out)
    if measured:
        excess = np.diag(change @ Z @ change.T) / sigma**2
    Y = (1 + excess) / sigma**2
    G = -change @ Z / sigma[:, None] ** 2
    B, A = compute(lora_da, G, Z, Y, p.rank, 1, variance=0, damping=0)
    assert near(B @ A, change / (1 + excess)[:, None], 1e-7)
    assert near(change @ row_projector(A), change, 1e-6)


def test_the_raw_gradient_misses_the_target_when_inputs_are_anisotropic():
    """A counterexample: Z stretches the one direction that did not change into the gradient."""
    change = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    Z = np.array(
        [
            [9.0, 3.0, 0.0],
            [3.0, 2.0, 0.0],
            [0.0, 0.0, 1.0],
        ]
    )
    G = -change @ Z
    Y = np.ones(2)
    exactly = {"variance": 0, "damping": 0}
    _, A = compute(lora_da, G, np.eye(3), Y, 1, 1, **exactly)
    missed = change - change @ row_projector(A)
    assert np.linalg.norm(missed) > 0.8 * np.linalg.norm(change)
    B, A = compute(lora_da, G, Z, Y, 1, 1, **exactly)
    assert near(B @ A, change)


@given(
    problems(),
    st.integers(1, 100),
    st.sampled_from([1, 7, math.inf]),
    st.sampled_from([0.0, 0.5, 10.0]),
    DAMPINGS,
)
def test_no_other_A_has_a_smaller_objective(p, n_train, n_fitted, variance, damping):
    """tr(AΩAᵀ) is least where AAᵀ = I; Ω = variance·(1/N + 1/M)·Σ(1/Yᵢ)·Z⁻¹ − DᵀD; BA = DAᵀA.

    D solves (diag(Y) ⊗ Z) vec D = −vec G, where Y and Z stand for C + damping·mean(diag C)·I.
    """
    G = p.matrix()
    Z = p.moment()
    Y = p.positive(p.n_out)
    if damping and p.n_out > 1:
        Y[0] = 0  # an output without a gradient
    counts = (n_train, n_fitted)
    options = {"variance": variance, "damping": damping}
    B, A = compute(lora_da, G, Z, Y, p.rank, *counts, **options)

    Y = Y + damping * np.mean(Y)
    Z = damped(Z, damping)
    hessian = np.kron(np.diag(Y), Z)
    delta = -np.linalg.solve(hessian, G.flatten()).reshape(G.shape)
    omega = guidance(Y, Z, delta, variance * (1 / n_train + 1 / n_fitted))
    room = 1e-8 * np.linalg.norm(omega)
    found = trace_within(A, omega)
    assert abs(found - least_trace(omega, p.rank)) <= room
    for size in (1e-2, 1e2):
        assert found <= trace_within(A + size * p.normal(*A.shape), omega) + room
    assert near(B @ A, delta @ row_projector(A), scale=np.linalg.norm(delta))


@given(problems(), DAMPINGS)
def test_the_features_are_white_and_as_large_as_plain_loras(p, damping):
    """A Z Aᵀ = c·I for the damped Z, where c = mean(diag Z)/3 is plain LoRA's mean of E(aᵀx)²."""
    G = p.matrix()
    Z = p.moment()
    Y = p.positive(p.n_out)
    _, da_A = compute(lora_da, G, Z, Y, p.rank, 1, damping=damping)
    _, cnt_A = compute(cntlora, G, Z, rank=p.rank, damping=damping)
    Z = damped(Z, damping)
    white = np.mean(np.diag(Z)) / 3 * np.eye(p.rank)
    assert near(da_A @ Z @ da_A.T, white)
    assert near(cnt_A @ Z @ cnt_A.T, white)


@given(problems(), st.integers(1, 3))
def test_the_objective_is_the_expected_error_of_the_fit_within_A(p, copies):
    """E‖W + Δ̂AᵀA − W*‖² = ‖Δ‖² + tr(AΩAᵀ): least squares on N given rows with noise σᵢ.

    Δ̂ = Δ + εᵀX(XᵀX)⁻¹ is linear in the noise ε, so its mean square is a sum over ε's entries.
    """
    X = np.tile(p.normal(p.n_in + 2, p.n_in), (copies, 1))  # (N, in)
    N = len(X)
    sigma = p.positive(p.n_out)
    change = p.change()
    Z = X.T @ X / N
    Y = sigma**-2
    fit_of_unit_noise = np.linalg.solve(X.T @ X, X.T)  # (in, N): row k's noise adds column k to Δ̂ᵢ
    omega = guidance(Y, Z, change, 1 / N)
    room = 1e-7 * (squared(change) + np.linalg.norm(omega))

    def expected_error(rows):
        projector = row_projector(rows)
        bias = squared(change @ projector - change)
        noise = sum(s**2 * squared(projector @ fit_of_unit_noise) for s in sigma)
        return bias + noise

    anywhere = p.orthogonal(p.n_in)[: p.rank]
    claimed = squared(change) + trace_within(anywhere, omega)
    assert abs(expected_error(anywhere) - claimed) <= room
    G = -Y[:, None] * change @ Z
    _, A = compute(lora_da, G, Z, Y, p.rank, N, damping=0)
    least = squared(change) + least_trace(omega, p.rank)
    assert abs(expected_error(A) - least) <= room


@given(problems(), st.integers(1, 50), st.integers(1, 50))
def test_with_M_rows_fitted_and_N_to_come_omega_is_unbiased(p, N, M):
    """E[Ω̂] = Ω = Σ(1/Yᵢ)/N·Z⁻¹ − ΔᵀΔ: in Ω̂ the noise weighs 1/N + 1/M, as E[DᵀD] has 1/M of it.

    D = Δ ± √in·(1/√Y) lₖᵀ, for the columns lₖ of a root of Z⁻¹/M, has the mean and the covariance
    of a fit to M rows. All these D under each other are one tall layer, whose Ω̂ is their sum.
    """
    Z = p.moment()
    Y = p.positive(p.n_out)
    noise = np.sum(1 / Y) * np.linalg.inv(Z)
    change = p.matrix()
    change *= math.sqrt(np.trace(noise) / N / change.size)
    fits = []
    for column in np.linalg.cholesky(np.linalg.inv(Z) / M).T:
        error = math.sqrt(p.n_in) * np.outer(Y**-0.5, column)
        fits += [change + error, change - error]
    Y = np.tile(Y, len(fits))
    delta = np.concatenate(fits)  # (fits · out, in)
    G = -Y[:, None] * delta @ Z
    _, A = compute(lora_da, G, Z, Y, p.rank, N, M, damping=0)
    omega = noise / N - change.T @ change
    lost = trace_within(A, omega) - least_trace(omega, p.rank)
    assert abs(lost) <= 1e-7 * np.linalg.norm(noise / N + noise / M)


@given(problems(), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_units_and_rotations_of_the_input_turn_A_with_them(p, unit, loss_unit):
    """x → cQx and loss → d·loss: A's span turns by Q, and BA becomes BA Qᵀ/(cd); Qᵀ = Q⁻¹."""
    G = p.matrix()
    Z = p.moment()
    Y = p.positive(p.n_out)
    Q = p.orthogonal(p.n_in)
    B, A = compute(lora_da, G, Z, Y, p.rank, 9, damping=0.1)
    other_G = unit * loss_unit * G @ Q.T
    other_Z = unit**2 * Q @ Z @ Q.T
    other_Y = loss_unit**2 * Y
    other_B, other_A = compute(lora_da, other_G, other_Z, other_Y, p.rank, 9, damping=0.1)
    Y = Y + 0.1 * np.mean(Y)
    Z = damped(Z, 0.1)
    delta = np.linalg.solve(Z, (G / Y[:, None]).T).T
    span = lowest_projector(guidance(Y, Z, delta, 1 / 9), p.rank)
    assert near(row_projector(other_A), Q @ span @ Q.T, 1e-6)
    assert near(unit * loss_unit * other_B @ other_A, B @ A @ Q.T, 1e-6)


# ---------------------------------------------------------------------------- HRP


@given(problems(), st.data())
def test_hrp_equals_the_svd_of_the_product(p, data):
    """A spans the top r right singular vectors of the dense B_high·A_high, AAᵀ = I, and B = 0."""
    high = data.draw(st.integers(p.rank, 12))
    B_high = p.normal(p.n_out, high)
    A_high = p.normal(high, p.n_in)
    product = B_high @ A_high
    B, A = compute(hrp, B_high, A_high, p.rank)
    assert np.array_equal(B, np.zeros((p.n_out, p.rank)))
    assert near(A @ A.T, np.eye(p.rank))
    assert near(A.T @ A, lowest_projector(-product.T @ product, p.rank), 1e-6)


@given(problems(), st.data())
def test_within_the_preheated_span_no_A_does_better_than_hrps(p, data):
    """A preheating that has converged: ‖Δ − BA‖² is least among the A within A_high's span.

    A span that contains another one leaves no more, and that of R = in leaves Eckart–Young's least.
    """
    change = p.matrix()
    directions = p.normal(p.n_in, p.n_in)
    high = data.draw(st.integers(p.rank, p.n_in))

    def preheated_A(A_high):
        B_high = np.linalg.lstsq(A_high.T, change.T)[0].T  # least ‖Δ − B_high·A_high‖
        return compute(hrp, B_high, A_high, p.rank)[1]

    def left(rows):
        return squared(change - change @ row_projector(rows))

    A_high = directions[:high]
    A = preheated_A(A_high)
    room = 1e-8 * squared(change)
    assert near(A @ row_projector(A_high), A, 1e-7)
    for size in (1e-2, 1e2):
        assert left(A) <= left(A + size * p.normal(p.rank, high) @ A_high) + room
    widest = left(preheated_A(directions))
    assert widest <= left(A) + room
    assert abs(widest - squared(singular_values(change)[p.rank :])) <= room


# ---------------------------------------------------------------------------- CNTLoRA


@given(problems())
def test_the_monge_map_carries_one_moment_to_the_other_and_no_other_map_moves_less(p):
    """T = Tᵀ ≻ 0 and T Z_f Tᵀ = Z_p; E‖Tx − x‖² is least among L_p Q L_f⁻¹, where QᵀQ = I.

    From moments in float32 it is as good as from the same numbers in float64.
    """
    Z_f = p.moment()
    Z_p = 3 * p.moment()
    T = compute(monge_map, Z_f, Z_p)
    L_f = np.linalg.cholesky(Z_f)
    L_p = np.linalg.cholesky(Z_p)
    room = 1e-8 * np.trace(Z_f + Z_p)

    def moved(map_):
        return squared((map_ - np.eye(p.n_in)) @ L_f)

    assert near(T, T.T)
    assert np.linalg.eigvalsh(T)[0] > 0
    assert near(T @ Z_f @ T.T, Z_p)
    ours = np.linalg.solve(L_p, T @ L_f)
    nearby = np.linalg.qr(ours + 0.01 * p.normal(p.n_in, p.n_in)).Q
    for Q in (p.orthogonal(p.n_in), nearby):
        assert moved(T) <= moved(L_p @ Q @ np.linalg.inv(L_f)) + room

    flat = np.outer(Z_p[0], Z_p[0])  # a moment of rank 1
    T = compute(monge_map, Z_f, flat)
    assert near(T @ Z_f @ T, flat, 1e-6)

    Z_f = Z_f.astype(np.float32)
    Z_p = Z_p.astype(np.float32)
    T = compute(monge_map, Z_f.astype(np.float64), Z_p.astype(np.float64))
    assert near(compute(monge_map, Z_f, Z_p), T, 1e-5)


@given(problems(), st.booleans(), DAMPINGS)
def test_output_moments_match(p, known, damping):
    """(W+ΔW) Z_f (W+ΔW)ᵀ = W Z_p Wᵀ for damped moments; without Z_p it is mean(diag Z_f)·I."""
    W = p.matrix()
    Z_f = p.moment()
    Z_p = 3 * p.moment()
    moments = [Z_f, Z_p] if known else [Z_f]
    B, A = compute(cntlora, W, *moments, rank=min(W.shape), damping=damping)
    Z_f = damped(Z_f, damping)
    white = np.mean(np.diag(Z_f)) * np.eye(p.n_in)
    Z_p = damped(Z_p, damping) if known else white
    adapted = W + B @ A
    assert near(adapted @ Z_f @ adapted.T, W @ Z_p @ W.T, 1e-6)


@given(problems())
def test_a_symmetric_distortion_is_undone_exactly(p):
    """x_f = S x_p, S = Sᵀ ≻ 0, rank(S − I) ≤ r, no damping: (W + BA) S = W. S = I asks for 0."""
    W = p.matrix()
    Z_p = p.moment()
    Q = p.orthogonal(p.n_in)[:, : p.rank]
    stretch = p.positive(p.rank) - 0.9 * p.random.integers(2)  # above −0.9
    stretch *= SPECTRA[p.spectrum](p.rank)
    S = np.eye(p.n_in) + Q * stretch @ Q.T
    Z_f = S @ Z_p @ S
    B, A = compute(cntlora, W, Z_f, Z_p, rank=p.rank, damping=0)
    assert near((W + B @ A) @ S, W, 1e-6)


@given(problems(), DAMPINGS)
def test_no_rival_factors_are_nearer(p, damping):
    """‖(ΔW − BA) L‖ is least at rank r, where L Lᵀ = Z_f: what an SVD of ΔW L leaves.

    ΔW = W(T − I), with T = Z_f^−½ (Z_f^½ Z_p Z_f^½)^½ Z_f^−½, another form of the least map.
    """
    W = p.matrix()
    Z_f = p.moment()
    Z_p = p.moment()
    B, A = compute(cntlora, W, Z_f, Z_p, rank=p.rank, damping=damping)
    half = root(damped(Z_f, damping))
    middle = root(half @ damped(Z_p, damping) @ half)
    T = np.linalg.inv(half) @ middle @ np.linalg.inv(half)
    weighted = (W @ T - W) @ half

    def left(B, A):
        return np.linalg.norm(weighted - B @ A @ half)

    room = 1e-7 * np.linalg.norm(W)
    least = np.linalg.norm(singular_values(weighted)[p.rank :])
    assert abs(left(B, A) - least) <= room
    for size in (1e-3, 1.0):
        other_B = B + size * p.normal(*B.shape)
        other_A = A + size * p.normal(*A.shape)
        assert left(B, A) <= left(other_B, other_A) + room


falling_lists = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@given(st.lists(falling_lists, min_size=2, max_size=3), st.data())
def test_no_other_spending_of_the_budget_leaves_less(lists, data):
    """Σ over layers of Σ_{k>r} σ_k² is least, Σ r = budget, each r ≥ 1: all ways are tried."""
    spectra = {f"layer {i}": torch.tensor(sorted(s, reverse=True)) for i, s in enumerate(lists)}
    lengths = [len(s) for s in lists]
    budget = data.draw(st.integers(len(lists), sum(lengths)))
    spent = allocate_ranks(spectra, budget)

    def left_out(ranks):
        pairs = zip(spectra.values(), ranks, strict=True)
        return sum(squared(array(s)[r:]) for s, r in pairs)

    ways = itertools.product(*(range(1, n + 1) for n in lengths))
    least = min(left_out(way) for way in ways if sum(way) == budget)
    assert list(spent) == list(spectra)
    assert sum(spent.values()) == budget
    assert min(spent.values()) >= 1
    assert left_out(spent.values()) == least


# ============================================================================ ENGINEERING


INITS = [init_lora_da, init_hrp, init_cntlora]


class Net(nn.Module):
    """Two layers on one input, a layer called twice, dropout, an in-place ReLU, checkpoints."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(3, 8)
        self.k = nn.Linear(3, 8)
        self.norm = nn.BatchNorm1d(8)
        self.twice = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)
        self.reentrant = None  # of the checkpoint, if there is one
        self.listed = None  # a list through which the head is reached, if there is one

    def middle(self, h):
        return self.twice(self.twice(h).tanh())

    def forward(self, x):
        h = nn.functional.relu_(self.q(x)) * self.k(x).sigmoid()
        h = self.norm(h.flatten(0, -2)).view(h.shape)
        if self.reentrant is None:
            h = self.middle(h)
        else:
            h = checkpoint(self.middle, h, use_reentrant=self.reentrant)
        head = self.listed[0] if self.listed else self.head
        return head(input=self.drop(h))


def mean_loss(model, batch):
    x, labels = batch
    return nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten())


def outputs(model, batch):
    assert not torch.is_grad_enabled()
    return model(batch[0])


def batches_of(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (sum(sizes),), generator=generator)
    return list(zip(x.split(sizes), labels.split(sizes), strict=True))


def fill(model):
    """Give every adapter random factors: calls must see the base model all the same."""
    for layer in lora_layers(model).values():
        B = torch.randn(layer.out_features, layer.rank)
        A = torch.randn(layer.rank, layer.in_features)
        layer.set_factors(B, A)


def shrunk(layer, args, y):
    return 0.7 * y


def adapted_net(seed=0):
    """A hook of the user's changes what an adapter returns, its thin term included."""
    torch.manual_seed(seed)
    model = Net().double()
    add_lora(model, 2, alpha=3)
    model.k.register_forward_hook(shrunk)
    fill(model)
    return model


class Merging(nn.Linear):
    """In eval mode it adds a part of its own to its weight, as loralib's layers do."""

    def train(self, mode=True):
        if mode != self.training:
            self.weight.data += -1 if mode else 1
        return super().train(mode)


def net_in_training():
    """Mixed modes, a frozen adapter, gradients, and a loss with its graph, which has no copy."""
    model = adapted_net()
    model.drop.eval()
    model.wrapped = nn.Sequential(model.drop)  # a second parent, in another mode
    model.merging = nn.ModuleList([Merging(1, 1), Merging(1, 1).eval()])
    for layer in model.merging:
        nn.init.ones_(layer.weight)
    model.k.requires_grad_(False)
    model.norm.requires_grad_(True)
    model.loss = mean_loss(model, batches_of(5)[0])
    model.loss.backward(retain_graph=True)
    return model


def collect(model, batches, loss_fn, **options):
    return collect_statistics(model, lora_layers(model), batches, loss_fn, **options)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def values(model):
    return [tensor.clone() for tensor in model.state_dict().values()]


def same_bits(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def snapshot(model):
    """All that a call has to leave as it was."""
    state = {"random numbers": torch.get_rng_state().tolist()}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.tolist()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        state[f"{name}: gradient"] = None if gradient is None else gradient.tolist()
        state[f"{name}: object"] = [id(parameter), parameter.data_ptr(), parameter.requires_grad]
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        hooks = list(module._forward_hooks.values())
        state[f"{name}: module"] = [id(module), module.training, scaling, hooks]
    return state


def changes(before, model):
    after = snapshot(model)
    return {key for key in before | after if before.get(key) != after.get(key)}


def assert_refused(message, call, model, *args, **options):
    """The call raises, and it leaves no trace in the model."""
    before = snapshot(model)
    with pytest.raises((KeyboardInterrupt, RuntimeError, TypeError, ValueError), match=message):
        call(model, *args, **options)
    assert changes(before, model) == set()


# ---------------------------------------------------------------------------- a wrapped layer


class Scaled(nn.Linear):
    def forward(self, input, scale=1.0):
        return scale * super().forward(input)


def test_the_layer_is_called_as_it_is_and_off_it_is_alone():
    """Its hooks and further arguments stay; then ΔW x is added, and with s = 0 nothing is."""
    linear = Scaled(4, 4)
    linear.register_forward_hook(lambda module, args, y: y.clamp(-0.1, 0.1))
    x = torch.randn(64, 4)
    expected = linear(x, scale=0.5)
    layer = LoRALinear(linear, 2, alpha=3)
    assert torch.equal(layer(x, scale=0.5), expected)
    assert "rank=2, scaling=1.5" in repr(layer)
    layer.set_factors(torch.ones(4, 2), torch.ones(2, 4))
    assert near(layer(x, 0.5), expected + 3 * x.sum(dim=1, keepdim=True), 1e-6)
    layer.lora_A.data.fill_(math.nan)
    layer.scaling = 0.0
    assert torch.equal(layer(input=x, scale=0.5), expected)


def test_a_weight_that_is_read_past_its_layer_is_adapted_and_trains(monkeypatch):
    """In eval mode PyTorch's encoder layer reads the weights and calls no layer."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert set(add_lora(model, 2)) == {"self_attn.out_proj", "linear1", "linear2"}
    fill(model)
    x = torch.randn(3, 5, 8)
    slow = model(x)
    assert model.linear1.weight.requires_grad
    monkeypatch.setattr(LoRALinear, "forward", None)  # a call would raise
    with torch.no_grad():
        assert near(model(x), slow, 1e-5)


def test_factors_are_copied_into_the_memory_that_others_hold_and_a_misfit_changes_nothing():
    """Another rank takes other memory. The Parameter objects stay."""
    layer = LoRALinear(nn.Linear(4, 3), 2)
    parameters = list(layer.parameters())
    held = layer.lora_A.detach()  # as by a worker, or by a CUDA graph
    layer.set_factors(torch.ones(2, 3).mT, torch.ones(4, 2).mT)
    assert torch.equal(held, torch.ones(2, 4))
    assert layer.lora_A.is_contiguous()  # a fused optimizer's state is written row by row
    assert layer.lora_B.is_contiguous()
    A = torch.ones(1, 4)
    B = torch.ones(3, 1)
    layer.set_factors(B, A)
    A.zero_()
    B.zero_()
    assert torch.equal(layer.delta_weight(), torch.ones(3, 4))
    for parameter, before in zip(layer.parameters(), parameters, strict=True):
        assert parameter is before
    for bad_B, bad_A, message in (
        (B, torch.ones(1, 5), r"A \(1, 5\) are not \(out, r\) and \(r, in\)"),
        (torch.ones(3, 2), A, r"B \(3, 2\) and A \(1, 4\)"),
        (B.double() + 1e39, A, "B .* holds NaN or Inf"),
        (B, A / 0, "A .* holds NaN or Inf"),
    ):
        assert_refused(message, LoRALinear.set_factors, layer, bad_B, bad_A)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_are_float32_at_least_and_the_sum_is_rounded_once(dtype):
    """y + s·B A x, in the layer's dtype. All numbers here are exact before the sum is rounded."""
    layer = LoRALinear(nn.Linear(4, 3, dtype=dtype), 2, alpha=1 / 32)
    for parameter in layer.parameters():
        parameter.data = torch.randint(-9, 10, parameter.shape).to(parameter)
    x = torch.randint(-9, 10, (64, 4)).to(dtype)
    thin = x.double() @ layer.delta_weight().double().mT
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_A.dtype == layer.lora_B.dtype == wide
    assert torch.equal(layer(x), (layer.base_layer(x).double() + thin).to(dtype))
    assert layer.merged().weight.dtype == dtype


def test_factors_on_the_meta_device_are_refused_and_get_their_numbers_by_to_empty():
    """A is uniform in ±1/√in and B is 0, as in a layer that was made in place.

    A layer that is offloaded leaves its adapter on the meta device: no number comes from there.
    """
    layer = LoRALinear(nn.Linear(99, 4, device="meta"), 2)
    assert layer(torch.ones(2, 99, device="meta")).shape == (2, 4)
    assert layer.weight.shape == (4, 99)
    layer.base_layer = nn.Linear(99, 4)
    x = torch.ones(2, 99)
    model = nn.Sequential(layer)
    for init in INITS:
        with pytest.raises(ValueError, match="layer '0'.*to_empty"):
            init(model, [x, x], lambda model, x: model(x).square().mean())
    with pytest.raises(ValueError, match=r"to_empty\(.*recurse=False\)"):
        layer(x)
    layer.to_empty(device="cpu", recurse=False)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert 0.9 < layer.lora_A.abs().max() * math.sqrt(99) < 1.0001
    layer.base_layer = nn.Linear(99, 4, device="meta")
    with pytest.raises(TypeError, match="on meta.*cannot be read"):
        layer.merged()
    fill(layer)
    expected = layer.delta_weight()
    assert near(layer.double().delta_weight(), expected, 1e-6)


# ---------------------------------------------------------------------------- adding and merging


class Pefts(nn.ModuleDict):
    def get_base_layer(self):
        return self["base_layer"]


def tiny():
    """Twelve layers, one under two names, a convolution, an adapter of PEFT's, a head, a scale.

    The user's own module has a child with the name that adapters give to theirs.
    """
    layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(12)])
    pefts = {"base_layer": nn.Linear(4, 4), "lora_A": nn.ModuleDict({"default": nn.Linear(4, 2)})}
    parts = {
        "layers": layers,
        "tied": layers[1],
        "conv": nn.Conv1d(6, 6, 1),
        "pefts": Pefts(pefts),
        "users": nn.ModuleDict({"base_layer": nn.Linear(6, 6)}),
        "head": nn.Linear(6, 4),
    }
    model = nn.ModuleDict(parts)
    model.scale = nn.Parameter(torch.ones(()))
    return model


def test_add_lora_takes_every_linear_layer_or_names_and_suffixes():
    assert set(add_lora(tiny(), 2, targets=["layers.1", "1"])) == {"layers.1"}  # and not layers.11
    model = tiny().eval()
    adapters = add_lora(model, 2, alpha=np.float64(8), targets="head")
    head = model["head"]
    assert adapters == lora_layers(model) == {"head": head}
    assert head.scaling == 4
    assert type(head.scaling) is float  # torch.load refuses NumPy's numbers
    assert not head.training
    head.lora_A.requires_grad_(False)
    others = add_lora(model, 1)
    assert set(others) == {*(f"layers.{i}" for i in range(12)), "users.base_layer"}
    factors = {f"{name}.lora_{letter}" for name in others for letter in "AB"}
    assert trainable(model) == {"head.lora_B", *factors}
    with pytest.raises(ValueError, match="to adapt .* ModuleDict"):
        add_lora(model, 1)
    two = nn.ModuleList([tiny(), tiny()])
    heads = add_lora(two, 2, targets="head")
    assert set(heads) == {"0.head", "1.head"}
    assert heads["0.head"].scaling == 1
    with pytest.raises(ValueError, match="to adapt .* Linear"):
        add_lora(nn.Linear(2, 2), 1)


def test_merge_lora_gives_the_same_function_in_plain_layers():
    model = tiny().double().eval()
    x = torch.randn(2, 6).double()
    bias = model["head"].bias
    add_lora(model, 2, alpha=3)
    fill(model)
    expected = model["head"](model["layers"](x))
    assert merge_lora(model) is model
    head = model["head"]
    assert near(head(model["layers"](x)), expected)
    assert model["tied"] is model["layers"][1]
    assert type(head) is nn.Linear
    assert head.bias.data_ptr() != bias.data_ptr()
    assert not head.training
    assert trainable(model) == set()
    with pytest.raises(ValueError, match="ModuleDict has no LoRALinear"):
        merge_lora(model)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["head", "heads"]}, "'heads' matches no .*'layers.0'"),
        ({"targets": ["head", "conv"]}, "'conv' matches no"),
        ({"targets": []}, "no linear layer is left to adapt .* ModuleDict"),
        ({"rank": 5}, r"layer 'head': rank 5 is not an int in 1\.\.4"),
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"alpha": math.inf}, "alpha inf"),
        ({"rank": 2.0}, "rank 2.0 is not an int"),
        ({"targets": ["head", "lazy"]}, "layer 'lazy': .*one batch"),
        ({"targets": ["head", "complex"]}, "layer 'complex': .*complex64"),
        ({"targets": ["head", "packed"]}, "layer 'packed': .*weight"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_nothing_changes(options, message):
    model = tiny()
    model["complex"] = nn.Linear(4, 4, dtype=torch.complex64)
    model["packed"] = nn.Linear(4, 4)
    del model["packed"].weight
    before = snapshot(model)
    model["lazy"] = nn.LazyLinear(4)
    with pytest.raises((ValueError, TypeError), match=message):
        add_lora(model, **{"rank": 2, "targets": ["layers.0", "head"], **options})
    for linear in (nn.Linear(2, 9), nn.Linear(9, 2)):
        with pytest.raises(ValueError, match=r"rank 3 is not an int in 1\.\.2"):
            LoRALinear(linear, 3)
    with pytest.raises(TypeError, match="complex64"):
        collect_statistics(model, {"complex": model["complex"]}, [], mean_loss)
    del model["lazy"]
    assert changes(before, model) <= {"random numbers"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int16])
def test_a_quantized_weight_is_refused_where_it_would_be_read(dtype):
    """W + ΔW of such a weight would be computed without its scale, and nothing would tell."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    linear = model[1]
    linear.weight = nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    linear.forward = lambda x: x + linear.bias  # a quantized layer has a way of its own
    add_lora(model, 2)
    x = torch.randn(9, 3)
    message = r"layer '1': Linear.*torch.*dequantize"
    assert_refused(message, merge_lora, model)
    assert_refused(message, init_cntlora, model, [(x,)], outputs, step=1)
    init_lora_da(model, [x], lambda model, x: model(x).square().mean(), step=1)
    assert model[1].lora_B.any()


class Halved(Tensor):
    """It holds half of the numbers that it means."""

    def dequantize(self):
        return 2 * self.as_subclass(Tensor)


def test_a_weight_that_can_be_dequantized_is_read_so():
    linear = nn.Linear(4, 3)
    W = linear.weight.detach()
    linear.weight = nn.Parameter((W / 2).as_subclass(Halved), requires_grad=False)
    layer = LoRALinear(linear, 2)
    fill(layer)
    merged = layer.merged()
    assert near(layer.base_weight, W, 1e-6)
    assert near(merged.weight, W + layer.delta_weight(), 1e-6)
    assert type(merged.weight) is nn.Parameter


# ---------------------------------------------------------------------------- bad arguments


torch.manual_seed(0)
W = torch.randn(2, 3).bfloat16().float()
Z = (W.mT @ W + torch.eye(3)).bfloat16().float()
GOOD = {
    lora_da: {
        "gradient": W,
        "input_moment": Z,
        "output_fisher": W[:, 0].abs(),
        "rank": 1,
        "n_train": 9,
    },
    hrp: {"B_high": W, "A_high": Z, "rank": 1},
    cntlora: {"weight": W, "input_moment": Z, "pretrain_moment": 2 * Z.diag().diag(), "rank": 1},
    monge_map: {"Z_f": Z, "Z_p": 2 * Z.diag().diag()},
    white_basis: {"B": W.mT, "A": W, "Z": Z},
}
TALL = {"gradient": W.mT, "input_moment": Z[:2, :2], "output_fisher": W[0].abs()}


@pytest.mark.parametrize(
    ("function", "bad", "message"),
    [
        (lora_da, {"rank": 3}, r"rank 3 is not an int in 1\.\.2"),
        (lora_da, {**TALL, "rank": 3}, r"rank 3 is not an int in 1\.\.2"),
        (lora_da, {"n_fitted": 0}, "n_fitted=0"),
        (lora_da, {"variance": -1}, "variance=-1"),
        (lora_da, {"variance": math.inf}, "variance=inf"),
        (lora_da, {"damping": -0.01}, "damping -0.01"),
        (lora_da, {"damping": math.inf}, "damping inf"),
        (lora_da, {"output_fisher": 0 * W[:, 0]}, "output_fisher is 0: .*no gradient"),
        (lora_da, {"output_fisher": torch.ones(1)}, r"output_fisher: .*\(1,\)"),
        (hrp, {"rank": 3}, r"in 1\.\.2"),
        (hrp, {"B_high": W[:, :1], "A_high": W[:1], "rank": 2}, r"in 1\.\.1"),
        (hrp, {"B_high": Z, "A_high": W.mT, "rank": 3}, r"in 1\.\.2"),
        (cntlora, {"rank": 3}, r"rank 3 is not an int in 1\.\.2"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(function, bad, message):
    with pytest.raises(ValueError, match=message):
        function(**{**GOOD[function], **bad})
    with pytest.raises(ValueError, match="layer 'x' .* holds NaN or Inf"):
        allocate_ranks({"x": W[0] / 0}, 1)


@pytest.mark.parametrize("function", GOOD)
def test_nan_and_what_is_no_real_number_are_refused_in_any_argument(function):
    arguments = GOOD[function]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            for bad in (value * math.nan, value / 0, value.to(torch.int8), value + 1j):
                with pytest.raises((ValueError, TypeError), match=f"{name} .*holds"):
                    function(**{**arguments, name: bad})


@pytest.mark.parametrize("function", GOOD)
def test_half_precision_is_computed_in_float32_without_autocast_or_a_graph(function):
    """In half precision a subspace or a square root would be off by percents."""
    exact = function(**GOOD[function])
    halves = dict(GOOD[function])
    for name, value in halves.items():
        if isinstance(value, Tensor):
            halves[name] = value.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        results = function(**halves)
    assert same_bits(results, exact)
    for result in results:
        assert result.dtype == torch.float32
        assert not result.requires_grad


def test_signatures_show_the_defaults_and_docstrings_through_the_decorators():
    for function, name, default in (
        (lora_da, "damping", 1.0),
        (init_lora_da, "damping", 1.0),
        (cntlora, "damping", 0.1),
        (init_cntlora, "damping", 0.1),
        (init_hrp, "preheat_rank", 64),
    ):
        assert inspect.signature(function).parameters[name].default == default
        assert function.__doc__


@pytest.mark.parametrize("init", INITS)
def test_a_single_batch_is_not_taken_for_a_list_of_batches(init):
    """A tensor would be taken row by row, and a dict key by key."""
    for batch in (torch.ones(9, 3), {"input_ids": torch.ones(9, 3)}):
        with pytest.raises(TypeError, match="put a single batch into a list"):
            init(adapted_net(), batch, mean_loss)


# ---------------------------------------------------------------------------- statistics


def means_row_by_row(model, x, labels):
    """The oracle: a backward pass of −log p for each row alone; (count, Z, G, Y) of each layer.

    A layer that is called twice has twice the rows, each of which weighs half in the means.
    """
    model = copy.deepcopy(model).eval()
    seen = {name: [] for name in lora_layers(model)}

    def keep(name, linear, args, y):
        y.retain_grad()
        seen[name].append((args[0], y))
        return y.clone()  # which the model may change in place

    for name, layer in lora_layers(model).items():
        layer.scaling = 0
        layer.base_layer.requires_grad_(True)
        layer.base_layer.register_forward_hook(partial(keep, name))
    for row, label in zip(x, labels, strict=True):
        mean_loss(model, (row[None], label[None])).backward()
    means = {}
    for name, pairs in seen.items():
        inputs = np.concatenate([array(row) for row, _ in pairs])
        calls = len(pairs) / len(x)
        g = calls * np.concatenate([array(y.grad) for _, y in pairs])
        n = len(inputs)
        Z = inputs.T @ inputs / n
        G = g.T @ inputs / n
        means[name] = (n, Z, G, np.mean(g**2, axis=0))
    return means


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(0, 99),
    st.sampled_from([0.6, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_statistics_are_per_row_means_of_what_counts(sizes, seed, share, flat, checkpoints):
    """Z, G and Y are means over single rows, however rows are batched, checkpoints or none.

    Masked rows leave no mark, whatever they hold. A mask (B, T) fits (B, T, in) and (B·T, in).
    """
    model = adapted_net(seed)
    x, labels = batches_of(sum(sizes), seed=seed)[0]
    mask = torch.rand(sum(sizes)) < share
    assume(all(part.any() for part in mask.split(sizes)))
    expected = means_row_by_row(model, x[mask], labels[mask])
    x = torch.where(mask[:, None], x, 1e6)
    labels = torch.where(mask, labels, -100)
    if checkpoints:
        model.reentrant = False
    parts = zip(x.split(sizes), labels.split(sizes), strict=True)
    batches = ((x if flat else x[None], labels[None]) for x, labels in parts)
    with torch.no_grad():
        actual = collect(model, batches, mean_loss, mask_fn=lambda batch: (batch[1] >= 0).int())
    assert list(actual) == list(expected)
    for name, (count, Z, G, Y) in expected.items():
        assert actual[name].count == count
        assert near(actual[name].input_moment, Z), name
        assert near(actual[name].gradient, G), name
        assert near(actual[name].output_fisher, Y), name


def one_by_one(layer, x):
    return torch.cat([layer(part) for part in x.split([1, 4, 2])])


def recurrence(layer, x):
    return layer(layer(layer(x).tanh()).tanh())


def twice(layer, x):
    return layer(x) * layer(x.cos())


def conditioned(layer, x):
    with torch.no_grad():
        first = layer(x)
    return layer(x + first)


@pytest.mark.parametrize(
    ("call", "count"), [(one_by_one, 7), (recurrence, 21), (twice, 14), (conditioned, 7)]
)
def test_the_gradient_is_autograds_however_a_layer_is_called(call, count):
    """G = ∂loss/∂W = Σ(∂loss/∂y)xᵀ. The rows that count are those with a gradient."""
    model = nn.Sequential(nn.Linear(3, 3)).double()
    batch = batches_of(7)[0]

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(call(model, batch[0]), batch[1])

    means = collect_statistics(model, {"0": model[0]}, [batch], loss_fn)["0"]
    (G,) = torch.autograd.grad(loss_fn(model, batch), model[0].weight)
    assert means.count == count
    assert near(means.gradient, G)


class Cutting(nn.Linear):
    """It passes no gradient on, as layers do that round their inputs."""

    def forward(self, x):
        return super().forward(x.detach())


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize("call", [collect, init_lora_da, init_hrp])
@pytest.mark.parametrize("targets", [["0"], None])
@pytest.mark.parametrize("hook", [None, lambda layer, args, y: y.requires_grad_()])
def test_a_layer_that_passes_no_gradient_on_is_named_where_gradients_are_taken(call, targets, hook):
    """The path around it hides it: layers before it would lack a part of their G, silently.

    So does a hook that lets the graph start again at its output.
    """
    model = nn.Sequential(nn.Linear(3, 3), Residual(nn.Linear(3, 3), Cutting(3, 3))).double()
    if hook:
        model[1][1].register_forward_hook(hook)
    add_lora(model, 2, targets=targets)
    batches = batches_of(9, 9)
    assert_refused(r"layer '1\.1", call, model, batches, mean_loss)
    init_cntlora(model, batches, mean_loss, step=1)  # takes none
    assert model[0].lora_B.any()


def test_a_module_that_is_no_linear_layer_may_stop_gradients():
    """As a codebook or a memory does, on purpose: G is still autograd's."""

    class Stop(nn.Module):
        def forward(self, x):
            return x.detach()

    model = nn.Sequential(nn.Linear(3, 3), Residual(Stop())).double()
    batch = batches_of(9)[0]
    (G,) = torch.autograd.grad(mean_loss(model, batch), model[0].weight)
    add_lora(model, 2)
    assert near(collect(model, [batch], mean_loss)["0"].gradient, G)


def test_a_factor_that_overflows_is_named_and_no_layer_has_changed():
    """The other layers' factors, step/s·B, are finite, and come first."""
    model = adapted_net()
    *_, (name, last) = lora_layers(model).items()
    last.scaling = 1e-30
    batches = batches_of(30)
    assert_refused(f"layer '{name}'", init_lora_da, model, batches, mean_loss, step=1e300)


@pytest.mark.parametrize("mask", [torch.ones(5), torch.ones(5, 2), -1e9 * torch.eye(2, 5), [1]])
def test_a_mask_that_does_not_fit_or_is_added_to_logits_is_refused(mask):
    """(5, 2) has as many numbers as (2, 5), but it would pick other rows."""
    x, labels = batches_of(10)[0]
    batch = (x.view(2, 5, 3), labels)
    with pytest.raises(ValueError, match="layer 'q': a mask|something else than a tensor of 0"):
        collect(adapted_net(), [batch], mean_loss, mask_fn=lambda batch: mask)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, b: m.q(b[0]).sum() + m.k(b[0].add_(1)).sum(), "'q': its input"),
        (lambda m, b: mean_loss(m, b).detach(), "a loss without a gradient"),
        (lambda m, b: mean_loss(m, b) * torch.ones(2), r"\(2,\), not a scalar"),
        (lambda m, b: mean_loss(m, b).item(), "float, not a scalar"),
        (lambda m, b: m.q(b[0]).sum() + 0 * len(m(b[0])), "'k': no row .* or no gradient"),
        (lambda m, b: mean_loss(m, (1e200 * b[0], b[1])), "'q': input_moment .* NaN or Inf"),
        (lambda m, b: setattr(m, "reentrant", True) or mean_loss(m, b), "use_reentrant=False"),
    ],
)
def test_a_loss_whose_statistics_would_be_wrong_is_refused(loss_fn, message):
    """An input changed in place, no gradient, no mean, a layer without effect, an overflow."""
    with pytest.raises((ValueError, RuntimeError), match=message):
        collect(adapted_net(), batches_of(5), loss_fn)


def test_half_precision_rows_are_summed_in_float32():
    """In bfloat16 the sum of 1,001 ones is 1,000."""
    model = nn.Sequential(nn.Linear(3, 2).bfloat16())
    x = torch.ones(1001, 3).bfloat16()

    def row_mean(model, x):
        return model(x).sum() / len(x)

    with torch.autocast("cpu", torch.bfloat16):
        actual = collect_statistics(model, {"0": model[0]}, [x, x], row_mean)["0"]
    assert torch.equal(actual.input_moment, torch.ones(3, 3))
    assert near(actual.output_fisher, torch.ones(2), 0.01)


# ---------------------------------------------------------------------------- whole models


MASK = {"mask_fn": lambda batch: batch[1] != batch[1][0]}  # labels can tell which rows count


@pytest.mark.parametrize(("n_train", "step"), [(None, 1), (50, 0.5), (None, 0)])
def test_lora_da_on_a_model_is_lora_da_on_its_statistics(n_train, step):
    """s·BA is step·BA of lora_da(G, Z, Y, N, M); M counts the rows, and so does N unless given."""
    model = adapted_net()
    batches = batches_of(4, 5)
    statistics = collect(model, batches, mean_loss, **MASK)
    options = {"variance": 3.0, "damping": 0.2}
    whole = {"n_train": n_train, "step": step, **options, **MASK}
    assert init_lora_da(model, iter(batches), mean_loss, **whole) == step
    for name, layer in lora_layers(model).items():
        means = statistics[name]
        M = means.count
        moments = (means.gradient, means.input_moment, means.output_fisher)
        B, A = lora_da(*moments, 2, n_train or M, M, **options)
        assert near(layer.delta_weight(), step * B @ A)
        assert near(layer.lora_A, A)


@pytest.mark.parametrize("old", [None, batches_of(9, seed=1)])
@pytest.mark.parametrize("rank_budget", [None, *range(4, 18)])
def test_cntlora_on_a_model_is_cntlora_on_its_moments(old, rank_budget, step=0.5):
    """s·BA is step·BA of cntlora(W, Z_f, Z_p), from forward passes alone.

    Ranks follow from the singular values of ΔW L, where L Lᵀ = Z_f; s stays.
    """
    model = net_in_training()
    new = batches_of(14, 16)
    assert not collect(model, new, outputs, backward=False)["q"].gradient.numel()
    statistics = [collect(model, source, mean_loss, **MASK) for source in (new, old or new)]
    options = {"pretrain_batches": old and iter(old), "step": step, "damping": 0.2, **MASK}
    init_cntlora(model, iter(new), outputs, rank_budget=rank_budget, **options)
    ranks = dict.fromkeys(statistics[0], 2)
    full = {}
    spectra = {}
    for name, layer in lora_layers(model).items():
        moments = [means[name].input_moment for means in statistics[: 2 if old else 1]]
        W = layer.base_weight
        full[name] = partial(cntlora, W, *moments, damping=0.2)
        B, A = full[name](rank=min(W.shape))
        weighted = array(B @ A) @ root(damped(array(moments[0]), 0.2))
        spectra[name] = torch.tensor(singular_values(weighted)[: min(W.shape)])
    if rank_budget:
        ranks = allocate_ranks(spectra, rank_budget)
    for name, layer in lora_layers(model).items():
        B, A = full[name](rank=ranks[name])
        assert layer.rank == ranks[name]
        assert near(layer.delta_weight(), step * B @ A, 1e-6)
        assert near(row_projector(layer.lora_A), row_projector(A), 1e-6)
        assert layer.scaling == 1.5
    mean_loss(model, new[0]).backward()


@pytest.mark.parametrize("preheat_rank", [2, 9])
def test_hrp_on_a_model_is_a_short_high_rank_training(preheat_rank):
    """Adam on B_high from 0, at s = 1, in eval mode; A_high is Kaiming-uniform from the seed."""
    model = adapted_net()
    oracle = copy.deepcopy(model).eval()
    batches = batches_of(4, 4, 4)
    model.reentrant = False
    init_hrp(model, batches, mean_loss, preheat_rank=preheat_rank, lr=0.1, seed=5)

    generator = torch.Generator().manual_seed(5)
    for layer in lora_layers(oracle).values():
        R = min(preheat_rank, layer.in_features, layer.out_features)
        uniform = torch.rand(R, layer.in_features, generator=generator)
        A_high = (2 * uniform - 1) / math.sqrt(layer.in_features)
        layer.set_factors(torch.zeros(layer.out_features, R), A_high)
        layer.scaling = 1
    optimizer = torch.optim.Adam([layer.lora_B for layer in lora_layers(oracle).values()], 0.1)
    for batch in batches:
        optimizer.zero_grad()
        mean_loss(oracle, batch).backward()
        optimizer.step()
    for name, layer in lora_layers(oracle).items():
        V_t = np.linalg.svd(array(layer.delta_weight())).Vh[:2]
        B = model.get_parameter(f"{name}.lora_B")
        A = array(model.get_parameter(f"{name}.lora_A"))
        assert not B.any()
        assert near(A.T @ A, V_t.T @ V_t, 1e-5)


# ---------------------------------------------------------------------------- the step


@pytest.mark.parametrize("init", [init_lora_da, init_cntlora])
@pytest.mark.parametrize("seed", range(3))
def test_the_step_is_the_best_of_the_grid_on_the_batch_held_out(init, seed):
    """The last batch chooses, by brute force over the grid; all other batches make the fit.

    On these batches the loss falls and then rises along the grid.
    """
    batches = batches_of(30, 30, 30, seed=seed)
    model = adapted_net(seed)
    step = init(model, iter(batches), mean_loss)

    def start(t):
        fitted = adapted_net(seed).eval()
        init(fitted, batches[:-1], mean_loss, step=t)
        return fitted

    def loss(t):
        return mean_loss(start(t), batches[-1]).item()

    grid = [4.0**k for k in range(-8, 3)]
    best = min([0.0, *grid], key=loss)
    assert step == min([best, best / 2, best * 2], key=loss)
    for found, expected in zip(values(model), values(start(step)), strict=True):
        assert near(found, expected)


@given(
    st.integers(0, 11).flatmap(lambda n: st.lists(st.integers(0, 1), min_size=n, max_size=n)),
    st.integers(1, 12),
    st.sampled_from([math.nan, math.inf]),
    st.sampled_from([math.floor, math.ceil]),
    st.sampled_from([-99, 99]),
)
@example(11 * [1], 12, math.nan, math.floor, -99)  # the longest step is the best one
@example(11 * [1], 12, math.nan, math.floor, 99)
@example([1] * 6 + [0, 0], 12, math.nan, math.floor, 99)  # the shortest of three equals
def test_the_search_finds_the_best_step_of_a_loss_that_falls_and_then_rises(
    falls, broken, nothing, neighbour, between
):
    """The loss of 0, 4⁻⁸ … 4²: weakly down, then up, and then no number, in 11 calls
    or, on plateaus, in 14 at most.

    Between two of these steps it is 99 below, or above, that of the shorter, or the longer, one. If
    below, the double of the best one, or its half, is better than it. A step of 16 or more is
    warned of.
    """
    losses = 99 - np.cumsum([0.0, *falls, *(11 - len(falls)) * [-1]])
    losses[broken:] = nothing
    least = losses[:broken].min()
    assume(least < losses[0] or np.sum(losses == least) == 1)
    x = torch.ones(1, 1)
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.zeros_(model[0].weight)  # so that y = ΔW
    add_lora(model, 1, alpha=4)
    tried = []

    def loss_at(t):
        place = max(0, 9 + math.log(max(t, 1e-9), 4))  # of t among 0, 4⁻⁸ … 4²
        if abs(place - round(place)) < 0.1:
            return losses[round(place)]
        return losses[min(11, neighbour(place))] + between

    def loss_fn(model, batch):
        y = model(x).sum()
        if batch is not None:
            return (y - 1).square()
        tried.append(y.item() / full)
        return torch.tensor(loss_at(tried[-1]))

    init_lora_da(model, [x], loss_fn, step=1)
    full = model[0].delta_weight().item()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        step = init_lora_da(model, [x, None], loss_fn)
    if between < 0:
        assert loss_at(step) == least - 99 * (step > 0)
    else:
        shortest = np.flatnonzero(losses == least)[0]
        assert step == (4.0 ** (shortest - 9) if shortest else 0)
    assert step == 0 or math.log2(step).is_integer()  # half a step of the walk, or twice it
    assert len(tried) <= (14 if 0 in falls else 11)
    assert all(t < 1e-9 or t > 4.0**-8.6 for t in tried)  # 0, or half of 4⁻⁸ and above
    assert model[0].delta_weight().item() == pytest.approx(step * full)
    assert len(heard) == (step >= 16)


def test_every_step_meets_the_same_random_numbers_and_the_search_draws_none():
    drawn = []

    def noisy_loss(model, batch):
        drawn.append(torch.rand(()))
        return mean_loss(model, batch)

    model = adapted_net()
    torch.manual_seed(0)
    init_lora_da(model, batches_of(30, 30, 30), noisy_loss)
    following = torch.rand(())
    torch.manual_seed(0)
    assert [*drawn[:2], following] == list(torch.rand(3))
    assert len({number.item() for number in drawn[2:]}) == 1


def test_a_start_says_what_it_does_to_those_who_listen(caplog):
    """At INFO: batch i of n, group j of m, and the loss of each step that was tried."""
    batches = batches_of(30, 30, 30)
    losses = []

    def loss_fn(model, batch):
        losses.append(mean_loss(model, batch))
        return losses[-1]

    start = partial(init_lora_da, batches=batches, loss_fn=loss_fn, layers_per_pass=2)
    start(adapted_net())
    assert not caplog.records
    losses.clear()
    caplog.set_level("INFO", "lora_init")
    start(adapted_net())
    for i, word in itertools.product((1, 2), ("batch", "group")):
        assert re.search(rf"{word}\D*{i}\D+2\b", caplog.text)
    numbers = np.array(re.findall(r"\d+\.\d+", caplog.text), dtype=float)
    for loss in losses[4:]:  # two batches for each of two groups come first
        assert np.abs(numbers / loss.item() - 1).min() < 1e-3


def test_the_log_tells_how_long_the_rest_will_take(caplog, monkeypatch):
    """After i of n batches (n − i)/i of the time so far."""
    now = 100

    def loss_fn(model, batch):
        nonlocal now
        now += 7
        return mean_loss(model, batch)

    monkeypatch.setattr(lora_init.time, "perf_counter", lambda: now)
    caplog.set_level("INFO", "lora_init")
    init_hrp(adapted_net(), batches_of(9, 9, 9, 9), loss_fn)
    assert re.findall(r"(\d+) s left", caplog.text) == ["21", "14", "7", "0"]


def test_the_loss_may_switch_an_adapter_off_if_it_puts_back_what_it_found():
    """As DPO does for its reference. Here the reference adds a constant, which changes nothing."""

    def preference(model, batch):
        found = model.head.scaling
        model.head.scaling = 0.0
        reference = mean_loss(model, batch).detach()
        model.head.scaling = found
        return mean_loss(model, batch) - reference

    steps = []
    for loss_fn in (mean_loss, preference):
        torch.manual_seed(0)
        model = Net().double()
        add_lora(model, 2, alpha=3, targets="head")
        steps.append(init_lora_da(model, 2 * batches_of(30), loss_fn))
    assert steps[0] == steps[1] > 0


class Pair(nn.Linear):
    """A linear layer of another signature, which has no adapter."""

    def forward(self, inputs):
        return super().forward(inputs[0])


@pytest.mark.parametrize("init", INITS)
def test_a_start_leaves_linear_layers_of_another_signature_alone(init):
    """They stand in the model, and it is no business of a start what they take."""
    model = nn.ModuleDict({"pair": Pair(3, 3), "net": adapted_net().float()})

    def loss_fn(model, batch):
        x, labels = batch
        return mean_loss(model["net"], (model["pair"]((x.float(), None)), labels))

    init(model, batches_of(40, 40), loss_fn)
    assert model["net"].q.lora_A.isfinite().all()


def test_hrp_preheats_float16_factors_in_float32():
    """Adam's 1e-8 is 0 in float16, so that a gradient of 0 would divide 0 by 0."""
    model = nn.Sequential(nn.Linear(3, 3))
    add_lora(model, 1)
    model[0].lora_A.data = model[0].lora_A.data.half()
    model[0].lora_B.data = model[0].lora_B.data.half()
    x = torch.randn(9, 3) * torch.tensor([1.0, 1.0, 0.0])
    init_hrp(model, [x, x], lambda model, x: model(x)[:, :2].square().mean(), preheat_rank=3)
    assert model[0].lora_A.isfinite().all()


def test_a_loss_may_collect_statistics_while_steps_are_tried():
    """What is lent to the adapters meanwhile is lent again afterwards."""
    batches = 2 * batches_of(40)  # held out is what was fitted, so that a step pays
    expected = adapted_net()
    model = adapted_net()

    def nested_loss(model, batch):
        collect(model, batches, mean_loss)
        return mean_loss(model, batch)

    step = init_lora_da(expected, batches, mean_loss)
    assert init_lora_da(model, batches, nested_loss) == step > 0
    assert near(model.q.delta_weight(), expected.q.delta_weight())


# ---------------------------------------------------------------------------- all or nothing


def interrupt(loss):
    raise KeyboardInterrupt("Ctrl-C")


@pytest.mark.parametrize("call", [collect, *INITS])
@pytest.mark.parametrize("spoil", [interrupt, lambda loss: loss * math.nan])
def test_a_call_that_fails_on_the_last_batch_leaves_no_trace(call, spoil):
    """Every tensor, mode, hook and flag stays; a NaN in the batch held out is no step of 0."""
    batches = batches_of(4, 4, 4)

    def failing_loss(model, batch):
        loss = mean_loss(model, batch)
        return spoil(loss) if batch is batches[-1] else loss

    assert_refused("Ctrl-C|the loss is nan", call, net_in_training(), batches, failing_loss)


def switch_off(model):
    model.k.scaling = 0.0


def add_an_unused_layer(model):
    model.unused = LoRALinear(nn.Linear(2, 2), 1)


def hide_the_head_in_a_list(model):
    model.listed = [model.head.base_layer]


def feed_zeros_to_the_head(model):
    model.drop.register_forward_hook(lambda module, args, h: h * 0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (merge_lora, "Net has no LoRALinear: call add_lora first"),
        (switch_off, "layer 'k': its adapter is off"),
        (add_an_unused_layer, "layer 'unused': .*no row reached it.* eval"),
        (hide_the_head_in_a_list, "layer 'head': .*no row reached it"),
        (
            feed_zeros_to_the_head,
            "layer '(head|q)': (all inputs are 0|B_high is 0|output_fisher is 0)",
        ),
    ],
)
def test_a_layer_that_cannot_be_started_is_named_and_no_other_changes(init, spoil, message):
    model = net_in_training()
    spoil(model)
    assert_refused(message, init, model, batches_of(5, 4), mean_loss)


def without_the_model(model, batch):
    return torch.ones((), requires_grad=True)


def without_labels_in_the_last(model, batch):
    return mean_loss(model, batch) * (len(batch[0]) == 5)


def certain(model, batch):
    return mean_loss(model, batch) * 1e-200


def coarse(model, batch):
    return mean_loss(model, batch).bfloat16()


def switching_on(model, batch):
    loss = mean_loss(model, batch)
    model.q.scaling = 1.5
    return loss


@pytest.mark.parametrize(
    ("init", "options", "message"),
    [
        (init_lora_da, {"n_train": 0}, "layer 'q': .*n_train=0"),
        (init_lora_da, {"loss_fn": without_the_model}, "layer 'q': no row reached it"),
        (init_lora_da, {"loss_fn": without_labels_in_the_last}, "every step has the same loss"),
        (init_lora_da, {"loss_fn": certain}, "layer 'q': .*too small"),
        (init_lora_da, {"loss_fn": coarse}, "float32"),
        (init_cntlora, {"loss_fn": switching_on}, "layer 'q'.* scaling"),
        (init_cntlora, {"step": -1}, "step -1 is not in"),
        (init_lora_da, {"step": math.inf}, "step inf is not in"),
        (init_cntlora, {"batches": batches_of(9)}, "number of batches is 1"),
        (init_lora_da, {"batches": [], "step": 1}, "layer 'q': no row reached it"),
        (init_lora_da, {"batches": batches_of(1, 9), "damping": 0}, "'q': .*positive-definite"),
        (init_cntlora, {"rank_budget": 3}, r"rank budget 3 is not in 4\.\.17"),
        (init_cntlora, {"rank_budget": 18}, r"rank budget 18 is not in 4\.\.17"),
        (init_cntlora, {"layers_per_pass": 0}, "layers_per_pass 0"),
        (init_cntlora, {"loss_fn": lambda m, b: mean_loss(m, b).item()}, "float, not a scalar"),
        (init_cntlora, {"loss_fn": lambda m, b: m(b[0])}, r"\(\d, 3\), not a scalar"),
        (init_hrp, {"preheat_rank": 1}, "layer 'q': preheat_rank=1 is below rank 2"),
        (init_hrp, {"batches": []}, "layer 'q': B_high is 0"),
    ],
)
def test_what_cannot_be_started_is_refused_and_nothing_changes(init, options, message):
    options = {"batches": batches_of(5, 4), "loss_fn": mean_loss, **options}
    assert_refused(message, init, net_in_training(), **options)


@pytest.mark.parametrize("init", INITS)
def test_a_start_changes_the_factors_alone_whatever_surrounds_it(init):
    """The loss may close over the model, and train a head of its own; inference mode is lifted.

    Until the loss was called for the last time, no factor has changed, moved or been replaced.
    """
    batches = batches_of(60, 60)
    model = net_in_training()
    before = snapshot(model)
    changed_inside = set()
    head = nn.Linear(3, 3, bias=False).double()
    nn.init.eye_(head.weight)
    torch.set_rng_state(torch.tensor(before["random numbers"], dtype=torch.uint8))

    def closing_loss(_, batch):
        changed_inside.update(changes(before, model))
        return mean_loss(nn.Sequential(model, head), batch)

    with torch.inference_mode():
        init(model, batches, closing_loss)
    factors = [f"{name}.lora_{letter}" for name in lora_layers(model) for letter in "AB"]
    gradients = [f"{name}: gradient" for name in factors if not name.startswith("k")]
    assert changed_inside.isdisjoint(factors)
    assert changed_inside.isdisjoint(f"{name}: object" for name in factors)
    assert changes(before, model) == {*factors, *gradients}  # of factors that are no more
    assert head.weight.grad is None
    expected = net_in_training()
    init(expected, batches, mean_loss)
    for name in factors:
        assert near(model.get_parameter(name), expected.get_parameter(name)), name
    mean_loss(model, batches[0]).backward()


def cntlora_with_old_batches(*args, **options):
    old = iter(batches_of(60, seed=1))  # can be read once only
    init_cntlora(*args, pretrain_batches=old, rank_budget=9, step=1, **options)


@pytest.mark.parametrize(("init", "passes"), [(init_lora_da, 1), (cntlora_with_old_batches, 2)])
def test_groups_of_layers_get_the_same_bits_and_hold_the_memory_of_one(init, passes, monkeypatch):
    """`layers_per_pass` is the number of statistics that are alive at once."""
    alive = weakref.WeakSet()
    numbers = []

    class Counted(lora_init.Statistics):
        def __init__(self, *args):
            super().__init__(*args)
            alive.add(self)
            numbers.append(len(alive))

    monkeypatch.setattr(lora_init, "Statistics", Counted)
    results = []
    for size in (4, 3, 1):
        model = adapted_net()
        numbers.clear()
        init(model, iter(batches_of(60, 60)), mean_loss, layers_per_pass=size)
        results.append(values(model))
        assert same_bits(results[0], results[-1])
        assert max(numbers) == passes * size
        assert len(numbers) == passes * 4


def test_a_star_import_gives_the_public_names_alone():
    names = {}
    exec("from lora_init import *", names)
    del names["__builtins__"]
    for name, value in names.items():
        assert value.__module__ == "lora_init", name
    assert {function.__name__ for function in (*GOOD, *INITS, add_lora)} <= names.keys()


# ---------------------------------------------------------------------------- two processes


STARTS = {
    "lora_da": partial(init_lora_da, layers_per_pass=1),
    "cntlora": init_cntlora,
    "hrp": partial(init_hrp, preheat_rank=3),
}
KINDS = ["whole", "sharded", "checkpointed", "bfloat16"]
SHARDS = batches_of(40, 70, 60, 30)  # the first process has 0 and 2, the second one 1 and 3


def sharded(kind):
    """The net with a part of each factor in each process (FSDP2)."""
    model = adapted_net()
    mesh = init_device_mesh("cpu", (2,))
    policy = fsdp.MixedPrecisionPolicy()
    if kind == "checkpointed":
        model.reentrant = False
    if kind == "bfloat16":
        policy = fsdp.MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32)
        model.norm = nn.Identity()
    for part in (model.twice, model.head, model):
        fsdp.fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def gathered(model):
    tensors = model.state_dict().values()
    return [t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for t in tensors]


def start_and_update(model, start, batches, loss_fn, batch):
    """The step, the state after the start, and that after an update of an older optimizer."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    step = start(model, batches, loss_fn)
    started = gathered(model)
    loss_fn(model.eval(), batch).backward()
    optimizer.step()
    return torch.tensor(step or 0.0), started, gathered(model)


def one_of_two(process, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    minutes = timedelta(minutes=2)
    distributed.init_process_group("gloo", store, minutes, world_size=2, rank=process)
    shards = SHARDS[process::2]
    results = {}
    for kind, (name, start) in itertools.product(KINDS, STARTS.items()):
        model = adapted_net() if kind == "whole" else sharded(kind)
        results[kind, name] = start_and_update(model, start, shards, mean_loss, shards[0])
    model = sharded("budget")
    before = gathered(model)
    with pytest.raises(ValueError, match="rank"):
        init_cntlora(model, shards, mean_loss, rank_budget=9)
    for layer in lora_layers(model).values():
        with pytest.raises(ValueError, match="sharded cannot change"):
            layer.set_factors(layer.lora_B.full_tensor()[:, :1], layer.lora_A.full_tensor()[:1])
    results["budget"] = before, gathered(model)
    torch.save(results, folder / f"{process}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{process}.pt", weights_only=True) for process in range(2)]


def mean_over_parts(model, parts):
    return sum(mean_loss(model, part) for part in parts) / len(parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STARTS)
def test_two_processes_end_with_the_same_bits_and_with_those_of_one(kind, name, two_processes):
    """Bit for bit on both, and to rounding what one process finds that sees all batches.

    The losses held out are added, and an update of HRP takes the mean gradient over both. Where
    each process holds a part of each factor, an older optimizer goes on as in one process.
    """
    (step, started, updated), (other_step, others, _) = (r[kind, name] for r in two_processes)
    assert step == other_step
    assert same_bits(started, others)
    for value in started:
        assert value.isfinite().all()
    if kind == "bfloat16":
        return
    batches = [SHARDS[:1], SHARDS[1:2], SHARDS[2:]]
    if name == "hrp":
        batches = [SHARDS[:2], SHARDS[2:]]
    expected = start_and_update(adapted_net(), STARTS[name], batches, mean_over_parts, SHARDS[:2])
    assert step == expected[0]
    for value, one in zip(started, expected[1], strict=True):
        assert near(value, one, 1e-6)
    if kind != "whole":
        for value, one in zip(updated, expected[2], strict=True):
            assert near(value, one, 1e-6)


def test_another_rank_is_refused_where_factors_are_sharded(two_processes):
    for results in two_processes:
        assert same_bits(*results["budget"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("init", INITS)
def test_a_start_on_a_gpu_is_that_on_a_cpu(init):
    """In float64 the same ΔW, and the same row space of A, on either device."""
    model = adapted_net()
    on_gpu = adapted_net().cuda()
    batches = batches_of(9, 9, 9)
    init(model, batches, mean_loss)
    init(on_gpu, [(x.cuda(), labels.cuda()) for x, labels in batches], mean_loss)
    for name, layer in lora_layers(model).items():
        other = on_gpu.get_submodule(name)
        assert other.lora_A.is_cuda
        assert near(other.delta_weight(), layer.delta_weight(), 1e-6, scale=1)
        assert near(row_projector(other.lora_A), row_projector(layer.lora_A), 1e-6)
