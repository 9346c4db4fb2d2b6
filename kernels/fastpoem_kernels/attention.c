/* Causal self-attention, forward and backward, one task for each head of each poem: everything of a head that is used twice is in its
   thread's scratch, which a cache holds, where products over all heads would write and read tensors of (heads, T, T).

   Poem s has rows starts[s] ... starts[s + 1] - 1 of the tensors' N, so that a padded batch and a packed one are the same. With weights
   P = softmax(scale q k^T) over what is not in the future, and R = kept * P what dropout leaves of them, the output is R v and, since
   dP * P = dR * R, the gradient of q k^T is scale * (dR * R - P * rowsum(dR * R)). The backward pass computes P again, from q k^T and two
   numbers a row. What is in the future is skipped, but for corners of the blocks. Any number of threads gives the same numbers. */

#include <omp.h>

#include "native.h"

/* Products are made in blocks of DOWN rows and ACROSS vectors, whose sums fill the registers. */
#if defined __AVX512F__
#define LANES 16
#define ACROSS 4
#define NUMBERS 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif defined __AVX__
#define LANES 8
#define ACROSS 2
#define NUMBERS 0, 1, 2, 3, 4, 5, 6, 7
#else
#define LANES 4
#define ACROSS 2
#define NUMBERS 0, 1, 2, 3
#endif
#define DOWN 6
#define TILE 48          /* a product's other side at a time: a multiple of DOWN and LANES */
#define BAND (16 * DOWN) /* rows of weights held at a time */
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

static inline size padded(size n) { return (n + LANES - 1) / LANES * LANES; }
static inline size least(size a, size b) { return a < b ? a : b; }

/* The first n there, or as many as there are lanes, then zeros. */
static inline vector load(const float *from, size n) {
    vector v = {};
    if (n >= LANES)
        memcpy(&v, from, sizeof v);
    else
        for (size j = 0; j < n; j++) v[j] = from[j];
    return v;
}
static inline void store(float *to, vector v, size n) {
    if (n >= LANES)
        memcpy(to, &v, sizeof v);
    else
        for (size j = 0; j < n; j++) to[j] = v[j];
}

#if HALF
typedef real row_of_lanes __attribute__((vector_size(2 * LANES)));
static inline vector load_real(const real *from, size n) {
    row_of_lanes v = {};
    if (n >= LANES)
        memcpy(&v, from, sizeof v);
    else
        for (size j = 0; j < n; j++) v[j] = from[j];
    return (vector)(__builtin_convertvector(v, lanes) << 16);
}
#else
static inline vector load_real(const real *from, size n) { return load(from, n); }
#endif

static inline vector larger(vector a, vector b) { /* b where either is NaN */
    lanes is = a > b;
    return (vector)(((lanes)a & is) | ((lanes)b & ~is));
}
/* Lanes in the order of those `by` after them, around the end. */
static inline vector turned(vector v, int by) { return __builtin_shuffle(v, ((lanes){NUMBERS} + by) % LANES); }

