#include "bottlenecks.h"

namespace hrpose::cuda {

template const char *run_bottlenecks<BFloat16, 128>(const BottlenecksArgs &, const Card &, Stream);
template const char *run_bottlenecks<Half, 128>(const BottlenecksArgs &, const Card &, Stream);

} // namespace hrpose::cuda
