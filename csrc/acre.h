/* acre: long documents, read once and questioned many times (arXiv 2412.12486).
 *
 * The public C interface. A few opaque nouns with different lifetimes:
 *
 *   engine   a device and its threads                       shareable, outlives all below
 *   model    configuration + weights, immutable once ready  shareable
 *   builder  reads a text window by window                  one owner
 *   cache    the frozen bi-layer KV cache                   immutable, shareable
 *   session  one question, or one generation                one owner
 *   trainer  L1 parameters that learn, on a frozen model    one owner
 *
 * Every noun is reference counted and retains what it needs: release in any order,
 * and releasing NULL does nothing. Every fallible call returns a status and fills the
 * last, nullable acre_error; on failure outputs are NULL or untouched and the objects
 * stay as they were before the call unless the call's comment says otherwise.
 *
 * Symbols: n context tokens, l L1/L2 interval, m L1 entries, W first window, s stride,
 * eta refill budget in L2 tokens, k refilled groups, t query tokens, h query heads,
 * g KV heads, d head dim, L layers, w_max usable positions, r recent entries.
 *
 * Threads: functions on different objects may run at once. A builder, session or trainer that is
 * in use on another thread answers ACRE_BUSY. Everything else is read-only and reentrant,
 * except acre_model_bind and acre_model_ready, which belong to one thread.
 */
#ifndef ACRE_H
#define ACRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(ACRE_SHARED) && defined(__GNUC__)
#define ACRE_API __attribute__((visibility("default")))
#else
#define ACRE_API
#endif

#define ACRE_VERSION "0.1.0"

/* ------------------------------------------------------------------ status, error */

/* Grouped by what the caller can do about it. */
typedef enum acre_status {
  ACRE_OK = 0,
  ACRE_BAD_VALUE,   /* an argument's value: fix the call */
  ACRE_BAD_SHAPE,   /* an argument's shape, dtype or layout: fix the array */
  ACRE_BAD_STATE,   /* the call does not fit the object's state: fix the order */
  ACRE_TOO_LONG,    /* text or question exceeds the position range: shorten it */
  ACRE_NO_MEMORY,   /* not enough memory, nothing retained */
  ACRE_DEVICE,      /* the device failed; the object must be released */
  ACRE_UNSUPPORTED, /* a known feature that this build or device lacks */
  ACRE_BUSY,        /* the object is in use on another thread: wait */
  ACRE_NO_PEER,     /* another process of a group, or the way to it, has failed */
} acre_status;

typedef struct acre_error {
  acre_status status;
  char message[480]; /* a sentence: the argument, what came, what was expected */
} acre_error;

ACRE_API const char *acre_status_name(acre_status status);

/* ------------------------------------------------------------------ arrays */

typedef enum acre_dtype { ACRE_F32 = 0, ACRE_BF16, ACRE_F16, ACRE_F64 } acre_dtype;

ACRE_API size_t acre_dtype_size(acre_dtype dtype);
ACRE_API const char *acre_dtype_name(acre_dtype dtype);

#define ACRE_MAX_DIMS 4

/* A borrowed view of caller memory; strides in elements. */
typedef struct acre_array {
  const void *data;
  acre_dtype dtype;
  int32_t ndim;
  int64_t shape[ACRE_MAX_DIMS];
  int64_t strides[ACRE_MAX_DIMS];
  bool on_device; /* on the engine's device, which lies apart: the host cannot read it */
} acre_array;

/* Reference-counted bytes. Views handed out by the library name the buffer that keeps
 * them alive. Thread-safe: the count is atomic, the bytes are read-only to callers. */
typedef struct acre_buffer acre_buffer;

ACRE_API void acre_buffer_retain(acre_buffer *buffer);
ACRE_API void acre_buffer_release(acre_buffer *buffer);
ACRE_API void *acre_buffer_data(const acre_buffer *buffer);
ACRE_API size_t acre_buffer_size(const acre_buffer *buffer);

/* Wraps caller memory; `free_bytes(context)` runs once, on whichever thread drops the last
 * reference. On failure free_bytes is not called and the bytes stay the caller's. */
ACRE_API acre_status acre_buffer_wrap(acre_buffer **out, void *data, size_t size,
                                      void (*free_bytes)(void *context), void *context,
                                      acre_error *error);

