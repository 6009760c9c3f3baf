// Sliding-window attention of one or more heads on a CPU, forward and backward; see cpp.py for the interface.
//
// Compiled once per (S, T, K, LANES, CHANNELS): type of the maps, type of the sums, window size, numbers per vector of
// pixels and per vector of channels.
//
// Logits and their gradients are products over channels: computed in vectors over the columns of a row of queries, for
// ROWS rows of queries at once, which share every vector of keys that is loaded. Sums over the window (of values, and
// the gradients of q, k and v) are computed in vectors over channels, each weight spread over a vector, so that they
// read and write rows as channels_last maps have them. Keys and queries are therefore kept in two forms:
//
//   wide row  [part of CHANNELS channels][column][CHANNELS], absent channels zero
//   tall row  [channel][column]; of keys, the columns are split by their remainder modulo the stride
//
// Only the rows that a block of queries sees exist at a time, each in the place `row % capacity` of a ring. Columns are
// reflected at the border when a row is read, rows when they are looked up.

#include "maps.h"


#include <utility>

namespace {

constexpr int ROWS = 4;

#if defined(__AVX512F__)
constexpr int REGISTERS = 32, REGISTER_BYTES = 64;
#elif defined(__aarch64__)
constexpr int REGISTERS = 32, REGISTER_BYTES = 16;
#elif defined(__AVX__)
constexpr int REGISTERS = 16, REGISTER_BYTES = 32;
#else
constexpr int REGISTERS = 16, REGISTER_BYTES = 16;
#endif

typedef T Pixel __attribute__((vector_size(CHANNELS * sizeof(T))));
typedef T LoosePixel __attribute__((vector_size(CHANNELS * sizeof(T)), aligned(sizeof(T)), may_alias));

inline Pixel load_pixel(const T *p) { return *reinterpret_cast<const LoosePixel *>(p); }
inline void store_pixel(T *p, Pixel v) { *reinterpret_cast<LoosePixel *>(p) = v; }

// Keeps a vector that several operations use in its register: GCC would load it anew for each of them.
template <class V>
inline __attribute__((always_inline)) void keep([[maybe_unused]] V &v) {
    if constexpr (sizeof(V) <= REGISTER_BYTES) {
#if defined(__AVX512F__)
        asm("" : "+v"(v));
#elif defined(__x86_64__)
        asm("" : "+x"(v));
#elif defined(__aarch64__)
        asm("" : "+w"(v));
#endif
    }
}

// work(0), work(1), ..., as if written out.
template <class Work, int... I>
inline __attribute__((always_inline)) void spell_out(std::integer_sequence<int, I...>, Work work) {
    (work(std::integral_constant<int, I>{}), ...);
}
template <int N, class Work>
inline __attribute__((always_inline)) void unroll(Work work) {
    spell_out(std::make_integer_sequence<int, N>{}, work);
}
#define INLINE __attribute__((always_inline))

struct Problem {
    int64_t heads, dim, height, width, stride, dilation;
    int64_t group;  // heads of an image that are done together
};

// Which queries of a block of rows see a row of keys: row i does as row ky of its window.
struct Seen {
    int count;
    int row[ROWS], ky[ROWS];
};

struct Sizes {
    int64_t dim, height, width, stride, dilation, group, reach, out_height, out_width;
    int64_t parts;        // of a head, in a wide row
    int64_t tile, tiles;  // queries of a row that are done together, and how many such tiles a row has
    int64_t columns;      // in a wide row of keys: reflected columns on both sides, zeros at the end
    int64_t phase;        // columns of one remainder modulo the stride in a tall row of keys
    int64_t pitch;        // from channel to channel in a tall row of keys
    int64_t query_columns, capacity;
    int64_t offset[K];  // in a tall row of keys, where the keys of a window column begin for query 0
    std::vector<Seen> seen;  // for each row of keys from the first that a block of rows sees
    std::vector<T> x, y;     // positions of columns and rows

