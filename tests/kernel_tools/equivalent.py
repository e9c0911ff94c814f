"""Mutants that nothing can find, each with the reason: they compute the same, or what differs
cannot be reached. Names are those of tests/kernel_tools/mutation.py."""

STORE = "tl.store converts to the type that its pointer points to, and rounds as .to does"
WIDER = "only compared: the same answers in wider integers"
REFUSED = (
    "the same numbers in wider integers for the interpreter; a compiler refuses it, since the `if` "
    "of split_range would give full_end two types"
)
AUTOGRAD = "autograd converts what a backward formula returns to the dtype of its input"
PROMOTES = "the other factor or summand is of the wider dtype already, which the result then has"
UNUSED = "lanes outside are not stored, or their condition is false already"
NOTHING = "a grid of no programs launches nothing, in Triton's launcher and in its interpreter"

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
    "attention/bias_gradient.py attention_bucket_bias_kernel extremes: tl.minimum -> tl.maximum in "
    "tl.minimum(n_query_tiles, n_key_tiles + diagonal)": (
        "further tiles lie outside the scores and add 0: the same gradient, later"
    ),
    "cross_entropy.py linear_cross_entropy casts: hidden_ND.contiguous() -> (hidden_ND)": (
        "hidden states are factors of torch's products alone, which take any strides"
    ),
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
    "rotary.py rotary_kernel casts: tl.load(source + (pair + PAIRS) * stride, mask=inside, "
    "other=0.0).to(ACCUMULATE) -> (tl.load(source + (pair + PAIRS) * stride, mask=inside, "
    "other=0.0))": PROMOTES,
    "rotary.py rotary_kernel casts: tl.load(source + pair * stride, mask=inside, "
    "other=0.0).to(ACCUMULATE) -> (tl.load(source + pair * stride, mask=inside, "
    "other=0.0))": PROMOTES,
    "norm.py norm_backward_kernel casts: tl.load(weight + column, mask=column < WIDTH, "
    "other=0.0).to(ACCUMULATE) -> (tl.load(weight + column, mask=column < WIDTH, "
    "other=0.0))": PROMOTES,
    "norm.py norm_forward_kernel casts: tl.load(residual + at, mask=inside, "
    "other=0.0).to(stream) -> (tl.load(residual + at, mask=inside, "
    "other=0.0))": PROMOTES,
    "attention/backward.py attention_delta_kernel casts: grad_tile.to(ACCUMULATE) -> "
    "(grad_tile)": PROMOTES,
    "glu.py glu_backward_kernel casts: (given * up * slope).to(grad.dtype.element_ty) -> "
    "((given * up * slope))": STORE,
    "cross_entropy.py backward casts: (grad * grad_loss).to(ctx.dtypes[index]) -> ((grad * "
    "grad_loss))": AUTOGRAD,
    "rotary.py rotary_kernel masks: tl.load(source + pair * stride, mask=inside, other=0.0) "
    "-> tl.load((source + pair * stride), mask=inside)": UNUSED,
    "attention/scores.py visible masks: tl.load(masks.order + query_row + t, mask=t < "
    "shape.n_queries, other=0) -> tl.load((masks.order + query_row + t), mask=(t < "
    "shape.n_queries))": UNUSED,
    "attention/bias_gradient.py attention_bucket_bias_kernel masks: tl.load(buckets + index, "
    "mask=inside, other=-1) -> tl.load((buckets + index), mask=inside)": (
        "pairs outside have the gradient 0, and add it to whichever bucket"
    ),
    "attention/forward.py attend_tile exchanges: v_tile -> k_tile in v_tile.dtype": (
        "keys and values have one dtype: Call refuses others"
    ),
    "attention/call.py view bounds: stride * 256 >= 2**31 -> (stride * 256) > (2**31)": (
        "a tile has 256 rows at most, of which the last is number 255: with a stride of 2^23 "
        "it lies below 2^31, copied or not"
    ),
    "attention/call.py Call.__init__ shifts: self.n_queries + self.n_keys - 1 -> "
    "((self.n_queries + self.n_keys))": (
        "only the end of a slice, of a tensor that has one entry less"
    ),
    "attention/ranges.py key_range exchanges: full_begin -> begin in tl.maximum(full_begin, "
    "high - masks.window + 1)": (
        "begin is max(0, low - window + 1) here, and low <= high: the same maximum"
    ),
    "attention/decode.py attention_decode_op extremes: min -> max in min(tiles, 2 * "
    "processors(q.device) // max(pairs, 1))": (
        "one tile a part always: the same sum, put together of more parts"
    ),
    "glu.py glu_backward_kernel casts: (given * value).to(grad.dtype.element_ty) -> "
    "((given * value))": STORE,
    "attention/scores.py kept factors: s * 0 -> (0) in t * 0 + s * 0": (
        "s_counter has the tile's shape without it, and the rounds of Philox spread the other "
        "counters over that: the same words"
    ),
    "glu.py launch extremes: min -> max in min(BLOCK, triton.next_power_of_2(width))": (
        "one block for all features: the same numbers, in more registers"
    ),
    "glu.py launch bounds: n_programs > 0 -> n_programs >= 0 in if n_programs > 0: with "
    "device_guard(args[0]): kernel[(n_programs,)]( ": NOTHING,
    "symmetric_product.py symmetric_product_op bounds: n_programs > 0 -> n_programs >= 0 in "
    "if n_programs > 0: with device_guard(x): symmetric_product_kernel[(n_p": NOTHING,
    "symmetric_product.py symmetric_product_kernel bounds: i > j -> i >= j in if i > j: "
    "mirror = out + tl.cast(column, tl.int64)[:, None] * n_rows +": (
        "a tile on the diagonal is its own mirror image: written twice, the same"
    ),
    "cross_entropy.py cross_entropy_kernel masks: keep & (best == target) -> ((best == target))": (
        "no column is number -100: what is not kept is not the best either"
    ),
}
