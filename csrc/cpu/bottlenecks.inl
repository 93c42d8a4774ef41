// A chain of residual bottlenecks, NHWC, batch norm folded into weights and biases. With y0 = relu(W1_0 x + b1_0):
//
//     z = relu(W2_i * y_i + b2_i)          3x3, dilation d_i, in block 0 with stride
//     x = relu(shortcut(x) + W3_i z + b3_i)          the shortcut of block 0 may be a 1x1 projection
//     y_i+1 = relu(W1_i+1 x + b1_i+1)
//
// One stage per block: a strip of pixels goes through all three lines while z and the new x are in the cache. Only y is
// read across pixels, so it alternates between two buffers and one barrier per stage is enough; x is updated in place
// in `out`. Reads and writes per pixel and block: 2 x `mid` and 2 x `out` values; every weight once per strip.
//
// 3x3 directly: pixels are grouped by the taps that fall inside the map, at most 3 x 3 rectangles; other taps are
// skipped, not multiplied by zeros. Or by Winograd's F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional
// Neural Networks") on the d x d sub-grids of pixels that a dilated convolution never mixes: 36 products for 16 pixels
// instead of up to 144. It rounds differently, an infinity becomes NaN in its neighbours too, and it is taken where it
// saves products.
//
// Products run in register tiles (vec.h) of pixels x outputs; bf16 maps with AMX in its tiles. Weights lie in panels of
// kPanel outputs, [outputs / kPanel][inputs][kPanel], the last one of half the width where outputs are no multiple of
// kPanel; bf16 ones in pairs of inputs, [outputs / kPanel][inputs / 2][kPanel][2]. Sums and biases are float always.
//
// Workers take whole images while there is one for each; the strips of the images left over are handed out one by one.

constexpr int kPanel = 32; // outputs: the columns of AVX-512's register tile
#ifdef __AMX_BF16__
constexpr int kAmxRows = 32; // rows of a product at a time in AMX's tiles
constexpr int kTiles = 8;    // 96 pixels, three times kAmxRows
#else
constexpr int kAmxRows = 0;
constexpr int kTiles = 4; // register tiles per strip: weights are read from L2 once for all of them
#endif
constexpr int kStrip = kTiles * kRows;
constexpr int kChunk = 24;      // Winograd tiles at a time: 2 register tiles, and 36 x 2 x 24 x mid values fit L2
constexpr int kProducts = 36;   // of a Winograd tile of 4 x 4 pixels, per pair of channels
constexpr int kTransforms = 12; // what the transforms of a tile cost, in channels of its products
constexpr int kSpins = 2000;    // about 50 us: longer than strips take, shorter than a slice of the scheduler
constexpr int64_t kLine = 64;   // bytes: a cache line

// sum over terms: rows[i][offset ...] times weights, i a row of the product.
template <class T> struct Term {
  const T *const *rows;
  int64_t offset, k;
  const T *weights;
};

// out[i] = [relu] (bias + residual[i] + terms); bias and residual may be null.
template <class T> struct Product {
  const Term<T> *terms;
  int count;
  const float *bias;
  const T *const *residual;
  T *const *out;
  int64_t offset, width; // of out: first column, columns
  bool rectify;
  T *spare; // room for kAmxRows rows of all terms
};

