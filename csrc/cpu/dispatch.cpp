// Which instruction set runs: the best one this processor has, until set_isa() says otherwise.
#include "kernels.h"
#include <atomic>
#include <cstring>
#ifdef HRPOSE_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hrpose {

extern const Kernels kernels_generic;
#ifdef HRPOSE_X86
extern const Kernels kernels_avx2, kernels_avx512, kernels_avx512bf16, kernels_amx;
#endif

namespace {

struct Candidate {
  const Kernels *kernels;
  bool (*runs_here)();
};

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
#ifdef HRPOSE_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef HRPOSE_AVX512BF16
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#ifdef HRPOSE_AMX
bool has_amx() {
#ifdef __linux__
  // Linux saves the tiles only for processes that have asked: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         !syscall(SYS_arch_prctl, 0x1023, 18);
#else
  return false;
#endif
}
#endif

const Candidate kCandidates[] = {
#ifdef HRPOSE_AMX
    {&kernels_amx, has_amx},
#endif
#ifdef HRPOSE_AVX512BF16
    {&kernels_avx512bf16, has_avx512bf16},
#endif
#ifdef HRPOSE_X86
    {&kernels_avx512, has_avx512},
    {&kernels_avx2, has_avx2},
#endif
    {&kernels_generic, [] { return true; }},
};
constexpr int kCount = sizeof(kCandidates) / sizeof(kCandidates[0]);

std::atomic<const Kernels *> chosen{nullptr};

} // namespace

const Kernels &active() {
  const Kernels *kernels = chosen.load(std::memory_order_acquire);
  for (int i = 0; !kernels; ++i)
    if (kCandidates[i].runs_here())
      chosen.store(kernels = kCandidates[i].kernels, std::memory_order_release);
  return *kernels;
}

bool supported(int index, const char **name) {
  *name = index < kCount ? kCandidates[index].kernels->isa : nullptr;
  return index < kCount && kCandidates[index].runs_here();
}

bool set_isa(const char *name) {
  for (const Candidate &candidate : kCandidates)
    if (!std::strcmp(candidate.kernels->isa, name) && candidate.runs_here()) {
      chosen.store(candidate.kernels, std::memory_order_release);
      return true;
    }
  return false;
}

} // namespace hrpose
