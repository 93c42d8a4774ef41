// Affine crops of one uint8 image, bilinear, zero outside. For pixel (x, y) of a crop with inverse transform R:
//
//     sx = R00 x + (R01 y + R02), sy = R10 x + (R11 y + R12)       image px, in double
//     grey = the four neighbours of (sx, sy), weighted bilinearly; a neighbour outside the image counts as 0
//     out[c, y, x] = grey[c] * scale[c] + bias[c]
//
// exact: the fractions of sx, sy as float. opencv4: the arithmetic of cv::warpAffine in OpenCV 2.4-4.x, see
// fixed_coordinates.
//
// Pixels are three bytes apart, or four: then the fourth, an alpha value or what Pillow fills up with, is not used.
//
// Reads up to 12 bytes and writes 12 bytes per pixel, 6 in bfloat16, twice that with mirrored copies. Planes of floats
// are written at once, all else from a piece of them in the cache. One worker takes whole rows, a row goes in pieces of
// kPiece pixels: coordinates (vectorised), the two taps of each image row by one load of eight bytes, interpolation of
// all channels (vectorised). In a row both coordinates are monotone in x, after every rounding too; so the pixels that
// touch the image are one span, those with all four neighbours inside are one span within it, and only what lies
// between the two needs a test per neighbour.

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed pixels are read as little-endian words");

constexpr int kPiece = 256;  // pixels: 9 KiB, and 4 KiB for the columns
constexpr int kFixed = 1024; // opencv4: coordinates count 1/1024 px ...
constexpr int kSteps = 32;   // ... and are then rounded to 1/32 px
// Coordinates are clamped to +-kFar before they become int32. Images end at 2^20 px = kFar / kFixed: still outside.
constexpr double kFar = 1 << 30;
constexpr int64_t kFarBytes = int64_t(1) << 31; // gathers take int32; images beyond are addressed pixel by pixel

struct Piece {
  alignas(64) int32_t ix[kPiece], iy[kPiece]; // top left neighbour
  alignas(64) uint32_t at[kPiece];            // its first byte in the image, modulo 2^32
  alignas(64) float fx[kPiece], fy[kPiece];   // fractions
  // Taps of the upper and of the lower image row, eight bytes per pixel: three of the left neighbour, three of the
  // right one `step` bytes on, anything in the others.
  alignas(64) uint32_t upper[2 * kPiece], lower[2 * kPiece];
};

struct Columns {
  alignas(64) double x[kPiece], y[kPiece]; // what a column adds to the source coordinates
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

// What column x adds to the source coordinates of a pixel. cv::warpAffine rounds it to 1/1024 px, row terms likewise,
// and their sum to 1/32 px, for which half a step is added to the row term.
template <bool opencv4> inline double column_term(double step, double x) {
  return opencv4 ? round_even(step * x * kFixed) : step * x;
}

template <bool opencv4> inline double row_term(const double *inverse_row, double y) {
  const double term = inverse_row[1] * y + inverse_row[2];
  return opencv4 ? round_even(term * kFixed) + kFixed / kSteps / 2 : term;
}

template <bool opencv4> inline void column_terms(const double *inverse, int64_t x0, int count, Columns &columns) {
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const double x = double(int32_t(x0) + i);
    columns.x[i] = column_term<opencv4>(inverse[0], x);
    columns.y[i] = column_term<opencv4>(inverse[3], x);
  }
}

// Whole part and fraction of a source coordinate.
template <bool opencv4> inline int32_t whole(double source, float &fraction) {
  const int32_t steps = int32_t(source); // toward zero
  if (opencv4) {                         // 1/1024 px
    fraction = float(steps >> 5 & (kSteps - 1)) * (1.0f / kSteps);
    return steps >> 10;
  }
#if defined(__SSE4_1__) || defined(__aarch64__) // one instruction
  const double below = __builtin_floor(source);
#else
  const double below = steps - (source < steps);
#endif
  fraction = float(source - below);
  return int32_t(below);
}

