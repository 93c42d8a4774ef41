// Affine crops of one uint8 image, as csrc/cpu/crop.inl defines them: bilinear, zero outside, normalised; both modes, and
// the same floats. A crop whose transform cannot be inverted is NaN, and is reported in `bad`.
//
// Reads up to 12 bytes of the image per pixel, most of them from the cache, and writes 12 bytes: bound by memory. A
// thread takes `count` neighbours of a row, so that it stores 16 bytes of each plane at once; single pixels where rows do
// not start on 16 bytes. Coordinates are in double: there is no other way to the reference's numbers.
#include "device.h"

namespace hrpose::cuda {
namespace {

constexpr int kThreads = 256;
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

template <bool opencv4, int count>
__global__ void __launch_bounds__(kThreads) crop_kernel(const __grid_constant__ CropArgs a) {
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
  for (int i = 0; i < count; ++i) {
    float one[3] = {NAN, NAN, NAN};
    if (inverse.good)
      pixel<opencv4>(a, inverse.m, x + i, y, one);
    for (int c = 0; c < 3; ++c)
      values[c][i] = one[c];
  }
  float *out = a.out + int64_t(n) * 3 * size + first;
  for (int c = 0; c < 3; ++c, out += size)
    if constexpr (count == kPerLoad<float>)
      store16(out, narrow<float>(values[c]));
    else
      *out = values[c][0];
}

template <bool opencv4> const char *crop(const CropArgs &args, Stream stream) {
  const bool chunks = args.w % kPerLoad<float> == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  const auto kernel = chunks ? crop_kernel<opencv4, kPerLoad<float>> : crop_kernel<opencv4, 1>;
  const int64_t threads = args.h * args.w / (chunks ? kPerLoad<float> : 1);
  return launch({dim3(unsigned(args.n * ceil_div(threads, int64_t(kThreads)))), dim3(kThreads), stream}, kernel, args);
}

} // namespace

const char *crop_fwd(const CropArgs &args, Stream stream) {
  if (args.n == 0)
    return nullptr;
  return args.opencv4 ? crop<true>(args, stream) : crop<false>(args, stream);
}

} // namespace hrpose::cuda