/* ------------------------------------------------------------------ engine */

typedef struct acre_engine acre_engine;

typedef struct acre_engine_options {
  size_t struct_size;
  const char *device; /* "cpu" (default), "cuda" or "cuda:N" */
  int32_t threads;    /* worker threads incl. the caller; 0 = usable cores; <= 1024 */
  const char *isa;    /* NULL = best; "scalar", "avx2", "avx512" or "avx512_bf16" to cap
                         the ladder */
  /* For "cuda": the file of the backend, and directories to look for cuBLASLt in before the
   * loader's own, ':' between. Both nullable; without a file the device is ACRE_UNSUPPORTED. */
  const char *plugin;
  const char *libraries;
} acre_engine_options;

ACRE_API acre_engine_options acre_engine_options_default(void);
ACRE_API acre_status acre_engine_open(acre_engine **out, const acre_engine_options *options,
                                      acre_error *error);
ACRE_API void acre_engine_release(acre_engine *engine);
ACRE_API const char *acre_engine_device(const acre_engine *engine); /* "cpu", "cuda:0" */
ACRE_API int32_t acre_engine_threads(const acre_engine *engine);
ACRE_API const char *acre_engine_isa(const acre_engine *engine); /* e.g. "avx2" */
/* Bytes now held by buffers of this engine, and the most held since the last reset. */
ACRE_API size_t acre_engine_bytes(const acre_engine *engine);
ACRE_API size_t acre_engine_peak_bytes(const acre_engine *engine);
ACRE_API void acre_engine_reset_peak(acre_engine *engine);
/* Bytes of pinned host memory now held for a device that lies apart from the host; else 0. */
ACRE_API size_t acre_engine_host_bytes(const acre_engine *engine);
/* The device's handle of the stream, a cudaStream_t, on which the engine reads arrays of others
 * that are on_device: what makes them goes before it. NULL where there is none. */
ACRE_API void *acre_engine_stream(const acre_engine *engine);
/* Bytes of an array that is on_device, copied to the host. */
ACRE_API acre_status acre_engine_fetch(acre_engine *engine, void *host, const void *device,
                                       size_t bytes, acre_error *error);
/* A copy of dense rows: of an array that is on_device on the same device, or on the host.
 * view->data becomes the copy, which *owner holds: the caller's reference. */
ACRE_API acre_status acre_engine_copy(acre_engine *engine, acre_array *view, bool to_host,
                                      acre_buffer **owner, acre_error *error);

/* ------------------------------------------------------------------ model */

typedef struct acre_model acre_model;

typedef enum acre_rope_kind {
  ACRE_ROPE_DEFAULT = 0,
  ACRE_ROPE_LINEAR,
  ACRE_ROPE_DYNAMIC,
  ACRE_ROPE_LLAMA3,
  ACRE_ROPE_YARN,
} acre_rope_kind;

/* Rotary embedding, half-split pairs (i, i + d/2), as Hugging Face files store them.
 * Frequencies as transformers' ROPE_INIT_FUNCTIONS computes them. `dynamic` is evaluated
 * once, for a sequence of w_max positions: within original_positions it is the default. */
typedef struct acre_rope_config {
  acre_rope_kind kind;
  double theta;               /* base, > 0 */
  double factor;              /* >= 1; all kinds but default */
  int64_t original_positions; /* dynamic, llama3, yarn: length of pre-training */
  double low_freq_factor;     /* llama3 */
  double high_freq_factor;    /* llama3 */
  double beta_fast;           /* yarn, default 32 */
  double beta_slow;           /* yarn, default 1 */
  double attention_factor;    /* yarn: multiplies cos and sin; <= 0: computed from factor */
  bool truncate;              /* yarn: round the correction range to whole dimensions */
} acre_rope_config;

/* How matrices are kept. Q8: 32 numbers of a row share a scale, a number is
 * bf16(scale * q) with a whole q of [-127, 127]: 17/32 of the bytes of bf16. Products are
 * those of bf16 with these numbers, whatever the number of rows. */
typedef enum acre_weights { ACRE_WEIGHTS_SAME = 0, ACRE_WEIGHTS_Q8 } acre_weights;

