// A convolution, NHWC, batch norm folded into weights and bias, and what follows it:
//
//     out = [relu] (W * x + b [+ residual])          1x1 or 3x3, padding 0 or 1, stride
//
// As one product with a term per tap; a tap outside the map reads zeros. Or, 3x3 of stride 1, by Winograd's way. Reads
// and writes per pixel: `in` values k^2 / stride^2 times or (T + 2)^2 / T^2 times, from the cache, and `out` values;
// the weights once per strip or chunk of tiles. Pixels and tiles of all images are one list, so that small maps share a
// reading of the weights; workers draw strips or chunks of it.

template <class T> struct ConvLayer {
  const T *weights;  // panels, see ConvArgs
  const float *bias; // (out)
  int64_t in, out, kernel, stride;
  int tile; // of Winograd's way, 0 for the direct one; float only
  bool rectify;
};

template <class T> struct ConvMaps {
  const T *x;        // (n, h, w, in)
  const T *residual; // (n, out_h, out_w, out), null for none; may be `out`
  T *out;            // (n, out_h, out_w, out)
  int64_t n, h, w;
};

// What one worker needs for itself.
template <class T> struct ConvScratch {
  const T *zeros;            // (in)
  T *spare;                  // outputs of pixels outside the map, or see Product
  float *factors, *products; // of Winograd's tiles, see winograd_tiles
};

// Where things lie in a worker's part of the workspace, in bytes.
template <class T> struct ConvRoom {
  int64_t zeros, spare, factors, products;

  ConvRoom(int64_t in, int64_t out, int64_t kernel, int tile) : zeros(lines<T>(in)) {
    const int64_t amx = kAmxRows * lines<T>(kernel * kernel * in), outside = lines<T>(out);
    spare = amx > outside ? amx : outside;
    factors = tile == 4 ? planes<4>(in, in) : tile == 2 ? planes<2>(in, in) : 0;
    products = tile == 4 ? planes<4>(in, kPanel) : tile == 2 ? planes<2>(in, kPanel) : 0;
  }
  template <int tile> static int64_t planes(int64_t in, int64_t channels) {
    return lines<float>(Winograd<tile>::kProducts * Winograd<tile>::plane(in, channels));
  }
  int64_t bytes() const { return zeros + spare + factors + products; }
  ConvScratch<T> at(char *own) const {
    std::memset(own, 0, size_t(zeros));
    char *const planes = own + zeros + spare;
    return {reinterpret_cast<T *>(own), reinterpret_cast<T *>(own + zeros), reinterpret_cast<float *>(planes),
            reinterpret_cast<float *>(planes + factors)};
  }
};

// Output pixels begin .. end of all images.
template <class T>
void conv_direct(const ConvLayer<T> &layer, const ConvMaps<T> &maps, const ConvScratch<T> &scratch, int64_t begin,
                 int64_t end) {
  const int64_t out_h = ceil_div(maps.h, layer.stride), out_w = ceil_div(maps.w, layer.stride);
  const T *rows[9][kStrip<T>], *residual[kStrip<T>];
  T *out[kStrip<T>];
  int64_t x = begin % out_w, y = begin / out_w % out_h, n = begin / out_w / out_h;
  const int64_t reach = layer.kernel / 2;
  for (int64_t i = begin; i < end; ++i) {
    const int at = int(i - begin);
    const T *image = maps.x + n * maps.h * maps.w * layer.in;
    int tap = 0;
    for (int64_t row = y * layer.stride - reach; row <= y * layer.stride + reach; ++row)
      for (int64_t col = x * layer.stride - reach; col <= x * layer.stride + reach; ++col) {
        const bool inside = row >= 0 && row < maps.h && col >= 0 && col < maps.w;
        rows[tap++][at] = inside ? image + (row * maps.w + col) * layer.in : scratch.zeros;
      }
    out[at] = maps.out + i * layer.out;
    residual[at] = maps.residual ? maps.residual + i * layer.out : nullptr;
    if (++x == out_w) {
      x = 0;
      if (++y == out_h)
        y = 0, ++n;
    }
  }
  Term<T> terms[9];
  const int taps = int(layer.kernel * layer.kernel);
  for (int tap = 0; tap < taps; ++tap)
    terms[tap] = {rows[tap], 0, layer.in, layer.weights + tap * layer.in * layer.out};
  const T *const *added = maps.residual ? residual : nullptr;
  product<T>({terms, taps, layer.bias, added, out, 0, layer.out, layer.rectify, scratch.spare}, int(end - begin));
}

