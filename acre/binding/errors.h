/* One mapper from C status to Python exception. */
#ifndef ACRE_BINDING_ERRORS_H
#define ACRE_BINDING_ERRORS_H

#include "binding.h"

/* Creates TooLongError, BusyError and DeviceError in `state` and adds them to `module`.
 */
int errors_add(PyObject *module, binding_state *state);

/* Raises what error->status stands for, with C's sentence. Always returns NULL. */
PyObject *errors_raise(const binding_state *state, const acre_error *error);

#endif
