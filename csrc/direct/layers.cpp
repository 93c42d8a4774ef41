// The ops on maps with packed weights: conv, basic_blocks, bottlenecks, stem.
#include "arguments.h"
#include "direct.h"

namespace hrpose {

namespace {

// The fields of packed weights. Their tensors are dense.
struct Packed {
  PyObject *tuple;
  bool valid;

  Packed(PyObject *tuple, Py_ssize_t fields)
      : tuple(tuple), valid(PyTuple_Check(tuple) && PyTuple_GET_SIZE(tuple) == fields) {}
  PyObject *field(int index) const { return PyTuple_GET_ITEM(tuple, index); }
  bool flag(int index) {
    const int truth = PyObject_IsTrue(field(index));
    if (truth < 0)
      PyErr_Clear(), valid = false;
    return truth > 0;
  }
  int64_t number(int index, int64_t least = 0) {
    const int64_t value = PyLong_AsLongLong(field(index));
    if (value == -1)
      PyErr_Clear();
    valid = valid && value >= least;
    return value;
  }
  TensorView tensor(int index, int ndim) {
    TensorView view = {};
    valid = valid && view_tensor(field(index), &view) && view.ndim == ndim && in_order(view);
    return view;
  }
  const float *floats(int index, int ndim) {
    const TensorView view = tensor(index, ndim);
    if (!values(view))
      return nullptr;
    valid = valid && is_float(view);
    return static_cast<const float *>(view.data);
  }
};

// What ops on maps with packed weights have in common: op(x, packed, `others` more, ...).
struct Layer {
  const Mode mode;
  TensorView x = {};
  Packed packed; // valid only if x is too

