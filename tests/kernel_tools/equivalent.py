"""Mutants that nothing can find, each with the reason: they compute the same, or what differs
cannot be reached. Names are those of tests/kernel_tools/mutation.py."""

STORE = "tl.store converts to the type that its pointer points to, and rounds as .to does"
WIDER = "only compared: the same answers in wider integers"
REFUSED = (
    "the same numbers in wider integers for the interpreter; a compiler refuses it, since the `if` "
    "of split_range would give full_end two types"
)
AUTOGRAD = "autograd converts what a backward formula returns to the dtype of its input"
TOO_LARGE = (
    "out of reach: the product passes 2^31 only for a result of more elements than that, which no "
    "test can have computed"
)

EQUIVALENT: dict[str, str] = {
    "attention/ranges.py query_range casts: tl.load(masks.key_lengths + batch).to(tl.int32) -> "
    "(tl.load(masks.key_lengths + batch))": WIDER,
    "attention/ranges.py key_range casts: tl.load(masks.key_lengths + batch).to(tl.int32) -> "
    "(tl.load(masks.key_lengths + batch))": REFUSED,
    "attention/ranges.py query_range casts: tl.load(masks.prefix_lengths + batch).to(tl.int32) -> "
    "(tl.load(masks.prefix_lengths + batch))": WIDER,
    "attention/ranges.py key_range casts: tl.load(masks.prefix_lengths + batch).to(tl.int32) -> "
    "(tl.load(masks.prefix_lengths + batch))": REFUSED,
    "norm.py norm_backward_kernel masks: tl.load(mean + row, mask=row < n_rows, other=0.0) -> "
    "tl.load((mean + row), mask=(row < n_rows))": (
        "rows outside are replaced by 0 in the tl.where that follows"
    ),
    "norm.py norm_backward_kernel masks: tl.load(rstd + row, mask=row < n_rows, other=0.0) -> "
    "tl.load((rstd + row), mask=(row < n_rows))": (
        "rows outside are replaced by 0 in the tl.where that follows, and not stored"
    ),
    "norm.py norm_backward_kernel selections: tl.where(inside, normed * scale, 0.0) -> "
    "((normed * scale))": (
        "every use is multiplied by the gradient, which is 0 outside, or is not stored there"
    ),
    "attention/operator.py attention bounds: dropout > 0 -> dropout >= 0 in "
    "seed if dropout > 0 else None": (
        "a seed that a caller gives without dropout drops nothing and scales by 1"
    ),
    "norm.py backward casts: grad_x.to(dtype) -> (grad_x)": AUTOGRAD,
    "norm.py backward casts: grad_x.to(residual_dtype) -> (grad_x)": AUTOGRAD,
    "attention/bias_gradient.py attention_bucket_bias_kernel truncations: tl.int64 -> tl.int32 in "
    "tl.cast(own, tl.int64)": TOO_LARGE,
    "attention/bias_gradient.py attention_dense_bias_kernel truncations: tl.int64 -> tl.int32 in "
    "tl.cast(own, tl.int64)": TOO_LARGE,
    "attention/bias_gradient.py attention_bucket_bias_kernel extremes: tl.minimum -> tl.maximum in "
    "tl.minimum(n_query_tiles, n_key_tiles + diagonal)": (
        "further tiles lie outside the scores and add 0: the same gradient, later"
    ),
    "cross_entropy.py linear_cross_entropy casts: hidden_ND.contiguous() -> (hidden_ND)": (
        "hidden states are factors of torch's products alone, which take any strides"
    ),
    "attention/scores.py visible truncations: tl.int64 -> tl.int32 in "
    "tl.cast(batch, tl.int64)": TOO_LARGE,
    "glu.py glu_backward_kernel truncations: tl.int64 -> tl.int32 in "
    "tl.cast(tl.program_id(0) // n_blocks, tl.int64)": TOO_LARGE,
    "attention/backward.py attention_delta_kernel truncations: tl.int64 -> tl.int32 in "
    "tl.cast(row, tl.int64)": TOO_LARGE,
    "attention/backward.py load_row truncations: tl.int64 -> tl.int32 in "
    "tl.cast(row, tl.int64)": TOO_LARGE,
    "tiles.py store_tile casts: tile.to(view.pointer.dtype.element_ty) -> (tile)": STORE,
    "glu.py glu_forward_kernel casts: result.to(out.dtype.element_ty) -> (result)": STORE,
    "cross_entropy.py cross_entropy_op extremes: min -> max in "
    "min(BLOCK, triton.next_power_of_2(n_columns))": (
        "one block for all columns: the same sums, in more registers"
    ),
    "symmetric_product.py symmetric_product_op truncations: torch.float32 -> torch.bfloat16 in "
    "x.dtype == torch.float32": (
        "the interpreter has one precision of products; `nanolm kernels compile` reads back which "
        "one the compiler took"
    ),
}
