// A chain of residual bottlenecks, NHWC, batch norm folded into weights and biases. With y0 = relu(W1_0 x + b1_0):
//
//     z = relu(W2_i * y_i + b2_i)          3x3, dilation d_i, in block 0 with stride
//     x = relu(shortcut(x) + W3_i z + b3_i)          that of block 0 with stride, and perhaps a 1x1 projection
//     y_i+1 = relu(W1_i+1 x + b1_i+1)
//
// One stage per block: a strip of pixels goes through all three lines while z and the new x are in the cache. Only y is
// read across pixels, so it alternates between two buffers and one barrier per stage is enough; x is updated in place
// in `out`. Reads and writes per pixel and block: 2 x `mid` and 2 x `out` values; every weight once per strip.
//
// 3x3 directly: pixels are grouped by the taps that fall inside the map, at most 3 x 3 rectangles; other taps are
// skipped, not multiplied by zeros. Or by Winograd's way (winograd.inl) on the d x d sub-grids of pixels that a dilated
// convolution never mixes, where that saves products.
//
// Workers take whole images while there is one for each; the strips of the images left over are handed out one by one.

using Tiles = Winograd<4>; // of the 3x3

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

// The order in which the pixels of a rectangle are taken: along lines of `length` pixels, which are rows, or columns if
// `down`. AMX reads a tile of rows as they are if these lie at equal distances, as do all pixels if the rows are `whole`
// rows of the map; else they are copied: `pitch` fills lines up to whole tiles with what lies behind them, if that is
// little. Of columns, tiles side by side follow one another: the pixels of a whole column meet in few sets of L1.
struct Order {
  bool down;
  int64_t length, pitch, count; // of lines
  int64_t unit;                 // pixels that one does not part

  Order(const Span &rows, const Span &cols, bool tiled, bool whole) : down(false) {
    const int64_t height = rows.end - rows.begin, width = cols.end - cols.begin;
    const auto filled = [](int64_t n) { return ceil_div(n, kTileRows) * kTileRows; };
    down = tiled && !whole && filled(height) * width < filled(width) * height;
    length = down ? height : width, count = down ? width : height;
    pitch = tiled && !whole && 3 * filled(length) <= 4 * length ? filled(length) : length;
    unit = tiled && pitch % kTileRows == 0 ? kTileRows : 1;
  }
  static constexpr int64_t kTileRows = 16;

  // All pixels of a map with margins.
  Order(int64_t w, int64_t pitch_of_map, int64_t h)
      : down(false), length(w), pitch(pitch_of_map), count(h), unit(kTileRows) {}

  int64_t pixels() const { return pitch * count; } // with those that fill lines up
  struct Place {
    int64_t line, at; // in it
  };
  int64_t run() const { return down && unit > 1 ? unit : pitch; } // pixels of a line that follow one another
  Place place(int64_t index) const {
    const int64_t runs = index / run();
    return {runs % count, runs / count * run() + index % run()};
  }
  void advance(Place &place) const {
    if (++place.at % run())
      return;
    if (++place.line < count)
      place.at -= run();
    else
      place.line = 0;
  }
};

template <class T> struct Block {
  const T *w1, *w2, *w3;
  const float *b1, *b2, *b3;
  const float *u;      // w2 in Winograd's domain, 36 matrices (mid, mid); null where the direct way is cheaper
  const T *projection; // of the shortcut, null for the identity
  int64_t in, dilation, stride, in_h, in_w;
  int64_t margin, pitch, first; // of y, see Chain::margin: pixels of zeros, from line to line, before pixel (0, 0)
};

// One image on its way through the chain.
template <class T> struct Image {
  const T *x; // (in_h, in_w, in): input of block 0
  T *out;     // (h, w, out): x of all later blocks
  T *y[2];    // block i reads y[i % 2] and writes the other one
};

// What one worker needs for itself.
template <class T> struct Scratch {
  T *z;                      // (strip or 16 kMostTiles, mid): outputs of the 3x3
  float *factors, *products; // of Winograd's tiles, see winograd_tiles
  const float *zeros;        // (mid): a pixel outside the map
  T *spare;                  // see Product
};

