// A chain of residual bottlenecks, NHWC, batch norm folded into weights and biases. The only place where pixels meet is
// the 3x3, so kernels are cut at its input, the map y of C = `mid` channels:
//
//     head:    y = relu(W1_0 x + b1_0)
//     step i:  z = relu(W2_i * y + b2_i)                 3x3, dilation d_i, in block 0 with stride
//              x' = relu(shortcut(x) + W3_i z + b3_i)    that of block 0 with stride, and perhaps a 1x1 projection
//              y' = relu(W1_i+1 x' + b1_i+1)             not after the last block
//
// Nothing is computed twice. Per pixel the head reads `in` values and writes C; a step reads y of each tap (from L1 or
// L2 but for the first), reads and writes `out` values of x and writes C of y'. Maps and weights are of T, bfloat16 or
// half; sums and biases are float.
//
// Threads and data. A warp has tiles of 8 columns x 2 M rows of pixels, M operands of 16 rows for the tensor cores.
// Lane 4 g + t has column g of each row and, of every group of 32 channels, the eight from 8 t on: one access of 16
// bytes. The order of channels within a product's inner dimension is free, and so is that of its outputs; weights are
// packed in the one with which these eight channels are the lane's own part both of the operand and of the sums
// (hrpose/ops/fragments.py). So z, x' and y' go from sums to operand without leaving the lane's registers, and no map
// needs shared memory.
//
// Taps that no pixel of a tile has inside the map are skipped, not multiplied by zeros; dilations that reach beyond the
// map cost one tap.
//
// Weights of a step come in stages: of each tap (C x C; two of 64 inputs each for C = 128); then, of each 32 outputs of
// W3, the projection's (32 x in, in pieces of 2 C inputs), and those of W3 (32 x C) with the W1 (C x 32) that reads the
// outputs. Blocks hold them all in shared memory where it is large enough, and take as many tiles as there are; else
// the stages pass through a ring that all warps of a block walk in step.
#pragma once
#include "device.h"
#include <type_traits>

namespace hrpose::cuda {

constexpr int kWarps = 8; // of a block: with 255 registers for each thread there are no more on a multiprocessor
constexpr int kThreads = 32 * kWarps;
constexpr int kGroup = 32; // channels: 4 lanes with 16 bytes each

struct HeadParams {
  const void *x; // (pixels, in)
  void *y;       // (pixels, C)
  const void *weights;
  const float *bias;
  int pixels, in;
  bool spread;   // see Tiles
  uint32_t ones; // see arrange
};

struct StepParams {
  const void *y; // (n, in_h, in_w, C)
  const void *x; // (n, in_h, in_w, in)
  void *out;     // (n, h, w, out); may be x
  void *next_y;  // (n, h, w, C); null after the last block
  const void *weights;
  const float *biases; // b2 (C), b3 (out), next b1 (C)
  int n, in_h, in_w, in, h, w, out_channels, dilation, stride;
  bool spread;
  uint32_t ones;
};

constexpr int kLive = 16; // numbers: room for those of nine taps, a multiple of 16 bytes

// Sizes in words of 16 bytes, which hold 8 weights.
template <int C> struct Stages {
  static constexpr int kTap = C * C / 8;
  static constexpr int kLargest = 2 * kGroup * C / 8;                  // of W3 and W1 together: a slot of the ring
  static constexpr int kPerTap = kTap > kLargest ? kTap / kLargest : 1;
  static constexpr int kTapStage = kTap / kPerTap;
  static constexpr int kSlots = C == 128 ? 5 : 6; // 80 and 48 KB: fits the 99 KB of a block on sm_86, sm_89 and sm_120
};

// One group of channels of a lane's pixels as mma wants it: two steps of 16 channels, four registers each.
template <int M> struct Operand {
  uint32_t words[M][2][4];
};

// mma wants its four words in adjacent registers, loads of 16 bytes have four others side by side. Left alone, ptxas
// moves them anew before every mma; an AND with a mask that it cannot see through makes the moved words values of their
// own, and zeroes a pixel in the padding. `mask` is 0 or StepParams::ones, all ones known at run time only.
template <int M>
__device__ __forceinline__ void arrange(Operand<M> &a, const uint4 (&from)[2 * M], const uint32_t (&mask)[2 * M]) {
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    const int m = r / 2, row = r % 2;
    a.words[m][0][row] = from[r].x & mask[r], a.words[m][0][row + 2] = from[r].y & mask[r];
    a.words[m][1][row] = from[r].z & mask[r], a.words[m][1][row + 2] = from[r].w & mask[r];
  }
}