    explicit Sizes(const Problem &p)
        : dim(p.dim), height(p.height), width(p.width), stride(p.stride), dilation(p.dilation), group(p.group),
          reach(p.dilation * (K / 2)), out_height((p.height + p.stride - 1) / p.stride),
          out_width((p.width + p.stride - 1) / p.stride), parts((p.dim + CHANNELS - 1) / CHANNELS),
          seen((ROWS - 1) * p.stride + (K - 1) * p.dilation + 1), x(positions(p.width)), y(positions(p.height)) {
        tile = tile_of(out_width);
        tiles = (out_width + tile - 1) / tile;
        int64_t shift = (K - 1) * dilation / stride;
        phase = std::max<int64_t>(tiles * tile + shift, LANES);
        pitch = stride * phase + (stride * phase % 32 ? 0 : 8);  // so that channels differ in cache sets
        columns = std::max(width + 2 * reach, std::max(stride * phase, (tiles * tile - 1) * stride + 2 * reach + 1));
        query_columns = (tiles - 1) * tile + LANES;
        capacity = std::min(height, int64_t(seen.size()));
        for (int64_t kx = 0; kx < K; kx++) offset[kx] = kx * dilation % stride * phase + kx * dilation / stride;
        for (size_t r = 0; r < seen.size(); r++) {
            seen[r].count = 0;
            for (int i = 0; i < ROWS; i++) {
                int64_t distance = int64_t(r) - i * stride;
                if (distance < 0 || distance % dilation || distance / dilation >= K) continue;
                seen[r].row[seen[r].count] = i;
                seen[r].ky[seen[r].count++] = int(distance / dilation);
            }
        }
    }
    static int64_t tile_of(int64_t width) {
        int64_t best = LANES;
        for (int64_t tile : {LANES * 7 / 8, LANES * 3 / 4, LANES / 2})
            if ((width + tile - 1) / tile == (width + LANES - 1) / LANES) best = tile;
        return best;
    }
    static std::vector<T> positions(int64_t size) {  // torch.linspace(-1, 1, size)
        std::vector<T> at(size, T(-1));
        T step = size > 1 ? T(2) / T(size - 1) : T(0);
        for (int64_t i = 0; i < size; i++) at[i] = i < size / 2 ? T(i) * step - 1 : 1 - T(size - 1 - i) * step;
        if (size == 1) at[0] = T(-1);
        return at;
    }
    int64_t all_parts() const { return group * parts; }
    int64_t channels() const { return all_parts() * CHANNELS; }
    int64_t wide_keys() const { return channels() * columns; }
    int64_t tall_keys() const { return channels() * pitch + LANES; }  // the last lanes of a vector may hold anything
    int64_t wide_queries() const { return channels() * query_columns; }
    int64_t tall_queries() const { return tiles * channels() * ROWS * LANES; }
    int64_t weights() const { return ROWS * K * K * LANES; }
};

inline int64_t reflect(int64_t i, int64_t size) {
    i = i < 0 ? -i : i;
    return i >= size ? 2 * (size - 1) - i : i;
}

// ---- rows of maps ----

// Vectors of the bits of N numbers; a vector's size cannot depend on a template's argument.
template <int N>
struct Bits;
#define BITS(N)                                               \
    template <>                                               \
    struct Bits<N> {                                          \
        typedef uint16_t Half __attribute__((vector_size(N * 2)));  \
        typedef uint32_t Whole __attribute__((vector_size(N * 4))); \
    };
BITS(LANES)
#if CHANNELS != LANES
BITS(CHANNELS)
#endif

template <class V>
inline V widen(const S *p) {
    V v;
    if constexpr (sizeof(S) == sizeof(T)) {
        std::memcpy(&v, p, sizeof v);
    } else {
        typedef Bits<sizeof(V) / sizeof(T)> Numbers;
        typename Numbers::Half half;
        std::memcpy(&half, p, sizeof half);
        typename Numbers::Whole bits = __builtin_convertvector(half, typename Numbers::Whole) << 16;
        std::memcpy(&v, &bits, sizeof v);
    }
    return v;
}

template <class V>
inline void narrow(S *p, V v) {
    if constexpr (sizeof(S) == sizeof(T)) {
        std::memcpy(p, &v, sizeof v);
    } else {
        typedef Bits<sizeof(V) / sizeof(T)> Numbers;
        typename Numbers::Whole bits;
        std::memcpy(&bits, &v, sizeof v);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        bits = v == v ? bits : typename Numbers::Whole{} + 0x7fc0;
        typename Numbers::Half half = __builtin_convertvector(bits, typename Numbers::Half);
        std::memcpy(p, &half, sizeof half);
    }
}

template <int... I>
inline Vec pick(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, I...);
#else
    typedef decltype(a < b) Index;
    return __builtin_shuffle(a, b, Index{I...});
#endif
}
template <int... I>
inline Vec evens(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return pick(a, b, std::integer_sequence<int, 2 * I...>{});
}
template <int... I>
inline Vec odds(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return pick(a, b, std::integer_sequence<int, 2 * I + 1 ...>{});
}
template <int FROM, int... I>
inline Vec zip(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return pick(a, b, std::integer_sequence<int, FROM + I / 2 + (I % 2 ? LANES : 0)...>{});
}
constexpr std::make_integer_sequence<int, LANES> ALL{};

// LANES pixels of CHANNELS channels: from pixel after pixel to channel after channel.
inline void split_channels(Vec (&v)[CHANNELS]) {
    for (int n = 1; n < CHANNELS; n *= 2) {
        Vec w[CHANNELS];
        unroll<CHANNELS / 2>([&](auto i) INLINE {
            w[i] = evens(v[2 * i], v[2 * i + 1], ALL);
            w[i + CHANNELS / 2] = odds(v[2 * i], v[2 * i + 1], ALL);
        });
        unroll<CHANNELS>([&](auto i) INLINE { v[i] = w[i]; });
    }
}

// And back.
inline void join_channels(Vec (&v)[CHANNELS]) {
    for (int n = 1; n < CHANNELS; n *= 2) {
        Vec w[CHANNELS];
        unroll<CHANNELS / 2>([&](auto i) INLINE {
            w[2 * i] = zip<0>(v[i], v[i + CHANNELS / 2], ALL);
            w[2 * i + 1] = zip<LANES / 2>(v[i], v[i + CHANNELS / 2], ALL);
        });
        unroll<CHANNELS>([&](auto i) INLINE { v[i] = w[i]; });
    }
}

// One part of a row of a map: `count` pixels, `column` apart, of which `present` channels, `channel` apart, are there.
struct Line {
    S *data;
    int64_t column, channel, present, count;
};

void read_line(const Line &line, T *to) {
    int64_t x = 0;
    if (line.channel == 1 && line.present == CHANNELS) {
        for (; x < line.count; x++) store_pixel(to + x * CHANNELS, widen<Pixel>(line.data + x * line.column));
    } else if (line.column == 1) {
        for (int64_t next = 0; next < line.count && line.count >= LANES; next += LANES) {
            x = std::min(next, line.count - LANES);
            Vec v[CHANNELS];
            for (int64_t c = 0; c < CHANNELS; c++)
                v[c] = c < line.present ? widen<Vec>(line.data + c * line.channel + x) : Vec{};
            join_channels(v);
            for (int c = 0; c < CHANNELS; c++) store(to + x * CHANNELS + c * LANES, v[c]);
            x += LANES;
        }
    }
    for (; x < line.count; x++)
        for (int64_t c = 0; c < CHANNELS; c++)
            to[x * CHANNELS + c] = c < line.present ? T(line.data[x * line.column + c * line.channel]) : T(0);
}

