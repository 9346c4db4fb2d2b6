/* The passes over memory between a step's matrix products on a CPU, each one pass: what PyTorch makes of them reads and writes every
   tensor several times, and spends more on tanh than on memory.

   All tensors are of `real`, rows contiguous. Sums over rows are taken in double, in the order of rows, before anything is rounded.
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
void bias_gelu(real *restrict h, const real *restrict bias, real *restrict y, size rows, size width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size i = 0; i < rows; i++) {
        real *restrict a = h + i * width, *restrict b = y + i * width;
#pragma omp simd
        for (size j = 0; j < width; j++) {
            a[j] = put(get(a[j]) + get(bias[j]));
            float x = get(a[j]); /* as the backward pass will see it */
            b[j] = put(x * gate(x));
        }
    }
}

/* dy (N, W) becomes dh; dbias (W,) its sum over rows. A thread has columns of its own, so the sums need no second stage. */
void gelu_backward(const real *restrict h, real *restrict dy, real *restrict dbias, size rows, size width, int threads) {
    size stripe = stripe_of(width, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size from = 0; from < width; from += stripe) {
        size n = width - from < stripe ? width - from : stripe;
        double sum[n];
        memset(sum, 0, sizeof sum);
        for (size i = 0; i < rows; i++) {
            const real *restrict a = h + i * width + from;
            real *restrict d = dy + i * width + from;
#pragma omp simd
            for (size j = 0; j < n; j++) {
                float x = get(a[j]), s = gate(x);
                float g = get(d[j]) * (s + x * s * (1.0f - s) * (SLOPE + 3.0f * CUBE * x * x));
                d[j] = put(g);
                sum[j] += g;
            }
        }
        for (size j = 0; j < n; j++) dbias[from + j] = put((float)sum[j]);
    }
}

/* The poem that row i is of, which is none before `poem`. Poem s has rows starts[s] ... starts[s + 1] - 1, and may have none. */
static inline size poem_of(const int32_t *starts, size poem, size i) {
    while (starts[poem + 1] <= i) poem++;
    return poem;
}

/* y (N, W) = kept * x; seeds (poems,) */
void drop(const real *restrict x, real *restrict y, const int32_t *restrict starts, size poems, size width, const size *restrict seeds,
          size dropped, int threads) {
    size poem = 0; /* a thread's rows come in order */
    float scale = scale_of(dropped);
#pragma omp parallel for schedule(static) firstprivate(poem) num_threads(threads)
    for (size i = 0; i < starts[poems]; i++) {
        const real *restrict a = x + i * width;
        real *restrict b = y + i * width;
        poem = poem_of(starts, poem, i);
        uint64_t bits = seeds[poem];
        uint32_t first = (uint32_t)((i - starts[poem]) * width);
#pragma omp simd
        for (size j = 0; j < width; j++) b[j] = put(get(a[j]) * kept(bits, first + (uint32_t)j, dropped, scale));
    }
}

/* x (N, W) becomes residual + kept * (x + bias) */
void drop_add(real *restrict x, const real *restrict bias, const real *restrict residual, const int32_t *restrict starts, size poems,
              size width, const size *restrict seeds, size dropped, int threads) {
    size poem = 0;
    float scale = scale_of(dropped);
#pragma omp parallel for schedule(static) firstprivate(poem) num_threads(threads)
    for (size i = 0; i < starts[poems]; i++) {
        real *restrict a = x + i * width;
        const real *restrict r = residual + i * width;
        poem = poem_of(starts, poem, i);
        uint64_t bits = seeds[poem];
        uint32_t first = (uint32_t)((i - starts[poem]) * width);
#pragma omp simd
        for (size j = 0; j < width; j++)
            a[j] = put(get(r[j]) + (get(a[j]) + get(bias[j])) * kept(bits, first + (uint32_t)j, dropped, scale));
    }
}

/* dx (N, W) = kept * dy; dbias (W,) its sum over rows */
void drop_add_backward(const real *restrict dy, real *restrict dx, real *restrict dbias, const int32_t *restrict starts, size poems,
                       size width, const size *restrict seeds, size dropped, int threads) {
    float scale = scale_of(dropped);
    size stripe = stripe_of(width, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size from = 0; from < width; from += stripe) {
        size n = width - from < stripe ? width - from : stripe;
        double sum[n];
        memset(sum, 0, sizeof sum);
        for (size i = 0, poem = 0; i < starts[poems]; i++) {
            const real *restrict a = dy + i * width + from;
            real *restrict d = dx + i * width + from;
            poem = poem_of(starts, poem, i);
            uint64_t bits = seeds[poem];
            uint32_t first = (uint32_t)((i - starts[poem]) * width + from);
#pragma omp simd
            for (size j = 0; j < n; j++) {
                float g = get(a[j]) * kept(bits, first + (uint32_t)j, dropped, scale);
                d[j] = put(g);
                sum[j] += g;
            }
        }
        for (size j = 0; j < n; j++) dbias[from + j] = put((float)sum[j]);
    }
}

/* The sum of e^(a - most) over a (n,), which with `keep` become what is added. */
static inline double exponentials(real *restrict a, size n, float most, int keep) {
    double total = 0.0;
    for (size from = 0; from < n; from += 512) { /* a float sum loses digits over 21,128 terms */
        size to = from + 512 < n ? from + 512 : n;
        float part = 0.0f;
#pragma omp simd reduction(+ : part)
        for (size j = from; j < to; j++) {
            float e = exponential(get(a[j]) - most);
            if (keep) a[j] = put(e);
            part += e;
        }
        total += part;
    }
    return total;
}

