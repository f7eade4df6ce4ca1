// vitrail::connectivity_topk on a GPU.
//
// One kernel writes down the rows that are mixed: |basis| of the keys, small entries zero. Then each query
// has a warp, whose scores live in shared memory: it mixes the few rows that its coefficients keep, which it
// reads from the caches, and looks for the largest.
#include <cassert>

#include "../core/portable.h"
#include "../cuda/launch.h"
#include "../cuda/selection.h"
#include "../dispatch/registration.h"
#include "connectivity_topk_host.h"

namespace vitrail {
namespace cuda {
namespace {

// --- rows ---

constexpr int kSide = 32;  // of a tile that is turned over
constexpr int kPitch = kSide + 1;
// Rows are padded with zeros to what a warp reads at once, four numbers for each lane.
constexpr int kStep = 4 * kWarp;

VITRAIL_DEVICE float entry(const Connectivity& c, int64_t at) {
    switch (c.basis_storage) {
        case Storage::kFloat64:
            return float(static_cast<const double*>(c.basis)[at]);
        case Storage::kBFloat16:
            return widen(static_cast<const BFloat16*>(c.basis)[at]);
        case Storage::kFloat16:
            return widen(static_cast<const Float16*>(c.basis)[at]);
        default:
            return static_cast<const float*>(c.basis)[at];
    }
}

VITRAIL_DEVICE int64_t token_of(const Connectivity& c, int64_t image, int64_t key) {
    if (!c.candidates) return key;
    const int64_t at = image * c.candidates_image + key * c.candidates_key;
    const int64_t token = c.wide_candidates ? static_cast<const int64_t*>(c.candidates)[at]
                                            : static_cast<const int32_t*>(c.candidates)[at];
    assert(token >= 0 && token < c.tokens && "index out of range");
    return token;
}

// A block of threads has a tile: `kSide` rows of as many keys. Lanes read along what lies together.
__global__ void __launch_bounds__(256)
    prepare_rows(const __grid_constant__ Connectivity c, float* to, int64_t stride) {
    auto* const tile = static_cast<float (*)[kPitch]>(shared_memory());
    const int64_t columns = stride / kSide, lines = (c.rows + kSide - 1) / kSide;
    const int64_t first_key = blockIdx.x % columns * kSide, first_row = blockIdx.x / columns % lines * kSide,
                  image = blockIdx.x / columns / lines;
    const bool along_rows = c.basis_row < c.basis_token;
    for (int i = warp(); i < kSide; i += int(blockDim.x) / kWarp) {
        const int row = along_rows ? lane() : i, key = along_rows ? i : lane();
        float magnitude = 0.0f;
        if (first_row + row < c.rows && first_key + key < c.keys) {
            const int64_t token = token_of(c, image, first_key + key);
            magnitude = fabsf(entry(c, (first_row + row) * c.basis_row + token * c.basis_token));
            if (magnitude <= float(c.basis_threshold)) magnitude = 0.0f;
        }
        tile[row][key] = magnitude;
    }
    __syncthreads();
    for (int row = warp(); row < kSide && first_row + row < c.rows; row += int(blockDim.x) / kWarp)
        to[(image * c.rows + first_row + row) * stride + first_key + lane()] = tile[row][lane()];
}

// --- choice ---

struct alignas(16) Numbers {
    float x[4];
};
struct alignas(16) Integers {
    int x[4];
};
struct alignas(8) Term {
    float coefficient;
    int row;
};

// The shared memory of a warp: numbers that are chosen from, first the logits, then the scores, and the rows
// that are mixed.
struct Layout {
    int64_t stride;  // of the prepared rows
    int numbers, terms;

    explicit Layout(const Connectivity& c)
        : stride((c.keys + kStep - 1) / kStep * kStep),
          numbers(int((std::max(stride, c.rows) + 3) / 4 * 4)),
          terms(int((some_coefficients(c) ? c.num_coefficients : c.rows) + 1) / 2 * 2) {}

