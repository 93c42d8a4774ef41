// Which instruction set runs: the best one this processor has, until set_isa() says otherwise.
#include "kernels.h"
#include <atomic>
#include <cstring>

namespace hrpose {

extern const Kernels kernels_generic;
#ifdef HRPOSE_X86
extern const Kernels kernels_avx2, kernels_avx512;
#endif

namespace {

struct Candidate {
  const Kernels *kernels;
  bool (*runs_here)();
};

// __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
const Candidate kCandidates[] = {
#ifdef HRPOSE_X86
    {&kernels_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
     }},
    {&kernels_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }},
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
