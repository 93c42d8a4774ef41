// Affine crops of one uint8 image, bilinear, zero outside. For pixel (x, y) of a crop with inverse transform R:
//
//     sx = R00 x + (R01 y + R02), sy = R10 x + (R11 y + R12)       image px, in double
//     grey = the four neighbours of (sx, sy), weighted bilinearly; a neighbour outside the image counts as 0
//     out[c, y, x] = grey[c] * scale[c] + bias[c]
//
// exact: the fractions of sx, sy as float. opencv4: the arithmetic of cv::warpAffine in OpenCV 2.4-4.x, see
// fixed_coordinates.
//
// Reads up to 12 bytes and writes 12 bytes per pixel. One worker takes whole rows, a row goes in pieces of kPiece
// pixels: coordinates (vectorised), taps gathered into four arrays of packed pixels (scalar), interpolation
// (vectorised). In a row both coordinates are monotone in x, after every rounding too; so the pixels that touch the
// image are one span, those with all four neighbours inside are one span within it, and only what lies between the two
// needs a test per neighbour.

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed pixels are read as little-endian words");

constexpr int kPiece = 256;  // pixels: 8 arrays of 1 KiB
constexpr int kFixed = 1024; // opencv4: coordinates count 1/1024 px ...
constexpr int kSteps = 32;   // ... and are then rounded to 1/32 px
// Coordinates are clamped to +-kFar before they become int32. Images end at 2^20 px = kFar / kFixed: still outside.
constexpr double kFar = 1 << 30;

struct Piece {
  alignas(64) int32_t ix[kPiece], iy[kPiece]; // top left neighbour
  alignas(64) float fx[kPiece], fy[kPiece];   // fractions: of 1 (exact), of kSteps (opencv4)
  alignas(64) uint32_t t00[kPiece], t01[kPiece]; // taps: top left and right
  alignas(64) uint32_t t10[kPiece], t11[kPiece]; // bottom left and right
};

// NaN becomes -kFar, so that no value reaches an integer conversion it does not fit.
inline double clamp_far(double v) {
  v = v > -kFar ? v : -kFar;
  return v < kFar ? v : kFar;
}

// Round half to even, like cvRound: 1.5 * 2^52 leaves no room for fractions. |v| <= 2^50.
inline double round_even(double v) {
  constexpr double kMagic = 6755399441055744.0, kLimit = 1125899906842624.0;
  v = v > -kLimit ? v : -kLimit;
  v = v < kLimit ? v : kLimit;
  return (v + kMagic) - kMagic;
}

inline void exact_coordinates(const double *inverse, int64_t x0, int64_t y, int count, Piece &p) {
  const double base_x = inverse[1] * double(y) + inverse[2], base_y = inverse[4] * double(y) + inverse[5];
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const double x = double(int32_t(x0) + i);
    const double sx = clamp_far(inverse[0] * x + base_x), sy = clamp_far(inverse[3] * x + base_y);
    const int32_t tx = int32_t(sx), ty = int32_t(sy); // toward zero; one less below zero makes it a floor
    p.ix[i] = tx - (sx < tx);
    p.iy[i] = ty - (sy < ty);
    p.fx[i] = float(sx - double(p.ix[i]));
    p.fy[i] = float(sy - double(p.iy[i]));
  }
}

// cv::warpAffine: column and row terms are rounded to 1/1024 px apart, their sum to 1/32 px (half a step is added to
// the row term); weights are whole 1/1024ths.
inline void fixed_coordinates(const double *inverse, int64_t x0, int64_t y, int count, Piece &p) {
  const double half_step = kFixed / kSteps / 2;
  const double base_x = round_even((inverse[1] * double(y) + inverse[2]) * kFixed) + half_step;
  const double base_y = round_even((inverse[4] * double(y) + inverse[5]) * kFixed) + half_step;
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const double x = double(int32_t(x0) + i);
    const int32_t tx = int32_t(clamp_far(round_even(inverse[0] * x * kFixed) + base_x)) >> 5;
    const int32_t ty = int32_t(clamp_far(round_even(inverse[3] * x * kFixed) + base_y)) >> 5;
    p.ix[i] = tx >> 5;
    p.iy[i] = ty >> 5;
    p.fx[i] = float(tx & (kSteps - 1));
    p.fy[i] = float(ty & (kSteps - 1));
  }
}

inline uint32_t load4(const uint8_t *bytes) {
  uint32_t word;
  memcpy(&word, bytes, 4);
  return word;
}

// Both taps of one image row. Left keeps its channels in bytes 0-2, right in bytes 1-3: the two words then span exactly
// the six bytes of the two pixels, and the last pixel of the image is never overrun.
inline void gather_inside(const uint8_t *pixel, uint32_t &left, uint32_t &right) {
  left = load4(pixel);
  right = load4(pixel + 2);
}

inline void gather_tested(const CropArgs &a, int64_t x, int64_t y, uint32_t &left, uint32_t &right) {
  left = right = 0;
  if (y < 0 || y >= a.image_h)
    return;
  const uint8_t *row = a.image + y * a.image_w * 3;
  if (x >= 0 && x < a.image_w)
    left = row[x * 3] | uint32_t(row[x * 3 + 1]) << 8 | uint32_t(row[x * 3 + 2]) << 16;
  if (x + 1 >= 0 && x + 1 < a.image_w)
    right = uint32_t(row[x * 3 + 3]) << 8 | uint32_t(row[x * 3 + 4]) << 16 | uint32_t(row[x * 3 + 5]) << 24;
}

