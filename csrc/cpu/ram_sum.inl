// Weighted sum of resampled maps with ReLU, and its gradient. For images of h x w pixels of c values (channels_last; in
// NCHW every plane is an image and c = 1), maps x_t of h / f x w / f pixels, f = factors[t]:
//
//     y = relu( sum_t weights[t] * R_t x_t ),  from left to right, weights of 1 where there are none
//     nearest:  (R x)[y, x] = x[y / f, x / f]
//     bilinear: (R x)[y, x] = the pixels of `Taps`, weighted (1 - l, l), along x, then along y
//     g = 0 where y <= 0, else grad;  s_t = transpose(R_t) g;  grads[t] = weights[t] * s_t;  weight_grads[t] = <x_t, s_t>
//
// Reads each input and writes each output once: bound by memory. Both directions are sums of rows (`Combination`),
// vectorised along the row whatever c is. Forward, a row of a smaller map is brought to width w once, for all the rows of
// y that need it, in a buffer that stays in L1; backward, rows of g (in the worker's workspace) are summed first and
// brought to width w / f then. A worker takes rows of y (forward) or whole images (backward). There is no fused
// multiply-add, so every instruction set gives the same y, and for nearest it is PyTorch's.

namespace ram {

constexpr int kMaxRows = 8;      // of one sum: its coefficients and temporaries still fit 16 vector registers
constexpr int kMaxLines = 8;     // that are computed at once
constexpr int64_t kAtOnce = 512; // values: shorter lines are computed together: starting costs more than the work

using hrpose::kMaxTerms;
using scalar::BFloat16;
using scalar::load;
using scalar::store;

// Calls body(factor) with the factors of HRNet as compile-time constants, so that loops over it unroll.
template <int64_t value> struct Constant {
  constexpr operator int64_t() const { return value; }
};
template <class Body> void with_factor(int64_t factor, const Body &body) {
  if (factor == 2)
    body(Constant<2>());
  else if (factor == 4)
    body(Constant<4>());
  else if (factor == 8)
    body(Constant<8>());
  else
    body(factor);
}

// The two pixels of a map that pixel i of its bilinear enlargement comes from, and the weight of the second. i goes up.
struct Taps {
  int64_t first, second;
  float l;

  Taps(int64_t i, int64_t factor, int64_t size) : factor(factor), size(size) {
    const int64_t position = 2 * i + 1 + factor; // 2 factor times (that on the map, + 1)
    before = position / (2 * factor) - 1;
    over = position % (2 * factor);
    find();
  }
  void next() {
    over += 2;
    if (over >= 2 * factor)
      over -= 2 * factor, ++before;
    find();
  }

private:
  int64_t factor, size, before, over;

  void find() {
    first = before < 0 ? 0 : before;
    second = first + 1 < size ? first + 1 : first;
    l = before < 0 ? 0 : float(over) / float(2 * factor);
  }
};

// `lines` rows of sums: out[l] = max(sum_k coefficient[l][k] * row[l][k], floor), from left to right; NaN stays.
struct Line {
  const float *rows[kMaxRows];
  float coefficients[kMaxRows];
};
template <int K, class T> void combine(const Line *line, int64_t lines, int64_t count, float floor, T *out) {
  for (int64_t l = 0; l < lines; ++l, out += count) {
    const float *row[K];
    float coefficient[K];
    for (int k = 0; k < K; ++k)
      row[k] = line[l].rows[k], coefficient[k] = line[l].coefficients[k];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      float sum = coefficient[0] * row[0][i];
#pragma GCC unroll 8
      for (int k = 1; k < K; ++k)
        sum += coefficient[k] * row[k][i];
      store(out + i, sum < floor ? floor : sum);
    }
  }
}

template <class T> void combine(int k, const Line *line, int64_t lines, int64_t count, float floor, T *out) {
  switch (k) {
  case 1: return combine<1>(line, lines, count, floor, out);
  case 2: return combine<2>(line, lines, count, floor, out);
  case 3: return combine<3>(line, lines, count, floor, out);
  case 4: return combine<4>(line, lines, count, floor, out);
  case 5: return combine<5>(line, lines, count, floor, out);
  case 6: return combine<6>(line, lines, count, floor, out);
  case 7: return combine<7>(line, lines, count, floor, out);
  default: return combine<8>(line, lines, count, floor, out);
  }
}

// Sums of any number of rows, `lines` at a time; `partial` has room for so many rows of `count` values.
struct Combination {
  float *partial;
  int64_t lines, count;
  int k = 0;
  Line line[kMaxLines];

  Combination(float *partial, int64_t lines, int64_t count) : partial(partial), lines(lines), count(count) {}

