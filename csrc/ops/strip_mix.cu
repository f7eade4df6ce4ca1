// vitrail::strip_mix and its backward on a GPU.
#include "../cuda/launch.h"
#include "../cuda/strips.h"
#include "../dispatch/registration.h"
#include "strip_mix_host.h"

namespace vitrail {
namespace {

template <class Action>
void with_storage(Storage storage, Action action) {
    if (storage == Storage::kBFloat16)
        action(cuda::BFloat16());
    else if (storage == Storage::kFloat16)
        action(cuda::Float16());
    else
        action(float());
}

// Rounded up.
int64_t quotient(int64_t n, int64_t size) {
    return (n + size - 1) / size;
}

// The largest number of bytes, up to 16, that divides an address and all distances from it.
int piece(const void* data, std::initializer_list<int64_t> distances, int64_t size) {
    uint64_t bits = uint64_t(uintptr_t(data)) | 16;
    for (int64_t distance : distances) bits |= uint64_t(distance * size);
    return int(bits & -bits);
}

int piece(const Grid& grid, int64_t groups, int64_t size) {
    return piece(grid.data, {grid.image, grid.row, grid.column, groups}, size);
}

struct OnGpu {
    static void mix(const StripMix& a, const Tensor& x) {
        const cuda::MixTile tile = {a.length > cuda::kPlaces ? 2 : 1};
        with_storage(a.storage, [&](auto s) {
            using S = decltype(s);
            const cuda::MixPieces pieces = {piece(a.x, a.groups, sizeof(S)),
                                            piece(a.weight, {a.tap, a.to, a.from, a.groups}, sizeof(S)),
                                            piece(a.out, a.groups, sizeof(S))};
            const int64_t blocks = quotient(a.groups, cuda::kChunkGroups<S>) *
                                   quotient(a.length, tile.places()) *
                                   quotient(a.images * a.patches * a.strips, tile.strips());
            cuda::Launcher{x}(cuda::mix_strips<S>, blocks, cuda::kMixThreads, tile.shared_bytes(a.length), a,
                              pieces, tile);
        });
    }

#if !defined(VITRAIL_STANDALONE)
    static void sum_gradients(const StripMixGradients& a, const Tensor& x) {
        // Blocks of threads that keep a GPU busy; how a sum is cut depends on shapes alone.
        constexpr int64_t kBlocks = 256, kThreads = 256;
        const cuda::GradientTile tile = {a.length > cuda::kPlaces ? 2 : 1};
        const int64_t strips = a.images * a.patches * a.strips, segments = quotient(strips, cuda::kSegment);
        with_storage(a.storage, [&](auto s) {
            using S = decltype(s);
            const cuda::GradientPieces pieces = {piece(a.grad, a.groups, sizeof(S)),
                                                 piece(a.x, a.groups, sizeof(S))};
            const int64_t chunks = quotient(a.groups, cuda::kChunkGroups<S>),
                          tiles = quotient(a.length, tile.places()), blocks = chunks * tiles * tiles;
            const int64_t each = quotient(segments, quotient(kBlocks, blocks)),
                          count = quotient(segments, each);
            const int64_t groups = chunks * cuda::kChunkGroups<S>,
                          size = (3 * a.length + 1) * a.length * groups;
            Tensor sums = tensors::new_empty(x, {count, size}, ScalarType::Float);
            const cuda::PartialSums parts = {static_cast<float*>(sums.mutable_data_ptr()), cuda::Place(each),
                                             groups, size};
            const cuda::Launcher launch{x};
            launch(cuda::sum_strips<S>, count * blocks, tile.threads(), tile.shared_bytes(strips), a, pieces,
                   tile, parts);
            launch(cuda::add_parts<S>, quotient(size, kThreads), kThreads, 0, a, parts, cuda::Place(count));
        });
    }
#endif
};

}  // namespace
}  // namespace vitrail

VITRAIL_REGISTER(strip_mix, &vitrail::strip_mix<vitrail::OnGpu>)
VITRAIL_REGISTER_BACKWARD(strip_mix_backward, &vitrail::strip_mix_backward<vitrail::OnGpu>)
