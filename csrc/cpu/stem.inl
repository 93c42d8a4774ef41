// The first layers of a network: a k x k convolution of an image of three channels, k odd, padding k / 2, batch norm
// folded in, ReLU, and a 3x3 max-pooling of stride 2 and padding 1 if wanted:
//
//     out = [pool] relu (W * image + b)
//
// The k taps of a row lie side by side in NHWC, so a convolution row is a product of k terms of 3 k values each, which
// zero weights may fill up to `depth`; for that the image is copied with zeros around it. Reads the copy k / stride
// times, from the cache, and writes only what leaves the pooling: two rows of the convolution at a time, and the one
// before them, stay in the cache. Workers take images, or shares of the rows.

// The largest of values that have been through ReLU, of kChannels channels or as many as are left. NaN stays NaN.
template <class T> struct Largest {
  static constexpr int kChannels = kLanes;
  Vec value = {};

  explicit Largest(int64_t) {}
  void take(const T *from) {
    const Vec next = load(from);
    value = (next > value) | (next != next) ? next : value;
  }
  void put(T *to) const { store(to, value); }
};

#ifdef __AVX512BF16__
// Without their sign they are ordered like whole numbers, NaN above all.
template <> struct Largest<Bf16> {
  static constexpr int kChannels = 32;
  __m512i value = _mm512_setzero_si512();
  __mmask32 left;

  explicit Largest(int64_t channels) : left(channels < kChannels ? 0xffff : 0xffffffff) {} // a multiple of 16
  void take(const Bf16 *from) {
    const __m512i next = _mm512_slli_epi16(_mm512_maskz_loadu_epi16(left, from), 1);
    value = _mm512_max_epu16(value, next);
  }
  void put(Bf16 *to) const { _mm512_mask_storeu_epi16(to, left, _mm512_srli_epi16(value, 1)); }
};
#endif