// The line becomes the wide row, or the sum of both.
void write_line(const Line &line, const T *from, bool accumulate) {
    int64_t x = 0;
    if (line.channel == 1 && line.present == CHANNELS) {
        for (; x < line.count; x++) {
            S *to = line.data + x * line.column;
            Pixel v = load_pixel(from + x * CHANNELS);
            narrow<Pixel>(to, accumulate ? v + widen<Pixel>(to) : v);
        }
    } else if (line.column == 1) {
        for (; x + LANES <= line.count; x += LANES) {
            Vec v[CHANNELS];
            for (int c = 0; c < CHANNELS; c++) v[c] = load(from + x * CHANNELS + c * LANES);
            split_channels(v);
            for (int64_t c = 0; c < line.present; c++) {
                S *to = line.data + c * line.channel + x;
                narrow<Vec>(to, accumulate ? v[c] + widen<Vec>(to) : v[c]);
            }
        }
    }
    for (; x < line.count; x++)
        for (int64_t c = 0; c < line.present; c++) {
            S &to = line.data[x * line.column + c * line.channel];
            T value = from[x * CHANNELS + c];
            to = S(accumulate ? T(to) + value : value);
        }
}

// The line of every step-th pixel of row y, of one part of the channels of a task's heads.
Line line_of(const Sizes &s, const Map &map, int64_t y, int64_t step, int64_t count, int64_t part) {
    int64_t head = part / s.parts, first = part % s.parts * CHANNELS;
    S *data = map.data + y * map.row + (head * s.dim + first) * map.channel;
    return {data, step * map.column, map.channel, std::min<int64_t>(CHANNELS, s.dim - first), count};
}

// A tall row of one part, LANES columns of a wide one that are `step` apart.
void turn(const T *from, int64_t step, T *to, int64_t pitch) {
    T beside[LANES * CHANNELS];
    if (step != 1) {
        for (int64_t x = 0; x < LANES; x++) store_pixel(beside + x * CHANNELS, load_pixel(from + x * step * CHANNELS));
        from = beside;
    }
    Vec v[CHANNELS];
    for (int c = 0; c < CHANNELS; c++) v[c] = load(from + c * LANES);
    split_channels(v);
    for (int c = 0; c < CHANNELS; c++) store(to + c * pitch, v[c]);
}

// A wide row of keys or values; `position` (dim, 2), where it is given, holds what to subtract per unit of x and y.
void read_keys(const Sizes &s, const Map &map, int64_t y, const T *position, T *row) {
    for (int64_t part = 0; part < s.all_parts(); part++) {
        T *first = row + part * s.columns * CHANNELS, *inside = first + s.reach * CHANNELS;
        Line line = line_of(s, map, y, 1, s.width, part);
        read_line(line, inside);
        if (position) {
            Pixel across = {}, down = {};
            for (int64_t c = 0; c < line.present; c++) {
                across[c] = position[2 * (part % s.parts * CHANNELS + c)];
                down[c] = position[2 * (part % s.parts * CHANNELS + c) + 1] * s.y[y];
            }
            for (int64_t x = 0; x < s.width; x++) {
                T *at = inside + x * CHANNELS;
                store_pixel(at, load_pixel(at) - (across * s.x[x] + down));
            }
        }
        T *last = inside + (s.width - 1) * CHANNELS;
        for (int64_t x = CHANNELS; x <= s.reach * CHANNELS; x += CHANNELS) {
            store_pixel(inside - x, load_pixel(inside + x));
            store_pixel(last + x, load_pixel(last - x));
        }
        std::fill(last + (s.reach + 1) * CHANNELS, first + s.columns * CHANNELS, T(0));
    }
}

void turn_keys(const Sizes &s, const T *wide, T *tall) {
    for (int64_t part = 0; part < s.all_parts(); part++)
        for (int64_t phase = 0; phase < s.stride; phase++)
            for (int64_t next = 0; next < s.phase; next += LANES) {
                int64_t x = std::min(next, s.phase - LANES);
                turn(wide + (part * s.columns + x * s.stride + phase) * CHANNELS, s.stride,
                     tall + part * CHANNELS * s.pitch + phase * s.phase + x, s.pitch);
            }
}

// Row i of a block of queries, times `scale`: wide, with zeros at the end, and its share of the tall block
// [tile][channel][ROWS][LANES].
void read_queries(const Sizes &s, const Map &map, int64_t y, int64_t step, T scale, int64_t i, T *wide, T *tall) {
    for (int64_t part = 0; part < s.all_parts(); part++) {
        T *row = wide + part * s.query_columns * CHANNELS;
        read_line(line_of(s, map, y, step, s.out_width, part), row);
        for (int64_t x = 0; x < s.out_width * CHANNELS; x += CHANNELS) store_pixel(row + x, load_pixel(row + x) * scale);
        std::fill(row + s.out_width * CHANNELS, row + s.query_columns * CHANNELS, T(0));
        for (int64_t tile = 0; tile < s.tiles; tile++)
            turn(row + tile * s.tile * CHANNELS, 1,
                 tall + ((tile * s.channels() + part * CHANNELS) * ROWS + i) * LANES, ROWS * LANES);
    }
}

// Rows of maps that the next block of queries will read or write, called into the cache bit by bit while this one is computed.
class Prefetch {
    struct Row {
        const S *data;
        int64_t step, count, length;  // `count` pieces of `length` numbers, `step` apart
        bool write;
    };
    const Sizes &s;
    std::vector<Row> rows;
    size_t row = 0;
    int64_t piece = 0, pieces = 0, share = 0;