template <bool opencv4, int step, bool near>
inline void coordinates(const Columns &columns, double base_x, double base_y, int64_t stride, int count, Piece &p) {
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    const double x = columns.x[i] + base_x, y = columns.y[i] + base_y;
    const int32_t ix = whole<opencv4>(near ? x : clamp_far(x), p.fx[i]);
    const int32_t iy = whole<opencv4>(near ? y : clamp_far(y), p.fy[i]);
    p.ix[i] = ix;
    p.iy[i] = iy;
    p.at[i] = uint32_t(iy) * uint32_t(stride) + uint32_t(ix) * step;
  }
}

// The coordinates of another row, for a crop that is not rotated: its rows differ in y alone, the pixels of a row in x.
template <bool opencv4> inline void move_to_row(double base_y, int64_t stride, int count, Piece &p) {
  float fy;
  const int32_t iy = whole<opencv4>(clamp_far(base_y), fy);
  const uint32_t bytes = (uint32_t(iy) - uint32_t(p.iy[0])) * uint32_t(stride);
#pragma omp simd
  for (int i = 0; i < count; ++i) {
    p.iy[i] = iy;
    p.at[i] += bytes;
    p.fy[i] = fy;
  }
}

// Both taps of one image row, zeros for those outside.
template <int step> inline void gather_tested(const CropArgs &a, int64_t x, int64_t y, uint32_t *taps) {
  uint8_t bytes[8] = {};
  if (y >= 0 && y < a.image_h)
    for (int i = 0; i < 2; ++i)
      if (x + i >= 0 && x + i < a.image_w)
        memcpy(bytes + step * i, a.image + y * a.image_stride + (x + i) * step, 3);
  memcpy(taps, bytes, 8);
}

inline bool touches(const CropArgs &a, int32_t x, int32_t y) {
  return x >= -1 && x < a.image_w && y >= -1 && y < a.image_h;
}

inline bool inside(const CropArgs &a, int32_t x, int32_t y) {
  return x >= 0 && x < a.image_w - 1 && y >= 0 && y < a.image_h - 1;
}

// The taps of pixels begin..end - 1, all of them inside.
inline void gather_inside(const CropArgs &a, int begin, int end, Piece &p) {
  const uint8_t *upper_row = a.image, *lower_row = a.image + a.image_stride;
#ifdef __AVX512F__
  for (int i = begin; i < end; i += 8) {
    const __mmask8 here = end - i < 8 ? (1 << (end - i)) - 1 : 255;
    const __m256i at = _mm256_maskz_loadu_epi32(here, p.at + i);
    const __m512i upper = _mm512_mask_i32gather_epi64(__m512i{}, here, at, upper_row, 1);
    const __m512i lower = _mm512_mask_i32gather_epi64(__m512i{}, here, at, lower_row, 1);
    _mm512_mask_storeu_epi64(p.upper + 2 * i, here, upper);
    _mm512_mask_storeu_epi64(p.lower + 2 * i, here, lower);
  }
#else
  for (int i = begin; i < end; ++i) {
    uint64_t upper, lower;
    memcpy(&upper, upper_row + p.at[i], 8);
    memcpy(&lower, lower_row + p.at[i], 8);
    // Through general registers: collected in vectors they would queue for the one port that inserts.
    __asm__("" : "+r"(upper), "+r"(lower));
    memcpy(p.upper + 2 * i, &upper, 8);
    memcpy(p.lower + 2 * i, &lower, 8);
  }
#endif
}