/* c (rows <= DOWN, columns <= ACROSS * LANES) = a (rows, depth) b (depth, columns), or += with `add`. Rows of b are whole vectors. */
static inline __attribute__((always_inline)) void block(int across, const float *a, size a_row, size a_step, const float *b, size b_row,
                                                        size depth, float *c, size c_row, size rows, size columns, int add) {
    vector sums[DOWN][ACROSS] = {};
    const float *from[DOWN];
    for (int r = 0; r < DOWN; r++) from[r] = a + least(r, rows - 1) * a_row; /* beyond the last: once more the last */
    for (size k = 0; k < depth; k++) {
        vector right[ACROSS];
#pragma GCC unroll 4
        for (int s = 0; s < across; s++) memcpy(&right[s], b + k * b_row + s * LANES, sizeof(vector));
#pragma GCC unroll 6
        for (int r = 0; r < DOWN; r++) {
            float left = from[r][k * a_step];
#pragma GCC unroll 4
            for (int s = 0; s < across; s++) sums[r][s] += left * right[s];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < DOWN; r++) {
        if (r >= rows) break;
#pragma GCC unroll 4
        for (int s = 0; s < across; s++) {
            float *to = c + r * c_row + s * LANES;
            store(to, add ? load(to, columns - s * LANES) + sums[r][s] : sums[r][s], columns - s * LANES);
        }
    }
}

/* The same for any number of columns. */
static void product(const float *a, size a_row, size a_step, const float *b, size b_row, size depth, float *c, size c_row, size rows,
                    size columns, int add) {
    for (; columns > 0; b += ACROSS * LANES, c += ACROSS * LANES, columns -= ACROSS * LANES) switch (padded(columns) / LANES) {
            case 1: block(1, a, a_row, a_step, b, b_row, depth, c, c_row, rows, columns, add); break;
#if ACROSS > 2
            case 2: block(2, a, a_row, a_step, b, b_row, depth, c, c_row, rows, columns, add); break;
            case 3: block(3, a, a_row, a_step, b, b_row, depth, c, c_row, rows, columns, add); break;
#endif
            default: block(ACROSS, a, a_row, a_step, b, b_row, depth, c, c_row, rows, columns, add);
        }
}

/* to (rows, padded(width)) = from (rows, width) + bias (width,) */
static void gather(float *restrict to, const real *restrict from, size from_row, const real *restrict bias, size rows, size width) {
    for (size i = 0; i < rows; i++, from += from_row)
        for (size j = 0; j < width; j += LANES, to += LANES) {
            vector v = load_real(from + j, width - j);
            store(to, bias ? v + load_real(bias + j, width - j) : v, LANES);
        }
}

/* to (padded(width), padded(rows)) = the same, transposed, by LANES squared: rows 1, 2, 4 ... apart trade lanes that are */
static void gather_transposed(float *restrict to, const real *restrict from, size from_row, const real *restrict bias, size rows,
                              size width) {
    size wide = padded(rows);
    for (size i = 0; i < rows; i += LANES)
        for (size j = 0; j < width; j += LANES) {
            vector v[LANES], shift = load_real(bias + j, width - j);
#pragma GCC unroll 16
            for (int l = 0; l < LANES; l++) v[l] = i + l < rows ? load_real(from + (i + l) * from_row + j, width - j) + shift : (vector){};
#pragma GCC unroll 4
            for (int by = 1; by < LANES; by *= 2) {
                lanes even = (lanes){NUMBERS} + ((((lanes){NUMBERS} & by) != 0) & (LANES - by)); /* by from a, by from b, ... */
#pragma GCC unroll 16
                for (int l = 0; l < LANES; l++)
                    if (!(l & by)) {
                        vector a = v[l], b = v[l + by];
                        v[l] = __builtin_shuffle(a, b, even);
                        v[l + by] = __builtin_shuffle(a, b, even + by);
                    }
            }
#pragma GCC unroll 16
            for (int l = 0; l < LANES; l++) store(to + (j + l) * wide + i, v[l], LANES);
        }
}

/* A row of q k^T, of which n - 1 is the last position not in the future, becomes exp(scale * (row - most)), and 0 from n to `wide`. The
   row is followed by room for 2 * LANES - 1 more. */
static inline void exponentials(float *restrict row, size n, size wide, float scale, float most) {
    for (size j = 0; j < 2; j++) store(row + n + j * LANES, (vector){} - INFINITY, LANES);
#pragma omp simd
    for (size j = 0; j < wide; j++) row[j] = exponential(scale * (row[j] - most));
}
static inline float largest(const float *row, size n) {
    vector most = (vector){} - INFINITY;
    size j = 0;
    for (; j + LANES <= n; j += LANES) most = larger(load(row + j, LANES), most);
    for (; j < n; j++) most = larger((vector){} + row[j], most);
#pragma GCC unroll 4
    for (int by = LANES / 2; by; by /= 2) most = larger(turned(most, by), most);
    return most[0];
}
static inline float sum(const float *row, size wide) {
    vector total = {};
    for (size j = 0; j < wide; j += LANES) total += load(row + j, LANES);
#pragma GCC unroll 4
    for (int by = LANES / 2; by; by /= 2) total += turned(total, by);
    return total[0];
}

/* p (bottom - top, T) = a (T, D) b (D, T), its rows from top on, as far as they are not in the future */
static void scores(const float *a, const float *b, size deep, size width, size wide, size top, size bottom, float *p, size room) {
    for (size j = 0; j < bottom; j += TILE)
        for (size i = j < top ? top : j; i < bottom; i += DOWN) {
            size rows = least(DOWN, bottom - i);
            size columns = least(TILE, padded(i + rows) - j);
            product(a + i * deep, deep, 1, b + j, wide, width, p + (i - top) * room + j, room, rows, columns, 0);
        }
}
/* c (T, width), its rows from top on, = p (bottom - top, T) b (T, D) */
static void mixed_by(const float *p, size room, const float *b, size deep, size width, size top, size bottom, float *c, size c_row) {
    for (size k = 0; k < bottom; k += TILE)
        for (size i = k < top ? top : k; i < bottom; i += DOWN) {
            size rows = least(DOWN, bottom - i), depth = least(TILE, i + rows - k);
            product(p + (i - top) * room + k, room, 1, b + k * deep, deep, depth, c + i * c_row, c_row, rows, width, k > 0);
        }
}

/* to (rows, width) = from (rows, padded(width)), rounded. Floats are written where they belong at once. */
static void scatter(real *restrict to, size to_row, const float *restrict from, size rows, size width) {
    size deep = padded(width);
    for (size i = 0; i < rows; i++)
#pragma omp simd
        for (size j = 0; j < width; j++) to[i * to_row + j] = put(from[i * deep + j]);
}

/* Asks memory for what the next head will read or write of a row: too little at a place for the processor to see a stream. */
static inline void ask(const real *row, size parts, size apart, size width, int writes) {
    for (size part = 0; part < parts; part++)
        for (size j = 0; j < width; j += 64 / sizeof *row)
            if (writes)
                __builtin_prefetch(row + part * apart + j, 1, 2);
            else
                __builtin_prefetch(row + part * apart + j, 0, 2);
}

/* How many rows at a time: near equal parts, each a multiple of DOWN. */
static size band_of(size length) {
    size bands = (length + BAND - 1) / BAND;
    return bands ? (length + bands * DOWN - 1) / (bands * DOWN) * DOWN : 1;
}

static size longest_of(const int32_t *starts, size poems) {
    size longest = 0;
    for (size i = 0; i < poems; i++) longest = starts[i + 1] - starts[i] > longest ? starts[i + 1] - starts[i] : longest;
    return longest;
}
static size scratch_of(size longest, size width) {
    return ((3 + 3 * HALF) * longest + 2 * padded(longest)) * padded(width) + (2 * BAND + 1) * (padded(longest) + 2 * LANES);
}

/* How many floats of scratch heads of this width need. */
size attention_scratch(const int32_t *starts, size poems, size width, int threads) {
    return threads * scratch_of(longest_of(starts, poems), width);
}

/* qkv (N, 3 * H * D), bias (3 * H * D,) -> out (N, H * D) and, for the backward pass, stats (H, N, 2): the largest of a row of q k^T, and
   1 / the sum of exponentials. seeds (poems,) */
void attention(const real *restrict qkv, const real *restrict bias, real *restrict out, float *restrict stats, float *restrict scratch,
               const int32_t *restrict starts, size poems, size heads, size width, float scale, const size *seeds, size dropped,
               int threads) {
    float keep = scale_of(dropped);
    size all = heads * width, n = starts[poems], deep = padded(width);
    size longest = longest_of(starts, poems), each = scratch_of(longest, width);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (size task = 0; task < poems * heads; task++) {
        size poem = task / heads, head = task % heads, start = starts[poem], length = starts[poem + 1] - start;
        uint64_t bits = seed_of(seeds[poem], head);
        size wide = padded(length), room = wide + 2 * LANES, band = band_of(length);
        const real *from = qkv + start * 3 * all + head * width, *shift = bias + head * width;
        real *mine = out + start * all + head * width;
        float *q = scratch + omp_get_thread_num() * each, *v = q + length * deep, *kt = v + length * deep;
        float *made = HALF ? kt + deep * wide : (float *)mine, *p = kt + deep * wide + HALF * length * deep;
        gather(q, from, 3 * all, shift, length, width);
        gather_transposed(kt, from + all, 3 * all, shift + all, length, width);
        gather(v, from + 2 * all, 3 * all, shift + 2 * all, length, width);
        for (size top = 0; top < length; top += band) {
            size bottom = least(top + band, length);
            scores(q, kt, deep, width, wide, top, bottom, p, room);
            for (size i = top; i < bottom; i++) {
                float *restrict a = p + (i - top) * room;
                size row = head * n + start + i, seen = padded(least(i / DOWN * DOWN + DOWN, bottom));
                uint32_t first = (uint32_t)(i * (i + 1) / 2); /* whatever the length; a row's future is 0 */
                if (head + 1 < heads) {
                    ask(from + i * 3 * all + width, 3, all, width, 0);
                    ask(out + (start + i) * all + (head + 1) * width, 1, all, width, 1);
                }
                float most = largest(a, i + 1);
                exponentials(a, i + 1, seen, scale, most);
                float share = 1.0f / sum(a, seen);
                stats[2 * row] = most;
                stats[2 * row + 1] = share;
#pragma omp simd
                for (size j = 0; j < seen; j++) a[j] = a[j] * share * kept(bits, first + (uint32_t)j, dropped, keep);
            }
            mixed_by(p, room, v, deep, width, top, bottom, made, HALF ? deep : all);
        }
        if (HALF) scatter(mine, all, made, length, width);
    }
}

/* dout (N, H * D) -> dqkv (N, 3 * H * D), dbias (3 * H * D,) its sum over rows; sums (poems, 3 * H * D) is scratch, the rest as above */
void attention_backward(const real *restrict qkv, const real *restrict bias, const float *restrict stats, const real *restrict dout,
                        real *restrict dqkv, real *restrict dbias, double *restrict sums, float *restrict scratch,
                        const int32_t *restrict starts, size poems, size heads, size width, float scale, const size *seeds, size dropped,
                        int threads) {
    float keep = scale_of(dropped);
    size all = heads * width, n = starts[poems], deep = padded(width);
    size longest = longest_of(starts, poems), each = scratch_of(longest, width);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (size task = 0; task < poems * heads; task++) {
        size poem = task / heads, head = task % heads, start = starts[poem], length = starts[poem + 1] - start;
        uint64_t bits = seed_of(seeds[poem], head);
        size wide = padded(length), room = wide + 2 * LANES, band = band_of(length);
        const real *from = qkv + start * 3 * all + head * width, *shift = bias + head * width;
        real *mine = dqkv + start * 3 * all + head * width;
        float *q = scratch + omp_get_thread_num() * each, *k = q + length * deep, *d = k + length * deep; /* (T, D) */
        float *kt = d + length * deep, *vt = kt + deep * wide;                                            /* (D, T) */
        float *restrict p = vt + deep * wide, *left = p + room, *ds = left + BAND * room;                 /* (1 or BAND, T) */
        float *dq = HALF ? ds + BAND * room : (float *)mine;                                              /* (T, D) */
        size apart = HALF ? length * deep : all, d_row = HALF ? deep : 3 * all;
        float *dk = dq + apart, *dv = dk + apart;
        gather(q, from, 3 * all, shift, length, width);
        gather(k, from + all, 3 * all, shift + all, length, width);
        gather(d, dout + start * all + head * width, all, NULL, length, width);
        gather_transposed(kt, from + all, 3 * all, shift + all, length, width);
        gather_transposed(vt, from + 2 * all, 3 * all, shift + 2 * all, length, width);
        for (size top = 0; top < length; top += band) {
            size bottom = least(top + band, length);
            scores(q, kt, deep, width, wide, top, bottom, left, room);
            scores(d, vt, deep, width, wide, top, bottom, ds, room);
            for (size i = top; i < bottom; i++) {
                float *restrict l = left + (i - top) * room, *restrict s = ds + (i - top) * room;
                size row = head * n + start + i, seen = padded(least(i / DOWN * DOWN + DOWN, bottom));
                float share = stats[2 * row + 1];
                if (head + 1 < heads) {
                    ask(from + i * 3 * all + width, 3, all, width, 0);
                    ask(dout + (start + i) * all + (head + 1) * width, 1, all, width, 0);
                    ask(mine + i * 3 * all + width, 3, all, width, 1);
                }
                uint32_t first = (uint32_t)(i * (i + 1) / 2);
                exponentials(l, i + 1, seen, scale, stats[2 * row]);
#pragma omp simd
                for (size j = 0; j < seen; j++) {
                    p[j] = l[j] * share;
                    l[j] = p[j] * kept(bits, first + (uint32_t)j, dropped, keep);
                    s[j] *= l[j];
                }
                float total = sum(s, seen);
#pragma omp simd
                for (size j = 0; j < seen; j++) s[j] = scale * (s[j] - p[j] * total);
            }
            mixed_by(ds, room, k, deep, width, top, bottom, dq, d_row);
            for (size j = 0; j < bottom; j += DOWN) {
                size i = j > top ? j : top, rows = least(DOWN, bottom - j), at = (i - top) * room + j;
                product(left + at, 1, room, d + i * deep, deep, bottom - i, dv + j * d_row, d_row, rows, width, j < top);
                product(ds + at, 1, room, q + i * deep, deep, bottom - i, dk + j * d_row, d_row, rows, width, j < top);
            }
        }
        for (size part = 0; part < 3; part++) {
            double *restrict total = sums + poem * 3 * all + part * all + head * width;
            for (size j = 0; j < width; j++) total[j] = 0.0;
            for (size i = 0; i < length; i++)
                for (size j = 0; j < width; j++) total[j] += dq[part * apart + i * d_row + j];
            if (HALF) scatter(mine + part * all, 3 * all, dq + part * apart, length, width);
        }
    }
    for (size j = 0; j < 3 * all; j++) {
        double total = 0.0;
        for (size poem = 0; poem < poems; poem++) total += sums[poem * 3 * all + j];
        dbias[j] = put((float)total);
    }
}