   public:
    explicit Prefetch(const Sizes &sizes) : s(sizes) {}
    void add(const Map &map, int64_t y, int64_t step, int64_t count, bool write = false) {
        const S *data = map.data + y * map.row;
        int64_t channels = s.dim * s.group;
        rows.push_back(map.channel == 1 ? Row{data, step * map.column, count, channels, write}
                                        : Row{data, map.channel, channels, (count - 1) * step * map.column + 1, write});
        pieces += rows.back().count;
    }
    // All that was added will be done in `steps` steps.
    void start(int64_t steps) { share = (pieces + steps - 1) / steps; }
    void step() {
        asm volatile("");  // or GCC takes this for a function without effects
        for (int64_t n = 0; n < share && row < rows.size(); n++) {
            const S *first = rows[row].data + piece * rows[row].step;
            for (int64_t x = 0; x < rows[row].length; x += 64 / int64_t(sizeof(S)))
                rows[row].write ? __builtin_prefetch(first + x, 1, 2) : __builtin_prefetch(first + x, 0, 2);
            if (++piece == rows[row].count) row++, piece = 0;
        }
    }
    void clear() {
        rows.clear();
        row = piece = pieces = 0;
    }
};

// ---- sums ----

// logits[n][kx][x] = sum_c queries[n][c][x] * keys[c][key of kx for query x], for N rows of queries
template <int N>
__attribute__((noinline)) void products(const Sizes &s, const T *const *queries, const T *keys, T *const *logits) {
    constexpr int STEP = REGISTERS >= 32 ? (K <= 7 ? K : 5) : 3;
    for (int first = 0; first < K; first += STEP) {
        Vec sum[N][STEP] = {};
        const T *at[STEP], *query[N];
        for (int i = 0; i < STEP; i++) at[i] = keys + s.offset[std::min(first + i, K - 1)];
        for (int n = 0; n < N; n++) query[n] = queries[n];
        for (int64_t c = 0; c < s.dim; c++) {
            Vec value[N];
            unroll<N>([&](auto n) INLINE { value[n] = load(query[n] + c * ROWS * LANES); });
            unroll<STEP>([&](auto i) INLINE {
                Vec key = load(at[i] + c * s.pitch);
                keep(key);
                unroll<N>([&](auto n) INLINE { sum[n][i] += value[n] * key; });
            });
        }
        unroll<STEP>([&](auto i) INLINE {
            if (first + i < K)
                unroll<N>([&](auto n) INLINE { store(logits[n] + (first + i) * LANES, sum[n][i]); });
        });
    }
}

// out[x] = scale[x] * sum_{ky, kx} weights[ky][kx][x] * rows[ky][key of kx for query x], for TILE queries
template <int TILE, int STRIDE>
__attribute__((noinline)) void gather(const Sizes &s, const T *weights, const T *const *rows, const T *scale, T *out) {
    Pixel sum[TILE] = {};
    for (int ky = 0; ky < K; ky++) {
        const T *row = rows[ky], *weight = weights + ky * K * LANES;
        if constexpr (STRIDE > 0) {
#pragma GCC unroll 64
            for (int j = 0; j < (TILE - 1) * STRIDE + K; j++) {
                Pixel value = load_pixel(row + j * CHANNELS);
                keep(value);
#pragma GCC unroll 16
                for (int x = 0; x < TILE; x++) {
                    const int kx = j - x * STRIDE;
                    if (kx >= 0 && kx < K) sum[x] += value * weight[kx * LANES + x];
                }
            }
        } else {
            for (int64_t kx = 0; kx < K; kx++)
#pragma GCC unroll 16
                for (int x = 0; x < TILE; x++)
                    sum[x] += load_pixel(row + (x * s.stride + kx * s.dilation) * CHANNELS) * weight[kx * LANES + x];
        }
    }
#pragma GCC unroll 16
    for (int x = 0; x < TILE; x++) store_pixel(out + x * CHANNELS, sum[x] * scale[x]);
}

// The most queries, of a whole fraction of a tile, whose keys fit into the registers.
constexpr int piece(int tile, int stride) {
    int most = tile;
    while (most > 1 && ((most - 1) * stride + K > REGISTERS - 4 || tile % most)) most--;
    return most;
}

// row[key of kx for query x] += sum_n weights[n][kx][x] * queries[n][x], for TILE queries of `count` rows
template <int TILE, int STRIDE>
__attribute__((noinline)) void scatter(const Sizes &s, int count, const T *const *weights, const T *const *queries,
                                       T *row) {
    if constexpr (STRIDE > 0) {
        constexpr int PIECE = piece(TILE, STRIDE), KEYS = (PIECE - 1) * STRIDE + K;
#pragma GCC unroll 16
        for (int first = 0; first < TILE; first += PIECE) {
            T *keys = row + first * STRIDE * CHANNELS;
            Pixel sum[KEYS];
#pragma GCC unroll 64
            for (int j = 0; j < KEYS; j++) sum[j] = load_pixel(keys + j * CHANNELS);
            for (int n = 0; n < count; n++) {
                const T *weight = weights[n] + first, *query = queries[n] + first * CHANNELS;
#pragma GCC unroll 16
                for (int x = 0; x < PIECE; x++) {
                    Pixel value = load_pixel(query + x * CHANNELS);
                    keep(value);
#pragma GCC unroll 16
                    for (int kx = 0; kx < K; kx++) sum[x * STRIDE + kx] += value * weight[kx * LANES + x];
                }
            }
#pragma GCC unroll 64
            for (int j = 0; j < KEYS; j++) store_pixel(keys + j * CHANNELS, sum[j]);
        }
    } else {
        for (int n = 0; n < count; n++)
            for (int64_t kx = 0; kx < K; kx++)
#pragma GCC unroll 16
                for (int x = 0; x < TILE; x++) {
                    T *at = row + (x * s.stride + kx * s.dilation) * CHANNELS;
                    Pixel value = load_pixel(queries[n] + x * CHANNELS);
                    store_pixel(at, load_pixel(at) + value * weights[n][kx * LANES + x]);
                }
    }
}

