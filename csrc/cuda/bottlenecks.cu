// Which kernels of bottlenecks.h or bottlenecks_wgmma.h run a chain, if any.
#include "bottlenecks_wgmma.h"

namespace hrpose::cuda {

namespace {

// Calls f(layout of C = mid); false if there is no kernel for it.
template <class F> bool with_width(const BottlenecksArgs &args, F f) {
  switch (args.mid) {
  case 32:
    return f(Layout<32>{args}), true;
  case 64:
    return f(Layout<64>{args}), true;
  case 128:
    return f(Layout<128>{args}), true;
  }
  return false;
}

template <int C> constexpr bool kHasWgmma = C < 128; // whose weights fit into shared memory

const char *current(Card *card) {
  const char *error = device_attribute(cudaDevAttrMultiProcessorCount, &card->multiprocessors);
  return error ? error : device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &card->shared_bytes);
}

} // namespace

const char *bottlenecks_workspace(const BottlenecksArgs &args, int64_t *bytes) {
  constexpr int64_t kLimit = int64_t(1) << 30; // half of what an int counts: pixels of a batch, values of an image
  *bytes = -1;
  Card card;
  int major = 0, minor = 0;
  if (const char *error = current(&card))
    return error;
  if (const char *error = device_attribute(cudaDevAttrComputeCapabilityMajor, &major))
    return error;
  if (const char *error = device_attribute(cudaDevAttrComputeCapabilityMinor, &minor))
    return error;
  const int64_t widest = max(args.mid, max(args.in_channels, args.out_channels));
  const bool sizes = args.in_channels % kGroup == 0 && args.out_channels % kGroup == 0 &&
                     args.n * args.h * args.w <= kLimit && args.h * args.w * widest <= kLimit;
  const bool capable = args.wgmma ? major == 9 && minor == 0 : major >= 8;
  if (capable && sizes)
    with_width(args, [&](auto layout) {
      constexpr int C = decltype(layout)::kWidth;
      bool fits = !args.wgmma && layout.fits(card);
      if constexpr (kHasWgmma<C>)
        fits = args.wgmma ? wgmma_fits(layout, card) : fits;
      if (fits)
        *bytes = layout.bytes();
    });
  return nullptr;
}

const char *bottlenecks_fwd(const BottlenecksArgs &args, Stream stream) {
  Card card;
  if (const char *error = current(&card))
    return error;
  const char *error = "bottlenecks: no kernel for these sizes";
  with_width(args, [&](auto layout) {
    constexpr int C = decltype(layout)::kWidth;
    const bool bfloat16 = args.type == Type::bfloat16;
    if (!args.wgmma)
      error = bfloat16 ? run_bottlenecks<BFloat16, C>(args, card, stream)
                       : run_bottlenecks<Half, C>(args, card, stream);
    else if constexpr (kHasWgmma<C>)
      error = bfloat16 ? run_bottlenecks_wgmma<BFloat16, C>(args, card, stream)
                       : run_bottlenecks_wgmma<Half, C>(args, card, stream);
  });
  return error;
}

} // namespace hrpose::cuda
