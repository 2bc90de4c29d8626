// Products of many tokens in AMX's tiles: sixteen tokens times sixteen rows, 32 columns at once.
//
// A block of 8-bit codes of a panel (kernels.h) is a tile as it lies. Everything else is AVX-512, and so are
// the bits: a group's sum is exact however it is formed. Compiled twice: with the processor's tiles, and
// with HANOK_EMULATES_TILES, where loops stand for them, so that all of it is tested where there are none.

#include "panels.h"

namespace {

constexpr int64_t kTokensOfTile = 16;
constexpr int kTilesAtOnce = 4;  // of tokens
constexpr int64_t kPiecePanels = 4, kPieceTokens = 128, kChunkColumns = 512;

typedef int32_t Whole[kTilesAtOnce][kTokensOfTile][kLanes];

#if defined(HANOK_EMULATES_TILES)

struct TilesInUse {};

// whole[i] = 16 tokens of x, `stride` bytes from token to token, times some blocks of codes.
INLINE void multiply_tiles(const char* x, int64_t stride, const uint8_t* codes, int64_t blocks, Whole& whole) {
    for (int64_t t = 0; t < kTilesAtOnce * kTokensOfTile; ++t)
        for (int64_t row = 0; row < kLanes; ++row) {
            int32_t sum = 0;
            for (int64_t c = 0; c < blocks * kBlock; ++c)
                sum += static_cast<int8_t>(x[t * stride + c]) * codes[c / 4 * kVectorBytes + 4 * row + c % 4];
            whole[t / kTokensOfTile][t % kTokensOfTile][row] = sum;
        }
}

#else

// Tiles 0 to 3 are sums, 4 to 6 x, 7 the weight.
struct TilesInUse {
    TilesInUse() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 32, 32, 32, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
        } sizes;
        _tile_loadconfig(&sizes);
    }
    ~TilesInUse() { _tile_release(); }
};

INLINE void multiply_tiles(const char* x, int64_t stride, const uint8_t* codes, int64_t blocks, Whole& whole) {
    const int64_t step = kTokensOfTile * stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t block = 0; block < blocks; ++block, x += kBlock) {
        _tile_loadd(7, codes + block * block_bytes(kBytes), kVectorBytes);
        _tile_loadd(4, x, stride);
        _tile_dpbsud(0, 4, 7);
        _tile_loadd(5, x + step, stride);
        _tile_dpbsud(1, 5, 7);
        _tile_loadd(6, x + 2 * step, stride);
        _tile_dpbsud(2, 6, 7);
        _tile_loadd(4, x + 3 * step, stride);
        _tile_dpbsud(3, 4, 7);
    }
    _tile_stored(0, whole[0], 64);
    _tile_stored(1, whole[1], 64);
    _tile_stored(2, whole[2], 64);
    _tile_stored(3, whole[3], 64);
}

#endif

// Codes of 4 bits as the bytes that the product takes; see Panels.
template <int kKind>
INLINE void bytes_of(const uint8_t* codes, int64_t blocks, const uint8_t* table, uint8_t* to) {
    for (int64_t block = 0; block < blocks; ++block)
        for (int j = 0; j < 4; ++j) {
            const Words words = Words::load(codes + block * block_bytes(kKind) + j * kVectorBytes);
            Words low = words & Words::all(0x0f0f0f0fu), high = (words >> 4) & Words::all(0x0f0f0f0fu);
            if (kKind == kTable) low = look_up(low, table), high = look_up(high, table);
            low.store(to + block * block_bytes(kBytes) + j * kVectorBytes);
            high.store(to + block * block_bytes(kBytes) + (4 + j) * kVectorBytes);
        }
}

// sums (tokens, 16) += a group of a panel times some tokens.
template <int kKind>
INLINE void add_group(const Panels& w, int64_t panel, int64_t group, const uint8_t* codes, const Rounded& x,
                      int64_t token, int64_t count, float* sums) {
    const int64_t index = panel * x.groups + group;
    const Floats scale = group_scale<kKind>(w, index);
    for (int64_t first = 0; first < count; first += kTilesAtOnce * kTokensOfTile) {
        alignas(64) Whole whole;
        multiply_tiles(x.codes + (token + first) * x.columns + group * w.group_columns, x.columns, codes,
                       w.group_columns / kBlock, whole);
        for (int64_t t = 0; t < kTilesAtOnce * kTokensOfTile && first + t < count; ++t) {
            const int64_t at = (token + first + t) * x.groups + group;
            const int32_t start = -excess(kKind) * x.sums[at];
            const Ints sum = Ints::load(whole[t / kTokensOfTile][t % kTokensOfTile]) + Ints::all(start);
            float* to = sums + (first + t) * kLanes;
            store(to, add_whole<kKind>(load(to), sum, w, index, scale, x, at));
        }
    }
}

