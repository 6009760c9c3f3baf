// Sliding-window attention of one or more heads on a CPU, forward and backward; see cpp.py for the interface.
//
// Compiled once per (S, T, K, LANES, CHANNELS): type of the maps, type of the sums, window size, numbers per vector of
// pixels and per vector of channels.
//
// Logits and their gradients are products over channels: computed in vectors over the columns of a row of queries, for
// ROWS rows of queries at once, which share every vector of keys that is loaded. Sums over the window (of values, and
// the gradients of q, k and v) are computed in vectors over channels, each weight spread over a vector, so that they
// read and write rows as channels_last maps have them. Rows of keys and queries are therefore kept wide or tall, or
// both; see rows.h.
//
// Only the rows of keys that a block of queries sees exist at a time, each in the place `row % capacity` of a ring.
// Columns are reflected at the border when a row is read, rows when they are looked up.

#include <numeric>

#include "rows.h"
#include "softmax.h"
#include "sums.h"

namespace {

constexpr T LOG2E = T(1.4426950408889634);

// Cuts a thread's memory into arrays that begin at cache lines.
class Arena {
    T *next;
    static int64_t whole(int64_t size) { return (size + 63) / 64 * 64; }

   public:
    explicit Arena(std::initializer_list<int64_t> sizes) {
        int64_t total = 64 + LANES * CHANNELS;  // whole vectors are read past the last row
        for (int64_t size : sizes) total += whole(size);
        next = scratch(total);
        next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64 / sizeof(T);
    }
    T *take(int64_t size) {
        T *taken = next;
        next += whole(size);
        return taken;
    }
};

// Rows of keys, values or their gradients.
struct Ring {
    T *data;
    int64_t row, capacity;
    T *operator[](int64_t y) const { return data + y % capacity * row; }
};

// Up to ROWS rows of queries from row y on.
struct Block {
    int64_t y, rows;
    int64_t top(const Sizes &s) const { return y * s.stride - s.reach; }  // the first row of keys, before reflection
    int64_t last(const Sizes &s) const { return std::min(s.height - 1, (y + rows - 1) * s.stride + s.reach); }
    Block next(const Sizes &s) const { return {y + rows, std::min<int64_t>(ROWS, s.out_height - y - rows)}; }
};

// A tile of the queries of a block, of one head.
struct Tile {
    Block block;
    int64_t head, index;
    int64_t column(const Sizes &s) const { return index * s.tile; }
    int64_t count(const Sizes &s) const { return std::min(s.tile, s.out_width - column(s)); }
    T *tall_queries(const Sizes &s, T *block_queries, int64_t row) const {
        return block_queries + ((index * s.channels() + head * s.parts * CHANNELS) * ROWS + row) * LANES;
    }
    T *wide_queries(const Sizes &s, T *block_queries, int64_t row, int64_t part) const {
        return block_queries + row * s.wide_queries() + (part * s.query_columns + column(s)) * CHANNELS;
    }
    T *tall_keys(const Sizes &s, T *row) const { return row + head * s.parts * CHANNELS * s.pitch + column(s); }
    T *wide_keys(const Sizes &s, T *row, int64_t part) const {
        return row + (part * s.columns + column(s) * s.stride) * CHANNELS;
    }
};

// What both passes have in common: the maps of a task, which is the heads of a group in one image.
struct Task {
    const Sizes &s;
    const Sums sums;
    Map q, k, v;
    const T *position;
    Prefetch ahead;
    int64_t read = 0;  // rows of keys so far

    // What the products of queries and keys must be multiplied by to be exponents of two.
    T to_bits() const { return LOG2E / std::sqrt(T(s.dim)); }