// sums += a times kTiles tiles of 8 outputs, whose weights lie one after the other from `weights` on.
template <class T, int M, int kTiles>
__device__ __forceinline__ void multiply(float (&sums)[M][kTiles][4], const Operand<M> &a, const uint4 *weights,
                                         int lane) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint4 b = weights[tile * 32 + lane];
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const auto &w = a.words[m][0];
      mma<T>(sums[m][tile], w[0], w[1], w[2], w[3], b.x, b.y);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const auto &w = a.words[m][1];
      mma<T>(sums[m][tile], w[0], w[1], w[2], w[3], b.z, b.w);
    }
  }
}

// All sums begin with the bias. Of a lane's eight channels of a group, tile i of its four has 2 i and 2 i + 1.
template <int M, int kTiles>
__device__ __forceinline__ void begin(float (&sums)[M][kTiles][4], const float *bias, int t) {
#pragma unroll
  for (int group = 0; group < kTiles / 4; ++group) {
    const float4 *own = reinterpret_cast<const float4 *>(bias + group * kGroup + 8 * t);
    const float4 low = own[0], high = own[1];
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 16; ++i)
        sums[m][4 * group + i / 4][i % 4] = values[i / 4 * 2 + i % 2];
  }
}

// relu of the sums of one group, as an operand.
template <class T, int M, int kTiles>
__device__ __forceinline__ void finish(Operand<M> &a, const float (&sums)[M][kTiles][4], int group) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float *pair = &sums[m][4 * group + i / 2][i % 2 * 2];
      a.words[m][i / 4][i % 4] = pack<T, true>(pair[0], pair[1]);
    }
}

// The 16 bytes of an operand that belong to row r of the lane's pixels.
template <int M> __device__ __forceinline__ uint4 row_of(const Operand<M> &a, int r) {
  const auto &w = a.words[r / 2];
  return {w[0][r % 2], w[0][r % 2 + 2], w[1][r % 2], w[1][r % 2 + 2]};
}

// The same, to be stored and multiplied. Masked for the reason that arrange() gives: the store wants its words side by
// side.
template <int M> __device__ __forceinline__ uint4 row_of(const Operand<M> &a, int r, uint32_t ones) {
  const uint4 row = row_of(a, r);
  return {row.x & ones, row.y & ones, row.z & ones, row.w & ones};
}

// Warp index, known to be the same in all lanes: addresses and branches that depend on it cost one lane's work.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0); }

// First tile of this one of the `units` of a block that take a tile each in a round. With few tiles they are spread
// over multiprocessors, else neighbours share a block, whose L1 then has the taps of both.
__device__ __forceinline__ int first_tile(bool spread, int unit = warp_index(), int units = kWarps) {
  const int block = int(blockIdx.x);
  return spread ? unit * int(gridDim.x) + block : block * units + unit;
}

// Blocks that run side by side on a multiprocessor, as far as registers go.
template <int C> constexpr int kHeadBlocks = C < 128 ? 2 : 1;
template <int C, int M> constexpr int kStepBlocks = C * M == 32 ? 2 : 1;

// Does a tap lie inside the map for an output in rows y0 to y1 and columns x0 to x1?
__device__ __forceinline__ bool is_inside(const StepParams &p, int tap, int y0, int y1, int x0, int x1) {
  const auto reaches = [&](int k, int first, int last, int in_size) {
    return last * p.stride + (k - 1) * p.dilation >= 0 && first * p.stride + (k - 1) * p.dilation < in_size;
  };
  return reaches(tap / 3, y0, y1, p.in_h) && reaches(tap % 3, x0, x1, p.in_w);
}

