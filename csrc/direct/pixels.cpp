// The ops from and to pixels of images: decode and crop.
#include "arguments.h"
#include "direct.h"

namespace hrpose {

namespace {

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

} // namespace

// decode(heatmaps, flipped, permutation, transforms, shift, quarter, gaussian, ...), tensors for the lists
PyObject *decode(PyObject *const *arguments) {
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

namespace {

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

} // namespace

// crop(image, transforms, width, height, opencv4, scale, bias, out, mirror, bf16, channels_last, ...); None, too, if a
// transform cannot be inverted
PyObject *crop(PyObject *const *arguments) {
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

} // namespace hrpose
