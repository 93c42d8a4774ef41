// Matrix products of rows that lie anywhere: out = [relu] (bias + residual + sum over terms of rows x weights). A
// convolution is such a product with a term per tap. Outputs may be added to in place: residual[i] may be out[i].
//
// Register tiles (vec.h) of rows x outputs; bf16 with AMX in its tiles. Weights lie in panels of kPanel outputs,
// [outputs / kPanel][inputs][kPanel], the last one of half the width where outputs are no multiple of kPanel; bf16 ones
// in pairs of inputs, [outputs / kPanel][inputs / 2][kPanel][2]. Sums and biases are float always.

constexpr int kPanel = 32; // outputs: the columns of AVX-512's register tile
#ifdef __AMX_BF16__
constexpr int kAmxRows = 96; // rows of a product at a time in AMX's tiles
#else
constexpr int kAmxRows = 0;
#endif
constexpr int64_t kAhead = 2048; // bytes of weights that are fetched ahead: those of a layer are cold, and panels short

// Rows that a caller had best ask for at a time, and the most it may: four register tiles, or kAmxRows. Weights are
// read from L2 once for all of them.
template <class T> constexpr int kStrip = kAmxRows && sizeof(T) < sizeof(float) ? kAmxRows : 4 * kRows;

// sum over terms: rows[i][offset ...] times weights, i a row of the product.
template <class T> struct Term {
  const T *const *rows;
  int64_t offset, k;
  const T *weights;
};

// Rows that somebody will read soon: what lies in L3 or beyond takes longer to come than a register tile to compute.
struct Fetch {
  const void *const *rows;
  int count;
  int64_t bytes; // of a row, whole cache lines
};

// Spreads the rows of a Fetch, null for none, evenly over a number of calls.
class Fetcher {
public:
  Fetcher(const Fetch *fetch, int64_t calls)
      : fetch_(fetch), rows_(fetch && calls ? ceil_div(fetch->count, calls) : 0) {}
  void step() {
    for (int64_t i = 0; i < rows_ && row_ < fetch_->count; ++i, ++row_)
      for (int64_t offset = 0; offset < fetch_->bytes; offset += kLine)
        __builtin_prefetch(static_cast<const char *>(fetch_->rows[row_]) + offset, 0, 2);
  }

private:
  const Fetch *fetch_;
  int64_t rows_;
  int row_ = 0;
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
  const Fetch *fetch = nullptr;
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
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      decltype(load_weights(b)) weights[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        weights[v] = load_weights(b + v * kLanes * kDepth<T>);
        __builtin_prefetch(b + v * kLanes * kDepth<T> + kAhead / int64_t(sizeof(T)));
      }
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const auto value = broadcast_inputs(a[i] + k);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          sum[i][v] = multiply_add(value, weights[v], sum[i][v]);
      }
      b += P * kDepth<T>;
    };
    int64_t k = 0;
    for (const int64_t whole = term->k - 3 * kDepth<T>; k < whole; k += 4 * kDepth<T>) {
      step(k);
      step(k + kDepth<T>);
      step(k + 2 * kDepth<T>);
      step(k + 3 * kDepth<T>);
    }
    for (; k < term->k; k += kDepth<T>)
      step(k);
  }
  if (p.residual) // last: rounded once to the precision of the large sum, not at every step
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        sum[i][v] = sum[i][v] + load(p.residual[row + i] + col + v * kLanes);
  if (p.rectify)
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        sum[i][v] = relu(sum[i][v]);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v)
      store(p.out[row + i] + p.offset + col + v * kLanes, sum[i][v]);
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

#ifdef __AMX_BF16__
// The product on AMX's tiles: sums of 32 rows x 32 columns in tiles 0 to 3, inputs in 4 and 5, weights in 6 and 7.
constexpr int kAmx = 16; // rows of a tile
constexpr int kMostTerms = 10;

// Where the kAmx rows of a term lie, `stride` bytes apart.
struct Rows {
  const Bf16 *first;
  int64_t stride;
};

inline Rows as_they_lie(const Bf16 *const *rows, int64_t offset) {
  return {rows[0] + offset, (rows[1] - rows[0]) * int64_t(sizeof(Bf16))};
}

// Do kAmx rows lie at equal distances, as pixels of one line of the map do?
inline bool amx_equal(const Bf16 *const *rows) {
  const __m512i step = _mm512_set1_epi64((rows[1] - rows[0]) * int64_t(sizeof(Bf16)));
  const auto differ = [&](int i) {
    const __m512i distance = _mm512_sub_epi64(_mm512_loadu_si512(rows + i + 1), _mm512_loadu_si512(rows + i));
    return _mm512_cmpneq_epi64_mask(distance, step);
  };
  return !(differ(0) | differ(7)); // 15 distances
}