// y = relu(W1 x + b1). Pixels are taken as they lie: a warp has 2 M runs of 8. All of W1 is in shared memory.
template <class T, int C, int M>
__global__ void __launch_bounds__(kThreads, kHeadBlocks<C>) bottlenecks_head_kernel(const HeadParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  constexpr int kTiles = C / 8;
  uint4 *weights = reinterpret_cast<uint4 *>(dynamic_shared());
  const uint4 *from = static_cast<const uint4 *>(p.weights);
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4, groups = p.in / kGroup;
  for (int i = int(threadIdx.x); i < groups * kTiles * 32; i += kThreads)
    copy_async(weights + i, from + i);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  let_next_kernel_start();

  const int tiles = ceil_div(p.pixels, 16 * M);
#pragma unroll 1
  for (int tile = first_tile(p.spread); tile < tiles; tile += int(gridDim.x) * kWarps) {
    const T *x[2 * M];
    uint32_t mask[2 * M];
    bool inside[2 * M];
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
      const int pixel = tile * 16 * M + r * 8 + g;
      inside[r] = pixel < p.pixels;
      mask[r] = inside[r] ? p.ones : 0;
      x[r] = static_cast<const T *>(p.x) + int64_t(inside[r] ? pixel : 0) * p.in + 8 * t;
    }
    float sums[M][kTiles][4];
    begin(sums, p.bias, t);
    uint4 loaded[2 * M];
    const auto load = [&](int group) {
#pragma unroll
      for (int r = 0; r < 2 * M; ++r)
        loaded[r] = load16_once(x[r] + group * kGroup);
    };
    load(0);
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      Operand<M> a;
      arrange(a, loaded, mask);
      load(min(group + 1, groups - 1)); // without a condition, which would cost registers
      multiply<T>(sums, a, weights + group * kTiles * 32, lane);
    }
#pragma unroll
    for (int group = 0; group < C / kGroup; ++group) {
      Operand<M> a;
      finish<T>(a, sums, group);
#pragma unroll
      for (int r = 0; r < 2 * M; ++r)
        if (inside[r]) {
          const int pixel = tile * 16 * M + r * 8 + g;
          store16(static_cast<T *>(p.y) + int64_t(pixel) * C + group * kGroup + 8 * t, row_of(a, r));
        }
    }
  }
#endif
}

