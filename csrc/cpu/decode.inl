// Heatmaps -> keypoints. For each map m = (n, k), with a = heatmaps[n, k], f = flipped[n, perm k] and s = shift:
//
//     v[y, x] = a[y, x]                                            without `flipped`, else
//     v[y, x] = (a[y, x] + f[y, w - 1 - max(x - s, 0)]) * 0.5      mirrored in x, columns 1.. moved one to the right
//     score = max v, (px, py) = first position of it; (0, 0) unless score > 0
//     quarter, if 1 < px < w - 1 and 1 < py < h - 1: px += 0.25 sign(v[py, px + 1] - v[py, px - 1]), py likewise
//     DARK, if 1 < px < w - 2 and 1 < py < h - 2: Newton's step on the logarithm of the blurred map, see taylor_step
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

// DARK (Zhang et al., 2020), in double. With L = log max(G v, 1e-10), G the Gaussian that `taps` are, zeros around the map,
//
//     g = (L[0, 1] - L[0, -1], L[1, 0] - L[-1, 0]) / 2,  H likewise with steps of two pixels:
//     Hxx = (L[0, 2] - 2 L[0, 0] + L[0, -2]) / 4,  Hxy = (L[1, 1] - L[-1, 1] - L[1, -1] + L[-1, -1]) / 4
//     (x, y) -= H^-1 g, unless det H is 0 or not finite
//
// where L[j, i] stands at (px + i, py + j): 5 x 5 pixels, for which G v needs the blur + 4 rows and columns around the
// peak, and no others.
constexpr int kNear = 5;  // pixels that the differences span
constexpr int kLane = 8;  // kNear, filled up to a vector
constexpr double kFloor = 1e-10;

inline void taylor_step(const Map &map, const double *taps, int blur, int64_t px, int64_t py, double &x, double &y) {
  double blurred[kNear][kLane] = {};
  const int side = blur + kNear - 1;
  for (int i = 0; i < side; ++i) {
    const int64_t row = py - side / 2 + i;
    if (row < 0 || row >= map.h)
      continue;
    double line[kMaxBlur + kLane - 1] = {}, across[kLane] = {};
    for (int j = 0; j < side; ++j)
      if (const int64_t column = px - side / 2 + j; column >= 0 && column < map.w)
        line[j] = value_at(map, row, column);
    for (int t = 0; t < blur; ++t)
#pragma omp simd
      for (int j = 0; j < kLane; ++j)
        across[j] += taps[t] * line[t + j];
    for (int r = 0; r < kNear; ++r)
      if (const int t = i - r; t >= 0 && t < blur)
#pragma omp simd
        for (int j = 0; j < kLane; ++j)
          blurred[r][j] += taps[t] * across[j];
  }
  const auto at = [&](int j, int i) {
    const double value = blurred[2 + j][2 + i];
    return __builtin_log(value < kFloor ? kFloor : value);
  };
  const double middle = at(0, 0), gx = (at(0, 1) - at(0, -1)) / 2, gy = (at(1, 0) - at(-1, 0)) / 2;
  const double hxx = (at(0, 2) - 2 * middle + at(0, -2)) / 4, hyy = (at(2, 0) - 2 * middle + at(-2, 0)) / 4;
  const double hxy = (at(1, 1) - at(-1, 1) - at(1, -1) + at(-1, -1)) / 4, det = hxx * hyy - hxy * hxy;
  if (det != 0 && __builtin_fabs(det) < __builtin_inf()) {
    x -= (hyy * gx - hxy * gy) / det;
    y -= (hxx * gy - hxy * gx) / det;
  }
}

inline void decode_map(const Map &map, const Map *next, const DecodeArgs &args, const double *transform,
                       float *keypoint, float *score) {
  // Without merging, the rows of a narrow map are as good as one long one.
  const Map rows = map.mirror || map.w >= kLanes ? map : Map{map.direct, nullptr, 1, map.h * map.w, 0};
  const Best best = map.mirror ? scan<true>(rows, next) : scan<false>(rows, next);
  if (best.nan) {
    *score = keypoint[0] = keypoint[1] = __builtin_nanf("");
    return;
  }
  const int64_t index = best.value > 0 ? best.index : 0, px = index % map.w, py = index / map.w;
  double x = double(px), y = double(py);
  if (args.quarter && px > 1 && px < map.w - 1 && py > 1 && py < map.h - 1) {
    x += quarter_step(value_at(map, py, px - 1), value_at(map, py, px + 1));
    y += quarter_step(value_at(map, py - 1, px), value_at(map, py + 1, px));
  }
  if (args.blur && px > 1 && px < map.w - 2 && py > 1 && py < map.h - 2)
    taylor_step(map, args.taps, args.blur, px, py, x, y);
  *score = best.value;
  keypoint[0] = float(transform ? transform[0] * x + transform[1] * y + transform[2] : x);
  keypoint[1] = float(transform ? transform[3] * x + transform[4] * y + transform[5] : y);
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
      decode_map(map, far ? &next : nullptr, args, transform, args.keypoints + m * 2, args.scores + m);
    }
  });
}
