# SPDX-License-Identifier: MIT
"""What `lora_init.py` claims, checked: the theorems first, the engineering after them.

A theorem's test has the claim as its name and the equation as its docstring. Its oracle is NumPy in
float64, independent of the module: an SVD, an eigenvalue problem, a dense Kronecker system, brute
force. NumPy is in requirements.txt for this alone. Tolerances are relative to norms. Singular
vectors and eigenvectors have no sign, so subspaces are compared by their projectors. What is
claimed to be an optimum has to be as good as random rivals and as rivals nearby.
"""

import copy
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the matrices are small: threads wait for each other

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
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
)

torch.set_num_threads(1)
settings.register_profile("here", deadline=None, max_examples=50)
settings.load_profile("here")


# ============================================================================ THEOREMS


SPECTRA = {
    "falling": lambda rank: np.geomspace(1, 0.1, rank),
    "equal": np.ones,
    "deficient": lambda rank: np.append(np.ones(rank - 1), 0.0),
    "zero": np.zeros,
}


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


def orthonormal(A, tolerance=1e-8):
    """AAᵀ = I."""
    return near(array(A) @ array(A).T, np.eye(len(A)), tolerance)


def rotated(A, p, angle):
    """Orthonormal rows near those of A."""
    return np.linalg.qr(A.T + angle * p.normal(*A.T.shape)).Q.T


def row_projector(A):
    """The orthogonal projector on the span of A's rows."""
    Q = np.linalg.qr(array(A).T).Q
    return Q @ Q.T


def top_right_projector(matrix, rank):
    """The projector on the top right singular vectors, where a gap makes them unique."""
    _, S, V_t = np.linalg.svd(matrix)
    below = S[rank] if rank < len(S) else 0.0
    assume(S[rank - 1] - below > 1e-4 * S[0])
    return V_t[:rank].T @ V_t[:rank]


def filled_adapter(p, alpha=None):
    """An adapter in float64 with random factors."""
    layer = LoRALinear(nn.Linear(p.n_in, p.n_out, dtype=torch.float64), p.rank, alpha)
    B = torch.tensor(p.normal(p.n_out, p.rank))
    A = torch.tensor(p.normal(p.rank, p.n_in))
    layer.set_factors(B, A)
    return layer


# ---------------------------------------------------------------------------- the layer


@given(problems(), st.lists(st.integers(1, 3), max_size=3))
def test_a_fresh_adapter_leaves_the_function_unchanged(p, leading):
    """B = 0: bit for bit the outputs of the layer, for x (…, in) of any leading shape."""
    linear = nn.Linear(p.n_in, p.n_out, dtype=torch.float64)
    x = torch.tensor(p.normal(*leading, p.n_in))
    assert torch.equal(LoRALinear(linear, p.rank, alpha=2.0)(x), linear(x))


@given(problems())
def test_plain_lora_draws_A_uniformly_and_scales_by_one(p):
    """A ~ U(−1/√in, 1/√in), which is Kaiming-uniform with a = √5; no other number is drawn."""
    linear = nn.Linear(p.n_in, p.n_out, dtype=torch.float64)
    torch.manual_seed(0)
    layer = LoRALinear(linear, p.rank)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    uniform = torch.rand(p.rank, p.n_in, dtype=torch.float64)
    assert near(layer.lora_A, (2 * uniform - 1) / math.sqrt(p.n_in))
    assert torch.equal(state, torch.get_rng_state())
    assert layer.scaling == 1


@given(problems(), st.floats(0.1, 30))
def test_forward_delta_weight_and_merged_are_one_function(p, alpha):
    """y = (W + s·BA) x + b with s = alpha / r, also after factors of another rank."""
    layer = filled_adapter(p, alpha)
    x = p.normal(2, 3, p.n_in)
    for rank in (p.rank, 1, min(p.n_out, p.n_in)):
        B = p.normal(p.n_out, rank)
        A = p.normal(rank, p.n_in)
        layer.set_factors(torch.tensor(B), torch.tensor(A))
        delta = alpha / p.rank * np.einsum("or,ri->oi", B, A)
        dense = array(layer.base_layer.weight) + delta
        y = np.einsum("...i,oi->...o", x, dense) + array(layer.bias)
        assert near(layer(torch.tensor(x)), y)
        assert near(layer.delta_weight(), delta)
        assert near(layer.weight, dense)
        assert near(layer.merged()(torch.tensor(x)), y)
        assert layer.rank == rank


@given(problems(), st.floats(0.1, 30))
def test_gradients_are_those_of_the_dense_weight(p, alpha):
    """∂L/∂B = s·G Aᵀ and ∂L/∂A = s·Bᵀ G, where G = ∂L/∂(W + s·BA); here L = Σ sin y."""
    layer = filled_adapter(p, alpha)
    x = p.normal(5, p.n_in)
    y = layer(torch.tensor(x))
    y.sin().sum().backward()
    G = np.cos(array(y)).T @ x
    s = alpha / p.rank
    assert near(layer.lora_B.grad, s * G @ array(layer.lora_A).T)
    assert near(layer.lora_A.grad, s * array(layer.lora_B).T @ G)
    assert layer.base_layer.weight.grad is None
    assert layer.base_layer.bias.grad is None


# ---------------------------------------------------------------------------- LoRA-DA


@given(problems())
def test_lora_da_reaches_the_target_in_one_step(p):
    """Hessian diag(Y) ⊗ Z: G = −diag(Y) Δ Z, and BA = Δ for any Z and Y, if rank Δ ≤ r."""
    change = p.change()
    Z = p.moment()
    Y = p.positive(p.n_out)
    G = -Y[:, None] * change @ Z
    B, A = compute(lora_da, G, Z, Y, p.rank, 1, variance=0, damping=0)
    assert near(B @ A, change, 1e-7)