// Rows row .. row + M and columns col .. col + V vectors of a product, in a panel of P columns.
template <int M, int V, int P, class T>
__attribute__((noinline)) void product_tile(const Product<T> &p, int row, int64_t col) {
  const int64_t panel = col / kPanel * kPanel;
  Vec sum[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      sum[i][v] = p.bias ? load(p.bias + col + v * kLanes) : Vec{};
  for (const Term<T> *term = p.terms; term < p.terms + p.count; ++term) {
    const T *a[M];
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
      a[i] = term->rows[row + i] + term->offset;
    // One pointer into the weights: with twelve rows and k, no more registers are left.
    const T *b = term->weights + panel * term->k + col % kPanel * kDepth<T>;
    for (int64_t k = 0, count = term->k; k < count; k += 4 * kDepth<T>)
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step, b += P * kDepth<T>) {
        decltype(load_weights(b)) weights[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          weights[v] = load_weights(b + v * kLanes * kDepth<T>);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
          const auto value = broadcast_inputs(a[i] + k + step * kDepth<T>);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v)
            sum[i][v] = multiply_add(value, weights[v], sum[i][v]);
        }
      }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      if (p.residual) // last: rounded once to the precision of the large sum, not at every step
        sum[i][v] = sum[i][v] + load(p.residual[row + i] + col + v * kLanes);
      store(p.out[row + i] + p.offset + col + v * kLanes, p.rectify ? relu(sum[i][v]) : sum[i][v]);
    }
}

template <int M, class T> void product_rows(const Product<T> &p, int row, int rows, int64_t col) {
  if constexpr (M > 1)
    if (rows < M)
      return product_rows<M - 1>(p, row, rows, col);
  constexpr int kHalf = kVecs < kPanel / 2 / kLanes ? kVecs : kPanel / 2 / kLanes;
  if (col / kPanel * kPanel + kPanel <= p.width)
    product_tile<M, kVecs, kPanel, T>(p, row, col);
  else if constexpr (M > kRows / 2) { // half panels are rare: not worth all the tiles' time to compile
    product_rows<kRows / 2>(p, row, kRows / 2, col);
    product_rows<M - kRows / 2>(p, row + kRows / 2, M - kRows / 2, col);
  } else
    product_tile<M, kHalf, kPanel / 2, T>(p, row, col);
}

// Part `index` of `parts` equal parts of 0..total begins here.
inline int64_t part_begin(int64_t total, int64_t parts, int64_t index) { return total * index / parts; }

#ifdef __AMX_BF16__
// The product on AMX's tiles: sums of 32 rows x 32 columns in tiles 0 to 3, inputs in 4 and 5, weights in 6 and 7.
constexpr int kAmx = kAmxRows / 2; // rows of a tile

// Where the kAmx rows of a term lie, `stride` bytes apart.
struct Rows {
  const Bf16 *first;
  int64_t stride;
};

// Rows `row` .. `row` + `count` - 1 of a term as they are if they are a full tile at equal distances, as pixels of one
// line of the map are; else copied to `spare`, what lies beyond `count` being of no account.
inline Rows amx_rows(const Term<Bf16> &term, int row, int count, Bf16 *spare) {
  const Bf16 *const *rows = term.rows + row;
  bool equal = count == kAmx;
  for (int i = 2; i < count; ++i)
    equal = equal && rows[i] - rows[i - 1] == rows[1] - rows[0];
  if (equal)
    return {rows[0] + term.offset, (rows[1] - rows[0]) * int64_t(sizeof(Bf16))};
  for (int i = 0; i < count; ++i)
    std::memcpy(spare + i * term.k, rows[i] + term.offset, size_t(term.k) * sizeof(Bf16));
  return {spare, term.k * int64_t(sizeof(Bf16))};
}

// Sums of a tile of kAmx x kPanel / 2 to `out`.
inline void amx_finish(const Product<Bf16> &p, int row, int count, int64_t col, const float *sums) {
  for (int i = 0; i < count; ++i) {
    Vec sum = load(sums + i * kLanes) + load(p.bias + col);
    if (p.residual)
      sum = sum + load(p.residual[row + i] + col);
    store(p.out[row + i] + p.offset + col, p.rectify ? relu(sum) : sum);
  }
}

