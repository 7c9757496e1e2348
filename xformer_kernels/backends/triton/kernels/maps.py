"""The maps of a layer in Gram form and their derivatives.

Formulas and names are those of xformer_kernels/layer/maps.py. Matrices of shape D x C are read in tiles of shape
(BLOCK_D, BLOCK_K), all features of the head by some of the tokens' C features; maps are whole tiles (BLOCK_D, BLOCK_D),
which are 0 beyond D. Rows of D x C and of D x D matrices start at multiples of ALIGN and of MAP_ALIGN elements. Norms,
cosines and gradients of maps are float64, everything else is ACC.
"""

import triton.language as tl

from xformer_kernels.backends.triton.kernels.compiler import device, kernel
from xformer_kernels.backends.triton.kernels.tiles import locate, mapped, product, record_base


@device
def rows_of(i, k, C: tl.constexpr, ALIGN: tl.constexpr):
    """(BLOCK_D, BLOCK_K): offsets in a contiguous D x C matrix, whose rows start at multiples of ALIGN elements."""
    return tl.multiple_of(i * C, ALIGN)[:, None] + k[None, :]


@device
def load_rows(ptr, i, k, D: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr):
    """(BLOCK_D, BLOCK_K) of a contiguous D x C matrix."""
    return tl.load(ptr + rows_of(i, k, C, ALIGN), mask=(i < D)[:, None] & (k < C)[None, :], other=0.0)


