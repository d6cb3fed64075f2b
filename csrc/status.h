/* Errors as values: a status for the program, a sentence for the person. */
#ifndef ACRE_STATUS_H
#define ACRE_STATUS_H

#include "acre.h"
#include "base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Fills *error (nullable) and returns `status`, so that a refusal is one statement. */
acre_status acre_fail(acre_error *error, acre_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define ACRE_TRY(call)                      \
  do {                                      \
    acre_status status_ = (call);           \
    if (status_ != ACRE_OK) return status_; \
  } while (0)

#ifdef __cplusplus
}
#endif
#endif
