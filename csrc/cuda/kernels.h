// Host launchers of the CUDA kernels. Each returns null, or a message for the Python exception; none prints, exits or
// allocates for longer than its call. Those that take a stream run on the current device, neither wait nor allocate, and
// so may be captured in a graph; they trust their caller (hrpose/ops).
#pragma once
#include <cstdint>

struct CUstream_st; // cudaStream_t is a pointer to it

namespace hrpose::cuda {

using Stream = CUstream_st *;
enum class Type : int { float32, bfloat16, float16 }; // the numbers are those of CUDA_TYPES in hrpose/ops/_ext.py

// Versions as 1000 * major + 10 * minor; 0 devices without a message means: the driver works and sees no card.
const char *probe_host(int *driver_version, int *runtime_version, int *device_count);

// code_arch: __CUDA_ARCH__ of the code that runs on the device (900 for sm_90), written by the device itself.
const char *probe_device(int device, char name[256], int *major, int *minor, int *code_arch);

// All tensors are dense and row-major, on the device. Sizes are >= 1 except n >= 0.
constexpr int kMaxJoints = 256; // MAX_JOINTS in hrpose/ops/decode.py: their permutation travels with the launch
constexpr int kMaxBlur = 27; // MAX_BLUR in hrpose/ops/decode.py: a warp's lanes take the rows of blur + 4
struct DecodeArgs {
  const void *heatmaps;     // (n, k, h, w), h w <= 2^30
  const void *flipped;      // the same shape, maps of the mirrored input, or null
  const int *perm;          // (k) on the host, read before return: joint of `flipped` that is joint k; with `flipped`
  const double *transforms; // (n, 2, 3) heatmap px -> image px, or null for heatmap px
  float *keypoints;         // (n, k, 2) out
  float *scores;            // (n, k) out
  int64_t n, k, h, w;
  bool shift;         // move the mirrored maps one column to the right
  bool quarter;       // refine by a quarter of a pixel
  const double *taps; // (blur) on the host, read before return: DARK's Gaussian; with blur
  int blur;           // refine by DARK: odd, 3..kMaxBlur; else 0
  Type type;          // of the maps
};
const char *decode_fwd(const DecodeArgs &args, Stream stream);

struct CropArgs {
  const uint8_t *image;     // (image_h, image_w, 3); both sides <= 2^20
  const double *transforms; // (n, 2, 3) image px -> crop px
  void *out;                // (n, 3, h, w); with channels_last (n, h, w, 3); with mirror 2 n of them; at most 2^31 values
  bool *bad;                // (n) out: this transform cannot be inverted
  int64_t image_h, image_w, n, h, w;
  float scale[3], bias[3]; // out = grey * scale + bias, per channel
  bool opencv4;            // OpenCV 2.4-4.x fixed point instead of exact bilinear
  bool mirror;             // behind the crops, the same with their columns in reverse
  bool channels_last;
  Type type; // of out, rounded to nearest
};
const char *crop_fwd(const CropArgs &args, Stream stream);

// Images of h x w pixels of c values: n = N, c = C for channels_last; for NCHW every plane is an image, n = N C, c = 1.
// No tensor has 2^30 values.
constexpr int kMaxTerms = 8; // KERNEL_TERMS in hrpose/ops/ram_sum.py
struct RamSumArgs {
  const void *inputs[kMaxTerms]; // m of (n, h / f, w / f, c), like `out`
  int factors[kMaxTerms];        // m of f
  const float *weights;          // (n / share, m), or null for ones
  void *out;                     // (n, h, w, c)
  int n, h, w, c, share;         // share images have the weights of one sample
  int m;                         // 1..8
  bool bilinear;
  Type type; // of inputs and out
};
const char *ram_sum_fwd(const RamSumArgs &args, Stream stream);

struct RamSumGradArgs {
  const void *grad, *out;        // (n, h, w, c)
  const void *inputs[kMaxTerms]; // as in RamSumArgs; read only with weights
  int factors[kMaxTerms];        // m, in any order
  const float *weights;          // (n / share, m), or null for ones
  void *grads[kMaxTerms];        // m, of the shapes of the inputs
  float *products;               // (n / share, m, parts) out with weights: their gradient, to be summed over the parts
  int parts;                     // blocks for a term of a sample, >= 1
  int n, h, w, c, share, m;
  bool bilinear;
  Type type;
};
const char *ram_sum_bwd(const RamSumGradArgs &args, Stream stream);

// A chain of residual bottlenecks, see bottlenecks.h. Maps are NHWC; sizes are >= 1, addresses on the device multiples of
// 16.
struct BottlenecksArgs {
  const void *x;            // (n, h, w, in_channels)
  void *out;                // (n, ceil(h / stride), ceil(w / stride), out_channels)
  const void *weights;      // in the order of `_slices`, hrpose/ops/bottlenecks.py, as fragments or core matrices
  const float *biases;      // of each block b1 (mid), b2 (mid), b3 (out)
  const int64_t *dilations; // (blocks), in host memory
  void *workspace;          // of bottlenecks_workspace() bytes
  int64_t n, h, w, in_channels, mid, out_channels, blocks, stride;
  bool project; // the shortcut of block 0 is a projection
  bool wgmma;   // weights are core matrices, for bottlenecks_wgmma.h: code for sm_90a on compute capability 9.0
  Type type;    // of the maps and weights: bfloat16 or float16
};
// bytes: -1 if the kernel does not take these sizes or the current device.
const char *bottlenecks_workspace(const BottlenecksArgs &args, int64_t *bytes);
const char *bottlenecks_fwd(const BottlenecksArgs &args, Stream stream);

} // namespace hrpose::cuda