typedef struct acre_model_config {
  size_t struct_size;
  int64_t vocab_size; /* L1 tokens carry the id vocab_size */
  int64_t hidden;
  int64_t layers;   /* L */
  int64_t heads;    /* h */
  int64_t kv_heads; /* g, divides h */
  int64_t head_dim; /* d, even, <= 512 */
  int64_t ffn;
  int64_t w_max; /* usable positions */
  double rms_eps;
  acre_rope_config rope;
  bool tied_head;
  acre_dtype dtype;     /* compute and cache dtype: ACRE_F32 or ACRE_BF16 */
  int64_t eos_id;       /* source of the untrained L1 embedding row; -1 = row 0 */
  acre_weights weights; /* default SAME: in dtype; Q8 needs dtype ACRE_BF16 */
} acre_model_config;

ACRE_API acre_model_config acre_model_config_default(void);
ACRE_API acre_status acre_model_create(acre_model **out, acre_engine *engine,
                                       const acre_model_config *config, acre_error *error);
/* Copies (packs) one tensor, of the host or on_device, by its Hugging Face name, e.g.
 * "model.layers.0.self_attn.q_proj.weight" [h*d, hidden] or
 * "model.acre_embed_tokens.weight" [1, hidden]. Any float dtype and strides. NaN or
 * infinity is refused. Unknown names: ACRE_BAD_VALUE. Binding a name twice replaces it. */
ACRE_API acre_status acre_model_bind(acre_model *model, const char *name,
                                     const acre_array *array, acre_error *error);
/* Checks that every tensor came; fills missing L1 parameters with their untrained values
 * (all or none of the acre_* tensors of a kind must have come). Then the model is fixed. */
ACRE_API acre_status acre_model_ready(acre_model *model, acre_error *error);
ACRE_API void acre_model_retain(acre_model *model);
ACRE_API void acre_model_release(acre_model *model);
ACRE_API const acre_model_config *acre_model_get_config(const acre_model *model);
ACRE_API acre_engine *acre_model_engine(const acre_model *model);
ACRE_API bool acre_model_has_l1(const acre_model *model); /* acre_* tensors were bound */

/* ------------------------------------------------------------------ build */

typedef enum acre_proxy { ACRE_PROXY_POOLED = 0, ACRE_PROXY_TRAINED } acre_proxy;

/* Where the L2 cache lies. Auto: on the device where the build, and then the cache with a
 * question, fit what the device has free; else on the host. On the CPU all are one memory, the
 * device's. */
typedef enum acre_place {
  ACRE_PLACE_AUTO = 0,
  ACRE_PLACE_DEVICE,
  ACRE_PLACE_HOST
} acre_place;

typedef struct acre_build_options {
  size_t struct_size;
  acre_proxy proxy;
  int64_t interval; /* l >= 1; 0 = auto: least of {8,16,32,64,128} that fits */
  int64_t window;   /* W >= 1, L2 tokens of the first window; default 4096 */
  int64_t stride;   /* s >= 1, L2 tokens of later windows; default 2048 */
  int64_t carry;    /* L2 tokens of earlier windows that stay attendable; 0 <= carry <= s */
  int64_t eta;      /* refill budget to leave room for, L2 tokens; default 4096 */
  int64_t reserve;  /* positions kept for question and answer; 0 = min(4096, w_max/8) */
  int64_t weight;   /* tokens that a pooled entry counts for in attention; 0 = interval */
  int64_t sink;     /* 1: L1 entry 0 is the first token, an attention sink; or 0 */
  acre_place l2;    /* default auto */
} acre_build_options;

ACRE_API acre_build_options acre_build_options_default(void);

/* What a text of n tokens becomes; the integers only. */
typedef struct acre_plan {
  int64_t n, interval, window, stride, carry, eta, reserve, weight, sink;
  int64_t windows;   /* full windows */
  int64_t m;         /* L1 entries */
  int64_t recent;    /* r: resident entries after the last L1 entry, L1 tokens included */
  int64_t l2_tokens; /* L2 entries of full windows */
  acre_place l2;     /* device or host; a stored cache's lies in its file, on the host */
  size_t l1_bytes, l2_bytes, recent_bytes; /* of the frozen cache */
  size_t peak_bytes; /* most that the build holds at once on the device, cache included */
  size_t host_bytes; /* of them not on the device but in host memory: l2_bytes, or 0 */
} acre_plan;