typedef void (*Gather)(const Sizes &, const T *, const T *const *, const T *, T *);
typedef void (*Scatter)(const Sizes &, int, const T *const *, const T *const *, T *);

// The variants of both for a size: tiles and strides that are known to the compiler.
template <int TILE>
std::pair<Gather, Scatter> sums_for_tile(const Sizes &s) {
    if (s.dilation == 1 && s.stride == 1) return {gather<TILE, 1>, scatter<TILE, 1>};
    if (s.dilation == 1 && s.stride == 2) return {gather<TILE, 2>, scatter<TILE, 2>};
    return {gather<TILE, 0>, scatter<TILE, 0>};
}
std::pair<Gather, Scatter> sums_for(const Sizes &s) {
    if (s.tile == LANES / 2) return sums_for_tile<LANES / 2>(s);
    if (s.tile == LANES * 3 / 4) return sums_for_tile<LANES * 3 / 4>(s);
    if (s.tile == LANES * 7 / 8) return sums_for_tile<LANES * 7 / 8>(s);
    return sums_for_tile<LANES>(s);
}

// ---- softmax ----

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

inline Doubles log2_of(Doubles x) {
    for (int i = 0; i < LANES; i++) x[i] = std::log2(x[i]);
    return x;
}

// 2^x for x <= 1, relative error 2e-7; zero below -126.5; NaN stays NaN. The constants are kept in registers.
struct Exp2 {
    Floats least = Floats{} - 127.0f;
    Floats shift = Floats{} + (0x1.8p23f + 127);  // brings the nearest integer + 127 into the lowest bits
    Floats c1 = Floats{} + 6.93146978e-1f, c2 = Floats{} + 2.40222421e-1f, c3 = Floats{} + 5.55073375e-2f,
           c4 = Floats{} + 9.67151286e-3f, c5 = Floats{} + 1.32647271e-3f, one = Floats{} + 1.0f;
    INLINE Exp2() {
        for (Floats *c : {&least, &shift, &c1, &c2, &c3, &c4, &c5, &one}) keep(*c);
    }
    INLINE Floats operator()(Floats x) const {
        x = x < least ? least : x;
        Floats shifted = x + shift, r = x - (shifted - shift);
        Floats p = ((((r * c5 + c4) * r + c3) * r + c2) * r + c1) * r + one;
        Ints bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        bits <<= 23;
        Floats power;
        std::memcpy(&power, &bits, sizeof power);
        return p * power;
    }
    Doubles operator()(Doubles x) const {
        for (int i = 0; i < LANES; i++) x[i] = std::exp2(x[i]);
        return x;
    }
};

// log2 of normal numbers: exponent + 2 atanh((m - 1) / (m + 1)) / ln 2 with m in [sqrt(1/2), sqrt(2)]
inline Floats log2_of(Floats x) {
    Ints bits;
    std::memcpy(&bits, &x, sizeof bits);
    Ints exponent = (bits - 0x3f3504f3) >> 23;
    Ints rest = bits - (exponent << 23);
    Floats m;
    std::memcpy(&m, &rest, sizeof m);
    Floats t = (m - 1.0f) / (m + 1.0f), u = t * t;
    Floats p = u * 4.31702544e-1f + 5.76716194e-1f;
    p = p * u + 9.61798819e-1f;
    p = p * u + 2.88539008f;
    return x == x ? p * t + __builtin_convertvector(exponent, Floats) : x;
}

// Logits (K², LANES), in units of ln 2, become weights that are not normalised yet; returns their sum, and their
// log2-sum-exp2.
inline std::pair<Vec, Vec> softmax(T *logits) {
    const Exp2 exp2;
    Vec top = load(logits), sum = {};
    for (int i = 1; i < K * K; i++) {
        Vec value = load(logits + i * LANES);
        top = value > top ? value : top;
    }
    for (int i = 0; i < K * K; i++) {
        Vec value = exp2(load(logits + i * LANES) - top);
        sum += value;
        store(logits + i * LANES, value);
    }
    return {sum, top + log2_of(sum)};
}

// Logits become weights, gradients of weights those of logits; returns sum(weights * their gradients), and scales both.
// Lanes from `valid` on become zero.
inline Vec softmax_backward(T *logits, T *grads, Vec lse, int64_t valid, T alpha, T scale) {
    const Exp2 exp2;
    Vec sum = {};
    for (int i = 0; i < K * K; i++) {
        Vec weight = exp2(load(logits + i * LANES) - lse);
        sum += weight * load(grads + i * LANES);
        store(logits + i * LANES, weight);
    }
    decltype(sum < sum) inside;
    for (int x = 0; x < LANES; x++) inside[x] = x < valid ? -1 : 0;
    for (int i = 0; i < K * K; i++) {
        Vec weight = load(logits + i * LANES), grad = weight * (load(grads + i * LANES) - sum) * scale;
        weight *= alpha;
        store(logits + i * LANES, inside ? weight : Vec{});
        store(grads + i * LANES, inside ? grad : Vec{});
    }
    return inside ? sum : Vec{};
}

// ---- one task: the heads of a group in one image ----

Map heads_of(const Map &map, const Problem &p, int64_t task) {
    Map heads = map;
    int64_t groups = p.heads / p.group;
    heads.data += task / groups * map.image + task % groups * p.group * p.dim * map.channel;
    return heads;
}

// Cuts a thread's memory into arrays that begin at cache lines.
struct Arena {
    T *next;
    explicit Arena(int64_t size) {
        next = scratch(size + 64);
        next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64 / sizeof(T);
    }
    static int64_t whole(int64_t size) { return (size + 63) / 64 * 64; }
    T *take(int64_t size) {
        T *taken = next;
        next += whole(size);
        return taken;
    }
};

