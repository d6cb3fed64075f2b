/* C option structs as Python dicts and keyword arguments, by one table per struct. */
#ifndef ACRE_BINDING_RECORDS_H
#define ACRE_BINDING_RECORDS_H

#include "binding.h"

typedef enum field_kind {
  FIELD_INT64,
  FIELD_INT32,
  FIELD_UINT64,
  FIELD_SIZE, /* size_t; only given, never taken */
  FIELD_DOUBLE,
  FIELD_FLOAT,
  FIELD_BOOL,
  FIELD_CHOICE, /* an enum by name: `choices` in the order of its values */
  FIELD_RECORD, /* a nested struct: `inner` */
} field_kind;

typedef struct record record;

typedef struct field {
  const char *name;
  size_t offset;
  field_kind kind;
  bool required; /* in a dict */
  const char *const *choices;
  const record *inner;
} field;

struct record {
  const char *name; /* as the messages call it */
  const field *fields;
  int count;
};

#define RECORD_MAX_FIELDS 16

extern const record record_model_config, record_build_options, record_plan, record_sampling,
    record_score_options;

/* Reads a dict into `target`, which holds the defaults. Unknown and missing keys are
 * refused by name. 0, or -1 with an exception. */
int record_from_dict(const record *record, void *target, PyObject *dict);

/* Reads keyword arguments: values[i] (borrowed, NULL = default) belongs to fields[i].
 */
int record_from_values(const record *record, void *target, PyObject *const *values);

PyObject *record_to_dict(const record *record, const void *source);

#endif
