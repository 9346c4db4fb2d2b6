/* Products of bfloat16 matrices on AMX's tiles, summed in float and rounded once.

   c (M, N) = a (M, K) b (K, N), where of each operand either the rows or the columns are contiguous: with a weight of (in, out) that is
   x W, dy W^T and x^T dy. The unit multiplies tiles of 16 rows of 64 bytes: a's are 16 rows of 32 numbers, b's are 16 pairs of its rows,
   interleaved, of 16 columns (Intel's Architectures Software Developer's Manual, TDPBF16PS). So of the four cases only an `a` with contiguous
   rows can be read as it lies; the others are packed into tiles first, a block that a cache holds at a time: all threads pack it together,
   then share its products. Four tiles of sums stay in registers while two of each operand pass by, so a strip is 32 rows, a panel 32 columns.

   Any number of threads gives the same numbers, and so does any number of other rows beside a row. */

#include "native.h"

#if HALF && defined __AMX_BF16__ && defined __linux__
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 32   /* rows of a strip, columns of a panel, numbers in a tile's row */
#define PAIR 2048 /* bytes of two tiles */
#ifndef BLOCK     /* the tests have smaller ones */
#define BLOCK (4 << 20)   /* bytes packed of an operand at a time: what the last cache has room for */
#define GROUP (768 << 10) /* bytes of b that a thread goes over again and again: its second cache's */
#define MOST 8            /* panels of such a group */
#define DEEP 8            /* tiles along K after which the sums leave the registers: so many of a strip stay in the first cache */
#endif

typedef uint32_t sixteen __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

static inline size least(size a, size b) { return a < b ? a : b; }
static inline size most(size a, size b) { return a > b ? a : b; }
static inline size parts_of(size n, size part) { return (n + part - 1) / part; }

/* 16 by 16, transposed: rows 1, 2, 4 and 8 apart trade what is in the other's place. */
static inline __attribute__((always_inline)) void transpose(sixteen v[16]) {
    const sixteen numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int by = 1; by < 16; by *= 2) {
        sixteen even = numbers + (((numbers & by) != 0) & (16 - by)), odd = even + by;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (!(i & by)) {
                sixteen a = v[i], b = v[i + by];
                v[i] = __builtin_shuffle(a, b, even);
                v[i + by] = __builtin_shuffle(a, b, odd);
            }
    }
}

/* A tile of what is there of lines, `pitch` apart and each contiguous, and zeros where nothing is. Two numbers that are multiplied together
   lie beside each other in a line (16 lines of 32 numbers) or, `across`, in two (32 lines of 16). */
static inline __attribute__((always_inline)) void pack(char *restrict to, const real *restrict from, size pitch, size lines, size length,
                                                       int across, int transposed) {
    real padded[SIDE * SIDE];
    size all = across ? SIDE : 16, wide = SIDE * 16 / all;
    if (lines < all || length < wide) {
        memset(padded, 0, sizeof padded);
        for (size i = 0; i < least(lines, all); i++)
            for (size j = 0; j < least(length, wide); j++) padded[i * SIDE + j] = from[i * pitch + j];
        from = padded, pitch = SIDE;
    }
    sixteen v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        if (across) {
            halves a, b;
            memcpy(&a, from + 2 * i * pitch, sizeof a);
            memcpy(&b, from + (2 * i + 1) * pitch, sizeof b);
            v[i] = __builtin_convertvector(a, sixteen) | __builtin_convertvector(b, sixteen) << 16;
        } else
            memcpy(&v[i], from + i * pitch, sizeof v[i]);
    if (transposed) transpose(v);
    memcpy(to, v, sizeof v);
}

/* An operand: where it lies, its lines' pitch, how far it goes across the sums (M or N) and along them (K), and whether its lines are along
   K, which makes its pairs neighbours. */
typedef struct {
    const real *at;
    size pitch, wide, deep;
    int along;
} operand;

/* The pair of tiles of an operand from `x` across and from `k` along. b's tiles, not a's, have K down their rows. */
static inline __attribute__((always_inline)) void pack_pair(char *restrict to, operand from, size x, size k, int is_b) {
    for (int half = 0; half < 2; half++, x += 16, to += PAIR / 2) {
        size wide = x < from.wide ? from.wide - x : 0, deep = from.deep - k;
        if (from.along)
            pack(to, from.at + (wide ? x * from.pitch + k : 0), from.pitch, wide, deep, 0, is_b);
        else
            pack(to, from.at + (wide ? k * from.pitch + x : 0), from.pitch, deep, wide, 1, !is_b);
    }
}
static void pack_a(char *restrict to, operand a, size x, size k) { pack_pair(to, a, x, k, 0); }
static void pack_b(char *restrict to, operand b, size x, size k) { pack_pair(to, b, x, k, 1); }