  // Makes room for `more` rows in every line.
  void next(int more) {
    if (k + more > kMaxRows) {
      combine(k, line, lines, count, -__builtin_inff(), partial);
      for (int64_t l = 0; l < lines; ++l)
        line[l].rows[0] = partial + l * count, line[l].coefficients[0] = 1;
      k = 1;
    }
    k += more;
  }
  // Row and coefficient at `back` from the end of line l.
  void set(int64_t l, int back, const float *row, float coefficient) {
    line[l].rows[k - back] = row, line[l].coefficients[k - back] = coefficient;
  }
  template <class T> void finish(float floor, T *out) const { combine(k, line, lines, count, floor, out); }
};

// `blocks` x c values -> `blocks` * factor x c, each pixel repeated.
template <class T> void repeat(const T *from, int64_t blocks, int64_t c, int64_t factor, float *to) {
  with_factor(factor, [&](auto f) {
    if (c == 1) {
#pragma omp simd
      for (int64_t i = 0; i < blocks; ++i) {
        const float value = load(from + i);
        for (int64_t j = 0; j < f; ++j)
          to[i * f + j] = value;
      }
      return;
    }
    for (int64_t i = 0; i < blocks; ++i)
#pragma omp simd
      for (int64_t ch = 0; ch < c; ++ch) {
        const float value = load(from + i * c + ch);
        for (int64_t j = 0; j < f; ++j)
          to[(i * f + j) * c + ch] = value;
      }
  });
}

// `blocks` x c values -> `blocks` * factor x c, interpolated along the row.
template <class T> void stretch(const T *from, int64_t blocks, int64_t c, int64_t factor, float *to) {
  const auto block = [=](int64_t i) { // one with a single neighbour
    Taps taps(i * factor, factor, blocks);
    for (int64_t x = i * factor; x < (i + 1) * factor; ++x, taps.next())
#pragma omp simd
      for (int64_t ch = 0; ch < c; ++ch)
        to[x * c + ch] = (1 - taps.l) * load(from + taps.first * c + ch) + taps.l * load(from + taps.second * c + ch);
  };
  // The `count` values from mid on become `f` each, `stride` apart: half lie on the side of left, half of right.
  const auto values = [=](auto f, auto stride, auto next, const T *mid, int64_t count, float *out) {
    const T *left = mid - c, *right = mid + c;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float a = load(left + i), b = load(mid + i), d = load(right + i);
      for (int64_t j = 0; j < f; ++j) {
        const int64_t twice = 2 * j + 1 - f;
        const float l = float(twice < 0 ? twice + 2 * f : twice) / float(2 * f);
        out[i * next + j * stride] = (1 - l) * (twice < 0 ? a : b) + l * (twice < 0 ? b : d);
      }
    }
  };
  block(0);
  with_factor(factor, [&](auto f) {
    if (c == 1)
      return values(f, Constant<1>(), f, from + 1, blocks - 2, to + f);
    for (int64_t i = 1; i < blocks - 1; ++i)
      values(f, c, Constant<1>(), from + i * c, c, to + i * f * c);
  });
  if (blocks > 1)
    block(blocks - 1);
}

inline const float *widened(const float *from, int64_t, float *) { return from; }
inline const float *widened(const BFloat16 *from, int64_t count, float *to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    to[i] = load(from + i);
  return to;
}

// One term of a sum whose lines are asked for from top to bottom. Rows of a smaller map are brought to the output's width
// once each, and stay in a ring while they are needed.
template <class T> struct Term {
  int64_t factor, h, w, c, slots;
  bool bilinear;
  float *buffer;               // `slots` rows; for a map of full size in bfloat16, the lines asked for at once
  const T *image;              // the current one
  int64_t before, over, slot;  // the next line is over / (2 factor) below row `before` of the map; slot of the last row
  const float *first, *second; // the rows it comes from, if over < 2 factor; one for nearest

  void start(const T *map, int64_t y) {
    const int64_t position = 2 * y + (bilinear ? 1 + factor : 2 * factor); // see Taps
    image = map, before = position / (2 * factor) - 1, over = position % (2 * factor), slot = 0;
    if (factor == 1)
      return;
    const int64_t r = before < 0 ? 0 : before;
    first = fetch(r);
    second = bilinear && r + 1 < h ? fetch(r + 1) : first;
  }

  const float *fetch(int64_t r) {
    slot = slot + 1 < slots ? slot + 1 : 0;
    float *to = buffer + slot * factor * w * c;
    if (bilinear)
      stretch(image + r * w * c, w, c, factor, to);
    else
      repeat(image + r * w * c, w, c, factor, to);
    return to;
  }

  void add(Combination &sum, float weight) {
    if (factor == 1) {
      const float *rows = widened(image + before * w * c, sum.lines * w * c, buffer);
      sum.next(1);
      for (int64_t l = 0; l < sum.lines; ++l)
        sum.set(l, 1, rows + l * w * c, weight);
      before += sum.lines;
      return;
    }
    sum.next(1 + bilinear);
    for (int64_t l = 0; l < sum.lines; ++l, over += 2) {
      if (over >= 2 * factor) {
        over -= 2 * factor, ++before;
        if (!bilinear)
          first = fetch(before);
        else if (before > 0)
          first = second, second = before + 1 < h ? fetch(before + 1) : first;
      }
      if (bilinear) {
        const float part = before < 0 ? 0 : float(over) / float(2 * factor);
        sum.set(l, 2, first, (1 - part) * weight);
        sum.set(l, 1, second, part * weight);
      } else {
        sum.set(l, 1, first, weight);
      }
    }
  }
};

