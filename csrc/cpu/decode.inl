// Heatmaps -> keypoints. For each map m = (n, k), with a = heatmaps[n, k], f = flipped[n, perm k] and s = shift:
//
//     v[y, x] = a[y, x]                                            without `flipped`, else
//     v[y, x] = (a[y, x] + f[y, w - 1 - max(x - s, 0)]) * 0.5      mirrored in x, columns 1.. moved one to the right
//     score = max v, (px, py) = first position of it; (0, 0) unless score > 0
//     quarter, if 1 < px < w - 1 and 1 < py < h - 1: px += 0.25 sign(v[py, px + 1] - v[py, px - 1]), py likewise
//
// Reads each input value once, 4 bytes (8 with `flipped`), and writes 12 bytes per map: bound by memory. One worker
// takes whole maps. A map is walked in blocks small enough to stay in L1; only the block that held the maximum is
// searched for its position.

constexpr int64_t kBlock = 1024; // floats: 4 KiB, so that block, map and mirrored map share a 32 KiB L1

struct Map {
  const float *direct, *mirror; // mirror is null without `flipped`
  int64_t h, w;
  int shift;
};

inline float value_at(const Map &map, int64_t y, int64_t x) {
  const float direct = map.direct[y * map.w + x];
  if (!map.mirror)
    return direct;
  const int64_t moved = x - map.shift;
  return (direct + map.mirror[y * map.w + map.w - 1 - (moved > 0 ? moved : 0)]) * 0.5f;
}

// Values of `rows` x `cols` pixels from (y, x): a pointer into the map, or `buffer` filled with merged values.
inline const float *block_values(const Map &map, int64_t y, int64_t x, int64_t rows, int64_t cols, float *buffer) {
  if (!map.mirror)
    return map.direct + y * map.w + x;
  for (int64_t row = 0; row < rows; ++row) {
    const float *direct = map.direct + (y + row) * map.w + x;
    const float *last =
        map.mirror + (y + row) * map.w + map.w - 1 - x + map.shift; // last[-i] is the partner of direct[i]
    float *out = buffer + row * cols;
    const int64_t first = x == 0 ? map.shift : 0; // column 0 has no left neighbour: it stays where it is
    if (first)
      out[0] = (direct[0] + last[-1]) * 0.5f;
#pragma omp simd
    for (int64_t i = first; i < cols; ++i)
      out[i] = (direct[i] + last[-i]) * 0.5f;
  }
  return buffer;
}

// Maximum of `count` values; sets `nan` if any of them is one.
inline float block_max(const float *values, int64_t count, bool &nan) {
  float best = -__builtin_inff();
  int unordered = 0;
#pragma omp simd reduction(max : best) reduction(| : unordered)
  for (int64_t i = 0; i < count; ++i) {
    best = values[i] > best ? values[i] : best;
    unordered |= values[i] != values[i];
  }
  nan = nan || unordered;
  return best;
}

inline float quarter_step(float low, float high) { return high > low ? 0.25f : high < low ? -0.25f : 0.0f; }

inline void decode_map(const Map &map, bool quarter, const double *transform, float *keypoint, float *score) {
  alignas(64) float buffer[kBlock];
  // Whole rows where they fit; else pieces of one row. A map that needs no merging is one long row.
  const int64_t h = map.mirror ? map.h : 1, w = map.mirror ? map.w : map.h * map.w;
  const Map flat = {map.direct, map.mirror, h, w, map.shift};
  const int64_t cols = w < kBlock ? w : kBlock, rows = kBlock / cols;

  float best = -__builtin_inff();
  int64_t best_y = 0, best_x = 0;
  bool nan = false;
  for (int64_t y = 0; y < h; y += rows)
    for (int64_t x = 0; x < w; x += cols) {
      const int64_t r = h - y < rows ? h - y : rows, c = w - x < cols ? w - x : cols;
      const float highest = block_max(block_values(flat, y, x, r, c, buffer), r * c, nan);
      if (highest > best)
        best = highest, best_y = y, best_x = x;
    }
  if (nan) {
    *score = keypoint[0] = keypoint[1] = __builtin_nanf("");
    return;
  }

  const int64_t r = h - best_y < rows ? h - best_y : rows, c = w - best_x < cols ? w - best_x : cols;
  const float *values = block_values(flat, best_y, best_x, r, c, buffer);
  int64_t found = 0;
  while (values[found] != best) // ends: every map holds its maximum, if only -inf at index 0
    ++found;
  const int64_t index = best_y * w + best_x + found;
  const int64_t px = best > 0 ? index % map.w : 0, py = best > 0 ? index / map.w : 0;

  float x = float(px), y = float(py);
  if (quarter && px > 1 && px < map.w - 1 && py > 1 && py < map.h - 1) {
    x += quarter_step(value_at(map, py, px - 1), value_at(map, py, px + 1));
    y += quarter_step(value_at(map, py - 1, px), value_at(map, py + 1, px));
  }
  *score = best;
  keypoint[0] = transform ? float(transform[0] * x + transform[1] * y + transform[2]) : x;
  keypoint[1] = transform ? float(transform[3] * x + transform[4] * y + transform[5]) : y;
}

void decode_fwd(const DecodeArgs &args) {
  const int64_t size = args.h * args.w;
  split(args.n * args.k, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t n = m / args.k;
      const float *mirror = args.flipped ? args.flipped + (n * args.k + args.perm[m % args.k]) * size : nullptr;
      const Map map = {args.heatmaps + m * size, mirror, args.h, args.w, args.shift};
      decode_map(map, args.quarter, args.transforms ? args.transforms + n * 6 : nullptr, args.keypoints + m * 2,
                 args.scores + m);
    }
  });
}
