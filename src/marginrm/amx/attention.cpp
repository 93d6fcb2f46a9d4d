// Softmax attention over a packed row in bfloat16, with the matrix tiles (AMX) of x86 processors.
//
// A row is a forest of runs. A token attends to its own run (causally in decoders), to the runs above it, and to the
// cached prefix that its sequence begins with. Keys and values of each span are packed once per key head, into tiles.
// Then 32 rows of queries at a time go over the spans in blocks of keys, with the running softmax of FlashAttention
// (arXiv 2205.14135, algorithm 1). So nothing is gathered or padded to a length, and no two results are merged.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "tiles.h"

namespace {

constexpr int kRows = 2 * kTile;   // rows of queries at a time
constexpr int kKeys = 512;         // keys at a time, so that scores stay in the second-level cache
constexpr int kMaxSize = 256;      // largest head size
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Keys or values of consecutive tokens of one head.
struct Tokens {
    const bf16* data;
    int64_t stride;  // from one token to the next
    int64_t length;
    int64_t size;  // numbers of a token
};

void transpose(__m512i (&r)[16]) {  // 16 x 16 numbers of 32 bits
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// Packs keys: for each 16 keys and each 32 numbers of the head size a tile whose row has one pair of each key.
void pack_keys(Tokens keys, int size, bf16* packed) {
    __m512i rows[16];
    for (int64_t at = 0; at < up(keys.length, kStep); at += kTile) {
        for (int from = 0; from < size; from += kStep, packed += kTileSize) {
            for (int i = 0; i < 16; ++i) {
                bool real = at + i < keys.length;
                rows[i] = real ? _mm512_maskz_loadu_epi16(first(keys.size - from), keys.data + (at + i) * keys.stride + from)
                               : _mm512_setzero_si512();
            }
            transpose(rows);
            for (int i = 0; i < 16; ++i) _mm512_store_si512(packed + i * kStep, rows[i]);
        }
    }
}

// Packs values: for each 32 values and each 16 numbers of the value size a tile whose row has pairs of two values.
void pack_values(Tokens values, int size, bf16* packed) {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; ++i) {
        low[i] = i / 2 + 32 * (i % 2);
        high[i] = low[i] + 16;
    }
    const __m512i pick_low = _mm512_load_si512(low), pick_high = _mm512_load_si512(high);
    for (int64_t at = 0; at < up(values.length, kStep); at += kStep) {
        for (int from = 0; from < size; from += kStep, packed += 2 * kTileSize) {
            for (int i = 0; i < 16; ++i) {
                __m512i pair[2];
                for (int j = 0; j < 2; ++j) {
                    int64_t token = at + 2 * i + j;
                    pair[j] = token < values.length
                        ? _mm512_maskz_loadu_epi16(first(values.size - from), values.data + token * values.stride + from)
                        : _mm512_setzero_si512();
                }
                _mm512_store_si512(packed + i * kStep, _mm512_permutex2var_epi16(pair[0], pick_low, pair[1]));
                _mm512_store_si512(packed + kTileSize + i * kStep, _mm512_permutex2var_epi16(pair[0], pick_high, pair[1]));
            }
        }
    }
}

// Returns 2^x for x <= 0; relative error at most 2.8e-6 (the minimax polynomial of degree 4 on [-1/2, 1/2]).
__m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-150.0f));
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 value = _mm512_set1_ps(9.57010197e-3f);
    for (float factor : {5.59178608e-2f, 2.40247448e-1f, 6.93121815e-1f, 9.99999261e-1f})
        value = _mm512_fmadd_ps(value, part, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(value, whole);
}

// 32 rows of queries of one key head, and their results so far.
struct alignas(64) Block {
    bf16 queries[kRows * kMaxSize];
    float scores[kRows * kKeys];
    bf16 shares[kRows * kKeys];
    float results[kRows * kMaxSize];
    float sums[kRows * 16];  // in 16 parts
    float largest[kRows];
    int64_t own[kRows];  // keys of its own run that a row attends to
};

void start(Block& b, int value_size) {
    std::fill_n(b.largest, kRows, kNone);
    std::fill_n(b.sums, kRows * 16, 0.0f);
    std::fill_n(b.results, kRows * value_size, 0.0f);
}

void multiply_keys(Block& b, const bf16* keys, int count, int size) {
    const int64_t group = int64_t(kTileSize) * (size / kStep);
    finish_stores();
    for (int at = 0; at < count; at += kStep, keys += 2 * group) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int s = 0; s < size / kStep; ++s) {
            _tile_loadd(4, b.queries + s * kStep, size * 2);
            _tile_loadd(5, b.queries + kTile * size + s * kStep, size * 2);
            _tile_loadd(6, keys + s * kTileSize, 64);
            _tile_loadd(7, keys + group + s * kTileSize, 64);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, b.scores + at, kKeys * 4);
        _tile_stored(1, b.scores + at + kTile, kKeys * 4);
        _tile_stored(2, b.scores + kTile * kKeys + at, kKeys * 4);
        _tile_stored(3, b.scores + kTile * kKeys + at + kTile, kKeys * 4);
    }
}

