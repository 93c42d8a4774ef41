// Ops on tensors as Python gives them, without the way through Python that checks, allocates and says what is wrong: it
// takes several times as long as a small kernel.
#pragma once
#include <Python.h>

namespace hrpose {

// Each takes its arguments one after the other.
PyObject *conv(PyObject *const *arguments);
PyObject *basic_blocks(PyObject *const *arguments);
PyObject *bottlenecks(PyObject *const *arguments);
PyObject *stem(PyObject *const *arguments);
PyObject *ram_sum(PyObject *const *arguments);
PyObject *decode(PyObject *const *arguments);
PyObject *crop(PyObject *const *arguments);

// Functions of the module, ended by a null. Each takes what the op of its name takes (hrpose/ops), then whether
// gradients are recorded, threads, and the work above which more than one is used. Each returns the result, or None,
// having done nothing, for whatever is not the plain case: tensors of the CPU, of types and shapes that fit, as they
// lie in memory.
extern PyMethodDef direct_methods[];

} // namespace hrpose
