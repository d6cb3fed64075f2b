/* Products by cuBLASLt, which is loaded at run time and never linked.
 *
 * The library counts columns first, so a row-major y = x w^T is asked for as y^T = w x^T,
 * with w as its left side. Which of its algorithms runs is asked once per shape and kept:
 * asking costs more than a small product, and the same algorithm gives the same bits. */
#include "cublaslt.h"

#include "gemm.h"
#include "library.h"

struct acre_gemm_library {
  void *handle;
#define MEMBER(result, name, arguments) result(*name) arguments;
  LT_FUNCTIONS(MEMBER)
#undef MEMBER
};

namespace acre {
namespace {

constexpr int KEPT = 64; /* shapes whose algorithm is remembered; a power of two */
constexpr uint32_t ALIGNMENT_MOST = 256;
const char *const NAMES[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

/* What an algorithm is chosen by. Without gaps, to be compared as bytes. */
struct shape {
  int64_t rows, columns, inner, y_step, x_step, w_step;
  uint32_t alignment[4]; /* of w, x, y, bias */
  int32_t dtype, x_turned, w_turned, biased, add, unused;
};

struct remembered {
  shape of;
  lt_algo algo;
  bool known;
};

}  // namespace
}  // namespace acre

struct acre_gemm {
  const acre_gemm_library *library;
  lt_handle handle;
  void *scratch;
  size_t bytes;
  acre::remembered kept[acre::KEPT];
};

namespace acre {

/* ------------------------------------------------------------------ the library */

namespace {

void *find_library(const char *directories) {
  void *found = NULL;
  for (const char *name : NAMES)
    if (!found) found = library_open(directories, name);
  return found;
}

}  // namespace

acre_status gemm_library_open(acre_gemm_library **out, const char *directories,
                              acre_error *error) {
  *out = NULL;
  void *handle = find_library(directories);
  if (!handle)
    return acre_fail(error, ACRE_UNSUPPORTED,
                     "device: cuBLASLt was not found (%s or %s); install it with pip "
                     "install \"acre[cuda]\", or put it where the loader looks",
                     NAMES[0], NAMES[1]);
  acre_gemm_library *library = (acre_gemm_library *)acre_alloc_zero(sizeof *library);
  if (!library) {
    dlclose(handle);
    return acre_fail(error, ACRE_NO_MEMORY, "out of memory for cuBLASLt");
  }
  library->handle = handle;
  const char *missing = NULL;
#define FIND(result, name, arguments) \
  if (!library_find(&library->name, handle, #name)) missing = #name;
  LT_FUNCTIONS(FIND)
#undef FIND
  if (missing) {
    gemm_library_close(library);
    return acre_fail(error, ACRE_UNSUPPORTED, "device: the cuBLASLt found has no %s",
                     missing);
  }
  *out = library;
  return ACRE_OK;
}

/* Its code stays: other users in the process may have it open anyway. */
void gemm_library_close(acre_gemm_library *library) { acre_free(library); }

acre_status gemm_open(acre_gemm **out, const acre_gemm_library *library, void *scratch,
                      size_t bytes, acre_error *error) {
  *out = NULL;
  acre_gemm *gemm = (acre_gemm *)acre_alloc_zero(sizeof *gemm);
  if (!gemm) return acre_fail(error, ACRE_NO_MEMORY, "out of memory for a queue");
  *gemm = acre_gemm{library, NULL, scratch, bytes, {}};
  int status = library->cublasLtCreate(&gemm->handle);
  if (status == LT_SUCCESS) {
    *out = gemm;
    return ACRE_OK;
  }
  acre_free(gemm);
  return acre_fail(error, ACRE_DEVICE, "cublasLtCreate: %s",
                   library->cublasLtGetStatusString(status));
}

void gemm_close(acre_gemm *gemm) {
  if (!gemm) return;
  gemm->library->cublasLtDestroy(gemm->handle);
  acre_free(gemm);
}

/* ------------------------------------------------------------------ one product */

namespace {

/* The descriptions of a product and of its sides, w first; gone at the end of a scope. */
class description {
 public:
  description(const acre_gemm_library *library, const gemm_job &job);
  ~description();
  description(const description &) = delete;

  int status = LT_SUCCESS; /* of what failed first */
  lt_desc product = NULL;
  lt_layout w = NULL, x = NULL, y = NULL;
  lt_preference preference = NULL;

  void also(int next) {
    if (status == LT_SUCCESS) status = next;
  }
  void set(int attribute, const void *value, size_t bytes) {
    if (status == LT_SUCCESS)
      status = library_->cublasLtMatmulDescSetAttribute(product, attribute, value, bytes);
  }
  void prefer(int attribute, const void *value, size_t bytes) {
    if (status == LT_SUCCESS)
      status = library_->cublasLtMatmulPreferenceSetAttribute(preference, attribute, value,
                                                              bytes);
  }

 private:
  const acre_gemm_library *library_;
  /* A side, [rows, inner] row by row, is [inner, rows] column by column. */
  void lay(lt_layout *out, const gemm_side &side, int type, int64_t rows, int64_t inner) {
    uint64_t r = (uint64_t)(side.turned ? rows : inner);
    uint64_t c = (uint64_t)(side.turned ? inner : rows);
    also(library_->cublasLtMatrixLayoutCreate(out, type, r, c, side.step));
  }
};

description::description(const acre_gemm_library *library, const gemm_job &job)
    : library_(library) {
  int type = job.dtype == ACRE_F32 ? LT_R_32F : LT_R_16BF;
  int w_op = job.w.turned ? LT_OP_N : LT_OP_T, x_op = job.x.turned ? LT_OP_T : LT_OP_N;
  int epilogue = job.bias ? LT_EPILOGUE_BIAS : LT_EPILOGUE_DEFAULT;
  also(library->cublasLtMatmulDescCreate(&product, LT_COMPUTE_32F, LT_R_32F));
  set(LT_DESC_TRANSA, &w_op, sizeof w_op);
  set(LT_DESC_TRANSB, &x_op, sizeof x_op);
  set(LT_DESC_EPILOGUE, &epilogue, sizeof epilogue);
  if (job.bias) set(LT_DESC_BIAS_POINTER, &job.bias, sizeof job.bias);
  lay(&w, job.w, type, job.columns, job.inner);
  lay(&x, job.x, type, job.rows, job.inner);
  also(library->cublasLtMatrixLayoutCreate(&y, LT_R_32F, (uint64_t)job.columns,
                                           (uint64_t)job.rows, job.y_step));
}

description::~description() {
  if (preference) library_->cublasLtMatmulPreferenceDestroy(preference);
  lt_layout layouts[] = {w, x, y};
  for (lt_layout layout : layouts)
    if (layout) library_->cublasLtMatrixLayoutDestroy(layout);
  if (product) library_->cublasLtMatmulDescDestroy(product);
}

/* The largest power of two that divides an address and its rows' distance, in bytes. */
uint32_t alignment(const void *data, int64_t step, int64_t size) {
  uint64_t bits = (uint64_t)(uintptr_t)data | (uint64_t)(step * size) | ALIGNMENT_MOST;
  return (uint32_t)(bits & (~bits + 1));
}

shape shape_of(const gemm_job &job) {
  int64_t size = (int64_t)acre_dtype_size(job.dtype);
  shape s = {
      job.rows,
      job.columns,
      job.inner,
      job.y_step,
      job.x.step,
      job.w.step,
      {alignment(job.w.data, job.w.step, size), alignment(job.x.data, job.x.step, size),
       alignment(job.y, job.y_step, sizeof(float)), alignment(job.bias, 0, 1)},
      job.dtype,
      job.x.turned,
      job.w.turned,
      job.bias != NULL,
      job.add,
      0};
  return s;
}

remembered *place_of(acre_gemm *gemm, const shape &s) {
  uint64_t hash = 0;
  const unsigned char *bytes = (const unsigned char *)&s;
  for (size_t i = 0; i < sizeof s; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
  return &gemm->kept[(hash >> 32) & (KEPT - 1)];
}

/* Asks which algorithm to take, within our scratch and these alignments. */
void choose(acre_gemm *gemm, description *d, const shape &s, lt_algo *out) {
  const acre_gemm_library *library = gemm->library;
  uint64_t bytes = gemm->bytes;
  d->also(library->cublasLtMatmulPreferenceCreate(&d->preference));
  d->prefer(LT_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof bytes);
  d->prefer(LT_PREF_MIN_ALIGNMENT_A_BYTES, &s.alignment[0], sizeof s.alignment[0]);
  d->prefer(LT_PREF_MIN_ALIGNMENT_B_BYTES, &s.alignment[1], sizeof s.alignment[0]);
  d->prefer(LT_PREF_MIN_ALIGNMENT_C_BYTES, &s.alignment[2], sizeof s.alignment[0]);
  d->prefer(LT_PREF_MIN_ALIGNMENT_D_BYTES, &s.alignment[2], sizeof s.alignment[0]);
  if (d->status != LT_SUCCESS) return;
  lt_heuristic found;
  int count = 0;
  d->also(library->cublasLtMatmulAlgoGetHeuristic(
      gemm->handle, d->product, d->w, d->x, d->y, d->y, d->preference, 1, &found, &count));
  if (d->status == LT_SUCCESS && count < 1) d->status = LT_NOT_SUPPORTED;
  if (d->status == LT_SUCCESS) *out = found.algo;
}

}  // namespace

void gemm(acre_queue *queue, const gemm_job &job) {
  if (job.rows <= 0 || job.columns <= 0 || job.inner <= 0 || queue->failure.failed) return;
  on_device scope(queue->owner->ordinal);
  acre_gemm *own = queue->gemm;
  description d(own->library, job);
  shape s = shape_of(job);
  remembered *place = place_of(own, s);
  if (!place->known || memcmp(&place->of, &s, sizeof s) != 0) {
    place->known = false;
    choose(own, &d, s, &place->algo);
    place->of = s, place->known = d.status == LT_SUCCESS;
  }
  float one = 1.0f, beta = job.add ? 1.0f : 0.0f;
  if (d.status == LT_SUCCESS)
    d.status = own->library->cublasLtMatmul(
        own->handle, d.product, &one, job.w.data, d.w, job.x.data, d.x, &beta, job.y, d.y,
        job.y, d.y, &place->algo, own->scratch, own->bytes, queue->stream);
  if (d.status == LT_SUCCESS) return;
  char call[160];
  snprintf(call, sizeof call, "cublasLtMatmul of [%lld, %lld] by [%lld, %lld]: %s",
           (long long)job.rows, (long long)job.inner, (long long)job.columns,
           (long long)job.inner, own->library->cublasLtGetStatusString(d.status));
  check(&queue->failure, cudaErrorLaunchFailure, site{call, __FILE__, __LINE__});
}

}  // namespace acre