// The logits of one head and one tile of a block of rows; or, of gradients and values, the gradients of the weights.
void block_products(const Sizes &s, int64_t head, int64_t tile, int64_t top, int64_t rows, const T *queries,
                    const T *keys, T *logits, Prefetch &ahead) {
    int64_t channel = head * s.parts * CHANNELS;
    const T *first = queries + (tile * s.channels() + channel) * ROWS * LANES;
    for (size_t r = 0; r < s.seen.size(); r++) {
        const T *query[ROWS];
        T *out[ROWS];
        int n = 0;
        for (int i = 0; i < s.seen[r].count; i++)
            if (s.seen[r].row[i] < rows) {
                query[n] = first + s.seen[r].row[i] * LANES;
                out[n++] = logits + (s.seen[r].row[i] * K + s.seen[r].ky[i]) * K * LANES;
            }
        if (!n) continue;
        int64_t y = reflect(top + int64_t(r), s.height);
        const T *key = keys + y % s.capacity * s.tall_keys() + channel * s.pitch + tile * s.tile;
        ahead.step();
        if (n == 1) products<1>(s, query, key, out);
        if (n == 2) products<2>(s, query, key, out);
        if (n == 3) products<3>(s, query, key, out);
        if (n == 4) products<4>(s, query, key, out);
    }
}

// The weighted sums of one row of keys or values for each query of a tile, for all parts of a head.
void block_gather(const Sizes &s, Gather gather, int64_t head, int64_t tile, int64_t y, const T *weights,
                  const T *ring, const T *scale, T *out, Prefetch &ahead) {
    for (int64_t part = head * s.parts; part < (head + 1) * s.parts; part++) {
        const T *rows[K];
        for (int64_t ky = 0; ky < K; ky++) {
            int64_t from = reflect(y * s.stride - s.reach + ky * s.dilation, s.height);
            rows[ky] = ring + from % s.capacity * s.wide_keys() +
                       (part * s.columns + tile * s.tile * s.stride) * CHANNELS;
        }
        ahead.step();
        gather(s, weights, rows, scale, out + (part * s.query_columns + tile * s.tile) * CHANNELS);
    }
}

void block_scatter(const Sizes &s, Scatter scatter, int64_t head, int64_t tile, int64_t top, int64_t rows,
                   const T *weights, const T *queries, T *ring, Prefetch &ahead) {
    for (size_t r = 0; r < s.seen.size(); r++) {
        int64_t y = reflect(top + int64_t(r), s.height);
        for (int64_t part = head * s.parts; part < (head + 1) * s.parts; part++) {
            const T *weight[ROWS], *query[ROWS];
            int n = 0;
            for (int i = 0; i < s.seen[r].count; i++) {
                int64_t row = s.seen[r].row[i];
                if (row >= rows) continue;
                weight[n] = weights + (row * K + s.seen[r].ky[i]) * K * LANES;
                query[n++] = queries + row * s.wide_queries() + (part * s.query_columns + tile * s.tile) * CHANNELS;
            }
            T *keys = ring + y % s.capacity * s.wide_keys() + (part * s.columns + tile * s.tile * s.stride) * CHANNELS;
            ahead.step();
            if (n) scatter(s, n, weight, query, keys);
        }
    }
}

// Rows of keys that a block of queries needs are read as far as they have not been.
int64_t last_row(const Sizes &s, int64_t y, int64_t rows) {
    return std::min(s.height - 1, (y + rows - 1) * s.stride + s.reach);
}

void forward_task(const Sizes &s, const Map &q, const Map &k, const Map &v, const T *position,
                  T alpha, bool accumulate, const Map &out, T *lse) {
    Arena arena(s.capacity * (s.wide_keys() + s.tall_keys()) + s.wide_keys() + s.wide_queries() * (ROWS + 1) +
                s.tall_queries() + s.weights() + 7 * 64);
    T *values = arena.take(s.capacity * s.wide_keys()), *keys = arena.take(s.capacity * s.tall_keys());
    T *wide = arena.take(s.wide_keys()), *query = arena.take(s.wide_queries());
    T *queries = arena.take(s.tall_queries()), *weights = arena.take(s.weights());
    T *sums = arena.take(ROWS * s.wide_queries());
    Gather gather = sums_for(s).first;
    const T scale = T(1.4426950408889634) / std::sqrt(T(s.dim));
    Prefetch ahead(s);
    int64_t read = 0;
    for (int64_t y = 0; y < s.out_height; y += ROWS) {
        int64_t rows = std::min<int64_t>(ROWS, s.out_height - y), top = y * s.stride - s.reach;
        for (; read <= last_row(s, y, rows); read++) {
            read_keys(s, v, read, nullptr, values + read % s.capacity * s.wide_keys());
            read_keys(s, k, read, position, wide);
            turn_keys(s, wide, keys + read % s.capacity * s.tall_keys());
        }
        for (int64_t i = 0; i < rows; i++)
            read_queries(s, q, (y + i) * s.stride, s.stride, scale, i, query, queries);
        int64_t more = std::min<int64_t>(ROWS, s.out_height - y - rows);
        for (int64_t i = 0; i < more; i++) ahead.add(q, (y + rows + i) * s.stride, s.stride, s.out_width);
        for (int64_t row = read; more > 0 && row <= last_row(s, y + rows, more); row++) {
            ahead.add(k, row, 1, s.width);
            ahead.add(v, row, 1, s.width);
        }
        for (int64_t i = 0; i < rows; i++) ahead.add(out, y + i, 1, s.out_width, true);
        ahead.start(s.group * s.tiles * (int64_t(s.seen.size()) + rows * s.parts));
        for (int64_t head = 0; head < s.group; head++)
            for (int64_t tile = 0; tile < s.tiles; tile++) {
                block_products(s, head, tile, top, rows, queries, keys, weights, ahead);
                for (int64_t i = 0; i < rows; i++) {
                    auto [sum, logs] = softmax(weights + i * K * K * LANES);
                    T inverse[LANES];
                    store(inverse, alpha / sum);
                    if (lse) {
                        T *at = lse + (head * s.out_height + y + i) * s.out_width + tile * s.tile;
                        std::memcpy(at, &logs, std::min(s.tile, s.out_width - tile * s.tile) * sizeof(T));
                    }
                    block_gather(s, gather, head, tile, y + i, weights + i * K * K * LANES, values, inverse,
                                 sums + i * s.wide_queries(), ahead);
                }
            }
        ahead.clear();
        for (int64_t i = 0; i < rows; i++)
            for (int64_t part = 0; part < s.all_parts(); part++)
                write_line(line_of(s, out, y + i, 1, s.out_width, part),
                           sums + i * s.wide_queries() + part * s.query_columns * CHANNELS, accumulate);
    }
}

