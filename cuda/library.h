/* Libraries that are found at run time and never linked, and what they export. */
#ifndef ACRE_CUDA_LIBRARY_H
#define ACRE_CUDA_LIBRARY_H

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

namespace acre {

inline void *library_open_in(const char *directory, size_t length, const char *name) {
  char path[4096];
  int wrote = snprintf(path, sizeof path, "%.*s/%s", (int)length, directory, name);
  return wrote > 0 && (size_t)wrote < sizeof path ? dlopen(path, RTLD_NOW | RTLD_LOCAL)
                                                  : NULL;
}

/* From one of these directories (':' between, nullable), or wherever the loader finds it; NULL
 * where it is in none. */
inline void *library_open(const char *directories, const char *name) {
  for (const char *at = directories; at && *at;) {
    size_t length = strcspn(at, ":");
    void *found = length ? library_open_in(at, length, name) : NULL;
    if (found) return found;
    at += length + (at[length] == ':');
  }
  return dlopen(name, RTLD_NOW | RTLD_LOCAL);
}

/* A symbol as a function: there is no cast for it. False where it is missing. */
template <class F>
bool library_find(F **out, void *handle, const char *name) {
  void *symbol = dlsym(handle, name);
  memcpy(out, &symbol, sizeof symbol);
  return symbol != NULL;
}

}  // namespace acre
#endif