// Fills the taps of pixels begin..end - 1, which become the span that touches the image.
template <int step> inline void gather(const CropArgs &a, int count, Piece &p, int &begin, int &end) {
  for (begin = 0; begin < count && !touches(a, p.ix[begin], p.iy[begin]);)
    ++begin;
  for (end = count; end > begin && !touches(a, p.ix[end - 1], p.iy[end - 1]);)
    --end;
  int inner_begin = begin, inner_end = end;
  while (inner_begin < end && !inside(a, p.ix[inner_begin], p.iy[inner_begin]))
    ++inner_begin;
  while (inner_end > inner_begin && !inside(a, p.ix[inner_end - 1], p.iy[inner_end - 1]))
    --inner_end;

  // Eight bytes would overrun the image where the taps end with its last pixel; a row that may go there is tested
  // throughout.
  const auto highest = [&](const int32_t *v) {
    return v[inner_begin] > v[inner_end - 1] ? v[inner_begin] : v[inner_end - 1];
  };
  const int64_t last = (a.image_h - 2) * a.image_stride + (a.image_w - 1) * step + 3 - 8;
  if (inner_begin < inner_end && highest(p.iy) * a.image_stride + highest(p.ix) * step > last)
    inner_end = inner_begin;
  if (a.image_h * a.image_stride > kFarBytes)
    inner_end = inner_begin;

  const auto tested = [&](int from, int to) {
    for (int i = from; i < to; ++i) {
      gather_tested<step>(a, p.ix[i], p.iy[i], p.upper + 2 * i);
      gather_tested<step>(a, p.ix[i], int64_t(p.iy[i]) + 1, p.lower + 2 * i);
    }
  };
  const auto zero = [&](int i) { p.upper[2 * i] = p.upper[2 * i + 1] = p.lower[2 * i] = p.lower[2 * i + 1] = 0; };
  tested(begin, inner_begin);
  gather_inside(a, inner_begin, inner_end, p);
  tested(inner_end, end);

  // Whole vectors for the interpolation.
  while (begin % kLanes)
    zero(--begin);
  while (end < count && end % kLanes)
    zero(end++);
}

// Byte `index` of the eight at `taps`.
inline float tap(const uint32_t *taps, int index) { return float(int32_t(taps[index / 4] >> (8 * (index % 4)) & 255)); }

template <bool opencv4, int step> inline float interpolate(const Piece &p, int i, int c) {
  const float fx = p.fx[i], fy = p.fy[i];
  const float a = tap(p.upper + 2 * i, c), b = tap(p.upper + 2 * i, c + step);
  const float d = tap(p.lower + 2 * i, c), e = tap(p.lower + 2 * i, c + step);
  const float top = a + fx * (b - a), bottom = d + fx * (e - d), grey = top + fy * (bottom - top);
  // Fractions in 1/32 make whole multiples of 1/1024, exact in float; + 0.5 and truncation is OpenCV's rounding.
  return opencv4 ? float(int32_t(grey + 0.5f)) : grey;
}

template <bool opencv4, int step>
inline void interpolate(const CropArgs &a, const Piece &p, int begin, int end, float *const *rows) {
  float *out0 = rows[0], *out1 = rows[1], *out2 = rows[2];
  const float s0 = a.scale[0], s1 = a.scale[1], s2 = a.scale[2], b0 = a.bias[0], b1 = a.bias[1], b2 = a.bias[2];
#pragma omp simd
  for (int i = begin; i < end; ++i) {
    out0[i] = interpolate<opencv4, step>(p, i, 0) * s0 + b0;
    out1[i] = interpolate<opencv4, step>(p, i, 1) * s1 + b1;
    out2[i] = interpolate<opencv4, step>(p, i, 2) * s2 + b2;
  }
}