def test_the_raw_gradient_misses_the_target_when_inputs_are_anisotropic():
    """A counterexample: Z stretches the one direction that did not change into the gradient."""
    change = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    Z = np.array([[9.0, 3.0, 0.0], [3.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
    Y = np.ones(2)
    G = -change @ Z
    exactly = {"variance": 0, "damping": 0}
    _, A = compute(lora_da, G, np.eye(3), Y, 1, 1, **exactly)
    missed = change - change @ row_projector(A)
    assert np.linalg.norm(missed) > 0.8 * np.linalg.norm(change)
    B, A = compute(lora_da, G, Z, Y, 1, 1, **exactly)
    assert near(B @ A, change)


@given(
    problems(),
    st.integers(1, 100),
    st.sampled_from([0.0, 0.5, 1.0, 10.0]),
    st.sampled_from([0.0, 0.3]),
)
def test_no_other_orthonormal_A_has_a_smaller_objective(p, n_train, variance, damping):
    """tr(AΩAᵀ) is least, Ω = variance/N·Σ(1/Yᵢ)·Z⁻¹ − ΔᵀΔ; B = ΔAᵀ.

    Δ solves (diag(Y) ⊗ Z) vec Δ = −vec G, where Y and Z stand for C + damping·mean(diag C)·I.
    """
    G = p.normal(p.n_out, p.n_in)
    Z = p.moment()
    Y = p.positive(p.n_out)
    B, A = compute(lora_da, G, Z, Y, p.rank, n_train, variance=variance, damping=damping)

    Y = Y + damping * np.mean(Y)
    Z = damped(Z, damping)
    hessian = np.kron(np.diag(Y), Z)
    delta = -np.linalg.solve(hessian, G.flatten()).reshape(G.shape)
    noise = variance * np.sum(1 / Y) / n_train
    omega = noise * np.linalg.inv(Z) - delta.T @ delta
    room = 1e-8 * np.linalg.norm(omega)

    def objective(rows):
        return np.trace(rows @ omega @ rows.T)

    assert orthonormal(A)
    assert near(B, delta @ A.T, scale=np.linalg.norm(delta))
    least = np.linalg.eigvalsh(omega)[: p.rank].sum()
    assert abs(objective(A) - least) <= room
    assert objective(A) <= objective(p.orthogonal(p.n_in)[: p.rank]) + room
    assert objective(A) <= objective(rotated(A, p, 0.01)) + room


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
    omega = np.sum(1 / Y) / N * np.linalg.inv(Z) - change.T @ change
    room = 1e-7 * (squared(change) + np.linalg.norm(omega))

    def expected_error(rows):
        projector = rows.T @ rows
        bias = squared(change @ projector - change)
        noise = sum(s**2 * squared(projector @ fit_of_unit_noise) for s in sigma)
        return bias + noise

    anywhere = p.orthogonal(p.n_in)[: p.rank]
    claimed = squared(change) + np.trace(anywhere @ omega @ anywhere.T)
    assert abs(expected_error(anywhere) - claimed) <= room
    G = -Y[:, None] * change @ Z
    _, A = compute(lora_da, G, Z, Y, p.rank, N, damping=0)
    least = squared(change) + np.linalg.eigvalsh(omega)[: p.rank].sum()
    assert abs(expected_error(A) - least) <= room


@given(problems(), st.floats(0.1, 10))
def test_a_measured_fisher_shortens_rows_and_keeps_the_row_space(p, sigma):
    """E[gᵢ²] = (σ² + (ΔZΔᵀ)ᵢᵢ)/σ⁴ divides row i of Δ by 1 + (ΔZΔᵀ)ᵢᵢ/σ²; A still spans Δ's rows."""
    change = p.change()
    Z = p.moment()
    signal = np.diag(change @ Z @ change.T)
    Y = (sigma**2 + signal) / sigma**4  # g = −(Δx + ε)/σ², and ε has the variance σ²
    G = -change @ Z / sigma**2
    B, A = compute(lora_da, G, Z, Y, p.rank, 1, variance=0, damping=0)
    assert near(B @ A, change / (1 + signal / sigma**2)[:, None], 1e-6)
    assert near(change @ A.T @ A, change, 1e-6)


def test_weight_one_of_the_variance_cancels_the_noise_and_two_is_unbiased():
    """N rows give Δ̂: E[Δ̂ᵀΔ̂] = ΔᵀΔ + Σ(1/Yᵢ)/N·Z⁻¹, so E[Ω̂] = (variance − 1)·noise − ΔᵀΔ.

    Many fits are laid under each other as one tall layer, which takes the mean of Δ̂ᵀΔ̂ by itself.
    """
    random = np.random.default_rng(0)
    X = random.standard_normal((20, 4))
    Z = X.T @ X / 20
    change = np.outer([0.2, 0.2, 0.0], [1.0, 0.0, 0.0, -1.0])
    errors = random.standard_normal((4000, 3, 20)) @ X @ np.linalg.inv(X.T @ X)
    fits = (change + errors).reshape(-1, 4)  # (4000 fits · out, in)
    Y = np.ones(len(fits))
    noise = 3 / 20 * np.linalg.inv(Z)
    for variance in (1, 2, 3):
        _, A = compute(lora_da, -fits @ Z, Z, Y, 1, 20, variance=variance, damping=0)
        expected_omega = (variance - 1) * noise - change.T @ change
        lowest = np.linalg.eigh(expected_omega).eigenvectors[:, :1]
        assert near(A.T @ A, lowest @ lowest.T, 0.05)


@given(problems(), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_units_and_rotations_of_the_input_turn_A_with_them(p, unit, loss_unit):
    """x → cQx and loss → d·loss: A's span turns by Q, and BA becomes BA Qᵀ/(cd); Qᵀ = Q⁻¹."""
    G = p.normal(p.n_out, p.n_in)
    Z = p.moment()
    Y = p.positive(p.n_out)
    Q = p.orthogonal(p.n_in)
    fit = partial(compute, lora_da, rank=p.rank, n_train=1, variance=0)
    B, A = fit(G, Z, Y)
    other_G = unit * loss_unit * G @ Q.T
    other_Z = unit**2 * Q @ Z @ Q.T
    other_B, other_A = fit(other_G, other_Z, loss_unit**2 * Y)
    scaled_G = G / (Y + 0.1 * np.mean(Y))[:, None]
    span = top_right_projector(np.linalg.solve(damped(Z, 0.1), scaled_G.T).T, p.rank)
    assert near(A.T @ A, span, 1e-6)
    assert near(other_A.T @ other_A, Q @ span @ Q.T, 1e-6)
    assert near(unit * loss_unit * other_B @ other_A, B @ A @ Q.T, 1e-6)


WIDTH = 1100
PLACES = np.arange(WIDTH)
WIDE_SPECTRA = {
    "1/k": 1 / (PLACES + 1),
    "even": 1 - 0.99 * PLACES / WIDTH,
    "eight strong": np.where(PLACES < 8, 100.0, 1.0),
    "exponential": np.exp(-PLACES / 20) + 1e-6,
    "log-spaced": 10 ** (-4 * PLACES / WIDTH),
}


def mid_spectrum_signal(noise):
    """Δ (6, WIDTH) with twice the noise on six eigenvectors from the middle."""
    delta = np.zeros((6, WIDTH))
    middle = np.arange(6) + WIDTH // 2
    delta[np.arange(6), middle] = np.sqrt(2 * noise[middle])
    return delta


def random_signal(noise, strength):
    """Δ (6, WIDTH) with `strength` times the noise of the six quietest directions."""
    delta = np.random.default_rng(0).standard_normal((6, WIDTH))
    return delta * np.sqrt(strength * noise[:6].sum()) / np.linalg.norm(delta)


SIGNALS = {
    "none": partial(random_signal, strength=0.0),
    "weak": partial(random_signal, strength=0.1),
    "equal": partial(random_signal, strength=1.0),
    "strong": partial(random_signal, strength=100.0),
    "overwhelming": partial(random_signal, strength=1e6),
    "mid-spectrum": mid_spectrum_signal,
}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("damping", [0.1, 1e-3, 0.0])
@pytest.mark.parametrize("spectrum", WIDE_SPECTRA)
def test_wide_layers_come_within_one_per_cent_of_the_least_objective(spectrum, damping, signal):
    """tr(AΩAᵀ) − least ≤ 0.01·(‖Δ‖² + |least|) at n = 1100; that Z is diagonal is not used."""
    Z = WIDE_SPECTRA[spectrum]
    damped_Z = Z + damping * np.mean(Z)
    damped_Y = 1 + damping
    noise = 6 / damped_Y / damped_Z  # along each eigenvector of Z
    delta = SIGNALS[signal](noise)
    G = -damped_Y * delta * damped_Z
    B, A = compute(lora_da, G, np.diag(Z), np.ones(6), 6, 1, damping=damping)
    omega = np.diag(noise) - delta.T @ delta
    least = np.linalg.eigvalsh(omega)[:6].sum()
    lost = np.trace(A @ omega @ A.T) - least
    assert orthonormal(A)
    assert near(B, delta @ A.T, scale=np.linalg.norm(delta))
    assert lost <= 0.01 * (squared(delta) + abs(least))


def test_wide_layers_of_a_high_rank_are_exact():
    """Where Davidson's basis would fill half of the space, all eigenvectors are found."""
    random = np.random.default_rng(0)
    Z = WIDE_SPECTRA["1/k"]
    noise = 1 / Z
    delta = 0.03 * random.standard_normal((100, WIDTH)) * np.sqrt(noise.mean())
    _, A = compute(lora_da, -delta * Z, np.diag(Z), np.ones(100), 100, 100, damping=0)
    omega = np.diag(noise) - delta.T @ delta
    least = np.linalg.eigvalsh(omega)[:100].sum()
    assert orthonormal(A)
    assert np.trace(A @ omega @ A.T) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("rank", [1, 20, 100])
def test_wide_layers_reach_the_target_in_one_step(rank):
    """BA = Δ also where Davidson's method finds A, and where its basis would be too wide for it."""
    p = Problem(100, WIDTH, rank, 1e4, "falling", np.random.default_rng(0))
    change = p.change()
    Z = p.moment()
    B, A = compute(lora_da, -change @ Z, Z, np.ones(100), rank, 1, variance=0, damping=0)
    assert near(B @ A, change, 1e-7)


@given(problems())
def test_a_zero_gradient_leaves_the_variance_term_and_B_zero(p):
    """G = 0 and Y = 0: Ω ∝ Z⁻¹, so that A spans the widest directions of x."""
    Z = p.moment()
    G = np.zeros((p.n_out, p.n_in))
    Y = np.zeros(p.n_out)
    B, A = compute(lora_da, G, Z, Y, p.rank, 10)
    assert not B.any()
    assert near(A.T @ A, top_right_projector(Z, p.rank), 1e-6)


# ---------------------------------------------------------------------------- HRP


@given(problems(), st.data())
def test_hrp_equals_the_svd_of_the_product(p, data):
    """A spans the top r right singular vectors of the dense B_high·A_high, AAᵀ = I, and B = 0."""
    high = data.draw(st.integers(p.rank, 12))
    B_high = p.normal(p.n_out, high)
    A_high = p.normal(high, p.n_in)
    B, A = compute(hrp, B_high, A_high, p.rank)
    assert np.array_equal(B, np.zeros((p.n_out, p.rank)))
    assert orthonormal(A)
    assert near(A.T @ A, top_right_projector(B_high @ A_high, p.rank), 1e-6)


@given(problems(), st.data())
def test_within_the_preheated_span_no_A_does_better_than_hrps(p, data):
    """A preheating that has converged: ‖D − BA‖² is least among the A within A_high's span.

    A span that contains another one leaves no more, and that of R = in leaves Eckart–Young's least.
    """
    change = p.normal(p.n_out, p.n_in)
    directions = p.normal(p.n_in, p.n_in)
    high = data.draw(st.integers(p.rank, p.n_in))

    def preheated_A(A_high):
        B_high = np.linalg.lstsq(A_high.T, change.T)[0].T  # least ‖D − B_high·A_high‖
        return compute(hrp, B_high, A_high, p.rank)[1]

    def left(rows):
        return squared(change - change @ row_projector(rows))

    A_high = directions[:high]
    A = preheated_A(A_high)
    room = 1e-8 * squared(change)
    assert near(A @ row_projector(A_high), A, 1e-7)
    best = singular_values(change @ row_projector(A_high))[: p.rank]
    assert abs(left(A) - squared(change) + squared(best)) <= room
    assert left(A) <= left(p.normal(p.rank, high) @ A_high) + room
    assert left(A) <= left(A + 0.01 * p.normal(p.rank, high) @ A_high) + room
    widest = left(preheated_A(directions))
    assert widest <= left(A) + room
    least = squared(singular_values(change)[p.rank :])
    assert abs(widest - least) <= room


# ---------------------------------------------------------------------------- CNTLoRA


@given(problems())
def test_the_monge_map_carries_one_moment_to_the_other_and_no_other_map_moves_less(p):
    """T = Tᵀ ≻ 0 and T Z_f Tᵀ = Z_p; E‖Tx − x‖² is least among T′ = L_p Q L_f⁻¹, Q orthogonal."""
    Z_f = p.moment()
    Z_p = 3 * p.moment()
    T = compute(monge_map, Z_f, Z_p)
    L_f = np.linalg.cholesky(Z_f)
    L_p = np.linalg.cholesky(Z_p)
    room = 1e-8 * np.trace(Z_f + Z_p)

    def moved(map_):
        return squared((map_ - np.eye(p.n_in)) @ L_f)

    def rival(Q):
        return L_p @ Q @ np.linalg.inv(L_f)

    assert near(T, T.T)
    assert np.linalg.eigvalsh(T)[0] > 0
    assert near(T @ Z_f @ T.T, Z_p)
    ours = np.linalg.solve(L_p, T @ L_f)
    for Q in (p.orthogonal(p.n_in), rotated(ours, p, 0.01)):
        assert moved(T) <= moved(rival(Q)) + room


@given(problems(), st.booleans(), st.sampled_from([0.0, 0.2]))
def test_output_moments_match(p, known, damping):
    """(W+ΔW) Z_f (W+ΔW)ᵀ = W Z_p Wᵀ for damped moments; without Z_p it is mean(diag Z_f)·I."""
    W = p.normal(p.n_out, p.n_in)
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
    """x_f = S x_p, S = Sᵀ ≻ 0, rank(S − I) ≤ r, no damping: (W + BA) S = W."""
    W = p.normal(p.n_out, p.n_in)
    Z_p = p.moment()
    Q = p.orthogonal(p.n_in)[:, : p.rank]
    stretch = p.positive(p.rank) - 0.9 * p.random.integers(2)  # above −0.9
    S = np.eye(p.n_in) + Q * stretch @ Q.T
    B, A = compute(cntlora, W, S @ Z_p @ S, Z_p, rank=p.rank, damping=0)
    assert near((W + B @ A) @ S, W, 1e-6)


@given(problems())
def test_equal_moments_ask_for_no_change(p):
    """Z_f = Z_p gives ΔW = 0; white inputs stay white when they are rotated, QQᵀ = I."""
    W = p.normal(p.n_out, p.n_in)
    Z = p.moment()
    B, A = compute(cntlora, W, Z, Z, rank=p.rank)
    assert np.linalg.norm(B @ A) <= 1e-7 * np.linalg.norm(W)
    Q = p.orthogonal(p.n_in)
    B, A = compute(cntlora, W, Q @ Q.T, rank=p.rank)
    assert np.linalg.norm(B @ A) <= 1e-7 * np.linalg.norm(W)


@given(problems(), st.sampled_from([0.0, 0.2]))
def test_no_rival_factors_are_nearer(p, damping):
    """‖(ΔW − BA) L‖ is least at rank r, L Lᵀ = Z_f; A Z_f Aᵀ = I; ‖column k of B‖ = σ_k.

    ΔW = W(T − I), with T = Z_f^−½ (Z_f^½ Z_p Z_f^½)^½ Z_f^−½, another form of the least map.
    """
    W = p.normal(p.n_out, p.n_in)
    Z_f = p.moment()
    Z_p = p.moment()
    B, A = compute(cntlora, W, Z_f, Z_p, rank=p.rank, damping=damping)

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values) @ vectors.T

    Z_f = damped(Z_f, damping)
    Z_p = damped(Z_p, damping)
    half = root(Z_f)
    T = np.linalg.solve(half, root(half @ Z_p @ half)) @ np.linalg.inv(half)
    weighted = (W @ T - W) @ half
    spectrum = singular_values(weighted)
    left = np.linalg.norm(weighted - B @ A @ half)
    room = 1e-7 * np.linalg.norm(W)
    assert near(A @ Z_f @ A.T, np.eye(p.rank))
    columns = np.linalg.norm(B, axis=0)
    assert np.linalg.norm(columns - spectrum[: p.rank]) <= room
    assert abs(left - np.linalg.norm(spectrum[p.rank :])) <= room
    for size in (1e-3, 1.0):
        other_B = B + size * p.normal(*B.shape)
        other_A = A + size * p.normal(*A.shape)
        assert left <= np.linalg.norm(weighted - other_B @ other_A @ half) + room


falling_lists = st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 5.0]), min_size=1, max_size=4)