    // work(tile) for all tiles of a block
    template <class Work>
    void for_tiles(const Block &block, Work work) {
        for (int64_t head = 0; head < s.group; head++)
            for (int64_t index = 0; index < s.tiles; index++) work(Tile{block, head, index});
    }
    // work(row, seen) for all rows of keys that a block sees
    template <class Work>
    void for_keys(const Block &block, Work work) {
        const std::vector<Seen> &seen = s.seen[block.rows];
        for (size_t r = 0; r < seen.size(); r++)
            if (seen[r].count) work(reflect(block.top(s) + int64_t(r), s.height), seen[r]);
    }
    // The weighted sums of one row of queries, for all parts of a head.
    void gather(const Tile &tile, int64_t row, const T *weights, const Ring &keys, const T *scale, T *out) {
        int64_t top = tile.block.top(s) + row * s.stride;
        for (int64_t part = tile.head * s.parts; part < (tile.head + 1) * s.parts; part++) {
            const T *rows[K];
            for (int64_t ky = 0; ky < K; ky++)
                rows[ky] = tile.wide_keys(s, keys[reflect(top + ky * s.dilation, s.height)], part);
            ahead.step();
            sums.gather(s, weights, rows, scale, tile.wide_queries(s, out, row, part));
        }
    }
    void prefetch_inputs(const Block &block) {
        for (int64_t row = block.y; row < block.y + block.rows; row++)
            ahead.add(q, row * s.stride, s.stride, s.out_width);
        for (int64_t row = read; block.rows > 0 && row <= block.last(s); row++) {
            ahead.add(k, row, 1, s.width);
            ahead.add(v, row, 1, s.width);
        }
    }
};

struct Forward : Task {
    Map out;
    T alpha;
    bool accumulate;
    T *lse;

    void run() {
        Arena arena{s.capacity * s.wide_keys(), s.capacity * s.tall_keys(), s.wide_keys(), s.wide_queries(),
                    s.tall_queries(), ROWS * s.wide_queries(), ROWS * K * K * LANES};
        Ring values{arena.take(s.capacity * s.wide_keys()), s.wide_keys(), s.capacity};
        Ring keys{arena.take(s.capacity * s.tall_keys()), s.tall_keys(), s.capacity};
        T *wide_key = arena.take(s.wide_keys()), *wide_query = arena.take(s.wide_queries());
        T *queries = arena.take(s.tall_queries()), *attended = arena.take(ROWS * s.wide_queries());
        T *weights = arena.take(ROWS * K * K * LANES);
        for (Block block = Block{0, 0}.next(s); block.rows > 0; block = block.next(s)) {
            for (; read <= block.last(s); read++) {
                read_keys(s, v, read, nullptr, values[read]);
                read_keys(s, k, read, position, wide_key);
                turn_keys(s, wide_key, keys[read]);
            }
            for (int64_t i = 0; i < block.rows; i++)
                read_queries(s, q, (block.y + i) * s.stride, s.stride, to_bits(), i, wide_query, queries);
            prefetch(block);
            for_tiles(block, [&](const Tile &tile) { attend(tile, keys, values, queries, weights, attended); });
            ahead.clear();
            for (int64_t i = 0; i < block.rows; i++)
                for (int64_t part = 0; part < s.all_parts(); part++)
                    write_line(line_of(s, out, block.y + i, 1, s.out_width, part),
                               attended + i * s.wide_queries() + part * s.query_columns * CHANNELS, accumulate);
        }
    }

    void prefetch(const Block &block) {
        prefetch_inputs(block.next(s));
        for (int64_t i = 0; i < block.rows; i++) ahead.add(out, block.y + i, 1, s.out_width, true);
        ahead.start(s.group * s.tiles * (int64_t(s.seen[block.rows].size()) + block.rows * s.parts));
    }

