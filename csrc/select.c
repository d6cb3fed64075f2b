#include "select.h"

#include "platform.h"

#include <stdio.h>

static const int64_t trained_intervals[] = {8, 16, 32, 64, 128};

acre_build_options acre_build_options_default(void) {
  return (acre_build_options){.struct_size = sizeof(acre_build_options),
                              .proxy = ACRE_PROXY_POOLED,
                              .window = 4096,
                              .stride = 2048,
                              .eta = 4096};
}

acre_nested acre_plan_nested(const acre_plan *plan, acre_proxy proxy) {
  return (acre_nested){plan->interval, plan->window, plan->stride,
                       proxy == ACRE_PROXY_TRAINED};
}

int64_t acre_plan_capacity(const acre_plan *plan, acre_proxy proxy) {
  acre_nested nested = acre_plan_nested(plan, proxy);
  return plan->m + plan->carry + acre_nested_longest(&nested, plan->n) + 1;
}

int64_t acre_plan_rows(const acre_plan *plan, acre_proxy proxy, const acre_model *model) {
  acre_nested nested = acre_plan_nested(plan, proxy);
  return acre_min(model->backend->rows_max, acre_nested_longest(&nested, plan->n));
}

int64_t acre_plan_groups(const acre_plan *plan, acre_proxy proxy) {
  acre_nested nested = acre_plan_nested(plan, proxy);
  return acre_nested_longest(&nested, plan->n) / plan->interval + 2;
}

size_t acre_plan_page_bytes(const acre_plan *plan, const acre_model *model) {
  int64_t tokens = plan->windows ? plan->window : 0;
  if (plan->windows > 1) tokens = acre_max(tokens, plan->stride);
  return acre_timeline_bytes(model, tokens, false);
}

/* Positions needed at interval l: while building, and for a question. */
typedef struct need {
  int64_t build, ask;
} need;

static void count_entries(acre_plan *plan, acre_proxy proxy) {
  acre_nested nested = acre_plan_nested(plan, proxy);
  plan->windows = acre_nested_windows(&nested, plan->n);
  plan->l2_tokens = acre_nested_closed(&nested, plan->n);
  plan->m = plan->l2_tokens / plan->interval;
  plan->recent =
      acre_plan_orphans(plan) + acre_nested_length(&nested, plan->l2_tokens, plan->n);
}

static need positions_needed(const acre_plan *plan) {
  int64_t W = acre_max(plan->window, plan->stride), l = plan->interval;
  int64_t refill = acre_min(plan->eta, plan->m * l);
  int64_t build = plan->windows ? plan->m + W + acre_ceil_div(W, l) + plan->carry : 0;
  return (need){build, plan->m + plan->recent + refill + plan->reserve};
}

static bool fits(acre_plan *plan, acre_proxy proxy, int64_t interval, int64_t w_max) {
  plan->interval = interval;
  count_entries(plan, proxy);
  need need = positions_needed(plan);
  return need.build <= w_max && need.ask <= w_max;
}

/* The least interval that fits: a trained one, or failing that any up to n; 0 = none. */
static int64_t interval_that_fits(acre_plan plan, acre_proxy proxy, int64_t w_max) {
  for (int i = 0; i < ACRE_COUNT(trained_intervals); ++i) {
    if (fits(&plan, proxy, trained_intervals[i], w_max)) return trained_intervals[i];
  }
  for (int64_t l = 256; l / 2 < plan.n; l *= 2) {
    if (fits(&plan, proxy, l, w_max)) return l;
  }
  return 0;
}

static acre_status refuse_length(acre_plan *plan, acre_proxy proxy, bool automatic,
                                 int64_t w_max, acre_error *error) {
  int64_t suggestion = interval_that_fits(*plan, proxy, w_max);
  if (automatic) plan->interval = trained_intervals[ACRE_COUNT(trained_intervals) - 1];
  fits(plan, proxy, plan->interval, w_max);
  need need = positions_needed(plan);
  char advice[96] = "no interval fits: use a smaller window, eta or reserve";
  if (suggestion) {
    snprintf(advice, sizeof advice, "interval=%lld would fit", (long long)suggestion);
  }
  return acre_fail(
      error, ACRE_TOO_LONG,
      "text: %lld tokens at interval %lld need %lld positions to build (m=%lld "
      "L1 entries + window %lld) and %lld to ask (m + %lld recent + eta %lld + "
      "reserve %lld), the model has %lld; %s",
      (long long)plan->n, (long long)plan->interval, (long long)need.build,
      (long long)plan->m, (long long)plan->window, (long long)need.ask,
      (long long)plan->recent, (long long)plan->eta, (long long)plan->reserve,
      (long long)w_max, advice);
}

