/* Vectors of the machine's natural width, in the compiler's own vector types, and a few functions
 * on them. One source serves AVX-512, AVX2, SSE and NEON; where a file wants more than that
 * (integer dot products, transposes), it tests GJ_AVX512 and keeps a plain path beside it. */
#ifndef GPTJET_SIMD_H
#define GPTJET_SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(GPTJET_GENERIC) && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define GJ_AVX512 1
#include <immintrin.h>
#else
#define GJ_AVX512 0
#endif

#if GJ_AVX512
#define VL 16
#define VL_LIST(x) x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x
#elif defined(__AVX__)
#define VL 8
#define VL_LIST(x) x, x, x, x, x, x, x, x
#else
#define VL 4
#define VL_LIST(x) x, x, x, x
#endif

typedef float vfloat __attribute__((vector_size(VL * 4)));
typedef int32_t vint __attribute__((vector_size(VL * 4)));
typedef float vfloat_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));

#define GJ_INLINE static inline __attribute__((always_inline))

GJ_INLINE vfloat vsplat(float x) { return (vfloat){VL_LIST(x)}; }
GJ_INLINE vint vsplat_int(int32_t x) { return (vint){VL_LIST(x)}; }
GJ_INLINE vfloat vload(const float *p) { return *(const vfloat_unaligned *)p; }
GJ_INLINE void vstore(float *p, vfloat v) { *(vfloat_unaligned *)p = v; }

/* The first n lanes, zero in the others. */
GJ_INLINE vfloat vload_some(const float *p, int n) {
    float lanes[VL] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return vload(lanes);
}

/* Lanes 0 and 1 change places, 2 and 3, and so on. */
GJ_INLINE vfloat vswap_pairs(vfloat v) {
#if GJ_AVX512
    return _mm512_permute_ps(v, 0xb1);
#else
    float lanes[VL], swapped[VL];
    vstore(lanes, v);
    for (int i = 0; i < VL; i++) swapped[i] = lanes[i ^ 1];
    return vload(swapped);
#endif
}

/* Where mask is all ones a, where it is zero b. */
GJ_INLINE vfloat vselect(vint mask, vfloat a, vfloat b) {
    return (vfloat)(((vint)a & mask) | ((vint)b & ~mask));
}

GJ_INLINE vfloat vmax(vfloat a, vfloat b) {
#if GJ_AVX512
    return _mm512_max_ps(a, b);
#else
    return vselect(a > b, a, b);
#endif
}

/* Always the same tree, so that a sum never depends on where its row stands. */
GJ_INLINE float vsum(vfloat v) {
    float lanes[VL];
    vstore(lanes, v);
    for (int width = VL / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

GJ_INLINE float vmax_lane(vfloat v) {
    float lanes[VL];
    vstore(lanes, v);
    float best = lanes[0];
    for (int i = 1; i < VL; i++) best = lanes[i] > best ? lanes[i] : best;
    return best;
}

/* e^x to about 1 ulp. x is held to [-87.3, 88.3], where e^x is a normal number; below it the result
 * is 0. x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite); e^r is its Taylor
 * polynomial of degree 7, whose rest is below 2^-27 there. */
GJ_INLINE vfloat vexp(vfloat x) {
    const vfloat magic = vsplat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vint tiny = x < vsplat(-87.3f);
    x = vselect(tiny, vsplat(-87.3f), x);
    x = vselect(x > vsplat(88.3f), vsplat(88.3f), x);
    vfloat shifted = x * vsplat(1.44269504f) + magic;
    vfloat n = shifted - magic;
    vfloat r = x - n * vsplat(0.693359375f);
    r = r - n * vsplat(-2.12194440e-4f);
    vfloat p = vsplat(1.98412698e-4f);
    p = p * r + vsplat(1.38888889e-3f);
    p = p * r + vsplat(8.33333333e-3f);
    p = p * r + vsplat(4.16666667e-2f);
    p = p * r + vsplat(1.66666667e-1f);
    p = p * r + vsplat(0.5f);
    p = p * r + vsplat(1.0f);
    p = p * r + vsplat(1.0f);
    vint exponent = ((vint)shifted - (vint)magic) << 23;
    vfloat result = (vfloat)((vint)p + exponent);
    return vselect(tiny, vsplat(0.0f), result);
}

#endif
