// Winograd's F(T x T, 3 x 3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"), T = 2 or 4: a tile
// of (T + 2)^2 pixels becomes as many factors per channel, whose products with those of the weights, summed over the
// channels, become T^2 outputs. 36 products for 16 outputs (T = 4) or 16 for 4 (T = 2) instead of 9 each. It rounds
// differently from the direct way, and an infinity becomes NaN in its neighbours too.
template <int T> struct Winograd {
  static constexpr int kSide = T + 2, kProducts = kSide * kSide, kOutputs = T * T;
  // Tiles at a time: whole register tiles, while factors and products of them and of 128 channels fit L2.
  static constexpr int kChunk = T == 4 ? 24 : 48;
  // Values from one factor of a tile to the next: a cache line more than the tiles need, so that the factors of a tile,
  // which are stored and loaded together, lie in different sets of L1.
  static constexpr int64_t plane(int64_t channels) { return kChunk * channels + kLine / int64_t(sizeof(float)); }
  // What the transforms of a tile cost, in channels of its products.
  static constexpr int kTransforms = 12;
};

// s[0], s[step], ... to B^T s and A^T s. Points 0, 1, -1, 2, -2 and infinity for T = 4, the first three and infinity
// for T = 2.
template <int T> inline void transform_input(const Vec *s, int step, Vec *out, int out_step) {
  const Vec s1 = s[step], s2 = s[2 * step], s3 = s[3 * step];
  if constexpr (T == 2) {
    out[0] = s[0] - s2, out[out_step] = s1 + s2, out[2 * out_step] = s2 - s1, out[3 * out_step] = s3 - s1;
  } else {
    const Vec two = broadcast(2), four = broadcast(4), minus_four = broadcast(-4), minus_five = broadcast(-5);
    const Vec s4 = s[4 * step];
    out[0] = fma(four, s[0], fma(minus_five, s2, s4));
    const Vec a = fma(minus_four, s2, s4), b = fma(minus_four, s1, s3);
    out[out_step] = a + b, out[2 * out_step] = a - b;
    const Vec c = s4 - s2, e = two * (s3 - s1);
    out[3 * out_step] = c + e, out[4 * out_step] = c - e;
    out[5 * out_step] = fma(four, s1, fma(minus_five, s3, s[5 * step]));
  }
}
template <int T> inline void transform_output(const Vec *s, int step, Vec *out, int out_step) {
  const Vec p = s[step] + s[2 * step], m = s[step] - s[2 * step];
  if constexpr (T == 2) {
    out[0] = s[0] + p, out[out_step] = m + s[3 * step];
  } else {
    const Vec q = s[3 * step] + s[4 * step], n = s[3 * step] - s[4 * step];
    out[0] = s[0] + p + q;
    out[out_step] = fma(broadcast(2), n, m);
    out[2 * out_step] = fma(broadcast(4), q, p);
    out[3 * out_step] = fma(broadcast(8), n, m) + s[5 * step];
  }
}

// kLanes channels from `c` on of one tile: its pixels to factors, which lie `plane` values apart.
template <int T>
__attribute__((noinline)) void winograd_input(const float *const *pixels, int64_t c, float *out, int64_t plane) {
  constexpr int kSide = Winograd<T>::kSide;
  Vec half[Winograd<T>::kProducts];
#pragma GCC unroll 6
  for (int x = 0; x < kSide; ++x) {
    Vec column[kSide];
#pragma GCC unroll 6
    for (int y = 0; y < kSide; ++y)
      column[y] = load(pixels[y * kSide + x] + c);
    transform_input<T>(column, 1, half + x, kSide);
  }
#pragma GCC unroll 6
  for (int y = 0; y < kSide; ++y) {
    Vec row[kSide];
    transform_input<T>(half + y * kSide, 1, row, 1);
#pragma GCC unroll 6
    for (int x = 0; x < kSide; ++x)
      store(out + (y * kSide + x) * plane, row[x]);
  }
}

// kLanes channels from `c` on of one tile: products to out[i] = [relu] (bias + residual[i] + ...), i one of the T x T
// pixels; residual may be null.
template <int T>
__attribute__((noinline)) void winograd_output(const float *in, int64_t plane, int64_t c, const float *bias,
                                               const float *const *residual, float *const *out, bool rectify) {
  constexpr int kSide = Winograd<T>::kSide;
  Vec half[T * kSide];
#pragma GCC unroll 6
  for (int x = 0; x < kSide; ++x) {
    Vec column[kSide];
#pragma GCC unroll 6
    for (int y = 0; y < kSide; ++y)
      column[y] = load(in + (y * kSide + x) * plane + c);
    transform_output<T>(column, 1, half + x, kSide);
  }
  const Vec offset = load(bias + c);
#pragma GCC unroll 4
  for (int y = 0; y < T; ++y) {
    Vec row[T];
    transform_output<T>(half + y * kSide, 1, row, 1);
#pragma GCC unroll 4
    for (int x = 0; x < T; ++x) {
      const int i = y * T + x;
      Vec value = row[x] + offset;
      if (residual)
        value = value + load(residual[i] + c);
      store(out[i] + c, rectify ? relu(value) : value);
    }
  }
}

// The products of `tiles` tiles: factors (kProducts, plane(in)) times weights, a panelled (in, out_channels) for each.
template <int T>
void winograd_products(const float *factors, const float *weights, float *products, int tiles, int64_t in,
                       int64_t out_channels, const Fetch *fetch = nullptr) {
  constexpr int kChunk = Winograd<T>::kChunk;
  const float *rows[kChunk];
  float *outs[kChunk];
  for (int t = 0; t < tiles; ++t)
    rows[t] = factors + t * in, outs[t] = products + t * out_channels;
  for (int i = 0; i < Winograd<T>::kProducts; ++i) {
    const Term<float> term = {rows, i * Winograd<T>::plane(in), in, weights + i * in * out_channels};
    const int64_t offset = i * Winograd<T>::plane(out_channels);
    const bool last = i + 1 == Winograd<T>::kProducts;
    product<float>({&term, 1, nullptr, nullptr, outs, offset, out_channels, false, nullptr, last ? fetch : nullptr}, tiles);
  }
}
