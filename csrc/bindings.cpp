// The Python module hrpose._C, and the only file that knows pybind11. Pointers come as integers from hrpose/ops, which
// has checked and allocated everything; kernels run with the GIL released.
#include "cpu/kernels.h"
#include "direct/direct.h"
#include "tensors.h"
#include "workspace.h"
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#ifdef HRPOSE_WITH_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <class T> T *pointer(Address address) { return reinterpret_cast<T *>(address); }

py::list isas() {
  py::list names;
  const char *name;
  for (int i = 0;; ++i) {
    const bool here = hrpose::supported(i, &name);
    if (!name)
      return names;
    if (here)
      names.append(name);
  }
}

void decode_fwd(Address heatmaps, Address flipped, Address perm, Address transforms, Address keypoints, Address scores,
                int64_t n, int64_t k, int64_t h, int64_t w, bool shift, bool quarter, Address taps, int blur,
                int threads) {
  hrpose::active().decode_fwd({pointer<const float>(heatmaps), pointer<const float>(flipped),
                               pointer<const int32_t>(perm), pointer<const double>(transforms),
                               pointer<float>(keypoints), pointer<float>(scores), n, k, h, w, shift, quarter,
                               pointer<const double>(taps), blur, threads});
}

int64_t crop_fwd(Address image, Address transforms, Address out, int64_t image_stride, int64_t image_step,
                 int64_t image_h, int64_t image_w, int64_t n, int64_t h, int64_t w, float s0, float s1, float s2,
                 float b0, float b1, float b2, bool opencv4, bool mirror, bool channels_last, bool bf16, int threads) {
  return hrpose::active().crop_fwd({pointer<const uint8_t>(image),
                                    pointer<const double>(transforms),
                                    pointer<void>(out),
                                    image_stride,
                                    image_step,
                                    image_h,
                                    image_w,
                                    n,
                                    h,
                                    w,
                                    {s0, s1, s2},
                                    {b0, b1, b2},
                                    opencv4,
                                    mirror,
                                    channels_last,
                                    bf16,
                                    threads});
}

std::vector<void *> pointers(const std::vector<Address> &addresses) {
  std::vector<void *> result;
  for (const Address address : addresses)
    result.push_back(pointer<void>(address));
  return result;
}

void ram_sum_bwd(Address grad, Address out, const std::vector<Address> &inputs, const std::vector<int64_t> &factors,
                 Address weights, const std::vector<Address> &grads, Address weight_grads, Address workspace,
                 int64_t room, int64_t n, int64_t h, int64_t w, int64_t c, int64_t share, bool bilinear, bool bfloat16,
                 int threads) {
  hrpose::active().ram_sum_bwd({pointer<const void>(grad), pointer<const void>(out), pointers(inputs).data(),
                                factors.data(), pointer<const float>(weights), pointers(grads).data(),
                                pointer<double>(weight_grads), pointer<float>(workspace), room, n, h, w, c, share,
                                int(factors.size()), bilinear, bfloat16, threads});
}

// The kernel and the measuring of its workspace take the same arguments.
template <class Result, Result (*hrpose::Kernels::*kernel)(const hrpose::RamSumArgs &)>
Result ram_sum(const std::vector<Address> &inputs, const std::vector<int64_t> &factors, Address weights, Address out,
               Address workspace, int64_t n, int64_t h, int64_t w, int64_t c, int64_t share, bool bilinear,
               bool bfloat16, int threads) {
  return (hrpose::active().*kernel)({pointers(inputs).data(), factors.data(), pointer<const float>(weights),
                                     pointer<void>(out), pointer<float>(workspace), n, h, w, c, share,
                                     int(factors.size()), bilinear, bfloat16, threads});
}

template <class Result, Result (*hrpose::Kernels::*kernel)(const hrpose::BottlenecksArgs &)>
Result bottlenecks(Address x, Address out, Address weights, Address biases, Address winograd, Address dilations,
                   Address workspace, int64_t n, int64_t h, int64_t w, int64_t in_channels, int64_t mid,
                   int64_t out_channels, int64_t blocks, int64_t stride, bool bf16, bool project, int threads) {
  return (hrpose::active().*kernel)({pointer<const void>(x), pointer<void>(out), pointer<const void>(weights),
                                     pointer<const float>(biases), pointer<const float>(winograd),
                                     pointer<const int64_t>(dilations), pointer<void>(workspace), n, h, w, in_channels,
                                     mid, out_channels, blocks, stride, bf16, project, threads});
}

template <class Result, Result (*hrpose::Kernels::*kernel)(const hrpose::ConvArgs &)>
Result conv(Address x, Address residual, Address out, Address weights, Address bias, Address workspace, int64_t n,
            int64_t h, int64_t w, int64_t in_channels, int64_t out_channels, int64_t size, int64_t stride, int tile,
            bool rectify, bool bf16, int threads) {
  return (hrpose::active().*kernel)({pointer<const void>(x), pointer<const void>(residual), pointer<void>(out),
                                     pointer<const void>(weights), pointer<const float>(bias),
                                     pointer<void>(workspace), n, h, w, in_channels, out_channels, size, stride, tile,
                                     rectify, bf16, threads});
}

