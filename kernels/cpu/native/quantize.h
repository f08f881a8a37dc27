/* Where the parts of a quantised row stand; see quantize.c. */
#ifndef GPTJET_QUANTIZE_H
#define GPTJET_QUANTIZE_H

#include "gptjet.h"

const float *gj_row_scales(const gj_weight *weight, const uint8_t *row);
const int32_t *gj_row_corrections(const gj_weight *weight, const uint8_t *row);

/* The product of `rows` quantised rows, `stride` bytes apart, with one group of weights, unsigned
 * bytes in the order of INT8. Adds scale * product to the tile (or stores it, when first), where
 * scale is the row's, times the column's if column_scale is given.
 * values, row_scale, correction: of the first row and of this group. */
typedef struct {
    const uint8_t *values;
    const float *row_scale;
    const int32_t *correction;
    size_t stride;
    int padded_group;
    const uint8_t *bytes;
    const float *column_scale;
    bool first;
} gj_group;
void gj_group_product(const gj_group *group, int rows, float *tile);

#endif
