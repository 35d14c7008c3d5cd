/* A packed matrix times a few rows, and packed rows made float32, on a CPU. Compiled by `cpu.py` where it runs.

   Stored as `layout.py` and `runs.py` say. Vectors of 16 lanes in the notation that gcc and clang share; the compiler
   cuts them to what the processor has. A word is copied into every lane, each lane shifts its own code down, and codes
   meet the activations in their natural order. A group is summed without its scale and its zero, and gets both once. */

#include <stdint.h>
#include <string.h>

enum { LANES = 16, CHUNK = 32, MOST_ROWS = 4 };

typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(64)));

/* The width is a constant in each copy. */
#define INLINE inline __attribute__((always_inline))

static const words BY_1 = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const words BY_2 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
static const words BY_4 = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
static const words BY_8 = {0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24, 0, 8, 16, 24};
static const words QUARTER_0 = {~0u, ~0u, ~0u, ~0u}, QUARTER_1 = {0, 0, 0, 0, ~0u, ~0u, ~0u, ~0u};
static const words QUARTER_2 = {0, 0, 0, 0, 0, 0, 0, 0, ~0u, ~0u, ~0u, ~0u};
static const words QUARTER_3 = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ~0u, ~0u, ~0u, ~0u};

/* What every call on one matrix shares; mirrored by `cpu.Matrix`. `places` and `firsts` have one entry for each run. */
struct matrix {
    const uint32_t *words;
    const void *scales;
    const uint32_t *zeros; /* NULL: 2^(bits - 1) */
    const int32_t *order;  /* NULL: one run, in the order of the matrix */
    const float *scale_base; /* NULL: float16 scales */
    int64_t rows, columns, groups, group_size, row_words, num_runs;
    int64_t bits[4], run_groups[4], run_chunks[4];
};

