// The list of kernels. Each kernels_<isa>.cpp includes this under its own flags, with HRPOSE_ISA_NAME defined.
//
// Everything but the table has internal linkage, and no STL is included: an inline function with external linkage would
// be merged across the units by the linker, and a baseline processor could then run its AVX-512 copy.
#include "kernels.h"
#include <cstring>
#include <sched.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define HRPOSE_PASTE(a, b) a##b
#define HRPOSE_TABLE(isa) HRPOSE_PASTE(kernels_, isa)
#define HRPOSE_TEXT(isa) #isa
#define HRPOSE_STRING(isa) HRPOSE_TEXT(isa)

namespace {
using hrpose::BasicBlocksArgs;
using hrpose::BottlenecksArgs;
using hrpose::ConvArgs;
using hrpose::CropArgs;
using hrpose::DecodeArgs;
using hrpose::kMaxBlur;
using hrpose::kMaxKernel;
using hrpose::RamSumArgs;
using hrpose::RamSumGradArgs;
using hrpose::StemArgs;

#ifdef __AVX512BF16__
constexpr bool kBf16 = true;
#else
constexpr bool kBf16 = false;
#endif

#include "bfloat16.h"
#include "vec.h"
#include "workers.h"

#include "product.inl"
#include "winograd.inl"

#include "bottlenecks.inl"
#include "conv.inl"
#include "padded.inl"
#include "basic_blocks.inl" // after conv.inl and padded.inl
#include "crop.inl"
#include "decode.inl"
#include "ram_sum.inl"
#include "stem.inl"
} // namespace

namespace hrpose {
extern const Kernels HRPOSE_TABLE(HRPOSE_ISA_NAME);
const Kernels HRPOSE_TABLE(HRPOSE_ISA_NAME) = {
    HRPOSE_STRING(HRPOSE_ISA_NAME), kBf16, decode_fwd, crop_fwd, ram_sum_workspace, ram_sum_fwd, ram_sum_bwd,
    bottlenecks_workspace, bottlenecks_fwd, conv_workspace, conv_fwd, basic_blocks_workspace, basic_blocks_fwd,
    stem_workspace, stem_fwd};
} // namespace hrpose
