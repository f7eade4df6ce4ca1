// vitrail::region_route on a GPU: one kernel takes the means of all regions of queries and keys, another
// multiplies them and chooses.
#include "../core/portable.h"
#include "../cuda/launch.h"
#include "../cuda/tiles.h"
#include "../dispatch/registration.h"
#include "region_route_host.h"

namespace vitrail {
namespace cuda {
namespace {

// --- means ---

constexpr int kUnits = 64;  // of a block: a region and some channels, for which ...
constexpr int kSlices = 4;  // ... so many threads share the rows of tokens
// Means are padded with zeros to whole steps of the products.
constexpr int kDepth = 32;

struct Means {
    Grid grid;
    Regions regions;
    int64_t blocks;  // of threads, for an image
    float* to;       // (image, region, channel)
};

VITRAIL_DEVICE Place least(Place a, Place b) {
    return a < b ? a : b;
}

// Rows are summed first, so that sums are of few numbers of like size.
template <class S, int kChunk>
__global__ void __launch_bounds__(kUnits* kSlices)
    region_means(const __grid_constant__ Means of_q, const __grid_constant__ Means of_k, int64_t images,
                 int channels, int padded) {
    const bool keys = blockIdx.x >= images * of_q.blocks;
    const Means& m = keys ? of_k : of_q;
    const Regions& r = m.regions;
    const unsigned block = blockIdx.x - (keys ? unsigned(images * of_q.blocks) : 0u);
    const int64_t image = block / unsigned(m.blocks);
    const int chunks = padded / kChunk, mine = int(threadIdx.x) % kUnits, slice = int(threadIdx.x) / kUnits;
    const int64_t unit = int64_t(block % unsigned(m.blocks)) * kUnits + mine;
    const Place region = Place(unit / chunks);
    const int channel = int(unit % chunks) * kChunk;
    const bool some = unit / chunks < r.count;
    float sums[kChunk] = {};
    Place tokens = 1;
    if (some && channel < channels) {
        const Place top = region / Place(r.across) * Place(r.height),
                    left = region % Place(r.across) * Place(r.width);
        const Place rows = least(Place(r.height), Place(r.grid_height) - top),
                    columns = least(Place(r.width), Place(r.grid_width) - left);
        tokens = rows * columns;
        const S* const from = static_cast<const S*>(m.grid.data) + image * m.grid.image + top * m.grid.row +
                              left * m.grid.column + channel;
        for (Place y = slice; y < rows; y += kSlices) {
            const S* at = from + y * m.grid.row;
            float row[kChunk] = {};
#pragma unroll 4
            for (Place x = 0; x < columns; ++x, at += m.grid.column) {
                struct alignas(kChunk * sizeof(S)) Chunk {
                    S numbers[kChunk];
                };
                const Chunk chunk = *reinterpret_cast<const Chunk*>(at);
#pragma unroll
                for (int c = 0; c < kChunk; ++c) row[c] += widen(chunk.numbers[c]);
            }
#pragma unroll
            for (int c = 0; c < kChunk; ++c) sums[c] += row[c];
        }
    }
    auto* const parts = static_cast<float (*)[kChunk][kUnits]>(shared_memory());
    if (slice > 0) {
#pragma unroll
        for (int c = 0; c < kChunk; ++c) parts[slice - 1][c][mine] = sums[c];
    }
    __syncthreads();
    if (slice > 0 || !some) return;
    float* const to = m.to + (image * r.count + region) * padded + channel;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
#pragma unroll
        for (int i = 0; i < kSlices - 1; ++i) sums[c] += parts[i][c][mine];
        to[c] = sums[c] / float(tokens);
    }
}

// --- choice ---

constexpr int kQueries = 8;  // query regions of a block, a warp each
constexpr int kKeys = 64;    // key regions of a tile, two for a lane

struct Choice {
    const float *q, *k;  // means, (image, region, channel)
    int padded;          // channels
    Place queries, keys, topk;
    Place blocks;      // of queries, for an image
    uint32_t* scores;  // (image, query, key); null: they are kept in shared memory
    int64_t* routes;   // (image, query, place)
};

// Some channels of the means of all queries of a block, and of a tile of keys.
struct Factors {
    static constexpr int kRows = kQueries + kKeys;
    static constexpr int kBytes = Rows<float, kDepth>::bytes(kRows);

