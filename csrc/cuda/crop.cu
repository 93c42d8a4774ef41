// Affine crops of one uint8 image, as csrc/cpu/crop.inl defines them: bilinear, zero outside, normalised; both modes, and
// the same floats, rounded to the type of the output. A crop whose transform cannot be inverted is NaN, and is reported
// in `bad`.
//
// Reads up to 12 bytes of the image per pixel, most of them from the cache, and writes 12 bytes, or 6 in the half types,
// twice that with mirrored copies: bound by memory. A thread takes kTogether neighbours of a row, so that it stores four
// values at once; single pixels where the width is no multiple of that or the output not aligned. Coordinates are in
// double: there is no other way to the reference's numbers.
#include "device.h"

namespace hrpose::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTogether = 4;
constexpr int kFixed = 1024; // opencv4: coordinates count 1/1024 px ...
constexpr int kSteps = 32;   // ... and are then rounded to 1/32 px
// Coordinates are clamped to +-kFar before they become int. Images end at 2^20 px = kFar / kFixed: still outside.
constexpr double kFar = 1 << 30;

struct Inverse {
  double m[6];
  bool good;
};

// The operation order of OpenCV's own inversion.
__device__ Inverse invert(const double *m) {
  const double det = m[0] * m[4] - m[1] * m[3], d = 1.0 / det;
  Inverse inverse = {{m[4] * d, m[1] * -d, 0, m[3] * -d, m[0] * d, 0}, det != 0};
  double *i = inverse.m;
  i[2] = -i[0] * m[2] - i[1] * m[5];
  i[5] = -i[3] * m[2] - i[4] * m[5];
  for (int j = 0; j < 6; ++j)
    inverse.good = inverse.good && fabs(m[j]) < INFINITY && fabs(i[j]) < INFINITY;
  return inverse;
}

__device__ double clamp(double v, double limit) {
  v = v > -limit ? v : -limit; // NaN too
  return v < limit ? v : limit;
}

// Half to even, like cvRound; within 2^50, as in the reference.
__device__ double round_even(double v) { return rint(clamp(v, 1125899906842624.0)); }

// Whole part and fraction, the latter in 1/kSteps with opencv4, of one source coordinate of pixel (x, y).
template <bool opencv4> __device__ int source(const double *inverse_row, int x, int y, float &fraction) {
  const double column = inverse_row[0] * x, row = inverse_row[1] * y + inverse_row[2];
  if (opencv4) {
    const double half_step = kFixed / kSteps / 2;
    const int steps = int(clamp(round_even(column * kFixed) + (round_even(row * kFixed) + half_step), kFar));
    fraction = float(steps >> 5 & (kSteps - 1));
    return steps >> 10;
  }
  const double exact = clamp(column + row, kFar), below = floor(exact);
  fraction = float(exact - below);
  return int(below);
}

template <bool opencv4> __device__ float interpolate(float a, float b, float c, float d, float fx, float fy) {
  if (opencv4) { // integers below 2^24, exact in float; + 0.5 and truncation is OpenCV's rounding
    const float gx = kSteps - fx, gy = kSteps - fy;
    const float sum = gy * (gx * a + fx * b) + fy * (gx * c + fx * d);
    return float(int(sum * (1.0f / kFixed) + 0.5f));
  }
  const float top = a + fx * (b - a), bottom = c + fx * (d - c);
  return top + fy * (bottom - top);
}

template <bool opencv4>
__device__ void pixel(const CropArgs &a, const double *inverse, int x, int y, float (&values)[3]) {
  float fx, fy;
  const int ix = source<opencv4>(inverse, x, y, fx), iy = source<opencv4>(inverse + 3, x, y, fy);
  const bool left = ix >= 0 && ix < a.image_w, right = ix >= -1 && ix < a.image_w - 1;
  const bool upper = iy >= 0 && iy < a.image_h, lower = iy >= -1 && iy < a.image_h - 1;
  const int64_t at = (iy * a.image_w + ix) * 3, below = at + a.image_w * 3;
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const float nw = upper && left ? a.image[at + c] : 0, ne = upper && right ? a.image[at + 3 + c] : 0;
    const float sw = lower && left ? a.image[below + c] : 0, se = lower && right ? a.image[below + 3 + c] : 0;
    values[c] = interpolate<opencv4>(nw, ne, sw, se, fx, fy) * a.scale[c] + a.bias[c];
  }
}