/* Resolves the options for n tokens or refuses (ACRE_TOO_LONG, the message naming the
 * numbers and an interval that would fit). Does no work; the model need not be ready. */
ACRE_API acre_status acre_plan_build(acre_plan *out, const acre_model *model,
                                     const acre_build_options *options, int64_t n,
                                     acre_error *error);

typedef struct acre_builder acre_builder;
typedef struct acre_cache acre_cache;

/* Starts reading ids[0..n). With `from`, continues that frozen text instead: `keep` of its
 * n tokens stay (keep <= its n, and no token of a full window may go), ids follow them, and
 * options must be those of `from` (pass NULL). `from` itself is not changed. n >= 1. */
ACRE_API acre_status acre_builder_open(acre_builder **out, acre_model *model,
                                       const acre_build_options *options,
                                       const acre_cache *from, int64_t keep,
                                       const int32_t *ids, int64_t n, acre_error *error);
/* Keeps -log p of every token as it is read: allowed once, before the first step. Reading
 * then runs the last layer and the head too. 4 n bytes, and 64 rows of logits. */
ACRE_API acre_status acre_builder_keep_losses(acre_builder *builder, acre_error *error);
/* losses [acre_builder_tokens]: nats per token given all that it may see before it (METHOD.md,
 * section 3); NaN for the first token and for those not read by this builder. */
ACRE_API acre_status acre_builder_losses(float *losses, acre_builder *builder,
                                         acre_error *error);
ACRE_API int64_t acre_builder_tokens(const acre_builder *builder); /* n, in all */

/* Reads at most one window's worth of tokens; *done = tokens read so far out of *total.
 * Finished when they are equal. After ACRE_DEVICE only release is allowed. */
ACRE_API acre_status acre_builder_step(acre_builder *builder, int64_t *done, int64_t *total,
                                       acre_error *error);
/* Ends a finished build. The builder is spent: only release is allowed afterwards, also where
 * memory runs out half-way. */
ACRE_API acre_status acre_builder_freeze(acre_builder *builder, acre_cache **out,
                                         acre_error *error);
ACRE_API void acre_builder_release(acre_builder *builder);

/* ------------------------------------------------------------------ cache */

ACRE_API void acre_cache_retain(acre_cache *cache);
ACRE_API void acre_cache_release(acre_cache *cache);
ACRE_API const acre_plan *acre_cache_plan(const acre_cache *cache);
ACRE_API acre_proxy acre_cache_proxy(const acre_cache *cache);
ACRE_API const int32_t *acre_cache_ids(const acre_cache *cache); /* [n] */
/* Tokens that may not be replaced by a continuation: those of full windows. */
ACRE_API int64_t acre_cache_closed_tokens(const acre_cache *cache);
/* Bytes held: L1 (keys, values and rotated keys) + L2 + recent. */
ACRE_API size_t acre_cache_bytes(const acre_cache *cache);

typedef enum acre_part {
  ACRE_L1_KEYS = 0, /* [m, g, d], before RoPE */
  ACRE_L1_VALUES,   /* [m, g, d] */
  ACRE_L2_KEYS,     /* [tokens, g, d], before RoPE; one page per call */
  ACRE_L2_VALUES,
  ACRE_RECENT_KEYS, /* [r, g, d], before RoPE, nested order */
  ACRE_RECENT_VALUES,
} acre_part;

/* A view of one layer's tensor; L2 lies in `pages` pages, the others in one (page 0).
 * *first is the index of the view's first row in the whole tensor. The caller owns one
 * reference to *owner. What lies on a device is copied to the host. */
ACRE_API acre_status acre_cache_view(const acre_cache *cache, acre_part part, int64_t layer,
                                     int64_t page, acre_array *view, int64_t *first,
                                     acre_buffer **owner, acre_error *error);
/* The same where it lies, without a copy: view->on_device says where. Nothing writes it, so
 * any stream may read it at once. */
ACRE_API acre_status acre_cache_view_in_place(const acre_cache *cache, acre_part part,
                                              int64_t layer, int64_t page, acre_array *view,
                                              int64_t *first, acre_buffer **owner,
                                              acre_error *error);
ACRE_API int64_t acre_cache_pages(const acre_cache *cache);