@given(st.lists(falling_lists, min_size=1, max_size=4), st.data())
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
    assert left_out(tuple(spent.values())) == least
    for wrong in (len(lists) - 1, sum(lengths) + 1):
        with pytest.raises(ValueError, match=f"budget {wrong}"):
            allocate_ranks(spectra, wrong)


# ============================================================================ ENGINEERING


INITS = [init_lora_da, init_hrp, init_cntlora]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Net(nn.Module):
    """Two layers on one input, a layer called twice, dropout, an in-place ReLU, checkpoints."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(3, 4)
        self.k = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.twice = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.reentrant = None  # of the checkpoint, if there is one
        self.calls = torch.zeros(1)  # neither a parameter nor a buffer

    def middle(self, h):
        return self.twice(self.twice(h).tanh())

    def forward(self, x):
        self.calls += 1
        h = nn.functional.relu_(self.q(x)) * self.k(x).sigmoid()
        h = self.norm(h.flatten(0, -2)).view(h.shape)
        if self.reentrant is None:
            h = self.middle(h)
        else:
            h = checkpoint(self.middle, h, use_reentrant=self.reentrant)
        return self.head(input=self.drop(h))


def mean_loss(model, batch):
    x = batch[0]
    labels = batch[1]
    return nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten())


def fill(model):
    """Give every adapter random factors: calls must see the base model all the same."""
    for layer in lora_layers(model).values():
        B = torch.randn(layer.out_features, layer.rank)
        A = torch.randn(layer.rank, layer.in_features)
        layer.set_factors(B, A)


def adapted_net(seed=0, device="cpu"):
    torch.manual_seed(seed)
    model = Net().to(device, torch.float64)
    add_lora(model, 2, alpha=3)
    fill(model)
    return model


def batches_of(*sizes, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64).to(device)
    labels = torch.randint(3, (sum(sizes),), generator=generator).to(device)
    return list(zip(x.split(sizes), labels.split(sizes), strict=True))


def collect(model, batches, loss_fn, **options):
    return collect_statistics(model, lora_layers(model), batches, loss_fn, **options)


def without_adapters(model):
    """A copy in eval mode with ΔW = 0."""
    model = copy.deepcopy(model).eval()
    for layer in lora_layers(model).values():
        layer.lora_B.data.zero_()
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def deltas(model):
    return {name: layer.delta_weight() for name, layer in lora_layers(model).items()}


def assert_same_deltas(model, other, tolerance=1e-8):
    for name, delta in deltas(other).items():
        assert near(deltas(model)[name], delta, tolerance), name


def values(model):
    return [tensor.clone() for tensor in model.state_dict().values()]


def same_bits(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


def snapshot(model):
    """All that a call has to leave as it was."""
    state = {"random numbers": torch.get_rng_state()}
    if isinstance(model, Net):
        state["calls"] = model.calls.clone()
    for name, tensor in model.state_dict().items():
        state[f"{name}: value"] = tensor.clone()
    for name, parameter in model.named_parameters():
        state[f"{name}: object"] = id(parameter)
        state[f"{name}: requires_grad"] = parameter.requires_grad
        state[f"{name}: gradient"] = copy.deepcopy(parameter.grad)
    for name, module in model.named_modules():
        state[f"{name}: object"] = id(module)
        state[f"{name}: mode"] = module.training
        state[f"{name}: scaling"] = getattr(module, "scaling", None)
        state[f"{name}: hooks"] = list(module._forward_hooks.values())
        state[f"{name}: backward hooks"] = list(module._backward_hooks.values())
    return state


def changes(before, model):
    after = snapshot(model)
    changed = [key for key in before if key not in after]
    for key, value in after.items():
        if isinstance(value, Tensor) and isinstance(before.get(key), Tensor):
            if not torch.equal(value, before[key]):
                changed.append(key)
        elif value != before.get(key):
            changed.append(key)
    return changed


# ---------------------------------------------------------------------------- a wrapped layer


def test_hooks_of_the_layer_stay():
    """A hook that clamps the layer's output clamps it under the adapter, and ΔW x is added."""
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, y: y.clamp(-0.1, 0.1))
    x = torch.randn(64, 4)
    expected = linear(x)
    layer = LoRALinear(linear, 2)
    assert torch.equal(layer(x), expected)
    layer.set_factors(torch.ones(4, 2), torch.ones(2, 4))
    assert near(layer(x), expected + 2 * x.sum(dim=1, keepdim=True), 1e-6)


def prune_half(linear):
    return prune.l1_unstructured(linear, "weight", amount=0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "reparametrize", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, prune_half]
)
def test_a_layer_that_computes_its_weight_starts_like_a_plain_one(reparametrize):
    """The same factors, function and merged layer as with the computed weight as a Parameter."""
    linear = reparametrize(nn.Linear(3, 4).double())
    plain = nn.Linear(3, 4).double()
    plain.weight.data = linear.weight.detach().clone()
    plain.bias.data = linear.bias.detach().clone()
    head = nn.Linear(4, 3).double()
    batches = batches_of(9, 9)
    model = nn.Sequential(linear, nn.Tanh(), head)
    oracle = nn.Sequential(plain, nn.Tanh(), copy.deepcopy(head))
    for either in (model, oracle):
        add_lora(either, 2)
        init_lora_da(either, batches, mean_loss, step=0.5)
    assert_same_deltas(model, oracle)
    assert trainable(model) == {"0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"}
    x = batches[0][0]
    expected = oracle(x)
    assert near(model(x), expected)
    assert near(merge_lora(model)(x), expected)


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(3, 4)

    def forward(self, x):
        return nn.functional.linear(x, self.q.weight, self.q.bias)


def test_a_weight_that_is_read_past_its_layer_is_adapted_and_trains():
    """F.linear(x, q.weight) computes (W + s·BA) x + b, with the gradients of A and B."""
    p = Problem(4, 3, 2, 10.0, "falling", np.random.default_rng(0))
    model = ReadsWeight()
    model.q = filled_adapter(p, alpha=3)
    x = torch.tensor(p.normal(5, 3))
    model(x).sin().sum().backward()
    through_weight = [model.q.lora_A.grad, model.q.lora_B.grad]
    model.zero_grad()
    assert near(model(x), model.q(x))
    model.q(x).sin().sum().backward()
    assert near(through_weight[0], model.q.lora_A.grad)
    assert near(through_weight[1], model.q.lora_B.grad)


def test_multihead_attention_reads_its_adapted_out_proj():
    model = nn.MultiheadAttention(6, 2).double()
    x = torch.randn(5, 1, 6).double()
    add_lora(model, 2, targets="out_proj")
    fill(model)
    y, _ = model(x, x, x)
    y.sin().sum().backward()
    assert model.out_proj.lora_A.grad.any()
    assert model.out_proj.lora_B.grad.any()
    merged_y, _ = merge_lora(model)(x, x, x)
    assert near(y, merged_y)
    with pytest.raises(
        ValueError, match="'out_proj': no row reached it, or no gradient. Are there"
    ):
        collect_statistics(
            model, {"out_proj": model.out_proj}, [x], lambda m, x: m(x, x, x), backward=False
        )


