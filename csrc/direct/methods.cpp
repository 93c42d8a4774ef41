#include "direct.h"

namespace hrpose {

namespace {

// A function of so many arguments as one of Python's.
template <PyObject *(*function)(PyObject *const *), Py_ssize_t count>
PyObject *called(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
  if (given != count)
    Py_RETURN_NONE;
  return function(arguments);
}
template <PyObject *(*function)(PyObject *const *), Py_ssize_t count> PyMethodDef method(const char *name) {
  void (*const address)() = reinterpret_cast<void (*)()>(called<function, count>);
  return {name, reinterpret_cast<PyCFunction>(address), METH_FASTCALL, nullptr};
}

} // namespace

PyMethodDef direct_methods[] = {method<conv, 6>("conv"),
                                method<basic_blocks, 5>("basic_blocks"),
                                method<bottlenecks, 5>("bottlenecks"),
                                method<stem, 5>("stem"),
                                method<ram_sum, 6>("ram_sum"),
                                method<decode, 10>("decode"),
                                method<crop, 14>("crop"),
                                {nullptr, nullptr, 0, nullptr}};

} // namespace hrpose