inline void product_amx(const Product<Bf16> &p, int rows) {
  alignas(64) float sums[4][kAmx * kLanes];
  constexpr int64_t kStep = 2 * kAmx, kWeights = 2 * kPanel * sizeof(Bf16), kSums = kLanes * sizeof(float);
  for (int row = 0; row < rows; row += 2 * kAmx) {
    const int upper = rows - row < kAmx ? rows - row : kAmx, both = rows - row < 2 * kAmx ? rows - row : 2 * kAmx;
    const int lower = both - upper;
    Rows a[10], b[10];
    Bf16 *spare = p.spare;
    for (int i = 0; i < p.count; ++i, spare += kStep * p.terms[i - 1].k) {
      a[i] = amx_rows(p.terms[i], row, upper, spare);
      b[i] = lower ? amx_rows(p.terms[i], row + kAmx, lower, spare + kAmx * p.terms[i].k) : a[i];
    }
    // GCC's tile loads do not say that they read memory: what they read must be written by here.
    __asm__ volatile("" ::: "memory");
    for (int64_t col = 0; col < p.width; col += kPanel) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int i = 0; i < p.count; ++i) {
        const Term<Bf16> &term = p.terms[i];
        const Bf16 *weights = term.weights + col * term.k;
        for (int64_t k = 0; k < term.k; k += kStep, weights += kStep * kPanel) {
          _tile_loadd(6, weights, kWeights);
          _tile_loadd(7, weights + kPanel, kWeights);
          _tile_loadd(4, a[i].first + k, a[i].stride);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          if (lower) {
            _tile_loadd(5, b[i].first + k, b[i].stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
      _tile_stored(0, sums[0], kSums);
      _tile_stored(1, sums[1], kSums);
      amx_finish(p, row, upper, col, sums[0]);
      amx_finish(p, row, upper, col + kLanes, sums[1]);
      if (lower) {
        _tile_stored(2, sums[2], kSums);
        _tile_stored(3, sums[3], kSums);
        amx_finish(p, row + kAmx, lower, col, sums[2]);
        amx_finish(p, row + kAmx, lower, col + kLanes, sums[3]);
      }
    }
  }
}

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16]; // of a row
  uint8_t rows[16];
};
constexpr TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// Sets up the tiles of this thread for the lifetime of the object: eight of 16 rows x 64 bytes.
template <bool wanted> struct AmxTiles {
  AmxTiles() {
    if (wanted)
      _tile_loadconfig(&kTileConfig);
  }
  ~AmxTiles() {
    if (wanted)
      _tile_release();
  }
};
#endif

// Columns outermost, so that a panel of weights stays in L1 while all rows pass.
template <class T> void product(const Product<T> &p, int rows) {
#ifdef __AMX_BF16__
  if constexpr (sizeof(T) == sizeof(Bf16)) {
    bool fits = p.width % kPanel == 0;
    for (int i = 0; i < p.count; ++i)
      fits = fits && p.terms[i].k % (2 * kAmx) == 0;
    if (fits)
      return product_amx(p, rows);
  }
#endif
  const int tiles = (rows + kRows - 1) / kRows;
  for (int64_t col = 0; col < p.width; col += kVecs * kLanes)
    for (int t = 0; t < tiles; ++t) {
      const int row = int(part_begin(rows, tiles, t));
      product_rows<kRows>(p, row, int(part_begin(rows, tiles, t + 1)) - row, col);
    }
}

// Outputs begin .. end of one axis, whose lower and upper tap are inside or outside together.
struct Span {
  int64_t begin, end;
  bool lower, upper;
};

inline int spans(int64_t in_size, int64_t size, int64_t stride, int64_t dilation, Span *out) {
  int64_t lower = (dilation + stride - 1) / stride; // the first output whose lower tap is inside ...
  int64_t upper = in_size > dilation ? (in_size - dilation + stride - 1) / stride : 0; // ... first with no upper tap
  lower = lower < size ? lower : size;
  upper = upper < size ? upper : size;
  const int64_t a = lower < upper ? lower : upper, b = lower < upper ? upper : lower;
  const int64_t edges[4] = {0, a, b, size};
  int count = 0;
  for (int i = 0; i < 3; ++i)
    if (edges[i] < edges[i + 1])
      out[count++] = {edges[i], edges[i + 1], edges[i] >= lower, edges[i] < upper};
  return count;
}

