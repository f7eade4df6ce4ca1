// vitrail::packed_linear, packed_mlp, packed_grn_mlp and packed_conv on the CPU: checks, memory, threads.
#include "linear.h"

#include <cmath>

#include "activation_host.h"

namespace vitrail {
namespace {

// Fewer multiplications than this are not worth waking another thread for.
constexpr double kGrain = 1 << 19;
// Of a hidden layer that goes through memory: what stays in the last cache.
constexpr int64_t kHiddenBytes = int64_t(4) << 20;

int64_t panels_of(int64_t columns) {
    return (columns + kPanel - 1) / kPanel;
}

// Checks a layer's weights against the rows that it takes, and fills in all but its input and output. The
// bias may depend on the token: it repeats within `rows`.
Linear layer(const Checks& checks, const char* weight_name, const Tensor& weight, const char* bias_name,
             const std::optional<Tensor>& bias, Storage storage, const Tensor& x, int64_t depth,
             int64_t columns, int64_t rows) {
    if (columns < 1 || columns > kMaxExtent)
        checks.fail("the number of columns must be from 1 to ", kMaxExtent, ", got ", columns);
    checks.placed(weight_name, weight);
    checks.dtype(weight_name, weight, x.scalar_type());
    if (storage == Storage::kBFloat16)
        checks.shape(weight_name, weight, {panels_of(columns), (depth + 1) / 2, kPanel, 2});
    else
        checks.shape(weight_name, weight, {panels_of(columns), depth, kPanel});
    if (!weight.is_contiguous()) checks.fail(weight_name, " must be contiguous, as pack_weight makes it");
    Linear a = {};
    a.storage = storage;
    a.weight = weight.const_data_ptr();
    a.depth = depth;
    a.columns = columns;
    a.norm_eps = -1;
    if (bias) {
        checks.placed(bias_name, *bias);
        checks.dtype(bias_name, *bias, compute_type(storage));
        if (bias->dim() == 1) {
            checks.shape(bias_name, *bias, {columns});
        } else {
            const int64_t tokens = bias->dim() == 2 ? bias->size(0) : 0;
            checks.shape(bias_name, *bias, {tokens, columns});
            if (tokens < 1 || rows % tokens != 0)
                checks.fail(bias_name, " must have a number of rows that divides ", rows, ", got ", tokens);
        }
        if (!bias->is_contiguous()) checks.fail(bias_name, " must be contiguous");
        a.bias = bias->const_data_ptr();
        a.bias_rows = bias->dim() == 1 ? 1 : bias->size(0);
    }
    return a;
}

Storage packed_storage(const Checks& checks, const char* name, const Tensor& x) {
    const Storage storage = checks.storage(name, x);
    if (storage == Storage::kFloat16) checks.fail(name, " must be float32, float64 or bfloat16, got float16");
    return storage;
}

Storage rows_of(const Checks& checks, const char* name, const Tensor& x) {
    checks.placed(name, x);
    const Storage storage = packed_storage(checks, name, x);
    if (x.dim() != 2 || x.size(1) < 1 || x.size(1) > kMaxExtent)
        checks.fail(name, " must have 2 dimensions (rows, channels), with at least one channel, got shape ",
                    shape_of(x));
    checks.contiguous_channels(name, x);
    return storage;
}

// One more input of the layer.
void add_input(Linear& a, const Tensor& x) {
    a.x[a.inputs++] = {x.const_data_ptr(), x.stride(0), x.size(1)};
}

// Checks that `other` can be joined to `x`; returns its channels.
int64_t joined_channels(const Checks& checks, const char* name, const std::optional<Tensor>& other,
                        const Tensor& x) {
    if (!other) return 0;
    rows_of(checks, name, *other);
    checks.dtype(name, *other, x.scalar_type());
    checks.shape(name, *other, {x.size(0), other->size(1)});
    return other->size(1);
}

void add_residual(const Checks& checks, Linear& a, const std::optional<Tensor>& residual, const Tensor& x) {
    if (!residual) return;
    checks.placed("residual", *residual);
    checks.dtype("residual", *residual, x.scalar_type());
    checks.shape("residual", *residual, {x.size(0), a.columns});
    checks.contiguous_channels("residual", *residual);
    a.residual = residual->const_data_ptr();
    a.residual_row = residual->stride(0);
}

// Equal blocks of at most kRowBlock rows, a multiple of the threads where that leaves blocks of some size.
int64_t row_blocks(int64_t rows) {
    const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock, threads = torch::stable::get_num_threads();
    const int64_t even = (blocks + threads - 1) / threads * threads;
    return rows / even >= kRowBlock / 2 ? even : blocks;
}

void run(const Linear& a, int64_t rows, int64_t blocks) {
    const LinearKernels& kernels = VITRAIL_KERNELS(kLinear);
    const int64_t panels = panels_of(a.columns);
    const int64_t threads = torch::stable::get_num_threads();
    // few rows: the columns are shared out, too
    const int64_t parts = blocks >= threads ? 1 : std::min(panels, (2 * threads + blocks - 1) / blocks);
    const double work = double(rows) * double(a.depth) * double(a.columns) / double(blocks * parts);
    parallel(blocks * parts, grain(kGrain, work), [&](int64_t begin, int64_t end) {
        AlignedBuffer scratch(kernels.linear_scratch(a));
        for (int64_t task = begin; task < end; ++task) {
            const int64_t block = task / parts, part = task % parts;
            const int64_t row = rows * block / blocks, next = rows * (block + 1) / blocks;
            const int64_t panel = panels * part / parts, last = panels * (part + 1) / parts;
            kernels.linear(a, row, next - row, panel, last - panel, block, scratch.data);
        }
    });
}

void check_norm(const Checks& checks, double norm_eps) {
    if (!std::isfinite(norm_eps)) checks.fail("norm_eps must be finite, got ", norm_eps);
}

Tensor packed_linear(const Tensor& x, const std::optional<Tensor>& x2, const std::optional<Tensor>& x3,
                     const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& residual, int64_t columns, double norm_eps,
                     const std::string& activation) {
    constexpr Checks checks("packed_linear");
    const Storage storage = rows_of(checks, "x", x);
    check_norm(checks, norm_eps);
    const int64_t depth =
        x.size(1) + joined_channels(checks, "x2", x2, x) + joined_channels(checks, "x3", x3, x);
    Linear a = layer(checks, "weight", weight, "bias", bias, storage, x, depth, columns, x.size(0));
    a.activation = activation_of(checks, activation);
    a.norm_eps = norm_eps;
    add_residual(checks, a, residual, x);
    Tensor out = torch::stable::new_empty(x, {x.size(0), columns});
    if (x.size(0) == 0) return out;
    add_input(a, x);
    if (x2) add_input(a, *x2);
    if (x3) add_input(a, *x3);
    a.out = out.mutable_data_ptr();
    a.out_row = columns;
    run(a, x.size(0), row_blocks(x.size(0)));
    return out;
}

Tensor packed_mlp(const Tensor& x, const Tensor& weight1, const std::optional<Tensor>& bias1,
                  const Tensor& weight2, const std::optional<Tensor>& bias2,
                  const std::optional<Tensor>& residual, int64_t hidden, int64_t columns, double norm_eps,
                  const std::string& activation) {
    constexpr Checks checks("packed_mlp");
    const Storage storage = rows_of(checks, "x", x);
    check_norm(checks, norm_eps);
    Mlp a = {};
    a.first = layer(checks, "weight1", weight1, "bias1", bias1, storage, x, x.size(1), hidden, x.size(0));
    a.second = layer(checks, "weight2", weight2, "bias2", bias2, storage, x, hidden, columns, x.size(0));
    a.first.activation = activation_of(checks, activation);
    a.first.norm_eps = norm_eps;
    add_residual(checks, a.second, residual, x);
    const int64_t rows = x.size(0);
    Tensor out = torch::stable::new_empty(x, {rows, columns});
    if (rows == 0) return out;
    add_input(a.first, x);
    a.second.out = out.mutable_data_ptr();
    a.second.out_row = columns;

    const int64_t blocks = row_blocks(rows);
    if (blocks < torch::stable::get_num_threads()) {  // few rows: layer by layer, columns shared out
        Tensor between = torch::stable::new_empty(x, {rows, hidden});
        a.first.out = between.mutable_data_ptr();
        a.first.out_row = hidden;
        add_input(a.second, between);
        run(a.first, rows, blocks);
        run(a.second, rows, blocks);
        return out;
    }
    const LinearKernels& kernels = VITRAIL_KERNELS(kLinear);
    parallel(blocks, 1, [&](int64_t begin, int64_t end) {
        AlignedBuffer scratch(kernels.mlp_scratch(a));
        for (int64_t block = begin; block < end; ++block) {
            const int64_t row = rows * block / blocks, next = rows * (block + 1) / blocks;
            kernels.mlp(a, row, next - row, scratch.data);
        }
    });
    return out;
}

// Results of a convolution along one dimension of a map.
int64_t steps(const Checks& checks, const char* name, int64_t size, int64_t kernel, int64_t stride,
              int64_t padding) {
    if (kernel < 1 || kernel > kMaxExtent)
        checks.fail("the kernel must be from 1 to ", kMaxExtent, " ", name, ", got ", kernel);
    if (stride < 1 || stride > kMaxExtent)
        checks.fail("strides must be from 1 to ", kMaxExtent, ", got ", stride);
    if (padding < 0 || padding >= kernel)
        checks.fail("padding must be from 0 to less than the kernel, ", kernel, ", got ", padding);
    if (size + 2 * padding < kernel)
        checks.fail("x with its padding must be at least as ", name, " as the kernel, ", kernel, ", got ",
                    size, " + 2 * ", padding);
    return (size + 2 * padding - kernel) / stride + 1;
}

Tensor packed_conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t columns,
                   const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding) {
    constexpr Checks checks("packed_conv");
    checks.grid("x", x);
    const Storage storage = packed_storage(checks, "x", x);
    if (kernel.size() != 2 || stride.size() != 2 || padding.size() != 2)
        checks.fail("kernel, stride and padding must be two numbers each, got ", kernel.size(), ", ",
                    stride.size(), " and ", padding.size());
    Patches p = {};
    p.height = x.size(1);
    p.width = x.size(2);
    p.channels = x.size(3);
    p.image = x.stride(0);
    p.line = x.stride(1);
    p.column = x.stride(2);
    p.kernel_height = kernel[0];
    p.kernel_width = kernel[1];
    p.stride_height = stride[0];
    p.stride_width = stride[1];
    p.above = padding[0];
    p.left = padding[1];
    p.out_height = steps(checks, "high", p.height, kernel[0], stride[0], padding[0]);
    p.out_width = steps(checks, "wide", p.width, kernel[1], stride[1], padding[1]);
    if (p.channels < 1 || p.channels > kMaxExtent || kernel[0] > kMaxExtent / kernel[1] ||
        kernel[0] * kernel[1] > kMaxExtent / p.channels)
        checks.fail("a patch must have from 1 to ", kMaxExtent, " numbers, got ", kernel[0], " x ", kernel[1],
                    " of ", p.channels, " channels");
    if (x.size(0) > std::numeric_limits<int64_t>::max() / p.out_height / p.out_width)
        checks.fail("x has too many images, ", x.size(0));
    const int64_t rows = x.size(0) * p.out_height * p.out_width;
    Linear a = layer(checks, "weight", weight, "bias", bias, storage, x, kernel[0] * kernel[1] * p.channels,
                     columns, rows);
    Tensor out = torch::stable::new_empty(x, {x.size(0), p.out_height, p.out_width, columns});
    if (rows == 0) return out;
    a.x[a.inputs++].data = x.const_data_ptr();
    a.patches = &p;
    a.out = out.mutable_data_ptr();
    a.out_row = columns;
    run(a, rows, row_blocks(rows));
    return out;
}

// Factors of global response normalisation (ConvNeXt V2), 1 + weight * norm / (mean of norms + eps), from the
// sums of squares of an image's blocks of rows.
template <class T>
void response_factors(const T* squares, int64_t blocks, int64_t stride, int64_t columns, const T* weight,
                      double eps, T* factors) {
    double mean = 0;
    for (int64_t c = 0; c < columns; ++c) {
        double sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += double(squares[block * stride + c]);
        const double norm = std::sqrt(sum);
        mean += norm;
        factors[c] = T(norm);
    }
    mean = mean / double(columns) + eps;
    for (int64_t c = 0; c < columns; ++c) factors[c] = T(1 + double(weight[c]) * double(factors[c]) / mean);
}

Tensor packed_grn_mlp(const Tensor& x, const Tensor& weight1, const std::optional<Tensor>& bias1,
                      const Tensor& grn_weight, const Tensor& weight2, const std::optional<Tensor>& bias2,
                      const std::optional<Tensor>& residual, int64_t images, int64_t hidden, int64_t columns,
                      double norm_eps, double grn_eps) {
    constexpr Checks checks("packed_grn_mlp");
    const Storage storage = rows_of(checks, "x", x);
    const ScalarType wide = compute_type(storage);
    check_norm(checks, norm_eps);
    const int64_t rows = x.size(0);
    if (images < 0 || (images == 0 ? rows != 0 : rows % images != 0))
        checks.fail("images must divide the rows of x, ", rows, ", got ", images);
    const int64_t of_image = images == 0 ? 0 : rows / images;
    Linear first = layer(checks, "weight1", weight1, "bias1", bias1, storage, x, x.size(1), hidden, of_image);
    Linear second = layer(checks, "weight2", weight2, "bias2", bias2, storage, x, hidden, columns, of_image);
    first.activation = Activation::kGelu;
    first.norm_eps = norm_eps;
    checks.placed("grn_weight", grn_weight);
    checks.dtype("grn_weight", grn_weight, wide);
    checks.shape("grn_weight", grn_weight, {hidden});
    checks.contiguous_channels("grn_weight", grn_weight);
    add_residual(checks, second, residual, x);
    Tensor out = torch::stable::new_empty(x, {rows, columns});
    if (rows == 0) return out;

    // Blocks are of one image, and no matter how many threads there are always the same. As many images are
    // taken through both layers together as leave the hidden layer in cache.
    const int64_t per_image = (of_image + kRowBlock - 1) / kRowBlock;
    const int64_t bytes = storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
    const int64_t together = std::clamp<int64_t>(kHiddenBytes / (of_image * hidden * bytes), 1, images);
    const int64_t stride = panels_of(hidden) * kPanel;
    Tensor between = torch::stable::new_empty(x, {together * of_image, hidden});
    Tensor squares = torch::stable::new_empty(x, {together * per_image, stride}, wide);
    Tensor factors = torch::stable::new_empty(x, {together, hidden}, wide);
    add_input(first, x);
    add_input(second, between);
    first.out = between.mutable_data_ptr();
    first.out_row = hidden;
    first.image_rows = second.image_rows = of_image;
    first.squares = squares.mutable_data_ptr();
    second.factors = factors.const_data_ptr();
    second.out_row = columns;
    const void* const all = second.residual;
    for (int64_t image = 0; image < images; image += together) {
        const int64_t count = std::min(together, images - image);
        const int64_t row = image * of_image * bytes;
        first.x[0].data = static_cast<const char*>(x.const_data_ptr()) + row * x.stride(0);
        run(first, count * of_image, count * per_image);
        parallel(count, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const auto of = [&](auto one) {
                    using T = decltype(one);
                    response_factors(static_cast<const T*>(squares.const_data_ptr()) + i * per_image * stride,
                                     per_image, stride, hidden,
                                     static_cast<const T*>(grn_weight.const_data_ptr()), grn_eps,
                                     static_cast<T*>(factors.mutable_data_ptr()) + i * hidden);
                };
                wide == ScalarType::Double ? of(double()) : of(float());
            }
        });
        second.out = static_cast<char*>(out.mutable_data_ptr()) + row * columns;
        if (all) second.residual = static_cast<const char*>(all) + row * second.residual_row;
        run(second, count * of_image, count * per_image);
    }
    return out;
}

}  // namespace
}  // namespace vitrail

STABLE_TORCH_LIBRARY_IMPL(vitrail, CPU, m) {
    m.impl("packed_linear", TORCH_BOX(&vitrail::packed_linear));
    m.impl("packed_mlp", TORCH_BOX(&vitrail::packed_mlp));
    m.impl("packed_grn_mlp", TORCH_BOX(&vitrail::packed_grn_mlp));
    m.impl("packed_conv", TORCH_BOX(&vitrail::packed_conv));
}