  Layer(PyObject *const *arguments, Py_ssize_t fields, int others = 0)
      : mode(arguments + 2 + others), packed(arguments[1], fields) {
    packed.valid = packed.valid && view_maps(arguments[0], mode, &x);
  }
  // Was all that was read valid, and are these weights of the type of x?
  bool fits(const TensorView &weights) const {
    return packed.valid && same_type(x, weights) && (!is_bf16(x) || active().bf16);
  }
};

} // namespace

// conv(x, packed, residual, ...)
PyObject *conv(PyObject *const *arguments) {
  Layer layer(arguments, 6, 1);
  auto &[mode, x, packed] = layer;
  if (!packed.valid)
    Py_RETURN_NONE;
  const TensorView weight = packed.tensor(0, 4), panels = packed.tensor(2, 1);
  const float *bias = packed.floats(1, 1);
  const int64_t stride = packed.number(3, 1), tile = packed.number(4);
  const bool rectify = packed.flag(5);
  if (!layer.fits(weight) || x.shape[1] != weight.shape[1] || !is_nhwc(x))
    Py_RETURN_NONE;
  const int64_t n = x.shape[0], h = x.shape[2], w = x.shape[3], in = x.shape[1], out = weight.shape[0];
  const int64_t out_h = strided(h, stride), out_w = strided(w, stride), kernel = weight.shape[2];
  TensorView residual = {};
  if (arguments[2] != Py_None) {
    if (!view_maps(arguments[2], mode, &residual) || !is_nhwc(residual) || !same_type(x, residual))
      Py_RETURN_NONE;
    const int64_t *got = residual.shape;
    if (got[0] != n || got[1] != out || got[2] != out_h || got[3] != out_w)
      Py_RETURN_NONE;
  }
  ConvArgs args = {x.data, residual.data, nullptr, panels.data, bias, nullptr, n, h, w,
                   in, out, kernel, stride, int(tile), rectify, is_bf16(x), 1};
  args.threads = mode.workers(n * out_h * out_w * out * in * kernel * kernel);
  return filled(args, x, n, out, out_h, out_w, true, &Kernels::conv_workspace, &Kernels::conv_fwd);
}

// basic_blocks(x, packed, ...)
PyObject *basic_blocks(PyObject *const *arguments) {
  Layer layer(arguments, 4);
  auto &[mode, x, packed] = layer;
  if (!packed.valid)
    Py_RETURN_NONE;
  const TensorView weights = packed.tensor(0, 5), panels = packed.tensor(2, 1);
  const float *biases = packed.floats(1, 2);
  const int64_t tile = packed.number(3);
  if (!layer.fits(weights) || x.shape[1] != weights.shape[2] || !is_nhwc(x))
    Py_RETURN_NONE;
  const int64_t n = x.shape[0], c = x.shape[1], h = x.shape[2], w = x.shape[3], convs = weights.shape[0];
  BasicBlocksArgs args = {x.data, nullptr, panels.data, biases, nullptr, n, h, w, c,
                          convs / 2, int(tile), is_bf16(x), 1};
  args.threads = mode.workers(n * h * w * c * c * 9 * convs);
  return filled(args, x, n, c, h, w, true, &Kernels::basic_blocks_workspace, &Kernels::basic_blocks_fwd);
}

// bottlenecks(x, packed, ...)
PyObject *bottlenecks(PyObject *const *arguments) {
  Layer layer(arguments, 10);
  auto &[mode, x, packed] = layer;
  if (!packed.valid || !PyTuple_Check(packed.field(8)))
    Py_RETURN_NONE;
  const TensorView weights = packed.tensor(0, 1);
  const float *biases = packed.floats(1, 1), *winograd = packed.floats(2, 1);
  const int64_t in = packed.number(3), mid = packed.number(4), out = packed.number(5), stride = packed.number(7, 1);
  const bool project = packed.flag(6);
  PyObject *layout = packed.field(9);
  const bool panels = PyUnicode_Check(layout) && PyUnicode_CompareWithASCIIString(layout, "panels") == 0;
  if (!panels || !layer.fits(weights) || x.shape[1] != in || !is_nhwc(x))
    Py_RETURN_NONE;
  constexpr int kMaxBlocks = 16; // of a chain that comes this way
  int64_t dilations[kMaxBlocks];
  const Py_ssize_t blocks = PyTuple_GET_SIZE(packed.field(8));
  Packed listed(packed.field(8), blocks);
  if (blocks < 1 || blocks > kMaxBlocks)
    Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < blocks; ++i)
    dilations[i] = listed.number(i, 1);
  if (!listed.valid)
    Py_RETURN_NONE;
  const int64_t n = x.shape[0], h = x.shape[2], w = x.shape[3];
  BottlenecksArgs args = {x.data, nullptr, weights.data, biases,
                          winograd, dilations, nullptr, n, h, w, in, mid, out, blocks,
                          stride, is_bf16(x), project, 1};
  args.threads = mode.workers(n * h * w * mid * (in + 9 * mid + out) * blocks);
  return filled(args, x, n, out, strided(h, stride), strided(w, stride), true, &Kernels::bottlenecks_workspace,
                &Kernels::bottlenecks_fwd);
}

// stem(images, packed, ...)
PyObject *stem(PyObject *const *arguments) {
  Layer layer(arguments, 5);
  auto &[mode, x, packed] = layer;
  if (!packed.valid)
    Py_RETURN_NONE;
  const TensorView weight = packed.tensor(0, 4), panels = packed.tensor(2, 1);
  const float *bias = packed.floats(1, 1);
  const int64_t stride = packed.number(3, 1);
  const bool pool = packed.flag(4);
  if (!layer.fits(weight) || x.shape[1] != 3)
    Py_RETURN_NONE;
  const int64_t n = x.shape[0], h = x.shape[2], w = x.shape[3], out = weight.shape[0], kernel = weight.shape[2];
  const int64_t out_h = strided(strided(h, stride), pool ? 2 : 1), out_w = strided(strided(w, stride), pool ? 2 : 1);
  const int64_t depth = values(panels) / (kernel * out);
  StemArgs args = {x.data, nullptr, panels.data, bias, nullptr, n, h, w, x.strides[0],
                   x.strides[1], x.strides[2], x.strides[3], out, kernel, stride, depth, pool, is_bf16(x), 1};
  args.threads = mode.workers(n * out_h * out_w * out * 3 * kernel * kernel);
  return filled(args, x, n, out, out_h, out_w, true, &Kernels::stem_workspace, &Kernels::stem_fwd);
}

} // namespace hrpose
