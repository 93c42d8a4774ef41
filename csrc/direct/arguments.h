// What ops on tensors have in common: how they look at their arguments, run a kernel and make its result.
#pragma once
#include "../cpu/kernels.h"
#include "../tensors.h"
#include "../workspace.h"

namespace hrpose {

constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4; // DLPack's codes of types

inline bool is(const TensorView &view, uint8_t code, int bits) { return view.code == code && view.bits == bits; }
inline bool is_bf16(const TensorView &view) { return is(view, kBFloat, 16); }
inline bool is_float(const TensorView &view) { return is(view, kFloat, 32); }
inline bool same_type(const TensorView &a, const TensorView &b) { return a.code == b.code && a.bits == b.bits; }

// Do the values lie one after the other in the order of `axes`? Strides of axes of size 1 say nothing.
inline bool lies(const TensorView &view, const int *axes) {
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    const int axis = axes[i];
    if (view.shape[axis] != 1 && view.strides[axis] != expected)
      return false;
    expected *= view.shape[axis];
  }
  return true;
}
constexpr int kInOrder[] = {0, 1, 2, 3, 4}, kNhwc[] = {0, 2, 3, 1};
inline bool in_order(const TensorView &view) { return view.ndim <= 5 && lies(view, kInOrder); }
inline bool is_nhwc(const TensorView &view) { return lies(view, kNhwc); }

inline int64_t values(const TensorView &view) {
  int64_t count = 1;
  for (int i = 0; i < view.ndim; ++i)
    count *= view.shape[i];
  return count;
}

// What a call goes by besides its tensors: its last three arguments.
struct Mode {
  bool gradients;
  int threads;
  int64_t parallel_above;

  Mode(PyObject *const *last)
      : gradients(last[0] == Py_True), threads(int(PyLong_AsLong(last[1]))),
        parallel_above(PyLong_AsLongLong(last[2])) {}
  int workers(int64_t work) const { return work > parallel_above ? threads : 1; }
};

// A tensor of so many axes whose gradient nobody wants.
inline bool view_value(PyObject *object, int ndim, const Mode &mode, TensorView *view) {
  if (!view_tensor(object, view) || view->ndim != ndim)
    return false;
  if (!mode.gradients)
    return true;
  static PyObject *const requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject *wanted = PyObject_GetAttr(object, requires_grad);
  if (!wanted)
    PyErr_Clear();
  Py_XDECREF(wanted);
  return wanted == Py_False;
}

// Maps (n, c, h, w), each size at least 1, of a type that kernels take.
inline bool view_maps(PyObject *object, const Mode &mode, TensorView *view) {
  return view_value(object, 4, mode, view) && (is_float(*view) || is_bf16(*view)) && values(*view);
}

// Runs a kernel in a workspace as large as it says, without the GIL. False with an exception set if there is no memory.
template <class Args>
bool run(Args &args, int64_t (*Kernels::*measure)(const Args &), void (*Kernels::*kernel)(const Args &)) {
  const Kernels &kernels = active();
  const int64_t bytes = (kernels.*measure)(args);
  args.workspace = static_cast<decltype(args.workspace)>(workspace(size_t(bytes)));
  if (!args.workspace) {
    PyErr_NoMemory();
    return false;
  }
  Py_BEGIN_ALLOW_THREADS;
  (kernels.*kernel)(args);
  Py_END_ALLOW_THREADS;
  return true;
}

inline PyObject *new_maps(const TensorView &like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last,
                          void **data) {
  int64_t shape[] = {n, c, h, w}, nhwc[] = {h * w * c, 1, w * c, c};
  return new_tensor(like, 4, shape, channels_last ? nhwc : nullptr, data);
}

// A new tensor for the maps that args.out is to be, filled by the kernel.
template <class Args>
PyObject *filled(Args &args, const TensorView &like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last,
                 int64_t (*Kernels::*measure)(const Args &), void (*Kernels::*kernel)(const Args &)) {
  PyObject *result = new_maps(like, n, c, h, w, channels_last, &args.out);
  if (result && !run(args, measure, kernel))
    Py_CLEAR(result);
  return result;
}

inline int64_t strided(int64_t size, int64_t stride) { return 1 + (size - 1) / stride; }

} // namespace hrpose