// Tiles first .. last of all images.
template <int T>
void conv_winograd(const ConvLayer<float> &layer, const ConvMaps<float> &maps, const ConvScratch<float> &scratch,
                   int64_t first, int64_t last) {
  using Tiles = Winograd<T>;
  const int64_t h = maps.h, w = maps.w, across = ceil_div(w, T), down = ceil_div(h, T);
  const float *residual[Tiles::kMostTiles][Tiles::kOutputs];
  float *out[Tiles::kMostTiles][Tiles::kOutputs];
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t n = tile / (across * down), y0 = tile / across % down * T, x0 = tile % across * T, t = tile - first;
    const float *pixels[Tiles::kProducts];
    for (int i = 0; i < Tiles::kProducts; ++i) {
      const int64_t y = y0 + i / Tiles::kSide - 1, x = x0 + i % Tiles::kSide - 1;
      const bool inside = y >= 0 && y < h && x >= 0 && x < w;
      pixels[i] = inside ? maps.x + ((n * h + y) * w + x) * layer.in : scratch.zeros;
    }
    for (int64_t c = 0; c < layer.in; c += kLanes)
      winograd_input<T>(pixels, c, scratch.factors + t * layer.in + c, Tiles::plane(layer.in, layer.in));
    for (int i = 0; i < Tiles::kOutputs; ++i) {
      const int64_t y = y0 + i / T, x = x0 + i % T, at = ((n * h + y) * w + x) * layer.out;
      const bool inside = y < h && x < w;
      out[t][i] = inside ? maps.out + at : scratch.spare;
      residual[t][i] = inside && maps.residual ? maps.residual + at : scratch.spare;
    }
  }
  winograd_tiles<T>({layer.weights, layer.bias, layer.in, layer.out, layer.rectify}, scratch.factors, scratch.products,
                    int(last - first), maps.residual ? residual : nullptr, out, nullptr);
}

// The whole layer for all images, or this worker's share of it: workers draw strips from `ticket`.
template <class T>
void conv_layer(const ConvLayer<T> &layer, const ConvMaps<T> &maps, const ConvScratch<T> &scratch, int workers,
                int64_t *ticket) {
  if constexpr (sizeof(T) == sizeof(float))
    if (layer.tile) {
      const int64_t tiles = maps.n * ceil_div(maps.h, layer.tile) * ceil_div(maps.w, layer.tile);
      const int64_t chunk = layer.tile == 4 ? Winograd<4>::tiles(layer.in) : Winograd<2>::tiles(layer.in);
      const int64_t chunks = ceil_div(ceil_div(tiles, chunk), workers) * workers;
      for (int64_t mine = take(ticket); mine < chunks; mine = take(ticket)) {
        const int64_t first = part_begin(tiles, chunks, mine), last = part_begin(tiles, chunks, mine + 1);
        if (first < last)
          layer.tile == 4 ? conv_winograd<4>(layer, maps, scratch, first, last)
                          : conv_winograd<2>(layer, maps, scratch, first, last);
      }
      return;
    }
  const int64_t pixels = maps.n * ceil_div(maps.h, layer.stride) * ceil_div(maps.w, layer.stride);
  const int64_t strips = count_strips<T>(pixels, workers);
  for (int64_t mine = take(ticket); mine < strips; mine = take(ticket))
    conv_direct(layer, maps, scratch, part_begin(pixels, strips, mine), part_begin(pixels, strips, mine + 1));
}

template <class T> void run_conv(const ConvArgs &args) {
  const ConvRoom<T> room(args.in_channels, args.out_channels, args.kernel, args.tile);
  const ConvLayer<T> layer = {static_cast<const T *>(args.weights), args.bias, args.in_channels, args.out_channels,
                              args.kernel, args.stride, args.tile, args.rectify};
  const ConvMaps<T> maps = {static_cast<const T *>(args.x), static_cast<const T *>(args.residual),
                            static_cast<T *>(args.out), args.n, args.h, args.w};
  char *const base = static_cast<char *>(args.workspace);
  int64_t *const ticket = reinterpret_cast<int64_t *>(base);
  *ticket = 0;
  team(args.threads, [&](int rank, int workers) {
    const AmxTiles<T> tiles;
    conv_layer(layer, maps, room.at(base + kLine + rank * room.bytes()), workers, ticket);
  });
}

int64_t conv_workspace(const ConvArgs &args) {
#ifdef __AVX512BF16__
  if (args.bf16)
    return kLine + args.threads * ConvRoom<Bf16>(args.in_channels, args.out_channels, args.kernel, 0).bytes();
#endif
  return kLine + args.threads * ConvRoom<float>(args.in_channels, args.out_channels, args.kernel, args.tile).bytes();
}

void conv_fwd(const ConvArgs &args) {
#ifdef __AVX512BF16__
  if (args.bf16)
    return run_conv<Bf16>(args);
#endif
  run_conv<float>(args);
}
