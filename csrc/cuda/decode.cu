// Heatmaps -> keypoints, as csrc/cpu/decode.inl defines them: merge with the mirrored maps, first maximum, quarter
// offset, transform; the same floats, whatever the type of the maps.
//
// Reads each value of the maps once and writes 12 bytes per map: bound by memory. Where there are many maps a warp takes
// one, else a block does, lest most of the card idle. A thread reads chunks of 16 bytes, kAhead of them before it looks
// at the first: 2048 threads x 4 x 16 bytes are in flight on a multiprocessor then, more than the 25 KiB that an H200's
// memory needs to stay busy. Chunks lie within a row, so that the mirrored chunk is one too; where rows or tensors do not
// start on 16 bytes, they are single values.
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

__device__ float quarter_step(float low, float high) { return high > low ? 0.25f : high < low ? -0.25f : 0.0f; }

template <bool merge, class T>
__device__ void write(const Map<T> &map, const Best &best, bool quarter, const double *transform, float *keypoint,
                      float *score) {
  if (best.nan) {
    *score = keypoint[0] = keypoint[1] = NAN;
    return;
  }
  const int index = best.value > 0 ? best.index : 0, py = index / map.w, px = index - py * map.w;
  float x = float(px), y = float(py);
  if (quarter && px > 1 && px < map.w - 1 && py > 1 && py < map.h - 1) {
    x += quarter_step(value_at<merge>(map, py, px - 1), value_at<merge>(map, py, px + 1));
    y += quarter_step(value_at<merge>(map, py - 1, px), value_at<merge>(map, py + 1, px));
  }
  *score = best.value;
  keypoint[0] = transform ? float(transform[0] * x + transform[1] * y + transform[2]) : x;
  keypoint[1] = transform ? float(transform[3] * x + transform[4] * y + transform[5]) : y;
}

template <class T, bool merge, int count>
__global__ void __launch_bounds__(32 * kWarps) decode_kernel(const __grid_constant__ Params params) {
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
  if (thread == 0)
    write<merge>(map, best, a.quarter, a.transforms ? a.transforms + n * 6 : nullptr, a.keypoints + m * 2,
                 a.scores + m);
}

template <class T, bool merge> const char *decode(const Params &params, Stream stream) {
  const DecodeArgs &a = params.args;
  const uintptr_t either = reinterpret_cast<uintptr_t>(a.heatmaps) | reinterpret_cast<uintptr_t>(a.flipped);
  const bool chunks = a.w % kPerLoad<T> == 0 && either % 16 == 0;
  const int64_t blocks = params.block_per_map ? a.n * a.k : ceil_div(a.n * a.k, int64_t(kWarps));
  const auto kernel = chunks ? decode_kernel<T, merge, kPerLoad<T>> : decode_kernel<T, merge, 1>;
  return launch({dim3(unsigned(blocks)), dim3(32 * kWarps), stream}, kernel, params);
}

} // namespace

const char *decode_fwd(const DecodeArgs &args, Stream stream) {
  int multiprocessors = 0;
  if (const char *error = device_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors))
    return error;
  if (args.n == 0)
    return nullptr;
  Params params = {args, args.n * args.k < int64_t(kManyMaps) * multiprocessors, {}};
  for (int64_t k = 0; args.flipped && k < args.k; ++k)
    params.perm[k] = int16_t(args.perm[k]);
  return with_type(args.type, [&](auto value) {
    using T = decltype(value);
    return args.flipped ? decode<T, true>(params, stream) : decode<T, false>(params, stream);
  });
}

} // namespace hrpose::cuda
