// Heatmaps -> keypoints, as csrc/cpu/decode.inl defines them: merge with the mirrored maps, first maximum, quarter
// offset or DARK's step, transform; the same floats, whatever the type of the maps.
//
// Reads each value of the maps once and writes 12 bytes per map: bound by memory. Where there are many maps a warp takes
// one, else a block does, lest most of the card idle. A thread reads chunks of 16 bytes, kAhead of them before it looks
// at the first: 2048 threads x 4 x 16 bytes are in flight on a multiprocessor then, more than the 25 KiB that an H200's
// memory needs to stay busy. Chunks lie within a row, so that the mirrored chunk is one too; where rows or tensors do not
// start on 16 bytes, they are single values. DARK's step is taken by the one warp that knows the maximum: a lane blurs a row,
// then a lane blurs a column.
#include "device.h"

namespace hrpose::cuda {
namespace {

constexpr int kManyMaps = 16; // per multiprocessor
constexpr int kWarps = 8;     // of a block
constexpr int kAhead = 4;

struct Params {
  DecodeArgs args;
  bool block_per_map; // else a warp
  int16_t perm[kMaxJoints];
  double taps[kMaxBlur];
};

template <class T> struct Map {
  const T *direct, *mirror;
  int h, w;
  bool shift;
};

template <bool merge, class T> __device__ float value_at(const Map<T> &map, int y, int x) {
  const float direct = widen(map.direct[y * map.w + x]);
  if (!merge)
    return direct;
  const int moved = max(x - int(map.shift), 0);
  return (direct + widen(map.mirror[y * map.w + map.w - 1 - moved])) * 0.5f;
}

// The values from index `first` on.
template <bool merge, class T, int count>
__device__ void load_chunk(const Map<T> &map, int first, float (&values)[count]) {
  if constexpr (count == 1) {
    const int y = first / map.w;
    values[0] = value_at<merge>(map, y, first - y * map.w);
  } else {
    widen<T>(load16(map.direct + first), values);
    if (!merge)
      return;
    const int y = first / map.w, x = first - y * map.w;
    const T *partners = map.mirror + (y + 1) * map.w - count - x; // of columns x.., but for the shift
    float mirror[count];
    widen<T>(load16(partners), mirror);
    // With the shift column x has its partner beyond the chunk, and column 0, which stays, that of column 1.
    const float beyond = map.shift && x > 0 ? widen(partners[count]) : mirror[count - 1];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float shifted = i ? mirror[(count - i) % count] : beyond;
      values[i] = (values[i] + (map.shift ? shifted : mirror[count - 1 - i])) * 0.5f;
    }
  }
}

struct Best {
  float value;
  int index;
  bool nan;
};
struct Partial {
  Best of_warp[kWarps];
};

__device__ Best better(const Best &a, const Best &b) {
  const bool second = b.value > a.value || (b.value == a.value && b.index < a.index);
  return {second ? b.value : a.value, second ? b.index : a.index, a.nan || b.nan};
}

template <bool merge, int count, class T> __device__ Best scan(const Map<T> &map, int thread, int threads) {
  Best best = {-INFINITY, 0, false}; // the index of -inf does not matter: keypoints of scores <= 0 are (0, 0)
  const int chunks = map.h * map.w / count;
  for (int chunk = thread; chunk < chunks; chunk += kAhead * threads) {
    float values[kAhead][count];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (chunk + a * threads < chunks)
        load_chunk<merge>(map, (chunk + a * threads) * count, values[a]);
      else
        for (float &value : values[a])
          value = -INFINITY;
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const float value = values[a][i]; // a thread's indices go up: it keeps the first
        best.nan |= value != value;
        best.index = value > best.value ? (chunk + a * threads) * count + i : best.index;
        best.value = value > best.value ? value : best.value;
      }
  }
#pragma unroll
  for (int step = 16; step; step /= 2) {
    const float value = __shfl_xor_sync(0xffffffffu, best.value, step);
    const int index = __shfl_xor_sync(0xffffffffu, best.index, step);
    best = better(best, {value, index, false});
  }
  best.nan = __any_sync(0xffffffffu, best.nan);
  return best;
}

struct Point {
  double x, y;
};

__device__ float quarter_step(float low, float high) { return high > low ? 0.25f : high < low ? -0.25f : 0.0f; }

template <bool merge, class T> __device__ Point quarter_offset(const Map<T> &map, int px, int py) {
  Point point = {double(px), double(py)};
  if (px > 1 && px < map.w - 1 && py > 1 && py < map.h - 1) {
    point.x += quarter_step(value_at<merge>(map, py, px - 1), value_at<merge>(map, py, px + 1));
    point.y += quarter_step(value_at<merge>(map, py - 1, px), value_at<merge>(map, py + 1, px));
  }
  return point;
}

constexpr int kNear = 5; // pixels that DARK's differences span
static_assert(kMaxBlur + kNear - 1 <= 32, "a lane for each row that it reads");
struct Across {
  double rows[kWarps][32][kNear]; // blurred along x
};

