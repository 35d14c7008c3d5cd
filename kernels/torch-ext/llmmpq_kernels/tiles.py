"""What the kernels do with a tile of words, in registers: codes to floats, and the scales and zeros beside them.

A word is 32 bits of codes that begin at bit 0 (`layout.py`). Integer-to-float conversion runs at a sixteenth of the
rate of a multiplication on NVIDIA chips, so no code is ever converted. A float32 whose mantissa is all zero but for a
field of b bits that ends e bits above the mantissa's last is, with the exponent e + l,

    2^(e + l) + 2^l * code

One shift brings each byte of a word under the mantissa's first eight bits; from there every code costs one
and-or (LOP3), and the product one fused multiply-add. The powers of two are known before any code is read: they are
taken off again with the zero, once for each group. With at most eight bits of offset no sum loses more than 2^-16 of
its terms, less than the rounding of a 16-bit activation. The lift l = 2 weighs the top plane of 3-bit codes.

`one_bits` is the integer 0x3F800000 handed in at run time. Known at compile time, it becomes an immediate beside the
mask's, and an instruction holds one immediate only: twice the instructions.

Rejected: half2 arithmetic (twice the rate; sums of bfloat16 lose three digits and those of float16 overflow), and
`x.to(float32)`.

Shape suffixes: N output rows, C chunks of 32 codes, W words, P codes in a word, L = 32 codes of a chunk.
"""

import triton
import triton.language as tl


