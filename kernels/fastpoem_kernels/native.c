/* The passes over memory between a step's matrix products on a CPU, each one pass: what PyTorch makes of them reads and writes every
   tensor several times, and spends more on tanh than on memory.

   All tensors are float32, rows contiguous. Sums over rows are taken in double, in the order of rows.
   Compiled for the processor it runs on by fastpoem_kernels.native; there is nothing of PyTorch in it. */

#include "native.h"

/* 1 / (1 + e^-2u) of GELU's tanh form: x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks & Gimpel, 2016). */
#define SLOPE 1.5957691216f /* 2 sqrt(2 / pi) */
#define CUBE 0.0713548163f  /* SLOPE * 0.044715 */
static inline float gate(float x) {
    float u = -x * (SLOPE + CUBE * x * x);
    return u > 80.0f ? 0.0f : 1.0f / (1.0f + exponential(u > 80.0f ? 80.0f : u));
}

/* How many columns a thread sums at a time: its share, but no more than a stack has room for. */
static size stripe_of(size width, int threads) {
    size share = (width + threads - 1) / threads;
    return share < 16384 ? share : 16384;
}

/* h (N, W) += bias (W,); y = gelu(h) */
void bias_gelu(float *restrict h, const float *restrict bias, float *restrict y, size rows, size width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size i = 0; i < rows; i++) {
        float *restrict a = h + i * width, *restrict b = y + i * width;
#pragma omp simd
        for (size j = 0; j < width; j++) {
            float x = a[j] + bias[j];
            a[j] = x;
            b[j] = x * gate(x);
        }
    }
}

/* dy (N, W) becomes dh; dbias (W,) its sum over rows. A thread has columns of its own, so the sums need no second stage. */
void gelu_backward(const float *restrict h, float *restrict dy, float *restrict dbias, size rows, size width, int threads) {
    size stripe = stripe_of(width, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size from = 0; from < width; from += stripe) {
        size n = width - from < stripe ? width - from : stripe;
        double sum[n];
        memset(sum, 0, sizeof sum);
        for (size i = 0; i < rows; i++) {
            const float *restrict a = h + i * width + from;
            float *restrict d = dy + i * width + from;
#pragma omp simd
            for (size j = 0; j < n; j++) {
                float x = a[j], s = gate(x);
                float g = d[j] * (s + x * s * (1.0f - s) * (SLOPE + 3.0f * CUBE * x * x));
                d[j] = g;
                sum[j] += g;
            }
        }
        for (size j = 0; j < n; j++) dbias[from + j] = (float)sum[j];
    }
}

/* The poem that row i is of, which is none before `poem`. Poem s has rows starts[s] ... starts[s + 1] - 1, and may have none. */
static inline size poem_of(const int32_t *starts, size poem, size i) {
    while (starts[poem + 1] <= i) poem++;
    return poem;
}

/* y (N, W) = kept * x; seeds (poems,) */
void drop(const float *restrict x, float *restrict y, const int32_t *restrict starts, size poems, size width, const size *restrict seeds,
          size dropped, int threads) {
    size poem = 0; /* a thread's rows come in order */
    float scale = scale_of(dropped);
#pragma omp parallel for schedule(static) firstprivate(poem) num_threads(threads)
    for (size i = 0; i < starts[poems]; i++) {
        const float *restrict a = x + i * width;
        float *restrict b = y + i * width;
        poem = poem_of(starts, poem, i);
        uint64_t bits = seeds[poem];
        uint32_t first = (uint32_t)((i - starts[poem]) * width);
#pragma omp simd
        for (size j = 0; j < width; j++) b[j] = a[j] * kept(bits, first + (uint32_t)j, dropped, scale);
    }
}