// B^T s and A^T s of F(4, 3) with the points 0, 1, -1, 2, -2 and infinity.
inline void transform_input(const Vec *s, int step, Vec *out, int out_step) {
  const Vec two = broadcast(2), four = broadcast(4), minus_four = broadcast(-4), minus_five = broadcast(-5);
  const Vec s1 = s[step], s2 = s[2 * step], s3 = s[3 * step], s4 = s[4 * step];
  out[0] = fma(four, s[0], fma(minus_five, s2, s4));
  const Vec a = fma(minus_four, s2, s4), b = fma(minus_four, s1, s3);
  out[out_step] = a + b, out[2 * out_step] = a - b;
  const Vec c = s4 - s2, e = two * (s3 - s1);
  out[3 * out_step] = c + e, out[4 * out_step] = c - e;
  out[5 * out_step] = fma(four, s1, fma(minus_five, s3, s[5 * step]));
}
inline void transform_output(const Vec *s, int step, Vec *out, int out_step) {
  const Vec p = s[step] + s[2 * step], m = s[step] - s[2 * step];
  const Vec q = s[3 * step] + s[4 * step], n = s[3 * step] - s[4 * step];
  out[0] = s[0] + p + q;
  out[out_step] = fma(broadcast(2), n, m);
  out[2 * out_step] = fma(broadcast(4), q, p);
  out[3 * out_step] = fma(broadcast(8), n, m) + s[5 * step];
}

// kLanes channels from `c` on of one tile: 6 x 6 pixels to 36 factors, 36 products to 4 x 4 pixels.
__attribute__((noinline)) void winograd_input(const float *const *taps, int64_t c, float *out, int64_t plane) {
  Vec half[36];
#pragma GCC unroll 6
  for (int x = 0; x < 6; ++x) {
    Vec column[6];
#pragma GCC unroll 6
    for (int y = 0; y < 6; ++y)
      column[y] = load(taps[y * 6 + x] + c);
    transform_input(column, 1, half + x, 6);
  }
#pragma GCC unroll 6
  for (int y = 0; y < 6; ++y) {
    Vec row[6];
    transform_input(half + y * 6, 1, row, 1);
#pragma GCC unroll 6
    for (int x = 0; x < 6; ++x)
      store(out + (y * 6 + x) * plane, row[x]);
  }
}
__attribute__((noinline)) void winograd_output(const float *in, int64_t plane, Vec bias, float *out, int64_t mid) {
  Vec half[24];
#pragma GCC unroll 6
  for (int x = 0; x < 6; ++x) {
    Vec column[6];
#pragma GCC unroll 6
    for (int y = 0; y < 6; ++y)
      column[y] = load(in + (y * 6 + x) * plane);
    transform_output(column, 1, half + x, 6);
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    Vec row[4];
    transform_output(half + y * 6, 1, row, 1);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x)
      store(out + (y * 4 + x) * mid, relu(row[x] + bias));
  }
}

template <class T> struct Block {
  const T *w1, *w2, *w3;
  const float *b1, *b2, *b3;
  const float *u;      // w2 in Winograd's domain, 36 matrices (mid, mid); null where the direct way is cheaper
  const T *projection; // of the shortcut, null for the identity
  int64_t in, dilation, stride, in_h, in_w;
};

// One image on its way through the chain.
template <class T> struct Image {
  const T *x; // (in_h, in_w, in): input of block 0
  T *out;     // (h, w, out): x of all later blocks
  T *y[2];    // block i reads y[i % 2] and writes the other one
};

// What one worker needs for itself.
template <class T> struct Scratch {
  T *z;                     // (strip or 16 kChunk, mid): outputs of the 3x3
  float *inputs, *products; // (36, kChunk, mid): of Winograd's products
  const float *zeros;       // (mid): a pixel outside the map
  T *spare;                 // see Product
};

// Some output pixels and their z.
template <class T> struct Pixels {
  const T *z[kStrip];
  int64_t y[kStrip], x[kStrip];
  int count = 0;
};