static INLINE floats load(const float *from) {
    floats vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

static INLINE words copies(uint32_t word) { return word - (words){0}; }

/* Half a chunk: 16 codes as floats. Copies and masks: gcc makes shuffles and conversions of bytes lane by lane. */
static INLINE floats half_chunk(const uint32_t *plane, const uint32_t *top, int bits, int half) {
    words codes;
    if (bits == 8) {
        const uint32_t *four = plane + 4 * half;
        codes = (copies(four[0]) & QUARTER_0) | (copies(four[1]) & QUARTER_1);
        codes |= (copies(four[2]) & QUARTER_2) | (copies(four[3]) & QUARTER_3);
        codes = codes >> BY_8 & 255;
    } else if (bits == 4) {
        const uint32_t *two = plane + 2 * half;
        codes = (copies(two[0]) & (QUARTER_0 | QUARTER_1)) | (copies(two[1]) & (QUARTER_2 | QUARTER_3));
        codes = codes >> BY_4 & 15;
    } else {
        codes = copies(plane[half]) >> BY_2 & 3;
        if (bits == 3) /* bit i of its half, moved to bit 2 by a shift of i */
            codes |= copies(half ? *top >> 14 : *top << 2) >> BY_1 & 4;
    }
    return __builtin_convertvector((ints)codes, floats);
}

/* float16 to float32 by the bits. Infinities are no scales. */
static inline float widen(uint32_t half) {
    uint32_t bits = (half & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    return half & 0x8000 ? -value : value;
}

static inline float scale_of(const struct matrix *m, int64_t row, int64_t place) {
    int64_t index = row * m->groups + place;
    if (m->scale_base)
        return widen((uint32_t)((const uint8_t *)m->scales)[index] << 6) * *m->scale_base;
    return widen(((const uint16_t *)m->scales)[index]);
}

/* `run` is the matrix [groups, rows] of packed zeros of one run. */
static INLINE float zero_of(const struct matrix *m, const uint32_t *run, int64_t group, int64_t row, int bits) {
    int64_t chunks = (m->rows + CHUNK - 1) / CHUNK;
    if (!m->zeros)
        return (float)(1 << (bits - 1));
    const uint32_t *line = run + group * bits * chunks;
    if (bits == 3) {
        uint32_t low = line[row / 16] >> 2 * (row % 16) & 3;
        return (float)(low | (line[2 * chunks + row / 32] >> row % 32 & 1) << 2);
    }
    int64_t codes = 32 / bits;
    return (float)(line[row / codes] >> bits * (row % codes) & ((1u << bits) - 1));
}

/* The first column of the matrix in a chunk of a run whose groups start at `place`. */
static inline int64_t column_of(const struct matrix *m, int64_t place, int64_t chunk) {
    int64_t per_group = m->group_size / CHUNK, group = place + chunk / per_group;
    return (m->order ? m->order[group] : group) * m->group_size + chunk % per_group * CHUNK;
}

/* One of several matrices that are multiplied with the same activations; mirrored by `cpu.Member`. */
struct member {
    const struct matrix *matrix;
    float *stored, *sums, *out; /* [num_x, width], [num_x, groups] and [num_x, rows] */
    int64_t width;              /* columns in stored order, whole chunks */
};

/* Activations [num_x, columns] in stored order, whole chunks side by side, and their sums for each stored group. */
static void prepare(const struct matrix *m, const float *x, int64_t num_x, int64_t width, float *stored, float *sums) {
    int64_t per_group = m->group_size / CHUNK;
    memset(sums, 0, sizeof(float) * num_x * m->groups);
    for (int64_t i = 0; i < num_x; i++) {
        float *to = stored + i * width;
        int64_t place = 0;
        for (int64_t run = 0; run < m->num_runs; place += m->run_groups[run++])
            for (int64_t chunk = 0; chunk < m->run_chunks[run]; chunk++, to += CHUNK) {
                int64_t column = column_of(m, place, chunk), count = m->columns - column;
                float sum = 0;
                count = count < 0 ? 0 : count > CHUNK ? CHUNK : count;
                if (count == CHUNK) {
                    memcpy(to, x + i * m->columns + column, sizeof(float) * CHUNK);
                } else {
                    memset(to, 0, sizeof(float) * CHUNK);
                    memcpy(to, x + i * m->columns + column, sizeof(float) * count);
                }
                for (int k = 0; k < CHUNK; k++)
                    sum += to[k];
                sums[i * m->groups + place + chunk / per_group] += sum;
            }
    }
}

static INLINE void add_run(const struct matrix *m, int64_t row, const uint32_t *line, const uint32_t *zeros,
                           int64_t place, int64_t chunks, const float *x, int64_t width, const float *sums,
                           floats *total, float *taken, int bits, int num_x) {
    int64_t per_group = m->group_size / CHUNK;
    const int low_words = bits == 3 ? 2 : bits;
    const uint32_t *top = line + 2 * chunks;
    for (int64_t chunk = 0, group = 0; chunk < chunks; group++) {
        floats sum[MOST_ROWS] = {{0}};
        int64_t end = chunk + per_group < chunks ? chunk + per_group : chunks;
        for (; chunk < end; chunk++)
            for (int half = 0; half < 2; half++) {
                floats codes = half_chunk(line + chunk * low_words, top + chunk, bits, half);
                for (int i = 0; i < num_x; i++)
                    sum[i] += codes * load(x + i * width + chunk * CHUNK + half * LANES);
            }
        float scale = scale_of(m, row, place + group), zero = zero_of(m, zeros, group, row, bits);
        for (int i = 0; i < num_x; i++) {
            total[i] += scale * sum[i];
            taken[i] += scale * zero * sums[i * m->groups + place + group];
        }
    }
}

static INLINE void multiply(const struct matrix *m, const float *x, int64_t width, const float *sums, float *out,
                            int64_t first, int64_t last, int num_x) {
    int64_t row_chunks = (m->rows + CHUNK - 1) / CHUNK;
    for (int64_t row = first; row < last; row++) {
        const uint32_t *line = m->words + row * m->row_words, *zeros = m->zeros;
        floats total[MOST_ROWS] = {{0}};
        float taken[MOST_ROWS] = {0};
        int64_t place = 0, column = 0;
        for (int64_t run = 0; run < m->num_runs; run++) {
            int64_t chunks = m->run_chunks[run];
            switch (m->bits[run]) {
            case 2: add_run(m, row, line, zeros, place, chunks, x + column, width, sums, total, taken, 2, num_x); break;
            case 3: add_run(m, row, line, zeros, place, chunks, x + column, width, sums, total, taken, 3, num_x); break;
            case 4: add_run(m, row, line, zeros, place, chunks, x + column, width, sums, total, taken, 4, num_x); break;
            case 8: add_run(m, row, line, zeros, place, chunks, x + column, width, sums, total, taken, 8, num_x); break;
            }
            line += m->bits[run] * chunks;
            if (zeros)
                zeros += m->run_groups[run] * m->bits[run] * row_chunks;
            place += m->run_groups[run];
            column += chunks * CHUNK;
        }
        for (int i = 0; i < num_x; i++) {
            float sum = 0;
            for (int lane = 0; lane < LANES; lane++)
                sum += total[i][lane];
            out[i * m->rows + row] = sum - taken[i];
        }
    }
}

void llmmpq_prepare(const struct member *members, int64_t num_members, const float *x, int64_t num_x) {
    for (int64_t i = 0; i < num_members; i++)
        prepare(members[i].matrix, x, num_x, members[i].width, members[i].stored, members[i].sums);
}

/* Rows [first, last) of the product [num_x, rows] of one matrix, for 1 to 4 rows of prepared activations. */
static void multiply_rows(const struct matrix *m, const float *x, int64_t num_x, int64_t width, const float *sums,
                          float *out, int64_t first, int64_t last) {
    switch (num_x) {
    case 1: multiply(m, x, width, sums, out, first, last, 1); break;
    case 2: multiply(m, x, width, sums, out, first, last, 2); break;
    case 3: multiply(m, x, width, sums, out, first, last, 3); break;
    case 4: multiply(m, x, width, sums, out, first, last, 4); break;
    }
}

/* Rows [first, last) of all members' products, counted from the first row of the first member on. */
void llmmpq_multiply(const struct member *members, int64_t num_members, int64_t num_x, int64_t first, int64_t last) {
    for (int64_t i = 0; i < num_members; i++) {
        const struct member *each = members + i;
        const struct matrix *m = each->matrix;
        int64_t from = first < 0 ? 0 : first, to = last < m->rows ? last : m->rows;
        for (int64_t done = 0; from < to && done < num_x; done += MOST_ROWS) {
            int64_t count = num_x - done < MOST_ROWS ? num_x - done : MOST_ROWS;
            multiply_rows(m, each->stored + done * each->width, count, each->width, each->sums + done * m->groups,
                          each->out + done * m->rows, from, to);
        }
        first -= m->rows, last -= m->rows;
    }
}

static INLINE void dequantize_run(const struct matrix *m, int64_t row, const uint32_t *line, const uint32_t *zeros,
                                  int64_t place, int64_t chunks, float *out, int bits) {
    int64_t per_group = m->group_size / CHUNK;
    const int low_words = bits == 3 ? 2 : bits;
    const uint32_t *top = line + 2 * chunks;
    float scale = 0, zero = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        if (chunk % per_group == 0) {
            scale = scale_of(m, row, place + chunk / per_group);
            zero = zero_of(m, zeros, chunk / per_group, row, bits);
        }
        int64_t column = column_of(m, place, chunk), count = m->columns - column;
        for (int half = 0; half < 2; half++, column += LANES, count -= LANES) {
            floats weights = (half_chunk(line + chunk * low_words, top + chunk, bits, half) - zero) * scale;
            if (count >= LANES) /* of a length that the compiler knows: one store, not a call */
                memcpy(out + column, &weights, sizeof weights);
            else if (count > 0)
                memcpy(out + column, &weights, sizeof(float) * count);
        }
    }
}

/* Rows [first, last) of the matrix as float32, side by side in `out`, bit for bit as the reference gives them. */
void llmmpq_dequantize(const struct matrix *m, float *out, int64_t first, int64_t last) {
    int64_t row_chunks = (m->rows + CHUNK - 1) / CHUNK;
    for (int64_t row = first; row < last; row++, out += m->columns) {
        const uint32_t *line = m->words + row * m->row_words, *zeros = m->zeros;
        int64_t place = 0;
        for (int64_t run = 0; run < m->num_runs; run++) {
            int64_t chunks = m->run_chunks[run];
            switch (m->bits[run]) {
            case 2: dequantize_run(m, row, line, zeros, place, chunks, out, 2); break;
            case 3: dequantize_run(m, row, line, zeros, place, chunks, out, 3); break;
            case 4: dequantize_run(m, row, line, zeros, place, chunks, out, 4); break;
            case 8: dequantize_run(m, row, line, zeros, place, chunks, out, 8); break;
            }
            line += m->bits[run] * chunks;
            if (zeros)
                zeros += m->run_groups[run] * m->bits[run] * row_chunks;
            place += m->run_groups[run];
        }
    }
}
