// Which CUDA devices there are, and whether this build has code that runs on them.
#include "device.h"
#include <cstring>

namespace hrpose::cuda {
namespace {

// One thread writes four bytes: the compile-time architecture of the image the driver picked for this card.
__global__ void code_arch_kernel(int *out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

} // namespace

const char *probe_host(int *driver_version, int *runtime_version, int *device_count) {
  *driver_version = *runtime_version = *device_count = 0;
  cudaError_t status = cudaRuntimeGetVersion(runtime_version);
  if (status == cudaSuccess)
    status = cudaDriverGetVersion(driver_version); // 0 without a driver, no error
  if (status != cudaSuccess)
    return message(status);
  status = cudaGetDeviceCount(device_count);
  if (status != cudaSuccess)
    *device_count = 0;
  if (status == cudaErrorNoDevice || (status == cudaErrorInsufficientDriver && *driver_version == 0)) {
    cudaGetLastError();
    return nullptr; // a machine without a card or without a driver is an answer, not a failure
  }
  return message(status);
}

const char *probe_device(int device, char name[256], int *major, int *minor, int *code_arch) {
  *major = *minor = *code_arch = 0;
  name[0] = 0;
  int previous = 0;
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDevice(&previous);
  if (status == cudaSuccess)
    status = cudaGetDeviceProperties(&properties, device);
  if (status != cudaSuccess)
    return message(status);
  std::strncpy(name, properties.name, 255);
  name[255] = 0;
  *major = properties.major;
  *minor = properties.minor;

  int *out = nullptr;
  status = cudaSetDevice(device);
  if (status == cudaSuccess)
    status = cudaMalloc(&out, sizeof(int));
  if (status == cudaSuccess) {
    code_arch_kernel<<<1, 1>>>(out);
    status = cudaGetLastError();
  }
  if (status == cudaSuccess)
    status = cudaMemcpy(code_arch, out, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(out);
  cudaSetDevice(previous);
  return message(status);
}

} // namespace hrpose::cuda
