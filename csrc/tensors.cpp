#include "tensors.h"

namespace hrpose {

namespace {

constexpr uint32_t kMajor = 1; // of DLPack: what is declared here
constexpr int32_t kCpu = 1;

struct ManagedTensor {
  uint32_t major, minor;
  void *context;
  void (*deleter)(ManagedTensor *);
  uint64_t flags;
  TensorView view;
};

struct Table {
  uint32_t major, minor;
  Table *previous;
  int (*allocate)(TensorView *prototype, ManagedTensor **out, void *context,
                  void (*set_error)(void *context, const char *kind, const char *message));
  int (*managed_from_object)(void *object, ManagedTensor **out);
  int (*object_from_managed)(ManagedTensor *tensor, void **out); // which owns `tensor` from then on
  int (*view_from_object)(void *object, TensorView *out);
  int (*current_work_stream)(int32_t device_type, int32_t device_index, void **out);
};

// Set once, under the GIL, which all readers hold.
const Table *table = nullptr;
PyTypeObject *tensor_type = nullptr;
PyObject *is_neg = nullptr; // torch's dispatcher, not the memory, knows the sign of what `x.conj().imag` gives

void set_error(void *, const char *, const char *message) { PyErr_SetString(PyExc_MemoryError, message); }

} // namespace

bool read_tensors(PyTypeObject *type, PyObject *capsule) {
  const auto *found = static_cast<const Table *>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!found)
    PyErr_Clear();
  while (found && found->major > kMajor)
    found = found->previous;
  if (!found || found->major != kMajor || !found->view_from_object)
    return false;
  Py_INCREF(type);
  is_neg = PyUnicode_InternFromString("is_neg");
  table = found, tensor_type = type;
  return true;
}

bool view_tensor(PyObject *object, TensorView *view) {
  if (!table || Py_TYPE(object) != tensor_type)
    return false;
  if (table->view_from_object(object, view)) {
    PyErr_Clear();
    return false;
  }
  view->data = static_cast<char *>(view->data) + view->byte_offset;
  if (view->device_type != kCpu || view->lanes != 1)
    return false;
  PyObject *negative = PyObject_CallMethodNoArgs(object, is_neg);
  if (!negative)
    PyErr_Clear();
  Py_XDECREF(negative);
  return negative == Py_False;
}

PyObject *new_tensor(const TensorView &like, int ndim, int64_t *shape, int64_t *strides, void **data) {
  TensorView prototype = like;
  prototype.device_type = kCpu, prototype.device_index = 0, prototype.lanes = 1, prototype.byte_offset = 0;
  prototype.ndim = ndim, prototype.shape = shape, prototype.strides = nullptr;
  ManagedTensor *managed = nullptr;
  if (table->allocate(&prototype, &managed, nullptr, set_error))
    return nullptr;
  *data = static_cast<char *>(managed->view.data) + managed->view.byte_offset;
  if (strides)
    managed->view.strides = strides; // the memory is dense either way; the next call copies them
  void *object = nullptr;
  if (table->object_from_managed(managed, &object))
    return nullptr;
  return static_cast<PyObject *>(object);
}

} // namespace hrpose
