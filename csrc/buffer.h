/* The only owner of bytes: an atomic count, a size, and how to free them. */
#ifndef ACRE_BUFFER_H
#define ACRE_BUFFER_H

#include "status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes held by an engine's buffers. peak >= held at every moment. Only through these. */
typedef struct acre_account {
  size_t held;
  size_t peak;
} acre_account;

void acre_account_add(acre_account *account, size_t bytes);
void acre_account_remove(acre_account *account, size_t bytes);
size_t acre_account_held(const acre_account *account);
size_t acre_account_peak(const acre_account *account);
void acre_account_reset_peak(acre_account *account);

#ifdef __cplusplus
}
#endif
#endif