/* What a stored cache consists of: whole tensors, one block per part, in the model's dtype,
 * row-major [L, rows, g, d]. Blocks may lie in mapped files: nothing is read here. The L2
 * blocks are retained; ids, L1 and recent blocks too, and read at first use. */
typedef struct acre_cache_parts {
  size_t struct_size;
  acre_build_options options; /* resolved: interval > 0 */
  const int32_t *ids;         /* [n], copied */
  int64_t n;
  acre_buffer *blocks[6]; /* by acre_part; NULL allowed where its rows are 0 */
  size_t offsets[6];      /* byte offset of each tensor in its block */
} acre_cache_parts;

/* Rebuilds a frozen cache. Every size is checked against the model and the plan. */
ACRE_API acre_status acre_cache_restore(acre_cache **out, acre_model *model,
                                        const acre_cache_parts *parts, acre_error *error);

/* ------------------------------------------------------------------ session */

typedef struct acre_session acre_session;

typedef enum acre_select { ACRE_SELECT_SHARED = 0, ACRE_SELECT_PER_LAYER } acre_select;

typedef struct acre_score_options {
  size_t struct_size;
  acre_select select;   /* shared: one row of scores; per_layer: one row per layer */
  bool rotated;         /* score with rotated queries and keys; default true */
  const uint8_t *heads; /* [L, h], nonzero = counts; NULL = shared: the last layer's
                            heads, per_layer: every layer's. Per layer with no head set:
                            all its heads. Shared with none set: refused */
} acre_score_options;

ACRE_API acre_score_options acre_score_options_default(void);

typedef struct acre_sampling {
  size_t struct_size;
  float temperature;        /* >= 0; 0 = greedy (ties: lower id) */
  int32_t top_k;            /* 0 = off */
  float top_p;              /* (0, 1]; 1 = off */
  float repetition_penalty; /* > 0; 1 = off; over the session's prompt and answer ids */
  uint64_t seed;            /* same seed, same tokens */
} acre_sampling;

ACRE_API acre_sampling acre_sampling_default(void);

/* A session over a frozen cache, or with cache NULL over nothing (plain generation).
 * `capacity` = query + answer tokens that it must hold. */
ACRE_API acre_status acre_session_open(acre_session **out, acre_model *model,
                                       acre_cache *cache, int64_t capacity,
                                       acre_error *error);
ACRE_API void acre_session_release(acre_session *session);

/* Section 4.1-4.2: runs the query ids[0..t) over [L1 | recent] and scores the groups with
 * its tokens [first, last). scores: float32 [m], or [L, m] per layer; each scored head and
 * token contributes a softmax over the m entries. m = 0 writes nothing. */
ACRE_API acre_status acre_session_score(acre_session *session, float *scores,
                                        const int32_t *ids, int64_t t, int64_t first,
                                        int64_t last, const acre_score_options *options,
                                        acre_error *error);
/* Section 4.3: k for a budget of eta L2 tokens: min(eta/l, (w_max-m-r-reserve)/l, m).
 * eta = 0 gives 0; 0 < eta < l is refused. */
ACRE_API acre_status acre_refill_count(int64_t *k, const acre_cache *cache, int64_t eta,
                                       acre_error *error);
/* The k best of m scores, ties by lower index, returned in ascending (text) order. */
ACRE_API acre_status acre_select_groups(int32_t *groups, const float *scores, int64_t m,
                                        int64_t k, acre_error *error);
/* Section 4.4: begins the session's own timeline: L1 with the groups' L2 entries spliced in,
 * then the recent entries. groups: [k] for every layer alike (per_layer false) or [L, k],
 * each ascending and distinct. May be called again: the session starts anew. */
ACRE_API acre_status acre_session_refill(acre_session *session, const int32_t *groups,
                                         int64_t k, bool per_layer, acre_error *error);
/* Appends ids to the timeline. logits: NULL, or float32 [t, vocab_size] for every row. The
 * last row's logits stay with the session. Without refill first, a session over a cache
 * refills nothing. May be called repeatedly. */
ACRE_API acre_status acre_session_prefill(acre_session *session, const int32_t *ids,
                                          int64_t t, float *logits, acre_error *error);
