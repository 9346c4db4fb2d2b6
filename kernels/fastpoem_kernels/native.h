/* What the C of this folder shares: how tensors are stored, e^x, and the random bits of dropout.

   Tensors are of `real`: float or, compiled with HALF 1, bfloat16. Arithmetic is float in both, so a pass rounds once, when it writes.

   Random bits are a hash of a poem's seed and an element's number in the poem, so that a backward pass makes a mask again instead of reading
   it, and any number of threads, any other poems beside it, and a padded batch or a packed one make the same. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int64_t size;

#if HALF
typedef uint16_t real;
static inline float get(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
static inline real put(float x) { /* the nearest, the even one of two; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000;
    return (real)(bits >> 16);
}
#else
typedef float real;
static inline float get(real x) { return x; }
static inline real put(float x) { return x; }
#endif

/* e^x for x <= 88, to 1e-7 of itself: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf). 0 below -87.3, so that nothing here
   computes with denormal numbers, which processors do a hundred times slower. NaN stays NaN. */
static inline float exponential(float x) {
    float y = x < -87.3f ? -87.3f : x;
    float n = rintf(y * 1.44269504f);
    float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.3f ? 0.0f : p * power;
}

/* Two rounds of a 32-bit mixer (Wellons' lowbias32), the seed's halves entering before each. */
static inline uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}
static inline float kept(uint64_t seed, uint32_t element, size dropped, float scale) {
    return mixed(mixed(element + (uint32_t)seed) ^ (uint32_t)(seed >> 32)) >= (uint32_t)dropped ? scale : 0.0f;
}
/* A seed for each of several masks of a poem: SplitMix64's next but `part`. */
static inline uint64_t seed_of(uint64_t seed, size part) {
    uint64_t x = seed + (uint64_t)(part + 1) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
/* Dropped with probability dropped / 2^32, the rest scaled so that the expectation is exact. */
static float scale_of(size dropped) { return (float)(4294967296.0 / (4294967296.0 - dropped)); }
