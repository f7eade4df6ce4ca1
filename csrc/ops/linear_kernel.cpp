// Linear layers, MLPs and convolutions for one instruction set. Compiled once per backend, with
// -DVITRAIL_ISA=<namespace>.
#include "../core/activation.h"
#include "../core/gemm.h"
#include "linear.h"

namespace vitrail::VITRAIL_ISA {
namespace {

template <class S>
struct Kernel {
    using T = Compute<S>;
    static constexpr int W = kLanes<T>;
    static constexpr int kDepth = Product<S>::kDepth;
    using V = Vec<T, W>;

    static int64_t padded(int64_t depth) { return (depth + kDepth - 1) / kDepth * kDepth; }
    static int64_t panels(const Linear& a) { return (a.columns + kPanel - 1) / kPanel; }
    // Whether the rows of x must be written anew before they can be multiplied.
    static bool prepares(const Linear& a) { return gathers(a) || changes(a); }
    static bool gathers(const Linear& a) { return a.inputs > 1 || a.patches; }
    static bool changes(const Linear& a) { return a.norm_eps >= 0 || a.factors || a.depth % kDepth != 0; }
    static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    static int64_t prepared_size(const Linear& a) {
        return prepares(a) ? aligned(kRowBlock * padded(a.depth) * int64_t(sizeof(S))) : 0;
    }

    static const S* row_of(const Rows& x, int64_t row) { return static_cast<const S*>(x.data) + row * x.row; }

    // A row of all inputs.
    static void join(const Linear& a, int64_t row, S* to) {
        for (int i = 0; i < a.inputs; to += a.x[i++].channels)
            __builtin_memcpy(to, row_of(a.x[i], row), a.x[i].channels * sizeof(S));
    }

    // Few numbers, without a call: the last two pieces overlap.
    static void copy(const S* from, int64_t count, S* to) {
        const char* const source = reinterpret_cast<const char*>(from);
        char* const target = reinterpret_cast<char*>(to);
        const int64_t bytes = count * int64_t(sizeof(S));
        const auto pieces = [&](auto size) VITRAIL_INLINED {
            constexpr int kSize = decltype(size)::kValue;
            if (bytes < kSize) return false;
            for (int64_t at = 0; at + kSize <= bytes; at += kSize)
                __builtin_memcpy(target + at, source + at, kSize);
            __builtin_memcpy(target + bytes - kSize, source + bytes - kSize, kSize);
            return true;
        };
        pieces(Index<64>()) || pieces(Index<32>()) || pieces(Index<16>()) || pieces(Index<8>()) ||
            pieces(Index<4>()) || pieces(Index<2>());
    }

    // A row of patches.
    static void cut(const Linear& a, int64_t row, S* to) {
        const Patches& p = *a.patches;
        const int64_t line = row / p.out_width, image = line / p.out_height;
        const int64_t top = line % p.out_height * p.stride_height - p.above;
        const int64_t left = row % p.out_width * p.stride_width - p.left;
        const int64_t past = p.width - left;
        const int64_t begin = left < 0 ? -left : 0, end = past < p.kernel_width ? past : p.kernel_width;
        const int64_t wide = p.kernel_width * p.channels;
        const bool beside = p.column == p.channels;
        const S* const map = static_cast<const S*>(a.x[0].data) + image * p.image;
        for (int64_t y = top; y < top + p.kernel_height; ++y, to += wide) {
            const bool on_map = y >= 0 && y < p.height && begin < end;
            if (!on_map || end - begin < p.kernel_width) __builtin_memset(to, 0, wide * sizeof(S));
            if (!on_map) continue;
            const S* from = map + y * p.line + (left + begin) * p.column;
            S* at = to + begin * p.channels;
            if (beside)
                copy(from, (end - begin) * p.channels, at);
            else
                for (int64_t x = begin; x < end; ++x, from += p.column, at += p.channels)
                    copy(from, p.channels, at);
        }
    }

