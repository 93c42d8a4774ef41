#include "direct.h"
#include "cpu/kernels.h"
#include "tensors.h"
#include "workspace.h"

namespace hrpose {

namespace {

constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4; // DLPack's codes of types

bool is(const TensorView &view, uint8_t code, int bits) { return view.code == code && view.bits == bits; }
bool is_bf16(const TensorView &view) { return is(view, kBFloat, 16); }
bool is_float(const TensorView &view) { return is(view, kFloat, 32); }
bool same_type(const TensorView &a, const TensorView &b) { return a.code == b.code && a.bits == b.bits; }

// Do the values lie one after the other in the order of `axes`? Strides of axes of size 1 say nothing.
bool lies(const TensorView &view, const int *axes) {
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
bool in_order(const TensorView &view) { return view.ndim <= 5 && lies(view, kInOrder); }
bool is_nhwc(const TensorView &view) { return lies(view, kNhwc); }

int64_t values(const TensorView &view) {
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
bool view_value(PyObject *object, int ndim, const Mode &mode, TensorView *view) {
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
bool view_maps(PyObject *object, const Mode &mode, TensorView *view) {
  return view_value(object, 4, mode, view) && (is_float(*view) || is_bf16(*view)) && values(*view);
}

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

PyObject *new_maps(const TensorView &like, int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last,
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

int64_t strided(int64_t size, int64_t stride) { return 1 + (size - 1) / stride; }

// conv(x, packed, residual, ...)
PyObject *conv(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 6)
    Py_RETURN_NONE;
  const Mode mode(arguments + 3);
  TensorView x, residual = {};
  if (!view_maps(arguments[0], mode, &x) || !is_nhwc(x))
    Py_RETURN_NONE;
  Packed packed(arguments[1], 6);
  if (!packed.valid)
    Py_RETURN_NONE;
  const TensorView weight = packed.tensor(0, 4), panels = packed.tensor(2, 1);
  const float *bias = packed.floats(1, 1);
  const int64_t stride = packed.number(3, 1), tile = packed.number(4);
  const bool rectify = packed.flag(5);
  if (!packed.valid || !same_type(x, weight) || x.shape[1] != weight.shape[1] || (is_bf16(x) && !active().bf16))
    Py_RETURN_NONE;
  const int64_t n = x.shape[0], h = x.shape[2], w = x.shape[3], in = x.shape[1], out = weight.shape[0];
  const int64_t out_h = strided(h, stride), out_w = strided(w, stride), kernel = weight.shape[2];
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
PyObject *basic_blocks(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 5)
    Py_RETURN_NONE;
  const Mode mode(arguments + 2);
  TensorView x;
  if (!view_maps(arguments[0], mode, &x) || !is_nhwc(x))
    Py_RETURN_NONE;
  Packed packed(arguments[1], 4);
  if (!packed.valid)
    Py_RETURN_NONE;
  const TensorView weights = packed.tensor(0, 5), panels = packed.tensor(2, 1);
  const float *biases = packed.floats(1, 2);
  const int64_t tile = packed.number(3);
  if (!packed.valid || !same_type(x, weights) || x.shape[1] != weights.shape[2] || (is_bf16(x) && !active().bf16))
    Py_RETURN_NONE;
  const int64_t n = x.shape[0], c = x.shape[1], h = x.shape[2], w = x.shape[3], convs = weights.shape[0];
  BasicBlocksArgs args = {x.data, nullptr, panels.data, biases, nullptr, n, h, w, c,
                          convs / 2, int(tile), is_bf16(x), 1};
  args.threads = mode.workers(n * h * w * c * c * 9 * convs);
  return filled(args, x, n, c, h, w, true, &Kernels::basic_blocks_workspace, &Kernels::basic_blocks_fwd);
}

// bottlenecks(x, packed, ...)
PyObject *bottlenecks(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 5)
    Py_RETURN_NONE;
  const Mode mode(arguments + 2);
  TensorView x;
  if (!view_maps(arguments[0], mode, &x) || !is_nhwc(x))
    Py_RETURN_NONE;
  Packed packed(arguments[1], 10);
  if (!packed.valid || !PyTuple_Check(packed.field(8)))
    Py_RETURN_NONE;
  const TensorView weights = packed.tensor(0, 1);
  const float *biases = packed.floats(1, 1), *winograd = packed.floats(2, 1);
  const int64_t in = packed.number(3), mid = packed.number(4), out = packed.number(5), stride = packed.number(7, 1);
  const bool project = packed.flag(6);
  PyObject *layout = packed.field(9);
  const bool panels = PyUnicode_Check(layout) && PyUnicode_CompareWithASCIIString(layout, "panels") == 0;
  if (!packed.valid || !panels || !same_type(x, weights) || x.shape[1] != in || (is_bf16(x) && !active().bf16))
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
PyObject *stem(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 5)
    Py_RETURN_NONE;
  const Mode mode(arguments + 2);
  TensorView x;
  if (!view_maps(arguments[0], mode, &x) || x.shape[1] != 3)
    Py_RETURN_NONE;
  Packed packed(arguments[1], 5);
  if (!packed.valid)
    Py_RETURN_NONE;
  const TensorView weight = packed.tensor(0, 4), panels = packed.tensor(2, 1);
  const float *bias = packed.floats(1, 1);
  const int64_t stride = packed.number(3, 1);
  const bool pool = packed.flag(4);
  if (!packed.valid || !same_type(x, weight) || (is_bf16(x) && !active().bf16))
    Py_RETURN_NONE;
  const int64_t n = x.shape[0], h = x.shape[2], w = x.shape[3], out = weight.shape[0], kernel = weight.shape[2];
  const int64_t out_h = strided(strided(h, stride), pool ? 2 : 1), out_w = strided(strided(w, stride), pool ? 2 : 1);
  const int64_t depth = values(panels) / (kernel * out);
  StemArgs args = {x.data, nullptr, panels.data, bias, nullptr, n, h, w, x.strides[0],
                   x.strides[1], x.strides[2], x.strides[3], out, kernel, stride, depth, pool, is_bf16(x), 1};
  args.threads = mode.workers(n * out_h * out_w * out * 3 * kernel * kernel);
  return filled(args, x, n, out, out_h, out_w, true, &Kernels::stem_workspace, &Kernels::stem_fwd);
}

// What the kernel takes for images, see RamSumArgs. Pixels of maps of one size have no neighbours: any shape will do.
void as_images(RamSumArgs &args, bool one_size, bool channels_last) {
  if (one_size)
    args.h *= args.w, args.w = args.c, args.c = 1; // n x c x (h w), or n x (h w) x c: either way one sample
  else if (!channels_last)
    args.n *= args.c, args.share = args.c, args.c = 1;
}

// ram_sum(inputs, weights, bilinear, ...)
PyObject *ram_sum(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 6 || !PyList_Check(arguments[0]))
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

// Is it None, which leaves the view empty, or a dense tensor of this type and shape?
bool view_dense(PyObject *object, uint8_t code, int bits, int ndim, const int64_t *shape, TensorView *view) {
  *view = {};
  if (object == Py_None)
    return true;
  bool fits = view_tensor(object, view) && is(*view, code, bits) && view->ndim == ndim && in_order(*view);
  for (int i = 0; fits && i < ndim; ++i)
    fits = view->shape[i] == shape[i];
  return fits;
}

constexpr int64_t kLargestMap = int64_t(1) << 30; // MAX_MAP in hrpose/ops/decode.py

// decode(heatmaps, flipped, permutation, transforms, shift, quarter, gaussian, ...), tensors for the lists
PyObject *decode(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 10)
    Py_RETURN_NONE;
  const Mode mode(arguments + 7); // gradients stop here anyway
  TensorView maps, flipped, permutation, transforms, gaussian = {};
  if (!view_tensor(arguments[0], &maps) || maps.ndim != 4 || !is_float(maps) || !in_order(maps) || !values(maps))
    Py_RETURN_NONE;
  const int64_t n = maps.shape[0], k = maps.shape[1], h = maps.shape[2], w = maps.shape[3];
  const int64_t affine[] = {n, 2, 3};
  if (h > kLargestMap / w || !view_dense(arguments[1], kFloat, 32, 4, maps.shape, &flipped) ||
      !view_dense(arguments[2], kInt, 32, 1, &k, &permutation) || (flipped.data && !permutation.data) ||
      !view_dense(arguments[3], kFloat, 64, 3, affine, &transforms))
    Py_RETURN_NONE;
  if (arguments[6] != Py_None && !(view_tensor(arguments[6], &gaussian) && is(gaussian, kFloat, 64)))
    Py_RETURN_NONE;
  int64_t shape[] = {n, k, 2};
  void *points, *heights;
  PyObject *const keypoints = new_tensor(maps, 3, shape, nullptr, &points);
  PyObject *const scores = keypoints ? new_tensor(maps, 2, shape, nullptr, &heights) : nullptr;
  PyObject *const result = scores ? PyTuple_Pack(2, keypoints, scores) : nullptr;
  if (result) {
    const DecodeArgs args = {static_cast<const float *>(maps.data), static_cast<const float *>(flipped.data),
                             static_cast<const int32_t *>(permutation.data),
                             static_cast<const double *>(transforms.data), static_cast<float *>(points),
                             static_cast<float *>(heights), n, k, h, w, arguments[4] == Py_True,
                             arguments[5] == Py_True, static_cast<const double *>(gaussian.data),
                             gaussian.data ? int(gaussian.shape[0]) : 0, mode.workers(n * k * h * w)};
    Py_BEGIN_ALLOW_THREADS;
    active().decode_fwd(args);
    Py_END_ALLOW_THREADS;
  }
  Py_XDECREF(keypoints);
  Py_XDECREF(scores);
  return result;
}

constexpr int64_t kLargestImage = int64_t(1) << 20, kLargestCrop = int64_t(1) << 14; // see hrpose/ops/crop.py
constexpr int64_t kLargestStride = int64_t(1) << 31, kMostValues = int64_t(1) << 31;

// Three numbers of a tuple.
bool read_three(PyObject *tuple, float *numbers) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3)
    return false;
  for (int i = 0; i < 3; ++i)
    numbers[i] = float(PyFloat_AsDouble(PyTuple_GET_ITEM(tuple, i)));
  const bool read = !PyErr_Occurred();
  PyErr_Clear();
  return read;
}

// crop(image, transforms, width, height, opencv4, scale, bias, out, mirror, bf16, channels_last, ...); None as well if a
// transform cannot be inverted
PyObject *crop(PyObject *, PyObject *const *arguments, Py_ssize_t count) {
  if (count != 14)
    Py_RETURN_NONE;
  const Mode mode(arguments + 11);
  TensorView image, transforms, out;
  CropArgs args = {};
  if (!view_tensor(arguments[0], &image) || image.ndim != 3 || !is(image, kUInt, 8) || image.shape[2] != 3 ||
      image.strides[2] != 1 || (image.strides[1] != 3 && image.strides[1] != 4) || image.strides[0] < 0 ||
      image.strides[0] >= kLargestStride || !values(image) || image.shape[0] > kLargestImage ||
      image.shape[1] > kLargestImage)
    Py_RETURN_NONE;
  if (!view_tensor(arguments[1], &transforms) || transforms.ndim != 3 || !is(transforms, kFloat, 64) ||
      !in_order(transforms) || transforms.shape[1] != 2 || transforms.shape[2] != 3 || !values(transforms))
    Py_RETURN_NONE;
  const int64_t n = transforms.shape[0], w = PyLong_AsLongLong(arguments[2]), h = PyLong_AsLongLong(arguments[3]);
  args.mirror = arguments[8] == Py_True, args.bf16 = arguments[9] == Py_True;
  args.channels_last = arguments[10] == Py_True;
  const int64_t crops = args.mirror ? 2 * n : n;
  if (w < 1 || w > kLargestCrop || h < 1 || h > kLargestCrop || crops > kMostValues / (3 * w * h) ||
      !read_three(arguments[5], args.scale) || !read_three(arguments[6], args.bias)) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  args.image = static_cast<const uint8_t *>(image.data), args.transforms = static_cast<const double *>(transforms.data);
  args.image_stride = image.strides[0], args.image_step = image.strides[1];
  args.image_h = image.shape[0], args.image_w = image.shape[1];
  args.n = n, args.h = h, args.w = w, args.opencv4 = arguments[4] == Py_True, args.threads = mode.workers(n * h * w);
  PyObject *result = arguments[7];
  if (result == Py_None) {
    TensorView like = {};
    like.code = args.bf16 ? kBFloat : kFloat, like.bits = args.bf16 ? 16 : 32;
    result = new_maps(like, crops, 3, h, w, args.channels_last, &args.out);
    if (!result)
      return nullptr;
  } else {
    const int64_t shape[] = {crops, 3, h, w};
    bool fits = view_value(result, 4, mode, &out) && is(out, args.bf16 ? kBFloat : kFloat, args.bf16 ? 16 : 32) &&
                (args.channels_last ? is_nhwc(out) : in_order(out));
    for (int i = 0; fits && i < 4; ++i)
      fits = out.shape[i] == shape[i];
    if (!fits)
      Py_RETURN_NONE;
    args.out = out.data;
    Py_INCREF(result);
  }
  int64_t bad;
  Py_BEGIN_ALLOW_THREADS;
  bad = active().crop_fwd(args);
  Py_END_ALLOW_THREADS;
  if (bad < 0)
    return result;
  Py_DECREF(result);
  Py_RETURN_NONE;
}

template <PyObject *(*function)(PyObject *, PyObject *const *, Py_ssize_t)> PyCFunction method() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

} // namespace

PyMethodDef direct_methods[] = {{"conv", method<conv>(), METH_FASTCALL, nullptr},
                                {"basic_blocks", method<basic_blocks>(), METH_FASTCALL, nullptr},
                                {"bottlenecks", method<bottlenecks>(), METH_FASTCALL, nullptr},
                                {"stem", method<stem>(), METH_FASTCALL, nullptr},
                                {"ram_sum", method<ram_sum>(), METH_FASTCALL, nullptr},
                                {"decode", method<decode>(), METH_FASTCALL, nullptr},
                                {"crop", method<crop>(), METH_FASTCALL, nullptr},
                                {nullptr, nullptr, 0, nullptr}};

} // namespace hrpose