// Turns a row's scores into shares, of which the first `seen` are not 0, and scales its results so far.
void soften(Block& b, int row, int seen, int count, float scale, int value_size) {
    const float* scores = b.scores + row * kKeys;
    bf16* shares = b.shares + row * kKeys;
    const int whole = seen / kStep * kStep, end = up(seen, kStep);
    std::memset(shares + end, 0, (count - end) * sizeof(bf16));
    if (!seen) return;
    const __mmask16 rest[2] = {first16(seen - whole), first16(seen - whole - 16)};
    __m512 most[2] = {_mm512_set1_ps(kNone), _mm512_set1_ps(kNone)};
    for (int at = 0; at < whole; at += kStep)
        for (int i = 0; i < 2; ++i) most[i] = _mm512_max_ps(most[i], _mm512_load_ps(scores + at + 16 * i));
    if (whole < end)
        for (int i = 0; i < 2; ++i)
            most[i] = _mm512_mask_max_ps(most[i], rest[i], most[i], _mm512_load_ps(scores + whole + 16 * i));
    const float before = b.largest[row];
    const float largest = std::max(before, _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1])) * scale);
    const __m512 scales = _mm512_set1_ps(scale), shift = _mm512_set1_ps(largest);
    __m512 sums[2] = {_mm512_load_ps(b.sums + row * 16), _mm512_setzero_ps()};
    if (largest != before && before != kNone) {
        const __m512 keep = power_of_two(_mm512_set1_ps(before - largest));
        sums[0] = _mm512_mul_ps(sums[0], keep);
        for (int at = 0; at < value_size; at += 16) {
            float* result = b.results + row * value_size + at;
            _mm512_store_ps(result, _mm512_mul_ps(_mm512_load_ps(result), keep));
        }
    }
    b.largest[row] = largest;
    for (int at = 0; at < end; at += kStep) {
        __m512 part[2];
        for (int i = 0; i < 2; ++i) {
            part[i] = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + at + 16 * i), scales, shift));
            if (at == whole) part[i] = _mm512_maskz_mov_ps(rest[i], part[i]);
            sums[i] = _mm512_add_ps(sums[i], part[i]);
        }
        _mm512_store_si512(shares + at, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(part[1], part[0])));
    }
    _mm512_store_ps(b.sums + row * 16, _mm512_add_ps(sums[0], sums[1]));
}

void multiply_values(Block& b, const bf16* values, int count, int value_size) {
    const int64_t group = int64_t(kTileSize) * (value_size / kTile);
    finish_stores();
    for (int from = 0; from < value_size; from += kStep, values += 2 * kTileSize) {
        float* results = b.results + from;
        _tile_loadd(0, results, value_size * 4);
        _tile_loadd(1, results + kTile, value_size * 4);
        _tile_loadd(2, results + kTile * value_size, value_size * 4);
        _tile_loadd(3, results + kTile * value_size + kTile, value_size * 4);
        for (int at = 0; at < count; at += kStep) {
            const bf16* tile = values + at / kStep * group;
            _tile_loadd(4, b.shares + at, kKeys * 2);
            _tile_loadd(5, b.shares + kTile * kKeys + at, kKeys * 2);
            _tile_loadd(6, tile, 64);
            _tile_loadd(7, tile + kTileSize, 64);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, results, value_size * 4);
        _tile_stored(1, results + kTile, value_size * 4);
        _tile_stored(2, results + kTile * value_size, value_size * 4);
        _tile_stored(3, results + kTile * value_size + kTile, value_size * 4);
    }
}

}  // namespace

