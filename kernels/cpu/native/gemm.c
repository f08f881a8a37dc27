/* Chooses the kernel of a weight's kind. */
#include "gptjet.h"

void gj_gemm(const gj_weight *weight, const gj_operand *operand, int first, int rows, int panel,
             float *tile, uint8_t *unpacked) {
    switch (weight->kind) {
        case GJ_FP32: gj_gemm_fp32(weight, operand, first, rows, panel, tile); break;
        case GJ_INT8: gj_gemm_int8(weight, operand, first, rows, panel, tile); break;
        case GJ_INT4: gj_gemm_int4(weight, operand, first, rows, panel, tile, unpacked); break;
    }
}