template <class T, int C, int M, bool resident, bool project>
__global__ void __launch_bounds__(kThreads, kStepBlocks<C, M>) bottlenecks_step_kernel(const StepParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  using S = Stages<C>;
  constexpr int kTiles = C / 8, kGroups = C / kGroup;
  constexpr int kTapGroups = kGroups / S::kPerTap; // groups of inputs in a stage of a tap
  constexpr int kRow = 4 * 32;                     // words: a group of inputs for 32 outputs
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int d = p.dilation, s = p.stride, groups = p.out_channels / kGroup;
  const bool tail = p.next_y;
  const int up_down = (tail ? 2 : 1) * kRow * kGroups;          // words: of W3 and W1, for 32 outputs of W3
  const int project_words = project ? p.in / kGroup * kRow : 0; // words: of the projection, for 32 outputs
  const int pieces = project ? ceil_div(project_words, S::kLargest) : 0;

  float *b2 = reinterpret_cast<float *>(dynamic_shared()), *b3 = b2 + C, *next_b1 = b3 + p.out_channels;
  int *live = reinterpret_cast<int *>(b2 + p.out_channels + 2 * C);
  uint4 *weights = reinterpret_cast<uint4 *>(live + kLive);
  const uint4 *from = static_cast<const uint4 *>(p.weights);

  // Taps that no output of the map has are neither copied nor waited for; in `live` are the others.
  int taps = 0;
#pragma unroll
  for (int tap = 0; tap < 9; ++tap)
    if (is_inside(p, tap, 0, p.h - 1, 0, p.w - 1)) {
      if (threadIdx.x == 0)
        live[taps] = tap;
      ++taps;
    }
  __syncthreads();
  const int stages = taps * S::kPerTap + groups * (pieces + 1);

  const auto copy = [&](uint4 *to, int offset, int count) {
    for (int i = int(threadIdx.x); i < count; i += kThreads)
      copy_async(to + i, from + offset + i);
  };
  for (int i = int(threadIdx.x); i < p.out_channels + (tail ? 2 : 1) * C; i += kThreads)
    b2[i] = p.biases[i];
  const int tiles_x = ceil_div(p.w, 8), tiles_y = ceil_div(p.h, 2 * M), tiles = p.n * tiles_y * tiles_x;
  const int round = int(gridDim.x) * kWarps, own = first_tile(p.spread);

  // The ring. Stages go on through all rounds; the slot in use is the one after that which is filled next.
  int ahead = resident ? 0 : ceil_div(tiles, round) * stages, ahead_stage = 0, ahead_slot = 0;
  const auto issue = [&] {
    if (ahead > 0) {
      int offset, count;
      if (ahead_stage < taps * S::kPerTap) {
        const int tap = live[ahead_stage / S::kPerTap];
        offset = tap * S::kTap + ahead_stage % S::kPerTap * S::kTapStage;
        count = S::kTapStage;
      } else {
        const int index = ahead_stage - taps * S::kPerTap, group = index / (pieces + 1), piece = index % (pieces + 1);
        const int begin = min(piece * S::kLargest, project_words);
        offset = 9 * S::kTap + group * (project_words + up_down) + begin;
        count = piece < pieces ? min(project_words - begin, S::kLargest) : up_down;
      }
      copy(weights + ahead_slot * S::kLargest, offset, count);
      --ahead;
      ahead_stage = ahead_stage + 1 < stages ? ahead_stage + 1 : 0;
    }
    ahead_slot = ahead_slot + 1 < S::kSlots ? ahead_slot + 1 : 0;
    commit_copies(); // empty groups, too: waiting counts them
  };
  if (resident) {
    for (int i = 0; i < taps; ++i) {
      const int offset = live[i] * S::kTap;
      copy(weights + offset, offset, S::kTap);
    }
    copy(weights + 9 * S::kTap, 9 * S::kTap, groups * (project_words + up_down));
    commit_copies();
    wait_copies<0>();
  } else {
    for (int i = 0; i < S::kSlots - 1; ++i)
      issue();
  }
  __syncthreads();
  // The next kernel's blocks may come and fetch their weights. Those do not depend on the kernel before, maps do.
  let_next_kernel_start();
  wait_for_previous_kernel();

  // The next stage, until the next call.
  const auto next_stage = [&] {
    wait_copies<S::kSlots - 2>();
    __syncthreads(); // this stage has arrived for all, and all have done with the one before, whose slot is filled next
    issue();
    return weights + ahead_slot * S::kLargest;
  };

#pragma unroll 1
  for (int first = 0; first < tiles; first += round) {
    const int tile = first + own;
    const bool active = tile < tiles; // all warps walk the ring
    if (resident && !active)
      break;
    const int image = active ? tile / (tiles_x * tiles_y) : 0, in_image = active ? tile % (tiles_x * tiles_y) : 0;
    const int x0 = in_image % tiles_x * 8, y0 = in_image / tiles_x * 2 * M, x = x0 + g;
    bool inside[2 * M];
#pragma unroll
    for (int r = 0; r < 2 * M; ++r)
      inside[r] = active && y0 + r < p.h && x < p.w;

    // Pixels beyond the map repeat its last row or column: rows of a product are independent, theirs are not stored.
    const T *shortcut = static_cast<const T *>(p.x) + int64_t(image) * p.in_h * p.in_w * p.in + 8 * t;
    const int last_row = p.h - 1 - y0, first_place = (y0 * p.in_w + min(x, p.w - 1)) * s * p.in;
    const auto place = [&](int r) { return first_place + min(r, last_row) * p.in_w * s * p.in; };
    // x comes from memory for the first time: bring it to L2 while the 3x3 runs, one line of 128 bytes at a time.
    if (active)
#pragma unroll
      for (int r = 0; r < 2 * M; ++r)
        for (int c = 64 * t; c < p.in; c += 64 * 4)
          prefetch(shortcut - 8 * t + place(r) + c);

    // z = relu(b2 + W2 * y)
    Operand<M> z[kGroups];
    {
      unsigned left = 0; // taps of this tile
#pragma unroll
      for (int tap = 0; tap < 9; ++tap)
        if (active && is_inside(p, tap, y0, min(y0 + 2 * M, p.h) - 1, x0, min(x0 + 8, p.w) - 1))
          left |= 1u << tap;
      const unsigned mine = left;
      int part = 0; // of a tap
      const T *y = static_cast<const T *>(p.y) + int64_t(image) * p.in_h * p.in_w * C + 8 * t;
      uint4 loaded[kTapGroups][2 * M];
      uint32_t mask[2 * M];
      // A pixel in the padding reads the first one of the map instead, masked: cheaper than a load under a condition.
      const auto load = [&] {
        const int tap = __ffs(int(left)) - 1;
        const int column = x * s + (tap % 3 - 1) * d, first_row = y0 * s + (tap / 3 - 1) * d;
        const int place = (first_row * p.in_w + column) * C + part * kTapGroups * kGroup;
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
          const bool valid = unsigned(first_row + r * s) < unsigned(p.in_h) && unsigned(column) < unsigned(p.in_w);
          const T *pixel = y + (valid ? place + r * s * p.in_w * C : 0);
          mask[r] = valid ? p.ones : 0;
#pragma unroll
          for (int group = 0; group < kTapGroups; ++group)
            loaded[group][r] = load16(pixel + group * kGroup);
        }
      };
      float sums[M][kTiles][4];
      begin(sums, b2, t);
      if (left)
        load();
      const auto multiply_loaded = [&](const uint4 *stage) {
        Operand<M> a[kTapGroups];
#pragma unroll
        for (int group = 0; group < kTapGroups; ++group)
          arrange(a[group], loaded[group], mask);
        if (++part == S::kPerTap)
          part = 0, left &= left - 1;
        if (left)
          load();
#pragma unroll
        for (int group = 0; group < kTapGroups; ++group)
          multiply<T>(sums, a[group], stage + group * kTiles * 32, lane);
      };
      if (resident) {
#pragma unroll 1
        while (left)
          multiply_loaded(weights + (__ffs(int(left)) - 1) * S::kTap + part * S::kTapStage);
      } else {
#pragma unroll 1
        for (int i = 0; i < taps * S::kPerTap; ++i) {
          const uint4 *stage = next_stage();
          if (mine >> live[i / S::kPerTap] & 1)
            multiply_loaded(stage);
        }
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        finish<T>(z[group], sums, group);
    }

    // x' = relu(b3 + shortcut + W3 z), 32 channels at a time, each going on to y' += W1 x'. Two copies: the sums of y'
    // take registers even where a branch skips them.
    const auto up_and_down = [&](auto has_tail) {
      constexpr bool kTail = decltype(has_tail)::value;
      float next[M][kTiles][4];
      if (kTail)
        begin(next, next_b1, t);
      uint4 loaded[2 * M];
      const auto load = [&](int group) {
#pragma unroll
        for (int r = 0; r < 2 * M; ++r)
          loaded[r] = load16_once(shortcut + place(r) + group * kGroup);
      };
      load(0);
      const uint4 *stage = weights + 9 * S::kTap;
      T *out = static_cast<T *>(p.out) + ((int64_t(image) * p.h + y0) * p.w + x) * p.out_channels + 8 * t;
#pragma unroll 1
      for (int group = 0; group < groups; ++group) {
        float sums[M][4][4];
        begin(sums, b3 + group * kGroup, t);
        if (project) {
          uint32_t all[2 * M];
#pragma unroll
          for (int r = 0; r < 2 * M; ++r)
            all[r] = p.ones;
          const int in_groups = p.in / kGroup;
#pragma unroll 1
          for (int i = 0; i < in_groups; ++i) {
            if (!resident && i * kRow % S::kLargest == 0)
              stage = next_stage();
            Operand<M> a;
            arrange(a, loaded, all);
            load(i + 1 < in_groups ? i + 1 : 0);
            multiply<T>(sums, a, stage, lane);
            stage += kRow;
          }
        }
        if (!resident)
          stage = next_stage();
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
          multiply<T>(sums, z[i], stage + i * kRow, lane);
        if (!project) {
#pragma unroll
          for (int r = 0; r < 2 * M; ++r) {
            const uint32_t words[4] = {loaded[r].x, loaded[r].y, loaded[r].z, loaded[r].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 pair = unpack<T>(words[i]);
              sums[r / 2][i][r % 2 * 2] += pair.x, sums[r / 2][i][r % 2 * 2 + 1] += pair.y;
            }
          }
        }
        Operand<M> a;
        finish<T>(a, sums, 0);
#pragma unroll
        for (int r = 0; r < 2 * M; ++r) {
          if (inside[r]) // a projection leaves no registers for masked words
            store16(out + int64_t(r) * p.w * p.out_channels + group * kGroup,
                    project ? row_of(a, r) : row_of(a, r, p.ones));
        }
        if (!project && group + 1 < groups)
          load(group + 1); // not earlier: registers
        if (kTail)
          multiply<T>(next, a, stage + kGroups * kRow, lane);
        stage += up_down;
      }
      if (kTail) {
        T *next_y = static_cast<T *>(p.next_y) + ((int64_t(image) * p.h + y0) * p.w + x) * C + 8 * t;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          Operand<M> a;
          finish<T>(a, next, group);
#pragma unroll
          for (int r = 0; r < 2 * M; ++r)
            if (inside[r])
              store16(next_y + int64_t(r) * p.w * C + group * kGroup, row_of(a, r));
        }
      }
    };
    if (tail)
      up_and_down(std::true_type());
    else
      up_and_down(std::false_type());
  }
