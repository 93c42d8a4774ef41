// Heatmaps -> keypoints. For each map m = (n, k), with a = heatmaps[n, k], f = flipped[n, perm k] and s = shift:
//
//     v[y, x] = a[y, x]                                            without `flipped`, else
//     v[y, x] = (a[y, x] + f[y, w - 1 - max(x - s, 0)]) * 0.5      mirrored in x, columns 1.. moved one to the right
//     score = max v, (px, py) = first position of it; (0, 0) unless score > 0
//     quarter, if 1 < px < w - 1 and 1 < py < h - 1: px += 0.25 sign(v[py, px + 1] - v[py, px - 1]), py likewise
//
// Reads each input value once, 4 bytes (8 with `flipped`), and writes 12 bytes per map: bound by memory. One worker
// takes whole maps. Each lane of a vector keeps the maximum of the values it has seen and the first position of it, so
// that a map is walked once. Meanwhile the next map is fetched: the hardware looks ahead within 4 KiB only, which gets
// a core half of the memory's bandwidth.

constexpr int64_t kCacheLine = 16;   // floats
constexpr int64_t kCached = 1 << 18; // floats, 1 MiB: what the network has just written is still in the L2 cache

template <int lanes> struct Vector {
  typedef float Floats __attribute__((vector_size(lanes * 4)));
  typedef int32_t Ints __attribute__((vector_size(lanes * 4)));
};

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

template <class V> inline V load(const float *values) {
  V v;
  memcpy(&v, values, sizeof v);
  return v;
}

// Lane i of the result is lane lanes - 1 - max(i - held, 0). GCC makes one instruction only of its own builtin, which
// clang does not have.
template <int lanes, int held> inline typename Vector<lanes>::Floats reversed(typename Vector<lanes>::Floats v) {
  typename Vector<lanes>::Ints from{};
  for (int i = 0; i < lanes; ++i)
    from[i] = lanes - 1 - (i > held ? i - held : 0);
#ifdef __clang__
  typename Vector<lanes>::Floats out;
  for (int i = 0; i < lanes; ++i)
    out[i] = v[from[i]];
  return out;
#else
  return __builtin_shuffle(v, from);
#endif
}

struct Best {
  float value;
  int64_t index;
  bool nan;
};

// Maximum, its first index and whether there is a NaN, in a map of at least `rows` rows, `lanes` columns. `rows` rows
// go side by side, lest each comparison wait for the one before. The last vector of a row and the last rows of a map
// overlap those before: seeing a value twice changes nothing.
template <int lanes, int rows, bool merge> inline Best scan(const Map &map, const Map *next) {
  using Floats = typename Vector<lanes>::Floats;
  using Ints = typename Vector<lanes>::Ints;
  Floats highest[rows];
  Ints at[rows], unordered{};
  for (int row = 0; row < rows; ++row)
    highest[row] = Floats{} - __builtin_inff(), at[row] = Ints{};

  for (int64_t step_y = 0; step_y < map.h; step_y += rows) {
    const int64_t y = step_y < map.h - rows ? step_y : map.h - rows;
    if (next)
      for (int64_t i = y * map.w; i < (y + rows) * map.w; i += kCacheLine) {
        __builtin_prefetch(next->direct + i, 0, 2);
        if (merge)
          __builtin_prefetch(next->mirror + i, 0, 2);
      }
    const auto see = [&](int64_t x) {
      const Ints here = Ints{} + int32_t(y * map.w + x);
      for (int row = 0; row < rows; ++row) {
        Floats v = load<Floats>(map.direct + (y + row) * map.w + x);
        if (merge) {
          const float *partners = map.mirror + (y + row + 1) * map.w - lanes - x; // of columns x.. but for the shift
          // Column 0 has no left neighbour: it stays where it is, and column 1 has the same partner.
          v += x == 0 && map.shift ? reversed<lanes, 1>(load<Floats>(partners))
                                   : reversed<lanes, 0>(load<Floats>(partners + map.shift));
          v *= 0.5f;
        }
        const Ints higher = v > highest[row];
        highest[row] = higher ? v : highest[row];
        at[row] = higher ? here : at[row];
        unordered |= v != v;
      }
    };
    see(0);
    for (int64_t x = lanes; x < map.w - lanes; x += lanes)
      see(x);
    if (map.w > lanes)
      see(map.w - lanes);
  }

  float values[rows * lanes];
  int32_t indices[rows * lanes], nans[lanes];
  memcpy(values, highest, sizeof values);
  memcpy(indices, at, sizeof indices);
  memcpy(nans, &unordered, sizeof nans);
  float best = values[0];
  int nan = 0, index = INT32_MAX;
#pragma omp simd reduction(max : best)
  for (int i = 0; i < rows * lanes; ++i)
    best = values[i] > best ? values[i] : best;
#pragma omp simd reduction(min : index)
  for (int i = 0; i < rows * lanes; ++i) {
    const int here = indices[i] + i % lanes + i / lanes * int(map.w);
    index = values[i] == best && here < index ? here : index;
  }
#pragma omp simd reduction(| : nan)
  for (int i = 0; i < lanes; ++i)
    nan |= nans[i];
  return {best, index, nan != 0};
}

template <bool merge> inline Best scan(const Map &map, const Map *next) {
  if (map.w >= kLanes)
    return map.h > 1 ? scan<kLanes, 2, merge>(map, next) : scan<kLanes, 1, merge>(map, next);
  return map.w >= 4 ? scan<4, 1, merge>(map, next) : scan<1, 1, merge>(map, next);
}

inline float quarter_step(float low, float high) { return high > low ? 0.25f : high < low ? -0.25f : 0.0f; }

inline void decode_map(const Map &map, const Map *next, bool quarter, const double *transform, float *keypoint,
                       float *score) {
  // Without merging, the rows of a narrow map are as good as one long one.
  const Map rows = map.mirror || map.w >= kLanes ? map : Map{map.direct, nullptr, 1, map.h * map.w, 0};
  const Best best = map.mirror ? scan<true>(rows, next) : scan<false>(rows, next);
  if (best.nan) {
    *score = keypoint[0] = keypoint[1] = __builtin_nanf("");
    return;
  }
  const int64_t index = best.value > 0 ? best.index : 0, px = index % map.w, py = index / map.w;
  float x = float(px), y = float(py);
  if (quarter && px > 1 && px < map.w - 1 && py > 1 && py < map.h - 1) {
    x += quarter_step(value_at(map, py, px - 1), value_at(map, py, px + 1));
    y += quarter_step(value_at(map, py - 1, px), value_at(map, py + 1, px));
  }
  *score = best.value;
  keypoint[0] = transform ? float(transform[0] * x + transform[1] * y + transform[2]) : x;
  keypoint[1] = transform ? float(transform[3] * x + transform[4] * y + transform[5]) : y;
}

void decode_fwd(const DecodeArgs &args) {
  const int64_t size = args.h * args.w;
  const auto map_at = [&](int64_t m) {
    const float *mirror = args.flipped;
    if (mirror)
      mirror += (m - m % args.k + args.perm[m % args.k]) * size;
    return Map{args.heatmaps + m * size, mirror, args.h, args.w, args.shift};
  };
  const bool far = args.n * args.k * size * (args.flipped ? 2 : 1) > kCached;
  split(args.n * args.k, args.threads, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const Map map = map_at(m), next = map_at(m + 1 < end ? m + 1 : m);
      const double *transform = args.transforms ? args.transforms + m / args.k * 6 : nullptr;
      decode_map(map, far ? &next : nullptr, args.quarter, transform, args.keypoints + m * 2, args.scores + m);
    }
  });
}
