/* What is done to each row by itself: LayerNorm, GELU, rotary positions. */
#include <math.h>

#include "gptjet.h"
#include "simd.h"

void gj_layer_norm(const float *x, const float *weight, const float *bias, float eps, int size,
                   float *out) {
    int whole = size / VL * VL, rest = size - whole;
    vfloat sum = vsplat(0);
    for (int i = 0; i < whole; i += VL) sum += vload(x + i);
    if (rest) sum += vload_some(x + whole, rest);
    float mean = vsum(sum) / (float)size;
    vfloat squares = vsplat(0);
    for (int i = 0; i < whole; i += VL) {
        vfloat d = vload(x + i) - vsplat(mean);
        squares += d * d;
    }
    float variance = 0;
    for (int i = whole; i < size; i++) variance += (x[i] - mean) * (x[i] - mean);
    variance = (variance + vsum(squares)) / (float)size;
    float inverse = 1.0f / sqrtf(variance + eps);
    for (int i = 0; i < whole; i += VL)
        vstore(out + i, (vload(x + i) - vsplat(mean)) * vsplat(inverse) * vload(weight + i) +
                            vload(bias + i));
    for (int i = whole; i < size; i++) out[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

/* gelu_new: x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3), which is x / (1 + e^-2u). */
void gj_gelu(float *x, int size) {
    for (int i = 0; i < size; i += VL) {
        vfloat v = vload(x + i);
        vfloat u = vsplat(0.797884561f) * (v + vsplat(0.044715f) * v * v * v);
        vstore(x + i, v / (vsplat(1.0f) + vexp(vsplat(-2.0f) * u)));
    }
}

void gj_rotate(float *x, int begin, int end, const float *cosine, const float *sine,
               int rotary_dim) {
    int stop = end < rotary_dim ? end : rotary_dim;
    x -= begin;
    int d = begin;
    for (; d + VL <= stop; d += VL) {
        vfloat v = vload(x + d);
        vstore(x + d, v * vload(cosine + d) + vswap_pairs(v) * vload(sine + d));
    }
    if (d >= stop) return;
    /* The last pairs in a vector too: a pair alone might be rounded in another order. */
    int rest = stop - d;
    vfloat v = vload_some(x + d, rest);
    vfloat turned = v * vload_some(cosine + d, rest) + vswap_pairs(v) * vload_some(sine + d, rest);
    float lanes[VL];
    vstore(lanes, turned);
    memcpy(x + d, lanes, (size_t)rest * sizeof *lanes);
}
