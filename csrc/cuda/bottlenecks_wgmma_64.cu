#include "bottlenecks_wgmma.h"

namespace hrpose::cuda {

template const char *run_bottlenecks_wgmma<BFloat16, 64>(const BottlenecksArgs &, const Card &, Stream);
template const char *run_bottlenecks_wgmma<Half, 64>(const BottlenecksArgs &, const Card &, Stream);

} // namespace hrpose::cuda
