// The first layers of a network: a k x k convolution of an image of three channels, k odd, padding k / 2, batch norm
// folded in, ReLU, and a 3x3 max-pooling of stride 2 and padding 1 if wanted:
//
//     out = [pool] relu (W * image + b)
//
// The k taps of a row lie side by side in NHWC, so a convolution row is a product of k terms of 3 k values each, which
// zero weights fill up to a multiple of `depth`; for that the rows of the image that are needed are copied with zeros
// around them. Reads the image k / stride times, from L1, and writes only what leaves the pooling: two rows of the
// convolution at a time, and the one before them, stay in the cache. Workers take images, or shares of the rows.

template <class T> struct Stem {
  const StemArgs &args;
  int64_t conv_h, conv_w, h, w; // of the convolution, of the output
  int64_t depth, pitch;         // values of a term, of a padded row
  static constexpr int64_t kRowsAtOnce = 2;

  explicit Stem(const StemArgs &a)
      : args(a), conv_h(ceil_div(a.h, a.stride)), conv_w(ceil_div(a.w, a.stride)), h(a.pool ? ceil_div(conv_h, 2) : conv_h),
        w(a.pool ? ceil_div(conv_w, 2) : conv_w), depth(a.depth), pitch((a.w + a.kernel) * 3 + depth) {}

  // Of a worker: padded rows of the image, rows of the convolution (those at once and the one before), see Product.
  int64_t image_rows() const { return (kRowsAtOnce - 1) * args.stride + args.kernel; }
  int64_t image_bytes() const { return lines<T>(image_rows() * pitch); }
  int64_t conv_bytes() const { return lines<T>(args.pool ? (kRowsAtOnce + 1) * conv_w * args.out_channels : 0); }
  int64_t bytes() const { return image_bytes() + conv_bytes() + kAmxRows * lines<T>(args.kernel * depth); }

  // Rows first .. first + count of the convolution of image n, to out[0 .. count].
  void convolve(int64_t n, int64_t first, int64_t count, T *own, T *const *out, T *spare) const {
    const int64_t reach = args.kernel / 2, used = (count - 1) * args.stride + args.kernel;
    const T *image = static_cast<const T *>(args.x) + n * args.stride_n;
    std::memset(own, 0, size_t(used * pitch) * sizeof(T));
    for (int64_t i = 0; i < used; ++i) {
      const int64_t y = first * args.stride - reach + i;
      if (y < 0 || y >= args.h)
        continue;
      T *to = own + i * pitch + reach * 3;
      for (int64_t c = 0; c < 3; ++c) {
        const T *from = image + c * args.stride_c + y * args.stride_h;
        for (int64_t x = 0; x < args.w; ++x)
          to[3 * x + c] = from[x * args.stride_w];
      }
    }
    const int64_t pixels = count * conv_w, strips = count_strips(pixels, 1);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t begin = part_begin(pixels, strips, strip), end = part_begin(pixels, strips, strip + 1);
      const T *rows[kStrip];
      T *outs[kStrip];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t y = i / conv_w, x = i % conv_w;
        rows[i - begin] = own + y * args.stride * pitch + x * args.stride * 3;
        outs[i - begin] = out[y] + x * args.out_channels;
      }
      Term<T> terms[kMaxKernel];
      for (int64_t k = 0; k < args.kernel; ++k)
        terms[k] = {rows, k * pitch, depth, static_cast<const T *>(args.weights) + k * depth * args.out_channels};
      product<T>({terms, int(args.kernel), args.bias, nullptr, outs, 0, args.out_channels, true, spare},
                 int(end - begin));
    }
  }

  static Vec larger(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; } // NaN stays NaN

  // An output row: the largest of up to three rows of the convolution and of three columns.
  void pool(const T *const *rows, int count, T *out) const {
    const int64_t c = args.out_channels;
    for (int64_t x = 0; x < w; ++x)
      for (int64_t channel = 0; channel < c; channel += kLanes) {
        Vec value = load(rows[0] + 2 * x * c + channel);
        for (int64_t col = x ? 2 * x - 1 : 0; col <= 2 * x + 1 && col < conv_w; ++col)
          for (int row = 0; row < count; ++row)
            value = larger(load(rows[row] + col * c + channel), value);
        store(out + x * c + channel, value);
      }
  }

  // Output rows begin .. end of image n.
  void run(int64_t n, int64_t begin, int64_t end, char *memory) const {
    T *const image = reinterpret_cast<T *>(memory), *const convs = reinterpret_cast<T *>(memory + image_bytes());
    T *const spare = reinterpret_cast<T *>(memory + image_bytes() + conv_bytes());
    T *const out = static_cast<T *>(args.out) + n * h * w * args.out_channels;
    if (!args.pool) {
      for (int64_t y = begin; y < end; y += kRowsAtOnce) {
        T *const rows[kRowsAtOnce] = {out + y * w * args.out_channels, out + (y + 1) * w * args.out_channels};
        convolve(n, y, end - y < kRowsAtOnce ? end - y : kRowsAtOnce, image, rows, spare);
      }
      return;
    }
    // Slot y % 3 holds row y of the convolution: 2 y - 1, 2 y and 2 y + 1 meet in output row y.
    const auto slot = [&](int64_t y) { return convs + y % 3 * conv_w * args.out_channels; };
    if (begin) {
      T *const before = slot(2 * begin - 1);
      convolve(n, 2 * begin - 1, 1, image, &before, spare);
    }
    for (int64_t y = begin; y < end; ++y) {
      T *const fresh[2] = {slot(2 * y), slot(2 * y + 1)};
      convolve(n, 2 * y, 2 * y + 1 < conv_h ? 2 : 1, image, fresh, spare);
      const T *rows[3];
      int count = 0;
      for (int64_t row = y ? 2 * y - 1 : 0; row <= 2 * y + 1 && row < conv_h; ++row)
        rows[count++] = slot(row);
      pool(rows, count, out + y * w * args.out_channels);
    }
  }
};

template <class T> void run_stem(const StemArgs &args) {
  const Stem<T> stem(args);
  char *const base = static_cast<char *>(args.workspace);
  const int64_t shares = args.n < args.threads ? args.threads : 1;
  int64_t *const ticket = reinterpret_cast<int64_t *>(base);
  *ticket = 0;
  team(args.threads, [&](int rank, int) {
    const AmxTiles<T> tiles;
    for (int64_t mine = take(ticket); mine < args.n * shares; mine = take(ticket))
      stem.run(mine / shares, part_begin(stem.h, shares, mine % shares), part_begin(stem.h, shares, mine % shares + 1),
               base + kLine + rank * stem.bytes());
  });
}

int64_t stem_workspace(const StemArgs &args) {
#ifdef __AVX512BF16__
  if (args.bf16)
    return kLine + args.threads * Stem<Bf16>(args).bytes();
#endif
  return kLine + args.threads * Stem<float>(args).bytes();
}

void stem_fwd(const StemArgs &args) {
#ifdef __AVX512BF16__
  if (args.bf16)
    return run_stem<Bf16>(args);
#endif
  run_stem<float>(args);
}
