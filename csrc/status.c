/* Names of statuses and dtypes, and the one way to refuse: a status and a sentence. */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>

acre_status acre_fail(acre_error *error, acre_status status, const char *format, ...) {
  if (!error) return status;
  error->status = status;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error->message, sizeof error->message, format, arguments);
  va_end(arguments);
  return status;
}

const char *acre_status_name(acre_status status) {
  switch (status) {
    case ACRE_OK: return "ok";
    case ACRE_BAD_VALUE: return "bad value";
    case ACRE_BAD_SHAPE: return "bad shape";
    case ACRE_BAD_STATE: return "bad state";
    case ACRE_TOO_LONG: return "too long";
    case ACRE_NO_MEMORY: return "no memory";
    case ACRE_DEVICE: return "device failure";
    case ACRE_UNSUPPORTED: return "unsupported";
    case ACRE_BUSY: return "busy";
    case ACRE_NO_PEER: return "no peer";
  }
  return "unknown status";
}

size_t acre_dtype_size(acre_dtype dtype) {
  switch (dtype) {
    case ACRE_F32: return 4;
    case ACRE_BF16: return 2;
    case ACRE_F16: return 2;
    case ACRE_F64: return 8;
  }
  return 0;
}

const char *acre_dtype_name(acre_dtype dtype) {
  switch (dtype) {
    case ACRE_F32: return "f32";
    case ACRE_BF16: return "bf16";
    case ACRE_F16: return "f16";
    case ACRE_F64: return "f64";
  }
  return "unknown dtype";
}
