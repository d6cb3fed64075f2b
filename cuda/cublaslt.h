/* As much of cuBLASLt's interface as is used here, as its documentation gives it: the library
 * is found at run time, and its header is not part of every toolkit. */
#ifndef ACRE_CUDA_CUBLASLT_H
#define ACRE_CUDA_CUBLASLT_H

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

enum { LT_SUCCESS = 0, LT_NOT_SUPPORTED = 15 };         /* cublasStatus_t */
enum { LT_R_32F = 0, LT_R_16BF = 14 };                  /* cudaDataType_t */
enum { LT_COMPUTE_32F = 68 };                           /* cublasComputeType_t */
enum { LT_OP_N = 0, LT_OP_T = 1 };                      /* cublasOperation_t */
enum { LT_EPILOGUE_DEFAULT = 1, LT_EPILOGUE_BIAS = 4 }; /* cublasLtEpilogue_t */
enum {                                                  /* of a product */
       LT_DESC_TRANSA = 3,
       LT_DESC_TRANSB = 4,
       LT_DESC_EPILOGUE = 7,
       LT_DESC_BIAS_POINTER = 8,
};
enum { /* of a preference */
       LT_PREF_MAX_WORKSPACE_BYTES = 1,
       LT_PREF_MIN_ALIGNMENT_A_BYTES = 5,
       LT_PREF_MIN_ALIGNMENT_B_BYTES = 6,
       LT_PREF_MIN_ALIGNMENT_C_BYTES = 7,
       LT_PREF_MIN_ALIGNMENT_D_BYTES = 8,
};

struct lt_algo {
  uint64_t data[8];
};

struct lt_heuristic {
  lt_algo algo;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

typedef struct lt_context *lt_handle;
typedef struct lt_matmul_desc *lt_desc;
typedef struct lt_matrix_layout *lt_layout;
typedef struct lt_matmul_preference *lt_preference;

/* X(result, name, arguments): every entry point that is used. */
#define LT_FUNCTIONS(X)                                                                    \
  X(size_t, cublasLtGetVersion, (void))                                                    \
  X(const char *, cublasLtGetStatusString, (int))                                          \
  X(int, cublasLtCreate, (lt_handle *))                                                    \
  X(int, cublasLtDestroy, (lt_handle))                                                     \
  X(int, cublasLtMatmulDescCreate, (lt_desc *, int compute, int scale))                    \
  X(int, cublasLtMatmulDescDestroy, (lt_desc))                                             \
  X(int, cublasLtMatmulDescSetAttribute, (lt_desc, int, const void *, size_t))             \
  X(int, cublasLtMatrixLayoutCreate,                                                       \
    (lt_layout *, int type, uint64_t rows, uint64_t columns, int64_t step))                \
  X(int, cublasLtMatrixLayoutDestroy, (lt_layout))                                         \
  X(int, cublasLtMatmulPreferenceCreate, (lt_preference *))                                \
  X(int, cublasLtMatmulPreferenceDestroy, (lt_preference))                                 \
  X(int, cublasLtMatmulPreferenceSetAttribute, (lt_preference, int, const void *, size_t)) \
  X(int, cublasLtMatmulAlgoGetHeuristic,                                                   \
    (lt_handle, lt_desc, lt_layout a, lt_layout b, lt_layout c, lt_layout d,               \
     lt_preference, int wanted, lt_heuristic *, int *found))                               \
  X(int, cublasLtMatmul,                                                                   \
    (lt_handle, lt_desc, const void *alpha, const void *a, lt_layout, const void *b,       \
     lt_layout, const void *beta, const void *c, lt_layout, void *d, lt_layout,            \
     const lt_algo *, void *workspace, size_t bytes, cudaStream_t))

#endif