def test_the_encoder_layers_fast_path_equals_its_slow_path(monkeypatch):
    """In eval mode PyTorch reads the weights and calls no layer, whatever size the factors have."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert set(add_lora(model, 2)) == {"self_attn.out_proj", "linear1", "linear2"}
    fill(model)
    x = torch.randn(3, 5, 8)
    slow = model(x)
    monkeypatch.setattr(LoRALinear, "forward", None)  # a call would raise
    with torch.no_grad():
        fast = model(x)
    assert near(fast, slow, 1e-5)


def test_a_layer_that_is_off_is_its_base_layer_alone():
    layer = LoRALinear(nn.Linear(4, 3), 2)
    x = torch.randn(5, 4)
    layer.lora_A.data.fill_(math.nan)
    layer.scaling = 0.0
    assert torch.equal(layer(x), layer.base_layer(x))


def test_factors_keep_their_parameters_and_a_misfit_changes_nothing():
    """An optimizer that was made before a start still holds the adapter."""
    layer = LoRALinear(nn.Linear(4, 3), 2)
    parameters = [layer.lora_A, layer.lora_B]
    layer.lora_A.requires_grad_(False)
    A = torch.ones(1, 4)
    B = torch.ones(3, 1)
    layer.set_factors(B, A)
    A.zero_()
    B.zero_()
    assert layer.lora_A is parameters[0]
    assert layer.lora_B is parameters[1]
    assert torch.equal(layer.lora_A, torch.ones(1, 4))
    assert torch.equal(layer.lora_B, torch.ones(3, 1))
    assert not layer.lora_A.requires_grad
    assert layer.lora_B.requires_grad
    with pytest.raises(ValueError, match="rank 4 is not a whole number in"):
        LoRALinear(nn.Linear(4, 3), 4)
    before = snapshot(layer)
    misfits = [
        (torch.ones(3, 2), torch.ones(1, 4), r"B has shape \(3, 2\), expected \(3, 1\)"),
        (torch.ones(3, 1), torch.ones(1, 5), r"A has shape \(1, 5\), expected \(1, 4\)"),
        (torch.ones(1, 4), torch.ones(3, 1), r"A has shape \(3, 1\), expected \(3, 4\)"),
        (torch.ones(3, 4), torch.ones(4, 4), r"rank 4 is not a whole number in 1\.\.3"),
        (torch.ones(3, 1) / 0, torch.ones(1, 4), r"B \(3, 1\) holds NaN or Inf"),
        (torch.ones(3, 1), torch.ones(1, 4) * math.nan, r"A \(1, 4\) holds NaN or Inf"),
        (torch.ones(3, 1).double() * 1e39, torch.ones(1, 4), r"B \(3, 1\) holds NaN or Inf"),
    ]
    for B, A, message in misfits:
        with pytest.raises(ValueError, match=message):
            layer.set_factors(B, A)
        assert changes(before, layer) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_factors_are_float32_at_least_and_the_output_keeps_its_dtype(dtype):
    linear = nn.Linear(4, 3, dtype=dtype)
    layer = LoRALinear(linear, 2)
    x = torch.ones(2, 4, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_A.dtype == wide
    assert layer.lora_B.dtype == wide
    assert layer(x).dtype == dtype
    assert layer.weight.dtype == dtype
    assert layer.merged().weight.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype


# ---------------------------------------------------------------------------- adding and merging


class Tiny(nn.Module):
    """Twelve layers, one of them under two names, a convolution and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(12)])
        self.tied = self.layers[1]
        self.conv = nn.Conv1d(6, 6, 1)
        self.head = nn.Linear(6, 4)


def test_add_lora_takes_every_linear_layer_or_names_and_suffixes():
    all_names = {"head", *[f"layers.{i}" for i in range(12)]}
    assert set(add_lora(Tiny(), 2)) == all_names
    assert set(add_lora(Tiny(), 2, targets=["layers.1", "1"])) == {"layers.1"}  # and not layers.11
    model = Tiny().eval()
    adapters = add_lora(model, np.int64(2), alpha=8, targets="head")
    assert adapters == lora_layers(model) == {"head": model.head}
    assert model.head.scaling == 4
    assert not model.head.training
    assert trainable(model) == {"head.lora_A", "head.lora_B"}


def test_every_linear_layer_means_linear_layers_alone():
    """A convolution may share the last part of a linear layer's name."""
    patches = nn.ModuleDict({"proj": nn.Conv1d(4, 4, 1)})
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "patches": patches})
    assert set(add_lora(model, 2)) == {"proj"}
    with pytest.raises(TypeError, match="Conv1d is not an nn.Linear"):
        LoRALinear(patches["proj"], 2)
    with pytest.raises(TypeError, match="layer 'patches.proj': .*Conv1d is not an nn.Linear"):
        collect_statistics(model, {"patches.proj": patches["proj"]}, [], mean_loss)