template <class T> struct Stem {
  const StemArgs &args;
  int64_t conv_h, conv_w, h, w; // of the convolution, of the output
  int64_t depth, pitch;         // values of a term, of a padded row
  static constexpr int64_t kRowsAtOnce = 2;

  explicit Stem(const StemArgs &a)
      : args(a), conv_h(ceil_div(a.h, a.stride)), conv_w(ceil_div(a.w, a.stride)),
        h(a.pool ? ceil_div(conv_h, 2) : conv_h), w(a.pool ? ceil_div(conv_w, 2) : conv_w), depth(a.depth),
        pitch((a.w + a.kernel) * 3 + depth) {}

  // Of a worker: padded rows of the image, rows of the convolution (those at once and the one before), see Product.
  int64_t image_bytes() const { return lines<T>((args.h + args.kernel) * pitch); }
  int64_t conv_bytes() const { return lines<T>(args.pool ? (kRowsAtOnce + 1) * conv_w * args.out_channels : 0); }
  int64_t bytes() const { return image_bytes() + conv_bytes() + kAmxRows * lines<T>(args.kernel * depth); }

  // Rows first .. first + count of an image, row 0 being `reach` above it, to `padded` with zeros around them.
  void pad(const T *image, int64_t first, int64_t count, T *padded) const {
    const int64_t reach = args.kernel / 2;
    for (int64_t i = 0; i < count; ++i) {
      T *to = padded + i * pitch;
      const int64_t y = first + i - reach;
      if (y < 0 || y >= args.h) {
        std::memset(to, 0, size_t(pitch) * sizeof(T));
        continue;
      }
      const T *from = image + y * args.stride_h;
      std::memset(to, 0, size_t(3 * reach) * sizeof(T));
      to += 3 * reach;
      const int64_t sw = args.stride_w, sc = args.stride_c, values = 3 * args.w;
      if (sc == 1 && sw == 3)
        std::memcpy(to, from, size_t(values) * sizeof(T));
      else
        for (int64_t x = 0; x < args.w; ++x)
          to[3 * x] = from[x * sw], to[3 * x + 1] = from[x * sw + sc], to[3 * x + 2] = from[x * sw + 2 * sc];
      std::memset(to + values, 0, size_t(pitch - 3 * reach - values) * sizeof(T));
    }
  }

  // Rows of the convolution whose taps begin at `padded`, to out[0 .. count].
  void convolve(const T *padded, int64_t count, T *const *out, T *spare) const {
    const int64_t pixels = count * conv_w, strips = count_strips<T>(pixels, 1);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t begin = part_begin(pixels, strips, strip), end = part_begin(pixels, strips, strip + 1);
      const T *rows[kStrip<T>];
      T *outs[kStrip<T>];
      int64_t y = begin / conv_w, x = begin % conv_w;
      for (int64_t i = begin; i < end; ++i) {
        rows[i - begin] = padded + y * args.stride * pitch + x * args.stride * 3;
        outs[i - begin] = out[y] + x * args.out_channels;
        if (++x == conv_w)
          x = 0, ++y;
      }
      Term<T> terms[kMaxKernel];
      for (int64_t k = 0; k < args.kernel; ++k)
        terms[k] = {rows, k * pitch, depth, static_cast<const T *>(args.weights) + k * depth * args.out_channels};
      product<T>({terms, int(args.kernel), args.bias, nullptr, outs, 0, args.out_channels, true, spare},
                 int(end - begin));
    }
  }

  // An output row: the largest of up to three rows of the convolution and of three columns.
  void pool(const T *const *rows, int count, T *out) const {
    const int64_t c = args.out_channels;
    for (int64_t x = 0; x < w; ++x) {
      const int64_t begin = x ? 2 * x - 1 : 0, end = 2 * x + 2 < conv_w ? 2 * x + 2 : conv_w;
      for (int64_t channel = 0; channel < c; channel += Largest<T>::kChannels) {
        Largest<T> largest(c - channel);
        for (int64_t col = begin; col < end; ++col)
          for (int row = 0; row < count; ++row)
            largest.take(rows[row] + col * c + channel);
        largest.put(out + x * c + channel);
      }
    }
  }

  // Output rows begin .. end of image n.
  void run(int64_t n, int64_t begin, int64_t end, char *memory) const {
    T *const padded = reinterpret_cast<T *>(memory), *const convs = reinterpret_cast<T *>(memory + image_bytes());
    T *const spare = reinterpret_cast<T *>(memory + image_bytes() + conv_bytes());
    T *const out = static_cast<T *>(args.out) + n * h * w * args.out_channels;
    // Rows of the convolution: with pooling 2 y - 1, 2 y and 2 y + 1 meet in output row y.
    const int64_t first = args.pool ? (begin ? 2 * begin - 1 : 0) : begin;
    const int64_t last = args.pool ? (2 * end < conv_h ? 2 * end : conv_h) : end;
    pad(static_cast<const T *>(args.x) + n * args.stride_n, first * args.stride,
        (last - first - 1) * args.stride + args.kernel, padded);
    const auto taps = [&](int64_t y) { return padded + (y - first) * args.stride * pitch; };
    if (!args.pool) {
      for (int64_t y = begin; y < end; y += kRowsAtOnce) {
        T *const rows[kRowsAtOnce] = {out + y * w * args.out_channels, out + (y + 1) * w * args.out_channels};
        convolve(taps(y), end - y < kRowsAtOnce ? end - y : kRowsAtOnce, rows, spare);
      }
      return;
    }
    const auto slot = [&](int64_t y) { return convs + y % 3 * conv_w * args.out_channels; };
    if (first < 2 * begin) {
      T *const before = slot(first);
      convolve(taps(first), 1, &before, spare);
    }
    for (int64_t y = begin; y < end; ++y) {
      T *const fresh[kRowsAtOnce] = {slot(2 * y), slot(2 * y + 1)};
      convolve(taps(2 * y), 2 * y + 1 < conv_h ? 2 : 1, fresh, spare);
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
