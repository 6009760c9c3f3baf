// Rows of maps, as they are read, kept and written. In memory of our own, a row has one of two forms:
//
//   wide  [part of CHANNELS channels][column][CHANNELS], absent channels zero
//   tall  [channel][column]; of keys, the columns are split by their remainder modulo the stride

#pragma once

#include "sizes.h"

namespace {

// One part of a row of a map: `count` pixels, `column` apart, of which `present` channels, `channel` apart, are there.
struct Line {
    S *data;
    int64_t column, channel, present, count;
};

// The line of every step-th pixel of row y, of one part of the channels of a task's heads.
Line line_of(const Sizes &s, const Map &map, int64_t y, int64_t step, int64_t count, int64_t part) {
    int64_t head = part / s.parts, first = part % s.parts * CHANNELS;
    S *data = map.data + y * map.row + (head * s.dim + first) * map.channel;
    return {data, step * map.column, map.channel, std::min<int64_t>(CHANNELS, s.dim - first), count};
}

// Writes whole vectors: up to LANES - 1 numbers past the last.
void read_line(const Line &line, T *to) {
    if (line.channel == 1 && line.present == CHANNELS) {
        for (int64_t x = 0; x < line.count; x++)
            store_pixel(to + x * CHANNELS, widen<Pixel>(line.data + x * line.column));
    } else if (line.column == 1) {
        for (int64_t x = 0; x < line.count; x += LANES) {
            Vec v[CHANNELS];
            for (int64_t c = 0; c < CHANNELS; c++) {
                const S *from = line.data + c * line.channel + x;
                v[c] = c >= line.present         ? Vec{}
                       : x + LANES <= line.count ? widen<Vec>(from)
                                                 : widen_some(from, line.count - x);
            }
            join_channels(v);
            for (int64_t c = 0; c < CHANNELS; c++)
                if (c * LANES < (line.count - x) * CHANNELS) store(to + x * CHANNELS + c * LANES, v[c]);
        }
    } else {
        for (int64_t x = 0; x < line.count; x++)
            for (int64_t c = 0; c < CHANNELS; c++)
                to[x * CHANNELS + c] = c < line.present ? T(line.data[x * line.column + c * line.channel]) : T(0);
    }
}

// The line becomes what `from` holds, or the sum of both. Reads whole vectors.
void write_line(const Line &line, const T *from, bool accumulate) {
    if (line.channel == 1 && line.present == CHANNELS) {
        for (int64_t x = 0; x < line.count; x++) {
            S *to = line.data + x * line.column;
            Pixel v = load_pixel(from + x * CHANNELS);
            narrow<Pixel>(to, accumulate ? v + widen<Pixel>(to) : v);
        }
    } else if (line.column == 1) {
        for (int64_t x = 0; x < line.count; x += LANES) {
            int64_t count = std::min<int64_t>(LANES, line.count - x);
            Vec v[CHANNELS];
            for (int c = 0; c < CHANNELS; c++) v[c] = load(from + x * CHANNELS + c * LANES);
            split_channels(v);
            for (int64_t c = 0; c < line.present; c++) {
                S *to = line.data + c * line.channel + x;
                if (count == LANES) narrow<Vec>(to, accumulate ? v[c] + widen<Vec>(to) : v[c]);
                else narrow_some(to, accumulate ? v[c] + widen_some(to, count) : v[c], count);
            }
        }
    } else {
        for (int64_t x = 0; x < line.count; x++)
            for (int64_t c = 0; c < line.present; c++) {
                S &to = line.data[x * line.column + c * line.channel];
                T value = from[x * CHANNELS + c];
                to = S(accumulate ? T(to) + value : value);
            }
    }
}

// LANES pixels of a wide row of one part, `step` apart, become tall, with `pitch` from channel to channel.
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

void scale_pixels(T *row, int64_t count, T scale) {
    for (int64_t x = 0; x < count * CHANNELS; x += CHANNELS) store_pixel(row + x, load_pixel(row + x) * scale);
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
    const int64_t few = 2;  // columns that are faster taken one by one
    for (int64_t part = 0; part < s.all_parts(); part++)
        for (int64_t phase = 0; phase < s.stride; phase++) {
            const T *from = wide + (part * s.columns + phase) * CHANNELS;
            T *to = tall + part * CHANNELS * s.pitch + phase * s.phase;
            int64_t x = 0;
            for (; x + few < s.phase; x += LANES) {
                x = std::min(x, s.phase - LANES);
                turn(from + x * s.stride * CHANNELS, s.stride, to + x, s.pitch);
            }
            for (; x < s.phase; x++)
                for (int64_t c = 0; c < CHANNELS; c++) to[c * s.pitch + x] = from[x * s.stride * CHANNELS + c];
        }
}

// Row i of a block of queries, from every step-th pixel of row y: wide, with zeros at the end, and its share of the
// block's tall form [tile][channel][ROWS][LANES].
void read_queries(const Sizes &s, const Map &map, int64_t y, int64_t step, T scale, int64_t i, T *wide, T *tall) {
    for (int64_t part = 0; part < s.all_parts(); part++) {
        T *row = wide + part * s.query_columns * CHANNELS;
        read_line(line_of(s, map, y, step, s.out_width, part), row);
        if (scale != 1) scale_pixels(row, s.out_width, scale);
        std::fill(row + s.out_width * CHANNELS, row + s.query_columns * CHANNELS, T(0));
        for (int64_t tile = 0; tile < s.tiles; tile++)
            turn(row + tile * s.tile * CHANNELS, 1,
                 tall + ((tile * s.channels() + part * CHANNELS) * ROWS + i) * LANES, ROWS * LANES);
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

// Subtracts from moments [part][2][CHANNELS] those of a row of dk that has been written: sum_x dk[x] * (x, y).
void subtract_moments(const Sizes &s, const T *row, int64_t y, T *moments) {
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

// A row of dq from its every stride-th pixel; the rows and pixels between have no gradient. `spread` is for a line.
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

// Rows of maps that the next block of queries will read or write, called into the cache bit by bit while this one is
// computed.
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
            const Row &now = rows[row];
            const S *first = now.data + piece * now.step;
            for (int64_t x = 0; x < now.length; x += 64 / int64_t(sizeof(S)))
                now.write ? __builtin_prefetch(first + x, 1, 2) : __builtin_prefetch(first + x, 0, 2);
            if (++piece == now.count) row++, piece = 0;
        }
    }
    void clear() {
        rows.clear();
        row = piece = pieces = 0;
    }
};

}  // namespace