    void attend(const Tile &tile, const Ring &keys, const Ring &values, T *queries, T *weights, T *attended) {
        T tops[ROWS][LANES];
        std::fill_n(tops[0], ROWS * LANES, -std::numeric_limits<T>::infinity());
        for_keys(tile.block, [&](int64_t y, const Seen &seen) {
            const T *query[ROWS];
            T *logits[ROWS], *top[ROWS];
            for (int n = 0; n < seen.count; n++) {
                query[n] = tile.tall_queries(s, queries, seen.row[n]);
                logits[n] = weights + (seen.row[n] * K + seen.ky[n]) * K * LANES;
                top[n] = tops[seen.row[n]];
            }
            ahead.step();
            products<true>(s, seen.count, query, tile.tall_keys(s, keys[y]), logits, top);
        });
        for (int64_t i = 0; i < tile.block.rows; i++) {
            T *weight = weights + i * K * K * LANES, inverse[LANES];
            Vec top = load(tops[i]), sum = softmax(weight, top);
            store(inverse, alpha / sum);
            if (lse) {
                Vec logs = top + log2_of(sum);
                T *at = lse + (tile.head * s.out_height + tile.block.y + i) * s.out_width + tile.column(s);
                std::memcpy(at, &logs, tile.count(s) * sizeof(T));
            }
            gather(tile, i, weight, values, inverse, attended);
        }
    }
};

struct Backward : Task {
    Map grad, dq, dk, dv;
    const T *lse;
    T alpha;
    bool accumulate;
    T *dposition, *dalpha;  // of this task's heads

    Ring keys, tall_keys, tall_values, dkeys, dvalues;
    T *wide_value, *queries, *tall_queries, *grads, *tall_grads;
    T *weights, *dlogits, *dqueries, *spread, *moments, *dots_of_heads;
    int64_t written = 0;  // rows of dk and dv so far

    void run() {
        int64_t wide = s.capacity * s.wide_keys(), tall = s.capacity * s.tall_keys(), rows = ROWS * s.wide_queries();
        int64_t window = ROWS * K * K * LANES;
        Arena arena{wide, wide, wide, tall, tall, s.wide_keys(), rows, rows, rows, s.tall_queries(), s.tall_queries(),
                    window, window, s.width * CHANNELS, 2 * s.channels(), s.group * LANES};
        for (Ring *ring : {&keys, &dkeys, &dvalues}) *ring = {arena.take(wide), s.wide_keys(), s.capacity};
        for (Ring *ring : {&tall_keys, &tall_values}) *ring = {arena.take(tall), s.tall_keys(), s.capacity};
        wide_value = arena.take(s.wide_keys());
        for (T **at : {&queries, &grads, &dqueries}) *at = arena.take(rows);
        for (T **at : {&tall_queries, &tall_grads}) *at = arena.take(s.tall_queries());
        for (T **at : {&weights, &dlogits}) *at = arena.take(window);
        spread = arena.take(s.width * CHANNELS);
        moments = arena.take(2 * s.channels());
        std::fill_n(moments, 2 * s.channels(), T(0));
        dots_of_heads = arena.take(s.group * LANES);
        std::fill_n(dots_of_heads, s.group * LANES, T(0));
        for (Block block = Block{0, 0}.next(s); block.rows > 0; block = block.next(s)) {
            read_block(block);
            prefetch(block);
            for_tiles(block, [&](const Tile &tile) {
                differentiate_weights(tile);
                add_to_keys(tile);
            });
            ahead.clear();
            for (int64_t i = 0; i < block.rows; i++)
                write_queries(s, dqueries + i * s.wide_queries(), spread, dq, block.y + i, accumulate);
        }
        while (read < s.height) read_row();
        while (written < s.height) write_row();
        for (int64_t head = 0; head < s.group; head++)
            dalpha[head] = std::accumulate(dots_of_heads + head * LANES, dots_of_heads + (head + 1) * LANES, T(0));
        for (int64_t i = 0; i < s.group * s.dim; i++)
            for (int64_t axis = 0; axis < 2; axis++) {
                int64_t part = i / s.dim * s.parts + i % s.dim / CHANNELS;
                dposition[2 * i + axis] = moments[(2 * part + axis) * CHANNELS + i % s.dim % CHANNELS];
            }
    }