template <class Result, Result (*hrpose::Kernels::*kernel)(const hrpose::BasicBlocksArgs &)>
Result basic_blocks(Address x, Address out, Address weights, Address biases, Address workspace, int64_t n, int64_t h,
                    int64_t w, int64_t channels, int64_t blocks, int tile, bool bf16, int threads) {
  return (hrpose::active().*kernel)({pointer<const void>(x), pointer<void>(out), pointer<const void>(weights),
                                     pointer<const float>(biases), pointer<void>(workspace), n, h, w, channels, blocks,
                                     tile, bf16, threads});
}

template <class Result, Result (*hrpose::Kernels::*kernel)(const hrpose::StemArgs &)>
Result stem(Address x, Address out, Address weights, Address bias, Address workspace, int64_t n, int64_t h, int64_t w,
            int64_t stride_n, int64_t stride_c, int64_t stride_h, int64_t stride_w, int64_t out_channels, int64_t size,
            int64_t stride, int64_t depth, bool pool, bool bf16, int threads) {
  return (hrpose::active().*kernel)({pointer<const void>(x), pointer<void>(out), pointer<const void>(weights),
                                     pointer<const float>(bias), pointer<void>(workspace), n, h, w, stride_n, stride_c,
                                     stride_h, stride_w, out_channels, size, stride, depth, pool, bf16, threads});
}

#ifdef HRPOSE_WITH_CUDA
void raise(const char *error) {
  if (error)
    throw std::runtime_error(error);
}

using hrpose::cuda::Type;

hrpose::cuda::Stream stream_of(Address stream) { return pointer<CUstream_st>(stream); }

void decode_fwd_cuda(Address heatmaps, Address flipped, const std::vector<int> &perm, Address transforms,
                     Address keypoints, Address scores, int64_t n, int64_t k, int64_t h, int64_t w, bool shift,
                     bool quarter, const std::vector<double> &taps, int type, Address stream) {
  raise(hrpose::cuda::decode_fwd({pointer<const void>(heatmaps), pointer<const void>(flipped), perm.data(),
                                  pointer<const double>(transforms), pointer<float>(keypoints), pointer<float>(scores),
                                  n, k, h, w, shift, quarter, taps.data(), int(taps.size()), Type(type)},
                                 stream_of(stream)));
}

void crop_fwd_cuda(Address image, Address transforms, Address out, Address bad, int64_t image_h, int64_t image_w,
                   int64_t n, int64_t h, int64_t w, float s0, float s1, float s2, float b0, float b1, float b2,
                   bool opencv4, bool mirror, bool channels_last, int type, Address stream) {
  raise(hrpose::cuda::crop_fwd({pointer<const uint8_t>(image),
                                pointer<const double>(transforms),
                                pointer<void>(out),
                                pointer<bool>(bad),
                                image_h,
                                image_w,
                                n,
                                h,
                                w,
                                {s0, s1, s2},
                                {b0, b1, b2},
                                opencv4,
                                mirror,
                                channels_last,
                                Type(type)},
                               stream_of(stream)));
}

void ram_sum_fwd_cuda(const std::vector<Address> &inputs, const std::vector<int> &factors, Address weights, Address out,
                      int n, int h, int w, int c, int share, bool bilinear, int type, Address stream) {
  hrpose::cuda::RamSumArgs args = {{}, {}, pointer<const float>(weights), pointer<void>(out), n, h, w, c, share,
                                   int(factors.size()), bilinear, Type(type)};
  for (size_t t = 0; t < factors.size(); ++t)
    args.inputs[t] = pointer<const void>(inputs[t]), args.factors[t] = factors[t];
  raise(hrpose::cuda::ram_sum_fwd(args, stream_of(stream)));
}

void ram_sum_bwd_cuda(Address grad, Address out, const std::vector<Address> &inputs, const std::vector<int> &factors,
                      Address weights, const std::vector<Address> &grads, Address products, int parts, int n, int h,
                      int w, int c, int share, bool bilinear, int type, Address stream) {
  hrpose::cuda::RamSumGradArgs args = {pointer<const void>(grad), pointer<const void>(out), {}, {},
                                       pointer<const float>(weights), {}, pointer<float>(products), parts, n, h, w, c,
                                       share, int(factors.size()), bilinear, Type(type)};
  for (size_t t = 0; t < inputs.size(); ++t)
    args.inputs[t] = pointer<const void>(inputs[t]);
  for (size_t t = 0; t < factors.size(); ++t)
    args.factors[t] = factors[t], args.grads[t] = pointer<void>(grads[t]);
  raise(hrpose::cuda::ram_sum_bwd(args, stream_of(stream)));
}