// Rows that are computed at once, and what a worker needs for them: partial sums, the buffers of the terms.
inline int64_t step_of(const RamSumArgs &a) {
  int64_t step = kAtOnce / (a.w * a.c);
  step = step < kMaxLines ? step : kMaxLines;
  step = step < a.h ? step : a.h;
  return step > 1 ? step : 1;
}
inline int64_t room_of(const RamSumArgs &a) { return a.w * a.c * (step_of(a) + (step_of(a) + 1) * a.m); }

// Steps begin..end - 1, each of so many rows of one image.
template <class T> void forward_rows(const RamSumArgs &a, int64_t begin, int64_t end, float *workspace) {
  const int64_t step = step_of(a), row = a.w * a.c, steps = ceil_div(a.h, step);
  Term<T> terms[kMaxTerms];
  float *next = workspace + step * row;
  for (int t = 0; t < a.m; ++t) {
    const int64_t f = a.factors[t], slots = (step + f - 2) / f + 2;
    terms[t].factor = f, terms[t].h = a.h / f, terms[t].w = a.w / f, terms[t].c = a.c;
    terms[t].slots = slots, terms[t].bilinear = a.bilinear && f > 1, terms[t].buffer = next;
    next += slots * row;
  }
  int64_t n = begin / steps, y = begin % steps * step;
  for (int64_t i = begin; i < end; ++i) {
    const float *weights = a.weights ? a.weights + n / a.share * a.m : nullptr;
    Combination sum(workspace, a.h - y < step ? a.h - y : step, row);
    for (int t = 0; t < a.m; ++t) {
      Term<T> &term = terms[t];
      if (i == begin || y == 0)
        term.start(static_cast<const T *>(a.inputs[t]) + n * term.h * term.w * a.c, y);
      term.add(sum, weights ? weights[t] : 1.0f);
    }
    sum.finish(0.0f, static_cast<T *>(a.out) + n * a.h * row + y * row);
    y += step;
    if (y >= a.h)
      y = 0, ++n;
  }
}

// The case that HRNet has: channels_last, nearest, first kFine maps of full size, then kCoarse smaller ones of even
// factors, so that blocks of 2 x 2 pixels share what comes from the latter. Pairs of rows begin..end - 1, no workspace.
template <class T, int kFine, int kCoarse> void forward_blocks(const RamSumArgs &a, int64_t begin, int64_t end) {
  const int64_t c = a.c, row = a.w * c, pairs = a.h / 2;
  float weight[kFine + kCoarse];
  for (float &w : weight)
    w = 1;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / pairs, y = i % pairs * 2;
    const T *fine[kFine], *coarse[kCoarse];
    int64_t blocks[kCoarse], left[kCoarse]; // per pixel of a coarse map; until its next one
    for (int t = 0; t < kFine; ++t)
      fine[t] = static_cast<const T *>(a.inputs[t]) + (n * a.h + y) * row;
    for (int t = 0; t < kCoarse; ++t) {
      const int64_t f = a.factors[kFine + t];
      coarse[t] = static_cast<const T *>(a.inputs[kFine + t]) + (n * (a.h / f) + y / f) * (row / f);
      left[t] = blocks[t] = f / 2;
    }
    if (a.weights)
      memcpy(weight, a.weights + n / a.share * a.m, sizeof(weight));
    T *out = static_cast<T *>(a.out) + (n * a.h + y) * row;
    const T *const row_end = out + row;
    while (out != row_end) {
      const auto channels = [&](int64_t first, auto count) {
#pragma omp simd
        for (int64_t ch = first; ch < first + count; ++ch) {
          float shared[kCoarse];
#pragma GCC unroll 4
          for (int t = 0; t < kCoarse; ++t)
            shared[t] = weight[kFine + t] * load(coarse[t] + ch);
#pragma GCC unroll 2
          for (int dy = 0; dy < 2; ++dy)
#pragma GCC unroll 2
            for (int dx = 0; dx < 2; ++dx) {
              const int64_t at = dy * row + dx * c + ch;
              float sum = weight[0] * load(fine[0] + at);
#pragma GCC unroll 4
              for (int t = 1; t < kFine; ++t)
                sum += weight[t] * load(fine[t] + at);
#pragma GCC unroll 4
              for (int t = 0; t < kCoarse; ++t)
                sum += shared[t];
              store(out + at, sum < 0 ? 0 : sum);
            }
        }
      };
      int64_t ch = 0;
      for (; ch + 16 <= c; ch += 16)
        channels(ch, Constant<16>());
      if (ch < c)
        channels(ch, c - ch);
      out += 2 * c;
#pragma GCC unroll 4
      for (int t = 0; t < kFine; ++t)
        fine[t] += 2 * c;
#pragma GCC unroll 4
      for (int t = 0; t < kCoarse; ++t)
        if (--left[t] == 0)
          left[t] = blocks[t], coarse[t] += c;
    }
  }
}