    void read_block(const Block &block) {
        while (read <= block.last(s)) read_row();
        for (int64_t i = 0; i < block.rows; i++) {
            T *query = queries + i * s.wide_queries(), *wide_grad = grads + i * s.wide_queries();
            read_queries(s, q, (block.y + i) * s.stride, s.stride, to_bits(), i, query, tall_queries);
            read_queries(s, grad, block.y + i, 1, 1, i, wide_grad, tall_grads);
            if (alpha != 1) scale_pixels(wide_grad, s.all_parts() * s.query_columns, alpha);
        }
    }

    void read_row() {
        if (read - written >= s.capacity) write_row();
        read_keys(s, k, read, position, keys[read]);
        turn_keys(s, keys[read], tall_keys[read]);
        read_keys(s, v, read, nullptr, wide_value);
        turn_keys(s, wide_value, tall_values[read]);
        std::fill_n(dkeys[read], s.wide_keys(), T(0));
        std::fill_n(dvalues[read], s.wide_keys(), T(0));
        read++;
    }

    void write_row() {
        write_keys(s, dkeys[written], dk, written, accumulate);
        subtract_moments(s, dkeys[written], written, moments);
        write_keys(s, dvalues[written], dv, written, accumulate);
        written++;
    }

    void prefetch(const Block &block) {
        Block next = block.next(s);
        prefetch_inputs(next);
        for (int64_t row = next.y; row < next.y + next.rows; row++) ahead.add(grad, row, 1, s.out_width);
        for (int64_t row = read; next.rows > 0 && row <= next.last(s); row++) {
            if (row < s.capacity) continue;
            ahead.add(dk, row - s.capacity, 1, s.width, true);
            ahead.add(dv, row - s.capacity, 1, s.width, true);
        }
        for (int64_t i = 0; i < block.rows; i++)
            ahead.add(dq, (block.y + i) * s.stride, s.stride, s.out_width, true);
        int64_t keys_seen = s.seen[block.rows].size();
        ahead.start(s.group * s.tiles * (2 * (1 + s.parts) * keys_seen + block.rows * s.parts));
    }

    // Weights and gradients of logits of a tile, and dq.
    void differentiate_weights(const Tile &tile) {
        T logs[ROWS][LANES] = {}, dots[ROWS][LANES] = {}, totals[ROWS][LANES] = {}, scale[LANES];
        for (int64_t i = 0; i < tile.block.rows; i++)
            std::memcpy(logs[i], lse + (tile.head * s.out_height + tile.block.y + i) * s.out_width + tile.column(s),
                        tile.count(s) * sizeof(T));
        for_keys(tile.block, [&](int64_t y, const Seen &seen) {
            const T *query[ROWS], *output_grad[ROWS], *log[ROWS];
            T *weight[ROWS], *dweight[ROWS], *dot[ROWS], *total[ROWS];
            for (int n = 0; n < seen.count; n++) {
                int row = seen.row[n], place = (row * K + seen.ky[n]) * K * LANES;
                query[n] = tile.tall_queries(s, tall_queries, row);
                output_grad[n] = tile.tall_queries(s, tall_grads, row);
                weight[n] = weights + place;
                dweight[n] = dlogits + place;
                log[n] = logs[row];
                dot[n] = dots[row];
                total[n] = totals[row];
            }
            ahead.step();
            products<false>(s, seen.count, query, tile.tall_keys(s, tall_keys[y]), weight);
            weigh(seen.count, weight, log);
            ahead.step();
            products<false>(s, seen.count, output_grad, tile.tall_keys(s, tall_values[y]), dweight);
            add_products(seen.count, weight, dweight, dot, total);
        });
        std::fill_n(scale, LANES, to_bits());
        for (int64_t i = 0; i < tile.block.rows; i++) {
            T *dlogit = dlogits + i * K * K * LANES;
            // The gradients of a query's logits must sum to 0: that of the position weight adds them up times the place
            // of the query.
            T means[LANES];
            Vec total = load(totals[i]), mean = load(dots[i]) / total;
            store(means, mean);
            softmax_backward(weights + i * K * K * LANES, dlogit, mean, total, alpha / LOG2E);
            for (int64_t x = 0; x < tile.count(s); x++) dots_of_heads[tile.head * LANES + x] += means[x];
            gather(tile, i, dlogit, keys, scale, dqueries);
        }
    }