@device
def projected(
    W_ptr, bias_ptr, c_ptr, s_ptr, i, D: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(BLOCK_D,) each: W c + bias and W s of one of q, k and v."""
    c_i = tl.load(bias_ptr + i, mask=i < D, other=0.0)
    s_i = tl.zeros((i.shape[0],), ACC)
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        W = load_rows(W_ptr, i, k, D, C, ALIGN)
        c_i += tl.sum(W * tl.load(c_ptr + k, mask=k < C, other=0.0)[None, :], axis=1)
        s_i += tl.sum(W * tl.load(s_ptr + k, mask=k < C, other=0.0)[None, :], axis=1)
    return c_i, s_i


@device
def inverse_of(norm, EPS: tl.constexpr, NORMALISED: tl.constexpr):
    """1 / max(norm, eps). NaN is propagated."""
    eps = tl.full([], EPS, norm.dtype)
    return 1.0 / tl.where(norm < eps, eps, norm) if NORMALISED else norm


@device
def activated(cos, temperature, present, SOFTMAX: tl.constexpr):
    """(BLOCK_D, BLOCK_D): the map A, with the softmax over its columns, of which `present` exist."""
    A = cos * temperature
    if SOFTMAX:
        A = tl.where(present[None, :], A, float("-inf"))
        A = tl.exp(A - tl.max(A, axis=1)[:, None])
        A = A / tl.sum(A, axis=1)[:, None]
    return A


@kernel
def layer_maps_kernel(
    P_ptr,
    qkv_ptr,
    bias_ptr,
    temperature_ptr,
    s_ptr,
    n_ptr,
    c_ptr,
    keep_ptr,
    T_ptr,
    e_ptr,
    cos_ptr,
    norms_ptr,
    stride_s: tl.int64,
    stride_n: tl.int64,
    stride_c: tl.int64,
    H: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    MAP_ALIGN: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    NORMALISED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program computes one (b, h). A loop over C sums G = W_left P_right^T and the squares of the norms; another
    one stores T = E W_z."""
    ROWS: tl.constexpr = 3 if KEY_VALUE else 2
    b, h, _ = locate(H, 1)
    head = b * H + h
    i = tl.arange(0, BLOCK_D)
    inside = (i < D)[:, None] & (i < D)[None, :]
    square = rows_of(i, i, D, MAP_ALIGN)
    q_ptr = record_base(qkv_ptr, h * D * C, ALIGN)
    k_ptr = record_base(q_ptr, H * D * C, ALIGN)
    v_ptr = record_base(k_ptr, H * D * C, ALIGN)
    Pq_ptr = record_base(P_ptr, (b * ROWS * H + h) * D * C, ALIGN)
    Pk_ptr = record_base(Pq_ptr, H * D * C, ALIGN)
    Pv_ptr = record_base(Pk_ptr, H * D * C, ALIGN)
    bias_ptr += h * D
    c_ptr += b * stride_c
    s_ptr += b * stride_s
    c_q, s_q = projected(q_ptr, bias_ptr, c_ptr, s_ptr, i, D, C, BLOCK_K, ALIGN, ACC)
    c_k, s_k = projected(k_ptr, bias_ptr + H * D, c_ptr, s_ptr, i, D, C, BLOCK_K, ALIGN, ACC)
    c_v, s_v = projected(v_ptr, bias_ptr + 2 * H * D, c_ptr, s_ptr, i, D, C, BLOCK_K, ALIGN, ACC)
    squares_q = tl.zeros((BLOCK_D,), ACC)
    squares_k = tl.zeros((BLOCK_D,), ACC)
    G = tl.zeros((BLOCK_D, BLOCK_D), ACC)
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        W_q = load_rows(q_ptr, i, k, D, C, ALIGN)
        W_k = load_rows(k_ptr, i, k, D, C, ALIGN)
        P_k = load_rows(Pk_ptr, i, k, D, C, ALIGN)
        squares_q += tl.sum(W_q * load_rows(Pq_ptr, i, k, D, C, ALIGN), axis=1)
        squares_k += tl.sum(W_k * P_k, axis=1)
        if KEY_VALUE:
            G = product(W_k, tl.trans(load_rows(Pv_ptr, i, k, D, C, ALIGN)), G, "ieee")
        else:
            G = product(W_q, tl.trans(P_k), G, "ieee")

    n = tl.load(n_ptr + b * stride_n).to(tl.float64)
    wide_q, wide_k, wide_v = c_q.to(tl.float64), c_k.to(tl.float64), c_v.to(tl.float64)
    sum_q, sum_k, sum_v = s_q.to(tl.float64), s_k.to(tl.float64), s_v.to(tl.float64)
    norm_q = tl.full((BLOCK_D,), 1.0, tl.float64)
    norm_k = norm_q
    if NORMALISED:
        norm_q = squares_q.to(tl.float64) + wide_q * (2 * sum_q + n * wide_q)
        norm_q = tl.sqrt(tl.where(norm_q < 0, 0.0, norm_q))
        norm_k = squares_k.to(tl.float64) + wide_k * (2 * sum_k + n * wide_k)
        norm_k = tl.sqrt(tl.where(norm_k < 0, 0.0, norm_k))
    inverse_q, inverse_k = inverse_of(norm_q, EPS, NORMALISED), inverse_of(norm_k, EPS, NORMALISED)
    cos = G.to(tl.float64)
    if KEY_VALUE:
        cos += sum_k[:, None] * wide_v[None, :] + wide_k[:, None] * (sum_v + n * wide_v)[None, :]
        cos *= inverse_k[:, None]
    else:
        cos += sum_q[:, None] * wide_k[None, :] + wide_q[:, None] * (sum_k + n * wide_k)[None, :]
        cos = cos * inverse_q[:, None] * inverse_k[None, :]
    cos = cos.to(ACC)
    tl.store(record_base(cos_ptr, head * D * D, MAP_ALIGN) + square, cos, mask=inside)
    norms_ptr += (b * 2 * H + h) * D
    tl.store(norms_ptr + i, norm_q.to(ACC), mask=i < D)
    tl.store(norms_ptr + H * D + i, norm_k.to(ACC), mask=i < D)

    E = activated(cos, tl.load(temperature_ptr + h), i < D, SOFTMAX)
    if HAS_KEEP:
        E *= tl.load(record_base(keep_ptr, head * D * D, MAP_ALIGN) + square, mask=inside, other=0.0)
    if KEY_VALUE:
        E = tl.trans(E * inverse_q.to(ACC)[:, None])
    c_z = c_q if KEY_VALUE else c_v
    tl.store(e_ptr + head * D + i, tl.sum(E * c_z[None, :], axis=1), mask=i < D)
    z_ptr = q_ptr if KEY_VALUE else v_ptr
    T_ptr = record_base(T_ptr, head * D * C, ALIGN)
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        T = mapped(E, load_rows(z_ptr, i, k, D, C, ALIGN), ACC, PRECISION)
        tl.store(T_ptr + rows_of(i, k, C, ALIGN), T, mask=(i < D)[:, None] & (k < C)[None, :])


@kernel
def layer_maps_backward_kernel(
    dT_ptr,
    de_ptr,
    qkv_ptr,
    bias_ptr,
    temperature_ptr,
    cos_ptr,
    norms_ptr,
    s_ptr,
    n_ptr,
    c_ptr,
    keep_ptr,
    dG_ptr,
    E_ptr,
    scale_ptr,
    x_ptr,
    e_ptr,
    dshifted_ptr,
    dtemperature_ptr,
    stride_norms: tl.int64,
    stride_s: tl.int64,
    stride_n: tl.int64,
    stride_c: tl.int64,
    H: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    MAP_ALIGN: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    NORMALISED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """Each program computes one (b, h). A loop over C sums the gradient of the map, dT W_z^T or its transpose for
    key_value.

    Stored are for layer_rows_kernel dG and E (B, H, D, D), or E^T for key_value, and the factors of W_q and W_k in X,
    `scale` (B, 2, H, D).
    Gradients with respect to c_q, c_k and c_v contain X s, which is scale (W s) + dG (W' s).
    """
    ROWS: tl.constexpr = 3 if KEY_VALUE else 2
    b, h, _ = locate(H, 1)
    head = b * H + h
    i = tl.arange(0, BLOCK_D)
    inside = (i < D)[:, None] & (i < D)[None, :]
    square = rows_of(i, i, D, MAP_ALIGN)
    q_ptr = record_base(qkv_ptr, h * D * C, ALIGN)
    k_ptr = record_base(q_ptr, H * D * C, ALIGN)
    v_ptr = record_base(k_ptr, H * D * C, ALIGN)
    dT_ptr = record_base(dT_ptr, head * D * C, ALIGN)
    bias_ptr += h * D
    c_ptr += b * stride_c
    s_ptr += b * stride_s
    c_q, s_q = projected(q_ptr, bias_ptr, c_ptr, s_ptr, i, D, C, BLOCK_K, ALIGN, ACC)
    c_k, s_k = projected(k_ptr, bias_ptr + H * D, c_ptr, s_ptr, i, D, C, BLOCK_K, ALIGN, ACC)
    c_v, s_v = projected(v_ptr, bias_ptr + 2 * H * D, c_ptr, s_ptr, i, D, C, BLOCK_K, ALIGN, ACC)
    dA = tl.zeros((BLOCK_D, BLOCK_D), ACC)
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        dT = load_rows(dT_ptr, i, k, D, C, ALIGN)
        if KEY_VALUE:
            dA = product(load_rows(q_ptr, i, k, D, C, ALIGN), tl.trans(dT), dA, "ieee")
        else:
            dA = product(dT, tl.trans(load_rows(v_ptr, i, k, D, C, ALIGN)), dA, "ieee")

    de = tl.load(de_ptr + head * D + i, mask=i < D, other=0.0)
    if KEY_VALUE:
        dA = dA.to(tl.float64) + c_q.to(tl.float64)[:, None] * de.to(tl.float64)[None, :]
    else:
        dA = dA.to(tl.float64) + de.to(tl.float64)[:, None] * c_v.to(tl.float64)[None, :]
    cos = tl.load(record_base(cos_ptr, head * D * D, MAP_ALIGN) + square, mask=inside, other=0.0).to(tl.float64)
    norms_ptr += b * stride_norms + h * D
    norm_q = tl.load(norms_ptr + i, mask=i < D, other=1.0).to(tl.float64)
    norm_k = tl.load(norms_ptr + H * D + i, mask=i < D, other=1.0).to(tl.float64)
    inverse_q, inverse_k = inverse_of(norm_q, EPS, NORMALISED), inverse_of(norm_k, EPS, NORMALISED)
    temperature = tl.load(temperature_ptr + h).to(tl.float64)
    if HAS_KEEP:
        keep = tl.load(record_base(keep_ptr, head * D * D, MAP_ALIGN) + square, mask=inside, other=0.0)
    E_ptr = record_base(E_ptr, head * D * D, MAP_ALIGN)
    if KEY_VALUE:
        E_T = cos * (temperature * inverse_q)[:, None]
        if HAS_KEEP:
            E_T *= keep
            dA *= keep
        E_T = E_T.to(ACC)
        tl.store(E_ptr + square, E_T, mask=inside)
        e = tl.sum(E_T * c_q[:, None], axis=0)
        d_q = tl.sum(E_T * de[None, :], axis=1)
        d_v = tl.zeros((BLOCK_D,), ACC)
        along = tl.sum(dA * cos, axis=1) * inverse_q
        squares_q = -temperature * along * inverse_q * inverse_q / 2
        squares_k = -temperature * along * inverse_k * inverse_k / 2
        dG = dA * (temperature * inverse_q * inverse_k)[:, None]
    else:
        A = tl.where(inside, activated(cos, temperature, i < D, SOFTMAX), 0.0)
        E = A
        if HAS_KEEP:
            E *= keep
            dA *= keep
        E = E.to(ACC)
        tl.store(E_ptr + square, E, mask=inside)
        e = tl.sum(E * c_v[None, :], axis=1)
        d_q = tl.zeros((BLOCK_D,), ACC)
        d_v = tl.sum(E * de[:, None], axis=0)
        if SOFTMAX:
            dA = A * (dA - tl.sum(A * dA, axis=1)[:, None])
        along = tl.sum(dA * cos, axis=1)
        squares_q = -temperature * along * inverse_q * inverse_q / 2
        squares_k = -temperature * tl.sum(dA * cos, axis=0) * inverse_k * inverse_k / 2
        dG = dA * inverse_q[:, None] * (temperature * inverse_k)[None, :]
    tl.store(e_ptr + head * D + i, e, mask=i < D)
    tl.store(dtemperature_ptr + head, tl.sum(along, axis=0))
    dG = tl.where(inside, dG, 0.0).to(ACC)
    tl.store(record_base(dG_ptr, head * D * D, MAP_ALIGN) + square, dG, mask=inside)
    scale_q = tl.zeros((BLOCK_D,), ACC)
    scale_k = scale_q
    if NORMALISED:
        eps = tl.full([], EPS, tl.float64)
        scale_q = (2 * tl.where(norm_q <= eps, 0.0, squares_q)).to(ACC)
        scale_k = (2 * tl.where(norm_k <= eps, 0.0, squares_k)).to(ACC)
    scale_ptr += (b * 2 * H + h) * D + i
    tl.store(scale_ptr, scale_q, mask=i < D)
    tl.store(scale_ptr + H * D, scale_k, mask=i < D)

    n = tl.load(n_ptr + b * stride_n)
    x_q, Xs_q = scale_q * c_q, scale_q * s_q
    x_k, Xs_k = scale_k * c_k, scale_k * s_k
    x_ptr += (b * ROWS * H + h) * D + i
    if KEY_VALUE:
        x_k += tl.sum(dG * c_v[None, :], axis=1)
        Xs_k += tl.sum(dG * s_v[None, :], axis=1)
        x_v = tl.sum(dG * c_k[:, None], axis=0)
        tl.store(x_ptr + 2 * H * D, x_v, mask=i < D)
        d_v += tl.sum(dG * s_k[:, None], axis=0) + n * x_v
    else:
        x_q += tl.sum(dG * c_k[None, :], axis=1)
        Xs_q += tl.sum(dG * s_k[None, :], axis=1)
        x_k += tl.sum(dG * c_q[:, None], axis=0)
        Xs_k += tl.sum(dG * s_q[:, None], axis=0)
    tl.store(x_ptr, x_q, mask=i < D)
    tl.store(x_ptr + H * D, x_k, mask=i < D)
    dshifted_ptr += (b * 3 * H + h) * D + i
    tl.store(dshifted_ptr, d_q + Xs_q + n * x_q, mask=i < D)
    tl.store(dshifted_ptr + H * D, Xs_k + n * x_k, mask=i < D)
    tl.store(dshifted_ptr + 2 * H * D, d_v, mask=i < D)


@kernel
def layer_rows_kernel(
    dT_ptr,
    qkv_ptr,
    dG_ptr,
    E_ptr,
    scale_ptr,
    X_ptr,
    T_ptr,
    dz_ptr,
    H: tl.int64,
    ACC: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
    MAP_ALIGN: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program computes BLOCK_K columns of X = scale W + dG W', T = E W_z and dz = E^T dT of one (b, h)."""
    ROWS: tl.constexpr = 3 if KEY_VALUE else 2
    b, h, block = locate(H, (C + BLOCK_K - 1) // BLOCK_K)
    head = b * H + h
    i = tl.arange(0, BLOCK_D)
    k = block.to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = rows_of(i, k, C, ALIGN)
    stored = (i < D)[:, None] & (k < C)[None, :]
    inside = (i < D)[:, None] & (i < D)[None, :]
    square = rows_of(i, i, D, MAP_ALIGN)
    transposed = i[:, None] + tl.multiple_of(i * D, MAP_ALIGN)[None, :]
    E_ptr = record_base(E_ptr, head * D * D, MAP_ALIGN)
    dG_ptr = record_base(dG_ptr, head * D * D, MAP_ALIGN)
    q_ptr = record_base(qkv_ptr, h * D * C, ALIGN)
    k_ptr = record_base(q_ptr, H * D * C, ALIGN)
    v_ptr = record_base(k_ptr, H * D * C, ALIGN)
    z_ptr = q_ptr if KEY_VALUE else v_ptr
    right_ptr = v_ptr if KEY_VALUE else k_ptr
    left_ptr = k_ptr if KEY_VALUE else q_ptr
    Xq_ptr = record_base(X_ptr, (b * ROWS * H + h) * D * C, ALIGN)
    Xk_ptr = record_base(Xq_ptr, H * D * C, ALIGN)
    Xv_ptr = record_base(Xk_ptr, H * D * C, ALIGN)
    scale_ptr += (b * 2 * H + h) * D + i
    scale_q = tl.load(scale_ptr, mask=i < D, other=0.0)[:, None]
    scale_k = tl.load(scale_ptr + H * D, mask=i < D, other=0.0)[:, None]

    E = tl.load(E_ptr + (transposed if KEY_VALUE else square), mask=inside, other=0.0)
    T = mapped(E, load_rows(z_ptr, i, k, D, C, ALIGN), ACC, PRECISION)
    tl.store(record_base(T_ptr, head * D * C, ALIGN) + rows, T, mask=stored)
    E_T = tl.load(E_ptr + (square if KEY_VALUE else transposed), mask=inside, other=0.0)
    dT = load_rows(record_base(dT_ptr, head * D * C, ALIGN), i, k, D, C, ALIGN)
    tl.store(record_base(dz_ptr, head * D * C, ALIGN) + rows, mapped(E_T, dT, ACC, PRECISION), mask=stored)

    dG = tl.load(dG_ptr + square, mask=inside, other=0.0)
    of_left = mapped(dG, load_rows(right_ptr, i, k, D, C, ALIGN), ACC, PRECISION)
    dG = tl.load(dG_ptr + transposed, mask=inside, other=0.0)
    of_right = mapped(dG, load_rows(left_ptr, i, k, D, C, ALIGN), ACC, PRECISION)
    X_q = scale_q * load_rows(q_ptr, i, k, D, C, ALIGN)
    X_k = scale_k * load_rows(k_ptr, i, k, D, C, ALIGN)
    if KEY_VALUE:
        tl.store(Xq_ptr + rows, X_q, mask=stored)
        tl.store(Xk_ptr + rows, X_k + of_left, mask=stored)
        tl.store(Xv_ptr + rows, of_right, mask=stored)
    else:
        tl.store(Xq_ptr + rows, X_q + of_left, mask=stored)
        tl.store(Xk_ptr + rows, X_k + of_right, mask=stored)
