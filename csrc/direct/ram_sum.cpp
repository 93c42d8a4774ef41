#include "arguments.h"
#include "direct.h"

namespace hrpose {

namespace {

// What the kernel takes for images, see RamSumArgs. Pixels of maps of one size have no neighbours: any shape will do.
void as_images(RamSumArgs &args, bool one_size, bool channels_last) {
  if (one_size)
    args.h *= args.w, args.w = args.c, args.c = 1; // n x c x (h w), or n x (h w) x c: either way one sample
  else if (!channels_last)
    args.n *= args.c, args.share = args.c, args.c = 1;
}

} // namespace

// ram_sum(inputs, weights, bilinear, ...)
PyObject *ram_sum(PyObject *const *arguments) {
  if (!PyList_Check(arguments[0]))
    Py_RETURN_NONE;
  const Mode mode(arguments + 3);
  const Py_ssize_t terms = PyList_GET_SIZE(arguments[0]);
  if (terms < 1 || terms > kMaxTerms)
    Py_RETURN_NONE;
  PyObject *tensors[kMaxTerms]; // others may change the list while the kernel runs
  TensorView views[kMaxTerms];
  const void *inputs[kMaxTerms];
  int64_t factors[kMaxTerms], h = 0, w = 0;
  for (Py_ssize_t t = 0; t < terms; ++t) {
    tensors[t] = PyList_GET_ITEM(arguments[0], t);
    if (!view_maps(tensors[t], mode, &views[t]))
      Py_RETURN_NONE;
    h = views[t].shape[2] > h ? views[t].shape[2] : h, w = views[t].shape[3] > w ? views[t].shape[3] : w;
    inputs[t] = views[t].data;
  }
  const int64_t n = views[0].shape[0], c = views[0].shape[1];
  Py_ssize_t full = -1;
  bool one_size = true;
  for (Py_ssize_t t = 0; t < terms; ++t) {
    const int64_t *shape = views[t].shape;
    factors[t] = h / shape[2];
    const bool whole = shape[2] * factors[t] == h && shape[3] * factors[t] == w;
    if (!whole || shape[0] != n || shape[1] != c || !same_type(views[0], views[t]))
      Py_RETURN_NONE;
    if (factors[t] > 1)
      one_size = false;
    else if (full < 0)
      full = t;
  }
  const bool channels_last = full >= 0 && !in_order(views[full]);
  for (Py_ssize_t t = 0; t < terms; ++t)
    if (full < 0 || !(channels_last ? is_nhwc(views[t]) : in_order(views[t])))
      Py_RETURN_NONE;
  TensorView weights = {};
  if (arguments[1] != Py_None) {
    if (!view_value(arguments[1], 2, mode, &weights) || !is_float(weights) || !in_order(weights) ||
        weights.shape[0] != n || weights.shape[1] != terms)
      Py_RETURN_NONE;
  }
  RamSumArgs args = {inputs, factors, static_cast<const float *>(weights.data), nullptr, nullptr, n, h, w, c, 1,
                     int(terms), arguments[2] == Py_True, is_bf16(views[0]), 1};
  as_images(args, one_size, channels_last);
  args.threads = mode.workers(n * c * h * w);
  for (Py_ssize_t t = 0; t < terms; ++t)
    Py_INCREF(tensors[t]);
  PyObject *result =
      filled(args, views[0], n, c, h, w, channels_last, &Kernels::ram_sum_workspace, &Kernels::ram_sum_fwd);
  for (Py_ssize_t t = 0; t < terms; ++t)
    Py_DECREF(tensors[t]);
  return result;
}

} // namespace hrpose