def test_the_parts_of_a_layer_are_no_targets():
    """A parametrized layer "0" holds modules named "….0"; an adapter of PEFT's holds three."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert set(add_lora(model, 2, targets=["0"])) == {"0"}
    theirs = nn.ModuleDict({"base_layer": nn.Linear(4, 4), "lora_A": nn.Linear(4, 2)})
    model = nn.ModuleDict({"q": theirs, "k": nn.Linear(4, 4)})
    assert set(add_lora(model, 2)) == {"k"}


def test_only_the_adapters_factors_train_whatever_the_names():
    model = nn.ModuleDict({"lora_model": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
    add_lora(model, 2)
    assert trainable(model) == {"lora_model.0.lora_A", "lora_model.0.lora_B"}


def test_a_second_add_lora_leaves_the_first_adapters_as_they_were():
    model = Tiny()
    add_lora(model, 2, targets=["layers.0"])
    first = model.layers[0]
    first.lora_A.requires_grad_(False)
    add_lora(model, 1, targets=["head"])
    assert model.layers[0] is first
    assert trainable(model) == {"layers.0.lora_B", "head.lora_A", "head.lora_B"}
    assert "head" not in add_lora(model, 1)
    with pytest.raises(ValueError, match="to adapt in Tiny; .*'layers.0', .*'head'"):
        add_lora(model, 1)
    with pytest.raises(ValueError, match="to adapt in Linear"):
        add_lora(nn.Linear(2, 2), 1)


def test_merge_lora_gives_the_same_function_in_plain_layers():
    model = Tiny().double().eval()
    x = torch.randn(2, 6).double()
    add_lora(model, 2, alpha=3)
    fill(model)
    assert model.tied is model.layers[1]
    expected = model.head(model.layers(x))
    bias = model.head.bias
    assert merge_lora(model) is model
    assert near(model.head(model.layers(x)), expected)
    assert type(model.head) is nn.Linear
    assert (model.head.in_features, model.head.out_features) == (6, 4)
    assert model.head.bias.data_ptr() != bias.data_ptr()
    assert model.tied is model.layers[1]
    assert not model.head.training
    assert trainable(model) == set()
    with pytest.raises(TypeError, match="itself a LoRALinear: call its merged"):
        merge_lora(LoRALinear(nn.Linear(2, 2), 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": ["head", "heads"]}, ValueError, "'heads' matches no layer; .*'layers.0'"),
        ({"targets": []}, ValueError, "no linear layer to adapt in Tiny"),
        ({"targets": ["head", "conv"]}, TypeError, r"layer 'conv': .*\.Conv1d is not an nn.Linear"),
        ({"targets": ["layers"]}, TypeError, r"layer 'layers': .*\.Sequential is not"),
        ({"rank": 5}, ValueError, r"layer 'head': rank 5 is not a whole number in 1\.\.4"),
        ({"rank": 2.0}, ValueError, "layer 'layers.0': rank 2.0"),
        ({"rank": 0}, ValueError, "layer 'layers.0': rank 0"),
        ({"alpha": 0.0}, ValueError, "alpha 0.0"),
        ({"alpha": math.inf}, ValueError, "alpha inf"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name_and_nothing_changes(options, error, message):
    model = Tiny()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        add_lora(model, **{"rank": 2, "targets": ["layers.0", "head"], **options})
    assert changes(before, model) == []


# ---------------------------------------------------------------------------- bad arguments


ONES = torch.ones(2, 3)
EYE = torch.eye(3)
GOOD = {
    lora_da: {
        "gradient": ONES,
        "input_moment": EYE,
        "output_fisher": torch.ones(2),
        "rank": 1,
        "n_train": 1,
    },
    hrp: {"B_high": ONES, "A_high": EYE, "rank": 1},
    cntlora: {"weight": ONES, "input_moment": EYE, "pretrain_moment": EYE, "rank": 1},
    monge_map: {"Z_f": EYE, "Z_p": EYE},
    allocate_ranks: {"spectra": {"x": torch.ones(2)}, "budget": 1},
}


@pytest.mark.parametrize(
    ("function", "bad", "message"),
    [
        (lora_da, {"rank": 3}, r"rank 3 is not a whole number in 1\.\.2"),
        (lora_da, {"gradient": ONES.mT, "rank": 3}, r"rank 3 is not a whole number in 1\.\.2"),
        (lora_da, {"n_train": 0}, "n_train 0 is below 1"),
        (lora_da, {"variance": -1}, "variance -1 is not in"),
        (lora_da, {"variance": math.inf}, "variance inf"),
        (lora_da, {"damping": -0.01}, "damping -0.01 is not in"),
        (lora_da, {"input_moment": torch.eye(2)}, r"moment .*\(2, 2\), expected \(3, 3\)"),
        (lora_da, {"output_fisher": torch.ones(1)}, r"shape \(1,\), expected \(2,\)"),
        (lora_da, {"input_moment": 0 * EYE}, r"input_moment \(3, 3\) is not positive definite"),
        (lora_da, {"output_fisher": torch.arange(2), "damping": 0}, "output_fisher .* positive"),
        (hrp, {"A_high": ONES}, r"A_high has shape \(2, 3\), expected \(3, 3\)"),
        (hrp, {"rank": 3}, r"rank 3 is not a whole number in 1\.\.2"),
        (hrp, {"B_high": ONES[:, :1], "A_high": ONES[:1], "rank": 2}, r"in 1\.\.1"),
        (hrp, {"B_high": 0 * ONES}, r"B_high \(2, 3\) is 0, so no gradient reached"),
        (cntlora, {"rank": 0}, "rank 0"),
        (cntlora, {"weight": ONES.mT, "rank": 3}, r"rank 3 is not a whole number in 1\.\.2"),
        (cntlora, {"input_moment": torch.eye(2)}, r"input_moment has shape \(2, 2\)"),
        (cntlora, {"pretrain_moment": torch.ones(3)}, r"pretrain_moment has shape \(3,\)"),
        (cntlora, {"damping": math.inf}, "damping inf"),
        (monge_map, {"Z_p": torch.eye(2)}, r"Z_p has shape \(2, 2\), expected \(3, 3\)"),
        (monge_map, {"Z_f": ONES}, r"Z_f has shape \(2, 3\), expected \(2, 2\)"),
        (monge_map, {"Z_p": -EYE}, r"Z_p \(3, 3\) is not positive definite"),
        (allocate_ranks, {"spectra": {"x": ONES[0] / 0}}, "layer 'x' .* holds NaN or Inf"),
    ],
)
def test_numbers_and_shapes_out_of_range_are_refused(function, bad, message):
    with pytest.raises(ValueError, match=message):
        function(**{**GOOD[function], **bad})


@pytest.mark.parametrize("function", [lora_da, hrp, cntlora, monge_map])
def test_nan_and_inf_in_any_argument_are_named_and_so_is_what_is_no_tensor(function):
    arguments = GOOD[function]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            for bad in (math.nan, math.inf):
                with pytest.raises(ValueError, match=f"{name} .* holds NaN or Inf"):
                    function(**{**arguments, name: value * bad})
    with pytest.raises(TypeError, match="is a NoneType, not a tensor"):
        function(**{**arguments, next(iter(arguments)): None})


def all_functions(G, Z):
    """What the algorithms make of G (4, 3) and Z (3, 3)."""
    return [
        *lora_da(G, Z, torch.ones(4).to(G), np.int64(2), 9),
        *hrp(G, Z, 2),
        *cntlora(G, Z, 2 * Z, rank=2),
        *cntlora(G, Z, rank=2),
        monge_map(Z, 2 * Z),
    ]


def test_half_precision_is_computed_in_float32_without_autocast_or_a_graph():
    """In half precision a subspace, a square root or a Newton step would be off by percents."""
    torch.manual_seed(0)
    G = torch.randn(4, 3).bfloat16()
    Z = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    expected = all_functions(G.float(), Z)
    from_half = all_functions(G.requires_grad_(), Z.bfloat16())
    assert same_bits(from_half, expected)
    assert not any(result.requires_grad for result in from_half)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(all_functions(G, Z), expected)


def test_wide_layers_get_the_same_bits_each_time_in_the_callers_precision():
    Z = torch.diag(torch.linspace(1, 2, WIDTH))
    G = torch.ones(2, WIDTH)
    state = torch.get_rng_state()
    B, A = lora_da(G, Z, torch.ones(2), 2, 1)
    again = lora_da(G, Z, torch.ones(2), 2, 1)
    assert same_bits([B, A], again)
    assert torch.equal(state, torch.get_rng_state())
    assert A.dtype == torch.float32
    assert orthonormal(A, 1e-5)


def test_what_is_left_out_is_what_the_pages_say():
    whole = {"damping": 0.1, "step": None, "mask_fn": None, "layers_per_pass": None}
    expected = {
        lora_da: {"variance": 1.0, "damping": 0.1},
        cntlora: {"damping": 0.1},
        init_lora_da: {"variance": 1.0, "n_train": None, **whole},
        init_hrp: {"preheat_rank": 64, "lr": 0.01, "train_A": False, "seed": 0},
        init_cntlora: {"pretrain_batches": None, "rank_budget": None, **whole},
        collect_statistics: {"backward": True, "mask_fn": None},
    }
    for function, defaults in expected.items():
        assert inspect.unwrap(function).__kwdefaults__ == defaults


# ---------------------------------------------------------------------------- statistics


def means_row_by_row(model, x, labels):
    """The oracle: a backward pass of −log p for each row alone, then means over these rows."""
    model = without_adapters(model).requires_grad_(True)
    seen = {name: [] for name in lora_layers(model)}

    def keep(name, linear, args, y):
        y.retain_grad()
        seen[name].append((args[0], y))
        return y.clone()  # which the model may change in place

    for name, layer in lora_layers(model).items():
        layer.base_layer.register_forward_hook(partial(keep, name))
    for row, label in zip(x, labels, strict=True):
        mean_loss(model, (row[None], label[None])).backward()
    means = {}
    for name, pairs in seen.items():
        inputs = np.concatenate([array(row) for row, _ in pairs])
        g = np.concatenate([array(y.grad) for _, y in pairs])
        means[name] = SimpleNamespace(
            count=len(inputs),
            input_moment=inputs.T @ inputs / len(inputs),
            gradient=g.T @ inputs / len(inputs),
            output_fisher=np.mean(g**2, axis=0),
        )
    return means


def assert_same_statistics(actual, expected, tolerance=1e-9):
    assert list(actual) == list(expected)
    for name, means in expected.items():
        assert actual[name].count == means.count, name
        for field in ("input_moment", "gradient", "output_fisher"):
            near_enough = near(getattr(actual[name], field), getattr(means, field), tolerance)
            assert near_enough, (name, field)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [None, False, True])
@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_statistics_are_per_row_means_however_rows_are_batched(device, reentrant, sizes, seed):
    """Z, G and Y from one pass are means over single rows, under either kind of checkpointing."""
    model = adapted_net(seed, device)
    batches = batches_of(*sizes, seed=seed, device=device)
    x, labels = batches_of(sum(sizes), seed=seed, device=device)[0]
    expected = means_row_by_row(model, x, labels)
    model.reentrant = reentrant
    with_a_dimension_more = [(x[None], labels) for x, labels in batches]
    actual = collect(model, iter(with_a_dimension_more), mean_loss)
    assert_same_statistics(actual, expected)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.enable_grad])
def test_forward_passes_alone_give_the_moments_and_no_gradient(grad_mode):
    model = adapted_net()
    batches = batches_of(4, 5)
    expected = means_row_by_row(model, *batches_of(9)[0])

    def outputs(twin, batch):
        assert not torch.is_grad_enabled()
        with torch.enable_grad():
            return twin(batch[0].clone().requires_grad_())

    with grad_mode():
        actual = collect(model, batches, outputs, backward=False)
        both = collect(model, batches, mean_loss)
    assert_same_statistics(both, expected)
    for name, means in actual.items():
        assert near(means.input_moment, expected[name].input_moment)
        assert not means.input_moment.requires_grad
        assert means.count == expected[name].count
        assert means.gradient is None
        assert means.output_fisher is None


@given(st.integers(0, 99))
@settings(max_examples=20)
def test_masked_rows_do_not_count(seed):
    """Rows where the mask is False leave no mark, whatever they hold."""
    model = adapted_net(seed)
    x, labels = batches_of(12, seed=seed)[0]
    mask = torch.rand(12, generator=torch.Generator().manual_seed(seed)) < 0.6
    assume(mask[:6].any() and mask[6:].any())
    expected = means_row_by_row(model, x[mask], labels[mask])
    x = torch.where(mask[:, None], x, 1e6)
    first = (x[:6], labels[:6], mask[:6])
    second = (x[6:], labels[6:], mask[6:].long())

    def masked_loss(model, batch):
        x, labels, mask = batch
        return nn.functional.cross_entropy(model(x)[mask.bool()], labels[mask.bool()])

    actual = collect(model, [first, second], masked_loss, mask_fn=lambda batch: batch[2])
    assert_same_statistics(actual, expected)


@pytest.mark.parametrize("shape", [(5,), (5, 2)])
def test_a_mask_that_does_not_fit_is_refused_with_both_shapes(shape):
    model = adapted_net()
    x, labels = batches_of(10)[0]
    batches = [(x.view(2, 5, 3), labels)]
    message = rf"layer 'q': a mask of {re.escape(str(shape))} for inputs of \(2, 5\)"
    with pytest.raises(ValueError, match=message):
        collect_statistics(
            model, {"q": model.q}, batches, mean_loss, mask_fn=lambda batch: torch.ones(shape)
        )


class Flattening(nn.Module):
    """A language model that lays its (B, T) tokens out as (B·T, n), as OPT's layers do."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 3)
        self.fc = nn.Linear(3, 9)

    def forward(self, tokens):
        h = self.embedding(tokens)  # (B, T, 3)
        return self.fc(h.flatten(0, 1)).view(*tokens.shape, 9)


def test_a_mask_fits_a_model_that_flattens_its_tokens():
    model = Flattening().double()
    tokens = torch.randint(9, (2, 5))
    mask = torch.arange(5) < torch.tensor([[5], [3]])  # (2, 5)

    def padded_loss(model, tokens):
        return nn.functional.cross_entropy(model(tokens)[mask], tokens[mask])

    layers = {"fc": model.fc}
    actual = collect_statistics(model, layers, [tokens], padded_loss, mask_fn=lambda tokens: mask)
    padded_loss(model, tokens).backward()
    x = array(model.embedding(tokens)[mask])
    assert actual["fc"].count == 8
    assert near(actual["fc"].input_moment, x.T @ x / 8)
    assert near(actual["fc"].gradient, model.fc.weight.grad)


def test_an_input_changed_in_place_is_refused():
    """The gradient meets the input only after the whole forward pass; until then it has to stay."""
    model = adapted_net()
    x = batches_of(5)[0][0]

    def changes_its_input(model, x):
        return (model.q(x) + model.k(x.add_(1))).sum()

    with pytest.raises(ValueError, match=r"layer 'q': its input \(5, 3\) was changed in place"):
        collect(model, [x], changes_its_input)