// 4 kFine + kCoarse if forward_blocks can do it, else 0.
inline int blocks_case(const RamSumArgs &a) {
  int fine = 0;
  while (fine < a.m && a.factors[fine] == 1)
    ++fine;
  for (int t = fine; t < a.m; ++t)
    if (a.factors[t] % 2)
      return 0;
  const bool possible = !a.bilinear && a.c >= 16 && fine > 0 && fine < a.m && a.m <= 4;
  return possible ? 4 * fine + a.m - fine : 0;
}

template <class T> void forward(const RamSumArgs &a, int64_t worker) {
  const int kind = blocks_case(a);
  const int64_t total = a.n * (kind ? a.h / 2 : ceil_div(a.h, step_of(a)));
  const int64_t begin = total * worker / a.threads, end = total * (worker + 1) / a.threads;
  switch (kind) {
  case 4 * 1 + 1: return forward_blocks<T, 1, 1>(a, begin, end);
  case 4 * 1 + 2: return forward_blocks<T, 1, 2>(a, begin, end);
  case 4 * 1 + 3: return forward_blocks<T, 1, 3>(a, begin, end);
  case 4 * 2 + 1: return forward_blocks<T, 2, 1>(a, begin, end);
  case 4 * 2 + 2: return forward_blocks<T, 2, 2>(a, begin, end);
  case 4 * 3 + 1: return forward_blocks<T, 3, 1>(a, begin, end);
  default: return forward_rows<T>(a, begin, end, a.workspace + worker * room_of(a));
  }
}

// `blocks` * factor x c values -> `blocks` x c, the sums that are the transpose of `repeat`.
inline void fold(const float *from, int64_t blocks, int64_t c, int64_t factor, float *to) {
  const auto values = [=](auto f, auto stride, auto next, const float *first, int64_t count, float *out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      float sum = first[i * next];
      for (int64_t j = 1; j < f; ++j)
        sum += first[i * next + j * stride];
      out[i] = sum;
    }
  };
  with_factor(factor, [&](auto f) {
    if (c == 1)
      return values(f, Constant<1>(), f, from, blocks, to);
    for (int64_t i = 0; i < blocks; ++i)
      values(f, c, Constant<1>(), from + i * f * c, c, to + i * c);
  });
}

// The transpose of `stretch`.
inline void shrink(const float *from, int64_t blocks, int64_t c, int64_t factor, float *to) {
  memset(to, 0, blocks * c * sizeof(float));
  Taps taps(0, factor, blocks);
  for (int64_t x = 0; x < blocks * factor; ++x, taps.next()) {
    float *first = to + taps.first * c, *second = to + taps.second * c; // the same at the right border
#pragma omp simd
    for (int64_t ch = 0; ch < c; ++ch)
      first[ch] += (1 - taps.l) * from[x * c + ch];
#pragma omp simd
    for (int64_t ch = 0; ch < c; ++ch)
      second[ch] += taps.l * from[x * c + ch];
  }
}