// An output pixel and where its values are.
template <class T> struct Pixel {
  const T *z, *x; // x: of the shortcut
  T *out, *y;     // y: the next one
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
    b.u = winograd_pays(b) ? args.winograd + index * Tiles::kProducts * mid * mid : nullptr;
    b.margin = margin(b), b.pitch = b.in_w + b.margin, b.first = b.margin * (b.pitch + 1);
    return b;
  }

  // AMX reads y with zeros around it, as many as the dilation behind each line and lines of them above and below: then all
  // pixels of the map are one run, and every tap is inside. Where that adds much to the map the pixels are grouped.
  static int64_t margin(const Block<T> &b) {
    const bool little = 4 * b.dilation <= b.in_w && 4 * b.dilation <= b.in_h;
    return kAmxRows && sizeof(T) < sizeof(float) && b.stride == 1 && little ? b.dilation : 0;
  }
  // Pixels of y in memory.
  static int64_t room(const Block<T> &b) { return b.in_h * b.pitch + 2 * b.first; }

  // Writes the zeros of the y that block `index` will read, or this worker's share of them.
  void clear_margin(const Image<T> &image, int64_t index, int rank, int workers) const {
    if (index == args.blocks)
      return;
    const Block<T> b = block(index);
    const auto clear = [&](int64_t begin, int64_t end) {
      std::memset(image.y[index % 2] + begin * args.mid, 0, size_t((end - begin) * args.mid) * sizeof(T));
    };
    if (!b.margin)
      return;
    if (!rank) {
      clear(0, b.first);
      clear(b.first + b.in_h * b.pitch, room(b));
    }
    const int64_t end = part_begin(b.in_h, workers, rank + 1);
    for (int64_t row = part_begin(b.in_h, workers, rank); row < end; ++row)
      clear(b.first + row * b.pitch + b.in_w, b.first + (row + 1) * b.pitch);
  }

  // Are Winograd's products fewer than those of the taps inside the map?
  bool winograd_pays(const Block<T> &b) const {
    if (!args.winograd || b.stride != 1)
      return false;
    Span rows[3], cols[3];
    const int64_t taps =
        sum_taps(rows, spans(h, h, 1, b.dilation, rows)) * sum_taps(cols, spans(w, w, 1, b.dilation, cols));
    return tiles_of(b.dilation) * Tiles::kProducts * (args.mid + Tiles::kTransforms) < taps * args.mid;
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
  int64_t tiles_of(int64_t d) const { return origins(h, d) * origins(w, d); }

  // y_0 of pixels begin .. end; those after them follow `ahead` pixels later.
  void head(const Image<T> &image, const Block<T> &b, const Scratch<T> &scratch, int64_t begin, int64_t end,
            int64_t ahead) const {
    const T *x[kStrip<T>];
    const void *later[kStrip<T>];
    T *y[kStrip<T>];
    Fetch fetch = {later, 0, b.in * int64_t(sizeof(T))};
    int64_t row = begin / args.w, col = begin % args.w;
    for (int64_t i = begin; i < end; ++i) {
      x[i - begin] = image.x + i * b.in;
      y[i - begin] = image.y[0] + (b.first + row * b.pitch + col) * args.mid;
      if (++col == args.w)
        col = 0, ++row;
      if (i + ahead < args.h * args.w)
        later[fetch.count++] = image.x + (i + ahead) * b.in;
    }
    const Term<T> term = {x, 0, b.in, b.w1};
    product<T>({&term, 1, b.b1, nullptr, y, 0, args.mid, true, scratch.spare, &fetch}, int(end - begin));
  }

  Pixel<T> pixel(const Image<T> &image, int64_t index, const Block<T> &b, const Block<T> *next, const T *z, int64_t y,
                 int64_t x) const {
    T *const out = image.out + (y * w + x) * args.out_channels;
    const T *const shortcut = index ? out : image.x + (y * b.in_w + x) * b.stride * b.in;
    T *const after = image.y[(index + 1) % 2];
    return {z, shortcut, out, next ? after + (next->first + y * next->pitch + x) * args.mid : nullptr};
  }

  // Second and third line of the equation: x and the next y of up to a strip of pixels whose z is known. `next` is null
  // for the last block. Fetches the shortcuts of as many pixels `later`, which may be null.
  void up_down(const Block<T> &b, const Block<T> *next, const Scratch<T> &scratch, const Pixel<T> *pixels, int count,
               const Pixel<T> *later, int later_count) const {
    const T *z[kStrip<T>], *x[kStrip<T>], *out[kStrip<T>];
    const void *rows[kStrip<T>];
    T *updated[kStrip<T>], *y[kStrip<T>];
    for (int i = 0; i < count; ++i) {
      z[i] = pixels[i].z, x[i] = pixels[i].x, y[i] = pixels[i].y;
      out[i] = updated[i] = pixels[i].out;
    }
    for (int i = 0; i < later_count; ++i)
      rows[i] = later[i].x;
    const Fetch fetch = {rows, later_count, b.in * int64_t(sizeof(T))};
    const Term<T> up[2] = {{z, 0, args.mid, b.w3}, {x, 0, b.in, b.projection}};
    product<T>({up, b.projection ? 2 : 1, b.b3, b.projection ? nullptr : x, updated, 0, args.out_channels, true,
                scratch.spare, &fetch},
               count);
    if (next) {
      const Term<T> down = {out, 0, args.out_channels, next->w1};
      product<T>({&down, 1, next->b1, nullptr, y, 0, args.mid, true, scratch.spare}, count);
    }
  }

  // All lines of the equation for pixels begin .. end of a rectangle in which every pixel has the same taps.
  void direct(const Image<T> &image, int64_t index, const Block<T> &b, const Block<T> *next, const Scratch<T> &scratch,
              const Span &rows, const Span &cols, const Order &order, int64_t begin, int64_t end) const {
    Pixel<T> pixels[kStrip<T>];
    const T *y[kStrip<T>];
    const void *x[kStrip<T>];
    T *z[kStrip<T>];
    const int64_t mid = args.mid;
    int used = 0, dropped = 0;
    Order::Place place = order.place(begin);
    for (int64_t i = begin; i < end; ++i, order.advance(place)) {
      const auto [line, at] = place;
      const int64_t row = rows.begin + (order.down ? at : line), col = cols.begin + (order.down ? line : at);
      const bool inside = at < order.length; // else its z is not looked at, and lies behind the others
      z[i - begin] = scratch.z + (inside ? used : end - begin - ++dropped) * mid;
      y[i - begin] = image.y[index % 2] + (b.first + (row * b.pitch + col) * b.stride) * mid;
      if (inside) {
        pixels[used] = pixel(image, index, b, next, z[i - begin], row, col);
        x[used] = pixels[used].x, ++used;
      }
    }
    Term<T> taps[9];
    int count = 0;
    for (int ky = rows.lower ? -1 : 0; ky <= rows.upper; ++ky)
      for (int kx = cols.lower ? -1 : 0; kx <= cols.upper; ++kx)
        taps[count++] = {y, (ky * b.pitch + kx) * b.dilation * mid, mid, b.w2 + (3 * ky + kx + 4) * mid * mid};
    const Fetch fetch = {x, used, b.in * int64_t(sizeof(T))};
    product<T>({taps, count, b.b2, nullptr, z, 0, mid, true, scratch.spare, &fetch}, int(end - begin));
    up_down(b, next, scratch, pixels, used, nullptr, 0);
  }

  // All lines for Winograd's tiles first .. last, at most as many as are done at a time.
  void winograd(const Image<T> &image, int64_t index, const Block<T> &b, const Block<T> *next,
                const Scratch<T> &scratch, int64_t first, int64_t last) const {
    const int64_t mid = args.mid, d = b.dilation, across = origins(w, d), plane = Tiles::plane(mid, mid);
    const int tiles = int(last - first);
    for (int t = 0; t < tiles; ++t) {
      const int64_t y0 = origin((first + t) / across, d), x0 = origin((first + t) % across, d);
      const float *taps[Tiles::kProducts];
      for (int i = 0; i < Tiles::kProducts; ++i) {
        const int64_t y = y0 + (i / Tiles::kSide - 1) * d, x = x0 + (i % Tiles::kSide - 1) * d;
        const bool inside = y >= 0 && y < h && x >= 0 && x < w;
        taps[i] = inside ? image.y[index % 2] + (y * w + x) * mid : scratch.zeros;
      }
      for (int64_t c = 0; c < mid; c += kLanes)
        winograd_input<4>(taps, c, scratch.factors + t * mid + c, plane);
    }
    // The pixels of all tiles line by line, and where each tile's values go: pixels d apart, as those of one tile are,
    // would meet in few sets of L1.
    Pixel<T> pixels[Tiles::kMostTiles * Tiles::kOutputs];
    float *outs[Tiles::kMostTiles][Tiles::kOutputs];
    float *const outside = scratch.z + (Tiles::kMostTiles * Tiles::kOutputs - 1) * mid; // free if any pixel is
    int count = 0;
    for (int64_t row = first / across; row <= (last - 1) / across; ++row) {
      const int64_t begin = row * across < first ? first % across : 0;
      const int64_t end = (row + 1) * across > last ? last - row * across : across, top = origin(row, d);
      for (int i = 0; i < 4; ++i)
        for (int64_t group = begin / d; group <= (end - 1) / d; ++group)
          for (int j = 0; j < 4; ++j)
            for (int64_t col = group * d < begin ? begin : group * d; col < end && col < (group + 1) * d; ++col) {
              const int64_t y = top + i * d, x = col + (3 * group + j) * d;
              const bool inside = y < h && x < w;
              float *const z = inside ? scratch.z + count * mid : outside;
              outs[row * across + col - first][4 * i + j] = z;
              if (inside)
                pixels[count++] = pixel(image, index, b, next, z, y, x);
            }
    }
    const auto strip = [&](int begin) { return count - begin < kStrip<T> ? count - begin : kStrip<T>; };
    const void *rows[kStrip<T>];
    for (int i = 0; i < strip(0); ++i)
      rows[i] = pixels[i].x;
    const Fetch fetch = {rows, strip(0), b.in * int64_t(sizeof(T))};
    winograd_tiles<4>({b.u, b.b2, mid, mid, true}, scratch.factors, scratch.products, tiles, nullptr, outs, &fetch);
    for (int begin = 0; begin < count; begin += kStrip<T>) {
      const int later = begin + strip(begin);
      up_down(b, next, scratch, pixels + begin, strip(begin), pixels + later, strip(later));
    }
  }

  // Stage `index` of an image: its head for -1, else a block. Workers draw strips from `ticket`.
  void stage(const Image<T> &image, int64_t index, const Scratch<T> &scratch, int rank, int workers,
             int64_t *ticket) const {
    clear_margin(image, index + 1, rank, workers);
    int64_t mine = take(ticket), begun = 0; // strip numbers: drawn last, before this rectangle
    if (index < 0) {
      const Block<T> b = block(0);
      const int64_t pixels = args.h * args.w, strips = count_strips<T>(pixels, workers);
      for (; mine < strips; mine = take(ticket))
        head(image, b, scratch, part_begin(pixels, strips, mine), part_begin(pixels, strips, mine + 1),
             workers * ceil_div(pixels, strips));
      return;
    }
    const Block<T> b = block(index), after = block(index + 1 < args.blocks ? index + 1 : index);
    const Block<T> *next = index + 1 < args.blocks ? &after : nullptr;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (b.u) {
        const int64_t tiles = tiles_of(b.dilation);
        const int64_t chunks = ceil_div(ceil_div(tiles, Tiles::tiles(args.mid)), workers) * workers;
        for (; mine < chunks; mine = take(ticket)) {
          const int64_t first = part_begin(tiles, chunks, mine), last = part_begin(tiles, chunks, mine + 1);
          if (first < last)
            winograd(image, index, b, next, scratch, first, last);
        }
        return;
      }
    }
    Span rows[3] = {{0, h, true, true}}, cols[3] = {{0, w, true, true}};
    const int row_spans = b.margin ? 1 : spans(b.in_h, h, b.stride, b.dilation, rows);
    const int col_spans = b.margin ? 1 : spans(b.in_w, w, b.stride, b.dilation, cols);
    for (int i = 0; i < row_spans * col_spans; ++i) {
      const Span &r = rows[i / col_spans], &c = cols[i % col_spans];
      const bool whole = c.end - c.begin == w && b.stride == 1;
      const Order order = b.margin ? Order(w, b.pitch, h) : Order(r, c, kAmxRows && sizeof(T) < sizeof(float), whole);
      const int64_t unit = order.unit, units = ceil_div(order.pixels(), unit);
      const int64_t strips = count_strips<T>(units * unit, workers);
      for (; mine < begun + strips; mine = take(ticket)) {
        const int64_t begin = part_begin(units, strips, mine - begun) * unit;
        const int64_t end = part_begin(units, strips, mine - begun + 1) * unit;
        if (begin < end)
          direct(image, index, b, next, scratch, r, c, order, begin, end < order.pixels() ? end : order.pixels());
      }
      begun += strips;
    }
  }
};

