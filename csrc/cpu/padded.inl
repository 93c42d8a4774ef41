// A chain of basic blocks in bf16 on AMX, on maps with zeros around them: see basic_blocks.inl for what is computed.
//
// A map has one zero pixel behind each of its lines and a line of zeros above and below. The lines follow one another,
// so what lies left of a line is the zero behind the one before it, and the neighbours in one direction of 16 pixels
// that follow one another do so too: AMX reads them as they are, and no tap needs to be told whether it is inside.
// Outputs between the lines are computed as well, and dropped. Looking up nine neighbours of a pixel takes longer than
// to multiply them.

// Of all basic blocks: bytes of a map of a group of images. x, y and Winograd's planes fit L2 together.
constexpr int64_t kGroup = 512 * 1024;

#ifdef __AMX_BF16__
constexpr int64_t kPixels = 2 * kAmx; // of a block, which is computed at once
constexpr int64_t kBlocks = 6;        // of a strip, for which a panel of weights is read once from L2

struct PaddedMap {
  int64_t h, w, c;

  int64_t pitch() const { return w + 1; }
  int64_t first() const { return 1 + pitch(); } // of pixel (0, 0), in pixels
  int64_t outputs() const { return h * pitch() - 1; }
  int64_t blocks() const { return ceil_div(outputs(), kPixels); }
  int64_t values() const { return (first() + outputs() + pitch() + 1 + kPixels) * c; } // whole cache lines
};

// Are the outputs that are dropped few?
inline bool padding_pays(const BasicBlocksArgs &a) {
  const int64_t computed = ceil_div(a.h * (a.w + 1) - 1, kAmx) * kAmx;
  return a.channels % kPanel == 0 && 2 * computed <= 3 * a.h * a.w;
}

// A 3x3 convolution, its residual and ReLU. Pointers are to pixel (0, 0) of the first image.
struct PaddedConv {
  const Bf16 *weights, *x;
  const float *bias;
  const Bf16 *residual; // null for none; may be `out`
  Bf16 *out;
  bool dense; // is `out` (n, h, w, c), without zeros?

  PaddedConv of(const PaddedMap &map, int64_t n) const {
    const int64_t padded = n * map.values();
    return {weights, x + padded, bias, residual ? residual + padded : nullptr,
            out + (dense ? n * map.h * map.w * map.c : padded), dense};
  }
};

// Outputs of columns col .. col + kPanel of `count` pixels from the one at `begin`.
template <bool residual>
inline void padded_finish(const PaddedMap &map, const PaddedConv &conv, int64_t begin, int count, int64_t col,
                          const float *sums) {
  const Vec left_bias = load(conv.bias + col), right_bias = load(conv.bias + col + kLanes);
  int64_t x = begin % map.pitch(), to = conv.dense ? begin / map.pitch() * map.w + x : begin;
  for (int i = 0; i < count; ++i, ++x, ++to) {
    if (x == map.w) { // between the lines
      x = -1, to -= conv.dense;
      continue;
    }
    Vec left = load(sums + i * kPanel) + left_bias, right = load(sums + i * kPanel + kLanes) + right_bias;
    if (residual) {
      const Bf16 *const added = conv.residual + (begin + i) * map.c + col;
      left = left + load(added), right = right + load(added + kLanes);
    }
    store(conv.out + to * map.c + col, relu(left), relu(right));
  }
}

