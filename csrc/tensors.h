// Tensors of Python, looked at and made through C functions and without a header of torch: DLPack's table of such
// functions, which recent releases of torch hand out (torch.Tensor.__dlpack_c_exchange_api__). Through it a tensor
// costs a tenth of a microsecond, through its attributes in Python one and more, above all right after a kernel, which
// has emptied the caches. https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <Python.h>
#include <cstdint>

namespace hrpose {

// Where a tensor lies: DLPack's DLTensor.
struct TensorView {
  void *data;
  int32_t device_type, device_index, ndim;
  uint8_t code, bits; // of a value
  uint16_t lanes;
  int64_t *shape, *strides; // strides in values
  uint64_t byte_offset;
};

// Take `table`, a capsule, for tensors of `type` from now on. False, and nothing changes, if it is of another version.
bool read_tensors(PyTypeObject *type, PyObject *table);

// Is it a tensor of exactly that type, on a CPU, whose values are as they lie in memory? Then `view` says where, while
// the tensor is there and as it is.
bool view_tensor(PyObject *object, TensorView *view);

// A new tensor, dense and uninitialised, whose values have the type of `like`; without `strides` in the order of the
// axes. Null with an exception set if there is no memory.
PyObject *new_tensor(const TensorView &like, int ndim, int64_t *shape, int64_t *strides, void **data);

} // namespace hrpose