    VITRAIL_INLINE int bytes() const { return numbers * int(sizeof(int)) + terms * int(sizeof(Term)); }
    VITRAIL_INLINE static bool some_coefficients(const Connectivity& c) {
        return c.num_coefficients > 0 && c.num_coefficients < c.rows;
    }
};

// Writes down the terms of a query's mixture, in the order of the basis; returns how many there are.
template <class S>
VITRAIL_DEVICE int keep_coefficients(const Connectivity& c, const S* logits, int64_t logit_stride,
                                     int* numbers, Term* terms) {
    const int count = int(c.rows);
    float top = -INFINITY;
    for (int i = lane(); i < count; i += kWarp) {
        const float logit = widen(logits[i * logit_stride]);
        top = fmaxf(top, logit);
        numbers[i] = ordered(logit);
    }
    top = across_warp(top, [](float x, float y) { return fmaxf(x, y); });
    const auto exponential = [&](int i) { return exp2_fast((number_of(numbers[i]) - top) * kLog2E); };
    float total = 0.0f;
    for (int i = lane(); i < count; i += kWarp) total += exponential(i);
    const float scale = 1.0f / across_warp(total, [](float x, float y) { return x + y; });
    const bool by_number = Layout::some_coefficients(c);
    const float threshold = c.num_coefficients > 0 ? 0.0f : float(c.coefficient_threshold);
    Cut cut = by_number ? find_cut(numbers, count, int(c.num_coefficients)) : Cut{};
    int kept = 0;
    for (int first = 0; first < count; first += kWarp) {
        const int i = first + lane();
        const bool some = i < count;
        const float coefficient = some ? exponential(i) * scale : 0.0f;
        const unsigned chosen = by_number ? cut.chosen(some, some ? numbers[i] : 0)
                                          : __ballot_sync(0xffffffffu, some && !(coefficient <= threshold));
        if (chosen >> lane() & 1u) terms[kept + __popc(chosen & lanes_below())] = {coefficient, i};
        kept += __popc(chosen);
    }
    return kept;
}

template <class S>
__global__ void __launch_bounds__(256)
    choose_keys(const __grid_constant__ ConnectivityTopk a, const __grid_constant__ Layout layout,
                const float* rows, Place queries) {
    const Connectivity& c = a.choice;
    const Place at = Place(blockIdx.x * (blockDim.x / kWarp)) + warp();  // of all images and heads
    if (at >= queries) return;
    const Place per_head = Place(a.queries), heads = Place(a.heads);
    const int64_t query = at % per_head, head = at / per_head % heads, image = at / per_head / heads;
    int* const numbers =
        reinterpret_cast<int*>(static_cast<unsigned char*>(shared_memory()) + warp() * layout.bytes());
    Term* const terms = reinterpret_cast<Term*>(numbers + layout.numbers);
    const S* const logits =
        static_cast<const S*>(a.logits) + image * a.image + head * a.head + query * a.query;
    const int kept = keep_coefficients(c, logits, a.row, numbers, terms);
    __syncwarp();

    const int keys = int(c.keys);
    if (c.candidates) rows += image * c.rows * layout.stride;
    for (int first = 4 * lane(); first < layout.stride; first += kStep) {
        float sums[4] = {};
#pragma unroll 4
        for (int i = 0; i < kept; ++i) {
            const Term term = terms[i];
            const Numbers row = *reinterpret_cast<const Numbers*>(rows + term.row * layout.stride + first);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[j] += term.coefficient * row.x[j];
        }
        Integers scores;  // not negative: the sign, which only NaN may have, is dropped
#pragma unroll
        for (int j = 0; j < 4; ++j) scores.x[j] = int(bits_of(sums[j]) & uint32_t(INT_MAX));
        *reinterpret_cast<Integers*>(numbers + first) = scores;
    }
    __syncwarp();

    int64_t* to = a.out + at * a.slots;
    if (c.num_keys == 0) {
        for (int i = lane(); i < keys; i += kWarp)
            to[i] = number_of(numbers[i]) > float(c.score_threshold) ? i : -1;
        return;
    }
    Cut cut = find_cut(numbers, keys, int(c.num_keys));
    for (int first = 0; first < keys; first += kWarp) {
        const int i = first + lane();
        const unsigned chosen = cut.chosen(i < keys, i < keys ? numbers[i] : 0);
        if (chosen >> lane() & 1u) to[__popc(chosen & lanes_below())] = i;
        to += __popc(chosen);
    }
}

}  // namespace
}  // namespace cuda

namespace {

// What a block of threads may have on any GPU, and what fits into it: keys, or rows if there are more, and
// twice the rows.
constexpr int kSharedBytes = 99 << 10;
constexpr int64_t kMostNumbers = 24 << 10;
static_assert(4 * (kMostNumbers + cuda::kStep + 16) <= kSharedBytes);

template <class S>
void run_choice(const ConnectivityTopk& a, const Tensor& logits, const float* rows) {
    constexpr int kMostWarps = 8;
    const cuda::Layout layout(a.choice);
    const int warps = std::min(kMostWarps, kSharedBytes / layout.bytes());
    const cuda::Place queries = cuda::Place(logits.size(0) * a.heads * a.queries);
    cuda::Launcher{logits}(cuda::choose_keys<S>, (queries + warps - 1) / warps, warps * cuda::kWarp,
                           warps * layout.bytes(), a, layout, rows, queries);
}

struct OnGpu {
    // A candidate out of range stops the program, as an index out of range does in PyTorch's own kernels.
    static void admit(const Checks& checks, const ConnectivityTopk& a, const Tensor& logits,
                      const Optional&) {
        const Connectivity& c = a.choice;
        if (logits.numel() / c.rows > kMaxExtent)
            checks.fail("logits must have at most ", kMaxExtent, " queries on a GPU, got shape ",
                        shape_of(logits));
        const int64_t numbers = std::max(c.keys, c.rows) + 2 * c.rows;
        if (numbers > kMostNumbers)
            checks.fail("keys and rows of the basis must fit into the memory that a block of threads has: ",
                        "the larger of their numbers plus twice the rows must be at most ", kMostNumbers,
                        ", got ", numbers, "; VITRAIL_OPS=reference takes more");
    }

    static void choose(const Checks&, const ConnectivityTopk& a, const Tensor& logits,
                       const Optional& candidates) {
        constexpr int kThreads = 256;
        const int64_t images = candidates ? logits.size(0) : 1, stride = cuda::Layout(a.choice).stride;
        Tensor rows = tensors::new_empty(logits, {images, a.choice.rows, stride}, ScalarType::Float);
        float* const to = static_cast<float*>(rows.mutable_data_ptr());
        const int64_t lines = (a.choice.rows + cuda::kSide - 1) / cuda::kSide;
        cuda::Launcher{logits}(cuda::prepare_rows, images * lines * (stride / cuda::kSide), kThreads,
                               cuda::kSide * cuda::kPitch * int(sizeof(float)), a.choice, to, stride);
        if (a.storage == Storage::kFloat32)
            run_choice<float>(a, logits, to);
        else if (a.storage == Storage::kBFloat16)
            run_choice<cuda::BFloat16>(a, logits, to);
        else
            run_choice<cuda::Float16>(a, logits, to);
    }
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(connectivity_topk, &vitrail::connectivity_topk<vitrail::OnGpu>)