template <int kKind, class Item>
int tiles_product(const Panels& w, const Item* x, const Item* bias, Item* y, int64_t tokens, int threads) {
    const int64_t groups = num_groups(w), panels = num_panels(w), blocks = w.group_columns / kBlock;
    const int64_t step = kTilesAtOnce * kTokensOfTile, padded = ceil_div(tokens, step) * step;
    const int64_t sums_floats = kPiecePanels * kPieceTokens * kLanes;
    const int64_t worker_bytes = sums_floats * 4 + kChunkColumns * kLanes;
    const int64_t rounded_bytes = RoundedMemory(nullptr, w, padded, 1).bytes;
    char* memory = static_cast<char*>(hanok_scratch(rounded_bytes + threads * worker_bytes));
    if (!memory) return 1;
    const Rounded rounded = RoundedMemory(memory, w, padded, 1).rounded;
    round_rows<false>(w, x, tokens, rounded, threads);
    // Tokens that are not there are multiplied too, and their sums are left.
    std::memset(rounded.codes + tokens * rounded.columns, 0,
                static_cast<std::size_t>((padded - tokens) * rounded.columns));
    uint8_t table[16] = {};
    set_table(w, table);
    const int64_t chunk = kChunkColumns / w.group_columns, ranges = ceil_div(panels, kPiecePanels);
    share(threads, ranges * ceil_div(tokens, kPieceTokens), [&](int64_t piece, int worker) {
        TilesInUse tiles;
        (void)tiles;
        float* sums = reinterpret_cast<float*>(memory + rounded_bytes + worker * worker_bytes);
        uint8_t* bytes = reinterpret_cast<uint8_t*>(sums + sums_floats);
        const int64_t token = piece / ranges * kPieceTokens, begin = piece % ranges * kPiecePanels;
        const int64_t count = tokens - token < kPieceTokens ? tokens - token : kPieceTokens;
        const int64_t end = begin + kPiecePanels < panels ? begin + kPiecePanels : panels;
        for (int64_t i = 0; i < sums_floats; i += kLanes) store(sums + i, Floats::all(0.0f));
        for (int64_t first = 0; first < groups; first += chunk) {
            const int64_t last = first + chunk < groups ? first + chunk : groups;
            for (int64_t panel = begin; panel < end; ++panel) {
                const uint8_t* codes = w.codes + (panel * groups + first) * blocks * block_bytes(kKind);
                if (is_4_bit(kKind)) {
                    bytes_of<kKind>(codes, (last - first) * blocks, table, bytes);
                    codes = bytes;
                }
                for (int64_t group = first; group < last; ++group)
                    add_group<kKind>(w, panel, group, codes + (group - first) * blocks * block_bytes(kBytes),
                                     rounded, token, count, sums + (panel - begin) * kPieceTokens * kLanes);
            }
        }
        for (int64_t panel = begin; panel < end; ++panel)
            write_sums<1>(sums + (panel - begin) * kPieceTokens * kLanes, 1, w, panel, bias, y, token, count);
    });
    return 0;
}

template <class Item>
int tiles_product_of(const Panels& w, const void* x_, const void* bias_, void* y_, int64_t tokens, int threads) {
    const Item* x = static_cast<const Item*>(x_);
    const Item* bias = static_cast<const Item*>(bias_);
    Item* y = static_cast<Item*>(y_);
    switch (w.kind) {
        case kBytes: return tiles_product<kBytes>(w, x, bias, y, tokens, threads);
        case kNibbles: return tiles_product<kNibbles>(w, x, bias, y, tokens, threads);
        case kZeroNibbles: return tiles_product<kZeroNibbles>(w, x, bias, y, tokens, threads);
        default: return tiles_product<kTable>(w, x, bias, y, tokens, threads);
    }
}

}  // namespace

extern const Kernels hanok_avx512_kernels;

// AVX-512's kernel where tokens are too few to fill tiles, and where x is left as it is.
int HANOK_PRODUCT(const Panels* weight, const void* x, const void* bias, void* y, std::int64_t tokens, int type,
                  int threads) {
    if (tokens <= kFewTokens || !weight->rounds_x)
        return hanok_avx512_kernels.product(weight, x, bias, y, tokens, type, threads);
    if (type == kFloat32) return tiles_product_of<float>(*weight, x, bias, y, tokens, threads);
    return tiles_product_of<uint16_t>(*weight, x, bias, y, tokens, threads);
}