def test_half_precision_rows_are_summed_in_float32():
    """In bfloat16 the sum of 1,001 ones is 1,000."""
    model = nn.Sequential(nn.Linear(3, 2).bfloat16())
    x = torch.ones(1001, 3).bfloat16()

    def row_mean(model, x):
        return model(x).sum() / len(x)

    with torch.autocast("cpu", torch.bfloat16):
        actual = collect_statistics(model, {"0": model[0]}, [x, x], row_mean)
    assert torch.equal(actual["0"].input_moment, torch.ones(3, 3))
    assert near(actual["0"].output_fisher, torch.ones(2), 0.01)


def test_statistics_that_overflow_are_refused_by_name():
    x, labels = batches_of(5)[0]
    with pytest.raises(ValueError, match=r"layer 'q': input_moment \(3, 3\) holds NaN or Inf"):
        collect(adapted_net(), [(1e200 * x, labels)], mean_loss)


def test_where_the_loss_averages_sequences_the_step_goes_beyond_one():
    """Logits from the mean of 64 tokens: Y is 64 times too large, the step as much too short."""
    torch.manual_seed(0)
    labels = torch.randint(2, (256,))
    x = torch.randn(256, 64, 4).double()  # (sequences, tokens, in)
    x[..., 0] += 0.3 * (2 * labels[:, None] - 1)
    model = nn.Sequential(nn.Linear(4, 2)).double()
    add_lora(model, 2)

    def sequence_loss(model, batch):
        x, labels = batch
        return nn.functional.cross_entropy(model(x).mean(dim=1), labels)

    batches = list(zip(x.split(128), labels.split(128), strict=True))
    assert init_lora_da(model, batches, sequence_loss) > 1


# ---------------------------------------------------------------------------- whole models


MASK = {"mask_fn": lambda batch: batch[1] != batch[1][0]}  # labels can tell which rows count


@pytest.mark.parametrize(("n_train", "step"), [(None, 1), (50, 0.5), (None, 0)])
def test_lora_da_on_a_model_is_lora_da_on_its_statistics(n_train, step):
    """s·BA is the step times that of lora_da(G, Z, Y); N is the number of rows unless given."""
    model = adapted_net()
    batches = batches_of(4, 5)
    statistics = collect(model, batches, mean_loss, **MASK)
    options = {"variance": 3.0, "damping": 0.2}
    returned = init_lora_da(
        model, iter(batches), mean_loss, n_train=n_train, step=step, **options, **MASK
    )
    assert returned == step
    for name, layer in lora_layers(model).items():
        means = statistics[name]
        N = n_train or means.count
        moments = (means.gradient, means.input_moment, means.output_fisher)
        B, A = lora_da(*moments, 2, N, **options)
        assert near(layer.delta_weight(), step * B @ A)
        assert near(layer.lora_A, A)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("step", [1, 0.5, 0])
def test_cntlora_on_a_model_is_cntlora_on_its_moments(known, step):
    """s·BA is the step times that of cntlora(W, Z_f, Z_p), and needs no loss."""
    model = adapted_net()
    sources = [batches_of(14, 16)]
    old = None
    if known:
        old = batches_of(9, seed=1)
        sources.append(old)
    moments = [collect(model, source, mean_loss, **MASK) for source in sources]
    returned = init_cntlora(
        model,
        sources[0],
        lambda m, b: m(b[0]),
        pretrain_batches=old,
        step=step,
        damping=0.2,
        **MASK,
    )
    assert returned == step
    for name, layer in lora_layers(model).items():
        inputs = [statistics[name].input_moment for statistics in moments]
        B, A = cntlora(layer.base_weight, *inputs, rank=2, damping=0.2)
        assert near(layer.delta_weight(), step * B @ A)
        assert near(layer.lora_A, A)


def test_cntlora_spends_a_rank_budget_over_the_layers():
    """Each layer's full-rank factors are cut to the rank that allocate_ranks gives it."""
    batches = batches_of(30)
    start = adapted_net()
    statistics = collect(start, batches, mean_loss)
    full = {}
    for name, layer in lora_layers(start).items():
        limit = min(layer.base_weight.shape)
        full[name] = cntlora(layer.base_weight, statistics[name].input_moment, rank=limit)
    spectra = {name: B.norm(dim=0) for name, (B, _) in full.items()}
    for budget in (4, 9, 13):
        model = adapted_net()
        init_cntlora(model, batches, mean_loss, rank_budget=budget, step=1)
        ranks = allocate_ranks(spectra, budget)
        for name, layer in lora_layers(model).items():
            B, A = full[name]
            r = ranks[name]
            assert layer.rank == r
            assert near(layer.delta_weight(), B[:, :r] @ A[:r])


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(("train_A", "preheat_rank"), [(False, 3), (True, 3), (False, 2)])
def test_hrp_on_a_model_is_a_short_high_rank_training(train_A, preheat_rank, reentrant):
    """Adam on B_high (and A_high) from 0, written out on dense weights W + B_high·A_high."""
    model = adapted_net()
    batches = batches_of(4, 4, 4)
    model.reentrant = reentrant
    init_hrp(model, batches, mean_loss, preheat_rank=preheat_rank, lr=0.1, train_A=train_A, seed=5)
    model.reentrant = None

    generator = torch.Generator().manual_seed(5)
    high_B = {}
    high_A = {}
    for name, layer in lora_layers(model).items():
        R = min(preheat_rank, layer.in_features, layer.out_features)
        uniform = torch.rand(R, layer.in_features, generator=generator)
        A = (2 * uniform - 1) / math.sqrt(layer.in_features)  # Kaiming-uniform with a = √5
        high_A[name] = A.double().requires_grad_(train_A)
        high_B[name] = torch.zeros(layer.out_features, R).double().requires_grad_()
    trained = [*high_B.values(), *(high_A.values() if train_A else [])]
    optimizer = torch.optim.Adam(trained, 0.1)
    base = without_adapters(model)
    for batch in batches:
        optimizer.zero_grad()
        weights = {
            f"{name}.base_layer.weight": layer.base_layer.weight + high_B[name] @ high_A[name]
            for name, layer in lora_layers(model).items()
        }
        mean_loss(partial(torch.func.functional_call, base, weights), batch).backward()
        optimizer.step()
    for name, layer in lora_layers(model).items():
        V_t = np.linalg.svd(array(high_B[name] @ high_A[name])).Vh[:2]
        assert not layer.lora_B.any()
        assert orthonormal(layer.lora_A)
        assert near(row_projector(layer.lora_A), V_t.T @ V_t, 1e-5)


# ---------------------------------------------------------------------------- the step


GRID = [0.0, *[4.0**k for k in range(-8, 3)]]


@pytest.mark.parametrize("init", [init_lora_da, init_cntlora])
@pytest.mark.parametrize("seed", range(4))
def test_the_step_is_the_best_of_the_grid_on_the_batch_held_out(init, seed):
    """The last batch chooses, by brute force over the grid; all other batches make the fit."""
    batches = batches_of(9, 9, 6, seed=seed)
    model = adapted_net(seed)
    step = init(model, iter(batches), mean_loss)
    losses = {}
    for t in GRID:
        fitted = adapted_net(seed)
        init(fitted, batches[:-1], mean_loss, step=t)
        losses[t] = mean_loss(fitted.eval(), batches[-1]).item()
        if t == step:
            assert_same_deltas(model, fitted)
    assert losses[step] == pytest.approx(min(losses.values()), rel=1e-12)


@pytest.mark.parametrize(
    ("best", "breaks_at", "expected"),
    [
        (-1.0, 99, 0.0),
        (4.0**-9, 99, 0.0),
        (4.0**-8, 99, 4.0**-8),
        (0.6, 99, 0.25),
        (0.7, 99, 1.0),
        (11.0, 99, 16.0),
        (900.0, 99, 16.0),
        (900.0, 3.0, 1.0),
        (900.0, 0.5, 0.25),
    ],
)
def test_the_grid_reaches_from_zero_to_sixteen_and_a_loss_that_is_nan_is_no_choice(
    best, breaks_at, expected
):
    """One weight, the loss held out (t − best)², and NaN from `breaks_at` on."""
    x = torch.ones(4, 1).double()
    fit = [("fit", x)]

    def quadratic(model, batch):
        kind, x = batch
        change = model(x).mean() - base
        if kind == "fit":
            return (change - 1).square()
        t = change / full
        return torch.where(t < breaks_at, (t - best).square(), math.nan)

    model = nn.Sequential(nn.Linear(1, 1)).double()
    base = model(x).mean().item()
    add_lora(model, 1, alpha=4)
    full = 1.0
    init_lora_da(model, fit, quadratic, step=1)
    full = model[0].delta_weight().item()
    assert init_lora_da(model, [*fit, ("chosen on", x)], quadratic) == expected
    assert model[0].delta_weight().item() == pytest.approx(expected * full)


def noisy_loss(model, x):
    """Flow matching: a random timestep and noise for each row."""
    t = torch.rand(len(x), 1)
    e = torch.randn_like(x)
    error = model(x * (1 - t) + e * t) - e
    return error.square().sum(dim=1).mean() / 2


def test_a_loss_with_random_timesteps_gives_the_same_step_whatever_the_callers_seed():
    """Every step meets the same random numbers, and the search draws none of the caller's."""
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    add_lora(start, 2)
    batches = [torch.randn(4096, 4), torch.randn(4096, 4), torch.randn(4, 4)]
    steps = set()
    for seed in range(8):
        torch.manual_seed(seed)
        steps.add(init_lora_da(copy.deepcopy(start), batches, noisy_loss))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        init_lora_da(copy.deepcopy(start), batches[:-1], noisy_loss, step=1)
        assert torch.equal(state, torch.get_rng_state())
    assert len(steps) == 1


def gaussian_labels(y):
    return y + torch.randn_like(y)


def gaussian_loss(y, label):
    return (y - label).square().sum(dim=1).mean() / 2


def random_classes(y):
    return torch.randint(4, (len(y),))