// Pixels x..x + count - 1 of row y, as planes of floats, to where they belong in `image` of the output.
template <class T>
inline void store_row(const CropArgs &a, int64_t image, int64_t y, int64_t x, int count, bool mirrored,
                      const float *const *rows) {
  const int64_t step = a.channels_last ? 3 : 1, plane = a.channels_last ? 1 : a.h * a.w;
  T *row = static_cast<T *>(a.out) + image * 3 * a.h * a.w + y * a.w * step;
  for (int c = 0; c < 3; ++c, row += plane) {
    const float *from = rows[c];
    if (a.channels_last && mirrored)
      for (int i = 0; i < count; ++i)
        scalar::store(row + 3 * (a.w - 1 - x - i), from[i]);
    else if (a.channels_last)
      for (int i = 0; i < count; ++i)
        scalar::store(row + 3 * (x + i), from[i]);
    else if (mirrored)
#pragma omp simd
      for (int i = 0; i < count; ++i)
        scalar::store(row + a.w - x - count + i, from[count - 1 - i]);
    else
#pragma omp simd
      for (int i = 0; i < count; ++i)
        scalar::store(row + x + i, from[i]);
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

// Rows y0..y1 - 1 of crop n.
template <bool opencv4, int step> inline void crop_rows(const CropArgs &a, int64_t n, int64_t y0, int64_t y1) {
  Piece p;
  Columns columns;
  alignas(64) float buffer[3][kPiece];
  const bool at_once = !a.bf16 && !a.channels_last;
  double inverse[6] = {};
  invert_affine(a.transforms + n * 6, inverse); // crop_fwd has seen that it can be
  const bool upright = inverse[1] == 0 && inverse[3] == 0;
  for (int64_t x0 = 0; x0 < a.w; x0 += kPiece) {
    const int count = a.w - x0 < kPiece ? int(a.w - x0) : kPiece;
    column_terms<opencv4>(inverse, x0, count, columns);
    for (int64_t y = y0; y < y1; ++y) {
      const double base_x = row_term<opencv4>(inverse, double(y)), base_y = row_term<opencv4>(inverse + 3, double(y));
      const auto near = [&](double x, double y) { return clamp_far(x) == x && clamp_far(y) == y; };
      if (upright && y > y0)
        move_to_row<opencv4>(base_y, a.image_stride, count, p);
      else if (near(columns.x[0] + base_x, columns.y[0] + base_y) &&
               near(columns.x[count - 1] + base_x, columns.y[count - 1] + base_y))
        coordinates<opencv4, step, true>(columns, base_x, base_y, a.image_stride, count, p);
      else
        coordinates<opencv4, step, false>(columns, base_x, base_y, a.image_stride, count, p);
      int begin, end;
      gather<step>(a, count, p, begin, end);
      float *rows[3];
      for (int c = 0; c < 3; ++c)
        rows[c] = at_once ? static_cast<float *>(a.out) + ((n * 3 + c) * a.h + y) * a.w + x0 : buffer[c];
      interpolate<opencv4, step>(a, p, begin, end, rows);
      for (int c = 0; c < 3; ++c) {
        const float outside = 0.0f * a.scale[c] + a.bias[c];
        for (int i = 0; i < begin; ++i)
          rows[c][i] = outside;
        for (int i = end; i < count; ++i)
          rows[c][i] = outside;
      }
      const auto store = [&](int64_t image, bool mirrored) {
        a.bf16 ? store_row<scalar::BFloat16>(a, image, y, x0, count, mirrored, rows)
               : store_row<float>(a, image, y, x0, count, mirrored, rows);
      };
      if (!at_once)
        store(n, false);
      if (a.mirror)
        store(n + a.n, true);
    }
  }
}

template <bool opencv4> inline void crop_rows(const CropArgs &a, int64_t n, int64_t y0, int64_t y1) {
  a.image_step == 3 ? crop_rows<opencv4, 3>(a, n, y0, y1) : crop_rows<opencv4, 4>(a, n, y0, y1);
}

int64_t crop_fwd(const CropArgs &a) {
  double inverse[6];
  for (int64_t n = 0; n < a.n; ++n)
    if (!invert_affine(a.transforms + n * 6, inverse))
      return n;
  split(a.n * a.h, a.threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t n = begin / a.h, y0 = begin % a.h, y1 = a.h - y0 < end - begin ? a.h : y0 + end - begin;
      a.opencv4 ? crop_rows<true>(a, n, y0, y1) : crop_rows<false>(a, n, y0, y1);
      begin += y1 - y0;
    }
  });
  return -1;
}