#endif
}

// ---- host -----------------------------------------------------------------------------------------------------------

// Of the current device.
struct Card {
  int multiprocessors, shared_bytes; // of a block at most
};

// Where the parts of a chain lie, and what of it fits.
template <int C> struct Layout {
  using S = Stages<C>;
  static constexpr int kWidth = C;
  // Weights of 136 KB are resident where a block may have them; those of C = 128, 544 KB, nowhere.
  static constexpr bool kResident = C < 128, kRing = C > 32;
  const BottlenecksArgs &args;
  int64_t h = (args.h + args.stride - 1) / args.stride, w = (args.w + args.stride - 1) / args.stride; // of the output

  bool projects(int64_t block) const { return args.project && block == 0; }
  int64_t head_words() const { return args.in_channels * C / 8; }
  int64_t step_words(int64_t block) const {
    const int64_t next = block + 1 < args.blocks ? C : 0, in = projects(block) ? args.in_channels : 0;
    return 9 * S::kTap + args.out_channels * (in + C + next) / 8;
  }
  size_t shared_bytes(int64_t block, bool resident) const {
    const int64_t words = resident ? step_words(block) : S::kSlots * S::kLargest;
    return size_t((args.out_channels + 2 * C + kLive) * 4 + words * 16);
  }
  bool fits(const Card &card) const {
    bool result = head_words() * 16 <= card.shared_bytes;
    for (int64_t block = 0; block < args.blocks; ++block)
      result = result && int64_t(shared_bytes(block, !kRing)) <= card.shared_bytes;
    return result;
  }
  // y of even and of odd blocks.
  int64_t even_bytes() const { return args.n * args.h * args.w * C * 2; }
  int64_t bytes() const { return even_bytes() + (args.blocks > 1 ? args.n * h * w * C * 2 : 0); }
};