    void add_to_keys(const Tile &tile) {
        for_keys(tile.block, [&](int64_t y, const Seen &seen) {
            for (int64_t part = tile.head * s.parts; part < (tile.head + 1) * s.parts; part++) {
                const T *query[ROWS], *output_grad[ROWS], *weight[ROWS], *dlogit[ROWS];
                for (int n = 0; n < seen.count; n++) {
                    int row = seen.row[n], place = (row * K + seen.ky[n]) * K * LANES;
                    query[n] = tile.wide_queries(s, queries, row, part);
                    output_grad[n] = tile.wide_queries(s, grads, row, part);
                    weight[n] = weights + place;
                    dlogit[n] = dlogits + place;
                }
                ahead.step();
                sums.scatter(s, seen.count, dlogit, query, tile.wide_keys(s, dkeys[y], part));
                ahead.step();
                sums.scatter(s, seen.count, weight, output_grad, tile.wide_keys(s, dvalues[y], part));
            }
        });
    }
};

Map heads_of(const Map *map, const Problem &p, int64_t task) {
    Map heads = *map;
    int64_t groups = p.heads / p.group;
    heads.data += task / groups * map->image + task % groups * p.group * p.dim * map->channel;
    return heads;
}

}  // namespace

extern "C" {

// Tasks begin..end-1: groups of heads, counted over all images. out = (accumulate ? out : 0) + alpha * attended map.
// `position` is the position weight (dim, 2). `lse` (images * heads, out_height, out_width), or null, receives the
// binary logarithm of the sum of the logits' exponentials.
void forward(const Problem *problem, const Map *q, const Map *k, const Map *v, const T *position, double alpha,
             int64_t accumulate, const Map *out, T *lse, int64_t begin, int64_t end, int64_t threads) {
    const Sizes s(*problem);
    parallel(begin, end, threads, [&](int64_t i) {
        auto at = [&](const Map *map) { return heads_of(map, *problem, i); };
        T *logs = lse ? lse + i * s.group * s.out_height * s.out_width : nullptr;
        Forward task{{s, Sums(s), at(q), at(k), at(v), position, Prefetch(s)},
                     at(out), T(alpha), accumulate != 0, logs};
        task.run();
    });
}

// dq, dk and dv receive alpha * the gradients for `grad`, that of the output, or are increased by them. `dposition`
// (images * heads, dim, 2) and `dalpha` (images * heads) receive each head's share of the other gradients.
void backward(const Problem *problem, const Map *grad, const Map *q, const Map *k, const Map *v, const T *position,
              const T *lse, double alpha, int64_t accumulate, const Map *dq, const Map *dk, const Map *dv, T *dposition,
              T *dalpha, int64_t begin, int64_t end, int64_t threads) {
    const Sizes s(*problem);
    parallel(begin, end, threads, [&](int64_t i) {
        auto at = [&](const Map *map) { return heads_of(map, *problem, i); };
        int64_t head = i * s.group;
        Backward task{{s, Sums(s), at(q), at(k), at(v), position, Prefetch(s)}, at(grad), at(dq), at(dk), at(dv),
                      lse + head * s.out_height * s.out_width, T(alpha), accumulate != 0,
                      dposition + head * s.dim * 2, dalpha + head};
        task.run();
    });
}

}  // extern "C"