// h x w x c values -> h / factor x w / factor x c, the transpose of resampling. `lines` has room for two rows.
inline void reduce(const float *map, int64_t h, int64_t w, int64_t c, int64_t factor, bool bilinear, float *lines,
                   float *to) {
  const int64_t row = w * c, height = h / factor, width = w / factor;
  for (int64_t r = 0; r < height; ++r) {
    Combination sum(lines + row, 1, row);
    if (bilinear) {
      int64_t y = r ? (r - 1) * factor + factor / 2 : 0;
      for (Taps taps(y, factor, height); y < h && y < (r + 1) * factor + factor / 2; ++y, taps.next()) {
        const float weight = (taps.first == r ? 1 - taps.l : 0) + (taps.second == r ? taps.l : 0);
        if (weight != 0) {
          sum.next(1);
          sum.set(0, 1, map + y * row, weight);
        }
      }
      sum.finish(-__builtin_inff(), lines);
      shrink(lines, width, c, factor, to + r * width * c);
    } else {
      for (int64_t y = r * factor; y < (r + 1) * factor; ++y) {
        sum.next(1);
        sum.set(0, 1, map + y * row, 1);
      }
      sum.finish(-__builtin_inff(), lines);
      fold(lines, width, c, factor, to + r * width * c);
    }
  }
}

// grads = weight * s, and <x, s>; x is null without weights. Partial sums of kPiece values in float, their sum in double.
template <class T> double emit(const float *s, const T *x, float weight, int64_t count, T *grads) {
  constexpr int64_t kPiece = 1024;
  double product = 0;
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t end = begin + kPiece < count ? begin + kPiece : count;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i)
      store(grads + i, weight * s[i]);
    float partial = 0;
    if (x) {
#pragma omp simd reduction(+ : partial)
      for (int64_t i = begin; i < end; ++i)
        partial += load(x + i) * s[i];
    }
    product += partial;
  }
  return product;
}

// In the workspace: g, two rows, s_t of every factor > 1.
template <class T> void backward(const RamSumGradArgs &a, int64_t n, float *workspace) {
  const int64_t row = a.w * a.c, size = a.h * row;
  const T *grad = static_cast<const T *>(a.grad) + n * size, *out = static_cast<const T *>(a.out) + n * size;
  float *g = workspace, *lines = g + size, *next = lines + 2 * row;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float y = load(out + i), value = load(grad + i);
    g[i] = y <= 0 ? 0 : value; // a NaN in y lets the gradient through, as in PyTorch
  }

  int order[kMaxTerms]; // by factor
  for (int i = 0; i < a.m; ++i) {
    int at = i;
    for (; at > 0 && a.factors[order[at - 1]] > a.factors[i]; --at)
      order[at] = order[at - 1];
    order[at] = i;
  }
  const float *maps[kMaxTerms];
  for (int i = 0; i < a.m; ++i) {
    const int t = order[i];
    const int64_t f = a.factors[t], count = a.h / f * (a.w / f) * a.c;
    // For nearest, s_t is made from that of a smaller factor: block sums of block sums are block sums.
    int64_t done = 1;
    maps[i] = g;
    for (int j = 0; j < i; ++j)
      if (const int64_t smaller = a.factors[order[j]]; a.bilinear ? smaller == f : f % smaller == 0)
        done = smaller, maps[i] = maps[j];
    if (f != done) {
      reduce(maps[i], a.h / done, a.w / done, a.c, f / done, a.bilinear, lines, next);
      maps[i] = next;
      next += count;
    }
    const T *x = a.weights ? static_cast<const T *>(a.inputs[t]) + n * count : nullptr;
    const float weight = a.weights ? a.weights[n / a.share * a.m + t] : 1.0f;
    const double product = emit(maps[i], x, weight, count, static_cast<T *>(a.grads[t]) + n * count);
    if (a.weights)
      a.weight_grads[n * a.m + t] = product;
  }
}

} // namespace ram

int64_t ram_sum_workspace(const RamSumArgs &args) { return args.threads * ram::room_of(args) * int64_t(sizeof(float)); }

void ram_sum_fwd(const RamSumArgs &args) {
  split(args.threads, args.threads, [&](int64_t worker, int64_t last) {
    for (; worker < last; ++worker)
      if (args.bfloat16)
        ram::forward<ram::BFloat16>(args, worker);
      else
        ram::forward<float>(args, worker);
  });
}

void ram_sum_bwd(const RamSumGradArgs &args) {
  split(args.threads, args.threads, [&](int64_t worker, int64_t last) {
    for (; worker < last; ++worker)
      for (int64_t n = args.n * worker / args.threads; n < args.n * (worker + 1) / args.threads; ++n) {
        float *workspace = args.workspace + worker * args.room;
        if (args.bfloat16)
          ram::backward<ram::BFloat16>(args, n, workspace);
        else
          ram::backward<float>(args, n, workspace);
      }
  });
}