// How a residual is added: to rows of sums, or by the tiles, as one more term whose weights are 1 or 0. That is as
// exact and spares vectors the work, but needs full tiles of rows as they lie.
enum class Residual { none, rows, tiles };
struct Identity {
  Bf16 weights[kAmx * 2 * kPanel] = {};

  constexpr Identity() {
    for (int i = 0; i < kPanel; ++i)
      weights[i / 2 * 2 * kPanel + 2 * i + i % 2].bits = 0x3f80;
  }
};
alignas(64) constexpr Identity kIdentity;

inline Residual residual_of(const Product<Bf16> &p, int rows) {
  if (!p.residual || rows % kAmx)
    return p.residual ? Residual::rows : Residual::none;
  bool equal = true;
  for (int row = 0; row < rows; row += kAmx)
    equal = equal && amx_equal(p.residual + row);
  return equal ? Residual::tiles : Residual::rows;
}

// Rows `row` .. `row` + `count` - 1 of a term as they are if they are a full tile at `equal` distances; else copied to
// `spare`, what lies beyond `count` being of no account.
inline Rows amx_rows(const Term<Bf16> &term, int row, int count, bool equal, Bf16 *spare) {
  const Bf16 *const *rows = term.rows + row;
  if (equal)
    return as_they_lie(rows, term.offset);
  for (int i = 0; i < count; ++i)
    std::memcpy(spare + i * term.k, rows[i] + term.offset, size_t(term.k) * sizeof(Bf16));
  return {spare, term.k * int64_t(sizeof(Bf16))};
}

// Sums that left the tiles: two buffers, a line more than 4 KB apart, one read while the other is written.
struct AmxSums {
  alignas(64) float values[2][2 * kAmx * kPanel + kLanes];
};

// What becomes of the sums of a block of up to 32 rows x kPanel columns on their way to `out`. They wait until the next
// block is multiplied, some rows after each step of it: what lies side by side in a program the processor does at the
// same time, tiles and vectors, but it does not look as far ahead as the end of a block.
template <Residual residual, bool rectify> struct AmxRows {
  const Product<Bf16> &p;
  int row = 0, count = 0, done = 0;
  int64_t col = 0;
  const float *sums = nullptr;

  void finish(int rows) {
    const int end = done + rows < count ? done + rows : count;
    if (done == end)
      return;
    const Vec left_bias = load(p.bias + col), right_bias = load(p.bias + col + kLanes);
    for (; done < end; ++done) {
      const float *const sum = sums + done * kPanel;
      Vec left = load(sum) + left_bias, right = load(sum + kLanes) + right_bias;
      if (residual == Residual::rows) {
        left = left + load(p.residual[row + done] + col);
        right = right + load(p.residual[row + done] + col + kLanes);
      }
      if (rectify)
        left = relu(left), right = relu(right);
      store(p.out[row + done] + p.offset + col, left, right);
    }
  }
};