    // The rows of x with mean 0 and variance 1, or times their factors, or as they are; padded to whole
    // elements.
    static void prepare(const Linear& a, int64_t row, int64_t rows, S* to) {
        const int64_t depth = a.depth, stride = padded(depth), whole = depth / W * W;
        for (int64_t r = 0; r < rows; ++r, to += stride) {
            if (gathers(a)) a.patches ? cut(a, row + r, to) : join(a, row + r, to);
            if (!changes(a)) continue;
            const S* const from = gathers(a) ? to : row_of(a.x[0], row + r);
            const T* factor =
                a.factors ? static_cast<const T*>(a.factors) + row / a.image_rows * depth : nullptr;
            T mean = 0, scale = 1;
            if (a.norm_eps >= 0) {
                V sum = {}, square = {};
                for (int64_t c = 0; c < whole; c += W) sum += widen<W>(from + c);
                mean = total(sum);
                for (int64_t c = whole; c < depth; ++c) mean += one(from + c);
                mean /= T(depth);
                for (int64_t c = 0; c < whole; c += W) {
                    const V x = widen<W>(from + c) - mean;
                    square += x * x;
                }
                T variance = total(square);
                for (int64_t c = whole; c < depth; ++c) {
                    const T x = one(from + c) - mean;
                    variance += x * x;
                }
                scale = T(1) / T(__builtin_sqrt(double(variance / T(depth)) + a.norm_eps));
            }
            for (int64_t c = 0; c < whole; c += W) {
                const V x = (widen<W>(from + c) - mean) * scale;
                narrow<W>(to + c, factor ? x * load(factor + c) : x);
            }
            for (int64_t c = whole; c < stride; c += 4) {
                const Vec<T, 4> x =
                    c < depth ? (widen_some(from + c, depth - c) - mean) * scale : Vec<T, 4>{};
                Vec<T, 4> kept = x;
                for (int i = 0; i < 4; ++i) kept[i] *= c + i >= depth ? T(0) : factor ? factor[c + i] : T(1);
                narrow_some(to + c, kept, stride - c);
            }
        }
    }

    static T one(const S* from) { return widen_some(from, 1)[0]; }

    static T total(V v) {
        const V rows[4] = {v, V{}, V{}, V{}};
        return reduce_rows<T>(rows, Add())[0];
    }

    static Factors<S> factors(const Linear& a, int64_t row, const S* prepared, const void* weight) {
        Factors<S> f = {};
        f.a = prepared ? prepared : row_of(a.x[0], row);
        f.a_row = prepared ? padded(a.depth) : a.x[0].row;
        f.a_step = kDepth;
        f.b = static_cast<const S*>(weight);
        f.b_step = kPanel * kDepth;
        f.depth = padded(a.depth) / kDepth;
        return f;
    }

    // Panel by panel: the product, then `finish(panel, columns, sums)` with `kPanel` sums a row.
    template <class Finish>
    static void each_panel(const Linear& a, int64_t row, int64_t rows, const S* prepared, int64_t first,
                           int64_t count, T* sums, Finish finish) {
        for (int64_t panel = first; panel < first + count; ++panel) {
            const int64_t left = a.columns - panel * kPanel, columns = left < kPanel ? left : kPanel;
            const S* weight = static_cast<const S*>(a.weight) + panel * kPanel * padded(a.depth);
            multiply<S>(rows, (columns + W - 1) / W, factors(a, row, prepared, weight), sums, kPanel, false);
            finish(panel, columns, sums);
        }
    }

    // Bias, activation and residual for one panel's sums, which then are rows of `to`.
    static void finish(const Linear& a, int64_t row, int64_t rows, int64_t panel, int64_t columns,
                       const T* sums, int64_t sums_row, S* to, int64_t to_row, T* squares = nullptr) {
        const int64_t first = panel * kPanel;
        const T* const bias = a.bias ? static_cast<const T*>(a.bias) + first : nullptr;
        for (int64_t c = 0; c < columns; c += W) {
            const int64_t left = columns - c;
            V square = {}, shift = {};
            int64_t token = a.bias ? row % a.bias_rows : 0;
            for (int64_t r = 0; r < rows; ++r) {
                if (bias && (r == 0 || a.bias_rows > 1)) {
                    const T* from = bias + token * a.columns + c;
                    shift = left >= W ? load(from) : some(from, left);
                    if (++token == a.bias_rows) token = 0;
                }
                V y = load(sums + r * sums_row + c) + shift;
                if (a.activation == Activation::kGelu) y = gelu<S, W>(y);
                if (a.residual) {
                    const S* from =
                        static_cast<const S*>(a.residual) + (row + r) * a.residual_row + first + c;
                    y += left >= W ? widen<W>(from) : some(from, left);
                }
                square += y * y;
                if (left >= W) {
                    narrow<W>(to + r * to_row + c, y);
                } else {
                    S tail[W];
                    narrow<W>(tail, y);
                    __builtin_memcpy(to + r * to_row + c, tail, left * sizeof(S));
                }
            }
            if (squares) store(squares + first + c, square);
        }
    }

    template <class From>
    static V some(const From* from, int64_t count) {
        From all[W] = {};
        __builtin_memcpy(all, from, count * sizeof(From));
        return widen<W>(all);
    }

    static int64_t linear_scratch(const Linear& a) {
        return prepared_size(a) + kRowBlock * kPanel * int64_t(sizeof(T));
    }