// By all lanes of a warp, which give the same arguments and get the same point.
template <bool merge, class T>
__device__ Point taylor_step(const Map<T> &map, const double *taps, int blur, int px, int py) {
  Point point = {double(px), double(py)};
  if (px <= 1 || px >= map.w - 2 || py <= 1 || py >= map.h - 2)
    return point;
  const int lane = threadIdx.x % 32, side = blur + kNear - 1, row = py - side / 2 + lane;
  double across[kNear] = {};
  if (lane < side && row >= 0 && row < map.h)
    for (int i = 0; i < side; ++i)
      if (const int column = px - side / 2 + i; column >= 0 && column < map.w) {
        const double value = value_at<merge>(map, row, column);
#pragma unroll
        for (int j = 0; j < kNear; ++j)
          if (i >= j && i - j < blur)
            across[j] += taps[i - j] * value;
      }
  auto &rows = shared<Across>().rows[threadIdx.x / 32];
#pragma unroll
  for (int j = 0; j < kNear; ++j)
    rows[lane][j] = across[j];
  __syncwarp();
  double level = 0; // of pixel (lane % kNear, lane / kNear)
  if (lane < kNear * kNear) {
    for (int t = 0; t < blur; ++t)
      level += taps[t] * rows[lane / kNear + t][lane % kNear];
    level = log(level < 1e-10 ? 1e-10 : level);
  }
  const auto at = [&](int j, int i) { return __shfl_sync(0xffffffffu, level, (2 + j) * kNear + 2 + i); };
  const double middle = at(0, 0), gx = (at(0, 1) - at(0, -1)) / 2, gy = (at(1, 0) - at(-1, 0)) / 2;
  const double hxx = (at(0, 2) - 2 * middle + at(0, -2)) / 4, hyy = (at(2, 0) - 2 * middle + at(-2, 0)) / 4;
  const double hxy = (at(1, 1) - at(-1, 1) - at(1, -1) + at(-1, -1)) / 4, det = hxx * hyy - hxy * hxy;
  if (det != 0 && fabs(det) < INFINITY) {
    point.x -= (hyy * gx - hxy * gy) / det;
    point.y -= (hxx * gy - hxy * gx) / det;
  }
  return point;
}

// With DARK four blocks on a multiprocessor, 64 registers: left to itself ptxas for sm_80 stops at 48 and spills.
template <class T, bool merge, bool dark, int count>
__global__ void __launch_bounds__(32 * kWarps, dark ? 4 : 0) decode_kernel(const __grid_constant__ Params params) {
  const DecodeArgs &a = params.args;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t m = params.block_per_map ? blockIdx.x : int64_t(blockIdx.x) * kWarps + warp;
  if (m >= a.n * a.k)
    return;
  const int64_t size = a.h * a.w, n = m / a.k, k = m - n * a.k;
  const T *mirror = merge ? static_cast<const T *>(a.flipped) + (n * a.k + params.perm[k]) * size : nullptr;
  const Map<T> map = {static_cast<const T *>(a.heatmaps) + m * size, mirror, int(a.h), int(a.w), a.shift};
  const int thread = params.block_per_map ? threadIdx.x : lane, threads = params.block_per_map ? 32 * kWarps : 32;
  Best best = scan<merge, count>(map, thread, threads);
  if (params.block_per_map) {
    Partial &partial = shared<Partial>();
    if (lane == 0)
      partial.of_warp[warp] = best;
    __syncthreads();
    for (const Best &other : partial.of_warp)
      best = better(best, other);
  }
  if (thread >= 32)
    return;
  const int index = best.value > 0 ? best.index : 0, py = index / map.w, px = index - py * map.w;
  Point point = {double(px), double(py)};
  if constexpr (dark)
    point = taylor_step<merge>(map, params.taps, a.blur, px, py);
  else if (a.quarter)
    point = quarter_offset<merge>(map, px, py);
  if (thread > 0)
    return;
  if (const double *t = a.transforms ? a.transforms + n * 6 : nullptr)
    point = {t[0] * point.x + t[1] * point.y + t[2], t[3] * point.x + t[4] * point.y + t[5]};
  a.scores[m] = best.nan ? NAN : best.value;
  a.keypoints[m * 2] = best.nan ? NAN : float(point.x);
  a.keypoints[m * 2 + 1] = best.nan ? NAN : float(point.y);
}

template <class T, bool merge, bool dark> const char *decode(const Params &params, Stream stream) {
  const DecodeArgs &a = params.args;
  const uintptr_t either = reinterpret_cast<uintptr_t>(a.heatmaps) | reinterpret_cast<uintptr_t>(a.flipped);
  const bool chunks = a.w % kPerLoad<T> == 0 && either % 16 == 0;
  const int64_t blocks = params.block_per_map ? a.n * a.k : ceil_div(a.n * a.k, int64_t(kWarps));
  const auto kernel = chunks ? decode_kernel<T, merge, dark, kPerLoad<T>> : decode_kernel<T, merge, dark, 1>;
  return launch({dim3(unsigned(blocks)), dim3(32 * kWarps), stream}, kernel, params);
}

} // namespace

const char *decode_fwd(const DecodeArgs &args, Stream stream) {
  int multiprocessors = 0;
  if (const char *error = device_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors))
    return error;
  if (args.n == 0)
    return nullptr;
  Params params = {args, args.n * args.k < int64_t(kManyMaps) * multiprocessors, {}, {}};
  for (int64_t k = 0; args.flipped && k < args.k; ++k)
    params.perm[k] = int16_t(args.perm[k]);
  for (int t = 0; t < args.blur; ++t)
    params.taps[t] = args.taps[t];
  return with_type(args.type, [&](auto value) {
    using T = decltype(value);
    if (args.blur)
      return args.flipped ? decode<T, true, true>(params, stream) : decode<T, false, true>(params, stream);
    return args.flipped ? decode<T, true, false>(params, stream) : decode<T, false, false>(params, stream);
  });
}

} // namespace hrpose::cuda
