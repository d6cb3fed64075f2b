/* Sums over devices: processes that meet, add up and part, with NCCL as the host stands in for
 * it (cuda/host/nccl.cpp); peers that die, never come or are found to have failed; libraries
 * that are missing, old or lack something; and trainers that share their gradients. */
#include "backend.h"
#include "host.h"
#include "platform.h"
#include "plugin.h"
#include "tiny.h"

#include <dlfcn.h>
#include <math.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WORLD = 3, MANY = 5000, FAILED = 100 }; /* MANY: some pieces, and a rest */

#define LIBRARY ACRE_TEST_CUDA "/nccl/libnccl.so.2"
#define FOUND ACRE_TEST_CUDA ":" ACRE_TEST_CUDA "/nccl"

/* What the processes of a test know together. */
typedef struct common {
  uint8_t id[ACRE_PEERS_ID];
  atomic_int invited, trained; /* the latter: ranks */
  float vectors[WORLD][1 << 16];
} common;

static common *shared;

/* ---------------------------------------------------------------- processes */

/* Runs work(rank) in a process each; FAILED in the status of one where a check did not hold. */
static void together(int world, void (*work)(int rank), int signal_of_last) {
  pid_t children[WORLD];
  memset(shared, 0, sizeof *shared);
  fflush(stdout);
  for (int rank = 0; rank < world; rank++) {
    children[rank] = fork();
    if (children[rank] != 0) continue;
    alarm(120);       /* nothing here may hang */
    check_failed = 0; /* of the tests before, which have told it */
    work(rank);
    _exit(check_failed ? FAILED : 0);
  }
  for (int rank = 0; rank < world; rank++) {
    int status = -1;
    CHECK(waitpid(children[rank], &status, 0) == children[rank]);
    if (signal_of_last && rank == world - 1)
      CHECK(WIFSIGNALED(status) && WTERMSIG(status) == signal_of_last);
    else
      CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

/* A counter of the library that the backend has loaded. */
static int count_of(const char *name) {
  void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_NOLOAD);
  const int *count = library ? dlsym(library, name) : NULL;
  int found = count ? *count : -1;
  if (library) dlclose(library);
  return found;
}

static void parted(int aborted) {
  CHECK(count_of("acre_host_nccl_live") == 0);
  CHECK(count_of("acre_host_nccl_aborted") == aborted);
}

/* ---------------------------------------------------------------- operations */

typedef struct device {
  acre_backend *backend;
  acre_queue *queue;
  const acre_backend_ops *ops;
  acre_buffer *x;
} device;

static acre_status open_backend(acre_backend **out, const char *libraries,
                                acre_error *error) {
  acre_cuda_options options = {sizeof options, libraries, 0, 0};
  return acre_cuda_backend_open(out, 0, &options, error);
}

static device open_device(void) {
  device d = {0};
  acre_error error = {0};
  CHECK(open_backend(&d.backend, FOUND, &error) == ACRE_OK);
  if (!d.backend) _exit(FAILED);
  d.ops = d.backend->ops;
  CHECK(d.ops->queue_open(d.backend, &d.queue, &error) == ACRE_OK);
  CHECK(d.ops->alloc(d.backend, &d.x, MANY * sizeof(float), &error) == ACRE_OK);
  return d;
}

/* The device is as good as before. */
static void close_device(device *d) {
  float out = 0, in = 7;
  acre_error error = {0};
  d->ops->upload(d->queue, acre_buffer_data(d->x), &in, sizeof in);
  d->ops->download(d->queue, &out, acre_buffer_data(d->x), sizeof out);
  CHECK(d->ops->sync(d->queue, &error) == ACRE_OK && out == in);
  acre_buffer_release(d->x);
  d->ops->queue_close(d->queue);
  d->ops->destroy(d->backend);
  CHECK(acre_alloc_live() == 0);
}

static void carry_id(const device *d, int rank) {
  acre_error error = {0};
  if (rank == 0) {
    CHECK(d->ops->peers_invite(d->backend, shared->id, &error) == ACRE_OK);
    atomic_store(&shared->invited, 1);
  }
  while (!atomic_load(&shared->invited)) acre_sleep(1e-3);
}

static acre_peers *begin(const device *d, int rank, int world) {
  acre_peers *peers = NULL;
  acre_error error = {0};
  carry_id(d, rank);
  CHECK(d->ops->peers_open(d->queue, &peers, rank, world, shared->id, &error) == ACRE_OK);
  if (error.message[0]) fprintf(stderr, "  %s\n", error.message);
  if (!peers) _exit(FAILED);
  return peers;
}

static acre_peers *meet(const device *d, int rank, int world) {
  acre_peers *peers = begin(d, rank, world);
  bool done = false;
  CHECK(d->ops->peers_wait(peers, &done, 60, NULL) == ACRE_OK && done);
  return peers;
}

static float number(int rank, int i, int again) {
  uint64_t state = (uint64_t)(rank * MANY + i) * 7 + (uint64_t)again;
  return random_float(&state) * powf(10.0f, (float)(i % 7 - 3));
}

static void sum_some(const device *d, acre_peers *peers, int rank, int n, int again) {
  static float x[MANY];
  bool done = false, right = true;
  for (int i = 0; i < n; i++) x[i] = number(rank, i, again);
  d->ops->upload(d->queue, acre_buffer_data(d->x), x, (size_t)n * sizeof *x);
  d->ops->peers_sum(peers, acre_buffer_data(d->x), n);
  CHECK(d->ops->peers_wait(peers, &done, 60, NULL) == ACRE_OK && done);
  d->ops->download(d->queue, x, acre_buffer_data(d->x), (size_t)n * sizeof *x);
  for (int i = 0; i < n; i++) {
    float sum = number(0, i, again);
    for (int other = 1; other < WORLD; other++) sum += number(other, i, again);
    right &= x[i] == sum;
  }
  CHECK(right);
}

static void sums(int rank) {
  static const int sizes[] = {1, 1000, MANY, 1024, 3};
  device d = open_device();
  acre_peers *peers = meet(&d, rank, WORLD);
  for (int i = 0; i < 5; i++) sum_some(&d, peers, rank, sizes[i], i);
  d.ops->peers_close(peers); /* the others' goodbyes are waited for */
  parted(0);
  close_device(&d);
}

/* ---------------------------------------------------------------- what goes wrong */

/* The last rank is killed when all have met. */
static void dies(int rank) {
  device d = open_device();
  acre_peers *peers = meet(&d, rank, WORLD);
  bool done = true;
  if (rank == WORLD - 1) raise(SIGKILL);
  d.ops->peers_sum(peers, acre_buffer_data(d.x), MANY);
  CHECK(d.ops->peers_wait(peers, &done, 0.2, NULL) == ACRE_OK && !done);
  d.ops->peers_close(peers);
  CHECK(count_of("acre_host_nccl_parting") == 0); /* there is nobody to wait for */
  parted(1);
  close_device(&d);
}

/* All have met and all but one have parted: that takes a while, and ends. */
static void parts_alone(int rank) {
  device d = open_device();
  acre_peers *peers = meet(&d, rank, 2);
  if (rank == 1) raise(SIGKILL);
  double began = acre_clock();
  d.ops->peers_close(peers);
  CHECK(acre_clock() - began < 30 && count_of("acre_host_nccl_parting") == 1);
  parted(1);
  close_device(&d);
}

static void nobody_comes(int rank) {
  device d = open_device();
  acre_peers *peers = begin(&d, rank, 2);
  bool done = true;
  CHECK(d.ops->peers_wait(peers, &done, 0.05, NULL) == ACRE_OK && !done);
  d.ops->peers_close(peers);
  parted(1);
  close_device(&d);
}

static void twice_the_same(int rank) {
  device d = open_device();
  acre_peers *peers = begin(&d, rank, 2), *same = NULL;
  acre_error error = {0};
  CHECK(d.ops->peers_open(d.queue, &same, rank, 2, shared->id, &error) == ACRE_NO_PEER);
  CHECK(!same && strstr(error.message, "ncclCommInitRankConfig: invalid argument: as the"));
  d.ops->peers_close(peers);
  memset(shared->id, 'x', sizeof shared->id);
  CHECK(d.ops->peers_open(d.queue, &same, rank, 2, shared->id, &error) == ACRE_NO_PEER);
  parted(1);
  close_device(&d);
}

/* The library knows it by the time that its first call returns: what it left is given up. */
static void fails_at_once(int rank) {
  device d = open_device();
  acre_peers *peers = NULL;
  acre_error error = {0};
  carry_id(&d, rank);
  setenv("ACRE_HOST_NCCL_FAULT", "1", 1);
  CHECK(d.ops->peers_open(d.queue, &peers, rank, 2, shared->id, &error) == ACRE_NO_PEER);
  CHECK(!peers && strstr(error.message, "ncclCommInitRankConfig: remote process exited"));
  unsetenv("ACRE_HOST_NCCL_FAULT");
  parted(1);
  close_device(&d);
}

/* The library finds it out by itself, when all meet or in a sum. */
static void found_to_have_failed(int rank) {
  device d = open_device();
  for (int met = 0; met < 2; met++) {
    acre_error error = {0};
    bool done = true;
    acre_peers *peers = met ? meet(&d, rank, 1) : begin(&d, rank, 1);
    if (met) d.ops->peers_sum(peers, acre_buffer_data(d.x), 10);
    setenv("ACRE_HOST_NCCL_FAULT", "1", 1);
    CHECK(d.ops->peers_wait(peers, &done, 60, &error) == ACRE_NO_PEER && !done);
    CHECK(strstr(error.message, met ? "ncclAllReduce: remote process exited"
                                    : "ncclCommInitRankConfig: remote process exited"));
    unsetenv("ACRE_HOST_NCCL_FAULT");
    d.ops->peers_close(peers);
    parted(met + 1);
  }
  close_device(&d);
}

/* What the library refuses at once is told by the wait, too. */
static void refused_at_once(int rank) {
  device d = open_device();
  acre_peers *peers = meet(&d, rank, 1);
  acre_error error = {0};
  bool done = true;
  d.ops->peers_sum(peers, acre_buffer_data(d.x), 10);
  d.ops->peers_sum(peers, acre_buffer_data(d.x), 10); /* before the wait */
  CHECK(d.ops->peers_wait(peers, &done, 60, &error) == ACRE_NO_PEER && !done);
  CHECK(strstr(error.message, "NCCL, ncclAllReduce: invalid argument: as the host"));
  d.ops->peers_close(peers);
  parted(1);
  close_device(&d);
}

/* The device fails while a sum is waited for: its own error, and the queue keeps it. */
static void device_fails(int rank) {
  device d = open_device();
  acre_peers *peers = meet(&d, rank, 1);
  acre_error error = {0};
  bool done = true;
  d.ops->peers_sum(peers, acre_buffer_data(d.x), 10);
  acre_host_fail(700, 1);
  CHECK(d.ops->peers_wait(peers, &done, 60, &error) == ACRE_DEVICE && !done);
  acre_host_fail(0, 0);
  CHECK(strstr(error.message, "cudaStreamQuery") &&
        strstr(error.message, "cudaErrorIllegalAddress"));
  CHECK(d.ops->sync(d.queue, &error) == ACRE_DEVICE);
  d.ops->peers_close(peers);
  parted(1);
  acre_buffer_release(d.x);
  d.ops->queue_close(d.queue), d.ops->destroy(d.backend);
  CHECK(acre_alloc_live() == 0);
}

/* Every allocation fails once. */
static void memory_runs_out(int rank) {
  bool done = false;
  for (int64_t n = 1; !done && n < 100; n++) {
    acre_backend *b = NULL;
    acre_queue *queue = NULL;
    acre_peers *peers = NULL;
    acre_error error = {0};
    acre_alloc_fail_at(n);
    acre_status status = open_backend(&b, FOUND, &error);
    if (status == ACRE_OK) status = b->ops->queue_open(b, &queue, &error);
    if (status == ACRE_OK) status = b->ops->peers_invite(b, shared->id, &error);
    if (status == ACRE_OK)
      status = b->ops->peers_open(queue, &peers, rank, 1, shared->id, &error);
    acre_alloc_fail_at(0);
    done = status == ACRE_OK;
    CHECK(done || error.status == ACRE_NO_MEMORY);
    if (peers) b->ops->peers_close(peers);
    unlink((const char *)shared->id); /* where nobody came to meet */
    if (queue) b->ops->queue_close(queue);
    if (b) b->ops->destroy(b);
    CHECK(acre_alloc_live() == 0);
  }
  CHECK(done);
}

/* ---------------------------------------------------------------- libraries */

static void refused(const char *libraries, const char *version, const char *words) {
  acre_backend *b = NULL;
  acre_error error = {0};
  uint8_t id[ACRE_PEERS_ID];
  if (version) setenv("ACRE_HOST_NCCL_VERSION", version, 1);
  CHECK(open_backend(&b, libraries, &error) == ACRE_OK);
  if (!b) return;
  for (int again = 0; again < 2; again++) {
    CHECK(b->ops->peers_invite(b, id, &error) == ACRE_UNSUPPORTED);
    CHECK(strstr(error.message, words) != NULL);
    if (!strstr(error.message, words)) fprintf(stderr, "  %s\n", error.message);
  }
  b->ops->destroy(b);
  unsetenv("ACRE_HOST_NCCL_VERSION");
  CHECK(acre_alloc_live() == 0);
}

static void test_libraries(void) {
  void *installed = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
  if (!installed) refused(ACRE_TEST_CUDA, NULL, "pip install \"acre[nccl]\"");
  if (installed) dlclose(installed);
  refused(ACRE_TEST_CUDA ":" ACRE_TEST_CUDA "/lacking", NULL, "has no ncclCommFinalize");
  refused(FOUND, "2804", "of version 2.8, expected 2.14");
  refused(FOUND, "21300", "of version 2.13, expected 2.14");
  refused(FOUND, "30100", "of version 3.1, expected 2.14 or a later 2");
}

/* ---------------------------------------------------------------- trainers */

static acre_trainer *open_trainer(const char *device, acre_model **model,
                                  acre_engine **engine) {
  acre_engine_options options = acre_engine_options_default();
  acre_trainer *trainer = NULL;
  acre_error error = {0};
  options.device = device, options.threads = 1;
  options.plugin = ACRE_TEST_CUDA "/cuda_host.so";
  options.libraries = FOUND;
  acre_status status = acre_engine_open(engine, &options, &error);
  *model = status == ACRE_OK ? tiny_model(*engine, ACRE_F32, false, &error) : NULL;
  if (*model) status = acre_trainer_open(&trainer, *model, &error);
  CHECK(trainer != NULL);
  if (trainer) return trainer;
  fprintf(stderr, "  %s\n", error.message);
  _exit(FAILED);
}

/* A text of this rank's own, to its gradients. */
static void learn(acre_trainer *trainer, int rank, float *gradients) {
  static const int64_t intervals[2] = {4, 2};
  int32_t ids[40];
  int64_t done = 0, total = 1;
  acre_error error = {0};
  acre_example example = acre_example_default();
  tiny_ids(ids, 40, 5 + (uint64_t)rank);
  example.ids = ids, example.n = 40;
  example.window = 24, example.stride = 16;
  example.intervals = intervals, example.windows = 2;
  CHECK(acre_trainer_begin(trainer, &example, true, &error) == ACRE_OK);
  while (done < total)
    if (acre_trainer_step(trainer, &done, &total, &error) != ACRE_OK) _exit(FAILED);
  CHECK(acre_trainer_read(gradients, trainer, ACRE_GRADIENTS, &error) == ACRE_OK);
}

static void join(acre_trainer *trainer, int rank) {
  acre_error error = {0};
  float one;
  bool done = false;
  if (rank == 0) {
    CHECK(acre_trainer_invite(shared->id, trainer, &error) == ACRE_OK);
    atomic_store(&shared->invited, 1);
  }
  while (!atomic_load(&shared->invited)) acre_sleep(1e-3);
  CHECK(acre_trainer_wait(&done, trainer, 1, &error) == ACRE_BAD_STATE);
  CHECK(acre_trainer_share(trainer, &error) == ACRE_BAD_STATE);
  CHECK(acre_trainer_join(trainer, rank, 2, shared->id, &error) == ACRE_OK);
  CHECK(acre_trainer_read(&one, trainer, ACRE_GRADIENTS, &error) == ACRE_BAD_STATE);
  CHECK(acre_trainer_share(trainer, &error) == ACRE_BAD_STATE);
  CHECK(acre_trainer_wait(&done, trainer, 60, &error) == ACRE_OK && done);
  CHECK(acre_trainer_join(trainer, rank, 2, shared->id, &error) == ACRE_BAD_STATE);
}

/* Two sums with an update between, which is the same on both; then alone again. */
static void trainers(int rank) {
  acre_model *model;
  acre_engine *engine = NULL;
  acre_trainer *trainer = open_trainer("cuda", &model, &engine);
  int64_t size = acre_trainer_size(trainer);
  float *sum = calloc((size_t)size, sizeof *sum);
  acre_adamw adamw = acre_adamw_default();
  acre_error error = {0};
  bool done = false;
  double norm;
  CHECK(size <= (int64_t)(sizeof shared->vectors[0] / sizeof(float)));
  join(trainer, rank);
  for (int step = 1; step <= 2; step++) {
    learn(trainer, rank, shared->vectors[rank]);
    CHECK(acre_trainer_share(trainer, &error) == ACRE_OK);
    CHECK(acre_trainer_clear(trainer, &error) == ACRE_BAD_STATE);
    CHECK(acre_trainer_wait(&done, trainer, 60, &error) == ACRE_OK && done);
    CHECK(acre_trainer_read(sum, trainer, ACRE_GRADIENTS, &error) == ACRE_OK);
    bool right = true, moved = false;
    for (int64_t i = 0; i < size; i++) {
      right &= sum[i] == shared->vectors[0][i] + shared->vectors[1][i];
      moved |= sum[i] != shared->vectors[rank][i];
    }
    CHECK(right && moved);
    adamw.step = step, adamw.lr = 0.01;
    CHECK(acre_trainer_update(trainer, &adamw, 70, 1.0, &norm, &error) == ACRE_OK);
    atomic_fetch_add(&shared->trained, 1); /* both have read what both wrote */
    while (atomic_load(&shared->trained) < 2 * step) acre_sleep(1e-3);
  }
  CHECK(acre_trainer_leave(trainer, &error) == ACRE_OK);
  CHECK(acre_trainer_leave(trainer, &error) == ACRE_OK);
  parted(0);
  CHECK(acre_trainer_share(trainer, &error) == ACRE_BAD_STATE);
  acre_trainer_release(trainer), acre_model_release(model), acre_engine_release(engine);
  free(sum);
}

/* A peer dies in a sum: what is under way is given up, and training can go on alone. */
static void trainer_left_alone(int rank) {
  acre_model *model;
  acre_engine *engine = NULL;
  acre_trainer *trainer = open_trainer("cuda", &model, &engine);
  acre_error error = {0};
  bool done = true, clear = true;
  join(trainer, rank);
  if (rank == 1) raise(SIGKILL);
  learn(trainer, rank, shared->vectors[0]);
  CHECK(acre_trainer_share(trainer, &error) == ACRE_OK);
  CHECK(acre_trainer_wait(&done, trainer, 0.1, &error) == ACRE_OK && !done);
  CHECK(acre_trainer_wait(&done, trainer, 0, &error) == ACRE_OK && !done);
  CHECK(acre_trainer_leave(trainer, &error) == ACRE_OK);
  parted(1);
  CHECK(acre_trainer_clear(trainer, &error) == ACRE_OK);
  CHECK(acre_trainer_read(shared->vectors[1], trainer, ACRE_GRADIENTS, &error) == ACRE_OK);
  for (int64_t i = 0; i < acre_trainer_size(trainer); i++)
    clear &= shared->vectors[1][i] == 0.0f;
  CHECK(clear);
  learn(trainer, rank, shared->vectors[1]);
  CHECK(memcmp(shared->vectors[0], shared->vectors[1],
               (size_t)acre_trainer_size(trainer) * sizeof(float)) == 0);
  acre_trainer_release(trainer), acre_model_release(model), acre_engine_release(engine);
}

/* The library's refusal comes through wait, and leaves the peers. */
static void trainer_told(int rank) {
  acre_model *model;
  acre_engine *engine = NULL;
  acre_trainer *trainer = open_trainer("cuda", &model, &engine);
  acre_error error = {0};
  bool done = true;
  join(trainer, rank);
  CHECK(acre_trainer_share(trainer, &error) == ACRE_OK);
  setenv("ACRE_HOST_NCCL_FAULT", "1", 1);
  CHECK(acre_trainer_wait(&done, trainer, 60, &error) == ACRE_NO_PEER && !done);
  CHECK(error.status == ACRE_NO_PEER && strstr(error.message, "ncclAllReduce"));
  CHECK(acre_trainer_wait(&done, trainer, 1, &error) == ACRE_BAD_STATE);
  parted(1);
  acre_trainer_release(trainer), acre_model_release(model), acre_engine_release(engine);
}

static void test_arguments(void) {
  acre_model *model;
  acre_engine *engine = NULL;
  acre_error error = {0};
  uint8_t id[ACRE_PEERS_ID] = {0};
  bool done;
  acre_trainer *trainer = open_trainer("cpu", &model, &engine);
  CHECK(acre_trainer_invite(id, trainer, &error) == ACRE_UNSUPPORTED);
  CHECK(strstr(error.message, "'cpu' has no sums over processes"));
  CHECK(acre_trainer_join(trainer, 0, 1, id, &error) == ACRE_UNSUPPORTED);
  CHECK(acre_trainer_share(trainer, &error) == ACRE_BAD_STATE);
  CHECK(acre_trainer_join(trainer, 2, 2, id, &error) == ACRE_BAD_VALUE);
  CHECK(strstr(error.message, "rank: got 2, expected 0 to 1"));
  CHECK(acre_trainer_join(trainer, -1, 2, id, &error) == ACRE_BAD_VALUE);
  CHECK(acre_trainer_join(trainer, 0, 0, id, &error) == ACRE_BAD_VALUE);
  CHECK(acre_trainer_join(trainer, 0, (int64_t)1 << 31, id, &error) == ACRE_BAD_VALUE);
  CHECK(acre_trainer_wait(&done, trainer, -1, &error) == ACRE_BAD_VALUE);
  CHECK(acre_trainer_wait(&done, trainer, NAN, &error) == ACRE_BAD_VALUE);
  CHECK(strstr(error.message, "seconds: got"));
  CHECK(acre_trainer_leave(trainer, &error) == ACRE_OK);
  CHECK(strcmp(acre_status_name(ACRE_NO_PEER), "no peer") == 0);
  acre_trainer_release(trainer), acre_model_release(model), acre_engine_release(engine);
}

int main(void) {
  shared =
      mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 1;
#ifndef __SANITIZE_ADDRESS__ /* which sees more of memory that it gave itself */
  setenv("ACRE_HOST_APART", "1", 1);
#endif
  together(WORLD, sums, 0);
  together(WORLD, dies, SIGKILL);
  together(2, parts_alone, SIGKILL);
  together(1, nobody_comes, 0);
  together(1, twice_the_same, 0);
  together(1, fails_at_once, 0);
  together(1, found_to_have_failed, 0);
  together(1, refused_at_once, 0);
  together(1, device_fails, 0);
  together(1, memory_runs_out, 0);
  together(2, trainers, 0);
  together(2, trainer_left_alone, SIGKILL);
  together(2, trainer_told, 0);
  test_libraries();
  test_arguments();
  return check_report();
}
