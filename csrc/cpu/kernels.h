// The table of CPU kernels: one per instruction set, the same members in each. Kernels trust their caller (hrpose/ops).
#pragma once
#include <cstdint>

namespace hrpose {

constexpr int kMaxBlur = 27; // MAX_BLUR in hrpose/ops/decode.py
constexpr int kMaxTerms = 8; // KERNEL_TERMS in hrpose/ops/ram_sum.py

// All tensors are dense and row-major. Sizes are >= 1 except n >= 0. threads >= 1 is the number of workers to split
// over.
struct DecodeArgs {
  const float *heatmaps;    // (n, k, h, w)
  const float *flipped;     // the same shape, maps of the mirrored input, or null
  const int32_t *perm;      // (k): joint of `flipped` that is joint k; read only with `flipped`
  const double *transforms; // (n, 2, 3) heatmap px -> image px, or null for heatmap px
  float *keypoints;         // (n, k, 2) out
  float *scores;            // (n, k) out
  int64_t n, k, h, w;
  bool shift;         // move the mirrored maps one column to the right
  bool quarter;       // refine by a quarter of a pixel
  const double *taps; // (blur) of DARK's Gaussian; read only with blur
  int blur;           // refine by DARK: odd, 3..kMaxBlur; else 0
  int threads;
};

struct CropArgs {
  const uint8_t *image;     // (image_h, image_w, 3), rows image_stride >= 0 and pixels image_step bytes apart
  const double *transforms; // (n, 2, 3) image px -> crop px
  void *out;                // (n, 3, h, w); with channels_last (n, h, w, 3); with mirror 2 n of them
  int64_t image_stride, image_step, image_h, image_w; // image_step 3 or 4; both sides <= 2^20
  int64_t n, h, w;
  float scale[3], bias[3]; // out = grey * scale + bias, per channel
  bool opencv4;            // OpenCV 2.4-4.x fixed point instead of exact bilinear
  bool mirror;             // behind the crops, the same with their columns in reverse
  bool channels_last;
  bool bf16; // out, rounded to nearest; else float
  int threads;
};

// Images of h x w pixels of c values: n = N, c = C for channels_last; for NCHW every plane is an image, n = N C, c = 1.
struct RamSumArgs {
  const void *const *inputs; // m of (n, h / f, w / f, c), float or bfloat16, like `out`
  const int64_t *factors;    // (m) f
  const float *weights;      // (n / share, m), or null for ones
  void *out;                 // (n, h, w, c)
  float *workspace;          // of ram_sum_workspace() bytes
  int64_t n, h, w, c, share; // share images have the weights of one sample
  int m;                     // 1..kMaxTerms
  bool bilinear, bfloat16;
  int threads;
};

struct RamSumGradArgs {
  const void *grad, *out;    // (n, h, w, c)
  const void *const *inputs; // as in RamSumArgs; read only with weights
  const int64_t *factors;    // (m), in any order
  const float *weights;      // (n / share, m), or null for ones
  void *const *grads;        // m, of the shapes of the inputs
  double *weight_grads;      // (n, m): of each image; written only with weights
  float *workspace;          // (threads, room), room = (h + 2) w c + the sizes of maps of factors > 1, per image
  int64_t room, n, h, w, c, share;
  int m;
  bool bilinear, bfloat16;
  int threads;
};

// A chain of residual bottlenecks, see bottlenecks.inl. Maps are NHWC; channels are multiples of 16.
struct BottlenecksArgs {
  const void *x; // (n, h, w, in_channels)
  void *out;     // (n, ceil(h / stride), ceil(w / stride), out_channels)
  // Panels of each block's W1 (mid x in), W2 (9 x mid x mid) and W3 (out x mid), then of the projection (out x in).
  const void *weights;
  const float *biases;      // of each block b1 (mid), b2 (mid), b3 (out)
  const float *winograd;    // of each block (36 x mid x mid) in panels; null: always the direct 3x3
  const int64_t *dilations; // (blocks)
  void *workspace;          // of bottlenecks_workspace() bytes
  int64_t n, h, w, in_channels, mid, out_channels, blocks, stride;
  bool bf16;    // x, out and weights, in panels of pairs; else float. Only where Kernels::bf16
  bool project; // the shortcut of block 0 is a projection
  int threads;
};

// A convolution and what follows it, see conv.inl. Maps are NHWC; channels are multiples of 16.
struct ConvArgs {
  const void *x;        // (n, h, w, in_channels)
  const void *residual; // like `out`, or null
  void *out;            // (n, ceil(h / stride), ceil(w / stride), out_channels)
  // Panels of a matrix (out x in) for each tap, or, if `tile`, for each of the (tile + 2)^2 factors of Winograd's way.
  const void *weights;
  const float *bias; // (out_channels)
  void *workspace;   // of conv_workspace() bytes
  int64_t n, h, w, in_channels, out_channels, kernel, stride; // kernel 1 or 3
  int tile;                                                   // 0, or 2 or 4 for a float 3x3 of stride 1
  bool rectify;
  bool bf16; // x, residual, out and weights, in panels of pairs; else float. Only where Kernels::bf16
  int threads;
};

// A chain of residual blocks of two 3x3 convolutions, see basic_blocks.inl. Maps are NHWC.
struct BasicBlocksArgs {
  const void *x;       // (n, h, w, channels), channels a multiple of 16
  void *out;           // the same
  const void *weights; // as ConvArgs', of the two convolutions of each block
  const float *biases; // (2 blocks, channels)
  void *workspace;     // of basic_blocks_workspace() bytes
  int64_t n, h, w, channels, blocks;
  int tile;  // 0, or 2 or 4 for float
  bool bf16; // as in ConvArgs
  int threads;
};

constexpr int kMaxKernel = 7; // of a stem

// The first layers of a network, see stem.inl.
struct StemArgs {
  const void *x;       // (n, 3, h, w) with the strides below, in values
  void *out;           // (n, out_h, out_w, out_channels): ceil(h / stride), with pool half of that, rounded up
  const void *weights; // panels of a matrix (out_channels x depth) for each row of taps
  const float *bias;   // (out_channels), a multiple of 16
  void *workspace;     // of stem_workspace() bytes
  int64_t n, h, w, stride_n, stride_c, stride_h, stride_w, out_channels;
  int64_t kernel, stride, depth; // kernel odd, <= kMaxKernel; depth >= 3 kernel, for bf16 a multiple of 32
  bool pool, bf16;               // bf16 as in ConvArgs
  int threads;
};

struct Kernels {
  const char *isa;
  bool bf16; // does it take bf16?
  void (*decode_fwd)(const DecodeArgs &);
  // -1, or the index of the first transform that cannot be inverted; `out` is then untouched.
  int64_t (*crop_fwd)(const CropArgs &);
  int64_t (*ram_sum_workspace)(const RamSumArgs &);
  void (*ram_sum_fwd)(const RamSumArgs &);
  void (*ram_sum_bwd)(const RamSumGradArgs &);
  int64_t (*bottlenecks_workspace)(const BottlenecksArgs &);
  void (*bottlenecks_fwd)(const BottlenecksArgs &);
  int64_t (*conv_workspace)(const ConvArgs &);
  void (*conv_fwd)(const ConvArgs &);
  int64_t (*basic_blocks_workspace)(const BasicBlocksArgs &);
  void (*basic_blocks_fwd)(const BasicBlocksArgs &);
  int64_t (*stem_workspace)(const StemArgs &);
  void (*stem_fwd)(const StemArgs &);
};

const Kernels &active();
// Does instruction set `index` of this build, best first, run here? Its name goes to `name`, null past the last.
bool supported(int index, const char **name);
// False, and nothing changes, if this build or this processor lacks it.
bool set_isa(const char *name);

} // namespace hrpose
