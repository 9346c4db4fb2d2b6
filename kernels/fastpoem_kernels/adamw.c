/* Clipped AdamW's two sweeps over memory on a CPU (fastpoem_kernels.adamw has the formulae): as fast as it can be read, which PyTorch's
   operators are not quite, because one stream of reads does not fill what a core may have under way at a time. */

#include "native.h"

#define AHEAD 256 /* elements: the processor's own prefetching ends with every page */

/* sums (ceil(n / block),): of the squares of each block of g (n,) */
void squares(const real *restrict g, size n, double *restrict sums, size block, int threads) {
    size blocks = (n + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size first = 0; first < blocks; first += 4) {
        const real *restrict a = g + first * block, *restrict b = a + block, *restrict c = b + block, *restrict d = c + block;
        size left = n - first * block;
        float p = 0, q = 0, r = 0, s = 0;
        if (left >= 4 * block) {
#pragma omp simd reduction(+ : p, q, r, s)
            for (size i = 0; i < block; i++) {
                p += get(a[i]) * get(a[i]);
                q += get(b[i]) * get(b[i]);
                r += get(c[i]) * get(c[i]);
                s += get(d[i]) * get(d[i]);
            }
            sums[first] = p, sums[first + 1] = q, sums[first + 2] = r, sums[first + 3] = s;
        } else
            for (size from = 0; from < left; from += block, a += block, p = 0) {
                size count = left - from < block ? left - from : block;
#pragma omp simd reduction(+ : p)
                for (size i = 0; i < count; i++) p += get(a[i]) * get(a[i]);
                sums[first + from / block] = p;
            }
    }
}

/* p, m, v (n,) floats after a step with the gradient g * factor, and with HALF `copy` (n,), p rounded: decay is 1 - lr weight_decay, new1 and
   new2 are 1 - beta1 and 1 - beta2, rate lr / (1 - beta1^t), root 1 / sqrt(1 - beta2^t) */
void adamw(float *restrict p, const real *restrict g, float *restrict m, float *restrict v, real *restrict copy, size n, float factor,
           float decay, float new1, float new2, float rate, float root, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (size from = 0; from < n; from += 16) {
        size to = from + 16 < n ? from + 16 : n;
        __builtin_prefetch(p + from + AHEAD);
        __builtin_prefetch(g + from + AHEAD);
        __builtin_prefetch(m + from + AHEAD);
        __builtin_prefetch(v + from + AHEAD);
#pragma omp simd
        for (size i = from; i < to; i++) {
            float x = get(g[i]) * factor;
            float a = m[i] + new1 * (x - m[i]), b = v[i] + new2 * (x * x - v[i]);
            float w = decay * p[i] - rate * a / (sqrtf(b) * root + eps);
            m[i] = a;
            v[i] = b;
            p[i] = w;
            if (HALF) copy[i] = put(w);
        }
    }
}