// Few tiles leave multiprocessors idle: a warp's operands are halved while not each has four of the full ones.
constexpr int kFewTiles = 4;

// Blocks of kSize threads, in which kUnits work on a tile each; kBlocks of them run side by side on a multiprocessor.
template <int kBlocks, int kUnits = kWarps, int kSize = kThreads, class Params>
const char *launch_tiles(void (*kernel)(Params), Params &params, int tiles, const Card &card, size_t shared_bytes,
                         Stream stream, bool overlap) {
  const int blocks = kBlocks * card.multiprocessors;
  params.spread = tiles < blocks * kUnits;
  params.ones = ~uint32_t(0);
  return launch({dim3(unsigned(min(tiles, blocks))), dim3(kSize), stream, shared_bytes, overlap}, kernel, params);
}

template <class T, int C>
const char *launch_head(const Layout<C> &layout, const Card &card, Stream stream) {
  const BottlenecksArgs &a = layout.args;
  HeadParams params = {a.x, a.workspace, a.weights, a.biases, int(a.n * a.h * a.w), int(a.in_channels), false, 0};
  constexpr int M = 1; // it waits for memory, not for products
  const int tiles = ceil_div(params.pixels, 16 * M);
  return launch_tiles<kHeadBlocks<C>>(bottlenecks_head_kernel<T, C, M>, params, tiles, card,
                                      size_t(layout.head_words() * 16), stream, false);
}

