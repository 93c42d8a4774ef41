// Winograd's F(T x T, 3 x 3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks"), T = 2 or 4: a tile
// of (T + 2)^2 pixels becomes as many factors per channel, whose products with those of the weights, summed over the
// channels, become T^2 outputs. 36 products for 16 outputs (T = 4) or 16 for 4 (T = 2) instead of 9 each. It rounds
// differently from the direct way, and an infinity becomes NaN in its neighbours too.
template <int T> struct Winograd {
  static constexpr int kSide = T + 2, kProducts = kSide * kSide, kOutputs = T * T;
  static constexpr int kMostTiles = 48; // at a time: whole register tiles
  // As many that their factors, and the products for a panel of outputs, leave room in L2. Where the weights do not fit
  // L2 anyway, they are read once for more tiles.
  static constexpr int64_t tiles(int64_t in) { return T == 2 || in >= 128 ? kMostTiles : kMostTiles / 2; }
  // Values from one factor of a tile to the next: a cache line more than the tiles need, so that the factors of a tile,
  // which are stored and loaded together, lie in different sets of L1.
  static constexpr int64_t plane(int64_t in, int64_t channels) {
    return tiles(in) * channels + kLine / int64_t(sizeof(float));
  }
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

// kLanes channels of one tile: products, `plane` values apart, to out[i][c] = [relu] (bias[c] + residual[i][c] + ...),
// i one of the T x T pixels; residual may be null.
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
      column[y] = load(in + (y * kSide + x) * plane);
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

// What Winograd's way needs of a convolution: panels of weights [out / kPanel][kProducts][in][kPanel].
struct WinogradLayer {
  const float *weights, *bias;
  int64_t in, out;
  bool rectify;
};

// The second half of the way: factors (kProducts, plane) of some tiles, times weights, to the outputs of each tile; a
// panel of outputs at a time, with its `products` (kProducts, plane). residual may be null.
template <int T>
void winograd_tiles(const WinogradLayer &layer, const float *factors, float *products, int tiles,
                    const float *const (*residual)[T * T], float *const (*out)[T * T], const Fetch *fetch) {
  constexpr int kProducts = Winograd<T>::kProducts;
  const int64_t in_plane = Winograd<T>::plane(layer.in, layer.in), plane = Winograd<T>::plane(layer.in, kPanel);
  const float *rows[Winograd<T>::kMostTiles], *weights = layer.weights;
  float *sums[Winograd<T>::kMostTiles];
  for (int t = 0; t < tiles; ++t)
    rows[t] = factors + t * layer.in, sums[t] = products + t * kPanel;
  for (int64_t panel = 0; panel < layer.out; panel += kPanel) {
    const int64_t width = layer.out - panel < kPanel ? layer.out - panel : kPanel;
    for (int i = 0; i < kProducts; ++i, weights += layer.in * width) {
      const Term<float> term = {rows, i * in_plane, layer.in, weights};
      const bool last = i + 1 == kProducts && panel + width == layer.out;
      product<float>({&term, 1, nullptr, nullptr, sums, i * plane, width, false, nullptr, last ? fetch : nullptr},
                     tiles);
    }
    for (int t = 0; t < tiles; ++t)
      for (int64_t c = 0; c < width; c += kLanes)
        winograd_output<T>(sums[t] + c, plane, panel + c, layer.bias, residual ? residual[t] : nullptr, out[t],
                           layer.rectify);
  }
}
