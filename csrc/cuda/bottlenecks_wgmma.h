// The step kernel of bottlenecks.h for the tensor cores of a warpgroup (sm_90a), C = 32 and 64; heads are those of
// bottlenecks.h. It has not run on a card yet: bottlenecks.cu takes it only for weights that were packed for it.
//
// Threads and data. A warpgroup has tiles of 8 x 8 pixels, its warp i rows 2 i and 2 i + 1 of each: to a warp this is
// what it has in bottlenecks.h with M = 1, for an operand of a warpgroup is one of 16 rows in each of its warps. So
// here, too, z, x' and y' go from sums to operand without leaving the lane's registers. The other operand, the weights,
// is read from shared memory by the tensor cores themselves, once for four warps.
//
// Weights of a step are C x C matrices: of each tap; then, of each C outputs of W3 (a part), those of the projection,
// of W3, and of the next W1 for the columns that read these outputs. All of them lie in shared memory as they do in
// device memory (hrpose/ops/fragments.py says how), one copy for each tap and each part, whose arrival is waited for on
// its own.
#pragma once
#include "bottlenecks.h"
#include "hopper.h"

namespace hrpose::cuda {

// Of a block. While one waits for its products or pixels, others have work. A projection takes more than the 128
// registers that four leave to a thread.
template <bool project> constexpr int kWarpgroups = project ? 3 : 4;

template <int C> constexpr int kMatrixBytes = 2 * C * C;
template <int C> constexpr int kLastTap = 9 * kMatrixBytes<C>; // where the first part begins

// Bit i: does tap i lie inside the map for an output in rows y0 to y1 and columns x0 to x1?
__device__ __forceinline__ unsigned taps_inside(const StepParams &p, int y0, int y1, int x0, int x1) {
  unsigned taps = 0;
#pragma unroll
  for (int tap = 0; tap < 9; ++tap)
    taps |= unsigned(is_inside(p, tap, y0, y1, x0, x1)) << tap;
  return taps;
}

template <int kGroups> __device__ __forceinline__ void hold(Operand<1> (&a)[kGroups]) {
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i)
    hold(a[i / 2].words[0][i % 2]);
}

// sums += a times a C x C matrix in shared memory.
template <class T, int C>
__device__ __forceinline__ void multiply_matrix(float (&sums)[C / 8][4], Operand<1> (&a)[C / kGroup],
                                                const unsigned char *matrix) {
  constexpr int kNextInputs = 16 * C, kNextOutputs = 128; // bytes to the next core matrix in either direction
  const uint64_t b = descriptor(matrix, kNextInputs, kNextOutputs);
  hold(sums);
  hold(a);
  fence_products();
#pragma unroll
  for (int i = 0; i < C / 16; ++i)
    multiply_group<T>(sums, a[i / 2].words[0][i % 2], advance(b, i * 2 * kNextInputs));
  commit_products();
  wait_products<0>();
  hold(sums);
}

template <class T, int C, bool project>
__global__ void __launch_bounds__(kWarpgroup *kWarpgroups<project>, 1) bottlenecks_wgmma_kernel(const StepParams p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTiles = C / 8, kGroups = C / kGroup, kUnits = kWarpgroups<project>;
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4, warp = warp_index();
  const int d = p.dilation, s = p.stride, parts = p.out_channels / C, pieces = project ? p.in / C : 0;
  const bool tail = p.next_y;
  const int part_bytes = (pieces + (tail ? 2 : 1)) * kMatrixBytes<C>;

  unsigned char *weights = dynamic_shared();
  float *b2 = reinterpret_cast<float *>(weights + kLastTap<C> + parts * part_bytes);
  float *b3 = b2 + C, *next_b1 = b3 + p.out_channels;
  Arrival *taps = reinterpret_cast<Arrival *>(next_b1 + C), *arrivals = taps + 9; // of each tap; of each part

  // Taps that no output of the map has are not copied.
  const unsigned inside_map = taps_inside(p, 0, p.h - 1, 0, p.w - 1);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 9 + parts; ++i)
      prepare(taps[i]);
    announce();
    const unsigned char *from = static_cast<const unsigned char *>(p.weights);
    for (int tap = 0; tap < 9; ++tap)
      if (inside_map >> tap & 1)
        copy_bulk(weights + tap * kMatrixBytes<C>, from + tap * kMatrixBytes<C>, kMatrixBytes<C>, taps[tap]);
    for (int part = 0; part < parts; ++part) {
      const int begin = kLastTap<C> + part * part_bytes;
      copy_bulk(weights + begin, from + begin, part_bytes, arrivals[part]);
    }
  }
  for (int i = int(threadIdx.x); i < p.out_channels + (tail ? 2 : 1) * C; i += kWarpgroup * kUnits)
    b2[i] = p.biases[i];
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();

  const int tiles_x = ceil_div(p.w, 8), tiles_y = ceil_div(p.h, 8), tiles = p.n * tiles_y * tiles_x;
#pragma unroll 1
  for (int tile = first_tile(p.spread, warp / 4, kUnits); tile < tiles; tile += int(gridDim.x) * kUnits) {
    const int image = tile / (tiles_x * tiles_y), in_image = tile % (tiles_x * tiles_y);
    const int x0 = in_image % tiles_x * 8, tile_y0 = in_image / tiles_x * 8, x = x0 + g, y0 = tile_y0 + warp % 4 * 2;
    const bool inside[2] = {x < p.w && y0 < p.h, x < p.w && y0 + 1 < p.h};

    // Pixels beyond the map repeat its last row or column, see bottlenecks.h.
    const T *shortcut = static_cast<const T *>(p.x) + int64_t(image) * p.in_h * p.in_w * p.in + 8 * t;
    const auto place = [&](int r) { return (min(y0 + r, p.h - 1) * p.in_w + min(x, p.w - 1)) * s * p.in; };
#pragma unroll
    for (int r = 0; r < 2; ++r)
      for (int c = 64 * t; c < p.in; c += 64 * 4)
        prefetch(shortcut - 8 * t + place(r) + c);

    // z = relu(b2 + W2 * y)
    float sums[1][kTiles][4];
    Operand<1> z[kGroups];
    {
      unsigned left = taps_inside(p, tile_y0, min(tile_y0 + 8, p.h) - 1, x0, min(x0 + 8, p.w) - 1); // of all four warps
      const T *y = static_cast<const T *>(p.y) + int64_t(image) * p.in_h * p.in_w * C + 8 * t;
      uint4 loaded[kGroups][2];
      uint32_t mask[2];
      const auto load = [&] {
        const int tap = __ffs(int(left)) - 1;
        const int column = x * s + (tap % 3 - 1) * d, first_row = y0 * s + (tap / 3 - 1) * d;
        const int place = (first_row * p.in_w + column) * C;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const bool valid = unsigned(first_row + r * s) < unsigned(p.in_h) && unsigned(column) < unsigned(p.in_w);
          const T *pixel = y + (valid ? place + r * s * p.in_w * C : 0);
          mask[r] = valid ? p.ones : 0;
#pragma unroll
          for (int group = 0; group < kGroups; ++group)
            loaded[group][r] = load16(pixel + group * kGroup);
        }
      };
      begin(sums, b2, t);
      load(); // every tile has a tap: the one in the middle
#pragma unroll 1
      while (left) {
        const int tap = __ffs(int(left)) - 1;
#pragma unroll
        for (int group = 0; group < kGroups; ++group)
          arrange(z[group], loaded[group], mask);
        hold(z); // or these words wait for the next tap's, which take other registers then and are moved
        left &= left - 1;
        if (left)
          load();
        wait_for(taps[tap]);
        multiply_matrix<T, C>(sums[0], z, weights + tap * kMatrixBytes<C>);
      }
#pragma unroll
      for (int group = 0; group < kGroups; ++group)
        finish<T>(z[group], sums, group);
    }

    // x' = relu(b3 + shortcut + W3 z), C channels at a time, each going on to y' += W1 x'. Two copies, see
    // bottlenecks.h.
    const auto up_and_down = [&](auto has_tail) {
      constexpr bool kTail = decltype(has_tail)::value;
      float next[1][kTiles][4];
      if (kTail)
        begin(next, next_b1, t);
      uint4 loaded[kGroups][2];
      const auto load = [&](int first_channel) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int group = 0; group < kGroups; ++group)
            loaded[group][r] = load16_once(shortcut + place(r) + first_channel + group * kGroup);
      };
      if (!project)
        load(0);
      T *out = static_cast<T *>(p.out) + ((int64_t(image) * p.h + y0) * p.w + x) * p.out_channels + 8 * t;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        const unsigned char *matrix = weights + kLastTap<C> + part * part_bytes;
        begin(sums, b3 + part * C, t);
        wait_for(arrivals[part]);
        Operand<1> a[kGroups];
        if (project) {
          const uint32_t all[2] = {p.ones, p.ones};
#pragma unroll 1
          for (int piece = 0; piece < pieces; ++piece, matrix += kMatrixBytes<C>) {
            load(piece * C); // not one piece ahead: registers
#pragma unroll
            for (int group = 0; group < kGroups; ++group)
              arrange(a[group], loaded[group], all);
            multiply_matrix<T, C>(sums[0], a, matrix);
          }
        }
        multiply_matrix<T, C>(sums[0], z, matrix);
        if (!project) {
#pragma unroll
          for (int i = 0; i < 8 * kGroups; ++i) { // words of two channels: row, group, four of each
            const int r = i % 2, group = i / 8, tile = i / 2 % 4;
            const uint4 &row = loaded[group][r];
            const float2 pair = unpack<T>(tile == 0 ? row.x : tile == 1 ? row.y : tile == 2 ? row.z : row.w);
            float *sum = &sums[0][4 * group + tile][2 * r];
            sum[0] += pair.x, sum[1] += pair.y;
          }
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          finish<T>(a[group], sums, group);
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (inside[r])
              store16(out + int64_t(r) * p.w * p.out_channels + part * C + group * kGroup,
                      row_of(a[group], r, p.ones));
        }
        if (!project && part + 1 < parts)
          load((part + 1) * C); // not earlier: registers
        if (kTail)
          multiply_matrix<T, C>(next[0], a, matrix + kMatrixBytes<C>);
      }
      if (kTail) {
        T *next_y = static_cast<T *>(p.next_y) + ((int64_t(image) * p.h + y0) * p.w + x) * C + 8 * t;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          Operand<1> a;
          finish<T>(a, next, group);
#pragma unroll
          for (int r = 0; r < 2; ++r)
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

  // A copy that no tile of this block waited for must not reach the shared memory of the next one.
  if (threadIdx.x == 0)
    for (int tap = 0; tap < 9; ++tap)
      if (inside_map >> tap & 1)
        wait_for(taps[tap]);
#endif
}

// ---- host -----------------------------------------------------------------------------------------------------------

template <int C> size_t wgmma_shared_bytes(const Layout<C> &layout, int64_t block) {
  const int64_t out = layout.args.out_channels;
  return size_t(layout.step_words(block) * 16 + (out + 2 * C) * 4 + (9 + out / C) * int64_t(sizeof(Arrival)));
}

template <int C> bool wgmma_fits(const Layout<C> &layout, const Card &card) {
  const BottlenecksArgs &a = layout.args;
  bool result = a.in_channels % C == 0 && a.out_channels % C == 0 && layout.head_words() * 16 <= card.shared_bytes;
  for (int64_t block = 0; block < a.blocks; ++block)
    result = result && int64_t(wgmma_shared_bytes(layout, block)) <= card.shared_bytes;
  return result;
}

template <class T, int C, bool project>
const char *launch_wgmma_step(const Layout<C> &layout, int64_t block, StepParams &params, const Card &card,
                              Stream stream) {
  const int tiles = params.n * ceil_div(params.h, 8) * ceil_div(params.w, 8);
  constexpr int kUnits = kWarpgroups<project>;
  return launch_tiles<1, kUnits, kWarpgroup * kUnits>(bottlenecks_wgmma_kernel<T, C, project>, params, tiles, card,
                                                      wgmma_shared_bytes(layout, block), stream, true);
}

template <class T, int C>
const char *run_bottlenecks_wgmma(const BottlenecksArgs &args, const Card &card, Stream stream) {
  const Layout<C> layout{args};
  return launch_chain<T>(layout, card, stream, [&](int64_t block, StepParams &params) {
    return layout.projects(block) ? launch_wgmma_step<T, C, true>(layout, block, params, card, stream)
                                  : launch_wgmma_step<T, C, false>(layout, block, params, card, stream);
  });
}

extern template const char *run_bottlenecks_wgmma<BFloat16, 32>(const BottlenecksArgs &, const Card &, Stream);
extern template const char *run_bottlenecks_wgmma<Half, 32>(const BottlenecksArgs &, const Card &, Stream);
extern template const char *run_bottlenecks_wgmma<BFloat16, 64>(const BottlenecksArgs &, const Card &, Stream);
extern template const char *run_bottlenecks_wgmma<Half, 64>(const BottlenecksArgs &, const Card &, Stream);

} // namespace hrpose::cuda