/* x (N, W) becomes residual + kept * (x + bias) */
void drop_add(float *restrict x, const float *restrict bias, const float *restrict residual, const int32_t *restrict starts, size poems,
              size width, const size *restrict seeds, size dropped, int threads) {
    size poem = 0;
    float scale = scale_of(dropped);
#pragma omp parallel for schedule(static) firstprivate(poem) num_threads(threads)
    for (size i = 0; i < starts[poems]; i++) {
        float *restrict a = x + i * width;
        const float *restrict r = residual + i * width;
        poem = poem_of(starts, poem, i);
        uint64_t bits = seeds[poem];
        uint32_t first = (uint32_t)((i - starts[poem]) * width);
#pragma omp simd
        for (size j = 0; j < width; j++) a[j] = r[j] + (a[j] + bias[j]) * kept(bits, first + (uint32_t)j, dropped, scale);
    }
}

/* dx (N, W) = kept * dy; dbias (W,) its sum over rows */
void drop_add_backward(const float *restrict dy, float *restrict dx, float *restrict dbias, const int32_t *restrict starts, size poems,
                       size width, const size *restrict seeds, size dropped, int threads) {
    float scale = scale_of(dropped);
    size stripe = stripe_of(width, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size from = 0; from < width; from += stripe) {
        size n = width - from < stripe ? width - from : stripe;
        double sum[n];
        memset(sum, 0, sizeof sum);
        for (size i = 0, poem = 0; i < starts[poems]; i++) {
            const float *restrict a = dy + i * width + from;
            float *restrict d = dx + i * width + from;
            poem = poem_of(starts, poem, i);
            uint64_t bits = seeds[poem];
            uint32_t first = (uint32_t)((i - starts[poem]) * width + from);
#pragma omp simd
            for (size j = 0; j < n; j++) {
                float g = a[j] * kept(bits, first + (uint32_t)j, dropped, scale);
                d[j] = g;
                sum[j] += g;
            }
        }
        for (size j = 0; j < n; j++) dbias[from + j] = (float)sum[j];
    }
}

/* Of each row of logits (N, V): losses (N,), hits (N,) whether its first largest logit is the target. With `overwrite` the row becomes
   its gradient, weight * (softmax - onehot); rows whose target is `ignored` become 0. */
void cross_entropy(float *restrict logits, const size *restrict target, double *restrict losses, uint8_t *restrict hits,
                   size rows, size vocabulary, size ignored, const float *weight, size overwrite, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size i = 0; i < rows; i++) {
        float *restrict a = logits + i * vocabulary;
        size wanted = target[i];
        losses[i] = 0.0;
        hits[i] = 0;
        if (wanted == ignored) {
            if (overwrite) memset(a, 0, vocabulary * sizeof *a);
            continue;
        }
        float most = -INFINITY, logit = a[wanted];
#pragma omp simd reduction(max : most)
        for (size j = 0; j < vocabulary; j++) most = a[j] > most ? a[j] : most;
        if (logit == most) {
            size j = 0;
            while (a[j] != most) j++;
            hits[i] = j == wanted;
        }
        double others = 0.0; /* without the target's own, beside which a sure model's other terms would be lost */
        for (size from = 0; from < vocabulary; from += 512) { /* a float sum loses digits over 21,128 terms */
            size to = from + 512 < vocabulary ? from + 512 : vocabulary;
            float part = 0.0f;
            if (overwrite) {
#pragma omp simd reduction(+ : part)
                for (size j = from; j < to; j++) {
                    float e = j == wanted ? 0.0f : exponential(a[j] - most);
                    a[j] = e;
                    part += e;
                }
            } else {
#pragma omp simd reduction(+ : part)
                for (size j = from; j < to; j++) part += j == wanted ? 0.0f : exponential(a[j] - most);
            }
            others += part;
        }
        double below = (double)logit - (double)most, total = others + exp(below);
        hits[i] &= total == total; /* a NaN would be the largest */
        losses[i] = below == 0.0 ? log1p(others) : log(total) - below;
        if (overwrite) {
            float share = (float)(*weight / total);
#pragma omp simd
            for (size j = 0; j < vocabulary; j++) a[j] *= share;
            a[wanted] = (float)(-*weight * (others / total));
        }
    }
}