@pytest.mark.parametrize(
    ("draw_labels", "loss", "bound"),
    [(gaussian_labels, gaussian_loss, 0.01), (random_classes, nn.functional.cross_entropy, 0.03)],
)
def test_where_there_is_nothing_to_learn_a_start_costs_next_to_nothing(draw_labels, loss, bound):
    """y = f(x) + ε, with f the model, or random classes: the mean over 12 seeds on fresh rows."""

    def draw(model, rows):
        x = torch.randn(rows, 8)
        return x, draw_labels(model(x).detach())

    def loss_fn(model, batch):
        x, labels = batch
        return loss(model(x), labels)

    costs = []
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        batches = [draw(model, 16) for _ in range(4)]
        fresh = draw(model, 2000)
        before = loss_fn(model, fresh).item()
        add_lora(model, 2)
        init_lora_da(model, batches, loss_fn)
        costs.append(loss_fn(model, fresh).item() - before)
    assert np.mean(costs) < bound


# ---------------------------------------------------------------------------- all or nothing


def net_in_training():
    """Gradients, mixed modes, a frozen adapter."""
    model = adapted_net()
    mean_loss(model, batches_of(5)[0]).backward()
    model.drop.eval()
    model.k.requires_grad_(False)
    model.norm.requires_grad_(True)
    return model


def assert_fails_without_a_trace(call, batch_that_fails, spoil, message):
    """The loss of one of three batches goes wrong; every tensor, mode, hook and flag stays."""
    model = net_in_training()
    batches = batches_of(4, 4, 4)
    before = snapshot(model)

    def failing_loss(twin, batch):
        twin.norm.train()  # modes, running means and gradients are the twin's own
        loss = mean_loss(twin, batch)
        if batch is batches[batch_that_fails]:
            return spoil(loss)
        return loss

    with pytest.raises((ZeroDivisionError, ValueError), match=message):
        call(model, batches, failing_loss)
    assert changes(before, model) == []


@pytest.mark.parametrize("call", [collect, *INITS])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: 1 / 0, "division"),
        (lambda loss: loss * math.nan, r"loss_fn's value \(\) holds NaN or Inf"),
        (lambda loss: loss * torch.ones(2), r"a tensor of shape \(2,\), not a scalar"),
        (lambda loss: loss.item(), "a float, not a scalar"),
    ],
)
def test_a_call_that_fails_on_the_last_batch_leaves_no_trace(call, spoil, message):
    assert_fails_without_a_trace(call, -1, spoil, message)


@pytest.mark.parametrize("call", [collect, init_lora_da, init_hrp])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: loss / 0, r"loss_fn's value \(\) holds NaN or Inf"),
        (Tensor.detach, "a loss without a gradient"),
    ],
)
def test_a_fit_that_fails_leaves_no_trace(call, spoil, message):
    assert_fails_without_a_trace(call, 1, spoil, message)


X, LABELS = batches_of(4)[0]
HUGE = [(1e200 * X, LABELS)]


@pytest.mark.parametrize(
    ("init", "options", "message"),
    [
        (init_lora_da, {"n_train": 0}, "layer 'q': n_train 0"),
        (init_lora_da, {"step": math.nan}, "step nan is not in"),
        (init_lora_da, {"step": math.inf}, "step inf is not in"),
        (init_cntlora, {"step": -1}, "step -1 is not in"),
        (init_lora_da, {"batches": []}, "holds the last batch out, and there are 0 batches"),
        (init_lora_da, {"batches": [], "step": 1}, "layer 'q': no row reached it"),
        (init_lora_da, {"batches": batches_of(9)}, "give two or more, or a step"),
        (init_lora_da, {"batches": HUGE, "step": 1}, r"layer 'q': input_moment \(3, 3\) holds NaN"),
        (init_cntlora, {"damping": -1}, "layer 'q': damping -1"),
        (init_cntlora, {"rank_budget": 3}, "rank budget 3"),
        (init_cntlora, {"rank_budget": 7.0}, "rank budget 7.0"),
        (init_cntlora, {"layers_per_pass": 0}, "layers_per_pass 0 is below 1"),
        (init_cntlora, {"batches": batches_of(9)}, "give two or more, or a step"),
        (init_hrp, {"preheat_rank": 1}, "layer 'q': preheat_rank 1 is below its rank 2"),
        (init_hrp, {"batches": []}, "layer 'q': B_high .* is 0"),
    ],
)
def test_what_cannot_be_started_is_refused_and_nothing_changes(init, options, message):
    model = net_in_training()
    before = snapshot(model)
    given_arguments = {"batches": batches_of(5, 4), "loss_fn": mean_loss, **options}
    with pytest.raises(ValueError, match=message):
        init(model, **given_arguments)
    assert changes(before, model) == []


@pytest.mark.parametrize("init", INITS)
def test_a_layer_that_cannot_be_started_is_named_and_no_other_changes(init):
    """The head sees only zeros; then a layer is reached by none."""
    model = net_in_training()
    handle = model.drop.register_forward_hook(lambda module, args, h: h * 0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer '(head|q)': (input_moment|Z_f|B_high) .* is "):
        init(model, batches_of(5, 4), mean_loss)
    assert changes(before, model) == []
    handle.remove()
    model.unused = LoRALinear(nn.Linear(2, 2), 1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 'unused': (no row reached it|B_high .* is 0)"):
        init(model, batches_of(5, 4), mean_loss)
    assert changes(before, model) == []


@pytest.mark.parametrize("init", [init_lora_da, init_cntlora])
def test_factors_that_overflow_in_the_last_layer_leave_the_others_as_they_were(init):
    model = adapted_net()
    model.head.scaling = 1e-300
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 'head': B .* holds NaN or Inf"):
        init(model, batches_of(5, 4), mean_loss, step=1e10)
    assert changes(before, model) == []


@pytest.mark.parametrize("init", [init_lora_da, init_cntlora])
def test_fewer_rows_than_inputs_are_enough_with_damping_and_too_few_without(init):
    """Z of one row is singular: damping makes it positive definite."""
    model = adapted_net()
    init(model, batches_of(1), mean_loss, step=1)
    for name, delta in deltas(model).items():
        assert delta.isfinite().all(), name
        assert delta.any(), name
    before = snapshot(model)
    with pytest.raises(ValueError, match="layer 'q': .* not positive"):
        init(model, batches_of(1), mean_loss, step=1, damping=0)
    assert changes(before, model) == []


@pytest.mark.parametrize("init", INITS)
def test_without_adapters_or_with_one_that_is_off_there_is_nothing_to_start(init):
    with pytest.raises(ValueError, match="Linear has no adapter: call add_lora first"):
        init(nn.Linear(2, 2), batches_of(5, 4), mean_loss)
    model = adapted_net()
    model.k.scaling = 0.0
    with pytest.raises(ValueError, match="layer 'k': its adapter is off"):
        init(model, batches_of(5, 4), mean_loss)


@pytest.mark.parametrize("init", INITS)
def test_a_start_changes_the_factors_alone(init):
    """Base weights keep their bits; all else stays, too. The twin shares the base weights."""
    model = net_in_training()
    before = snapshot(model)

    def sharing_loss(twin, batch):
        assert twin is not model
        for name in ("q.base_layer.weight", "norm.weight"):  # frozen, and trained by the caller
            shared = twin.get_parameter(name)
            assert shared.data_ptr() == model.get_parameter(name).data_ptr()
            assert not shared.requires_grad
        return mean_loss(twin, batch)

    init(model, batches_of(5, 4), sharing_loss)
    names = lora_layers(model)
    factors = {f"{name}.lora_A: value" for name in names}
    factors |= {f"{name}.lora_B: value" for name in names}
    assert set(changes(before, model)) == factors


@pytest.mark.parametrize("init", INITS)
def test_a_start_is_deterministic(init):
    """The same bits whatever surrounds the call; the seed of HRP alone changes its directions."""
    batches = batches_of(6, 6)
    results = []
    for seed, grad_mode in ((1, torch.no_grad), (2, torch.enable_grad)):
        model = adapted_net()
        torch.manual_seed(seed)
        with grad_mode():
            init(model, batches, mean_loss)
        results.append(values(model))
    assert same_bits(*results)
    if init is init_hrp:
        init_hrp(model, batches, mean_loss, seed=1)
        assert not same_bits(values(model), results[0])


def cntlora_with_old_batches(*args, **options):
    old = iter(batches_of(12, seed=1))  # can be read once only
    return init_cntlora(*args, pretrain_batches=old, **options)


@pytest.mark.parametrize(
    "init", [init_lora_da, cntlora_with_old_batches, partial(init_cntlora, rank_budget=9)]
)
def test_any_number_of_layers_a_pass_gives_the_same_bits(init, monkeypatch):
    sizes = []

    def counting_collect(model, layers, *args, **kwargs):
        sizes.append(len(layers))
        return collect_statistics(model, layers, *args, **kwargs)

    monkeypatch.setattr(lora_init, "collect_statistics", counting_collect)
    results = []
    totals = set()
    for layers_per_pass, most in ((None, 4), (1, 1), (3, 3), (99, 4)):
        model = adapted_net()
        sizes.clear()
        init(model, iter(batches_of(6, 6)), mean_loss, layers_per_pass=layers_per_pass)
        results.append(values(model))
        totals.add(sum(sizes))
        assert max(sizes) == most
        assert len(totals) == 1  # every layer is fitted once, whatever the groups
        assert same_bits(results[0], results[-1])


# ---------------------------------------------------------------------------- two processes


STARTS = {
    "lora_da": init_lora_da,
    "lora_da layer by layer": partial(init_lora_da, layers_per_pass=1),
    "cntlora": init_cntlora,
    "hrp": partial(init_hrp, preheat_rank=3),
}
SHARDS = batches_of(4, 7, 6, 3)  # the first process has batches 0 and 2, the second one 1 and 3


def one_of_two(process, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        f"file://{folder}/store",
        timeout=timedelta(seconds=60),
        world_size=2,
        rank=process,
    )
    results = {}
    for name, start in STARTS.items():
        model = adapted_net()
        step = start(model, SHARDS[process::2], mean_loss)
        results[name] = (step, values(model))
    torch.save(results, folder / f"{process}.pt")
    torch.distributed.destroy_process_group()


def mean_over_parts(model, parts):
    return sum(mean_loss(model, part) for part in parts) / len(parts)


def test_two_processes_end_with_the_same_bits_and_with_those_of_one(tmp_path):
    """Bit for bit on both, and to rounding what one process finds that sees all batches.

    The losses held out are added, and a step of HRP takes the mean gradient of a batch from each.
    """
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    first = torch.load(tmp_path / "0.pt")
    second = torch.load(tmp_path / "1.pt")
    for name, start in STARTS.items():
        batches = [SHARDS[:1], SHARDS[1:2], SHARDS[2:]]
        if name == "hrp":
            batches = [SHARDS[:2], SHARDS[2:]]
        model = adapted_net()
        step = start(model, batches, mean_over_parts)
        assert first[name][0] == second[name][0] == step, name
        assert same_bits(first[name][1], second[name][1]), name
        for value, expected in zip(first[name][1], values(model), strict=True):
            assert near(value, expected, 1e-6), name


# ---------------------------------------------------------------------------- other people's models


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}


def padded_tokens(padding):
    """Three sequences of 7, 5 and 4 tokens, and so many columns of padding more."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 64, (3, 7), generator=generator)
    tokens = nn.functional.pad(tokens, (0, padding), value=1)
    mask = torch.arange(7 + padding) < torch.tensor([[7], [5], [4]])
    return {"input_ids": tokens, "attention_mask": mask.long()}


def llama(hf, padding):
    config = hf.LlamaConfig(vocab_size=64, tie_word_embeddings=True, **SIZES)
    batch = padded_tokens(padding)
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    return hf.LlamaForCausalLM(config), ["q_proj", "k_proj", "up_proj", "down_proj"], batch


def bert(hf, padding):
    config = hf.BertConfig(vocab_size=64, num_labels=3, **SIZES)
    batch = {**padded_tokens(padding), "labels": torch.tensor([0, 2, 1])}
    targets = ["query", "value", "output.dense", "intermediate.dense"]
    return hf.BertForSequenceClassification(config), targets, batch


def t5(hf, padding):
    """It reads wo.weight.dtype."""
    config = hf.T5Config(
        vocab_size=64,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    batch = {"input_ids": padded_tokens(0)["input_ids"], "labels": torch.ones(3, 4).long()}
    return hf.T5ForConditionalGeneration(config), ["q", "v", "wi", "wo"], batch


def hugging_face(build, padding=0):
    """A small random model, its targets and a batch."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, targets, batch = build(hf, padding)
    return model.eval(), targets, batch


def hf_loss(model, batch):
    return model(**batch).loss


def hf_mask(batch):
    return batch["attention_mask"] == 1


@pytest.mark.parametrize("build", [llama, bert, t5])
def test_hugging_face_statistics_see_autograds_gradient(build):
    """G = ∂loss/∂W for every layer that is called once."""
    model, targets, batch = hugging_face(build)
    layers = add_lora(model, 2, targets=targets)
    mask = {"mask_fn": hf_mask} if "attention_mask" in batch else {}
    statistics = collect(model, [batch], hf_loss, **mask)
    model.requires_grad_(True)
    hf_loss(model, batch).backward()
    for name, layer in layers.items():
        assert near(statistics[name].gradient, layer.base_layer.weight.grad, 1e-4), name


@pytest.mark.parametrize("build", [llama, bert])
def test_hugging_face_statistics_see_no_padding(build):
    """Three more columns of padding change no statistic."""
    results = []
    for padding in (0, 3):
        model, targets, batch = hugging_face(build, padding)
        add_lora(model, 2, targets=targets)
        results.append(collect(model, [batch], hf_loss, mask_fn=hf_mask))
    assert {means.count for means in results[0].values()} == {16}
    assert_same_statistics(results[1], results[0], 1e-4)


def test_num_items_in_batch_makes_the_gradient_of_masked_prompts_exact():
    """2 and 28 of 30 labels: the gradient of the sum over labels, by cosine; the default is not."""
    model, targets, _ = hugging_face(llama)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for labelled in (2, 28):
        tokens = torch.randint(1, 64, (1, 31), generator=generator)
        labels = tokens.clone()
        labels[:, : 31 - labelled] = -100
        batches.append({"input_ids": tokens, "attention_mask": tokens > 0, "labels": labels})

    def loss_per_row(model, batch):
        rows = int(batch["attention_mask"].sum())
        return model(**batch, num_items_in_batch=rows).loss

    layers = add_lora(model, 2, targets=targets)
    exact = collect(model, batches, loss_per_row)
    default = collect(model, batches, hf_loss)
    model.requires_grad_(True)
    for batch in batches:
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()

    def cosine(statistics):
        G = torch.cat([statistics[name].gradient.flatten() for name in layers])
        true = torch.cat([layer.base_layer.weight.grad.flatten() for layer in layers.values()])
        return nn.functional.cosine_similarity(G, true, dim=0).item()

    assert cosine(exact) > 0.9999
    assert cosine(default) < 0.9


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("build", "dtype"),
    [
        (llama, torch.float32),
        (llama, torch.bfloat16),
        (bert, torch.float32),
        (t5, torch.float32),
    ],
)
def test_a_hugging_face_model_starts_trains_and_merges(init, build, dtype):
    """Never worse at the start on the batch held out, better ten steps later; merging changes
    no output, and no base weight changes a bit."""
    model, targets, batch = hugging_face(build)
    model.to(dtype)
    if build is llama:
        model.gradient_checkpointing_enable()
        targets = [*targets, "lm_head"]  # embedding and head are one Parameter
    base = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    rounding = 0.01 if dtype == torch.bfloat16 else 1e-5
    before = hf_loss(model, batch).item()
    add_lora(model, 2, alpha=4, targets=targets)
    init(model, [batch, batch], hf_loss)
    assert hf_loss(model, batch) <= before + rounding
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.005)
    for _ in range(10):
        optimizer.zero_grad()
        hf_loss(model, batch).backward()
        optimizer.step()
    after = model(**batch)
    assert after.loss < before - 0.01
    for parameter, value in base:
        assert torch.equal(parameter, value)
    assert near(merge_lora(model)(**batch).logits, after.logits, 5 * rounding)


def test_a_four_bit_layer_is_fitted_and_what_needs_its_weight_is_refused():
    """LoRA-DA and HRP leave the 4-bit Parameter as the same object; W itself cannot be read."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    model = nn.Sequential(linear, nn.Tanh(), nn.Linear(64, 3)).to("cpu")
    labels = torch.randint(3, (64,))
    x = torch.randn(64, 64) + 2 * nn.functional.one_hot(labels, 64)
    batches = list(zip(x.split(32), labels.split(32), strict=True))
    weight = linear.weight
    before = mean_loss(model, batches[1]).item()

    def sharing_loss(twin, batch):
        twin.train()  # in eval mode, on a CPU, bitsandbytes repacks the weight
        assert twin[0].base_layer.weight is weight
        return mean_loss(twin, batch)

    bits = weight.detach().clone()
    add_lora(model, 2)
    init_hrp(model, batches, sharing_loss)
    assert orthonormal(model[0].lora_A, 1e-5)
    assert init_lora_da(model, batches, sharing_loss) > 0
    assert model[0].lora_B.any()
    assert mean_loss(model, batches[1]) < before
    assert model[0].base_layer.weight is weight
    assert torch.equal(weight, bits)
    state = snapshot(model)
    with pytest.raises(TypeError, match="Linear4bit holds a quantized torch.uint8 weight"):
        _ = model[0].weight
    with pytest.raises(TypeError, match="layer '0': Linear4bit"):
        init_cntlora(model, batches, mean_loss)
    assert changes(state, model) == []
    layers = nn.ModuleList([LoRALinear(nn.Linear(2, 2), 1), model[0]])
    state = snapshot(layers)
    with pytest.raises(TypeError, match="layer '1': Linear4bit"):
        merge_lora(layers)
    assert changes(state, layers) == []


# ---------------------------------------------------------------------------- the demo


def save_tiny_llama(folder):
    """A random model of two layers, and a tokenizer whose tokens are bytes."""
    hf = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = tokenizers.decoders.ByteLevel()
    hf.PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder)
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=len(vocabulary), **SIZES)
    hf.LlamaForCausalLM(config).save_pretrained(folder)


def test_the_transformer_demo_runs_on_a_tiny_llama(tmp_path):
    """`demo_transformer.py --model FOLDER --fast` ends well, with runs of LoRA-DA in its JSON."""
    model = tmp_path / "model"
    results = tmp_path / "runs.json"
    save_tiny_llama(model)
    demo = Path(lora_init.__file__).with_name("demo_transformer.py")
    command = [sys.executable, demo, "--model", model, "--fast", "--json", results]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = json.loads(results.read_text(encoding="utf-8"))["runs"]
    assert any(run["method"] == "lora_da" for run in runs)


# ---------------------------------------------------------------------------- the page


PAGE = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\s*```text\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_readmes_python_prints_what_the_readme_says(block, tmp_path):
    """Each ```python block runs by itself, and prints the ```text block that follows it.

    Another version of torch draws other random numbers, so that it prints other digits.
    """
    code, expected = BLOCKS[block]
    for package in ("transformers", "peft"):
        if package in code:
            pytest.importorskip(package)
    (tmp_path / "block.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(lora_init.__file__).parent)}
    command = [sys.executable, "block.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = re.search(r"torch (\d+\.\d+)", PAGE)[1]
    if not torch.__version__.startswith(version):
        numbers = re.compile(r"[\d.]+")
        assert numbers.sub("0", done.stdout) == numbers.sub("0", expected)
    else:
        assert done.stdout == expected


def test_every_python_block_of_the_readme_has_an_output():
    assert len(BLOCKS) == PAGE.count("```python\n") > 0


def test_every_test_that_the_readme_selects_exists():
    """`-k words` on the page selects a test by a part of its name."""
    tests = [name for name in globals() if name.startswith("test_")]
    words = re.findall(r"`-k (\w+)`", PAGE)
    assert len(words) > 10
    for word in words:
        assert any(word in test for test in tests), word