/* Chooses the next token from the session's logits; the token is processed by the next
 * call, so the last one costs nothing. */
ACRE_API acre_status acre_session_next(acre_session *session, int32_t *token,
                                       const acre_sampling *sampling, acre_error *error);
/* float32 [vocab_size]: the logits that the next token is chosen from. */
ACRE_API acre_status acre_session_logits(acre_session *session, float *logits,
                                         acre_error *error);
/* Entries in view: positions used so far. */
ACRE_API int64_t acre_session_count(const acre_session *session);

/* Sessions that decode together. Decoding is bound by reading the weights, which several
 * answers can share: a step of all of them costs little more than a step of one.
 *
 * Opens `count` sessions of one model, each over a cache of its own choice (caches or an entry
 * NULL: over nothing). They share what a pass needs, so while one of them, or a batch, is in
 * use on a thread, all others are ACRE_BUSY; alone each is a session like any other. `out`
 * [count] is all NULL on failure. */
ACRE_API acre_status acre_sessions_open(acre_session **out, acre_model *model,
                                        acre_cache *const *caches,
                                        const int64_t *capacities, int64_t count,
                                        acre_error *error);
/* acre_session_next for some of the sessions of one opening, each once: tokens [count],
 * samplings [count] (it or an entry NULL: the default). On the CPU the tokens are those of
 * one by one, to the bit. What a session refuses is refused before any of them moves, with
 * its place in the message. */
ACRE_API acre_status acre_sessions_next(acre_session *const *sessions, int64_t count,
                                        int32_t *tokens,
                                        const acre_sampling *const *samplings,
                                        acre_error *error);
/* How many sessions, of at most `wanted` and at least 1, have timelines that fit the memory
 * that is available now, each with k groups refilled; `wanted` where that is not known. */
ACRE_API int64_t acre_sessions_fit(const acre_model *model, const acre_cache *cache,
                                   int64_t k, int64_t capacity, int64_t wanted);

/* ------------------------------------------------------------------ trainer */

/* Learns the L1 parameters of METHOD.md section 2 while the base model stays as it is.
 * Gradients and parameters are one float32 vector each; entries name its pieces. */
typedef struct acre_trainer acre_trainer;

/* One example: n context tokens, read under selective attention, and t tokens behind them, a
 * question and its answer, which hold no L1 tokens and see [L1 | recent] and each other. */
/* A question asked of an example's text, and its answer. The evidence term is what tokens
 * [first, last) lack in attention to the L1 entries whose group holds a token with
 * evidence[i] != 0: with an entry's share being that of the mass that these tokens put on all
 * L1 entries at the heads in use, the mean of -log(share) over the evidence's entries. */
typedef struct acre_question {
  const int32_t *ids; /* [t], t >= 1 */
  int64_t t;
  const float *weights;    /* [t], as the example's */
  const uint8_t *evidence; /* [n], NULL: none */
  int64_t first, last;
} acre_question;

typedef struct acre_example {
  size_t struct_size;
  const int32_t *ids; /* [n], n >= 1 */
  int64_t n;
  const float *weights; /* [n], >= 0, of each token's loss; NULL: 1. Token 0 has none */
  int64_t window, stride, carry;
  const int64_t *intervals; /* l of each window, a last, partial one included */
  int64_t windows;
  const acre_question *questions; /* each sees the text, none another one */
  int64_t question_count;
  double evidence_weight; /* an evidence term counts like the loss of so many tokens */
  const uint8_t *heads;   /* [L, h], nonzero = counts; NULL: the last layer's */
} acre_example;

ACRE_API acre_example acre_example_default(void);

typedef struct acre_example_result {
  double loss;     /* sum of weight * -log p, in nats */
  double weight;   /* sum of the weights */
  double evidence; /* sum over questions of the share of mass on the evidence's entries */
  int64_t known;   /* questions in it: with evidence that L1 entries stand for */
  int64_t rows;    /* nested tokens that went through the layers */
} acre_example_result;

typedef struct acre_adamw {
  size_t struct_size;
  int64_t step; /* this one, from 1 */
  double lr, beta1, beta2, eps, weight_decay;
} acre_adamw;

ACRE_API acre_adamw acre_adamw_default(void);

/* Starts from the model's L1 parameters, or where it has none from METHOD.md's initial ones.
 * The model itself never changes. */