    VITRAIL_DEVICE explicit Factors(int i)
        : q{reinterpret_cast<float*>(static_cast<unsigned char*>(shared_memory()) + i * kBytes)},
          k(q.from(kQueries)) {}

    const Rows<float, kDepth> q, k;
};

// Keeps the order: what is no number is larger than all, as torch.topk has it.
VITRAIL_DEVICE uint32_t rank_of(float x) {
    const uint32_t bits = bits_of(x + 0.0f);  // zero has one sign
    return x != x ? 0xffffffffu : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__global__ void __launch_bounds__(kQueries* kWarp) choose_regions(const __grid_constant__ Choice a) {
    constexpr int kPieces = kDepth / 4;  // of 16 bytes, in a row
    const int64_t image = Place(blockIdx.x) / a.blocks;
    const Place first = Place(blockIdx.x) % a.blocks * kQueries, query = first + warp();
    const float* const q = a.q + image * a.queries * a.padded;
    const float* const k = a.k + image * a.keys * a.padded;
    // Regions past the last are copies of it, whose scores nobody looks at.
    const auto load = [&](int stage, Place tile, int channel) {
        const Factors to(stage);
        for (int i = int(threadIdx.x); i < Factors::kRows * kPieces; i += int(blockDim.x)) {
            const int row = i / kPieces, c = i % kPieces * 4;
            const int64_t region =
                row < kQueries ? least(first + row, a.queries - 1) : least(tile + row - kQueries, a.keys - 1);
            copy_async(to.q[row] + c, (row < kQueries ? q : k) + region * a.padded + channel + c);
        }
        commit_copies();
    };
    uint32_t* const scores = a.scores
                                 ? a.scores + (image * a.queries + least(query, a.queries - 1)) * a.keys
                                 : reinterpret_cast<uint32_t*>(static_cast<unsigned char*>(shared_memory()) +
                                                               2 * Factors::kBytes) +
                                       warp() * int64_t(a.keys);
    load(0, 0, 0);
    int stage = 0;
    for (Place tile = 0; tile < a.keys; tile += kKeys) {
        float sums[2] = {};
        for (int channel = 0; channel < a.padded; channel += kDepth, stage ^= 1) {
            wait_for_copies<0>();
            __syncthreads();
            if (channel + kDepth < a.padded)
                load(stage ^ 1, tile, channel + kDepth);
            else if (tile + kKeys < a.keys)
                load(stage ^ 1, tile + kKeys, 0);
            const Factors factors(stage);
            const float* const row = factors.q[warp()];
            const float *const one = factors.k[lane()], *const other = factors.k[lane() + kWarp];
            float part[2] = {};
#pragma unroll
            for (int c = 0; c < kDepth; ++c) {
                part[0] += row[c] * one[c];
                part[1] += row[c] * other[c];
            }
            for (int i = 0; i < 2; ++i) sums[i] += part[i];
        }
        for (int i = 0; i < 2; ++i) {
            const Place key = tile + lane() + i * kWarp;
            if (key < a.keys && query < a.queries) scores[key] = rank_of(sums[i]);
        }
    }
    if (query >= a.queries) return;
    // The largest below the last one, again and again; of equals the one with the lower number. A lane looks
    // at the scores that it wrote itself.
    int64_t* const to = a.routes + (image * a.queries + query) * a.topk;
    uint64_t last = ~uint64_t(0);
    for (Place place = 0; place < a.topk; ++place) {
        uint64_t best = 0;
        for (Place key = lane(); key < a.keys; key += kWarp) {
            const uint64_t here = uint64_t(scores[key]) << 32 | uint32_t(0x7fffffff - key);
            if (here < last && here > best) best = here;
        }
        const uint32_t rank = __reduce_max_sync(0xffffffffu, uint32_t(best >> 32));
        const uint32_t key =
            __reduce_max_sync(0xffffffffu, uint32_t(best >> 32) == rank ? uint32_t(best) : 0u);
        last = uint64_t(rank) << 32 | key;
        if (lane() == 0) to[place] = 0x7fffffff - int64_t(key);
    }
}

}  // namespace
}  // namespace cuda

namespace {

// Scores of so many key regions are kept in shared memory, those of more in the device's.
constexpr int64_t kMostKept = 2048;

template <class S, int kChunk>
void run_means(cuda::Means of_q, cuda::Means of_k, const Tensor& q, int64_t padded) {
    for (cuda::Means* m : {&of_q, &of_k})
        m->blocks = (m->regions.count * (padded / kChunk) + cuda::kUnits - 1) / cuda::kUnits;
    cuda::Launcher{q}(cuda::region_means<S, kChunk>, q.size(0) * (of_q.blocks + of_k.blocks),
                      cuda::kUnits * cuda::kSlices,
                      (cuda::kSlices - 1) * kChunk * cuda::kUnits * int(sizeof(float)), of_q, of_k, q.size(0),
                      int(q.size(3)), int(padded));
}

template <class S>
void run_means(const cuda::Means& of_q, const cuda::Means& of_k, const Tensor& q, int64_t padded) {
    constexpr int kChunk = 16 / int(sizeof(S));
    const auto in_chunks = [&](const Grid& grid) {
        return uintptr_t(grid.data) % 16 == 0 &&
               (grid.image | grid.row | grid.column | q.size(3)) % kChunk == 0;
    };
    if (in_chunks(of_q.grid) && in_chunks(of_k.grid))
        run_means<S, kChunk>(of_q, of_k, q, padded);
    else
        run_means<S, 1>(of_q, of_k, q, padded);
}

struct OnGpu {
    static void route(const RegionRoute& a, const Tensor& q, const Tensor& k) {
        const int64_t images = q.size(0), queries = a.q_regions.count, keys = a.k_regions.count;
        const int64_t padded = (q.size(3) + cuda::kDepth - 1) / cuda::kDepth * cuda::kDepth;
        Tensor means = tensors::new_empty(q, {images * (queries + keys), padded}, ScalarType::Float);
        float* const of_q = static_cast<float*>(means.mutable_data_ptr());
        float* const of_k = of_q + images * queries * padded;
        const cuda::Means q_means = {grid_of(q), a.q_regions, 0, of_q},
                          k_means = {grid_of(k), a.k_regions, 0, of_k};
        if (a.storage == Storage::kFloat32)
            run_means<float>(q_means, k_means, q, padded);
        else if (a.storage == Storage::kBFloat16)
            run_means<cuda::BFloat16>(q_means, k_means, q, padded);
        else
            run_means<cuda::Float16>(q_means, k_means, q, padded);

        cuda::Choice choice = {};
        choice.q = of_q;
        choice.k = of_k;
        choice.padded = int(padded);
        choice.queries = cuda::Place(queries);
        choice.keys = cuda::Place(keys);
        choice.topk = cuda::Place(a.topk);
        choice.blocks = cuda::Place((queries + cuda::kQueries - 1) / cuda::kQueries);
        choice.routes = a.routes;
        int64_t shared = 2 * cuda::Factors::kBytes;
        Optional scores;  // until the kernel is launched
        if (keys > kMostKept) {
            scores = tensors::new_empty(q, {images, queries, keys}, ScalarType::Int);
            choice.scores = static_cast<uint32_t*>(scores->mutable_data_ptr());
        } else {
            shared += cuda::kQueries * keys * int64_t(sizeof(uint32_t));
        }
        cuda::Launcher{q}(cuda::choose_regions, images * choice.blocks, cuda::kQueries * cuda::kWarp,
                          int(shared), choice);
    }
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(region_route, &vitrail::region_route<vitrail::OnGpu>)
