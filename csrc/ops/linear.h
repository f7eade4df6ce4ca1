// What linear layers, MLPs and convolutions (checks, memory, threads) tell their kernels.
#pragma once

#include "../core/tensors.h"
#include "../dispatch/backend.h"

namespace vitrail {

// Columns of a panel of packed weights; a multiple of every instruction set's vector.
constexpr int64_t kPanel = 32;
// Rows that are taken through a layer together: their numbers stay in cache while the weights stream past.
constexpr int64_t kRowBlock = 108;
// Hidden columns of an MLP that are computed together.
constexpr int64_t kHiddenBlock = 384;

// Inputs whose channels can be joined.
constexpr int kMaxInputs = 3;

// Rows of tokens; strides in elements.
struct Rows {
    const void* data;
    int64_t row, channels;
};

// Rows that are the patches of maps which a convolution sees: the channels of its taps, one after the other,
// and zeros past the map. `image`, `line` and `column` are strides in elements.
struct Patches {
    int64_t image, line, column;
    int64_t height, width, channels;
    int64_t kernel_height, kernel_width, stride_height, stride_width, above, left;  // padding
    int64_t out_height, out_width;
};

// out = activation(norm(x) W^T + bias) + residual, where a row of x is that of its inputs, one after the
// other, or a patch of the first.
struct Linear {
    Storage storage;
    Rows x[kMaxInputs];
    int inputs;
    const Patches* patches;  // or null
    const void* residual;    // or null
    int64_t residual_row;
    void* out;
    int64_t out_row;
    const void* weight;  // packed: (panels, depth, kPanel), bfloat16 (panels, depth / 2, kPanel, 2)
    const void* bias;    // of the type of sums, or null: row r gets row r % bias_rows, (bias_rows, columns)
    int64_t bias_rows;
    int64_t depth, columns;
    double norm_eps;  // of the normalisation of x's rows; negative for none
    Activation activation;
    // Of the type of sums, or null: rows of x are multiplied by factors[row / image_rows], (images, depth);
    // squares[block of rows] += the squares of the block's results, (blocks, columns padded to panels).
    const void* factors;
    int64_t image_rows;
    void* squares;
};

// out = activation(norm(x) W1^T + b1) W2^T + b2 + residual: `second` reads what `first` writes, and only
// those of their pointers that the whole needs are set.
struct Mlp {
    Linear first, second;
};

struct LinearKernels {
    // Bytes of scratch for a block of rows.
    int64_t (*linear_scratch)(const Linear&);
    int64_t (*mlp_scratch)(const Mlp&);
    // Rows [row, row + rows), rows <= kRowBlock, and panels [panel, panel + panels) of the columns.
    // The rows are of one image where there are factors; `block` is their number in `squares`.
    void (*linear)(const Linear&, int64_t row, int64_t rows, int64_t panel, int64_t panels, int64_t block,
                   void* scratch);
    void (*mlp)(const Mlp&, int64_t row, int64_t rows, void* scratch);
};

VITRAIL_DECLARE_KERNELS(LinearKernels, kLinear)

}  // namespace vitrail