py::dict cuda_host() {
  int driver, runtime, devices;
  raise(hrpose::cuda::probe_host(&driver, &runtime, &devices));
  py::dict result;
  result["driver"] = driver;
  result["runtime"] = runtime;
  result["devices"] = devices;
  return result;
}

py::dict cuda_device(int device) {
  char name[256];
  int major, minor, arch;
  const char *error = hrpose::cuda::probe_device(device, name, &major, &minor, &arch);
  py::dict result;
  result["name"] = name;
  result["capability"] = py::make_tuple(major, minor);
  result["code_arch"] = arch ? py::object(py::int_(arch)) : py::none();
  result["error"] = error ? py::object(py::str(error)) : py::none();
  return result;
}

int64_t bottlenecks_workspace_cuda(const std::vector<int64_t> &dilations, int64_t n, int64_t h, int64_t w,
                                   int64_t in_channels, int64_t mid, int64_t out_channels, int64_t stride, bool project,
                                   bool wgmma, int type) {
  int64_t bytes;
  raise(hrpose::cuda::bottlenecks_workspace({nullptr, nullptr, nullptr, nullptr, dilations.data(), nullptr, n, h, w,
                                             in_channels, mid, out_channels, int64_t(dilations.size()), stride, project,
                                             wgmma, Type(type)},
                                            &bytes));
  return bytes;
}

void bottlenecks_fwd_cuda(Address x, Address out, Address weights, Address biases, Address workspace,
                          const std::vector<int64_t> &dilations, int64_t n, int64_t h, int64_t w, int64_t in_channels,
                          int64_t mid, int64_t out_channels, int64_t stride, bool project, bool wgmma, int type,
                          Address stream) {
  raise(hrpose::cuda::bottlenecks_fwd({pointer<const void>(x), pointer<void>(out), pointer<const void>(weights),
                                       pointer<const float>(biases), dilations.data(), pointer<void>(workspace), n, h,
                                       w, in_channels, mid, out_channels, int64_t(dilations.size()), stride, project,
                                       wgmma, Type(type)},
                                      stream_of(stream)));
}
#endif

} // namespace

PYBIND11_MODULE(_C, m) {
  using release = py::call_guard<py::gil_scoped_release>;
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("isas", isas);
  m.def("isa", [] { return hrpose::active().isa; });
  m.def("set_isa", hrpose::set_isa);
  m.def("advise_huge_pages",
        [](Address begin, std::size_t size) { hrpose::advise_huge_pages(pointer<void>(begin), size); });
  m.def("read_tensors", [](py::type type, const py::object &table) {
    return hrpose::read_tensors(reinterpret_cast<PyTypeObject *>(type.ptr()), table.ptr());
  });
  py::module_ direct = m.def_submodule("direct"); // ops on tensors, see direct/direct.h
  PyModule_AddFunctions(direct.ptr(), hrpose::direct_methods);
  m.def("bf16", [] { return hrpose::active().bf16; });
  m.def("decode_fwd", decode_fwd, release());
  m.def("crop_fwd", crop_fwd, release());
  m.def("ram_sum_workspace", ram_sum<int64_t, &hrpose::Kernels::ram_sum_workspace>);
  m.def("ram_sum_fwd", ram_sum<void, &hrpose::Kernels::ram_sum_fwd>, release());
  m.def("ram_sum_bwd", ram_sum_bwd, release());
  m.def("bottlenecks_workspace", bottlenecks<int64_t, &hrpose::Kernels::bottlenecks_workspace>);
  m.def("bottlenecks_fwd", bottlenecks<void, &hrpose::Kernels::bottlenecks_fwd>, release());
  m.def("conv_workspace", conv<int64_t, &hrpose::Kernels::conv_workspace>);
  m.def("conv_fwd", conv<void, &hrpose::Kernels::conv_fwd>, release());
  m.def("basic_blocks_workspace", basic_blocks<int64_t, &hrpose::Kernels::basic_blocks_workspace>);
  m.def("basic_blocks_fwd", basic_blocks<void, &hrpose::Kernels::basic_blocks_fwd>, release());
  m.def("stem_workspace", stem<int64_t, &hrpose::Kernels::stem_workspace>);
  m.def("stem_fwd", stem<void, &hrpose::Kernels::stem_fwd>, release());
#ifdef HRPOSE_WITH_CUDA
  m.attr("cuda_archs") = HRPOSE_CUDA_ARCHS;
  m.def("cuda_host", cuda_host);
  m.def("cuda_device", cuda_device);
  m.def("decode_fwd_cuda", decode_fwd_cuda, release());
  m.def("crop_fwd_cuda", crop_fwd_cuda, release());
  m.def("ram_sum_fwd_cuda", ram_sum_fwd_cuda, release());
  m.def("ram_sum_bwd_cuda", ram_sum_bwd_cuda, release());
  m.def("bottlenecks_workspace_cuda", bottlenecks_workspace_cuda);
  m.def("bottlenecks_fwd_cuda", bottlenecks_fwd_cuda, release());
#else
  m.attr("cuda_archs") = "";
#endif
}