/* Tiles 0 to 3 are sums, 4 and 5 are a's, 6 and 7 are b's: all whole. */
static void configure(void) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1};
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    __asm__ volatile("" : : "r"(&tiles) : "memory"); /* gcc's _tile_loadconfig says that it reads eight bytes (its PR 114098) */
    _tile_loadconfig(&tiles);
}

/* c (32, 32), rows of `row` floats, (+)= a's two rows of tiles times b's two columns of them, `steps` along K. Of a, tiles are `next` bytes
   apart along K, and their rows `pitch`. */
static inline void multiply(const char *a, const char *below, size pitch, size next, const char *b, size steps, float *c, size row, int add) {
    size bytes = row * sizeof *c;
    float *under = c + 16 * row;
    __asm__ volatile("" ::: "memory"); /* gcc's tile loads do not say that they read memory */
    if (add) {
        _tile_loadd(0, c, bytes);
        _tile_loadd(1, c + 16, bytes);
        _tile_loadd(2, under, bytes);
        _tile_loadd(3, under + 16, bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (size i = 0; i < steps; i++, a += next, below += next, b += PAIR) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, pitch);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + PAIR / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, below, pitch);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, bytes);
    _tile_stored(1, c + 16, bytes);
    _tile_stored(2, under, bytes);
    _tile_stored(3, under + 16, bytes);
}

/* to (columns,) = from, rounded */
static inline void rounded(real *restrict to, const float *restrict from, size columns) {
    size j = 0;
#if defined __AVX512BF16__
    for (; j + 16 <= columns; j += 16) {
        __m256bh v = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + j));
        memcpy(to + j, &v, sizeof v);
    }
#endif
#pragma omp simd
    for (size i = j; i < columns; i++) to[i] = put(from[i]);
}

/* Parts of n that are no larger than `part`, and nearly equal. */
static inline size even(size n, size part) { return parts_of(n, parts_of(n, part)); }

/* How a product is divided: how many strips, panels and steps along K it has, and how many of them are packed at a time. */
typedef struct {
    size strips, panels, steps, high, wide, deep;
} blocks;
static blocks blocks_of(size m, size n, size k, int packs_a) {
    size pairs = BLOCK / PAIR, strips = parts_of(m, SIDE), panels = parts_of(n, SIDE), steps = parts_of(k, SIDE);
    blocks of = {strips, panels, steps, strips, panels, steps};
    if (panels * steps > pairs) {
        if (panels > steps)
            of.wide = most(pairs / steps, 1);
        else
            of.deep = most(pairs / panels, 1);
    }
    if (packs_a) of.high = least(of.high, most(pairs / of.deep, 1));
    of.wide = even(panels, of.wide), of.deep = even(steps, of.deep), of.high = even(strips, of.high);
    return of;
}

/* Where in scratch each thing lies, in bytes: tiles of b, tiles of a (all, or those of its edges: the last step of every strip, and all of the
   last strip), the sums of a product that is deeper than a block, each thread's sums of a strip. */
typedef struct {
    size a, sums, strips, end;
} places;
static places places_of(blocks of, int packs_a, int threads) {
    places at;
    at.a = of.wide * of.deep * PAIR;
    at.sums = at.a + (packs_a ? of.high * of.deep : of.strips + of.steps) * PAIR;
    at.strips = at.sums + (of.deep < of.steps) * of.strips * of.wide * SIDE * SIDE * (size)sizeof(float);
    at.end = at.strips + threads * MOST * SIDE * SIDE * (size)sizeof(float);
    return at;
}

/* How many bytes of scratch, beginning at a multiple of 64, `product` needs. */
size product_scratch(size m, size n, size k, size a_column, int threads) {
    return places_of(blocks_of(m, n, k, a_column != 1), a_column != 1, threads).end;
}