@triton.jit
def load_words(row_N, first, chunk, num_chunks, PER_CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """`CHUNKS` chunks from `chunk` on, of a plane that starts at word `first` of each row: words [N, C * PER_CHUNK]."""
    word = chunk * PER_CHUNK + tl.arange(0, CHUNKS * PER_CHUNK)
    inside = word < num_chunks * PER_CHUNK
    # Every word is read once: it leaves the cache first, so that activations and scales stay.
    return tl.load(
        row_N[:, None] + (first + word)[None, :], mask=inside[None, :], other=0, eviction_policy="evict_first"
    )


@triton.jit
def split_fields(words, one_bits, BITS: tl.constexpr, LIFT: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """words [N, W] -> float32 [N, C, 32], each its code and the offset that `offsets` names for its position."""
    CODES: tl.constexpr = 32 // BITS
    PER_BYTE: tl.constexpr = 8 // BITS
    position = tl.arange(0, CODES)
    shift = 15 - 8 * (position // PER_BYTE)
    left = tl.maximum(shift, 0).to(tl.uint32)[None, None, :]
    right = tl.maximum(-shift, 0).to(tl.uint32)[None, None, :]
    place = BITS * (position % PER_BYTE)
    mask = (((1 << BITS) - 1) << (15 + place)).to(tl.uint32)[None, None, :]
    exponent = (one_bits + ((8 - place + LIFT) << 23)).to(tl.uint32)[None, None, :]
    # A reshape, not `[:, :, None]`: Triton carries the layout of the load through it, so words stay in their registers.
    # The top plane of 3 bits is the exception: it has to follow the layout of the plane below, to which it is added.
    words = words.to(tl.uint32, bitcast=True)
    words = words[:, :, None] if BITS == 1 else tl.reshape(words, (ROWS, CHUNKS * BITS, 1))
    fields = (((words << left) >> right) & mask) | exponent
    return tl.reshape(fields.to(tl.float32, bitcast=True), (ROWS, CHUNKS, 32))


@triton.jit
def offsets(BITS: tl.constexpr, LIFT: tl.constexpr):
    """The power of two in each of the 32 fields of a chunk: float32 [32]."""
    PER_BYTE: tl.constexpr = 8 // BITS
    exponent = 8 - BITS * (tl.arange(0, 32) % PER_BYTE) + LIFT
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_scales(scales_ptr, base_ptr, places, inside, EIGHT_BIT: tl.constexpr):
    """float16 scales, or 8-bit ones: the upper half of a positive float16, times the matrix's base."""
    stored = tl.load(scales_ptr + places, mask=inside, other=0)
    if EIGHT_BIT:
        return (stored.to(tl.int16) << 6).to(tl.float16, bitcast=True).to(tl.float32) * tl.load(base_ptr)
    else:
        return stored.to(tl.float32)


@triton.jit
def load_zeros(zeros_ptr, first, group, row, num_rows, inside, BITS: tl.constexpr):
    """The zeros of `row` in `group` of a run, which is a matrix [groups, N] of packed codes from word `first` on."""
    num_words = (num_rows + 31) // 32
    if BITS == 3:
        line = zeros_ptr + first + group.to(tl.int64) * (3 * num_words)
        low = tl.load(line + row // 16, mask=inside, other=0) >> (2 * (row % 16))
        high = tl.load(line + 2 * num_words + row // 32, mask=inside, other=0) >> (row % 32)
        code = (low & 3) | ((high & 1) << 2)
    else:
        CODES: tl.constexpr = 32 // BITS
        line = zeros_ptr + first + group.to(tl.int64) * (BITS * num_words)
        code = (tl.load(line + row // CODES, mask=inside, other=0) >> (BITS * (row % CODES))) & ((1 << BITS) - 1)
    # 2^23 + code, less 2^23: exact, and cheaper than a conversion.
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def dequantize_tile(
    row_N,
    n_N,
    scales_ptr,
    base_ptr,
    zeros_ptr,
    num_n,
    num_groups,
    one_bits,
    first_word,
    first_group,
    first_zero,
    chunk,
    num_chunks,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The weights of `BLOCK_C` chunks of a run, float32 [N, C * 32]: the reference's bit for bit if `EXACT`.

    If not, offset, zero and scale take one multiply-add instead of three operations, and the result is within 2^-15 of
    a scale of the reference: a twentieth of what rounding to float16 costs.
    """
    PLANE: tl.constexpr = 2 if BITS == 3 else BITS
    words = load_words(row_N, first_word, chunk, num_chunks, PLANE, BLOCK_C)
    fields_NCL = split_fields(words, one_bits, PLANE, 0, BLOCK_N, BLOCK_C)
    offset_L = offsets(PLANE, 0)
    if BITS == 3:
        words = load_words(row_N, first_word + 2 * num_chunks, chunk, num_chunks, 1, BLOCK_C)
        fields_NCL += split_fields(words, one_bits, 1, 2, BLOCK_N, BLOCK_C)
        offset_L += offsets(1, 2)
    chunk_C = (chunk + tl.arange(0, BLOCK_C))[None, :]
    group_C = chunk_C // (GROUP // 32)
    inside = chunk_C < num_chunks
    places = n_N.to(tl.int64)[:, None] * num_groups + (first_group + group_C)
    scales_NC = load_scales(scales_ptr, base_ptr, places, inside, EIGHT_BIT)
    if HAS_ZEROS:
        zeros_NC = load_zeros(zeros_ptr, first_zero, group_C, n_N[:, None], num_n, inside, BITS)
    else:
        zeros_NC = tl.full((BLOCK_N, BLOCK_C), 1 << (BITS - 1), tl.float32)
    if EXACT:
        codes_NCL = fields_NCL - offset_L[None, None, :]
        weights_NCL = (codes_NCL - zeros_NC[:, :, None]) * scales_NC[:, :, None]
    else:
        constant_NCL = (offset_L[None, None, :] + zeros_NC[:, :, None]) * scales_NC[:, :, None]
        weights_NCL = fields_NCL * scales_NC[:, :, None] - constant_NCL
    return tl.reshape(weights_NCL, (BLOCK_N, BLOCK_C * 32))


@triton.jit
def columns_of(order_ptr, first_group, c, num_chunks, GROUP: tl.constexpr, MIXED: tl.constexpr):
    """The first column of the matrix in each of the chunks `c` of a run."""
    PER_GROUP: tl.constexpr = GROUP // 32
    group = c // PER_GROUP
    if MIXED:
        group = tl.load(order_ptr + first_group + group, mask=c < num_chunks, other=0)
    return group * GROUP + (c % PER_GROUP) * 32
