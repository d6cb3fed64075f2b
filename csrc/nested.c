#include "nested.h"

int64_t acre_nested_windows(const acre_nested *nested, int64_t n) {
  return n < nested->window ? 0 : 1 + (n - nested->window) / nested->stride;
}

int64_t acre_nested_closed(const acre_nested *nested, int64_t n) {
  int64_t windows = acre_nested_windows(nested, n);
  return windows ? nested->window + (windows - 1) * nested->stride : 0;
}

int64_t acre_nested_window_end(const acre_nested *nested, int64_t i) {
  if (i < nested->window) return nested->window;
  return acre_nested_closed(nested, i) + nested->stride;
}

int64_t acre_nested_length(const acre_nested *nested, int64_t a, int64_t b) {
  int64_t l1 = nested->l1_tokens ? b / nested->interval - a / nested->interval : 0;
  return b - a + l1;
}

int64_t acre_nested_longest(const acre_nested *nested, int64_t n) {
  int64_t tokens = acre_min(n, nested->window);
  if (n > nested->window) {
    tokens = acre_max(tokens, acre_min(n - nested->window, nested->stride));
  }
  /* A window that starts inside a group may meet one L1 token more. */
  return tokens + (nested->l1_tokens ? acre_ceil_div(tokens, nested->interval) : 0);
}

void acre_nested_fill(const acre_nested *nested, int32_t *out, const int32_t *ids,
                      int64_t a, int64_t b, int32_t l1_id) {
  for (int64_t i = a; i < b; ++i) {
    *out++ = ids[i - a];
    if (nested->l1_tokens && (i + 1) % nested->interval == 0) *out++ = l1_id;
  }
}
