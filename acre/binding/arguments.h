/* Python arguments to C values. Each refusal names the argument, what came and what was
 * expected. All return 0, or -1 with an exception. */
#ifndef ACRE_BINDING_ARGUMENTS_H
#define ACRE_BINDING_ARGUMENTS_H

#include "binding.h"

int argument_int64(PyObject *object, const char *name, int64_t *out);
int argument_int32(PyObject *object, const char *name, int32_t *out);
int argument_uint64(PyObject *object, const char *name, uint64_t *out);
int argument_double(PyObject *object, const char *name, double *out);
int argument_bool(PyObject *object, const char *name, bool *out);
/* *out is UTF-8 without NUL, owned by `object`. */
int argument_text(PyObject *object, const char *name, const char **out);
/* `choices` ends with NULL; *out is the index of the one that came. */
int argument_choice(PyObject *object, const char *name, const char *const *choices,
                    int *out);
int argument_instance(PyObject *object, PyTypeObject *type, const char *name);
/* TypeError "name: got <type>, expected <expected>"; always -1. */
int argument_refuse(PyObject *object, const char *name, const char *expected);

#endif