template <class T, int C, int M, bool resident, bool project>
const char *launch_step(const Layout<C> &layout, int64_t block, StepParams &params, const Card &card, Stream stream) {
  const auto kernel = bottlenecks_step_kernel<T, C, M, resident, project>;
  const int tiles = params.n * ceil_div(params.h, 2 * M) * ceil_div(params.w, 8);
  // The head did not overlap, so weights are complete when the first step looks at them.
  return launch_tiles<kStepBlocks<C, M>>(kernel, params, tiles, card, layout.shared_bytes(block, resident), stream,
                                         true);
}

// The ring and projections take registers that the large operands need. Small ones read weights from shared memory
// twice as often; cards that need the ring have tensor cores that are slow enough for that.
template <class T, int C, int M, bool resident>
const char *launch_step(const Layout<C> &layout, int64_t block, StepParams &params, const Card &card, Stream stream) {
  if (layout.projects(block))
    return launch_step<T, C, 1, resident, true>(layout, block, params, card, stream);
  return launch_step<T, C, resident ? M : 1, resident, false>(layout, block, params, card, stream);
}

// The head, then launch_one(block, params) for each step, which sets the rest of the parameters.
template <class T, int C, class LaunchOne>
const char *launch_chain(const Layout<C> &layout, const Card &card, Stream stream, const LaunchOne &launch_one) {
  const BottlenecksArgs &a = layout.args;
  if (const char *error = launch_head<T, C>(layout, card, stream))
    return error;
  char *y[2] = {static_cast<char *>(a.workspace), static_cast<char *>(a.workspace) + layout.even_bytes()};
  const uint4 *weights = static_cast<const uint4 *>(a.weights) + layout.head_words();
  const float *biases = a.biases + C;
  const int64_t side = max(a.h, a.w); // what reaches farther reaches nothing, and need not fit an int
  for (int64_t block = 0; block < a.blocks; ++block) {
    const bool first = block == 0, last = block + 1 == a.blocks;
    StepParams params = {y[block % 2], first ? a.x : a.out, a.out, last ? nullptr : y[(block + 1) % 2], weights, biases,
                         int(a.n), int(first ? a.h : layout.h), int(first ? a.w : layout.w),
                         int(first ? a.in_channels : a.out_channels), int(layout.h), int(layout.w), int(a.out_channels),
                         int(min(a.dilations[block], side)), int(first ? min(a.stride, side) : 1), false, 0};
    if (const char *error = launch_one(block, params))
      return error;
    weights += layout.step_words(block);
    biases += a.out_channels + 2 * C;
  }
  return nullptr;
}

template <class T, int C, int M>
const char *run_chain(const Layout<C> &layout, const Card &card, Stream stream) {
  return launch_chain<T>(layout, card, stream, [&](int64_t block, StepParams &params) {
    if constexpr (Layout<C>::kResident && Layout<C>::kRing)
      return int64_t(layout.shared_bytes(block, true)) <= card.shared_bytes
                 ? launch_step<T, C, M, true>(layout, block, params, card, stream)
                 : launch_step<T, C, M, false>(layout, block, params, card, stream);
    else
      return launch_step<T, C, M, Layout<C>::kResident>(layout, block, params, card, stream);
  });
}

// Either size of operands, as far as there are two.
template <class T, int C> const char *run_bottlenecks(const BottlenecksArgs &args, const Card &card, Stream stream) {
  const Layout<C> layout{args};
  if constexpr (Layout<C>::kResident)
    if (args.n * ((layout.h + 3) / 4) * ((layout.w + 7) / 8) >= kFewTiles * int64_t(card.multiprocessors))
      return run_chain<T, C, 2>(layout, card, stream);
  return run_chain<T, C, 1>(layout, card, stream);
}

// Each width has a file of its own, so that nvcc compiles them side by side.
extern template const char *run_bottlenecks<BFloat16, 32>(const BottlenecksArgs &, const Card &, Stream);
extern template const char *run_bottlenecks<Half, 32>(const BottlenecksArgs &, const Card &, Stream);
extern template const char *run_bottlenecks<BFloat16, 64>(const BottlenecksArgs &, const Card &, Stream);
extern template const char *run_bottlenecks<Half, 64>(const BottlenecksArgs &, const Card &, Stream);
extern template const char *run_bottlenecks<BFloat16, 128>(const BottlenecksArgs &, const Card &, Stream);
extern template const char *run_bottlenecks<Half, 128>(const BottlenecksArgs &, const Card &, Stream);

} // namespace hrpose::cuda