// Columns outermost, so that a panel of weights is in L1 for all but the first rows.
template <Residual residual, bool rectify> void product_amx(const Product<Bf16> &p, int rows) {
  AmxSums sums;
  AmxRows<residual, rectify> late = {p};
  int64_t steps = residual == Residual::tiles;
  Rows inputs[kAmxRows / kAmx][kMostTerms];
  const int blocks = int(ceil_div(rows, 2 * kAmx));
  constexpr int64_t kStep = 2 * kAmx, kWeights = 2 * kPanel * sizeof(Bf16), kSums = kPanel * sizeof(float);
  Bf16 *spare = p.spare;
  for (int row = 0, tile = 0; tile < 2 * blocks; row += kAmx, ++tile) {
    const int count = rows - row < kAmx ? rows - row : kAmx;
    bool equal = false;
    for (int i = 0; i < p.count && count > 0; ++i, spare += kAmx * p.terms[i - 1].k) {
      if (!i || p.terms[i].rows != p.terms[i - 1].rows) // the taps of a convolution may share theirs
        equal = count == kAmx && amx_equal(p.terms[i].rows + row);
      inputs[tile][i] = amx_rows(p.terms[i], row, count, equal, spare);
    }
  }
  for (int i = 0; i < p.count; ++i)
    steps += p.terms[i].k / kStep;
  const int late_rows = int(ceil_div(2 * kAmx, steps));
  // GCC's tile loads do not say that they read memory: what they read must be written by here.
  __asm__ volatile("" ::: "memory");
  Fetcher fetcher(p.fetch, p.width / kPanel * blocks);
  for (int64_t col = 0; col < p.width; col += kPanel)
    for (int block = 0; block < blocks; ++block) {
      fetcher.step();
      const int row = block * 2 * kAmx, count = rows - row < 2 * kAmx ? rows - row : 2 * kAmx;
      const bool lower = count > kAmx;
      const Rows *a = inputs[2 * block], *b = inputs[2 * block + 1];
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const auto step = [&](const Bf16 *weights, const Rows &above, const Rows &below, int64_t k)
                            __attribute__((always_inline)) {
        _tile_loadd(6, weights, kWeights);
        _tile_loadd(4, above.first + k, above.stride);
        _tile_loadd(7, weights + kPanel, kWeights);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (lower) {
          _tile_loadd(5, below.first + k, below.stride);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        late.finish(late_rows);
      };
      if (residual == Residual::tiles)
        step(kIdentity.weights, as_they_lie(p.residual + row, col),
             lower ? as_they_lie(p.residual + row + kAmx, col) : Rows{}, 0);
      for (int i = 0; i < p.count; ++i) {
        const Term<Bf16> &term = p.terms[i];
        const Bf16 *weights = term.weights + col * term.k;
        for (int64_t k = 0; k < term.k; k += kStep, weights += kStep * kPanel) {
          for (int64_t line = 0; !block && line < kStep * kPanel; line += kLine / int64_t(sizeof(Bf16)))
            __builtin_prefetch(weights + 2 * kStep * kPanel + line); // two steps ahead; later blocks find it in L1
          step(weights, a[i], b[i], k);
        }
      }
      float *const own = sums.values[late.sums == sums.values[0]];
      _tile_stored(0, own, kSums);
      _tile_stored(1, own + kLanes, kSums);
      if (lower) {
        _tile_stored(2, own + kAmx * kPanel, kSums);
        _tile_stored(3, own + kAmx * kPanel + kLanes, kSums);
      }
      late.row = row, late.count = count, late.done = 0, late.col = col, late.sums = own;
    }
  late.finish(2 * kAmx);
}

template <bool rectify> void product_amx(const Product<Bf16> &p, int rows) {
  switch (residual_of(p, rows)) {
  case Residual::none: return product_amx<Residual::none, rectify>(p, rows);
  case Residual::rows: return product_amx<Residual::rows, rectify>(p, rows);
  case Residual::tiles: return product_amx<Residual::tiles, rectify>(p, rows);
  }
}

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16]; // of a row
  uint8_t rows[16];
};
constexpr TileConfig kTileConfig = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

#endif

// Sets up AMX's tiles of this thread for the lifetime of the object, where products of T need them: eight of 16 rows x
// 64 bytes.
template <class T> struct AmxTiles {
  AmxTiles() {
#ifdef __AMX_BF16__
    if (sizeof(T) == sizeof(Bf16))
      _tile_loadconfig(&kTileConfig);
#endif
  }
  ~AmxTiles() {
#ifdef __AMX_BF16__
    if (sizeof(T) == sizeof(Bf16))
      _tile_release();
#endif
  }
};

// Columns outermost, so that a panel of weights stays in L1 while all rows pass.
template <class T> void product(const Product<T> &p, int rows) {
#ifdef __AMX_BF16__
  if constexpr (sizeof(T) == sizeof(Bf16)) {
    bool fits = p.width % kPanel == 0;
    for (int i = 0; i < p.count; ++i)
      fits = fits && p.terms[i].k % (2 * kAmx) == 0;
    if (fits)
      return p.rectify ? product_amx<true>(p, rows) : product_amx<false>(p, rows);
  }
#endif
  const int tiles = (rows + kRows - 1) / kRows;
  Fetcher fetcher(p.fetch, ceil_div(p.width, kVecs * kLanes) * tiles);
  for (int64_t col = 0; col < p.width; col += kVecs * kLanes)
    for (int t = 0, row = 0; t < tiles; ++t) {
      fetcher.step();
      const int count = rows / tiles + (t < rows % tiles);
      product_rows<kRows>(p, row, count, col);
      row += count;
    }
}

// Full strips for one worker; shorter ones, but whole register tiles, where several must share few rows.
template <class T> int64_t count_strips(int64_t rows, int workers) {
  const int64_t shared = ceil_div(ceil_div(rows, kStrip<T>), workers) * workers, tiles = ceil_div(rows, kRows);
  return shared < tiles ? shared : tiles;
}