// Blocks begin .. end of the outputs of all images. Columns outermost, so that a panel of weights is in L1 or L2 for
// all but the first block.
inline void padded_strip(const PaddedMap &map, const PaddedConv &images, int64_t begin, int64_t end) {
  alignas(64) float sums[kPixels * kPanel];
  constexpr int64_t kStep = 2 * kAmx, kWeights = 2 * kPanel * sizeof(Bf16), kSums = kPanel * sizeof(float);
  const int64_t c = map.c, row = c * int64_t(sizeof(Bf16)), of_image = map.blocks();
  // GCC's tile loads do not say that they read memory: what they read must be written by here.
  __asm__ volatile("" ::: "memory");
  for (int64_t col = 0; col < c; col += kPanel)
    for (int64_t block = begin; block < end; ++block) {
      const PaddedConv conv = images.of(map, block / of_image);
      const int64_t at = block % of_image * kPixels, rest = map.outputs() - at;
      const int count = int(rest < kPixels ? rest : kPixels);
      const bool lower = count > kAmx;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int tap = 0; tap < 9; ++tap) {
        const Bf16 *const x = conv.x + (at + (tap / 3 - 1) * map.pitch() + tap % 3 - 1) * c;
        const Bf16 *weights = conv.weights + (tap * c + col) * c;
        for (int64_t k = 0; k < c; k += kStep, weights += kStep * kPanel) {
          _tile_loadd(6, weights, kWeights);
          _tile_loadd(4, x + k, row);
          _tile_loadd(7, weights + kPanel, kWeights);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          if (lower) {
            _tile_loadd(5, x + kAmx * c + k, row);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
      _tile_stored(0, sums, kSums);
      _tile_stored(1, sums + kLanes, kSums);
      if (lower) {
        _tile_stored(2, sums + kAmx * kPanel, kSums);
        _tile_stored(3, sums + kAmx * kPanel + kLanes, kSums);
      }
      conv.residual ? padded_finish<true>(map, conv, at, count, col, sums)
                    : padded_finish<false>(map, conv, at, count, col, sums);
    }
}

struct PaddedSpace {
  PaddedMap map;
  int64_t group, bytes_of_group, shared; // images at a time; bytes of one of their two maps, of tickets
  bool own_images;

  explicit PaddedSpace(const BasicBlocksArgs &a)
      : map{a.h, a.w, a.channels}, shared((1 + a.threads * 2 * a.blocks) * kLine), own_images(a.n >= a.threads) {
    const int64_t image = map.values() * int64_t(sizeof(Bf16));
    group = kGroup / image < 1 ? 1 : kGroup / image;
    group = group < a.n ? group : a.n;
    bytes_of_group = group * image;
  }
  int64_t bytes(const BasicBlocksArgs &a) const { return shared + (own_images ? a.threads : 1) * 2 * bytes_of_group; }
};

inline void run_padded(const BasicBlocksArgs &args) {
  const PaddedSpace space(args);
  const PaddedMap &map = space.map;
  const int64_t c = args.channels, line = args.w * c, passes = 2 * args.blocks;
  char *const base = static_cast<char *>(args.workspace);
  std::memset(base, 0, size_t(space.shared));
  int *const arrived = reinterpret_cast<int *>(base);
  team(args.threads, [&](int rank, int workers) {
    const AmxTiles<Bf16> tiles;
    char *const own = base + space.shared + (space.own_images ? rank : 0) * 2 * space.bytes_of_group;
    if (space.own_images || !rank)
      std::memset(own, 0, size_t(2 * space.bytes_of_group));
    // Lines begin .. end of images from `first` on, to the maps at `to`.
    const auto take_in = [&](char *to, int64_t first, int64_t begin, int64_t end) {
      const Bf16 *const x = static_cast<const Bf16 *>(args.x) + first * args.h * line;
      for (int64_t i = begin; i < end; ++i)
        std::memcpy(reinterpret_cast<Bf16 *>(to) + i / args.h * map.values() +
                        (map.first() + i % args.h * map.pitch()) * c,
                    x + i * line, size_t(line) * sizeof(Bf16));
    };
    const auto pass = [&](char *maps, int64_t index, int64_t first, int64_t count, int sharing, int64_t *ticket) {
      const bool second = index % 2, last = index + 1 == passes;
      Bf16 *const x = reinterpret_cast<Bf16 *>(maps) + map.first() * c;
      Bf16 *const y = reinterpret_cast<Bf16 *>(maps + space.bytes_of_group) + map.first() * c;
      Bf16 *const out = last ? static_cast<Bf16 *>(args.out) + first * args.h * line : second ? x : y;
      const PaddedConv conv = {static_cast<const Bf16 *>(args.weights) + index * 9 * c * c,
                               second ? y : x,
                               args.biases + index * c,
                               second ? x : nullptr,
                               out,
                               last};
      const int64_t blocks = count * map.blocks();
      const int64_t strips = ceil_div(ceil_div(blocks, kBlocks), sharing) * sharing;
      for (int64_t mine = take(ticket); mine < strips; mine = take(ticket))
        padded_strip(map, conv, part_begin(blocks, strips, mine), part_begin(blocks, strips, mine + 1));
    };
    const auto counted = [&](int64_t first, int64_t end) {
      return end - first < space.group ? end - first : space.group;
    };
    const int64_t whole = space.own_images ? args.n / workers * workers : 0;
    const int64_t end = part_begin(whole, workers, rank + 1);
    for (int64_t first = part_begin(whole, workers, rank); first < end; first += space.group) {
      const int64_t count = counted(first, end);
      take_in(own, first, 0, count * args.h);
      for (int64_t index = 0; index < passes; ++index) {
        int64_t ticket = 0;
        pass(own, index, first, count, 1, &ticket);
      }
    }
    int meetings = 0;
    int64_t *ticket = reinterpret_cast<int64_t *>(base + kLine);
    char *const shared = base + space.shared; // worker 0's
    for (int64_t first = whole; first < args.n; first += space.group) {
      const int64_t count = counted(first, args.n), rows = count * args.h;
      meet(arrived, workers * ++meetings); // they are free and have their zeros
      take_in(shared, first, part_begin(rows, workers, rank), part_begin(rows, workers, rank + 1));
      for (int64_t index = 0; index < passes; ++index, ticket += kLine / int64_t(sizeof(int64_t))) {
        meet(arrived, workers * ++meetings);
        pass(shared, index, first, count, workers, ticket);
      }
    }
  });
}
#endif