__device__ void store4(float *to, const float (&v)[4]) { store16(to, narrow<float>(v)); }
template <class T> __device__ void store4(T *to, const float (&v)[4]) {
  *reinterpret_cast<uint2 *>(to) = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
}

// `count` pixels from `first` on, row-major, of `image` of the output; mirrored, where their mirrored copies belong.
template <class T, bool mirrored, int count>
__device__ void store(const CropArgs &a, int64_t image, int first, const float (&values)[3][count]) {
  const int size = int(a.h * a.w), y = first / int(a.w), x = first - y * int(a.w);
  const int at = mirrored ? y * int(a.w) + int(a.w) - count - x : first;
  T *out = static_cast<T *>(a.out) + image * 3 * size;
  const auto value = [&](int c, int i) { return values[c][mirrored ? count - 1 - i : i]; };
#pragma unroll
  for (int part = 0; part < 3; ++part)
    if constexpr (count == 1) {
      out[a.channels_last ? int64_t(at) * 3 + part : int64_t(part) * size + at] = narrow<T>(value(part, 0));
    } else if (a.channels_last) { // 12 values, pixel by pixel
      const int j = part * 4;
      store4(out + int64_t(at) * 3 + j, {value(j % 3, j / 3), value((j + 1) % 3, (j + 1) / 3),
                                         value((j + 2) % 3, (j + 2) / 3), value((j + 3) % 3, (j + 3) / 3)});
    } else {
      store4(out + int64_t(part) * size + at, {value(part, 0), value(part, 1), value(part, 2), value(part, 3)});
    }
}

// No launch bounds: told of kThreads, ptxas for sm_120 spills where it has registers to spare.
template <class T, bool opencv4, int count>
__global__ void crop_kernel(const __grid_constant__ CropArgs a) {
  const int size = int(a.h * a.w), blocks = ceil_div(size / count, kThreads); // of a crop
  const int n = blockIdx.x / blocks, block = blockIdx.x - n * blocks;
  Inverse &inverse = shared<Inverse>();
  if (threadIdx.x == 0) {
    inverse = invert(a.transforms + int64_t(n) * 6);
    if (block == 0)
      a.bad[n] = !inverse.good;
  }
  __syncthreads();
  const int first = (block * kThreads + int(threadIdx.x)) * count;
  if (first >= size)
    return;
  const int y = first / int(a.w), x = first - y * int(a.w);
  float values[3][count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    float one[3] = {NAN, NAN, NAN};
    if (inverse.good)
      pixel<opencv4>(a, inverse.m, x + i, y, one);
#pragma unroll
    for (int c = 0; c < 3; ++c)
      values[c][i] = one[c];
  }
  store<T, false>(a, n, first, values);
  if (a.mirror)
    store<T, true>(a, n + a.n, first, values);
}

template <class T, bool opencv4> const char *crop(const CropArgs &args, Stream stream) {
  const bool chunks = args.w % kTogether == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  const auto kernel = chunks ? crop_kernel<T, opencv4, kTogether> : crop_kernel<T, opencv4, 1>;
  const int64_t threads = args.h * args.w / (chunks ? kTogether : 1);
  return launch({dim3(unsigned(args.n * ceil_div(threads, int64_t(kThreads)))), dim3(kThreads), stream}, kernel, args);
}

} // namespace

const char *crop_fwd(const CropArgs &args, Stream stream) {
  if (args.n == 0)
    return nullptr;
  return with_type(args.type, [&](auto value) {
    using T = decltype(value);
    return args.opencv4 ? crop<T, true>(args, stream) : crop<T, false>(args, stream);
  });
}

} // namespace hrpose::cuda
