// Products of bfloat16 rows with packed weights: y = x w^T + b.
//
// Four tiles of sums take two tiles of rows and two of weights, so each loaded tile is multiplied twice. A tile that comes
// from the first-level cache is multiplied at full speed, so the loops are those of K. Goto and R. van de Geijn (Anatomy of
// High-Performance Matrix Multiplication, 2008). A chunk of rows is packed and stays in the second-level cache. Of a panel,
// which is 32 columns of the result, kDepth numbers stay in the first-level cache while all rows of the chunk go by. In
// between, sums wait in float32. A number of the result is summed in the same order whatever rows are computed beside it.

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "tiles.h"

// What the caller passes; sizes count numbers.
struct Product {
    const bf16* rows;  // [count, in], `step` numbers from one to the next
    int64_t step, count, in, out;
    const bf16* weights;  // packed: [panels, in / 32, tile of 16 columns, pair of numbers, column, number of the pair]
    const bf16* bias;     // [out], or null
    bf16* result;         // [count, out]
    int64_t threads;
};

namespace {

constexpr int64_t kWide = 2 * kTile;       // rows of a block, and columns of a panel
constexpr int64_t kBlock = 2 * kTileSize;  // numbers of a block or a panel that are multiplied in one step
constexpr int64_t kDepth = 512;            // numbers of a row at a time
constexpr int64_t kChunk = 1 << 19;        // numbers of a chunk: half of a second-level cache
constexpr int64_t kGroup = 8 * kWide;      // columns that are written together
constexpr int64_t kFewRows = 128;          // of a thread; with fewer, threads divide the panels too

// Packs rows: for each depth, for each block of 32 rows, its steps. Missing rows and numbers are zeros.
void pack(const Product& call, int64_t from, int64_t count, bf16* packed) {
    const int64_t in = up(call.in, kStep), filled = up(count, kWide);
    for (int64_t row = 0; row < filled; ++row) {
        const bf16* source = call.rows + (from + row) * call.step;
        for (int64_t at = 0; at < in; at += kStep) {
            const int64_t start = at / kDepth * kDepth, depth = std::min(kDepth, in - start);
            bf16* block = packed + start * filled + row / kWide * kWide * depth;
            _mm512_store_si512(block + (at - start) * kWide + row % kWide * kStep,
                row < count ? _mm512_maskz_loadu_epi16(first(call.in - at), source + at) : _mm512_setzero_si512());
        }
    }
    finish_stores();
}

// Multiplies a block with a panel over one depth, and adds to the sums. `ahead` are weights to fetch from memory meanwhile.
void multiply_block(const bf16* rows, const bf16* weights, int64_t depth, float* sums, bool fresh, const bf16*& ahead,
    int64_t lines) {
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_stream_loadd(0, sums, 64);
        _tile_stream_loadd(1, sums + 256, 64);
        _tile_stream_loadd(2, sums + 512, 64);
        _tile_stream_loadd(3, sums + 768, 64);
    }
    for (int64_t at = 0; at < depth; at += kStep, rows += kBlock, weights += kBlock) {
        for (int64_t line = 0; line < lines; ++line, ahead += kStep) _mm_prefetch(ahead, _MM_HINT_T1);
        _tile_stream_loadd(4, rows, 64);  // `stream`: rows go by, and the weights stay in the first-level cache
        _tile_loadd(6, weights, 64);
        _tile_loadd(7, weights + kTileSize, 64);
        _tile_stream_loadd(5, rows + kTileSize, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}

__m512 floats(const bf16* numbers, int64_t count) {
    const __m256i loaded = _mm256_maskz_loadu_epi16(first16(count), numbers);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(loaded), 16));
}

// Adds the bias to a block's sums and rounds them.
void round(const float* sums, __m512 left, __m512 right, bf16* rounded) {
    for (int row = 0; row < kWide; ++row) {
        const float* at = sums + row / kTile * kTileSize + row % kTile * kTile;
        const __m512 low = _mm512_add_ps(_mm512_load_ps(at), left);
        const __m512 high = _mm512_add_ps(_mm512_load_ps(at + 256), right);
        _mm512_store_si512(rounded + row * kGroup, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
}

// Writes rounded rows.
void write(const bf16* rounded, int64_t count, int64_t columns, bf16* result, int64_t step) {
    for (int64_t row = 0; row < count; ++row, rounded += kGroup, result += step) {
        for (int64_t at = 0; at < columns; at += kStep) {
            _mm512_mask_storeu_epi16(result + at, first(columns - at), _mm512_load_si512(rounded + at));
        }
    }
}

// Computes some rows and columns of a product; both begin at a multiple of 32. Returns false without memory.
bool multiply_part(const Product& call, int64_t from, int64_t to, int64_t left, int64_t right) {
    static thread_local Buffer buffer;
    const int64_t in = up(call.in, kStep);
    const int64_t chunks = (to - from) / std::max(kWide, kChunk / in) + 1;  // two even ones are faster than a full one
    const int64_t chunk = up((to - from + chunks - 1) / chunks, kWide);
    bf16* const packed = buffer.of(chunk * (in + kGroup + 2 * kWide));
    if (!packed) return false;
    bf16* const rounded = packed + chunk * in;
    float* const sums = reinterpret_cast<float*>(rounded + chunk * kGroup);
    for (int64_t at = from; at < to; at += chunk) {
        const int64_t count = std::min(chunk, to - at), filled = up(count, kWide);
        const int64_t lines = (kWide * kWide + filled - 1) / filled;  // in each step, so that all come in time
        pack(call, at, count, packed);
        for (int64_t group = left; group < right; group += kGroup) {
            const int64_t end = std::min(group + kGroup, right);
            for (int64_t column = group; column < end; column += kWide) {
                for (int64_t k = 0; k < in; k += kDepth) {
                    const int64_t depth = std::min(kDepth, in - k);
                    const bf16* const weights = call.weights + column * in + k * kWide;
                    const bf16* ahead = weights + depth * kWide;
                    for (int64_t row = 0; row < filled; row += kWide) {
                        const bf16* const rows = packed + k * filled + row * depth;
                        multiply_block(rows, weights, depth, sums + row * kWide, k == 0, ahead, lines);
                    }
                }
                const int64_t biased = call.bias ? call.out - column : 0;
                const __m512 low = floats(call.bias + column, biased), high = floats(call.bias + column + kTile, biased - kTile);
                for (int64_t row = 0; row < filled; row += kWide) {
                    round(sums + row * kWide, low, high, rounded + row * kGroup + column - group);
                }
            }
            write(rounded, count, std::min(end, call.out) - group, call.result + at * call.out + group, call.out);
        }
    }
    return true;
}

}  // namespace

// Computes a product. Returns 0, or 1 without memory.
extern "C" int64_t multiply(const Product* call) {
    const int64_t panels = up(call->out, kWide) / kWide, blocks = up(call->count, kWide) / kWide;
    int64_t failed = 0;
#pragma omp parallel num_threads(call->threads) reduction(+ : failed)
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        int64_t parts = threads;  // of the rows
        while (parts > 1 && (threads % parts || call->count / parts < kFewRows)) --parts;
        const int64_t shares = threads / parts, part = thread / shares, share = thread % shares;  // of the panels
        const int64_t from = blocks * part / parts * kWide, to = std::min(call->count, blocks * (part + 1) / parts * kWide);
        const int64_t left = panels * share / shares * kWide, right = panels * (share + 1) / shares * kWide;
        const Tiles tiles_in_use;
        if (from < to && left < right) failed += !multiply_part(*call, from, to, left, right);
    }
    return failed != 0;
}
