/* An opened device, shared by the models on it. */
#ifndef ACRE_ENGINE_H
#define ACRE_ENGINE_H

#include "backend.h"

#include <stdatomic.h>

struct acre_engine {
  _Atomic int64_t references;
  acre_backend *backend;
  char device[16];
};

acre_engine *acre_engine_retain(acre_engine *engine);

#endif