/* c (M, N), its rows contiguous, = a (M, K) b (K, N); of each operand its strides, one of which is 1 */
void product(const real *restrict a, size a_row, size a_column, const real *restrict b, size b_row, size b_column, real *restrict c,
             size c_row, size m, size n, size k, char *restrict scratch, int threads) {
    int packs_a = a_column != 1;
    operand left = {a, packs_a ? a_column : a_row, m, k, !packs_a}, right = {b, b_row == 1 ? b_column : b_row, n, k, b_row == 1};
    blocks of = blocks_of(m, n, k, packs_a);
    places at = places_of(of, packs_a, threads);
    char *tails = scratch + at.a, *last = tails + of.strips * PAIR; /* the edges of an `a` that is read as it lies */
    size whole = k / SIDE, whole_strips = m / SIDE;                 /* what such an `a` has without its edges */
#pragma omp parallel num_threads(threads)
    {
        configure();
        if (!packs_a) {
#pragma omp for schedule(static) nowait
            for (size i = 0; i < of.strips + of.steps; i++) {
                if (i < of.strips && whole < of.steps) pack_a(tails + i * PAIR, left, i * SIDE, whole * SIDE);
                if (i >= of.strips && whole_strips < of.strips)
                    pack_a(tails + i * PAIR, left, whole_strips * SIDE, (i - of.strips) * SIDE);
            }
        }
        for (size p0 = 0; p0 < of.panels; p0 += of.wide)
            for (size k0 = 0; k0 < of.steps; k0 += of.deep) {
                size panels = least(of.wide, of.panels - p0), deep = least(of.deep, of.steps - k0);
#pragma omp for schedule(static) nowait
                for (size i = 0; i < panels * deep; i++)
                    pack_b(scratch + i * PAIR, right, (p0 + i / deep) * SIDE, (k0 + i % deep) * SIDE);
                for (size s0 = 0; s0 < of.strips; s0 += of.high) {
                    size strips = least(of.high, of.strips - s0);
                    if (packs_a) {
#pragma omp for schedule(static) nowait
                        for (size i = 0; i < strips * deep; i++)
                            pack_a(scratch + at.a + i * PAIR, left, (s0 + i / deep) * SIDE, (k0 + i % deep) * SIDE);
                    }
                    /* A task is some strips of some panels: panels that a second cache has room for, as many tasks for each thread. */
                    size across = parts_of(panels, most(least(GROUP / (deep * PAIR), MOST), 1)), down = 1;
                    while (down < least(threads, strips) && across * down % threads) down++;
#pragma omp barrier
#pragma omp for schedule(dynamic)
                    for (size task = 0; task < across * down; task++) {
                        size from = task / down * panels / across, to = (task / down + 1) * panels / across;
                        size top = s0 + task % down * strips / down, bottom = s0 + (task % down + 1) * strips / down;
                        for (size s = top; s < bottom; s++) {
                            int in_place = !packs_a && s < whole_strips, kept = of.deep < of.steps;
                            size row = kept ? of.wide * SIDE : MOST * SIDE, part = even(deep, DEEP);
                            float *sums = kept ? (float *)(scratch + at.sums) + s * SIDE * row + from * SIDE
                                               : (float *)(scratch + at.strips) + omp_get_thread_num() * MOST * SIDE * SIDE;
                            for (size i = 0, j; i < deep; i = j) {
                                j = least(i + part, deep);
                                const char *tiles = packs_a ? scratch + at.a + ((s - s0) * deep + i) * PAIR : last + (k0 + i) * PAIR;
                                const char *below = tiles + PAIR / 2;
                                size pitch = 64, next = PAIR;
                                if (in_place && k0 + i >= whole)
                                    tiles = tails + s * PAIR, below = tiles + PAIR / 2;
                                else if (in_place) {
                                    j = least(j, whole - k0);
                                    pitch = a_row * sizeof *a, next = SIDE * sizeof *a;
                                    tiles = (const char *)(a + s * SIDE * a_row + (k0 + i) * SIDE), below = tiles + 16 * pitch;
                                }
                                for (size p = from; p < to; p++)
                                    multiply(tiles, below, pitch, next, scratch + (p * deep + i) * PAIR, j - i,
                                             sums + (p - from) * SIDE, row, k0 + i > 0);
                            }
                            if (k0 + deep < of.steps) continue;
                            size column = (p0 + from) * SIDE, columns = least(n, (p0 + to) * SIDE) - column;
                            for (size i = 0; i < least(SIDE, m - s * SIDE); i++)
                                rounded(c + (s * SIDE + i) * c_row + column, sums + i * row, columns);
                        }
                    }
                }
            }
        _tile_release();
    }
}

/* May this process use the tiles, and do they multiply? */
size has_tiles(void) {
#ifndef PRETEND /* the tests bring their own, for processors that have none */
    if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
#endif
    _Alignas(64) real a[SIDE * SIDE], b[SIDE * SIDE];
    _Alignas(64) char right[PAIR];
    float sums[SIDE * SIDE];
    for (int i = 0; i < SIDE * SIDE; i++) a[i] = put((float)(i % 7 - 3)), b[i] = put((float)(i % 5 - 2));
    pack_b(right, (operand){b, SIDE, SIDE, SIDE, 0}, 0, 0);
    configure();
    multiply((char *)a, (char *)(a + 16 * SIDE), 2 * SIDE, 0, right, 1, sums, SIDE, 0);
    _tile_release();
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) {
            float sum = 0.0f;
            for (int k = 0; k < SIDE; k++) sum += get(a[i * SIDE + k]) * get(b[k * SIDE + j]);
            if (sums[i * SIDE + j] != sum) return 0;
        }
    return 1;
}
#else
size has_tiles(void) { return 0; }
#endif