template <class T> struct Chain {
  const BottlenecksArgs &args;
  int64_t h, w; // of the output

  explicit Chain(const BottlenecksArgs &a)
      : args(a), h((a.h + a.stride - 1) / a.stride), w((a.w + a.stride - 1) / a.stride) {}

  Block<T> block(int64_t index) const {
    const int64_t mid = args.mid, out = args.out_channels, in = index ? out : args.in_channels;
    const int64_t first = args.in_channels * mid + 9 * mid * mid + mid * out, later = 2 * out * mid + 9 * mid * mid;
    const T *weights = static_cast<const T *>(args.weights) + (index ? first + (index - 1) * later : 0);
    const float *biases = args.biases + index * (2 * mid + out);
    Block<T> b;
    b.w1 = weights, b.w2 = b.w1 + in * mid, b.w3 = b.w2 + 9 * mid * mid;
    b.b1 = biases, b.b2 = b.b1 + mid, b.b3 = b.b2 + mid;
    b.projection = !index && args.project ? weights + first + (args.blocks - 1) * later : nullptr;
    b.in = in, b.dilation = args.dilations[index], b.stride = index ? 1 : args.stride;
    b.in_h = index ? h : args.h, b.in_w = index ? w : args.w;
    b.u = winograd_pays(b) ? args.winograd + index * kProducts * mid * mid : nullptr;
    return b;
  }

  // Are Winograd's products fewer than those of the taps inside the map?
  bool winograd_pays(const Block<T> &b) const {
    if (!args.winograd || b.stride != 1)
      return false;
    Span rows[3], cols[3];
    const int64_t taps =
        sum_taps(rows, spans(h, h, 1, b.dilation, rows)) * sum_taps(cols, spans(w, w, 1, b.dilation, cols));
    return winograd_tiles(b.dilation) * kProducts * (args.mid + kTransforms) < taps * args.mid;
  }
  static int64_t sum_taps(const Span *span, int count) {
    int64_t taps = 0;
    for (int i = 0; i < count; ++i)
      taps += (span[i].end - span[i].begin) * (1 + span[i].lower + span[i].upper);
    return taps;
  }

  // Where Winograd's tiles begin along an axis: every d-th pixel belongs to the same sub-grid, four of them to a tile.
  static int64_t origins(int64_t size, int64_t d) {
    const int64_t rest = size % (4 * d);
    return size / (4 * d) * d + (rest < d ? rest : d);
  }
  static int64_t origin(int64_t index, int64_t d) { return index / d * 4 * d + index % d; }
  int64_t winograd_tiles(int64_t d) const { return origins(h, d) * origins(w, d); }

  // y_0 of pixels begin .. end.
  void head(const Image<T> &image, const Block<T> &b, const Scratch<T> &scratch, int64_t begin, int64_t end) const {
    const T *x[kStrip];
    T *y[kStrip];
    for (int64_t i = begin; i < end; ++i) {
      x[i - begin] = image.x + i * b.in;
      y[i - begin] = image.y[0] + i * args.mid;
    }
    const Term<T> term = {x, 0, b.in, b.w1};
    product<T>({&term, 1, b.b1, nullptr, y, 0, args.mid, true, scratch.spare}, int(end - begin));
  }

  // Second and third line of the equation: x and the next y of pixels whose z is known. `next` is null for the last.
  void up_down(const Image<T> &image, int64_t index, const Block<T> &b, const Block<T> *next, const Scratch<T> &scratch,
               const Pixels<T> &pixels) const {
    const T *x[kStrip], *out[kStrip];
    T *updated[kStrip], *y[kStrip];
    for (int i = 0; i < pixels.count; ++i) {
      const int64_t at = pixels.y[i] * w + pixels.x[i];
      out[i] = updated[i] = image.out + at * args.out_channels;
      x[i] = index ? out[i] : image.x + (pixels.y[i] * b.in_w + pixels.x[i]) * b.stride * b.in;
      y[i] = image.y[(index + 1) % 2] + at * args.mid;
    }
    const Term<T> up[2] = {{pixels.z, 0, args.mid, b.w3}, {x, 0, b.in, b.projection}};
    product<T>({up, b.projection ? 2 : 1, b.b3, b.projection ? nullptr : x, updated, 0, args.out_channels, true,
                scratch.spare},
               pixels.count);
    if (next) {
      const Term<T> down = {out, 0, args.out_channels, next->w1};
      product<T>({&down, 1, next->b1, nullptr, y, 0, args.mid, true, scratch.spare}, pixels.count);
    }
  }

  // All lines for pixels begin .. end of a rectangle in which every pixel has the same taps.
  void direct(const Image<T> &image, int64_t index, const Block<T> &b, const Block<T> *next, const Scratch<T> &scratch,
              const Span &rows, const Span &cols, int64_t begin, int64_t end) const {
    Pixels<T> pixels;
    const T *y[kStrip];
    T *z[kStrip];
    const int64_t mid = args.mid, width = cols.end - cols.begin;
    for (int64_t i = begin; i < end; ++i) {
      const int at = pixels.count++;
      pixels.y[at] = rows.begin + i / width, pixels.x[at] = cols.begin + i % width;
      pixels.z[at] = z[at] = scratch.z + at * mid;
      y[at] = image.y[index % 2] + (pixels.y[at] * b.in_w + pixels.x[at]) * b.stride * mid;
    }
    Term<T> taps[9];
    int count = 0;
    for (int ky = rows.lower ? -1 : 0; ky <= rows.upper; ++ky)
      for (int kx = cols.lower ? -1 : 0; kx <= cols.upper; ++kx)
        taps[count++] = {y, (ky * b.in_w + kx) * b.dilation * mid, mid, b.w2 + (3 * ky + kx + 4) * mid * mid};
    product<T>({taps, count, b.b2, nullptr, z, 0, mid, true, scratch.spare}, pixels.count);
    up_down(image, index, b, next, scratch, pixels);
  }

  // All lines for Winograd's tiles first .. last, at most kChunk of them.
  void winograd(const Image<T> &image, int64_t index, const Block<T> &b, const Block<T> *next,
                const Scratch<T> &scratch, int64_t first, int64_t last) const {
    const int64_t mid = args.mid, d = b.dilation, across = origins(w, d), plane = kChunk * mid;
    const int tiles = int(last - first);
    const float *rows[kChunk];
    float *outs[kChunk];
    for (int t = 0; t < tiles; ++t) {
      const int64_t y0 = origin((first + t) / across, d), x0 = origin((first + t) % across, d);
      const float *taps[kProducts];
      for (int i = 0; i < kProducts; ++i) {
        const int64_t y = y0 + (i / 6 - 1) * d, x = x0 + (i % 6 - 1) * d;
        const bool inside = y >= 0 && y < h && x >= 0 && x < w;
        taps[i] = inside ? image.y[index % 2] + (y * w + x) * mid : scratch.zeros;
      }
      for (int64_t c = 0; c < mid; c += kLanes)
        winograd_input(taps, c, scratch.inputs + t * mid + c, plane);
      rows[t] = scratch.inputs + t * mid, outs[t] = scratch.products + t * mid;
    }
    for (int i = 0; i < kProducts; ++i) {
      const Term<float> term = {rows, i * plane, mid, b.u + i * mid * mid};
      product<float>({&term, 1, nullptr, nullptr, outs, i * plane, mid, false, nullptr}, tiles);
    }
    Pixels<T> pixels;
    for (int t = 0; t < tiles; ++t) {
      const int64_t y0 = origin((first + t) / across, d), x0 = origin((first + t) % across, d);
      float *z = scratch.z + t * 16 * mid;
      for (int64_t c = 0; c < mid; c += kLanes)
        winograd_output(outs[t] + c, plane, load(b.b2 + c), z + c, mid);
      for (int i = 0; i < 16; ++i) {
        const int64_t y = y0 + i / 4 * d, x = x0 + i % 4 * d;
        if (y >= h || x >= w)
          continue;
        pixels.z[pixels.count] = z + i * mid, pixels.y[pixels.count] = y, pixels.x[pixels.count] = x;
        if (++pixels.count == kStrip) {
          up_down(image, index, b, next, scratch, pixels);
          pixels.count = 0;
        }
      }
    }
    up_down(image, index, b, next, scratch, pixels);
  }

  // Stage `index` of an image: its head for -1, else a block. Workers draw strips from `ticket`.
  void stage(const Image<T> &image, int64_t index, const Scratch<T> &scratch, int workers, int64_t *ticket) const {
    int64_t mine = take(ticket), begun = 0; // strip numbers: drawn last, before this rectangle
    if (index < 0) {
      const Block<T> b = block(0);
      const int64_t pixels = args.h * args.w, strips = count_strips(pixels, workers);
      for (; mine < strips; mine = take(ticket))
        head(image, b, scratch, part_begin(pixels, strips, mine), part_begin(pixels, strips, mine + 1));
      return;
    }
    const Block<T> b = block(index), after = block(index + 1 < args.blocks ? index + 1 : index);
    const Block<T> *next = index + 1 < args.blocks ? &after : nullptr;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (b.u) {
        const int64_t tiles = winograd_tiles(b.dilation), chunks = ceil_div(ceil_div(tiles, kChunk), workers) * workers;
        for (; mine < chunks; mine = take(ticket))
          winograd(image, index, b, next, scratch, part_begin(tiles, chunks, mine),
                   part_begin(tiles, chunks, mine + 1));
        return;
      }
    }
    Span rows[3], cols[3];
    const int row_spans = spans(b.in_h, h, b.stride, b.dilation, rows);
    const int col_spans = spans(b.in_w, w, b.stride, b.dilation, cols);
    for (int i = 0; i < row_spans * col_spans; ++i) {
      const Span &r = rows[i / col_spans], &c = cols[i % col_spans];
      const int64_t pixels = (r.end - r.begin) * (c.end - c.begin), strips = count_strips(pixels, workers);
      for (; mine < begun + strips; mine = take(ticket)) {
        const int64_t strip = mine - begun;
        direct(image, index, b, next, scratch, r, c, part_begin(pixels, strips, strip),
               part_begin(pixels, strips, strip + 1));
      }
      begun += strips;
    }
  }

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t take(int64_t *ticket) { return __atomic_fetch_add(ticket, 1, __ATOMIC_RELAXED); }
  // Full strips for one worker; shorter ones, but whole register tiles, where several must share few pixels.
  static int64_t count_strips(int64_t pixels, int workers) {
    const int64_t strips = ceil_div(pixels, kStrip), shared = ceil_div(strips, workers) * workers;
    const int64_t tiles = ceil_div(pixels, kRows);
    return shared < tiles ? shared : tiles;
  }
};

