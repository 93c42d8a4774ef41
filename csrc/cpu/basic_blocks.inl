// A chain of residual blocks of two 3x3 convolutions at one resolution, NHWC, batch norm folded in:
//
//     y = relu(W1_i * x + b1_i)
//     x = relu(W2_i * y + b2_i + x)
//
// Each line is a pass of conv.inl; x is updated in place in `out`. Images go through the whole chain in groups whose
// maps stay in L2 and share a reading of the weights. Workers take images of their own while there is one for each;
// those left over are shared, with a barrier after each pass.

template <class T> struct BasicBlocksSpace {
  int64_t group, map, shared, scratch; // images; bytes of y of a group, of tickets, of a worker
  ConvRoom<T> room;
  bool own_images; // does every worker have a y of its own?

  explicit BasicBlocksSpace(const BasicBlocksArgs &args) : room(args.channels, args.channels, 3, args.tile) {
    const int64_t image = args.h * args.w * args.channels * int64_t(sizeof(T));
    group = kGroup / image < 1 ? 1 : kGroup / image;
    group = group < args.n ? group : args.n;
    own_images = args.n >= args.threads;
    map = lines<T>(group * args.h * args.w * args.channels);
    scratch = room.bytes();
    const int64_t passes = args.threads * 2 * args.blocks; // at most threads - 1 images are left over
    shared = (1 + passes) * kLine;
  }
  int64_t bytes(const BasicBlocksArgs &args) const {
    return shared + (own_images ? args.threads : 1) * map + args.threads * scratch;
  }
};

template <class T> void run_basic_blocks(const BasicBlocksArgs &args) {
  const BasicBlocksSpace<T> space(args);
  char *const base = static_cast<char *>(args.workspace), *const maps = base + space.shared;
  char *const scratches = maps + (space.own_images ? args.threads : 1) * space.map;
  std::memset(base, 0, size_t(space.shared));
  int *const arrived = reinterpret_cast<int *>(base);
  const int64_t c = args.channels, products = args.tile ? (args.tile + 2) * (args.tile + 2) : 9;
  const int64_t size = products * c * c; // of the weights of a convolution
  team(args.threads, [&](int rank, int workers) {
    const AmxTiles<T> tiles;
    const ConvScratch<T> scratch = space.room.at(scratches + rank * space.scratch);
    // Pass `index` of images first .. first + count: the blocks' convolutions in turn.
    const auto pass = [&](int64_t index, int64_t first, int64_t count, T *y, int sharing, int64_t *ticket) {
      const int64_t offset = first * args.h * args.w * c;
      T *const out = static_cast<T *>(args.out) + offset;
      const T *const x = index < 2 ? static_cast<const T *>(args.x) + offset : out;
      const T *const weights = static_cast<const T *>(args.weights) + index * size;
      const bool second = index % 2;
      const ConvMaps<T> maps = {second ? y : x, second ? x : nullptr, second ? out : y, count, args.h, args.w};
      conv_layer<T>({weights, args.biases + index * c, c, c, 3, 1, args.tile, true}, maps, scratch, sharing, ticket);
    };
    const int64_t whole = space.own_images ? args.n / workers * workers : 0, passes = 2 * args.blocks;
    const int64_t begin = part_begin(whole, workers, rank), end = part_begin(whole, workers, rank + 1);
    T *const own = reinterpret_cast<T *>(maps + (space.own_images ? rank : 0) * space.map);
    for (int64_t first = begin; first < end; first += space.group)
      for (int64_t index = 0; index < passes; ++index) {
        int64_t ticket = 0;
        pass(index, first, end - first < space.group ? end - first : space.group, own, 1, &ticket);
      }
    int meetings = 0;
    int64_t *ticket = reinterpret_cast<int64_t *>(base + kLine);
    if (whole && whole < args.n)
      meet(arrived, workers * ++meetings); // worker 0's y is shared from here on
    for (int64_t first = whole; first < args.n; first += space.group)
      for (int64_t index = 0; index < passes; ++index, ticket += kLine / int64_t(sizeof(int64_t))) {
        pass(index, first, args.n - first < space.group ? args.n - first : space.group,
             reinterpret_cast<T *>(maps), workers, ticket);
        meet(arrived, workers * ++meetings);
      }
  });
}

int64_t basic_blocks_workspace(const BasicBlocksArgs &args) {
#ifdef __AMX_BF16__
  if (args.bf16 && padding_pays(args))
    return PaddedSpace(args).bytes(args);
#endif
#ifdef __AVX512BF16__
  if (args.bf16)
    return BasicBlocksSpace<Bf16>(args).bytes(args);
#endif
  return BasicBlocksSpace<float>(args).bytes(args);
}

void basic_blocks_fwd(const BasicBlocksArgs &args) {
#ifdef __AMX_BF16__
  if (args.bf16 && padding_pays(args))
    return run_padded(args);
#endif
#ifdef __AVX512BF16__
  if (args.bf16)
    return run_basic_blocks<Bf16>(args);
#endif
  run_basic_blocks<float>(args);
}
