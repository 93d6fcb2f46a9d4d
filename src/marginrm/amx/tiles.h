// What the kernels share. Tiles are 16 rows of 64 bytes. The processor multiplies [16, 32] bfloat16 with [32, 16], given
// as 16 rows of pairs, and adds the product to [16, 16] float32.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace {

using bf16 = uint16_t;

constexpr int kTile = 16;       // rows of a tile, and float32 numbers in each
constexpr int kStep = 32;       // bfloat16 numbers in a row of a tile
constexpr int kTileSize = 512;  // bfloat16 numbers of a tile

inline int64_t up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

inline __mmask32 first(int64_t count) { return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1; }

inline __mmask16 first16(int64_t count) { return static_cast<__mmask16>(first(std::min<int64_t>(count, 16))); }

// Tile loads do not tell the compiler that they read memory, so stores before them have to be finished.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// Eight whole tiles, for as long as it lives; then those of before, since oneDNN does not set its own at each call.
class Tiles {
public:
    Tiles() {
        Config now;
        _tile_storeconfig(&before_);
        _tile_loadconfig(&now);
    }
    ~Tiles() { _tile_loadconfig(&before_); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

private:
    struct alignas(64) Config {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Config before_;
};

// Memory that a thread keeps from call to call.
class Buffer {
public:
    ~Buffer() { std::free(data_); }
    bf16* of(int64_t numbers) {  // null without memory
        if (numbers > size_) {
            std::free(data_);
            data_ = static_cast<bf16*>(std::aligned_alloc(64, up(numbers * sizeof(bf16), 64)));
            size_ = data_ ? numbers : 0;
        }
        return data_;
    }

private:
    bf16* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace
