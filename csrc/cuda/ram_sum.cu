// Weighted sum of resampled maps with ReLU, and its gradient, as csrc/cpu/ram_sum.inl defines them:
//
//     y = relu( sum_t weights[t] * R_t x_t ),  from left to right
//     g = 0 where y <= 0, else grad;  s_t = transpose(R_t) g;  grads[t] = weights[t] * s_t;  weight_grads[t] = <x_t, s_t>
//
// Bound by memory. Forward a thread makes 16 bytes of y, from 16 bytes of every input: it reads each input and writes y
// once. Backward a thread makes 16 bytes of one gradient and gathers what they are made of, f f pixels of g (4 f f with
// "bilinear"): all terms read grad and y, of which all but one come from the cache; no atomics, so that the sums have
// one order. The 16 bytes are channels of a pixel, single values where c does not fill them. Sums are in float.
#include "device.h"

namespace hrpose::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kResident = 4; // blocks on a multiprocessor: 64 registers. For more of them ptxas would spill some
constexpr int kAhead = 4;    // terms that are read before the first of them is added

// v / factor without a division for the factors of HRNet.
struct Divisor {
  int factor, shift; // shift: -1 if the factor is no power of two
};
__device__ int quotient(int v, Divisor d) { return d.shift >= 0 ? v >> d.shift : v / d.factor; }

Divisor divisor(int factor) {
  int shift = 0;
  while (1 << shift < factor)
    ++shift;
  return {factor, 1 << shift == factor ? shift : -1};
}

struct Forward {
  RamSumArgs args;
  Divisor divisors[kMaxTerms];
};

// The two pixels of a map that pixel i of its bilinear enlargement comes from, and the weight of the second.
struct Taps {
  int first, second;
  float l;
};
__device__ Taps taps(int i, Divisor d, int size) {
  const int position = 2 * i + 1 + d.factor; // 2 factor times (that on the map, + 1)
  const int before = quotient(position >> 1, d) - 1, over = position - 2 * d.factor * (before + 1);
  const int first = max(before, 0);
  return {first, min(first + 1, size - 1), before < 0 ? 0 : float(over) / float(2 * d.factor)};
}

template <class T, int count> __device__ void load(const T *from, float (&values)[count]) {
  if constexpr (count == 1)
    values[0] = widen(*from);
  else
    widen<T>(load16(from), values);
}
template <class T, int count> __device__ void store(T *to, const float (&values)[count]) {
  if constexpr (count == 1)
    *to = narrow<T>(values[0]);
  else
    store16(to, narrow<T>(values));
}

// `count` values of R_t x_t from channel ch of pixel x on, in row `row` of all the images.
template <class T, bool bilinear, int count>
__device__ void resample(const Forward &p, int t, int row, int x, int ch, float (&values)[count]) {
  const RamSumArgs &a = p.args;
  const Divisor d = p.divisors[t];
  const T *map = static_cast<const T *>(a.inputs[t]);
  const int c = a.c, width = quotient(a.w, d);
  if (!bilinear || d.factor == 1) // h is a multiple of the factor: rows of all images are divided like those of one
    return load(map + (quotient(row, d) * width + quotient(x, d)) * c + ch, values);
  const int height = quotient(a.h, d), image = row / a.h;
  const Taps v = taps(row - image * a.h, d, height), h = taps(x, d, width);
  const T *upper = map + (image * height + v.first) * width * c + ch;
  const T *lower = map + (image * height + v.second) * width * c + ch;
  float nw[count], ne[count], sw[count], se[count];
  load(upper + h.first * c, nw), load(upper + h.second * c, ne);
  load(lower + h.first * c, sw), load(lower + h.second * c, se);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const float top = (1 - h.l) * nw[i] + h.l * ne[i], bottom = (1 - h.l) * sw[i] + h.l * se[i];
    values[i] = (1 - v.l) * top + v.l * bottom;
  }
}

// Threads (columns of 16 bytes, rows); blocks likewise, `across` of them side by side.
template <class T, bool bilinear, int count>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Forward p, int across) {
  const RamSumArgs &a = p.args;
  const int down = blockIdx.x / across, chunks = a.c / count;
  const int row = down * blockDim.y + threadIdx.y, col = (blockIdx.x - down * across) * blockDim.x + threadIdx.x;
  if (row >= a.n * a.h || col >= a.w * chunks)
    return;
  const int x = col / chunks, ch = (col - x * chunks) * count;
  const float *weights = a.weights ? a.weights + row / (a.share * a.h) * a.m : nullptr;
  float sum[count] = {};
  for (int begin = 0; begin < a.m; begin += kAhead) {
    float values[kAhead][count];
#pragma unroll
    for (int t = 0; t < kAhead; ++t)
      if (begin + t < a.m)
        resample<T, bilinear>(p, begin + t, row, x, ch, values[t]);
#pragma unroll
    for (int t = 0; t < kAhead; ++t)
      if (begin + t < a.m) {
        const float weight = weights ? weights[begin + t] : 1;
#pragma unroll
        for (int i = 0; i < count; ++i)
          sum[i] += weight * values[t][i];
      }
  }
#pragma unroll
  for (int i = 0; i < count; ++i)
    sum[i] = sum[i] < 0 ? 0 : sum[i]; // NaN stays
  store(static_cast<T *>(a.out) + (row * a.w + x) * a.c + ch, sum);
}

// ---- backward --------------------------------------------------------------------------------------------------------

// sum += weight * g, of `count` values.
template <class T, int count>
__device__ void add_g(const RamSumGradArgs &a, int at, float weight, float (&sum)[count]) {
  float grad[count], out[count];
  load(static_cast<const T *>(a.grad) + at, grad);
  load(static_cast<const T *>(a.out) + at, out);
#pragma unroll
  for (int i = 0; i < count; ++i)
    sum[i] += out[i] <= 0 ? 0 : weight * grad[i]; // a NaN in y lets the gradient through, as in PyTorch
}

// How much of pixel i of the enlargement comes from pixel `of` of the map.
__device__ float share_of(int i, int of, Divisor d, int size) {
  const Taps t = taps(i, d, size);
  return (t.first == of ? 1 - t.l : 0) + (t.second == of ? t.l : 0);
}

// `count` values of s_t, from channel ch of pixel (x, y) of image `image` on.
template <class T, bool bilinear, int count>
__device__ void gather(const RamSumGradArgs &a, Divisor d, int image, int y, int x, int ch, float (&sum)[count]) {
  const int f = d.factor, rows = image * a.h;
  if (!bilinear || f == 1) {
    for (int j = y * f; j < (y + 1) * f; ++j)
#pragma unroll 4
      for (int i = x * f; i < (x + 1) * f; ++i)
        add_g<T>(a, ((rows + j) * a.w + i) * a.c + ch, 1, sum);
    return;
  }
  // The pixels whose first or second is this one: from the middle of the one before to the middle of the next.
  const int top = max(y * f - (f + 1) / 2, 0), bottom = min((y + 1) * f + f / 2, a.h);
  const int left = max(x * f - (f + 1) / 2, 0), right = min((x + 1) * f + f / 2, a.w);
  for (int j = top; j < bottom; ++j) {
    const float vertical = share_of(j, y, d, a.h / f);
    for (int i = left; i < right; ++i)
      add_g<T>(a, ((rows + j) * a.w + i) * a.c + ch, vertical * share_of(i, x, d, a.w / f), sum);
  }
}

struct Partial {
  float of_warp[kThreads / 32];
};

// Of all threads, in a fixed order; thread 0 has it.
__device__ float block_sum(float value) {
#pragma unroll
  for (int step = 16; step; step /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, step);
  Partial &partial = shared<Partial>();
  if (threadIdx.x % 32 == 0)
    partial.of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (const float one : partial.of_warp)
    value += one;
  return value;
}

struct Backward {
  RamSumGradArgs args;
  Divisor divisors[kMaxTerms];
};

// `parts` blocks for a term of a sample. The last terms go first: smaller maps, of longer sums, often are the last.
template <class T, bool bilinear, int count>
__global__ void __launch_bounds__(kThreads, kResident) backward_kernel(const __grid_constant__ Backward p) {
  const RamSumGradArgs &a = p.args;
  const int samples = a.n / a.share, part = blockIdx.x % a.parts, sample = blockIdx.x / a.parts % samples;
  const int t = a.m - 1 - blockIdx.x / a.parts / samples;
  const Divisor d = p.divisors[t];
  const int height = a.h / d.factor, width = a.w / d.factor, chunks = a.c / count;
  const int items = a.share * height * width * chunks, first = sample * a.share;
  const float weight = a.weights ? a.weights[sample * a.m + t] : 1;
  float product = 0;
  for (int item = part * kThreads + threadIdx.x; item < items; item += a.parts * kThreads) {
    const int pixel = item / chunks, ch = (item - pixel * chunks) * count;
    const int row = pixel / width, x = pixel - row * width, image = row / height;
    float sum[count] = {}, values[count];
    gather<T, bilinear>(a, d, first + image, row - image * height, x, ch, sum);
    const int at = (first * height * width + pixel) * a.c + ch;
#pragma unroll
    for (int i = 0; i < count; ++i)
      values[i] = weight * sum[i];
    store(static_cast<T *>(a.grads[t]) + at, values);
    if (a.weights) {
      load(static_cast<const T *>(a.inputs[t]) + at, values);
#pragma unroll
      for (int i = 0; i < count; ++i)
        product += values[i] * sum[i];
    }
  }
  if (!a.weights)
    return;
  product = block_sum(product);
  if (threadIdx.x == 0)
    a.products[(sample * a.m + t) * a.parts + part] = product;
}

// May pixels be read in 16 bytes?
template <class T> struct Chunks {
  bool possible;
  explicit Chunks(int c) : possible(c % kPerLoad<T> == 0) {}
  void also(const void *p) { possible = possible && reinterpret_cast<uintptr_t>(p) % 16 == 0; }
};

template <class T> const char *forward(const Forward &p, Stream stream) {
  const RamSumArgs &a = p.args;
  Chunks<T> chunks(a.c);
  chunks.also(a.out);
  for (int t = 0; t < a.m; ++t)
    chunks.also(a.inputs[t]);
  constexpr int kMany = kPerLoad<T>;
  const int columns = a.w * a.c / (chunks.possible ? kMany : 1), rows = a.n * a.h;
  const dim3 block(unsigned(columns < kThreads ? columns : kThreads), columns < kThreads ? kThreads / columns : 1);
  const int across = ceil_div(columns, int(block.x)), down = ceil_div(rows, int(block.y));
  const auto kernel = chunks.possible ? a.bilinear ? forward_kernel<T, true, kMany> : forward_kernel<T, false, kMany>
                      : a.bilinear    ? forward_kernel<T, true, 1>
                                      : forward_kernel<T, false, 1>;
  return launch({dim3(unsigned(across) * unsigned(down)), block, stream}, kernel, p, across);
}

template <class T> const char *backward(const Backward &p, Stream stream) {
  const RamSumGradArgs &a = p.args;
  Chunks<T> chunks(a.c);
  chunks.also(a.grad), chunks.also(a.out);
  for (int t = 0; t < a.m; ++t) {
    chunks.also(a.grads[t]);
    if (a.weights)
      chunks.also(a.inputs[t]);
  }
  constexpr int kMany = kPerLoad<T>;
  const auto kernel = chunks.possible ? a.bilinear ? backward_kernel<T, true, kMany> : backward_kernel<T, false, kMany>
                      : a.bilinear    ? backward_kernel<T, true, 1>
                                      : backward_kernel<T, false, 1>;
  return launch({dim3(unsigned(a.n / a.share * a.m * a.parts)), dim3(kThreads), stream}, kernel, p);
}

} // namespace

const char *ram_sum_fwd(const RamSumArgs &args, Stream stream) {
  Forward p = {args, {}};
  for (int t = 0; t < args.m; ++t)
    p.divisors[t] = divisor(args.factors[t]);
  return args.n == 0 ? nullptr : with_type(args.type, [&](auto value) { return forward<decltype(value)>(p, stream); });
}

const char *ram_sum_bwd(const RamSumGradArgs &args, Stream stream) {
  Backward p = {args, {}};
  for (int t = 0; t < args.m; ++t)
    p.divisors[t] = divisor(args.factors[t]);
  return args.n == 0 ? nullptr : with_type(args.type, [&](auto value) { return backward<decltype(value)>(p, stream); });
}

} // namespace hrpose::cuda
