/* The nested sequence: integers only.
 *
 * After every l-th L2 token of the text one L1 token follows, standing for the l before it:
 * group j = L2 tokens [j l, (j+1) l) and its L1 entry j. Windows: the first holds W L2
 * tokens, later ones s; window w = tokens [start(w), start(w+1)). With pooled proxies the
 * sequence holds no L1 tokens (l1_tokens false) and the groups are the same. */
#ifndef ACRE_NESTED_H
#define ACRE_NESTED_H

#include "base.h"

typedef struct acre_nested {
  int64_t interval; /* l >= 1 */
  int64_t window;   /* W >= 1 */
  int64_t stride;   /* s >= 1 */
  bool l1_tokens;
} acre_nested;

/* Full windows among the first n tokens, and the tokens that they hold. */
int64_t acre_nested_windows(const acre_nested *nested, int64_t n);
int64_t acre_nested_closed(const acre_nested *nested, int64_t n);
/* First token after the window that token i belongs to. */
int64_t acre_nested_window_end(const acre_nested *nested, int64_t i);
/* Entries that tokens [a, b) become. */
int64_t acre_nested_length(const acre_nested *nested, int64_t a, int64_t b);
/* Most entries that any one window has. */
int64_t acre_nested_longest(const acre_nested *nested, int64_t n);
/* Writes the nested ids of tokens [a, b), where ids[0] is token a; L1 tokens get l1_id. */
void acre_nested_fill(const acre_nested *nested, int32_t *out, const int32_t *ids,
                      int64_t a, int64_t b, int32_t l1_id);

#endif