/* Of each row of logits (N, V): losses (N,), hits (N,) whether its first largest logit is the target. With `overwrite` the row becomes
   its gradient, weight * (softmax - onehot); rows whose target is `ignored` become 0. */
void cross_entropy(real *restrict logits, const size *restrict target, double *restrict losses, uint8_t *restrict hits, size rows,
                   size vocabulary, size ignored, const float *weight, size overwrite, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size i = 0; i < rows; i++) {
        real *restrict a = logits + i * vocabulary;
        size wanted = target[i];
        losses[i] = 0.0;
        hits[i] = 0;
        if (wanted == ignored) {
            if (overwrite) memset(a, 0, vocabulary * sizeof *a);
            continue;
        }
        float most = -INFINITY, logit = get(a[wanted]);
#pragma omp simd reduction(max : most)
        for (size j = 0; j < vocabulary; j++) most = get(a[j]) > most ? get(a[j]) : most;
        if (logit == most) {
            size j = 0;
            while (get(a[j]) != most) j++;
            hits[i] = j == wanted;
        }
        /* Without the target's own, beside which a sure model's other terms would be lost. bfloat16 would round them twice: it is left alone,
           and they are computed again. */
        double others;
        if (overwrite && !HALF)
            others = exponentials(a, wanted, most, 1) + exponentials(a + wanted + 1, vocabulary - wanted - 1, most, 1);
        else
            others = exponentials(a, wanted, most, 0) + exponentials(a + wanted + 1, vocabulary - wanted - 1, most, 0);
        double below = (double)logit - (double)most, total = others + exp(below);
        hits[i] &= total == total; /* a NaN would be the largest */
        losses[i] = below == 0.0 ? log1p(others) : log(total) - below;
        if (overwrite) {
            float share = (float)(*weight / total);
#pragma omp simd
            for (size j = 0; j < vocabulary; j++) a[j] = put((HALF ? exponential(get(a[j]) - most) : get(a[j])) * share);
            a[wanted] = put((float)(-*weight * (others / total)));
        }
    }
}

#if HALF
/* PyTorch's own in float is faster; in bfloat16 it is slower, and adds up the gradients of weight and bias in bfloat16 (off by a twentieth). */

/* y (N, W) = (x - mean) / sqrt(variance + eps) * weight + bias, of each row; stats (N, 2): mean and the factor before weight */
void layer_norm(const real *restrict x, const real *restrict weight, const real *restrict bias, real *restrict y, float *restrict stats,
                size rows, size width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size i = 0; i < rows; i++) {
        const real *restrict a = x + i * width;
        real *restrict b = y + i * width;
        float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (size j = 0; j < width; j++) sum += get(a[j]);
        float mean = sum / (float)width;
#pragma omp simd reduction(+ : squares)
        for (size j = 0; j < width; j++) squares += (get(a[j]) - mean) * (get(a[j]) - mean);
        float factor = squares < INFINITY ? 1.0f / sqrtf(squares / (float)width + eps) : NAN; /* or a run that diverged would look whole */
        stats[2 * i] = mean, stats[2 * i + 1] = factor;
#pragma omp simd
        for (size j = 0; j < width; j++) b[j] = put((get(a[j]) - mean) * factor * get(weight[j]) + get(bias[j]));
    }
}

/* dy (N, W) -> dx (N, W); dweight, dbias (W,) */
void layer_norm_backward(const real *restrict x, const real *restrict weight, const float *restrict stats, const real *restrict dy,
                         real *restrict dx, real *restrict dweight, real *restrict dbias, size rows, size width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size i = 0; i < rows; i++) {
        const real *restrict a = x + i * width, *restrict d = dy + i * width;
        real *restrict b = dx + i * width;
        float mean = stats[2 * i], factor = stats[2 * i + 1], sum = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : sum, along)
        for (size j = 0; j < width; j++) {
            float g = get(d[j]) * get(weight[j]);
            sum += g;
            along += g * (get(a[j]) - mean);
        }
        sum /= (float)width, along *= factor * factor / (float)width;
#pragma omp simd
        for (size j = 0; j < width; j++) b[j] = put(factor * (get(d[j]) * get(weight[j]) - sum - along * (get(a[j]) - mean)));
    }
    size stripe = stripe_of(width, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size from = 0; from < width; from += stripe) {
        size n = width - from < stripe ? width - from : stripe;
        float sum[n], along[n]; /* what rounds them is bfloat16 */
        memset(sum, 0, sizeof sum), memset(along, 0, sizeof along);
        for (size i = 0; i < rows; i++) {
            const real *restrict a = x + i * width + from, *restrict d = dy + i * width + from;
            float mean = stats[2 * i], factor = stats[2 * i + 1];
#pragma omp simd
            for (size j = 0; j < n; j++) {
                sum[j] += get(d[j]);
                along[j] += get(d[j]) * ((get(a[j]) - mean) * factor);
            }
        }
        for (size j = 0; j < n; j++) dbias[from + j] = put(sum[j]), dweight[from + j] = put(along[j]);
    }
}
#endif
