/* The device of tests of whole models: CUDA as the host can run it, loaded as a plug-in, or, with
 * ACRE_TEST_PLUGIN in the environment, the device of that plug-in. */
#ifndef ACRE_TEST_DEVICE_H
#define ACRE_TEST_DEVICE_H

#include "acre.h"

#include <stdlib.h>

static inline const char *plugin_file(void) {
  const char *given = getenv("ACRE_TEST_PLUGIN");
  return given ? given : ACRE_TEST_CUDA "/cuda_host.so";
}

static inline acre_status open_engine(acre_engine **out, const char *device,
                                      const char *plugin, acre_error *error) {
  acre_engine_options options = acre_engine_options_default();
  options.device = device;
  options.threads = 1;
  options.plugin = plugin;
  const char *given = getenv("ACRE_TEST_LIBRARIES");
  options.libraries = given ? given : "no/such/place:" ACRE_TEST_CUDA;
  return acre_engine_open(out, &options, error);
}

#endif
