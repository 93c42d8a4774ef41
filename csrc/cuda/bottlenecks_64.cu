#include "bottlenecks.h"

namespace hrpose::cuda {

template const char *run_bottlenecks<BFloat16, 64>(const BottlenecksArgs &, const Card &, Stream);
template const char *run_bottlenecks<Half, 64>(const BottlenecksArgs &, const Card &, Stream);

} // namespace hrpose::cuda