// Where things lie in the workspace; `base` null only measures it. Each region begins at a cache line.
template <class T> struct Workspace {
  int64_t *tickets; // one line each: (threads, blocks + 1)
  int *arrived;
  int64_t shared, y_first, y_both, y_all; // bytes: of the above, of y[0], of both, of all workers'
  int64_t z, planes, zeros, scratch;      // bytes: of a worker's z, Winograd's planes, zeros, and all of these
  int64_t bytes;
  bool whole_images; // does every worker have a y of its own?
  char *base;

  Workspace(const BottlenecksArgs &a, char *memory) : base(memory) {
    const Chain<T> chain(a);
    whole_images = a.n >= a.threads;
    shared = (1 + a.threads * (a.blocks + 1)) * kLine;
    y_first = lines<T>(a.h * a.w * a.mid) + kLine; // a line apart, so that equal pixels of both miss each other in L1
    y_both = y_first + lines<T>(chain.h * chain.w * a.mid) + kLine;
    y_all = (whole_images ? a.threads : 1) * y_both;
    z = lines<T>((a.winograd && 16 * kChunk > kStrip ? 16 * kChunk : kStrip) * a.mid);
    planes = a.winograd ? lines<float>(kProducts * kChunk * a.mid) : 0;
    zeros = lines<float>(a.mid);
    const int64_t deepest = 9 * a.mid + a.in_channels + a.out_channels;
    scratch = z + 2 * planes + zeros + kAmxRows * lines<T>(deepest);
    bytes = shared + y_all + a.threads * scratch;
    arrived = reinterpret_cast<int *>(base);
    tickets = reinterpret_cast<int64_t *>(base + kLine);
  }
  template <class Element> static int64_t lines(int64_t count) {
    return (count * int64_t(sizeof(Element)) + kLine - 1) / kLine * kLine;
  }
  Scratch<T> scratch_of(int rank) const {
    char *own = base + shared + y_all + rank * scratch;
    float *inputs = reinterpret_cast<float *>(own + z), *zero = reinterpret_cast<float *>(own + z + 2 * planes);
    std::memset(zero, 0, size_t(zeros));
    return {reinterpret_cast<T *>(own), inputs, reinterpret_cast<float *>(own + z + planes), zero,
            reinterpret_cast<T *>(own + z + 2 * planes + zeros)};
  }
  T *y_of(int buffer, int which) const {
    return reinterpret_cast<T *>(base + shared + buffer * y_both + which * y_first);
  }
};