// A finished row of a gradient of keys: what reflected columns have received goes to their sources, then to the map.
void write_keys(const Sizes &s, T *row, const Map &map, int64_t y, bool accumulate) {
    for (int64_t part = 0; part < s.all_parts(); part++) {
        T *inside = row + (part * s.columns + s.reach) * CHANNELS, *last = inside + (s.width - 1) * CHANNELS;
        for (int64_t x = CHANNELS; x <= s.reach * CHANNELS; x += CHANNELS) {
            store_pixel(inside + x, load_pixel(inside + x) + load_pixel(inside - x));
            store_pixel(last - x, load_pixel(last - x) + load_pixel(last + x));
        }
        write_line(line_of(s, map, y, 1, s.width, part), inside, accumulate);
    }
}

// Less the moments of a row of dk, already written: sum_x dk[x] * (x, y), in rows [part][2][CHANNELS].
void add_moments(const Sizes &s, const T *row, int64_t y, T *moments) {
    for (int64_t part = 0; part < s.all_parts(); part++) {
        const T *inside = row + (part * s.columns + s.reach) * CHANNELS;
        Pixel total = {}, across = {};
        for (int64_t x = 0; x < s.width; x++) {
            Pixel value = load_pixel(inside + x * CHANNELS);
            total += value;
            across += value * s.x[x];
        }
        T *to = moments + part * 2 * CHANNELS;
        store_pixel(to, load_pixel(to) - across);
        store_pixel(to + CHANNELS, load_pixel(to + CHANNELS) - total * s.y[y]);
    }
}

// A row of dq from its every stride-th pixel; the rows and pixels between have no gradient.
void write_queries(const Sizes &s, const T *row, T *spread, const Map &map, int64_t y, bool accumulate) {
    for (int64_t part = 0; part < s.all_parts(); part++) {
        const T *from = row + part * s.query_columns * CHANNELS;
        if (accumulate || s.stride == 1) {
            write_line(line_of(s, map, y * s.stride, s.stride, s.out_width, part), from, accumulate);
            continue;
        }
        std::fill(spread, spread + s.width * CHANNELS, T(0));
        for (int64_t below = 1; below < s.stride && y * s.stride + below < s.height; below++)
            write_line(line_of(s, map, y * s.stride + below, 1, s.width, part), spread, false);
        for (int64_t x = 0; x < s.out_width; x++)
            store_pixel(spread + x * s.stride * CHANNELS, load_pixel(from + x * CHANNELS));
        write_line(line_of(s, map, y * s.stride, 1, s.width, part), spread, false);
    }
}

struct Gradients {
    Map q, k, v;
    T *position, *alpha;  // of this task's heads: (group, dim, 2), (group)
};