    static void linear(const Linear& a, int64_t row, int64_t rows, int64_t panel, int64_t count,
                       int64_t block, void* scratch) {
        S* prepared = nullptr;
        T* sums = reinterpret_cast<T*>(static_cast<char*>(scratch) + prepared_size(a));
        if (prepares(a)) prepare(a, row, rows, prepared = static_cast<S*>(scratch));
        T* squares = a.squares ? static_cast<T*>(a.squares) + block * panels(a) * kPanel : nullptr;
        each_panel(a, row, rows, prepared, panel, count, sums,
                   [&](int64_t at, int64_t columns, const T* from) {
                       S* to = static_cast<S*>(a.out) + row * a.out_row + at * kPanel;
                       finish(a, row, rows, at, columns, from, kPanel, to, a.out_row, squares);
                   });
    }

    static int64_t mlp_scratch(const Mlp& a) {
        return linear_scratch(a.first) + aligned(kRowBlock * kHiddenBlock * int64_t(sizeof(S))) +
               kRowBlock * panels(a.second) * kPanel * int64_t(sizeof(T));
    }

    // The hidden layer is computed, and used up, a block of columns at a time; it never reaches memory.
    static void mlp(const Mlp& a, int64_t row, int64_t rows, void* scratch) {
        char* at = static_cast<char*>(scratch);
        S* prepared = nullptr;
        if (prepares(a.first)) prepare(a.first, row, rows, prepared = reinterpret_cast<S*>(at));
        at += prepared_size(a.first);
        T* sums = reinterpret_cast<T*>(at);
        at += kRowBlock * kPanel * sizeof(T);
        S* hidden = reinterpret_cast<S*>(at);
        at += aligned(kRowBlock * kHiddenBlock * sizeof(S));
        T* out = reinterpret_cast<T*>(at);

        const int64_t wide = panels(a.second), out_row = wide * kPanel;
        for (int64_t first = 0; first < a.first.columns; first += kHiddenBlock) {
            const int64_t left = a.first.columns - first, count = left < kHiddenBlock ? left : kHiddenBlock;
            const int64_t whole = padded(count);
            each_panel(a.first, row, rows, prepared, first / kPanel, (count + kPanel - 1) / kPanel, sums,
                       [&](int64_t panel, int64_t columns, const T* from) {
                           S* to = hidden + panel * kPanel - first;
                           finish(a.first, row, rows, panel, columns, from, kPanel, to, kHiddenBlock);
                       });
            for (int64_t r = 0; whole > count && r < rows; ++r)
                __builtin_memset(hidden + r * kHiddenBlock + count, 0, (whole - count) * sizeof(S));
            for (int64_t panel = 0; panel < wide; ++panel) {
                Factors<S> f = {};
                f.a = hidden;
                f.a_row = kHiddenBlock;
                f.a_step = kDepth;
                f.b = static_cast<const S*>(a.second.weight) + panel * kPanel * padded(a.second.depth) +
                      first * kPanel;
                f.b_step = kPanel * kDepth;
                f.depth = whole / kDepth;
                const int64_t columns = a.second.columns - panel * kPanel;
                const int64_t vectors = ((columns < kPanel ? columns : kPanel) + W - 1) / W;
                multiply<S>(rows, vectors, f, out + panel * kPanel, out_row, first > 0);
            }
        }
        for (int64_t panel = 0; panel < wide; ++panel) {
            const int64_t columns = a.second.columns - panel * kPanel;
            S* to = static_cast<S*>(a.second.out) + row * a.second.out_row + panel * kPanel;
            finish(a.second, row, rows, panel, columns < kPanel ? columns : kPanel, out + panel * kPanel,
                   out_row, to, a.second.out_row);
        }
    }
};

template <class Action>
auto with_kernel(Storage storage, Action action) {
    switch (storage) {
        case Storage::kFloat64:
            return action(Kernel<double>());
        case Storage::kBFloat16:
            return action(Kernel<BFloat16>());
        default:
            return action(Kernel<float>());
    }
}

int64_t linear_scratch(const Linear& a) {
    return with_kernel(a.storage, [&](auto kernel) { return kernel.linear_scratch(a); });
}

int64_t mlp_scratch(const Mlp& a) {
    return with_kernel(a.first.storage, [&](auto kernel) { return kernel.mlp_scratch(a); });
}

void linear(const Linear& a, int64_t row, int64_t rows, int64_t panel, int64_t panels, int64_t block,
            void* scratch) {
    with_kernel(a.storage, [&](auto kernel) { kernel.linear(a, row, rows, panel, panels, block, scratch); });
}

void mlp(const Mlp& a, int64_t row, int64_t rows, void* scratch) {
    with_kernel(a.first.storage, [&](auto kernel) { kernel.mlp(a, row, rows, scratch); });
}

}  // namespace

const LinearKernels kLinear = {linear_scratch, mlp_scratch, linear, mlp};

}  // namespace vitrail::VITRAIL_ISA