// Waits until `target` arrivals. Spins for as long as the others usually need, then lets them have the core.
inline void meet(int *arrived, int target) {
  __atomic_fetch_add(arrived, 1, __ATOMIC_ACQ_REL);
  for (int spins = 0; __atomic_load_n(arrived, __ATOMIC_ACQUIRE) < target; ++spins)
    if (spins > kSpins)
      sched_yield();
#ifdef HRPOSE_X86
    else
      __builtin_ia32_pause();
#endif
}

template <class T> void run_bottlenecks(const BottlenecksArgs &args) {
  const Chain<T> chain(args);
  const Workspace<T> space(args, static_cast<char *>(args.workspace));
  std::memset(args.workspace, 0, size_t(space.shared));
  team(args.threads, [&](int rank, int workers) {
#ifdef __AMX_BF16__
    const AmxTiles<sizeof(T) == sizeof(Bf16)> tiles;
#endif
    const Scratch<T> scratch = space.scratch_of(rank);
    const auto image = [&](int64_t n, int buffer) {
      return Image<T>{static_cast<const T *>(args.x) + n * args.h * args.w * args.in_channels,
                      static_cast<T *>(args.out) + n * chain.h * chain.w * args.out_channels,
                      {space.y_of(buffer, 0), space.y_of(buffer, 1)}};
    };
    const int64_t whole = space.whole_images ? args.n / workers * workers : 0;
    for (int64_t n = rank; n < whole; n += workers)
      for (int64_t index = -1; index < args.blocks; ++index) {
        int64_t ticket = 0;
        chain.stage(image(n, rank), index, scratch, 1, &ticket);
      }
    int meetings = 0;
    int64_t *ticket = space.tickets;
    if (whole && whole < args.n)
      meet(space.arrived, workers * ++meetings); // worker 0's y is shared from here on
    for (int64_t n = whole; n < args.n; ++n)
      for (int64_t index = -1; index < args.blocks; ++index, ticket += kLine / sizeof(int64_t)) {
        chain.stage(image(n, 0), index, scratch, workers, ticket);
        meet(space.arrived, workers * ++meetings);
      }
  });
}

int64_t bottlenecks_workspace(const BottlenecksArgs &args) {
#ifdef __AVX512BF16__
  if (args.bf16)
    return Workspace<Bf16>(args, nullptr).bytes;
#endif
  return Workspace<float>(args, nullptr).bytes;
}

void bottlenecks_fwd(const BottlenecksArgs &args) {
#ifdef __AVX512BF16__
  if (args.bf16)
    return run_bottlenecks<Bf16>(args);
#endif
  run_bottlenecks<float>(args);
}