void backward_task(const Sizes &s, const Map &grad, const Map &q, const Map &k, const Map &v, const T *position,
                   const T *lse, T alpha, bool accumulate, const Gradients &to) {
    int64_t wide_ring = s.capacity * s.wide_keys(), tall_ring = s.capacity * s.tall_keys();
    Arena arena(3 * wide_ring + 2 * tall_ring + s.wide_keys() + 3 * ROWS * s.wide_queries() + 2 * s.tall_queries() +
                2 * s.weights() + s.width * CHANNELS + 2 * s.channels() + 14 * 64);
    T *keys = arena.take(wide_ring), *dkeys = arena.take(wide_ring), *dvalues = arena.take(wide_ring);
    T *tall_keys = arena.take(tall_ring), *tall_values = arena.take(tall_ring), *wide = arena.take(s.wide_keys());
    T *queries = arena.take(ROWS * s.wide_queries()), *grads = arena.take(ROWS * s.wide_queries());
    T *tall_queries = arena.take(s.tall_queries()), *tall_grads = arena.take(s.tall_queries());
    T *weights = arena.take(s.weights()), *dlogits = arena.take(s.weights());
    T *sums = arena.take(ROWS * s.wide_queries()), *spread = arena.take(s.width * CHANNELS);
    T *moments = arena.take(2 * s.channels());
    auto [gather, scatter] = sums_for(s);
    const T log2e = T(1.4426950408889634), scale = log2e / std::sqrt(T(s.dim));
    T scales[LANES];
    std::fill(scales, scales + LANES, scale);
    std::fill(moments, moments + 2 * s.channels(), T(0));
    std::vector<Vec> dalpha(s.group, Vec{});

    Prefetch ahead(s);
    int64_t read = 0, written = 0;
    auto write_row = [&] {
        T *dk = dkeys + written % s.capacity * s.wide_keys(), *dv = dvalues + written % s.capacity * s.wide_keys();
        write_keys(s, dk, to.k, written, accumulate);
        add_moments(s, dk, written, moments);
        write_keys(s, dv, to.v, written, accumulate);
        written++;
    };
    auto read_row = [&] {
        int64_t place = read % s.capacity;
        if (read - written >= s.capacity) write_row();
        read_keys(s, k, read, position, keys + place * s.wide_keys());
        turn_keys(s, keys + place * s.wide_keys(), tall_keys + place * s.tall_keys());
        read_keys(s, v, read, nullptr, wide);
        turn_keys(s, wide, tall_values + place * s.tall_keys());
        std::fill_n(dkeys + place * s.wide_keys(), s.wide_keys(), T(0));
        std::fill_n(dvalues + place * s.wide_keys(), s.wide_keys(), T(0));
        read++;
    };

    for (int64_t y = 0; y < s.out_height; y += ROWS) {
        int64_t rows = std::min<int64_t>(ROWS, s.out_height - y), top = y * s.stride - s.reach;
        while (read <= last_row(s, y, rows)) read_row();
        for (int64_t i = 0; i < rows; i++) {
            read_queries(s, q, (y + i) * s.stride, s.stride, scale, i, queries + i * s.wide_queries(), tall_queries);
            read_queries(s, grad, y + i, 1, T(1), i, grads + i * s.wide_queries(), tall_grads);
        }
        int64_t more = std::min<int64_t>(ROWS, s.out_height - y - rows);
        for (int64_t i = 0; i < more; i++) {
            ahead.add(q, (y + rows + i) * s.stride, s.stride, s.out_width);
            ahead.add(grad, y + rows + i, 1, s.out_width);
        }
        for (int64_t row = read; more > 0 && row <= last_row(s, y + rows, more); row++) {
            ahead.add(k, row, 1, s.width);
            ahead.add(v, row, 1, s.width);
            if (row < s.capacity) continue;
            ahead.add(to.k, row - s.capacity, 1, s.width, true);
            ahead.add(to.v, row - s.capacity, 1, s.width, true);
        }
        for (int64_t i = 0; i < rows; i++) ahead.add(to.q, (y + i) * s.stride, s.stride, s.out_width, true);
        ahead.start(s.group * s.tiles * (2 * (1 + s.parts) * int64_t(s.seen.size()) + rows * s.parts));
        for (int64_t head = 0; head < s.group; head++)
            for (int64_t tile = 0; tile < s.tiles; tile++) {
                int64_t valid = std::min(s.tile, s.out_width - tile * s.tile);
                block_products(s, head, tile, top, rows, tall_queries, tall_keys, weights, ahead);
                block_products(s, head, tile, top, rows, tall_grads, tall_values, dlogits, ahead);
                for (int64_t i = 0; i < rows; i++) {
                    T *weight = weights + i * K * K * LANES, *dlogit = dlogits + i * K * K * LANES;
                    const T *at = lse + (head * s.out_height + y + i) * s.out_width + tile * s.tile;
                    Vec logs = {};
                    for (int64_t x = 0; x < valid; x++) logs[x] = at[x];
                    dalpha[head] += softmax_backward(weight, dlogit, logs, valid, alpha, alpha / log2e);
                    block_gather(s, gather, head, tile, y + i, dlogit, keys, scales, sums + i * s.wide_queries(), ahead);
                }
                block_scatter(s, scatter, head, tile, top, rows, dlogits, queries, dkeys, ahead);
                block_scatter(s, scatter, head, tile, top, rows, weights, grads, dvalues, ahead);
            }
        ahead.clear();
        for (int64_t i = 0; i < rows; i++)
            write_queries(s, sums + i * s.wide_queries(), spread, to.q, y + i, accumulate);
    }
    while (read < s.height) read_row();
    while (written < s.height) write_row();

    for (int64_t head = 0; head < s.group; head++) {
        to.alpha[head] = 0;
        for (int x = 0; x < LANES; x++) to.alpha[head] += dalpha[head][x];
        for (int64_t c = 0; c < s.dim; c++)
            for (int64_t axis = 0; axis < 2; axis++)
                to.position[(head * s.dim + c) * 2 + axis] =
                    moments[((head * s.parts + c / CHANNELS) * 2 + axis) * CHANNELS + c % CHANNELS];
    }
}

}  // namespace

extern "C" {

// Tasks begin..end-1: groups of heads, counted over all images. out = (accumulate ? out : 0) + alpha * attended map.
// `position` is the position weight (dim, 2). `lse` (images * heads, out_height, out_width), or null, receives the
// log2-sum-exp2 of the logits / ln 2.
void forward(const Problem *problem, const Map *q, const Map *k, const Map *v, const T *position, double alpha,
             int64_t accumulate, const Map *out, T *lse, int64_t begin, int64_t end, int64_t threads) {
    const Sizes s(*problem);
    parallel(begin, end, threads, [&](int64_t task) {
        auto at = [&](const Map *map) { return heads_of(*map, *problem, task); };
        T *logs = lse ? lse + task * s.group * s.out_height * s.out_width : nullptr;
        forward_task(s, at(q), at(k), at(v), position, T(alpha), accumulate, at(out), logs);
    });
}

// dq, dk and dv receive alpha * the gradients for grad, the gradient of the output, or are increased by them. `dposition`
// (images * heads, dim, 2) and `dalpha` (images * heads) receive each head's share of the other gradients.
void backward(const Problem *problem, const Map *grad, const Map *q, const Map *k, const Map *v, const T *position,
              const T *lse, double alpha, int64_t accumulate, const Map *dq, const Map *dk, const Map *dv, T *dposition,
              T *dalpha, int64_t begin, int64_t end, int64_t threads) {
    const Sizes s(*problem);
    parallel(begin, end, threads, [&](int64_t task) {
        auto at = [&](const Map *map) { return heads_of(*map, *problem, task); };
        int64_t head = task * s.group;
        Gradients to{at(dq), at(dk), at(dv), dposition + head * s.dim * 2, dalpha + head};
        backward_task(s, at(grad), at(q), at(k), at(v), position, lse + head * s.out_height * s.out_width, T(alpha),
                      accumulate, to);
    });
}

}  // extern "C"