ACRE_API acre_status acre_trainer_open(acre_trainer **out, acre_model *model,
                                       acre_error *error);
ACRE_API void acre_trainer_release(acre_trainer *trainer);

/* The vector's pieces, in order: entry i of acre_trainer_entries. rows 0: one-dimensional. */
typedef struct acre_trainer_entry {
  char name[96]; /* Hugging Face name */
  int64_t offset, rows, columns;
} acre_trainer_entry;
ACRE_API int64_t acre_trainer_entries(const acre_trainer *trainer);
ACRE_API acre_status acre_trainer_entry_at(acre_trainer_entry *out,
                                           const acre_trainer *trainer, int64_t index,
                                           acre_error *error);

typedef enum acre_trainer_part {
  ACRE_PARAMETERS = 0,
  ACRE_GRADIENTS, /* summed since the last update */
  ACRE_FIRST_MOMENTS,
  ACRE_SECOND_MOMENTS,
} acre_trainer_part;
ACRE_API int64_t acre_trainer_size(const acre_trainer *trainer); /* numbers of each part */
ACRE_API acre_status acre_trainer_read(float *out, acre_trainer *trainer,
                                       acre_trainer_part part, acre_error *error);
/* Values must be finite; parameters also in the model's dtype. */
ACRE_API acre_status acre_trainer_write(acre_trainer *trainer, acre_trainer_part part,
                                        const float *values, acre_error *error);

/* Forward and backward of one example, in steps: begin, then step until *done == *total (a step
 * is a window, read or gone back through). With `gradients` false only the loss is computed.
 * begin drops an example that is under way, whose part of the gradients stays: clear them. Its
 * arrays are copied. */
ACRE_API acre_status acre_trainer_begin(acre_trainer *trainer, const acre_example *example,
                                        bool gradients, acre_error *error);
ACRE_API acre_status acre_trainer_step(acre_trainer *trainer, int64_t *done, int64_t *total,
                                       acre_error *error);
ACRE_API acre_status acre_trainer_result(acre_example_result *out, acre_trainer *trainer,
                                         acre_error *error);

/* One step of AdamW with the gradients divided by `divisor` and then, where their norm exceeds
 * `clip` > 0, scaled down to it; clears the gradients. *norm: before clipping. A norm that is
 * not finite changes nothing and is ACRE_BAD_VALUE. */
ACRE_API acre_status acre_trainer_update(acre_trainer *trainer, const acre_adamw *adamw,
                                         double divisor, double clip, double *norm,
                                         acre_error *error);
ACRE_API acre_status acre_trainer_clear(acre_trainer *trainer, acre_error *error);

/* Trainers of several processes, each on a GPU of its own, that add up their gradients on the
 * devices. One of them invites; its id goes to all by the caller's own means, and each joins as
 * another rank of the same world. join and share only begin: call wait until *done, and between
 * them nothing but wait and leave (ACRE_BAD_STATE). ACRE_UNSUPPORTED, with what is missing, where
 * the device knows no peers.
 *
 * wait returns after `seconds` at the latest (0 to 1e6), *done or not: how long a silent peer is
 * waited for is the caller's choice. ACRE_NO_PEER: the peers are left, and after a share the
 * gradients are no sum: clear them. So does leave, which gives up what is under way, takes some
 * seconds where the others do not leave, and does nothing where no peers are; releasing a trainer
 * leaves them, too. */
enum { ACRE_PEERS_ID = 128 }; /* bytes of an id */
ACRE_API acre_status acre_trainer_invite(uint8_t *id, acre_trainer *trainer,
                                         acre_error *error);
ACRE_API acre_status acre_trainer_join(acre_trainer *trainer, int64_t rank, int64_t world,
                                       const uint8_t *id, acre_error *error);
/* The sum over all ranks becomes the gradient of each, with the same bits. */
ACRE_API acre_status acre_trainer_share(acre_trainer *trainer, acre_error *error);
ACRE_API acre_status acre_trainer_wait(bool *done, acre_trainer *trainer, double seconds,
                                       acre_error *error);
ACRE_API acre_status acre_trainer_leave(acre_trainer *trainer, acre_error *error);

#ifdef __cplusplus
}
#endif
#endif /* ACRE_H */