static acre_status check_options(const acre_build_options *o, int64_t n, int64_t w_max,
                                 acre_error *error) {
  const struct {
    const char *name;
    int64_t value, low, high;
  } limits[] = {{"n (tokens)", n, 1, (int64_t)1 << 40},
                {"proxy", (int64_t)o->proxy, ACRE_PROXY_POOLED, ACRE_PROXY_TRAINED},
                {"interval", o->interval, 0, 1 << 24},
                {"window", o->window, 1, 1 << 24},
                {"stride", o->stride, 1, 1 << 24},
                {"carry", o->carry, 0, o->stride},
                {"eta", o->eta, 0, 1 << 26},
                {"reserve", o->reserve, 0, w_max},
                {"weight", o->weight, 0, o->proxy == ACRE_PROXY_POOLED ? 1 << 24 : 1},
                {"sink", o->sink, 0, 1},
                {"l2", (int64_t)o->l2, ACRE_PLACE_AUTO, ACRE_PLACE_HOST}};
  for (int i = 0; i < ACRE_COUNT(limits); ++i) {
    if (limits[i].value < limits[i].low || limits[i].value > limits[i].high) {
      return acre_fail(error, ACRE_BAD_VALUE, "%s: got %lld, expected %lld to %lld",
                       limits[i].name, (long long)limits[i].value, (long long)limits[i].low,
                       (long long)limits[i].high);
    }
  }
  return ACRE_OK;
}

/* ---------------------------------------------------------------- bytes, place of L2 */

static void count_bytes(acre_plan *plan, acre_proxy proxy, const acre_model *model) {
  const acre_backend *backend = model->backend;
  plan->l1_bytes = acre_timeline_bytes(model, plan->m, true);
  plan->recent_bytes = acre_timeline_bytes(model, plan->recent, true);
  plan->l2_bytes = acre_timeline_bytes(model, plan->l2_tokens, false);
  bool host = plan->l2 == ACRE_PLACE_HOST;
  int64_t capacity = acre_plan_capacity(plan, proxy);
  size_t scratch = acre_workspace_bytes(model, acre_plan_rows(plan, proxy, model)) +
                   backend->queue_bytes;
  if (proxy == ACRE_PROXY_TRAINED)
    scratch += (size_t)acre_plan_groups(plan, proxy) * acre_model_row_bytes(model);
  if (plan->weight > 1) scratch += (size_t)(2 * capacity) * sizeof(float);
  if (host) scratch += acre_plan_page_bytes(plan, model) + backend->mover_bytes;
  /* Freezing copies the resident timeline one layer at a time. */
  plan->peak_bytes =
      acre_timeline_bytes(model, capacity, true) + (host ? 0 : plan->l2_bytes) +
      (plan->l1_bytes + plan->recent_bytes) / (size_t)model->config.layers + scratch;
  plan->host_bytes = host ? plan->l2_bytes : 0;
}

/* What a question takes beside the cache: the session's entries, those of the cache with the
 * refilled groups among them, and scratch. */
static size_t question_bytes(const acre_plan *plan, const acre_model *model) {
  int64_t refill = acre_min(plan->eta, plan->m * plan->interval);
  int64_t entries = plan->m + plan->recent + refill + 2 * plan->reserve;
  int64_t rows = acre_min(model->backend->rows_max, plan->reserve);
  return acre_timeline_bytes(model, entries, false) + acre_workspace_bytes(model, rows) +
         model->backend->queue_bytes + model->backend->mover_bytes;
}

/* Auto: on the device where the build fits there, and afterwards the cache with a question,
 * without which it would be of no use. A sixteenth stays free: a device hands memory out in
 * pieces of some megabytes, of which none is ever full. */
static bool fits_device(const acre_plan *plan, const acre_model *model) {
  size_t available = model->backend->ops->available(model->backend);
  size_t asked =
      plan->l1_bytes + plan->l2_bytes + plan->recent_bytes + question_bytes(plan, model);
  size_t need = plan->peak_bytes > asked ? plan->peak_bytes : asked;
  return !available || need <= available - available / 16;
}

static void place_l2(acre_plan *plan, acre_place wanted, acre_proxy proxy,
                     const acre_model *model) {
  bool choice = model->backend->apart; /* else there is one memory */
  plan->l2 = choice && wanted == ACRE_PLACE_HOST ? ACRE_PLACE_HOST : ACRE_PLACE_DEVICE;
  count_bytes(plan, proxy, model);
  if (!choice || wanted != ACRE_PLACE_AUTO || fits_device(plan, model)) return;
  plan->l2 = ACRE_PLACE_HOST;
  count_bytes(plan, proxy, model);
}

acre_status acre_plan_build(acre_plan *out, const acre_model *model,
                            const acre_build_options *given, int64_t n, acre_error *error) {
  acre_build_options o;
  ACRE_TAKE_OPTIONS(o, acre_build_options_default(), given);
  int64_t w_max = model->config.w_max;
  ACRE_TRY(check_options(&o, n, w_max, error));
  acre_plan plan = {.n = n,
                    .interval = o.interval,
                    .window = o.window,
                    .stride = o.stride,
                    .carry = o.carry,
                    .eta = o.eta,
                    .reserve = o.reserve ? o.reserve : acre_min(4096, w_max / 8),
                    .sink = o.sink};
  bool fit = false;
  if (o.interval) {
    fit = fits(&plan, o.proxy, o.interval, w_max);
  } else {
    for (int i = 0; !fit && i < ACRE_COUNT(trained_intervals); ++i) {
      fit = fits(&plan, o.proxy, trained_intervals[i], w_max);
    }
  }
  if (!fit) return refuse_length(&plan, o.proxy, o.interval == 0, w_max, error);
  int64_t pooled = o.proxy == ACRE_PROXY_POOLED ? plan.interval : 1;
  plan.weight = o.weight ? o.weight : pooled;
  place_l2(&plan, o.l2, o.proxy, model);
  *out = plan;
  return ACRE_OK;
}
