// Host launchers of the CUDA kernels. Each returns null, or a message for the Python exception; none prints, exits or
// allocates for longer than its call.
#pragma once

namespace hrpose::cuda {

// Versions as 1000 * major + 10 * minor; 0 devices without a message means: the driver works and sees no card.
const char *probe_host(int *driver_version, int *runtime_version, int *device_count);

// code_arch: __CUDA_ARCH__ of the code that runs on the device (900 for sm_90), written by the device itself.
const char *probe_device(int device, char name[256], int *major, int *minor, int *code_arch);

} // namespace hrpose::cuda
