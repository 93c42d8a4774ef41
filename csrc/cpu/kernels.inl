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
using hrpose::BottlenecksArgs;
using hrpose::CropArgs;
using hrpose::DecodeArgs;

// Calls body(begin, end) on `workers` equal parts of 0..total. One worker runs in the calling thread without entering
// OpenMP, so that a process forked after its parent used OpenMP (a data loader's worker) cannot hang.
template <class Body> void split(int64_t total, int workers, Body body) {
  if (workers <= 1 || total <= 1) {
    body(int64_t(0), total);
    return;
  }
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int part = 0; part < workers; ++part)
    body(total * part / workers, total * (part + 1) / workers);
}

// Calls body(rank, size) once in each of at most `workers` workers: OpenMP may grant fewer.
template <class Body> void team(int workers, Body body) {
#ifdef _OPENMP
  if (workers > 1) {
#pragma omp parallel num_threads(workers)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

#ifdef __AVX512BF16__
constexpr bool kBf16 = true;
#else
constexpr bool kBf16 = false;
#endif

#include "bottlenecks.inl"
#include "crop.inl"
#include "decode.inl"
} // namespace

namespace hrpose {
extern const Kernels HRPOSE_TABLE(HRPOSE_ISA_NAME);
const Kernels HRPOSE_TABLE(HRPOSE_ISA_NAME) = {HRPOSE_STRING(HRPOSE_ISA_NAME), kBf16,          decode_fwd, crop_fwd,
                                               bottlenecks_workspace,          bottlenecks_fwd};
} // namespace hrpose
