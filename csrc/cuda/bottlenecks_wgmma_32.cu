#include "bottlenecks_wgmma.h"

namespace hrpose::cuda {

template const char *run_bottlenecks_wgmma<BFloat16, 32>(const BottlenecksArgs &, const Card &, Stream);
template const char *run_bottlenecks_wgmma<Half, 32>(const BottlenecksArgs &, const Card &, Stream);

} // namespace hrpose::cuda