inline bool touches(const CropArgs &a, int32_t x, int32_t y) {
  return x >= -1 && x < a.image_w && y >= -1 && y < a.image_h;
}

inline bool inside(const CropArgs &a, int32_t x, int32_t y) {
  return x >= 0 && x < a.image_w - 1 && y >= 0 && y < a.image_h - 1;
}

// Fills the taps of pixels begin..end - 1, which become the span that touches the image.
inline void gather(const CropArgs &a, int count, Piece &p, int &begin, int &end) {
  for (begin = 0; begin < count && !touches(a, p.ix[begin], p.iy[begin]);)
    ++begin;
  for (end = count; end > begin && !touches(a, p.ix[end - 1], p.iy[end - 1]);)
    --end;
  int inner_begin = begin, inner_end = end;
  while (inner_begin < end && !inside(a, p.ix[inner_begin], p.iy[inner_begin]))
    ++inner_begin;
  while (inner_end > inner_begin && !inside(a, p.ix[inner_end - 1], p.iy[inner_end - 1]))
    --inner_end;

  const auto tested = [&](int from, int to) {
    for (int i = from; i < to; ++i) {
      gather_tested(a, p.ix[i], p.iy[i], p.t00[i], p.t01[i]);
      gather_tested(a, p.ix[i], int64_t(p.iy[i]) + 1, p.t10[i], p.t11[i]);
    }
  };
  tested(begin, inner_begin);
  const int64_t stride = a.image_w * 3;
  for (int i = inner_begin; i < inner_end; ++i) {
    const uint8_t *pixel = a.image + p.iy[i] * stride + p.ix[i] * int64_t(3);
    gather_inside(pixel, p.t00[i], p.t01[i]);
    gather_inside(pixel + stride, p.t10[i], p.t11[i]);
  }
  tested(inner_end, end);
}

// Channel c of a packed tap; `at` is 0 for left taps and 1 for right ones.
inline float tap(uint32_t word, int c, int at) { return float(int32_t(word >> (8 * (c + at)) & 255)); }

inline void interpolate(const Piece &p, int c, bool opencv4, float scale, float bias, int begin, int end, float *out) {
  if (opencv4) { // integers below 2^24, exact in float; + 0.5 and truncation is OpenCV's rounding
#pragma omp simd
    for (int i = begin; i < end; ++i) {
      const float gx = kSteps - p.fx[i], gy = kSteps - p.fy[i];
      const float sum = gy * (gx * tap(p.t00[i], c, 0) + p.fx[i] * tap(p.t01[i], c, 1)) +
                        p.fy[i] * (gx * tap(p.t10[i], c, 0) + p.fx[i] * tap(p.t11[i], c, 1));
      out[i] = float(int32_t(sum * (1.0f / kFixed) + 0.5f)) * scale + bias;
    }
  } else {
#pragma omp simd
    for (int i = begin; i < end; ++i) {
      const float a = tap(p.t00[i], c, 0), b = tap(p.t01[i], c, 1), d = tap(p.t10[i], c, 0), e = tap(p.t11[i], c, 1);
      const float top = a + p.fx[i] * (b - a), bottom = d + p.fx[i] * (e - d);
      out[i] = (top + p.fy[i] * (bottom - top)) * scale + bias;
    }
  }
}

inline void crop_row(const CropArgs &a, const double *inverse, int64_t y, float *out) {
  Piece p;
  for (int64_t x0 = 0; x0 < a.w; x0 += kPiece) {
    const int count = a.w - x0 < kPiece ? int(a.w - x0) : kPiece;
    if (a.opencv4)
      fixed_coordinates(inverse, x0, y, count, p);
    else
      exact_coordinates(inverse, x0, y, count, p);
    int begin, end;
    gather(a, count, p, begin, end);
    for (int c = 0; c < 3; ++c) {
      float *row = out + c * a.h * a.w + x0;
      for (int i = 0; i < begin; ++i)
        row[i] = a.bias[c];
      interpolate(p, c, a.opencv4, a.scale[c], a.bias[c], begin, end, row);
      for (int i = end; i < count; ++i)
        row[i] = a.bias[c];
    }
  }
}

// The operation order of OpenCV's own inversion (D = 1 / det first); false if it leaves the finite numbers.
inline bool invert_affine(const double *m, double *inverse) {
  double d = m[0] * m[4] - m[1] * m[3];
  if (d == 0)
    return false;
  d = 1.0 / d;
  inverse[0] = m[4] * d;
  inverse[1] = m[1] * -d;
  inverse[3] = m[3] * -d;
  inverse[4] = m[0] * d;
  inverse[2] = -inverse[0] * m[2] - inverse[1] * m[5];
  inverse[5] = -inverse[3] * m[2] - inverse[4] * m[5];
  for (int i = 0; i < 6; ++i)
    if (!(__builtin_fabs(m[i]) < __builtin_inf() && __builtin_fabs(inverse[i]) < __builtin_inf()))
      return false;
  return true;
}

int64_t crop_fwd(const CropArgs &a) {
  for (int64_t n = 0; n < a.n; ++n)
    if (!invert_affine(a.transforms + n * 6, a.inverses + n * 6))
      return n;
  split(a.n * a.h, a.threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / a.h, y = row % a.h;
      crop_row(a, a.inverses + n * 6, y, a.out + (n * 3 * a.h + y) * a.w);
    }
  });
  return -1;
}