extern "C" {

// A row and its attention call. Strides are in numbers; the numbers of a head lie side by side.
struct Call {
    const bf16 *query, *key, *value;
    int64_t query_token, query_head, key_token, key_head, value_token, value_head;
    bf16* result;  // [tokens, heads, value size]
    int64_t heads, key_heads, size, value_size;
    int64_t runs;
    const int64_t *start, *length, *parent, *cached;  // of each run, parents first; -1 for none
    int64_t prefixes;
    const bf16* const* prefix_key;    // of each cached prefix
    const bf16* const* prefix_value;
    const int64_t* prefix_strides;  // key token, key head, value token, value head
    const int64_t* prefix_length;
    int64_t causal, threads;
    float scale;
};

// Computes a call. Returns 0, or 1 without memory.
int64_t attend(const Call* c) {
    const int size = up(c->size, kStep), value_size = up(c->value_size, kStep);
    const int64_t ratio = c->heads / c->key_heads, spans = c->prefixes + c->runs;
    // Where each span lies in the packed keys and values: cached prefixes, then runs.
    int64_t* place = static_cast<int64_t*>(std::malloc((spans + 1) * sizeof(int64_t)));
    if (!place) return 1;
    place[0] = 0;
    for (int64_t i = 0; i < spans; ++i)
        place[i + 1] = place[i] + up(i < c->prefixes ? c->prefix_length[i] : c->length[i - c->prefixes], kStep);
    const int64_t parts = (c->threads + c->key_heads - 1) / c->key_heads;  // of the blocks of a key head
    int64_t failed = 0;
#pragma omp parallel num_threads(c->threads) reduction(+ : failed)
    {
        static thread_local Buffer buffer;
        static thread_local Block b;
        bf16* const keys = buffer.of(place[spans] * (size + value_size));
        bf16* const values = keys + place[spans] * size;
        const Tiles tiles_in_use;
        bool* const packed = static_cast<bool*>(std::malloc(spans));
        const bool memory = keys && packed;
        failed += !memory;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < c->key_heads * parts; ++item) {
            if (!memory) continue;
            const int64_t head = item / parts;
            std::fill_n(packed, spans, false);
            const auto pack = [&](int64_t i) {
                const int64_t run = i - c->prefixes;
                const int64_t* s = c->prefix_strides + 4 * i;
                const Tokens k = run < 0 ? Tokens{c->prefix_key[i] + head * s[1], s[0], c->prefix_length[i], c->size}
                    : Tokens{c->key + head * c->key_head + c->start[run] * c->key_token, c->key_token, c->length[run], c->size};
                const Tokens v = run < 0 ? Tokens{c->prefix_value[i] + head * s[3], s[2], c->prefix_length[i], c->value_size}
                    : Tokens{c->value + head * c->value_head + c->start[run] * c->value_token, c->value_token, c->length[run], c->value_size};
                pack_keys(k, size, keys + place[i] * size);
                pack_values(v, value_size, values + place[i] * value_size);
                packed[i] = true;
            };
            int64_t number = 0;
            for (int64_t run = 0; run < c->runs; ++run) {
                const int64_t tiles = (c->length[run] + kTile - 1) / kTile * ratio;  // a tile: 16 tokens, one head
                for (int64_t tile = 0; tile < tiles; tile += 2) {
                    if (number++ % parts != item % parts) continue;
                    int64_t most = 0;
                    for (int row = 0; row < kRows; ++row) {
                        const int64_t one = tile + row / kTile, token = one / ratio * kTile + row % kTile;
                        const bool real = one < tiles && token < c->length[run];
                        const bf16* from = c->query + (c->start[run] + token) * c->query_token
                            + (head * ratio + one % ratio) * c->query_head;
                        for (int at = 0; at < size; at += kStep)
                            _mm512_store_si512(b.queries + row * size + at,
                                real ? _mm512_maskz_loadu_epi16(first(c->size - at), from + at) : _mm512_setzero_si512());
                        b.own[row] = !real ? 0 : c->causal ? token + 1 : c->length[run];
                        most = std::max(most, b.own[row]);
                    }
                    start(b, value_size);
                    for (int64_t span = c->prefixes + run; span >= 0;) {
                        if (!packed[span]) pack(span);  // now, so that it is still in the second-level cache
                        const bool own = span == c->prefixes + run;
                        const int64_t length = own ? most : place[span + 1] - place[span];
                        const int64_t real = own ? most
                            : span < c->prefixes ? c->prefix_length[span] : c->length[span - c->prefixes];
                        for (int64_t at = 0; at < real; at += kKeys) {
                            const int64_t here = place[span] + at;
                            const int count = up(std::min<int64_t>(length - at, kKeys), kStep);
                            multiply_keys(b, keys + here * size, count, size);
                            for (int row = 0; row < kRows; ++row) {
                                const int64_t seen = own ? b.own[row] : b.own[row] ? real : 0;
                                soften(b, row, std::clamp<int64_t>(seen - at, 0, count), count, c->scale, value_size);
                            }
                            multiply_values(b, values + here * value_size, count, value_size);
                        }
                        if (span < c->prefixes) break;
                        const int64_t above = c->parent[span - c->prefixes];
                        span = above >= 0 ? c->prefixes + above : c->cached[span - c->prefixes];
                    }
                    for (int row = 0; row < kRows; ++row) {
                        if (!b.own[row]) continue;
                        const int64_t one = tile + row / kTile, token = one / ratio * kTile + row % kTile;
                        bf16* to = c->result + ((c->start[run] + token) * c->heads + head * ratio + one % ratio) * c->value_size;
                        const __m512 factor = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(b.sums + row * 16)));
                        for (int at = 0; at < c->value_size; at += 16) {
                            const __m512 value = _mm512_mul_ps(_mm512_load_ps(b.results + row * value_size + at), factor);
                            _mm256_mask_storeu_epi16(to + at, first16(c->value_size - at),
                                reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
                        }
                    }
                }
            }
        }
        std::free(packed);
    }
    std::free(place);
    return failed != 0;
}
}