// Where things lie in the workspace; `base` null only measures it. Each region begins at a cache line.
template <class T> struct Workspace {
  int64_t *tickets; // one line each: (threads, blocks + 1)
  int *arrived;
  int64_t shared, y_first, y_both, y_all; // bytes: of the above, of y[0], of both, of all workers'
  int64_t z, factors, products, zeros;    // bytes: of a worker's z, Winograd's planes, zeros
  int64_t scratch;                        // bytes: all of a worker's
  int64_t bytes;
  bool whole_images; // does every worker have a y of its own?
  char *base;

  Workspace(const BottlenecksArgs &a, char *memory) : base(memory) {
    const Chain<T> chain(a);
    whole_images = a.n >= a.threads;
    shared = (1 + a.threads * (a.blocks + 1)) * kLine;
    int64_t pixels[2] = {0, 0};
    for (int64_t index = 0; index < a.blocks; ++index) {
      const int64_t room = Chain<T>::room(chain.block(index));
      pixels[index % 2] = pixels[index % 2] > room ? pixels[index % 2] : room;
    }
    y_first = lines<T>(pixels[0] * a.mid) + kLine; // a line apart, so that equal pixels of both miss each other in L1
    y_both = y_first + lines<T>(pixels[1] * a.mid) + kLine;
    y_all = (whole_images ? a.threads : 1) * y_both;
    constexpr int64_t tiled = Tiles::kOutputs * Tiles::kMostTiles;
    z = lines<T>((a.winograd && tiled > kStrip<T> ? tiled : kStrip<T>) * a.mid);
    factors = a.winograd ? lines<float>(Tiles::kProducts * Tiles::plane(a.mid, a.mid)) : 0;
    products = a.winograd ? lines<float>(Tiles::kProducts * Tiles::plane(a.mid, kPanel)) : 0;
    zeros = lines<float>(a.mid);
    const int64_t deepest = 9 * a.mid + a.in_channels + a.out_channels;
    scratch = z + factors + products + zeros + kAmxRows * lines<T>(deepest);
    bytes = shared + y_all + a.threads * scratch;
    if (kAmxRows) // behind the last line of a map, see Order
      bytes += lines<T>(Order::kTileRows * a.stride * a.w * a.mid);
    arrived = reinterpret_cast<int *>(base);
    tickets = reinterpret_cast<int64_t *>(base + kLine);
  }
  Scratch<T> scratch_of(int rank) const {
    char *const own = base + shared + y_all + rank * scratch, *const planes = own + z;
    char *const zero = planes + factors + products;
    std::memset(zero, 0, size_t(zeros));
    return {reinterpret_cast<T *>(own), reinterpret_cast<float *>(planes), reinterpret_cast<float *>(planes + factors),
            reinterpret_cast<float *>(zero), reinterpret_cast<T *>(zero + zeros)};
  }
  T *y_of(int buffer, int which) const {
    return reinterpret_cast<T *>(base + shared + buffer * y_both + which * y_first);
  }
};

template <class T> void run_bottlenecks(const BottlenecksArgs &args) {
  const Chain<T> chain(args);
  const Workspace<T> space(args, static_cast<char *>(args.workspace));
  std::memset(args.workspace, 0, size_t(space.shared));
  team(args.threads, [&](int rank, int workers) {
    const AmxTiles<T> tiles;
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
        chain.stage(image(n, rank), index, scratch, 0, 1, &ticket);
      }
    int meetings = 0;
    int64_t *ticket = space.tickets;
    if (whole && whole < args.n)
      meet(space.arrived, workers * ++meetings); // worker 0's y is shared from here on
    for (int64_t n = whole; n < args.n; ++n)
      for (int64_t index = -1; index < args.blocks; ++index, ticket += kLine / sizeof(int64_t)) {
        chain.stage(image(n, 0), index, scratch, rank, workers, ticket);
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
